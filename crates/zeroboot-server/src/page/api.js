// Requests to the server that this page came from: the key, errors, events.

const STORED = "zeroboot-key";
const keyDialog = document.getElementById("key-dialog");
const keyInput = document.getElementById("key");
const keyWrong = document.getElementById("key-wrong");

/** What the server refused, by its stable code. */
export class Refused extends Error {
  constructor(status, body) {
    super(body?.error ?? `The server answered with HTTP ${status}`);
    this.status = status;
    this.code = body?.code ?? "";
  }
}

// The tab's storage, which can be switched off; then the key lives as long as the page.
let memory = null;
export function key() {
  try {
    return sessionStorage.getItem(STORED) ?? memory;
  } catch {
    return memory;
  }
}

function keep(value) {
  memory = value;
  try {
    if (value === null) sessionStorage.removeItem(STORED);
    else sessionStorage.setItem(STORED, value);
  } catch {
    // It is in `memory`.
  }
}

let asking = null;

/** Asks for a key; true if there is one now. Whoever asks meanwhile waits for the same answer. */
export function askForKey(wrong) {
  asking ??= new Promise((resolve) => {
    keyWrong.hidden = !wrong;
    keyInput.value = "";
    keyDialog.returnValue = "";
    keyDialog.addEventListener("close", () => {
      asking = null;
      resolve(keyDialog.returnValue === "use" && key() !== null);
    }, { once: true });
    keyDialog.showModal();
    keyInput.focus();
  });
  return asking;
}

document.getElementById("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const value = keyInput.value.trim();
  keyInput.value = "";
  if (value === "") return;
  keep(value);
  keyDialog.close("use");
});
document.getElementById("key-cancel").addEventListener("click", () => keyDialog.close(""));
document.getElementById("key-forget").addEventListener("click", () => {
  keep(null);
  keyDialog.close("");
});

/** A request with the key. `quiet`: without one that works, it fails instead of asking. */
export async function request(path, { method = "GET", body, raw, accept, signal, quiet = false } = {}) {
  for (;;) {
    const headers = new Headers();
    const used = key();
    if (used !== null) headers.set("Authorization", `Bearer ${used}`);
    if (body !== undefined) headers.set("Content-Type", "application/json");
    if (accept !== undefined) headers.set("Accept", accept);
    const answer = await fetch(path, {
      method,
      headers,
      body: raw ?? (body === undefined ? undefined : JSON.stringify(body)),
      signal,
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
    });
    if (answer.ok) return answer;
    if (answer.status === 401 && !quiet) {
      // Another request may have asked for one since.
      if (key() !== used || (await askForKey(used !== null))) continue;
    }
    throw new Refused(answer.status, await answer.json().catch(() => null));
  }
}

/** The events of an answer: `[name, data]`. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      let end;
      while ((end = text.indexOf("\n\n")) >= 0) {
        const block = text.slice(0, end);
        text = text.slice(end + 2);
        let name = "message";
        let data = "";
        for (const line of block.split("\n")) {
          if (line.startsWith("event:")) name = line.slice(6).trim();
          else if (line.startsWith("data:")) data += line.slice(5);
        }
        if (data !== "") yield [name, JSON.parse(data)];
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

export function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

export function base64Of(bytes) {
  let text = "";
  for (let at = 0; at < bytes.length; at += 32768) {
    text += String.fromCharCode(...bytes.subarray(at, at + 32768));
  }
  return btoa(text);
}
