//! `POST /v1/exec` with `Accept: text/event-stream`.
//!
//! A client that does not read cannot keep the sandbox: see [`crate::sse`].

use std::panic::AssertUnwindSafe;

use axum::response::Response;
use futures_util::FutureExt as _;
use serde::Serialize;
use tokio::time::Instant;
use tracing::Instrument as _;
use uuid::Uuid;
use zeroboot_engine::{Event, ExecRequest};

use crate::{
    answer::{FileBody, Pieces, end_body, milliseconds},
    backend::Run,
    error::ApiError,
    peer::Peer,
    sse::{self, KEEP_ALIVE, Sender, Unsent},
    under_way::{UnderWay, lost},
    wire::Named,
};

/// The event `start`.
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = Start)]
pub(crate) struct StartBody<'a> {
    id: Uuid,
    template: &'a str,
    language: &'a str,
    #[schema(value_type = crate::answer::IsolationName)]
    isolation: &'static str,
    fork_time_ms: f64,
    pooled: bool,
}

/// The event `file`.
#[derive(Serialize)]
struct FileEvent<'a> {
    path: &'a str,
    #[serde(flatten)]
    body: FileBody<'a>,
}

/// Takes a sandbox and answers with its events. An error before the first event is an ordinary error answer.
pub(crate) async fn start(under_way: UnderWay, request: ExecRequest, peer: Peer) -> Result<Response, ApiError> {
    let stall = under_way.app.config.limits.stall_timeout;
    let timeout = request.limits.timeout;
    let run = under_way.begin(request).await?;
    // The engine ends the sandbox at its deadline. This bounds what a client can do that reads, but slowly.
    let until = Instant::now() + timeout + stall * 2;
    let request_id = under_way.request_id;
    let (sender, response) = sse::stream(peer, under_way.share.clone(), stall, Some(until));
    let pump = async move {
        // A panic must not leave the client with a stream that just stops.
        if AssertUnwindSafe(pump(&under_way, run, &sender)).catch_unwind().await.is_err() {
            tracing::error!(%request_id, "panic while streaming");
            sender.last("error", &ApiError::internal(), request_id).await;
        }
    };
    tokio::spawn(pump.in_current_span());
    Ok(response)
}

/// Moves all events. Returning drops the run, which ends its sandbox.
async fn pump(under_way: &UnderWay, run: Run, sender: &Sender) {
    match move_events(under_way, run, sender).await {
        Ok(()) => {}
        Err(Stop::Unsent(Unsent::Gone)) => {
            tracing::info!(request_id = %under_way.request_id, "the client left or read too slowly; sandbox ended");
        }
        Err(Stop::Unsent(Unsent::Full(full))) => {
            sender.last("error", &under_way.refused(full.output_limit()), under_way.request_id).await;
        }
        Err(Stop::Failed(error)) => sender.last("error", &error, under_way.request_id).await,
    }
}

enum Stop {
    Unsent(Unsent),
    Failed(ApiError),
}

impl From<Unsent> for Stop {
    fn from(unsent: Unsent) -> Stop {
        Stop::Unsent(unsent)
    }
}

async fn move_events(under_way: &UnderWay, mut run: Run, sender: &Sender) -> Result<(), Stop> {
    let Named { name: template, language } = &under_way.template;
    let body = StartBody {
        id: run.id(),
        template,
        language,
        isolation: run.isolation().as_str(),
        fork_time_ms: milliseconds(run.fork_time()),
        pooled: run.pooled(),
    };
    sender.send("start", &body).await?;
    let (mut stdout, mut stderr) = (Pieces::default(), Pieces::default());
    let mut alive = tokio::time::interval_at(Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
    loop {
        let event = tokio::select! {
            event = run.next() => event.map_err(|error| Stop::Failed(under_way.failed(error)))?,
            () = sender.closed() => return Err(Unsent::Gone.into()),
            _ = alive.tick() => {
                sender.keep_alive().await?;
                continue;
            }
        };
        match event {
            Some(Event::Started) => {}
            Some(Event::Stdout(bytes)) => {
                if let Some(piece) = stdout.push(&bytes) {
                    sender.send_piece("stdout", None, &piece).await?;
                }
            }
            Some(Event::Stderr(bytes)) => {
                if let Some(piece) = stderr.push(&bytes) {
                    sender.send_piece("stderr", None, &piece).await?;
                }
            }
            Some(Event::File(file)) => {
                sender.send("file", &FileEvent { path: &file.path, body: FileBody::of(&file) }).await?;
            }
            Some(Event::End(report)) if report.lost => {
                return Err(Stop::Failed(under_way.failed(lost())));
            }
            Some(Event::End(report)) => {
                let (id, isolation) = (run.id(), run.isolation());
                under_way.ended(&run, &report);
                // The sandbox is given back before the last words are sent.
                drop(run);
                let cut = crate::answer::is_truncated(report.outcome);
                for (name, pieces) in [("stdout", &mut stdout), ("stderr", &mut stderr)] {
                    if let Some(piece) = pieces.finish().filter(|_| !cut) {
                        sender.send_piece(name, None, &piece).await?;
                    }
                }
                sender.send("end", &end_body(id, &report, isolation, (template, language))).await?;
                return Ok(());
            }
            None => {
                let error = zeroboot_engine::ExecError::Sandbox("no end event".into());
                return Err(Stop::Failed(under_way.failed(error)));
            }
        }
    }
}
