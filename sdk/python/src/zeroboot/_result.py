"""The answer to one exec."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from ._errors import ExecutionError, ServerError, ZerobootError
from ._types import Isolation, Outcome


@dataclass(frozen=True)
class OutputFile:
    """A file that came back. Either `data` or `error`."""

    path: str
    data: bytes = b""
    error: Optional[str] = None

    @property
    def ok(self) -> bool:
        return self.error is None

    def read_bytes(self) -> bytes:
        """The content; raises where the sandbox could not read the file."""
        if self.error is not None:
            raise ZerobootError(f"{self.path}: {self.error}", may_have_run=True)
        return self.data

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)


class Result(str):
    """What the code wrote and how it ended.

    The object *is* its output as a string without the final newline, so that it prints, formats,
    compares and goes into JSON as the output. `stdout` is exact. An empty output is a false
    string: ask `ok`, not the truth of the result, whether the code ended well.
    """

    id: str
    stdout: str
    stderr: str
    exit_code: int
    outcome: Outcome
    signal: Optional[int]
    fork_time_ms: float
    exec_time_ms: float
    total_time_ms: float
    isolation: Isolation
    pooled: bool
    truncated: bool
    template: str
    language: str
    files: dict[str, OutputFile]
    output: str
    duration_ms: float
    encoding: dict[str, str]
    #: 0 where the host cannot tell.
    cpu_time_ms: float
    peak_memory_bytes: int
    #: What the sandbox knows about an uncaught error. The code can forge it.
    hints: list[str]
    #: The streams as bytes, exact even where they are not UTF-8 (then the text has U+FFFD).
    stdout_bytes: bytes
    stderr_bytes: bytes
    #: The `X-Request-Id` of the HTTP answer.
    request_id: Optional[str]
    #: The answer as it came, with whatever a newer server added.
    raw: Mapping[str, Any]

    def __new__(cls, raw: Mapping[str, Any], request_id: Optional[str] = None) -> Result:
        encoding = dict(raw.get("encoding") or {})
        stdout_bytes, stdout = stream_of(raw, "stdout", encoding)
        stderr_bytes, stderr = stream_of(raw, "stderr", encoding)
        self = super().__new__(cls, _without_final_newline(stdout))
        self.raw = raw
        self.request_id = request_id
        self.id = raw.get("id", "")
        self.stdout = self.output = stdout
        self.stderr = stderr
        self.stdout_bytes = stdout_bytes
        self.stderr_bytes = stderr_bytes
        self.encoding = encoding
        try:
            self.exit_code = raw["exit_code"]
        except KeyError:
            raise ServerError("the answer has no exit_code", may_have_run=True) from None
        self.outcome = raw.get("outcome", "exited")
        self.signal = raw.get("signal")
        self.fork_time_ms = raw.get("fork_time_ms", 0.0)
        self.exec_time_ms = raw.get("exec_time_ms", 0.0)
        self.total_time_ms = raw.get("total_time_ms", 0.0)
        self.duration_ms = raw.get("duration_ms", self.total_time_ms)
        self.isolation = raw.get("isolation", "process")
        self.pooled = raw.get("pooled", False)
        self.truncated = raw.get("truncated", False)
        self.template = raw.get("template", "")
        self.language = raw.get("language", "")
        self.cpu_time_ms = raw.get("cpu_time_ms", 0.0)
        self.peak_memory_bytes = raw.get("peak_memory_bytes", 0)
        self.hints = list(raw.get("hints") or [])
        self.files = {
            path: output_file(path, content) for path, content in (raw.get("files") or {}).items()
        }
        return self

    @property
    def ok(self) -> bool:
        """Whether the code ended by itself with exit code 0."""
        return self.outcome == "exited" and self.exit_code == 0

    def check(self) -> Result:
        """This result if it is `ok`; raises `ExecutionError` if not."""
        if self.ok:
            return self
        said = self.stderr.strip().rsplit("\n", 1)[-1]
        how = f"exit code {self.exit_code}" if self.outcome == "exited" else self.outcome
        raise ExecutionError(f"the code failed: {how}" + (f": {said}" if said else ""), self)

    def to_dict(self) -> dict[str, Any]:
        """All fields of the API, as plain data (what is not UTF-8 stays base64, as marked)."""
        return dict(self.raw)

    def __repr__(self) -> str:
        text = super().__repr__()
        if self.ok:
            return text
        # A failure should not look like an empty string in a log or a debugger.
        return (
            f"Result({text}, exit_code={self.exit_code}, outcome={self.outcome!r}, "
            f"stderr={self.stderr[-200:]!r})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # str would pickle the text alone.
        return (type(self), (self.raw, self.request_id))


def output_file(path: str, content: Mapping[str, Any]) -> OutputFile:
    if "error" in content:
        return OutputFile(path, error=str(content["error"]))
    return OutputFile(path, data_bytes(content))


def data_bytes(content: Mapping[str, Any]) -> bytes:
    """The bytes of `{"text": s}` or `{"base64": s}`."""
    if "base64" in content:
        return unbase64(content["base64"])
    return _utf8(content.get("text", ""))


def unbase64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as e:
        raise ServerError("the answer has bad base64", may_have_run=True) from e


def stream_of(raw: Mapping[str, Any], name: str, encoding: Mapping[str, str]) -> tuple[bytes, str]:
    """A stream of an answer: its bytes, and its text."""
    text = raw.get(name, "")
    if encoding.get(name) == "base64":
        data = unbase64(text)
        return data, data.decode("utf-8", "replace")
    return _utf8(text), text


def _utf8(text: str) -> bytes:
    # JSON can spell a lone surrogate, which UTF-8 cannot.
    return text.encode("utf-8", "surrogatepass")


def _without_final_newline(text: str) -> str:
    if text.endswith("\r\n"):
        return text[:-2]
    return text[:-1] if text.endswith("\n") else text
