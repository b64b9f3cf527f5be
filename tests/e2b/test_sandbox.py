"""The control plane, by E2B's documentation of `Sandbox`."""

import time
import uuid

import pytest
from e2b import (
    AsyncSandbox,
    AuthenticationException,
    NotFoundException,
    Sandbox,
    SandboxException,
    SandboxQuery,
    SandboxState,
    TimeoutException,
)


def pages(paginator):
    found = []
    while paginator.has_next:
        found += paginator.next_items()
    return found


def test_a_sandbox_is_made_found_and_killed(server):
    sandbox = Sandbox.create(metadata={"purpose": "a b+c&d"}, timeout=120)
    try:
        info = sandbox.get_info()
        assert info.sandbox_id == sandbox.sandbox_id
        assert info.metadata == {"purpose": "a b+c&d"}
        assert info.state == SandboxState.RUNNING
        assert 100 < (info.end_at - info.started_at).total_seconds() < 140
        assert info.cpu_count > 0 and info.memory_mb > 0
        assert sandbox.is_running()
    finally:
        assert sandbox.kill()
    assert not sandbox.is_running()
    assert not Sandbox.kill(sandbox.sandbox_id)
    with pytest.raises(NotFoundException):
        Sandbox.get_info(sandbox.sandbox_id)


def test_lists_are_filtered_and_paged(server):
    mark = uuid.uuid4().hex
    made = [Sandbox.create(metadata={"mark": mark, "n": str(n)}) for n in range(3)]
    try:
        ids = {sandbox.sandbox_id for sandbox in made}
        query = SandboxQuery(metadata={"mark": mark})
        assert {one.sandbox_id for one in pages(Sandbox.list(query=query))} == ids
        assert {one.sandbox_id for one in pages(Sandbox.list(query=query, limit=1))} == ids
        first = Sandbox.list(query=query, limit=2)
        assert len(first.next_items()) == 2 and first.has_next
        paused = SandboxQuery(metadata={"mark": mark}, state=[SandboxState.PAUSED])
        assert pages(Sandbox.list(query=paused)) == []
        one = SandboxQuery(metadata={"mark": mark, "n": "1"}, state=[SandboxState.RUNNING])
        assert [found.metadata["n"] for found in pages(Sandbox.list(query=one))] == ["1"]
    finally:
        for sandbox in made:
            sandbox.kill()


def test_a_timeout_is_set_anew_and_connect_never_makes_it_shorter(server):
    sandbox = Sandbox.create(timeout=60)
    try:
        sandbox.set_timeout(600)
        left = (sandbox.get_info().end_at - sandbox.get_info().started_at).total_seconds()
        assert left > 590
        again = Sandbox.connect(sandbox.sandbox_id, timeout=30)
        assert again.get_info().end_at == sandbox.get_info().end_at
        assert again.commands.run("echo here").stdout == "here\n"
    finally:
        sandbox.kill()


def test_a_sandbox_ends_with_its_timeout(server):
    sandbox = Sandbox.create(timeout=1)
    until = time.monotonic() + 60
    while sandbox.is_running():
        assert time.monotonic() < until
        time.sleep(0.1)
    with pytest.raises(TimeoutException):
        sandbox.commands.run("true")


def test_variables_are_those_of_all_programs(server):
    with Sandbox.create(envs={"WHO": "me"}) as sandbox:
        assert sandbox.commands.run("echo $WHO $HOME").stdout == "me /home/user\n"
        assert sandbox.commands.run("echo $WHO", envs={"WHO": "you"}).stdout == "you\n"


def test_a_template_that_is_not_there_is_said(server):
    with pytest.raises((NotFoundException, SandboxException), match="nothing-of-the-kind"):
        Sandbox.create("nothing-of-the-kind")


def test_a_key_that_is_not_one_is_refused(server):
    with pytest.raises(AuthenticationException):
        Sandbox.create(api_key="e2b_" + "0" * 40)


def test_what_cannot_be_done_is_an_error(server, sandbox):
    with pytest.raises(SandboxException, match="paused"):
        sandbox.pause() if hasattr(sandbox, "pause") else sandbox.beta_pause()
    with pytest.raises(SandboxException, match="not measured"):
        sandbox.get_metrics()
    if hasattr(sandbox, "fork"):
        with pytest.raises(SandboxException, match="forked"):
            sandbox.fork()
    if hasattr(sandbox, "create_snapshot"):
        with pytest.raises(SandboxException, match="snapshot"):
            sandbox.create_snapshot()
    # The sandbox is none the worse.
    assert sandbox.commands.run("echo on").stdout == "on\n"


def test_an_asynchronous_client_works_as_well(server):
    import asyncio

    async def main():
        sandbox = await AsyncSandbox.create()
        try:
            results = await asyncio.gather(*(sandbox.commands.run(f"echo {n}") for n in range(8)))
            assert [result.stdout for result in results] == [f"{n}\n" for n in range(8)]
            await sandbox.files.write("a", "text")
            assert await sandbox.files.read("a") == "text"
        finally:
            await sandbox.kill()

    asyncio.run(main())
