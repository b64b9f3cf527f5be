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

/// Says that it lives, waits for a number, answers with its square.
const CODE: &str = "print('alive', flush=True)\nn = int(input())\nprint(n * n)";

struct Alive {
    execution: Execution,
    stdin: StdinWriter,
    fork: Duration,
}

/// Keeps `--alive` sandboxes alive at once.
pub(crate) async fn alive_at_once(
    args: &BenchArgs,
    template: &TemplateConfig,
    results: &mut Results,
) -> anyhow::Result<()> {
    let count = args.alive as usize;
    let engine = super::start(template, 0, count).await?;
    drop(start(&engine).await?);
    let zygotes = descendants();
    let available = meminfo("MemAvailable:");

    let begin = Instant::now();
    let mut tasks = JoinSet::new();
    let mut alive = Vec::with_capacity(count);
    for _ in 0..count {
        let engine = engine.clone();
        tasks.spawn(async move { start(&engine).await });
    }
    while let Some(done) = tasks.join_next().await {
        alive.push(done.context("a task ended")??);
    }
    let made = begin.elapsed();
    ensure!(alive.len() == count, "not all sandboxes live");
    let times = alive.iter().map(|a| a.fork).collect();
    results.row(format!("{count} at once: fork to `alive` on stdout"), times);
    results.figure(format!("{count} at once: all alive after"), made.as_secs_f64() * 1e3, "ms");

    let lost = available.saturating_sub(meminfo("MemAvailable:"));
    let (processes, dirty, tables) = memory_of(&descendants(), &zygotes);
    ensure!(processes >= count, "only {processes} processes were found for {count} sandboxes");
    let each = |bytes: u64| bytes as f64 / count as f64 / 1024.0;
    results.figure("each: private dirty memory of its processes", each(dirty), "KiB");
    results.figure("each: page tables of its processes", each(tables), "KiB");
    results.figure("each: memory that the host has less", each(lost), "KiB");

    let begin = Instant::now();
    let mut tasks = JoinSet::new();
    for (number, one) in alive.into_iter().enumerate() {
        tasks.spawn(answer(one, number));
    }
    while let Some(done) = tasks.join_next().await {
        done.context("a task ended")??;
    }
    results.figure(format!("{count} at once: all answered after"), begin.elapsed().as_secs_f64() * 1e3, "ms");
    let begin = Instant::now();
    while engine.stats().live > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    results.figure(format!("{count} at once: all gone after"), begin.elapsed().as_secs_f64() * 1e3, "ms");
    engine.shutdown(Duration::from_secs(5)).await;
    Ok(())
}

async fn start(engine: &Engine) -> anyhow::Result<Alive> {
    let begin = Instant::now();
    let mut request = ExecRequest::new("python", CODE);
    request.stdin = Stdin::Stream;
    request.limits.timeout = Duration::from_secs(600);
    let mut execution = engine.exec(request).await?;
    let stdin = execution.stdin().context("a streamed stdin")?;
    loop {
        match execution.next().await? {
            Some(Event::Stdout(bytes)) => {
                ensure!(bytes == "alive\n", "a sandbox said {bytes:?}");
                return Ok(Alive { execution, stdin, fork: begin.elapsed() });
            }
            Some(Event::Started) => {}
            other => bail!("a sandbox did not live: {other:?}"),
        }
    }
}

async fn answer(mut one: Alive, number: usize) -> anyhow::Result<()> {
    ensure!(one.stdin.write(Bytes::from(format!("{number}\n"))).await, "a sandbox takes no input");
    drop(one.stdin);
    let done = one.execution.collect().await?;
    let expected = format!("{}\n", number * number);
    ensure!(
        done.stdout == expected.as_bytes() && done.report.outcome == Outcome::Exited { code: 0 },
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

/// All processes below this one.
fn descendants() -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        // The name in parentheses may hold anything; the parent is the second field after it.
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
        children.entry(parent.unwrap_or(0)).or_default().push(pid);
    }
    let mut found = Vec::new();
    let mut todo = vec![std::process::id()];
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
