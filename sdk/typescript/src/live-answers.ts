// Answers about a long-lived sandbox. Fields of the API keep the names that they have there; the lists at
// the end are held against `openapi/zeroboot.json` by `test/openapi.test.ts`.

import { CellFailed, CommandFailed, ServerError } from "./errors.js";
import { isObject, streamOf, unbase64 } from "./result.js";
import type { Isolation } from "./wire.js";

/** The last five: the interpreter itself ended (`context_lost`). */
export type CellOutcome = "ok" | "error" | "interrupted" | CommandOutcome;
export type CommandOutcome = "exited" | "signaled" | "deadline_passed" | "out_of_memory" | "closed";
export type EntryKind = "file" | "directory" | "link" | "other";
export type ChangeKind = "created" | "modified" | "removed" | "overflow";

/** A sandbox, as the server described it when it was asked. */
export interface SandboxInfo {
  id: string;
  template: string;
  language: string;
  isolation: Isolation;
  state: string;
  /** RFC 3339. */
  created_at: string;
  /** The end of its lease, RFC 3339. */
  expires_at: string;
  idle_timeout_seconds: number | null;
  metadata: Record<string, string>;
  limits: Record<string, number>;
  pooled: boolean;
  fork_time_ms: number;
  /** Runs that have not ended. */
  runs: number;
  /** The id of the sandbox that it is a branch of. */
  branch_of: string | null;
  /** The id of the last checkpoint that was made of it, or that it began at. */
  checkpoint_id: string | null;
}

/** A moment of a sandbox that the server keeps. */
export interface Checkpoint {
  id: string;
  /** The sandbox that it is of. */
  sandbox_id: string;
  /** The checkpoint that its sandbox had come from: checkpoints are trees. */
  parent_id: string | null;
  template: string;
  /** RFC 3339. */
  created_at: string;
  /** When the server removes it, RFC 3339. */
  expires_at: string;
  metadata: Record<string, string>;
  /** Memory that it adds to what its sandbox was forked from. */
  memory_bytes: number;
}

/** A named interpreter of a sandbox, as it was when the server was asked. */
export interface Context {
  name: string;
  cwd: string;
  /** A cell runs in it. */
  busy: boolean;
  /** Cells that wait for it. */
  waiting: number;
  /** Cells that have begun in its interpreter. */
  executions: number;
}

/** A file of a sandbox. */
export interface Entry {
  path: string;
  name: string;
  kind: EntryKind;
  size: number;
  /** Permission bits, octal. */
  mode: string;
  /** RFC 3339. */
  modified_at: string;
  uid: number;
  gid: number;
  /** Where a link leads. */
  target?: string;
}

/** What happened to a file. After `overflow` some changes are missing: look again. */
export interface Change {
  kind: ChangeKind;
  path: string;
}

/** A command, as the server described it when it was asked. */
export interface CommandInfo {
  id: string;
  pid: number | null;
  tag: string | null;
  argv: string[];
  /** It has a terminal. */
  terminal: boolean;
  state: "running" | "ended";
  outcome?: CommandOutcome;
  exit_code?: number;
  /** Where its output ends. */
  output_offset: number;
  /** Where the output that the server still holds begins. */
  first_offset: number;
  started_at: string;
}

/** How the program of a terminal ended. */
export interface TerminalExit {
  exit_code: number;
  outcome: CommandOutcome;
}

/** The error that a cell did not catch. Its context goes on. */
export interface CellError {
  name: string;
  value: string;
  /** As the language prints it, without frames of the sandbox's own. */
  traceback: string;
}

/** JSON of more characters is sent as text. */
const LONG_JSON = 1024 * 1024;

/**
 * Something that a cell showed, in every form that it has: a MIME bundle. Each form is undefined where
 * there is none. Pictures and documents are bytes.
 */
export class RichResult {
  readonly type = "result";
  /** It is the value of the cell's last expression, and not something that the cell displayed. */
  readonly isMain: boolean;
  /** MIME type to text (to base64 where it is not text), as it came. */
  readonly data: Readonly<Record<string, unknown>>;

  constructor(raw: Record<string, unknown>) {
    this.isMain = raw["is_main"] === true;
    this.data = Object.fromEntries(Object.entries(raw).filter(([name]) => name.includes("/")));
  }

  /** The MIME types that there are. */
  get formats(): string[] {
    return Object.keys(this.data);
  }

  get text(): string | undefined {
    return this.#text("text/plain");
  }

  get html(): string | undefined {
    return this.#text("text/html");
  }

  get markdown(): string | undefined {
    return this.#text("text/markdown");
  }

  get latex(): string | undefined {
    return this.#text("text/latex");
  }

  get svg(): string | undefined {
    return this.#text("image/svg+xml");
  }

  get javascript(): string | undefined {
    return this.#text("application/javascript");
  }

  get png(): Uint8Array | undefined {
    return this.#bytes("image/png");
  }

  get jpeg(): Uint8Array | undefined {
    return this.#bytes("image/jpeg");
  }

  get pdf(): Uint8Array | undefined {
    return this.#bytes("application/pdf");
  }

  /** The value of `application/json`. */
  get json(): unknown {
    const value = this.data["application/json"];
    return typeof value === "string" && value.length > LONG_JSON ? (JSON.parse(value) as unknown) : value;
  }

  toString(): string {
    return this.text ?? "";
  }

  #text(mime: string): string | undefined {
    const value = this.data[mime];
    return typeof value === "string" ? value : undefined;
  }

  #bytes(mime: string): Uint8Array | undefined {
    const value = this.data[mime];
    return typeof value === "string" ? unbase64(value) : undefined;
  }
}

/** What cells and commands have in common. */
class RunResult {
  readonly id: string;
  /** The program's own; 128 + signal; 124 for a passed timeout; 137 for one that was ended. */
  readonly exit_code: number;
  /** Exact. */
  readonly stdout: string;
  readonly stderr: string;
  /** The streams as bytes, exact even where they are not UTF-8 (then the text has U+FFFD). */
  readonly stdoutBytes: Uint8Array;
  readonly stderrBytes: Uint8Array;
  /** There was more output than one answer brings, or some fell out of the server's buffer. */
  readonly truncated: boolean;
  readonly wall_time_ms: number;
  /** The `X-Request-Id` of the HTTP answer. */
  readonly requestId: string | undefined;
  /** The answer as it came, with whatever a newer server added. */
  readonly raw: Readonly<Record<string, unknown>>;

  constructor(raw: Record<string, unknown>, requestId: string | undefined) {
    if (typeof raw["outcome"] !== "string") {
      throw new ServerError("the answer has no outcome", { requestId, mayHaveRun: true });
    }
    const marks = isObject(raw["encoding"]) ? raw["encoding"] : {};
    const stream = (name: string): [string, Uint8Array] =>
      streamOf(text(raw[name]), text(marks[name]) ?? "utf-8");
    this.id = text(raw["id"]) ?? "";
    this.exit_code = number(raw["exit_code"]);
    [this.stdout, this.stdoutBytes] = stream("stdout");
    [this.stderr, this.stderrBytes] = stream("stderr");
    this.truncated = raw["truncated"] === true;
    this.wall_time_ms = number(raw["wall_time_ms"]);
    this.requestId = requestId;
    this.raw = raw;
  }
}

/** What a cell wrote and showed, and how it ended. */
export class CellResult extends RunResult {
  readonly context: string;
  /** Its number in its context; the first is 1. */
  readonly execution_count: number;
  readonly outcome: CellOutcome;
  /** `text/plain` of the last expression's value. */
  readonly value: string | undefined;
  readonly results: readonly RichResult[];
  readonly error: CellError | undefined;
  /** The context's interpreter is gone, and its state with it; the next run has a new one. */
  readonly context_lost: boolean;

  constructor(raw: Record<string, unknown>, requestId: string | undefined) {
    super(raw, requestId);
    this.context = text(raw["context"]) ?? "";
    this.execution_count = number(raw["execution_count"]);
    this.outcome = raw["outcome"] as CellOutcome;
    const results = Array.isArray(raw["results"]) ? raw["results"].filter(isObject) : [];
    this.results = results.map((item) => new RichResult(item));
    this.value = text(raw["value"]) ?? this.results.find((item) => item.isMain)?.text;
    this.error = isObject(raw["error"]) ? (raw["error"] as unknown as CellError) : undefined;
    this.context_lost = raw["context_lost"] === true;
  }

  /** Whether the cell ended without an error. */
  get ok(): boolean {
    return this.outcome === "ok";
  }

  /** This result if it is `ok`; throws `CellFailed` if not. */
  check(): this {
    if (this.ok) return this;
    const said = this.error === undefined ? this.outcome : `${this.error.name}: ${this.error.value}`;
    throw new CellFailed(`the cell failed: ${said}`, this);
  }

  override toString(): string {
    return this.value ?? this.stdout;
  }
}

/** What a command wrote and how it ended. */
export class CommandResult extends RunResult {
  readonly pid: number | null;
  readonly outcome: CommandOutcome;
  /** The signal that ended it. */
  readonly signal: number | null;

  constructor(raw: Record<string, unknown>, requestId: string | undefined) {
    super(raw, requestId);
    this.pid = typeof raw["pid"] === "number" ? raw["pid"] : null;
    this.outcome = raw["outcome"] as CommandOutcome;
    this.signal = typeof raw["signal"] === "number" ? raw["signal"] : null;
  }

  /** Whether the command ended by itself with exit code 0. */
  get ok(): boolean {
    return this.outcome === "exited" && this.exit_code === 0;
  }

  /** This result if it is `ok`; throws `CommandFailed` if not. */
  check(): this {
    if (this.ok) return this;
    const said = this.stderr.trim().split("\n").pop() ?? "";
    const how = this.outcome === "exited" ? `exit code ${this.exit_code}` : this.outcome;
    throw new CommandFailed(`the command failed: ${how}${said === "" ? "" : `: ${said}`}`, this);
  }
}

/** An answer that must have these fields: of a server that is another, it has not. */
export function checked<T>(raw: unknown, ...fields: (keyof T & string)[]): T {
  const missing = fields.find((name) => !isObject(raw) || raw[name] === undefined);
  if (missing !== undefined) {
    throw new ServerError(`the answer has no ${missing}`, { mayHaveRun: true });
  }
  return raw as T;
}

export function text(value: unknown): string | undefined {
  return typeof value === "string" ? value : undefined;
}

function number(value: unknown): number {
  return typeof value === "number" ? value : 0;
}

// As in wire.ts: a Record must name every key, so a list made from its keys is complete.
const names = <T extends string>(all: Record<T, true>): readonly string[] => Object.keys(all);

export const SANDBOX_FIELDS = names<keyof SandboxInfo>({
  id: true,
  template: true,
  language: true,
  isolation: true,
  state: true,
  created_at: true,
  expires_at: true,
  idle_timeout_seconds: true,
  metadata: true,
  limits: true,
  pooled: true,
  fork_time_ms: true,
  runs: true,
  branch_of: true,
  checkpoint_id: true,
});
export const CHECKPOINT_FIELDS = names<keyof Checkpoint>({
  id: true,
  sandbox_id: true,
  parent_id: true,
  template: true,
  created_at: true,
  expires_at: true,
  metadata: true,
  memory_bytes: true,
});
export const CONTEXT_FIELDS = names<keyof Context>({
  name: true,
  cwd: true,
  busy: true,
  waiting: true,
  executions: true,
});
export const ENTRY_FIELDS = names<keyof Entry>({
  path: true,
  name: true,
  kind: true,
  size: true,
  mode: true,
  modified_at: true,
  uid: true,
  gid: true,
  target: true,
});
export const COMMAND_FIELDS = names<keyof CommandInfo>({
  id: true,
  pid: true,
  tag: true,
  argv: true,
  terminal: true,
  state: true,
  outcome: true,
  exit_code: true,
  output_offset: true,
  first_offset: true,
  started_at: true,
});
export const CELL_OUTCOMES = names<CellOutcome>({
  ok: true,
  error: true,
  interrupted: true,
  exited: true,
  signaled: true,
  deadline_passed: true,
  out_of_memory: true,
  closed: true,
});
export const ENTRY_KINDS = names<EntryKind>({ file: true, directory: true, link: true, other: true });
