"""Files, by E2B's documentation of `sandbox.files`."""

import io
import time
import urllib.error
import urllib.request

import pytest
from e2b import FileType, FilesystemEventType, InvalidArgumentException, NotFoundException, SandboxException


def test_text_and_bytes_go_in_and_come_out(sandbox):
    written = sandbox.files.write("dir/a.txt", "text ä")
    assert (written.name, written.path) == ("a.txt", "/home/user/dir/a.txt")
    assert sandbox.files.read("/home/user/dir/a.txt") == "text ä"
    data = bytes(range(256)) * 5000
    sandbox.files.write("/tmp/b", data)
    assert bytes(sandbox.files.read("/tmp/b", format="bytes")) == data
    assert b"".join(sandbox.files.read("/tmp/b", format="stream")) == data
    sandbox.files.write("c", io.BytesIO(data))
    assert sandbox.commands.run("cmp c /tmp/b && echo same").stdout == "same\n"
    sandbox.files.write("empty", "")
    assert sandbox.files.read("empty") == ""


def test_several_files_go_in_at_once(sandbox):
    write = getattr(sandbox.files, "write_files", sandbox.files.write)
    made = write([{"path": "x/1", "data": "one"}, {"path": "x/2", "data": b"two"}])
    assert [one.path for one in made] == ["/home/user/x/1", "/home/user/x/2"]
    assert (sandbox.files.read("x/1"), sandbox.files.read("x/2")) == ("one", "two")


def test_a_packed_upload_is_unpacked(sandbox, server):
    import gzip

    url = server.url + "/files?path=packed"
    token = sandbox._envd_access_token
    headers = {
        "E2b-Sandbox-Id": sandbox.sandbox_id,
        "E2b-Sandbox-Port": "49983",
        "X-Access-Token": token,
        "Content-Type": "application/octet-stream",
        "Content-Encoding": "gzip",
    }
    body = gzip.compress(b"0123456789" * 100_000)
    urllib.request.urlopen(urllib.request.Request(url, body, headers)).read()
    assert sandbox.files.read("packed") == "0123456789" * 100_000
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(urllib.request.Request(url, body[:100], headers))
    assert raised.value.code == 400
    assert len(sandbox.files.read("packed")) == 1_000_000


def test_directories_are_made_listed_moved_and_removed(sandbox):
    assert sandbox.files.make_dir("d/e")
    assert not sandbox.files.make_dir("d/e")
    sandbox.files.write("d/e/f", "12345")
    sandbox.commands.run("ln -s e d/link && chmod 640 d/e/f")
    listed = {entry.path: entry for entry in sandbox.files.list("d", depth=2)}
    assert set(listed) == {"/home/user/d/e", "/home/user/d/e/f", "/home/user/d/link"}
    one = listed["/home/user/d/e/f"]
    assert (one.type, one.size, one.mode, one.permissions) == (FileType.FILE, 5, 0o640, "-rw-r-----")
    assert (one.owner, one.group) == ("user", "user")
    assert abs(one.modified_time.timestamp() - time.time()) < 3600
    assert listed["/home/user/d/e"].type == FileType.DIR
    link = listed["/home/user/d/link"]
    # The wire tells what the link leads to and that it is one; newer SDKs make a type of that.
    assert link.type.value in ("dir", "symlink") and link.symlink_target == "e"
    assert [entry.name for entry in sandbox.files.list("d/e")] == ["f"]
    moved = sandbox.files.rename("d/e/f", "new/place")
    assert moved.path == "/home/user/new/place"
    assert not sandbox.files.exists("d/e/f")
    assert sandbox.files.get_info("new/place").size == 5
    sandbox.files.remove("d")
    assert not sandbox.files.exists("d")
    sandbox.files.remove("d")


def test_what_is_not_there_is_said(sandbox):
    for call in (
        lambda: sandbox.files.read("nothing"),
        lambda: sandbox.files.list("nothing"),
        lambda: sandbox.files.get_info("nothing"),
        lambda: sandbox.files.rename("nothing", "a"),
        lambda: sandbox.files.watch_dir("nothing"),
    ):
        with pytest.raises(NotFoundException):
            call()
    with pytest.raises((InvalidArgumentException, SandboxException)):
        sandbox.files.read("/tmp")
    sandbox.files.write("file", "")
    with pytest.raises(SandboxException):
        sandbox.files.list("file")
    with pytest.raises(SandboxException):
        sandbox.files.write("/usr/new", "")


def events_of(handle, wanted):
    found, until = [], time.monotonic() + 60
    while not wanted(found):
        assert time.monotonic() < until, found
        found += [(event.name, event.type) for event in handle.get_new_events()]
        time.sleep(0.02)
    return found


def test_changes_of_a_directory_are_told(sandbox):
    sandbox.files.make_dir("watched/below")
    handle = sandbox.files.watch_dir("watched")
    sandbox.commands.run("echo b > watched/below/b; echo a > watched/a")
    found = events_of(handle, lambda found: ("a", FilesystemEventType.CREATE) in found)
    sandbox.files.remove("watched/a")
    found += events_of(handle, lambda found: ("a", FilesystemEventType.REMOVE) in found)
    assert not [name for name, _ in found if name.startswith("below/")]
    handle.stop()
    with pytest.raises(SandboxException):
        handle.get_new_events()

    deep = sandbox.files.watch_dir("watched", recursive=True)
    sandbox.files.write("watched/below/c", "c")
    events_of(deep, lambda found: "below/c" in [name for name, _ in found])
    deep.stop()


def test_a_flood_on_a_watcher_is_bounded_and_said(sandbox):
    sandbox.files.make_dir("flood")
    handle = sandbox.files.watch_dir("flood")
    sandbox.commands.run("cd flood; for n in $(seq 10000); do : > file-$n; done", timeout=120)
    # All or an error: nothing is passed over in silence.
    lost, names, until = False, set(), time.monotonic() + 60
    while not lost and len(names) < 10000:
        assert time.monotonic() < until, len(names)
        try:
            names |= {event.name for event in handle.get_new_events()}
        except SandboxException as error:
            assert "lost" in str(error)
            lost = True
        time.sleep(0.1)
    handle.stop()
    assert sandbox.commands.run("echo on").stdout == "on\n"


def test_an_asynchronous_watcher_is_told_at_once(server):
    import asyncio

    from e2b import AsyncSandbox

    async def main():
        sandbox = await AsyncSandbox.create()
        try:
            await sandbox.files.make_dir("w")
            came = asyncio.Event()

            def on_event(event):
                if event.name == "a":
                    came.set()

            handle = await sandbox.files.watch_dir("w", on_event)
            await sandbox.files.write("w/a", "a")
            await asyncio.wait_for(came.wait(), 60)
            await handle.stop()
        finally:
            await sandbox.kill()

    asyncio.run(main())


def test_signed_addresses_work_for_one_file_and_a_while(sandbox, server):
    """The SDK's own signature. E2B's gateway finds the sandbox by the host's name."""
    from e2b.sandbox.signature import get_signature

    sandbox.files.write("signed.txt", "inside")
    port = server.url.rsplit(":", 1)[1]
    host = {"Host": f"49983-{sandbox.sandbox_id}.sandbox.example:{port}"}

    def get(path, signature, expiration=None):
        from urllib.parse import urlencode

        query = {"path": path, "username": "user", "signature": signature}
        if expiration is not None:
            query["signature_expiration"] = expiration
        url = f"{server.url}/files?{urlencode(query)}"
        return urllib.request.urlopen(urllib.request.Request(url, headers=host)).read()

    signed = get_signature("signed.txt", "read", "user", sandbox._envd_access_token, 60)
    assert get("signed.txt", signed["signature"], signed["expiration"]) == b"inside"
    for path, until in (("other.txt", signed["expiration"]), ("signed.txt", signed["expiration"] + 1)):
        with pytest.raises(urllib.error.HTTPError) as raised:
            get(path, signed["signature"], until)
        assert raised.value.code == 401
    past = get_signature("signed.txt", "read", "user", sandbox._envd_access_token, -10)
    with pytest.raises(urllib.error.HTTPError) as raised:
        get("signed.txt", past["signature"], past["expiration"])
    assert raised.value.code == 401


def test_a_sandbox_wants_its_token(sandbox, server):
    for token in ({}, {"X-Access-Token": "0" * 64}):
        headers = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "49983", **token}
        for path in ("/files?path=a", "/contexts", "/envs"):
            with pytest.raises(urllib.error.HTTPError) as raised:
                urllib.request.urlopen(urllib.request.Request(server.url + path, headers=headers))
            assert raised.value.code == 401


def test_an_upload_larger_than_the_sandbox_is_refused_and_leaves_nothing(sandbox):
    from e2b import NotEnoughSpaceException

    class Endless(io.RawIOBase):
        left = 4 * 1024**3

        def readable(self):
            return True

        def readinto(self, into):
            if self.left <= 0:
                return 0
            self.left -= len(into)
            return len(into)

    # The server's answer can come before the client has sent all: then it may see only that the connection ended.
    with pytest.raises(Exception) as raised:
        sandbox.files.write("large", io.BufferedReader(Endless()))
    assert isinstance(raised.value, (NotEnoughSpaceException, SandboxException, OSError)) or "Error" in repr(raised.value)
    assert not sandbox.files.exists("large")
    assert sandbox.commands.run("echo on").stdout == "on\n"
