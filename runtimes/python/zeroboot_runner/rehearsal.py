"""A small program, run in the way of those to come.

Each page that a fork writes to is a page copied. What has run often writes to fewer: the interpreter has specialised its code, its
caches are filled, and what is made once is made.
"""

import contextlib
import gc
import linecache
import os
import socket
import sys

from . import streams
from .finish import tidy
from .wire import ARG, CODE, IDENTITY, IDENTITY_LEN, RUN, send

# CPython specialises code that has run eight times, and some of it in steps.
TIMES = 24


@contextlib.contextmanager
def standard_pipes():
    """0, 1 and 2 are pipes, as in a sandbox."""
    kept = [os.dup(fd) for fd in range(3)]
    try:
        for fd in range(3):
            ends = os.pipe()
            # The other end of 0 is closed: it is at its end at once.
            os.dup2(ends[0] if fd == 0 else ends[1], fd)
            for end in ends:
                if fd == 0 or end == ends[1]:
                    os.close(end)
                else:
                    kept.append(end)
        yield
    finally:
        for fd in range(3):
            os.dup2(kept[fd], fd)
        for fd in kept:
            os.close(fd)


@contextlib.contextmanager
def unchanged():
    """Undoes what becoming a program changes."""
    spawn, context = sys.modules.get("multiprocessing.spawn"), sys.modules.get("multiprocessing.context")
    places = [(sys, "argv"), (sys, "orig_argv"), (spawn, "get_preparation_data"), (context, "_default_context")]
    kept = [(place, name, getattr(place, name)) for place, name in places if hasattr(place, name)]
    path, main = sys.path[:], sys.modules["__main__"]
    try:
        yield
    finally:
        for place, name, value in kept:
            setattr(place, name, value)
        sys.path[:] = path
        sys.modules["__main__"] = main
        linecache.clearcache()


def rehearse(read_request, generators, make_shell):
    """After this, sys.stdin, sys.stdout and sys.stderr are as a program finds them."""
    with standard_pipes():
        # They are over the descriptors, whatever these become in a fork.
        streams.open_stdio()
        for _ in range(TIMES):
            with unchanged():
                ours, theirs = socket.socketpair()
                for kind, payload in (
                    (IDENTITY, os.urandom(IDENTITY_LEN)),
                    (ARG, b"-c"),
                    (CODE, b"print(1)"),
                    (RUN, b""),
                ):
                    send(ours.fileno(), kind, payload)
                program = read_request(theirs.detach(), generators, make_shell)
                generators.settle()
                tidy(program.main, program.attempt()[0])
                os.close(program.note_fd)
                ours.close()
