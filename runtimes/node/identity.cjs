// Whatever a snapshot froze is made new.
'use strict';

const { createHash, randomBytes, randomInt, randomUUID, randomUUIDv7 } = require('crypto');
const { IDENTITY_LEN, RunnerError } = require('./wire.cjs');

// OpenSSL's generators were seeded when Node started, so a snapshot freezes them, and Node has no call that seeds them again.
// They do it themselves when the wall clock says that their last seed is older than an hour (OpenSSL 3: 3600 s for the
// primary, 420 s for the others) or in the future. The agent of a VM therefore warms a template with a clock that is two
// hours slow and sets it right at the identity. Here that is checked, and without it no program runs.
const RESEED_SECONDS = 3600;

/**
 * Replaces Math.random by xoshiro128**, 53 bits a number, and returns what seeds it. V8's own state is part of the snapshot
 * and cannot be set. Before anything is warmed, since a module may keep the function that it finds.
 */
function replaceRandom() {
  let a, b, c, d;
  const word = () => {
    const m = Math.imul(b, 5);
    const result = Math.imul(m << 7 | m >>> 25, 9) >>> 0;
    const t = b << 9;
    c ^= a; d ^= b; b ^= c; a ^= d; c ^= t;
    d = d << 11 | d >>> 21;
    return result;
  };
  const { random } = { random() { return ((word() >>> 5) * 67108864 + (word() >>> 6)) / 9007199254740992; } };
  Object.defineProperty(Math, 'random', { value: random, writable: true, enumerable: false, configurable: true });
  return (seed) => {
    a = seed.readUInt32LE(0); b = seed.readUInt32LE(4); c = seed.readUInt32LE(8); d = seed.readUInt32LE(12) | 1;
  };
}

// Node draws ahead, at the first use, and has no call that drops it. The functions as they are before a module replaces one.
const UUIDS_AHEAD = 128, INTEGERS_AHEAD = 1024;

/** Uses up what was drawn before: whatever comes after it was drawn after it was called. */
function spendDrawnAhead() {
  for (let i = 0; i < UUIDS_AHEAD; i++) {
    randomUUID();
    if (randomUUIDv7) randomUUIDv7();
  }
  for (let i = 0; i < INTEGERS_AHEAD; i++) randomInt(2);
}

/** When the process began is when the machine began that was frozen. The clocks are right by now. */
function renewTimeOrigin() {
  const prototype = Object.getPrototypeOf(performance);
  const origin = Date.now() - performance.now();
  Object.defineProperty(prototype, 'timeOrigin', { get() { return origin; }, enumerable: true, configurable: true });
}

function applyIdentity(payload, frozen) {
  if (payload.length !== IDENTITY_LEN) throw new RunnerError(`the identity has ${payload.length} bytes, not ${IDENTITY_LEN}`);
  // A process that nobody copied was seeded by the kernel when it started: nothing to do.
  if (!frozen) return;
  const now = Date.now() / 1000;
  if (now - frozen.until <= RESEED_SECONDS && now >= frozen.since - 1) {
    throw new RunnerError('the clock has not moved by an hour since the snapshot, so OpenSSL would not seed itself again');
  }
  // The first use after the jump is what makes OpenSSL notice.
  const seed = createHash('sha512').update(payload.subarray(0, 64)).update(randomBytes(32)).digest();
  frozen.since = frozen.until = now;
  frozen.seedRandom(seed);
  spendDrawnAhead();
  renewTimeOrigin();
}

module.exports = { replaceRandom, spendDrawnAhead, applyIdentity };
