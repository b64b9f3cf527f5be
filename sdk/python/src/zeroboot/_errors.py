"""What can go wrong. Code that fails is a `Result`, never one of these (see `Result.check`)."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional, Union

if TYPE_CHECKING:
    from ._result import Result

__all__ = [
    "AuthenticationError",
    "BadRequestError",
    "BatchError",
    "ConnectionError",
    "ExecutionError",
    "RateLimitError",
    "ServerError",
    "TimeoutError",
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
    """The server could not do its part (5xx), or answered with what is not an answer."""


class ConnectionError(ZerobootError, builtins.ConnectionError):
    """No connection, or it broke. `may_have_run` tells the two apart."""


class TimeoutError(ZerobootError, builtins.TimeoutError):
    """This client gave up waiting. (An exec that passed its own deadline is a `Result`.)"""


class ExecutionError(ZerobootError):
    """Raised by `Result.check()` when the code did not end well. `result` holds all of it."""

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


# Codes that are the server's fault. Needed where there is no HTTP status to go by: an item of a
# batch, an `error` event in a stream.
SERVER_CODES = frozenset(
    {
        "batch_output_limit",
        "busy",
        "internal",
        "not_ready",
        "sandbox_failed",
        "server_output_limit",
        "shutting_down",
    }
)
RATE_CODES = frozenset({"concurrency_limited", "rate_limited"})


def error_class(status: Optional[int], code: Optional[str]) -> type[ZerobootError]:
    if status in (401, 403) or (status is None and code == "unauthorized"):
        return AuthenticationError
    if status == 429 or (status is None and code in RATE_CODES):
        return RateLimitError
    if status is None:
        return ServerError if code is None or code in SERVER_CODES else BadRequestError
    return BadRequestError if 400 <= status < 500 else ServerError
