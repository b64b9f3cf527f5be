"""A file in, a file out, and a limit."""

from __future__ import annotations

from zeroboot import Sandbox

CODE = """
import csv, json
with open("sales.csv") as f:
    rows = list(csv.DictReader(f))
with open("report.json", "w") as f:
    json.dump({"rows": len(rows), "total": sum(int(r["amount"]) for r in rows)}, f)
print("read", len(rows), "rows")
"""

with Sandbox() as sandbox:
    result = sandbox.run(
        CODE,
        files={"sales.csv": "who,amount\nann,3\nbob,4\n"},  # str, bytes, or a pathlib.Path
        output_files=["report.json"],
        limits={"memory_mb": 256, "output_bytes": 10_000},
    ).check()  # raises if the code failed
    print(result)
    print(result.files["report.json"].read_text())
