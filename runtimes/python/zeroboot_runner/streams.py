"""The standard streams, Python's and C's."""

import gc
import io
import sys

from .report import unraisable

try:
    import ctypes
except ImportError:  # an interpreter built without libffi: no fork server, no flush of C stdio
    ctypes = None

FFLUSH = None


def find_fflush():
    """Looks it up before a fork, once for all."""
    global FFLUSH
    if ctypes is not None:
        FFLUSH = ctypes.CDLL(None).fflush
        FFLUSH.argtypes = [ctypes.c_void_p]


def flush_c():
    if FFLUSH is not None:
        FFLUSH(None)


def open_stdio():
    """The three streams as CPython makes them, over whatever 0, 1 and 2 are now; output is flushed at each line."""

    def stream(fd, mode, name, errors):
        try:
            raw = io.FileIO(fd, mode, closefd=False)
        except OSError:
            return None  # closed from the start, as CPython shows it
        raw.name = name
        buffer = io.BufferedReader(raw) if mode == "r" else io.BufferedWriter(raw)
        text = io.TextIOWrapper(buffer, encoding="utf-8", errors=errors, newline="\n", line_buffering=mode == "w")
        text.mode = mode
        return text

    sys.stdin = sys.__stdin__ = stream(0, "r", "<stdin>", "surrogateescape")
    sys.stdout = sys.__stdout__ = stream(1, "w", "<stdout>", "surrogateescape")
    sys.stderr = sys.__stderr__ = stream(2, "w", "<stderr>", "backslashreplace")


def flush_files():
    writers = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
    # The collector's lists leave out what was frozen before the fork, so this is short.
    for obj in gc.get_objects():
        if type(obj) in writers:
            try:
                if not obj.closed:
                    obj.flush()
            except Exception:
                # Nobody is left to be told; CPython drops it in a deallocator too.
                pass


def flush_std():
    failed = False
    done = []
    for stream in (sys.stdout, sys.__stdout__, sys.stderr, sys.__stderr__):
        if stream is None or any(stream is other for other in done):
            continue
        done.append(stream)
        try:
            if not getattr(stream, "closed", False):
                stream.flush()
        except BaseException:
            if stream is sys.stdout or stream is sys.__stdout__:
                unraisable(repr(stream))
                failed = True
                try:
                    # Do not report the same broken pipe twice.
                    if stream is sys.stdout:
                        sys.stdout = None
                    if stream is sys.__stdout__:
                        sys.__stdout__ = None
                except Exception:
                    pass
    return failed
