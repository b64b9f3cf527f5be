//! `POST /v1/exec` with `Accept: text/event-stream`.
//!
//! A task of its own moves events from the sandbox to the connection, so that a client that does not read cannot keep
//! the sandbox: the task gives up after a bounded time, ends the sandbox, and cuts the connection.

use std::{convert::Infallible, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::FutureExt as _;
use serde::Serialize;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tracing::Instrument as _;
use uuid::Uuid;
use zeroboot_engine::{Event, ExecRequest};

use crate::{
    answer::{FileBody, Pieces, end_body, milliseconds},
    app::Peer,
    backend::Run,
    budget::{Full, Share},
    error::ApiError,
    routes::exec::UnderWay,
};

/// Proxies close connections on which nothing comes for long.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Events that may wait for the connection. More would only be memory: the kernel has a buffer of its own.
const WAITING: usize = 8;

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
    let (events, mut receiver) = mpsc::channel::<Bytes>(WAITING);
    let request_id = under_way.request_id;
    let sender = Sender { events, stall, until, peer, share: under_way.share.clone() };
    let pump = async move {
        // A panic must not leave the client with a stream that just stops.
        if AssertUnwindSafe(pump(&under_way, run, &sender)).catch_unwind().await.is_err() {
            tracing::error!(%request_id, "panic while streaming");
            sender.last(&ApiError::internal(), request_id).await;
        }
    };
    tokio::spawn(pump.in_current_span());
    let stream = futures_util::stream::poll_fn(move |context| {
        receiver.poll_recv(context).map(|bytes| bytes.map(Ok::<_, Infallible>))
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // nginx would hold the events back.
        (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    Ok((headers, Body::from_stream(stream)).into_response())
}

/// Why an event was not sent.
#[derive(Debug)]
enum Unsent {
    /// The client is gone, or was cut off.
    Gone,
    /// There is no room to hold it until it is taken.
    Full(Full),
}

struct Sender {
    events: mpsc::Sender<Bytes>,
    stall: Duration,
    until: Instant,
    peer: Peer,
    share: Arc<Share>,
}

impl Sender {
    /// An event, which counts as held until the connection has written or dropped it, and has a clock of its own: also
    /// after the last one was handed over.
    async fn send(&self, name: &str, data: &impl Serialize) -> Result<(), Unsent> {
        let held = self.share.part(&self.peer, event(name, data)?).map_err(Unsent::Full)?;
        self.raw(held).await
    }

    async fn raw(&self, bytes: Bytes) -> Result<(), Unsent> {
        let until = self.until.min(Instant::now() + self.stall);
        match timeout_at(until, self.events.send(bytes)).await {
            Ok(sent) => sent.map_err(|_| Unsent::Gone),
            Err(_) => {
                self.peer.cut.notify_one();
                Err(Unsent::Gone)
            }
        }
    }

    /// The event `error`. It is small, and is sent whether there is room or not.
    async fn last(&self, error: &ApiError, request_id: Uuid) {
        let Ok(text) = event("error", &error.body(Some(request_id))) else { return };
        let sent = match self.share.part(&self.peer, text.clone()) {
            Ok(held) => self.raw(held).await,
            Err(Full) => self.raw(text.into()).await,
        };
        if sent.is_err() {
            tracing::debug!(%request_id, "the client left before the stream's last event");
        }
    }
}

fn event(name: &str, data: &impl Serialize) -> Result<Vec<u8>, Unsent> {
    let mut text = format!("event: {name}\ndata: ").into_bytes();
    serde_json::to_writer(&mut text, data).map_err(|_| Unsent::Gone)?;
    text.extend_from_slice(b"\n\n");
    Ok(text)
}

/// Moves all events. Returning drops the run, which ends its sandbox.
async fn pump(under_way: &UnderWay, run: Run, sender: &Sender) {
    match move_events(under_way, run, sender).await {
        Ok(()) => {}
        Err(Stop::Unsent(Unsent::Gone)) => {
            tracing::info!(request_id = %under_way.request_id, "the client left or read too slowly; sandbox ended");
        }
        Err(Stop::Unsent(Unsent::Full(full))) => {
            sender.last(&under_way.refused(full.output_limit()), under_way.request_id).await;
        }
        Err(Stop::Failed(error)) => sender.last(&error, under_way.request_id).await,
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
    let app = &under_way.app;
    let (template, language) = app.catalog.get(under_way.template);
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
            () = sender.events.closed() => return Err(Unsent::Gone.into()),
            _ = alive.tick() => {
                sender.raw(Bytes::from_static(b": keep-alive\n\n")).await?;
                continue;
            }
        };
        match event {
            Some(Event::Started) => {}
            Some(Event::Stdout(bytes)) => {
                if let Some(piece) = stdout.push(&bytes) {
                    sender.send("stdout", &piece).await?;
                }
            }
            Some(Event::Stderr(bytes)) => {
                if let Some(piece) = stderr.push(&bytes) {
                    sender.send("stderr", &piece).await?;
                }
            }
            Some(Event::File(file)) => {
                sender.send("file", &FileEvent { path: &file.path, body: FileBody::of(&file) }).await?;
            }
            Some(Event::End(report)) if report.lost => {
                return Err(Stop::Failed(under_way.failed(super::exec::lost())));
            }
            Some(Event::End(report)) => {
                let (id, isolation) = (run.id(), run.isolation());
                under_way.ended(&run, &report);
                // The sandbox is given back before the last words are sent.
                drop(run);
                let cut = crate::answer::is_truncated(report.outcome);
                for (name, pieces) in [("stdout", &mut stdout), ("stderr", &mut stderr)] {
                    if let Some(piece) = pieces.finish().filter(|_| !cut) {
                        sender.send(name, &piece).await?;
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
