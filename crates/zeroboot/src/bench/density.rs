//! Many sandboxes alive at once: made in parallel, each answering, each measured, all gone.

use std::{
    collections::HashMap,
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use tokio::task::JoinSet;
use zeroboot_engine::{Engine, Event, ExecRequest, Execution, Outcome, Stdin, StdinWriter, TemplateConfig};

use super::Results;
use crate::cli::BenchArgs;

/// Numbers of sandboxes alive at once, step by step, up to `--alive`.
const STEPS: [usize; 4] = [10, 100, 1000, 10_000];
/// Forks one after the other while that number is alive.
const ONE_MORE: usize = 20;

/// What the sandboxes do: say that they live, wait for a number, answer with something that only this number gives.
#[derive(Clone, Copy)]
pub(crate) struct Program {
    pub(crate) code: &'static str,
    pub(crate) alive: &'static str,
    pub(crate) input: fn(usize) -> String,
    pub(crate) answer: fn(usize) -> String,
}

pub(crate) const PYTHON: Program = Program {
    code: "print('alive', flush=True)\nn = int(input())\nprint(n * n)",
    alive: "alive\n",
    input: |number| format!("{number}\n"),
    answer: |number| format!("{}\n", number * number),
};

pub(crate) struct Alive {
    pub(crate) execution: Execution,
    pub(crate) stdin: StdinWriter,
    fork: Duration,
}

/// Keeps `--alive` sandboxes alive at once. `label` begins each line of the table.
pub(crate) async fn alive_at_once(
    args: &BenchArgs,
    template: &TemplateConfig,
    program: Program,
    label: &str,
    results: &mut Results,
) -> anyhow::Result<()> {
    let count = args.alive as usize;
    // Room for those that are just going.
    let engine = super::start(template, 0, count + ONE_MORE).await?;
    // A process template's memory is an image from its second fork on.
    for _ in 0..2 {
        drop(start(&engine, program).await?);
        gone(&engine, 0).await;
    }
    let zygotes = descendants(std::process::id());
    let available = meminfo("MemAvailable:");

    let mut alive: Vec<Alive> = Vec::with_capacity(count);
    for target in STEPS.into_iter().filter(|&step| step < count).chain([count]) {
        let begin = Instant::now();
        let new = target - alive.len();
        let mut tasks = JoinSet::new();
        for _ in 0..new {
            let engine = engine.clone();
            tasks.spawn(async move { start(&engine, program).await });
        }
        while let Some(done) = tasks.join_next().await {
            alive.push(done.context("a task ended")??);
        }
        let made = begin.elapsed();
        ensure!(alive.len() == target, "not all sandboxes live");
        let name = format!("{label}{target} alive");
        let times = alive.iter().rev().take(new).map(|a| a.fork).collect();
        results.row(format!("{name}: {new} made at once, fork to `alive`"), times);
        results.figure(format!("{name}: a fork, when made in parallel"), made.as_secs_f64() * 1e3 / new as f64, "ms");

        let lost = available.saturating_sub(meminfo("MemAvailable:"));
        let (processes, dirty, tables) = memory_of(&descendants(std::process::id()), &zygotes);
        ensure!(processes >= target, "only {processes} processes were found for {target} sandboxes");
        let each = |bytes: u64| bytes as f64 / target as f64 / 1024.0;
        results.figure(format!("{name}: each, private dirty memory"), each(dirty), "KiB");
        results.figure(format!("{name}: each, page tables"), each(tables), "KiB");
        results.figure(format!("{name}: each, memory that the host has less"), each(lost), "KiB");

        let mut one_more = Vec::with_capacity(ONE_MORE);
        for _ in 0..ONE_MORE {
            let one = start(&engine, program).await?;
            one_more.push(one.execution.fork_time());
            drop(one);
            gone(&engine, target).await;
        }
        results.row(format!("{name}: one more fork, ready"), one_more);
    }

    let name = format!("{label}{count} alive");
    let begin = Instant::now();
    let mut tasks = JoinSet::new();
    for (number, one) in alive.into_iter().enumerate() {
        tasks.spawn(answer(one, program, number));
    }
    while let Some(done) = tasks.join_next().await {
        done.context("a task ended")??;
    }
    results.figure(format!("{name}: all answered after"), begin.elapsed().as_secs_f64() * 1e3, "ms");
    let begin = Instant::now();
    gone(&engine, 0).await;
    results.figure(format!("{name}: all gone after"), begin.elapsed().as_secs_f64() * 1e3, "ms");
    let left = descendants(std::process::id()).iter().filter(|pid| !zygotes.contains(pid)).count();
    ensure!(left == 0, "{left} processes are left");
    engine.shutdown(Duration::from_secs(5)).await;
    Ok(())
}

/// Until no more than `live` sandboxes are left.
async fn gone(engine: &Engine, live: usize) {
    while engine.stats().live > live {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn start(engine: &Engine, program: Program) -> anyhow::Result<Alive> {
    start_with(engine, program, Duration::from_secs(600)).await
}

/// Starts the program in a fresh sandbox and waits until it says that it lives.
pub(crate) async fn start_with(engine: &Engine, program: Program, timeout: Duration) -> anyhow::Result<Alive> {
    let begin = Instant::now();
    let mut request = ExecRequest::new("python", program.code);
    request.stdin = Stdin::Stream;
    request.limits.timeout = timeout;
    let mut execution = engine.exec(request).await?;
    let stdin = execution.stdin().context("a streamed stdin")?;
    loop {
        match execution.next().await? {
            Some(Event::Stdout(bytes)) => {
                ensure!(bytes == program.alive, "a sandbox said {bytes:?}");
                return Ok(Alive { execution, stdin, fork: begin.elapsed() });
            }
            Some(Event::Started) => {}
            other => bail!("a sandbox did not live: {other:?}"),
        }
    }
}

/// Gives it its number and checks the answer.
pub(crate) async fn answer(mut one: Alive, program: Program, number: usize) -> anyhow::Result<()> {
    ensure!(one.stdin.write(Bytes::from((program.input)(number))).await, "a sandbox takes no input");
    drop(one.stdin);
    let done = one.execution.collect().await?;
    ensure!(
        done.stdout == (program.answer)(number).as_bytes() && done.report.outcome == Outcome::Exited { code: 0 },
        "sandbox {number} answered {:?}",
        String::from_utf8_lossy(&done.stdout)
    );
    Ok(())
}

fn meminfo(field: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Every process of this machine, its kernel's threads among them, with its `stat`. One that has just ended is left out.
pub(crate) fn processes() -> impl Iterator<Item = (u32, String)> {
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        Some((pid, fs::read_to_string(entry.path().join("stat")).ok()?))
    })
}

/// All processes below this one.
pub(crate) fn descendants(of: u32) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for (pid, stat) in processes() {
        // The name in parentheses may hold anything; the parent is the second field after it.
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
        children.entry(parent.unwrap_or(0)).or_default().push(pid);
    }
    let mut found = Vec::new();
    let mut todo = vec![of];
    while let Some(pid) = todo.pop() {
        for child in children.remove(&pid).unwrap_or_default() {
            found.push(child);
            todo.push(child);
        }
    }
    found
}

/// Of the processes in `all` but not in `without`: how many, their private dirty bytes, their page tables.
fn memory_of(all: &[u32], without: &[u32]) -> (usize, u64, u64) {
    let kib = |text: &str, field: &str| {
        let line = text.lines().find(|line| line.starts_with(field)).unwrap_or_default();
        line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    let mut sum = (0, 0, 0);
    for pid in all.iter().filter(|pid| !without.contains(pid)) {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        sum.0 += 1;
        sum.1 += kib(&rollup, "Private_Dirty:");
        sum.2 += kib(&status, "VmPTE:");
    }
    sum
}
