"""Live sandboxes of both kinds against a real `zeroboot serve`: see `test_contract.py`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from blocking import Blocking

import zeroboot
from zeroboot import (
    AsyncSandbox,
    BadRequestError,
    CannotStart,
    CellEnd,
    CellError,
    CellFailed,
    Change,
    CommandFailed,
    CommandNotFound,
    ContextExists,
    ContextNotFound,
    FileNotFound,
    Lost,
    NotAllowed,
    NotEmpty,
    RunEnded,
    Sandbox,
    SandboxGone,
    SandboxNotFound,
    Started,
    Stdout,
    TooManySandboxes,
    WrongKind,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from with_server import Server, find_binary, required

ENGINES = [e for e in os.environ.get("ZEROBOOT_TEST_ENGINES", "").split(",") if e] or ["auto"]
NOBODY = "01990000-0000-7000-8000-000000000000"


@pytest.fixture(scope="module", params=ENGINES)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    if find_binary() is None and not required():
        pytest.skip("no zeroboot binary (ZEROBOOT_BIN)")
    engine = None if request.param == "auto" else request.param
    with Server(engine) as running:
        yield running


Make = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def create(request: pytest.FixtureRequest, server: Server) -> Iterator[Make]:
    """Makes sandboxes of either kind, and ends them."""
    made: list[Any] = []
    loop = asyncio.new_event_loop()

    def make(**options: Any) -> Any:
        options = {"timeout": 120, "api_key": server.key, "base_url": server.url, **options}
        if request.param == "sync":
            made.append(Sandbox.create(**options))
        else:
            made.append(Blocking(loop.run_until_complete(AsyncSandbox.create(**options)), loop))
        return made[-1]

    yield make
    for sandbox in made:
        sandbox.kill()
        sandbox.close()
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@pytest.fixture
def sb(create: Make) -> Any:
    return create()


def test_state_is_kept_from_run_to_run(sb: Any) -> None:
    assert sb.run("x = 41").check().value is None
    result = sb.run("print('out'); x + 1")
    assert (result.value, result.stdout, result.outcome, result.context) == (
        "42",
        "out\n",
        "ok",
        "default",
    )
    assert (
        result.execution_count == 2 and result.results[0].is_main and result.results[0].text == "42"
    )
    again = Sandbox.connect(sb.id, client=None, **where(sb))
    assert again.run("x").value == "41"
    again.close()


def where(sb: Any) -> dict[str, Any]:
    config = getattr(sb, "_inner", sb)._client._config
    return {
        "base_url": config.base_url,
        "api_key": config.headers["Authorization"].removeprefix("Bearer "),
    }


def test_an_error_leaves_the_context_usable(sb: Any) -> None:
    result = sb.run("y = 1\n1/0")
    assert not result.ok and (result.error.name, result.error.value) == (
        "ZeroDivisionError",
        "division by zero",
    )
    assert "1/0" in result.error.traceback
    with pytest.raises(CellFailed, match="division by zero"):
        result.check()
    assert sb.run("y").value == "1"


def test_what_a_cell_shows_comes_in_its_forms(sb: Any) -> None:
    code = """
class Shown:
    def _repr_html_(self): return "<b>shown</b>"
    def _repr_png_(self): return b"\\x89PNG"
    def _repr_json_(self): return {"a": [1, "two"]}
    def __repr__(self): return "Shown()"
Shown()
"""
    main = sb.run(code).check().results[0]
    assert (main.text, main.html, main.png) == ("Shown()", "<b>shown</b>", b"\x89PNG")
    assert main.json == {"a": [1, "two"]}


def test_a_cell_streams(sb: Any) -> None:
    code = (
        "import sys, time\nprint('one', flush=True)\ntime.sleep(0.4)\nsys.stderr.write('e')\n6 * 7"
    )
    seen: list[tuple[str, float]] = []
    with sb.stream(code) as events:
        for event in events:
            seen.append((event.type, time.monotonic()))
    kinds = [kind for kind, _ in seen]
    assert kinds[:2] == ["started", "stdout"] and kinds[-1] == "end"
    assert sorted(kinds[2:-1]) == ["result", "stderr"]
    assert seen[2][1] - seen[1][1] > 0.2, "the first came while the code ran"
    assert isinstance(event, CellEnd) and event.result is events.result
    assert (events.result.value, events.result.stdout, events.result.context) == (
        "42",
        "one\n",
        "default",
    )
    heard: list[Any] = []
    result = sb.run(
        "print('a'); display = 3; display", on_stdout=heard.append, on_result=heard.append
    )
    # Streams and results are apart: nothing says in which order they come.
    assert len(heard) == 2 and "a\n" in heard and result.results[0] in heard
    assert result.value == "3"
    with sb.stream("1/0") as events:
        assert next(e for e in events if isinstance(e, CellError)).name == "ZeroDivisionError"


def test_a_cell_that_takes_too_long_is_interrupted(sb: Any) -> None:
    sb.run("kept = 1")
    begin = time.monotonic()
    result = sb.run("import time\nwhile True: time.sleep(0.01)", timeout=0.5)
    assert result.outcome == "deadline_passed" and time.monotonic() - begin < 10
    assert not result.context_lost and sb.run("kept").value == "1"


def test_an_interpreter_that_ends_says_so_and_another_takes_its_place(sb: Any) -> None:
    sb.run("gone = 1")
    result = sb.run("import os; os._exit(3)")
    assert result.context_lost and not result.ok
    assert sb.run("gone").error.name == "NameError"


def test_contexts_are_apart(sb: Any) -> None:
    made = sb.contexts.create("other", cwd="/tmp")
    assert (made.name, made.cwd, made.busy) == ("other", "/tmp", False)
    sb.run("x = 'default'")
    sb.run("x = 'other'", context=made)
    assert sb.run("x").value == "'default'" and sb.run("x", context="other").value == "'other'"
    assert sb.run("import os; os.getcwd()", context="other").value == "'/tmp'"
    unnamed = sb.contexts.create()
    assert {c.name for c in sb.contexts.list()} == {"default", "other", unnamed.name}
    assert sb.contexts.restart("other").name == "other"
    assert sb.run("x", context="other").error.name == "NameError"
    sb.contexts.delete("other")
    with pytest.raises(ContextNotFound):
        sb.run("1", context="other")
    with pytest.raises(ContextNotFound):
        sb.contexts.delete("other")
    with pytest.raises(ContextExists):
        sb.contexts.create(unnamed.name)


def test_a_cell_can_be_interrupted_from_elsewhere(sb: Any) -> None:
    other = Sandbox.connect(sb.id, **where(sb))
    with sb.stream("import time\nprint('up', flush=True)\ntime.sleep(60)") as events:
        for event in events:
            if isinstance(event, Stdout):
                other.contexts.interrupt()
    other.close()
    assert (
        events.result.outcome == "interrupted" and events.result.error.name == "KeyboardInterrupt"
    )


def test_commands_run_with_all_they_were_given(sb: Any) -> None:
    result = sb.commands.run(
        ["sh", "-c", 'echo "$0 $A $(pwd)"; cat; echo err >&2; exit 3', "zero"],
        cwd="/tmp",
        env={"A": "b"},
        stdin=b"\xff in",
    )
    assert result.stdout_bytes == b"zero b /tmp\n\xff in" and result.stderr == "err\n"
    assert (result.exit_code, result.outcome, result.ok) == (3, "exited", False) and result.pid > 0
    with pytest.raises(CommandFailed, match="exit code 3: err"):
        result.check()
    assert sb.commands.run("echo $((6 * 7)) | cat").check().stdout == "42\n"
    heard: list[str] = []
    result = sb.commands.run(
        "echo out; echo err >&2", on_stdout=heard.append, on_stderr=heard.append
    )
    assert sorted(heard) == ["err\n", "out\n"] and result.stdout == "out\n"
    killed = sb.commands.run("kill -9 $$")
    assert (killed.outcome, killed.signal, killed.exit_code) == ("signaled", 9, 137)


def test_a_command_that_cannot_start_or_takes_too_long_says_so(sb: Any) -> None:
    for start in (sb.commands.run, sb.commands.start):
        with pytest.raises(CannotStart):
            start(["no-such-program"])
    result = sb.commands.run("sleep 60", timeout=0.3)
    assert (result.outcome, result.exit_code) == ("deadline_passed", 124)


def test_a_server_in_the_background_is_reached_from_a_second_command(sb: Any) -> None:
    sb.files.write("index.html", "served")
    web = sb.commands.start(
        [sb.run("import sys; sys.executable").value.strip("'"), "-m", "http.server", "8000"],
        tag="web",
    )
    ask = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8000').read())"
    end = time.monotonic() + 30
    while not (result := sb.run(ask)).ok and time.monotonic() < end:
        time.sleep(0.1)
    assert result.stdout == "b'served'\n"
    (listed,) = (c for c in sb.commands.list() if c.tag == "web")
    assert (listed.id, listed.pid, listed.running) == (web.id, web.pid, True)
    web.kill()
    assert web.wait(30).outcome in ("closed", "signaled") and not web.refresh().running


def test_a_command_is_left_and_found_again(sb: Any) -> None:
    code = "for i in 1 2 3 4 5 6; do echo line $i; sleep 0.1; done"
    left = sb.commands.start(code)
    with left.output() as events:
        for event in events:
            if isinstance(event, Stdout):
                break
    found = sb.commands.connect(left.id)
    result = found.wait(30)
    assert result.stdout == "".join(f"line {i}\n" for i in range(1, 7)) and not result.truncated
    assert found.wait() is result
    with found.output(len("line 1\n")) as events:
        rest = "".join(e.text for e in events if isinstance(e, Stdout))
    assert rest == result.stdout[len("line 1\n") :]


def test_output_that_fell_out_of_the_buffer_is_said(sb: Any) -> None:
    command = sb.commands.start("yes | head -c 8000000")
    end = time.monotonic() + 30
    while command.refresh().running and time.monotonic() < end:
        time.sleep(0.05)
    with command.output() as events:
        seen = list(events)
    lost = sum(e.bytes for e in seen if isinstance(e, Lost))
    assert lost > 0 and lost + len(events.result.stdout_bytes) == 8_000_000
    assert events.result.truncated and command.info.first_offset == lost


def test_a_command_is_written_to_and_signalled(sb: Any) -> None:
    command = sb.commands.start("cat; exit 5", keep_stdin_open=True)
    command.write("tëxt")
    command.write(b"\x00bytes")
    command.close_stdin()
    result = command.wait(30)
    assert result.stdout_bytes == "tëxt".encode() + b"\x00bytes" and result.exit_code == 5
    with pytest.raises(RunEnded):
        command.write("late")
    trap = sb.commands.start(
        "trap 'echo caught; exit 7' INT; echo up; while :; do sleep 0.05; done"
    )
    with trap.output() as events:
        for event in events:
            if isinstance(event, Stdout) and event.text == "up\n":
                trap.signal(signal.SIGINT)
    assert events.result.exit_code == 7 and "caught" in events.result.stdout
    with pytest.raises(CommandNotFound):
        sb.commands.connect(NOBODY)


def test_leaving_the_stream_of_a_command_ends_it(sb: Any) -> None:
    with sb.commands.stream("echo up; sleep 60") as events:
        for event in events:
            if isinstance(event, Started):
                started = event
            if isinstance(event, Stdout):
                break
    command = sb.commands.connect(started.id)
    assert command.wait(30).outcome in ("closed", "signaled")


def test_files_of_any_size_go_in_and_come_out(sb: Any, tmp_path: Path) -> None:
    entry = sb.files.write("a/b.txt", "tëxt", mode=0o755)
    assert (entry.name, entry.size, entry.mode, entry.kind) == ("b.txt", 5, 0o755, "file")
    assert (
        sb.files.read_text("a/b.txt") == "tëxt" and sb.commands.run("cat a/b.txt").stdout == "tëxt"
    )
    local = tmp_path / "local"
    local.write_bytes(os.urandom(5_000_000))
    sb.files.write("big", local)
    sb.files.download("big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == local.read_bytes()
    assert sb.files.read("big", offset=4_999_990, length=100) == local.read_bytes()[-10:]
    assert sb.files.read("big", offset=7, length=3) == local.read_bytes()[7:10]
    sb.files.write("pieces", (b"x" * 100_000 for _ in range(30)))
    assert sb.files.stat("pieces").size == 3_000_000
    sb.files.write("empty", b"")
    assert sb.files.read("empty") == b""


def test_files_are_listed_moved_and_removed(sb: Any) -> None:
    sb.files.mkdir("d/e")
    sb.files.write("d/f", "1")
    assert sorted((e.name, e.kind) for e in sb.files.list("d")) == [
        ("e", "directory"),
        ("f", "file"),
    ]
    sb.files.write("d/e/g", "22")
    assert sorted(e.name for e in sb.files.list("d", depth=2)) == ["e", "f", "g"]
    assert sb.files.move("d/f", "d/h").name == "h" and not sb.files.exists("d/f")
    assert sb.files.chmod("d/h", "600").mode == 0o600
    with pytest.raises(NotEmpty):
        sb.files.remove("d")
    sb.files.remove("d", recursive=True)
    assert not sb.files.exists("d")
    sb.commands.run("ln -s /etc/passwd link").check()
    assert (sb.files.stat("link").kind, sb.files.stat("link").target) == ("link", "/etc/passwd")


def test_what_files_cannot_do_has_its_type(sb: Any) -> None:
    sb.files.mkdir("d")
    calls: list[tuple[Callable[[], Any], type[Exception]]] = [
        (lambda: sb.files.read("missing"), FileNotFound),
        (lambda: sb.files.list("missing"), FileNotFound),
        (lambda: sb.files.read("d"), WrongKind),
        (lambda: sb.files.write("d", "x"), WrongKind),
        (lambda: sb.files.write("/usr/x", "x"), NotAllowed),
        (lambda: sb.files.read("a\0b"), BadRequestError),
        (lambda: sb.files.read(""), BadRequestError),
    ]
    for call, kind in calls:
        with pytest.raises(kind):
            call()
    assert sb.run("1").ok, "the sandbox goes on"


def test_a_watch_hears_what_changes_from_its_call_on(sb: Any) -> None:
    with sb.files.watch(".") as changes:
        sb.files.write("new", "x")
        seen: list[Change] = []
        while not any(c.path.endswith("/new") for c in seen):
            seen.append(next(changes))
        sb.files.remove("new")
        while not any(c.kind == "removed" and c.path.endswith("/new") for c in seen):
            seen.append(next(changes))
    with pytest.raises(FileNotFound):
        sb.files.watch("missing")


def test_a_terminal_is_one(sb: Any) -> None:
    with sb.terminal(
        "stty size; read line; stty size; echo got $line; exit 5", columns=100, rows=30
    ) as terminal:
        shown = b""
        while b"30 100" not in shown:
            shown += terminal.read(30)
        terminal.resize(90, 20)
        terminal.send("typed\r")
        rest: list[bytes] = []
        assert terminal.wait(rest.append).exit_code == 5
        assert b"20 90" in b"".join(rest) and b"got typed" in b"".join(rest)
        assert terminal.started.pid > 0
    with sb.terminal() as terminal:
        # In one program: a shell that is interrupted between two waits for the second.
        terminal.send("sh -c 'echo $((6*7)); sleep 60'\r")
        shown = b""
        while b"42\r\n" not in shown:
            shown += terminal.read(30)
        terminal.send("\x03")
        terminal.send("exit 9\r")
        assert terminal.wait().exit_code == 9
    for bad in ({"columns": 0}, {"rows": -1}, {"columns": 70000}):
        with pytest.raises(BadRequestError):
            sb.terminal(**bad)


def test_closing_a_terminal_ends_its_program_and_leaving_a_command_does_not(sb: Any) -> None:
    terminal = sb.terminal("echo up; sleep 60")
    assert b"up" in terminal.read(30) and terminal.started is not None
    terminal.close()
    assert sb.commands.connect(terminal.started.id).wait(30).outcome in ("closed", "signaled")
    command = sb.commands.start("echo up; read x; echo $x", terminal=(80, 24))
    with command.terminal() as terminal:
        assert b"up" in terminal.read(30)
    with command.terminal(offset=4) as terminal:
        terminal.send("back\r")
        assert terminal.wait().exit_code == 0
    piped = sb.commands.start("sleep 60")
    with pytest.raises(BadRequestError) as caught:
        piped.terminal()
    assert caught.value.code == "no_terminal"


def test_a_lease_is_seen_extended_and_ends(create: Make) -> None:
    sandbox = create(
        timeout=30,
        idle_timeout=25,
        env={"WHO": "me"},
        metadata={"n": "1"},
        limits={"memory_mb": 256},
    )
    assert sandbox.run("import os; os.environ['WHO']").value == "'me'"
    assert sandbox.info.limits["memory_mb"] == 256 and sandbox.metadata == {"n": "1"}
    before = sandbox.expires_at
    assert (sandbox.extend(90).expires_at - before).total_seconds() > 50
    sandbox.extend(0.5)
    time.sleep(1)
    with pytest.raises(SandboxGone) as caught:
        sandbox.run("1")
    assert caught.value.reason == "lease_ended" and sandbox.kill() is False


def test_a_sandbox_that_ends_under_a_run_says_so(create: Make) -> None:
    sandbox = create()
    other = Sandbox.connect(sandbox.id, **where(sandbox))
    with (
        pytest.raises(SandboxGone) as caught,
        sandbox.stream("import time\nprint(1, flush=True)\ntime.sleep(60)") as events,
    ):
        for event in events:
            if isinstance(event, Stdout):
                assert other.kill() is True
    assert caught.value.reason == "requested"
    other.close()


def test_sandboxes_are_listed_by_their_words_and_only_to_their_key(
    create: Make, server: Server
) -> None:
    sandbox = create(metadata={"mark": f"{time.time()}"})
    found = Sandbox.list(metadata=dict(sandbox.metadata), **where(sandbox))
    assert [info.id for info in found] == [sandbox.id]
    assert Sandbox.list(metadata={"mark": "none"}, **where(sandbox)) == []
    for unknown in (NOBODY, "no-id", "../health"):
        with pytest.raises(SandboxNotFound):
            Sandbox.connect(unknown, **where(sandbox))
    with pytest.raises(BadRequestError):
        Sandbox.create("no-such-template", **where(sandbox))
    with pytest.raises(zeroboot.AuthenticationError):
        Sandbox.connect(sandbox.id, base_url=server.url, api_key="zb_live_other")


def test_too_many_sandboxes_are_refused(server: Server) -> None:
    with Sandbox(server.key, server.url) as client:
        made = []
        try:
            with pytest.raises((TooManySandboxes, zeroboot.ServerError)):
                for _ in range(40):
                    made.append(Sandbox.create(client=client, timeout=60))
        finally:
            for sandbox in made:
                sandbox.kill()
        assert len(made) == 16


def test_the_example_of_the_documentation_runs(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROBOOT_API_KEY", server.key)
    monkeypatch.setenv("ZEROBOOT_BASE_URL", server.url)
    with Sandbox.create(template="python", timeout=600) as sb:
        sb.files.write("data.csv", b"a\n1\n2\n")
        sb.run("import csv; rows = list(csv.reader(open('data.csv')))")
        result = sb.run("rows")
        assert result.value == "[['a'], ['1'], ['2']]"
        sb.commands.start("sleep 1")
        sb.files.watch(".").close()
    with pytest.raises(SandboxGone):
        Sandbox.connect(sb.id)


def test_many_at_once_never_mix_their_answers(server: Server) -> None:
    async def one(client: AsyncSandbox, n: int) -> None:
        async with await AsyncSandbox.create(client=client, timeout=120) as sandbox:

            async def step(i: int) -> None:
                mark = f"{n}-{i}"
                if i % 3 == 0:
                    assert (await sandbox.run(f"'{mark}'")).value == f"'{mark}'"
                elif i % 3 == 1:
                    assert (await sandbox.commands.run(["echo", mark])).stdout == mark + "\n"
                else:
                    await sandbox.files.write(f"f{i}", mark)
                    assert await sandbox.files.read_text(f"f{i}") == mark

            await asyncio.gather(*(step(i) for i in range(12)))

    async def main() -> None:
        async with AsyncSandbox(server.key, server.url, max_retries=20) as client:
            await asyncio.gather(*(one(client, n) for n in range(8)))

    asyncio.run(main())


def test_trio_works_too(server: Server) -> None:
    trio = pytest.importorskip("trio")

    async def main() -> None:
        options: dict[str, Any] = {"api_key": server.key, "base_url": server.url}
        async with await AsyncSandbox.create(**options) as sandbox:
            assert (await sandbox.run("6 * 7")).value == "42"
            assert (
                await sandbox.files.read((await sandbox.files.write("a", iter([b"1", b"2"]))).path)
                == b"12"
            )
            async with await sandbox.terminal("exit 3") as terminal:
                assert (await terminal.wait()).exit_code == 3

    trio.run(main)
