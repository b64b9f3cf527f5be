//! `zeroboot sandbox`: long-lived sandboxes on a server.

pub(crate) mod args;
pub(crate) mod client;
mod cp;
pub(crate) mod events;
mod exec;
mod run;
pub(crate) mod shell;

use std::{io, time::Duration};

use anyhow::Context;
use hyper::Method;
use serde_json::{Map, Value, json};

use self::{
    args::{BranchArgs, CheckpointsCommand, ContextsCommand, CreateArgs, SandboxArgs, SandboxCommand},
    client::{Client, checkpoint, path, query},
};
use crate::{hint::hinted, printer};

/// Exit status when the reader of the output has closed it: that of a program that SIGPIPE ends.
pub(crate) const BROKEN_PIPE: u8 = 128 + 13;

/// Runs it; gives the exit status.
pub(crate) fn run(args: SandboxArgs) -> anyhow::Result<u8> {
    let client = Client::new(&args.server.base_url)?;
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let status = tokio.block_on(command(&client, args.command));
    // A thread may still wait for our standard input, which need not come.
    tokio.shutdown_background();
    match status {
        // The reader of our output has seen enough.
        Err(error) if is_broken_pipe(&error) => Ok(BROKEN_PIPE),
        status => status,
    }
}

async fn command(client: &Client, command: SandboxCommand) -> anyhow::Result<u8> {
    match command {
        SandboxCommand::Create(args) => create(client, &args).await?,
        SandboxCommand::Run(args) => return run::run(client, args).await,
        SandboxCommand::Exec(args) => return exec::exec(client, args).await,
        SandboxCommand::Shell(args) => return shell::shell(client, &args).await,
        SandboxCommand::Cp(args) => return cp::cp(client, args).await,
        SandboxCommand::List { labels, json } => list(client, &labels, json).await?,
        SandboxCommand::Show { id, json } => {
            let sandbox = client.json(Method::GET, &path(&id, &[]), None).await?;
            if json { print_json(&sandbox)? } else { show(&sandbox)? }
        }
        SandboxCommand::Extend { id, time, json } => {
            let body = json!({ "timeout_seconds": time.as_secs_f64() });
            let sandbox = client.json(Method::POST, &path(&id, &["extend"]), Some(&body)).await?;
            if json { print_json(&sandbox)? } else { printer::line(field(&sandbox, "expires_at"))? }
        }
        SandboxCommand::Branch(args) => branch(client, &path(&args.id, &["branch"]), &args).await?,
        SandboxCommand::Checkpoint(args) => {
            let body = present([
                ("timeout_seconds", Some(args.timeout.as_secs_f64().into())),
                ("metadata", metadata(&args.labels)),
            ]);
            let made = client.json(Method::POST, &path(&args.id, &["checkpoints"]), Some(&body)).await?;
            if args.json { print_json(&made)? } else { printer::line(field(&made, "id"))? }
        }
        SandboxCommand::Checkpoints(command) => return checkpoints(client, command).await,
        SandboxCommand::Restore(args) => branch(client, &checkpoint(&args.id, &["restore"]), &args).await?,
        SandboxCommand::Rollback { id, checkpoint, json } => {
            let body = present([("checkpoint_id", checkpoint.map(Value::from))]);
            let sandbox = client.json(Method::POST, &path(&id, &["rollback"]), Some(&body)).await?;
            if json {
                print_json(&sandbox)?;
            }
        }
        SandboxCommand::Promote { id, json } => {
            let sandbox = client.json(Method::POST, &path(&id, &["promote"]), None).await?;
            if json { print_json(&sandbox)? } else { printer::line(field(&sandbox, "id"))? }
        }
        SandboxCommand::Rm { ids } => return remove(client, &ids, path).await,
        SandboxCommand::Contexts(command) => contexts(client, command).await?,
        SandboxCommand::Ps { id, json } => processes(client, &id, json).await?,
        SandboxCommand::Logs { id, command, offset } => return exec::logs(client, &id, &command, offset).await,
        SandboxCommand::Kill { id, command, signal } => {
            let body = exec::signal(&signal);
            client.json(Method::POST, &path(&id, &["commands", &command, "signal"]), Some(&body)).await?;
        }
    }
    Ok(0)
}

/// Makes sandboxes that begin at another one, or at a checkpoint.
async fn branch(client: &Client, path: &str, args: &BranchArgs) -> anyhow::Result<()> {
    let body = present([
        ("count", Some(args.count.into())),
        ("timeout_seconds", Some(args.timeout.as_secs_f64().into())),
        ("metadata", metadata(&args.labels)),
    ]);
    let answer = client.json(Method::POST, path, Some(&body)).await?;
    let branches = answer.get("sandboxes").cloned().unwrap_or_default();
    if args.json {
        return print_json(&branches);
    }
    for branch in branches.as_array().into_iter().flatten() {
        printer::line(field(branch, "id"))?;
    }
    Ok(())
}

async fn checkpoints(client: &Client, command: CheckpointsCommand) -> anyhow::Result<u8> {
    match command {
        CheckpointsCommand::List { id, json } => {
            let pairs: Vec<_> = id.iter().map(|id| ("sandbox_id", id.as_str())).collect();
            let answer = client.json(Method::GET, &query("/v1/checkpoints", &pairs), None).await?;
            let all = answer.get("checkpoints").cloned().unwrap_or_default();
            if json {
                print_json(&all)?;
                return Ok(0);
            }
            printer::line(format_args!("{:<38} {:<38} {:>8} {:<9} LABELS", "ID", "SANDBOX", "MIB", "ENDS IN"))?;
            for one in all.as_array().into_iter().flatten() {
                let [id, of] = ["id", "sandbox_id"].map(|name| field(one, name));
                let bytes = one.get("memory_bytes").and_then(Value::as_u64).unwrap_or(0);
                let (ends, labels) = (ends_in(one), labels_of(one));
                let line = format!("{id:<38} {of:<38} {:>8} {ends:<9} {labels}", bytes.div_ceil(1 << 20));
                printer::line(line.trim_end())?;
            }
        }
        CheckpointsCommand::Show { id, json } => {
            let one = client.json(Method::GET, &checkpoint(&id, &[]), None).await?;
            if json { print_json(&one)? } else { show(&one)? }
        }
        CheckpointsCommand::Rm { ids } => return remove(client, &ids, checkpoint).await,
    }
    Ok(0)
}

fn metadata(labels: &[(String, String)]) -> Option<Value> {
    let labels: Map<String, Value> = labels.iter().map(|(key, value)| (key.clone(), value.as_str().into())).collect();
    (!labels.is_empty()).then(|| labels.into())
}

async fn create(client: &Client, args: &CreateArgs) -> anyhow::Result<()> {
    let body = present([
        ("template", args.template.as_deref().map(Value::from)),
        ("language", args.runtime.map(|runtime| runtime.name().into())),
        ("timeout_seconds", Some(args.timeout.as_secs_f64().into())),
        ("idle_timeout_seconds", args.idle_timeout.map(|time| time.as_secs_f64().into())),
        ("env", environment(&args.env)?),
        ("metadata", metadata(&args.labels)),
        ("memory_mb", args.memory.map(|bytes| bytes.div_ceil(1 << 20).into())),
        ("processes", args.processes.map(Value::from)),
    ]);
    let sandbox = client.json(Method::POST, "/v1/sandboxes", Some(&body)).await?;
    if args.json {
        return print_json(&sandbox);
    }
    printer::line(field(&sandbox, "id"))?;
    Ok(())
}

async fn list(client: &Client, labels: &[(String, String)], as_json: bool) -> anyhow::Result<()> {
    let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let mut all: Vec<Value> = Vec::new();
    let mut cursor: Option<String> = None;
    loop {
        let mut pairs: Vec<(&str, &str)> = labels.iter().map(|label| ("metadata", label.as_str())).collect();
        pairs.extend(cursor.as_deref().map(|cursor| ("cursor", cursor)));
        let page = client.json(Method::GET, &query("/v1/sandboxes", &pairs), None).await?;
        all.extend(page.get("sandboxes").and_then(Value::as_array).cloned().unwrap_or_default());
        match page.get("next_cursor").and_then(Value::as_str) {
            Some(next) if Some(next) != cursor.as_deref() => cursor = Some(next.to_owned()),
            _ => break,
        }
    }
    if as_json {
        return print_json(&Value::Array(all));
    }
    printer::line(format_args!("{:<38} {:<12} {:<8} {:<9} LABELS", "ID", "TEMPLATE", "ENGINE", "ENDS IN"))?;
    for sandbox in &all {
        let [id, template, isolation] = ["id", "template", "isolation"].map(|name| field(sandbox, name));
        let (ends, labels) = (ends_in(sandbox), labels_of(sandbox));
        let line = format!("{id:<38} {template:<12} {isolation:<8} {ends:<9} {labels}");
        printer::line(line.trim_end())?;
    }
    Ok(())
}

fn labels_of(sandbox: &Value) -> String {
    let labels = sandbox.get("metadata").and_then(Value::as_object);
    let pairs = labels.into_iter().flatten().map(|(key, value)| format!("{key}={}", plain(value)));
    pairs.collect::<Vec<_>>().join(" ")
}

fn ends_in(sandbox: &Value) -> String {
    let Ok(end) = field(sandbox, "expires_at").parse::<jiff::Timestamp>() else { return "?".into() };
    let seconds = end.duration_since(jiff::Timestamp::now()).as_secs().max(0);
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
    }
}

/// One line a field.
fn show(sandbox: &Value) -> io::Result<()> {
    let first = ["id", "sandbox_id", "template", "language", "isolation", "state", "created_at", "expires_at"];
    let place = |name: &str| first.iter().position(|known| *known == name).unwrap_or(first.len());
    let mut fields: Vec<_> = sandbox.as_object().into_iter().flatten().collect();
    fields.sort_by_key(|(name, _)| place(name));
    for (name, value) in fields {
        let text = match value {
            Value::Null => "-".to_owned(),
            Value::Object(fields) => {
                let pairs: Vec<String> = fields.iter().map(|(key, value)| format!("{key}={}", plain(value))).collect();
                if pairs.is_empty() { "-".to_owned() } else { pairs.join(" ") }
            }
            value => plain(value),
        };
        printer::line(format_args!("{:<21} {text}", name.replace('_', " ")))?;
    }
    Ok(())
}

async fn remove(client: &Client, ids: &[String], path: fn(&str, &[&str]) -> String) -> anyhow::Result<u8> {
    let mut failed = Ok(0);
    for id in ids {
        if let Err(error) = client.json(Method::DELETE, &path(id, &[]), None).await {
            // All are tried; the last one that failed is told by our caller.
            if let Err(earlier) = std::mem::replace(&mut failed, Err(error.context(format!("remove {id}")))) {
                printer::error(&earlier, None);
            }
        }
    }
    failed
}

async fn contexts(client: &Client, command: ContextsCommand) -> anyhow::Result<()> {
    match command {
        ContextsCommand::List { id, json } => {
            let answer = client.json(Method::GET, &path(&id, &["contexts"]), None).await?;
            let contexts = answer.get("contexts").cloned().unwrap_or_default();
            if json {
                return print_json(&contexts);
            }
            printer::line(format_args!("{:<20} {:<8} {:>7} {:>5}  CWD", "NAME", "STATE", "WAITING", "RUNS"))?;
            for context in contexts.as_array().into_iter().flatten() {
                let [name, waiting, runs, cwd] =
                    ["name", "waiting", "executions", "cwd"].map(|name| field(context, name));
                let state = if context.get("busy") == Some(&Value::Bool(true)) { "busy" } else { "idle" };
                printer::line(format_args!("{name:<20} {state:<8} {waiting:>7} {runs:>5}  {cwd}"))?;
            }
        }
        ContextsCommand::Create { id, name, cwd } => {
            let body = present([("name", name.map(Value::from)), ("cwd", cwd.map(Value::from))]);
            let context = client.json(Method::POST, &path(&id, &["contexts"]), Some(&body)).await?;
            printer::line(field(&context, "name"))?;
        }
        ContextsCommand::Interrupt { id, name } => {
            client.json(Method::POST, &path(&id, &["contexts", &name, "interrupt"]), None).await?;
        }
        ContextsCommand::Restart { id, name } => {
            client.json(Method::POST, &path(&id, &["contexts", &name, "restart"]), None).await?;
        }
        ContextsCommand::Rm { id, name } => {
            client.json(Method::DELETE, &path(&id, &["contexts", &name]), None).await?;
        }
    }
    Ok(())
}

async fn processes(client: &Client, id: &str, as_json: bool) -> anyhow::Result<()> {
    let answer = client.json(Method::GET, &path(id, &["commands"]), None).await?;
    let commands = answer.get("commands").cloned().unwrap_or_default();
    if as_json {
        return print_json(&commands);
    }
    printer::line(format_args!("{:<38} {:>7} {:<16} {:<12} COMMAND", "ID", "PID", "STATE", "TAG"))?;
    for command in commands.as_array().into_iter().flatten() {
        let [id, pid, tag] = ["id", "pid", "tag"].map(|name| field(command, name));
        let state = match (command.get("exit_code"), field(command, "outcome").as_str()) {
            (Some(code), "exited") => format!("exited {}", plain(code)),
            (_, "") => field(command, "state"),
            (_, outcome) => outcome.to_owned(),
        };
        let argv: Vec<String> =
            command.get("argv").and_then(Value::as_array).into_iter().flatten().map(plain).collect();
        // What is not ours to print as it is: the sandbox's words could steer a terminal.
        let argv = argv.join(" ").replace(|c: char| c.is_control(), "?");
        printer::line(format_args!("{id:<38} {pid:>7} {state:<16} {tag:<12} {argv}"))?;
    }
    Ok(())
}

/// Environment variables, as `KEY=VALUE`, or `KEY` alone for one of ours.
fn environment(pairs: &[String]) -> anyhow::Result<Option<Value>> {
    let mut env = Map::new();
    for pair in pairs {
        let (key, value) = match pair.split_once('=') {
            Some((key, value)) => (key, value.to_owned()),
            None => match std::env::var(pair) {
                Ok(value) => (pair.as_str(), value),
                Err(_) => return Err(hinted(format!("our environment has no {pair}"), "write KEY=VALUE")),
            },
        };
        env.insert(key.into(), value.into());
    }
    Ok((!env.is_empty()).then(|| env.into()))
}

/// An object of the fields that are there.
fn present<const N: usize>(fields: [(&str, Option<Value>); N]) -> Value {
    fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect::<Map<_, _>>().into()
}

fn print_json(value: &Value) -> anyhow::Result<()> {
    printer::line(serde_json::to_string(value)?)?;
    Ok(())
}

/// A field of an answer as text; nothing if it is not there.
fn field(value: &Value, name: &str) -> String {
    value.get(name).filter(|value| !value.is_null()).map(plain).unwrap_or_default()
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// How long to wait for the answer to something that may take this time.
fn patience(time: Duration) -> Duration {
    time.saturating_add(client::PATIENCE)
}
