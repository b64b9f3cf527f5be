"""The types of this package against `openapi/zeroboot.json`. Fails when either side moves alone."""

from __future__ import annotations

import json
import os
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import stub

import zeroboot
from zeroboot import Exec, Result
from zeroboot import _live_core as core
from zeroboot._core import exec_body
from zeroboot._errors import CODE_CLASSES, RATE_CODES, SERVER_CODES
from zeroboot._live_types import CellOutcome, CommandOutcome, EndReason, EntryKind

FILE = Path(
    os.environ.get("ZEROBOOT_OPENAPI")
    or Path(__file__).resolve().parents[3] / "openapi" / "zeroboot.json"
)


@pytest.fixture(scope="module")
def api() -> Any:
    if not FILE.is_file():
        if os.environ.get("ZEROBOOT_REQUIRE_SERVER") == "1":
            pytest.fail(f"{FILE} is missing")
        pytest.skip(f"{FILE} is missing")
    return json.loads(FILE.read_text())


def resolve(api: Any, schema: Any) -> Any:
    while "$ref" in schema:
        found = api
        for step in schema["$ref"].removeprefix("#/").split("/"):
            found = found[step]
        schema = found
    return schema


def properties(api: Any, schema: Any) -> dict[str, Any]:
    """All properties of an object, those of its parts and alternatives included."""
    schema = resolve(api, schema)
    found = dict(schema.get("properties", {}))
    for part in (*schema.get("allOf", ()), *schema.get("oneOf", ()), *schema.get("anyOf", ())):
        found.update(properties(api, part))
    return found


def words(api: Any, schema: Any) -> set[str]:
    """The strings that an enumeration allows."""
    schema = resolve(api, schema)
    if "const" in schema:
        return {schema["const"]}
    found = {word for word in schema.get("enum", ()) if word is not None}
    for part in (*schema.get("allOf", ()), *schema.get("oneOf", ()), *schema.get("anyOf", ())):
        found |= words(api, part)
    return found


def request_schema(api: Any, path: str) -> Any:
    return api["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def answer_schema(api: Any, path: str, method: str = "post") -> Any:
    content = api["paths"][path][method]["responses"]["200"]["content"]
    return content["application/json"]["schema"]


def test_every_field_of_a_request_can_be_sent_and_no_other(api: Any) -> None:
    known = set(properties(api, request_schema(api, "/v1/exec")))
    full = Exec("x", "node", "t", 1.0, "s", {"A": "b"}, ["a"], {"f": "c"}, ["o"], {"memory_mb": 1})
    assert set(exec_body(full, 1.0)) == known
    assert len(fields(Exec)) == len(known)


def test_limits_are_the_same(api: Any) -> None:
    limits = properties(api, request_schema(api, "/v1/exec"))["limits"]
    assert set(properties(api, limits)) == set(zeroboot.Limits.__annotations__)


def test_every_field_of_an_answer_is_in_the_result_and_no_other(api: Any) -> None:
    known = set(properties(api, answer_schema(api, "/v1/exec")))
    own = {"stdout_bytes", "stderr_bytes", "request_id", "raw"}
    assert set(Result.__annotations__) - own == known
    # The recorded answer that the other tests use has them all, too.
    assert set(stub.OK) == known


def test_the_words_are_the_same(api: Any) -> None:
    answer = properties(api, answer_schema(api, "/v1/exec"))
    assert words(api, answer["outcome"]) == set(typing.get_args(zeroboot.Outcome))
    assert words(api, answer["isolation"]) == set(typing.get_args(zeroboot.Isolation))


def test_a_batch_is_made_of_the_same_parts(api: Any) -> None:
    executions = properties(api, request_schema(api, "/v1/exec/batch"))["executions"]
    assert set(properties(api, executions["items"])) == set(
        properties(api, request_schema(api, "/v1/exec"))
    )
    results = properties(api, answer_schema(api, "/v1/exec/batch"))["results"]
    assert set(properties(api, results["items"])) >= {"exit_code", "error", "code"}


def test_health_has_what_the_client_reads(api: Any) -> None:
    health = properties(api, answer_schema(api, "/v1/health", "get"))
    own = {"raw"}
    assert {field.name for field in fields(zeroboot.Health)} - own == set(health)
    assert words(api, health["status"]) == set(typing.get_args(zeroboot.HealthStatus))
    template = properties(api, resolve(api, health["templates"])["additionalProperties"])
    assert set(zeroboot.TemplateHealth.__annotations__) == set(template)


def body(api: Any, path: str, method: str = "post") -> dict[str, Any]:
    content = api["paths"][path][method]["requestBody"]["content"]["application/json"]
    return properties(api, content["schema"])


def answered(api: Any, path: str, method: str, status: str = "200") -> dict[str, Any]:
    content = api["paths"][path][method]["responses"][status]["content"]
    return properties(api, content["application/json"]["schema"])


SANDBOX = "/v1/sandboxes/{id}"


def test_every_field_of_a_live_request_can_be_sent_and_no_other(api: Any) -> None:
    known = set(body(api, "/v1/sandboxes"))
    limits = {name: 1 for name in zeroboot.SandboxLimits.__annotations__}
    full = core.create_body("t", "python", 1.0, 1.0, {"A": "b"}, {"a": "b"}, limits)  # type: ignore[arg-type]
    assert set(full) == known
    assert set(body(api, SANDBOX + "/branch")) == {"count", "timeout_seconds", "metadata"}
    assert set(body(api, "/v1/checkpoints/{id}/restore")) == set(body(api, SANDBOX + "/branch"))
    assert set(body(api, SANDBOX + "/checkpoints")) == {"timeout_seconds", "metadata"}
    assert set(body(api, SANDBOX + "/rollback")) == {"checkpoint_id"}
    # Streams are asked for by the header.
    assert set(core.cell_body("x", "c", 1.0)) == set(body(api, SANDBOX + "/run")) - {"stream"}
    options: Any = {
        "cwd": "/",
        "env": {"A": "b"},
        "timeout": 1.0,
        "keep_stdin_open": True,
        "background": True,
        "tag": "t",
        "end_with_client": True,
        "terminal": (80, 24),
    }
    known = set(body(api, SANDBOX + "/commands")) - {"stream"}
    sent = {*core.command_body("x", stdin="t", **options)}
    assert sent | {*core.command_body(["x"], stdin=b"b", **options)} == known


def test_every_field_of_a_live_answer_is_read_and_no_other(api: Any) -> None:
    def read(kind: Any, *own: str, **renamed: str) -> set[str]:
        names = {field.name for field in fields(kind)} - {"raw", "request_id", *own}
        return {renamed.get(name, name) for name in names}

    exact = ("stdout_bytes", "stderr_bytes")
    info = read(zeroboot.SandboxInfo, idle_timeout="idle_timeout_seconds")
    assert info == set(answered(api, "/v1/sandboxes", "post", "201"))
    kept = answered(api, SANDBOX + "/checkpoints", "post", "201")
    assert read(zeroboot.Checkpoint) == set(kept)
    cell = answered(api, SANDBOX + "/run", "post")
    command = answered(api, SANDBOX + "/commands", "post")
    # In both answers, each for the other: a cell's status, a command's count.
    spare = {"encoding", "output_offset", "exit_code", "signal", "execution_count", "context_lost"}
    assert set(cell) - read(zeroboot.CellResult, *exact) <= spare
    assert read(zeroboot.CellResult, *exact) <= set(cell)
    assert set(command) - read(zeroboot.CommandResult, *exact) <= spare
    assert read(zeroboot.CommandResult, *exact) <= set(command)
    status = answered(api, SANDBOX + "/commands/{run}", "get")
    spare = {"execution_count", "context_lost", "signal", "wall_time_ms"}
    assert set(status) - read(zeroboot.CommandInfo) == spare
    assert read(zeroboot.CommandInfo) <= set(status)
    contexts = answered(api, SANDBOX + "/contexts", "get")["contexts"]
    assert read(zeroboot.Context) == set(properties(api, contexts["items"]))
    assert read(zeroboot.Entry) == set(answered(api, SANDBOX + "/files/stat", "get"))


def test_the_words_of_live_sandboxes_are_the_same(api: Any) -> None:
    outcomes = words(api, answered(api, SANDBOX + "/run", "post")["outcome"])
    assert outcomes == {*typing.get_args(CellOutcome), *typing.get_args(CommandOutcome)}
    kinds = words(api, answered(api, SANDBOX + "/files/stat", "get")["kind"])
    assert kinds == set(typing.get_args(EntryKind))
    reasons = words(api, api["components"]["schemas"]["EndReasonName"])
    assert reasons == set(typing.get_args(EndReason))


def test_every_code_that_has_a_class_is_in_the_api(api: Any) -> None:
    text = json.dumps(api)
    for code in CODE_CLASSES:
        assert f"`{code}`" in text, f"{code} is not in {FILE.name}"


def test_error_codes_are_known_where_only_the_code_tells(api: Any) -> None:
    text = json.dumps(api)
    for code in SERVER_CODES | RATE_CODES | {"unauthorized"}:
        assert f'"{code}"' in text or f"`{code}`" in text, f"{code} is not in {FILE.name}"
