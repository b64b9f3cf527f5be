"""What can go wrong. Code that fails is a `Result`, never one of these (see `Result.check`)."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional, Union

if TYPE_CHECKING:
    from ._live_types import CellResult, CommandResult, EndReason
    from ._result import Result

__all__ = [
    "AuthenticationError",
    "BadRequestError",
    "BatchError",
    "CannotStart",
    "CellFailed",
    "CommandFailed",
    "CommandNotFound",
    "ConnectionError",
    "ContextExists",
    "ContextNotFound",
    "ExecutionError",
    "FileExists",
    "FileNotFound",
    "NoRoom",
    "NotAllowed",
    "NotEmpty",
    "RateLimitError",
    "RunEnded",
    "SandboxGone",
    "SandboxNotFound",
    "ServerError",
    "TimeoutError",
    "TooManySandboxes",
    "WrongKind",
    "ZerobootError",
]


class ZerobootError(Exception):
    """Base of every error that this package raises on purpose.

    `status` is the HTTP status, `code` the server's stable error code, `request_id` what to quote
    to whoever runs the server. Each is None where there was no answer to take it from.
    `retry_after` is in seconds. `may_have_run` says whether the code can have run: False only
    where it certainly did not.
    """

    def __init__(
        self,
        message: str,
        *,
        code: Optional[str] = None,
        status: Optional[int] = None,
        request_id: Optional[str] = None,
        retry_after: Optional[float] = None,
        may_have_run: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.request_id = request_id
        self.retry_after = retry_after
        self.may_have_run = may_have_run

    def __str__(self) -> str:
        facts = []
        if self.status is not None:
            facts.append(f"HTTP {self.status}")
        if self.code is not None:
            facts.append(self.code)
        if self.request_id is not None:
            facts.append(f"request {self.request_id}")
        return f"{self.message} ({', '.join(facts)})" if facts else self.message


class AuthenticationError(ZerobootError):
    """The key is missing, wrong, revoked or expired (401, 403)."""


class RateLimitError(ZerobootError):
    """The key, or the address, has used up its rate (429). `retry_after` says when to come back."""


class BadRequestError(ZerobootError):
    """The request is wrong and would be wrong again (400, 404, 413, 415 ...)."""


class ServerError(ZerobootError):
    """The server failed (5xx), or its answer is not valid."""


class ConnectionError(ZerobootError, builtins.ConnectionError):
    """No connection, or it broke. `may_have_run` tells the two apart."""


class TimeoutError(ZerobootError, builtins.TimeoutError):
    """This client stopped waiting. (An exec that passed its own timeout is a `Result`.)"""


class ExecutionError(ZerobootError):
    """Raised by `Result.check()` if the result is not `ok`. `result` is that result."""

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message, may_have_run=True)
        self.result = result


class BatchError(ZerobootError):
    """Some items of a batch were refused or failed. `results` has all of them, in order."""

    def __init__(
        self,
        message: str,
        results: Sequence[Union[Result, ZerobootError]],
        *,
        code: Optional[str] = None,
        request_id: Optional[str] = None,
    ) -> None:
        super().__init__(message, code=code, request_id=request_id, may_have_run=True)
        self.results = list(results)

    @property
    def errors(self) -> list[ZerobootError]:
        return [item for item in self.results if isinstance(item, ZerobootError)]


# --- long-lived sandboxes -------------------------------------------------------------------


class SandboxNotFound(BadRequestError):
    """No sandbox of this key has this id."""


class SandboxGone(BadRequestError):
    """The sandbox has ended. `reason` says why: `lease_ended`, `idle`, `requested`, `lost` ..."""

    def __init__(self, message: str, *, reason: Optional[EndReason] = None, **facts: Any) -> None:
        super().__init__(message, **facts)
        self.reason = reason


class TooManySandboxes(RateLimitError):
    """The key, or the server, already has its maximum of long-lived sandboxes."""


class ContextNotFound(BadRequestError):
    """The sandbox has no context of this name."""


class ContextExists(BadRequestError):
    """The sandbox already has a context of this name."""


class CommandNotFound(BadRequestError):
    """The sandbox knows no command with this id."""


class RunEnded(BadRequestError):
    """The command has ended: it takes no input and no signal."""


class CannotStart(BadRequestError):
    """The program cannot be started: it does not exist, or is not executable."""


class FileNotFound(BadRequestError, builtins.FileNotFoundError):
    """The sandbox has no file of this name. Also a built-in `FileNotFoundError`."""


class FileExists(BadRequestError, builtins.FileExistsError):
    """A file of this name exists. Also a built-in `FileExistsError`."""


class NotAllowed(BadRequestError, builtins.PermissionError):
    """Not allowed; the code may not do it either. Also a built-in `PermissionError`."""


class WrongKind(BadRequestError):
    """A directory where a file is needed, or the reverse, or not a regular file."""


class NotEmpty(BadRequestError):
    """The directory is not empty."""


class NoRoom(BadRequestError):
    """The sandbox has no room left: disk, processes, memory, descriptors, contexts."""


class CellFailed(ZerobootError):
    """Raised by `CellResult.check()` if the result is not `ok`. `result` is that result."""

    def __init__(self, message: str, result: CellResult) -> None:
        super().__init__(message, may_have_run=True)
        self.result = result


class CommandFailed(ZerobootError):
    """Raised by `CommandResult.check()` if the result is not `ok`. `result` is that result."""

    def __init__(self, message: str, result: CommandResult) -> None:
        super().__init__(message, may_have_run=True)
        self.result = result


CODE_CLASSES: Mapping[str, type[ZerobootError]] = {
    "cannot_start": CannotStart,
    "context_exists": ContextExists,
    "context_not_found": ContextNotFound,
    "file_exists": FileExists,
    "file_not_found": FileNotFound,
    "no_room": NoRoom,
    "not_allowed": NotAllowed,
    "not_empty": NotEmpty,
    "run_ended": RunEnded,
    "run_not_found": CommandNotFound,
    "sandbox_gone": SandboxGone,
    "sandbox_not_found": SandboxNotFound,
    "too_many_sandboxes": TooManySandboxes,
    "wrong_kind": WrongKind,
}

# Codes that are the server's fault. Needed where there is no HTTP status to go by: an item of a
# batch, an `error` event in a stream.
SERVER_CODES = frozenset(
    {
        "batch_output_limit",
        "branch_failed",
        "busy",
        "internal",
        "needs_vm_engine",
        "not_ready",
        "operation_failed",
        "sandbox_failed",
        "server_output_limit",
        "shutting_down",
    }
)
RATE_CODES = frozenset({"concurrency_limited", "rate_limited", "too_many_runs", "too_many_streams"})


def error_class(status: Optional[int], code: Optional[str]) -> type[ZerobootError]:
    if code is not None and code in CODE_CLASSES:
        return CODE_CLASSES[code]
    if status in (401, 403) or (status is None and code == "unauthorized"):
        return AuthenticationError
    if status == 429 or (status is None and code in RATE_CODES):
        return RateLimitError
    if status is None:
        return ServerError if code is None or code in SERVER_CODES else BadRequestError
    return BadRequestError if 400 <= status < 500 else ServerError


def error_of(
    status: Optional[int],
    fields: Mapping[str, Any],
    request_id: Optional[str],
    *,
    message: str = "",
    retry_after: Optional[float] = None,
    may_have_run: bool = False,
) -> ZerobootError:
    """What the server's `{"error", "code", "request_id"}` means."""
    code = fields.get("code")
    kind = error_class(status, code)
    extra = {"reason": fields.get("reason")} if kind is SandboxGone else {}
    return kind(
        message or str(fields.get("error") or "") or "the request failed",
        code=code,
        status=status,
        request_id=fields.get("request_id") or request_id,
        retry_after=retry_after,
        may_have_run=may_have_run,
        **extra,
    )
