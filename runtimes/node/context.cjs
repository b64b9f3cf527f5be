// A context: an interpreter that runs cells, one after the other, and keeps their state.
//
// Cells are evaluated by V8's own mode for that, which the inspector offers: let, const and class may be declared again, await
// stands at the top level. The session is in this process and this thread; nothing listens anywhere.
'use strict';

const fs = require('fs');
const net = require('net');
const v8 = require('v8');
const vm = require('vm');
const { inspect } = require('util');
const wire = require('./wire.cjs');
const { RunnerError, send } = wire;
const { rewriteImports, importer } = require('./imports.cjs');
const { defineModuleGlobals } = require('./program.cjs');
const { parts, isBundle, represent, withoutOurs, sendBundle, errorPayload } = require('./results.cjs');

const OK = 0, FAILED = 1, INTERRUPTED = 2;
const IMPORT = '__zeroboot_import';
const INTERRUPT = 'ERR_SCRIPT_EXECUTION_INTERRUPTED';

// How often a cell that waits looks whether SIGINT came.
const LOOK_MS = 50;

/**
 * SIGINT is this process's from here on, as Node's own watchdog takes it: with libuv's handler it would be without one for a
 * moment at each change between the two, and a signal ends the process then.
 */
class Signal {
  constructor() {
    this.watchdog = process.binding('contextify');
    // One for good, and one whose end tells what came.
    this.watchdog.startSigintWatchdog();
    this.watchdog.startSigintWatchdog();
    // A listener of a cell is called for an interrupt, but libuv does not hear of it.
    for (const listen of process.listeners('newListener').filter((one) => one.name === 'startListeningIfSignal')) {
      process.removeListener('newListener', listen);
      process.on('newListener', (name) => { if (name !== 'SIGINT') listen(name); });
    }
  }

  /** Whether one came that stopped no code. */
  take() {
    const came = this.watchdog.stopSigintWatchdog();
    this.watchdog.startSigintWatchdog();
    return came;
  }
}

/** Runs a function so that SIGINT stops it, whatever it does. */
class Guard {
  constructor() {
    this.script = new vm.Script('__zeroboot_guarded()', { filename: 'zeroboot' });
  }

  /** Returns true if it was stopped. */
  stops(call) {
    let thrown;
    const run = () => {
      delete globalThis.__zeroboot_guarded;
      try { call(); } catch (error) { thrown = { error }; }
    };
    Object.defineProperty(globalThis, '__zeroboot_guarded', { value: run, configurable: true, enumerable: false });
    try {
      this.script.runInThisContext({ breakOnSigint: true });
    } catch (error) {
      if (error && error.code === INTERRUPT) return true;
      throw error;
    }
    if (thrown) throw thrown.error;
    return false;
  }
}

/**
 * Keeps the promises alive that were made while a cell waits. The inspector answers an evaluation whose promise is collected,
 * and does so by a call of JavaScript in the middle of the collection, which ends the process (Node 22 and 24).
 */
class Holder {
  constructor() {
    this.pending = new Set();
    this.stop = v8.promiseHooks.createHook({
      init: (promise, parent) => {
        this.pending.add(promise);
        if (parent) this.pending.add(parent);
      },
      settled: (promise) => { this.pending.delete(promise); },
    });
  }
}

class Evaluator {
  constructor() {
    const { Session } = require('inspector');
    this.session = new Session();
    this.session.connect();
    this.guard = new Guard();
    // The way from the inspector's handle of a value to the value.
    this.taken = [];
    this.taker = this.post('Runtime.evaluate', { expression: 'globalThis.process', silent: true }).result.objectId;
    this.take = (value) => { this.taken[0] = value; };
  }

  post(method, parameters) {
    let answer;
    this.session.post(method, parameters, (error, result) => {
      if (error) throw error;
      answer = result;
    });
    return answer;
  }

  value(handle) {
    const argument = 'objectId' in handle ? { objectId: handle.objectId }
      : 'unserializableValue' in handle ? { unserializableValue: handle.unserializableValue }
        : handle.type === 'undefined' ? {} : { value: handle.value };
    Object.defineProperty(globalThis, '__zeroboot_take', { value: this.take, configurable: true, enumerable: false });
    this.post('Runtime.callFunctionOn', {
      objectId: this.taker, functionDeclaration: 'function(value) { globalThis.__zeroboot_take(value) }', arguments: [argument], silent: true,
    });
    delete globalThis.__zeroboot_take;
    return this.taken.pop();
  }

  /** Calls `done` once the code has run, with what the inspector says; within this call if it did not have to wait. */
  start(code, file, done) {
    this.session.post('Runtime.evaluate', {
      expression: `${code}\n//# sourceURL=${file}`, replMode: true, objectGroup: 'cell', silent: true,
    }, done);
    // Microtasks: what follows an await of something that is there already, and the answer itself.
    process._tickCallback();
  }

  forget() {
    this.session.post('Runtime.releaseObjectGroup', { objectGroup: 'cell' });
    this.session.post('Runtime.discardConsoleEntries');
  }
}

/** `{a: 1}` is an object where a value is asked for. */
function asExpression(source) {
  if (!/^\s*\{/.test(source) || /;\s*$/.test(source)) return source;
  try {
    new vm.Script(`(async()=>(${source}\n))`);
    return `(${source}\n)`;
  } catch {
    return source;
  }
}

/** Where V8 found a syntax error. */
function place(details, source, file) {
  const lines = source.split('\n'), number = Math.min(details.lineNumber, lines.length - 1), line = lines[number];
  if (line.length > 1000) return `${file}:${number + 1}\n`;
  const column = number === details.lineNumber ? details.columnNumber : line.length;
  return `${file}:${number + 1}\n${line}\n${line.slice(0, column).replace(/[^\t]/g, ' ')}^\n\n`;
}

/** Takes our frames out of the stacks that an error holds. */
function cleanStacks(error, seen = new Set()) {
  if (error === null || typeof error !== 'object' || seen.has(error)) return;
  seen.add(error);
  try {
    if (typeof error.stack === 'string') {
      const clean = withoutOurs(error.stack);
      if (clean !== error.stack) error.stack = clean;
    }
    cleanStacks(error.cause, seen);
    if (Array.isArray(error.errors)) error.errors.forEach((one) => cleanStacks(one, seen));
  } catch { /* A frame too many is better than no stack. */ }
}

function describe(error, details, source, file) {
  try {
    if (error !== null && typeof error === 'object' && typeof error.stack === 'string') {
      // One that the parser found has no stack.
      const early = error instanceof SyntaxError && details && !details.stackTrace;
      cleanStacks(error);
      // One without frames stands in brackets.
      const shown = inspect(error, { colors: false }).replace(/^\[(.*)\]$/s, '$1');
      return errorPayload(String(error.name || 'Error'), String(error.message), (early ? place(details, source, file) : '') + shown);
    }
    return errorPayload('Uncaught', inspect(error), `Uncaught ${inspect(error, { colors: false })}`);
  } catch {
    return errorPayload('Error', 'an error that cannot be shown', 'Uncaught error, which cannot be shown');
  }
}

class Context {
  constructor(decoder, identify, setEnvironment) {
    if (!process.features.inspector) throw new RunnerError('this Node was built without its inspector, which contexts need');
    Object.assign(this, { decoder, identify, setEnvironment, code: [], waiting: [], count: 0, cell: null, shown: [], abandoned: [] });
    // Before `Started`: from then on the agent may send one.
    this.signal = new Signal();
    this.evaluator = new Evaluator();
    defineModuleGlobals(process.cwd());
    process.argv = [process.argv[0]];
    const define = (name, value) => Object.defineProperty(globalThis, name, { value, writable: true, configurable: true, enumerable: false });
    define(IMPORT, importer());
    define('display', (...values) => this.display(values));
    this.last = undefined;
    Object.defineProperty(globalThis, '_', {
      get: () => this.last, set: (value) => { Object.defineProperty(globalThis, '_', { value, writable: true, configurable: true, enumerable: true }); this.ownUnderscore = true; },
      configurable: true, enumerable: false,
    });
    quietConsole();
    // Cells have no standard input.
    replaceStdin();
  }

  serve() {
    process.on('uncaughtException', (error) => {
      if (process.listenerCount('uncaughtException') === 1) report(error);
    });
    const socket = this.socket = new net.Socket({ fd: wire.CONTROL_IN, readable: true, writable: false, allowHalfOpen: true });
    socket.on('data', (bytes) => this.feed(bytes));
    // The agent has gone, or wants us to.
    socket.on('end', () => process.reallyExit(0));
    socket.on('error', () => process.reallyExit(0));
    this.feed(Buffer.alloc(0));
  }

  feed(bytes) {
    try {
      this.decoder.feed(bytes, (kind, payload) => {
        if (kind === wire.CODE) this.code.push(Buffer.from(payload));
        else if (kind === wire.CELL) {
          const source = Buffer.concat(this.code.splice(0)).toString().replace(/^\uFEFF/, '');
          // Between cells it means nothing.
          if (!this.cell && this.waiting.length === 0) this.signal.take();
          this.waiting.push(() => this.run(source));
        } else if (kind === wire.IDENTITY) {
          const identity = Buffer.from(payload);
          this.waiting.push(() => this.identify(identity));
        } else if (kind === wire.ENV) {
          const pair = payload.toString();
          this.waiting.push(() => this.setEnvironment(pair));
        } else throw new RunnerError(`unexpected frame kind ${kind} in a context`);
        return true;
      });
    } catch (error) {
      wire.fail(error);
    }
    this.next();
  }

  /** From a fresh stack, where no microtask runs. */
  next() {
    if (this.scheduled || this.cell || this.waiting.length === 0) return;
    this.scheduled = true;
    setImmediate(() => {
      this.scheduled = false;
      try { this.waiting.shift()(); } catch (error) { wire.fail(error); }
      this.next();
    });
  }

  run(source) {
    this.count++;
    const cell = this.cell = { source, file: `cell-${this.count}`, outcome: null };
    const stopped = this.signal.take() || this.evaluator.guard.stops(() => {
      const code = rewriteImports(asExpression(source), IMPORT);
      if (code.includes('await')) cell.holder = new Holder();
      this.evaluator.start(code, cell.file, (error, answer) => this.answered(cell, error, answer));
      cell.waits = cell.outcome === null;
    });
    if (stopped) this.finish(cell, INTERRUPTED);
    else if (cell.outcome) this.finish(cell, cell.outcome.status);
    else cell.looks = setInterval(() => this.look(cell), LOOK_MS);
  }

  /** While a cell waits, nothing of it runs that a signal could stop. */
  look(cell) {
    if (!this.signal.take()) return;
    process.emit('SIGINT', 'SIGINT', 2);
    if (this.cell === cell) this.finish(cell, INTERRUPTED);
  }

  /** The evaluation is over: in the call that started it, or later from the event loop. */
  answered(cell, error, answer) {
    if (this.cell !== cell) return;
    const read = () => {
      if (error) throw error;
      if (answer.exceptionDetails) {
        const { exceptionDetails: details } = answer;
        const thrown = details.exception ? this.evaluator.value(details.exception) : new Error(details.text);
        cell.outcome = { status: FAILED, error: describe(thrown, details, cell.source, cell.file) };
        return;
      }
      const value = this.evaluator.value(answer.result);
      const bundle = value === undefined ? null : represent(value);
      if (value !== undefined) this.last = value;
      cell.outcome = { status: OK, bundle };
    };
    const guarded = () => {
      try { read(); } catch (thrown) {
        if (!error) cell.outcome = { status: FAILED, error: describe(thrown, null, cell.source, cell.file) };
      }
    };
    if (!cell.waits) {
      guarded();
      return;
    }
    setImmediate(() => {
      if (this.cell !== cell) return;
      const stopped = this.evaluator.guard.stops(guarded);
      this.finish(cell, stopped || !cell.outcome ? INTERRUPTED : cell.outcome.status);
    });
  }

  finish(cell, status) {
    this.cell = null;
    clearInterval(cell.looks);
    if (cell.holder) {
      cell.holder.stop();
      // For good, where it still waits.
      if (!cell.outcome) this.abandoned.push(cell.holder.pending);
    }
    this.flush();
    const { outcome } = cell;
    if (status === OK && outcome.bundle) sendBundle(outcome.bundle, true);
    if (status === FAILED) send(wire.ERROR, outcome.error);
    if (status === INTERRUPTED) send(wire.ERROR, errorPayload('Interrupted', 'the cell was interrupted', 'Interrupted'));
    const done = Buffer.alloc(5);
    done[0] = status;
    done.writeUInt32LE(this.count, 1);
    this.evaluator.forget();
    send(wire.DONE, done);
    this.next();
  }

  /** Shows values, or an object whose keys are MIME types as that. */
  display(values) {
    for (const value of values) {
      const bundle = isBundle(value) ? parts(value) : represent(value);
      if (bundle.length === 0) continue;
      if (!this.cell) {
        // Nobody waits for a result between cells.
        const plain = bundle.find(([type]) => type === 'text/plain');
        if (plain) process.stdout.write(`${plain[1]}\n`);
        continue;
      }
      this.shown.push(bundle);
      // An interrupt may stop code anywhere, and must not stop a frame half way: they leave from the event loop.
      setImmediate(() => this.flush());
    }
  }

  flush() {
    for (const bundle of this.shown.splice(0)) sendBundle(bundle, false);
  }
}

/** An error that no cell is there to hear of. */
function report(error) {
  let text;
  try {
    cleanStacks(error);
    text = inspect(error, { colors: false });
  } catch {
    text = 'an error that cannot be shown';
  }
  try { fs.writeSync(2, `Uncaught ${text}\n`); } catch { /* Nobody reads it. */ }
}

/** The inspector keeps what goes through the console that Node wraps for it. */
function quietConsole() {
  const plain = new console.Console({ stdout: process.stdout, stderr: process.stderr });
  for (const name of Object.keys(plain)) {
    if (typeof plain[name] === 'function' && typeof console[name] === 'function') console[name] = plain[name];
  }
}

function replaceStdin() {
  // Opening takes the lowest number that is free.
  try { fs.closeSync(0); } catch { /* It was closed. */ }
  fs.openSync('/dev/null', 'r');
}

/** First uses, before a snapshot. From the event loop, as a cell: in a microtask others do not run. */
function practise() {
  return new Promise((resolve, reject) => setImmediate(() => {
    try {
      const evaluator = new Evaluator();
      evaluator.guard.stops(() => evaluator.start('1 + 1', 'practice', (error, answer) => represent(evaluator.value(answer.result))));
      evaluator.forget();
      evaluator.session.disconnect();
      resolve();
    } catch (error) {
      reject(error);
    }
  }));
}

module.exports = { Context, practise };
