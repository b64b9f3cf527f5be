"""Hooks of `os.register_at_fork` around a fork of the warm interpreter."""

import gc
import os
import sys
import threading

from .report import unraisable

# The standard library's hooks that a fork of ours does without, and why. They cost more than the rest of a fork.
NEEDLESS = {
    "threading": "forgets other threads and makes locks anew: there is one thread, and it holds none",
    "random": "seeds the global generator: the identity does",
    "logging": "makes locks anew: none is held",
}


def needless(hook):
    if getattr(hook, "__module__", None) in NEEDLESS:
        return True
    # The methods of one lock, which nobody holds.
    lock = getattr(sys.modules.get("concurrent.futures.thread"), "_global_shutdown_lock", None)
    return lock is not None and getattr(hook, "__self__", None) is lock


def lists_of_hooks():
    """The interpreter's own lists: what runs before a fork and what runs in the child. They have no other name."""

    def before():
        pass

    def in_child():
        pass

    os.register_at_fork(before=before, after_in_child=in_child)
    found = []
    for mark in (before, in_child):
        lists = [each for each in gc.get_referrers(mark) if type(each) is list and each[-1:] == [mark]]
        if len(lists) != 1:
            return None
        found.append(lists[0])
    for each in found:
        each.pop()
    return found


class Hooks:
    """Those of packages. To be made before objects are frozen: the collector then no longer knows the lists."""

    def __init__(self):
        lists = lists_of_hooks() if getattr(sys, "_is_gil_enabled", lambda: True)() else None
        # Otherwise CPython runs them all.
        self.known = lists is not None
        before, in_child = lists or ([], [])
        self.before = [hook for hook in reversed(before) if not needless(hook)]
        self.in_child = [hook for hook in in_child if not needless(hook)]

    def around(self, fork, before_all, after_all):
        """Calls `fork`, which returns in each child. `before_all`, `after_all`: CPython's own, both or neither: one takes the import lock and the other gives it back."""
        if not self.known:
            before_all()
            status = fork()
            after_all()
            return status
        run(self.before)
        status = fork()
        # The one thing that CPython's hooks would change.
        threading.main_thread()._set_native_id()
        run(self.in_child)
        return status


def run(hooks):
    for hook in hooks:
        try:
            hook()
        except BaseException:
            # As CPython.
            unraisable(repr(hook))
