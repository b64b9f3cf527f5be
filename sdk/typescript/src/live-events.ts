// Events of runs and watches, and the readers that make them out of bytes.

import { ConnectionError, ServerError } from "./errors.js";
import { failure, marked, SseReader } from "./events.js";
import type { OutputEvent } from "./events.js";
import { lossy } from "./bytes.js";
import { CellResult, CommandResult, RichResult, text } from "./live-answers.js";
import type { CellError, Change, ChangeKind } from "./live-answers.js";
import { dataOf, isObject } from "./result.js";

/** The run has begun. */
export interface StartedEvent {
  type: "started";
  id: string;
  /** null for a cell. */
  pid: number | null;
}

/** The error that the cell did not catch. */
export interface CellErrorEvent extends CellError {
  type: "error";
}

/** So many bytes of output fell out of the server's buffer. */
export interface LostEvent {
  type: "lost";
  bytes: number;
}

/** The last event. `result` is the same as `run` would have returned. */
export interface CellEndEvent {
  type: "end";
  result: CellResult;
}

/** The last event. `result` has what came since the first event of this stream. */
export interface CommandEndEvent {
  type: "end";
  result: CommandResult;
}

export type CellEvent =
  | StartedEvent
  | OutputEvent
  | RichResult
  | CellErrorEvent
  | LostEvent
  | CellEndEvent;
export type CommandEvent = StartedEvent | OutputEvent | LostEvent | CommandEndEvent;

/** Something that takes the pieces of a stream. */
export interface Reader<E> {
  feed(chunk: Uint8Array): Generator<E>;
  /** The last event was seen: whatever happens to the stream now, nothing is missing. */
  readonly ended: boolean;
}

/** Chunks of a run's event stream in, events out; collects what the result needs. */
abstract class RunReader<E> implements Reader<E> {
  ended = false;
  protected requestId: string | undefined;
  #sse = new SseReader();
  readonly #streams = { stdout: [] as Uint8Array[], stderr: [] as Uint8Array[] };
  #id: string;
  #pid: number | null;
  #lost = false;

  constructor(requestId?: string, id = "", pid: number | null = null) {
    this.requestId = requestId;
    this.#id = id;
    this.#pid = pid;
  }

  /** Where a stream that broke here goes on. */
  get offset(): string | undefined {
    return this.#sse.lastId;
  }

  /** The same run in a new stream, from `offset` on. */
  resume(requestId: string | undefined): void {
    const { lastId } = this.#sse;
    this.#sse = new SseReader();
    this.#sse.lastId = lastId;
    this.requestId = requestId;
  }

  *feed(chunk: Uint8Array): Generator<E> {
    for (const [name, data] of this.#sse.feed(chunk)) {
      const fields = jsonEvent(name, data, this.requestId);
      if (name === "failure") throw failure(fields, this.requestId);
      const event = this.event(name, fields);
      if (event !== undefined) yield event;
    }
  }

  /** The body is over: was the run? */
  finish(): void {
    if (!this.ended) {
      throw new ConnectionError("the stream ended before the run did", {
        requestId: this.requestId,
        mayHaveRun: true,
      });
    }
  }

  protected abstract event(name: string, fields: Record<string, unknown>): E | undefined;

  protected common(
    name: string,
    fields: Record<string, unknown>,
  ): StartedEvent | OutputEvent | LostEvent | undefined {
    switch (name) {
      case "started":
        this.#id = text(fields["id"]) ?? this.#id;
        this.#pid = typeof fields["pid"] === "number" ? fields["pid"] : this.#pid;
        return { type: name, id: this.#id, pid: this.#pid };
      case "stdout":
      case "stderr": {
        const data = dataOf(fields as { text: string } | { base64: string });
        this.#streams[name].push(data);
        return { type: name, text: text(fields["text"]) ?? lossy(data), data };
      }
      case "lost":
        this.#lost = true;
        return { type: name, bytes: Number(fields["bytes"]) };
      default:
        return undefined; // an event of a newer server
    }
  }

  /** The fields of `end` with the streams put back. */
  protected whole(fields: Record<string, unknown>): Record<string, unknown> {
    this.ended = true;
    const stdout = marked(this.#streams.stdout);
    const stderr = marked(this.#streams.stderr);
    return {
      id: this.#id,
      pid: this.#pid,
      ...fields,
      stdout: stdout.text,
      stderr: stderr.text,
      encoding: { stdout: stdout.encoding, stderr: stderr.encoding },
      truncated: this.#lost,
    };
  }
}

export class CellReader extends RunReader<CellEvent> {
  readonly #context: string;
  readonly #results: Record<string, unknown>[] = [];
  #error: Record<string, unknown> | undefined;

  constructor(context: string) {
    super();
    this.#context = context;
  }

  protected event(name: string, fields: Record<string, unknown>): CellEvent | undefined {
    switch (name) {
      case "result":
        this.#results.push(fields);
        return new RichResult(fields);
      case "error":
        this.#error = fields;
        return { type: name, ...(fields as unknown as CellError) };
      case "end": {
        const own = { context: this.#context, results: this.#results, error: this.#error };
        return { type: name, result: new CellResult({ ...own, ...this.whole(fields) }, this.requestId) };
      }
      default:
        return this.common(name, fields);
    }
  }
}

export class CommandReader extends RunReader<CommandEvent> {
  protected event(name: string, fields: Record<string, unknown>): CommandEvent | undefined {
    if (name !== "end") return this.common(name, fields);
    return { type: name, result: new CommandResult(this.whole(fields), this.requestId) };
  }
}

const CHANGES: readonly string[] = ["created", "modified", "removed", "overflow"];

/** The stream of a watch, which ends with its sandbox. */
export class WatchReader implements Reader<Change> {
  readonly ended = false;
  readonly #sse = new SseReader();
  readonly #requestId: string | undefined;

  constructor(requestId: string | undefined) {
    this.#requestId = requestId;
  }

  *feed(chunk: Uint8Array): Generator<Change> {
    for (const [name, data] of this.#sse.feed(chunk)) {
      const fields = jsonEvent(name, data, this.#requestId);
      if (name === "failure") throw failure(fields, this.#requestId);
      if (CHANGES.includes(name)) {
        yield { kind: name as ChangeKind, path: text(fields["path"]) ?? "" };
      }
    }
  }
}

function jsonEvent(
  name: string,
  data: string,
  requestId: string | undefined,
): Record<string, unknown> {
  let fields: unknown;
  try {
    fields = JSON.parse(data);
  } catch {
    fields = undefined;
  }
  if (!isObject(fields)) {
    throw new ServerError(`the ${name} event is not a JSON object`, { requestId, mayHaveRun: true });
  }
  return fields;
}
