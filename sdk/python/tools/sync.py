#!/usr/bin/env python3
"""Makes `src/zeroboot/_live_sync.py` out of `_live_async.py`: the same without the waiting.

tools/sync.py            writes it
tools/sync.py --check    fails if it would change anything
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent / "src" / "zeroboot"
HEAD = '''"""`LiveSandbox`: a long-lived sandbox.

Made from `_live_async.py` by `tools/sync.py`.
"""
'''
#: In this order.
WORDS = [
    (r"\basync (def|with|for)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAsync([A-Z])", r"\1"),
    (r"\bStopAsyncIteration\b", "StopIteration"),
    (r"\b__a(enter|exit|iter|next)__\b", r"__\1__"),
    (r"\ba(iter_bytes|close|read)\b", r"\1"),
    (r"\b_(async|waiting_async)\b", lambda m: f"_{m[1].replace('async', 'sync')}"),
    (r"task or thread", "thread"),
]


def made() -> str:
    text = (HERE / "_live_async.py").read_text()
    text = HEAD + text.split('"""\n', 1)[1]
    for pattern, replacement in WORDS:
        text = re.sub(pattern, replacement, text)
    ruff = Path(sys.executable).with_name("ruff")
    for task in (["check", "--fix-only", "--quiet", "--select=I"], ["format", "--quiet"]):
        command = [ruff, *task, "--no-cache", "--stdin-filename", HERE / "_live_sync.py", "-"]
        text = subprocess.run(
            command, input=text, capture_output=True, text=True, check=True
        ).stdout
    return text


if __name__ == "__main__":
    path = HERE / "_live_sync.py"
    if sys.argv[1:] == ["--check"]:
        sys.exit(
            None if path.read_text() == made() else f"{path.name} is not made from _live_async.py"
        )
    path.write_text(made())
