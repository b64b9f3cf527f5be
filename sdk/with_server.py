#!/usr/bin/env python3
"""Starts a real `zeroboot serve`, runs a command against it, stops it.

    sdk/with_server.py [--engine process|vm] -- COMMAND [ARG ...]

The command finds the server in ZEROBOOT_BASE_URL and its key in ZEROBOOT_API_KEY. The binary is
ZEROBOOT_BIN, else target/release/zeroboot or target/debug/zeroboot of this checkout. Tests import
`Server` from here.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parent.parent
#: Making the templates ready takes about a second for a process and more for a virtual machine.
READY_SECONDS = float(os.environ.get("ZEROBOOT_READY_SECONDS", "120"))


def find_binary() -> Optional[Path]:
    named = os.environ.get("ZEROBOOT_BIN")
    if named:
        return Path(named) if Path(named).is_file() else None
    built = [ROOT / "target" / kind / "zeroboot" for kind in ("release", "debug")]
    found = [path for path in built if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime) if found else None


def required() -> bool:
    return os.environ.get("ZEROBOOT_REQUIRE_SERVER") == "1"


class Server:
    """A server on a free port, with one key, in a directory of its own."""

    def __init__(
        self, engine: Optional[str] = None, options: tuple[str, ...] = (), key: Optional[str] = None
    ) -> None:
        binary = find_binary()
        if binary is None:
            raise FileNotFoundError("no zeroboot binary: set ZEROBOOT_BIN or build it")
        self.binary = binary
        self.key = key or "zb_live_" + secrets.token_hex(16)
        self._engine = engine
        self._options = options

    def __enter__(self) -> Server:
        self._directory = tempfile.TemporaryDirectory(prefix="zeroboot-test-")
        directory = Path(self._directory.name)
        keys = directory / "keys.json"
        keys.write_text(json.dumps([self.key]))
        keys.chmod(0o600)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [str(self.binary), "serve", "--listen", f"127.0.0.1:{port}", *self._options]
        if self._engine is not None:
            command += ["--engine", self._engine]
        self._log = (directory / "server.log").open("w+b")
        # A group of its own, so that a Ctrl-C at the tests does not race their own stopping of it.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "ZEROBOOT_API_KEYS_FILE": str(keys)},
            start_new_session=True,
        )
        try:
            self._wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()
        self._directory.cleanup()

    def health(self) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(self.url + "/v1/health", timeout=5) as answer:
                body = answer.read()
        except urllib.error.HTTPError as e:
            body = e.read()
        found: dict[str, Any] = json.loads(body)
        return found

    def languages(self) -> set[str]:
        """Languages that have a template which is ready."""
        templates = self.health().get("templates", {})
        return {
            template.get("language", name)
            for name, template in templates.items()
            if template.get("ready")
        }

    def log(self) -> str:
        self._log.flush()
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace")[-4000:]

    def _wait_ready(self) -> None:
        begin = time.monotonic()
        end = begin + READY_SECONDS
        said: object = "nothing yet"
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended: {self._process.returncode}\n{self.log()}")
            try:
                health = self.health()
                if health.get("status") == "ok":
                    return
                # A host without Node, say: what is there will do, but not while it is being made.
                if health.get("status") == "degraded" and time.monotonic() > begin + 30:
                    return
                said = health
            except (OSError, ValueError) as e:
                said = e
            time.sleep(0.1)
        raise RuntimeError(f"the server was not ready in {READY_SECONDS:g} s: {said}\n{self.log()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=["process", "vm"])
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("no command")
    try:
        server = Server(given.engine)
    except FileNotFoundError as e:
        print(f"with_server: {e}", file=sys.stderr)
        return 1
    with server:
        environment = {
            **os.environ,
            "ZEROBOOT_BASE_URL": server.url,
            "ZEROBOOT_API_KEY": server.key,
            "ZEROBOOT_BIN": str(server.binary),
        }
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
