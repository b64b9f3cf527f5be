"""From the start of the runner to the program or the context that it becomes."""

import fcntl
import gc
import json
import os
import sys

from . import streams
from .context import Context, set_environment, shell_maker, warm_cells
from .hooks import Hooks
from .identity import Generators, apply_identity
from .installed import HomePackages
from .program import Program
from .rehearsal import rehearse
from .streams import ctypes
from .warm import UNFIT, plug_c_holes, plug_holes, shares_memory, threads, warm
from .wire import (
    ARG,
    CODE,
    CONTROL_IN,
    CONTROL_OUT,
    CWD,
    ENV,
    IDENTITY,
    READY,
    RUN,
    SERVE,
    STARTED,
    Reader,
    RunnerError,
    fail,
    frames,
    send,
)

PLUGS = []
# Ends of the names of scripts for the shell. `-bash` is code for it that is in no file.
SHELL_ENDS = (".sh", ".bash")


def serve(ready, generators, make_shell):
    """Waits for what to be, a program or a context, and becomes it; never returns."""
    try:
        send(CONTROL_OUT, READY, ready)
        work = read_request(CONTROL_IN, CONTROL_OUT, generators, make_shell)
    except RunnerError as error:
        fail(error)
    except BaseException as error:
        fail("%s: %s" % (type(error).__name__, error))
    work.run()


def read_request(control_in, control_out, generators, make_shell):
    # Out of the way of what runs here, and not inherited by what that executes.
    private, heard = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for fd in (control_out, control_in)]
    reader = Reader(heard)
    argv, code, environment, identified, directory, serves = [], [], [], False, None, False
    for kind, payload in frames(reader):
        if kind == IDENTITY:
            apply_identity(payload, generators)
            identified = True
        elif kind == CODE:
            code.append(payload)
        elif kind == ARG:
            argv.append(os.fsdecode(payload))
        elif kind == ENV:
            environment.append(payload)
        elif kind == CWD:
            directory = payload
        elif kind in (RUN, SERVE):
            serves = kind == SERVE
            break
        else:
            raise RunnerError("unexpected frame kind %#04x" % kind)
    else:
        # The agent went away without a request: an unused fork.
        os._exit(0)
    if not identified:
        raise RunnerError("a run without an identity")
    for payload in environment:
        set_environment(payload)
    if directory is not None:
        try:
            os.chdir(directory)
        except OSError as error:
            raise RunnerError("cannot enter the working directory %r: %s" % (os.fsdecode(directory), error.strerror)) from None
    if serves:
        work = Context(reader, private, generators, make_shell)
    elif argv and (argv[0] == "-bash" or argv[0].lower().endswith(SHELL_ENDS)):
        # Here: a program in Python does not pay for it.
        from .bash import Shell

        work = Shell(b"".join(code), argv)
    else:
        # Code and argv are the program's; everything else of this function goes.
        work = Program(b"".join(code), argv or ["-c"], private)
        work.hook_multiprocessing()
        os.close(heard)
    os.close(control_in)
    os.close(control_out)
    send(private, STARTED)
    return work


def fork_server(path, fd, hooks):
    """Hands the process to the cdylib, which forks it on demand; returns in each child."""
    if ctypes is None:
        raise RunnerError("this interpreter has no ctypes module, which the fork server needs")
    count = threads()
    if count != 1:
        raise RunnerError(
            "the warmed interpreter has %d threads and cannot be forked safely; do not warm the module that starts them" % count
        )
    if shares_memory():
        raise RunnerError("a warmed module shares memory with all forks; do not warm the module that maps it")
    library = ctypes.PyDLL(path)
    library.zb_serve.argtypes = [ctypes.c_int]
    library.zb_serve.restype = ctypes.c_int
    ctypes.pythonapi.PyOS_BeforeFork.restype = None
    ctypes.pythonapi.PyOS_AfterFork_Child.restype = None
    # Resolved before the fork, so that a child does not look symbols up.
    before, after = ctypes.pythonapi.PyOS_BeforeFork, ctypes.pythonapi.PyOS_AfterFork_Child
    serve_forks = library.zb_serve
    status = hooks.around(lambda: serve_forks(fd), before, after)
    if status != 0:
        raise RunnerError("the fork server returned %d" % status)


def parse(arguments):
    options = {"--warm": "", "--dropped": "", "--fork-server": None, "--fork-fd": None, "--context": False}
    rest = list(arguments)
    while rest:
        name = rest.pop(0)
        if name == "--frozen":
            continue  # said to every runner whose memory gets snapshotted; Python's identity needs no other treatment
        if name == "--context":
            options[name] = True
            continue
        if name not in options or not rest:
            raise RunnerError("unknown or incomplete argument %r" % name)
        options[name] = rest.pop(0)
    if (options["--fork-server"] is None) != (options["--fork-fd"] is None):
        raise RunnerError("--fork-server and --fork-fd go together")
    return options


def prepare(arguments):
    """Everything up to the ready point: the options, what `Ready` says, the generators, and what makes a shell for cells."""
    options = parse(arguments)
    # Ours while we start; what runs here gets its own first entry.
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if sys.path and os.path.abspath(sys.path[0] or ".") == here:
        del sys.path[0]
        sys.path_importer_cache.pop(here, None)
    streams.find_fflush()
    sys.meta_path.append(HomePackages)
    ready = {"version": "Python " + sys.version.split()[0], "warmed": []}
    if options["--context"]:
        streams.open_stdio()
        # Started cold for one context: nobody copies it, so there is nothing to warm and nothing that a copy froze.
        return options, json.dumps(ready).encode(), Generators(walk=False), shell_maker(), None
    ready["warmed"], skipped = warm(options["--warm"], forks=options["--fork-server"] is not None)
    skipped += ["%s: %s" % (name, UNFIT) for name in options["--dropped"].split(",") if name]
    if skipped:
        ready["skipped"] = skipped
    warm_cells()
    make_shell = shell_maker()
    gc.collect()
    generators = Generators()
    hooks = Hooks()
    ready = json.dumps(ready).encode()
    # After the walk: the collector does not list frozen objects. Forks then share these pages for good.
    gc.freeze()
    rehearse(read_request, generators, make_shell)
    gc.collect()
    plug_c_holes()
    PLUGS.append(plug_holes())
    gc.freeze()
    return options, ready, generators, make_shell, hooks


def main():
    try:
        options, ready, generators, make_shell, hooks = prepare(sys.argv[1:])
        if options["--fork-server"] is not None:
            fork_server(options["--fork-server"], int(options["--fork-fd"]), hooks)
    except RunnerError as error:
        fail(error)
    except BaseException as error:
        fail("%s: %s" % (type(error).__name__, error))
    serve(ready, generators, make_shell)
