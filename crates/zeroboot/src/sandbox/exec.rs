//! `zeroboot sandbox exec`: a program, its streams and its exit status.

use anyhow::Context;
use bytes::Bytes;
use hyper::Method;
use serde_json::{Value, json};
use tokio::{
    signal::unix::{Signal, SignalKind, signal as listen},
    sync::mpsc,
};

use super::{
    args::ExecArgs,
    client::{Client, empty, full, path, query},
    environment,
    events::{Event, Events, cut_off},
    field, patience, present, print_json,
};
use crate::{hint::hinted, printer, run::read_stdin};

pub(super) async fn exec(client: &Client, args: ExecArgs) -> anyhow::Result<u8> {
    let mut argv = Vec::new();
    for arg in &args.argv {
        let text = arg.to_str().with_context(|| format!("argument {arg:?} is not valid UTF-8"))?;
        argv.push(Value::from(text));
    }
    let attached = !args.detach && !args.json;
    let body = present([
        ("argv", Some(argv.into())),
        ("cwd", args.cwd.as_deref().map(Value::from)),
        ("env", environment(&args.env)?),
        ("timeout_seconds", args.timeout.map(|time| time.as_secs_f64().into())),
        ("tag", args.tag.as_deref().map(Value::from)),
        ("background", args.detach.then(|| true.into())),
        ("keep_stdin_open", attached.then(|| true.into())),
        ("end_with_client", (!args.detach).then(|| true.into())),
    ]);
    let commands = path(&args.id, &["commands"]);
    if args.detach {
        let command = client.json(Method::POST, &commands, Some(&body)).await?;
        printer::line(field(&command, "id"))?;
        return Ok(0);
    }
    if args.json {
        let work = client.json_within(Method::POST, &commands, Some(&body), args.timeout.map(patience));
        let result = work.await?;
        print_json(&result)?;
        return Ok(status(&result));
    }
    let headers = [("content-type", "application/json".to_owned()), ("accept", "text/event-stream".to_owned())];
    let answer = client.send(Method::POST, &commands, &headers, full(body.to_string()), None).await?;
    let mut events = Events::new(client, client.good(answer).await?);
    let id = match events.next().await? {
        Some(event) if event.name == "started" => field(&event.fields, "id"),
        Some(event) if event.name == "end" => return ended(&event, &args),
        _ => return Err(cut_off()),
    };
    let command = |what: &str| path(&args.id, &["commands", &id, what]);
    let mut follow = std::pin::pin!(follow(&mut events, &args));
    let mut feed = std::pin::pin!(feed(client, command("stdin")));
    let mut fed = false;
    let mut signals = Signals::new()?;
    loop {
        tokio::select! {
            // What it wrote and its end are looked at first: input that it does not take is not a failure.
            biased;
            status = &mut follow => return status,
            signal = signals.next() => {
                // The program hears it as if it were ours, and ends or does not.
                let sent = client.json(Method::POST, &command("signal"), Some(&json!({ "signal": signal }))).await;
                if !sent.as_ref().is_err_and(is_over) {
                    sent?;
                }
            }
            done = &mut feed, if !fed => {
                fed = true;
                if !done.as_ref().is_err_and(is_over) {
                    done?;
                }
            }
        }
    }
}

/// The output of a command, from a byte on.
pub(super) async fn logs(client: &Client, id: &str, command: &str, offset: u64) -> anyhow::Result<u8> {
    let to = query(&path(id, &["commands", command, "output"]), &[("offset", &offset.to_string())]);
    let headers = [("accept", "text/event-stream".to_owned())];
    let answer = client.send(Method::GET, &to, &headers, empty(), Some(super::client::PATIENCE)).await?;
    let mut events = Events::new(client, client.good(answer).await?);
    let mut signals = Signals::new()?;
    loop {
        tokio::select! {
            event = events.next() => match event? {
                None => return Err(cut_off()),
                Some(event) if event.name == "end" => return Ok(status(&event.fields)),
                Some(event) => show(&event)?,
            },
            // We only listen.
            signal = signals.next() => return Ok(128 + signal),
        }
    }
}

async fn follow(events: &mut Events<'_>, args: &ExecArgs) -> anyhow::Result<u8> {
    loop {
        match events.next().await? {
            None => return Err(cut_off()),
            Some(event) if event.name == "end" => return ended(&event, args),
            Some(event) => show(&event)?,
        }
    }
}

/// Our standard input, to its end.
async fn feed(client: &Client, to: String) -> anyhow::Result<()> {
    let mut chunks: mpsc::Receiver<Bytes> = read_stdin();
    let headers = [("content-type", "application/octet-stream".to_owned())];
    while let Some(chunk) = chunks.recv().await {
        // Without a deadline: the program takes it when it likes.
        let answer = client.send(Method::POST, &to, &headers, full(chunk), None).await?;
        client.good(answer).await?;
    }
    let answer = client.send(Method::POST, &query(&to, &[("end", "true")]), &headers, empty(), None).await?;
    client.good(answer).await?;
    Ok(())
}

/// The command ended before it heard us, or does not listen: its end is on its way.
fn is_over(error: &anyhow::Error) -> bool {
    let code = error.downcast_ref::<super::client::Refused>().map(|refused| refused.code.as_str());
    matches!(code, Some("run_ended" | "run_not_found" | "no_stdin"))
}

fn show(event: &Event) -> anyhow::Result<()> {
    let lost = || format!("zeroboot: {} bytes of output were lost", field(&event.fields, "bytes"));
    let written = match event.name.as_str() {
        "stdout" => printer::stdout(&event.bytes()?),
        "stderr" => printer::stderr(&event.bytes()?),
        "lost" => printer::stderr(format!("{}\n", lost()).as_bytes()),
        _ => Ok(()),
    };
    match written {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(hinted(format!("cannot write the output: {error}"), "check whether the disk is full"))
        }
        written => Ok(written?),
    }
}

fn ended(end: &Event, args: &ExecArgs) -> anyhow::Result<u8> {
    match end.text("outcome") {
        Some("deadline_passed") => {
            let timeout = args.timeout.map_or_else(String::new, |time| format!(" of {time:?}"));
            printer::note(format_args!("zeroboot: stopped: the timeout{timeout} passed (--timeout)"));
        }
        Some("out_of_memory") => printer::note("zeroboot: out of memory: the limit is the sandbox's"),
        _ => {}
    }
    Ok(status(&end.fields))
}

pub(super) fn status(end: &Value) -> u8 {
    let code = end.get("exit_code").and_then(Value::as_u64).and_then(|code| u8::try_from(code).ok());
    code.unwrap_or(match end.get("outcome").and_then(Value::as_str) {
        Some("deadline_passed") => 124,
        _ => 137,
    })
}

/// The body that asks for a signal by name or number.
pub(super) fn signal(word: &str) -> Value {
    match word.parse::<u32>() {
        Ok(number) => json!({ "signal": number }),
        Err(_) => {
            let name = word.to_ascii_uppercase();
            json!({ "signal": if name.starts_with("SIG") { name } else { format!("SIG{name}") } })
        }
    }
}

/// The signals that are passed on.
struct Signals {
    interrupt: Signal,
    quit: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Signals> {
        let listen = |kind| listen(kind).context("listen for signals");
        Ok(Signals {
            interrupt: listen(SignalKind::interrupt())?,
            quit: listen(SignalKind::quit())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    /// The number of the next one.
    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 2,
            _ = self.quit.recv() => 3,
            _ = self.terminate.recv() => 15,
            _ = self.hangup.recv() => 1,
        }
    }
}
