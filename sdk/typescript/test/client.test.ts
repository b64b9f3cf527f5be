import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createServer } from "node:net";
import type { AddressInfo } from "node:net";
import { test } from "node:test";
import {
  AuthenticationError,
  BadRequestError,
  BatchError,
  ConnectionError,
  RateLimitError,
  Sandbox,
  ServerError,
  TimeoutError,
  VERSION,
  ZerobootError,
} from "../src/index.js";
import type { ExecEvent } from "../src/index.js";
import { answer, drop, END, event, OK, silent, sse, stub } from "./stub.js";

delete process.env["ZEROBOOT_API_KEY"];
delete process.env["ZEROBOOT_BASE_URL"];

async function all(stream: AsyncIterable<ExecEvent>): Promise<ExecEvent[]> {
  const events: ExecEvent[] = [];
  for await (const event of stream) events.push(event);
  return events;
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, "127.0.0.1");
  await new Promise((resolve) => server.once("listening", resolve));
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

const whole = (fields: Record<string, unknown> = {}): Buffer[] => [
  event("start", { id: "1" }),
  event("end", { ...END, ...fields }),
];

test("a run sends code, key, language and timeout", async (t) => {
  const server = await stub(t, answer());
  const result = await new Sandbox("zb_live_test", server.url).run("console.log(1 + 1)");
  const [sent] = server.seen;
  assert.equal(`${sent?.method ?? ""} ${sent?.path ?? ""}`, "POST /v1/exec");
  assert.equal(sent?.headers.authorization, "Bearer zb_live_test");
  assert.equal(sent.headers["content-type"], "application/json");
  assert.deepEqual(JSON.parse(sent.body), {
    code: "console.log(1 + 1)",
    language: "node",
    timeout_seconds: 30,
  });
  assert.equal(String(result), "2");
  assert.equal(result.stdout, "2\n");
  assert.equal(result.requestId, "req-1");
});

test("every option has its place", async (t) => {
  const server = await stub(t, answer());
  await new Sandbox({ baseUrl: server.url }).run("x", {
    template: "py",
    timeout: 2.5,
    stdin: Uint8Array.of(255),
    env: { A: "b" },
    args: ["--x", "1"],
    files: {
      "a.txt": "text",
      "b.bin": Uint8Array.of(0, 255),
      "c.sh": { data: "#!", executable: true },
    },
    outputFiles: ["out.png"],
    limits: { memory_mb: 64, cpu_seconds: 1.5 },
  });
  assert.deepEqual(JSON.parse(server.seen[0]?.body ?? ""), {
    code: "x",
    template: "py",
    timeout_seconds: 2.5,
    stdin: { base64: "/w==" },
    env: { A: "b" },
    args: ["--x", "1"],
    files: {
      "a.txt": "text",
      "b.bin": { base64: "AP8=" },
      "c.sh": { text: "#!", executable: true },
    },
    output_files: ["out.png"],
    limits: { memory_mb: 64, cpu_seconds: 1.5 },
  });
});

test("connections are used again", async (t) => {
  const server = await stub(t, answer(), sse(whole()), answer());
  const sandbox = new Sandbox("k", server.url);
  await sandbox.run("1");
  await all(sandbox.stream("2"));
  for (let i = 3; i <= 8; i += 1) await sandbox.run(String(i));
  assert.equal(server.seen.length, 8);
  // Not always one: fetch may hand over the last byte before it puts the connection back.
  assert(server.connections <= 2, `${server.connections} connections for 8 requests`);
});

for (const [status, code, kind] of [
  [400, "invalid_request", BadRequestError],
  [401, "unauthorized", AuthenticationError],
  [413, "body_too_large", BadRequestError],
  [429, "rate_limited", RateLimitError],
  [500, "sandbox_failed", ServerError],
  [503, "busy", ServerError],
] as const) {
  test(`a refusal has its type: ${status} ${code}`, async (t) => {
    const server = await stub(t, answer(status, { error: "because", code, request_id: "r9" }));
    const sandbox = new Sandbox("k", server.url);
    for (const ask of [() => sandbox.run("x"), () => all(sandbox.stream("x"))]) {
      await assert.rejects(ask(), (e) => {
        assert(e instanceof kind && e instanceof ZerobootError);
        assert.deepEqual([e.code, e.status, e.requestId], [code, status, "r9"]);
        assert.equal(
          String(e),
          `${kind.name}: because (HTTP ${status}, ${code}, request r9)`,
        );
        return true;
      });
    }
    assert.equal(server.seen.length, 2, "without Retry-After nothing is sent again");
  });
}

test("an error page of a proxy is still a server error", async (t) => {
  const server = await stub(t, answer(502, "<html>Bad gateway</html>"));
  await assert.rejects(new Sandbox("k", server.url).run("x"), /Bad gateway/);
});

test("a 200 that is no answer is a server error", async (t) => {
  for (const body of ["hello", "[]", "{}"]) {
    const server = await stub(t, answer(200, body));
    await assert.rejects(new Sandbox("k", server.url).run("x"), ServerError);
  }
  const server = await stub(t, answer());
  await assert.rejects(all(new Sandbox("k", server.url).stream("x")), /does not stream/);
});

test("a redirect is not followed", async (t) => {
  const other = await stub(t, answer());
  const server = await stub(t, answer(307, "", { location: `${other.url}/v1/exec` }));
  await assert.rejects(new Sandbox("k", server.url).run("x"), /redirects to http/);
  assert.equal(other.seen.length, 0);
});

for (const status of [429, 503]) {
  test(`a refusal with Retry-After is tried again: ${status}`, async (t) => {
    const later = answer(status, { error: "later" }, { "retry-after": "0.2" });
    const server = await stub(t, later, answer(), later, sse(whole()));
    const begin = Date.now();
    assert.equal(String(await new Sandbox("k", server.url).run("x")), "2");
    assert(Date.now() - begin >= 190);
    assert.equal((await all(new Sandbox("k", server.url).stream("x"))).length, 2);
    assert.equal(server.seen.length, 4);
  });
}

test("retries are bounded", async (t) => {
  const server = await stub(t, answer(503, { error: "busy" }, { "retry-after": "0" }));
  await assert.rejects(new Sandbox("k", { baseUrl: server.url, maxRetries: 2 }).run("x"));
  assert.equal(server.seen.length, 3);
});

test("a long Retry-After is told, not slept through", async (t) => {
  const date = new Date(Date.now() + 60_000).toUTCString();
  for (const value of ["60", date]) {
    const server = await stub(t, answer(429, { error: "slow" }, { "retry-after": value }));
    await assert.rejects(new Sandbox("k", server.url).run("x"), (e) => {
      assert(e instanceof RateLimitError && (e.retryAfter ?? 0) > 55);
      return true;
    });
    assert.equal(server.seen.length, 1);
  }
});

test("what may have run is never sent again", async (t) => {
  for (const step of [drop, answer(500, { error: "no" }, { "retry-after": "0" })]) {
    const server = await stub(t, step);
    await assert.rejects(new Sandbox("k", server.url).run("x"), (e) => {
      assert(e instanceof ZerobootError && e.mayHaveRun);
      return true;
    });
    assert.equal(server.seen.length, 1);
  }
});

test("a server that is not there is tried again, then reported", async () => {
  let calls = 0;
  const sandbox = new Sandbox("k", {
    baseUrl: `http://127.0.0.1:${await freePort()}`,
    maxRetries: 1,
    fetch: (...args) => {
      calls += 1;
      return fetch(...args);
    },
  });
  await assert.rejects(sandbox.run("x"), (e) => {
    assert(e instanceof ConnectionError && !e.mayHaveRun);
    assert.match(e.message, /no connection to .*ECONNREFUSED.*start a server with `zeroboot serve`/);
    return true;
  });
  assert.equal(calls, 2);
});

test("the client waits for the exec and its grace, then ends the sandbox", async (t) => {
  const server = await stub(t, silent);
  const begin = Date.now();
  const run = new Sandbox("k", { baseUrl: server.url, grace: 0.2 }).run("x", { timeout: 0.3 });
  await assert.rejects(run, (e) => {
    assert(e instanceof TimeoutError && e.mayHaveRun);
    return true;
  });
  assert(Date.now() - begin >= 490);
  await server.gone;
  assert.equal(server.seen.length, 1);
});

test("a body that never ends is given up", async (t) => {
  const server = await stub(t, async (response) => {
    response.writeHead(200, { "content-type": "application/json" });
    while (!response.destroyed) {
      response.write(" ");
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  });
  const sandbox = new Sandbox("k", server.url);
  await assert.rejects(sandbox.run("x", { requestTimeout: 0.3 }), TimeoutError);
  await server.gone;
});

test("keep-alives do not stretch the deadline", async (t) => {
  const server = await stub(t, sse(Array(50).fill(Buffer.from(": keep-alive\n\n")), "hold"));
  const stream = new Sandbox("k", server.url).stream("x", { requestTimeout: 0.3 });
  await assert.rejects(all(stream), TimeoutError);
  await server.gone;
});

const EURO = "€uro 😀\n";
const STREAM = Buffer.concat([
  Buffer.from(": hello\n\n"),
  event("start", { id: "7", template: "node", isolation: "vm", pooled: true, fork_time_ms: 0.4 }),
  event("stdout", { text: EURO }),
  Buffer.from('event: brand-new\ndata: {}\n\nevent: stderr\r\ndata: {"text":\r\ndata: "warn"}\r\n\r\n'),
  event("stdout", { base64: "/wA=" }),
  event("file", { path: "out.txt", text: "made" }),
  event("end", { ...END, exit_code: 3 }),
]);

for (const size of [1, 2, 7, 100000]) {
  test(`events come whole when the bytes are cut every ${size}`, async (t) => {
    const chunks: Buffer[] = [];
    for (let at = 0; at < STREAM.length; at += size) chunks.push(STREAM.subarray(at, at + size));
    const server = await stub(t, sse(chunks));
    const events = await all(new Sandbox("k", server.url).stream("x"));
    assert.equal(server.seen[0]?.headers.accept, "text/event-stream");
    assert.deepEqual(
      events.map((e) => e.type),
      ["start", "stdout", "stderr", "stdout", "file", "end"],
    );
    const [start, first, warn, bytes, file, end] = events;
    assert(start?.type === "start" && start.id === "7" && start.fork_time_ms === 0.4);
    assert(first?.type === "stdout" && first.text === EURO);
    assert(warn?.type === "stderr" && warn.text === "warn");
    assert(bytes?.type === "stdout" && bytes.text === "\ufffd\0");
    assert.deepEqual([...bytes.data], [255, 0]);
    assert(file?.type === "file" && file.file.text() === "made");
    assert(end?.type === "end");
    const { result } = end;
    const bytesOut = Buffer.concat([Buffer.from(EURO), Buffer.of(255, 0)]);
    assert.deepEqual(Buffer.from(result.stdoutBytes), bytesOut);
    assert.equal(result.stderr, "warn");
    assert(!result.ok && result.exit_code === 3 && result.encoding.stdout === "base64");
    assert.equal(result.files["out.txt"]?.text(), "made");
    assert.equal(result.requestId, "req-2");
  });
}

test("callbacks get the output and so does the result", async (t) => {
  const server = await stub(t, sse([STREAM]));
  const out: string[] = [];
  const err: string[] = [];
  const result = await new Sandbox("k", server.url).run("x", {
    onStdout: (text) => out.push(text),
    onStderr: (text) => err.push(text),
  });
  assert.equal(out.join(""), `${EURO}\ufffd\0`);
  assert.deepEqual(err, ["warn"]);
  assert.equal(result.stdout, `${EURO}\ufffd\0`);
});

test("a long exec goes over the event stream, which fetch does not give up", async (t) => {
  const server = await stub(t, sse([STREAM]));
  await new Sandbox("k", server.url).run("x", { timeout: 300 });
  assert.equal(server.seen[0]?.headers.accept, "text/event-stream");
});

test("leaving the loop ends the sandbox", async (t) => {
  const hold = sse([event("start", { id: "1" }), event("stdout", { text: "a" })], "hold");
  const server = await stub(t, hold);
  const stream = new Sandbox("k", server.url).stream("x");
  for await (const e of stream) if (e.type === "stdout") break;
  assert.throws(() => stream.result, /not ended/);
  await server.gone;
});

test("a callback that throws ends the sandbox", async (t) => {
  const hold = sse([event("start", { id: "1" }), event("stdout", { text: "a" })], "hold");
  const server = await stub(t, hold);
  const refuse = (text: string): never => {
    throw new RangeError(text);
  };
  await assert.rejects(new Sandbox("k", server.url).run("x", { onStdout: refuse }), RangeError);
  await server.gone;
});

test("aborting ends the sandbox, at every stage", async (t) => {
  const hold = sse([event("start", { id: "1" })], "hold");
  for (const step of [silent, hold]) {
    const server = await stub(t, step);
    const sandbox = new Sandbox("k", server.url);
    const controller = new AbortController();
    const { signal } = controller;
    setTimeout(() => {
      controller.abort();
    }, 100);
    const ask = step === silent ? sandbox.run("x", { signal }) : all(sandbox.stream("x", { signal }));
    await assert.rejects(ask, { name: "AbortError" });
    await server.gone;
  }
  const later = await stub(t, answer(503, { error: "busy" }, { "retry-after": "5" }));
  const sandbox = new Sandbox("k", later.url);
  await assert.rejects(sandbox.run("x", { signal: AbortSignal.timeout(100) }), {
    name: "TimeoutError",
  });
  await assert.rejects(sandbox.run("x", { signal: AbortSignal.abort() }), { name: "AbortError" });
  assert.equal(later.seen.length, 1);
});

test("a stream cut short is a connection error", async (t) => {
  for (const how of ["end", "cut"] as const) {
    const server = await stub(t, sse([event("start", { id: "1" })], how));
    await assert.rejects(all(new Sandbox("k", server.url).stream("x")), (e) => {
      assert(e instanceof ConnectionError && e.mayHaveRun);
      return true;
    });
    assert.equal(server.seen.length, 1);
  }
});

test("a stream cut after its last event is whole", async (t) => {
  const server = await stub(t, sse(whole(), "cut"));
  assert.equal((await all(new Sandbox("k", server.url).stream("x"))).length, 2);
});

test("an error event throws its type", async (t) => {
  for (const [code, kind] of [
    ["sandbox_failed", ServerError],
    ["rate_limited", RateLimitError],
  ] as const) {
    const server = await stub(t, sse([event("error", { error: "gone", code, request_id: "r5" })]));
    await assert.rejects(all(new Sandbox("k", server.url).stream("x")), (e) => {
      assert(e instanceof kind && e.requestId === "r5");
      return true;
    });
  }
});

test("a batch keeps order and options", async (t) => {
  const server = await stub(t, answer(200, { results: [OK, { ...OK, stdout: "b\n" }] }));
  const items = ["a", { code: "b", language: "python", timeout: 1, stdin: "s" } as const];
  const results = await new Sandbox("k", server.url).runBatch(items, { template: "js" });
  assert.deepEqual(results.map(String), ["2", "b"]);
  assert.deepEqual(JSON.parse(server.seen[0]?.body ?? ""), {
    executions: [
      { code: "a", timeout_seconds: 30, template: "js" },
      { code: "b", timeout_seconds: 1, language: "python", stdin: "s" },
    ],
  });
});

test("an item that did not run is an error in its place", async (t) => {
  const body = { results: [OK, { error: "Rate limit exceeded", code: "rate_limited" }] };
  const server = await stub(t, answer(200, body));
  const sandbox = new Sandbox("k", server.url);
  await assert.rejects(sandbox.runBatch(["a", "b"]), (e) => {
    assert(e instanceof BatchError && e.errors.length === 1);
    assert.equal(String(e.results[0]), "2");
    return true;
  });
  const results = await sandbox.runBatch(["a", "b"], { returnErrors: true });
  assert(results[1] instanceof RateLimitError);
  await assert.rejects(sandbox.runBatch(["a"]), /1 items, the answer does not/);
  assert.deepEqual(await sandbox.runBatch([]), []);
});

test("health is an answer even when the server is not well", async (t) => {
  const body = { status: "unavailable", templates: { python: { ready: false } } };
  const server = await stub(t, answer(503, body, { "retry-after": "1" }));
  const health = await new Sandbox("k", server.url).health();
  assert(!health.ok && !health.ready && health.templates["python"]?.ready === false);
  assert.equal(server.seen.length, 1);
});

test("metrics are text", async (t) => {
  const server = await stub(t, answer(200, "a_total 1\n", { "content-type": "text/plain" }));
  assert.equal(await new Sandbox("k", server.url).metrics(), "a_total 1\n");
});

test("the environment gives key and address", async (t) => {
  const server = await stub(t, answer());
  process.env["ZEROBOOT_API_KEY"] = "zb_live_env";
  process.env["ZEROBOOT_BASE_URL"] = `${server.url}/v1/`;
  try {
    await new Sandbox().run("x");
    await new Sandbox("zb_live_given").run("x");
  } finally {
    delete process.env["ZEROBOOT_API_KEY"];
    delete process.env["ZEROBOOT_BASE_URL"];
  }
  const keys = server.seen.map((seen) => seen.headers.authorization);
  assert.deepEqual(keys, ["Bearer zb_live_env", "Bearer zb_live_given"]);
  assert(server.seen.every((seen) => seen.path === "/v1/exec"));
});

test("without configuration nothing leaves this machine, and no key is sent", async (t) => {
  assert.equal(new Sandbox().baseUrl, "http://127.0.0.1:8080");
  const server = await stub(t, answer());
  await new Sandbox({ baseUrl: server.url }).run("x");
  assert.equal(server.seen[0]?.headers.authorization, undefined);
});

test("the version is the package's", () => {
  const file = new URL("../../package.json", import.meta.url); // from build/test
  const { version } = JSON.parse(readFileSync(file, "utf8")) as { version: string };
  assert.equal(VERSION, version);
});

test("a bad key or address is refused without showing the key", () => {
  for (const key of ["zb live", "zb_livé", "a\nb"]) {
    assert.throws(
      () => new Sandbox(key),
      (e) => e instanceof TypeError && !e.message.includes(key),
    );
  }
  for (const url of ["localhost:8080", "ftp://host", "http://"]) {
    assert.throws(() => new Sandbox("k", url), /base URL/);
  }
  assert.throws(() => new Sandbox().stream("x", { timeout: NaN }), /timeout/);
});
