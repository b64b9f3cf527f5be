// A terminal over a WebSocket: the runtime's own where it has one that can send headers, else the
// package `ws`.

/// <reference lib="esnext.disposable" preserve="true" />

import { lossy, utf8 } from "./bytes.js";
import { ConnectionError, TimeoutError } from "./errors.js";
import type { ZerobootError } from "./errors.js";
import { failure } from "./events.js";
import { signalBody } from "./live.js";
import type { StartedEvent } from "./live-events.js";
import type { TerminalExit } from "./live-answers.js";
import { isObject } from "./result.js";
import { ask, parse } from "./transport.js";
import type { Transport } from "./transport.js";
import type { Data } from "./wire.js";

/** What is used of a WebSocket: the browser's, and those of Node 22, Deno, Bun and `ws`, have it. */
export interface WebSocketLike {
  binaryType: string;
  send(data: string | Uint8Array): void;
  close(code?: number): void;
  // Each has its own types of events, which agree in nothing but what is read here.
  // eslint-disable-next-line @typescript-eslint/no-explicit-any
  addEventListener(type: "open" | "message" | "close" | "error", listener: (event: any) => void): void;
  /** Only that of `ws`: what is not read is not taken off the network. */
  pause?(): void;
  resume?(): void;
}

/** Makes a WebSocket that sends these headers. */
export type WebSocketMaker = (
  url: string,
  headers: Readonly<Record<string, string>>,
) => WebSocketLike | Promise<WebSocketLike>;

type SocketClass = new (url: string, options: { headers: object }) => WebSocketLike;

interface Globals {
  WebSocket?: SocketClass;
  process?: { versions?: Record<string, string> };
}

async function makeSocket(
  url: string,
  headers: Readonly<Record<string, string>>,
): Promise<WebSocketLike> {
  const { WebSocket: own, process } = globalThis as unknown as Globals;
  if (own === undefined && process?.versions !== undefined) {
    // By a name that bundlers for the web do not look into.
    const name = "ws";
    let found: { WebSocket: SocketClass };
    try {
      found = (await import(name)) as { WebSocket: SocketClass };
    } catch (cause) {
      throw new ConnectionError("this runtime has no WebSocket: install `ws`, or use Node 22", {
        cause,
      });
    }
    return new found.WebSocket(url, { headers });
  }
  if (own === undefined) throw new ConnectionError("this runtime has no WebSocket");
  return new own(url, { headers });
}

/** Messages that wait to be read before `ws` is asked to wait. */
const MANY = 64;

/** A terminal of a sandbox. Iterate over what it shows; `send()` what is typed. */
export class Terminal implements AsyncIterableIterator<Uint8Array> {
  /** The command's id and pid, once something was read. */
  started: Omit<StartedEvent, "type"> | undefined;
  /** How the program ended, after the last bytes. */
  exit: TerminalExit | undefined;
  readonly #socket: WebSocketLike;
  readonly #shown: Uint8Array[] = [];
  #error: ZerobootError | undefined;
  #over = false;
  #wake: () => void = () => undefined;

  /** @internal */
  constructor(socket: WebSocketLike) {
    this.#socket = socket;
    socket.addEventListener("message", ({ data }: { data: unknown }) => {
      if (typeof data === "string") this.#word(data);
      else this.#shown.push(new Uint8Array(data as ArrayBuffer));
      if (this.#shown.length > MANY) socket.pause?.();
      this.#wake();
    });
    socket.addEventListener("close", () => {
      this.#over = true;
      this.#wake();
    });
  }

  /** What it shows next; undefined at its end. `TimeoutError` after `timeout` seconds. */
  async read(timeout?: number): Promise<Uint8Array | undefined> {
    const end = Date.now() + (timeout ?? Infinity) * 1000;
    for (;;) {
      const shown = this.#shown.shift();
      if (shown !== undefined) {
        if (this.#shown.length === 0) this.#socket.resume?.();
        return shown;
      }
      if (this.#over) {
        if (this.#error !== undefined) throw this.#error;
        return undefined;
      }
      const left = end - Date.now();
      if (left <= 0) throw new TimeoutError(`nothing within ${timeout ?? 0} s`, { mayHaveRun: true });
      await this.#event(left);
    }
  }

  /** What is typed. */
  send(data: Data): void {
    this.#say(typeof data === "string" ? utf8(data) : data);
  }

  resize(columns: number, rows: number): void {
    this.#say(JSON.stringify({ resize: { columns, rows } }));
  }

  /** Sends a signal to the program that the terminal belongs to. */
  signal(signal: number | string): void {
    this.#say(JSON.stringify(signalBody(signal)));
  }

  /** Reads to the end of the program, and says how it ended. */
  async wait(onOutput?: (text: string) => unknown): Promise<TerminalExit> {
    for await (const shown of this) await onOutput?.(lossy(shown));
    if (this.exit === undefined) {
      throw new ConnectionError("the terminal ended before its program", { mayHaveRun: true });
    }
    return this.exit;
  }

  /** Hangs up. */
  async close(): Promise<void> {
    this.#socket.resume?.();
    this.#socket.close(1000);
    const end = Date.now() + 1000;
    while (!this.#over && Date.now() < end) await this.#event(end - Date.now());
    this.#over = true;
    this.#shown.length = 0;
  }

  async next(): Promise<IteratorResult<Uint8Array, undefined>> {
    const value = await this.read();
    return value === undefined ? { done: true, value } : { done: false, value };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  #say(data: string | Uint8Array): void {
    if (this.#over) throw new ConnectionError("the terminal is closed", { mayHaveRun: true });
    this.#socket.send(data);
  }

  /** Something came, or this time passed. */
  async #event(milliseconds: number): Promise<void> {
    let timer: ReturnType<typeof setTimeout> | undefined;
    await new Promise<void>((resolve) => {
      this.#wake = resolve;
      if (milliseconds < 0x7fffffff) timer = setTimeout(resolve, milliseconds);
    });
    clearTimeout(timer);
  }

  #word(text: string): void {
    const word = parse(text) ?? {};
    if (isObject(word["started"])) {
      this.started = word["started"] as unknown as Omit<StartedEvent, "type">;
    } else if (isObject(word["exit"])) {
      this.exit = word["exit"] as unknown as TerminalExit;
      this.#error = undefined; // of something on the way, such as input that came too late
    } else if (isObject(word["error"])) {
      this.#error = failure(word["error"], undefined);
    }
  }
}

export async function openTerminal(
  inside: { transport: Transport; grace: number },
  path: string,
  size: { columns: number; rows: number } | undefined,
  signal: AbortSignal | undefined,
): Promise<Terminal> {
  const { transport, grace } = inside;
  for (const side of Object.values(size ?? {})) {
    if (!Number.isInteger(side) || side < 1 || side > 0xffff) {
      throw new RangeError("columns and rows must be whole numbers from 1 to 65535");
    }
  }
  signal?.throwIfAborted();
  const url = transport.baseUrl.replace(/^http/, "ws") + path;
  const socket = await (transport.webSocket ?? makeSocket)(url, transport.headers);
  socket.binaryType = "arraybuffer";
  // Made before the first message can come.
  const terminal = new Terminal(socket);
  const opened = await new Promise<boolean | undefined>((resolve) => {
    const timer = setTimeout(resolve, grace * 1000, undefined);
    const settle = (value: boolean): void => {
      clearTimeout(timer);
      resolve(value);
    };
    socket.addEventListener("open", () => {
      settle(true);
    });
    socket.addEventListener("error", () => {
      settle(false);
    });
    socket.addEventListener("close", () => {
      settle(false);
    });
    signal?.addEventListener("abort", () => {
      settle(false);
    });
  });
  if (opened === true && signal?.aborted !== true) {
    signal?.addEventListener("abort", () => void terminal.close());
    return terminal;
  }
  socket.close();
  signal?.throwIfAborted();
  if (opened === undefined) {
    throw new TimeoutError(`no answer within ${grace} s`, { mayHaveRun: true });
  }
  // A WebSocket does not tell why: the same without one does.
  const answer = await ask(transport, {
    method: "GET",
    path,
    accept: "application/json",
    budget: grace,
    signal,
  });
  const error = answer.error();
  if (error.code !== "not_a_websocket") throw error;
  throw new ConnectionError(`the terminal at ${transport.baseUrl} could not be opened`);
}
