from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Callable

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from stub import Step, Stub


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ZEROBOOT_API_KEY", "ZEROBOOT_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stub() -> Iterator[Callable[..., Stub]]:
    with ExitStack() as stack:
        yield lambda *script: stack.enter_context(Stub(list(script)))


__all__ = ["Step"]
