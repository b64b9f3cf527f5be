"""Both clients against a real `zeroboot serve`.

The binary is found by `sdk/with_server.py`. Without one these tests are skipped, or fail if
ZEROBOOT_REQUIRE_SERVER=1. Engines: ZEROBOOT_TEST_ENGINES ("process", "process,vm"); by default
whatever the server picks.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zeroboot import (
    AsyncSandbox,
    AuthenticationError,
    BadRequestError,
    BatchError,
    End,
    Exec,
    ExecutionError,
    InputFile,
    Sandbox,
    Start,
    Stdout,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from with_server import Server, find_binary, required

ENGINES = [e for e in os.environ.get("ZEROBOOT_TEST_ENGINES", "").split(",") if e] or ["auto"]


@pytest.fixture(scope="module", params=ENGINES)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    if find_binary() is None and not required():
        pytest.skip("no zeroboot binary (ZEROBOOT_BIN)")
    engine = None if request.param == "auto" else request.param
    with Server(engine) as running:
        yield running


@pytest.fixture
def sandbox(server: Server) -> Iterator[Sandbox]:
    with Sandbox(server.key, server.url) as client:
        yield client


def node(server: Server) -> None:
    if "node" not in server.languages():
        if os.environ.get("ZEROBOOT_REQUIRE_NODE") == "1":
            pytest.fail("the server has no node template")
        pytest.skip("the server has no node template")


def test_output_comes_back_exactly(sandbox: Sandbox) -> None:
    result = sandbox.run("import sys\nprint(1 + 1)\nsys.stderr.write('warn\\r\\n')")
    assert result == "2" and result.stdout == "2\n" and result.stderr == "warn\r\n"
    assert result.ok and result.exit_code == 0 and result.outcome == "exited"
    assert result.isolation in ("vm", "process") and result.id and result.request_id
    assert 0 < result.total_time_ms < 30_000 and result.language == "python"


def test_every_run_is_a_new_sandbox(sandbox: Sandbox) -> None:
    sandbox.run("open('left', 'w').write('x')").check()
    assert sandbox.run("import os; print(os.path.exists('left'))") == "False"


def test_code_that_fails_is_a_result(sandbox: Sandbox) -> None:
    result = sandbox.run("1/0")
    assert result.exit_code == 1 and not result.ok
    with pytest.raises(ExecutionError, match="ZeroDivisionError: division by zero"):
        result.check()
    assert sandbox.run("raise SystemExit(3)").exit_code == 3
    killed = sandbox.run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.outcome in ("signaled", "crashed") and not killed.ok


def test_a_passed_deadline_is_a_result(sandbox: Sandbox) -> None:
    begin = time.monotonic()
    result = sandbox.run("print('begun', flush=True)\nwhile True: pass", timeout=0.5)
    assert result.outcome == "deadline_passed" and result == "begun"
    assert time.monotonic() - begin < 10


def test_input_arrives(sandbox: Sandbox, tmp_path: Path) -> None:
    local = tmp_path / "local.bin"
    local.write_bytes(bytes(range(256)))
    code = """
import os, subprocess, sys
print(sys.stdin.read(), os.environ["WHO"], sys.argv[1:])
print(open("a/b.txt").read(), open("c.bin", "rb").read() == bytes(range(256)))
print(os.access("d.sh", os.X_OK), os.access("a/b.txt", os.X_OK))
"""
    result = sandbox.run(
        code,
        stdin="in",
        env={"WHO": "me"},
        args=["-x", "é"],
        files={"a/b.txt": "tëxt", "c.bin": local, "d.sh": InputFile("#!", executable=True)},
    ).check()
    assert result.stdout == "in me ['-x', 'é']\ntëxt True\nTrue False\n"


def test_bytes_and_files_come_back_exactly(sandbox: Sandbox) -> None:
    code = """
import sys
sys.stdout.buffer.write(b"\\xff\\x00")
open("text.txt", "w").write("é")
open("bytes.bin", "wb").write(b"\\xfe")
"""
    result = sandbox.run(code, output_files=["text.txt", "bytes.bin", "missing"])
    assert result.stdout_bytes == b"\xff\x00" and result.encoding["stdout"] == "base64"
    assert result.files["text.txt"].read_text() == "é"
    assert result.files["bytes.bin"].data == b"\xfe"
    assert not result.files["missing"].ok


def test_output_beyond_the_limit_is_cut_and_says_so(sandbox: Sandbox) -> None:
    result = sandbox.run("print('x' * 100000)", limits={"output_bytes": 1000})
    assert result.truncated and result.outcome == "output_limit" and len(result.stdout) <= 1000


def test_node_runs(server: Server, sandbox: Sandbox) -> None:
    node(server)
    result = sandbox.run("console.log([1, 2].map(x => x * 2).join())", language="node")
    assert result == "2,4" and result.language == "node"


def test_events_come_while_the_code_runs(sandbox: Sandbox) -> None:
    code = """
import sys, time
print("one", flush=True)
time.sleep(0.5)
print("two", flush=True)
sys.stderr.write("err")
"""
    seen: list[tuple[str, float]] = []
    with sandbox.stream(code) as events:
        first = next(events)
        assert isinstance(first, Start) and first.isolation in ("vm", "process")
        for event in events:
            seen.append((event.type, time.monotonic()))
        assert isinstance(event, End) and event.result.stdout == "one\ntwo\n"
        assert events.result.stderr == "err" and events.result.ok
    out = [at for kind, at in seen if kind == "stdout"]
    assert len(out) == 2 and out[1] - out[0] > 0.2, seen


def test_a_stream_and_a_run_give_the_same_result(sandbox: Sandbox) -> None:
    code = "import sys; print('é'); sys.stdout.buffer.write(b'\\xff'); open('f', 'w').write('1')"
    whole = sandbox.run(code, output_files=["f"])
    with sandbox.stream(code, output_files=["f"]) as events:
        types = [event.type for event in events]
    assert types[0] == "start" and types[-2:] == ["file", "end"]
    for name in set(whole.raw) - {"id", "pooled", "peak_memory_bytes"}:
        if not name.endswith("_ms"):
            assert getattr(events.result, name) == getattr(whole, name), name
    assert set(events.result.raw) == set(whole.raw)


def test_callbacks_hear_the_output(sandbox: Sandbox) -> None:
    heard: list[str] = []
    result = sandbox.run("print('a'); print('b')", on_stdout=heard.append)
    assert "".join(heard) == result.stdout == "a\nb\n"


def test_leaving_a_stream_ends_the_sandbox(server: Server, sandbox: Sandbox) -> None:
    with sandbox.stream("print('up', flush=True)\nimport time\ntime.sleep(25)") as events:
        for event in events:
            if isinstance(event, Stdout):
                assert live(sandbox) >= 1
                break
    wait_until_none_is_live(sandbox)


def test_cancelling_a_task_ends_the_sandbox(server: Server, sandbox: Sandbox) -> None:
    async def main() -> None:
        async with AsyncSandbox(server.key, server.url) as client:
            task = asyncio.create_task(client.run("import time; time.sleep(25)"))
            end = time.monotonic() + 5
            while await asyncio.to_thread(live, sandbox) == 0 and time.monotonic() < end:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    wait_until_none_is_live(sandbox)


def live(sandbox: Sandbox) -> int:
    """Sandboxes that serve a request now, by the server's own count."""
    return sandbox.health().live


def wait_until_none_is_live(sandbox: Sandbox) -> None:
    end = time.monotonic() + 5
    while (count := live(sandbox)) > 0:
        assert time.monotonic() < end, f"{count} execs still run"
        time.sleep(0.05)


def test_many_at_once(server: Server) -> None:
    async def main() -> list[Any]:
        async with AsyncSandbox(server.key, server.url) as client:
            return await asyncio.gather(*(client.run(f"print({i} ** 2)") for i in range(20)))

    assert asyncio.run(main()) == [str(i**2) for i in range(20)]


def test_a_batch_keeps_its_order(sandbox: Sandbox) -> None:
    results = sandbox.run_batch(
        ["import time; time.sleep(0.2); print('a')", Exec("print(input())", stdin="b"), "1/0"]
    )
    assert results[:2] == ["a", "b"] and results[2].exit_code == 1
    with pytest.raises(BatchError) as caught:
        sandbox.run_batch(["print(1)", Exec("x", template="no-such-template")])
    assert caught.value.results[0] == "1" and caught.value.code == "unknown_template"
    assert isinstance(caught.value.errors[0], BadRequestError)


def test_mistakes_are_refused_with_a_code(server: Server, sandbox: Sandbox) -> None:
    with pytest.raises(BadRequestError) as caught:
        sandbox.run("x", language="ruby")  # type: ignore[arg-type]
    assert caught.value.code == "unknown_language" and caught.value.request_id
    with pytest.raises(BadRequestError) as caught:
        sandbox.run("x", timeout=-1)
    assert caught.value.code == "invalid_timeout"
    with pytest.raises(BadRequestError):
        list(sandbox.stream(""))
    for key in ("zb_live_wrong", None):
        with Sandbox(key, server.url) as stranger, pytest.raises(AuthenticationError) as refused:
            stranger.run("print(1)")
        assert refused.value.code == "unauthorized" and refused.value.status == 401


def test_health_and_metrics(sandbox: Sandbox) -> None:
    health = sandbox.health()
    assert health.ok and health.ready and health.templates["python"]["ready"]
    assert "zeroboot_total_executions" in sandbox.metrics()
