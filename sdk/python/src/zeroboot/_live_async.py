"""`AsyncLiveSandbox`: a long-lived sandbox, for asyncio and trio.

`_live_sync.py` is made from this file by `tools/sync.py`; `sdk/test.sh` holds them together.
"""

from __future__ import annotations

import builtins
import os
import time
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, Generic, Optional, TypeVar, Union

import httpx

from . import _core, _live_core
from ._core import Attempts
from ._errors import (
    ConnectionError,
    FileNotFound,
    SandboxGone,
    SandboxNotFound,
    TimeoutError,
    ZerobootError,
)
from ._events import Stderr, Stdout
from ._live_core import FOREVER, CellReader, CommandReader, TerminalWire, WatchReader
from ._live_types import (
    CellEnd,
    CellEvent,
    CellResult,
    Change,
    Checkpoint,
    CommandEnd,
    CommandEvent,
    CommandInfo,
    CommandResult,
    Context,
    Entry,
    RichResult,
    SandboxInfo,
    Started,
    TerminalExit,
)
from ._types import Data, Isolation
from ._waiting_async import Lock, Source, call, save, sleep, upload

if TYPE_CHECKING:
    from ._async import AsyncSandbox

T = TypeVar("T")
R = TypeVar("R", CellResult, CommandResult)
OnText = Optional[Callable[[str], object]]

_SSE = "text/event-stream"
_BYTES = "application/octet-stream"


class AsyncLiveSandbox:
    """A long-lived sandbox: many runs, commands, files and terminals, until its lease ends.

    Made by `AsyncSandbox.create()`, `AsyncSandbox.connect()`. Leaving the `with` block of one that
    was created ends it.
    """

    #: Its named interpreters.
    contexts: AsyncContexts
    #: Its programs.
    commands: AsyncCommands
    #: Its files.
    files: AsyncFiles

    def __init__(
        self, client: AsyncSandbox, info: SandboxInfo, *, owns_client: bool, kill_on_exit: bool
    ) -> None:
        self._client = client
        self._owns_client = owns_client
        self._kill_on_exit = kill_on_exit
        #: What the server last said about it.
        self.info = info
        self.contexts = AsyncContexts(self)
        self.commands = AsyncCommands(self)
        self.files = AsyncFiles(self)

    @property
    def id(self) -> str:
        return self.info.id

    @property
    def template(self) -> str:
        return self.info.template

    @property
    def language(self) -> str:
        return self.info.language

    @property
    def isolation(self) -> Isolation:
        return self.info.isolation

    @property
    def expires_at(self) -> datetime:
        return self.info.expires_at

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.info.metadata

    async def run(
        self,
        code: str,
        *,
        context: Union[str, Context, None] = None,
        timeout: Optional[float] = None,
        on_stdout: OnText = None,
        on_stderr: OnText = None,
        on_result: Optional[Callable[[RichResult], object]] = None,
        request_timeout: Optional[float] = None,
    ) -> CellResult:
        """Run a cell in a context and wait for its end. The context keeps its state.

        An error that the code does not catch is in the result; `result.check()` raises. `timeout`
        is in seconds (the client's default if None): the cell is then interrupted.
        """
        if on_stdout is None and on_stderr is None and on_result is None:
            body, budget = self._cell(code, context, timeout, request_timeout)
            answer = await self._client._ask("POST", self._path("run"), body, budget=budget)
            return CellResult.of(answer.fields(), answer.request_id)
        async with self.stream(
            code, context=context, timeout=timeout, request_timeout=request_timeout
        ) as events:
            async for event in events:
                if isinstance(event, Stdout) and on_stdout is not None:
                    await call(on_stdout, event.text)
                elif isinstance(event, Stderr) and on_stderr is not None:
                    await call(on_stderr, event.text)
                elif isinstance(event, RichResult) and on_result is not None:
                    await call(on_result, event)
            return events.result

    def stream(
        self,
        code: str,
        *,
        context: Union[str, Context, None] = None,
        timeout: Optional[float] = None,
        request_timeout: Optional[float] = None,
    ) -> AsyncRunStream[CellEvent, CellResult]:
        """Run a cell and iterate over its events while it runs.

        The request is sent when the iteration begins. The cell goes on when you leave early:
        `contexts.interrupt()` stops it.
        """
        body, budget = self._cell(code, context, timeout, request_timeout)
        return AsyncRunStream(self._cell_events(body, budget))

    async def terminal(
        self,
        command: Optional[str] = None,
        *,
        columns: int = 80,
        rows: int = 24,
        cwd: Optional[str] = None,
    ) -> AsyncTerminal:
        """Start a program (a shell if None) on a new terminal. Closing it ends the program."""
        path = self._path(
            "terminal",
            columns=columns,
            rows=rows,
            command=command,
            cwd=cwd,
            end_with_client="true",
        )
        return await AsyncTerminal._open(self._client, path)

    async def refresh(self) -> SandboxInfo:
        """Ask the server about it again."""
        answer = await self._client._ask("GET", self._path())
        self.info = SandboxInfo.of(answer.fields())
        return self.info

    async def extend(self, timeout: float) -> SandboxInfo:
        """Set its lease to `timeout` seconds from now."""
        body = {"timeout_seconds": timeout}
        answer = await self._client._ask("POST", self._path("extend"), body)
        self.info = SandboxInfo.of(answer.fields())
        return self.info

    async def branch(
        self,
        count: int = 1,
        *,
        timeout: float = 300,
        metadata: Optional[Mapping[str, str]] = None,
    ) -> list[AsyncLiveSandbox]:
        """Make `count` sandboxes that begin where this one is now; it goes on. VM engine.

        They have its memory, files, processes and contexts. All are made, or none; each lives
        `timeout` seconds, and leaving its `with` block ends it. `metadata` replaces this one's.
        """
        return await self._begin(self._path("branch"), count, timeout, metadata)

    async def checkpoint(
        self, *, timeout: float = 3600, metadata: Optional[Mapping[str, str]] = None
    ) -> Checkpoint:
        """Keep this moment of it for `timeout` seconds; it goes on. VM engine."""
        body: dict[str, Any] = {"timeout_seconds": timeout}
        if metadata is not None:
            body["metadata"] = dict(metadata)
        answer = await self._client._ask("POST", self._path("checkpoints"), body)
        return Checkpoint.of(answer.fields())

    async def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints of it that are kept, the oldest first."""
        answer = await self._client._ask("GET", _live_core.checkpoints_path(self.id))
        return [Checkpoint.of(raw) for raw in answer.fields().get("checkpoints") or []]

    async def restore(
        self,
        checkpoint: Union[str, Checkpoint],
        count: int = 1,
        *,
        timeout: float = 300,
        metadata: Optional[Mapping[str, str]] = None,
    ) -> list[AsyncLiveSandbox]:
        """Make `count` sandboxes that begin at a checkpoint, of this sandbox or another one.

        All are made, or none; leaving the `with` block of one ends it.
        """
        path = _live_core.checkpoint_path(checkpoint, "restore")
        return await self._begin(path, count, timeout, metadata)

    async def remove_checkpoint(self, checkpoint: Union[str, Checkpoint]) -> None:
        """Let the server forget a checkpoint. Sandboxes that began there stay."""
        answer = await self._client._ask("DELETE", _live_core.checkpoint_path(checkpoint))
        if not answer.good:
            raise answer.error()

    async def rollback(self, checkpoint: Union[str, Checkpoint, None] = None) -> SandboxInfo:
        """Go back to a checkpoint of it (the last one if None). What runs in it now ends.

        Its id, lease and metadata stay.
        """
        body = {} if checkpoint is None else {"checkpoint_id": _live_core.checkpoint_id(checkpoint)}
        answer = await self._client._ask("POST", self._path("rollback"), body)
        self.info = SandboxInfo.of(answer.fields())
        return self.info

    async def promote(self) -> SandboxInfo:
        """Take over the id of the sandbox that it is a branch of, which ends."""
        answer = await self._client._ask("POST", self._path("promote"))
        self.info = SandboxInfo.of(answer.fields())
        return self.info

    async def _begin(
        self, path: str, count: int, timeout: float, metadata: Optional[Mapping[str, str]]
    ) -> list[AsyncLiveSandbox]:
        body: dict[str, Any] = {"count": count, "timeout_seconds": timeout}
        if metadata is not None:
            body["metadata"] = dict(metadata)
        answer = await self._client._ask("POST", path, body)
        made = [SandboxInfo.of(raw) for raw in answer.fields().get("sandboxes") or []]
        return [
            AsyncLiveSandbox(self._client, info, owns_client=False, kill_on_exit=True)
            for info in made
        ]

    async def kill(self) -> bool:
        """End it now. False if it had ended already."""
        answer = await self._client._ask("DELETE", self._path())
        if answer.good:
            return True
        error = answer.error()
        if isinstance(error, (SandboxGone, SandboxNotFound)):
            return False
        raise error

    async def aclose(self) -> None:
        """Close the connections. The sandbox goes on."""
        if self._owns_client:
            await self._client.aclose()

    async def __aenter__(self) -> AsyncLiveSandbox:
        return self

    async def __aexit__(
        self,
        exc_type: Optional[type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        try:
            if self._kill_on_exit:
                await self.kill()
        except ZerobootError:
            # The lease ends it then; what went wrong inside the block matters more.
            if exc is None:
                raise
        finally:
            await self.aclose()

    def __repr__(self) -> str:
        return f"AsyncLiveSandbox(id={self.id!r}, template={self.template!r})"

    def _path(self, *parts: str, **query: Any) -> str:
        return _live_core.sandbox_path(self.info.id, *parts, **query)

    def _cell(
        self,
        code: str,
        context: Union[str, Context, None],
        timeout: Optional[float],
        request_timeout: Optional[float],
    ) -> tuple[dict[str, Any], float]:
        body = _live_core.cell_body(
            code, context, self._client._config.timeout if timeout is None else timeout
        )
        return body, self._client._config.request_timeout([body], request_timeout)

    async def _cell_events(
        self, body: Mapping[str, Any], budget: float
    ) -> AsyncIterator[CellEvent]:
        attempts = Attempts(self._client._config, budget, silence=_core.STREAM_SILENCE)
        response = await self._client._opened(
            "POST", self._path("run"), _core.dump(body), attempts, _SSE
        )
        context = str(body.get("context", "default"))
        reader = CellReader(response.headers.get("x-request-id"), context)
        try:
            async for chunk in response.aiter_bytes():
                if not reader.ended:
                    attempts.check_deadline()
                for event in reader.feed(chunk):
                    yield event
            # Read to the end of the body, so that the connection can be used again.
            reader.finish()
        except httpx.HTTPError as e:
            if not reader.ended:
                attempts.after_error(e)
        finally:
            await response.aclose()


class AsyncStream(AsyncIterator[T], Generic[T]):
    """Items of a stream. Iterate once; close it (or leave the `with` block) to stop early."""

    def __init__(self, items: AsyncIterator[T]) -> None:
        self._items = items

    async def aclose(self) -> None:
        """Stop listening."""
        close = getattr(self._items, "aclose", None)
        if close is not None:
            await close()

    async def __anext__(self) -> T:
        return await self._items.__anext__()

    async def __aenter__(self: S) -> S:
        return self

    async def __aexit__(
        self,
        exc_type: Optional[type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        await self.aclose()


S = TypeVar("S", bound=AsyncStream[Any])


class AsyncRunStream(AsyncStream[T], Generic[T, R]):
    """The events of one run."""

    _result: Optional[R] = None

    @property
    def result(self) -> R:
        """The result, after the last event."""
        if self._result is None:
            raise ZerobootError("the run has not ended", may_have_run=True)
        return self._result

    async def __anext__(self) -> T:
        event = await self._items.__anext__()
        if isinstance(event, (CellEnd, CommandEnd)):
            self._result = event.result  # type: ignore[assignment]
        return event


class AsyncContexts:
    """The named interpreters of a sandbox. `default` exists from the start."""

    def __init__(self, sandbox: AsyncLiveSandbox) -> None:
        self._sandbox = sandbox

    async def create(self, name: Optional[str] = None, *, cwd: Optional[str] = None) -> Context:
        """Start an interpreter. Without a name the server chooses one."""
        body = {key: value for key, value in (("name", name), ("cwd", cwd)) if value is not None}
        answer = await self._ask("POST", self._sandbox._path("contexts"), body)
        return Context.of(answer.fields())

    async def list(self) -> builtins.list[Context]:
        answer = await self._ask("GET", self._sandbox._path("contexts"))
        return [Context.of(item) for item in answer.entries("contexts")]

    async def interrupt(self, context: Union[str, Context] = "default") -> None:
        """Interrupt the cell: `KeyboardInterrupt` in Python. The context keeps its state."""
        await self._do("POST", context, "interrupt")

    async def restart(self, context: Union[str, Context] = "default") -> Context:
        """Replace the interpreter by a new one. Its cell ends and its state is lost."""
        return Context.of((await self._do("POST", context, "restart")).fields())

    async def delete(self, context: Union[str, Context]) -> None:
        """End the interpreter."""
        await self._do("DELETE", context)

    async def _do(self, method: str, context: Union[str, Context], *what: str) -> _core.Answer:
        name = context.name if isinstance(context, Context) else context
        return await self._ask(method, self._sandbox._path("contexts", name, *what))

    async def _ask(
        self, method: str, path: str, body: Optional[Mapping[str, Any]] = None
    ) -> _core.Answer:
        answer = await self._sandbox._client._ask(method, path, body)
        if not answer.good:
            raise answer.error()
        return answer


class AsyncCommands:
    """The programs of a sandbox."""

    def __init__(self, sandbox: AsyncLiveSandbox) -> None:
        self._sandbox = sandbox

    async def run(
        self,
        command: _live_core.Command,
        *,
        cwd: Optional[str] = None,
        env: Optional[Mapping[str, str]] = None,
        stdin: Optional[Data] = None,
        timeout: Optional[float] = None,
        on_stdout: OnText = None,
        on_stderr: OnText = None,
        request_timeout: Optional[float] = None,
    ) -> CommandResult:
        """Run a program and wait for its end.

        A string is a line for the shell; a list is a program with its arguments. A program that
        fails is a result; `result.check()` raises. `timeout` is in seconds (the client's default if
        None): the program is then killed.
        """
        if on_stdout is None and on_stderr is None:
            body, budget = self._body(command, cwd, env, stdin, timeout, request_timeout)
            path = self._sandbox._path("commands")
            answer = await self._sandbox._client._ask("POST", path, body, budget=budget)
            return CommandResult.of(answer.fields(), answer.request_id)
        async with self.stream(
            command,
            cwd=cwd,
            env=env,
            stdin=stdin,
            timeout=timeout,
            request_timeout=request_timeout,
        ) as events:
            await _hear(events, on_stdout, on_stderr)
            return events.result

    def stream(
        self,
        command: _live_core.Command,
        *,
        cwd: Optional[str] = None,
        env: Optional[Mapping[str, str]] = None,
        stdin: Optional[Data] = None,
        timeout: Optional[float] = None,
        request_timeout: Optional[float] = None,
    ) -> AsyncRunStream[CommandEvent, CommandResult]:
        """Run a program and iterate over its events while it runs.

        The request is sent when the iteration begins. Leaving early ends the program.
        """
        body, budget = self._body(
            command, cwd, env, stdin, timeout, request_timeout, end_with_client=True
        )
        return AsyncRunStream(self._events(body, budget))

    async def start(
        self,
        command: _live_core.Command,
        *,
        cwd: Optional[str] = None,
        env: Optional[Mapping[str, str]] = None,
        stdin: Optional[Data] = None,
        keep_stdin_open: bool = False,
        terminal: Optional[tuple[int, int]] = None,
        timeout: Optional[float] = None,
        tag: Optional[str] = None,
    ) -> AsyncCommand:
        """Start a program in the background. It goes on when this client goes.

        `keep_stdin_open`: `write()` and `close_stdin()` come later. `terminal`: (columns, rows), on
        a terminal instead of pipes. `timeout`: seconds; None is as long as the sandbox lives.
        """
        body = _live_core.command_body(
            command,
            cwd=cwd,
            env=env,
            stdin=stdin,
            timeout=timeout,
            keep_stdin_open=keep_stdin_open,
            background=True,
            tag=tag,
            terminal=terminal,
        )
        answer = await self._sandbox._client._ask("POST", self._sandbox._path("commands"), body)
        return AsyncCommand(self._sandbox, CommandInfo.of(answer.fields()))

    async def list(self) -> builtins.list[CommandInfo]:
        """List the programs that run, and some that have ended."""
        answer = await self._sandbox._client._ask("GET", self._sandbox._path("commands"))
        return [CommandInfo.of(item) for item in answer.entries("commands")]

    async def connect(self, command_id: str) -> AsyncCommand:
        """Connect to a program that was started before, perhaps by another client."""
        path = self._sandbox._path("commands", command_id)
        answer = await self._sandbox._client._ask("GET", path)
        return AsyncCommand(self._sandbox, CommandInfo.of(answer.fields()))

    def _body(
        self,
        command: _live_core.Command,
        cwd: Optional[str],
        env: Optional[Mapping[str, str]],
        stdin: Optional[Data],
        timeout: Optional[float],
        request_timeout: Optional[float],
        end_with_client: bool = False,
    ) -> tuple[dict[str, Any], float]:
        config = self._sandbox._client._config
        body = _live_core.command_body(
            command,
            cwd=cwd,
            env=env,
            stdin=stdin,
            timeout=config.timeout if timeout is None else timeout,
            end_with_client=end_with_client,
        )
        return body, config.request_timeout([body], request_timeout)

    async def _events(self, body: Mapping[str, Any], budget: float) -> AsyncIterator[CommandEvent]:
        client = self._sandbox._client
        attempts = Attempts(client._config, budget, silence=_core.STREAM_SILENCE)
        response = await client._opened(
            "POST", self._sandbox._path("commands"), _core.dump(body), attempts, _SSE
        )
        reader = CommandReader(response.headers.get("x-request-id"))
        try:
            async for chunk in response.aiter_bytes():
                if not reader.ended:
                    attempts.check_deadline()
                for event in reader.feed(chunk):
                    yield event
            reader.finish()
        except httpx.HTTPError as e:
            if not reader.ended:
                attempts.after_error(e)
        finally:
            await response.aclose()


class AsyncCommand:
    """A program in the background of a sandbox."""

    def __init__(self, sandbox: AsyncLiveSandbox, info: CommandInfo) -> None:
        self._sandbox = sandbox
        self._result: Optional[CommandResult] = None
        #: What the server last said about it.
        self.info = info

    @property
    def id(self) -> str:
        return self.info.id

    @property
    def pid(self) -> int:
        return self.info.pid

    def output(
        self, offset: int = 0, *, timeout: Optional[float] = None
    ) -> AsyncRunStream[CommandEvent, CommandResult]:
        """Follow its output from byte `offset` on until its end.

        A connection that breaks is made again where it broke. What the server no longer has is one
        `Lost` event. `timeout`: seconds after which this client gives up; the program goes on.
        """
        return AsyncRunStream(self._events(offset, FOREVER if timeout is None else timeout))

    async def wait(
        self,
        timeout: Optional[float] = None,
        *,
        on_stdout: OnText = None,
        on_stderr: OnText = None,
    ) -> CommandResult:
        """Wait for its end. The result has all its output that the server still has.

        Raises `TimeoutError` after `timeout` seconds; the program goes on.
        """
        if self._result is None:
            async with self.output(timeout=timeout) as events:
                await _hear(events, on_stdout, on_stderr)
                self._result = events.result
        return self._result

    async def refresh(self) -> CommandInfo:
        """Ask the server about it again."""
        answer = await self._ask("GET")
        self.info = CommandInfo.of(answer.fields())
        return self.info

    async def write(self, data: Data) -> None:
        """Write bytes to its standard input, or its terminal."""
        await self._stdin(data.encode("utf-8") if isinstance(data, str) else data, None)

    async def close_stdin(self) -> None:
        """Close its standard input."""
        await self._stdin(b"", "true")

    async def signal(self, signal: Union[int, str]) -> None:
        """Send a signal, by number or name."""
        await self._ask("POST", "signal", body=_live_core.signal_body(signal))

    async def kill(self) -> None:
        """Kill it and its children. The server forgets a command that has ended."""
        await self._ask("DELETE")

    async def resize(self, columns: int, rows: int) -> None:
        """Set the size of its terminal."""
        await self._ask("POST", "resize", body={"columns": columns, "rows": rows})

    async def terminal(self, offset: int = 0) -> AsyncTerminal:
        """Open its terminal, from byte `offset` of its output on. Closing it leaves it running."""
        path = self._path("terminal", offset=offset)
        return await AsyncTerminal._open(self._sandbox._client, path)

    def __repr__(self) -> str:
        return f"AsyncCommand(id={self.id!r}, pid={self.pid})"

    def _path(self, *what: str, **query: Any) -> str:
        return self._sandbox._path("commands", self.info.id, *what, **query)

    async def _ask(
        self, method: str, *what: str, body: Optional[Mapping[str, Any]] = None
    ) -> _core.Answer:
        answer = await self._sandbox._client._ask(method, self._path(*what), body)
        if not answer.good:
            raise answer.error()
        return answer

    async def _stdin(self, data: bytes, end: Optional[str]) -> None:
        client = self._sandbox._client
        # The program may take its time to read it.
        attempts = Attempts(client._config, FOREVER)
        headers = {"Content-Type": _BYTES}
        response = await client._opened(
            "POST", self._path("stdin", end=end), data, attempts, "application/json", headers
        )
        await response.aclose()

    async def _events(self, offset: int, budget: float) -> AsyncIterator[CommandEvent]:
        client = self._sandbox._client
        attempts = Attempts(client._config, budget, silence=_core.STREAM_SILENCE)
        reader = CommandReader(None, self.id, self.pid)
        failed = 0
        while True:
            path = self._path("output", offset=reader.offset or offset)
            response = await client._opened("GET", path, None, attempts, _SSE)
            reader.resume(response.headers.get("x-request-id"))
            try:
                async for chunk in response.aiter_bytes():
                    if not reader.ended:
                        attempts.check_deadline()
                    failed = 0
                    for event in reader.feed(chunk):
                        yield event
                reader.finish()
                return
            except (httpx.HTTPError, ConnectionError) as e:
                if reader.ended:
                    return
                failed += 1
                attempts.check_deadline()
                if failed > client._config.max_retries:
                    if isinstance(e, httpx.HTTPError):
                        attempts.after_error(e)
                    raise
            finally:
                await response.aclose()
            await sleep(0.1 * 2.0**failed)


class AsyncFiles:
    """The files of a sandbox. Paths are absolute, or relative to the home directory."""

    def __init__(self, sandbox: AsyncLiveSandbox) -> None:
        self._sandbox = sandbox

    async def read(self, path: str, *, offset: int = 0, length: Optional[int] = None) -> bytes:
        """Read a file, or `length` bytes of it from `offset`."""
        pieces: builtins.list[bytes] = []
        async with self.stream(path, offset=offset, length=length) as stream:
            async for piece in stream:
                pieces.append(piece)
        return b"".join(pieces)

    async def read_text(self, path: str, encoding: str = "utf-8", errors: str = "strict") -> str:
        return (await self.read(path)).decode(encoding, errors)

    def stream(
        self, path: str, *, offset: int = 0, length: Optional[int] = None
    ) -> AsyncStream[bytes]:
        """Read a file piece by piece: for files that are larger than memory."""
        headers = _live_core.range_header(offset, length)
        return AsyncStream(self._pieces(path, headers))

    async def download(self, path: str, local: Union[str, os.PathLike[str]]) -> None:
        """Copy a file of the sandbox to a local one, in pieces."""
        async with self.stream(path) as stream:
            await save(stream, local)

    async def write(self, path: str, data: Source, *, mode: Union[int, str, None] = None) -> Entry:
        """Write a file, and make its directories. It appears under its name when it is complete.

        `data`: text, bytes, a local `pathlib.Path`, an open file, or an iterable of bytes, which is
        sent in pieces.
        """
        client = self._sandbox._client
        attempts = Attempts(client._config, FOREVER, silence=_core.STREAM_SILENCE)
        query = {"path": path, "mode": _live_core.mode_text(mode)}
        headers = {"Content-Type": _BYTES}
        response = await client._opened(
            "PUT",
            self._sandbox._path("files", **query),
            upload(data),
            attempts,
            "application/json",
            headers,
        )
        try:
            body = await response.aread()
        except httpx.HTTPError as e:
            attempts.after_error(e)
        finally:
            await response.aclose()
        answer = _core.Answer(response.status_code, response.headers, body)
        return Entry.of(answer.fields())

    async def list(self, path: str = ".", *, depth: int = 1) -> builtins.list[Entry]:
        """List a directory; with `depth` 2 also its directories, and so on."""
        answer = await self._ask("GET", "list", path=path, depth=depth)
        return [Entry.of(item) for item in answer.entries("entries")]

    async def stat(self, path: str) -> Entry:
        """Describe a file; of a link, the link itself."""
        return Entry.of((await self._ask("GET", "stat", path=path)).fields())

    async def exists(self, path: str) -> bool:
        try:
            await self.stat(path)
        except FileNotFound:
            return False
        return True

    async def mkdir(self, path: str) -> Entry:
        """Make a directory and its parents. It may exist."""
        return Entry.of((await self._ask("POST", "mkdir", {"path": path})).fields())

    async def move(self, source: str, target: str) -> Entry:
        """Move a file or a directory. A file at the new path is replaced."""
        answer = await self._ask("POST", "move", {"from": source, "to": target})
        return Entry.of(answer.fields())

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file or a directory; with `recursive` also everything in it."""
        await self._ask("DELETE", path=path, recursive="true" if recursive else None)

    async def chmod(self, path: str, mode: Union[int, str]) -> Entry:
        """Set the permission bits: 0o755, or "755"."""
        body = {"path": path, "mode": _live_core.mode_text(mode)}
        return Entry.of((await self._ask("POST", "chmod", body)).fields())

    async def watch(self, path: str = ".", *, recursive: bool = False) -> AsyncStream[Change]:
        """Watch a directory for changes. Close it, or leave the `with` block, to stop."""
        client = self._sandbox._client
        attempts = Attempts(client._config, FOREVER, silence=_core.STREAM_SILENCE)
        query = {"path": path, "recursive": "true" if recursive else None}
        response = await client._opened(
            "GET", self._sandbox._path("files", "watch", **query), None, attempts, _SSE
        )
        return AsyncStream(_Changes(response, attempts))

    async def _ask(
        self,
        method: str,
        what: Optional[str] = None,
        body: Optional[Mapping[str, Any]] = None,
        **query: Any,
    ) -> _core.Answer:
        parts = ("files",) if what is None else ("files", what)
        url = self._sandbox._path(*parts, **query)
        # Large trees take their time.
        answer = await self._sandbox._client._ask(method, url, body, budget=_core.STREAM_SILENCE)
        if not answer.good:
            raise answer.error()
        return answer

    async def _pieces(self, path: str, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        client = self._sandbox._client
        attempts = Attempts(client._config, FOREVER, silence=_core.STREAM_SILENCE)
        url = self._sandbox._path("files", path=path)
        response = await client._opened("GET", url, None, attempts, _BYTES, headers)
        try:
            async for piece in response.aiter_bytes():
                yield piece
        except httpx.HTTPError as e:
            attempts.after_error(e)
        finally:
            await response.aclose()


class _Changes(AsyncIterator[Change]):
    """The changes of a watch whose answer has begun.

    No generator: one that was never begun would not close its answer.
    """

    def __init__(self, response: httpx.Response, attempts: Attempts) -> None:
        self._response = response
        self._attempts = attempts
        self._chunks = response.aiter_bytes()
        self._reader = WatchReader(response.headers.get("x-request-id"))
        self._ready: builtins.list[Change] = []

    async def __anext__(self) -> Change:
        while not self._ready:
            try:
                chunk = await self._chunks.__anext__()
            except httpx.StreamClosed:
                raise StopAsyncIteration from None
            except httpx.HTTPError as e:
                self._attempts.after_error(e)
                raise
            self._ready.extend(self._reader.feed(chunk))
        return self._ready.pop(0)

    async def aclose(self) -> None:
        await self._response.aclose()


class AsyncTerminal(AsyncIterator[bytes]):
    """A terminal of a sandbox. Iterate over what it shows; `send()` input.

    One task or thread may read while others send.
    """

    def __init__(self, response: httpx.Response, wire: TerminalWire) -> None:
        self._response = response
        self._stream = response.extensions["network_stream"]
        self._wire = wire
        self._lock = Lock()

    @classmethod
    async def _open(cls, client: AsyncSandbox, path: str) -> AsyncTerminal:
        wire = TerminalWire()
        attempts = Attempts(client._config, client._config.grace)
        response = await client._opened("GET", path, None, attempts, "*/*", wire.headers())
        try:
            wire.accepted(response.headers if response.status_code == 101 else {})
        except BaseException:
            await response.aclose()
            raise
        return cls(response, wire)

    @property
    def started(self) -> Optional[Started]:
        """The command's id and pid, once something was read."""
        return self._wire.started

    @property
    def exit(self) -> Optional[TerminalExit]:
        """How the program ended, after the last bytes; None before, or if it is unknown."""
        return self._wire.exit

    async def read(self, timeout: Optional[float] = None) -> bytes:
        """Read what it shows next; empty at its end. `TimeoutError` after `timeout` seconds."""
        # The server asks now and then whether we are there, so each read alone may be short.
        end = None if timeout is None else time.monotonic() + timeout
        while not self._wire.over:
            left = None if end is None else max(end - time.monotonic(), 0.001)
            try:
                data = await self._stream.read(_live_core.CHUNK, timeout=left)
            except Exception as e:  # httpcore's, which httpx does not translate here
                if "Timeout" in type(e).__name__:
                    raise TimeoutError(f"nothing within {timeout:g} s", may_have_run=True) from e
                raise ConnectionError(f"the terminal broke: {e}", may_have_run=True) from e
            shown, answer = self._wire.feed(data)
            if answer:
                await self._send(answer)
            if shown:
                return shown
        if self._wire.error is not None:
            raise self._wire.error
        return b""

    async def send(self, data: Data) -> None:
        """Send input, as if typed."""
        data = data.encode("utf-8") if isinstance(data, str) else data
        async with self._lock:
            await self._write(self._wire.output(data))

    async def resize(self, columns: int, rows: int) -> None:
        async with self._lock:
            await self._write(self._wire.control(resize={"columns": columns, "rows": rows}))

    async def signal(self, signal: Union[int, str]) -> None:
        """Send a signal to the program that the terminal belongs to."""
        async with self._lock:
            await self._write(self._wire.control(**_live_core.signal_body(signal)))

    async def wait(self, on_output: Optional[Callable[[bytes], object]] = None) -> TerminalExit:
        """Read to the end of the program, and return how it ended."""
        while shown := await self.read():
            if on_output is not None:
                await call(on_output, shown)
        if self._wire.exit is None:
            raise ConnectionError("the terminal ended before its program", may_have_run=True)
        return self._wire.exit

    async def aclose(self) -> None:
        """Close the terminal."""
        try:
            async with self._lock:
                await self._write(self._wire.close())
        except ZerobootError:
            pass  # it was broken already
        finally:
            await self._response.aclose()

    async def __anext__(self) -> bytes:
        shown = await self.read()
        if not shown:
            raise StopAsyncIteration
        return shown

    async def __aenter__(self) -> AsyncTerminal:
        return self

    async def __aexit__(
        self,
        exc_type: Optional[type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        await self.aclose()

    async def _send(self, frames: bytes) -> None:
        async with self._lock:
            await self._write(frames)

    async def _write(self, frames: bytes) -> None:
        if not frames:
            return
        try:
            await self._stream.write(frames, timeout=_core.STREAM_SILENCE)
        except Exception as e:  # httpcore's
            raise ConnectionError(f"the terminal broke: {e}", may_have_run=True) from e


async def _hear(
    events: AsyncRunStream[CommandEvent, CommandResult], on_stdout: OnText, on_stderr: OnText
) -> None:
    async for event in events:
        if isinstance(event, Stdout) and on_stdout is not None:
            await call(on_stdout, event.text)
        elif isinstance(event, Stderr) and on_stderr is not None:
            await call(on_stderr, event.text)
