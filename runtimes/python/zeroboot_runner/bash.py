"""Code for the shell: this process becomes it."""

import os
import shutil
import signal
import tempfile

from .wire import RunnerError

# The name of code that is in no file; a script is told by its own.
INLINE = "-bash"
EXTENSIONS = (".sh", ".bash")
# The kernel takes 128 KiB in one argument (MAX_ARG_STRLEN).
LONGEST = 100000


def runs(argv):
    return bool(argv) and (argv[0] == INLINE or argv[0].lower().endswith(EXTENSIONS))


def command(code, argv):
    """The shell's arguments; its program is the first."""
    shell = shutil.which("bash") or shutil.which("sh")
    if shell is None:
        raise RunnerError("this template has no shell")
    if argv[0] != INLINE:
        name = os.path.basename(argv[0])
        try:
            with open(name, "xb") as file:
                file.write(code)
            return [shell, name] + argv[1:]
        except OSError:
            # A file of that name was put there, or nothing can be written: the code runs all the same.
            pass
    elif len(code) <= LONGEST:
        return [shell, "-c", os.fsdecode(code), "bash"] + argv[1:]
    fd, path = tempfile.mkstemp(suffix=".sh")
    with os.fdopen(fd, "wb") as file:
        file.write(code)
    return [shell, path] + argv[1:]


def become(words):
    # Python ignores them, and what is ignored stays so.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execv(words[0], words)
