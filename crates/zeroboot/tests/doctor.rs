//! `zeroboot doctor --full` as its user sees it: what it tried, what it could not, and what it does not tell.

#[path = "harness/lib.rs"]
#[allow(dead_code)]
mod harness;

use std::{collections::BTreeMap, path::Path};

use harness::{Cli, Done, Who, python};
use serde_json::Value;

/// Steps of a report by name.
fn steps(done: &Done) -> BTreeMap<String, (String, String)> {
    let report: Value = serde_json::from_str(done.out()).unwrap_or_else(|error| panic!("{error}: {done:?}"));
    let word = |step: &Value, field: &str| step[field].as_str().unwrap().to_owned();
    let steps = report["full"]["steps"].as_array().unwrap_or_else(|| panic!("{done:?}"));
    steps.iter().map(|s| (word(s, "what"), (word(s, "verdict"), word(s, "found")))).collect()
}

/// On any host: a step passed because it was done, and one that could not be done says why.
#[test]
fn the_full_report_passes_what_was_done_and_gives_a_reason_for_what_was_not() {
    let done = Cli::bare(Who::Me)
        .args(["doctor", "--full", "--json", "--python", python(Who::Me)])
        .env("ZEROBOOT_HOME", "/nonexistent/zeroboot-home")
        .go();
    let steps = steps(&done);
    assert_eq!(steps.len(), 8, "{steps:#?}");
    for (what, (verdict, found)) in &steps {
        assert!(["ok", "not_run"].contains(&verdict.as_str()), "{what}: {verdict}: {found}");
        assert!(!found.is_empty(), "{what}");
    }
    let (verdict, found) = &steps["process forks"];
    assert!(verdict == "ok" && found.contains("values different in each and the clock right"), "{steps:#?}");
    // No template is here, whatever KVM is: it is neither built nor called good.
    for what in ["python template", "node template"] {
        assert_eq!(steps[what].0, "not_run", "{steps:#?}");
    }
    if let Err(error) = zeroboot_vm::Host::open() {
        assert!(
            std::env::var_os("ZEROBOOT_REQUIRE_KVM").is_none_or(|v| v != "1"),
            "ZEROBOOT_REQUIRE_KVM=1 and {error}"
        );
        let ran: Vec<_> = steps.iter().filter(|(_, (verdict, _))| verdict != "not_run").map(|(what, _)| what).collect();
        assert_eq!(ran, ["process forks"], "{steps:#?}");
        eprintln!("the rest is skipped: no usable /dev/kvm ({error})");
        return;
    }
    let found = |what: &str| match &steps[what] {
        (verdict, found) if verdict == "ok" => found.as_str(),
        other => panic!("{what}: {other:?}"),
    };
    assert!(found("save and restore").contains("goes on in a fork"));
    assert!(found("little template").contains("left out"));
    assert!(found("little forks").contains("each with its own answer and memory"));
    assert!(found("deadlines").contains("3 runs without an end were ended at 300 ms"));
    assert!(found("fork speed").contains("the prototype's order"));
    if Path::new("/sys/module/kvm_pvm").exists() {
        // It must not pass for hardware.
        assert!(found("fork speed").contains("not the hardware kind"));
        assert!(steps["python template"].1.contains("no Linux guest can run here"), "{steps:#?}");
    }
}

#[test]
fn a_user_who_may_not_open_kvm_gets_a_report_in_which_no_vm_was_tried() {
    let Some(who) = Who::ordinary() else { return };
    let open =
        std::fs::metadata("/dev/kvm").is_ok_and(|m| std::os::unix::fs::PermissionsExt::mode(&m.permissions()) & 6 == 6);
    if open {
        eprintln!("skipped: every user may open /dev/kvm here");
        return;
    }
    let done = Cli::bare(who).args(["doctor", "--full", "--python", python(who)]).go();
    let text = done.out();
    assert!(text.contains("Steps of --full: 1 passed, 0 failed, 7 not run."), "{done:?}");
    assert!(
        text.lines().filter(|line| line.starts_with("not run")).all(|line| line.contains("/dev/kvm cannot be used: "))
    );
}

#[test]
fn the_report_tells_neither_home_nor_host_name_nor_environment() {
    let home = tempfile::tempdir().unwrap();
    let private = home.path().join("jane-doe");
    std::fs::create_dir(&private).unwrap();
    // An error that names a path in it.
    let missing = private.join("venv/bin/python");
    let done = Cli::bare(Who::Me)
        .args(["doctor", "--full", "--python", missing.to_str().unwrap()])
        .env("HOME", private.to_str().unwrap())
        .env("ZEROBOOT_HOME", private.join("store").to_str().unwrap())
        .env("ZEROBOOT_TEST_SECRET", "zb_live_do_not_tell")
        .go();
    let text = done.out();
    assert!(text.contains("~/venv/bin/python"), "{done:?}");
    for secret in ["jane-doe", "zb_live_do_not_tell"] {
        assert!(!text.contains(secret), "{secret}: {done:?}");
    }
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let words = |c: char| !c.is_alphanumeric() && c != '-' && c != '.';
    assert!(name.len() < 4 || !text.split(words).any(|word| word == name), "{name}: {done:?}");
    assert!(text.lines().last().unwrap().contains("paste all of this into an issue"), "{done:?}");
}
