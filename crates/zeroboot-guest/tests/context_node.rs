//! Node contexts.

#[path = "context/lib.rs"]
#[allow(dead_code)]
mod context;

use std::time::Duration;

use context::{Context, INTERRUPTED, OK};

fn command() -> Vec<String> {
    let node = std::env::var("ZEROBOOT_TEST_NODE").unwrap_or_else(|_| "node".into());
    [node.as_str(), "--no-deprecation", "--experimental-vm-modules", "--expose-gc", zeroboot_runtimes::NODE_PATH]
        .map(str::to_owned)
        .to_vec()
}

fn start() -> Context {
    Context::start(&command().iter().map(String::as_str).collect::<Vec<_>>(), &[])
}

#[test]
fn a_hundred_cells_share_their_state() {
    let mut context = start();
    assert_eq!(context.run("let x = 0; const seen = []").value(), "");
    for i in 1..=100 {
        assert_eq!(context.run(format!("x += {i}; seen.push(x); x")).value(), (i * (i + 1) / 2).to_string());
    }
    assert_eq!(context.run("seen.length").value(), "100");
    assert_eq!(context.run("_ + 1").value(), "101");
    assert_eq!((context.out(), context.err()), (String::new(), String::new()));
    assert_eq!(context.close(), Some(0));
}

#[test]
fn names_may_be_declared_again() {
    let mut context = start();
    for value in ["1", "2"] {
        for (declare, show) in [
            ("let a = VALUE", "a"),
            ("const b = VALUE", "b"),
            ("class C { m() { return VALUE } }", "new C().m()"),
            ("function f() { return VALUE }", "f()"),
            ("var v = VALUE", "v"),
            ("const { d, e: [g] } = { d: VALUE, e: [VALUE] }", "d === g && g"),
            ("const w = await Promise.resolve(VALUE)", "w"),
        ] {
            assert_eq!(context.run(declare.replace("VALUE", value)).value(), "", "{declare}");
            assert_eq!(context.run(show).value(), value, "{declare}");
        }
    }
}

#[test]
fn the_value_is_the_last_expression() {
    let mut context = start();
    for (code, value) in [
        ("1 + 1", "2"),
        ("undefined", ""),
        ("null", "null"),
        ("'žluťoučký 🐎'", "'žluťoučký 🐎'"),
        ("({ a: 1 })", "{ a: 1 }"),
        ("{ a: 1, b: [1, 2] }", "{ a: 1, b: [ 1, 2 ] }"),
        ("{ let q = 1; q + 1 }", "2"),
        ("10n", "10n"),
        ("-0", "-0"),
        ("NaN", "NaN"),
        ("Symbol('s')", "Symbol(s)"),
        ("new Map([[1, 2]])", "Map(1) { 1 => 2 }"),
        ("", ""),
        ("// only a comment", ""),
        ("1 // with one", "1"),
        ("await new Promise((done) => setTimeout(done, 10, 5))", "5"),
        ("for await (const x of [Promise.resolve(6)]) x", "6"),
        ("require('path').basename('/a/b')", "'b'"),
        ("typeof module, typeof exports", "'object'"),
    ] {
        assert_eq!(context.run(code).value(), value, "{code}");
    }
}

#[test]
fn imports_of_every_form_work() {
    let mut context = start();
    let write = |name: &str, text: &str| std::fs::write(context.dir.path().join(name), text).unwrap();
    write(
        "m.mjs",
        "export default 7; export const a = 1; export { a as 'x y' }; globalThis.ran = (globalThis.ran ?? 0) + 1;",
    );
    write("c.cjs", "exports.q = 3");
    for (code, value) in [
        ("import fs from 'fs'; typeof fs.readFileSync", "'function'"),
        (
            "import m, { a as b, 'x y' as z } from './m.mjs'\nimport * as all from \"./m.mjs\";\n[m, b, z, Object.keys(all).length]",
            "[ 7, 1, 1, 3 ]",
        ),
        ("import {\n  a,\n} from './m.mjs'; a", "1"),
        ("import n, * as rest from './m.mjs'; n + rest.a", "8"),
        ("import './m.mjs'; ran", "1"),
        ("(await import('./m.mjs')).a", "1"),
        ("const later = () => import('node:os'); (await later()).EOL.length", "1"),
        ("require('./c.cjs').q", "3"),
        // What only looks like one.
        (
            "const s = \"import(x); import y from 'z'\"; // import(q)\n[s.length, /import(a)/.source, `import(${1}) ${typeof import('fs')}`]",
            "[ 28, 'import(a)', 'import(1) object' ]",
        ),
        ("`\nimport x from 'y'\n`.length", "19"),
        ("({ import: (x) => x }).import(4)", "4"),
    ] {
        assert_eq!(context.run(code).value(), value, "{code}");
    }
    assert!(context.run("import { nope } from 'fs'").error().contains("does not provide an export named 'nope'"));
    assert!(context.run("import x from './missing.mjs'").error().contains("Cannot find module"));
    assert_eq!(context.run("1 + 1").value(), "2");
}

#[test]
fn errors_say_what_happened_and_leave_the_context_usable() {
    let mut context = start();
    context.run("const kept = 41");
    for (code, name, shows) in [
        (
            "function f() { return g() }\nfunction g() { throw new TypeError('žluťoučký') }\nf()",
            "TypeError",
            "at g (cell-2:2:",
        ),
        ("x ==", "SyntaxError", "cell-3:1\\nx =="),
        ("let kept2 = 1;\nlet kept2 = 2;", "SyntaxError", "cell-4:2\\nlet kept2 = 2;"),
        ("throw 5", "Uncaught", "Uncaught 5"),
        ("await Promise.reject(new RangeError('late'))", "RangeError", "late"),
        ("throw new Error('a', { cause: new Error('b') })", "Error", "[cause]: Error: b"),
        ("(function f() { f() })()", "RangeError", "call stack"),
        ("undefined_and_unlike_any_other", "ReferenceError", "undefined_and"),
        ("kept = 1", "TypeError", "constant"),
        ("({ [Symbol.for('nodejs.util.inspect.custom')]() { throw new Error('in inspect') } })", "Error", "in inspect"),
    ] {
        let cell = context.run(code);
        assert!(cell.failed_with(name) && cell.error().contains(shows), "{code}: {cell:?}");
        for ours in ["zeroboot", "node.cjs", "inspector", "\\u001b"] {
            assert!(!cell.error().contains(ours), "{code}: {ours}: {cell:?}");
        }
    }
    assert_eq!(context.run("kept + 1").value(), "42");
    let cell = context.run("throw new Error('\\x01é🐎'.repeat(1_000_000))");
    assert!(cell.failed_with("Error") && cell.error().contains("characters left out"));
    assert_eq!(context.run("kept + 1").value(), "42");
}

#[test]
fn errors_of_timers_and_promises_are_printed_and_nothing_more() {
    let mut context = start();
    let code =
        "setTimeout(() => { throw new Error('from a timer') }, 20); Promise.reject(new Error('from a promise')); 1";
    assert_eq!(context.run(code).value(), "1");
    context.wait_for("Uncaught Error: from a promise");
    // Between cells, by itself.
    context.wait_for("Uncaught Error: from a timer");
    assert_eq!(context.run("1 + 1").value(), "2");
    assert!(!context.err().contains("node.cjs"), "{}", context.err());
}

#[test]
fn displays_are_mime_bundles_and_come_before_the_value() {
    let mut context = start();
    let cell = context.run(
        "display({ 'text/html': '<b>é</b>', 'image/png': Buffer.from('raw').toString('base64'), 'application/json': { k: 1 } });
display([1, 2], 's');
const rich = { [Symbol.for('Jupyter.display')]() { return { 'text/html': '<i>' } } };
rich",
    );
    assert_eq!((cell.status, cell.bundles.len()), (OK, 4), "{cell:?}");
    assert_eq!(cell.bundles[0].text("text/html"), "<b>é</b>");
    assert_eq!(cell.bundles[0].parts["image/png"], b"raw");
    assert_eq!(cell.bundles[0].text("application/json"), "{\"k\":1}");
    assert_eq!(cell.bundles[1].text("text/plain"), "[ 1, 2 ]");
    assert_eq!(cell.bundles[2].text("text/plain"), "'s'");
    assert!(cell.bundles[3].is_value && cell.bundles[3].text("text/html") == "<i>");
    assert!(cell.bundles[3].text("text/plain").contains("Jupyter.display"));
    let cell = context.run("const data = require('crypto').randomBytes(5 << 20); display({ 'image/png': data })");
    let image = &cell.bundles[0].parts["image/png"];
    std::fs::write(context.dir.path().join("back"), image).unwrap();
    assert_eq!(context.run("require('fs').readFileSync('back').equals(data)").value(), "true");
    context.run("setTimeout(() => display('displayed late'), 10); 1");
    context.wait_for("displayed late");
}

#[test]
fn output_of_a_cell_is_in_the_pipes_before_its_end() {
    let mut context = start();
    assert_eq!(
        context.run("for (let i = 0; i < 20000; i++) console.log('line', i); console.error('error')").status,
        OK
    );
    context.wait_for("line 19999\n");
    context.wait_for("error\n");
    assert_eq!(context.out().lines().count(), 20000);
}

#[test]
fn an_interrupt_stops_a_cell_whatever_it_does() {
    let mut context = start();
    for (i, code) in [
        "for (;;);",
        "await new Promise(() => {})",
        "await 1; for (;;);",
        "await (async () => { for (;;) await null })()",
        "await new Promise((done) => setTimeout(done, 1e6))",
        "setTimeout(gc, 20); setTimeout(gc, 40); await new Promise(() => {})",
        "({ [Symbol.for('nodejs.util.inspect.custom')]() { for (;;); } })",
        "/(a+)+b/.test('a'.repeat(40))",
    ]
    .into_iter()
    .enumerate()
    {
        let word = format!("begun {i}");
        let cell = context.interrupted(&format!("console.log('{word}'); {code}"), &word);
        assert_eq!(cell.status, INTERRUPTED, "{code}: {cell:?}");
        assert_eq!(context.run("gc(); await null; 1 + 1").value(), "2", "after {code}");
    }
    for _ in 0..20 {
        context.interrupt();
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(context.run("1 + 1").value(), "2");
    assert_eq!(context.err(), "");
}

#[test]
fn an_interrupt_at_any_moment_loses_no_frame() {
    let mut context = start();
    let mut stopped = 0;
    for i in 0..40 {
        context.begin("for (let i = 0; i < 5; i++) display({ 'image/png': Buffer.alloc(200_000) }); for (let i = 0; i < 3e6; i++) Math.sqrt(i); undefined");
        std::thread::sleep(Duration::from_micros(i * 400));
        context.interrupt();
        // Every bundle is whole, and there is one end: this panics otherwise.
        let cell = context.end();
        stopped += u32::from(cell.status == INTERRUPTED);
        for bundle in &cell.bundles {
            assert_eq!(bundle.parts["image/png"].len(), 200_000);
        }
    }
    assert!(stopped > 0, "no interrupt met a cell");
    assert_eq!(context.run("1 + 1").value(), "2");
}

#[test]
fn descriptors_are_the_cells_own() {
    let mut context = start();
    assert_eq!(context.run("require('fs').readlinkSync('/proc/self/fd/0')").value(), "'/dev/null'");
    let code = "const { spawnSync } = require('child_process'); spawnSync('sh', ['-c', 'test -e /proc/self/fd/3 && readlink /proc/self/fd/3'], { stdio: ['ignore', 'pipe', 'pipe'] }).stdout.toString().includes('socket:')";
    assert_eq!(context.run(code).value(), "false");
}

#[test]
fn process_exit_keeps_its_status_and_hanging_up_ends_it() {
    let mut context = start();
    context.begin("process.exit(7)");
    assert_eq!(context.child.wait().unwrap().code(), Some(7));
    let mut context = start();
    context.run("setInterval(() => {}, 1000); 1");
    assert_eq!(context.close(), Some(0));
}

#[test]
fn a_cold_context_is_told_where_to_work() {
    let mut command = command();
    command.push("--context".into());
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let mut context = Context::ready(&command, &[]);
    assert!(context.ready.contains("Node v"), "{}", context.ready);
    let place = context.dir.path().join("place é");
    std::fs::create_dir(&place).unwrap();
    std::fs::write(place.join("beside.cjs"), "exports.y = 3").unwrap();
    context.identity();
    context.env("A", "1=2");
    assert_eq!(context.serve_in(place.to_str().unwrap()), Ok(()));
    let code = "[require('path').basename(process.cwd()), process.env.A, require('./beside.cjs').y, (await import('./beside.cjs')).default.y]";
    assert_eq!(context.run(code).value(), "[ 'place é', '1=2', 3, 3 ]");
    context.identity();
    context.env("LATER", "here");
    assert_eq!(context.run("process.env.LATER").value(), "'here'");
    let mut context = Context::ready(&command, &[]);
    context.identity();
    assert!(context.serve_in("/no/such/place").unwrap_err().contains("/no/such/place"));
    let mut context = Context::ready(&command, &[]);
    assert!(context.serve_in("/").unwrap_err().contains("identity"));
}
