//! Sandboxes that live, through a real server over HTTP, each beside what it is measured by.

mod idle;
mod server;
mod stream;
mod terminal;

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use hyper::Method;
use serde_json::{Value, json};

use self::server::{Sandbox, Server};
use super::Results;
use crate::cli::{BenchArgs, EngineChoice};

/// Clients that ask at once in the measurement of throughput.
const CLIENTS: usize = 4;
/// Sandboxes kept ready.
const POOL: usize = 4;

pub(crate) async fn measure(args: &BenchArgs, engine: EngineChoice, results: &mut Results) -> anyhow::Result<()> {
    let ours = std::env::current_exe().context("find this program")?;
    let server = Server::start(&ours, args, engine, POOL).await?;
    let before = match &args.against {
        Some(program) => Some(Server::start(program, args, engine, POOL).await?),
        None => None,
    };
    one_shots(args, &server, before.as_ref(), results).await?;
    drop(before);
    let one_shot = created(args, &server, results).await?;
    let sandbox = Sandbox::create(&server).await?;
    cells(args, &sandbox, one_shot, results).await?;
    commands(args, &sandbox, results).await?;
    terminal::echo(args, &sandbox, results).await?;
    stream::output(args, &sandbox, results).await?;
    sandbox.end().await?;
    drop(server);
    if args.idle > 0 {
        let server = Server::start(&ours, args, engine, 0).await?;
        idle::sandboxes(args, &server, results).await?;
    }
    Ok(())
}

/// A pooled exec of `print(1)`, checked; gives its time.
async fn one_shot(server: &Server) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    let done = server.client.json(Method::POST, "/v1/exec", Some(&json!({ "code": "print(1)" }))).await?;
    let time = begin.elapsed();
    ensure!(done["stdout"] == "1\n" && done["exit_code"] == 0, "a measured exec gave a wrong answer: {done}");
    Ok(time)
}

/// One-shot execs, of this program and of another, by turns.
async fn one_shots(
    args: &BenchArgs,
    server: &Server,
    before: Option<&Server>,
    results: &mut Results,
) -> anyhow::Result<()> {
    let servers: Vec<_> =
        [Some(("", server)), before.map(|before| (", --against", before))].into_iter().flatten().collect();
    // A template's memory is an image from its second fork on.
    for _ in 0..5 {
        for (_, server) in &servers {
            server.pool_is_full().await?;
            one_shot(server).await?;
        }
    }
    let mut times = vec![Vec::new(); servers.len()];
    for round in 0..args.repeat {
        for at in 0..servers.len() {
            // Neither is always the one behind.
            let at = (at + round as usize) % servers.len();
            let Some(((_, server), times)) = servers.get(at).zip(times.get_mut(at)) else { continue };
            server.pool_is_full().await?;
            times.push(one_shot(server).await?);
        }
    }
    let mut found = Vec::new();
    for ((name, _), times) in servers.iter().zip(times) {
        let p50 = results.row(format!("POST /v1/exec print(1), pooled{name}"), times);
        found.push((p50, results.last_p99()));
    }
    if let [ours, theirs] = found[..] {
        results.figure("one-shot exec / --against, p50", ours.0 / theirs.0, "times");
        results.figure("one-shot exec / --against, p99", ours.1 / theirs.1, "times");
    }
    let mut rates = vec![Vec::new(); servers.len()];
    for _ in 0..5 {
        for ((_, server), rates) in servers.iter().zip(&mut rates) {
            server.pool_is_full().await?;
            rates.push(throughput(server, args.repeat).await?);
        }
    }
    for rates in &mut rates {
        rates.sort_by(f64::total_cmp);
    }
    let medians: Vec<f64> = rates.iter().filter_map(|rates| rates.get(rates.len() / 2).copied()).collect();
    for ((name, _), rate) in servers.iter().zip(&medians) {
        results.figure(format!("execs a second, {CLIENTS} clients, median of 5{name}"), *rate, "1/s");
    }
    if let [ours, theirs] = medians[..] {
        results.figure("execs a second / --against", ours / theirs, "times");
    }
    Ok(())
}

/// Execs a second while several clients ask as fast as they are answered.
async fn throughput(server: &Server, execs: u32) -> anyhow::Result<f64> {
    let begin = Instant::now();
    let each = (execs as usize).div_ceil(CLIENTS);
    let client = || async {
        for _ in 0..each {
            one_shot(server).await?;
        }
        anyhow::Ok(())
    };
    futures_util::future::try_join_all((0..CLIENTS).map(|_| client())).await?;
    Ok((each * CLIENTS) as f64 / begin.elapsed().as_secs_f64())
}

/// Creation from the pool, against a pooled checkout and a request; gives a one-shot exec's p50 of the same run.
async fn created(args: &BenchArgs, server: &Server, results: &mut Results) -> anyhow::Result<f64> {
    let (mut creates, mut shows, mut checkouts, mut execs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.repeat {
        server.pool_is_full().await?;
        let begin = Instant::now();
        let sandbox = Sandbox::create(server).await?;
        creates.push(begin.elapsed());
        ensure!(sandbox.facts["pooled"] == true, "the pool was empty");
        let checkout = sandbox.facts["fork_time_ms"].as_f64().context("a sandbox without fork_time_ms")?;
        checkouts.push(Duration::try_from_secs_f64(checkout / 1e3)?);
        let begin = Instant::now();
        let shown = server.client.json(Method::GET, &sandbox.path(&[]), None).await?;
        shows.push(begin.elapsed());
        ensure!(shown["id"] == sandbox.facts["id"], "another sandbox was shown: {shown}");
        sandbox.end().await?;
        server.pool_is_full().await?;
        execs.push(one_shot(server).await?);
    }
    let create = results.row("POST /v1/sandboxes, from the pool", creates);
    let checkout = results.row("of it, the pooled checkout", checkouts);
    let show = results.row("GET /v1/sandboxes/ID, a request", shows);
    results.figure("create / (checkout + a request), p50; goal 1.2", create / (checkout + show), "times");
    Ok(results.row("POST /v1/exec print(1) beside it", execs))
}

async fn cells(args: &BenchArgs, sandbox: &Sandbox<'_>, one_shot: f64, results: &mut Results) -> anyhow::Result<()> {
    let (path, body) = (sandbox.path(&["run"]), json!({ "code": "1+1" }));
    let mut times = Vec::new();
    for round in 0..args.repeat + 5 {
        let begin = Instant::now();
        let done = sandbox.server.client.json(Method::POST, &path, Some(&body)).await?;
        let time = begin.elapsed();
        ensure!(done["value"] == "2" && done["outcome"] == "ok", "a measured cell gave a wrong answer: {done}");
        if round >= 5 {
            times.push(time);
        }
    }
    let cell = results.row("run(\"1+1\") in a context", times);
    results.figure("a cell / a pooled one-shot exec, p50; goal 0.6", cell / one_shot, "times");
    Ok(())
}

/// `true` in a live sandbox, by turns with the same program outside.
async fn commands(args: &BenchArgs, sandbox: &Sandbox<'_>, results: &mut Results) -> anyhow::Result<()> {
    let (path, body) = (sandbox.path(&["commands"]), json!({ "argv": ["/usr/bin/true"] }));
    let (mut inside, mut outside) = (Vec::new(), Vec::new());
    for _ in 0..args.repeat {
        let begin = Instant::now();
        let done = sandbox.server.client.json(Method::POST, &path, Some(&body)).await?;
        inside.push(begin.elapsed());
        ensure!(done["exit_code"] == 0 && done["outcome"] == "exited", "a measured command failed: {done}");
        let time = tokio::task::spawn_blocking(|| {
            let begin = Instant::now();
            let status = Command::new("/usr/bin/true").stdin(Stdio::null()).status().context("start true")?;
            ensure!(status.success(), "true failed");
            Ok(begin.elapsed())
        });
        outside.push(time.await??);
    }
    let inside = results.row("exec -- true in a live sandbox", inside);
    let outside = results.row("fork and exec of true outside", outside);
    results.figure("exec -- true / fork and exec outside, p50; goal 1.5", inside / outside, "times");
    Ok(())
}

/// A field that must be text.
fn text(fields: &Value, name: &str) -> anyhow::Result<String> {
    fields[name].as_str().map(str::to_owned).with_context(|| format!("an answer without {name}: {fields}"))
}
