// What is paid for once, before a snapshot.
'use strict';

const path = require('path');
const vm = require('vm');
const Module = require('module');
const { RunnerError } = require('./wire.cjs');
const { dynamicImport } = require('./imports.cjs');

const WARM = ('assert buffer child_process crypto events fs/promises http https net os perf_hooks querystring readline ' +
  'stream stream/promises string_decoder timers/promises tty url util worker_threads zlib').split(' ');

async function warm(names) {
  for (const name of WARM) require(name);
  const local = Module.createRequire(path.join(process.cwd(), '[eval]'));
  const warmed = [], skipped = [];
  for (const item of names.split(',').map((s) => s.trim()).filter(Boolean)) {
    const name = item.replace(/\?$/, '');
    try {
      local(name);
      let version = '';
      try { version = ' ' + local(name + '/package.json').version; } catch { /* a builtin, or it does not export that file */ }
      warmed.push(name + version);
    } catch (error) {
      const reason = String(error && error.message || error).split('\n')[0];
      if (!item.endsWith('?')) throw new RunnerError(`cannot warm module ${name}: ${reason}`);
      skipped.push(`${name}: ${reason}`);
    }
  }
  // The loader of ES modules, the compiler, and the formatting of values and errors.
  await import('data:text/javascript,export default 1');
  const { emitWarning } = process;
  // That the constant below is experimental is said once a process, and is no news to the program's author.
  process.emitWarning = () => {};
  await new vm.Script("import('fs')", { filename: '[eval]', importModuleDynamically: dynamicImport(process.cwd()) }).runInThisContext();
  process.emitWarning = emitWarning;
  new vm.Script('(a) => [a]', { filename: '[eval]' }).runInThisContext();
  require('util').inspect({ a: [1, 'x', new Map([[1, 2]])], e: new Error('x') });
  blockingStreams();
  return { version: `Node ${process.version}`, warmed, ...(skipped.length && { skipped }) };
}

/** The streams over 1 and 2. Blocking, so that process.exit() loses nothing that was written: Node's pipes are not. */
function blockingStreams() {
  for (const stream of [process.stdout, process.stderr]) {
    if (stream._handle && stream._handle.setBlocking) stream._handle.setBlocking(true);
  }
}

module.exports = { warm, blockingStreams };
