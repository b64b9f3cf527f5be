// E2B's SDK for JavaScript, unmodified: what docs/e2b.md promises, once more from there.
import assert from 'node:assert/strict'
import test from 'node:test'

import { Sandbox } from '@e2b/code-interpreter'
import { CommandExitError, FileType, NotFoundError } from 'e2b'

async function withSandbox(work, ...options) {
  const sandbox = await Sandbox.create(...options)
  try {
    await work(sandbox)
  } finally {
    await sandbox.kill()
  }
}

test('a sandbox is made, found, joined and killed', async () => {
  const sandbox = await Sandbox.create({ metadata: { mark: `m ${process.pid}` }, timeoutMs: 120_000 })
  const info = await sandbox.getInfo()
  assert.equal(info.sandboxId, sandbox.sandboxId)
  const pages = Sandbox.list({ query: { metadata: { mark: `m ${process.pid}` } } })
  assert.deepEqual((await pages.nextItems()).map((one) => one.sandboxId), [sandbox.sandboxId])
  await sandbox.setTimeout(300_000)
  const again = await Sandbox.connect(sandbox.sandboxId)
  assert.equal(await again.isRunning(), true)
  assert.equal(await sandbox.kill(), true)
  assert.equal(await again.isRunning(), false)
  await assert.rejects(again.commands.run('true'), /not running|not found|timeout/i)
})

test('commands have output, status, input, and an end', async () => {
  await withSandbox(async (sandbox) => {
    const seen = []
    const result = await sandbox.commands.run('echo out; echo err >&2; pwd', {
      onStdout: (data) => { seen.push(data) },
    })
    assert.deepEqual([result.stdout, result.stderr, result.exitCode], ['out\n/home/user\n', 'err\n', 0])
    assert.equal(seen.join(''), result.stdout)
    await assert.rejects(sandbox.commands.run('exit 3'), (error) => {
      return error instanceof CommandExitError && error.exitCode === 3
    })
    const handle = await sandbox.commands.run('read line; echo $line', { background: true, stdin: true })
    assert.ok((await sandbox.commands.list()).some((one) => one.pid === handle.pid))
    await sandbox.commands.sendStdin(handle.pid, 'typed\n')
    assert.equal((await handle.wait()).stdout, 'typed\n')
    const sleeper = await sandbox.commands.run('sleep 1000', { background: true })
    assert.equal(await sleeper.kill(), true)
    await assert.rejects(sleeper.wait())
    assert.equal(await sandbox.commands.kill(sleeper.pid), false)
  })
})

test('a terminal shows what is typed', async () => {
  await withSandbox(async (sandbox) => {
    const shown = []
    const terminal = await sandbox.pty.create({ cols: 80, rows: 24, onData: (data) => { shown.push(...data) } })
    await sandbox.pty.sendInput(terminal.pid, new TextEncoder().encode('echo first-$((40+2))\nexit\n'))
    await terminal.wait()
    assert.match(Buffer.from(shown).toString(), /first-42/)
  })
})

test('files go in and out, are listed, moved, watched and removed', async () => {
  await withSandbox(async (sandbox) => {
    await sandbox.files.write('d/a', 'text ä')
    await sandbox.files.write([{ path: 'd/b', data: 'one' }, { path: 'd/c', data: new Blob(['two']) }])
    assert.equal(await sandbox.files.read('d/a'), 'text ä')
    assert.equal(Buffer.from(await sandbox.files.read('d/c', { format: 'bytes' })).toString(), 'two')
    assert.equal(await sandbox.files.makeDir('d/e'), true)
    assert.equal(await sandbox.files.makeDir('d/e'), false)
    const listed = await sandbox.files.list('d')
    assert.deepEqual(listed.map((one) => one.name).sort(), ['a', 'b', 'c', 'e'])
    assert.equal(listed.find((one) => one.name === 'e').type, FileType.DIR)
    let told
    const changed = new Promise((resolve) => { told = resolve })
    const watch = await sandbox.files.watchDir('d', (event) => { if (event.name === 'new') told() })
    await sandbox.files.rename('d/a', 'd/new')
    await changed
    await watch.stop()
    assert.equal(await sandbox.files.exists('d/a'), false)
    await sandbox.files.remove('d')
    await assert.rejects(sandbox.files.read('d/new'), NotFoundError)
  })
})

test('code has results, output, errors, state and contexts', async () => {
  await withSandbox(async (sandbox) => {
    const execution = await sandbox.runCode('print("hi")\nx = 6\nx * 7')
    assert.deepEqual([execution.text, execution.logs.stdout.join('')], ['42', 'hi\n'])
    assert.equal((await sandbox.runCode('1 / 0')).error.name, 'ZeroDivisionError')
    const context = await sandbox.createCodeContext({ cwd: '/tmp' })
    assert.equal((await sandbox.runCode('x', { context })).error.name, 'NameError')
    assert.equal((await sandbox.runCode('x')).text, '6')
    assert.ok((await sandbox.listCodeContexts()).some((one) => one.id === context.id))
    await sandbox.removeCodeContext(context)
    assert.equal((await sandbox.runCode('echo 5', { language: 'bash' })).logs.stdout.join(''), '5\n')
  })
})
