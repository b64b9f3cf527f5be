"""What a cell shows: MIME bundles, and the frames that carry them."""

import json
import os
import struct
import sys
import threading

from .charts import extras
from .figures import png
from .report import print_exception
from .wire import DONE, ERROR, MAX_PAYLOAD, RESULT, send

# Bits of a Result frame: the value of the last expression; not the first chunk of its part; the last chunk of its bundle.
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

    def begin(self):
        self.pending = False
        self.open = True

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
        bundle["image/png"] = png(obj)
    add_representations(bundle, extras(obj))
    if "text/plain" not in bundle:
        bundle["text/plain"] = repr(obj).encode("utf-8", "replace")
    # The plain one first, as people read it.
    return {"text/plain": bundle.pop("text/plain"), **bundle}
