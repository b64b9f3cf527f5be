"""Commands and terminals, by E2B's documentation of `sandbox.commands` and `sandbox.pty`."""

import time

import pytest
from e2b import CommandExitException, NotFoundException, PtySize, SandboxException, TimeoutException


def test_output_and_status_come_back(sandbox):
    result = sandbox.commands.run("echo out; echo err >&2")
    assert (result.stdout, result.stderr, result.exit_code, result.error) == ("out\n", "err\n", 0, None)


def test_a_status_that_is_not_zero_is_raised(sandbox):
    with pytest.raises(CommandExitException) as raised:
        sandbox.commands.run("echo before; exit 3")
    assert (raised.value.exit_code, raised.value.stdout, raised.value.error) == (3, "before\n", "exit status 3")


def test_output_is_told_as_it_comes(sandbox):
    out, err = [], []
    sandbox.commands.run("echo a; echo b >&2; echo ä", on_stdout=out.append, on_stderr=err.append)
    assert ("".join(out), "".join(err)) == ("a\nä\n", "b\n")


def test_much_output_comes_whole(sandbox):
    result = sandbox.commands.run("head -c 3000000 /dev/urandom | base64 -w 0 | tee /tmp/all | md5sum; cat /tmp/all")
    digest, text = result.stdout.split("\n", 1)
    import hashlib

    assert hashlib.md5(text.encode()).hexdigest() == digest.split()[0]


def test_a_command_runs_where_it_is_told(sandbox):
    assert sandbox.commands.run("pwd").stdout == "/home/user\n"
    assert sandbox.commands.run("pwd", cwd="/tmp").stdout == "/tmp\n"
    with pytest.raises(SandboxException):
        sandbox.commands.run("pwd", cwd="/nothing/here")


def test_the_one_user_is_user_and_root_is_refused(sandbox):
    assert sandbox.commands.run("echo fine", user="user").stdout == "fine\n"
    with pytest.raises(SandboxException, match="one user"):
        sandbox.commands.run("echo fine", user="root")


def test_a_command_in_the_background_is_listed_and_waited_for(sandbox):
    handle = sandbox.commands.run("read line; echo got $line", background=True, stdin=True)
    assert handle.pid in [process.pid for process in sandbox.commands.list()]
    sandbox.commands.send_stdin(handle.pid, "this\n")
    assert handle.wait().stdout == "got this\n"
    assert handle.pid not in [process.pid for process in sandbox.commands.list()]


def test_input_can_be_closed(sandbox):
    handle = sandbox.commands.run("cat; echo end", background=True, stdin=True)
    sandbox.commands.send_stdin(handle.pid, "some")
    sandbox.commands.close_stdin(handle.pid)
    assert handle.wait().stdout == "someend\n"


def test_a_command_can_be_killed(sandbox):
    handle = sandbox.commands.run("sleep 1000", background=True)
    assert handle.kill()
    with pytest.raises(CommandExitException) as raised:
        handle.wait()
    assert raised.value.exit_code == -1 and "killed" in raised.value.error
    assert not sandbox.commands.kill(handle.pid)


def test_a_command_that_a_client_left_goes_on_and_can_be_joined(sandbox):
    handle = sandbox.commands.run("read line; echo $line", background=True, stdin=True)
    handle.disconnect()
    again = sandbox.commands.connect(handle.pid)
    sandbox.commands.send_stdin(handle.pid, "there\n")
    assert again.wait().stdout == "there\n"
    with pytest.raises(NotFoundException):
        sandbox.commands.connect(handle.pid)


def test_a_command_ends_with_its_timeout(sandbox):
    with pytest.raises(TimeoutException):
        sandbox.commands.run("sleep 1000", timeout=1)
    until = time.monotonic() + 60
    while sandbox.commands.list():
        assert time.monotonic() < until
        time.sleep(0.1)
    assert sandbox.commands.run("echo on").stdout == "on\n"


def test_a_terminal_shows_what_is_typed_and_has_a_size(sandbox):
    shown = bytearray()
    terminal = sandbox.pty.create(PtySize(rows=30, cols=100))
    sandbox.pty.send_stdin(terminal.pid, b"stty size; echo first-$((40+2))\n")
    sandbox.pty.resize(terminal.pid, PtySize(rows=20, cols=70))
    sandbox.pty.send_stdin(terminal.pid, b"stty size\nexit\n")
    terminal.wait(on_pty=shown.extend)
    assert b"first-42" in shown and b"20 70" in shown


def test_a_terminal_can_be_killed(sandbox):
    terminal = sandbox.pty.create(PtySize(rows=30, cols=100))
    assert sandbox.pty.kill(terminal.pid)


def test_a_sandbox_that_ends_under_a_command_is_said(server):
    from e2b import Sandbox

    sandbox = Sandbox.create()
    handle = sandbox.commands.run("sleep 1000", background=True)
    sandbox.kill()
    with pytest.raises((TimeoutException, SandboxException)):
        handle.wait()
