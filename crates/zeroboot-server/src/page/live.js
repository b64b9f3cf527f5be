// What the server does now, out of /v1/metrics and /v1/health.

import { Refused, request } from "./api.js";
import { $, bytes, make, milliseconds } from "./dom.js";

/** Time between two looks, ms. */
const EVERY = 2000;
/** Looks that a curve shows. */
const KEPT = 60;
/** What the server keeps of health is this old at most while it is looked at, ms. */
const HEALTH_EVERY = 6000;

const SVG = "http://www.w3.org/2000/svg";

/** The samples of a Prometheus text: name to `[labels, value]`. */
export function samples(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name] = value.replaceAll(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    }
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push([labels, Number(match[3])]);
  }
  return found;
}

const sum = (now, name, keep = () => true) =>
  (now.get(name) ?? []).reduce((total, [labels, value]) => (keep(labels) ? total + value : total), 0);

/** Counts below each bound of a histogram, all its series together. */
function buckets(now, name) {
  const counts = new Map();
  for (const [labels, value] of now.get(`${name}_bucket`) ?? []) {
    const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
    counts.set(bound, (counts.get(bound) ?? 0) + value);
  }
  return [...counts].sort((a, b) => a[0] - b[0]);
}

/** A quantile in seconds, as Prometheus' histogram_quantile has it; NaN where nothing was counted. */
export function quantile(counts, q) {
  const total = counts.at(-1)?.[1] ?? 0;
  if (total === 0) return NaN;
  let [below, from] = [0, 0];
  for (const [bound, count] of counts) {
    if (count >= q * total) {
      if (bound === Infinity) return from;
      return from + (bound - from) * ((q * total - below) / Math.max(count - below, 1));
    }
    [below, from] = [count, bound];
  }
  return from;
}

/** What was counted between two looks; all of it where nothing was. */
function lately(now, before, name) {
  const all = buckets(now, name);
  if (!before) return all;
  const earlier = new Map(buckets(before, name));
  const fresh = all.map(([bound, count]) => [bound, count - (earlier.get(bound) ?? 0)]);
  return fresh.at(-1)?.[1] > 0 ? fresh : all;
}

const tiles = new Map();

function tile(name, value, unit, curve) {
  if (!tiles.has(name)) {
    const line = document.createElementNS(SVG, "polyline");
    const picture = document.createElementNS(SVG, "svg");
    picture.setAttribute("viewBox", `0 0 ${KEPT - 1} 20`);
    picture.setAttribute("preserveAspectRatio", "none");
    picture.setAttribute("aria-hidden", "true");
    picture.append(line);
    const [number, small] = [make("span"), make("small")];
    $("tiles").append(make("div", {}, make("dt", {}, name), make("dd", {}, number, " ", small), picture));
    tiles.set(name, { number, small, line, curve: [] });
  }
  const one = tiles.get(name);
  one.number.textContent = value;
  one.small.textContent = unit;
  one.curve.push(Number.isFinite(curve) ? curve : 0);
  one.curve.splice(0, one.curve.length - KEPT);
  const most = Math.max(...one.curve, 1e-9);
  const from = KEPT - one.curve.length;
  one.line.setAttribute("points", one.curve.map((y, x) => `${from + x},${(18.5 - (y / most) * 17).toFixed(2)}`).join(" "));
}

/** The last looks. */
const looks = [];
/** The first of them. */
let before = null;

function show(now, at) {
  // Rates are over the last ten seconds: one look is too short for them.
  const seconds = before ? (at - before.at) / 1000 : 0;
  const old = before?.now;
  const rate = (name, keep) => (old ? Math.max(0, sum(now, name, keep) - sum(old, name, keep)) / seconds : 0);
  const forks = "zeroboot_pool_refills_total";
  const perSecond = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(1));
  tile("Forks", sum(now, forks).toLocaleString("en"), `${perSecond(rate(forks))}/s`, rate(forks));
  const runs = rate("zeroboot_execs_total");
  tile("Runs", sum(now, "zeroboot_execs_total").toLocaleString("en"), `${perSecond(runs)}/s`, runs);
  for (const [name, metric] of [["Sandbox ready", "zeroboot_fork_seconds"], ["Run", "zeroboot_exec_seconds"]]) {
    const counts = lately(now, old, metric);
    const [half, most] = [quantile(counts, 0.5) * 1000, quantile(counts, 0.99) * 1000];
    tile(`${name}, p50`, milliseconds(half), `p99 ${milliseconds(most)}`, half);
  }
  const live = sum(now, "zeroboot_live_sandboxes");
  const longLived = sum(now, "zeroboot_sandboxes");
  tile("Sandboxes", String(live + longLived), `${live} running, ${longLived} kept`, live + longLived);
  const [waiting, wanted] = [sum(now, "zeroboot_pool_ready"), sum(now, "zeroboot_pool_target")];
  tile("Pool", `${waiting}`, `of ${wanted} waiting`, waiting);
  const memory = sum(now, "zeroboot_memory_usage_bytes");
  tile("Memory", bytes(memory), "server, templates", memory);

  const rows = (now.get("zeroboot_template_ready") ?? []).map(([{ template }, up]) => {
    const mine = (labels) => labels.template === template;
    const works = up === 1 && sum(now, "zeroboot_template_canary_ok", mine) === 1;
    const of = (name) => sum(now, name, mine);
    return make("tr", {},
      make("td", {}, template),
      make("td", {}, make("span", { class: "pill", "data-state": works ? "ok" : "error" }, works ? "ready" : "not ready")),
      make("td", { class: "number" }, `${of("zeroboot_pool_ready")}/${of("zeroboot_pool_target")}`),
      make("td", { class: "number" }, of(forks).toLocaleString("en")),
      make("td", { class: "number" }, bytes(of("zeroboot_template_memory_bytes"))));
  });
  $("templates").replaceChildren(...rows);
}

const ends = (at) => {
  const left = Math.max(0, (Date.parse(at) - Date.now()) / 1000);
  return left < 120 ? `${left.toFixed(0)} s` : `${(left / 60).toFixed(0)} min`;
};

async function sandboxes() {
  const { sandboxes: all } = await (await request("/v1/sandboxes?limit=20", { quiet: true })).json();
  const body = $("sandboxes");
  // A button that has the focus stays: its row is only given another text.
  const rows = new Map([...body.rows].map((row) => [row.dataset.id, row]));
  const next = all.map((one) => {
    const row = rows.get(one.id) ?? rowOf(one);
    row.cells[2].textContent = ends(one.expires_at);
    return row;
  });
  if (next.length === 0) next.push(make("tr", {}, make("td", { colspan: "4" }, "none")));
  if (next.length !== body.rows.length || next.some((row, at) => row !== body.rows[at])) body.replaceChildren(...next);
}

function rowOf(one) {
  const end = make("button", { type: "button", class: "quiet", "aria-label": `End sandbox ${one.id}` }, "End");
  end.addEventListener("click", async () => {
    end.disabled = true;
    await request(`/v1/sandboxes/${encodeURIComponent(one.id)}`, { method: "DELETE" }).catch(() => {});
    await look();
  });
  return make("tr", { "data-id": one.id },
    make("td", {}, make("code", {}, one.id)), make("td", {}, one.template), make("td", { class: "number" }), make("td", {}, end));
}

let healthAt = -Infinity;

/** The state of the server in the head; gives its templates. */
export async function health() {
  healthAt = performance.now();
  let body;
  try {
    // 503 has the same body: a server that warms says so.
    body = await (await fetch("/v1/health", { cache: "no-store", credentials: "omit" })).json();
  } catch {
    body = { status: "unreachable", templates: {} };
  }
  const pill = $("health");
  const state = { ok: "ok", degraded: "degraded", warming: "warming" }[body.status] ?? "error";
  // Said again only when it changes: it is a live region.
  const words = String(body.status).replace("_", " ");
  if (pill.textContent !== words) pill.textContent = words;
  pill.dataset.state = state;
  const engines = [...new Set(Object.values(body.templates).map((template) => template.engine))];
  $("engine").hidden = engines.length === 0;
  $("engine").textContent = `engine ${engines.join(", ")}${body.version ? ` · ${body.version}` : ""}`;
  return body.templates;
}

let looking = false;

async function look() {
  if (looking) return;
  looking = true;
  try {
    if (performance.now() - healthAt > HEALTH_EVERY) await health();
    const answer = await request("/v1/metrics", { quiet: true });
    const [now, at] = [samples(await answer.text()), performance.now()];
    show(now, at);
    // Ten seconds back, or as long as there is.
    looks.push({ now, at });
    while (looks.length > 6) looks.shift();
    before = looks.length > 1 ? looks[0] : null;
    await sandboxes();
    $("live-note").hidden = true;
  } catch (error) {
    const words = error instanceof Refused && error.status === 401 ? "A key is needed to see this." : `Not to be had: ${error.message}`;
    if ($("live-note").textContent !== words) $("live-note").textContent = words;
    $("live-note").hidden = false;
  } finally {
    looking = false;
  }
}

export function follow() {
  const due = () => !document.hidden && $("follow").checked;
  setInterval(() => { if (due()) look(); }, EVERY);
  document.addEventListener("visibilitychange", () => { if (due()) look(); });
  $("follow").addEventListener("change", () => { if (due()) look(); });
  return look();
}
