// Frames of crates/zeroboot-proto/src/frame.rs on descriptors 3 (in) and 4 (out).
'use strict';

const fs = require('fs');

const CODE = 0x01, ARG = 0x02, ENV = 0x03, IDENTITY = 0x09, RUN = 0x0a, CWD = 0x0b, SERVE = 0x0c, CELL = 0x0d;
const READY = 0x81, STARTED = 0x82, FAILURE = 0x87, NOTE = 0x88, RESULT = 0x8a, ERROR = 0x8b, DONE = 0x8c;
const NOTE_ENDED = 2, NOTE_HINT = 3;
const HEADER = 8, MAX_PAYLOAD = 64 * 1024 - HEADER, IDENTITY_LEN = 64 + 8 + 16;
const CONTROL_IN = 3, CONTROL_OUT = 4;
// EX_SOFTWARE: the agent reads the Failure frame, not this.
const STATUS_FAILURE = 70;
// How long to wait for an agent that does not read.
const BUSY_MS = 1;
const sleeper = new Int32Array(new SharedArrayBuffer(4));

class RunnerError extends Error {}

/** `content`: text or bytes. */
function send(kind, content) {
  const payload = Buffer.from(content).subarray(0, MAX_PAYLOAD);
  const frame = Buffer.alloc(HEADER + payload.length);
  frame.writeUInt32LE(payload.length, 0);
  frame[4] = kind;
  payload.copy(frame, HEADER);
  for (let at = 0; at < frame.length;) {
    try {
      at += fs.writeSync(CONTROL_OUT, frame, at);
    } catch (error) {
      // The code can have made the descriptor one that does not block.
      if (error.code !== 'EAGAIN') throw error;
      Atomics.wait(sleeper, 0, 0, BUSY_MS);
    }
  }
}

function fail(error) {
  const text = (error instanceof RunnerError ? error.message : String(error && error.stack || error)).replace(/\s+/g, ' ');
  // Whoever does not listen any more cannot be told; the agent keeps what is on stderr.
  try { send(FAILURE, text); } catch {}
  try { fs.writeSync(2, `zeroboot runner: ${text}\n`); } catch {}
  process.reallyExit(STATUS_FAILURE);
}

/** Takes frames out of the bytes that came, in pieces of any size. */
class Decoder {
  held = Buffer.alloc(0);

  /** Calls `each(kind, payload)` for each whole frame until it returns false. */
  feed(bytes, each) {
    this.held = Buffer.concat([this.held, bytes]);
    while (this.held.length >= HEADER) {
      const length = this.held.readUInt32LE(0);
      if (length > MAX_PAYLOAD) throw new RunnerError(`a control frame of ${length} bytes is above the limit`);
      if (this.held.length < HEADER + length) break;
      const kind = this.held[4], payload = this.held.subarray(HEADER, HEADER + length);
      this.held = this.held.subarray(HEADER + length);
      if (!each(kind, payload)) return false;
    }
    return true;
  }
}

/** Calls `each(kind, payload)` for each frame until it returns false; ends the process when the other side closes. */
function readFrames(decoder, each) {
  const buffer = Buffer.allocUnsafe(MAX_PAYLOAD);
  for (let n = 0; decoder.feed(buffer.subarray(0, n), each);) {
    n = fs.readSync(CONTROL_IN, buffer, 0, buffer.length, null);
    // An unused runner whose agent has gone.
    if (n === 0) process.reallyExit(0);
  }
}

module.exports = {
  CODE, ARG, ENV, IDENTITY, RUN, CWD, SERVE, CELL, READY, STARTED, FAILURE, NOTE, RESULT, ERROR, DONE, NOTE_ENDED, NOTE_HINT,
  MAX_PAYLOAD, IDENTITY_LEN, CONTROL_IN, CONTROL_OUT, RunnerError, send, fail, Decoder, readFrames,
};
