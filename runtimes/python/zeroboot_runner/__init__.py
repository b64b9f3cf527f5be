"""The Python runner. See README.md beside this package for the whole contract.

What a program needs comes first and side by side, after all that is not ours: a fork copies the pages that it touches, and the
fewer these functions share with others, the fewer they are.
"""

import __future__, ast, atexit, builtins, fcntl, functools, gc, hashlib, importlib.machinery, importlib.util, io, json, linecache, os, random, signal, struct, sys, tempfile, threading, time, traceback, types

try:
    import ctypes
except ImportError:
    pass

from . import wire, report, streams, finish, program, identity, life
