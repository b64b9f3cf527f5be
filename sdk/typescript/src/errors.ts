import type { CellResult, CommandResult } from "./live-answers.js";
import type { Result } from "./result.js";

export interface ErrorFacts {
  /** The server's stable error code. */
  code?: string | undefined;
  /** Why a sandbox has ended, with the code `sandbox_gone`. */
  reason?: string | undefined;
  /** The HTTP status. */
  status?: number | undefined;
  /** The id of the request, which the server's log also has. */
  requestId?: string | undefined;
  /** Seconds, from the Retry-After header. */
  retryAfter?: number | undefined;
  /** Whether the code can have run: false only where it certainly did not. */
  mayHaveRun?: boolean;
  cause?: unknown;
}

/** Base of every error that this package throws on purpose. Code that fails is a `Result` instead. */
export class ZerobootError extends Error {
  override name = "ZerobootError";
  readonly code: string | undefined;
  readonly status: number | undefined;
  readonly requestId: string | undefined;
  readonly retryAfter: number | undefined;
  readonly mayHaveRun: boolean;

  constructor(message: string, facts: ErrorFacts = {}) {
    const { code, status, requestId } = facts;
    const said = [
      status === undefined ? "" : `HTTP ${status}`,
      code ?? "",
      requestId === undefined ? "" : `request ${requestId}`,
    ].filter((fact) => fact !== "");
    super(said.length > 0 ? `${message} (${said.join(", ")})` : message);
    // Not through super's options: the types of ES2020 do not know them.
    if (facts.cause !== undefined) (this as { cause?: unknown }).cause = facts.cause;
    this.code = code;
    this.status = status;
    this.requestId = requestId;
    this.retryAfter = facts.retryAfter;
    this.mayHaveRun = facts.mayHaveRun ?? false;
  }
}

/** The key is missing, wrong, revoked or expired (401, 403). */
export class AuthenticationError extends ZerobootError {
  override name = "AuthenticationError";
}

/** The key, or the address, has used up its rate (429). `retryAfter` says when to come back. */
export class RateLimitError extends ZerobootError {
  override name = "RateLimitError";
}

/** The request is wrong and would be wrong again (400, 404, 413, 415 ...). */
export class BadRequestError extends ZerobootError {
  override name = "BadRequestError";
}

/** The server failed (5xx), or its answer is not valid. */
export class ServerError extends ZerobootError {
  override name = "ServerError";
}

/** No connection, or it broke. `mayHaveRun` tells the two apart. */
export class ConnectionError extends ZerobootError {
  override name = "ConnectionError";
}

/** This client stopped waiting. (An exec that passed its own timeout is a `Result`.) */
export class TimeoutError extends ZerobootError {
  override name = "TimeoutError";
}

/** Thrown by `result.check()` if the result is not `ok`. */
export class ExecutionError extends ZerobootError {
  override name = "ExecutionError";
  readonly result: Result;

  constructor(message: string, result: Result) {
    super(message, { mayHaveRun: true });
    this.result = result;
  }
}

/** Some items of a batch were refused or failed. `results` has all of them, in order. */
export class BatchError extends ZerobootError {
  override name = "BatchError";
  readonly results: readonly (Result | ZerobootError)[];

  constructor(
    message: string,
    results: readonly (Result | ZerobootError)[],
    facts: ErrorFacts = {},
  ) {
    super(message, { ...facts, mayHaveRun: true });
    this.results = results;
  }

  get errors(): ZerobootError[] {
    return this.results.filter((item): item is ZerobootError => item instanceof ZerobootError);
  }
}

/** No sandbox of this key has this id. */
export class SandboxNotFound extends BadRequestError {
  override name = "SandboxNotFound";
}

/** The sandbox has ended. `reason`: `lease_ended`, `idle`, `requested`, `lost` ... */
export class SandboxGone extends BadRequestError {
  override name = "SandboxGone";
  readonly reason: string | undefined;

  constructor(message: string, facts: ErrorFacts = {}) {
    super(message, facts);
    this.reason = facts.reason;
  }
}

/** The key already has its maximum of long-lived sandboxes. */
export class TooManySandboxes extends RateLimitError {
  override name = "TooManySandboxes";
}

/** The sandbox has no context of this name. */
export class ContextNotFound extends BadRequestError {
  override name = "ContextNotFound";
}

/** The sandbox already has a context of this name. */
export class ContextExists extends BadRequestError {
  override name = "ContextExists";
}

/** The sandbox knows no command with this id. */
export class CommandNotFound extends BadRequestError {
  override name = "CommandNotFound";
}

/** The command has ended: it takes no input and no signal. */
export class RunEnded extends BadRequestError {
  override name = "RunEnded";
}

/** The program cannot be started: it does not exist, or is not executable. */
export class CannotStart extends BadRequestError {
  override name = "CannotStart";
}

/** The sandbox has no file of this name. */
export class FileNotFound extends BadRequestError {
  override name = "FileNotFound";
}

/** A file of this name exists. */
export class FileExists extends BadRequestError {
  override name = "FileExists";
}

/** Not allowed; the code in the sandbox may not do it either. */
export class NotAllowed extends BadRequestError {
  override name = "NotAllowed";
}

/** A directory where a file is needed, or the reverse, or not a regular file. */
export class WrongKind extends BadRequestError {
  override name = "WrongKind";
}

/** The directory is not empty. */
export class NotEmpty extends BadRequestError {
  override name = "NotEmpty";
}

/** The sandbox has no room left: disk, processes, memory, descriptors, contexts. */
export class NoRoom extends BadRequestError {
  override name = "NoRoom";
}

/** Thrown by `check()` of a cell's result. */
export class CellFailed extends ZerobootError {
  override name = "CellFailed";
  readonly result: CellResult;

  constructor(message: string, result: CellResult) {
    super(message, { mayHaveRun: true });
    this.result = result;
  }
}

/** Thrown by `check()` of a command's result. */
export class CommandFailed extends ZerobootError {
  override name = "CommandFailed";
  readonly result: CommandResult;

  constructor(message: string, result: CommandResult) {
    super(message, { mayHaveRun: true });
    this.result = result;
  }
}

type Kind = new (message: string, facts: ErrorFacts) => ZerobootError;
export const CODE_CLASSES: ReadonlyMap<string, Kind> = new Map<string, Kind>([
  ["cannot_start", CannotStart],
  ["context_exists", ContextExists],
  ["context_not_found", ContextNotFound],
  ["file_exists", FileExists],
  ["file_not_found", FileNotFound],
  ["no_room", NoRoom],
  ["not_allowed", NotAllowed],
  ["not_empty", NotEmpty],
  ["run_ended", RunEnded],
  ["run_not_found", CommandNotFound],
  ["sandbox_gone", SandboxGone],
  ["sandbox_not_found", SandboxNotFound],
  ["too_many_sandboxes", TooManySandboxes],
  ["wrong_kind", WrongKind],
]);

// Codes that are the server's fault. Needed where there is no HTTP status to go by: an item of a
// batch, an `error` event in a stream.
export const SERVER_CODES = new Set([
  "batch_output_limit",
  "branch_failed",
  "busy",
  "internal",
  "needs_vm_engine",
  "not_ready",
  "operation_failed",
  "sandbox_failed",
  "server_output_limit",
  "shutting_down",
]);
const RATE_CODES = new Set([
  "concurrency_limited",
  "rate_limited",
  "too_many_runs",
  "too_many_streams",
]);

export function errorFor(message: string, facts: ErrorFacts): ZerobootError {
  const { status, code } = facts;
  const named = code === undefined ? undefined : CODE_CLASSES.get(code);
  if (named !== undefined) return new named(message, facts);
  if (status === 401 || status === 403 || (status === undefined && code === "unauthorized")) {
    return new AuthenticationError(message, facts);
  }
  if (status === 429 || (status === undefined && code !== undefined && RATE_CODES.has(code))) {
    return new RateLimitError(message, facts);
  }
  const ours =
    status === undefined
      ? code !== undefined && !SERVER_CODES.has(code)
      : status >= 400 && status < 500;
  return ours ? new BadRequestError(message, facts) : new ServerError(message, facts);
}
