"""What the two clients share: everything but the waiting.

Nothing here does I/O on the network, so the rules (what is sent, what is retried, which error it
is) are in one place and both clients follow them.
"""

from __future__ import annotations

import base64
import email.utils
import functools
import ipaddress
import json
import os
import random
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional, Union
from urllib.parse import urlsplit

import httpx

from ._errors import (
    BatchError,
    ConnectionError,
    ServerError,
    TimeoutError,
    ZerobootError,
    error_class,
    error_of,
)
from ._result import Result
from ._types import Data, Exec, FileData, Health, InputFile
from ._version import __version__

DEFAULT_BASE_URL = "http://127.0.0.1:8080"
DEFAULT_TIMEOUT = 30.0
#: The server sends a keep-alive every 15 s, so a minute of silence is a dead connection.
STREAM_SILENCE = 60.0
#: A longer Retry-After is given to the caller rather than slept through.
MAX_RETRY_WAIT = 10.0
MAX_ERROR_TEXT = 500
#: More than a socket's timeout can hold is a limit that no socket needs.
LONGEST_WAIT = 1e6


@dataclass(frozen=True)
class Config:
    base_url: str
    headers: Mapping[str, str]
    timeout: float
    grace: float
    connect_timeout: float
    max_retries: int
    has_key: bool

    def url(self, path: str) -> str:
        return self.base_url + path

    def request_timeout(self, execs: Sequence[Mapping[str, Any]], given: Optional[float]) -> float:
        """How long this client waits: as long as the execs may take, and the grace on top.

        A batch runs in parallel, but how parallel is the server's to say, so the sum is the only
        bound that is never wrong.
        """
        if given is not None:
            return given
        return float(sum(max(0.0, e["timeout_seconds"]) for e in execs)) + self.grace


def make_config(
    api_key: Optional[str],
    base_url: Optional[str],
    *,
    timeout: float,
    grace: float,
    connect_timeout: float,
    max_retries: int,
) -> Config:
    key = (api_key if api_key is not None else os.environ.get("ZEROBOOT_API_KEY", "")).strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        # Said here, without the key: the HTTP library would put it into its message.
        raise ValueError("the API key has characters that a key cannot have")
    url = base_url or os.environ.get("ZEROBOOT_BASE_URL") or DEFAULT_BASE_URL
    url = url.strip().rstrip("/")
    # An address copied from an example of the REST API.
    url = url[: -len("/v1")] if url.endswith("/v1") else url
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"the base URL must begin with http:// or https://: {url!r}")
    headers = {"User-Agent": f"zeroboot-python/{__version__}"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return Config(url, headers, timeout, grace, connect_timeout, max_retries, bool(key))


def client_options(config: Config) -> dict[str, Any]:
    """Arguments for `httpx.Client` and `httpx.AsyncClient`."""
    local = _is_loopback(urlsplit(config.base_url).hostname or "")
    return {
        # A redirect would send the code to a host that nobody named.
        "follow_redirects": False,
        # For a server on this machine, a proxy from the environment is never meant.
        "trust_env": not local,
        # Made once a process: reading the CA file costs more than an exec.
        "verify": False if local and config.base_url.startswith("http:") else _tls(),
        "limits": httpx.Limits(
            max_connections=1000, max_keepalive_connections=100, keepalive_expiry=15.0
        ),
    }


@functools.lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- requests -------------------------------------------------------------------------------


def exec_body(item: Exec, default_timeout: float) -> dict[str, Any]:
    body: dict[str, Any] = {
        "code": item.code,
        "timeout_seconds": default_timeout if item.timeout is None else item.timeout,
    }
    if item.language is not None:
        body["language"] = item.language
    if item.template is not None:
        body["template"] = item.template
    if item.stdin is not None:
        body["stdin"] = _data(item.stdin)
    if item.env:
        body["env"] = dict(item.env)
    if item.args:
        body["args"] = list(item.args)
    if item.files:
        body["files"] = {path: _file_data(content) for path, content in item.files.items()}
    if item.output_files:
        body["output_files"] = list(item.output_files)
    if item.limits:
        body["limits"] = dict(item.limits)
    return body


def batch_bodies(
    items: Iterable[Union[str, Exec]], defaults: Exec, default_timeout: float
) -> list[dict[str, Any]]:
    if isinstance(items, str):
        raise TypeError("run_batch takes a list; one piece of code goes to run")
    bodies = []
    for item in items:
        whole = replace(defaults, code=item) if isinstance(item, str) else _over(defaults, item)
        bodies.append(exec_body(whole, default_timeout))
    return bodies


def _over(defaults: Exec, item: Exec) -> Exec:
    own = {name: value for name, value in vars(item).items() if value is not None}
    if "template" in own or "language" in own:
        # The two exclude each other: the item's own choice takes the place of the batch's.
        own.setdefault("template", None)
        own.setdefault("language", None)
    return replace(defaults, **own)


def dump(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")


def _data(data: Data) -> Any:
    if isinstance(data, str):
        return data
    return {"base64": base64.b64encode(data).decode("ascii")}


def _file_data(data: FileData) -> Any:
    if isinstance(data, InputFile):
        content = _data(data.data)
        fields = {"text": content} if isinstance(content, str) else content
        return {**fields, "executable": data.executable}
    if isinstance(data, os.PathLike):
        return _data(Path(data).read_bytes())
    return _data(data)


# --- answers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def request_id(self) -> Optional[str]:
        value: Optional[str] = self.headers.get("x-request-id")
        return value

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError as e:
            raise ServerError(
                f"the answer is not JSON: {self.text()}",
                status=self.status,
                request_id=self.request_id,
                may_have_run=True,
            ) from e

    def text(self) -> str:
        text = self.body.decode("utf-8", "replace").strip()
        return text[:MAX_ERROR_TEXT] + " ..." if len(text) > MAX_ERROR_TEXT else text

    def result(self) -> Result:
        if self.status != 200:
            raise self.error()
        return Result(self._object(), self.request_id)

    def results(self, count: int, return_errors: bool) -> list[Any]:
        if self.status != 200:
            raise self.error()
        items = self._object().get("results")
        if not isinstance(items, list) or len(items) != count:
            raise ServerError(
                f"the batch has {count} items, the answer does not",
                status=self.status,
                request_id=self.request_id,
                may_have_run=True,
            )
        results = [self._item(item) for item in items]
        errors = [item for item in results if isinstance(item, ZerobootError)]
        if errors and not return_errors:
            raise BatchError(
                f"{len(errors)} of {count} items of the batch did not run; first: {errors[0]}",
                results,
                code=errors[0].code,
                request_id=self.request_id,
            )
        return results

    def fields(self) -> dict[str, Any]:
        """The JSON object of an answer that is good."""
        if not self.good:
            raise self.error()
        return self._object()

    def entries(self, name: str) -> list[dict[str, Any]]:
        """The list of objects that stands under `name`."""
        found = self.fields().get(name)
        if not isinstance(found, list) or any(not isinstance(item, dict) for item in found):
            raise ServerError(
                f"the answer has no list {name}", status=self.status, request_id=self.request_id
            )
        return found

    @property
    def good(self) -> bool:
        return 200 <= self.status < 300

    def health(self) -> Health:
        raw: Any = None
        if self.status in (200, 503):
            try:
                raw = json.loads(self.body)
            except ValueError:
                raw = None
        # A 503 with a status is an answer to the question, not a failure to answer.
        if not isinstance(raw, dict) or "status" not in raw:
            raise self.error()
        return Health(
            status=raw["status"],
            templates=raw.get("templates") or {},
            reasons=raw.get("reasons") or [],
            warnings=raw.get("warnings") or [],
            live=raw.get("live", 0),
            uptime_seconds=raw.get("uptime_seconds", 0),
            version=raw.get("version", ""),
            raw=raw,
        )

    def error(self) -> ZerobootError:
        """What this answer, which is not a 200, means."""
        message, fields = "", {}
        try:
            found = json.loads(self.body)
        except ValueError:
            message = self.text()
        else:
            if isinstance(found, dict):
                fields = found
                message = str(fields.get("error") or "")
        if 300 <= self.status < 400:
            where = self.headers.get("location", "")
            message = f"the server redirects to {where}; name that address to send code there"
        return error_of(
            self.status,
            fields,
            self.request_id,
            message=message or httpx.codes.get_reason_phrase(self.status),
            retry_after=retry_after(self.headers),
            # 500 and above without a promise: it may have run.
            may_have_run=self.status >= 500 and self.status != 503,
        )

    def _object(self) -> dict[str, Any]:
        fields = self.json()
        if not isinstance(fields, dict):
            raise ServerError(
                "the answer is not a JSON object", status=self.status, may_have_run=True
            )
        return fields

    def _item(self, item: Any) -> Union[Result, ZerobootError]:
        if isinstance(item, dict) and "error" in item and "exit_code" not in item:
            code = item.get("code")
            return error_class(None, code)(
                str(item["error"]),
                code=code,
                request_id=item.get("request_id") or self.request_id,
            )
        if not isinstance(item, dict):
            return ServerError("an item of the answer is not a JSON object", may_have_run=True)
        return Result(item, self.request_id)


def retry_after(headers: Mapping[str, str]) -> Optional[float]:
    """Seconds, from either form of the header."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


# --- one request and its retries ------------------------------------------------------------


@dataclass
class Attempts:
    """Deadline and retries of one request.

    A request is sent again only if it certainly did not run: no connection was made, or the server
    refused it (429, 503) and said when to come back.
    """

    config: Config
    #: How long one attempt may take.
    budget: float
    #: Longest silence between two reads; the budget, unless the answer is an event stream.
    silence: Optional[float] = None
    _failed: int = field(default=0, init=False)
    _deadline: float = field(default=0.0, init=False)

    def begin(self) -> httpx.Timeout:
        self._deadline = time.monotonic() + self.budget
        silence = self.budget if self.silence is None else min(self.silence, self.budget)
        bound = min(self.budget, LONGEST_WAIT)
        return httpx.Timeout(
            connect=min(self.config.connect_timeout, bound),
            read=min(silence, LONGEST_WAIT),
            write=bound if self.silence is None else min(silence, bound),
            pool=bound,
        )

    def check_deadline(self) -> None:
        """To be called at each chunk: the HTTP library limits each read, not their sum."""
        if time.monotonic() > self._deadline:
            raise self._timed_out(may_have_run=True)

    def after_error(self, error: httpx.HTTPError) -> float:
        """Seconds until the next attempt; raises if there is none."""
        unsent = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
        if unsent and self._failed < self.config.max_retries:
            return self._backoff(0.0)
        host = self.config.base_url
        if unsent:
            raise ConnectionError(
                f"no connection to {host}: {_said(error)}; {START_ONE}"
            ) from error
        if isinstance(error, httpx.PoolTimeout):
            raise self._timed_out(may_have_run=False) from error
        if isinstance(error, httpx.TimeoutException):
            raise self._timed_out(may_have_run=True) from error
        raise ConnectionError(
            f"the connection to {host} broke: {_said(error)}",
            may_have_run=not isinstance(error, (httpx.ProxyError, httpx.UnsupportedProtocol)),
        ) from error

    def after_answer(self, status: int, headers: Mapping[str, str]) -> Optional[float]:
        """Seconds until the next attempt, or None if this answer is the last word."""
        if status not in (429, 503) or self._failed >= self.config.max_retries:
            return None
        wait = retry_after(headers)
        return None if wait is None or wait > MAX_RETRY_WAIT else self._backoff(wait)

    def _backoff(self, at_least: float) -> float:
        self._failed += 1
        # Full jitter on top of what was asked for: a crowd that was refused together does not
        # come back together. Not a secret, so `random` will do.
        return at_least + random.uniform(0.0, 0.1 * 2.0**self._failed)  # noqa: S311

    def _timed_out(self, may_have_run: bool) -> TimeoutError:
        waited = self.budget if self.silence is None else min(self.silence, self.budget)
        return TimeoutError(f"no answer within {waited:g} s", may_have_run=may_have_run)


#: What to do where no server is.
START_ONE = "start a server with `zeroboot serve`, or name another in ZEROBOOT_BASE_URL or base_url"


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def stream_refused(status: int, headers: Mapping[str, str]) -> bool:
    """Whether an answer to a stream request is something else than the stream."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return status != 200 or kind != "text/event-stream"


def not_a_stream(answer: Answer) -> ZerobootError:
    if answer.status != 200:
        return answer.error()
    return ServerError(
        "the server does not stream (its answer is not text/event-stream)",
        status=answer.status,
        request_id=answer.request_id,
        may_have_run=True,
    )
