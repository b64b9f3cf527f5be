"""Run code that nobody vouches for, each time in a sandbox of its own.

from zeroboot import Sandbox

print(Sandbox().run("print(1 + 1)"))  # "2"
"""

from ._async import AsyncExecStream, AsyncSandbox
from ._errors import (
    AuthenticationError,
    BadRequestError,
    BatchError,
    ConnectionError,
    ExecutionError,
    RateLimitError,
    ServerError,
    TimeoutError,
    ZerobootError,
)
from ._events import End, Event, File, Start, Stderr, Stdout
from ._result import OutputFile, Result
from ._sync import ExecStream, Sandbox
from ._types import (
    Data,
    Exec,
    FileData,
    Health,
    HealthStatus,
    InputFile,
    Isolation,
    Language,
    Limits,
    Outcome,
    TemplateHealth,
)
from ._version import __version__

__all__ = [
    "AsyncExecStream",
    "AsyncSandbox",
    "AuthenticationError",
    "BadRequestError",
    "BatchError",
    "ConnectionError",
    "Data",
    "End",
    "Event",
    "Exec",
    "ExecStream",
    "ExecutionError",
    "File",
    "FileData",
    "Health",
    "HealthStatus",
    "InputFile",
    "Isolation",
    "Language",
    "Limits",
    "Outcome",
    "OutputFile",
    "RateLimitError",
    "Result",
    "Sandbox",
    "ServerError",
    "Start",
    "Stderr",
    "Stdout",
    "TemplateHealth",
    "TimeoutError",
    "ZerobootError",
    "__version__",
]
