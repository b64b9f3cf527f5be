export { Sandbox, ExecStream } from "./sandbox.js";
export type {
  BatchOptions,
  CreateOptions,
  Exec,
  Health,
  RunOptions,
  SandboxOptions,
  StreamOptions,
} from "./sandbox.js";
export { Command, Commands, Contexts, Files, LiveSandbox, LiveStream, RunStream, Watch } from "./live.js";
export type {
  BranchOptions,
  CheckpointOptions,
  CellOptions,
  CellRunOptions,
  CommandLine,
  CommandOptions,
  CommandRunOptions,
  CommandStreamOptions,
  FileSource,
  StartOptions,
  TerminalOptions,
  WaitOptions,
} from "./live.js";
export { CellResult, CommandResult, RichResult } from "./live-answers.js";
export type {
  CellError,
  CellOutcome,
  Change,
  Checkpoint,
  ChangeKind,
  CommandInfo,
  CommandOutcome,
  Context,
  Entry,
  EntryKind,
  SandboxInfo,
  TerminalExit,
} from "./live-answers.js";
export type {
  CellEndEvent,
  CellErrorEvent,
  CellEvent,
  CommandEndEvent,
  CommandEvent,
  LostEvent,
  StartedEvent,
} from "./live-events.js";
export { Terminal } from "./terminal.js";
export type { WebSocketLike, WebSocketMaker } from "./terminal.js";
export { isResult, OutputFile } from "./result.js";
export type { Result, ResultFields } from "./result.js";
export type { EndEvent, ExecEvent, FileEvent, OutputEvent, StartEvent } from "./events.js";
export {
  AuthenticationError,
  BadRequestError,
  BatchError,
  CannotStart,
  CellFailed,
  CommandFailed,
  CommandNotFound,
  ConnectionError,
  ContextExists,
  ContextNotFound,
  ExecutionError,
  FileExists,
  FileNotFound,
  NoRoom,
  NotAllowed,
  NotEmpty,
  RateLimitError,
  RunEnded,
  SandboxGone,
  SandboxNotFound,
  ServerError,
  TimeoutError,
  TooManySandboxes,
  WrongKind,
  ZerobootError,
} from "./errors.js";
export type { Data, FileData, HealthAnswer, HealthStatus, Isolation, Language, Limits, Outcome, TemplateHealth } from "./wire.js";
export { VERSION } from "./version.js";
