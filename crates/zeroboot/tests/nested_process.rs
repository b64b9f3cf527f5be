//! The process engine on another kernel with cgroup v2: in the nested lane.
#![allow(clippy::print_stderr, reason = "tests speak to people")]

use std::{path::Path, process::Command};

#[test]
fn sandboxes_have_a_cgroup_that_goes_with_them() {
    if std::env::var_os("ZEROBOOT_NESTED").is_none() {
        eprintln!("skipped: only in the nested lane, which has cgroup v2");
        return;
    }
    let binary = std::env::var_os("ZEROBOOT_BIN").expect("the lane names the binary");
    let groups = || {
        let entries = std::fs::read_dir("/sys/fs/cgroup").expect("cgroup v2 is mounted");
        entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).filter(|n| n.starts_with("zeroboot")).count()
    };
    let run = |code: &str| {
        let mut command = Command::new(&binary);
        command.args(["run", "--engine", "process", "--timeout", "5m", "--memory", "64M", "-c", code]);
        if Path::new("/usr/bin/python3").exists() {
            command.args(["--python", "/usr/bin/python3"]);
        }
        let output = command.output().expect("the binary starts");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned(), format!("{output:?}"))
    };
    let (status, stdout, all) = run("print(open('/proc/self/cgroup').read().strip())");
    assert!(status == Some(0) && stdout.contains("/sandbox-"), "{all}");
    // Each process stays below its own limit; together they do not.
    let many = "import os, time\nfor _ in range(8):\n  if os.fork() == 0:\n    x = b'x' * (40 << 20)\n    time.sleep(100)\ntime.sleep(100)";
    let (status, _, all) = run(many);
    assert!(status == Some(137) && all.contains("out of memory"), "{all}");
    assert_eq!(groups(), 0, "a cgroup is left");
}
