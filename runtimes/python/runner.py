"""The Python runner: warms an interpreter, waits for one request on descriptor 3, becomes the user's program.

    python -E -s -X utf8 runner.py [--warm numpy,pandas?,...] [--fork-server CDYLIB --fork-fd N] [--frozen]

Standard library only, Python 3.9 to 3.14. Descriptor 3 carries zeroboot-proto frames; 0, 1 and 2 are the program's.
A module in `--warm` that ends in `?` is skipped when it cannot be imported. See README.md for the whole contract.
"""

import __future__
import atexit
import builtins
import gc
import hashlib
import importlib
import importlib.machinery
import io
import json
import linecache
import os
import random
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import types
import uuid

try:
    import ctypes
except ImportError:  # an interpreter built without libffi: no fork server, no flush of C stdio
    ctypes = None

# Frame kinds of crates/zeroboot-proto/src/frame.rs.
CODE, ARG, ENV, IDENTITY, RUN, CWD, SERVE, CELL = 0x01, 0x02, 0x03, 0x09, 0x0A, 0x0B, 0x0C, 0x0D
READY, STARTED, FAILURE, NOTE, RESULT, ERROR, DONE = 0x81, 0x82, 0x87, 0x88, 0x8A, 0x8B, 0x8C
NOTE_OUT_OF_MEMORY = b"\x01"
NOTE_ENDED = b"\x02"
# Set by the agent of a VM.
LINGER = os.environ.pop("ZEROBOOT_LINGER", None) == "1"
HEADER = struct.Struct("<IB3x")
MAX_PAYLOAD = 64 * 1024 - 8
IDENTITY_LEN = 64 + 8 + 16

CONTROL_FD = 3
# EX_SOFTWARE: the status of a runner that could not do its work. The agent reads the Failure frame, not this.
STATUS_FAILURE = 70

# What most programs import, paid for once. Names only: user code still has to import them.
STDLIB_WARM = (
    "asyncio base64 collections concurrent.futures contextlib copy csv dataclasses datetime decimal enum fractions "
    "functools glob heapq inspect itertools logging math multiprocessing multiprocessing.spawn operator pathlib pickle "
    "platform queue re shutil socket ssl statistics string subprocess textwrap typing urllib.parse zlib"
).split()

# A warm runtime that is going to be forked may have one thread only, so numeric libraries must not start theirs.
ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "BLIS_NUM_THREADS")


class RunnerError(Exception):
    """The runner cannot do its work; the text goes into a Failure frame."""


# ---- control descriptor


def send(fd, kind, payload=b""):
    data = memoryview(HEADER.pack(len(payload), kind) + payload)
    while data:
        data = data[os.write(fd, data) :]


def fail(text, fd=CONTROL_FD):
    """Tells the agent why no user code will run, and ends."""
    line = " ".join(str(text).split())
    try:
        send(fd, FAILURE, line.encode("utf-8", "replace")[:MAX_PAYLOAD])
    except OSError:
        # Nobody listens; the agent keeps what is on stderr.
        pass
    try:
        os.write(2, ("zeroboot runner: " + line + "\n").encode("utf-8", "replace"))
    except OSError:
        pass
    os._exit(STATUS_FAILURE)


def frames(control):
    """Yields (kind, payload) until the other side closes."""
    while True:
        header = control.read(HEADER.size)
        if not header:
            return
        if len(header) < HEADER.size:
            raise RunnerError("the control channel ended inside a frame")
        length, kind = HEADER.unpack(header)
        if length > MAX_PAYLOAD:
            raise RunnerError("a control frame of %d bytes is above the limit" % length)
        payload = control.read(length) if length else b""
        if len(payload) < length:
            raise RunnerError("the control channel ended inside a frame")
        yield kind, payload


# ---- warming


def warm(spec):
    """Imports what the template names. Returns ("name version" list, skipped list)."""
    for name in STDLIB_WARM:
        try:
            importlib.import_module(name)
        except ImportError:
            # A trimmed interpreter (no ssl, say): the program gets the same ImportError that it would get anyway.
            pass
    ours = [name for name in ONE_THREAD if name not in os.environ]
    for name in ours:
        os.environ[name] = "1"
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
                skipped.append("%s: %s" % (name, " ".join(reason.split())[:200]))
                continue
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
    finally:
        sys.stdout, sys.stderr, sys.stdin = saved
        linecache.clearcache()


# ---- identity: whatever a fork or a snapshot froze


class Seeds:
    """Endless independent seeds from one fork's entropy."""

    def __init__(self, entropy):
        # Both the host's bytes and the kernel's: two forks differ if either does.
        self.key = hashlib.sha512(b"zeroboot identity" + entropy + os.urandom(32)).digest()
        self.count = 0

    def take(self):
        self.count += 1
        return hashlib.sha512(self.key + self.count.to_bytes(8, "little")).digest()

    def number(self, bits=512):
        return int.from_bytes(self.take(), "little") >> (512 - bits)


class Generators:
    """Every random generator object that was alive at the snapshot. Found before it, because a walk costs milliseconds."""

    def __init__(self, known=None):
        self.python, self.numpy_bits, self.numpy_states = [], [], []
        core = random.Random.__mro__[1]  # _random.Random, which the garbage collector does not track
        numpy_random = sys.modules.get("numpy.random")
        bit_type = getattr(numpy_random, "BitGenerator", None)
        state_type = getattr(numpy_random, "RandomState", None)
        wanted = tuple(t for t in (core, bit_type, state_type) if t is not None)
        interesting = {}

        def consider(obj):
            kind = type(obj)
            hit = interesting.get(kind)
            if hit is None:
                hit = interesting[kind] = isinstance(kind, type) and issubclass(kind, wanted)
            return hit

        # What an earlier walk found is frozen by now: the collector does not list it.
        seen = {id(obj): obj for obj in known.all()} if known else {}
        tracked = gc.get_objects()
        for obj in tracked:
            if consider(obj):
                seen[id(obj)] = obj
        # What the collector does not track is still referred to by something that it does.
        for start in range(0, len(tracked), 4096):
            for obj in gc.get_referents(*tracked[start : start + 4096]):
                if consider(obj):
                    seen[id(obj)] = obj
        del tracked
        for obj in list(seen.values()):
            if state_type is not None and isinstance(obj, state_type):
                self.numpy_states.append(obj)
                bits = obj._bit_generator
                seen.setdefault(id(bits), bits)
        for obj in seen.values():
            if bit_type is not None and isinstance(obj, bit_type):
                self.numpy_bits.append(obj)
            elif isinstance(obj, core) and not isinstance(obj, random.SystemRandom):
                self.python.append(obj)
        # The walk found the ones that must exist, or it cannot be trusted to have found the others.
        if not any(obj is random._inst for obj in self.python):
            raise RunnerError("the walk for random generators missed the one of module random")
        mtrand = sys.modules.get("numpy.random.mtrand")
        if mtrand is not None and not any(obj is mtrand._rand for obj in self.numpy_states):
            raise RunnerError("the walk for random generators missed numpy's global one")

    def all(self):
        return self.python + self.numpy_bits + self.numpy_states

    def reseed(self, seeds):
        for obj in self.python:
            # Unbound: a subclass may have made seed() do something else.
            kind = random.Random if isinstance(obj, random.Random) else random.Random.__mro__[1]
            kind.seed(obj, seeds.number())
        if not self.numpy_bits and not self.numpy_states:
            return
        numpy = sys.modules["numpy"]
        mersenne = getattr(numpy.random, "MT19937", None)

        def mersenne_key():
            return numpy.frombuffer(hashlib.shake_256(seeds.take()).digest(4 * 624), dtype=numpy.uint32).copy()

        for obj in self.numpy_bits:
            seed = numpy.random.SeedSequence(seeds.number())
            if type(obj) is mersenne:
                # The one that is always there. Its own seeding takes five times as long.
                state = {"bit_generator": "MT19937", "state": {"key": mersenne_key(), "pos": 624}}
            else:
                state = type(obj)(seed).state
            try:
                # numpy from 1.25 on takes the seed sequence along, which spawn() draws from.
                obj.__setstate__((state, seed))
                whole = obj.seed_seq is seed
            except Exception:
                whole = False
            if not whole:
                type(obj).__init__(obj, seed)
        for obj in self.numpy_states:
            # Also drops the second half of a Gaussian pair, which would survive.
            if type(obj._bit_generator) is mersenne:
                obj.set_state(("MT19937", mersenne_key(), 624, 0, 0.0))
            else:
                state = obj.get_state(legacy=False)
                state["has_gauss"], state["gauss"] = 0, 0.0
                obj.set_state(state)


def apply_identity(payload, generators):
    """Makes this fork differ from all others. Any error here means that no user code runs."""
    if len(payload) != IDENTITY_LEN:
        raise RunnerError("the identity has %d bytes, not %d" % (len(payload), IDENTITY_LEN))
    seeds = Seeds(payload[:64])
    generators.reseed(seeds)
    # uuid1: libuuid keeps a clock sequence and a node that forks would share, so take the pure Python path with our own node
    # (multicast bit set: RFC 4122 4.5), which also keeps the host's MAC address out.
    uuid._generate_time_safe = None
    uuid._node = seeds.number(48) | (1 << 40)
    for name in ("_last_timestamp", "_last_timestamp_v6", "_last_timestamp_v7"):
        if hasattr(uuid, name):
            setattr(uuid, name, None)
    tempfile._name_sequence = None
    tempfile.tempdir = None
    openssl = sys.modules.get("_ssl")
    if openssl is not None:
        # Reseeds OpenSSL's primary generator, from the kernel and from this; the others notice and follow. Needed because
        # OpenSSL detects a fork by the process id, which is the same in every fork of a VM.
        openssl.RAND_add(seeds.take(), 64.0)
    process = sys.modules.get("multiprocessing.process")
    if process is not None:
        process.current_process().authkey = seeds.take()[:32]
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(seeds.number(63))


# ---- the program


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


class Program:
    """The code as `__main__`."""

    def __init__(self, code, argv):
        self.code = code
        self.argv = argv
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

    def run(self, note_fd):
        """Runs the code to its end; never returns."""
        note = os.fstat(note_fd)
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
                    send(note_fd, NOTE, NOTE_OUT_OF_MEMORY)
                except OSError:
                    # The program closed the descriptor: it is then an ordinary exit 1.
                    pass
            status = report(error, program)
        interrupted = isinstance(error, KeyboardInterrupt)
        error = None
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


FFLUSH = None
PLUGS = []


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
    if flush_std():
        status = 120
    # Files that were never closed lose their buffers unless they are flushed or the objects go, and __del__ methods are owed
    # their call: the same two passes over the main module as in CPython's finalize_modules.
    try:
        flush_files()
        names = main.__dict__
        for name in [n for n in names if n[:1] == "_" and n[1:2] != "_"]:
            names[name] = None
        for name in [n for n in names if n != "__builtins__"]:
            names[name] = None
        gc.collect()
        flush_files()
    except BaseException:
        unraisable("finalization")
    if flush_std():
        status = 120
    if FFLUSH is not None:
        FFLUSH(None)
    return status


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


# ---- a context


HERE = (lambda: None).__code__.co_filename
OK, FAILED, INTERRUPTED = 0, 1, 2
VALUE, CONTINUES, LAST = 1, 2, 4

# What an object says of itself, by method. Text is str, the others bytes; JSON is anything that json can write.
REPRESENTATIONS = (
    ("text/html", "_repr_html_"),
    ("text/markdown", "_repr_markdown_"),
    ("text/latex", "_repr_latex_"),
    ("image/svg+xml", "_repr_svg_"),
    ("image/png", "_repr_png_"),
    ("image/jpeg", "_repr_jpeg_"),
    ("application/json", "_repr_json_"),
    ("application/pdf", "_repr_pdf_"),
    ("application/javascript", "_repr_javascript_"),
)
# Notebooks carry these as base64; a result carries the bytes.
BINARY = ("image/png", "image/jpeg", "application/pdf")


class Channel:
    """What a context says on its private copy of the control descriptor."""

    def __init__(self, fd):
        self.fd = fd
        self.pid = os.getpid()
        self.main = threading.get_ident()
        # Threads of the program display, too. Whole bundles: a half one would swallow what comes after it.
        self.lock = threading.Lock()
        self.open = False  # a cell runs
        self.holding = False  # the main thread is inside a bundle: an interrupt waits for its end
        self.pending = False

    def result(self, bundle, value):
        """`bundle`: MIME type to bytes. False if no cell of this process could have it."""
        parts = [(kind.encode(), memoryview(data)) for kind, data in bundle.items()]
        if not parts or os.getpid() != self.pid:
            return not parts
        main = threading.get_ident() == self.main
        with self.lock:
            if not self.open:
                return False
            self.holding = main
            try:
                for i, (kind, data) in enumerate(parts):
                    self.part(kind, data, VALUE if value else 0, i == len(parts) - 1)
            finally:
                if main:
                    self.holding = False
        if main and self.pending:
            self.pending = False
            raise KeyboardInterrupt
        return True

    def part(self, kind, data, flags, last):
        room = MAX_PAYLOAD - 2 - len(kind)
        for at in range(0, max(len(data), 1), room):
            ends = at + room >= len(data)
            bits = flags | (CONTINUES if at else 0) | (LAST if ends and last else 0)
            send(self.fd, RESULT, bytes((bits, len(kind))) + kind + data[at : at + room])

    def done(self, status, count, error):
        with self.lock:
            self.open = False
            if error is not None:
                send(self.fd, ERROR, error)
            send(self.fd, DONE, struct.pack("<BI", status, count & 0xFFFFFFFF))


def cut(text, room):
    """Leaves the middle out."""
    if len(text) <= room:
        return text
    return "%s\n... %d characters left out ...\n%s" % (text[: room // 2], len(text) - room, text[len(text) - room // 2 :])


def error_payload(name, value, shown):
    room = MAX_PAYLOAD
    while True:
        fields = {"name": cut(name, 200), "value": cut(value, room // 4), "traceback": cut(shown, room)}
        # A lone surrogate is nothing that JSON can carry.
        fields = {key: text.encode("utf-8", "replace").decode() for key, text in fields.items()}
        payload = json.dumps(fields, ensure_ascii=False).encode()
        if len(payload) <= MAX_PAYLOAD:
            return payload
        room = room * 3 // 4


def error_text(error):
    try:
        return str(error)
    except Exception:
        return "<no text: its __str__ failed>"


def hide_our_frames(shown, seen):
    if shown is None or id(shown) in seen:
        return
    seen.add(id(shown))
    if shown.stack is not None:
        shown.stack[:] = [frame for frame in shown.stack if frame.filename != HERE]
    for other in (shown.__cause__, shown.__context__, *(getattr(shown, "exceptions", None) or ())):
        hide_our_frames(other, seen)


def as_bytes(kind, data):
    """One representation as a result carries it, or None."""
    if data is None:
        return None
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    if isinstance(data, str):
        if kind in BINARY:
            import binascii

            return binascii.a2b_base64(data)
        return data.encode("utf-8", "replace")
    return json.dumps(data, default=repr).encode("utf-8", "replace")


def add_representations(bundle, data):
    for kind, content in data.items():
        content = as_bytes(kind, content)
        if content is not None and 0 < len(kind) < 256 and kind.isascii():
            bundle[kind] = content


def without_metadata(said):
    return said[0] if isinstance(said, tuple) and len(said) == 2 else said


def representations(obj):
    """The MIME bundle of an object: what it says of itself, and its repr."""
    bundle, kind = {}, type(obj)

    def ask(name, *arguments, **named):
        # Of the type: an object that has every attribute has no representation.
        method = getattr(kind, name, None)
        if method is None:
            return None
        try:
            return without_metadata(method(obj, *arguments, **named))
        except NotImplementedError:
            return None
        except Exception as error:
            # The others may still work.
            print_exception(error)
            return None

    whole = ask("_repr_mimebundle_", include=None, exclude=None)
    if isinstance(whole, dict):
        add_representations(bundle, whole)
    for mime, name in REPRESENTATIONS:
        if mime not in bundle:
            add_representations(bundle, {mime: ask(name)})
    figure = getattr(sys.modules.get("matplotlib.figure"), "Figure", None)
    if figure is not None and isinstance(obj, figure) and "image/png" not in bundle:
        bundle["image/png"] = figure_png(obj)
    if "text/plain" not in bundle:
        bundle["text/plain"] = repr(obj).encode("utf-8", "replace")
    # The plain one first, as people read it.
    return {"text/plain": bundle.pop("text/plain"), **bundle}


def figure_png(figure):
    image = io.BytesIO()
    figure.savefig(image, format="png", bbox_inches="tight")
    return image.getvalue()


class Loop:
    """The event loop that top-level awaits of all cells share."""

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
        except BaseException:
            # An interrupt leaves the task where it was; it must not go on at the next await.
            if not task.done():
                task.cancel()
                self.loop.run_until_complete(asyncio.wait([task]))
            raise


class Shell:
    """A shell of our own, for an interpreter without IPython."""

    def __init__(self, main, channel, loop):
        self.names, self.channel, self.loop = main.__dict__, channel, loop
        self.flags = 0
        builtins.display = self.display

    def run(self, source, count):
        """Runs a cell. Returns the error that ended it, and its traceback as text."""
        try:
            return self.attempt(source, "<cell %d>" % count), None
        except BaseException as error:
            tb = error.__traceback__
            # Ours and the event loop's.
            while tb is not None and not tb.tb_frame.f_code.co_filename.startswith("<cell "):
                tb = tb.tb_next
            caught = error.with_traceback(tb or error.__traceback__)
        shown = traceback.TracebackException(type(caught), caught, caught.__traceback__)
        hide_our_frames(shown, set())
        sys.last_type, sys.last_value, sys.last_traceback = type(caught), caught, caught.__traceback__
        if sys.version_info >= (3, 12):
            sys.last_exc = caught
        return caught, "".join(shown.format())

    def attempt(self, source, filename):
        import ast

        register_source(filename, source)
        awaits = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        tree = compile(source, filename, "exec", self.flags | awaits | ast.PyCF_ONLY_AST, dont_inherit=True)
        last = None
        if tree.body and isinstance(tree.body[-1], ast.Expr) and not silenced(source, tree.body[-1]):
            last = ast.Expression(tree.body.pop().value)
        codes = [compile(tree, filename, "exec", self.flags | awaits, dont_inherit=True)] if tree.body else []
        if codes:
            # A `from __future__ import` holds for the cells that follow.
            self.flags |= codes[0].co_flags & FUTURES
        if last is not None:
            codes.append(compile(last, filename, "eval", self.flags | awaits, dont_inherit=True))
        value = None
        for code in codes:
            value = eval(code, self.names)
            # CO_COROUTINE
            if code.co_flags & 0x80:
                value = self.loop.run(value)
        if last is not None and value is not None:
            bundle = representations(value)
            builtins._ = value
            self.show(bundle, True)
        return None

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

    def after(self):
        """Figures that the cell left open."""
        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is None:
            return
        try:
            for number in pyplot.get_fignums():
                self.display(pyplot.figure(number))
        finally:
            pyplot.close("all")


FUTURES = 0
for _name in __future__.all_feature_names:
    FUTURES |= getattr(__future__, _name).compiler_flag


def silenced(source, expression):
    """Whether a semicolon follows the last expression."""
    lines = source.splitlines()
    line = lines[expression.end_lineno - 1] if expression.end_lineno <= len(lines) else b""
    return line[expression.end_col_offset :].lstrip().startswith(b";")


def no_input(prompt=""):
    raise EOFError("a cell has no standard input: pass the value in the code, or run a command that has one")


class Context:
    """Runs cells, one after the other, in one `__main__`."""

    def __init__(self, control, fd, generators):
        self.control, self.generators = control, generators
        self.channel = Channel(fd)
        self.count = 0
        self.running = False
        main = types.ModuleType("__main__")
        main.__builtins__ = builtins
        main.__loader__ = importlib.machinery.BuiltinImporter
        sys.path.insert(0, "")
        sys.argv = [""]
        if hasattr(sys, "orig_argv"):
            sys.orig_argv = [sys.executable]
        sys.modules["__main__"] = main
        builtins.input = no_input
        self.shell = Shell(main, self.channel, Loop())

    def run(self):
        """Serves until the agent closes; never returns."""
        code = []
        signal.signal(signal.SIGINT, self.interrupt)
        try:
            for kind, payload in self.control:
                if kind == CODE:
                    code.append(payload)
                elif kind == CELL:
                    source, code = b"".join(code), []
                    self.cell(source)
                elif kind == IDENTITY:
                    # What the cells made is to be found, too.
                    self.generators = Generators(self.generators)
                    apply_identity(payload, self.generators)
                elif kind == ENV:
                    set_environment(payload)
                else:
                    raise RunnerError("unexpected frame kind %#04x in a context" % kind)
        except RunnerError as error:
            fail(error, self.channel.fd)
        except BaseException as error:
            fail("%s: %s" % (type(error).__name__, error), self.channel.fd)
        flush_std()
        flush_files()
        os._exit(0)

    def interrupt(self, signum, frame):
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
        """Every interrupt that comes before this is over ends in here or in its caller, and nowhere else."""
        error = shown = None
        try:
            self.running = True
            error, shown = self.shell.run(source, self.count)
            self.shell.after()
            self.running = False
        except BaseException as caught:
            self.running = False
            error, shown = caught, "%s\n" % type(caught).__name__
        return error, shown

    def cell(self, source):
        self.count += 1
        self.channel.open = True
        self.channel.pending = False
        # A cell may have put its own in its place.
        signal.signal(signal.SIGINT, self.interrupt)
        try:
            error, shown = self.guarded(source)
        except KeyboardInterrupt as caught:
            error, shown = caught, "KeyboardInterrupt\n"
        if os.getpid() != self.channel.pid:
            # A fork that the program made came to the end of the cell.
            flush_std()
            os._exit(0 if error is None else 1)
        signal.signal(signal.SIGINT, self.interrupt)
        flush_std()
        if FFLUSH is not None:
            FFLUSH(None)
        if any(stream is None or getattr(stream, "closed", False) for stream in (sys.stdout, sys.stderr)):
            open_stdio()
        status, payload = OK, None
        if error is not None:
            status = INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
            payload = error_payload(type(error).__name__, error_text(error), shown)
        self.channel.done(status, self.count, payload)


# ---- life


def serve(ready, generators):
    """Waits for what to be, a program or a context, and becomes it; never returns."""
    try:
        # Before Ready: in a pool of waiting forks this costs nobody anything.
        open_stdio()
        send(CONTROL_FD, READY, ready)
        # Out of the program's way, and not inherited by what it executes.
        work = read_request(generators)
    except RunnerError as error:
        fail(error)
    except BaseException as error:
        fail("%s: %s" % (type(error).__name__, error))
    work()


def set_environment(payload):
    key, nul, value = payload.partition(b"\0")
    if not nul or not key:
        raise RunnerError("malformed env frame")
    os.environb[key] = value
    if key == b"TZ":
        time.tzset()


def read_request(generators):
    import fcntl

    private = fcntl.fcntl(CONTROL_FD, fcntl.F_DUPFD_CLOEXEC, 20)
    control = frames(io.BufferedReader(io.FileIO(private, "r", closefd=False), MAX_PAYLOAD))
    argv, code, environment, identified, directory, serves = [], [], [], False, None, False
    for kind, payload in control:
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
        # Cells have no standard input.
        null = os.open(os.devnull, os.O_RDONLY)
        if null != 0:
            os.dup2(null, 0)
            os.close(null)
        work = Context(control, private, generators).run
    else:
        # Code and argv are the program's; everything else of this function goes.
        program = Program(b"".join(code), argv or ["-c"])
        program.hook_multiprocessing()
        work = lambda: program.run(private)
    os.close(CONTROL_FD)
    send(private, STARTED)
    return work


def fork_server(path, fd):
    """Hands the process to the cdylib, which forks it on demand; returns in each child."""
    if ctypes is None:
        raise RunnerError("this interpreter has no ctypes module, which the fork server needs")
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RunnerError(
            "the warmed interpreter has %d threads and cannot be forked safely; do not warm the module that starts them" % threads
        )
    library = ctypes.PyDLL(path)
    library.zb_serve.argtypes = [ctypes.c_int]
    library.zb_serve.restype = ctypes.c_int
    ctypes.pythonapi.PyOS_BeforeFork.restype = None
    ctypes.pythonapi.PyOS_AfterFork_Child.restype = None
    # Resolved before the fork, so that a child does not look symbols up.
    before, after = ctypes.pythonapi.PyOS_BeforeFork, ctypes.pythonapi.PyOS_AfterFork_Child
    serve_forks = library.zb_serve
    before()
    status = serve_forks(fd)
    after()
    if status != 0:
        raise RunnerError("the fork server returned %d" % status)


def parse(arguments):
    options = {"--warm": "", "--fork-server": None, "--fork-fd": None}
    rest = list(arguments)
    while rest:
        name = rest.pop(0)
        if name == "--frozen":
            continue  # said to every runner whose memory gets snapshotted; Python's identity needs no other treatment
        if name not in options or not rest:
            raise RunnerError("unknown or incomplete argument %r" % name)
        options[name] = rest.pop(0)
    if (options["--fork-server"] is None) != (options["--fork-fd"] is None):
        raise RunnerError("--fork-server and --fork-fd go together")
    return options


def prepare(arguments):
    """Everything up to the ready point."""
    global FFLUSH
    options = parse(arguments)
    # Ours while warming; the program gets its own first entry.
    here = os.path.dirname(os.path.abspath(__file__))
    if sys.path and os.path.abspath(sys.path[0] or ".") == here:
        del sys.path[0]
    warmed, skipped = warm(options["--warm"])
    if ctypes is not None:
        FFLUSH = ctypes.CDLL(None).fflush
        FFLUSH.argtypes = [ctypes.c_void_p]
    ready = {"version": "Python " + sys.version.split()[0], "warmed": warmed}
    if skipped:
        ready["skipped"] = skipped
    gc.collect()
    generators = Generators()
    # Once for practice: OpenSSL makes its generators at the first use, which takes a millisecond.
    apply_identity(os.urandom(IDENTITY_LEN), generators)
    ready = json.dumps(ready).encode()
    # After the walk: the collector does not list frozen objects. Forks then share these pages for good.
    gc.collect()
    PLUGS.append(plug_holes())
    gc.freeze()
    return options, ready, generators


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


def main():
    try:
        options, ready, generators = prepare(sys.argv[1:])
        if options["--fork-server"] is not None:
            fork_server(options["--fork-server"], int(options["--fork-fd"]))
            # The pages that the identity writes to get copied now, while this fork waits in a pool.
            apply_identity(os.urandom(IDENTITY_LEN), generators)
    except RunnerError as error:
        fail(error)
    except BaseException as error:
        fail("%s: %s" % (type(error).__name__, error))
    serve(ready, generators)


if __name__ == "__main__":
    main()
