import { fromBase64, lossy, utf8 } from "./bytes.js";
import { ExecutionError, ServerError, ZerobootError } from "./errors.js";
import { ANSWER_FIELDS } from "./wire.js";
import type { ExecAnswer, Isolation, Outcome, WireFile } from "./wire.js";

/** A file that came back. */
export class OutputFile {
  readonly path: string;
  readonly error: string | undefined;
  readonly #data: Uint8Array;

  constructor(path: string, content: WireFile) {
    this.path = path;
    this.error = "error" in content ? content.error : undefined;
    this.#data = "error" in content ? new Uint8Array() : dataOf(content);
  }

  get ok(): boolean {
    return this.error === undefined;
  }

  /** The content; throws where the sandbox could not read the file. */
  bytes(): Uint8Array {
    if (this.error !== undefined) {
      throw new ZerobootError(`${this.path}: ${this.error}`, { mayHaveRun: true });
    }
    return this.#data;
  }

  text(): string {
    return lossy(this.bytes());
  }
}

/** The fields of a result. Those of the API keep the names that they have there. */
export interface ResultFields {
  readonly id: string;
  /** What the result is as a string, as a primitive: for `===`, `typeof` and `switch`. */
  readonly text: string;
  /** Exact. The result itself, as a string, is this without the final newline. */
  readonly stdout: string;
  readonly stderr: string;
  readonly exit_code: number;
  readonly outcome: Outcome;
  readonly signal: number | null;
  readonly fork_time_ms: number;
  readonly exec_time_ms: number;
  readonly total_time_ms: number;
  readonly isolation: Isolation;
  readonly pooled: boolean;
  readonly truncated: boolean;
  readonly template: string;
  readonly language: string;
  readonly files: Readonly<Record<string, OutputFile>>;
  readonly output: string;
  readonly duration_ms: number;
  readonly encoding: Readonly<{ stdout: string; stderr: string }>;
  /** 0 where the host cannot tell. */
  readonly cpu_time_ms: number;
  readonly peak_memory_bytes: number;
  /** What the sandbox knows about an uncaught error. The code can forge it. */
  readonly hints: readonly string[];
  /** The streams as bytes, exact even where they are not UTF-8 (then the text has U+FFFD). */
  readonly stdoutBytes: Uint8Array;
  readonly stderrBytes: Uint8Array;
  /** The `X-Request-Id` of the HTTP answer. */
  readonly requestId: string | undefined;
  /** Whether the code ended by itself with exit code 0. */
  readonly ok: boolean;
  /** This result if it is `ok`; throws `ExecutionError` if not. */
  check(): Result;
  /** The answer as it came, as plain data, with whatever a newer server added. */
  toObject(): ExecAnswer & Record<string, unknown>;
}

/**
 * What the code wrote and how it ended.
 *
 * It *is* its output, without the final newline, wherever a string is wanted: in a template, in
 * `console.log`, in `JSON.stringify`, as an argument of type `string`. To JavaScript it is a String
 * object, so `typeof` says "object" and `===` compares objects: write `result.text === "2"`.
 */
export type Result = string & ResultFields;

type Inspect = (value: unknown, options?: unknown) => string;

class ResultObject extends String implements ResultFields {
  declare readonly id: string;
  declare readonly stdout: string;
  declare readonly stderr: string;
  declare readonly exit_code: number;
  declare readonly outcome: Outcome;
  declare readonly signal: number | null;
  declare readonly fork_time_ms: number;
  declare readonly exec_time_ms: number;
  declare readonly total_time_ms: number;
  declare readonly isolation: Isolation;
  declare readonly pooled: boolean;
  declare readonly truncated: boolean;
  declare readonly template: string;
  declare readonly language: string;
  declare readonly output: string;
  declare readonly duration_ms: number;
  declare readonly encoding: Readonly<{ stdout: string; stderr: string }>;
  declare readonly cpu_time_ms: number;
  declare readonly peak_memory_bytes: number;
  declare readonly hints: readonly string[];
  declare readonly files: Readonly<Record<string, OutputFile>>;
  readonly stdoutBytes: Uint8Array;
  readonly stderrBytes: Uint8Array;
  readonly requestId: string | undefined;
  readonly #raw: ExecAnswer & Record<string, unknown>;

  constructor(answer: ExecAnswer & Record<string, unknown>, requestId: string | undefined) {
    const marks = answer.encoding as Partial<ExecAnswer["encoding"]> | undefined;
    const encoding = { stdout: marks?.stdout ?? "utf-8", stderr: marks?.stderr ?? "utf-8" };
    const [stdout, stdoutBytes] = streamOf(answer.stdout, encoding.stdout);
    const [stderr, stderrBytes] = streamOf(answer.stderr, encoding.stderr);
    super(stdout.replace(/\r?\n$/, ""));
    this.#raw = answer;
    const fields: Record<string, unknown> = { ...DEFAULTS };
    // Only names that we know: a String has names of its own that no server may set.
    for (const name of ANSWER_FIELDS) {
      if (answer[name] !== undefined) fields[name] = answer[name];
    }
    Object.assign(this, fields, {
      stdout,
      output: stdout,
      stderr,
      encoding,
      files: Object.fromEntries(
        Object.entries((answer.files as ExecAnswer["files"] | undefined) ?? {}).map(
          ([path, content]) => [path, new OutputFile(path, content)],
        ),
      ),
      duration_ms: fields["duration_ms"] ?? fields["total_time_ms"],
    });
    this.stdoutBytes = stdoutBytes;
    this.stderrBytes = stderrBytes;
    this.requestId = requestId;
  }

  get text(): string {
    return this.toString();
  }

  get ok(): boolean {
    return this.outcome === "exited" && this.exit_code === 0;
  }

  check(): Result {
    if (this.ok) return this as unknown as Result;
    const said = this.stderr.trim().split("\n").pop() ?? "";
    const how = this.outcome === "exited" ? `exit code ${this.exit_code}` : this.outcome;
    throw new ExecutionError(
      `the code failed: ${how}${said === "" ? "" : `: ${said}`}`,
      this as unknown as Result,
    );
  }

  toObject(): ExecAnswer & Record<string, unknown> {
    return { ...this.#raw };
  }

  // `console.log(result)` prints the output, as it would for the string; inside an object it is
  // quoted, as a string there would be. Node and Bun; the other name is Deno's.
  [Symbol.for("nodejs.util.inspect.custom")](
    depth: number | null,
    options: { depth?: number | null },
    inspect?: Inspect,
  ): string {
    const text = this.toString();
    if (depth === options.depth || inspect === undefined) return text;
    return inspect(text, options);
  }

  [Symbol.for("Deno.customInspect")](): string {
    return this.toString();
  }
}

const DEFAULTS = {
  id: "",
  outcome: "exited",
  signal: null,
  fork_time_ms: 0,
  exec_time_ms: 0,
  total_time_ms: 0,
  isolation: "process",
  pooled: false,
  truncated: false,
  template: "",
  language: "",
  cpu_time_ms: 0,
  peak_memory_bytes: 0,
  hints: [],
};

export function makeResult(answer: unknown, requestId: string | undefined): Result {
  if (!isObject(answer) || typeof answer["exit_code"] !== "number") {
    throw new ServerError("the answer has no exit_code", { requestId, mayHaveRun: true });
  }
  return new ResultObject(answer as never, requestId) as unknown as Result;
}

/** Whether a value is a `Result`, which `typeof` cannot say. */
export function isResult(value: unknown): value is Result {
  return value instanceof ResultObject;
}

export function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** The bytes of `{"text": s}` or `{"base64": s}`. */
export function dataOf(content: { text: string } | { base64: string }): Uint8Array {
  return "base64" in content ? unbase64(content.base64) : utf8(content.text);
}

/** The text and the bytes of a stream of an answer. */
export function streamOf(text: string | undefined, encoding: string): [string, Uint8Array] {
  if (encoding === "base64") {
    const bytes = unbase64(text ?? "");
    return [lossy(bytes), bytes];
  }
  return [text ?? "", utf8(text ?? "")];
}

export function unbase64(text: string): Uint8Array {
  try {
    return fromBase64(text);
  } catch (cause) {
    throw new ServerError("the answer has bad base64", { mayHaveRun: true, cause });
  }
}
