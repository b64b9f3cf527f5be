//! `zeroboot run -i`: the interpreter's own prompt, in a sandbox of its own, on our terminal.

use std::time::Duration;

use anyhow::Context;
use rustix::{stdio::stdin, termios::isatty};
use tokio::signal::unix::{SignalKind, signal};
use zeroboot_engine::{
    Attached, EndReason, Engine, EngineConfig, ExecRequest, Item, Run, RunEnd, RunEvent, RunHow, RunSpec, Sandbox,
    SandboxBounds, SandboxLimits, SandboxSpec, Size,
};

use crate::{
    hint::hinted,
    printer,
    run::read_stdin,
    terminal::{Raw, Signals, size},
};

/// A prompt needs somebody who types.
pub(super) fn check() -> anyhow::Result<()> {
    if isatty(stdin()) {
        return Ok(());
    }
    Err(hinted(
        "-i: standard input is not a terminal",
        "without -i, `zeroboot run` runs the code that is piped into it",
    ))
}

/// Gives the exit status of the interpreter. `request`: what runs before the prompt, its files, environment and limits.
pub(super) fn run(mut config: EngineConfig, request: ExecRequest, language: &str) -> anyhow::Result<u8> {
    // It ends with its interpreter or with us, not with a lease.
    let lease = SandboxBounds::default().max_lease;
    config.sandboxes = SandboxBounds { most: 1, memory: config.max_memory, checkpoints: 0, max_lease: lease };
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let status = tokio.block_on(async {
        let mut signals = Signals::new()?;
        let work = async {
            let engine = Engine::start(config).await?;
            let status = session(&engine, request, language, lease).await;
            engine.shutdown(Duration::from_secs(1)).await;
            status
        };
        tokio::select! {
            status = work => status,
            // Dropping the work kills the sandbox and its zygote, and our terminal is what it was.
            _ = signals.interrupt.recv() => Ok(130),
            _ = signals.terminate.recv() => Ok(143),
            _ = signals.hangup.recv() => Ok(129),
        }
    });
    // A thread still waits for our standard input.
    tokio.shutdown_background();
    status
}

async fn session(engine: &Engine, request: ExecRequest, language: &str, lease: Duration) -> anyhow::Result<u8> {
    let defaults = SandboxLimits::default();
    let limits = SandboxLimits { memory: request.limits.memory, processes: request.limits.processes, ..defaults };
    let spec = SandboxSpec { env: request.env.clone(), limits, lease, ..SandboxSpec::new(request.template.clone()) };
    let sandbox = engine.create(spec).await?;
    for file in &request.files {
        put(&sandbox, &file.path, file.data.clone()).await?;
    }
    let named = !matches!(request.name.as_str(), "" | "-" | "-c");
    if named {
        put(&sandbox, &request.name, request.code.clone()).await?;
    }
    let (columns, rows) = size();
    let command = RunSpec::Command {
        argv: argv(&request, language, named)?,
        env: Vec::new(),
        cwd: None,
        terminal: Some(Size { columns, rows }),
        stdin: true,
        timeout: None,
        tag: None,
    };
    let (run, attached) = sandbox.start_attached(command).await?;
    let end = follow(&run, attached).await?;
    let status = match end.how {
        RunHow::Exited(code) => u8::try_from(code).unwrap_or(1),
        RunHow::Signaled(signal) => 128u8.saturating_add(u8::try_from(signal).unwrap_or(0)),
        RunHow::OutOfMemory => {
            printer::note(format_args!("zeroboot: out of memory: the limit is {} MiB (--memory)", limits.memory >> 20));
            137
        }
        RunHow::Refused(_, why) => {
            return Err(hinted(
                format!("the interpreter does not start: {why}"),
                "`zeroboot doctor` shows what this host can do",
            ));
        }
        RunHow::Gone(EndReason::Lost) => {
            printer::note("zeroboot: the sandbox crashed");
            137
        }
        _ => 137,
    };
    sandbox.end(EndReason::Requested).await;
    Ok(status)
}

async fn put(sandbox: &Sandbox, path: &str, data: bytes::Bytes) -> anyhow::Result<()> {
    let mut file =
        sandbox.write(path.to_owned(), None).await.with_context(|| format!("put {path} into the sandbox"))?;
    file.write(data).await.with_context(|| format!("put {path} into the sandbox"))?;
    file.finish().await.with_context(|| format!("put {path} into the sandbox"))?;
    Ok(())
}

/// The interpreter as a user would start it.
fn argv(request: &ExecRequest, language: &str, named: bool) -> anyhow::Result<Vec<String>> {
    let code = std::str::from_utf8(&request.code).context("the code is not UTF-8")?;
    let node = language == "node";
    let mut argv: Vec<String> = if node { vec!["node".into()] } else { vec!["python3".into(), "-q".into()] };
    argv.push("-i".into());
    if named {
        if node {
            // Node has no prompt behind a file.
            argv.extend(["-r".into(), format!("./{}", request.name)]);
        } else {
            argv.push(request.name.clone());
        }
    } else if !code.is_empty() {
        argv.extend([if node { "-e" } else { "-c" }.into(), code.into()]);
    }
    argv.extend(request.args.iter().cloned());
    Ok(argv)
}

/// Passes on what is typed and shown until the interpreter ends.
async fn follow(run: &Run, mut attached: Attached) -> anyhow::Result<RunEnd> {
    let mut resume =
        signal(SignalKind::from_raw(rustix::process::Signal::CONT.as_raw())).context("listen for signals")?;
    let mut resized = signal(SignalKind::window_change()).context("listen for signals")?;
    // From here on no message is ours to print before it is dropped.
    let raw = Raw::new()?;
    let mut typed = read_stdin();
    let mut keyboard = true;
    loop {
        tokio::select! {
            biased;
            event = attached.next() => match event {
                Some((_, RunEvent::Item(Item::Stdout(bytes) | Item::Stderr(bytes)))) => printer::stdout(&bytes)?,
                Some((_, RunEvent::End(end))) => return Ok(end),
                Some(_) => {}
                None => anyhow::bail!("the interpreter gave no end"),
            },
            chunk = typed.recv(), if keyboard => match chunk {
                // What cannot be sent is no failure yet: the end is on its way to us.
                Some(chunk) => keyboard = run.write(chunk).await.is_ok(),
                // Our own terminal was hung up.
                None => {
                    keyboard = false;
                    let _ended = run.close();
                }
            },
            _ = resized.recv() => {
                let (columns, rows) = size();
                let _ended = run.resize(Size { columns, rows });
            }
            _ = resume.recv() => raw.set()?,
        }
    }
}
