// A server that answers from a script and writes down what it saw. For faults only: what the real
// server does is tested against the real server.
import { createServer } from "node:http";
import type { IncomingMessage, ServerResponse } from "node:http";
import type { AddressInfo, Socket } from "node:net";
import type { TestContext } from "node:test";

export const OK = {
  id: "0193-1",
  stdout: "2\n",
  stderr: "",
  exit_code: 0,
  outcome: "exited",
  signal: null,
  fork_time_ms: 0.5,
  exec_time_ms: 1.5,
  total_time_ms: 2,
  isolation: "process",
  pooled: true,
  truncated: false,
  template: "node",
  language: "node",
  files: {},
  output: "2\n",
  duration_ms: 2,
  encoding: { stdout: "utf-8", stderr: "utf-8" },
  cpu_time_ms: 1,
  peak_memory_bytes: 4096,
  hints: [],
};
export const END: Record<string, unknown> = Object.fromEntries(
  Object.entries(OK).filter(([name]) => !["stdout", "stderr", "output"].includes(name)),
);

export interface Seen {
  method: string;
  path: string;
  headers: IncomingMessage["headers"];
  body: string;
}
export type Step = (response: ServerResponse, stub: Stub) => void | Promise<void>;

export interface Stub {
  url: string;
  seen: Seen[];
  connections: number;
  /** Resolves when a client closes before its answer is out. */
  gone: Promise<void>;
}

export async function stub(t: TestContext, ...script: Step[]): Promise<Stub> {
  let left = (): void => undefined;
  const it: Stub = {
    url: "",
    seen: [],
    connections: 0,
    gone: new Promise((resolve) => (left = resolve)),
  };
  const sockets = new Set<Socket>();
  const server = createServer((request, response) => {
    response.on("close", () => {
      if (!response.writableFinished) left();
    });
    void (async () => {
      const chunks: Buffer[] = [];
      for await (const chunk of request) chunks.push(chunk as Buffer);
      it.seen.push({
        method: request.method ?? "",
        path: request.url ?? "",
        headers: request.headers,
        body: Buffer.concat(chunks).toString(),
      });
      const step = script.length > 1 ? script.shift() : script[0];
      await step?.(response, it);
    })();
  });
  server.on("connection", (socket) => {
    it.connections += 1;
    sockets.add(socket);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  it.url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  t.after(() => {
    for (const socket of sockets) socket.destroy();
    server.close();
  });
  return it;
}

export function answer(
  status = 200,
  body: unknown = OK,
  headers: Record<string, string> = {},
): Step {
  return (response) => {
    response.writeHead(status, {
      "content-type": "application/json",
      "x-request-id": "req-1",
      ...headers,
    });
    response.end(typeof body === "string" ? body : JSON.stringify(body));
  };
}

/** An event stream in exactly these chunks. `hold` leaves it open; `cut` breaks it. */
export function sse(chunks: readonly Uint8Array[], how: "end" | "hold" | "cut" = "end"): Step {
  return async (response) => {
    response.writeHead(200, {
      "content-type": "text/event-stream; charset=utf-8",
      "x-request-id": "req-2",
    });
    response.flushHeaders();
    for (const chunk of chunks) {
      response.write(chunk);
      await new Promise(setImmediate);
    }
    if (how === "end") response.end();
    if (how === "cut") setTimeout(() => response.destroy(), 30);
  };
}

export const silent: Step = () => undefined;
export const drop: Step = (response) => {
  response.destroy();
};

export function event(name: string, fields: Record<string, unknown>): Buffer {
  return Buffer.from(`event: ${name}\ndata: ${JSON.stringify(fields)}\n\n`);
}
