"""One line about an uncaught exception, where the sandbox knows more than the code does."""

import errno
import os
import resource
import socket
import sys

# Modules that are not called as the package that brings them.
PACKAGES = {
    "PIL": "pillow",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python-headless",
    "dateutil": "python-dateutil",
    "docx": "python-docx",
    "dotenv": "python-dotenv",
    "fitz": "pymupdf",
    "pptx": "python-pptx",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
# How many installed packages are named.
NAMED = 12
LONGEST = 400


def chain(error):
    """The exception and what it came of."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        reason = getattr(error, "reason", None)
        error = reason if isinstance(reason, BaseException) else error.__cause__ or error.__context__


def installed():
    from importlib.metadata import distributions

    names = sorted({d.metadata["Name"] for d in distributions() if d.metadata["Name"]}, key=str.lower)
    if not names:
        return "no package is installed"
    rest = len(names) - NAMED
    return "installed: " + ", ".join(names[:NAMED]) + (" and %d more (pip list)" % rest if rest > 0 else "")


def of_module(name):
    name = name.partition(".")[0]
    if not name or name in getattr(sys, "stdlib_module_names", ()):
        return None
    package = PACKAGES.get(name, name)
    return "package %s is not installed in this sandbox; take a template with it (`--with %s`); %s" % (package, package, installed())


def of_os_error(error):
    number, path = error.errno, error.filename
    path = os.fsdecode(path) if isinstance(path, (str, bytes)) else None
    if isinstance(error, socket.gaierror) or number in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN):
        return "there is no network in this sandbox; put data in with the request's files"
    if number == errno.EROFS or (number == errno.EACCES and path is not None and not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK)):
        where = path or "this place"
        return "%s is in a read-only place; write to %s, /tmp or /dev/shm" % (where, os.path.expanduser("~"))
    if number == errno.ENOSPC:
        place = os.statvfs(os.path.dirname(os.path.abspath(path)) if path else ".")
        return "the disk of this sandbox is full: it holds %d MiB here" % (place.f_frsize * place.f_blocks >> 20)
    if number == errno.EFBIG:
        return "a file may have at most %d MiB in this sandbox" % (resource.getrlimit(resource.RLIMIT_FSIZE)[0] >> 20)
    if number == errno.EMFILE:
        return "a process may have at most %d open files in this sandbox" % resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if number == errno.EAGAIN and isinstance(error, BlockingIOError):
        return processes()
    return None


def processes():
    return "the sandbox has reached its limit of processes and threads; start fewer, or ask for more (`processes`)"


def of(error):
    """The hint, or none. Never raises."""
    try:
        for one in chain(error):
            hint = None
            if isinstance(one, ModuleNotFoundError) and one.name:
                hint = of_module(one.name)
            elif isinstance(one, MemoryError):
                hint = "the code needed more memory than this sandbox may use; use less, or ask for more (`memory`)"
            elif isinstance(one, RuntimeError) and "can't start new thread" in str(one):
                hint = processes()
            elif isinstance(one, OSError):
                hint = of_os_error(one)
            if hint:
                # One line of text, whatever was in a path.
                return "".join(c if c.isprintable() else "?" for c in hint).encode("utf-8", "replace")[:LONGEST].decode("utf-8", "ignore")
    except BaseException:
        pass
    return None
