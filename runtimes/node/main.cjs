// The Node runner: warms an interpreter, waits for one request on descriptor 3, becomes the user's program.
//
//   node --no-deprecation runner.cjs [--warm a,b?,...] [--frozen]
//
// Node 18 to 24, no packages. Descriptor 3 carries zeroboot-proto frames; 0, 1 and 2 are the program's.
// See ../README.md for the whole contract.
'use strict';

const fs = require('fs');
const path = require('path');
const vm = require('vm');
const Module = require('module');
const { pathToFileURL } = require('url');

// Frame kinds of crates/zeroboot-proto/src/frame.rs.
const CODE = 0x01, ARG = 0x02, ENV = 0x03, IDENTITY = 0x09, RUN = 0x0a;
const READY = 0x81, STARTED = 0x82, FAILURE = 0x87, NOTE = 0x88;
const NOTE_ENDED = 2, NOTE_HINT = 3;
const HEADER = 8, MAX_PAYLOAD = 64 * 1024 - HEADER, IDENTITY_LEN = 64 + 8 + 16;
const CONTROL = 3;
// EX_SOFTWARE: the agent reads the Failure frame, not this.
const STATUS_FAILURE = 70;
// What a program ends with whose top-level await never ends.
const STATUS_UNSETTLED = 13;

// OpenSSL's generators were seeded when Node started, so a snapshot freezes them, and Node has no call that seeds them again.
// They do it themselves when the wall clock says that their last seed is older than an hour (OpenSSL 3: 3600 s for the
// primary, 420 s for the others) or in the future. The agent of a VM therefore warms a template with a clock that is two
// hours slow and sets it right at the identity. Here that is checked, and without it no program runs.
const RESEED_SECONDS = 3600;

const WARM = ('assert buffer child_process crypto events fs/promises http https net os perf_hooks querystring readline ' +
  'stream stream/promises string_decoder timers/promises tty url util worker_threads zlib').split(' ');

class RunnerError extends Error {}

// ---- control descriptor

/** `content`: text or bytes. */
function send(kind, content) {
  const payload = Buffer.from(content).subarray(0, MAX_PAYLOAD);
  const frame = Buffer.alloc(HEADER + payload.length);
  frame.writeUInt32LE(payload.length, 0);
  frame[4] = kind;
  payload.copy(frame, HEADER);
  for (let at = 0; at < frame.length;) at += fs.writeSync(CONTROL, frame, at);
}

function fail(error) {
  const text = (error instanceof RunnerError ? error.message : String(error && error.stack || error)).replace(/\s+/g, ' ');
  // Whoever does not listen any more cannot be told; the agent keeps what is on stderr.
  try { send(FAILURE, text); } catch {}
  try { fs.writeSync(2, `zeroboot runner: ${text}\n`); } catch {}
  process.reallyExit(STATUS_FAILURE);
}

/** Calls `each(kind, payload)` for each frame until it returns false; ends the process when the other side closes. */
function readFrames(each) {
  let held = Buffer.alloc(0);
  const buffer = Buffer.allocUnsafe(MAX_PAYLOAD);
  for (;;) {
    while (held.length >= HEADER) {
      const length = held.readUInt32LE(0);
      if (length > MAX_PAYLOAD) throw new RunnerError(`a control frame of ${length} bytes is above the limit`);
      if (held.length < HEADER + length) break;
      const more = each(held[4], held.subarray(HEADER, HEADER + length));
      held = held.subarray(HEADER + length);
      if (!more) return;
    }
    const n = fs.readSync(CONTROL, buffer, 0, buffer.length, null);
    // An unused runner whose agent has gone.
    if (n === 0) process.reallyExit(0);
    held = Buffer.concat([held, buffer.subarray(0, n)]);
  }
}

// ---- warming

function parse(args) {
  const options = { warm: '', frozen: false };
  while (args.length) {
    const name = args.shift();
    if (name === '--frozen') options.frozen = true;
    else if (name === '--warm' && args.length) options.warm = args.shift();
    else throw new RunnerError(`unknown or incomplete argument ${name}`);
  }
  return options;
}

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
  // The streams over 1 and 2. Blocking, so that process.exit() loses nothing that was written: Node's pipes are not.
  for (const stream of [process.stdout, process.stderr]) {
    if (stream._handle && stream._handle.setBlocking) stream._handle.setBlocking(true);
  }
  return { version: `Node ${process.version}`, warmed, ...(skipped.length && { skipped }) };
}

// ---- identity

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
const { createHash, randomBytes, randomInt, randomUUID, randomUUIDv7 } = require('crypto');

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
  frozen.seedRandom(seed);
  spendDrawnAhead();
  renewTimeOrigin();
}

// ---- the program

// What V8 says when the text is a module and not a script.
const ONLY_IN_MODULES = ['Cannot use import statement outside a module', "Unexpected token 'export'",
  "Cannot use 'import.meta' outside a module"];

/** Node's own rule: it is a module if it parses as one and does not as a script. */
function isModule(error, source) {
  if (ONLY_IN_MODULES.some((text) => error.message.includes(text))) return true;
  try {
    // Top-level await, in all the ways in which a script fails to parse it.
    new vm.Script(`(async () => {${source}\n})`);
    return !error.message.includes('Illegal return');
  } catch {
    return false;
  }
}

function dynamicImport(cwd) {
  const own = vm.constants && vm.constants.USE_MAIN_CONTEXT_DEFAULT_LOADER;
  if (own) return own;
  // Node 18.
  const local = Module.createRequire(path.join(cwd, '[eval]'));
  return (name) => {
    if (/^\.{0,2}\//.test(name)) return import(pathToFileURL(path.resolve(cwd, name)).href);
    if (/^[a-z]+:/.test(name) || Module.builtinModules.includes(name)) return import(name);
    return import(pathToFileURL(local.resolve(name)).href);
  };
}

/** Writes `source` where modules resolve as from the working directory. Returns its path, or null if nothing can be written. */
function writeModule(source) {
  for (const directory of [process.cwd(), require('os').tmpdir()]) {
    for (let i = 1; i < 10; i++) {
      const file = path.join(directory, `[eval${i}].mjs`);
      try {
        fs.writeFileSync(file, source, { flag: 'wx' });
        return file;
      } catch (error) {
        if (error.code !== 'EEXIST') break;
      }
    }
  }
  return null;
}

const asDataUrl = (source) => 'data:text/javascript;charset=utf-8,' + encodeURIComponent(source);

function startModule(url) {
  // As Node. Not after process.exit(), which does not come here.
  const unsettled = () => { if (process.exitCode === undefined) process.exitCode = STATUS_UNSETTLED; };
  process.on('beforeExit', unsettled);
  const settled = () => process.removeListener('beforeExit', unsettled);
  const running = import(url);
  // A rejection goes on to be an unhandled one, which is how Node reports it and ends.
  running.then(settled, settled);
  void running.finally(() => {});
}

/** For a module that has no file of its own. */
function startFromText(source) {
  const file = writeModule(source);
  if (file === null) return startModule.bind(null, asDataUrl(source));
  // The file is read when the graph is loaded and gone before the first line runs: its name is not the program's business.
  const remove = asDataUrl(`import{unlinkSync}from'node:fs';try{unlinkSync(${JSON.stringify(file)})}catch{}`);
  const entry = asDataUrl(`import ${JSON.stringify(remove)};import ${JSON.stringify(pathToFileURL(file).href)};`);
  process.once('exit', () => { try { fs.unlinkSync(file); } catch { /* the usual case */ } });
  return startModule.bind(null, entry);
}

/** Returns what to start from a fresh stack, where no frame of this file is below the program's. */
function prepareEval(source, args) {
  const cwd = process.cwd();
  process.argv = [process.argv[0], ...args];
  const main = new Module('[eval]');
  main.filename = path.join(cwd, '[eval]');
  main.paths = Module._nodeModulePaths(cwd);
  // Node gives the same five to `node -e`. They stay for modules too: code with both `require` and top-level await is common.
  const globals = { require: Module.createRequire(main.filename), module: main, exports: main.exports, __filename: '[eval]', __dirname: '.' };
  for (const [name, value] of Object.entries(globals)) {
    Object.defineProperty(globalThis, name, { value, writable: true, enumerable: false, configurable: true });
  }
  let script;
  try {
    script = new vm.Script(source, { filename: '[eval]', importModuleDynamically: dynamicImport(cwd) });
  } catch (error) {
    if (!isModule(error, source)) {
      error.stack = error.stack.split('\n').filter((line) => !line.includes(__filename)).join('\n');
      return () => { throw error; };
    }
    return startFromText(source);
  }
  return script.runInThisContext.bind(script);
}

function prepareScript(source, name, args) {
  const file = path.join(process.cwd(), path.basename(name) || 'main.js');
  // A file of that name that was put there, or a full disk: then it is what it is.
  try { fs.writeFileSync(file, source, { flag: 'wx' }); } catch {}
  process.argv = [process.argv[0], file, ...args];
  const extension = path.extname(file);
  let module = extension === '.mjs';
  if (!module && extension !== '.cjs') {
    try {
      Module.wrap && new vm.Script(Module.wrap(source), { filename: file });
    } catch (error) {
      module = isModule(error, source);
    }
  }
  if (!module) return Module._load.bind(Module, file, null, true);
  // Older ones (18, 20 up to 20.18, 22 up to 22.6) take the file's name for the answer.
  const [major, minor] = process.versions.node.split('.').map(Number);
  const detects = major > 22 || (major === 22 && minor >= 7) || (major === 20 && minor >= 19);
  return extension === '.mjs' || detects ? startModule.bind(null, pathToFileURL(file).href) : startFromText(source);
}

// ---- hints

const NAMED = 12, LONGEST = 400;
// What may write files, look at directories and read names, before a program replaces it.
const { readdirSync } = fs;

function installed() {
  let names = [];
  try { names = readdirSync('/node_modules').filter((name) => !name.startsWith('.')); } catch { /* None. */ }
  if (names.length === 0) return 'no package is installed';
  return `installed: ${names.slice(0, NAMED).join(', ')}${names.length > NAMED ? ` and ${names.length - NAMED} more` : ''}`;
}

/** One line about an uncaught error, where the sandbox knows more than the code does. */
function hintOf(error) {
  const { code, message = '', syscall = '' } = error;
  if (code === 'MODULE_NOT_FOUND' || code === 'ERR_MODULE_NOT_FOUND') {
    const found = /Cannot find (?:module|package) '((?:@[^/']+\/)?[^./'][^/']*)/.exec(message);
    return found && `package ${found[1]} is not installed in this sandbox; take a template with it (\`--with ${found[1]}\`); ${installed()}`;
  }
  if (['ENOTFOUND', 'EAI_AGAIN', 'ENETUNREACH', 'EHOSTUNREACH'].includes(code)) {
    return "there is no network in this sandbox; put data in with the request's files";
  }
  if (code === 'EROFS' || (code === 'EACCES' && error.path && syscall !== 'spawn')) {
    return `${error.path || 'this place'} is in a read-only place; write to /home/sandbox, /tmp or /dev/shm`;
  }
  if (code === 'ENOSPC') return 'the disk of this sandbox is full';
  if (code === 'EFBIG') return 'the file is larger than a file may be in this sandbox';
  if (code === 'EMFILE') return 'a process may not have more open files in this sandbox';
  if (code === 'EAGAIN' && syscall.startsWith('spawn')) {
    return 'the sandbox has reached its limit of processes and threads; start fewer, or ask for more (`processes`)';
  }
  return null;
}

function hint(error) {
  // `fetch` hides what happened in `cause`.
  for (let i = 0; error && typeof error === 'object' && i < 5; i++, error = error.cause) {
    const text = hintOf(error);
    if (text) return Buffer.from(text.replace(/[^\x20-\x7e\u00a1-\uffff]/g, '?')).subarray(0, LONGEST).toString().replace(/\ufffd+$/, '');
  }
  return null;
}

// ---- life

/**
 * Lets the agent know the status once the program's last `exit` listener has returned: taking the interpreter down takes
 * longer than most programs, and in a fork it copies the pages that it touches.
 */
function tellTheEnd() {
  const { ino } = fs.fstatSync(CONTROL);
  const { emit } = process;
  const { fstatSync } = fs;
  const wait = Atomics.wait.bind(Atomics, new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1000);
  let uncaught = false;
  // The property that Node itself calls. A listener of ours could not be the last. Neither is this if the program has
  // wrapped it, as some packages do: then it ends as any process.
  const ours = process.emit = function (name, ...rest) {
    // Node prints an uncaught error after `exit`, in C++.
    if (name === 'uncaughtExceptionMonitor') {
      uncaught = true;
      try {
        const text = hint(rest[0]);
        // Not into a file that the program has put in its place.
        if (text && fstatSync(CONTROL).ino === ino) send(NOTE, Buffer.concat([Buffer.of(NOTE_HINT), Buffer.from(text)]));
      } catch { /* A hint is not worth an error. */ }
    }
    const heard = Reflect.apply(emit, this, [name, ...rest]);
    const status = process.exitCode ?? rest[0] ?? 0;
    if (name === 'exit' && process._exiting && process.emit === ours && !uncaught &&
        Number.isInteger(+status) && +status !== STATUS_UNSETTLED) {
      try {
        // Not into a file that the program has put in its place.
        if (fstatSync(CONTROL).ino === ino) {
          send(NOTE, [NOTE_ENDED, status & 0xff]);
          // The agent's signal comes long before.
          wait();
        }
      } catch { /* The program closed the descriptor: it ends as any process. */ }
    }
    return heard;
  };
}

async function main() {
  const since = Date.now() / 1000;
  const options = parse(process.argv.slice(2));
  const seedRandom = options.frozen && replaceRandom();
  if (options.frozen) seedRandom(randomBytes(16));
  const ready = JSON.stringify(await warm(options.warm));
  // Until it is compiled: it takes a millisecond before and a twentieth of it after, and every fork does it.
  for (let i = 0; options.frozen && i < 20; i++) spendDrawnAhead();
  process.argv = [process.execPath];
  process.execArgv = [];
  const frozen = options.frozen && { since, until: Date.now() / 1000, seedRandom };
  send(READY, ready);
  const args = [], code = [], environment = [];
  let identified = false;
  readFrames((kind, payload) => {
    if (kind === IDENTITY) {
      applyIdentity(payload, frozen);
      identified = true;
    } else if (kind === CODE) code.push(Buffer.from(payload));
    else if (kind === ARG) args.push(payload.toString());
    else if (kind === ENV) environment.push(payload.toString());
    else if (kind !== RUN) throw new RunnerError(`unexpected frame kind ${kind}`);
    return kind !== RUN;
  });
  if (!identified) throw new RunnerError('a run without an identity');
  for (const pair of environment) {
    const nul = pair.indexOf('\0');
    if (nul < 1) throw new RunnerError('malformed env frame');
    process.env[pair.slice(0, nul)] = pair.slice(nul + 1);
  }
  const source = Buffer.concat(code).toString().replace(/^\uFEFF/, '');
  const name = args.shift() || '-c';
  const start = name === '-c' || name === '-' ? prepareEval(source, args) : prepareScript(source, name, args);
  send(STARTED, '');
  tellTheEnd();
  // From the event loop: this function is then not on the program's stack.
  setImmediate(start);
}

main().catch(fail);
