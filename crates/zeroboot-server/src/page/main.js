// The page: what is asked for, what came of it.

import { Refused, askForKey, base64Of, events, key, request } from "./api.js";
import { $, make, milliseconds } from "./dom.js";
import { follow, health } from "./live.js";
import * as output from "./output.js";
import * as snippets from "./snippets.js";

const EXAMPLES = {
  python: {
    "Hello": "import platform\n\nprint(\"hello from Python\", platform.python_version())\nprint(6 * 7)\n",
    "Streaming": "import time\n\nfor n in range(1, 6):\n    print(n, flush=True)\n    time.sleep(0.4)\n",
    "An error": "def half(n):\n    return n / 0\n\nprint(\"before\")\nhalf(2)\n",
    "A file": "import csv\n\nwith open(\"squares.csv\", \"w\") as file:\n    rows = csv.writer(file)\n    rows.writerows((n, n * n) for n in range(10))\nprint(\"squares.csv is ready\")\n",
    "A timeout": "while True:\n    pass\n",
  },
  node: {
    "Hello": "console.log(\"hello from Node\", process.version);\nconsole.log([1, 2, 3].map((n) => n * n));\n",
    "Streaming": "const { setTimeout: wait } = require(\"node:timers/promises\");\n\nasync function main() {\n  for (let n = 1; n <= 5; n += 1) {\n    console.log(n);\n    await wait(400);\n  }\n}\nmain();\n",
    "An error": "console.log(\"before\");\nthrow new Error(\"on purpose\");\n",
    "A file": "require(\"fs\").writeFileSync(\"squares.json\", JSON.stringify([1, 4, 9]));\nconsole.log(\"squares.json is ready\");\n",
  },
};
const OUTPUTS = { "A file": { python: "squares.csv", node: "squares.json" } };
const TIMEOUTS = { "A timeout": "2" };
/** Lease of the sandbox that is kept, seconds; each run makes it new. */
const LEASE = 600;

let languages = new Map();
let session = null;
let running = null;

const mode = () => new FormData($("form")).get("mode");
const language = () => languages.get($("template").value) ?? "python";

async function templates() {
  const found = await health();
  const names = Object.keys(found).sort((a, b) => (b === "python") - (a === "python") || a.localeCompare(b));
  const chosen = $("template").value;
  languages = new Map(names.map((name) => [name, found[name].language]));
  $("template").replaceChildren(...names.map((name) => {
    const { version, warmed, ready } = found[name];
    const title = [version, ...warmed].filter(Boolean).join(", ");
    return make("option", { value: name, title: title || undefined }, ready ? name : `${name} (not ready)`);
  }));
  if (languages.has(chosen)) $("template").value = chosen;
  if (names.length > 0 && $("code").value === "") examples();
  return names.some((name) => found[name].ready);
}

function examples() {
  const all = EXAMPLES[language()] ?? {};
  $("example").replaceChildren(...Object.keys(all).map((name) => make("option", { value: name }, name)));
  example();
}

function example() {
  const name = $("example").value;
  $("code").value = EXAMPLES[language()]?.[name] ?? "";
  $("outputs").value = OUTPUTS[name]?.[language()] ?? "";
  $("timeout").value = TIMEOUTS[name] ?? "30";
}

/** What a run is: the body of an exec, and where it goes. */
async function asked() {
  const body = { code: $("code").value, template: $("template").value, timeout_seconds: Number($("timeout").value) || 30 };
  const files = {};
  for (const file of $("files").files) {
    files[file.name] = { base64: base64Of(new Uint8Array(await file.arrayBuffer())) };
  }
  const keep = mode() === "keep";
  if (Object.keys(files).length > 0) body.files = files;
  if (!keep) {
    if ($("stdin").value !== "") body.stdin = $("stdin").value;
    const wanted = $("outputs").value.split(",").map((name) => name.trim()).filter(Boolean);
    if (wanted.length > 0) body.output_files = wanted;
    if ($("memory").value !== "") body.limits = { memory_mb: Number($("memory").value) };
  }
  return { keep, body };
}

function outcome(words, state) {
  $("outcome").textContent = words;
  $("outcome").dataset.state = state;
}

function facts(pairs) {
  const rows = pairs.filter(([, value]) => value !== undefined && value !== "");
  $("facts").replaceChildren(...rows.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

const WORDS = {
  deadline_passed: "the timeout passed",
  cpu_limit: "the CPU time limit was reached",
  output_limit: "the output limit was reached",
  out_of_memory: "out of memory",
  crashed: "the sandbox crashed",
  interrupted: "interrupted",
};

async function fresh(run, signal) {
  const answer = await request("/v1/exec", { method: "POST", body: run.body, accept: "text/event-stream", signal });
  for await (const [name, data] of events(answer)) {
    if (name === "stdout" || name === "stderr") output.text(name, data);
    else if (name === "file") output.file(data);
    else if (name === "error") throw new Refused(500, data);
    else if (name === "end") {
      const good = data.outcome === "exited" && data.exit_code === 0;
      const words = data.outcome === "exited" ? `exit code ${data.exit_code}` : WORDS[data.outcome] ?? data.outcome.replaceAll("_", " ");
      outcome(words, good ? "ok" : "error");
      for (const hint of data.hints ?? []) output.note(hint);
      facts([
        ["sandbox", `${milliseconds(data.fork_time_ms)}${data.pooled ? ", pooled" : ", forked now"}`],
        ["run", milliseconds(data.exec_time_ms)], ["total", milliseconds(data.total_time_ms)],
        ["CPU", milliseconds(data.cpu_time_ms)],
        ["memory", `${(data.peak_memory_bytes / 1048576).toFixed(1)} MiB`], ["engine", data.isolation],
      ]);
      return;
    }
  }
  throw new Error("the answer was broken off");
}

const at = (rest) => `/v1/sandboxes/${encodeURIComponent(session.id)}${rest}`;

/** The sandbox that is kept, made now if there is none of this template. */
async function sandbox(template) {
  if (session !== null && session.template !== template) await endSession();
  if (session === null) {
    const made = await request("/v1/sandboxes", { method: "POST", body: { template, timeout_seconds: LEASE } });
    session = await made.json();
  } else {
    await request(at("/extend"), { method: "POST", body: { timeout_seconds: LEASE } });
  }
  showSession();
}

function showSession() {
  $("session").hidden = $("end").hidden = session === null;
  if (session !== null) $("session").textContent = `Kept: ${session.id}`;
}

async function endSession() {
  const ended = session;
  session = null;
  showSession();
  if (ended !== null) await request(`/v1/sandboxes/${encodeURIComponent(ended.id)}`, { method: "DELETE" }).catch(() => {});
}

async function kept(run, signal) {
  const { code, template, timeout_seconds, files } = run.body;
  try {
    await sandbox(template);
  } catch (error) {
    // Its lease ended meanwhile: another.
    if (!(error instanceof Refused && (error.status === 410 || error.status === 404)) || session === null) throw error;
    session = null;
    output.note("The sandbox had ended; this is a new one.");
    await sandbox(template);
  }
  for (const [name, { base64 }] of Object.entries(files ?? {})) {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    await request(at(`/files?path=${encodeURIComponent(name)}`), { method: "PUT", raw: bytes, signal });
  }
  signal.throwIfAborted();
  // Stopping interrupts the cell, once it has begun, and its state is kept.
  let begun = false;
  const interrupt = () => {
    if (begun && signal.aborted) request(at("/contexts/default/interrupt"), { method: "POST" }).catch(() => {});
  };
  signal.addEventListener("abort", interrupt);
  const answer = await request(at("/run"), { method: "POST", body: { code, timeout_seconds }, accept: "text/event-stream" });
  for await (const [name, data] of events(answer)) {
    if (name === "stdout" || name === "stderr") output.text(name, data);
    else if (name === "started") {
      begun = true;
      interrupt();
    } else if (name === "result") output.result(data);
    else if (name === "error") output.error(data);
    else if (name === "lost") output.note(`… ${data.bytes} bytes were lost`);
    else if (name === "failure") throw new Refused(500, data);
    else if (name === "end") {
      outcome(data.outcome === "ok" ? "ok" : WORDS[data.outcome] ?? data.outcome.replaceAll("_", " "), data.outcome === "ok" ? "ok" : "error");
      for (const hint of data.hints ?? []) output.note(hint);
      facts([["run", milliseconds(data.wall_time_ms)], ["cell", String(data.execution_count ?? "")], ["engine", session?.isolation]]);
      return;
    }
  }
  throw new Error("the answer was broken off");
}

async function start() {
  if (running !== null) return;
  const stop = new AbortController();
  running = stop;
  $("run").disabled = true;
  $("stop").disabled = false;
  output.clear();
  facts([]);
  outcome("running", "busy");
  try {
    const run = await asked();
    snippets.show(run);
    await (run.keep ? kept(run, stop.signal) : fresh(run, stop.signal));
    snippets.show();
  } catch (error) {
    if (stop.signal.aborted) outcome("stopped", "error");
    else {
      outcome(error instanceof Refused ? error.code || "refused" : "failed", "error");
      output.error({ traceback: error.message });
    }
  } finally {
    running = null;
    $("run").disabled = false;
    $("stop").disabled = true;
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
$("stop").addEventListener("click", () => running?.abort());
$("end").addEventListener("click", endSession);
$("template").addEventListener("change", examples);
$("example").addEventListener("change", example);
$("key-button").addEventListener("click", () => askForKey(false));
for (const radio of document.querySelectorAll("input[name=mode]")) {
  radio.addEventListener("change", () => {
    for (const label of document.querySelectorAll("label.fresh")) label.hidden = mode() === "keep";
  });
}
$("code").addEventListener("keydown", (event) => {
  const code = $("code");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    start();
  } else if (event.key === "Enter" && !event.isComposing && !event.shiftKey) {
    // The next line begins where this one does, and deeper behind a colon or a brace.
    event.preventDefault();
    const line = code.value.slice(code.value.lastIndexOf("\n", code.selectionStart - 1) + 1, code.selectionStart);
    const deeper = /[:{([]\s*$/.test(line) ? (language() === "node" ? "  " : "    ") : "";
    const indent = `\n${/^[ \t]*/.exec(line)[0]}${deeper}`;
    // The browser's own undo knows of it, where it is told so.
    if (!document.execCommand("insertText", false, indent)) code.setRangeText(indent, code.selectionStart, code.selectionEnd, "end");
  }
});
addEventListener("pagehide", () => {
  // Not waited for; without it the lease ends by itself.
  if (session !== null) {
    const headers = key() === null ? {} : { Authorization: `Bearer ${key()}` };
    fetch(at(""), { method: "DELETE", headers, keepalive: true, credentials: "omit" });
  }
});

/** Where there are keys, metrics are refused without one. */
async function wantsKey() {
  try {
    await request("/v1/sandboxes?limit=1", { quiet: true });
    return false;
  } catch (error) {
    return error instanceof Refused && error.status === 401;
  }
}

const ready = await templates();
$("key-button").hidden = key() === null;
if (await wantsKey()) {
  $("key-button").hidden = false;
  await askForKey(key() !== null);
}
follow();
if (!ready) {
  // It warms: the names of the versions come with the first run.
  const again = setInterval(async () => {
    if (await templates()) clearInterval(again);
  }, 1000);
}
snippets.show(await asked());
document.documentElement.dataset.ready = "true";
