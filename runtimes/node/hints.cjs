// One line about an uncaught error, where the sandbox knows more than the code does.
'use strict';

const fs = require('fs');

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

module.exports = { hint };
