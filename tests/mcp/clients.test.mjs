// The official TypeScript clients, both generations, and the inspector's command line: the tools over both transports.
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { test } from "node:test";
import { promisify } from "node:util";

import * as second from "@modelcontextprotocol/client";
import { StdioClientTransport } from "@modelcontextprotocol/client/stdio";
import { Client as FirstClient } from "@modelcontextprotocol/sdk/client/index.js";
import { StdioClientTransport as FirstStdio } from "@modelcontextprotocol/sdk/client/stdio.js";
import { StreamableHTTPClientTransport as FirstHttp } from "@modelcontextprotocol/sdk/client/streamableHttp.js";

const { ZEROBOOT_BASE_URL, ...env } = process.env; // on standard input and output with a server of its own
const { ZEROBOOT_BIN, ZEROBOOT_API_KEY, INSPECTOR } = env;
const TOOLS = "create_sandbox exec fork_sandbox kill_sandbox read_file run_code run_parallel write_file".split(" ");
const url = new URL("/mcp", ZEROBOOT_BASE_URL);
const authorization = `Bearer ${ZEROBOOT_API_KEY}`;
const program = { command: ZEROBOOT_BIN, args: ["mcp"], env, stderr: "ignore" };
const headers = { requestInit: { headers: { authorization } } };

const CLIENTS = [
  ["second generation, stdio", second.Client, () => new StdioClientTransport(program)],
  ["second generation, HTTP", second.Client, () => new second.StreamableHTTPClientTransport(url, headers)],
  ["first generation, stdio", FirstClient, () => new FirstStdio(program)],
  ["first generation, HTTP", FirstClient, () => new FirstHttp(url, headers)],
];

for (const [name, Client, transport] of CLIENTS) {
  test(`the tools work: ${name}`, async () => {
    const client = new Client({ name: "test", version: "1" });
    const connection = transport();
    await client.connect(connection);
    const call = (tool, args) => client.callTool({ name: tool, arguments: args });
    assert.deepEqual((await client.listTools()).tools.map((tool) => tool.name).sort(), TOOLS);
    const done = await call("run_code", { code: "print('hello'); 6 * 7" });
    assert.match(done.content[0].text, /^hello\n/);
    assert.equal(done.structuredContent.value, "42");
    const failed = await call("run_code", { code: "1 / 0" });
    assert.ok(failed.isError && failed.content.some((part) => part.text?.includes("ZeroDivisionError")));

    const { sandbox_id } = (await call("create_sandbox", {})).structuredContent;
    await call("write_file", { sandbox_id, path: "a.txt", content: "some words\n" });
    const command = await call("exec", { sandbox_id, command: "cat a.txt; exit 3" });
    assert.equal(command.structuredContent.exit_code, 3);
    const { resources } = await client.listResources();
    const uri = resources.map((resource) => resource.uri).find((one) => one.endsWith("/a.txt"));
    assert.equal((await client.readResource({ uri })).contents[0].text, "some words\n");
    const missing = await call("read_file", { sandbox_id, path: "nothing" });
    assert.ok(missing.isError && missing.content[0].text.startsWith("file_not_found"));
    assert.ok(!(await call("kill_sandbox", { sandbox_id })).isError);
    await connection.terminateSession?.();
    await client.close();
  });
}

test("the inspector takes the tools, and finds nothing that a model could not", async () => {
  const inspect = async (...args) => {
    const command = ["--cli", ZEROBOOT_BIN, "mcp", "--method", ...args];
    const { stdout, stderr } = await promisify(execFile)(INSPECTOR, command, { env });
    return { ...JSON.parse(stdout), stderr };
  };
  const { tools, stderr } = await inspect("tools/list", "--strict");
  assert.doesNotMatch(stderr, /Warning: tool|portability/);
  assert.deepEqual(tools.map((tool) => tool.name).sort(), TOOLS);
  const done = await inspect("tools/call", "--tool-name", "run_code", "--tool-arg", "code=print(6*7)");
  assert.equal(done.content[0].text, "42\n");
  assert.deepEqual((await inspect("resources/list")).resources, []);
});
