// Until the clock jumps at the identity, as the agent of a VM makes it, all that OpenSSL gives is the same in every process.
'use strict';
const { internalBinding } = require('internal/test/binding');
const fs = require('fs');
const { now } = Date, { readSync } = fs;
const { RandomBytesJob } = internalBinding('crypto');
let jump = 0, count = 0;
Date.now = () => now() + jump;
fs.readSync = (...args) => {
  if (args[0] === 3) jump = 7200e3;
  return readSync(...args);
};
internalBinding('crypto').RandomBytesJob = function (mode, buffer, offset, size) {
  if (jump) return new RandomBytesJob(mode, buffer, offset, size);
  const bytes = new Uint8Array(buffer.buffer || buffer, (buffer.byteOffset || 0) + offset, size);
  return { run() { bytes.forEach((_, i) => { bytes[i] = Math.imul(++count, 2654435761) >>> 24; }); return []; } };
};
