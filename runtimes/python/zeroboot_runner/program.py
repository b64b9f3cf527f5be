"""One program: the whole life of a sandbox that serves one exec."""

import builtins
import importlib.machinery
import os
import signal
import sys
import tempfile
import time
import types

from . import hints
from .finish import finish
from .report import register_source, report
from .wire import NOTE, NOTE_ENDED, NOTE_HINT, NOTE_OUT_OF_MEMORY, send

# Set by the agent of a VM.
LINGER = os.environ.pop("ZEROBOOT_LINGER", None) == "1"


class Program:
    """The code as `__main__`."""

    def __init__(self, code, argv, note_fd):
        self.code = code
        self.argv = argv
        self.note_fd = note_fd
        self.pid = os.getpid()
        self.path = None
        name = argv[0]
        main = types.ModuleType("__main__")
        main.__builtins__ = builtins
        if sys.version_info < (3, 14):
            main.__annotations__ = {}
        if name in ("", "-c", "-"):
            self.filename = "<stdin>" if name == "-" else "<string>"
            main.__loader__ = importlib.machinery.BuiltinImporter
            sys.path.insert(0, "")
        else:
            # A script: it exists, under its own name, in the working directory.
            directory = os.getcwd()
            self.filename = os.path.join(directory, os.path.basename(name) or "main.py")
            try:
                with open(self.filename, "xb") as file:
                    file.write(code)
            except OSError:
                # A file of that name was put there, or nothing can be written: the program runs all the same.
                pass
            main.__file__ = self.filename
            main.__cached__ = None
            main.__loader__ = importlib.machinery.SourceFileLoader("__main__", self.filename)
            sys.path.insert(0, directory)
        sys.argv = argv
        if hasattr(sys, "orig_argv"):
            sys.orig_argv = [sys.executable] + argv
        sys.modules["__main__"] = main
        self.main = main
        register_source(self.filename, code)

    def preparation_data(self, original, name):
        """multiprocessing's spawn and forkserver start a new interpreter, which has to find the functions of code that is in no file."""
        data = original(name)
        if sys.modules.get("__main__") is self.main and name != "ignore" and not (
            "init_main_from_path" in data or "init_main_from_name" in data
        ):
            if self.path is None:
                fd, path = tempfile.mkstemp(prefix="main-", suffix=".py")
                with os.fdopen(fd, "wb") as file:
                    file.write(self.code)
                self.path = path
            data["init_main_from_path"] = self.path
        return data

    def hook_multiprocessing(self):
        spawn = sys.modules.get("multiprocessing.spawn")
        context = sys.modules.get("multiprocessing.context")
        if spawn is None or context is None or hasattr(self.main, "__file__"):
            return
        original = spawn.get_preparation_data
        spawn.get_preparation_data = lambda name: self.preparation_data(original, name)
        # From 3.14 on forkserver is the default, and runs the main program's file again: code without a file, and without a
        # `__name__` guard, would stop working. The process has one thread, so fork is safe here.
        default = context._default_context
        if sys.version_info >= (3, 14) and default._actual_context is None:
            default._default_context = context._concrete_contexts["fork"]

    @staticmethod
    def hint(note_fd, error):
        hint = hints.of(error)
        if hint:
            try:
                send(note_fd, NOTE, NOTE_HINT + hint.encode())
            except OSError:
                # The program closed the descriptor.
                pass

    def attempt(self):
        """Runs the code. Returns the exit status so far and whether SIGINT ended it."""
        status, program, error = 0, None, None
        try:
            program = compile(self.code, self.filename, "exec", dont_inherit=True)
            exec(program, self.main.__dict__)
        except BaseException as caught:
            # Our own frame goes; for a syntax error there is no other.
            error = caught.with_traceback(caught.__traceback__.tb_next if caught.__traceback__ else None)
        # Outside the handler: an exception in the program's own hook must not have this one as its context.
        if error is not None:
            if isinstance(error, MemoryError) and os.getpid() == self.pid:
                try:
                    send(self.note_fd, NOTE, NOTE_OUT_OF_MEMORY)
                except OSError:
                    # The program closed the descriptor: it is then an ordinary exit 1.
                    pass
            status = report(error, program)
            if os.getpid() == self.pid and not isinstance(error, (SystemExit, KeyboardInterrupt)):
                self.hint(self.note_fd, error)
        return status, isinstance(error, KeyboardInterrupt)

    def run(self):
        """Runs the code to its end; never returns."""
        note_fd = self.note_fd
        note = os.fstat(note_fd)
        status, interrupted = self.attempt()
        status = finish(self.main, status)
        if interrupted:
            # As CPython: a program that SIGINT ended is seen to have been ended by SIGINT.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        elif os.getpid() == self.pid:
            # The agent throws the process away, in a VM with the machine: taking it down first costs more than it ran.
            try:
                # Not into a file that the program has put in its place.
                if os.path.samestat(os.fstat(note_fd), note):
                    send(note_fd, NOTE, NOTE_ENDED + bytes([status & 0xFF]))
                    if LINGER:
                        os.kill(os.getpid(), signal.SIGSTOP)
                    # The agent's signal comes long before.
                    time.sleep(1)
            except BaseException:
                # The program closed the descriptor, or its handler of a signal raised: it ends as any process.
                pass
        os._exit(status)
