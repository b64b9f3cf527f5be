//! A command's output, many bytes of it, against a pipe between two processes.

use std::{
    io::{Read, Write},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use http_body_util::BodyExt;
use hyper::{Method, body::Incoming};
use serde_json::json;

use super::{Results, server::Sandbox};
use crate::{
    cli::BenchArgs,
    sandbox::{
        client::{empty, full, query},
        events::Events,
    },
};

/// Bytes of the file, which is written out as often as it takes.
const FILE: usize = 8 << 20;
/// Rounds of each way.
const ROUNDS: usize = 3;

/// Lines of text that differ.
fn content() -> Vec<u8> {
    let mut content = Vec::with_capacity(FILE);
    for number in 0..FILE / 64 {
        content.extend_from_slice(format!("{number:020} abcdefghijklmnopqrstuvwxyz 0123456789 \"\\-\n").as_bytes());
    }
    content
}

/// Compares what comes with the file, over and over.
struct Check<'a> {
    content: &'a [u8],
    seen: usize,
}

impl Check<'_> {
    fn take(&mut self, mut bytes: &[u8]) -> anyhow::Result<()> {
        while !bytes.is_empty() {
            let rest = self.content.get(self.seen % self.content.len()..).unwrap_or_default();
            let (now, later) = bytes.split_at(rest.len().min(bytes.len()));
            ensure!(rest.starts_with(now), "the output differs behind byte {}", self.seen);
            self.seen += now.len();
            bytes = later;
        }
        Ok(())
    }

    async fn take_all(&mut self, mut body: Incoming) -> anyhow::Result<()> {
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame?.into_data() {
                self.take(&data)?;
            }
        }
        Ok(())
    }

    fn is_whole(&self, total: usize) -> anyhow::Result<()> {
        ensure!(self.seen == total, "{} bytes instead of {total}", self.seen);
        Ok(())
    }
}

pub(super) async fn output(args: &BenchArgs, sandbox: &Sandbox<'_>, results: &mut Results) -> anyhow::Result<()> {
    let content = content();
    let times = (args.stream_mb as usize * (1 << 20)).div_ceil(FILE);
    let total = times * content.len();
    let client = &sandbox.server.client;
    let put = query(&sandbox.path(&["files"]), &[("path", "big")]);
    let put = client.send(Method::PUT, &put, &[], full(content.clone()), None).await?;
    client.good(put).await?.into_body().collect().await?;
    let mut file = tempfile::NamedTempFile::new().context("make a file")?;
    file.write_all(&content)?;

    let command = json!({ "command": format!("exec cat{}", " big".repeat(times)) }).to_string();
    let start = |accept: &str| {
        let headers = [("content-type", "application/json".to_owned()), ("accept", accept.to_owned())];
        let (path, command) = (sandbox.path(&["commands"]), command.clone());
        async move {
            let answer = client.send(Method::POST, &path, &headers, full(command), None).await?;
            client.good(answer).await
        }
    };
    let mut rates = [const { Vec::new() }; 4];
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        let mut check = Check { content: &content, seen: 0 };
        let mut events = Events::new(client, start("text/event-stream").await?);
        loop {
            let Some(event) = events.next().await? else { bail!("the events ended before the command") };
            match event.name.as_str() {
                "stdout" => check.take(&event.bytes()?)?,
                "started" => {}
                "end" => break ensure!(event.fields["exit_code"] == 0, "cat failed: {}", event.fields),
                other => bail!("an event {other}: {}", event.fields),
            }
        }
        check.is_whole(total)?;
        rates[0].push(begin.elapsed());

        let begin = Instant::now();
        let mut check = Check { content: &content, seen: 0 };
        check.take_all(start("application/octet-stream").await?.into_body()).await?;
        check.is_whole(total)?;
        rates[1].push(begin.elapsed());

        let begin = Instant::now();
        let mut check = Check { content: &content, seen: 0 };
        for _ in 0..times {
            let to = query(&sandbox.path(&["files"]), &[("path", "big")]);
            let answer = client.send(Method::GET, &to, &[], empty(), None).await?;
            check.take_all(client.good(answer).await?.into_body()).await?;
        }
        check.is_whole(total)?;
        rates[2].push(begin.elapsed());

        let (path, content) = (file.path().to_owned(), content.clone());
        rates[3].push(tokio::task::spawn_blocking(move || pipe(&path, &content, times)).await??);
    }
    let best = |times: &[Duration]| {
        let best = times.iter().min().copied().unwrap_or(Duration::MAX);
        total as f64 / f64::from(1 << 20) / best.as_secs_f64()
    };
    let [events, bytes, files, pipe] = rates.map(|times| best(&times));
    results.figure("cat in a sandbox, as events, best of 3", events, "MiB/s");
    results.figure("cat in a sandbox, as bytes, best of 3", bytes, "MiB/s");
    results.figure("files of a sandbox, best of 3", files, "MiB/s");
    results.figure("cat into a pipe outside, best of 3", pipe, "MiB/s");
    results.figure("as bytes / a pipe; goal 0.33", bytes / pipe, "times");
    results.figure("as events / a pipe", events / pipe, "times");
    results.figure("files / a pipe", files / pipe, "times");
    Ok(())
}

/// The same program, with a pipe between it and us.
fn pipe(path: &std::path::Path, content: &[u8], times: usize) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    let mut command = Command::new("cat");
    command.args((0..times).map(|_| path)).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().context("start cat")?;
    let mut output = child.stdout.take().context("its output")?;
    let (mut check, mut buffer) = (Check { content, seen: 0 }, vec![0; 64 * 1024]);
    loop {
        let count = output.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        check.take(buffer.get(..count).unwrap_or_default())?;
    }
    ensure!(child.wait()?.success() && check.seen == content.len() * times, "the local cat failed");
    Ok(begin.elapsed())
}
