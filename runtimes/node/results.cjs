// What a cell shows: MIME bundles, and the frames that carry them.
'use strict';

const { inspect } = require('util');
const { MAX_PAYLOAD, RESULT, send } = require('./wire.cjs');

// Bits of a Result frame: the value of the last expression; not the first chunk of its part; the last chunk of its bundle.
const VALUE = 1, CONTINUES = 2, LAST = 4;
// Notebooks carry these as base64; a result carries the bytes.
const BINARY = ['image/png', 'image/jpeg', 'application/pdf'];
const MIME = /^[a-z]+\/[a-z0-9.+-]+$/i;
// By which objects say what they look like, as in other notebooks for JavaScript.
const DISPLAY = Symbol.for('Jupyter.display');

function asBytes(type, data) {
  if (data === undefined || data === null) return null;
  if (typeof data === 'string') return Buffer.from(data, BINARY.includes(type) ? 'base64' : 'utf8');
  if (ArrayBuffer.isView(data)) return Buffer.from(data.buffer, data.byteOffset, data.byteLength);
  return Buffer.from(JSON.stringify(data) ?? 'null');
}

/** [MIME type, bytes] pairs of an object whose keys are MIME types. */
function parts(content) {
  return Object.entries(content).filter(([type]) => type.length < 256 && MIME.test(type))
    .map(([type, data]) => [type, asBytes(type, data)]).filter(([, data]) => data !== null);
}

function isBundle(value) {
  if (value === null || typeof value !== 'object' || Object.getPrototypeOf(value) !== Object.prototype) return false;
  const keys = Object.keys(value);
  return keys.length > 0 && keys.every((key) => MIME.test(key));
}

// Packed, all of our code is one file.
const OURS = __filename.endsWith('results.cjs') ? __dirname : __filename;

/** Takes out the frames that are ours, and those below a cell. */
function withoutOurs(text) {
  if (!text.includes(OURS)) return text;
  let below = false;
  return text.split('\n').filter((line) => {
    if (!/^\s+at /.test(line)) return !(below = false);
    below ||= line.includes('(node:inspector:') || line.includes('zeroboot:1:1');
    return !below && !line.includes(OURS) && !line.includes('[as _tickCallback]');
  }).join('\n');
}

/** What a value looks like. */
function represent(value) {
  const plain = ['text/plain', Buffer.from(withoutOurs(inspect(value)))];
  const own = value !== null && typeof value === 'object' && typeof value[DISPLAY] === 'function' ? value[DISPLAY]() : null;
  if (own === null || typeof own !== 'object') return [plain];
  const said = parts(own);
  return said.some(([type]) => type === 'text/plain') ? said : [plain, ...said];
}

function sendBundle(bundle, isValue) {
  bundle.forEach(([type, data], i) => {
    const name = Buffer.from(type), room = MAX_PAYLOAD - 2 - name.length;
    for (let at = 0; at === 0 || at < data.length; at += room) {
      const last = at + room >= data.length && i === bundle.length - 1;
      const flags = (isValue ? VALUE : 0) | (at ? CONTINUES : 0) | (last ? LAST : 0);
      send(RESULT, Buffer.concat([Buffer.from([flags, name.length]), name, data.subarray(at, at + room)]));
    }
  });
}

/** Leaves the middle out. */
function cut(text, room) {
  if (text.length <= room) return text;
  const half = room >> 1;
  return `${text.slice(0, half)}\n... ${text.length - 2 * half} characters left out ...\n${text.slice(text.length - half)}`;
}

function errorPayload(name, value, traceback) {
  for (let room = MAX_PAYLOAD; ; room = room * 3 >> 2) {
    const fields = { name: cut(name, 200), value: cut(value, room >> 2), traceback: cut(traceback, room) };
    // A lone surrogate is nothing that UTF-8 can carry.
    for (const key in fields) fields[key] = Buffer.from(fields[key]).toString();
    const payload = Buffer.from(JSON.stringify(fields));
    if (payload.length <= MAX_PAYLOAD) return payload;
  }
}

module.exports = { parts, isBundle, represent, withoutOurs, sendBundle, errorPayload };
