//! What a sandbox takes of the host's memory until its limit stops it: the table of `docs/threat-model.md`. On demand, on a host
//! that does nothing else, since it looks at all of the host's memory:
//!
//! ```text
//! cargo test -p zeroboot --test worst -- --ignored --nocapture
//! ```

#[path = "harness/greedy.rs"]
mod greedy;
#[path = "harness/lib.rs"]
#[allow(dead_code)]
mod harness;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use harness::{Cli, Who};

/// `MemAvailable`, MiB.
fn available() -> i64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<i64>().unwrap() / 1024
}

#[test]
#[ignore = "a measurement of a host that does nothing else"]
fn the_worst_that_a_sandbox_takes_of_the_host() {
    let nothing = ("a program that sleeps", 64, "");
    println!("| program | limit, MiB | taken, MiB | ended |\n|---|---|---|---|");
    for (name, limit, code) in std::iter::once(&nothing).chain(&greedy::ALL) {
        let (before, over) = (available(), AtomicBool::new(false));
        let (least, done) = std::thread::scope(|scope| {
            let least = scope.spawn(|| {
                let mut least = before;
                while !over.load(Ordering::Relaxed) {
                    least = least.min(available());
                    std::thread::sleep(Duration::from_millis(2));
                }
                least
            });
            let cli = Cli::run(Who::Me).args(["--memory", &format!("{limit}M"), "--timeout", "2m", "--cpu-time", "2m"]);
            let done = cli.code(greedy::program(code)).go();
            over.store(true, Ordering::Relaxed);
            (least.join().unwrap(), done)
        });
        let ended = if done.out == greedy::HELD.as_bytes() { "by itself".into() } else { format!("{}", done.code()) };
        println!("| {name} | {limit} | {} | {ended} |", before - least);
    }
}
