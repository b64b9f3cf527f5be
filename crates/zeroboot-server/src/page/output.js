// What a run printed and gave back.

import { bytesOf } from "./api.js";
import { $, bytes, make } from "./dom.js";

/** Most characters of output that the page shows of one run; more would make it slow. */
const MOST_SHOWN = 1_000_000;
/** Colours and the like, which are for terminals. */
const ESCAPES = /\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])/g;
const IMAGES = ["image/png", "image/jpeg", "image/gif", "image/webp"];

const output = $("output");
const list = $("brought-list");
let shown = 0;
let links = [];
let last = null;
let waiting = [];

export function clear() {
  for (const link of links) URL.revokeObjectURL(link);
  [shown, links, last, waiting] = [0, [], null, []];
  output.replaceChildren();
  list.replaceChildren();
  $("brought").hidden = true;
}

/** Text of a stream. It is shown with the next picture of the screen, so that a fast program does not stop the page. */
export function text(kind, data) {
  const piece = data.text ?? new TextDecoder().decode(bytesOf(data.base64));
  if (shown > MOST_SHOWN) return;
  shown += piece.length;
  if (waiting.length === 0) requestAnimationFrame(flush);
  waiting.push([kind, piece]);
  if (shown > MOST_SHOWN) waiting.push(["note", "\n… the page shows no more of it"]);
}

function flush() {
  const near = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
  for (const [kind, piece] of waiting) {
    if (last?.className !== kind) {
      last = make("span", { class: kind }, "");
      output.append(last);
    }
    last.append(piece.replace(ESCAPES, ""));
  }
  waiting = [];
  if (near) output.scrollTop = output.scrollHeight;
}

function add(element) {
  flush();
  last = null;
  output.append(element);
  output.scrollTop = output.scrollHeight;
}

export function note(words) {
  add(make("span", { class: "note" }, `${words}\n`));
}

/** A value or a display of a cell: the richest form that a page can show without trusting it. */
export function result(data) {
  const image = IMAGES.find((type) => typeof data[type] === "string");
  if (image) {
    const link = blob(bytesOf(data[image]), image);
    add(make("img", { src: link, alt: data["text/plain"] ?? "an image that the code made" }));
    return;
  }
  const json = data["application/json"];
  const plain = data["text/plain"] ?? data["text/markdown"] ?? (json === undefined ? undefined : JSON.stringify(json));
  if (plain !== undefined) add(make("span", { class: data.is_main ? "value" : "stdout" }, `${plain}\n`));
}

export function error(data) {
  const trace = Array.isArray(data.traceback) ? data.traceback.join("\n") : data.traceback;
  text("error", { text: `${(trace || `${data.name}: ${data.value}`).trimEnd()}\n` });
}

function blob(content, type) {
  const link = URL.createObjectURL(new Blob([content], { type }));
  links.push(link);
  return link;
}

/** A file that came back, to download. */
export function file(data) {
  $("brought").hidden = false;
  if (data.error !== undefined) {
    list.append(make("li", { class: "error" }, `${data.path}: ${data.error}`));
    return;
  }
  const content = data.base64 === undefined ? new TextEncoder().encode(data.text) : bytesOf(data.base64);
  // Never a type that a browser would run on this origin.
  const link = blob(content, "application/octet-stream");
  const name = data.path.split("/").pop();
  list.append(make("li", {}, make("a", { href: link, download: name }, data.path), ` ${bytes(content.length)}`));
  const image = IMAGES.find((type) => type.endsWith(name.toLowerCase().split(".").pop().replace("jpg", "jpeg")));
  if (image) add(make("img", { src: blob(content, image), alt: data.path }));
}
