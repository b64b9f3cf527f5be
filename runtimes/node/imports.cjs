// How `import` finds modules for code that is in no file.
'use strict';

const path = require('path');
const vm = require('vm');
const Module = require('module');
const { pathToFileURL } = require('url');

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

const CLAUSE = /import\s*(?:(?<name>[\p{ID_Start}$_][\p{ID_Continue}$]*)\s*(?:,\s*)?)?(?:\*\s*as\s+(?<all>[\p{ID_Start}$_][\p{ID_Continue}$]*)|\{(?<named>[^}]*)\})?(?:\s*from)?\s*(?<from>"[^"\n]*"|'[^'\n]*')(?:\s*(?:with|assert)\s*(?<options>\{[^}]*\}))?[ \t]*;?/uy;
const CALL = /(?<![.\p{ID_Continue}$#])import(?=\s*\()/gu;

/** The error with which V8 refuses `source`, taken as the body of an async function. */
function syntaxError(source) {
  try {
    new vm.Script(`(async()=>{${source}\n})`);
    return null;
  } catch (error) {
    return error;
  }
}

/**
 * Rewrites `import` for an evaluation that has no loader of its own, by calls of the function `name`. Which `import` is code,
 * and not in a string, a comment or a regular expression, V8 decides: it refuses what is changed into nonsense there.
 */
function rewriteImports(source, name) {
  if (!source.includes('import')) return source;
  return rewriteCalls(rewriteStatements(source, name), name);
}

function rewriteStatements(source, name) {
  // Each one that V8 names is taken away, so this ends.
  for (const start of [...source.matchAll(/(?<![.\p{ID_Continue}$#])import(?!\s*[(.])/gu)].map((found) => found.index).reverse()) {
    CLAUSE.lastIndex = start;
    const found = CLAUSE.exec(source);
    if (!found) continue;
    const before = source.slice(0, start), after = source.slice(CLAUSE.lastIndex);
    // Nonsense in its place is seen where it is code only; a statement can stand there, too.
    if (syntaxError(before + '@' + after) === null) continue;
    const lines = '\n'.repeat(found[0].split('\n').length - 1);
    source = before + statement(found.groups, name) + lines + after;
  }
  return source;
}

/** What an import statement does, without hoisting. */
function statement({ name: whole, all, named, from, options }, name) {
  const names = named === undefined ? [] : named.split(',').map((item) => item.trim()).filter(Boolean).map((item) => item.split(/\s+as\s+/));
  if (whole) names.unshift(['default', whole]);
  const wanted = JSON.stringify(names.map(([theirs]) => theirs.replace(/^["']|["']$/g, '')));
  const module = `await ${name}(${from},${options ? `{with:${options}}` : 'undefined'},${wanted})`;
  if (all) return `const ${all}=${module}${whole ? `,{default:${whole}}=${all}` : ''};`;
  return names.length ? `const {${names.map(([theirs, ours]) => `${theirs}:${ours || theirs}`)}}=${module};` : `${module};`;
}

function rewriteCalls(source, name) {
  const found = [...source.matchAll(CALL)].map((call) => call.index);
  if (found.length === 0 || syntaxError(source) !== null) return source;
  for (const start of found.reverse()) {
    const before = source.slice(0, start), after = source.slice(start + 'import'.length);
    if (syntaxError(`${before}@${after}`) !== null) source = `${before}${name}${after}`;
  }
  return source;
}

/** What the rewritten code calls: `import()`, which resolves as from the working directory. */
function importer() {
  const call = new vm.Script('(name, options) => options === undefined ? import(name) : import(name, options)', {
    filename: '[eval]', importModuleDynamically: dynamicImport(process.cwd()),
  }).runInThisContext();
  return async (name, options, wanted = []) => {
    const module = await call(name, options);
    for (const one of wanted) {
      if (!(one in module)) throw new SyntaxError(`The requested module '${name}' does not provide an export named '${one}'`);
    }
    return module;
  };
}

module.exports = { dynamicImport, rewriteImports, importer };
