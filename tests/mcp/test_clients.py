"""The official Python client: the tools over both transports."""

import asyncio
import os
from contextlib import asynccontextmanager

import pytest
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import create_mcp_http_client, streamable_http_client

TOOLS = "create_sandbox exec fork_sandbox kill_sandbox read_file run_code run_parallel write_file".split()


@asynccontextmanager
async def over_stdio():
    # With a server of its own.
    env = {name: value for name, value in os.environ.items() if name != "ZEROBOOT_BASE_URL"}
    program = StdioServerParameters(command=os.environ["ZEROBOOT_BIN"], args=["mcp"], env=env)
    async with stdio_client(program) as (read, write), ClientSession(read, write) as session:
        await session.initialize()
        yield session


@asynccontextmanager
async def over_http():
    headers = {"Authorization": f"Bearer {os.environ['ZEROBOOT_API_KEY']}"}
    async with create_mcp_http_client(headers=headers) as http:
        url = os.environ["ZEROBOOT_BASE_URL"] + "/mcp"
        async with streamable_http_client(url, http_client=http) as (read, write, *_):
            async with ClientSession(read, write) as session:
                await session.initialize()
                yield session


def text(result):
    return "".join(part.text for part in result.content if part.type == "text")


async def use(session):
    assert sorted(tool.name for tool in (await session.list_tools()).tools) == TOOLS
    done = await session.call_tool("run_code", {"code": "print('hello'); 6 * 7"})
    assert not done.is_error and text(done).startswith("hello\n")
    assert done.structured_content["value"] == "42"
    failed = await session.call_tool("run_code", {"code": "1 / 0"})
    assert failed.is_error and "ZeroDivisionError" in text(failed)
    several = {"programs": [{"code": f"print('answer', {number} ** 2)"} for number in range(4)]}
    answers = text(await session.call_tool("run_parallel", several))
    places = [answers.index(f"answer {number**2}\n") for number in range(4)]
    assert places == sorted(places)

    sandbox = (await session.call_tool("create_sandbox", {})).structured_content["sandbox_id"]
    of = {"sandbox_id": sandbox}
    await session.call_tool("run_code", of | {"code": "x = 41"})
    assert (await session.call_tool("run_code", of | {"code": "x + 1"})).structured_content["value"] == "42"
    written = await session.call_tool("write_file", of | {"path": "data/a.txt", "content": "some words\n"})
    assert not written.is_error
    command = await session.call_tool("exec", of | {"command": "cat data/a.txt; exit 3"})
    assert text(command).startswith("some words\n") and command.structured_content["exit_code"] == 3
    assert text(await session.call_tool("read_file", of | {"path": "data/a.txt"})) == "some words\n"
    uris = [str(resource.uri) for resource in (await session.list_resources()).resources]
    uri = next(uri for uri in uris if uri.endswith("/data/a.txt"))
    assert (await session.read_resource(uri)).contents[0].text == "some words\n"

    missing = await session.call_tool("read_file", of | {"path": "nothing"})
    assert missing.is_error and text(missing).startswith("file_not_found")
    forked = await session.call_tool("fork_sandbox", of)
    assert forked.is_error and text(forked).startswith("needs_vm_engine")
    heard = []

    async def hear(progress, total, message):
        heard.append(progress)

    slow = {"code": "import time; time.sleep(2.5); print('late')"}
    assert text(await session.call_tool("run_code", slow, progress_callback=hear)).startswith("late")
    assert heard == sorted(heard) and len(heard) >= 2
    assert not (await session.call_tool("kill_sandbox", of)).is_error
    assert (await session.call_tool("run_code", of | {"code": "x"})).is_error


@pytest.mark.parametrize("transport", [over_stdio, over_http])
def test_the_tools_work(transport, caplog):
    async def all_of_it():
        async with transport() as session:
            await use(session)

    asyncio.run(all_of_it())
    # Such as a session that would not end.
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
