// Against a real server: `sdk/with_server.py -- npm run test:contract`.
import assert from "node:assert/strict";
import { test } from "node:test";
import {
  AuthenticationError,
  BadRequestError,
  BatchError,
  ExecutionError,
  Sandbox,
} from "../src/index.js";
import type { ExecEvent } from "../src/index.js";

const baseUrl = process.env["ZEROBOOT_BASE_URL"];
assert(baseUrl, "no server: run this with sdk/with_server.py");
const sandbox = new Sandbox();

/** The Python template is the one that every server has. */
const python = { language: "python" } as const;

async function live(): Promise<number> {
  return (await sandbox.health()).live;
}

async function noneIsLive(): Promise<void> {
  const end = Date.now() + 5000;
  while ((await live()) > 0) {
    assert(Date.now() < end, "execs still run");
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

test("JavaScript runs without a word about the language", async (t) => {
  const { templates } = await sandbox.health();
  if (!Object.values(templates).some((it) => it.language === "node")) {
    assert.notEqual(process.env["ZEROBOOT_REQUIRE_NODE"], "1", "no node template");
    t.skip("the server has no node template");
    return;
  }
  const result = await sandbox.run("console.log(1 + 1)");
  assert.equal(String(result), "2");
  assert.equal(result.stdout, "2\n");
  assert.equal(result.language, "node");
  assert(result.ok && result.requestId !== undefined && result.total_time_ms > 0);
});

test("code that fails is a result", async () => {
  const result = await sandbox.run("1/0", python);
  assert.equal(result.exit_code, 1);
  assert.throws(
    () => result.check(),
    (e) => e instanceof ExecutionError && e.message.includes("ZeroDivisionError"),
  );
});

test("a passed deadline is a result", async () => {
  const result = await sandbox.run("while True: pass", { ...python, timeout: 0.5 });
  assert.equal(result.outcome, "deadline_passed");
});

test("input arrives, bytes and files come back exactly", async () => {
  const code = `
import os, sys
data = sys.stdin.buffer.read()
open("out.bin", "wb").write(data + open("in/a.txt", "rb").read())
sys.stdout.buffer.write(b"\\xff")
print(os.environ["WHO"], sys.argv[1:], os.access("x.sh", os.X_OK))
`;
  const result = await sandbox.run(code, {
    ...python,
    stdin: Uint8Array.of(0, 255),
    env: { WHO: "me" },
    args: ["é"],
    files: { "in/a.txt": "tëxt", "x.sh": { data: "#!", executable: true } },
    outputFiles: ["out.bin", "missing"],
  });
  assert.equal(result.check().encoding.stdout, "base64");
  assert.equal(Buffer.from(result.stdoutBytes).subarray(1).toString(), "me ['é'] True\n");
  const expected = Buffer.concat([Buffer.of(0, 255), Buffer.from("tëxt")]);
  assert.deepEqual(Buffer.from(result.files["out.bin"]?.bytes() ?? []), expected);
  assert.equal(result.files["missing"]?.ok, false);
});

test("events come while the code runs, and make the same result", async () => {
  const code = "import time\nprint('one', flush=True)\ntime.sleep(0.5)\nprint('two')";
  const at: number[] = [];
  const events: ExecEvent[] = [];
  const stream = sandbox.stream(code, python);
  for await (const event of stream) {
    if (event.type === "stdout") at.push(Date.now());
    events.push(event);
  }
  assert.equal(events[0]?.type, "start");
  assert.equal(events.at(-1)?.type, "end");
  assert.equal(stream.result.stdout, "one\ntwo\n");
  assert(at.length === 2 && (at[1] ?? 0) - (at[0] ?? 0) > 200, String(at));
  const heard: string[] = [];
  const result = await sandbox.run("print('a')", {
    ...python,
    onStdout: (text) => heard.push(text),
  });
  assert.equal(heard.join(""), result.stdout);
});

test("leaving a loop and aborting end the sandbox", async () => {
  const code = "import time\nprint('up', flush=True)\ntime.sleep(25)";
  for await (const event of sandbox.stream(code, python)) if (event.type === "stdout") break;
  await noneIsLive();
  const controller = new AbortController();
  const run = sandbox.run(code, { ...python, signal: controller.signal });
  const end = Date.now() + 5000;
  while ((await live()) === 0 && Date.now() < end) await new Promise((r) => setTimeout(r, 20));
  controller.abort();
  await assert.rejects(run, { name: "AbortError" });
  await noneIsLive();
});

test("a batch keeps its order, each item its own result or error", async () => {
  const results = await sandbox.runBatch(
    ["import time; time.sleep(0.2); print('a')", { code: "print(input())", stdin: "b" }, "1/0"],
    python,
  );
  assert.deepEqual(results.map(String), ["a", "b", ""]);
  assert.equal(results[2]?.exit_code, 1);
  const mixed = sandbox.runBatch(["print(1)", { code: "x", template: "no-such-one" }], python);
  await assert.rejects(mixed, (e) => {
    assert(e instanceof BatchError && e.code === "unknown_template");
    assert.equal(String(e.results[0]), "1");
    return true;
  });
});

test("mistakes are refused with a type and a code", async () => {
  await assert.rejects(sandbox.run("x", { ...python, timeout: -1 }), (e) => {
    assert(e instanceof BadRequestError && e.code === "invalid_timeout");
    return true;
  });
  const stranger = new Sandbox("zb_live_wrong", baseUrl);
  await assert.rejects(stranger.run("x", python), AuthenticationError);
  const events = stranger.stream("x", python);
  await assert.rejects(events.next(), AuthenticationError);
});

test("health and metrics", async () => {
  const health = await sandbox.health();
  assert((await sandbox.metrics()).includes("zeroboot_total_executions"));
  assert(health.ok && health.templates["python"]?.ready === true);
});
