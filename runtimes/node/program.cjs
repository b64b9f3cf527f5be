// One program: the whole life of a sandbox that serves one exec.
'use strict';

const fs = require('fs');
const path = require('path');
const vm = require('vm');
const Module = require('module');
const { pathToFileURL } = require('url');
const { CONTROL_OUT, NOTE, NOTE_ENDED, NOTE_HINT, send } = require('./wire.cjs');
const { hint } = require('./hints.cjs');
const { dynamicImport } = require('./imports.cjs');

// What a program ends with whose top-level await never ends.
const STATUS_UNSETTLED = 13;

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

/** Gives code without a file the names that Node gives to `node -e`. */
function defineModuleGlobals(cwd) {
  const main = new Module('[eval]');
  main.filename = path.join(cwd, '[eval]');
  main.paths = Module._nodeModulePaths(cwd);
  // They stay for modules too: code with both `require` and top-level await is common.
  const globals = { require: Module.createRequire(main.filename), module: main, exports: main.exports, __filename: '[eval]', __dirname: '.' };
  for (const [name, value] of Object.entries(globals)) {
    Object.defineProperty(globalThis, name, { value, writable: true, enumerable: false, configurable: true });
  }
}

// The name of TypeScript that is in no file; a script is told by its own.
const INLINE_TYPESCRIPT = '-typescript';
const TYPESCRIPT = ['.ts', '.mts', '.cts'];

/** The JavaScript of a TypeScript program, in the same lines and columns, by Node's own stripping of types. */
function withoutTypes(source) {
  if (!process.features.typescript || !Module.stripTypeScriptTypes) {
    throw new Error(`TypeScript needs Node.js 22.18 or newer, and this is ${process.version}; compile it to JavaScript first, such as with esbuild`);
  }
  const { emitWarning } = process;
  // That it is experimental is said once a process, and is no news to the program's author.
  process.emitWarning = () => {};
  try {
    return Module.stripTypeScriptTypes(source);
  } finally {
    process.emitWarning = emitWarning;
  }
}

/** Returns what to start for the code of a request, by the name that it has. */
function prepare(source, name, args) {
  const inline = name === '-c' || name === '-' || name === INLINE_TYPESCRIPT;
  let text = source;
  try {
    if (name === INLINE_TYPESCRIPT || TYPESCRIPT.includes(path.extname(name))) text = withoutTypes(source);
  } catch (error) {
    // Not thrown: Node would show the line of this file.
    return () => {
      fs.writeSync(2, `${error}\n`);
      process.exit(1);
    };
  }
  return inline ? prepareEval(text, args) : prepareScript(source, text, name, args);
}

/** Returns what to start from a fresh stack, where no frame of this file is below the program's. */
function prepareEval(source, args) {
  const cwd = process.cwd();
  process.argv = [process.argv[0], ...args];
  defineModuleGlobals(cwd);
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

/** `text`: the source as JavaScript. */
function prepareScript(source, text, name, args) {
  const file = path.join(process.cwd(), path.basename(name) || 'main.js');
  // A file of that name that was put there, or a full disk: then it is what it is.
  try { fs.writeFileSync(file, source, { flag: 'wx' }); } catch {}
  process.argv = [process.argv[0], file, ...args];
  const extension = path.extname(file);
  let module = extension === '.mjs' || extension === '.mts';
  if (!module && extension !== '.cjs' && extension !== '.cts') {
    try {
      Module.wrap && new vm.Script(Module.wrap(text), { filename: file });
    } catch (error) {
      module = isModule(error, text);
    }
  }
  if (!module) return Module._load.bind(Module, file, null, true);
  // Older ones (18, 20 up to 20.18, 22 up to 22.6) take the file's name for the answer.
  const [major, minor] = process.versions.node.split('.').map(Number);
  const detects = major > 22 || (major === 22 && minor >= 7) || (major === 20 && minor >= 19);
  return extension === '.mjs' || extension === '.mts' || detects ? startModule.bind(null, pathToFileURL(file).href) : startFromText(source);
}

/**
 * Lets the agent know the status once the program's last `exit` listener has returned: taking the interpreter down takes
 * longer than most programs, and in a fork it copies the pages that it touches.
 */
function tellTheEnd() {
  const { ino } = fs.fstatSync(CONTROL_OUT);
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
        if (text && fstatSync(CONTROL_OUT).ino === ino) send(NOTE, Buffer.concat([Buffer.of(NOTE_HINT), Buffer.from(text)]));
      } catch { /* A hint is not worth an error. */ }
    }
    const heard = Reflect.apply(emit, this, [name, ...rest]);
    const status = process.exitCode ?? rest[0] ?? 0;
    if (name === 'exit' && process._exiting && process.emit === ours && !uncaught &&
        Number.isInteger(+status) && +status !== STATUS_UNSETTLED) {
      try {
        // Not into a file that the program has put in its place.
        if (fstatSync(CONTROL_OUT).ino === ino) {
          send(NOTE, [NOTE_ENDED, status & 0xff]);
          // The agent's signal comes long before.
          wait();
        }
      } catch { /* The program closed the descriptor: it ends as any process. */ }
    }
    return heard;
  };
}

module.exports = { prepare, defineModuleGlobals, tellTheEnd };
