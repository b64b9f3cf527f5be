// A module that is warmed: it keeps what it finds, and has drawn from all of it.
'use strict';
const crypto = require('crypto');
const { random } = Math, { randomUUID, randomInt, randomBytes } = crypto;
const webUUID = globalThis.crypto && globalThis.crypto.randomUUID.bind(globalThis.crypto) || randomUUID;
const before = [randomUUID(), randomInt(2 ** 47), randomBytes(8).toString('hex'), webUUID()];
for (let i = 0; i < 100; i++) randomInt(2 ** 47);
random();

module.exports = () => [
  ...before.map((value) => `before ${value}`),
  `random ${random()}`,
  `randomUUID ${randomUUID()}`,
  `web.randomUUID ${webUUID()}`,
  `randomInt ${randomInt(2 ** 47)}`,
  `randomBytes ${randomBytes(8).toString('hex')}`,
  `all ${[Array.from({ length: 2000 }, random), Array.from({ length: 300 }, randomUUID), Array.from({ length: 2000 }, () => randomInt(2 ** 47))]
    .map((drawn) => new Set(drawn).size)} ${Math.random()}`,
];
