"""Output while the code runs, and stopping it early."""

from __future__ import annotations

from zeroboot import Sandbox, Stdout

COUNT = """
import time
for n in range(100):
    print(n, flush=True)
    time.sleep(0.05)
"""

with Sandbox() as sandbox:
    # Leaving the block ends the sandbox, wherever its code is.
    with sandbox.stream(COUNT) as events:
        for event in events:
            if isinstance(event, Stdout):
                print("heard", event.text.strip())
                if event.text.strip() == "3":
                    break

    # Or with a callback, to the end.
    result = sandbox.run("print('a'); print('b')", on_stdout=lambda text: print(text, end=""))
    print("exit code", result.exit_code)
