//! `zeroboot sandbox run`: a cell in a context.

use std::io::Read;

use anyhow::Context;
use hyper::Method;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use super::{
    args::RunArgs,
    client::{Client, full, path},
    events::{Event, Events, cut_off},
    patience, present, print_json,
};
use crate::{hint::hinted, printer};

pub(super) async fn run(client: &Client, args: RunArgs) -> anyhow::Result<u8> {
    let code = match (&args.code, &args.file) {
        (Some(code), _) => code.clone(),
        (None, Some(file)) if file.as_os_str() == "-" => {
            let mut code = String::new();
            std::io::stdin().read_to_string(&mut code).context("read the code from standard input")?;
            code
        }
        (None, Some(file)) => std::fs::read_to_string(file).map_err(|error| {
            hinted(format!("cannot read {}: {error}", file.display()), "name an existing file, or give code with -c")
        })?,
        (None, None) => return Err(hinted("no code was given", "give code with -c 'print(1)', or a file")),
    };
    let body = present([
        ("code", Some(code.into())),
        ("context", args.context.as_deref().map(Value::from)),
        ("timeout_seconds", Some(args.timeout.as_secs_f64().into())),
    ]);
    let to = path(&args.id, &["run"]);
    if args.json {
        let work = client.json_within(Method::POST, &to, Some(&body), Some(patience(args.timeout)));
        let result = work.await?;
        print_json(&result)?;
        return Ok(status(&result));
    }
    let headers = [("content-type", "application/json".to_owned()), ("accept", "text/event-stream".to_owned())];
    let answer = client.send(Method::POST, &to, &headers, full(body.to_string()), Some(patience(args.timeout))).await?;
    let mut events = Events::new(client, client.good(answer).await?);
    let mut interrupts = signal(SignalKind::interrupt()).context("listen for signals")?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for signals")?;
    let mut interrupted = false;
    loop {
        tokio::select! {
            event = events.next() => match event? {
                None => return Err(cut_off()),
                Some(event) if event.name == "end" => {
                    explain(&event, &args);
                    return Ok(status(&event.fields));
                }
                Some(event) => show(&event)?,
            },
            _ = interrupts.recv() => {
                if interrupted {
                    return Ok(130);
                }
                // The code hears it as if it were ours; a second one is for us.
                interrupted = true;
                let context = args.context.as_deref().unwrap_or("default");
                let interrupt = path(&args.id, &["contexts", context, "interrupt"]);
                client.json(Method::POST, &interrupt, None).await?;
            }
            _ = terminate.recv() => return Ok(143),
        }
    }
}

/// Prints what an event has to show.
fn show(event: &Event) -> anyhow::Result<()> {
    match event.name.as_str() {
        "stdout" => printer::stdout(&event.bytes()?)?,
        "stderr" => printer::stderr(&event.bytes()?)?,
        "result" => {
            // As a notebook in a terminal does: what has no text says at least what it is.
            let kinds = || {
                let fields = event.fields.as_object().into_iter().flatten();
                let kinds: Vec<&str> =
                    fields.map(|(name, _)| name.as_str()).filter(|name| name.contains('/')).collect();
                format!("<{}>", kinds.join(", "))
            };
            printer::line(event.text("text/plain").map_or_else(kinds, str::to_owned))?;
        }
        "error" => {
            let traceback = match event.fields.get("traceback") {
                Some(Value::String(text)) => text.clone(),
                Some(Value::Array(lines)) => lines.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("\n"),
                _ => String::new(),
            };
            if traceback.trim().is_empty() {
                let [name, value] = ["name", "value"].map(|name| event.text(name).unwrap_or_default());
                printer::note(format_args!("{name}: {value}"));
            } else {
                printer::note(traceback.trim_end());
            }
        }
        "lost" => {
            printer::note(format_args!("zeroboot: {} bytes of output were lost", super::field(&event.fields, "bytes")))
        }
        _ => {}
    }
    Ok(())
}

/// Says what the code's own output cannot.
fn explain(end: &Event, args: &RunArgs) {
    let lost = end.fields.get("context_lost") == Some(&json!(true));
    let text = match end.text("outcome") {
        Some("deadline_passed") => format!("stopped: the timeout of {:?} passed (--timeout)", args.timeout),
        Some("out_of_memory") => "out of memory".to_owned(),
        Some("ok" | "error" | "interrupted") if !lost => return,
        _ if lost => "the context's interpreter ended".to_owned(),
        _ => return,
    };
    let state = if lost { "; its state is lost, the next run has a new one" } else { "" };
    printer::note(format_args!("zeroboot: {text}{state}"));
}

fn status(end: &Value) -> u8 {
    match end.get("outcome").and_then(Value::as_str) {
        Some("ok") => 0,
        Some("error") => 1,
        Some("interrupted") => 130,
        Some("deadline_passed") => 124,
        _ => 137,
    }
}
