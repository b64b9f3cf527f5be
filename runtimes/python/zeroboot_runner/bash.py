"""Code for the shell: this process becomes it."""

import os
import shutil
import signal
import tempfile

from .wire import RunnerError

# The name of code that is in no file.
INLINE = "-bash"
# The kernel takes 128 KiB in one argument (MAX_ARG_STRLEN).
LONGEST = 100000


class Shell:
    """The code as a program of the shell."""

    def __init__(self, code, argv):
        shell = shutil.which("bash") or shutil.which("sh")
        if shell is None:
            raise RunnerError("this template has no shell")
        self.words = [shell] + self.source(code, argv[0]) + argv[1:]

    @staticmethod
    def source(code, name):
        """The shell's arguments that name the code."""
        if name != INLINE:
            name = os.path.basename(name)
            try:
                with open(name, "xb") as file:
                    file.write(code)
                # Not an option, whatever it begins with.
                return ["--", name]
            except OSError:
                # A file of that name was put there, or nothing can be written: the code runs all the same.
                pass
        elif len(code) <= LONGEST:
            return ["-c", "--", os.fsdecode(code), "bash"]
        fd, path = tempfile.mkstemp(suffix=".sh")
        with os.fdopen(fd, "wb") as file:
            file.write(code)
        return [path]

    def run(self):
        """Never returns."""
        # Python ignores them. The shell would inherit that, and no script can undo it.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execv(self.words[0], self.words)
