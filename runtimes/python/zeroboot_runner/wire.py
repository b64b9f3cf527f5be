"""Frames of crates/zeroboot-proto/src/frame.rs on the control descriptor."""

import os
import struct

CODE, ARG, ENV, IDENTITY, RUN, CWD, SERVE, CELL = 0x01, 0x02, 0x03, 0x09, 0x0A, 0x0B, 0x0C, 0x0D
READY, STARTED, FAILURE, NOTE, RESULT, ERROR, DONE = 0x81, 0x82, 0x87, 0x88, 0x8A, 0x8B, 0x8C
NOTE_OUT_OF_MEMORY = b"\x01"
NOTE_ENDED = b"\x02"
NOTE_HINT = b"\x03"
HEADER = struct.Struct("<IB3x")
MAX_PAYLOAD = 64 * 1024 - 8
IDENTITY_LEN = 64 + 8 + 16

CONTROL_FD = 3
# EX_SOFTWARE: the status of a runner that could not do its work. The agent reads the Failure frame, not this.
STATUS_FAILURE = 70
# What the file names of our own code begin with.
OURS = (lambda: None).__code__.co_filename.rpartition("/")[0] + "/"


class RunnerError(Exception):
    """The runner cannot do its work; the text goes into a Failure frame."""


def send(fd, kind, payload=b""):
    data = memoryview(HEADER.pack(len(payload), kind) + payload)
    while data:
        data = data[os.write(fd, data) :]


def fail(text, fd=CONTROL_FD):
    """Tells the agent why no user code will run, and ends."""
    line = " ".join(str(text).split())
    try:
        send(fd, FAILURE, line.encode("utf-8", "replace")[:MAX_PAYLOAD])
    except OSError:
        # Nobody listens; the agent keeps what is on stderr.
        pass
    try:
        os.write(2, ("zeroboot runner: " + line + "\n").encode("utf-8", "replace"))
    except OSError:
        pass
    os._exit(STATUS_FAILURE)


def frames(reader):
    """Yields (kind, payload) until the other side closes."""
    while True:
        header = reader.read(HEADER.size)
        if not header:
            return
        if len(header) < HEADER.size:
            raise RunnerError("the control channel ended inside a frame")
        length, kind = HEADER.unpack(header)
        if length > MAX_PAYLOAD:
            raise RunnerError("a control frame of %d bytes is above the limit" % length)
        payload = reader.read(length) if length else b""
        if len(payload) < length:
            raise RunnerError("the control channel ended inside a frame")
        yield kind, payload


class Reader:
    """Reads from a descriptor, and calls `wait` before each read that may wait long."""

    def __init__(self, fd):
        self.fd = fd
        self.wait = None
        self.held = b""

    def read(self, size):
        """`size` bytes, or fewer at the end."""
        held = self.held
        while len(held) < size:
            if self.wait is not None:
                self.wait()
            # No more than most requests have: what is allocated for it is written to.
            more = os.read(self.fd, max(size - len(held), 4096))
            if not more:
                break
            held += more
        self.held = held[size:]
        return held[:size]
