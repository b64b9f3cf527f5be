// One request: its deadline, its signal, its retries. The rule of the retries: a request is sent
// again only if it certainly did not run.

import { ConnectionError, errorFor, ServerError, TimeoutError } from "./errors.js";
import type { ZerobootError } from "./errors.js";
import { isObject } from "./result.js";
import type { WebSocketMaker } from "./terminal.js";

/** A longer Retry-After is given to the caller rather than slept through. */
const MAX_RETRY_WAIT = 10;
const MAX_ERROR_TEXT = 500;

export interface Transport {
  baseUrl: string;
  headers: Readonly<Record<string, string>>;
  maxRetries: number;
  fetch: typeof fetch;
  webSocket?: WebSocketMaker | undefined;
}

export interface Call {
  method: "GET" | "POST" | "PUT" | "DELETE";
  path: string;
  /** JSON if it is text. A stream can be sent once only. */
  body?: string | Uint8Array | ReadableStream<Uint8Array>;
  headers?: Record<string, string>;
  accept: string;
  /** Seconds that one attempt may take. */
  budget: number;
  signal?: AbortSignal | undefined;
  retryAnswers?: boolean;
}

/** An answer whose body has not been read, and the clock that still runs for it. */
export interface Open {
  response: Response;
  attempt: Attempt;
}

/** The deadline and the caller's signal as one signal, and which of the two it was. */
export class Attempt {
  readonly #controller = new AbortController();
  readonly #timer: ReturnType<typeof setTimeout>;
  readonly #caller: AbortSignal | undefined;
  readonly #budget: number;
  readonly #forward = (): void => {
    this.#controller.abort();
  };
  #late = false;
  #silence: ReturnType<typeof setTimeout> | undefined;
  #longest = 0;

  constructor(budget: number, caller: AbortSignal | undefined) {
    caller?.throwIfAborted();
    this.#budget = budget;
    this.#caller = caller;
    // A timer takes at most 2^31 - 1 ms; more is no limit that anyone waits for.
    this.#timer = setTimeout(
      () => {
        this.#late = true;
        this.#controller.abort();
      },
      Math.min(budget * 1000, 0x7fffffff),
    );
    caller?.addEventListener("abort", this.#forward, { once: true });
  }

  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  /** To be called at each piece of a stream: it may not be silent for longer than this. */
  heard(seconds: number): void {
    clearTimeout(this.#silence);
    this.#longest = seconds;
    this.#silence = setTimeout(() => {
      this.#late = true;
      this.#controller.abort();
    }, seconds * 1000);
  }

  /** The answer was read to its end: stops the clock, and leaves the connection for the next. */
  done(): void {
    clearTimeout(this.#timer);
    clearTimeout(this.#silence);
    this.#caller?.removeEventListener("abort", this.#forward);
  }

  /** Stops the clock and closes the connection, which ends a sandbox that still runs. */
  abandon(): void {
    this.done();
    this.#controller.abort();
  }

  /** What a failure of fetch or of the body means. */
  explain(error: unknown, baseUrl: string): unknown {
    if (this.#caller?.aborted) return this.#caller.reason;
    if (this.#late) {
      const waited = Math.min(this.#budget, this.#longest || this.#budget);
      return new TimeoutError(`no answer within ${waited} s`, { mayHaveRun: true });
    }
    const said = reason(error);
    return neverSent(error)
      ? new ConnectionError(`no connection to ${baseUrl}: ${said}; ${START_ONE}`, { cause: error })
      : new ConnectionError(`the connection to ${baseUrl} broke: ${said}`, {
          cause: error,
          mayHaveRun: true,
        });
  }
}

/** Sends until there is an answer to read. The caller must call `attempt.done()` or `attempt.abandon()`. */
export async function open(transport: Transport, call: Call): Promise<Open> {
  const streamed = typeof call.body === "object" && !(call.body instanceof Uint8Array);
  for (let failed = 0; ; failed += 1) {
    const attempt = new Attempt(call.budget, call.signal);
    let wait: number | undefined;
    try {
      const response = await transport.fetch(transport.baseUrl + call.path, {
        method: call.method,
        headers: {
          ...transport.headers,
          Accept: call.accept,
          ...(typeof call.body === "string" ? { "Content-Type": "application/json" } : {}),
          ...call.headers,
        },
        ...(call.body === undefined ? {} : { body: call.body as NonNullable<RequestInit["body"]> }),
        // fetch wants to hear that the answer comes after the last piece.
        ...(streamed ? { duplex: "half" } : {}),
        signal: attempt.signal,
        // A redirect would send the code to a host that nobody named.
        redirect: "manual",
      });
      if (failed < transport.maxRetries && call.retryAnswers !== false && !streamed) {
        wait = refused(response);
      }
      if (wait === undefined) return { response, attempt };
    } catch (error) {
      attempt.abandon();
      const once = streamed || !neverSent(error) || failed >= transport.maxRetries;
      if (call.signal?.aborted || once) {
        throw attempt.explain(error, transport.baseUrl);
      }
      wait = 0;
    }
    attempt.abandon();
    // Jitter on top of what was asked for: a crowd that was refused together does not come back
    // together.
    await sleep(wait + Math.random() * 0.1 * 2 ** (failed + 1), call.signal);
  }
}

/** A whole answer as text. */
export async function ask(transport: Transport, call: Call): Promise<Answer> {
  const { response, attempt } = await open(transport, call);
  try {
    const answer = new Answer(response, await response.text());
    attempt.done();
    return answer;
  } catch (error) {
    attempt.abandon();
    throw attempt.explain(error, transport.baseUrl);
  }
}

export class Answer {
  readonly status: number;
  readonly text: string;
  readonly requestId: string | undefined;
  readonly #headers: Headers;

  constructor(response: Response, text: string) {
    this.status = response.status;
    this.text = text;
    this.#headers = response.headers;
    this.requestId = response.headers.get("x-request-id") ?? undefined;
  }

  /** Whether what was asked for was done. */
  get good(): boolean {
    return this.status >= 200 && this.status < 300;
  }

  /** The JSON of a good answer; throws what any other answer means. */
  json(): Record<string, unknown> {
    if (!this.good) throw this.error();
    const fields = parse(this.text);
    if (fields === undefined) {
      throw new ServerError(`the answer is not a JSON object: ${cut(this.text)}`, {
        status: this.status,
        requestId: this.requestId,
        mayHaveRun: true,
      });
    }
    return fields;
  }

  error(): ZerobootError {
    const fields = parse(this.text);
    const field = (name: string): string | undefined => {
      const value = fields?.[name];
      return typeof value === "string" ? value : undefined;
    };
    let message = fields === undefined ? cut(this.text) : (field("error") ?? "");
    // Browsers hide a redirect behind status 0.
    if (this.status === 0 || (this.status >= 300 && this.status < 400)) {
      const where = this.#headers.get("location") ?? "another address";
      message = `the server redirects to ${where}; name that address to send code there`;
    }
    return errorFor(message || "the request failed", {
      code: field("code"),
      reason: field("reason"),
      status: this.status,
      requestId: field("request_id") ?? this.requestId,
      retryAfter: retryAfter(this.#headers),
      // 500 and above without a promise: it may have run.
      mayHaveRun: this.status >= 500 && this.status !== 503,
    });
  }
}

export function parse(text: string): Record<string, unknown> | undefined {
  try {
    const value: unknown = JSON.parse(text);
    return isObject(value) ? value : undefined;
  } catch {
    return undefined;
  }
}

/** Seconds until a refused request may come back, or undefined if this answer is the last word. */
function refused(response: Response): number | undefined {
  if (response.status !== 429 && response.status !== 503) return undefined;
  const wait = retryAfter(response.headers);
  return wait === undefined || wait > MAX_RETRY_WAIT ? undefined : wait;
}

function retryAfter(headers: Headers): number | undefined {
  const value = headers.get("retry-after");
  if (value === null || value.trim() === "") return undefined;
  const seconds = Number(value);
  if (!Number.isNaN(seconds)) return Math.max(0, seconds);
  const date = Date.parse(value);
  return Number.isNaN(date) ? undefined : Math.max(0, (date - Date.now()) / 1000);
}

/** What to do where no server is. */
const START_ONE =
  "start a server with `zeroboot serve`, or name another in ZEROBOOT_BASE_URL or baseUrl";

// Error codes that mean that no connection was made, so that nothing was sent. `fetch` hides them
// in `cause`; a browser does not tell, and there nothing is sent again.
const NEVER_SENT = new Set([
  "ECONNREFUSED",
  "ENOTFOUND",
  "EAI_AGAIN",
  "EHOSTUNREACH",
  "ENETUNREACH",
  "UND_ERR_CONNECT_TIMEOUT",
  "ConnectionRefused", // Bun
]);

function neverSent(error: unknown): boolean {
  for (let at = error, depth = 0; isObject(at) && depth < 5; at = at["cause"], depth += 1) {
    if (typeof at["code"] === "string" && NEVER_SENT.has(at["code"])) return true;
    // Deno has no code, but says at which stage it was.
    if (String(at["message"]).includes("client error (Connect)")) return true;
  }
  return false;
}

function reason(error: unknown): string {
  let said = String(error);
  for (let at = error, depth = 0; at instanceof Error && depth < 5; depth += 1) {
    if (at.message !== "") said = at.message;
    at = (at as { cause?: unknown }).cause;
  }
  return said;
}

function cut(text: string): string {
  const trimmed = text.trim();
  return trimmed.length > MAX_ERROR_TEXT ? `${trimmed.slice(0, MAX_ERROR_TEXT)} ...` : trimmed;
}

async function sleep(seconds: number, signal: AbortSignal | undefined): Promise<void> {
  await new Promise<void>((resolve, reject) => {
    const stop = (): void => {
      clearTimeout(timer);
      reject(signal?.reason as Error);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, seconds * 1000);
    signal?.addEventListener("abort", stop, { once: true });
  });
}
