"""A server that answers from a script and writes down what it saw. For faults only: what the real
server does is tested against the real server (`test_contract.py`)."""

from __future__ import annotations

import base64
import hashlib
import json
import select
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

from wsproto.connection import Connection, ConnectionType

OK = {
    "id": "0193-1",
    "stdout": "2\n",
    "stderr": "",
    "exit_code": 0,
    "outcome": "exited",
    "signal": None,
    "fork_time_ms": 0.5,
    "exec_time_ms": 1.5,
    "total_time_ms": 2.0,
    "isolation": "process",
    "pooled": True,
    "truncated": False,
    "template": "python",
    "language": "python",
    "files": {},
    "output": "2\n",
    "duration_ms": 2.0,
    "encoding": {"stdout": "utf-8", "stderr": "utf-8"},
    "cpu_time_ms": 1.0,
    "peak_memory_bytes": 4096,
    "hints": [],
}


@dataclass
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Step = Callable[["Stub", socket.socket], None]


@dataclass
class Stub:
    """`script` holds one step per request, in order; the last one stays."""

    script: list[Step]
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    #: Set when a client closed while a step was waiting for that.
    gone: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Stub:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        # Closing a socket does not wake a thread that accepts on it; shutting it down does.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(
                target=self._serve, args=(client, self.connections), daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket, number: int) -> None:
        with client:
            try:
                while (request := self._read(client, number)) is not None:
                    self.seen.append(request)
                    step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
                    step(self, client)
            except ConnectionError:
                self.gone.set()  # it closed while we were writing
            except OSError:
                pass

    def _read(self, client: socket.socket, number: int) -> Optional[Seen]:
        data = b""
        while b"\r\n\r\n" not in data:
            while not select.select([client], [], [], 0.05)[0]:
                if self.stop.is_set():
                    return None
            chunk = client.recv(65536)
            if not chunk:
                return None
            data += chunk
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {k.strip().lower(): v.strip() for k, _, v in (x.partition(":") for x in lines)}
        while len(body) < int(headers.get("content-length", 0)):
            body += client.recv(65536)
        if headers.get("transfer-encoding") == "chunked":
            while not body.endswith(b"0\r\n\r\n"):
                body += client.recv(65536)
            body = unchunk(body)
        method, path, _ = first.split(" ")
        return Seen(method, path, headers, body, number)

    def wait_gone(self, client: socket.socket, limit: float = 10.0) -> None:
        """Until the client closes; says so in `gone`."""
        end = time.monotonic() + limit
        while time.monotonic() < end and not self.stop.is_set():
            if select.select([client], [], [], 0.05)[0]:
                try:
                    closed = client.recv(1024) == b""
                except ConnectionError:
                    closed = True
                if closed:
                    self.gone.set()
                    raise OSError("the client is gone")


def answer(status: int = 200, body: Any = None, **headers: str) -> Step:
    raw = body if isinstance(body, bytes) else json.dumps(OK if body is None else body).encode()
    names = {"content_type": "application/json", "x_request_id": "req-1", **headers}

    def step(stub: Stub, client: socket.socket) -> None:
        lines = [f"HTTP/1.1 {status} Whatever", f"content-length: {len(raw)}"]
        lines += [f"{k.replace('_', '-')}: {v}" for k, v in names.items()]
        client.sendall("\r\n".join([*lines, "", ""]).encode() + raw)

    return step


def sse(*chunks: bytes, end: bool = True, hold: bool = False) -> Step:
    """An event stream in exactly these chunks. `hold` keeps it open until the client leaves."""

    def step(stub: Stub, client: socket.socket) -> None:
        client.sendall(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"x-request-id: req-2\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for chunk in chunks:
            client.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            time.sleep(0.001)
        if hold:
            stub.wait_gone(client)
        if end:
            client.sendall(b"0\r\n\r\n")
        else:
            raise OSError("cut")

    return step


def silent(stub: Stub, client: socket.socket) -> None:
    """Takes the request and never answers."""
    stub.wait_gone(client)


def drop(stub: Stub, client: socket.socket) -> None:
    """Takes the request and closes."""
    client.close()
    raise OSError("dropped")


def drip(stub: Stub, client: socket.socket) -> None:
    """Answers a byte at a time, for ever: each read is quick, the whole never ends."""
    client.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
    client.sendall(b"content-length: 100000\r\n\r\n")
    while not stub.stop.is_set():
        client.sendall(b" ")
        time.sleep(0.05)


def event(name: str, /, at: Any = None, **fields: Any) -> bytes:
    mark = "" if at is None else f"id: {at}\n"
    return f"{mark}event: {name}\ndata: {json.dumps(fields)}\n\n".encode()


def unchunk(body: bytes) -> bytes:
    whole = b""
    while True:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            return whole
        whole, body = whole + rest[:length], rest[length + 2 :]


def web_socket(talk: Callable[[socket.socket, Any], None]) -> Step:
    """Upgrades, then lets `talk` have the socket and a wsproto connection."""

    def step(stub: Stub, client: socket.socket) -> None:
        key = stub.seen[-1].headers["sec-websocket-key"]
        digest = hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        client.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            b"sec-websocket-accept: " + base64.b64encode(digest) + b"\r\n\r\n"
        )
        talk(client, Connection(ConnectionType.SERVER))
        raise OSError("the talk is over")

    return step


END = {k: v for k, v in OK.items() if k not in ("stdout", "stderr", "output")}
