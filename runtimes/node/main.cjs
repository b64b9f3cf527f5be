// The Node runner: warms an interpreter, waits on descriptor 3 for what to be, becomes the user's program or a context.
//
//   node --no-deprecation node.cjs [--warm a,b?,...] [--frozen] [--context]
//
// Node 18 to 24, no packages. Descriptor 3 carries zeroboot-proto frames; 0, 1 and 2 are the program's.
// See ../README.md for the whole contract.
'use strict';

const { randomBytes } = require('crypto');
const wire = require('./wire.cjs');
const { RunnerError, send } = wire;
const { warm, blockingStreams } = require('./warm.cjs');
const { replaceRandom, spendDrawnAhead, applyIdentity } = require('./identity.cjs');
const { prepare, tellTheEnd } = require('./program.cjs');

function parse(args) {
  const options = { warm: '', frozen: false, context: false };
  while (args.length) {
    const name = args.shift();
    if (name === '--frozen') options.frozen = true;
    else if (name === '--context') options.context = true;
    else if (name === '--warm' && args.length) options.warm = args.shift();
    else throw new RunnerError(`unknown or incomplete argument ${name}`);
  }
  return options;
}

function setEnvironment(pair) {
  const nul = pair.indexOf('\0');
  if (nul < 1) throw new RunnerError('malformed env frame');
  process.env[pair.slice(0, nul)] = pair.slice(nul + 1);
}

function enter(directory) {
  try {
    process.chdir(directory);
  } catch (error) {
    throw new RunnerError(`cannot enter the working directory ${directory}: ${error.message}`);
  }
}

/** Makes what `warm` makes, as far as a context that nobody copies needs it. */
function cold() {
  blockingStreams();
  return { version: `Node ${process.version}`, warmed: [] };
}

async function main() {
  const since = Date.now() / 1000;
  const options = parse(process.argv.slice(2));
  const seedRandom = options.frozen && replaceRandom();
  if (options.frozen) seedRandom(randomBytes(16));
  const ready = JSON.stringify(options.context ? cold() : await warm(options.warm));
  // What a context needs is loaded before a snapshot only: elsewhere each start would pay for it.
  if (options.frozen && process.features.inspector) await require('./context.cjs').practise();
  // Until it is compiled: it takes a millisecond before and a twentieth of it after, and every fork does it.
  for (let i = 0; options.frozen && i < 20; i++) spendDrawnAhead();
  process.argv = [process.execPath];
  process.execArgv = [];
  const frozen = options.frozen && { since, until: Date.now() / 1000, seedRandom };
  send(wire.READY, ready);
  const args = [], code = [], environment = [], decoder = new wire.Decoder();
  let identified = false, directory, serves = false;
  wire.readFrames(decoder, (kind, payload) => {
    if (kind === wire.IDENTITY) {
      applyIdentity(payload, frozen);
      identified = true;
    } else if (kind === wire.CODE) code.push(Buffer.from(payload));
    else if (kind === wire.ARG) args.push(payload.toString());
    else if (kind === wire.ENV) environment.push(payload.toString());
    else if (kind === wire.CWD) directory = payload.toString();
    else if (kind === wire.SERVE) serves = true;
    else if (kind !== wire.RUN) throw new RunnerError(`unexpected frame kind ${kind}`);
    return kind !== wire.RUN && kind !== wire.SERVE;
  });
  if (!identified) throw new RunnerError('a run without an identity');
  environment.forEach(setEnvironment);
  if (directory !== undefined) enter(directory);
  if (serves) {
    const { Context } = require('./context.cjs');
    const context = new Context(decoder, (payload) => applyIdentity(payload, frozen), setEnvironment);
    send(wire.STARTED, '');
    context.serve();
    return;
  }
  const source = Buffer.concat(code).toString().replace(/^\uFEFF/, '');
  const name = args.shift() || '-c';
  const start = prepare(source, name, args);
  send(wire.STARTED, '');
  tellTheEnd();
  // From the event loop: this function is then not on the program's stack.
  setImmediate(start);
}

main().catch(wire.fail);
