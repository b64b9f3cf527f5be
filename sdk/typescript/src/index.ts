export { Sandbox, ExecStream } from "./sandbox.js";
export type {
  BatchOptions,
  Exec,
  Health,
  RunOptions,
  SandboxOptions,
  StreamOptions,
} from "./sandbox.js";
export { isResult, OutputFile } from "./result.js";
export type { Result, ResultFields } from "./result.js";
export type { EndEvent, ExecEvent, FileEvent, OutputEvent, StartEvent } from "./events.js";
export {
  AuthenticationError,
  BadRequestError,
  BatchError,
  ConnectionError,
  ExecutionError,
  RateLimitError,
  ServerError,
  TimeoutError,
  ZerobootError,
} from "./errors.js";
export type { Data, FileData, HealthAnswer, HealthStatus, Isolation, Language, Limits, Outcome, TemplateHealth } from "./wire.js";
export { VERSION } from "./version.js";
