from __future__ import annotations

import base64
import copy
import json
import pickle
from typing import Any

import pytest
from stub import OK

from zeroboot import ExecutionError, Result, ServerError, ZerobootError


def make(**fields: Any) -> Result:
    return Result({**OK, **fields}, "req")


def test_a_result_is_its_output_without_the_final_newline() -> None:
    for stdout, text in (("2\n", "2"), ("2", "2"), ("a\n\n", "a\n"), ("a\r\n", "a"), ("", "")):
        result = make(stdout=stdout)
        assert str(result) == f"{result}" == text and result == text
        assert result.stdout == result.output == stdout


def test_a_result_goes_where_a_string_goes() -> None:
    result = make()
    assert json.dumps({"output": result}) == '{"output": "2"}'
    assert str({"success": True, "output": result}) == "{'success': True, 'output': '2'}"
    assert isinstance(result, str) and int(result) == 2


def test_a_failure_does_not_look_like_an_empty_string() -> None:
    result = make(stdout="", exit_code=1, stderr="NameError: x")
    assert "exit_code=1" in repr(result) and "NameError" in repr(result)


def test_every_field_of_the_answer_is_there() -> None:
    result = make()
    for name, value in OK.items():
        assert getattr(result, name) == value, name
    assert make(brand_new=1).raw["brand_new"] == 1
    assert make().to_dict() == OK


def test_bytes_that_are_no_text_are_exact() -> None:
    data = b"\xff\x00ok"
    result = make(
        stdout=base64.b64encode(data).decode(), encoding={"stdout": "base64", "stderr": "utf-8"}
    )
    assert result.stdout_bytes == data and result.stdout == "\ufffd\x00ok"
    assert result.stderr_bytes == b""
    with pytest.raises(ServerError):
        make(stdout="***", encoding={"stdout": "base64"})


def test_files_come_back_as_bytes_or_text_or_an_error() -> None:
    result = make(
        files={"a": {"text": "é"}, "b": {"base64": "/w=="}, "c": {"error": "no such file"}}
    )
    assert result.files["a"].read_text() == "é" and result.files["b"].data == b"\xff"
    assert result.files["a"].ok and not result.files["c"].ok
    with pytest.raises(ZerobootError, match="c: no such file"):
        result.files["c"].read_bytes()


def test_ok_means_ended_by_itself_with_zero() -> None:
    assert make().ok and make().check() == "2"
    for fields in ({"exit_code": 3}, {"outcome": "deadline_passed"}, {"outcome": "signaled"}):
        result = make(**fields)
        assert not result.ok
        with pytest.raises(ExecutionError):
            result.check()


def test_a_short_answer_of_an_older_server_is_enough() -> None:
    result = Result({"id": "1", "stdout": "x\n", "stderr": "", "exit_code": 0})
    assert result == "x" and result.ok and result.files == {}


def test_a_result_survives_pickle_and_copy() -> None:
    for twin in (pickle.loads(pickle.dumps(make())), copy.copy(make()), copy.deepcopy(make())):
        assert twin == "2" and twin.stdout == "2\n" and twin.request_id == "req"
