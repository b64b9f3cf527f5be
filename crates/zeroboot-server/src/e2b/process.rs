//! `process.Process`: commands and terminals.

use std::{panic::AssertUnwindSafe, time::Duration};

use axum::{body::Body, http::HeaderMap, response::Response};
use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio::time::Instant;
use tracing::Instrument as _;
use zeroboot_engine::{
    Attached, EndReason, Item, Refusal, Run, RunEnd, RunEvent, RunHow, RunKind, RunSpec, RunStatus, Sandbox, Size,
};

use super::{
    HOME, Target, check_basic_user,
    connect::{Incoming, Outgoing, failed, single, timeout, unary},
    errors::connect_code,
    messages::{
        Data, Empty, End, Event, Input, ListResponse, Output, ProcessAnswer, ProcessConfig, ProcessInfo, ProcessInput,
        ProcessRequest, ProcessSelector, Selector, SendInputRequest, SendSignalRequest, StartRequest, Started,
        StreamInputEvent, StreamInputRequest, Terminal, UpdateRequest,
    },
};
use crate::{
    call::Call,
    error::{About, ApiError},
    routes::follow::refusal,
    sse::Unsent,
};

/// How often a client is told that a silent process lives, unless it asks otherwise.
pub(crate) const KEEP_ALIVE: Duration = Duration::from_secs(90);
/// The shell that the SDKs ask for, and the one that every system has.
const SHELLS: (&str, &str) = ("/bin/bash", "/bin/sh");

fn invalid(text: &str) -> ApiError {
    ApiError::new("invalid_request", text)
}

fn of_run(error: zeroboot_engine::RunError) -> ApiError {
    ApiError::of_run(error, About::Command)
}

/// What the client asks for in seconds.
pub(crate) fn keep_alive(headers: &HeaderMap) -> Duration {
    let asked = headers.get("keepalive-ping-interval").and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
    asked.filter(|seconds| *seconds > 0).map_or(KEEP_ALIVE, |seconds| Duration::from_secs(seconds.into()))
}

fn size(terminal: &Terminal) -> Result<Size, ApiError> {
    let asked = terminal.size.clone().unwrap_or_default();
    let side = |given: u32| u16::try_from(given).map_err(|_| invalid("the terminal is too large"));
    Ok(Size { columns: side(asked.cols)?, rows: side(asked.rows)? })
}

fn spec(request: StartRequest, timeout: Option<Duration>) -> Result<RunSpec, ApiError> {
    let process = request.process.ok_or_else(|| invalid("process is missing"))?;
    let mut argv = vec![process.cmd];
    argv.extend(process.args);
    let cwd = process.cwd.filter(|cwd| !cwd.is_empty()).unwrap_or_else(|| HOME.into());
    let mut env: Vec<(String, String)> = process.envs.into_iter().collect();
    // The home directory is a link: a shell says the name that it was given, and otherwise where it leads.
    if !env.iter().any(|(name, _)| name == "PWD") {
        env.push(("PWD".into(), cwd.clone()));
    }
    let terminal = request.pty.as_ref().map(size).transpose()?;
    Ok(RunSpec::Command {
        argv,
        env,
        cwd: Some(cwd),
        terminal,
        stdin: request.stdin.unwrap_or(true),
        timeout,
        tag: request.tag,
    })
}

/// Starts a process and follows it. It goes on when the client leaves, until it ends or its time is over.
pub(crate) async fn start(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let mut incoming = Incoming::new(&headers, body)?;
    let codec = incoming.codec();
    let begun = async {
        check_basic_user(&headers)?;
        let spec = spec(incoming.only(&call).await?, timeout(&headers)?)?;
        begin(&sandbox, spec).await
    };
    match begun.await {
        Err(error) => Ok(failed(codec, &error)),
        Ok((run, attached, first)) => {
            let (outgoing, response) = Outgoing::open(&call, codec);
            let follow = Follow { run, attached, first: Some(first), until: None, keep_alive: keep_alive(&headers) };
            spawn(call, follow, outgoing);
            Ok(response)
        }
    }
}

/// Waits until it runs. An image without bash has another shell.
async fn begin(sandbox: &Sandbox, spec: RunSpec) -> Result<(Run, Attached, RunEvent), ApiError> {
    let (run, mut attached, first) = first_event(sandbox, spec.clone()).await?;
    let RunEvent::End(end) = &first else { return Ok((run, attached, first)) };
    let missing = matches!(&end.how, RunHow::Refused(Refusal::NotFound | Refusal::CannotStart, _));
    if missing
        && let RunSpec::Command { argv, env, cwd, terminal, stdin, timeout, tag } = spec
        && argv.first().is_some_and(|program| program == SHELLS.0)
    {
        run.forget();
        let argv = std::iter::once(SHELLS.1.to_owned()).chain(argv.into_iter().skip(1)).collect();
        let spec = RunSpec::Command { argv, env, cwd, terminal, stdin, timeout, tag };
        let (run, again, first) = first_event(sandbox, spec).await?;
        attached = again;
        return told(run, attached, first);
    }
    told(run, attached, first)
}

fn told(run: Run, attached: Attached, first: RunEvent) -> Result<(Run, Attached, RunEvent), ApiError> {
    if let RunEvent::End(end) = &first {
        refusal(end, About::Command)?;
    }
    Ok((run, attached, first))
}

async fn first_event(sandbox: &Sandbox, spec: RunSpec) -> Result<(Run, Attached, RunEvent), ApiError> {
    let (run, mut attached) = sandbox.start_attached(spec).await.map_err(of_run)?;
    let (_, first) = attached.next().await.ok_or_else(ApiError::internal)?;
    Ok((run, attached, first))
}

/// Follows a process that was started before, from now on.
pub(crate) async fn connect(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let mut incoming = Incoming::new(&headers, body)?;
    let codec = incoming.codec();
    let found = async {
        let request: ProcessRequest = incoming.only(&call).await?;
        Ok::<_, ApiError>((find(&sandbox, request.process.as_ref())?, timeout(&headers)?))
    };
    match found.await {
        Err(error) => Ok(failed(codec, &error)),
        Ok((run, time)) => {
            let attached = run.attach(u64::MAX);
            let until = time.map(|time| Instant::now() + time);
            let (outgoing, response) = Outgoing::open(&call, codec);
            spawn(call, Follow { run, attached, first: None, until, keep_alive: keep_alive(&headers) }, outgoing);
            Ok(response)
        }
    }
}

struct Follow {
    run: Run,
    attached: Attached,
    first: Option<RunEvent>,
    /// When the client's time is over. A process that this request started has its own deadline.
    until: Option<Instant>,
    keep_alive: Duration,
}

fn spawn(call: Call, follow: Follow, outgoing: Outgoing) {
    let request_id = call.request_id();
    let pump = async move {
        let _foreground = call.app.foreground();
        match AssertUnwindSafe(pass_on(follow, &outgoing)).catch_unwind().await {
            Ok(Ok(())) => outgoing.end(Ok(()), request_id).await,
            Ok(Err(Stop::Left)) => tracing::debug!(%request_id, "the client left, or read too slowly"),
            Ok(Err(Stop::Failed(code, text))) => outgoing.end(Err((code, &text)), request_id).await,
            Err(_panic) => {
                tracing::error!(%request_id, "panic while streaming");
                outgoing.end(Err(("internal", "Internal error")), request_id).await;
            }
        }
    };
    tokio::spawn(pump.in_current_span());
}

/// Why a stream ends before its process.
pub(crate) enum Stop {
    Left,
    Failed(&'static str, String),
}

impl From<Unsent> for Stop {
    fn from(unsent: Unsent) -> Stop {
        match unsent {
            Unsent::Gone => Stop::Left,
            Unsent::Full(full) => Stop::from(full.output_limit()),
        }
    }
}

impl From<ApiError> for Stop {
    fn from(error: ApiError) -> Stop {
        Stop::Failed(connect_code(&error), error.message)
    }
}

async fn pass_on(follow: Follow, outgoing: &Outgoing) -> Result<(), Stop> {
    let Follow { run, mut attached, mut first, until, keep_alive } = follow;
    let terminal = matches!(run.status().map(|status| status.kind), Some(RunKind::Command { terminal: true, .. }));
    let mut alive = tokio::time::interval_at(Instant::now() + keep_alive, keep_alive);
    loop {
        let event = match first.take() {
            Some(event) => event,
            None => tokio::select! {
                next = attached.next() => match next {
                    Some((_, event)) => event,
                    None => return Ok(()),
                },
                () = outgoing.closed() => return Err(Stop::Left),
                _ = alive.tick() => {
                    outgoing.send(&ProcessAnswer::from(Event::Keepalive(Empty {}))).await?;
                    continue;
                }
                () = async { tokio::time::sleep_until(until.unwrap_or_else(Instant::now)).await }, if until.is_some() => {
                    return Err(Stop::Failed("deadline_exceeded", "The time of the request is over".into()));
                }
            },
        };
        match event {
            RunEvent::Started(pid) => {
                outgoing.send(&ProcessAnswer::from(Event::Start(Started { pid: pid.unwrap_or_default() }))).await?;
            }
            RunEvent::Item(Item::Stdout(bytes)) => {
                let output = if terminal { Output::Pty(bytes) } else { Output::Stdout(bytes) };
                outgoing.send(&data(output)).await?;
            }
            RunEvent::Item(Item::Stderr(bytes)) => outgoing.send(&data(Output::Stderr(bytes))).await?,
            // A reader that is there from the start loses nothing, and one that comes later asked for the rest.
            RunEvent::Item(Item::Lost(_) | Item::Result(_) | Item::Error(_)) => {}
            RunEvent::End(end) => {
                let end = ended(&end)?;
                outgoing.send(&ProcessAnswer::from(Event::End(end))).await?;
                drop(attached);
                run.forget();
                return Ok(());
            }
        }
    }
}

fn data(output: Output) -> ProcessAnswer {
    Event::Data(Data { output: Some(output) }).into()
}

/// A process' end, in the words of Go's `os/exec`.
fn ended(end: &RunEnd) -> Result<End, Stop> {
    let killed = |name: String, error: String| End { exit_code: -1, exited: false, status: name, error: Some(error) };
    Ok(match &end.how {
        RunHow::Exited(code) => {
            let status = format!("exit status {code}");
            End { exit_code: *code, exited: true, error: (*code != 0).then(|| status.clone()), status }
        }
        RunHow::Signaled(number) => {
            let name = format!("signal: {}", signal_name(*number));
            killed(name.clone(), name)
        }
        RunHow::OutOfMemory => killed("signal: killed".into(), "signal: killed (the sandbox was out of memory)".into()),
        RunHow::Closed => killed("signal: killed".into(), "signal: killed".into()),
        RunHow::DeadlinePassed => {
            return Err(Stop::Failed(
                "deadline_exceeded",
                "The command's timeout has passed, and it was killed".into(),
            ));
        }
        RunHow::Gone(reason) => return Err(gone(*reason)),
        RunHow::Refused(..) | RunHow::Cell { .. } => {
            refusal(end, About::Command)?;
            return Err(ApiError::internal().into());
        }
    })
}

fn gone(reason: EndReason) -> Stop {
    let text = format!("The connection to the sandbox ended before the stream completed: {}", reason.as_str());
    Stop::Failed("unavailable", text)
}

fn signal_name(number: i32) -> String {
    match number {
        1 => "hangup".into(),
        2 => "interrupt".into(),
        3 => "quit".into(),
        6 => "aborted".into(),
        9 => "killed".into(),
        11 => "segmentation fault".into(),
        13 => "broken pipe".into(),
        15 => "terminated".into(),
        other => format!("signal {other}"),
    }
}

fn not_found() -> ApiError {
    ApiError::new("run_not_found", "No process of the sandbox has this id or tag")
}

/// A command that has not ended.
fn lives(status: &RunStatus) -> bool {
    status.end.is_none() && matches!(status.kind, RunKind::Command { .. })
}

/// The process that a request names.
fn find(sandbox: &Sandbox, selector: Option<&ProcessSelector>) -> Result<Run, ApiError> {
    let selector = selector.and_then(|selector| selector.selector.as_ref());
    let selector = selector.ok_or_else(|| invalid("process names neither a pid nor a tag"))?;
    let is_it = |status: &RunStatus| match (selector, &status.kind) {
        (Selector::Pid(pid), _) => status.pid == Some(*pid),
        (Selector::Tag(wanted), RunKind::Command { tag, .. }) => tag.as_ref() == Some(wanted),
        (Selector::Tag(_), RunKind::Cell { .. }) => false,
    };
    let all = sandbox.runs();
    // The newest: a pid can come back.
    let found = all.iter().rev().find(|status| lives(status) && is_it(status));
    found.and_then(|status| sandbox.run(status.id)).ok_or_else(not_found)
}

pub(crate) async fn list(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    unary(&call, &headers, body, async |_: Empty| {
        let all = sandbox.runs();
        let processes = all.iter().filter(|status| lives(status)).filter_map(|status| match &status.kind {
            RunKind::Command { argv, tag, .. } => {
                let (cmd, args) = argv.split_first()?;
                let config = ProcessConfig { cmd: cmd.clone(), args: args.to_vec(), ..ProcessConfig::default() };
                Some(ProcessInfo { config: Some(config), pid: status.pid?, tag: tag.clone() })
            }
            RunKind::Cell { .. } => None,
        });
        Ok(ListResponse { processes: processes.collect() })
    })
    .await
}

fn bytes(input: Option<ProcessInput>) -> Result<Bytes, ApiError> {
    match input.and_then(|input| input.input) {
        Some(Input::Stdin(bytes) | Input::Pty(bytes)) => Ok(bytes),
        None => Err(invalid("input is missing")),
    }
}

pub(crate) async fn send_input(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    unary(&call, &headers, body, async |request: SendInputRequest| {
        let run = find(&sandbox, request.process.as_ref())?;
        run.write(bytes(request.input)?).await.map_err(of_run)?;
        Ok(Empty {})
    })
    .await
}

/// Input as a stream: the first message names the process.
pub(crate) async fn stream_input(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let mut incoming = Incoming::new(&headers, body)?;
    let codec = incoming.codec();
    let taken = async {
        let mut run = None;
        while let Some(request) = incoming.next::<StreamInputRequest>(&call).await? {
            match (request.event, &run) {
                (Some(StreamInputEvent::Start(start)), None) => run = Some(find(&sandbox, start.process.as_ref())?),
                (Some(StreamInputEvent::Data(data)), Some(run)) => {
                    run.write(bytes(data.input)?).await.map_err(of_run)?;
                }
                (Some(StreamInputEvent::Keepalive(_)), _) => {}
                _ => return Err(invalid("the first message must be start, and no other")),
            }
        }
        Ok(())
    };
    match taken.await {
        Ok(()) => single(codec, &Empty {}),
        Err(error) => Ok(failed(codec, &error)),
    }
}

pub(crate) async fn send_signal(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    unary(&call, &headers, body, async |request: SendSignalRequest| {
        let run = find(&sandbox, request.process.as_ref())?;
        if ![9, 15].contains(&request.signal) {
            return Err(invalid("signal must be SIGNAL_SIGTERM or SIGNAL_SIGKILL"));
        }
        run.signal(request.signal).map_err(of_run)?;
        Ok(Empty {})
    })
    .await
}

pub(crate) async fn update(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    unary(&call, &headers, body, async |request: UpdateRequest| {
        let run = find(&sandbox, request.process.as_ref())?;
        if let Some(terminal) = &request.pty {
            run.resize(size(terminal)?).map_err(of_run)?;
        }
        Ok(Empty {})
    })
    .await
}

pub(crate) async fn close_stdin(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    unary(&call, &headers, body, async |request: ProcessRequest| {
        find(&sandbox, request.process.as_ref())?.close_stdin().map_err(of_run)?;
        Ok(Empty {})
    })
    .await
}
