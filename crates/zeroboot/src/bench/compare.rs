//! One small piece of work by Zeroboot and by whatever else this host has: answers checked, interleaved, in one run.

mod plot;
mod rival;

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use serde::Serialize;
use tokio::task::JoinSet;
use zeroboot_engine::{Engine, ExecRequest, Outcome, TemplateConfig, ZygoteSpec};

use super::{
    cpu::Account,
    density, start,
    stats::{HostFacts, Summary},
};
use crate::{
    cli::{BenchArgs, Runtime},
    printer, resolve,
};

/// Samples of one rival between two reads of the account of CPU time.
const BATCH: u32 = 5;
const CONCURRENCY: [usize; 6] = [1, 2, 4, 8, 16, 32];
/// Sandboxes that wait while the cost of one more is measured.
const ALIVE: [usize; 3] = [10, 100, 1000];

/// What one rival needs for `print(1)`.
#[derive(Debug, Serialize)]
pub(crate) struct Line {
    name: String,
    /// From the request to the last byte, milliseconds.
    wall: Summary,
    /// CPU time of all processes, milliseconds, by batches.
    cpu: Summary,
}

/// A line of a plot.
#[derive(Debug, Serialize)]
pub(crate) struct Series {
    name: &'static str,
    x: &'static str,
    y: &'static str,
    points: Vec<(f64, f64)>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Comparison {
    zeroboot: &'static str,
    host: HostFacts,
    /// Whose CPU time is counted.
    account: &'static str,
    lines: Vec<Line>,
    /// Name and reason.
    absent: Vec<(&'static str, String)>,
    series: Vec<Series>,
    /// Many forks of a bare warm Python at once, each of which prints its number: whose, how many, milliseconds.
    at_once: Vec<(&'static str, usize, f64)>,
}

/// Runs all of it, prints the table, and writes the files that `args` names.
pub(crate) async fn with_what_is_here(args: &BenchArgs, template: &TemplateConfig) -> anyhow::Result<()> {
    let account = Account::open();
    let mut found = rival::find(args, template).await?;
    let rivals = &mut found.rivals;
    let mut samples: Vec<_> = rivals.iter().map(|_| (Vec::new(), Vec::new())).collect();
    for _ in 0..args.repeat.div_ceil(BATCH) {
        for (rival, (wall, cpu)) in rivals.iter_mut().zip(&mut samples) {
            rival.settle().await;
            let before = account.now()?;
            for _ in 0..BATCH {
                let begin = Instant::now();
                rival.once().await?;
                wall.push(begin.elapsed());
            }
            rival.settle().await;
            cpu.push(account.now()?.saturating_sub(before) / BATCH);
        }
    }
    let lines = rivals
        .iter()
        .zip(samples)
        .map(|(rival, (wall, cpu))| Line { name: rival.name.clone(), wall: Summary::of(wall), cpu: Summary::of(cpu) })
        .collect();
    for rival in found.rivals.drain(..) {
        rival.end().await;
    }
    let series = vec![throughput(args, template).await?, cost_beside_others(args, template, &account).await?];
    let comparison = Comparison {
        zeroboot: env!("CARGO_PKG_VERSION"),
        host: HostFacts::read(),
        account: account.whose(),
        lines,
        absent: found.absent,
        series,
        at_once: at_once(args, template).await?,
    };
    print(&comparison)?;
    if let Some(path) = &args.json {
        fs::write(path, serde_json::to_vec_pretty(&comparison)?)
            .with_context(|| format!("write {}", path.display()))?;
    }
    if let Some(path) = &args.html {
        fs::write(path, plot::page(&comparison)).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// Sandboxes a second, against how many are wanted at once.
async fn throughput(args: &BenchArgs, template: &TemplateConfig) -> anyhow::Result<Series> {
    let engine = start(template, 0, CONCURRENCY[CONCURRENCY.len() - 1]).await?;
    let mut points = Vec::new();
    for at_once in CONCURRENCY {
        let count = (args.repeat as usize).max(at_once);
        let took = many(&engine, count, at_once).await?;
        points.push((at_once as f64, count as f64 / took.as_secs_f64()));
    }
    engine.shutdown(Duration::from_secs(5)).await;
    Ok(Series { name: "Throughput", x: "sandboxes wanted at once", y: "sandboxes a second", points })
}

/// Runs `count` programs, `at_once` of them at the same time. Each prints its number.
async fn many(engine: &Engine, count: usize, at_once: usize) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    let mut tasks = JoinSet::new();
    for first in 0..at_once {
        let engine = engine.clone();
        tasks.spawn(async move {
            for number in (first..count).step_by(at_once) {
                let done = engine.exec(ExecRequest::new("python", format!("print({number})"))).await?.collect().await?;
                ensure!(
                    done.report.outcome == Outcome::Exited { code: 0 }
                        && done.stdout == format!("{number}\n").as_bytes(),
                    "sandbox {number} gave a wrong answer"
                );
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.context("a task ended")??;
    }
    Ok(begin.elapsed())
}

/// CPU time of a fork while others live.
async fn cost_beside_others(args: &BenchArgs, template: &TemplateConfig, account: &Account) -> anyhow::Result<Series> {
    let most = args.alive as usize;
    let engine = start(template, 0, most + 4).await?;
    // The memory of a template is an image from its second fork on.
    for _ in 0..2 {
        many(&engine, 1, 1).await?;
    }
    let (mut alive, mut points) = (Vec::new(), Vec::new());
    for target in ALIVE.into_iter().filter(|&target| target < most).chain([most]) {
        while alive.len() < target {
            alive.push(density::start_with(&engine, density::PYTHON, Duration::from_secs(600)).await?);
        }
        let mut costs = Vec::new();
        for _ in 0..args.repeat.div_ceil(BATCH) {
            let before = account.now()?;
            many(&engine, BATCH as usize, 1).await?;
            while engine.stats().live > target {
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
            costs.push(account.now()?.saturating_sub(before) / BATCH);
        }
        points.push((target as f64, Summary::of(costs).p50));
    }
    for (number, one) in alive.into_iter().enumerate() {
        density::answer(one, density::PYTHON, number).await?;
    }
    engine.shutdown(Duration::from_secs(5)).await;
    Ok(Series { name: "Cost of one more", x: "sandboxes alive", y: "CPU of one exec, ms", points })
}

/// Forks of a bare warm Python, all wanted at once, by Zeroboot and by sandlock.
async fn at_once(args: &BenchArgs, template: &TemplateConfig) -> anyhow::Result<Vec<(&'static str, usize, f64)>> {
    let count = args.alive as usize;
    let mut template = template.clone();
    let ZygoteSpec::Process { warm, .. } = &mut template.spec else { return Ok(Vec::new()) };
    warm.clear();
    let engine = start(&template, 0, CONCURRENCY[CONCURRENCY.len() - 1]).await?;
    for _ in 0..2 {
        many(&engine, 1, 1).await?;
    }
    let took = many(&engine, count, CONCURRENCY[CONCURRENCY.len() - 1]).await?;
    engine.shutdown(Duration::from_secs(5)).await;
    let mut found = vec![("Zeroboot, full isolation", count, took.as_secs_f64() * 1e3)];
    if let Some(took) = rival::sandlock_clones(args, count)? {
        found.push(("sandlock, clones", count, took.as_secs_f64() * 1e3));
    }
    Ok(found)
}

fn print(comparison: &Comparison) -> anyhow::Result<()> {
    printer::line(format_args!(
        "{:<56} {:>5} {:>9} {:>9} {:>8} {:>9} {:>8}",
        "print(1), answers checked", "n", "wall p50", "wall p95", "times", "CPU p50", "times"
    ))?;
    let first = comparison.lines.first().context("nothing was measured")?;
    for line in &comparison.lines {
        printer::line(format_args!(
            "{:<56} {:>5} {:>9.2} {:>9.2} {:>8.2} {:>9.2} {:>8.2}",
            line.name,
            line.wall.n,
            line.wall.p50,
            line.wall.p95,
            line.wall.p50 / first.wall.p50,
            line.cpu.p50,
            line.cpu.p50 / first.cpu.p50
        ))?;
    }
    printer::line(format_args!("milliseconds; CPU of {}; times: of the first line", comparison.account))?;
    for (name, reason) in &comparison.absent {
        printer::line(format_args!("{name:<56} absent: {reason}"))?;
    }
    for series in &comparison.series {
        printer::line(format_args!("\n{}: {} by {}", series.name, series.y, series.x))?;
        for (x, y) in &series.points {
            printer::line(format_args!("{x:>8} {y:>10.2}"))?;
        }
    }
    for (name, count, took) in &comparison.at_once {
        printer::line(format_args!("{count} forks of a bare warm Python at once: {name}: {took:.0} ms"))?;
    }
    Ok(())
}

/// The template of the other language, where the host has it.
fn node_template(args: &BenchArgs) -> Option<TemplateConfig> {
    resolve::process_template(Runtime::Node, &args.from, None, 0).ok()
}
