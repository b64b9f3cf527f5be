"""What waiting is for `AsyncSandbox`: see `_waiting_sync.py`."""

from __future__ import annotations

import inspect
import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import IO, Any, Callable, Union

import anyio

from ._live_core import CHUNK

Lock = anyio.Lock
sleep = anyio.sleep

#: What a file is written from: its content, a local path, an open file, or pieces as they come.
Source = Union[str, bytes, "os.PathLike[str]", IO[bytes], Iterable[bytes], AsyncIterator[bytes]]


async def call(callback: Callable[[Any], object], value: Any) -> None:
    done = callback(value)
    if inspect.isawaitable(done):
        await done


def upload(source: Source) -> Union[bytes, AsyncIterator[bytes]]:
    """The body for `source`. Only bytes can be sent twice."""
    if isinstance(source, str):
        return source.encode("utf-8")
    if isinstance(source, bytes):
        return source
    return _pieces(source)


async def _pieces(source: Any) -> AsyncIterator[bytes]:
    if isinstance(source, os.PathLike):
        async with await anyio.open_file(source, "rb") as file:
            while piece := await file.read(CHUNK):
                yield piece
    elif hasattr(source, "read"):
        while piece := await anyio.to_thread.run_sync(source.read, CHUNK):
            yield piece
    elif hasattr(source, "__aiter__"):
        async for piece in source:
            yield piece
    else:
        for piece in source:
            yield piece


async def save(pieces: AsyncIterator[bytes], path: Union[str, os.PathLike[str]]) -> None:
    async with await anyio.open_file(Path(path), "wb") as file:
        async for piece in pieces:
            await file.write(piece)
