"""A context: an interpreter that runs cells, one after the other, and keeps their state."""

import builtins
import importlib.machinery
import importlib.util
import linecache
import os
import signal
import sys
import time
import types

from . import streams
from .identity import Generators, apply_identity
from .results import Channel, error_payload, error_text
from .shell import Shell
from .wire import CELL, CODE, ENV, IDENTITY, IDENTITY_LEN, RunnerError, fail, frames

OK, FAILED, INTERRUPTED = 0, 1, 2


def set_environment(payload):
    key, nul, value = payload.partition(b"\0")
    if not nul or not key:
        raise RunnerError("malformed env frame")
    os.environb[key] = value
    if key == b"TZ":
        time.tzset()


def no_input(prompt=""):
    raise EOFError("a cell has no standard input: put the value into the code, or run a program that reads it")


def shell_maker():
    """How the first cell gets its shell. Where IPython is warm, its shell is made now, and where there is none, nobody looks again."""
    if sys.modules.get("IPython") is not None:
        shell = load_ipython()
        return lambda: shell
    return Shell if importlib.util.find_spec("IPython") is None else load_ipython


def load_ipython():
    try:
        from .ipython import IPythonShell
    except ImportError:
        # What it needs is not there.
        return Shell()
    return IPythonShell()


class Context:
    def __init__(self, reader, fd, generators, make_shell):
        self.reader, self.generators, self.make_shell = reader, generators, make_shell
        self.channel = Channel(fd)
        self.count = 0
        self.running = False
        # Identities that are still to come by frame, and were taken at their signal.
        self.renewed = 0
        self.shell = None
        main = self.main = types.ModuleType("__main__")
        main.__builtins__ = builtins
        main.__loader__ = importlib.machinery.BuiltinImporter
        if sys.version_info < (3, 14):
            main.__annotations__ = {}
        sys.path.insert(0, "")
        sys.argv = [""]
        if hasattr(sys, "orig_argv"):
            sys.orig_argv = [sys.executable]
        sys.modules["__main__"] = main
        builtins.input = no_input
        # Before `Started`: from then on the agent may send one.
        signal.signal(signal.SIGINT, self.interrupt)
        # Ignored where nobody has set it: a context that is still starting.
        signal.signal(signal.SIGURG, self.renew)
        # Cells have no standard input.
        null = os.open(os.devnull, os.O_RDONLY)
        if null != 0:
            os.dup2(null, 0)
            os.close(null)

    def engaged_shell(self):
        shell = self.make_shell()
        shell.engage(self.main, self.channel)
        # In place of the one that waits for nothing.
        self.reader.wait = lambda: shell.loop.wait(self.reader.fd)
        return shell

    def run(self):
        """Serves until the agent closes; never returns."""
        code = []
        try:
            for kind, payload in frames(self.reader):
                if kind == CODE:
                    code.append(payload)
                elif kind == CELL:
                    source, code = b"".join(code), []
                    self.cell(source)
                elif kind == IDENTITY:
                    if self.renewed > 0:
                        # At its signal.
                        self.renewed -= 1
                    else:
                        self.become_other(payload)
                elif kind == ENV:
                    set_environment(payload)
                else:
                    raise RunnerError("unexpected frame kind %#04x in a context" % kind)
        except RunnerError as error:
            fail(error, self.channel.fd)
        except BaseException as error:
            fail("%s: %s" % (type(error).__name__, error), self.channel.fd)
        streams.flush_std()
        streams.flush_files()
        os._exit(0)

    def become_other(self, identity):
        """The sandbox was branched, and this is another one."""
        # What the cells made has to be found, too.
        self.generators = Generators(self.generators)
        apply_identity(identity, self.generators)

    def renew(self, signum, frame):
        """SIGURG: the same, at once. The kernel has its own random bytes by now, and the identity follows by frame."""
        if os.getpid() != self.channel.pid:
            return
        try:
            self.become_other(os.urandom(IDENTITY_LEN))
            self.renewed += 1
        except BaseException as error:
            # No code goes on with another sandbox's generators.
            fail("%s: %s" % (type(error).__name__, error), self.channel.fd)
            os._exit(1)

    def interrupt(self, signum, frame):
        """SIGINT: a KeyboardInterrupt in the cell that runs, and nothing between cells."""
        if not self.running:
            return
        if self.channel.holding:
            self.channel.pending = True
            return
        if frame is not None and frame.f_code is Context.guarded.__code__:
            # The cell has not begun or is over: once is enough.
            self.running = False
        raise KeyboardInterrupt

    def guarded(self, source):
        """Runs the cell. An interrupt is raised in here, and nowhere else."""
        try:
            self.running = True
            if self.shell is None:
                self.shell = self.engaged_shell()
            error, shown = self.shell.run(source, self.count)
            self.running = False
        except BaseException as caught:
            self.running = False
            error, shown = caught, None
        return error, shown

    def cell(self, source):
        self.count += 1
        self.channel.begin()
        # A cell may have put another in its place.
        signal.signal(signal.SIGINT, self.interrupt)
        try:
            error, shown = self.guarded(source)
        except KeyboardInterrupt as caught:
            # Between the lines of `guarded`.
            error, shown = caught, None
        if os.getpid() != self.channel.pid:
            # A fork that the program made came to the end of the cell.
            streams.flush_std()
            os._exit(0 if error is None else 1)
        signal.signal(signal.SIGINT, self.interrupt)
        status, payload = OK, None
        if error is not None:
            status = INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
            name = type(error).__name__
            payload = error_payload(name, error_text(error), name + "\n" if shown is None else shown)
        streams.flush_std()
        streams.flush_c()
        if any(stream is None or getattr(stream, "closed", False) for stream in (sys.stdout, sys.stderr)):
            streams.open_stdio()
        self.channel.done(status, self.count, payload)


def warm_cells():
    """First uses, as in warm.py."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        shell = Shell()
        shell.names, shell.channel = {"__name__": "__main__"}, Channel(null)
        shell.channel.begin()
        for code in (b"x = 1\nx + 1", b"1/0"):
            error, shown = shell.run(code, 0)
            if error is not None:
                error_payload(type(error).__name__, error_text(error), shown)
        shell.channel.done(OK, 0, None)
    finally:
        os.close(null)
        linecache.clearcache()
        vars(builtins).pop("_", None)
        for name in ("last_type", "last_value", "last_traceback", "last_exc"):
            vars(sys).pop(name, None)
