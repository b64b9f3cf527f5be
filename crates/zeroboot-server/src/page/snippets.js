// The run as a program of the user's own. The key is never in it.

import { key } from "./api.js";
import { $ } from "./dom.js";

const kinds = ["curl", "python", "typescript"];
let kind = "curl";
let run = null;

const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
// What JSON writes, Python and JavaScript read alike, but for what stands beyond the basic plane.
const quoted = (text) => JSON.stringify(text).replaceAll(/[\u2028\u2029]/g, (c) => `\\u${c.charCodeAt(0).toString(16)}`);

/** Several lines as they are, where the language can. */
function python(text) {
  if (!text.includes("\n") || /\\|"""|"$|[^\x20-\x7e\n\t]/.test(text)) {
    // The surrogates of JSON's own escapes are not characters to Python; JSON.stringify writes none but for lone ones.
    return quoted(text);
  }
  return `"""\\\n${text}"""`;
}

function typescript(text) {
  if (!text.includes("\n") || /[\\`]|\$\{|[^\x20-\x7e\n\t]/.test(text)) return quoted(text);
  return `\`${text}\``;
}

const bodyOf = ({ body }) => JSON.stringify(body, null, 2);

function curl() {
  const auth = key() === null ? "" : ` \\\n  -H "Authorization: Bearer $ZEROBOOT_API_KEY"`;
  const json = ` \\\n  -H 'Content-Type: application/json'`;
  const post = (path, body) => `curl -s ${path}${auth}${json} \\\n  -d ${shell(body)}`;
  const base = location.origin;
  if (!run.keep) return post(`${base}/v1/exec`, bodyOf(run));
  const create = JSON.stringify({ template: run.body.template });
  const { code, timeout_seconds } = run.body;
  return `ID=$(${post(`${base}/v1/sandboxes`, create)} \\\n  | sed 's/^{"id":"\\([^"]*\\)".*/\\1/')\n`
    + post(`"${base}/v1/sandboxes/$ID/run"`, JSON.stringify({ code, timeout_seconds }, null, 2));
}

const indent = (lines, by) => lines.map((line) => " ".repeat(by) + line);

function inPython() {
  const { code, template, timeout_seconds, stdin, files, output_files, limits } = run.body;
  const base = `base_url=${quoted(location.origin)}`;
  // The key is taken from ZEROBOOT_API_KEY.
  if (run.keep) {
    return [
      "from zeroboot import Sandbox", "",
      `with Sandbox.create(${base}, template=${quoted(template)}) as sandbox:`,
      `    cell = sandbox.run(${python(code)}, timeout=${timeout_seconds})`,
      "    print(cell.stdout, cell.value)",
    ].join("\n");
  }
  const options = [`${python(code)},`, `template=${quoted(template)},`, `timeout=${timeout_seconds},`];
  if (stdin) options.push(`stdin=${python(stdin)},`);
  const names = Object.keys(files ?? {});
  if (names.length) {
    options.push("files={", ...names.map((name) => `    ${quoted(name)}: open(${quoted(name)}, "rb").read(),`), "},");
  }
  if (output_files) options.push(`output_files=[${output_files.map(quoted).join(", ")}],`);
  if (limits) options.push(`limits={"memory_mb": ${limits.memory_mb}},`);
  return [
    "from zeroboot import Sandbox", "",
    `result = Sandbox(${base}).run(`, ...indent(options, 4), ")",
    "print(result.stdout, result.exit_code)",
  ].join("\n");
}

function inTypeScript() {
  const { code, template, timeout_seconds, stdin, files, output_files, limits } = run.body;
  const base = `baseUrl: ${quoted(location.origin)}`;
  if (run.keep) {
    return [
      `import { Sandbox } from "@zeroboot/sdk";`, "",
      `const client = new Sandbox({ ${base} });`,
      `const sandbox = await Sandbox.create({ client, template: ${quoted(template)} });`,
      "try {",
      `  const cell = await sandbox.run(${typescript(code)}, { timeout: ${timeout_seconds} });`,
      "  console.log(cell.stdout, cell.value);",
      "} finally {",
      "  await sandbox.kill();",
      "}",
    ].join("\n");
  }
  const names = Object.keys(files ?? {});
  const options = [`template: ${quoted(template)},`, `timeout: ${timeout_seconds},`];
  if (stdin) options.push(`stdin: ${typescript(stdin)},`);
  if (names.length) {
    options.push("files: {", ...names.map((name) => `  ${quoted(name)}: await readFile(${quoted(name)}),`), "},");
  }
  if (output_files) options.push(`outputFiles: [${output_files.map(quoted).join(", ")}],`);
  if (limits) options.push(`limits: { memory_mb: ${limits.memory_mb} },`);
  return [
    ...(names.length ? [`import { readFile } from "node:fs/promises";`] : []),
    `import { Sandbox } from "@zeroboot/sdk";`, "",
    `const result = await new Sandbox({ ${base} }).run(`,
    `  ${typescript(code)},`, "  {", ...indent(options, 4), "  },", ");",
    "console.log(result.stdout, result.exit_code);",
  ].join("\n");
}

export function show(next = run) {
  run = next;
  if (run === null) return;
  $("snippet").textContent = { curl, python: inPython, typescript: inTypeScript }[kind]();
}

function select(next, focus) {
  kind = next;
  for (const one of kinds) {
    const tab = $(`tab-${one}`);
    tab.setAttribute("aria-selected", String(one === kind));
    tab.tabIndex = one === kind ? 0 : -1;
    if (one === kind && focus) tab.focus();
  }
  $("snippet").setAttribute("aria-labelledby", `tab-${kind}`);
  show();
}

for (const one of kinds) {
  $(`tab-${one}`).addEventListener("click", () => select(one, false));
  $(`tab-${one}`).addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) select(kinds.at((kinds.indexOf(kind) + step) % kinds.length), true);
  });
}

$("copy").addEventListener("click", async () => {
  const said = $("copied");
  try {
    await navigator.clipboard.writeText($("snippet").textContent);
    said.textContent = "Copied.";
  } catch {
    // Not on a page without TLS and from elsewhere: the text can still be selected.
    getSelection().selectAllChildren($("snippet"));
    said.textContent = "Selected: press Ctrl+C.";
  }
  setTimeout(() => { said.textContent = ""; }, 3000);
});
