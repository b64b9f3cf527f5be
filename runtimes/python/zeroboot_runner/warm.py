"""What is paid for once, before a snapshot or a fork."""

import importlib
import io
import linecache
import os
import sys
import time

from .report import print_exception, register_source
from .streams import ctypes
from .wire import RunnerError

# What most programs import, paid for once. Names only: user code still has to import them.
STDLIB_WARM = (
    "asyncio base64 collections concurrent.futures contextlib copy csv dataclasses datetime decimal enum fractions "
    "functools glob heapq inspect itertools logging math multiprocessing multiprocessing.spawn operator pathlib pickle "
    "platform queue re shutil socket ssl statistics string subprocess tempfile textwrap typing urllib.parse uuid zlib"
).split()

# A warm runtime that is going to be forked may have one thread only, so numeric libraries must not start theirs.
ONE_THREAD = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "BLIS_NUM_THREADS": "1",
    "POLARS_MAX_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "GOMAXPROCS": "1",
    # The allocator inside pyarrow.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
# How long the threads of an import may take to end.
THREADS_END = 0.2
UNFIT = "it starts threads, and a process with threads cannot be forked"


def threads():
    """How many this process has, once those that end at once have ended."""
    until = time.monotonic() + THREADS_END
    while True:
        count = len(os.listdir("/proc/self/task"))
        if count == 1 or time.monotonic() > until:
            return count
        time.sleep(0.005)


def shares_memory():
    """Whether forks would write to the same memory: one tenant's would be another's."""
    with open("/proc/self/maps") as maps:
        return any(line.split(None, 2)[1][1::2] == "ws" for line in maps)


def start_without(name):
    """Starts the interpreter anew and warms all but this module: threads cannot be taken back."""
    command = list(getattr(sys, "orig_argv", None) or ["python3", "-E", "-s", "-X", "utf8"] + sys.argv)
    at = command.index("--warm") + 1
    command[at] = ",".join(item for item in command[at].split(",") if item.strip().rstrip("?") != name)
    if "--dropped" in command:
        command[command.index("--dropped") + 1] += "," + name
    else:
        command += ["--dropped", name]
    os.execv(sys.executable, command)


def warm(spec, forks=False):
    """Imports what the template names. `forks`: this process is going to be forked, so no module may start threads.

    Returns ("name version" list, skipped list).
    """
    for name in STDLIB_WARM:
        try:
            importlib.import_module(name)
        except ImportError:
            # A trimmed interpreter (no ssl, say): the program gets the same ImportError that it would get anyway.
            pass
    ours = [name for name in ONE_THREAD if name not in os.environ]
    for name in ours:
        os.environ[name] = ONE_THREAD[name]
    warmed, skipped = [], []
    try:
        for item in spec.split(","):
            name = item.strip()
            optional = name.endswith("?")
            name = name.rstrip("?")
            if not name:
                continue
            try:
                module = importlib.import_module(name)
            except BaseException as error:
                reason = "%s: %s" % (type(error).__name__, error)
                if not optional:
                    raise RunnerError("cannot warm module %r: %s" % (name, reason)) from None
                if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
                    # Not installed, which is what the question mark is for.
                    continue
                skipped.append("%s: %s" % (name, " ".join(reason.split())[:200]))
                # It may have come far enough.
                if forks and threads() > 1:
                    start_without(name)
                continue
            if forks and threads() > 1:
                if not optional:
                    raise RunnerError("cannot warm module %r: %s" % (name, UNFIT))
                for set_by_us in ours:
                    os.environ.pop(set_by_us, None)
                start_without(name)
            version = getattr(module, "__version__", None)
            warmed.append("%s %s" % (name, version) if isinstance(version, str) else name)
        first_uses()
    finally:
        for name in ours:
            os.environ.pop(name, None)
    return warmed, skipped


def first_uses():
    """Runs a program in the way that a real one will be run, so that first-use costs are paid before the snapshot."""
    saved = sys.stdout, sys.stderr, sys.stdin
    sys.stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", line_buffering=True)
    sys.stderr = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", line_buffering=True)
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"1\n"), encoding="utf-8")
    try:
        code = b"import sys\ndef f(a, *b, c=1):\n    return [x for x in (a, c)]\nprint(1, 'x', 1.5, f(1), f'{2:>3}')\ninput()\n1/0\n"
        program = compile(code, "<string>", "exec", dont_inherit=True)
        register_source("<string>", code)
        try:
            exec(program, {"__name__": "__main__"})
        except ZeroDivisionError as error:
            print_exception(error)
        try:
            compile(b"x ==", "<string>", "exec", dont_inherit=True)
        except SyntaxError as error:
            print_exception(error)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            a = numpy.arange(6.0).reshape(2, 3)
            repr(a @ numpy.ones(3)), str(a.sum(axis=0)), (a * 2 + 1).mean()
            numpy.random.rand(2), numpy.random.default_rng().random(2)
            try:
                numpy.linalg.inv(numpy.eye(2))
            except Exception:
                # Only a warm-up; a numpy without a working LAPACK is the program's business.
                pass
        pandas = sys.modules.get("pandas")
        if pandas is not None:
            frame = pandas.DataFrame({"a": [1, 2], "b": [0.5, 1.5]})
            repr(frame), frame.groupby("a").sum(), frame.describe()
        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is not None:
            # The backend, the fonts, and what draws text.
            try:
                figure, axes = pyplot.subplots()
                axes.plot([1, 2], label="a")
                axes.set_title("a")
                axes.legend()
                figure.savefig(io.BytesIO(), format="png")
            except Exception:
                # Only a warm-up, as above.
                pass
            finally:
                pyplot.close("all")
    finally:
        sys.stdout, sys.stderr, sys.stdin = saved
        linecache.clearcache()


def plug_holes():
    """Fills the holes that warming left in CPython's small-object pools, for good.

    A fork's objects would go into them, one here and one there, and each copies a page. Once they are full, new objects
    lie side by side in fresh pools. Returns what fills them: to be kept alive.
    """
    pool = 16384 if sys.version_info >= (3, 10) else 4096
    plugs = []
    for size in range(16, 513, 16):
        # What an object of this size class is made of; a number has 28 bytes, an object 16, and bytes 33 and their length.
        make = object if size == 16 else (lambda: int("1000")) if size == 32 else (lambda size=size: bytes(size - 33))
        following = run = 0
        # The bound is for an allocator that has no pools.
        for _ in range((2 << 20) // size):
            plug = make()
            plugs.append(plug)
            at = id(plug)
            # A pool is taken only when all others of its class are full; its first block comes after a header of 48 bytes.
            run = 1 if at % pool == 48 else run + 1 if run and at == following else 0
            following = at + size
            if run == 3:
                break
    return plugs


def plug_c_holes():
    """The same for the C library's heap, where it is glibc's: what is free of it is taken, down to what lies in one piece at its end.

    Otherwise one allocation in a fork writes to hundreds of pages: it sorts all that was ever freed.
    """
    library = ctypes and ctypes.CDLL(None)
    trim = getattr(library, "malloc_trim", None)
    if trim is None:
        return
    # Joins what is free and small.
    trim(0)
    malloc = library.malloc
    malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    # Seven of each size up to 1 KiB are kept ready for one thread (mallopt(3), tcache_count).
    for size in range(24, 1033, 16):
        for _ in range(7):
            malloc(size)
    for bits in range(16, 4, -1):
        following = run = 0
        # The bound is for an allocator that leaves gaps.
        for _ in range((64 << 20) >> bits):
            # With its header of 8 bytes.
            at = malloc((1 << bits) - 8)
            run = run + 1 if at == following else 0
            following = (at or 0) + (1 << bits)
            if run == 3:
                break
