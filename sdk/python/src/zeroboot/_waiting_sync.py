"""What waiting is for `Sandbox`.

`_waiting_async.py` has the same names for `AsyncSandbox`, so that `_live_sync.py` can be made from
`_live_async.py`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Callable, Union

from ._live_core import CHUNK

Lock = threading.Lock
sleep = time.sleep

#: What a file is written from: its content, a local path, an open file, or pieces as they come.
Source = Union[str, bytes, "os.PathLike[str]", IO[bytes], Iterable[bytes]]


def call(callback: Callable[[Any], object], value: Any) -> None:
    callback(value)


def upload(source: Source) -> Union[bytes, Iterator[bytes]]:
    """The body for `source`. Only bytes can be sent twice."""
    if isinstance(source, str):
        return source.encode("utf-8")
    if isinstance(source, bytes):
        return source
    return _pieces(source)


def _pieces(source: Any) -> Iterator[bytes]:
    if isinstance(source, os.PathLike):
        with Path(source).open("rb") as file:
            while piece := file.read(CHUNK):
                yield piece
    elif hasattr(source, "read"):
        while piece := source.read(CHUNK):
            yield piece
    else:
        yield from source


def save(pieces: Iterator[bytes], path: Union[str, os.PathLike[str]]) -> None:
    with Path(path).open("wb") as file:
        for piece in pieces:
            file.write(piece)
