import { exact, join, lossy, toBase64 } from "./bytes.js";
import { ConnectionError, errorFor, ServerError } from "./errors.js";
import type { ZerobootError } from "./errors.js";
import { dataOf, isObject, makeResult, OutputFile } from "./result.js";
import type { Result } from "./result.js";
import type { Isolation, WireFile } from "./wire.js";

/** The sandbox is there and the code begins. */
export interface StartEvent {
  type: "start";
  id: string;
  template: string;
  language: string;
  isolation: Isolation;
  pooled: boolean;
  fork_time_ms: number;
}

/** Output, as it came. `text` never holds half a character; `data` is exact. */
export interface OutputEvent {
  type: "stdout" | "stderr";
  text: string;
  data: Uint8Array;
}

/** A file that was asked for by `outputFiles`. */
export interface FileEvent {
  type: "file";
  path: string;
  file: OutputFile;
}

/** The last event. `result` is the same as `run` would have returned. */
export interface EndEvent {
  type: "end";
  result: Result;
}

export type ExecEvent = StartEvent | OutputEvent | FileEvent | EndEvent;

/** Bytes in, `[event, data]` out. The chunks may be cut anywhere. */
export class SseReader {
  readonly #decoder = new TextDecoder("utf-8"); // drops a BOM, as the format wants
  // Pieces of the current line: a line of megabytes in many chunks is joined once.
  #line: string[] = [];
  #afterCr = false;
  #event = "";
  #data: string[] = [];
  #id: string | undefined;
  /** The `id` of the last event, as a reader would send it to go on from there. */
  lastId: string | undefined;

  *feed(chunk: Uint8Array): Generator<[string, string]> {
    let text = this.#decoder.decode(chunk, { stream: true });
    if (text === "") return;
    const cr = text.endsWith("\r");
    // The second half of a \r\n that was cut in two.
    if (this.#afterCr && text.startsWith("\n")) text = text.slice(1);
    this.#afterCr = cr;
    const lines = text.split(/\r\n|\r|\n/);
    const rest = lines.pop() ?? "";
    for (const line of lines) {
      this.#line.push(line);
      const whole = this.#line.join("");
      this.#line = [];
      const ready = this.#take(whole);
      if (ready) yield ready;
    }
    this.#line.push(rest);
  }

  #take(line: string): [string, string] | undefined {
    if (line === "") {
      const ready: [string, string] | undefined =
        this.#data.length > 0 ? [this.#event || "message", this.#data.join("\n")] : undefined;
      if (ready !== undefined) this.lastId = this.#id ?? this.lastId;
      this.#event = "";
      this.#data = [];
      return ready;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value.startsWith(" ")) value = value.slice(1);
    if (field === "event") this.#event = value;
    else if (field === "data") this.#data.push(value);
    else if (field === "id") this.#id = value;
    return undefined; // a comment (keep-alive), `retry`: nothing for us
  }
}

/** Chunks of an event stream in, events out; collects what the result needs. */
export class ExecReader {
  readonly #sse = new SseReader();
  readonly #requestId: string | undefined;
  readonly #streams = { stdout: [] as Uint8Array[], stderr: [] as Uint8Array[] };
  readonly #files: [string, WireFile][] = [];
  result: Result | undefined;

  constructor(requestId: string | undefined) {
    this.#requestId = requestId;
  }

  *feed(chunk: Uint8Array): Generator<ExecEvent> {
    for (const [name, data] of this.#sse.feed(chunk)) {
      let fields: unknown;
      try {
        fields = JSON.parse(data);
      } catch {
        fields = undefined;
      }
      if (!isObject(fields)) {
        throw new ServerError(`the ${name} event is not a JSON object`, {
          requestId: this.#requestId,
          mayHaveRun: true,
        });
      }
      const event = this.#event(name, fields);
      if (event) yield event;
    }
  }

  /** The body is over: was the exec? */
  finish(): void {
    if (this.result === undefined) {
      throw new ConnectionError("the stream ended before the exec did", {
        requestId: this.#requestId,
        mayHaveRun: true,
      });
    }
  }

  #event(name: string, fields: Record<string, unknown>): ExecEvent | undefined {
    switch (name) {
      case "start":
        return { type: name, ...fields } as unknown as StartEvent;
      case "stdout":
      case "stderr": {
        const data = dataOf(fields as { text: string } | { base64: string });
        this.#streams[name].push(data);
        const text = typeof fields["text"] === "string" ? fields["text"] : lossy(data);
        return { type: name, text, data };
      }
      case "file": {
        const { path, ...content } = fields as { path: string } & WireFile;
        this.#files.push([path, content]);
        return { type: name, path, file: new OutputFile(path, content) };
      }
      case "end":
        this.result = makeResult(this.#whole(fields), this.#requestId);
        return { type: name, result: this.result };
      case "error":
        throw failure(fields, this.#requestId);
      default:
        return undefined; // an event of a newer server
    }
  }

  /** The fields of `end` with the streams and files put back, as `run` would have them. */
  #whole(fields: Record<string, unknown>): Record<string, unknown> {
    const stdout = marked(this.#streams.stdout);
    const stderr = marked(this.#streams.stderr);
    return {
      ...fields,
      stdout: stdout.text,
      stderr: stderr.text,
      output: stdout.text,
      encoding: { stdout: stdout.encoding, stderr: stderr.encoding },
      files: Object.fromEntries([
        ...Object.entries(isObject(fields["files"]) ? fields["files"] : {}),
        ...this.#files,
      ]),
    };
  }
}

/** What an error in the middle of a stream means. */
export function failure(
  fields: Record<string, unknown>,
  requestId: string | undefined,
): ZerobootError {
  const text = (name: string): string | undefined => {
    const value = fields[name];
    return typeof value === "string" ? value : undefined;
  };
  return errorFor(text("error") ?? "the run failed", {
    code: text("code"),
    reason: text("reason"),
    requestId: text("request_id") ?? requestId,
    mayHaveRun: true,
  });
}

export function marked(chunks: readonly Uint8Array[]): { text: string; encoding: "utf-8" | "base64" } {
  const bytes = join(chunks);
  const text = exact(bytes);
  return text === undefined
    ? { text: toBase64(bytes), encoding: "base64" }
    : { text, encoding: "utf-8" };
}
