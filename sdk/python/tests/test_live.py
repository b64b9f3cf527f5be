"""Live sandboxes against a server that answers from a script: what is sent, and faults.

What the real server does is tested against the real server (`test_live_contract.py`). Every test
runs with `Sandbox` and with `AsyncSandbox`.
"""

from __future__ import annotations

import asyncio
import base64
import builtins
import inspect
import io
import signal
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable

import pytest
import wsproto.events as ws
from blocking import Blocking
from stub import Stub, answer, drop, event, silent, sse, web_socket

import zeroboot
from zeroboot import (
    AsyncSandbox,
    CellError,
    CellFailed,
    Change,
    CommandFailed,
    RateLimitError,
    RichResult,
    Sandbox,
    SandboxGone,
    ServerError,
    Started,
    Stderr,
    Stdout,
    TerminalExit,
)
from zeroboot._errors import CODE_CLASSES
from zeroboot._live_types import moment

Make = Callable[..., Stub]
CREATED = {
    "id": "0199",
    "template": "python",
    "language": "python",
    "isolation": "process",
    "state": "running",
    "created_at": "2026-11-25T00:00:00.123456789Z",
    "expires_at": "2026-11-25T00:05:00Z",
    "idle_timeout_seconds": None,
    "metadata": {"who": "me"},
    "limits": {"memory_mb": 512},
    "pooled": True,
    "fork_time_ms": 0.1,
}
CELL = {
    "id": "r1",
    "context": "default",
    "execution_count": 2,
    "stdout": "out\n",
    "stderr": "",
    "results": [
        {
            "is_main": False,
            "text/plain": "<Figure>",
            "image/png": base64.b64encode(b"PNG").decode(),
        },
        {
            "is_main": True,
            "text/plain": "{'a': 1}",
            "text/html": "<b>a</b>",
            "application/json": {"a": 1},
        },
    ],
    "value": "{'a': 1}",
    "outcome": "ok",
    "context_lost": False,
    "wall_time_ms": 1.5,
}
COMMAND = {
    "id": "c1",
    "pid": 17,
    "exit_code": 3,
    "outcome": "exited",
    "stdout": "o",
    "stderr": "bad\nworse\n",
    "wall_time_ms": 2.0,
}
RUNNING = {
    "id": "c1",
    "pid": 17,
    "tag": "web",
    "argv": ["sleep", "9"],
    "state": "running",
    "output_offset": 5,
    "started_at": "2026-11-25T00:00:01Z",
}
ENTRY = {
    "path": "/home/sandbox/a.txt",
    "name": "a.txt",
    "kind": "file",
    "size": 3,
    "mode": "644",
    "modified_at": "2026-11-25T00:00:01.5Z",
    "uid": 1000,
    "gid": 1000,
}
END = {"outcome": "exited", "exit_code": 0, "wall_time_ms": 3.0}


@pytest.fixture(params=["sync", "async"])
def api(request: pytest.FixtureRequest) -> Iterator[Any]:
    """`Sandbox`, or `AsyncSandbox` driven from a test that is not async."""
    if request.param == "sync":
        yield Sandbox
        return
    loop = asyncio.new_event_loop()

    class Api:
        def __new__(cls, *args: Any, **options: Any) -> Any:
            return Blocking(AsyncSandbox(*args, **options), loop)

        create = staticmethod(
            lambda *a, **o: Blocking(None, loop)._out(AsyncSandbox.create(*a, **inner(o)))
        )
        connect = staticmethod(
            lambda *a, **o: Blocking(None, loop)._out(AsyncSandbox.connect(*a, **inner(o)))
        )
        list = staticmethod(
            lambda *a, **o: Blocking(None, loop)._out(AsyncSandbox.list(*a, **inner(o)))
        )

    def inner(options: dict[str, Any]) -> dict[str, Any]:
        return {k: v._inner if isinstance(v, Blocking) else v for k, v in options.items()}

    yield Api
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@pytest.fixture
def live(api: Any, stub: Make) -> Iterator[Callable[..., tuple[Stub, Any]]]:
    """A stub with this script, and a sandbox of it."""
    made: list[Any] = []

    def make(*script: Any, **options: Any) -> tuple[Stub, Any]:
        server = stub(answer(201, CREATED), *(script or (answer(204, b""),)))
        made.append(client := api(base_url=server.url, **options))
        made.append(sandbox := api.create(client=client))
        server.seen.clear()
        return server, sandbox

    yield make
    for thing in reversed(made):
        thing.close()


def test_create_sends_what_was_asked_and_reads_what_came(api: Any, stub: Make) -> None:
    server = stub(answer(201, CREATED), answer(204, b""))
    with api.create(
        "python",
        timeout=600,
        idle_timeout=60,
        env={"A": "b"},
        metadata={"who": "me"},
        limits={"memory_mb": 64},
        api_key="zb_live_test",
        base_url=server.url,
    ) as sandbox:
        assert sandbox.id == "0199" and sandbox.metadata == {"who": "me"}
        assert sandbox.expires_at == datetime(2026, 11, 25, 0, 5, tzinfo=timezone.utc)
        assert sandbox.info.created_at.microsecond == 123456
    made, ended = server.seen
    assert (made.method, made.path) == ("POST", "/v1/sandboxes")
    assert made.headers["authorization"] == "Bearer zb_live_test"
    assert made.json == {
        "template": "python",
        "timeout_seconds": 600,
        "idle_timeout_seconds": 60,
        "env": {"A": "b"},
        "metadata": {"who": "me"},
        "memory_mb": 64,
    }
    assert (ended.method, ended.path) == ("DELETE", "/v1/sandboxes/0199")


def test_branches_are_sandboxes_of_their_own(live: Any) -> None:
    branches = [{**CREATED, "id": f"b{n}", "branch_of": "0199"} for n in range(2)]
    server, sandbox = live(
        answer(201, {"sandboxes": branches}), answer(204, b""), answer(204, b""), answer(204, b"")
    )
    made = sandbox.branch(2, timeout=60, metadata={"try": "1"})
    assert [branch.id for branch in made] == ["b0", "b1"]
    assert {branch.info.branch_of for branch in made} == {"0199"}
    assert sandbox.info.branch_of is None
    with made[0] as branch:
        assert branch.id == "b0"
    assert made[1].kill()
    asked, *ended = server.seen
    assert (asked.method, asked.path) == ("POST", "/v1/sandboxes/0199/branch")
    assert asked.json == {"count": 2, "timeout_seconds": 60, "metadata": {"try": "1"}}
    assert [seen.path for seen in ended] == ["/v1/sandboxes/b0", "/v1/sandboxes/b1"]


CHECKPOINT = {
    "id": "c/1",
    "sandbox_id": "0199",
    "parent_id": None,
    "template": "python",
    "created_at": "2026-01-02T03:04:05Z",
    "expires_at": "2026-01-02T04:04:05Z",
    "metadata": {"step": "1"},
    "memory_bytes": 4096,
}


def test_a_checkpoint_is_made_listed_restored_gone_back_to_and_removed(live: Any) -> None:
    back = {**CREATED, "checkpoint_id": "c/1"}
    server, sandbox = live(
        answer(201, CHECKPOINT),
        answer(200, {"checkpoints": [CHECKPOINT]}),
        answer(201, {"sandboxes": [{**CREATED, "id": "r0", "branch_of": "0199"}]}),
        answer(200, back),
        answer(200, back),
        answer(204, b""),
        answer(404, {"error": "No checkpoint has this id", "code": "checkpoint_not_found"}),
    )
    kept = sandbox.checkpoint(timeout=60, metadata={"step": "1"})
    assert (kept.id, kept.sandbox_id, kept.memory_bytes) == ("c/1", "0199", 4096)
    assert kept.metadata == {"step": "1"}
    assert [one.id for one in sandbox.checkpoints()] == ["c/1"]
    assert [one.id for one in sandbox.restore(kept, 1, timeout=9)] == ["r0"]
    assert sandbox.rollback().checkpoint_id == "c/1"
    assert sandbox.rollback(kept).id == "0199"
    sandbox.remove_checkpoint("c/1")
    with pytest.raises(zeroboot.ZerobootError, match="No checkpoint"):
        sandbox.remove_checkpoint(kept)
    asked = [(seen.method, seen.path) for seen in server.seen]
    assert asked == [
        ("POST", "/v1/sandboxes/0199/checkpoints"),
        ("GET", "/v1/checkpoints?sandbox_id=0199"),
        ("POST", "/v1/checkpoints/c%2F1/restore"),
        ("POST", "/v1/sandboxes/0199/rollback"),
        ("POST", "/v1/sandboxes/0199/rollback"),
        ("DELETE", "/v1/checkpoints/c%2F1"),
        ("DELETE", "/v1/checkpoints/c%2F1"),
    ]
    assert server.seen[0].json == {"timeout_seconds": 60, "metadata": {"step": "1"}}
    assert server.seen[2].json == {"count": 1, "timeout_seconds": 9}
    assert [server.seen[3].json, server.seen[4].json] == [{}, {"checkpoint_id": "c/1"}]


def test_a_promoted_branch_is_asked_under_its_origins_id(live: Any) -> None:
    server, sandbox = live(answer(200, {**CREATED, "id": "origin"}), answer(204, b""))
    assert sandbox.promote().id == "origin"
    assert sandbox.id == "origin"
    assert sandbox.kill()
    assert [seen.path for seen in server.seen] == [
        "/v1/sandboxes/0199/promote",
        "/v1/sandboxes/origin",
    ]


def test_a_branch_of_the_process_engine_is_refused_with_the_reason(live: Any) -> None:
    refusal = {"error": "only a sandbox of the VM engine can", "code": "needs_vm_engine"}
    _, sandbox = live(answer(501, refusal))
    with pytest.raises(ServerError, match="VM engine") as caught:
        sandbox.branch()
    assert caught.value.code == "needs_vm_engine"


def test_a_connected_sandbox_outlives_its_block(api: Any, stub: Make) -> None:
    server = stub(answer(200, CREATED))
    with api.connect("01/99", base_url=server.url) as sandbox:
        assert sandbox.isolation == "process"
    assert [seen.path for seen in server.seen] == ["/v1/sandboxes/01%2F99"]


def test_a_list_has_all_pages(api: Any, stub: Make) -> None:
    server = stub(
        answer(200, {"sandboxes": [CREATED], "next_cursor": "c&1"}),
        answer(200, {"sandboxes": [CREATED]}),
    )
    found = api.list(metadata={"a": "b c"}, base_url=server.url)
    assert [info.id for info in found] == ["0199", "0199"]
    assert [seen.path for seen in server.seen] == [
        "/v1/sandboxes?metadata=a%3Db%20c",
        "/v1/sandboxes?metadata=a%3Db%20c&cursor=c%261",
    ]


def test_a_block_that_fails_shows_its_own_error_not_that_of_the_end(api: Any, stub: Make) -> None:
    server = stub(answer(201, CREATED), answer(500, {"error": "no", "code": "internal"}))
    with pytest.raises(KeyError), api.create(base_url=server.url):
        raise KeyError("mine")
    server = stub(answer(201, CREATED), answer(500, {"error": "no", "code": "internal"}))
    with pytest.raises(ServerError), api.create(base_url=server.url):
        pass


def test_a_cell_comes_back_with_all_its_forms(live: Any) -> None:
    server, sandbox = live(answer(200, CELL))
    result = sandbox.run("df", context="other", timeout=2)
    assert server.seen[0].path == "/v1/sandboxes/0199/run"
    assert server.seen[0].json == {"code": "df", "context": "other", "timeout_seconds": 2}
    assert result.ok and result.check() is result and result.value == str(result) == "{'a': 1}"
    picture, main = result.results
    assert picture.png == b"PNG" and picture.html is None and not picture.is_main
    assert main.is_main and main.html == "<b>a</b>" and main.json == {"a": 1} and main.png is None
    assert main.formats == ["text/plain", "text/html", "application/json"]
    assert result.stdout == "out\n" and result.error is None and result.execution_count == 2
    assert result.request_id == "req-1"


def test_an_error_of_a_cell_is_a_result(live: Any) -> None:
    error = {"name": "ZeroDivisionError", "value": "division by zero", "traceback": "Traceback"}
    failed = {**CELL, "results": [], "value": None, "outcome": "error", "error": error}
    _, sandbox = live(answer(200, failed))
    result = sandbox.run("1/0")
    assert not result.ok and result.value is None
    assert result.error == CellError("ZeroDivisionError", "division by zero", "Traceback")
    with pytest.raises(CellFailed, match="ZeroDivisionError: division by zero") as caught:
        result.check()
    assert caught.value.result is result


def cell_stream() -> bytes:
    return b"".join(
        [
            event("started", at=0),
            event("stdout", at=4, text="o\u20ac"),
            event("stderr", at=5, base64=base64.b64encode(b"\xff").decode()),
            event("result", at=5, **CELL["results"][0]),  # type: ignore[index]
            event("brand-new", x=1),
            event("error", at=5, name="E", value="v", traceback="t"),
            event("end", at=5, outcome="error", context="default", execution_count=1),
        ]
    )


@pytest.mark.parametrize("size", [1, 7, 100000])
def test_events_of_a_cell_come_whole_wherever_they_are_cut(live: Any, size: int) -> None:
    raw = cell_stream()
    server, sandbox = live(sse(*(raw[i : i + size] for i in range(0, len(raw), size))))
    with sandbox.stream("x") as events:
        seen = list(events)
    assert server.seen[0].headers["accept"] == "text/event-stream"
    assert [e.type for e in seen] == ["started", "stdout", "stderr", "result", "error", "end"]
    assert [type(e) for e in seen[:5]] == [Started, Stdout, Stderr, RichResult, CellError]
    result = events.result
    assert (
        result.stdout == "o\u20ac" and result.stderr_bytes == b"\xff" and result.outcome == "error"
    )
    assert result.error == CellError("E", "v", "t") and result.results[0].png == b"PNG"


def test_callbacks_hear_a_cell_and_the_result_has_it_all(live: Any) -> None:
    _, sandbox = live(sse(cell_stream()))
    heard: list[Any] = []
    result = sandbox.run(
        "x", on_stdout=heard.append, on_stderr=heard.append, on_result=heard.append
    )
    assert heard == ["o\u20ac", "\ufffd", result.results[0]]


def test_a_stream_that_breaks_off_is_a_connection_error(live: Any) -> None:
    for end in (True, False):
        _, sandbox = live(sse(event("started", at=0), end=end))
        with pytest.raises(zeroboot.ConnectionError):
            list(sandbox.stream("x"))


def test_a_sandbox_that_ends_meanwhile_is_gone_and_says_why(live: Any) -> None:
    gone = {"error": "ended", "code": "sandbox_gone", "reason": "lease_ended", "request_id": "r7"}
    _, sandbox = live(answer(410, gone))
    with pytest.raises(SandboxGone) as caught:
        sandbox.run("x")
    assert (caught.value.reason, caught.value.code, caught.value.status) == (
        "lease_ended",
        "sandbox_gone",
        410,
    )
    assert sandbox.kill() is False
    _, sandbox = live(sse(event("started", at=0), event("failure", **gone)))
    with pytest.raises(SandboxGone) as caught:
        list(sandbox.stream("x"))
    assert caught.value.reason == "lease_ended" and caught.value.request_id == "r7"


@pytest.mark.parametrize("code", sorted(CODE_CLASSES))
def test_every_code_has_its_class(live: Any, code: str) -> None:
    _, sandbox = live(answer(409, {"error": "because", "code": code}))
    with pytest.raises(CODE_CLASSES[code]) as caught:
        sandbox.files.stat("x")
    assert type(caught.value) is CODE_CLASSES[code] and caught.value.code == code


def test_errors_of_files_are_also_those_of_python(live: Any) -> None:
    _, sandbox = live(answer(404, {"error": "no", "code": "file_not_found"}))
    with pytest.raises(builtins.FileNotFoundError):
        sandbox.files.read("x")
    assert not sandbox.files.exists("x")
    _, sandbox = live(answer(403, {"error": "no", "code": "not_allowed"}))
    with pytest.raises(builtins.PermissionError):
        sandbox.files.write("x", "y")
    assert issubclass(zeroboot.TooManySandboxes, RateLimitError)


def test_contexts_are_asked_by_name(live: Any) -> None:
    info = {"name": "a/b", "cwd": "/tmp", "busy": True, "waiting": 1, "executions": 2}
    server, sandbox = live(answer(201, info), answer(200, {"contexts": [info]}), answer(200, info))
    made = sandbox.contexts.create("a/b", cwd="/tmp")
    assert sandbox.contexts.list() == [made] and made.busy and made.executions == 2
    sandbox.contexts.interrupt()
    sandbox.contexts.restart(made)
    sandbox.contexts.delete("a/b")
    base = "/v1/sandboxes/0199/contexts"
    assert server.seen[0].json == {"name": "a/b", "cwd": "/tmp"}
    assert [(seen.method, seen.path) for seen in server.seen] == [
        ("POST", base),
        ("GET", base),
        ("POST", base + "/default/interrupt"),
        ("POST", base + "/a%2Fb/restart"),
        ("DELETE", base + "/a%2Fb"),
    ]


def test_a_command_sends_everything_and_fails_as_a_result(live: Any) -> None:
    server, sandbox = live(answer(200, COMMAND))
    result = sandbox.commands.run(["ls", "-l"], cwd="/", env={"A": "b"}, stdin=b"\xff", timeout=4)
    assert server.seen[0].json == {
        "argv": ["ls", "-l"],
        "cwd": "/",
        "env": {"A": "b"},
        "stdin_base64": "/w==",
        "timeout_seconds": 4,
    }
    assert (result.exit_code, result.stdout, result.ok, result.pid) == (3, "o", False, 17)
    with pytest.raises(CommandFailed, match="exit code 3: worse"):
        result.check()
    sandbox.commands.run("echo | cat", stdin="text")
    assert server.seen[1].json == {
        "command": "echo | cat",
        "stdin": "text",
        "timeout_seconds": 30.0,
    }
    with pytest.raises(TypeError):
        sandbox.commands.run(["sleep", 1])


def test_leaving_the_stream_of_a_command_ends_the_command(live: Any) -> None:
    server, sandbox = live(sse(event("started", at=0), event("stdout", at=1, text="a"), hold=True))
    with sandbox.commands.stream("yes") as events:
        assert [next(events).type, next(events).type] == ["started", "stdout"]
    assert server.seen[0].json["end_with_client"] is True and server.gone.wait(5)


def test_a_broken_output_goes_on_where_it_broke(live: Any) -> None:
    server, sandbox = live(
        answer(201, RUNNING),
        sse(event("stdout", at=3, text="one"), b"id: 6\nevent: stdo", end=False),
        drop,
        answer(503, {"error": "busy"}, retry_after="0"),
        sse(
            event("lost", at=9, bytes=3),
            event("stderr", at=12, text="two"),
            event("end", at=12, **END),
        ),
    )
    command = sandbox.commands.start("work", tag="web", terminal=(80, 24), keep_stdin_open=True)
    sent = server.seen[0].json
    assert sent["background"] and sent["tag"] == "web" and sent["keep_stdin_open"]
    assert sent["terminal"] == {"columns": 80, "rows": 24} and "timeout_seconds" not in sent
    heard: list[str] = []
    with pytest.raises(zeroboot.ConnectionError):
        # The one in the middle breaks before it is answered: that is not for us to repeat.
        command.wait(on_stdout=heard.append)
    result = command.wait(on_stdout=heard.append)
    offsets = [seen.path.partition("?")[2] for seen in server.seen[1:]]
    assert offsets == ["offset=0", "offset=3", "offset=0", "offset=0"]
    assert (result.stderr, result.truncated, result.exit_code, result.pid) == ("two", True, 0, 17)


def test_output_can_begin_anywhere(live: Any) -> None:
    server, sandbox = live(answer(200, RUNNING), sse(event("end", at=7, **END)))
    command = sandbox.commands.connect("c1")
    assert [e.type for e in command.output(5)] == ["end"]
    assert server.seen[1].path.endswith("/commands/c1/output?offset=5")


def test_waiting_for_a_command_has_an_end(live: Any) -> None:
    server, sandbox = live(answer(201, RUNNING), sse(*[b": keep-alive\n\n"] * 900, hold=True))
    command = sandbox.commands.start("sleep 9")
    begin = time.monotonic()
    with pytest.raises(zeroboot.TimeoutError):
        command.wait(0.3)
    assert time.monotonic() - begin < 3 and server.gone.wait(5)


def test_a_command_is_written_to_and_signalled(live: Any) -> None:
    server, sandbox = live(answer(201, RUNNING), answer(204, b""))
    command = sandbox.commands.start("cat")
    command.write("tëxt")
    command.close_stdin()
    command.signal(signal.SIGINT)
    command.signal("term")
    command.resize(100, 30)
    command.kill()
    base = "/v1/sandboxes/0199/commands/c1"
    assert [(seen.method, seen.path, seen.body) for seen in server.seen[1:]] == [
        ("POST", base + "/stdin", "tëxt".encode()),
        ("POST", base + "/stdin?end=true", b""),
        ("POST", base + "/signal", b'{"signal":2}'),
        ("POST", base + "/signal", b'{"signal":"SIGTERM"}'),
        ("POST", base + "/resize", b'{"columns":100,"rows":30}'),
        ("DELETE", base, b""),
    ]


def test_files_travel_in_pieces(live: Any, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_bytes(b"L" * 300_000)
    server, sandbox = live(answer(200, ENTRY))
    entry = sandbox.files.write("a b/c?.txt", "é", mode=0o755)
    assert entry.mode == 0o644 and entry.is_file and not entry.is_dir and entry.name == "a.txt"
    sandbox.files.write("x", local)
    sandbox.files.write("x", io.BytesIO(b"open"))
    sandbox.files.write("x", iter([b"a", b"b"]))
    assert server.seen[0].path == "/v1/sandboxes/0199/files?path=a%20b%2Fc%3F.txt&mode=755"
    assert server.seen[0].headers["content-type"] == "application/octet-stream"
    bodies = [seen.body for seen in server.seen]
    assert bodies == ["é".encode(), b"L" * 300_000, b"open", b"ab"]
    assert all(seen.headers.get("transfer-encoding") == "chunked" for seen in server.seen[1:])


def test_pieces_that_were_refused_are_not_sent_again(live: Any) -> None:
    busy = answer(503, {"error": "busy", "code": "busy"}, retry_after="0")
    server, sandbox = live(busy, answer(200, ENTRY))
    with pytest.raises(ServerError):
        sandbox.files.write("x", iter([b"a"]))
    assert len(server.seen) == 1, "half of it would be missing"
    server, sandbox = live(busy, answer(200, ENTRY))
    sandbox.files.write("x", b"a")
    assert len(server.seen) == 2


def test_a_part_of_a_file_is_a_range(live: Any, tmp_path: Path) -> None:
    server, sandbox = live(answer(206, b"bytes", content_type="application/octet-stream"))
    assert sandbox.files.read("f", offset=5, length=5) == b"bytes"
    assert sandbox.files.read("f", offset=5) == b"bytes" and sandbox.files.read_text("f") == "bytes"
    sandbox.files.download("f", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == b"bytes"
    ranges = [seen.headers.get("range") for seen in server.seen]
    assert ranges == ["bytes=5-9", "bytes=5-", None, None]
    for bad in ({"offset": -1}, {"length": 0}):
        with pytest.raises(ValueError):
            sandbox.files.read("f", **bad)


def test_file_operations_have_their_routes(live: Any) -> None:
    server, sandbox = live(answer(200, {"entries": [ENTRY]}), answer(200, ENTRY))
    assert [entry.path for entry in sandbox.files.list(".", depth=2)] == [ENTRY["path"]]
    assert sandbox.files.stat("a").size == 3
    sandbox.files.mkdir("d")
    sandbox.files.move("a", "b")
    sandbox.files.remove("d", recursive=True)
    sandbox.files.chmod("b", 0o600)
    base = "/v1/sandboxes/0199/files"
    assert [(seen.method, seen.path, seen.body) for seen in server.seen] == [
        ("GET", base + "/list?path=.&depth=2", b""),
        ("GET", base + "/stat?path=a", b""),
        ("POST", base + "/mkdir", b'{"path":"d"}'),
        ("POST", base + "/move", b'{"from":"a","to":"b"}'),
        ("DELETE", base + "?path=d&recursive=true", b""),
        ("POST", base + "/chmod", b'{"path":"b","mode":"600"}'),
    ]


def test_a_watch_listens_from_the_call_on_and_can_be_left(live: Any) -> None:
    server, sandbox = live(
        sse(event("created", path="/a"), event("removed", path="/b"), event("overflow"), hold=True)
    )
    changes = sandbox.files.watch("d", recursive=True)
    assert server.seen[0].path.endswith("/files/watch?path=d&recursive=true")
    seen = [next(changes) for _ in range(3)]
    assert seen == [Change("created", "/a"), Change("removed", "/b"), Change("overflow", "")]
    changes.close()
    assert server.gone.wait(5)
    _, sandbox = live(sse(event("created", path="/a")))
    with sandbox.files.watch() as changes:
        assert list(changes) == [Change("created", "/a")]


def test_a_terminal_talks_both_ways(live: Any) -> None:
    heard: list[Any] = []

    def talk(client: Any, connection: Any) -> None:
        client.sendall(connection.send(ws.Ping(b"p")))
        client.sendall(connection.send(ws.TextMessage('{"started":{"id":"c1","pid":9}}')))
        client.sendall(connection.send(ws.BytesMessage(b"$ ", message_finished=False)))
        client.sendall(connection.send(ws.BytesMessage(b"more")))
        while len(heard) < 4:
            connection.receive_data(client.recv(65536))
            heard.extend(connection.events())
        client.sendall(
            connection.send(ws.TextMessage('{"exit":{"exit_code":3,"outcome":"exited"}}'))
        )
        client.sendall(connection.send(ws.CloseConnection(1000)))

    server, sandbox = live(web_socket(talk))
    with sandbox.terminal("bash -l", columns=100, rows=30, cwd="/tmp") as terminal:
        shown = terminal.read()
        while shown != b"$ more":
            shown += terminal.read()
        assert terminal.started == Started("c1", 9)
        terminal.send("exit 3\n")
        terminal.resize(80, 24)
        terminal.signal("INT")
        assert terminal.wait() == TerminalExit(3, "exited") == terminal.exit
        assert terminal.read() == b"" and list(terminal) == []
    query = "columns=100&rows=30&command=bash%20-l&cwd=%2Ftmp&end_with_client=true"
    assert server.seen[0].path == f"/v1/sandboxes/0199/terminal?{query}"
    assert [type(e) for e in heard] == [ws.Pong, ws.BytesMessage, ws.TextMessage, ws.TextMessage]
    assert bytes(heard[1].data) == b"exit 3\n"
    assert heard[2].data == '{"resize": {"columns": 80, "rows": 24}}'
    assert heard[3].data == '{"signal": "SIGINT"}'


def test_a_terminal_that_is_refused_or_breaks_says_so(live: Any) -> None:
    _, sandbox = live(answer(400, {"error": "0 x 0", "code": "invalid_request"}))
    with pytest.raises(zeroboot.BadRequestError, match="0 x 0"):
        sandbox.terminal(columns=0, rows=0)
    _, sandbox = live(answer(200, {}))
    with pytest.raises(ServerError, match="no WebSocket"):
        sandbox.terminal()

    def garbage(client: Any, connection: Any) -> None:
        client.sendall(b"\xff\xff\xff\xff")
        client.recv(65536)

    _, sandbox = live(web_socket(garbage))
    terminal = sandbox.terminal()
    with pytest.raises(ServerError, match="broken"):
        terminal.read()
    terminal.close()
    _, sandbox = live(web_socket(lambda client, connection: None))
    with pytest.raises(zeroboot.ConnectionError, match="before its program"):
        sandbox.terminal().wait()


def test_a_terminal_that_is_silent_can_be_waited_for(live: Any) -> None:
    def pings(client: Any, connection: Any) -> None:
        for _ in range(20):
            client.sendall(connection.send(ws.Ping(b"there?")))
            time.sleep(0.05)

    _, sandbox = live(web_socket(pings))
    terminal = sandbox.terminal()
    begin = time.monotonic()
    with pytest.raises(zeroboot.TimeoutError):
        terminal.read(0.2)
    assert time.monotonic() - begin < 0.8
    terminal.close()


def test_a_call_that_is_not_answered_is_given_up(live: Any) -> None:
    _, sandbox = live(silent, grace=0.2)
    begin = time.monotonic()
    with pytest.raises(zeroboot.TimeoutError):
        sandbox.run("x", timeout=0.1)
    assert time.monotonic() - begin < 3


def test_an_answer_without_its_fields_is_a_server_error(live: Any) -> None:
    _, sandbox = live(answer(200, {}))
    calls: list[Callable[[], Any]] = [
        lambda: sandbox.run("x"),
        lambda: sandbox.commands.run("x"),
        lambda: sandbox.commands.start("x"),
        lambda: sandbox.commands.list(),
        lambda: sandbox.contexts.create(),
        lambda: sandbox.contexts.list(),
        lambda: sandbox.files.stat("x"),
        lambda: sandbox.files.list(),
        lambda: sandbox.refresh(),
    ]
    for call in calls:
        with pytest.raises(ServerError):
            call()


def test_times_have_any_number_of_digits() -> None:
    whole = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    assert moment("2026-01-02T03:04:05Z") == whole
    assert moment("2026-01-02T04:04:05.000000001+01:00") == whole
    assert moment("2026-01-02T03:04:05.5Z").microsecond == 500_000
    with pytest.raises(ServerError):
        moment("yesterday")


def test_both_kinds_are_made_with_the_same_arguments() -> None:
    for name in ("create", "connect", "list"):
        one = inspect.signature(getattr(Sandbox, name)).parameters
        two = inspect.signature(getattr(AsyncSandbox, name)).parameters
        assert list(one) == list(two)
        assert [p.default for p in one.values()] == [p.default for p in two.values()]
