//! Sandboxes in which nothing happens: what they cost.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::{Duration, Instant},
};

use anyhow::ensure;
use hyper::Method;
use serde_json::json;

use super::{
    super::{Results, cpu, density},
    server::{Sandbox, Server},
};
use crate::cli::BenchArgs;

/// What a thread has used up to now.
#[derive(Clone, Copy, Default)]
struct Used {
    /// Nanoseconds on a CPU.
    cpu: u64,
    /// Times that it went to sleep or was put aside: as often, it was woken.
    switches: u64,
}

/// Of all threads of the server and of what it started.
fn used(server: u32) -> BTreeMap<(u32, String), Used> {
    let mut found = BTreeMap::new();
    for pid in density::descendants(server).into_iter().chain([server]) {
        for entry in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let read = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
            let cpu = read("schedstat").split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0);
            let status = read("status");
            let switches = status.lines().filter(|line| line.contains("ctxt_switches:"));
            let switches = switches.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum();
            found.insert((pid, entry.file_name().to_string_lossy().into_owned()), Used { cpu, switches });
        }
    }
    found
}

/// The processes of this machine that are not ours: name and CPU time.
fn others(server: u32) -> BTreeMap<u32, (String, Duration)> {
    let ours: BTreeSet<u32> = density::descendants(server).into_iter().chain([server, std::process::id()]).collect();
    let all = density::processes().filter(|(pid, _)| !ours.contains(pid));
    all.filter_map(|(pid, stat)| cpu::of_a_process(&stat).map(|(name, used)| (pid, (name.to_owned(), used)))).collect()
}

/// Makes `--idle` sandboxes with a cell's worth of state in each, leaves them alone, and asks each for it afterwards.
pub(super) async fn sandboxes(args: &BenchArgs, server: &Server, results: &mut Results) -> anyhow::Result<()> {
    let count = args.idle;
    let mut sandboxes = Vec::new();
    let begin = Instant::now();
    for number in 0..count {
        let sandbox = Sandbox::create(server).await?;
        let code = format!("x = {number}");
        let done = server.client.json(Method::POST, &sandbox.path(&["run"]), Some(&json!({ "code": code }))).await?;
        ensure!(done["outcome"] == "ok", "a cell failed: {done}");
        sandboxes.push(sandbox);
    }
    let made = begin.elapsed().as_secs_f64() * 1e3 / f64::from(count);
    results.figure(format!("{count} live sandboxes: each made and run in"), made, "ms");
    // What was set off by the last cell has passed.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let others_before = others(server.pid());
    let (begin, before, busy) = (Instant::now(), used(server.pid()), cpu::of_the_machine()?);
    tokio::time::sleep(Duration::from_secs(args.idle_seconds.into())).await;
    let (after, busy) = (used(server.pid()), cpu::of_the_machine()?.saturating_sub(busy));
    let seconds = begin.elapsed().as_secs_f64();
    let (mut cpu, mut switches) = (0, 0);
    for (thread, now) in &after {
        let then = before.get(thread).copied().unwrap_or_default();
        cpu += now.cpu.saturating_sub(then.cpu);
        switches += now.switches.saturating_sub(then.switches);
    }
    let label = format!("{count} idle sandboxes and their server");
    let processes = after.keys().map(|(pid, _)| pid).collect::<BTreeSet<_>>().len();
    ensure!(processes > count as usize, "only {processes} processes were found");
    results.figure(format!("{label}: CPU, goal 1"), cpu as f64 / 1e9 / seconds * 100.0, "% of one core");
    results.figure(format!("{label}: wake-ups"), switches as f64 / seconds, "1/s");
    results.figure("the whole host meanwhile", busy.as_secs_f64() / seconds * 100.0, "% of one core");
    // What watches all memory or all processes of a machine has more to do the more there are. By number: a worker of the
    // kernel changes its name with its work.
    let spent = |(pid, (name, now)): (u32, (String, Duration))| {
        let before = others_before.get(&pid).map_or(Duration::ZERO, |(_, used)| *used);
        (name, now.saturating_sub(before))
    };
    let mut others: Vec<(String, Duration)> = others(server.pid()).into_iter().map(spent).collect();
    others.sort_by_key(|(_, used)| std::cmp::Reverse(*used));
    for (name, used) in others.iter().take(3) {
        results.figure(format!("  of it {name}, none of ours"), used.as_secs_f64() / seconds * 100.0, "% of one core");
    }
    for (number, sandbox) in sandboxes.iter().enumerate() {
        let done = server.client.json(Method::POST, &sandbox.path(&["run"]), Some(&json!({ "code": "x" }))).await?;
        ensure!(done["value"].as_str() == Some(number.to_string().as_str()), "sandbox {number} answered {done}");
    }
    Ok(())
}
