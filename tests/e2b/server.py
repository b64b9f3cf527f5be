"""Runs a command with a server behind the variables that E2B's SDKs read."""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "sdk"))
from with_server import Server  # sdk/with_server.py

key = "e2b_" + os.urandom(20).hex()
with Server("process", key=key) as server:
    variables = {"E2B_API_URL": server.url, "E2B_SANDBOX_URL": server.url, "E2B_API_KEY": key}
    status = subprocess.run(sys.argv[1:], env={**os.environ, **variables}).returncode
    if status != 0:
        print(server.log(), file=sys.stderr)
sys.exit(status)
