// Live sandboxes against a server that answers from a script: what is sent, and faults. What the real
// server does is tested against the real server (contract/live.test.ts).
import assert from "node:assert/strict";
import { test } from "node:test";
import type { TestContext } from "node:test";
import {
  BadRequestError,
  CellFailed,
  CommandFailed,
  ConnectionError,
  RateLimitError,
  Sandbox,
  SandboxGone,
  ServerError,
  Terminal,
  TimeoutError,
  TooManySandboxes,
} from "../src/index.js";
import type { LiveSandbox, SandboxOptions, WebSocketLike } from "../src/index.js";
import { CODE_CLASSES } from "../src/errors.js";
import { answer, drop, event, silent, sse, stub } from "./stub.js";
import type { Step, Stub } from "./stub.js";

delete process.env["ZEROBOOT_API_KEY"];
delete process.env["ZEROBOOT_BASE_URL"];

const CREATED = {
  id: "0199",
  template: "node",
  language: "node",
  isolation: "process",
  state: "running",
  created_at: "2026-11-25T00:00:00Z",
  expires_at: "2026-11-25T00:05:00Z",
  metadata: { who: "me" },
};
const COMMAND = { id: "c1", pid: 17, state: "running", argv: ["sleep"], output_offset: 5 };
const ENTRY = { path: "/home/sandbox/a", name: "a", kind: "file", size: 3, mode: "644" };
const END = { outcome: "exited", exit_code: 0 };
const none: Step = (response) => {
  response.writeHead(204);
  response.end();
};

async function live(
  t: TestContext,
  script: Step[],
  options: SandboxOptions = {},
): Promise<[Stub, LiveSandbox]> {
  const server = await stub(t, answer(201, CREATED), ...script);
  const client = new Sandbox({ baseUrl: server.url, ...options });
  const sandbox = await Sandbox.create({ client });
  server.seen.length = 0;
  return [server, sandbox];
}

/** An event with the offset to go on from. */
const at = (offset: number, name: string, fields: Record<string, unknown>): Buffer =>
  Buffer.concat([Buffer.from(`id: ${offset}\n`), event(name, fields)]);

const sent = (server: Stub): string[] => server.seen.map((it) => `${it.method} ${it.path} ${it.body}`);

test("create sends what was asked, and the end of its using ends it", async (t) => {
  const server = await stub(t, answer(201, CREATED), none);
  const client = new Sandbox("zb_live_test", server.url);
  const options = { template: "py", timeout: 600, idleTimeout: 60, env: { A: "b" } };
  const more = { metadata: { who: "me" }, limits: { memory_mb: 64 } };
  const sandbox = await Sandbox.create({ client, ...options, ...more });
  assert.equal(sandbox.id, "0199");
  assert.deepEqual(JSON.parse(server.seen[0]?.body ?? ""), {
    template: "py",
    timeout_seconds: 600,
    idle_timeout_seconds: 60,
    env: { A: "b" },
    metadata: { who: "me" },
    memory_mb: 64,
  });
  assert.equal(server.seen[0]?.headers.authorization, "Bearer zb_live_test");
  await sandbox[Symbol.asyncDispose]();
  assert.equal(sent(server)[1], "DELETE /v1/sandboxes/0199 ");
});

test("a connected sandbox outlives its using, and a list has all pages", async (t) => {
  const server = await stub(
    t,
    answer(200, CREATED),
    answer(200, { sandboxes: [CREATED], next_cursor: "c&1" }),
    answer(200, { sandboxes: [CREATED] }),
  );
  const client = new Sandbox({ baseUrl: server.url });
  await (await Sandbox.connect("01/99", { client })).close();
  assert.equal((await Sandbox.list({ client, metadata: { a: "b c" } })).length, 2);
  assert.deepEqual(sent(server), [
    "GET /v1/sandboxes/01%2F99 ",
    "GET /v1/sandboxes?metadata=a%3Db%20c ",
    "GET /v1/sandboxes?metadata=a%3Db%20c&cursor=c%261 ",
  ]);
});

test("a cell comes back with all its forms", async (t) => {
  const results = [
    { is_main: false, "text/plain": "<Figure>", "image/png": btoa("PNG") },
    { is_main: true, "text/plain": "{a: 1}", "text/html": "<b>a</b>", "application/json": { a: 1 } },
  ];
  const cell = { outcome: "ok", stdout: "out\n", stderr: "", value: "{a: 1}", results };
  const [server, sandbox] = await live(t, [answer(200, cell)]);
  const result = await sandbox.run("df", { context: "other", timeout: 2 });
  const body = '{"code":"df","timeout_seconds":2,"context":"other"}';
  assert.deepEqual(sent(server), [`POST /v1/sandboxes/0199/run ${body}`]);
  assert.equal(result.check(), result);
  assert.equal(String(result), "{a: 1}");
  const [picture, main] = result.results;
  assert.deepEqual(picture?.png, new TextEncoder().encode("PNG"));
  assert.equal(picture.html, undefined);
  assert(main?.isMain);
  assert.equal(main.html, "<b>a</b>");
  assert.deepEqual(main.json, { a: 1 });
});

test("events of a cell come whole wherever they are cut, and make the same result", async (t) => {
  const raw = Buffer.concat([
    at(0, "started", { id: "r1", pid: null }),
    at(4, "stdout", { text: "o€" }),
    at(5, "stderr", { base64: "/w==" }),
    at(6, "result", { is_main: true, "text/plain": "1" }),
    at(7, "error", { name: "E", value: "v", traceback: "t" }),
    event("brand-new", {}),
    at(7, "end", { outcome: "error", execution_count: 3 }),
  ]);
  for (const size of [1, 7, 10_000]) {
    const chunks: Buffer[] = [];
    for (let i = 0; i < raw.length; i += size) chunks.push(raw.subarray(i, i + size));
    const [, sandbox] = await live(t, [sse(chunks)]);
    const stream = sandbox.stream("x");
    const types: string[] = [];
    for await (const it of stream) types.push(it.type);
    assert.deepEqual(types, ["started", "stdout", "stderr", "result", "error", "end"]);
    const { result } = stream;
    assert.equal(result.stdout, "o€");
    assert.deepEqual(result.stderrBytes, Uint8Array.of(255));
    assert.equal(result.value, "1");
    assert.equal(result.context, "default");
    assert.throws(() => result.check(), (e) => e instanceof CellFailed && e.message.includes("E: v"));
  }
});

test("a stream that breaks off is a connection error, and a failure in it has its type", async (t) => {
  const [, cut] = await live(t, [sse([at(0, "started", { id: "1" })], "cut")]);
  await assert.rejects(cut.run("x", { onStdout: () => undefined }), ConnectionError);
  const gone = { error: "over", code: "sandbox_gone", reason: "lease_ended", request_id: "r7" };
  const [, sandbox] = await live(t, [sse([event("failure", gone)]), answer(410, gone)]);
  for (const options of [{ onStdout: (): void => undefined }, {}]) {
    await assert.rejects(sandbox.run("x", options), (e) => {
      return e instanceof SandboxGone && e.reason === "lease_ended" && e.requestId === "r7";
    });
  }
  assert.equal(await sandbox.kill(), false);
});

test("every code has its class", async (t) => {
  for (const [code, kind] of CODE_CLASSES) {
    const [, sandbox] = await live(t, [answer(409, { error: "because", code })]);
    await assert.rejects(sandbox.files.stat("x"), (e) => {
      return e instanceof kind && e.code === code && e.constructor === kind;
    });
  }
  assert(new TooManySandboxes("") instanceof RateLimitError);
});

test("commands and contexts have their routes", async (t) => {
  const context = { name: "a/b", cwd: "/", busy: false };
  const [server, sandbox] = await live(t, [
    answer(200, { ...END, exit_code: 3, stdout: "", stderr: "bad\nworse\n" }),
    answer(201, COMMAND),
    none,
    none,
    none,
    none,
    none,
    answer(201, context),
    answer(200, { contexts: [context] }),
    none,
    answer(200, context),
    none,
  ]);
  const result = await sandbox.commands.run(["ls"], { cwd: "/", stdin: Uint8Array.of(255), timeout: 4 });
  assert.throws(() => result.check(), (e) => e instanceof CommandFailed && e.message.includes("worse"));
  const command = await sandbox.commands.start("cat", { keepStdinOpen: true, tag: "web" });
  await command.write("tëxt");
  await command.closeStdin();
  await command.signal("term");
  await command.resize(100, 30);
  await command.kill();
  const made = await sandbox.contexts.create("a/b");
  assert.deepEqual(await sandbox.contexts.list(), [made]);
  await sandbox.contexts.interrupt();
  await sandbox.contexts.restart(made);
  await sandbox.contexts.delete("a/b");
  const [base, c1] = ["/v1/sandboxes/0199", "/v1/sandboxes/0199/commands/c1"];
  const start = '{"command":"cat","background":true,"keep_stdin_open":true,"tag":"web"}';
  assert.deepEqual(sent(server), [
    `POST ${base}/commands {"argv":["ls"],"cwd":"/","stdin_base64":"/w==","timeout_seconds":4}`,
    `POST ${base}/commands ${start}`,
    `POST ${c1}/stdin tëxt`,
    `POST ${c1}/stdin?end=true `,
    `POST ${c1}/signal {"signal":"SIGTERM"}`,
    `POST ${c1}/resize {"columns":100,"rows":30}`,
    `DELETE ${c1} `,
    `POST ${base}/contexts {"name":"a/b"}`,
    `GET ${base}/contexts `,
    `POST ${base}/contexts/default/interrupt `,
    `POST ${base}/contexts/a%2Fb/restart `,
    `DELETE ${base}/contexts/a%2Fb `,
  ]);
});

test("a broken output goes on where it broke, and waiting has an end", async (t) => {
  const [server, sandbox] = await live(t, [
    answer(201, COMMAND),
    sse([at(3, "stdout", { text: "one" })], "cut"),
    sse([at(9, "lost", { bytes: 3 }), at(12, "stderr", { text: "two" }), at(12, "end", END)]),
    sse([Buffer.from(": keep-alive\n\n")], "hold"),
  ]);
  const command = await sandbox.commands.start("work");
  const result = await command.wait();
  assert.deepEqual(
    [result.stdout, result.stderr, result.truncated, result.exit_code],
    ["one", "two", true, 0],
  );
  assert.deepEqual(
    server.seen.slice(1).map((it) => it.path.split("?")[1]),
    ["offset=0", "offset=3"],
  );
  const begin = Date.now();
  await assert.rejects(async () => {
    const stream = command.output(0, { timeout: 0.2 });
    while ((await stream.next()).done !== true);
  }, TimeoutError);
  assert(Date.now() - begin < 3000);
  await server.gone;
});

test("an output that breaks again and again is given up", async (t) => {
  const [server, sandbox] = await live(t, [
    answer(201, COMMAND),
    sse([], "cut"),
  ]);
  await assert.rejects((await sandbox.commands.start("work")).wait(), ConnectionError);
  assert.equal(server.seen.length, 4);
});

test("leaving the stream of a command ends it", async (t) => {
  const [server, sandbox] = await live(t, [sse([at(1, "stdout", { text: "a" })], "hold")]);
  for await (const it of sandbox.commands.stream("yes")) if (it.type === "stdout") break;
  assert.match(server.seen[0]?.body ?? "", /"end_with_client":true/);
  await server.gone;
});

test("files travel in pieces and have their routes", async (t) => {
  const [server, sandbox] = await live(t, [
    answer(200, ENTRY),
    answer(200, ENTRY),
    answer(200, ENTRY),
    answer(206, "bytes"),
    answer(200, { entries: [ENTRY] }),
    none,
    answer(200, ENTRY),
  ]);
  async function* pieces(): AsyncGenerator<Uint8Array> {
    yield new TextEncoder().encode("a");
    await Promise.resolve();
    yield new TextEncoder().encode("b");
  }
  await sandbox.files.write("a b/c?", "é", { mode: 0o755 });
  await sandbox.files.write("x", pieces());
  await sandbox.files.write("x", new Blob(["blob"]));
  assert.equal(new TextDecoder().decode(await sandbox.files.read("f", { offset: 5, length: 5 })), "bytes");
  assert.deepEqual(await sandbox.files.list(".", { depth: 2 }), [ENTRY]);
  await sandbox.files.remove("d", { recursive: true });
  await sandbox.files.chmod("b", 0o600);
  const base = "/v1/sandboxes/0199/files";
  assert.deepEqual(sent(server), [
    `PUT ${base}?path=a%20b%2Fc%3F&mode=755 é`,
    `PUT ${base}?path=x ab`,
    `PUT ${base}?path=x blob`,
    `GET ${base}?path=f `,
    `GET ${base}/list?path=.&depth=2 `,
    `DELETE ${base}?path=d&recursive=true `,
    `POST ${base}/chmod {"path":"b","mode":"600"}`,
  ]);
  assert.equal(server.seen[3]?.headers.range, "bytes=5-9");
  assert.equal(server.seen[1]?.headers["transfer-encoding"], "chunked");
  assert.throws(() => sandbox.files.stream("f", { offset: -1 }), RangeError);
});

test("pieces that were refused are not sent again", async (t) => {
  const busy = answer(503, { error: "busy", code: "busy" }, { "retry-after": "0" });
  const [server, sandbox] = await live(t, [busy, busy, answer(200, ENTRY)]);
  const stream = new Blob(["a"]).stream() as ReadableStream<Uint8Array>;
  await assert.rejects(sandbox.files.write("x", stream), ServerError);
  assert.equal(server.seen.length, 1, "half of it would be missing");
  await sandbox.files.write("x", "a");
  assert.equal(server.seen.length, 3);
});

test("a watch listens from the call on and can be left", async (t) => {
  const changes = [event("watching", {}), event("created", { path: "/a" }), event("overflow", {})];
  const [server, sandbox] = await live(t, [sse(changes, "hold")]);
  const watch = await sandbox.files.watch("d", { recursive: true });
  assert.equal(server.seen[0]?.path, "/v1/sandboxes/0199/files/watch?path=d&recursive=true");
  assert.deepEqual((await watch.next()).value, { kind: "created", path: "/a" });
  assert.deepEqual((await watch.next()).value, { kind: "overflow", path: "" });
  await watch.close();
  await server.gone;
});

test("a call that is not answered is given up", async (t) => {
  const [server, sandbox] = await live(t, [silent], { grace: 0.2 });
  await assert.rejects(sandbox.run("x", { timeout: 0.1 }), TimeoutError);
  await server.gone;
  const [, dropped] = await live(t, [drop]);
  await assert.rejects(dropped.run("x"), (e) => e instanceof ConnectionError && e.mayHaveRun);
});

test("an answer without its fields is a server error", async (t) => {
  const [, sandbox] = await live(t, [answer(200, {})]);
  const calls: (() => Promise<unknown>)[] = [
    () => sandbox.run("x"),
    () => sandbox.commands.run("x"),
    () => sandbox.commands.start("x"),
    () => sandbox.commands.list(),
    () => sandbox.contexts.create(),
    () => sandbox.files.stat("x"),
    () => sandbox.files.list(),
    () => sandbox.refresh(),
  ];
  for (const call of calls) await assert.rejects(call(), ServerError, String(call));
});

test("branches are sandboxes of their own", async (t) => {
  const branches = ["b0", "b1"].map((id) => ({ ...CREATED, id, branch_of: "0199" }));
  const [server, sandbox] = await live(t, [answer(201, { sandboxes: branches }), none]);
  const made = await sandbox.branch(2, { timeout: 60, metadata: { try: "1" } });
  assert.deepEqual(
    made.map((branch) => [branch.id, branch.info.branch_of]),
    [
      ["b0", "0199"],
      ["b1", "0199"],
    ],
  );
  assert.equal(await made[1]?.kill(), true);
  const [asked, ended] = server.seen;
  assert.deepEqual([asked?.method, asked?.path], ["POST", "/v1/sandboxes/0199/branch"]);
  assert.deepEqual(JSON.parse(asked?.body ?? ""), {
    count: 2,
    timeout_seconds: 60,
    metadata: { try: "1" },
  });
  assert.equal(ended?.path, "/v1/sandboxes/b1");
});

const CHECKPOINT = {
  id: "c/1",
  sandbox_id: "0199",
  parent_id: null,
  template: "python",
  created_at: "2026-01-02T03:04:05Z",
  expires_at: "2026-01-02T04:04:05Z",
  metadata: { step: "1" },
  memory_bytes: 4096,
};

test("a checkpoint is made, listed, restored, gone back to and removed", async (t) => {
  const back = { ...CREATED, checkpoint_id: "c/1" };
  const [server, sandbox] = await live(t, [
    answer(201, CHECKPOINT),
    answer(200, { checkpoints: [CHECKPOINT] }),
    answer(201, { sandboxes: [{ ...CREATED, id: "r0", branch_of: "0199" }] }),
    answer(200, back),
    answer(200, back),
    none,
    answer(404, { error: "No checkpoint has this id", code: "checkpoint_not_found" }),
  ]);
  const kept = await sandbox.checkpoint({ timeout: 60, metadata: { step: "1" } });
  assert.deepEqual(kept, CHECKPOINT);
  assert.deepEqual(await sandbox.checkpoints(), [CHECKPOINT]);
  const restored = await sandbox.restore(kept, 1, { timeout: 9 });
  assert.deepEqual(
    restored.map((one) => one.id),
    ["r0"],
  );
  assert.equal((await sandbox.rollback()).checkpoint_id, "c/1");
  assert.equal((await sandbox.rollback(kept)).id, "0199");
  await sandbox.removeCheckpoint("c/1");
  await assert.rejects(sandbox.removeCheckpoint(kept), /No checkpoint/);
  assert.deepEqual(
    server.seen.map((seen) => `${seen.method} ${seen.path}`),
    [
      "POST /v1/sandboxes/0199/checkpoints",
      "GET /v1/checkpoints?sandbox_id=0199",
      "POST /v1/checkpoints/c%2F1/restore",
      "POST /v1/sandboxes/0199/rollback",
      "POST /v1/sandboxes/0199/rollback",
      "DELETE /v1/checkpoints/c%2F1",
      "DELETE /v1/checkpoints/c%2F1",
    ],
  );
  const body = (at: number): unknown => JSON.parse(server.seen[at]?.body ?? "");
  assert.deepEqual(body(0), { timeout_seconds: 60, metadata: { step: "1" } });
  assert.deepEqual(body(2), { count: 1, timeout_seconds: 9 });
  assert.deepEqual([body(3), body(4)], [{}, { checkpoint_id: "c/1" }]);
});

test("a promoted branch is asked under its origin's id", async (t) => {
  const [server, sandbox] = await live(t, [answer(200, { ...CREATED, id: "origin" }), none]);
  assert.equal((await sandbox.promote()).id, "origin");
  assert.equal(await sandbox.kill(), true);
  assert.deepEqual(
    server.seen.map((seen) => seen.path),
    ["/v1/sandboxes/0199/promote", "/v1/sandboxes/origin"],
  );
});

test("a branch of the process engine is refused with the reason", async (t) => {
  const refusal = { error: "only a sandbox of the VM engine can", code: "needs_vm_engine" };
  const [, sandbox] = await live(t, [answer(501, refusal)]);
  await assert.rejects(sandbox.branch(), (error: ServerError) => {
    assert.ok(error instanceof ServerError && error.message.includes("VM engine"));
    return error.code === "needs_vm_engine";
  });
});

class FakeSocket extends EventTarget implements WebSocketLike {
  binaryType = "blob";
  sent: (string | Uint8Array)[] = [];
  closed = false;
  send(data: string | Uint8Array): void {
    this.sent.push(data);
  }
  close(): void {
    this.closed = true;
    this.dispatchEvent(new Event("close"));
  }
  tell(data: string | Uint8Array): void {
    this.dispatchEvent(Object.assign(new Event("message"), { data }));
  }
}

test("a terminal talks both ways over the WebSocket that it is given", async (t) => {
  const socket = new FakeSocket();
  let asked = "";
  const webSocket = (url: string): WebSocketLike => {
    asked = url;
    setTimeout(() => socket.dispatchEvent(new Event("open")), 5);
    return socket;
  };
  const [server, sandbox] = await live(t, [], { webSocket });
  const terminal = await sandbox.terminal("bash -l", { columns: 100, rows: 30 });
  assert(terminal instanceof Terminal);
  const query = "columns=100&rows=30&command=bash%20-l&end_with_client=true";
  assert.equal(asked, `${server.url.replace("http", "ws")}/v1/sandboxes/0199/terminal?${query}`);
  socket.tell('{"started":{"id":"c1","pid":9}}');
  socket.tell(new TextEncoder().encode("$ "));
  assert.equal(new TextDecoder().decode(await terminal.read()), "$ ");
  assert.deepEqual(terminal.started, { id: "c1", pid: 9 });
  await assert.rejects(terminal.read(0.05), TimeoutError);
  terminal.send("exit\r");
  terminal.resize(80, 24);
  terminal.signal("INT");
  assert.deepEqual(socket.sent.slice(1), ['{"resize":{"columns":80,"rows":24}}', '{"signal":"SIGINT"}']);
  setTimeout(() => {
    socket.tell('{"exit":{"outcome":"exited","exit_code":3}}');
    socket.close();
  }, 5);
  assert.equal((await terminal.wait()).exit_code, 3);
  assert.equal(await terminal.read(), undefined);
  assert.throws(() => {
    terminal.send("late");
  }, ConnectionError);
});

test("a terminal that cannot be opened says why", async (t) => {
  const webSocket = (): WebSocketLike => {
    const socket = new FakeSocket();
    setTimeout(() => socket.dispatchEvent(new Event("error")), 5);
    return socket;
  };
  const [, sandbox] = await live(
    t,
    [answer(410, { error: "over", code: "sandbox_gone" }), answer(400, { code: "not_a_websocket" })],
    { webSocket },
  );
  await assert.rejects(sandbox.terminal(), SandboxGone);
  await assert.rejects(sandbox.terminal(), ConnectionError);
  await assert.rejects(sandbox.terminal(undefined, { columns: 0 }), RangeError);
  const [, other] = await live(t, [answer(404, { error: "no", code: "sandbox_not_found" })]);
  await assert.rejects(other.terminal(), BadRequestError);
});
