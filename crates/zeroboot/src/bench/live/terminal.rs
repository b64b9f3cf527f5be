//! A letter typed on a terminal until a program has written it back.

use std::{
    fs::File,
    io::{Read, Write},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use tokio_tungstenite::tungstenite::Message;

use super::{Results, server::Sandbox};
use crate::{
    cli::BenchArgs,
    sandbox::{client::query, shell},
};

/// The terminal passes each letter on at once, and a program writes it back.
const ECHO: &str = "stty raw -echo; printf ready; exec cat";
const READY: &[u8] = b"ready";

pub(super) async fn echo(args: &BenchArgs, sandbox: &Sandbox<'_>, results: &mut Results) -> anyhow::Result<()> {
    let to = query(&sandbox.path(&["terminal"]), &[("command", ECHO), ("end_with_client", "true")]);
    let mut socket = shell::open(&sandbox.server.client, &to).await?;
    let mut local = Local::open()?;
    let mut seen = Vec::new();
    while seen != READY {
        match socket.next().await {
            Some(Ok(Message::Binary(bytes))) => seen.extend_from_slice(&bytes),
            Some(Ok(_)) => {}
            other => bail!("the terminal is not ready: {other:?}, {seen:?}"),
        }
    }
    let (mut remote, mut beside) = (Vec::new(), Vec::new());
    for round in 0..args.repeat {
        let letter = b'a' + u8::try_from(round % 26)?;
        let begin = Instant::now();
        socket.send(Message::Binary(Bytes::copy_from_slice(&[letter]))).await?;
        loop {
            match socket.next().await {
                Some(Ok(Message::Binary(bytes))) => {
                    remote.push(begin.elapsed());
                    ensure!(*bytes == [letter], "the terminal wrote {bytes:?} back");
                    break;
                }
                Some(Ok(_)) => {}
                other => bail!("the terminal ended: {other:?}"),
            }
        }
        let typed;
        (local, typed) = tokio::task::spawn_blocking(move || local.echo(letter)).await??;
        beside.push(typed);
    }
    drop(socket);
    results.row("terminal of a sandbox: a letter and its echo", remote);
    let remote = results.last_p99();
    results.row("local terminal: the same", beside);
    results.figure("a sandbox's terminal beside a local one, p99; goal 2", remote - results.last_p99(), "ms more");
    Ok(())
}

/// The same program on a terminal of this host.
struct Local {
    terminal: File,
    program: std::process::Child,
}

impl Local {
    fn open() -> anyhow::Result<Local> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = openpt(flags).context("open a terminal")?;
        grantpt(&ours)?;
        unlockpt(&ours)?;
        let theirs = ioctl_tiocgptpeer(&ours, flags)?;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", ECHO]).stdin(theirs.try_clone()?).stdout(theirs).stderr(Stdio::null());
        let program = command.spawn().context("start a shell")?;
        let mut local = Local { terminal: File::from(ours), program };
        let mut seen = [0; READY.len()];
        local.terminal.read_exact(&mut seen).context("wait for the local terminal")?;
        ensure!(seen == READY, "the local terminal said {seen:?}");
        Ok(local)
    }

    fn echo(mut self, letter: u8) -> anyhow::Result<(Local, Duration)> {
        let begin = Instant::now();
        self.terminal.write_all(&[letter])?;
        let mut back = [0];
        self.terminal.read_exact(&mut back)?;
        let time = begin.elapsed();
        ensure!(back == [letter], "the local terminal wrote {back:?} back");
        Ok((self, time))
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        // It may have ended.
        self.program.kill().unwrap_or_default();
        self.program.wait().map(drop).unwrap_or_default();
    }
}
