//! Cells and commands: `…/run` and `…/commands`.

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode},
    response::Response,
};
use zeroboot_engine::{Attached, Run, RunEvent, RunKind, Sandbox};

use super::follow::{Follow, Gathered, KillOnLeave, follow, gather, raw};
use crate::{
    answer::Text,
    body::{next_bytes, wants_bytes, wants_stream},
    call::Call,
    error::{About, ApiError},
    params::{InPath, InQuery, MOST_OFFSET},
    sandbox_answer::{
        CellAnswer, CellErrorBody, CommandAnswer, CommandBodyOut, CommandList, OutputBody, ResultBody, RunEndBody,
        plain_text,
    },
    sandbox_wire::{CommandBody, Input, RunBody, SignalBody, SizeBody},
};

/// Longest wait of the answer to a background command for its process.
const START: Duration = Duration::from_secs(10);

/// Runs a cell.
pub(crate) async fn run(call: Call, path: InPath, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let sandbox = call.sandbox(&path)?;
    let body: RunBody = call.body(&headers, body).await?;
    let stream = body.stream || wants_stream(&headers);
    let spec = body.into_spec(call.limits())?;
    let started = sandbox.start_attached(spec).await;
    let (run, attached) = started.map_err(|error| ApiError::of_run(error, About::Context))?;
    if stream {
        let kill = KillOnLeave::new(&run, false);
        return Ok(follow(call, Follow { run, attached, about: About::Context, kill, foreground: true }));
    }
    let _foreground = call.app.foreground();
    let gathered = gather(&call, attached, About::Context).await?;
    let Gathered { stdout, stderr, results, error, end, truncated, offset } = gathered;
    let kind = run.status().map(|status| status.kind);
    let context = match &kind {
        Some(RunKind::Cell { context }) => context.as_str(),
        _ => "",
    };
    run.forget();
    let (stdout, stderr) = (Text::of(stdout, truncated), Text::of(stderr, truncated));
    let answer = CellAnswer {
        id: run.id(),
        context,
        end: RunEndBody::of(&end),
        output: OutputBody::of(&stdout, &stderr, truncated, offset),
        value: results.iter().find(|bundle| bundle.main).and_then(|bundle| plain_text(bundle)),
        results: results.iter().map(|bundle| ResultBody(bundle)).collect(),
        error: error.as_deref().map(CellErrorBody::of),
    };
    call.json(StatusCode::OK, &answer)
}

/// Runs a program.
pub(crate) async fn start(call: Call, path: InPath, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let sandbox = call.sandbox(&path)?;
    let body: CommandBody = call.body(&headers, body).await?;
    let (background, stream) = (body.background, body.stream || wants_stream(&headers));
    let end_with_client = body.end_with_client;
    let (spec, input) = body.into_spec(call.limits())?;
    let started = sandbox.start_attached(spec).await;
    let (run, attached) = started.map_err(|error| ApiError::of_run(error, About::Command))?;
    feed(&call, &run, input);
    let kill = KillOnLeave::new(&run, end_with_client && !background);
    if background {
        return in_background(&call, &run, attached).await;
    }
    if stream || wants_bytes(&headers) {
        let what = Follow { run, attached, about: About::Command, kill, foreground: true };
        return if stream { Ok(follow(call, what)) } else { raw(call, what).await };
    }
    let _foreground = call.app.foreground();
    let gathered = gather(&call, attached, About::Command).await?;
    kill.ended();
    let pid = run.status().and_then(|status| status.pid);
    let (stdout, stderr) =
        (Text::of(gathered.stdout, gathered.truncated), Text::of(gathered.stderr, gathered.truncated));
    let answer = CommandAnswer {
        id: run.id(),
        pid,
        end: RunEndBody::of(&gathered.end),
        output: OutputBody::of(&stdout, &stderr, gathered.truncated, gathered.offset),
    };
    if !gathered.truncated {
        run.forget();
    }
    call.json(StatusCode::OK, &answer)
}

/// Gives it its input, as it reads it.
fn feed(call: &Call, run: &Run, input: Option<Input>) {
    let Some(Input { bytes, keep_open }) = input else { return };
    // The input counts as held until it is taken, even if the request is over.
    let (run, share) = (run.clone(), call.share.clone());
    tokio::spawn(async move {
        // A program that reads no more, or has ended, needs no more.
        let written = run.write(bytes).await;
        if !keep_open && written.is_ok() {
            run.close_stdin().unwrap_or_default();
        }
        drop(share);
    });
}

async fn in_background(call: &Call, run: &Run, mut attached: Attached) -> Result<Response, ApiError> {
    // A program that cannot be started is told at once.
    if let Ok(Some((_, RunEvent::End(end)))) = tokio::time::timeout(START, attached.next()).await {
        super::follow::refusal(&end, About::Command)?;
    }
    drop(attached);
    let status = run.status().ok_or_else(ApiError::internal)?;
    call.json(StatusCode::CREATED, &CommandBodyOut::of(&status).ok_or_else(ApiError::internal)?)
}

pub(crate) async fn list(call: Call, path: InPath) -> Result<Response, ApiError> {
    let runs = call.sandbox(&path)?.runs();
    let commands = runs.iter().filter_map(CommandBodyOut::of).collect();
    call.json(StatusCode::OK, &CommandList { commands })
}

pub(crate) async fn show(call: Call, path: InPath) -> Result<Response, ApiError> {
    let run = command(&call.sandbox(&path)?, &path)?;
    let status = run.status().ok_or_else(unknown)?;
    call.json(StatusCode::OK, &CommandBodyOut::of(&status).ok_or_else(unknown)?)
}

fn unknown() -> ApiError {
    ApiError::new("run_not_found", "The sandbox has no command of this id, or has forgotten it")
}

/// The command that the path names.
pub(crate) fn command(sandbox: &Sandbox, path: &InPath) -> Result<Run, ApiError> {
    let run = path.id("run").and_then(|id| sandbox.run(id)).ok_or_else(unknown)?;
    let is_command = |status: &zeroboot_engine::RunStatus| matches!(status.kind, RunKind::Command { .. });
    if run.status().as_ref().is_some_and(is_command) { Ok(run) } else { Err(unknown()) }
}

/// Its output from an offset on, as it comes. Cells have one, too: a client that lost its stream comes back.
pub(crate) async fn output(
    call: Call,
    path: InPath,
    mut query: InQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let offset = query.number("offset", 0..=MOST_OFFSET)?;
    query.end()?;
    let last = headers.get("last-event-id").and_then(|value| value.to_str().ok()?.parse().ok());
    let sandbox = call.sandbox(&path)?;
    let run = path.id("run").and_then(|id| sandbox.run(id)).ok_or_else(unknown)?;
    let attached = run.attach(offset.or(last).unwrap_or(0));
    let kill = KillOnLeave::new(&run, false);
    let what = Follow { run, attached, about: About::Command, kill, foreground: false };
    if wants_bytes(&headers) && !wants_stream(&headers) { raw(call, what).await } else { Ok(follow(call, what)) }
}

pub(crate) async fn stdin(
    call: Call,
    path: InPath,
    mut query: InQuery,
    mut body: Body,
) -> Result<StatusCode, ApiError> {
    let end = query.flag("end")?;
    query.end()?;
    let run = command(&call.sandbox(&path)?, &path)?;
    let failed = |error| ApiError::of_run(error, About::Command);
    // Also an empty input is refused by a command that takes none.
    run.write(bytes::Bytes::new()).await.map_err(failed)?;
    while let Some(data) = next_bytes(&mut body, call.limits()).await? {
        run.write(data).await.map_err(failed)?;
    }
    if end {
        run.close_stdin().map_err(failed)?;
    }
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn signal(call: Call, path: InPath, headers: HeaderMap, body: Body) -> Result<StatusCode, ApiError> {
    let run = command(&call.sandbox(&path)?, &path)?;
    let body: SignalBody = call.body(&headers, body).await?;
    run.signal(body.number()?).map_err(|error| ApiError::of_run(error, About::Command))?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn resize(call: Call, path: InPath, headers: HeaderMap, body: Body) -> Result<StatusCode, ApiError> {
    let run = command(&call.sandbox(&path)?, &path)?;
    let body: SizeBody = call.body(&headers, body).await?;
    run.resize(body.into()).map_err(|error| ApiError::of_run(error, About::Command))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Kills it; one that has ended is forgotten.
pub(crate) async fn kill(call: Call, path: InPath) -> Result<StatusCode, ApiError> {
    let run = command(&call.sandbox(&path)?, &path)?;
    match run.close() {
        Ok(()) => {}
        Err(zeroboot_engine::RunError::Ended) => run.forget(),
        Err(error) => return Err(ApiError::of_run(error, About::Command)),
    }
    Ok(StatusCode::NO_CONTENT)
}
