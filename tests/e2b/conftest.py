"""One server for all tests, and a fresh sandbox for each that asks for one."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "sdk"))
from with_server import Server  # sdk/with_server.py


@pytest.fixture(scope="session")
def server():
    key = "e2b_" + os.urandom(20).hex()
    # The tests make sandboxes faster than one agent does.
    with Server("process", key=key) as server:
        os.environ["E2B_API_URL"] = server.url
        os.environ["E2B_SANDBOX_URL"] = server.url
        os.environ["E2B_API_KEY"] = key
        yield server


@pytest.fixture
def sandbox(server):
    from e2b_code_interpreter import Sandbox

    sandbox = Sandbox.create()
    yield sandbox
    sandbox.kill()
