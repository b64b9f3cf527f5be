//! No two forks of one warm runtime draw the same.

#[path = "harness/lib.rs"]
#[allow(dead_code)]
mod harness;

use std::collections::{BTreeMap, HashSet};
use std::process::Command;

use harness::{Request, Sandbox};
use zeroboot_proto::Kind;

/// What each of `count` clones of one warm Python drew, by name.
fn clones(count: usize, more: &[&str]) -> BTreeMap<String, Vec<String>> {
    let root = harness::repository();
    let python = harness::python();
    // Each clone makes a directory.
    let made = tempfile::tempdir().unwrap();
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc", &python, "-X", "utf8"])
        .arg(root.join("crates/zeroboot-guest/tests/clones/clones.py"))
        .arg(zeroboot_runtimes::PYTHON_PATH)
        .arg(count.to_string())
        .args(more)
        .env("TMPDIR", made.path())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut drawn: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in text.lines() {
        // A flat object of numbers and strings without commas: no JSON library needed.
        for pair in line.trim_matches(['{', '}']).split(", ") {
            let (name, value) = pair.split_once(": ").unwrap();
            drawn.entry(name.trim_matches('"').into()).or_default().push(value.into());
        }
    }
    assert!(drawn.len() >= 18 && drawn.values().all(|v| v.len() == count), "{text}");
    drawn
}

#[test]
fn clones_of_a_warm_python_differ_in_every_generator() {
    for (name, values) in clones(60, &[]) {
        let different: HashSet<&String> = values.iter().collect();
        assert_eq!(different.len(), values.len(), "{name} repeats");
    }
}

#[test]
fn without_an_identity_they_would_be_alike_so_the_test_sees_it() {
    let drawn = clones(3, &["--no-identity"]);
    for (name, values) in &drawn {
        let alike = values.iter().all(|v| *v == values[0]);
        // What the kernel gives each time differs in any process.
        let from_kernel =
            ["os.urandom", "secrets", "uuid4", "default_rng()", "uuid1", "uuid1.clock_seq", "mkdtemp", "tempfile"]
                .contains(&name.as_str());
        assert!(alike || from_kernel, "{name} differs although nothing was seeded: {values:?}");
    }
}

#[test]
fn a_frozen_node_refuses_to_run_when_openssl_would_not_seed_itself_again() {
    let answer = Sandbox::node(&[], &["--frozen"]).run(Request::new("console.log(1)"));
    assert!(answer.failure.as_ref().is_some_and(|f| f.contains("clock")), "{answer:?}");
    assert!(!answer.order.contains(&Kind::Started) && answer.stdout.is_empty());
}

#[test]
fn a_frozen_node_has_numbers_of_its_own() {
    // The clock that jumps by two hours at the identity, as the agent of a VM makes it.
    let dir = tempfile::TempDir::new().unwrap();
    let shim = dir.path().join("clock.cjs");
    std::fs::write(&shim, "const now = Date.now, read = require('fs').readSync;\nlet jump = 0;\nDate.now = () => now() + jump;\nrequire('fs').readSync = (...a) => { if (a[0] === 3) jump = 7200e3; return read(...a); };\n").unwrap();
    let code = "const a = Array.from({length: 20000}, Math.random);
const mean = a.reduce((x, y) => x + y) / a.length;
const d = Object.getOwnPropertyDescriptor(Math, 'random');
console.log(a[0], a[1], new Set(a).size === a.length, a.every((x) => x >= 0 && x < 1), Math.abs(mean - 0.5) < 0.02,
  Math.random.name, Math.random.length, d.enumerable, d.writable, d.configurable,
  Math.abs(performance.timeOrigin + performance.now() - Date.now()) < 600e3)";
    let mut seen = HashSet::new();
    for _ in 0..3 {
        let answer = Sandbox::node(&["--require", shim.to_str().unwrap()], &["--frozen"]).run(Request::new(code));
        let words: Vec<&str> = answer.good().split_whitespace().collect();
        assert_eq!(words[2..], ["true", "true", "true", "random", "0", "false", "true", "true", "true"]);
        assert!(seen.insert(words[0].to_string()) && seen.insert(words[1].to_string()));
    }
}

/// Two runners that draw the same until the identity, as forks of one snapshot do: their V8 has one seed, and what OpenSSL
/// gives them comes from a counter until the clock jumps.
#[test]
fn what_a_module_that_a_frozen_node_warmed_keeps_gives_numbers_of_its_own() {
    let dir = tempfile::TempDir::new().unwrap();
    let shim = dir.path().join("shim.cjs");
    std::fs::write(&shim, include_str!("clones/alike.cjs")).unwrap();
    let module = dir.path().join("made_before.cjs");
    std::fs::write(&module, include_str!("clones/made_before.cjs")).unwrap();
    let module = module.to_str().unwrap();
    let code = format!("console.log(require({module:?})().join('\\n'))");
    let flags = ["--expose-internals", "--random-seed=1", "--no-warnings", "--require", shim.to_str().unwrap()];
    let runs: Vec<Vec<String>> = (0..3)
        .map(|_| {
            let answer = Sandbox::node(&flags, &["--frozen", "--warm", module]).run(Request::new(&code));
            answer.good().lines().map(str::to_owned).collect()
        })
        .collect();
    for draw in 0..runs[0].len() {
        let values: HashSet<&String> = runs.iter().map(|run| &run[draw]).collect();
        let (name, _) = runs[0][draw].split_once(' ').unwrap();
        // What was drawn while it was warmed shows that the runners were alike.
        assert_eq!(values.len(), if name == "before" { 1 } else { runs.len() }, "{name}: {values:?}");
    }
    assert_eq!(runs[0].len(), 10, "{:?}", runs[0]);
}
