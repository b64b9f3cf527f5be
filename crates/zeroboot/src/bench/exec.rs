//! From a request to its first output, and the fork alone.

use std::{
    io::Read,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use zeroboot_engine::{Engine, Event, ExecRequest, TemplateConfig};

use super::{Results, checked, start};
use crate::cli::BenchArgs;

const NUMPY: &str = "import numpy; print(int(numpy.arange(10).sum()))";
const NUMPY_SAYS: &[u8] = b"45\n";
const PRINT: &str = "print(1)";
const PRINT_SAYS: &[u8] = b"1\n";

/// Fork to first output, with numpy warmed, against a fresh interpreter that prints the same.
pub(crate) async fn first_output(
    args: &BenchArgs,
    template: &TemplateConfig,
    results: &mut Results,
) -> anyhow::Result<()> {
    let host = zeroboot_process::python(args.from.python.as_deref())?;
    let numpy = fresh(&host.interpreter, NUMPY, NUMPY_SAYS).is_ok();
    let (code, says, what) =
        if numpy { (NUMPY, NUMPY_SAYS, "import numpy") } else { (PRINT, PRINT_SAYS, "print(1) (no numpy here)") };
    let unpooled = start(template, 0, 4).await?;
    let pooled = start(template, 4, 4).await?;
    // Twice: a process template's memory is an image from its second fork on.
    for engine in [&unpooled, &pooled, &unpooled, &pooled] {
        checked(engine, code, says).await?;
    }
    let (mut from_fork, mut from_pool, mut from_fresh) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.repeat {
        from_fork.push(to_first_output(&unpooled, code, says).await?);
        wait_for_pool(&pooled).await;
        from_pool.push(to_first_output(&pooled, code, says).await?);
        let interpreter = host.interpreter.clone();
        from_fresh.push(tokio::task::spawn_blocking(move || fresh(&interpreter, code, says)).await??);
    }
    let fork = results.row(format!("{what}: fork to first output"), from_fork);
    let pool = results.row(format!("{what}: pooled to first output"), from_pool);
    let fresh = results.row(format!("{what}: fresh python3 to first output"), from_fresh);
    results.figure("fresh python3 / fork, p50", fresh / fork, "times");
    results.figure("fresh python3 / pooled, p50", fresh / pool, "times");
    let (mut print_fork, mut print_pool) = (Vec::new(), Vec::new());
    for _ in 0..args.repeat {
        print_fork.push(checked(&unpooled, PRINT, PRINT_SAYS).await?.total_time);
        wait_for_pool(&pooled).await;
        print_pool.push(checked(&pooled, PRINT, PRINT_SAYS).await?.total_time);
    }
    results.row("print(1): fork to last byte", print_fork);
    results.row("print(1): pooled to last byte", print_pool);
    unpooled.shutdown(Duration::from_secs(5)).await;
    pooled.shutdown(Duration::from_secs(5)).await;
    Ok(())
}

async fn to_first_output(engine: &Engine, code: &'static str, says: &[u8]) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    let mut execution = engine.exec(ExecRequest::new("python", code)).await?;
    while let Some(event) = execution.next().await? {
        match event {
            Event::Stdout(bytes) => {
                let time = begin.elapsed();
                ensure!(bytes == says, "a measured exec gave a wrong answer: {bytes:?}");
                return Ok(time);
            }
            Event::Stderr(bytes) => bail!("a measured exec failed: {}", String::from_utf8_lossy(&bytes)),
            Event::End(report) => bail!("a measured exec printed nothing: {:?}", report.outcome),
            Event::Started | Event::File(_) => {}
        }
    }
    bail!("a measured exec gave no end")
}

/// A fresh interpreter, no sandbox at all: start to first byte.
fn fresh(interpreter: &std::path::Path, code: &str, says: &[u8]) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    let mut child = Command::new(interpreter)
        .args(["-c", code])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("start a fresh python3")?;
    let mut output = vec![0; says.len()];
    let read = child.stdout.take().context("its output")?.read_exact(&mut output);
    let time = begin.elapsed();
    let status = child.wait()?;
    read?;
    ensure!(status.success() && output == says, "the fresh python3 gave a wrong answer");
    Ok(time)
}

/// Lets the pool fill up again, so that the next checkout is a pooled one.
pub(crate) async fn wait_for_pool(engine: &Engine) {
    while engine.templates().iter().any(|t| t.pool_ready < t.pool_target) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A pooled checkout against an unpooled fork, and what follows a run: the whole way to a sandbox's end.
pub(crate) async fn pooled_and_not(
    args: &BenchArgs,
    template: &TemplateConfig,
    results: &mut Results,
) -> anyhow::Result<()> {
    let unpooled = start(template, 0, 4).await?;
    let pooled = start(template, 4, 4).await?;
    for _ in 0..2 {
        checked(&unpooled, PRINT, PRINT_SAYS).await?;
    }
    let (mut forks, mut checkouts, mut teardowns) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.repeat {
        let report = checked(&unpooled, PRINT, PRINT_SAYS).await?;
        ensure!(!report.pooled, "an unpooled engine had a pool");
        forks.push(report.fork_time);
        let gone = Instant::now();
        while unpooled.stats().live > 0 {
            tokio::time::sleep(Duration::from_micros(50)).await;
        }
        teardowns.push(gone.elapsed());
        wait_for_pool(&pooled).await;
        let report = checked(&pooled, PRINT, PRINT_SAYS).await?;
        ensure!(report.pooled, "the pool was empty");
        checkouts.push(report.fork_time);
    }
    let fork = results.row("unpooled fork (sandbox ready)", forks);
    let checkout = results.row("pooled checkout (sandbox ready)", checkouts);
    results.row("teardown, off the response path", teardowns);
    results.figure("unpooled fork / pooled checkout, p50", fork / checkout, "times");
    unpooled.shutdown(Duration::from_secs(5)).await;
    pooled.shutdown(Duration::from_secs(5)).await;
    Ok(())
}

/// What HTTP adds: a request on a kept-alive connection against the same exec through the engine itself.
pub(crate) async fn server(args: &BenchArgs, template: &TemplateConfig, results: &mut Results) -> anyhow::Result<()> {
    let engine = start(template, 4, 4).await?;
    let overhead = zeroboot_server::measure_overhead(&engine, &template.name, args.repeat as usize).await?;
    let added = overhead.added_at_median();
    results.row("print(1): through the engine", overhead.direct);
    results.row("print(1): through HTTP", overhead.http);
    results.row("of it, outside of the engine", overhead.added);
    results.figure("added by the server, p50", added.as_secs_f64() * 1e3, "ms");
    engine.shutdown(Duration::from_secs(5)).await;
    Ok(())
}
