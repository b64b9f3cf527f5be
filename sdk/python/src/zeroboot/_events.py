"""Events of a running exec, and the two readers that make them out of bytes."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional, Union

from ._errors import ConnectionError, ServerError, error_of
from ._result import OutputFile, Result, data_bytes, output_file
from ._types import Isolation


@dataclass(frozen=True)
class Start:
    """The sandbox is ready and the code begins."""

    id: str
    template: str
    language: str
    isolation: Isolation
    pooled: bool
    fork_time_ms: float
    type: Literal["start"] = "start"


@dataclass(frozen=True)
class Stdout:
    """Output, as it came. `text` never holds half a character; `data` is exact."""

    text: str
    data: bytes
    type: Literal["stdout"] = "stdout"


@dataclass(frozen=True)
class Stderr:
    text: str
    data: bytes
    type: Literal["stderr"] = "stderr"


@dataclass(frozen=True)
class File:
    """A file that `output_files` named."""

    file: OutputFile
    type: Literal["file"] = "file"

    @property
    def path(self) -> str:
        return self.file.path


@dataclass(frozen=True)
class End:
    """The last event. `result` is the same as `run` would have returned."""

    result: Result
    type: Literal["end"] = "end"


Event = Union[Start, Stdout, Stderr, File, End]


class SseReader:
    """Bytes in, (event, data) out. The chunks may be cut anywhere."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # Pieces of the current line. A list, so that a line of megabytes that comes in many
        # chunks is joined once and not copied with each chunk.
        self._line: list[str] = []
        self._after_cr = False
        self._event = ""
        self._data: list[str] = []
        self._first = True
        #: The `id` of the last event, as a reader would send it to go on from there.
        self.last_id: Optional[str] = None
        self._id: Optional[str] = None

    def feed(self, chunk: bytes) -> Iterator[tuple[str, str]]:
        text = self._decoder.decode(chunk)
        if not text:
            return
        if self._first:
            self._first = False
            text = text[1:] if text.startswith("\ufeff") else text
        if self._after_cr and text.startswith("\n"):
            text = text[1:]  # the second half of a \r\n that was cut in two
        self._after_cr = text.endswith("\r")
        *lines, rest = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for line in lines:
            self._line.append(line)
            whole = "".join(self._line)
            self._line.clear()
            ready = self._take(whole)
            if ready is not None:
                yield ready
        self._line.append(rest)

    def _take(self, line: str) -> Optional[tuple[str, str]]:
        if not line:
            ready = (self._event or "message", "\n".join(self._data)) if self._data else None
            self._event, self._data = "", []
            if ready is not None and self._id is not None:
                self.last_id = self._id
            return ready
        field, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if field == "event":
            self._event = value
        elif field == "data":
            self._data.append(value)
        elif field == "id":
            self._id = value
        return None  # a comment (keep-alive), `retry`: nothing for us


class ExecReader:
    """Chunks of an event stream in, `Event`s out; collects what the `Result` needs."""

    def __init__(self, request_id: Optional[str]) -> None:
        self._sse = SseReader()
        self._request_id = request_id
        self._streams: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        self._files: dict[str, Any] = {}
        self.result: Optional[Result] = None

    def feed(self, chunk: bytes) -> Iterator[Event]:
        for name, data in self._sse.feed(chunk):
            try:
                fields = json.loads(data)
            except ValueError as e:
                raise ServerError(
                    f"the {name} event is not JSON", request_id=self._request_id, may_have_run=True
                ) from e
            event = self._event(name, fields)
            if event is not None:
                yield event

    def finish(self) -> None:
        """The body is over: was the exec?"""
        if self.result is None:
            raise ConnectionError(
                "the stream ended before the exec did",
                request_id=self._request_id,
                may_have_run=True,
            )

    def _event(self, name: str, fields: Mapping[str, Any]) -> Optional[Event]:
        if name == "start":
            return Start(
                id=fields.get("id", ""),
                template=fields.get("template", ""),
                language=fields.get("language", ""),
                isolation=fields.get("isolation", "process"),
                pooled=fields.get("pooled", False),
                fork_time_ms=fields.get("fork_time_ms", 0.0),
            )
        if name in ("stdout", "stderr"):
            data = data_bytes(fields)
            self._streams[name].append(data)
            text = fields["text"] if "text" in fields else data.decode("utf-8", "replace")
            return Stdout(text, data) if name == "stdout" else Stderr(text, data)
        if name == "file":
            path = fields.get("path", "")
            self._files[path] = {k: v for k, v in fields.items() if k != "path"}
            return File(output_file(path, self._files[path]))
        if name == "end":
            self.result = Result(self._whole(fields), self._request_id)
            return End(self.result)
        if name == "error":
            raise error_of(None, fields, self._request_id, may_have_run=True)
        return None  # an event of a newer server

    def _whole(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `end` with the streams and files put back, as `run` would have them."""
        whole = dict(fields)
        encoding = {}
        for name, chunks in self._streams.items():
            data = b"".join(chunks)
            try:
                whole[name], encoding[name] = data.decode("utf-8"), "utf-8"
            except UnicodeDecodeError:
                whole[name] = codecs.encode(data, "base64").decode("ascii").replace("\n", "")
                encoding[name] = "base64"
        whole["output"] = whole["stdout"]
        whole["encoding"] = encoding
        whole["files"] = {**(fields.get("files") or {}), **self._files}
        return whole
