"""Data about a long-lived sandbox: its runs, contexts, commands, files and events.

`tests/test_openapi.py` holds the words against `openapi/zeroboot.json`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal, Optional, TypedDict, Union

from ._errors import CellFailed, CommandFailed, ServerError
from ._events import Stderr, Stdout
from ._result import stream_of, unbase64
from ._types import Isolation

#: The last five: the interpreter itself ended (`context_lost`).
CellOutcome = Literal[
    "ok",
    "error",
    "interrupted",
    "exited",
    "signaled",
    "deadline_passed",
    "out_of_memory",
    "closed",
]
CommandOutcome = Literal["exited", "signaled", "deadline_passed", "out_of_memory", "closed"]
EntryKind = Literal["file", "directory", "link", "other"]
ChangeKind = Literal["created", "modified", "removed", "overflow"]
EndReason = Literal[
    "lease_ended", "idle", "requested", "lost", "out_of_memory", "shutting_down", "replaced"
]


#: The server sends JSON of more characters as text.
LONG_JSON = 1024 * 1024


class SandboxLimits(TypedDict, total=False):
    """Limits of a long-lived sandbox; each may only lower what the server allows."""

    memory_mb: int
    processes: int
    file_size_mb: int
    open_files: int


@dataclass(frozen=True)
class SandboxInfo:
    """A sandbox, as the server described it when it was asked."""

    id: str
    template: str
    language: str
    isolation: Isolation
    state: str
    created_at: datetime
    #: The end of its lease.
    expires_at: datetime
    #: Seconds without any use after which it ends, or None.
    idle_timeout: Optional[float]
    metadata: Mapping[str, str]
    limits: Mapping[str, Any]
    pooled: bool
    fork_time_ms: float
    #: Runs that have not ended.
    runs: int
    #: The id of the sandbox that it is a branch of, or None.
    branch_of: Optional[str]
    #: The id of the last checkpoint that was made of it, or that it began at, or None.
    checkpoint_id: Optional[str]
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> SandboxInfo:
        try:
            return cls(
                id=raw["id"],
                template=raw["template"],
                language=raw["language"],
                isolation=raw["isolation"],
                state=raw["state"],
                created_at=moment(raw["created_at"]),
                expires_at=moment(raw["expires_at"]),
                idle_timeout=raw.get("idle_timeout_seconds"),
                metadata=raw.get("metadata") or {},
                limits=raw.get("limits") or {},
                pooled=raw.get("pooled", False),
                fork_time_ms=raw.get("fork_time_ms") or 0.0,
                runs=raw.get("runs", 0),
                branch_of=raw.get("branch_of"),
                checkpoint_id=raw.get("checkpoint_id"),
                raw=raw,
            )
        except KeyError as e:
            raise _missing("the sandbox", e) from None


@dataclass(frozen=True)
class Checkpoint:
    """A moment of a sandbox that the server keeps."""

    id: str
    #: The sandbox that it is of.
    sandbox_id: str
    #: The checkpoint that its sandbox had come from, or None: checkpoints are trees.
    parent_id: Optional[str]
    template: str
    created_at: datetime
    #: When the server removes it.
    expires_at: datetime
    metadata: Mapping[str, str]
    #: Memory that it adds to what its sandbox was forked from.
    memory_bytes: int
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Checkpoint:
        try:
            return cls(
                id=raw["id"],
                sandbox_id=raw["sandbox_id"],
                parent_id=raw.get("parent_id"),
                template=raw["template"],
                created_at=moment(raw["created_at"]),
                expires_at=moment(raw["expires_at"]),
                metadata=raw.get("metadata") or {},
                memory_bytes=raw["memory_bytes"],
                raw=raw,
            )
        except KeyError as e:
            raise _missing("the checkpoint", e) from None


# --- cells ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RichResult:
    """Something that a cell showed, in every form that it has: a MIME bundle.

    Each property is None where there is no such form. Pictures and documents are bytes.
    """

    #: MIME type to text (to base64 where it is not text), as it came.
    data: Mapping[str, Any]
    #: It is the value of the cell's last expression, and not something that the cell displayed.
    is_main: bool = False
    type: Literal["result"] = "result"

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> RichResult:
        data = {name: value for name, value in raw.items() if "/" in name}
        return cls(data, bool(raw.get("is_main", False)))

    @property
    def formats(self) -> list[str]:
        """The MIME types that there are."""
        return list(self.data)

    @property
    def text(self) -> Optional[str]:
        return self._text("text/plain")

    @property
    def html(self) -> Optional[str]:
        return self._text("text/html")

    @property
    def markdown(self) -> Optional[str]:
        return self._text("text/markdown")

    @property
    def latex(self) -> Optional[str]:
        return self._text("text/latex")

    @property
    def svg(self) -> Optional[str]:
        return self._text("image/svg+xml")

    @property
    def javascript(self) -> Optional[str]:
        return self._text("application/javascript")

    @property
    def png(self) -> Optional[bytes]:
        return self._bytes("image/png")

    @property
    def jpeg(self) -> Optional[bytes]:
        return self._bytes("image/jpeg")

    @property
    def pdf(self) -> Optional[bytes]:
        return self._bytes("application/pdf")

    @property
    def json(self) -> Any:
        """The value of `application/json`."""
        value = self.data.get("application/json")
        if isinstance(value, str) and len(value) > LONG_JSON:
            return json.loads(value)
        return value

    def __str__(self) -> str:
        return self.text or ""

    def _text(self, mime: str) -> Optional[str]:
        value = self.data.get(mime)
        return None if value is None else str(value)

    def _bytes(self, mime: str) -> Optional[bytes]:
        value = self.data.get(mime)
        return None if value is None else unbase64(value)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """For a notebook that shows this result: the same MIME bundle."""
        return dict(self.data)


@dataclass(frozen=True)
class CellError:
    """The error that a cell did not catch. Its context goes on."""

    name: str
    value: str
    #: As the language prints it, without frames of the sandbox's own.
    traceback: str
    type: Literal["error"] = "error"

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> CellError:
        traceback = raw.get("traceback", "")
        if isinstance(traceback, list):
            traceback = "\n".join(traceback)
        return cls(str(raw.get("name", "")), str(raw.get("value", "")), traceback)

    def __str__(self) -> str:
        return f"{self.name}: {self.value}" if self.value else self.name


@dataclass(frozen=True)
class CellResult:
    """What a cell wrote and showed, and how it ended."""

    id: str
    context: str
    #: Its number in its context; the first is 1.
    execution_count: int
    outcome: CellOutcome
    #: `text/plain` of the last expression's value, or None.
    value: Optional[str]
    results: list[RichResult]
    error: Optional[CellError]
    stdout: str
    stderr: str
    #: The streams as bytes, exact even where they are not UTF-8.
    stdout_bytes: bytes = field(repr=False)
    stderr_bytes: bytes = field(repr=False)
    #: There was more output than one answer brings.
    truncated: bool
    #: The context's interpreter is gone, and its state with it; the next run has a new one.
    context_lost: bool
    wall_time_ms: float
    request_id: Optional[str] = field(repr=False)
    #: The answer as it came, with whatever a newer server added.
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, raw: Mapping[str, Any], request_id: Optional[str]) -> CellResult:
        encoding = raw.get("encoding") or {}
        stdout_bytes, stdout = stream_of(raw, "stdout", encoding)
        stderr_bytes, stderr = stream_of(raw, "stderr", encoding)
        results = [RichResult.of(item) for item in raw.get("results") or []]
        main = next((item for item in results if item.is_main), None)
        try:
            return cls(
                id=raw.get("id", ""),
                context=raw.get("context", ""),
                execution_count=raw.get("execution_count") or 0,
                outcome=raw["outcome"],
                value=raw.get("value", None if main is None else main.text),
                results=results,
                error=CellError.of(raw["error"]) if raw.get("error") else None,
                stdout=stdout,
                stderr=stderr,
                stdout_bytes=stdout_bytes,
                stderr_bytes=stderr_bytes,
                truncated=raw.get("truncated", False),
                context_lost=raw.get("context_lost", False),
                wall_time_ms=raw.get("wall_time_ms", 0.0),
                request_id=request_id,
                raw=raw,
            )
        except KeyError as e:
            raise _missing("the answer", e) from None

    @property
    def ok(self) -> bool:
        """Whether the cell ended without an error."""
        return self.outcome == "ok"

    def check(self) -> CellResult:
        """This result if it is `ok`; raises `CellFailed` if not."""
        if self.ok:
            return self
        said = str(self.error) if self.error is not None else self.outcome
        raise CellFailed(f"the cell failed: {said}", self)

    def __str__(self) -> str:
        return self.value if self.value is not None else self.stdout


# --- commands -------------------------------------------------------------------------------


@dataclass(frozen=True)
class CommandResult:
    """What a command wrote and how it ended."""

    id: str
    pid: int
    #: Its own; 128 + signal; 124 if its timeout passed; 137 if it was ended.
    exit_code: int
    outcome: CommandOutcome
    stdout: str
    stderr: str
    stdout_bytes: bytes = field(repr=False)
    stderr_bytes: bytes = field(repr=False)
    wall_time_ms: float
    #: The signal that ended it.
    signal: Optional[int]
    #: There was more output than one answer brings, or some fell out of the server's buffer.
    truncated: bool
    request_id: Optional[str] = field(repr=False)
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, raw: Mapping[str, Any], request_id: Optional[str]) -> CommandResult:
        encoding = raw.get("encoding") or {}
        stdout_bytes, stdout = stream_of(raw, "stdout", encoding)
        stderr_bytes, stderr = stream_of(raw, "stderr", encoding)
        try:
            return cls(
                id=raw.get("id", ""),
                pid=raw.get("pid") or 0,
                exit_code=raw["exit_code"],
                outcome=raw["outcome"],
                stdout=stdout,
                stderr=stderr,
                stdout_bytes=stdout_bytes,
                stderr_bytes=stderr_bytes,
                wall_time_ms=raw.get("wall_time_ms", 0.0),
                signal=raw.get("signal"),
                truncated=raw.get("truncated", False),
                request_id=request_id,
                raw=raw,
            )
        except KeyError as e:
            raise _missing("the answer", e) from None

    @property
    def ok(self) -> bool:
        """Whether the command ended by itself with exit code 0."""
        return self.outcome == "exited" and self.exit_code == 0

    def check(self) -> CommandResult:
        """This result if it is `ok`; raises `CommandFailed` if not."""
        if self.ok:
            return self
        said = self.stderr.strip().rsplit("\n", 1)[-1]
        how = f"exit code {self.exit_code}" if self.outcome == "exited" else self.outcome
        raise CommandFailed(f"the command failed: {how}" + (f": {said}" if said else ""), self)


@dataclass(frozen=True)
class CommandInfo:
    """A command, as the server described it when it was asked."""

    id: str
    pid: int
    tag: Optional[str]
    argv: list[str]
    state: Literal["running", "ended"]
    outcome: Optional[CommandOutcome]
    exit_code: Optional[int]
    #: It has a terminal.
    terminal: bool
    #: Where its output ends.
    output_offset: int
    #: Where the output that the server still holds begins.
    first_offset: int
    started_at: Optional[datetime]
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> CommandInfo:
        try:
            return cls(
                id=raw["id"],
                pid=raw.get("pid") or 0,
                tag=raw.get("tag"),
                argv=list(raw.get("argv") or []),
                state=raw.get("state", "running"),
                outcome=raw.get("outcome"),
                exit_code=raw.get("exit_code"),
                terminal=raw.get("terminal", False),
                output_offset=raw.get("output_offset") or 0,
                first_offset=raw.get("first_offset") or 0,
                started_at=moment(raw["started_at"]) if raw.get("started_at") else None,
                raw=raw,
            )
        except KeyError as e:
            raise _missing("the command", e) from None

    @property
    def running(self) -> bool:
        return self.state == "running"


# --- events ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """The run has begun."""

    id: str
    #: 0 for a cell.
    pid: int
    type: Literal["started"] = "started"


@dataclass(frozen=True)
class Lost:
    """Bytes of output that fell out of the server's buffer."""

    bytes: int
    type: Literal["lost"] = "lost"


@dataclass(frozen=True)
class CellEnd:
    """The last event. `result` is the same as `run` would have returned."""

    result: CellResult
    type: Literal["end"] = "end"


@dataclass(frozen=True)
class CommandEnd:
    """The last event. `result` has the output since the first event of this stream."""

    result: CommandResult
    type: Literal["end"] = "end"


CellEvent = Union[Started, Stdout, Stderr, RichResult, CellError, Lost, CellEnd]
CommandEvent = Union[Started, Stdout, Stderr, Lost, CommandEnd]


# --- contexts, files ------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """A named interpreter of a sandbox, as it was when the server was asked."""

    name: str
    cwd: str
    #: A cell runs in it.
    busy: bool
    #: Cells that wait for it.
    waiting: int
    #: Cells that have begun in its interpreter.
    executions: int
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Context:
        try:
            return cls(
                name=raw["name"],
                cwd=raw.get("cwd", ""),
                busy=raw.get("busy", False),
                waiting=raw.get("waiting", 0),
                executions=raw.get("executions", 0),
                raw=raw,
            )
        except KeyError as e:
            raise _missing("the context", e) from None


@dataclass(frozen=True)
class Entry:
    """A file of a sandbox."""

    path: str
    name: str
    kind: EntryKind
    size: int
    #: Permission bits.
    mode: int
    modified_at: datetime
    uid: int
    gid: int
    #: Where a link leads.
    target: Optional[str]
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Entry:
        try:
            path = raw["path"]
            mode = raw["mode"]
            return cls(
                path=path,
                name=raw.get("name", path.rsplit("/", 1)[-1]),
                kind=raw["kind"],
                size=raw["size"],
                mode=int(mode, 8) if isinstance(mode, str) else mode,
                modified_at=moment(raw["modified_at"]),
                uid=raw.get("uid", 0),
                gid=raw.get("gid", 0),
                target=raw.get("target"),
                raw=raw,
            )
        except KeyError as e:
            raise _missing("the entry", e) from None

    @property
    def is_file(self) -> bool:
        return self.kind == "file"

    @property
    def is_dir(self) -> bool:
        return self.kind == "directory"


@dataclass(frozen=True)
class Change:
    """A change of a file. After `overflow` some changes are missing: list the directory again."""

    kind: ChangeKind
    path: str


@dataclass(frozen=True)
class TerminalExit:
    """How the program of a terminal ended."""

    exit_code: int
    outcome: str


def moment(text: str) -> datetime:
    """RFC 3339, with however many digits behind the second."""
    found = _MOMENT.fullmatch(text)
    if found is None:
        raise ServerError(f"the answer has a bad time: {text[:50]!r}", may_have_run=True)
    seconds, fraction, zone = found.groups()
    whole = datetime.strptime(seconds.replace("t", "T"), "%Y-%m-%dT%H:%M:%S")
    whole = whole.replace(microsecond=int(((fraction or "") + "000000")[:6]))
    if zone in ("Z", "z"):
        return whole.replace(tzinfo=timezone.utc)
    return datetime.fromisoformat(whole.isoformat() + zone).astimezone(timezone.utc)


_MOMENT = re.compile(r"(\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d)(?:\.(\d+))?([Zz]|[+-]\d\d:\d\d)")


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _missing(what: str, key: KeyError) -> ServerError:
    return ServerError(f"{what} has no {key.args[0]}", may_have_run=True)
