"""`Sandbox`: the blocking client."""

from __future__ import annotations

import builtins
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Callable, Literal, Optional, Union, overload

import httpx

from . import _core, _live_core
from ._core import Answer, Attempts
from ._errors import ZerobootError
from ._events import End, Event, ExecReader, Stderr, Stdout
from ._live_sync import LiveSandbox
from ._live_types import SandboxInfo, SandboxLimits
from ._result import Result
from ._types import Data, Exec, FileData, Health, Language, Limits


class Sandbox:
    """A client of a Zeroboot server. Every `run` uses a new sandbox, which ends with the answer.

    `api_key` defaults to `ZEROBOOT_API_KEY`, `base_url` to `ZEROBOOT_BASE_URL`, else to a server
    on this machine. `timeout` is the default wall-clock limit of an exec in seconds; the client
    waits for that and `grace` seconds more. One object can be used by many threads.
    """

    def __init__(
        self,
        api_key: Optional[str] = None,
        base_url: Optional[str] = None,
        *,
        timeout: float = _core.DEFAULT_TIMEOUT,
        grace: float = 15.0,
        connect_timeout: float = 5.0,
        max_retries: int = 2,
        http_client: Optional[httpx.Client] = None,
    ) -> None:
        self._config = _core.make_config(
            api_key,
            base_url,
            timeout=timeout,
            grace=grace,
            connect_timeout=connect_timeout,
            max_retries=max_retries,
        )
        self._owned = http_client is None
        self._http = http_client or httpx.Client(**_core.client_options(self._config))

    def run(
        self,
        code: str,
        language: Optional[Language] = None,
        timeout: Optional[float] = None,
        *,
        template: Optional[str] = None,
        stdin: Optional[Data] = None,
        env: Optional[Mapping[str, str]] = None,
        args: Optional[Sequence[str]] = None,
        files: Optional[Mapping[str, FileData]] = None,
        output_files: Optional[Sequence[str]] = None,
        limits: Optional[Limits] = None,
        on_stdout: Optional[Callable[[str], object]] = None,
        on_stderr: Optional[Callable[[str], object]] = None,
        request_timeout: Optional[float] = None,
    ) -> Result:
        """Run `code` in a new sandbox and wait for its end.

        Code that fails is a `Result`, not an exception; `result.check()` raises. With `on_stdout`
        or `on_stderr` the output is handed over as it comes, and is in the result all the same.
        """
        if on_stdout is not None or on_stderr is not None:
            with self.stream(
                code,
                language,
                timeout,
                template=template,
                stdin=stdin,
                env=env,
                args=args,
                files=files,
                output_files=output_files,
                limits=limits,
                request_timeout=request_timeout,
            ) as events:
                for event in events:
                    if isinstance(event, Stdout) and on_stdout is not None:
                        on_stdout(event.text)
                    elif isinstance(event, Stderr) and on_stderr is not None:
                        on_stderr(event.text)
                return events.result
        item = Exec(
            code, language, template, timeout, stdin, env, args, files, output_files, limits
        )
        body = _core.exec_body(item, self._config.timeout)
        return self._post("/v1/exec", body, [body], request_timeout).result()

    def stream(
        self,
        code: str,
        language: Optional[Language] = None,
        timeout: Optional[float] = None,
        *,
        template: Optional[str] = None,
        stdin: Optional[Data] = None,
        env: Optional[Mapping[str, str]] = None,
        args: Optional[Sequence[str]] = None,
        files: Optional[Mapping[str, FileData]] = None,
        output_files: Optional[Sequence[str]] = None,
        limits: Optional[Limits] = None,
        request_timeout: Optional[float] = None,
    ) -> ExecStream:
        """Run `code` and iterate over its events while it runs.

        The request is sent when the iteration begins. Leaving the `with` block, or `close()`, ends
        the sandbox.
        """
        item = Exec(
            code, language, template, timeout, stdin, env, args, files, output_files, limits
        )
        body = _core.exec_body(item, self._config.timeout)
        return ExecStream(self._events(body, request_timeout))

    @overload
    def run_batch(
        self,
        items: Sequence[Union[str, Exec]],
        language: Optional[Language] = ...,
        timeout: Optional[float] = ...,
        *,
        template: Optional[str] = ...,
        return_errors: Literal[False] = ...,
        request_timeout: Optional[float] = ...,
    ) -> list[Result]: ...

    @overload
    def run_batch(
        self,
        items: Sequence[Union[str, Exec]],
        language: Optional[Language] = ...,
        timeout: Optional[float] = ...,
        *,
        template: Optional[str] = ...,
        return_errors: Literal[True],
        request_timeout: Optional[float] = ...,
    ) -> list[Union[Result, ZerobootError]]: ...

    def run_batch(
        self,
        items: Sequence[Union[str, Exec]],
        language: Optional[Language] = None,
        timeout: Optional[float] = None,
        *,
        template: Optional[str] = None,
        return_errors: bool = False,
        request_timeout: Optional[float] = None,
    ) -> Any:
        """Run many pieces of code, each in its own sandbox, in parallel; results in order.

        An item that the server refuses raises `BatchError`, whose `results` has them all; with
        `return_errors=True` the error stands in the list instead.
        """
        bodies = _core.batch_bodies(
            items, Exec("", language, template, timeout), self._config.timeout
        )
        if not bodies:
            return []
        answer = self._post("/v1/exec/batch", {"executions": bodies}, bodies, request_timeout)
        return answer.results(len(bodies), return_errors)

    def health(self) -> Health:
        """Ask for the server's health. Raises only if the server cannot be asked."""
        return self._get("/v1/health", retry=False).health()

    def metrics(self) -> str:
        """The server's metrics in Prometheus' text format."""
        answer = self._get("/v1/metrics")
        if answer.status != 200:
            raise answer.error()
        return answer.body.decode("utf-8")

    # --- long-lived sandboxes ---

    @classmethod
    def create(
        cls,
        template: Optional[str] = None,
        *,
        language: Optional[Language] = None,
        timeout: float = _live_core.DEFAULT_LEASE,
        idle_timeout: Optional[float] = None,
        env: Optional[Mapping[str, str]] = None,
        metadata: Optional[Mapping[str, str]] = None,
        limits: Optional[SandboxLimits] = None,
        api_key: Optional[str] = None,
        base_url: Optional[str] = None,
        client: Optional[Sandbox] = None,
    ) -> LiveSandbox:
        """Make a sandbox that lives for `timeout` seconds, until `kill()`, or its block's end.

        `idle_timeout`: it also ends when nothing was asked of it for so many seconds. `client`: use
        the key, the address and the connections of this one.
        """
        body = _live_core.create_body(
            template, language, timeout, idle_timeout, env, metadata, limits
        )
        used = client or cls(api_key, base_url)
        try:
            answer = used._ask("POST", "/v1/sandboxes", body)
            info = SandboxInfo.of(answer.fields())
        except BaseException:
            if client is None:
                used.close()
            raise
        return LiveSandbox(used, info, owns_client=client is None, kill_on_exit=True)

    @classmethod
    def connect(
        cls,
        sandbox_id: str,
        *,
        api_key: Optional[str] = None,
        base_url: Optional[str] = None,
        client: Optional[Sandbox] = None,
    ) -> LiveSandbox:
        """Connect to an existing sandbox. Leaving its `with` block does not end it."""
        used = client or cls(api_key, base_url)
        try:
            answer = used._ask("GET", _live_core.sandbox_path(sandbox_id))
            info = SandboxInfo.of(answer.fields())
        except BaseException:
            if client is None:
                used.close()
            raise
        return LiveSandbox(used, info, owns_client=client is None, kill_on_exit=False)

    @classmethod
    def list(
        cls,
        *,
        metadata: Optional[Mapping[str, str]] = None,
        api_key: Optional[str] = None,
        base_url: Optional[str] = None,
        client: Optional[Sandbox] = None,
    ) -> builtins.list[SandboxInfo]:
        """List the sandboxes of this key; with `metadata`, those that have all of it."""
        used = client or cls(api_key, base_url)
        try:
            found: builtins.list[SandboxInfo] = []
            cursor: Optional[str] = None
            while True:
                answer = used._ask("GET", _live_core.list_path(metadata, cursor))
                found += [SandboxInfo.of(item) for item in answer.entries("sandboxes")]
                cursor = answer.fields().get("next_cursor")
                if not cursor:
                    return found
        finally:
            if client is None:
                used.close()

    def close(self) -> None:
        if self._owned:
            self._http.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self,
        exc_type: Optional[type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A Sandbox made for one call, as agents do, gives its connection back without a `with`.
        with contextlib.suppress(Exception):
            self.close()

    def __repr__(self) -> str:
        return f"Sandbox(base_url={self._config.base_url!r})"

    def _post(
        self,
        path: str,
        body: Mapping[str, Any],
        execs: Sequence[Mapping[str, Any]],
        request_timeout: Optional[float],
    ) -> Answer:
        budget = self._config.request_timeout(execs, request_timeout)
        return self._request("POST", path, _core.dump(body), Attempts(self._config, budget))

    def _get(self, path: str, *, retry: bool = True) -> Answer:
        return self._request("GET", path, None, Attempts(self._config, self._config.grace), retry)

    def _request(
        self,
        method: str,
        path: str,
        content: Optional[bytes],
        attempts: Attempts,
        retry_answers: bool = True,
    ) -> Answer:
        while True:
            try:
                with self._open(method, path, content, attempts, "application/json") as response:
                    answer = _read(response, attempts)
            except httpx.HTTPError as e:
                wait: Optional[float] = attempts.after_error(e)
            else:
                wait = attempts.after_answer(answer.status, answer.headers)
                if wait is None or not retry_answers:
                    return answer
            time.sleep(wait or 0.0)

    def _ask(
        self,
        method: str,
        path: str,
        body: Optional[Mapping[str, Any]] = None,
        *,
        budget: Optional[float] = None,
    ) -> Answer:
        attempts = Attempts(self._config, self._config.grace if budget is None else budget)
        content = None if body is None else _core.dump(body)
        return self._request(method, path, content, attempts)

    def _opened(
        self,
        method: str,
        path: str,
        content: Any,
        attempts: Attempts,
        accept: str,
        headers: Optional[Mapping[str, str]] = None,
    ) -> httpx.Response:
        """A good answer whose body is still to be read. The caller closes it."""
        headers = {**self._config.headers, "Accept": accept, **(headers or {})}
        if content is not None and "Content-Type" not in headers:
            headers["Content-Type"] = "application/json"
        while True:
            request = self._http.build_request(
                method,
                self._config.url(path),
                content=content,
                headers=headers,
                timeout=attempts.begin(),
            )
            try:
                response = self._http.send(request, stream=True)
                if 200 <= response.status_code < 300 or response.status_code == 101:
                    return response
                try:
                    answer = _read(response, attempts)
                finally:
                    response.close()
            except httpx.HTTPError as e:
                wait: Optional[float] = attempts.after_error(e)
            else:
                wait = attempts.after_answer(answer.status, answer.headers)
                if wait is None or not isinstance(content, (bytes, type(None))):
                    raise answer.error()
            time.sleep(wait or 0.0)

    def _open(
        self, method: str, path: str, content: Optional[bytes], attempts: Attempts, accept: str
    ) -> contextlib.AbstractContextManager[httpx.Response]:
        headers = {**self._config.headers, "Accept": accept}
        if content is not None:
            headers["Content-Type"] = "application/json"
        return self._http.stream(
            method,
            self._config.url(path),
            content=content,
            headers=headers,
            timeout=attempts.begin(),
        )

    def _events(self, body: Mapping[str, Any], request_timeout: Optional[float]) -> Iterator[Event]:
        budget = self._config.request_timeout([body], request_timeout)
        attempts = Attempts(self._config, budget, silence=_core.STREAM_SILENCE)
        content = _core.dump(body)
        reader: Optional[ExecReader] = None
        while True:
            try:
                with self._open(
                    "POST", "/v1/exec", content, attempts, "text/event-stream"
                ) as response:
                    if not _core.stream_refused(response.status_code, response.headers):
                        reader = ExecReader(response.headers.get("x-request-id"))
                        for chunk in response.iter_bytes():
                            if reader.result is None:
                                attempts.check_deadline()
                            yield from reader.feed(chunk)
                        # Read to the end of the body, so that the connection can be used again.
                        reader.finish()
                        return
                    answer = _read(response, attempts)
            except httpx.HTTPError as e:
                if reader is not None and reader.result is not None:
                    return  # broken after the last event: nothing is missing
                wait: Optional[float] = attempts.after_error(e)
            else:
                wait = attempts.after_answer(answer.status, answer.headers)
                if wait is None:
                    raise _core.not_a_stream(answer)
            time.sleep(wait or 0.0)


class ExecStream(Iterator[Event]):
    """The events of one exec. Iterate once; close (or leave the `with` block) to end it early."""

    def __init__(self, events: Iterator[Event]) -> None:
        self._events = events
        self._result: Optional[Result] = None

    @property
    def result(self) -> Result:
        """The result, after the last event."""
        if self._result is None:
            raise ZerobootError("the exec has not ended", may_have_run=True)
        return self._result

    def close(self) -> None:
        """End the sandbox if it still runs: the server ends it when the connection closes."""
        close = getattr(self._events, "close", None)
        if close is not None:
            close()

    def __next__(self) -> Event:
        event = next(self._events)
        if isinstance(event, End):
            self._result = event.result
        return event

    def __enter__(self) -> ExecStream:
        return self

    def __exit__(
        self,
        exc_type: Optional[type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()


def _read(response: httpx.Response, attempts: Attempts) -> Answer:
    chunks = []
    for chunk in response.iter_bytes():
        attempts.check_deadline()
        chunks.append(chunk)
    return Answer(response.status_code, response.headers, b"".join(chunks))
