// The words of the API. `test/openapi.test.ts` holds the lists against `openapi/zeroboot.json`, and
// the compiler holds the types against the lists.

export type Language = "python" | "node" | "javascript" | "bash" | "typescript";
export type Isolation = "vm" | "process";
export type Outcome =
  | "exited"
  | "signaled"
  | "deadline_passed"
  | "cpu_limit"
  | "output_limit"
  | "out_of_memory"
  | "crashed";

/** Text, or exact bytes. */
export type Data = string | Uint8Array;

/** A file for a sandbox: its content, alone or with more. */
export type FileData = Data | { data: Data; executable?: boolean };

/** How content travels. */
export type WireData =
  | string
  | { base64: string; executable?: boolean }
  | { text: string; executable?: boolean };

/** Limits of one exec, spelled as the API spells them; each may only lower what the server allows. */
export interface Limits {
  memory_mb?: number;
  processes?: number;
  output_bytes?: number;
  file_size_mb?: number;
  open_files?: number;
  cpu_seconds?: number;
}

/** What is sent for one exec. */
export interface ExecRequest {
  code: string;
  language?: Language;
  template?: string;
  timeout_seconds: number;
  stdin?: WireData;
  env?: Record<string, string>;
  args?: readonly string[];
  files?: Record<string, WireData>;
  output_files?: readonly string[];
  limits?: Limits;
}

export type WireFile = { text: string } | { base64: string } | { error: string };

/** What comes back for one exec. */
export interface ExecAnswer {
  id: string;
  stdout: string;
  stderr: string;
  exit_code: number;
  outcome: Outcome;
  signal: number | null;
  fork_time_ms: number;
  exec_time_ms: number;
  total_time_ms: number;
  isolation: Isolation;
  pooled: boolean;
  truncated: boolean;
  template: string;
  language: string;
  files: Record<string, WireFile>;
  output: string;
  duration_ms: number;
  encoding: { stdout: string; stderr: string };
  cpu_time_ms: number;
  peak_memory_bytes: number;
  hints: string[];
}

export type HealthStatus = "ok" | "degraded" | "unavailable" | "warming" | "shutting_down";

/** One template. `ready` means that a canary exec just passed. */
export interface TemplateHealth {
  ready: boolean;
  reason?: string;
  language: string;
  engine: Isolation;
  isolation: Isolation;
  version: string;
  warmed: string[];
  numpy: boolean;
  memory_mb: number;
  pool_ready: number;
  pool_target: number;
  forks: number;
  restarts: number;
  /** Of this template that live. */
  sandboxes: number;
  canary_age_seconds: number;
}

/** What `GET /v1/health` says. */
export interface HealthAnswer {
  status: HealthStatus;
  templates: Record<string, TemplateHealth>;
  /** Why it is not `ok`. */
  reasons?: string[];
  /** What is weaker on this server than it could be; for callers with a key. */
  warnings?: string[];
  /** Sandboxes that serve a request now. */
  live: number;
  uptime_seconds: number;
  /** The server's version. */
  version: string;
}

// A Record must name every key of the type and no other, so a list made from its keys is complete.
const names = <T extends string>(all: Record<T, true>): readonly string[] => Object.keys(all);

export const REQUEST_FIELDS = names<keyof ExecRequest>({
  code: true,
  language: true,
  template: true,
  timeout_seconds: true,
  stdin: true,
  env: true,
  args: true,
  files: true,
  output_files: true,
  limits: true,
});
export const LIMIT_FIELDS = names<keyof Limits>({
  memory_mb: true,
  processes: true,
  output_bytes: true,
  file_size_mb: true,
  open_files: true,
  cpu_seconds: true,
});
export const ANSWER_FIELDS = names<keyof ExecAnswer>({
  id: true,
  stdout: true,
  stderr: true,
  exit_code: true,
  outcome: true,
  signal: true,
  fork_time_ms: true,
  exec_time_ms: true,
  total_time_ms: true,
  isolation: true,
  pooled: true,
  truncated: true,
  template: true,
  language: true,
  files: true,
  output: true,
  duration_ms: true,
  encoding: true,
  cpu_time_ms: true,
  peak_memory_bytes: true,
  hints: true,
});
export const HEALTH_FIELDS = names<keyof HealthAnswer>({
  status: true,
  templates: true,
  reasons: true,
  warnings: true,
  live: true,
  uptime_seconds: true,
  version: true,
});
export const TEMPLATE_FIELDS = names<keyof TemplateHealth>({
  ready: true,
  reason: true,
  language: true,
  engine: true,
  isolation: true,
  version: true,
  warmed: true,
  numpy: true,
  memory_mb: true,
  pool_ready: true,
  pool_target: true,
  forks: true,
  restarts: true,
  sandboxes: true,
  canary_age_seconds: true,
});
export const HEALTH_STATUSES = names<HealthStatus>({
  ok: true,
  degraded: true,
  unavailable: true,
  warming: true,
  shutting_down: true,
});
export const ISOLATIONS = names<Isolation>({ vm: true, process: true });
export const OUTCOMES = names<Outcome>({
  exited: true,
  signaled: true,
  deadline_passed: true,
  cpu_limit: true,
  output_limit: true,
  out_of_memory: true,
  crashed: true,
});
