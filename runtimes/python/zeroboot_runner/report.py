"""Uncaught exceptions, as CPython reports them."""

import linecache
import sys
import traceback
import types


def register_source(filename, code):
    text = code.decode("utf-8", "replace")
    # No modification time: linecache.checkcache leaves such an entry alone.
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)


def print_exception(error, program=None):
    """What CPython prints for an uncaught exception, with source lines for code that is in no file."""
    shown = traceback.TracebackException(type(error), error, error.__traceback__)
    if program is not None:
        try:
            hide_foreign_lines(error, shown, program, set())
        except Exception:
            # A line too many is better than no traceback.
            pass
    for line in shown.format():
        sys.stderr.write(line)


def code_objects(code):
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_objects(constant)


def hide_foreign_lines(error, shown, program, seen):
    """`eval` and `exec` of the program's own use the file name `<string>` too; the lines of the program are not theirs."""
    if error is None or shown is None or id(error) in seen:
        return
    seen.add(id(error))
    ours = None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for i, frame in enumerate(frames[: len(shown.stack)]):
        code = frame.f_code
        if code.co_filename == program.co_filename:
            ours = ours or {id(c) for c in code_objects(program)}
            if id(code) not in ours:
                old = shown.stack[i]
                shown.stack[i] = traceback.FrameSummary(old.filename, old.lineno, old.name, lookup_line=False, line="")
    hide_foreign_lines(error.__cause__, shown.__cause__, program, seen)
    hide_foreign_lines(error.__context__, shown.__context__, program, seen)


def report(error, program=None):
    """Handles an exception that reached the top: the exit status."""
    if isinstance(error, SystemExit):
        code = error.code
        if code is None:
            return 0
        if isinstance(code, int):
            return code & 0xFF if -(2**63) <= code < 2**63 else 255
        try:
            if sys.stderr is not None:
                sys.stdout is None or sys.stdout.flush()
                sys.stderr.write(str(code) + "\n")
        except Exception:
            # As CPython: a message that cannot be written is lost, the status is not.
            pass
        return 1
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
    if sys.version_info >= (3, 12):
        sys.last_exc = error
    hook = getattr(sys, "excepthook", None)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except Exception:
        pass
    try:
        if hook is None or hook is sys.__excepthook__:
            if sys.stderr is not None:
                print_exception(error, program)
        else:
            hook(type(error), error, error.__traceback__)
    except SystemExit as again:
        return report(again, program)
    except BaseException as again:
        try:
            sys.stderr.write("Error in sys.excepthook:\n")
            again.__traceback__ = again.__traceback__.tb_next if again.__traceback__ else None
            print_exception(again, program)
            sys.stderr.write("\nOriginal exception was:\n")
            print_exception(error, program)
        except Exception:
            # stderr is gone or memory is: the status still tells.
            pass
    return 1


def unraisable(where):
    """Reports the current exception as CPython does for one that nobody can catch."""
    kind, value, tb = sys.exc_info()
    try:
        if sys.stderr is not None:
            sys.stderr.write("Exception ignored in: %s\n" % where)
            traceback.print_exception(kind, value, tb.tb_next if tb else None)
    except Exception:
        # stderr itself is what broke.
        pass
