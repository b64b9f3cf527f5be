"""The words of the API. `tests/test_openapi.py` holds them against `openapi/zeroboot.json`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional, TypedDict, Union

Language = Literal["python", "node", "javascript", "bash", "typescript"]
Isolation = Literal["vm", "process"]
Outcome = Literal[
    "exited",
    "signaled",
    "deadline_passed",
    "cpu_limit",
    "output_limit",
    "out_of_memory",
    "crashed",
]

#: What goes into a sandbox: text or exact bytes.
Data = Union[str, bytes]


@dataclass(frozen=True)
class InputFile:
    """A file with more than its content."""

    data: Data
    executable: bool = False


#: A file for a sandbox: its content, or the path of a local file to send.
FileData = Union[str, bytes, "os.PathLike[str]", InputFile]


class Limits(TypedDict, total=False):
    """Limits of one exec; each may only lower what the server allows."""

    memory_mb: int
    processes: int
    output_bytes: int
    file_size_mb: int
    open_files: int
    cpu_seconds: float


@dataclass(frozen=True)
class Exec:
    """One exec of a batch. What is None is left to the batch's own arguments, then the server."""

    code: str
    language: Optional[Language] = None
    template: Optional[str] = None
    timeout: Optional[float] = None
    stdin: Optional[Data] = None
    env: Optional[Mapping[str, str]] = None
    args: Optional[Sequence[str]] = None
    files: Optional[Mapping[str, FileData]] = None
    output_files: Optional[Sequence[str]] = None
    limits: Optional[Limits] = None


HealthStatus = Literal["ok", "degraded", "unavailable", "warming", "shutting_down"]


class TemplateHealth(TypedDict, total=False):
    """One template. `ready` means that a canary exec just passed."""

    ready: bool
    reason: str
    language: str
    engine: Isolation
    isolation: Isolation
    version: str
    warmed: list[str]
    numpy: bool
    memory_mb: float
    pool_ready: int
    pool_target: int
    forks: int
    restarts: int
    #: Of this template that live.
    sandboxes: int
    canary_age_seconds: float


@dataclass(frozen=True)
class Health:
    """What `GET /v1/health` says. `raw` is the whole answer."""

    status: HealthStatus
    templates: Mapping[str, TemplateHealth]
    #: Why it is not `ok`.
    reasons: Sequence[str]
    #: What is weaker on this server than it could be; for callers with a key.
    warnings: Sequence[str]
    #: Sandboxes that serve a request now.
    live: int
    uptime_seconds: int
    #: The server's version.
    version: str
    raw: Mapping[str, Any]

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def ready(self) -> bool:
        """Whether something can run: `ok` or `degraded`."""
        return self.status in ("ok", "degraded")
