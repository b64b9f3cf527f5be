"""IPython's shell, where the template has it. Nothing of it stays visible in a program that is not a context."""

import atexit
import builtins
import fnmatch
import importlib.util
import os
import signal
import subprocess
import sys
import traceback
import types
import warnings

from IPython.core import interactiveshell
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.profiledir import ProfileDir
from traitlets import Type, observe
from traitlets.config import Config

from .charts import extras
from .results import add_representations
from .shell import Loop, format_error
from .wire import OURS

IPYTHON = os.path.dirname(sys.modules["IPython"].__file__) + os.sep
INLINE = "matplotlib_inline.backend_inline"
# How long the processes of a `!` line have after an interrupt.
GRACE_SECONDS = 1


class Memory(dict):
    """In place of pickleshare's database on disk."""

    def __init__(self, path=None):
        super().__init__()

    def keys(self, pattern="*"):
        return fnmatch.filter(super().keys(), pattern)


# Up to IPython 9.15 the shell makes one when it starts.
if hasattr(interactiveshell, "PickleShareDB"):
    interactiveshell.PickleShareDB = Memory


class Hook(DisplayHook):
    """Values of last expressions."""

    def write_output_prompt(self):
        pass

    def write_format_data(self, format_dict, md_dict=None):
        self.shell.show(format_dict, True)

    def finish_displayhook(self):
        self._is_active = False


class Publisher(DisplayPublisher):
    """What `display()` shows."""

    def publish(self, data, metadata=None, *arguments, **options):
        self.shell.show(data, False)

    def clear_output(self, wait=False):
        """Output that has left cannot be taken back."""


class Interactive(InteractiveShell):
    displayhook_class = Type(Hook)
    display_pub_class = Type(Publisher)
    channel = None
    said = None

    # No directory in the user's home, nobody else's environment, no completions.

    def init_ipython_dir(self, ipython_dir):
        self.ipython_dir = os.path.join(os.path.expanduser("~"), ".ipython")

    @observe("ipython_dir")
    def _ipython_dir_changed(self, change):
        """IPython's own would make it."""

    def init_profile_dir(self, profile_dir):
        # One without a place.
        self.profile_dir = ProfileDir()

    @property
    def db(self):
        """What `%store` and aliases keep: as long as the context."""
        return self.__dict__.setdefault("memory", Memory())

    @db.setter
    def db(self, value):
        pass

    def init_virtualenv(self):
        pass

    def init_completer(self):
        self.Completer = None

    def show(self, data, value):
        bundle = {}
        add_representations(bundle, data)
        if not self.channel.result(bundle, value) and sys.stdout is not None:
            # Between cells, or in a process that the program forked.
            sys.stdout.write(bundle.get("text/plain", b"").decode() + "\n")

    def enable_gui(self, gui=None):
        if gui not in (None, "inline"):
            raise UsageError("no screen is here for %r: use %%matplotlib inline" % gui)

    def ask_exit(self):
        raise SystemExit

    def show_usage_error(self, exc):
        self.said = "UsageError: %s\n" % exc

    def _showtraceback(self, etype, evalue, stb):
        self.said = self.InteractiveTB.stb2text(stb)

    def showtraceback(self, exc_tuple=None, filename=None, tb_offset=None, exception_only=False, running_compiled_code=False):
        kind, value, tb = self._get_exc_info(exc_tuple)
        if isinstance(value, (SyntaxError, UsageError)):
            super().showtraceback((kind, value, tb), filename, tb_offset, exception_only, running_compiled_code)
            return
        frames = []
        while tb is not None:
            # IPython's and ours below the cell, and ours wherever they are: an interrupt is raised in one.
            name = tb.tb_frame.f_code.co_filename
            if not name.startswith(OURS) and (frames or not name.startswith(IPYTHON)):
                frames.append(tb)
            tb = tb.tb_next
        if not frames or hasattr(value, "awaited") or holds_group(value):
            self.said = format_error(value, (OURS, IPYTHON))
            return
        for entry in reversed(frames):
            tb = types.TracebackType(tb, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
        # Its own frame is gone already. The later arguments are for what was handled above.
        super().showtraceback((kind, value, tb), filename, 0)

    def system(self, cmd):
        """`!cmd`, `%pip`: straight into our own output, and an interrupt ends all of its processes."""
        cmd = self.var_expand(cmd, depth=1)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        child = subprocess.Popen(cmd, shell=True, executable=os.environ.get("SHELL") or "/bin/sh", start_new_session=True)
        try:
            status = child.wait()
        except BaseException as error:
            for number, seconds in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, None)):
                try:
                    os.killpg(child.pid, number)
                except ProcessLookupError:
                    pass
                try:
                    child.wait(seconds)
                except subprocess.TimeoutExpired:
                    pass
            # The frames of `wait` say nothing.
            raise error.with_traceback(None) from None
        self.user_ns["_exit_code"] = status
        if getattr(self, "system_raise_on_error", False) and status != 0:
            raise subprocess.CalledProcessError(status, cmd)


def holds_group(error):
    group = getattr(builtins, "BaseExceptionGroup", None)
    while group is not None and error is not None:
        if isinstance(error, group):
            return True
        error = error.__context__
    return False


class IPythonShell:
    """Made before a fork where IPython is warm, else at the first cell."""

    def __init__(self):
        config = Config()
        # A database in the user's home, and a thread that writes to it.
        config.HistoryManager.enabled = False
        config.HistoryManager.hist_file = ":memory:"
        config.InteractiveShell.colors = "NoColor"
        # `name?` is shown, not paged.
        config.InteractiveShell.display_page = True
        self.loop = Loop()
        self.main = types.ModuleType("__main__")
        saved = sys.modules.get("__main__"), getattr(sys, "ps1", None), getattr(sys, "ps2", None)
        names = ("display", "__IPYTHON__")
        before = {name: getattr(builtins, name) for name in names if hasattr(builtins, name)}
        self.shell = Interactive.instance(config=config, user_module=self.main, user_ns=self.main.__dict__)
        self.shell.loop_runner = self.loop.run
        bundles = self.shell.display_formatter.mimebundle_formatter
        # pandas says another module of its class since version 3.
        for module, name in (("matplotlib.figure", "Figure"), ("pandas", "DataFrame"), ("pandas.core.frame", "DataFrame")):
            bundles.for_type_by_name(module, name, lambda obj, include=None, exclude=None: extras(obj))
        self.practise()
        # A program must not take itself for a notebook.
        self.ours = {name: getattr(builtins, name) for name in names if hasattr(builtins, name)}
        for name in self.ours:
            if name in before:
                setattr(builtins, name, before[name])
            else:
                delattr(builtins, name)
        self.prompts = {}
        for name, value in zip(("ps1", "ps2"), saved[1:]):
            if hasattr(sys, name):
                self.prompts[name] = getattr(sys, name)
                delattr(sys, name) if value is None else setattr(sys, name, value)
        sys.modules["__main__"] = saved[0]
        Interactive.clear_instance()
        atexit.unregister(self.shell.atexit_operations)

    def practise(self):
        """First uses, as in warm.py."""
        self.shell.channel = Nobody()
        for code in ("x = 1\nx + 1", "1/0", "display(1)", "del x"):
            self.shell.run_cell(code, store_history=True)
        self.shell.reset(new_session=True)
        self.shell.said = None
        for name in ("last_type", "last_value", "last_traceback", "last_exc"):
            if hasattr(sys, name):
                delattr(sys, name)

    def engage(self, main, channel):
        """Now it is a notebook."""
        shell = self.shell
        shell.channel = channel
        # The names that the context's module has and IPython's has not.
        for name, value in main.__dict__.items():
            if name.startswith("__"):
                self.main.__dict__[name] = value
        sys.modules["__main__"] = self.main
        for name, value in self.ours.items():
            setattr(builtins, name, value)
        for name, value in self.prompts.items():
            setattr(sys, name, value)
        for kind in Interactive._walk_mro():
            kind._instance = shell
        shell.starting_dir = os.getcwd()
        shell.ipython_dir = os.path.join(os.path.expanduser("~"), ".ipython")
        # Said for sys.exit(), which is an error here.
        warnings.filterwarnings("ignore", message="To exit: use")
        if "MPLBACKEND" not in os.environ and importlib.util.find_spec("matplotlib_inline") is not None:
            os.environ["MPLBACKEND"] = "module://" + INLINE
            if "matplotlib" in sys.modules:
                # It has read the environment already.
                shell.run_line_magic("matplotlib", "inline")

    def run(self, source, count):
        shell = self.shell
        shell.said = None
        shell.execution_count = count
        result = shell.run_cell(source.decode("utf-8", "replace"), store_history=True)
        error = result.error_before_exec or result.error_in_exec
        if error is None:
            return None, None
        return error, shell.said if shell.said is not None else format_error(error, (OURS, IPYTHON))


class Nobody:
    """Takes what the practice shows."""

    def result(self, bundle, value):
        return True
