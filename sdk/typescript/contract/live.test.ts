// Live sandboxes against a real server: `sdk/with_server.py -- npm run test:contract`.
import assert from "node:assert/strict";
import { after, test } from "node:test";
import {
  BadRequestError,
  CannotStart,
  CommandNotFound,
  ContextExists,
  ContextNotFound,
  FileNotFound,
  NotAllowed,
  NotEmpty,
  RunEnded,
  Sandbox,
  SandboxGone,
  SandboxNotFound,
  WrongKind,
} from "../src/index.js";
import { WebSocket } from "ws";
import type { CreateOptions, LiveSandbox } from "../src/index.js";

const client = new Sandbox();
const made: LiveSandbox[] = [];
after(async () => {
  for (const sandbox of made) await sandbox.kill();
});

async function create(options: CreateOptions = {}): Promise<LiveSandbox> {
  const sandbox = await Sandbox.create({ client, language: "python", timeout: 120, ...options });
  made.push(sandbox);
  return sandbox;
}

test("state is kept, errors leave it usable, results have their forms", async () => {
  const sb = await create();
  assert.equal((await sb.run("x = 41")).check().value, undefined);
  const result = await sb.run("print('out'); x + 1");
  assert.deepEqual([result.value, result.stdout, result.context], ["42", "out\n", "default"]);
  const failed = await sb.run("1/0");
  assert.equal(failed.error?.name, "ZeroDivisionError");
  assert.match(failed.error.traceback, /1\/0/);
  const shown = await sb.run(
    "class S:\n def _repr_html_(self): return '<b>'\n def _repr_png_(self): return b'PNG'\n" +
      " def _repr_json_(self): return {'a': 1}\nS()",
  );
  assert.equal(shown.results[0]?.html, "<b>");
  assert.equal(Buffer.from(shown.results[0].png ?? []).toString(), "PNG");
  assert.deepEqual(shown.results[0].json, { a: 1 });
  assert.equal((await (await Sandbox.connect(sb.id, { client })).run("x")).value, "41");
});

test("JavaScript keeps its state, too", async (t) => {
  const { templates } = await client.health();
  if (!Object.values(templates).some((it) => it.language === "node")) {
    assert.notEqual(process.env["ZEROBOOT_REQUIRE_NODE"], "1", "no node template");
    t.skip("the server has no node template");
    return;
  }
  const sb = await Sandbox.create({ client, timeout: 60 });
  made.push(sb);
  assert.equal(sb.info.language, "node");
  await sb.run("let x = await Promise.resolve(41)");
  assert.equal((await sb.run("x + 1")).check().value, "42");
});

test("a cell streams, is interrupted, and its callbacks hear it", async () => {
  const sb = await create();
  const stream = sb.stream("import time\nprint('up', flush=True)\ntime.sleep(60)");
  for await (const event of stream) if (event.type === "stdout") await sb.contexts.interrupt();
  assert.equal(stream.result.outcome, "interrupted");
  const heard: string[] = [];
  const result = await sb.run("print('a'); 3", { onStdout: (text) => heard.push(text) });
  assert.deepEqual([heard.join(""), result.value], ["a\n", "3"]);
  assert.equal((await sb.run("while True: pass", { timeout: 0.5 })).outcome, "deadline_passed");
});

test("contexts are apart", async () => {
  const sb = await create();
  const other = await sb.contexts.create("other", { cwd: "/tmp" });
  await sb.run("x = 1");
  await sb.run("x = 2", { context: other });
  assert.equal((await sb.run("x")).value, "1");
  assert.equal((await sb.run("x", { context: "other" })).value, "2");
  assert.equal((await sb.contexts.list()).length, 2);
  await assert.rejects(sb.contexts.create("other"), ContextExists);
  await sb.contexts.restart("other");
  assert.equal((await sb.run("x", { context: "other" })).error?.name, "NameError");
  await sb.contexts.delete("other");
  await assert.rejects(sb.run("1", { context: "other" }), ContextNotFound);
});

test("commands run, are left and found again, written to and signalled", async () => {
  const sb = await create();
  const line = 'echo "$A $(pwd)"; cat; echo err >&2; exit 3';
  const options = { cwd: "/tmp", env: { A: "b" }, stdin: Uint8Array.of(255) };
  const result = await sb.commands.run(["sh", "-c", line], options);
  assert.deepEqual([...result.stdoutBytes.slice(-1)], [255]);
  assert.deepEqual([result.stderr, result.exit_code], ["err\n", 3]);
  await assert.rejects(sb.commands.run(["no-such-program"]), CannotStart);
  assert.equal((await sb.commands.run("sleep 60", { timeout: 0.3 })).exit_code, 124);

  const slow = await sb.commands.start("for i in 1 2 3 4; do echo $i; sleep 0.1; done", { tag: "t" });
  for await (const event of slow.output()) if (event.type === "stdout") break;
  assert.equal((await (await sb.commands.connect(slow.id)).wait()).stdout, "1\n2\n3\n4\n");
  assert.equal((await sb.commands.list()).find((it) => it.tag === "t")?.id, slow.id);

  const cat = await sb.commands.start("cat; exit 5", { keepStdinOpen: true });
  await cat.write("tëxt");
  await cat.closeStdin();
  const done = await cat.wait();
  assert.deepEqual([done.stdout, done.exit_code], ["tëxt", 5]);
  await assert.rejects(cat.write("late"), RunEnded);
  const sleep = await sb.commands.start("sleep 60");
  await sleep.signal("TERM");
  assert.equal((await sleep.wait()).exit_code, 143);
  await assert.rejects(sb.commands.connect(sb.id), CommandNotFound);

  const controller = new AbortController();
  const aborted = sb.commands.run("touch began; sleep 60; touch not", { signal: controller.signal });
  while (!(await sb.files.exists("began")));
  controller.abort();
  await assert.rejects(aborted, { name: "AbortError" });
});

test("files go in and come out in pieces, are listed, moved, removed and watched", async () => {
  const sb = await create();
  const watch = await sb.files.watch(".");
  const entry = await sb.files.write("a.txt", "tëxt", { mode: 0o755 });
  assert.deepEqual([entry.size, entry.mode], [5, "755"]);
  const change = await watch.next();
  assert.match(change.value?.path ?? "", /a\.txt$/);
  await watch.close();
  assert.equal(await sb.files.readText("a.txt"), "tëxt");
  async function* pieces(): AsyncGenerator<Uint8Array> {
    for (let i = 0; i < 30; i += 1) {
      await Promise.resolve();
      yield new Uint8Array(100_000).fill(i);
    }
  }
  assert.equal((await sb.files.write("big", pieces())).size, 3_000_000);
  assert.deepEqual([...(await sb.files.read("big", { offset: 99_999, length: 2 }))], [0, 1]);
  assert.equal((await sb.files.read("big")).length, 3_000_000);
  await sb.files.mkdir("d/e");
  await sb.files.move("a.txt", "d/b.txt");
  const names = (await sb.files.list("d")).map((it) => `${it.name} ${it.kind}`).sort();
  assert.deepEqual(names, ["b.txt file", "e directory"]);
  assert.equal((await sb.files.chmod("d/b.txt", "600")).mode, "600");
  await assert.rejects(sb.files.remove("d"), NotEmpty);
  await sb.files.remove("d", { recursive: true });
  assert.equal(await sb.files.exists("d"), false);
  await assert.rejects(sb.files.read("missing"), FileNotFound);
  await assert.rejects(sb.files.read("."), WrongKind);
  await assert.rejects(sb.files.write("/usr/x", "x"), NotAllowed);
});

test("a terminal is one", async () => {
  const sb = await create();
  const line = "stty size; read line; stty size; echo got $line; exit 5";
  const terminal = await sb.terminal(line, { columns: 100, rows: 30 });
  let shown = "";
  const show = (bytes: Uint8Array | undefined): void => {
    shown += new TextDecoder().decode(bytes);
  };
  while (!shown.includes("30 100")) show(await terminal.read(30));
  terminal.resize(90, 20);
  terminal.send("typed\r");
  assert.equal((await terminal.wait((text) => (shown += text))).exit_code, 5);
  assert.match(shown, /20 90/);
  assert.match(shown, /got typed/);
  const own = new Sandbox({ webSocket: (url, headers) => new WebSocket(url, { headers }) });
  const over = await (await Sandbox.connect(sb.id, { client: own })).terminal("exit 4");
  assert.equal((await over.wait()).exit_code, 4);

  const left = await sb.terminal("echo up; sleep 60");
  while (left.started === undefined) await left.read(30);
  await left.close();
  const ended = await (await sb.commands.connect(left.started.id)).wait();
  assert(ended.outcome === "closed" || ended.outcome === "signaled", ended.outcome);
  const command = await sb.commands.start("read x; echo $x", { terminal: { columns: 80, rows: 24 } });
  const attached = await command.terminal();
  attached.send("hi\r");
  assert.equal((await attached.wait()).exit_code, 0);
  await assert.rejects((await sb.commands.start("sleep 9")).terminal(), BadRequestError);
});

test("leases are extended and end, and what is gone says why", async () => {
  const sb = await create({ timeout: 30, metadata: { n: "ts" }, env: { WHO: "me" }, limits: { memory_mb: 256 } });
  assert.equal((await sb.run("import os; os.environ['WHO']")).value, "'me'");
  assert.equal(sb.info.limits["memory_mb"], 256);
  const before = Date.parse(sb.info.expires_at);
  assert(Date.parse((await sb.extend(90)).expires_at) - before > 50_000);
  const found = await Sandbox.list({ client, metadata: { n: "ts" } });
  assert.deepEqual(found.map((it) => it.id), [sb.id]);
  assert.equal(await sb.kill(), true);
  assert.equal(await sb.kill(), false);
  await assert.rejects(sb.run("1"), (e) => e instanceof SandboxGone && e.reason === "requested");
  await assert.rejects(sb.terminal(), SandboxGone);
  await assert.rejects(Sandbox.connect("none", { client }), SandboxNotFound);
  await assert.rejects(Sandbox.create({ client, template: "none" }), BadRequestError);
});
