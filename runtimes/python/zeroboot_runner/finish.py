"""The end of a program."""

import atexit
import gc
import threading

from . import streams
from .report import unraisable


def finish(main, status=0):
    """What Py_Finalize does that a program can see, without its slow parts. Returns the exit status."""
    try:
        threading._shutdown()
    except BaseException:
        unraisable(repr(threading))
    try:
        atexit._run_exitfuncs()
    except BaseException:
        # Printed already; up to 3.9 the last one is raised again.
        pass
    return tidy(main, status)


def tidy(main, status):
    """Flushes what is open, and lets the objects of the main module go. Returns the exit status."""
    if streams.flush_std():
        status = 120
    # Files that were never closed lose their buffers unless they are flushed or the objects go, and __del__ methods are owed
    # their call: the same two passes over the main module as in CPython's finalize_modules.
    try:
        streams.flush_files()
        names = main.__dict__
        for name in [n for n in names if n[:1] == "_" and n[1:2] != "_"]:
            names[name] = None
        for name in [n for n in names if n != "__builtins__"]:
            names[name] = None
        gc.collect()
        streams.flush_files()
    except BaseException:
        unraisable("finalization")
    if streams.flush_std():
        status = 120
    streams.flush_c()
    return status
