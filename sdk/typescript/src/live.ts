/// <reference lib="esnext.disposable" preserve="true" />

import { toBase64, utf8, join, lossy } from "./bytes.js";
import {
  ConnectionError,
  FileNotFound,
  SandboxGone,
  SandboxNotFound,
  ZerobootError,
} from "./errors.js";
import { CellResult, checked, CommandResult } from "./live-answers.js";
import type {
  Change,
  Checkpoint,
  CommandInfo,
  Context,
  Entry,
  RichResult,
  SandboxInfo,
} from "./live-answers.js";
import { CellReader, CommandReader, WatchReader } from "./live-events.js";
import type { CellEvent, CommandEvent, Reader } from "./live-events.js";
import { openTerminal } from "./terminal.js";
import type { Terminal } from "./terminal.js";
import { Answer, ask, open } from "./transport.js";
import type { Call, Open, Transport } from "./transport.js";
import type { Data } from "./wire.js";

/** A program with its arguments, or a line for the shell. */
export type CommandLine = string | readonly string[];

/** The source of a file: its content, or pieces of it. */
export type FileSource = Data | Blob | ReadableStream<Uint8Array> | AsyncIterable<Uint8Array>;

export interface CellOptions {
  /** The context. Default: "default". */
  context?: string | Context | undefined;
  /** Seconds after which the cell is interrupted. */
  timeout?: number | undefined;
  /** Aborting it stops the waiting. The cell goes on: `contexts.interrupt()` stops it. */
  signal?: AbortSignal | undefined;
  /** How many seconds this client waits, instead of `timeout` and the grace. */
  requestTimeout?: number | undefined;
}

export interface CellRunOptions extends CellOptions {
  /** Called with the output as it comes. The result has it, too. */
  onStdout?: ((text: string) => unknown) | undefined;
  onStderr?: ((text: string) => unknown) | undefined;
  onResult?: ((result: RichResult) => unknown) | undefined;
}

export interface CommandOptions {
  /** The working directory. Default: the home directory. */
  cwd?: string | undefined;
  env?: Record<string, string> | undefined;
  stdin?: Data | undefined;
  /** Seconds after which it is killed. */
  timeout?: number | undefined;
}

export interface CommandStreamOptions extends CommandOptions {
  /** Aborting it ends the program. */
  signal?: AbortSignal | undefined;
  requestTimeout?: number | undefined;
}

export interface CommandRunOptions extends CommandStreamOptions {
  onStdout?: ((text: string) => unknown) | undefined;
  onStderr?: ((text: string) => unknown) | undefined;
}

export interface StartOptions extends CommandOptions {
  /** `write()` and `closeStdin()` come later. */
  keepStdinOpen?: boolean | undefined;
  /** Runs it on a terminal of this size instead of pipes. */
  terminal?: { columns: number; rows: number } | undefined;
  /** Your own label, for the list. */
  tag?: string | undefined;
}

export interface CheckpointOptions {
  /** Seconds that the server keeps it. */
  timeout?: number | undefined;
  metadata?: Record<string, string> | undefined;
  signal?: AbortSignal | undefined;
}

export interface BranchOptions {
  /** Seconds that each lives, unless its lease is extended. */
  timeout?: number | undefined;
  /** In place of this one's. */
  metadata?: Record<string, string> | undefined;
  signal?: AbortSignal | undefined;
}

export interface WaitOptions {
  /** Seconds after which this client stops waiting; the program goes on. */
  timeout?: number | undefined;
  signal?: AbortSignal | undefined;
}

export interface TerminalOptions {
  columns?: number | undefined;
  rows?: number | undefined;
  cwd?: string | undefined;
  signal?: AbortSignal | undefined;
}

const SSE = "text/event-stream";
const BYTES = "application/octet-stream";
/** The server sends something every 15 s, so a minute of silence means a dead connection. */
const SILENCE = 60;
/** Node's fetch gives up on an answer after 300 s without a byte: what may take longer is streamed. */
const LONG_SECONDS = 240;

/** What the parts of a sandbox share. */
interface Inside {
  id: string;
  readonly transport: Transport;
  /** Default timeout of a run. */
  readonly timeout: number;
  readonly grace: number;
}

/**
 * A long-lived sandbox: many runs, commands, files and terminals, until its lease ends. Made by
 * `Sandbox.create()` and `Sandbox.connect()`. `await using` ends one that was created.
 */
export class LiveSandbox {
  /** What the server last said about it. */
  info: SandboxInfo;
  /** Its named interpreters. */
  readonly contexts: Contexts;
  /** Its programs. */
  readonly commands: Commands;
  /** Its files. */
  readonly files: Files;
  readonly #in: Inside;
  readonly #killAtEnd: boolean;

  /** @internal */
  constructor(
    info: SandboxInfo,
    options: { transport: Transport; timeout: number; grace: number; killAtEnd: boolean },
  ) {
    this.info = info;
    this.#in = { ...options, id: info.id };
    this.#killAtEnd = options.killAtEnd;
    this.contexts = new Contexts(this.#in);
    this.commands = new Commands(this.#in);
    this.files = new Files(this.#in);
  }

  get id(): string {
    return this.info.id;
  }

  /**
   * Runs a cell in a context and waits for its end. The context keeps its state. An error that the
   * code does not catch is in the result; `result.check()` throws.
   */
  async run(code: string, options: CellRunOptions = {}): Promise<CellResult> {
    const { onStdout, onStderr, onResult } = options;
    const [body, budget] = this.#cell(code, options);
    if (onStdout || onStderr || onResult || body.timeout_seconds > LONG_SECONDS) {
      const stream = this.stream(code, options);
      for await (const event of stream) {
        if (event.type === "stdout") await onStdout?.(event.text);
        else if (event.type === "stderr") await onStderr?.(event.text);
        else if (event.type === "result") await onResult?.(event);
      }
      return stream.result;
    }
    const answer = await say(this.#in, "POST", ["run"], { body, budget, signal: options.signal });
    return new CellResult(answer.json(), answer.requestId);
  }

  /**
   * Runs a cell and gives what happens as it happens, for `for await`. The request is sent when the
   * iteration begins. The cell goes on when you leave early: `contexts.interrupt()` stops it.
   */
  stream(code: string, options: CellOptions = {}): RunStream<CellEvent, CellResult> {
    const [body, budget] = this.#cell(code, options);
    const reader = new CellReader(body.context ?? "default");
    return new RunStream(
      runEvents(this.#in, reader, {
        method: "POST",
        path: pathOf(this.#in, ["run"]),
        body: JSON.stringify(body),
        accept: SSE,
        budget,
        signal: options.signal,
      }),
    );
  }

  /**
   * Starts a program (a line for the shell; a shell if undefined) on a new terminal. Closing it ends
   * the program.
   */
  async terminal(command?: string, options: TerminalOptions = {}): Promise<Terminal> {
    const { columns = 80, rows = 24, cwd, signal } = options;
    const query = { columns, rows, command, cwd, end_with_client: true };
    return openTerminal(this.#in, pathOf(this.#in, ["terminal"], query), { columns, rows }, signal);
  }

  /** Asks the server about it again. */
  async refresh(): Promise<SandboxInfo> {
    this.info = sandboxOf((await say(this.#in, "GET", [])).json());
    return this.info;
  }

  /** Sets its lease to `timeout` seconds from now. */
  async extend(timeout: number): Promise<SandboxInfo> {
    const answer = await say(this.#in, "POST", ["extend"], { body: { timeout_seconds: timeout } });
    this.info = sandboxOf(answer.json());
    return this.info;
  }

  /**
   * Makes `count` sandboxes that begin where this one is now; it goes on. VM engine. They have its
   * memory, files, processes and contexts. All are made, or none; the end of `await using` ends one.
   */
  async branch(count = 1, options: BranchOptions = {}): Promise<LiveSandbox[]> {
    return this.#begin(pathOf(this.#in, ["branch"]), count, options);
  }

  /** Keeps this moment of it, for an hour unless said otherwise; it goes on. VM engine. */
  async checkpoint(options: CheckpointOptions = {}): Promise<Checkpoint> {
    const { timeout = 3600, metadata, signal } = options;
    const body = { timeout_seconds: timeout, metadata };
    const answer = await say(this.#in, "POST", ["checkpoints"], { body, signal });
    return checkpointOf(answer.json());
  }

  /** The checkpoints of it that are kept, the oldest first. */
  async checkpoints(): Promise<Checkpoint[]> {
    const path = `/v1/checkpoints?sandbox_id=${encodeURIComponent(this.id)}`;
    const answer = (await sayTo(this.#in, "GET", path)).json();
    return checked<{ checkpoints: unknown[] }>(answer, "checkpoints").checkpoints.map(checkpointOf);
  }

  /**
   * Makes `count` sandboxes that begin at a checkpoint, of this sandbox or another one. All are made,
   * or none; the end of `await using` ends one.
   */
  async restore(
    checkpoint: string | Checkpoint,
    count = 1,
    options: BranchOptions = {},
  ): Promise<LiveSandbox[]> {
    return this.#begin(`${checkpointPath(checkpoint)}/restore`, count, options);
  }

  /** Lets the server forget a checkpoint. Sandboxes that began there stay. */
  async removeCheckpoint(checkpoint: string | Checkpoint): Promise<void> {
    await sayTo(this.#in, "DELETE", checkpointPath(checkpoint));
  }

  /**
   * Goes back to a checkpoint of it, the last one if undefined. What runs in it now ends. Its id, lease
   * and metadata stay.
   */
  async rollback(checkpoint?: string | Checkpoint): Promise<SandboxInfo> {
    const body = checkpoint === undefined ? {} : { checkpoint_id: idOf(checkpoint) };
    this.info = sandboxOf((await say(this.#in, "POST", ["rollback"], { body })).json());
    return this.info;
  }

  /** Takes over the id of the sandbox that it is a branch of, which ends. */
  async promote(): Promise<SandboxInfo> {
    this.info = sandboxOf((await say(this.#in, "POST", ["promote"])).json());
    this.#in.id = this.info.id;
    return this.info;
  }

  async #begin(path: string, count: number, options: BranchOptions): Promise<LiveSandbox[]> {
    const { timeout = 300, metadata, signal } = options;
    const body = { count, timeout_seconds: timeout, metadata };
    const answer = (await sayTo(this.#in, "POST", path, { body, signal })).json();
    const { sandboxes } = checked<{ sandboxes: unknown[] }>(answer, "sandboxes");
    const { transport, timeout: ofRuns, grace } = this.#in;
    const inside = { transport, timeout: ofRuns, grace, killAtEnd: true };
    return sandboxes.map((raw) => new LiveSandbox(sandboxOf(raw), inside));
  }

  /** Ends it now. False if it had ended already. */
  async kill(): Promise<boolean> {
    try {
      await say(this.#in, "DELETE", []);
      return true;
    } catch (error) {
      if (error instanceof SandboxGone || error instanceof SandboxNotFound) return false;
      throw error;
    }
  }

  /** What `await using` does at the end: ends one that was created, and leaves a connected one alone. */
  async close(): Promise<void> {
    if (this.#killAtEnd) await this.kill();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  #cell(code: string, options: CellOptions): [CellBody, number] {
    const { context, timeout = this.#in.timeout } = options;
    const body: CellBody = { code, timeout_seconds: timeout };
    if (context !== undefined) body.context = nameOf(context);
    return [body, options.requestTimeout ?? timeout + this.#in.grace];
  }
}

interface CellBody {
  code: string;
  context?: string;
  timeout_seconds: number;
}

/** Items of a stream. Iterate once. Leaving the loop, or `close()`, stops it. */
export class LiveStream<T> implements AsyncIterableIterator<T> {
  readonly #items: AsyncGenerator<T, void>;

  /** @internal */
  constructor(items: AsyncGenerator<T, void>) {
    this.#items = items;
  }

  async next(): Promise<IteratorResult<T, void>> {
    return this.#items.next();
  }

  async return(): Promise<IteratorResult<T, void>> {
    return this.#items.return();
  }

  async close(): Promise<void> {
    await this.#items.return();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  [Symbol.asyncIterator](): this {
    return this;
  }
}

/** The events of one run. */
export class RunStream<E extends { type: string }, R> extends LiveStream<E> {
  #result: R | undefined;

  /** The result, after the last event. */
  get result(): R {
    if (this.#result === undefined) {
      throw new ZerobootError("the run has not ended", { mayHaveRun: true });
    }
    return this.#result;
  }

  override async next(): Promise<IteratorResult<E, void>> {
    const step = await super.next();
    if (!step.done && step.value.type === "end") {
      this.#result = (step.value as unknown as { result: R }).result;
    }
    return step;
  }
}

/** The named interpreters of a sandbox. `default` exists from the start. */
export class Contexts {
  readonly #in: Inside;

  /** @internal */
  constructor(inside: Inside) {
    this.#in = inside;
  }

  /** Starts an interpreter. Without a name the server chooses one. */
  async create(name?: string, options: { cwd?: string } = {}): Promise<Context> {
    const answer = await say(this.#in, "POST", ["contexts"], { body: { name, ...options } });
    return checked<Context>(answer.json(), "name");
  }

  async list(): Promise<Context[]> {
    const answer = await say(this.#in, "GET", ["contexts"]);
    return entriesOf<Context>(answer.json(), "contexts");
  }

  /** Interrupts the cell that runs: `KeyboardInterrupt` in Python. The context keeps its state. */
  async interrupt(context: string | Context = "default"): Promise<void> {
    await say(this.#in, "POST", ["contexts", nameOf(context), "interrupt"]);
  }

  /** Replaces the interpreter by a new one. Its cell ends and its state is lost. */
  async restart(context: string | Context = "default"): Promise<Context> {
    const answer = await say(this.#in, "POST", ["contexts", nameOf(context), "restart"]);
    return checked<Context>(answer.json(), "name");
  }

  /** Ends the interpreter. */
  async delete(context: string | Context): Promise<void> {
    await say(this.#in, "DELETE", ["contexts", nameOf(context)]);
  }
}

/** The programs of a sandbox. */
export class Commands {
  readonly #in: Inside;

  /** @internal */
  constructor(inside: Inside) {
    this.#in = inside;
  }

  /**
   * Runs a program and waits for its end. A string is a line for the shell; a list is a program with
   * its arguments. A program that fails is a result; `result.check()` throws.
   */
  async run(command: CommandLine, options: CommandRunOptions = {}): Promise<CommandResult> {
    const { onStdout, onStderr, signal } = options;
    const [body, budget] = this.#foreground(command, options);
    // A client that leaves ends the program only if it was streamed.
    if (onStdout || onStderr || signal || body.timeout_seconds > LONG_SECONDS) {
      return hear(this.stream(command, options), options);
    }
    const answer = await say(this.#in, "POST", ["commands"], { body, budget });
    return new CommandResult(answer.json(), answer.requestId);
  }

  /**
   * Runs a program and gives what happens as it happens, for `for await`. The request is sent when the
   * iteration begins. Leaving early ends the program.
   */
  stream(
    command: CommandLine,
    options: CommandStreamOptions = {},
  ): RunStream<CommandEvent, CommandResult> {
    const [body, budget] = this.#foreground(command, options);
    return new RunStream(
      runEvents(this.#in, new CommandReader(), {
        method: "POST",
        path: pathOf(this.#in, ["commands"]),
        body: JSON.stringify({ ...body, end_with_client: true }),
        accept: SSE,
        budget,
        signal: options.signal,
      }),
    );
  }

  /** Starts a program in the background. It goes on when this client goes. */
  async start(command: CommandLine, options: StartOptions = {}): Promise<Command> {
    const { keepStdinOpen, terminal, tag, timeout } = options;
    const body = {
      ...commandBody(command, options),
      background: true,
      timeout_seconds: timeout,
      keep_stdin_open: keepStdinOpen,
      terminal,
      tag,
    };
    const answer = await say(this.#in, "POST", ["commands"], { body });
    return new Command(this.#in, checked<CommandInfo>(answer.json(), "id"));
  }

  /** Lists the programs that run, and some that have ended. */
  async list(): Promise<CommandInfo[]> {
    const answer = await say(this.#in, "GET", ["commands"]);
    return entriesOf<CommandInfo>(answer.json(), "commands");
  }

  /** Connects to a program that was started before, perhaps by another client. */
  async connect(id: string): Promise<Command> {
    const answer = await say(this.#in, "GET", ["commands", id]);
    return new Command(this.#in, checked<CommandInfo>(answer.json(), "id"));
  }

  #foreground(
    command: CommandLine,
    options: CommandStreamOptions,
  ): [{ timeout_seconds: number }, number] {
    const { timeout = this.#in.timeout } = options;
    const body = { ...commandBody(command, options), timeout_seconds: timeout };
    return [body, options.requestTimeout ?? timeout + this.#in.grace];
  }
}

/** A program in the background of a sandbox. */
export class Command {
  /** What the server last said about it. */
  info: CommandInfo;
  readonly #in: Inside;
  #result: CommandResult | undefined;

  /** @internal */
  constructor(inside: Inside, info: CommandInfo) {
    this.#in = inside;
    this.info = info;
  }

  get id(): string {
    return this.info.id;
  }

  get pid(): number | null {
    return this.info.pid;
  }

  /**
   * Its output from byte `offset` on, as it comes, until its end. A connection that breaks is made
   * again where it broke. What the server no longer has is a `lost` event.
   */
  output(offset = 0, options: WaitOptions = {}): RunStream<CommandEvent, CommandResult> {
    return new RunStream(this.#output(offset, options));
  }

  /** Waits for its end. The result has all its output that the server still has. */
  async wait(
    options: WaitOptions & Pick<CommandRunOptions, "onStdout" | "onStderr"> = {},
  ): Promise<CommandResult> {
    this.#result ??= await hear(this.output(0, options), options);
    return this.#result;
  }

  /** Asks the server about it again. */
  async refresh(): Promise<CommandInfo> {
    const answer = await say(this.#in, "GET", ["commands", this.id]);
    this.info = checked<CommandInfo>(answer.json(), "id");
    return this.info;
  }

  /** Writes bytes to its standard input, or its terminal. */
  async write(data: Data): Promise<void> {
    await this.#stdin(typeof data === "string" ? utf8(data) : data, undefined);
  }

  /** Closes its standard input. */
  async closeStdin(): Promise<void> {
    await this.#stdin(new Uint8Array(), true);
  }

  /** Sends a signal, by number or name. */
  async signal(signal: number | string): Promise<void> {
    await say(this.#in, "POST", ["commands", this.id, "signal"], { body: signalBody(signal) });
  }

  /** Kills it and its children. The server forgets a command that has ended. */
  async kill(): Promise<void> {
    await say(this.#in, "DELETE", ["commands", this.id]);
  }

  /** Sets the size of its terminal. */
  async resize(columns: number, rows: number): Promise<void> {
    await say(this.#in, "POST", ["commands", this.id, "resize"], { body: { columns, rows } });
  }

  /** Opens its terminal, from byte `offset` of its output on. Closing it does not end the program. */
  async terminal(offset = 0, options: { signal?: AbortSignal } = {}): Promise<Terminal> {
    const path = pathOf(this.#in, ["commands", this.id, "terminal"], { offset });
    return openTerminal(this.#in, path, undefined, options.signal);
  }

  async #stdin(data: Uint8Array, end: boolean | undefined): Promise<void> {
    const call: Call = {
      method: "POST",
      path: pathOf(this.#in, ["commands", this.id, "stdin"], { end }),
      body: data,
      headers: { "Content-Type": BYTES },
      accept: "application/json",
      // The program may take its time to read it.
      budget: Infinity,
    };
    const answer = await ask(this.#in.transport, call);
    if (!answer.good) throw answer.error();
  }

  async *#output(offset: number, options: WaitOptions): AsyncGenerator<CommandEvent, void> {
    const reader = new CommandReader(undefined, this.id, this.pid);
    const { timeout = Infinity, signal } = options;
    const end = Date.now() + timeout * 1000;
    for (let failed = 0; ; ) {
      const path = pathOf(this.#in, ["commands", this.id, "output"], {
        offset: reader.offset ?? offset,
      });
      const budget = Math.max((end - Date.now()) / 1000, 0.001);
      const opened = await listen(this.#in, { method: "GET", path, accept: SSE, budget, signal });
      reader.resume(opened.response.headers.get("x-request-id") ?? undefined);
      try {
        for await (const event of read(this.#in, opened, reader)) {
          failed = 0;
          yield event;
        }
        reader.finish();
        return;
      } catch (error) {
        failed += 1;
        const broke = error instanceof ConnectionError;
        if (!broke || failed > this.#in.transport.maxRetries) throw error;
      }
      await new Promise((resolve) => setTimeout(resolve, 100 * 2 ** failed));
    }
  }
}

/** The files of a sandbox. Paths are absolute, or relative to the home directory. */
export class Files {
  readonly #in: Inside;

  /** @internal */
  constructor(inside: Inside) {
    this.#in = inside;
  }

  /** Reads a file, or `length` bytes of it from `offset`. */
  async read(path: string, options: { offset?: number; length?: number } = {}): Promise<Uint8Array> {
    const pieces: Uint8Array[] = [];
    for await (const piece of this.stream(path, options)) pieces.push(piece);
    return join(pieces);
  }

  /** The content as text, with U+FFFD where it is not UTF-8. */
  async readText(path: string): Promise<string> {
    return lossy(await this.read(path));
  }

  /** Reads a file piece by piece: for files that are larger than memory. */
  stream(
    path: string,
    options: { offset?: number; length?: number } = {},
  ): LiveStream<Uint8Array> {
    const { offset = 0, length } = options;
    if (!(offset >= 0)) throw new RangeError("the offset is negative");
    if (length !== undefined && !(length > 0)) throw new RangeError("the length must be above zero");
    const last = length === undefined ? "" : String(offset + length - 1);
    const range = offset > 0 || length !== undefined ? { Range: `bytes=${offset}-${last}` } : {};
    return new LiveStream(this.#pieces(path, range));
  }

  /**
   * Writes a file, and makes its directories. It appears under its name when it is whole. A stream is
   * sent in pieces. `mode`: permission bits, as 0o755 or "755".
   */
  async write(
    path: string,
    data: FileSource,
    options: { mode?: number | string } = {},
  ): Promise<Entry> {
    const answer = await ask(this.#in.transport, {
      method: "PUT",
      path: pathOf(this.#in, ["files"], { path, mode: modeOf(options.mode) }),
      body: await upload(data),
      headers: { "Content-Type": BYTES },
      accept: "application/json",
      budget: Infinity,
    });
    return entryOf(answer.json());
  }

  /** Lists a directory; with `depth` 2 also its directories, and so on. */
  async list(path = ".", options: { depth?: number } = {}): Promise<Entry[]> {
    const answer = await this.#ask("GET", ["list"], { path, depth: options.depth ?? 1 });
    return entriesOf<Entry>(answer.json(), "entries");
  }

  /** Describes a file; of a link, the link itself. */
  async stat(path: string): Promise<Entry> {
    return entryOf((await this.#ask("GET", ["stat"], { path })).json());
  }

  async exists(path: string): Promise<boolean> {
    try {
      await this.stat(path);
      return true;
    } catch (error) {
      if (error instanceof FileNotFound) return false;
      throw error;
    }
  }

  /** Makes a directory and its parents. It may exist. */
  async mkdir(path: string): Promise<Entry> {
    return entryOf((await this.#ask("POST", ["mkdir"], {}, { path })).json());
  }

  /** Moves a file or a directory. A file at the new path is replaced. */
  async move(from: string, to: string): Promise<Entry> {
    return entryOf((await this.#ask("POST", ["move"], {}, { from, to })).json());
  }

  /** Removes a file or a directory; with `recursive` also everything in it. */
  async remove(path: string, options: { recursive?: boolean } = {}): Promise<void> {
    await this.#ask("DELETE", [], { path, recursive: options.recursive === true || undefined });
  }

  /** Sets the permission bits: 0o755, or "755". */
  async chmod(path: string, mode: number | string): Promise<Entry> {
    const body = { path, mode: modeOf(mode) };
    return entryOf((await this.#ask("POST", ["chmod"], {}, body)).json());
  }

  /** Watches a directory for changes. Leave the loop, or close it, to stop. */
  async watch(
    path = ".",
    options: { recursive?: boolean; signal?: AbortSignal } = {},
  ): Promise<Watch> {
    const query = { path, recursive: options.recursive === true || undefined };
    const opened = await listen(this.#in, {
      method: "GET",
      path: pathOf(this.#in, ["files", "watch"], query),
      accept: SSE,
      budget: Infinity,
      signal: options.signal,
    });
    const reader = new WatchReader(opened.response.headers.get("x-request-id") ?? undefined);
    return new Watch(read(this.#in, opened, reader), opened);
  }

  async #ask(
    method: Call["method"],
    parts: string[],
    query: Query,
    body?: Record<string, unknown>,
  ): Promise<Answer> {
    // Large trees take their time.
    return say(this.#in, method, ["files", ...parts], { query, body, budget: SILENCE });
  }

  async *#pieces(path: string, headers: Record<string, string>): AsyncGenerator<Uint8Array, void> {
    const opened = await listen(this.#in, {
      method: "GET",
      path: pathOf(this.#in, ["files"], { path }),
      headers,
      accept: BYTES,
      budget: Infinity,
    });
    yield* chunks(this.#in, opened);
  }
}

/** The changes of a watch. */
export class Watch extends LiveStream<Change> {
  readonly #opened: Open;

  /** @internal */
  constructor(items: AsyncGenerator<Change, void>, opened: Open) {
    super(items);
    this.#opened = opened;
  }

  override async close(): Promise<void> {
    // A generator that was never asked for anything would not close its answer.
    this.#opened.attempt.abandon();
    await super.close().catch(() => undefined);
  }
}

// --- requests -----------------------------------------------------------------------------

type Query = Record<string, string | number | boolean | undefined>;

export function queryOf(query: Query): string {
  const pairs = Object.entries(query).filter(([, value]) => value !== undefined);
  const said = pairs.map(([name, value]) => `${name}=${encodeURIComponent(String(value))}`);
  return said.length > 0 ? `?${said.join("&")}` : "";
}

function pathOf(inside: { id: string }, parts: readonly string[], query: Query = {}): string {
  const names = ["/v1/sandboxes", ...[inside.id, ...parts].map((part) => encodeURIComponent(part))];
  return names.join("/") + queryOf(query);
}

interface More {
  body?: object | undefined;
  budget?: number;
  signal?: AbortSignal | undefined;
}

/** A request about the sandbox, and its good answer. */
async function say(
  inside: Inside,
  method: Call["method"],
  parts: readonly string[],
  more: More & { query?: Query } = {},
): Promise<Answer> {
  return sayTo(inside, method, pathOf(inside, parts, more.query), more);
}

/** A request and its good answer. */
async function sayTo(
  inside: Inside,
  method: Call["method"],
  path: string,
  more: More = {},
): Promise<Answer> {
  const answer = await ask(inside.transport, {
    method,
    path,
    ...(more.body === undefined ? {} : { body: JSON.stringify(more.body) }),
    accept: "application/json",
    budget: more.budget ?? inside.grace,
    signal: more.signal,
  });
  if (!answer.good) throw answer.error();
  return answer;
}

/** A good answer whose body is still to be read. */
async function listen(inside: Inside, call: Call): Promise<Open> {
  const opened = await open(inside.transport, call);
  const { response, attempt } = opened;
  if (response.ok) return opened;
  try {
    throw new Answer(response, await response.text()).error();
  } catch (error) {
    throw error instanceof ZerobootError ? error : attempt.explain(error, inside.transport.baseUrl);
  } finally {
    attempt.abandon();
  }
}

/** The body of an answer. Leaving early closes the connection. */
async function* chunks(inside: Inside, opened: Open): AsyncGenerator<Uint8Array, void> {
  const { response, attempt } = opened;
  let finished = false;
  try {
    const body = response.body?.getReader();
    for (;;) {
      let chunk: Uint8Array | undefined;
      try {
        attempt.heard(SILENCE);
        chunk = (await body?.read())?.value as Uint8Array | undefined;
      } catch (error) {
        throw attempt.explain(error, inside.transport.baseUrl);
      }
      if (chunk === undefined) break;
      yield chunk;
    }
    finished = true;
  } finally {
    if (finished) attempt.done();
    else attempt.abandon();
  }
}

async function* read<E>(inside: Inside, opened: Open, reader: Reader<E>): AsyncGenerator<E, void> {
  try {
    for await (const chunk of chunks(inside, opened)) yield* reader.feed(chunk);
  } catch (error) {
    // Broken after the last event: nothing is missing.
    if (!reader.ended || !(error instanceof ConnectionError)) throw error;
  }
}

/** The events of a run that this request starts. */
async function* runEvents<E>(
  inside: Inside,
  reader: Reader<E> & { resume(requestId: string | undefined): void; finish(): void },
  call: Call,
): AsyncGenerator<E, void> {
  const opened = await listen(inside, call);
  reader.resume(opened.response.headers.get("x-request-id") ?? undefined);
  yield* read(inside, opened, reader);
  reader.finish();
}

async function hear(
  stream: RunStream<CommandEvent, CommandResult>,
  { onStdout, onStderr }: Pick<CommandRunOptions, "onStdout" | "onStderr">,
): Promise<CommandResult> {
  for await (const event of stream) {
    if (event.type === "stdout") await onStdout?.(event.text);
    else if (event.type === "stderr") await onStderr?.(event.text);
  }
  return stream.result;
}

function commandBody(command: CommandLine, options: CommandOptions): Record<string, unknown> {
  const { cwd, env, stdin } = options;
  return {
    ...(typeof command === "string" ? { command } : { argv: command }),
    cwd,
    env,
    ...(stdin === undefined
      ? {}
      : typeof stdin === "string"
        ? { stdin }
        : { stdin_base64: toBase64(stdin) }),
  };
}

export function signalBody(signal: number | string): { signal: number | string } {
  if (typeof signal === "number") return { signal };
  const name = signal.toUpperCase();
  return { signal: name.startsWith("SIG") ? name : `SIG${name}` };
}

function modeOf(mode: number | string | undefined): string | undefined {
  return typeof mode === "number" ? mode.toString(8) : mode;
}

function nameOf(context: string | Context): string {
  return typeof context === "string" ? context : context.name;
}

async function upload(data: FileSource): Promise<Uint8Array | ReadableStream<Uint8Array>> {
  if (typeof data === "string") return utf8(data);
  if (data instanceof Uint8Array) return data;
  if (data instanceof Blob) return new Uint8Array(await data.arrayBuffer());
  if (data instanceof ReadableStream) return data;
  const pieces = data[Symbol.asyncIterator]();
  return new ReadableStream<Uint8Array>({
    async pull(controller): Promise<void> {
      const step = await pieces.next();
      if (step.done === true) controller.close();
      else controller.enqueue(step.value);
    },
    async cancel(): Promise<void> {
      await pieces.return?.();
    },
  });
}

// --- answers ------------------------------------------------------------------------------

export function sandboxOf(raw: unknown): SandboxInfo {
  return checked<SandboxInfo>(raw, "id", "template", "expires_at");
}

function checkpointOf(raw: unknown): Checkpoint {
  return checked<Checkpoint>(raw, "id", "sandbox_id", "memory_bytes");
}

function idOf(checkpoint: string | Checkpoint): string {
  return typeof checkpoint === "string" ? checkpoint : checkpoint.id;
}

function checkpointPath(checkpoint: string | Checkpoint): string {
  return `/v1/checkpoints/${encodeURIComponent(idOf(checkpoint))}`;
}

function entryOf(raw: unknown): Entry {
  return checked<Entry>(raw, "path", "kind", "size");
}

export function entriesOf<T>(raw: Record<string, unknown>, name: string): T[] {
  const found = raw[name];
  checked(Array.isArray(found) ? raw : {}, name as never);
  return found as T[];
}
