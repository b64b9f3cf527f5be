import { toBase64 } from "./bytes.js";
import { BatchError, errorFor, ServerError, ZerobootError } from "./errors.js";
import { ExecReader } from "./events.js";
import type { ExecEvent } from "./events.js";
import { entriesOf, LiveSandbox, sandboxOf } from "./live.js";
import type { SandboxInfo } from "./live-answers.js";
import { isObject, makeResult } from "./result.js";
import type { Result } from "./result.js";
import type { WebSocketMaker } from "./terminal.js";
import { Answer, ask, open, parse } from "./transport.js";
import type { Transport } from "./transport.js";
import { VERSION } from "./version.js";
import type { Data, ExecRequest, FileData, HealthAnswer, Language, Limits, WireData } from "./wire.js";

const DEFAULT_BASE_URL = "http://127.0.0.1:8080";

// Node's fetch gives up on an answer after 300 s without a byte, and takes no option for that. The
// event stream has a byte every 15 s, so a long exec goes over it.
const LONG_EXEC_SECONDS = 240;

export interface SandboxOptions {
  /** Default: the environment's ZEROBOOT_API_KEY. */
  apiKey?: string | undefined;
  /** Default: the environment's ZEROBOOT_BASE_URL, else a server on this machine. */
  baseUrl?: string | undefined;
  /** Default timeout of an exec, in seconds. */
  timeout?: number;
  /** How many seconds longer than the exec's timeout this client waits. */
  grace?: number;
  maxRetries?: number;
  /** Another `fetch`, for proxies, special certificates, tests. */
  fetch?: typeof fetch;
  /** Another WebSocket for terminals. Default: the runtime's, else that of the package `ws`. */
  webSocket?: WebSocketMaker;
}

/** Options of a new long-lived sandbox. */
export interface CreateOptions {
  /** Default: "node", as for `run`. */
  language?: Language | undefined;
  /** A template by name. Excludes `language`. */
  template?: string | undefined;
  /** Its lease in seconds. It can be extended. */
  timeout?: number | undefined;
  /** It also ends when it was idle for this many seconds. */
  idleTimeout?: number | undefined;
  /** Environment variables of everything in it. */
  env?: Record<string, string> | undefined;
  /** Your own labels, for the list. */
  metadata?: Record<string, string> | undefined;
  /** Spelled as the API spells them. */
  limits?: { memory_mb?: number; processes?: number; file_size_mb?: number; open_files?: number } | undefined;
  /** The client whose key, address and `fetch` are used. Default: a new one. */
  client?: Sandbox | undefined;
  signal?: AbortSignal | undefined;
}

export interface StreamOptions {
  /** Default: "node", because users of this SDK write JavaScript. */
  language?: Language | undefined;
  /** A template by name. Excludes `language`. */
  template?: string | undefined;
  /** Timeout of the exec, in seconds. */
  timeout?: number | undefined;
  stdin?: Data | undefined;
  env?: Record<string, string> | undefined;
  args?: readonly string[] | undefined;
  /** Path in the sandbox to content. */
  files?: Record<string, FileData> | undefined;
  /** Paths in the sandbox to bring back. */
  outputFiles?: readonly string[] | undefined;
  limits?: Limits | undefined;
  /** Aborting it ends the sandbox. */
  signal?: AbortSignal | undefined;
  /** How many seconds this client waits, instead of `timeout` and the grace. */
  requestTimeout?: number | undefined;
}

export interface RunOptions extends StreamOptions {
  /** Called with the output as it comes. The result has it, too. */
  onStdout?: ((text: string) => unknown) | undefined;
  onStderr?: ((text: string) => unknown) | undefined;
}

/** One exec of a batch. Missing fields are taken from the options of the batch. */
export interface Exec
  extends Omit<StreamOptions, "signal" | "requestTimeout"> {
  code: string;
}

export interface BatchOptions {
  language?: Language | undefined;
  template?: string | undefined;
  timeout?: number | undefined;
  signal?: AbortSignal | undefined;
  requestTimeout?: number | undefined;
}

export interface Health extends HealthAnswer {
  /** Whether all is well. */
  ok: boolean;
  /** Whether code can be run: `ok` or `degraded`. */
  ready: boolean;
}

/** A client of a Zeroboot server. Every `run` uses a new sandbox, which ends with the answer. */
export class Sandbox {
  readonly #transport: Transport;
  readonly #timeout: number;
  readonly #grace: number;

  constructor(apiKey?: string, baseUrl?: string);
  constructor(apiKey: string | undefined, options: SandboxOptions);
  constructor(options: SandboxOptions);
  constructor(first?: string | SandboxOptions, second?: string | SandboxOptions) {
    const options: SandboxOptions = {
      ...(typeof first === "object" ? first : { apiKey: first }),
      ...(typeof second === "object" ? second : second === undefined ? {} : { baseUrl: second }),
    };
    if (typeof first === "string") options.apiKey = first;
    const key = (options.apiKey ?? environment("ZEROBOOT_API_KEY") ?? "").trim();
    if (!/^[\x21-\x7e]*$/.test(key)) {
      // Said here, without the key: fetch would put it into its message.
      throw new TypeError("the API key has characters that a key cannot have");
    }
    const baseUrl = (options.baseUrl || environment("ZEROBOOT_BASE_URL") || DEFAULT_BASE_URL)
      .trim()
      .replace(/\/+$/, "")
      // An address copied from an example of the REST API.
      .replace(/\/v1$/, "");
    if (!/^https?:\/\/[^/]/.test(baseUrl)) {
      throw new TypeError(`the base URL must begin with http:// or https://: ${baseUrl}`);
    }
    const headers: Record<string, string> = {};
    if (key !== "") headers["Authorization"] = `Bearer ${key}`;
    // A browser has its own, and another would cost a preflight.
    if (!inBrowser()) headers["User-Agent"] = `zeroboot-typescript/${VERSION}`;
    // Not bound to an object: a browser refuses to call `fetch` as a method of anything else.
    const send = options.fetch ?? fetch;
    this.#transport = {
      baseUrl,
      headers,
      maxRetries: options.maxRetries ?? 2,
      fetch: (...args) => send(...args),
      webSocket: options.webSocket,
    };
    this.#timeout = options.timeout ?? 30;
    this.#grace = options.grace ?? 15;
  }

  /** Makes a sandbox that lives until its lease ends, `kill()`, or the end of its `await using`. */
  static async create(options: CreateOptions = {}): Promise<LiveSandbox> {
    const { client = new Sandbox(), language, template, timeout = 300, idleTimeout } = options;
    const answer = await ask(client.#transport, {
      method: "POST",
      path: "/v1/sandboxes",
      body: JSON.stringify({
        language: language ?? (template === undefined ? "node" : undefined),
        template,
        timeout_seconds: timeout,
        idle_timeout_seconds: idleTimeout,
        env: options.env,
        metadata: options.metadata,
        ...options.limits,
      }),
      accept: "application/json",
      budget: client.#grace,
      signal: options.signal,
    });
    return client.#live(answer, true);
  }

  /** Connects to an existing sandbox. The end of its `await using` does not end it. */
  static async connect(
    id: string,
    options: { client?: Sandbox; signal?: AbortSignal } = {},
  ): Promise<LiveSandbox> {
    const { client = new Sandbox(), signal } = options;
    return client.#live(await client.#get(`/v1/sandboxes/${encodeURIComponent(id)}`, signal), false);
  }

  /** Lists the sandboxes of this key; with `metadata`, those that have all of it. */
  static async list(
    options: { metadata?: Record<string, string>; client?: Sandbox; signal?: AbortSignal } = {},
  ): Promise<SandboxInfo[]> {
    const { client = new Sandbox(), metadata = {}, signal } = options;
    const words = Object.entries(metadata).map(
      ([name, value]) => `metadata=${encodeURIComponent(`${name}=${value}`)}`,
    );
    const found: SandboxInfo[] = [];
    let cursor: string | undefined;
    do {
      const query = [...words, ...(cursor === undefined ? [] : [`cursor=${encodeURIComponent(cursor)}`])];
      const path = `/v1/sandboxes${query.length > 0 ? "?" : ""}${query.join("&")}`;
      const page = (await client.#get(path, signal)).json();
      found.push(...entriesOf<SandboxInfo>(page, "sandboxes"));
      cursor = typeof page["next_cursor"] === "string" ? page["next_cursor"] : undefined;
    } while (cursor !== undefined);
    return found;
  }

  get baseUrl(): string {
    return this.#transport.baseUrl;
  }

  /**
   * Runs `code` in a new sandbox and waits for its end. Code that fails is a result, not an
   * exception; `result.check()` throws.
   */
  async run(code: string, options: RunOptions = {}): Promise<Result> {
    const request = this.#request({ ...options, code });
    const { onStdout, onStderr } = options;
    if (onStdout || onStderr || request.timeout_seconds > LONG_EXEC_SECONDS) {
      const stream = this.stream(code, options);
      for await (const event of stream) {
        if (event.type === "stdout") await onStdout?.(event.text);
        else if (event.type === "stderr") await onStderr?.(event.text);
      }
      return stream.result;
    }
    const answer = await ask(this.#transport, {
      method: "POST",
      path: "/v1/exec",
      body: JSON.stringify(request),
      accept: "application/json",
      budget: this.#budget([request], options.requestTimeout),
      signal: options.signal,
    });
    return makeResult(answer.json(), answer.requestId);
  }

  /**
   * Runs `code` and gives what happens as it happens, for `for await`. The request is sent when the
   * iteration begins. Leaving the loop early ends the sandbox.
   */
  stream(code: string, options: StreamOptions = {}): ExecStream {
    const request = this.#request({ ...options, code });
    return new ExecStream(
      events(this.#transport, request, {
        budget: this.#budget([request], options.requestTimeout),
        signal: options.signal,
      }),
    );
  }

  /**
   * Runs many pieces of code, each in its own sandbox, in parallel; results in order. An item that
   * the server refuses throws a `BatchError`, whose `results` has them all; with
   * `returnErrors: true` the error stands in the list instead.
   */
  async runBatch(
    items: readonly (string | Exec)[],
    options?: BatchOptions & { returnErrors?: false },
  ): Promise<Result[]>;
  async runBatch(
    items: readonly (string | Exec)[],
    options: BatchOptions & { returnErrors: true },
  ): Promise<(Result | ZerobootError)[]>;
  async runBatch(
    items: readonly (string | Exec)[],
    options: BatchOptions & { returnErrors?: boolean } = {},
  ): Promise<(Result | ZerobootError)[]> {
    const { language, template, timeout } = options;
    const executions = items.map((item) => {
      const own: Exec = typeof item === "string" ? { code: item } : item;
      // The two exclude each other: the item's own choice takes the place of the batch's.
      const chosen = own.language === undefined && own.template === undefined;
      return this.#request({
        ...own,
        ...(chosen ? { language, template } : {}),
        timeout: own.timeout ?? timeout,
      });
    });
    if (executions.length === 0) return [];
    const answer = await ask(this.#transport, {
      method: "POST",
      path: "/v1/exec/batch",
      body: JSON.stringify({ executions }),
      accept: "application/json",
      budget: this.#budget(executions, options.requestTimeout),
      signal: options.signal,
    });
    const list = answer.json()["results"];
    if (!Array.isArray(list) || list.length !== executions.length) {
      throw new ServerError(`the batch has ${executions.length} items, the answer does not`, {
        requestId: answer.requestId,
        mayHaveRun: true,
      });
    }
    const results = list.map((item: unknown) => itemOf(item, answer.requestId));
    const errors = results.filter((item): item is ZerobootError => item instanceof ZerobootError);
    const [first] = errors;
    if (first !== undefined && options.returnErrors !== true) {
      throw new BatchError(
        `${errors.length} of ${results.length} items of the batch did not run; first: ${first.message}`,
        results,
        { code: first.code, requestId: answer.requestId },
      );
    }
    return results;
  }

  /** Asks for the server's health. Throws only if the server cannot be asked. */
  async health(options: { signal?: AbortSignal } = {}): Promise<Health> {
    const answer = await ask(this.#transport, {
      method: "GET",
      path: "/v1/health",
      accept: "application/json",
      budget: this.#grace,
      signal: options.signal,
      retryAnswers: false, // a health check that waits is no health check
    });
    // A 503 with a status is an answer to the question, not a failure to answer.
    const raw = answer.status === 200 || answer.status === 503 ? parse(answer.text) : undefined;
    const status = raw?.["status"];
    if (raw === undefined || typeof status !== "string") throw answer.error();
    const older = { templates: {}, live: 0, uptime_seconds: 0, version: "" };
    return {
      ...older,
      ...(raw as unknown as HealthAnswer),
      ok: status === "ok",
      ready: status === "ok" || status === "degraded",
    };
  }

  /** The server's metrics in Prometheus' text format. */
  async metrics(options: { signal?: AbortSignal } = {}): Promise<string> {
    const answer = await ask(this.#transport, {
      method: "GET",
      path: "/v1/metrics",
      accept: "text/plain",
      budget: this.#grace,
      signal: options.signal,
    });
    if (answer.status !== 200) throw answer.error();
    return answer.text;
  }

  async #get(path: string, signal: AbortSignal | undefined): Promise<Answer> {
    const call = { method: "GET", path, accept: "application/json" } as const;
    return ask(this.#transport, { ...call, budget: this.#grace, signal });
  }

  #live(answer: Answer, killAtEnd: boolean): LiveSandbox {
    const [transport, timeout, grace] = [this.#transport, this.#timeout, this.#grace];
    return new LiveSandbox(sandboxOf(answer.json()), { transport, timeout, grace, killAtEnd });
  }

  /**
   * How long this client waits: as long as the execs may take, and the grace on top. A batch runs
   * in parallel, but how parallel is the server's to say: only the sum is never wrong.
   */
  #budget(requests: readonly ExecRequest[], given: number | undefined): number {
    if (given !== undefined) return given;
    return requests.reduce((sum, r) => sum + Math.max(0, r.timeout_seconds), this.#grace);
  }

  #request(exec: Exec): ExecRequest {
    const request: ExecRequest = {
      code: exec.code,
      timeout_seconds: exec.timeout ?? this.#timeout,
    };
    if (!Number.isFinite(request.timeout_seconds)) {
      throw new TypeError("the timeout must be a number of seconds");
    }
    if (exec.template !== undefined) request.template = exec.template;
    if (exec.language !== undefined) request.language = exec.language;
    else if (exec.template === undefined) request.language = "node";
    if (exec.stdin !== undefined) request.stdin = wire(exec.stdin);
    if (exec.env !== undefined) request.env = exec.env;
    if (exec.args !== undefined) request.args = exec.args;
    if (exec.files !== undefined) {
      request.files = Object.fromEntries(
        Object.entries(exec.files).map(([path, content]) => [path, wireFile(content)]),
      );
    }
    if (exec.outputFiles !== undefined) request.output_files = exec.outputFiles;
    if (exec.limits !== undefined) request.limits = exec.limits;
    return request;
  }
}

/** The events of one exec. Iterate once. Leaving the loop, or `close()`, ends the sandbox. */
export class ExecStream implements AsyncIterableIterator<ExecEvent> {
  readonly #events: AsyncGenerator<ExecEvent, void>;
  #result: Result | undefined;

  constructor(events: AsyncGenerator<ExecEvent, void>) {
    this.#events = events;
  }

  /** The result, after the last event. */
  get result(): Result {
    if (this.#result === undefined) {
      throw new ZerobootError("the exec has not ended", { mayHaveRun: true });
    }
    return this.#result;
  }

  async next(): Promise<IteratorResult<ExecEvent, void>> {
    const step = await this.#events.next();
    if (!step.done && step.value.type === "end") this.#result = step.value.result;
    return step;
  }

  async return(): Promise<IteratorResult<ExecEvent, void>> {
    return this.#events.return();
  }

  async close(): Promise<void> {
    await this.#events.return();
  }

  [Symbol.asyncIterator](): this {
    return this;
  }
}

async function* events(
  transport: Transport,
  request: ExecRequest,
  options: { budget: number; signal: AbortSignal | undefined },
): AsyncGenerator<ExecEvent, void> {
  const { response, attempt } = await open(transport, {
    method: "POST",
    path: "/v1/exec",
    body: JSON.stringify(request),
    accept: "text/event-stream",
    ...options,
  });
  let finished = false;
  try {
    const requestId = response.headers.get("x-request-id") ?? undefined;
    const kind = response.headers.get("content-type")?.split(";")[0]?.trim().toLowerCase();
    if (response.status !== 200 || kind !== "text/event-stream" || response.body === null) {
      const answer = new Answer(response, await textOf(response, attempt, transport.baseUrl));
      if (answer.status !== 200) throw answer.error();
      throw new ServerError("the server does not stream (its answer is not text/event-stream)", {
        status: answer.status,
        requestId,
        mayHaveRun: true,
      });
    }
    const reader = new ExecReader(requestId);
    const body = response.body.getReader();
    for (;;) {
      let chunk: Uint8Array | undefined;
      try {
        chunk = (await body.read()).value as Uint8Array | undefined;
      } catch (error) {
        if (reader.result !== undefined) return; // broken after the last event: nothing is missing
        throw attempt.explain(error, transport.baseUrl);
      }
      if (chunk === undefined) break;
      yield* reader.feed(chunk);
    }
    reader.finish();
    finished = true;
  } finally {
    if (finished) attempt.done();
    else attempt.abandon();
  }
}

async function textOf(
  response: Response,
  attempt: { explain(error: unknown, baseUrl: string): unknown },
  baseUrl: string,
): Promise<string> {
  try {
    return await response.text();
  } catch (error) {
    throw attempt.explain(error, baseUrl);
  }
}

function itemOf(item: unknown, requestId: string | undefined): Result | ZerobootError {
  if (isObject(item) && typeof item["error"] === "string" && item["exit_code"] === undefined) {
    const code = typeof item["code"] === "string" ? item["code"] : undefined;
    return errorFor(item["error"], { code, requestId });
  }
  return makeResult(item, requestId);
}

function wire(data: Data): string | { base64: string } {
  return typeof data === "string" ? data : { base64: toBase64(data) };
}

function wireFile(file: FileData): WireData {
  if (typeof file === "string" || file instanceof Uint8Array) return wire(file);
  const content = wire(file.data);
  return {
    ...(typeof content === "string" ? { text: content } : content),
    executable: file.executable ?? false,
  };
}

interface Globals {
  process?: { env?: Record<string, string | undefined>; versions?: Record<string, string> };
  Deno?: { env: { get(name: string): string | undefined } };
  document?: unknown;
}

function environment(name: string): string | undefined {
  const { process, Deno } = globalThis as Globals;
  try {
    return process?.env?.[name] ?? Deno?.env.get(name);
  } catch {
    return undefined; // Deno without the permission to read it
  }
}

function inBrowser(): boolean {
  const { process, Deno } = globalThis as Globals;
  return process?.versions === undefined && Deno === undefined;
}
