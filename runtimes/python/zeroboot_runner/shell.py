"""A shell of our own, for an interpreter without IPython; and the event loop that both shells use."""

import __future__
import ast
import builtins
import sys
import traceback

from . import figures
from .report import register_source
from .results import add_representations, representations
from .wire import OURS

FUTURES = 0
for _name in __future__.all_feature_names:
    FUTURES |= getattr(__future__, _name).compiler_flag
CO_COROUTINE = 0x80


class Loop:
    """The event loop that top-level awaits of all cells share. Between cells it runs the tasks that they left."""

    def __init__(self):
        self.loop = None

    def run(self, coroutine):
        import asyncio

        if self.loop is None or self.loop.is_closed():
            self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        task = self.loop.create_task(coroutine)
        try:
            return self.loop.run_until_complete(task)
        except BaseException as error:
            # An interrupt of the waiting loop leaves the task where it is; it must not go on at the next await.
            if not task.done():
                error.awaited = waiting_frames(coroutine)
                task.cancel()
                self.loop.run_until_complete(asyncio.wait([task]))
                if not task.cancelled():
                    # Looked at, so that the loop does not complain.
                    task.exception()
            raise

    def wait(self, fd):
        """Runs what is left to run until `fd` can be read."""
        if self.loop is None or self.loop.is_closed() or self.loop.is_running():
            return
        self.loop.add_reader(fd, self.loop.stop)
        try:
            self.loop.run_forever()
        except BaseException:
            # `sys.exit()` in a task: no cell hears of it.
            traceback.print_exc()
        finally:
            self.loop.remove_reader(fd)


def waiting_frames(awaitable):
    """(frame, line) of each coroutine on the way to where an await stands."""
    frames = []
    while awaitable is not None:
        frame = getattr(awaitable, "cr_frame", None) or getattr(awaitable, "gi_frame", None)
        if frame is None:
            break
        frames.append((frame, frame.f_lineno))
        awaitable = getattr(awaitable, "cr_await", None) or getattr(awaitable, "gi_yieldfrom", None)
    return traceback.StackSummary.extract(frames)


def hide_frames(shown, hidden, seen):
    """Takes the frames out of a TracebackException whose file names begin with one of `hidden`."""
    if shown is None or id(shown) in seen:
        return
    seen.add(id(shown))
    if shown.stack is not None:
        shown.stack[:] = [frame for frame in shown.stack if not frame.filename.startswith(hidden)]
    for other in (shown.__cause__, shown.__context__, *(getattr(shown, "exceptions", None) or ())):
        hide_frames(other, hidden, seen)


def format_error(error, hidden=(OURS,)):
    """Its traceback, as the interpreter would print it."""
    shown = traceback.TracebackException(type(error), error, error.__traceback__)
    awaited = getattr(error, "awaited", None)
    if awaited is not None:
        shown.stack[:] = awaited
    hide_frames(shown, hidden, set())
    return "".join(shown.format())


class Shell:
    def __init__(self):
        self.names, self.channel, self.loop = {}, None, Loop()
        self.flags = 0

    def engage(self, main, channel):
        self.names, self.channel = main.__dict__, channel
        builtins.display = self.display
        figures.Finder(self.display).install()

    def run(self, source, count):
        """Runs a cell. Returns the error that ended it and its traceback as text, or None twice."""
        try:
            self.attempt(source, "<cell %d>" % count)
            figures.show_all(self.display)
            return None, None
        except BaseException as error:
            # Ours and the event loop's.
            tb = error.__traceback__
            while tb is not None and not tb.tb_frame.f_code.co_filename.startswith("<cell "):
                tb = tb.tb_next
            caught = error.with_traceback(tb or error.__traceback__)
        sys.last_type, sys.last_value, sys.last_traceback = type(caught), caught, caught.__traceback__
        if sys.version_info >= (3, 12):
            sys.last_exc = caught
        return caught, hint(caught, source) + format_error(caught)

    def attempt(self, source, filename):
        register_source(filename, source)
        flags = self.flags | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        tree = compile(source, filename, "exec", flags | ast.PyCF_ONLY_AST, dont_inherit=True)
        last = None
        if tree.body and isinstance(tree.body[-1], ast.Expr) and not silenced(source, tree.body[-1]):
            last = ast.Expression(tree.body.pop().value)
        codes = [compile(tree, filename, "exec", flags, dont_inherit=True)] if tree.body else []
        # A `from __future__ import` holds for what follows.
        for code in codes:
            self.flags |= code.co_flags & FUTURES
        if last is not None:
            codes.append(compile(last, filename, "eval", flags | self.flags, dont_inherit=True))
        # Without an await it runs outside of the loop, so that `asyncio.run()` works.
        if any(code.co_flags & CO_COROUTINE for code in codes):
            value = self.loop.run(self.in_loop(codes))
        else:
            value = None
            for code in codes:
                value = eval(code, self.names)
        if last is not None and value is not None:
            bundle = representations(value)
            builtins._ = value
            self.show(bundle, True)

    async def in_loop(self, codes):
        value = None
        for code in codes:
            value = eval(code, self.names)
            if code.co_flags & CO_COROUTINE:
                value = await value
        return value

    def show(self, bundle, value):
        if not self.channel.result(bundle, value) and sys.stdout is not None:
            # Between cells, or in a process that the program forked.
            sys.stdout.write(bundle.get("text/plain", b"").decode() + "\n")

    def display(self, *objects, raw=False, **_):
        """Shows objects in every representation that they have. `raw`: they are dicts of MIME type to data."""
        for obj in objects:
            bundle = {}
            if raw:
                add_representations(bundle, obj)
            else:
                bundle = representations(obj)
            self.show(bundle, False)


def silenced(source, expression):
    """Whether a semicolon follows the last expression."""
    lines = source.splitlines()
    line = lines[expression.end_lineno - 1] if expression.end_lineno <= len(lines) else b""
    return line[expression.end_col_offset :].lstrip().startswith(b";")


def hint(error, source):
    if type(error) is SyntaxError and source.lstrip()[:1] in (b"!", b"%"):
        return "Lines that begin with ! or % need IPython, which this template does not have.\n"
    return ""
