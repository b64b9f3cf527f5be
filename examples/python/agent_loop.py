"""An agent loop: the model writes code, the sandbox runs it, the model sees what happened."""

from __future__ import annotations

from zeroboot import Sandbox


def ask_model(conversation: list[str]) -> str:
    """Stands in for a language model: its first program has a mistake, its second has not."""
    if any("ZeroDivisionError" in message for message in conversation):
        return "values = []\nprint(sum(values) / len(values) if values else 0)"
    return "values = []\nprint(sum(values) / len(values))"


def main() -> None:
    conversation = ["What is the mean of an empty list?"]
    with Sandbox() as sandbox:
        for attempt in range(1, 4):
            code = ask_model(conversation)
            result = sandbox.run(code, timeout=5, limits={"memory_mb": 256})
            if result.ok:
                print(f"attempt {attempt}: {result}")
                return
            # The error goes back to the model. It is data here, not an exception.
            print(f"attempt {attempt} failed: {result.stderr.strip().splitlines()[-1]}")
            conversation.append(result.stderr)
    raise SystemExit("the model did not find it")


main()
