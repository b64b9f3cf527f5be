"""Both clients against faults. Every test runs with `Sandbox` and with `AsyncSandbox`."""

from __future__ import annotations

import asyncio
import base64
import builtins
import gc
import inspect
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from stub import END, OK, Stub, answer, drip, drop, event, silent, sse

import zeroboot
from zeroboot import (
    AsyncSandbox,
    AuthenticationError,
    BadRequestError,
    BatchError,
    End,
    Exec,
    ExecutionError,
    File,
    InputFile,
    RateLimitError,
    Sandbox,
    ServerError,
    Start,
    Stderr,
    Stdout,
    ZerobootError,
)

Make = Callable[..., Stub]


class FromAsync:
    """`AsyncSandbox` driven from a test that is not async."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._inner = AsyncSandbox(*args, **options)

    def _do(self, awaitable: Any) -> Any:
        async def main() -> Any:
            return await awaitable

        return self._loop.run_until_complete(main())

    def run(self, *args: Any, **options: Any) -> Any:
        return self._do(self._inner.run(*args, **options))

    def run_batch(self, *args: Any, **options: Any) -> Any:
        return self._do(self._inner.run_batch(*args, **options))

    def health(self) -> Any:
        return self._do(self._inner.health())

    def metrics(self) -> Any:
        return self._do(self._inner.metrics())

    def stream(self, *args: Any, **options: Any) -> Any:
        stream = self._inner.stream(*args, **options)
        outer = self

        class Events:
            def __iter__(self) -> Iterator[Any]:
                while True:
                    try:
                        yield outer._do(stream.__anext__())
                    except StopAsyncIteration:
                        return

            def __enter__(self) -> Events:
                return self

            def __exit__(self, *_: object) -> None:
                outer._do(stream.aclose())

            @property
            def result(self) -> Any:
                return stream.result

        return Events()

    def close(self) -> None:
        self._do(self._inner.aclose())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


@pytest.fixture(params=["sync", "async"])
def client(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def make(url: str, **options: Any) -> Any:
        kind = Sandbox if request.param == "sync" else FromAsync
        made.append(kind("zb_live_test", url, **options))
        return made[-1]

    yield make
    for sandbox in made:
        sandbox.close()


# --- what is sent ---------------------------------------------------------------------------


def test_a_run_sends_code_key_and_timeout(client: Any, stub: Make) -> None:
    server = stub(answer())
    result = client(server.url).run("print(1 + 1)")
    sent = server.seen[0]
    assert (sent.method, sent.path) == ("POST", "/v1/exec")
    assert sent.headers["authorization"] == "Bearer zb_live_test"
    assert sent.headers["content-type"] == "application/json"
    assert sent.json == {"code": "print(1 + 1)", "timeout_seconds": 30.0}
    assert result == "2" and result.stdout == "2\n" and result.request_id == "req-1"


def test_every_option_has_its_place(client: Any, stub: Make, tmp_path: Path) -> None:
    local = tmp_path / "local.bin"
    local.write_bytes(b"\x00\xff")
    server = stub(answer())
    client(server.url).run(
        "x",
        "node",
        2.5,
        stdin=b"\xff",
        env={"A": "b"},
        args=["--x", "1"],
        files={
            "a.txt": "text",
            "b.bin": b"bytes",
            "c.bin": local,
            "d.sh": InputFile("#!", executable=True),
        },
        output_files=["out.png"],
        limits={"memory_mb": 64, "cpu_seconds": 1.5},
    )

    def b64(data: bytes) -> dict[str, str]:
        return {"base64": base64.b64encode(data).decode()}

    assert server.seen[0].json == {
        "code": "x",
        "language": "node",
        "timeout_seconds": 2.5,
        "stdin": b64(b"\xff"),
        "env": {"A": "b"},
        "args": ["--x", "1"],
        "files": {
            "a.txt": "text",
            "b.bin": b64(b"bytes"),
            "c.bin": b64(b"\x00\xff"),
            "d.sh": {"text": "#!", "executable": True},
        },
        "output_files": ["out.png"],
        "limits": {"memory_mb": 64, "cpu_seconds": 1.5},
    }


def test_connections_are_used_again(client: Any, stub: Make) -> None:
    server = stub(answer(), sse(event("start", id="1"), event("end", **END)), answer())
    sandbox = client(server.url)
    sandbox.run("1")
    list(sandbox.stream("2"))
    sandbox.run("3")
    assert server.connections == 1 and len(server.seen) == 3


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_request", BadRequestError),
        (401, "unauthorized", AuthenticationError),
        (404, "not_found", BadRequestError),
        (413, "body_too_large", BadRequestError),
        (429, "rate_limited", RateLimitError),
        (500, "sandbox_failed", ServerError),
        (503, "busy", ServerError),
    ],
)
def test_a_refusal_has_its_type(
    client: Any, stub: Make, status: int, code: str, kind: type[ZerobootError]
) -> None:
    server = stub(answer(status, {"error": "because", "code": code, "request_id": "r9"}))
    with pytest.raises(kind) as caught:
        client(server.url).run("x")
    e = caught.value
    assert type(e) is kind
    assert (e.code, e.status, e.request_id) == (code, status, "r9")
    assert str(e) == f"because (HTTP {status}, {code}, request r9)"
    assert len(server.seen) == 1, "without Retry-After nothing is sent again"
    with pytest.raises(kind):
        list(client(server.url).stream("x"))


def test_an_error_page_of_a_proxy_is_still_a_server_error(client: Any, stub: Make) -> None:
    server = stub(answer(502, b"<html>Bad gateway</html>", content_type="text/html"))
    with pytest.raises(ServerError, match="Bad gateway") as caught:
        client(server.url).run("x")
    assert caught.value.may_have_run


def test_a_200_that_is_no_answer_is_a_server_error(client: Any, stub: Make) -> None:
    for body in (b"hello", b"[]", b"{}"):
        with pytest.raises(ServerError):
            client(stub(answer(200, body)).url).run("x")
    with pytest.raises(ServerError, match="does not stream"):
        list(client(stub(answer()).url).stream("x"))


def test_a_redirect_is_not_followed(client: Any, stub: Make) -> None:
    other = stub(answer())
    server = stub(answer(307, b"", location=other.url + "/v1/exec"))
    with pytest.raises(ServerError, match="redirects"):
        client(server.url).run("x")
    assert not other.seen


# --- retries --------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_with_retry_after_is_tried_again(client: Any, stub: Make, status: int) -> None:
    server = stub(answer(status, {"error": "later"}, retry_after="0.2"), answer())
    begin = time.monotonic()
    assert client(server.url).run("x") == "2"
    assert time.monotonic() - begin >= 0.2 and len(server.seen) == 2
    server = stub(
        answer(status, {"error": "later"}, retry_after="0"),
        sse(event("start", id="1"), event("end", **END)),
    )
    assert [e.type for e in client(server.url).stream("x")] == ["start", "end"]


def test_retries_are_bounded(client: Any, stub: Make) -> None:
    server = stub(answer(503, {"error": "busy"}, retry_after="0"))
    with pytest.raises(ServerError):
        client(server.url, max_retries=2).run("x")
    assert len(server.seen) == 3


def test_a_long_retry_after_is_told_not_slept_through(client: Any, stub: Make) -> None:
    server = stub(answer(429, {"error": "slow down"}, retry_after="60"))
    with pytest.raises(RateLimitError) as caught:
        client(server.url).run("x")
    assert caught.value.retry_after == 60 and len(server.seen) == 1


def test_a_500_is_never_sent_again_even_if_it_says_retry_after(client: Any, stub: Make) -> None:
    server = stub(answer(500, {"error": "no"}, retry_after="0"))
    with pytest.raises(ServerError):
        client(server.url).run("x")
    assert len(server.seen) == 1


def test_a_request_that_may_have_run_is_never_sent_again(client: Any, stub: Make) -> None:
    server = stub(drop)
    with pytest.raises(zeroboot.ConnectionError) as caught:
        client(server.url).run("x")
    assert len(server.seen) == 1 and caught.value.may_have_run
    assert isinstance(caught.value, builtins.ConnectionError)


def test_a_server_that_is_not_there_is_tried_again_then_reported(client: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    says = r"no connection to .*`zeroboot serve`"
    with pytest.raises(zeroboot.ConnectionError, match=says) as caught:
        client(f"http://127.0.0.1:{port}", max_retries=1).run("x")
    assert not caught.value.may_have_run


def test_a_server_that_comes_up_meanwhile_is_found(client: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    served = threading.Event()

    def late() -> None:
        time.sleep(0.15)
        with socket.create_server(("127.0.0.1", port)) as listener:
            conn, _ = listener.accept()
            with conn:
                conn.recv(65536)
                served.set()
                answer()(Stub([]), conn)

    thread = threading.Thread(target=late)
    thread.start()
    assert client(f"http://127.0.0.1:{port}", max_retries=20).run("x") == "2"
    thread.join()
    assert served.is_set()


# --- time -----------------------------------------------------------------------------------


def test_the_client_waits_for_the_exec_and_its_grace(client: Any, stub: Make) -> None:
    server = stub(silent)
    begin = time.monotonic()
    with pytest.raises(zeroboot.TimeoutError) as caught:
        client(server.url, grace=0.2).run("x", timeout=0.3)
    assert 0.5 <= time.monotonic() - begin < 3
    assert isinstance(caught.value, builtins.TimeoutError) and caught.value.may_have_run
    assert len(server.seen) == 1 and server.gone.wait(5), "giving up ends the sandbox"


def test_a_body_that_drips_for_ever_is_given_up(client: Any, stub: Make) -> None:
    begin = time.monotonic()
    with pytest.raises(zeroboot.TimeoutError):
        client(stub(drip).url).run("x", request_timeout=0.4)
    assert time.monotonic() - begin < 3


def test_keep_alives_do_not_stretch_the_deadline(client: Any, stub: Make) -> None:
    server = stub(sse(event("start", id="1"), *[b": keep-alive\n\n"] * 500, hold=True))
    with pytest.raises(zeroboot.TimeoutError):
        list(client(server.url).stream("x", request_timeout=0.3))
    assert server.gone.wait(5)


# --- streaming ------------------------------------------------------------------------------

EURO = "€uro 😀\n"


def stream_bytes() -> bytes:
    return (
        b": hello\n\n"
        + event(
            "start",
            id="7",
            template="p",
            language="python",
            isolation="vm",
            pooled=True,
            fork_time_ms=0.4,
        )
        + event("stdout", text=EURO)
        + b"event: brand-new\ndata: {}\n\n"
        + b'event: stderr\r\ndata: {"text":\r\ndata: "warn"}\r\n\r\n'
        + event("stdout", base64=base64.b64encode(b"\xff\x00").decode())
        + event("file", path="out.txt", text="made")
        + event("end", **{**END, "exit_code": 3})
    )


@pytest.mark.parametrize("size", [1, 2, 7, 100000])
def test_events_come_whole_wherever_the_bytes_are_cut(client: Any, stub: Make, size: int) -> None:
    raw = stream_bytes()
    server = stub(sse(*(raw[i : i + size] for i in range(0, len(raw), size))))
    events = list(client(server.url).stream("x"))
    assert server.seen[0].headers["accept"] == "text/event-stream"
    assert [type(e) for e in events] == [Start, Stdout, Stderr, Stdout, File, End]
    assert events[0] == Start("7", "p", "python", "vm", True, 0.4)
    assert events[1].text == EURO and events[2].text == "warn"
    assert events[3].data == b"\xff\x00" and events[3].text == "\ufffd\x00"
    assert events[4].path == "out.txt" and events[4].file.read_text() == "made"
    result = events[5].result
    assert result.stdout_bytes == EURO.encode() + b"\xff\x00" and result.stderr == "warn"
    assert result.exit_code == 3 and not result.ok and result.encoding["stdout"] == "base64"
    assert result.files["out.txt"].data == b"made" and result.request_id == "req-2"


def test_callbacks_get_the_output_and_so_does_the_result(client: Any, stub: Make) -> None:
    out: list[str] = []
    err: list[str] = []
    server = stub(sse(stream_bytes()))
    result = client(server.url).run("x", on_stdout=out.append, on_stderr=err.append)
    assert "".join(out) == EURO + "\ufffd\x00" and err == ["warn"]
    assert result.stdout == EURO + "\ufffd\x00"


def test_leaving_the_stream_ends_the_sandbox(client: Any, stub: Make) -> None:
    server = stub(sse(event("start", id="1"), event("stdout", text="a"), hold=True))
    with client(server.url).stream("x") as events:
        for e in events:
            if isinstance(e, Stdout):
                break
        with pytest.raises(ZerobootError, match="not ended"):
            _ = events.result
    assert server.gone.wait(5)


def test_a_callback_that_raises_ends_the_sandbox(client: Any, stub: Make) -> None:
    server = stub(sse(event("start", id="1"), event("stdout", text="a"), hold=True))

    def refuse(text: str) -> None:
        raise KeyError(text)

    with pytest.raises(KeyError):
        client(server.url).run("x", on_stdout=refuse)
    assert server.gone.wait(5)


def test_a_stream_cut_short_is_a_connection_error(client: Any, stub: Make) -> None:
    for end in (True, False):
        server = stub(sse(event("start", id="1"), event("stdout", text="a"), end=end))
        with pytest.raises(zeroboot.ConnectionError) as caught:
            list(client(server.url).stream("x"))
        assert caught.value.may_have_run and len(server.seen) == 1


def test_a_stream_cut_after_its_last_event_is_whole(client: Any, stub: Make) -> None:
    server = stub(sse(event("start", id="1"), event("end", **END), end=False))
    assert len(list(client(server.url).stream("x"))) == 2


def test_an_error_event_raises_its_type(client: Any, stub: Make) -> None:
    for code, kind in (("sandbox_failed", ServerError), ("rate_limited", RateLimitError)):
        failed = event("error", error="gone", code=code, request_id="r5")
        server = stub(sse(event("start", id="1"), failed))
        with pytest.raises(kind) as caught:
            list(client(server.url).stream("x"))
        assert caught.value.request_id == "r5" and caught.value.code == code


# --- batch, health --------------------------------------------------------------------------


def test_a_batch_keeps_order_and_options(client: Any, stub: Make) -> None:
    server = stub(answer(200, {"results": [OK, {**OK, "stdout": "b\n"}]}))
    results = client(server.url).run_batch(
        ["a", Exec("b", language="node", timeout=1, stdin="s")], template="py"
    )
    assert results == ["2", "b"]
    assert server.seen[0].path == "/v1/exec/batch"
    assert server.seen[0].json == {
        "executions": [
            {"code": "a", "template": "py", "timeout_seconds": 30.0},
            {"code": "b", "language": "node", "timeout_seconds": 1, "stdin": "s"},
        ]
    }


def test_an_item_that_did_not_run_is_an_error_in_its_place(client: Any, stub: Make) -> None:
    body = {"results": [OK, {"error": "Rate limit exceeded", "code": "rate_limited"}]}
    server = stub(answer(200, body))
    with pytest.raises(BatchError, match="1 of 2") as caught:
        client(server.url).run_batch(["a", "b"])
    assert caught.value.results[0] == "2"
    assert isinstance(caught.value.errors[0], RateLimitError)
    results = client(server.url).run_batch(["a", "b"], return_errors=True)
    assert isinstance(results[1], RateLimitError)


def test_a_batch_of_another_length_is_refused(client: Any, stub: Make) -> None:
    with pytest.raises(ServerError):
        client(stub(answer(200, {"results": [OK]})).url).run_batch(["a", "b"])


def test_an_empty_batch_asks_nobody(client: Any) -> None:
    assert client("http://127.0.0.1:1").run_batch([]) == []
    with pytest.raises(TypeError):
        client("http://127.0.0.1:1").run_batch("print(1)")


def test_health_is_an_answer_even_when_the_server_is_not_well(client: Any, stub: Make) -> None:
    body = {"status": "unavailable", "templates": {"python": {"ready": False}}}
    server = stub(answer(503, body, retry_after="1"))
    health = client(server.url).health()
    assert not health.ok and not health.ready and not health.templates["python"]["ready"]
    assert len(server.seen) == 1, "a health check that waits is no health check"
    with pytest.raises(ServerError):
        client(stub(answer(503, {"error": "no", "code": "x"})).url).health()


def test_metrics_are_text(client: Any, stub: Make) -> None:
    server = stub(answer(200, b"a_total 1\n", content_type="text/plain"))
    assert client(server.url).metrics() == "a_total 1\n"


# --- cancelling -----------------------------------------------------------------------------


def test_cancelling_the_task_ends_the_sandbox(stub: Make) -> None:
    server = stub(silent)

    async def main() -> None:
        async with AsyncSandbox(base_url=server.url) as sandbox:
            task = asyncio.create_task(sandbox.run("while True: pass"))
            while not server.seen:  # noqa: ASYNC110 the stub is a thread
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.gone.wait, 5)

    asyncio.run(main())


def test_cancelling_a_stream_ends_the_sandbox(stub: Make) -> None:
    server = stub(sse(event("start", id="1"), hold=True))

    async def main() -> None:
        async with AsyncSandbox(base_url=server.url) as sandbox:

            async def read() -> None:
                async for _ in sandbox.stream("x"):
                    pass

            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(read(), 0.2)
            assert await asyncio.to_thread(server.gone.wait, 5)

    asyncio.run(main())


def test_a_forgotten_stream_ends_its_sandbox(stub: Make) -> None:
    server = stub(sse(event("start", id="1"), hold=True))
    with Sandbox(base_url=server.url) as sandbox:
        for _ in sandbox.stream("x"):
            break
        gc.collect()
        assert server.gone.wait(5)


def test_async_callbacks_are_awaited(stub: Make) -> None:
    server = stub(sse(stream_bytes()))
    out: list[str] = []

    async def take(text: str) -> None:
        await asyncio.sleep(0)
        out.append(text)

    async def main() -> None:
        async with AsyncSandbox(base_url=server.url) as sandbox:
            await sandbox.run("x", on_stdout=take)

    asyncio.run(main())
    assert "".join(out) == EURO + "\ufffd\x00"


def test_trio_works_and_its_cancelling_ends_the_sandbox(stub: Make) -> None:
    trio = pytest.importorskip("trio")
    server = stub(
        answer(503, {"error": "busy"}, retry_after="0"), answer(), sse(stream_bytes()), silent
    )

    async def main() -> None:
        async with AsyncSandbox(base_url=server.url) as sandbox:
            assert await sandbox.run("x") == "2"
            assert len([e async for e in sandbox.stream("x")]) == 6
            with trio.move_on_after(0.2):
                await sandbox.run("while True: pass")
            assert await trio.to_thread.run_sync(server.gone.wait, 5)

    trio.run(main)


# --- configuration --------------------------------------------------------------------------


def test_the_environment_gives_key_and_address(stub: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    server = stub(answer())
    monkeypatch.setenv("ZEROBOOT_API_KEY", "zb_live_env")
    monkeypatch.setenv("ZEROBOOT_BASE_URL", server.url + "/v1/")
    with Sandbox() as sandbox:
        sandbox.run("x")
    with Sandbox("zb_live_given") as sandbox:
        sandbox.run("x")
    keys = [seen.headers["authorization"] for seen in server.seen]
    assert keys == ["Bearer zb_live_env", "Bearer zb_live_given"]
    assert {seen.path for seen in server.seen} == {"/v1/exec"}


def test_without_configuration_nothing_leaves_this_machine() -> None:
    for kind in (Sandbox, AsyncSandbox):
        assert repr(kind()) == f"{kind.__name__}(base_url='http://127.0.0.1:8080')"


def test_without_a_key_none_is_sent(stub: Make) -> None:
    server = stub(answer())
    with Sandbox(base_url=server.url) as sandbox:
        sandbox.run("x")
    assert "authorization" not in server.seen[0].headers


def test_a_proxy_of_the_environment_is_not_used_for_this_machine(
    stub: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, proxy = stub(answer()), stub(answer())
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    with Sandbox(base_url=server.url) as sandbox:
        sandbox.run("x")
    assert server.seen and not proxy.seen


def test_a_bad_key_or_address_is_refused_without_showing_the_key() -> None:
    for key in ("zb live", "zb_live_\n", "zb_livé"):
        if key.strip() == key:
            with pytest.raises(ValueError, match="API key") as caught:
                Sandbox(key)
            assert key not in str(caught.value)
    for url in ("localhost:8080", "ftp://host", "http://"):
        with pytest.raises(ValueError, match="base URL"):
            Sandbox(base_url=url)


def test_a_number_that_is_none_is_refused_here() -> None:
    with Sandbox() as sandbox, pytest.raises(ValueError):
        sandbox.run("x", timeout=float("nan"))


def test_the_two_clients_have_the_same_arguments() -> None:
    for name in ("__init__", "run", "run_batch", "stream", "health", "metrics"):
        one = inspect.signature(getattr(Sandbox, name)).parameters
        two = inspect.signature(getattr(AsyncSandbox, name)).parameters
        assert list(one) == list(two)
        assert [p.default for p in one.values()] == [p.default for p in two.values()]


def test_check_raises_with_the_last_line_of_stderr(client: Any, stub: Make) -> None:
    failed = {
        **OK,
        "exit_code": 1,
        "stderr": "Traceback ...\nZeroDivisionError: division by zero\n",
    }
    result = client(stub(answer(200, failed)).url).run("1/0")
    with pytest.raises(ExecutionError, match="exit code 1: ZeroDivisionError") as caught:
        result.check()
    assert caught.value.result is result
