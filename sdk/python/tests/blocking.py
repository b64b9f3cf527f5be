"""An asynchronous object in the clothes of a blocking one, so that one test serves both."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any


class Blocking:
    def __init__(self, inner: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._inner, self._loop = inner, loop

    def _out(self, value: Any) -> Any:
        if inspect.isawaitable(value):

            async def main() -> Any:
                return await value

            value = self._loop.run_until_complete(main())
        if isinstance(value, list):
            return [self._out(one) for one in value]
        if isinstance(value, type) or not type(value).__name__.startswith("Async"):
            return value
        return Blocking(value, self._loop)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, "aclose" if name == "close" else name)
        if inspect.ismethod(value):
            return lambda *args, **options: self._out(value(*args, **options))
        return self._out(value)

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                yield self._out(self._inner.__anext__())
            except StopAsyncIteration:
                return

    def __next__(self) -> Any:
        try:
            return self._out(self._inner.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> Blocking:
        self._out(self._inner.__aenter__())
        return self

    def __exit__(self, *exc: Any) -> None:
        self._out(self._inner.__aexit__(*exc))
