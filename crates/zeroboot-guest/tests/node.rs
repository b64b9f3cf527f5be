//! What a Node program sees: driven end to end through the agent.

#[path = "harness/lib.rs"]
#[allow(dead_code)]
mod harness;

use harness::{Answer, Request, Sandbox};
use zeroboot_proto::{Ending, Kind};

fn node(code: impl AsRef<[u8]>) -> Answer {
    Sandbox::node(&[], &[]).run(Request::new(code))
}

#[test]
fn a_script_prints_and_ends_with_zero() {
    let answer = node("console.log([1,2,3].map(x => x * x))");
    assert_eq!(answer.good(), "[ 1, 4, 9 ]\n");
    assert_eq!(answer.order, [Kind::Ready, Kind::Started, Kind::Stdout, Kind::Exit]);
    assert!(answer.ready.contains("\"Node v"), "{}", answer.ready);
}

#[test]
fn commonjs_has_its_globals() {
    let code = "const fs = require('fs'); console.log(typeof fs.readFileSync, __filename, typeof module, typeof exports, process.argv.length)";
    assert_eq!(node(code).good(), "function [eval] object object 1\n");
    assert_eq!(
        node("var a = 1; function f() {}; console.log(globalThis.a, typeof globalThis.f, this === globalThis)").good(),
        "1 function true\n"
    );
}

#[test]
fn es_modules_and_top_level_await_are_known_by_their_content() {
    assert_eq!(
        node(
            "import fs from 'fs'; import { join } from 'node:path'; console.log(typeof fs.readFileSync, join('a', 'b'))"
        )
        .good(),
        "function a/b\n"
    );
    assert_eq!(node("const x = await Promise.resolve(3); console.log(x)").good(), "3\n");
    assert_eq!(node("for await (const x of [1, 2]) console.log(x)").good(), "1\n2\n");
    assert_eq!(
        node("export const a = 1; console.log(import.meta.url.startsWith('file:'), typeof this)").good(),
        "true undefined\n"
    );
    assert_eq!(node("import('fs').then((m) => console.log(typeof m.readFileSync))").good(), "function\n");
    // Both at once, as people and models write it.
    assert_eq!(
        node("const os = require('os'); const x = await 1; console.log(typeof os.cpus, x)").good(),
        "function 1\n"
    );
    // The word alone does not make a module.
    assert_eq!(node("const s = 'import x from y'; console.log(s.length) // await").good(), "15\n");
}

#[test]
fn a_module_leaves_no_file_behind() {
    let answer = node("import fs from 'fs'; console.log(fs.readdirSync('.'))");
    assert_eq!(answer.good(), "[]\n");
}

#[test]
fn files_and_packages_beside_the_program_can_be_imported() {
    let put = |request: Request| {
        request
            .put("helper.mjs", b"export const x = 1")
            .put("old.cjs", b"exports.y = 2")
            .put("node_modules/pkg/index.js", b"module.exports = { z: 3 }")
            .put("node_modules/pkg/package.json", b"{\"name\":\"pkg\",\"version\":\"1.0.0\"}")
    };
    let module = "import { x } from './helper.mjs'; import old from './old.cjs'; import pkg from 'pkg'; console.log(x, old.y, pkg.z)";
    let script = "const old = require('./old.cjs'), pkg = require('pkg'); import('./helper.mjs').then((h) => console.log(h.x, old.y, pkg.z))";
    for (code, name) in [
        (module, "-c"),
        (script, "-c"),
        (module, "main.mjs"),
        (script, "main.cjs"),
        (script, "main.js"),
        (module, "main.js"),
    ] {
        let answer = Sandbox::node(&[], &[]).run(put(Request::new(code).named(name)));
        assert_eq!((answer.ending(), answer.out()), (Ending::Exited(0), "1 2 3\n"), "{name}: {answer:?}");
    }
}

#[test]
fn a_script_has_its_name_and_arguments() {
    let code = "console.log(require.main === module, require('path').basename(__filename), process.argv.slice(2), process.env.A)";
    let answer = Sandbox::node(&[], &[]).run(Request::new(code).named("/x/job.js").arg("a b").arg("").env("A", "1=ž"));
    assert_eq!(answer.good(), "true job.js [ 'a b', '' ] 1=ž\n");
    let answer = Sandbox::node(&[], &[]).run(Request::new("console.log(process.argv.slice(1))").arg("x"));
    assert_eq!(answer.good(), "[ 'x' ]\n");
}

#[test]
fn uncaught_errors_end_with_1_and_a_stack_without_our_frames() {
    for code in [
        "function f() { throw new Error('boom') }\nf()",
        "throw new Error('boom'); export {}",
        "await Promise.reject(new Error('boom'))",
        "Promise.reject(new Error('boom'))",
        "setTimeout(() => { throw new Error('boom') }, 1)",
        "process.nextTick(() => { throw new Error('boom') })",
    ] {
        let answer = node(code);
        assert_eq!(answer.ending(), Ending::Exited(1), "{code}");
        assert!(answer.err().contains("Error: boom\n") && !answer.err().contains("node.cjs"), "{}", answer.err());
    }
    for code in [
        "let x = ;",
        "import { nope } from 'fs'; await 1",
        "import 'no-such-package'",
        "require('no-such-package')",
        "return 1",
    ] {
        let answer = node(code);
        assert_eq!(answer.ending(), Ending::Exited(1), "{code}");
        assert!(answer.err().contains("Error") && !answer.err().contains("node.cjs"), "{code}: {}", answer.err());
    }
}

#[test]
fn exit_statuses_are_the_programs() {
    for (code, status) in [
        ("process.exit(3)", 3),
        ("process.exitCode = 4", 4),
        ("process.on('exit', () => { process.exitCode = 5 })", 5),
        ("await 0; process.exit()", 0),
        ("await new Promise(() => {})", 13),
        ("process.on('uncaughtException', () => {}); setTimeout(() => { throw 1 })", 0),
    ] {
        assert_eq!(node(code).ending(), Ending::Exited(status), "{code}");
    }
    assert_eq!(node("process.kill(process.pid, 'SIGKILL')").ending(), Ending::Signaled(9));
    assert_eq!(node("process.abort()").ending(), Ending::Signaled(6));
}

#[test]
fn the_loop_runs_until_it_is_empty() {
    let code = "setTimeout(() => console.log('c'), 500); setImmediate(() => console.log('b')); Promise.resolve().then(() => console.log('a')); process.on('exit', () => console.log('d'))";
    assert_eq!(node(code).good(), "a\nb\nc\nd\n");
}

#[test]
fn a_large_output_is_whole_after_process_exit() {
    let answer = node("process.stdout.write('x'.repeat(5e6)); process.stderr.write('y'.repeat(1e6)); process.exit(0)");
    assert_eq!((answer.ending(), answer.stdout.len(), answer.stderr.len()), (Ending::Exited(0), 5_000_000, 1_000_000));
    let answer = node("process.stdout.write(Buffer.from(Array.from({length: 256}, (_, i) => i)))");
    assert_eq!(answer.stdout, (0..=255).collect::<Vec<u8>>());
    assert_eq!(node("process.stdout.write('žluťoučký 🐎')").good(), "žluťoučký 🐎");
}

#[test]
fn standard_input_streams_while_the_program_runs() {
    let mut sandbox = Sandbox::node(&[], &[]);
    sandbox.wait_for(Kind::Ready);
    let code = "require('readline').createInterface({ input: process.stdin }).on('line', (l) => console.log(l.length)).on('close', () => console.log('end'))";
    sandbox.send(&Request::new(code).keep_stdin_open());
    sandbox.send_frame(Kind::Stdin, b"abc\n");
    sandbox.wait_for_output("3\n");
    sandbox.send_frame(Kind::Stdin, b"x\n");
    sandbox.wait_for_output("1\n");
    sandbox.send_frame(Kind::StdinEnd, b"");
    assert_eq!(sandbox.finish().good(), "3\n1\nend\n");
    let answer = Sandbox::node(&[], &[])
        .run(Request::new("console.log(require('fs').readFileSync(0, 'utf8').length)").stdin("x".repeat(1 << 20)));
    assert_eq!(answer.good(), "1048576\n");
}

#[test]
fn child_processes_and_workers_work() {
    let code = "const { execFileSync } = require('child_process');
const { Worker } = require('worker_threads');
console.log(execFileSync('echo', ['sub']).toString().trim());
console.log(execFileSync(process.execPath, ['-p', '1+1']).toString().trim());
new Worker('require(\"worker_threads\").parentPort.postMessage(40 + 2)', { eval: true }).on('message', console.log);";
    assert_eq!(node(code).good(), "sub\n2\n42\n");
}

#[test]
fn the_control_descriptor_is_not_inherited_and_garbage_on_it_changes_nothing() {
    let code = "const fs = require('fs'); fs.writeSync(4, Buffer.from('garbage of any kind'));
const seen = require('child_process').execFileSync('sh', ['-c', 'test -e /proc/self/fd/3 -o -e /proc/self/fd/4 && echo there || echo gone']);
console.log(seen.toString().trim()); process.exitCode = 6";
    let answer = node(code);
    assert_eq!((answer.ending(), answer.out()), (Ending::Exited(6), "gone\n"), "{answer:?}");
}

#[test]
fn a_full_heap_is_out_of_memory() {
    let node = ["node", "--max-old-space-size=64", zeroboot_runtimes::NODE_PATH];
    let answer =
        Sandbox::start(&[], &node).run(Request::new("const a = []; for (;;) a.push(new Array(1000).fill({}))"));
    assert!(matches!(answer.ending(), Ending::OutOfMemory(_)), "{answer:?}");
}

#[test]
fn an_endless_loop_is_stopped_at_its_deadline() {
    let answer = Sandbox::node(&[], &[])
        .run(Request::new("console.log('before'); for (;;);").limits(|l| l.wall_ns = 500_000_000));
    assert_eq!((answer.ending(), answer.out()), (Ending::DeadlinePassed, "before\n"));
}

#[test]
fn ten_megabytes_of_code_run() {
    let mut code = "// filler filler filler filler\n".repeat((10 << 20) / 31);
    code.push_str("console.log('ran')");
    assert_eq!(node(&code).good(), "ran\n");
    code.push_str("; await 1");
    assert_eq!(node(&code).good(), "ran\n");
}

#[test]
fn a_module_that_cannot_be_warmed_is_a_failure_that_names_it() {
    let start = |warm| Sandbox::node(&[], &["--warm", warm]);
    let mut sandbox = start("no-such-thing");
    sandbox.wait_for(Kind::Failure);
    let failure = sandbox.finish().failure.unwrap();
    assert!(failure.contains("no-such-thing") && !failure.contains('\n'), "{failure}");
    assert_eq!(start("no-such-thing?").run(Request::new("console.log(1)")).good(), "1\n");
}

#[test]
fn a_program_is_over_with_its_last_exit_listener() {
    // Whatever comes after it is Node's own business and would be waited for without end.
    let hang = "process.reallyExit = () => { for (;;); };";
    let answer =
        node(format!("{hang} process.on('exit', (c) => console.log('bye', c)); console.log('on'); process.exit(5)"));
    assert_eq!((answer.ending(), answer.out()), (Ending::Exited(5), "on\nbye 5\n"), "{answer:?}");
    // A listener may change the status, at the natural end too.
    let answer = node("process.on('exit', () => { process.exitCode = 4; }); console.log('on')");
    assert_eq!((answer.ending(), answer.out()), (Ending::Exited(4), "on\n"), "{answer:?}");
}

#[test]
fn an_uncaught_error_is_printed_whole_whatever_exit_listeners_do() {
    for throws in [
        "throw new Error('boom')",
        "Promise.reject(new Error('boom'))",
        "setTimeout(() => { throw new Error('boom') })",
    ] {
        // Listeners of ours, if there were any, are the program's to remove.
        let code = format!("process.removeAllListeners(); process.on('exit', () => console.log('bye')); {throws}");
        let answer = node(code);
        assert_eq!((answer.ending(), answer.out()), (Ending::Exited(1), "bye\n"), "{answer:?}");
        assert!(answer.err().contains("Error: boom") && answer.err().contains("Node.js v"), "{answer:?}");
    }
}

#[test]
fn what_wraps_emit_is_heard_to_its_end() {
    // As the package signal-exit does.
    let wrap = "const { emit } = process;
process.emit = function (name, ...rest) { const heard = emit.call(this, name, ...rest); if (name === 'exit') console.log('after'); return heard; };";
    for end in ["", "process.exit(0)"] {
        assert_eq!(node(format!("{wrap} console.log('on'); {end}")).good(), "on\nafter\n");
    }
}

#[test]
fn a_program_that_says_exit_itself_or_takes_the_descriptor_goes_on() {
    assert_eq!(node("process.emit('exit', 3); console.log('on')").good(), "on\n");
    let take = "const fs = require('fs'); fs.closeSync(3); const fd = fs.openSync('f', 'w+'); process.on('exit', () => console.log(fd))";
    let answer = Sandbox::node(&[], &[]).run(Request::new(take).get("f"));
    assert_eq!(answer.good(), "3\n");
    assert_eq!(answer.files["f"], Ok(Vec::new()));
}
