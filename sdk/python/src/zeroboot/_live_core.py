"""What the two kinds of live sandbox share: bodies, paths, readers. No I/O."""

from __future__ import annotations

import base64
import codecs
import hashlib
import json
import math
import os
import secrets
import signal as signals
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional, Union
from urllib.parse import quote, urlencode

import wsproto.events as ws
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.utilities import ProtocolError

from ._errors import ConnectionError, ServerError, ZerobootError, error_of
from ._events import SseReader, Stderr, Stdout
from ._live_types import (
    CellEnd,
    CellError,
    CellEvent,
    CellResult,
    Change,
    Checkpoint,
    CommandEnd,
    CommandEvent,
    CommandResult,
    Context,
    Lost,
    RichResult,
    SandboxLimits,
    Started,
    TerminalExit,
    encode,
)
from ._result import data_bytes
from ._types import Data

#: A program with its arguments, or a line for the shell.
Command = Union[str, Sequence[str]]

#: What is asked for by it can take any time; a silence of it cannot.
FOREVER = math.inf
#: Bytes of one piece of a file on its way.
CHUNK = 256 * 1024
DEFAULT_LEASE = 300.0


def sandbox_path(sandbox_id: str, *parts: str, **query: Any) -> str:
    """`/v1/sandboxes/ID/part/...?query`; names are escaped, None in a query is left out."""
    path = "/v1/sandboxes/" + "/".join(quote(part, safe="") for part in (sandbox_id, *parts))
    pairs = {key: value for key, value in query.items() if value is not None}
    return f"{path}?{urlencode(pairs, quote_via=quote)}" if pairs else path


def checkpoint_id(checkpoint: Union[str, Checkpoint]) -> str:
    return checkpoint if isinstance(checkpoint, str) else checkpoint.id


def checkpoint_path(checkpoint: Union[str, Checkpoint], *parts: str) -> str:
    names = (checkpoint_id(checkpoint), *parts)
    return "/v1/checkpoints/" + "/".join(quote(part, safe="") for part in names)


def checkpoints_path(sandbox_id: str) -> str:
    return "/v1/checkpoints?sandbox_id=" + quote(sandbox_id, safe="")


def list_path(metadata: Optional[Mapping[str, str]], cursor: Optional[str]) -> str:
    pairs = [("metadata", f"{key}={value}") for key, value in (metadata or {}).items()]
    if cursor is not None:
        pairs.append(("cursor", cursor))
    return "/v1/sandboxes" + (f"?{urlencode(pairs, quote_via=quote)}" if pairs else "")


def create_body(
    template: Optional[str],
    language: Optional[str],
    timeout: float,
    idle_timeout: Optional[float],
    env: Optional[Mapping[str, str]],
    metadata: Optional[Mapping[str, str]],
    limits: Optional[SandboxLimits],
) -> dict[str, Any]:
    return _present(
        template=template,
        language=language,
        timeout_seconds=timeout,
        idle_timeout_seconds=idle_timeout,
        env=dict(env) if env else None,
        metadata=dict(metadata) if metadata else None,
        **(limits or {}),
    )


def cell_body(code: str, context: Union[str, Context, None], timeout: float) -> dict[str, Any]:
    name = context.name if isinstance(context, Context) else context
    return _present(code=code, context=name, timeout_seconds=timeout)


def command_body(
    command: Command,
    *,
    cwd: Optional[str],
    env: Optional[Mapping[str, str]],
    stdin: Optional[Data],
    timeout: Optional[float],
    keep_stdin_open: bool = False,
    background: bool = False,
    tag: Optional[str] = None,
    end_with_client: bool = False,
    terminal: Optional[tuple[int, int]] = None,
) -> dict[str, Any]:
    if not isinstance(command, str) and any(not isinstance(arg, str) for arg in command):
        raise TypeError("a command is a string for the shell, or a list of strings")
    size = None if terminal is None else {"columns": terminal[0], "rows": terminal[1]}
    return _present(
        command=command if isinstance(command, str) else None,
        argv=None if isinstance(command, str) else list(command),
        cwd=cwd,
        env=dict(env) if env else None,
        stdin=stdin if isinstance(stdin, str) else None,
        stdin_base64=encode(stdin) if isinstance(stdin, bytes) else None,
        timeout_seconds=timeout,
        keep_stdin_open=keep_stdin_open or None,
        background=background or None,
        tag=tag,
        end_with_client=end_with_client or None,
        terminal=size,
    )


def signal_body(signal: Union[int, str]) -> dict[str, Any]:
    """A number, a name with or without SIG, or a member of `signal.Signals`."""
    if isinstance(signal, str):
        name = signal.upper()
        return {"signal": name if name.startswith("SIG") else f"SIG{name}"}
    return {"signal": int(signal)}


SIGKILL = int(signals.SIGKILL) if hasattr(signals, "SIGKILL") else 9


def mode_text(mode: Union[int, str, None]) -> Optional[str]:
    """Permission bits as the API spells them: octal digits."""
    return format(mode, "o") if isinstance(mode, int) else mode


def range_header(offset: int, length: Optional[int]) -> dict[str, str]:
    """`Range` for `length` bytes from `offset`; nothing where the whole file is meant."""
    if offset < 0:
        raise ValueError("the offset is negative")
    if length is not None and length <= 0:
        raise ValueError("the length must be above zero")
    if offset == 0 and length is None:
        return {}
    end = "" if length is None else str(offset + length - 1)
    return {"Range": f"bytes={offset}-{end}"}


def _present(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


# --- readers --------------------------------------------------------------------------------


class _RunReader:
    """Chunks of a run's event stream in, events out; collects what the result needs."""

    def __init__(self, request_id: Optional[str], run_id: str = "", pid: int = 0) -> None:
        self._sse = SseReader()
        self.request_id = request_id
        self._id = run_id
        self._pid = pid
        self._streams: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        self._lost = 0
        self.ended = False

    @property
    def offset(self) -> Optional[str]:
        """Where a stream that broke here goes on."""
        return self._sse.last_id

    def resume(self, request_id: Optional[str]) -> None:
        """The same run in a new stream, from `offset` on."""
        last_id = self._sse.last_id
        self._sse = SseReader()
        self._sse.last_id = last_id
        self.request_id = request_id

    def finish(self) -> None:
        """The body is over: was the run?"""
        if not self.ended:
            raise ConnectionError(
                "the stream ended before the run did",
                request_id=self.request_id,
                may_have_run=True,
            )

    def _events(self, chunk: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, data in self._sse.feed(chunk):
            fields = json_event(name, data, self.request_id)
            if name == "failure":
                raise error_of(None, fields, self.request_id, may_have_run=True)
            yield name, fields

    def _output(self, name: str, fields: Mapping[str, Any]) -> Union[Stdout, Stderr]:
        data = data_bytes(fields)
        self._streams[name].append(data)
        text = fields["text"] if "text" in fields else data.decode("utf-8", "replace")
        return Stdout(text, data) if name == "stdout" else Stderr(text, data)

    def _begun(self, fields: Mapping[str, Any]) -> Started:
        self._id = fields.get("id", self._id)
        self._pid = fields.get("pid") or self._pid
        return Started(self._id, self._pid)

    def _fell_out(self, fields: Mapping[str, Any]) -> Lost:
        count = int(fields.get("bytes", 0))
        self._lost += count
        return Lost(count)

    def _whole(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `end` with the streams put back."""
        self.ended = True
        whole: dict[str, Any] = {"id": self._id, "pid": self._pid, **fields}
        encoding = {}
        for name, chunks in self._streams.items():
            data = b"".join(chunks)
            try:
                whole[name], encoding[name] = data.decode("utf-8"), "utf-8"
            except UnicodeDecodeError:
                whole[name] = codecs.encode(data, "base64").decode("ascii").replace("\n", "")
                encoding[name] = "base64"
        whole["encoding"] = encoding
        whole["truncated"] = self._lost > 0
        return whole


class CellReader(_RunReader):
    """A cell's stream."""

    def __init__(self, request_id: Optional[str], context: str) -> None:
        super().__init__(request_id)
        self._context = context
        self._results: list[dict[str, Any]] = []
        self._error: Optional[dict[str, Any]] = None
        self.result: Optional[CellResult] = None

    def feed(self, chunk: bytes) -> Iterator[CellEvent]:
        for name, fields in self._events(chunk):
            event = self._event(name, fields)
            if event is not None:
                yield event

    def _event(self, name: str, fields: dict[str, Any]) -> Optional[CellEvent]:
        if name == "started":
            return self._begun(fields)
        if name in ("stdout", "stderr"):
            return self._output(name, fields)
        if name == "result":
            self._results.append(fields)
            return RichResult.of(fields)
        if name == "error":
            self._error = fields
            return CellError.of(fields)
        if name == "lost":
            return self._fell_out(fields)
        if name == "end":
            whole = {
                "context": self._context,
                "results": self._results,
                "error": self._error,
                **self._whole(fields),
            }
            self.result = CellResult.of(whole, self.request_id)
            return CellEnd(self.result)
        return None  # an event of a newer server


class CommandReader(_RunReader):
    """A command's stream."""

    result: Optional[CommandResult] = None

    def feed(self, chunk: bytes) -> Iterator[CommandEvent]:
        for name, fields in self._events(chunk):
            event = self._event(name, fields)
            if event is not None:
                yield event

    def _event(self, name: str, fields: dict[str, Any]) -> Optional[CommandEvent]:
        if name == "started":
            return self._begun(fields)
        if name in ("stdout", "stderr"):
            return self._output(name, fields)
        if name == "lost":
            return self._fell_out(fields)
        if name == "end":
            self.result = CommandResult.of(self._whole(fields), self.request_id)
            return CommandEnd(self.result)
        return None


class WatchReader:
    """The stream of a watch."""

    def __init__(self, request_id: Optional[str]) -> None:
        self._sse = SseReader()
        self._request_id = request_id

    def feed(self, chunk: bytes) -> Iterator[Change]:
        for name, data in self._sse.feed(chunk):
            fields = json_event(name, data, self._request_id)
            if name == "failure":
                raise error_of(None, fields, self._request_id, may_have_run=True)
            if name in ("created", "modified", "removed", "overflow"):
                yield Change(name, fields.get("path", ""))  # type: ignore[arg-type]


def json_event(name: str, data: str, request_id: Optional[str]) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ServerError(
            f"the {name} event is not a JSON object", request_id=request_id, may_have_run=True
        )
    return fields


# --- terminals ------------------------------------------------------------------------------

_ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3


class TerminalWire:
    """A terminal's WebSocket without its socket: bytes in, bytes out (the framing is wsproto's)."""

    def __init__(self) -> None:
        self._key = base64.b64encode(secrets.token_bytes(16)).decode("ascii")
        self._connection = Connection(ConnectionType.CLIENT)
        self._text: list[str] = []
        #: What runs, once the server has said so.
        self.started: Optional[Started] = None
        #: Set by the server's last word.
        self.exit: Optional[TerminalExit] = None
        self.error: Optional[ZerobootError] = None
        #: No more bytes come.
        self.over = False

    def headers(self) -> dict[str, str]:
        return {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": self._key,
        }

    def accepted(self, headers: Mapping[str, str]) -> None:
        digest = hashlib.sha1(self._key.encode() + _ACCEPT_GUID, usedforsecurity=False).digest()
        if headers.get("sec-websocket-accept") != base64.b64encode(digest).decode("ascii"):
            raise ServerError("the server's answer is no WebSocket", may_have_run=True)

    def output(self, data: bytes) -> bytes:
        """A frame with bytes for the program."""
        return self._connection.send(ws.BytesMessage(data))

    def control(self, **fields: Any) -> bytes:
        """A frame with something for the terminal itself."""
        return self._connection.send(ws.TextMessage(json.dumps(fields)))

    def close(self) -> bytes:
        if self.over or self._connection.state is not ConnectionState.OPEN:
            return b""
        return self._connection.send(ws.CloseConnection(code=1000))

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Bytes of the socket (empty: its end) in; bytes of the terminal, and an answer, out."""
        shown: list[bytes] = []
        answer: list[bytes] = []
        try:
            self._connection.receive_data(data or None)
            for event in self._connection.events():
                self._take(event, shown, answer)
        except ProtocolError as e:
            self.over = True
            self.error = ServerError(f"the terminal's stream is broken: {e}", may_have_run=True)
        if not data:
            self.over = True
        return b"".join(shown), b"".join(answer)

    def _take(self, event: ws.Event, shown: list[bytes], answer: list[bytes]) -> None:
        if isinstance(event, ws.BytesMessage):
            shown.append(bytes(event.data))
        elif isinstance(event, ws.TextMessage):
            self._text.append(event.data)
            if event.message_finished:
                self._word("".join(self._text))
                self._text.clear()
        elif isinstance(event, ws.Ping):
            answer.append(self._connection.send(event.response()))
        elif isinstance(event, ws.CloseConnection):
            if self._connection.state is ConnectionState.REMOTE_CLOSING:
                answer.append(self._connection.send(event.response()))
            elif self._connection.state is ConnectionState.OPEN:
                # wsproto's way to say that these were no frames.
                self.error = ServerError(
                    f"the terminal's stream is broken: {event.reason}", may_have_run=True
                )
            self.over = True

    def _word(self, text: str) -> None:
        fields = json_event("terminal", text, None)
        begun, ended = fields.get("started"), fields.get("exit")
        if isinstance(begun, dict):
            self.started = Started(begun.get("id", ""), begun.get("pid") or 0)
        elif isinstance(ended, dict):
            self.error = None  # of something on the way, such as input that came too late
            self.exit = TerminalExit(ended.get("exit_code", 0), ended.get("outcome", "exited"))
        elif "error" in fields:
            failed = fields["error"]
            whole = failed if isinstance(failed, dict) else fields
            self.error = error_of(None, whole, None, may_have_run=True)


def local_path(path: Union[str, os.PathLike[str]]) -> str:
    return os.fspath(path)
