//! A run's events: gathered into one answer, or passed on as they come.

use std::{panic::AssertUnwindSafe, sync::Arc};

use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio::time::Instant;
use tracing::Instrument as _;
use zeroboot_engine::{Attached, CellError, Item, MimeBundle, Run, RunEnd, RunEvent, RunHow};

use crate::{
    answer::{Piece, Pieces},
    app::Foreground,
    call::Call,
    error::{About, ApiError},
    sandbox_answer::{CellErrorBody, LostBody, ResultBody, RunEndBody, StartedBody},
    sse::{self, KEEP_ALIVE, Sender, Unsent},
};

/// The header of an answer that is a run's bytes alone: whose.
pub(crate) const RUN_ID: &str = "zeroboot-run-id";
/// Most bytes of all results of one answer.
const MOST_RESULTS: u64 = 64 * 1024 * 1024;

/// Kills a run whose client leaves before its end, if it was asked to.
pub(crate) struct KillOnLeave(Option<Run>);

impl KillOnLeave {
    pub(crate) fn new(run: &Run, wanted: bool) -> KillOnLeave {
        KillOnLeave(wanted.then(|| run.clone()))
    }

    pub(crate) fn ended(mut self) {
        self.0 = None;
    }
}

impl Drop for KillOnLeave {
    fn drop(&mut self) {
        if let Some(run) = self.0.take() {
            // It may have ended meanwhile.
            run.close().unwrap_or_default();
        }
    }
}

/// An end that is an error for the caller: nothing was run, or the sandbox is gone.
pub(crate) fn refusal(end: &RunEnd, about: About) -> Result<(), ApiError> {
    match &end.how {
        RunHow::Gone(reason) => Err(ApiError::gone(*reason)),
        RunHow::Refused(refusal, text) => Err(ApiError::refused(*refusal, text, about)),
        _ => Ok(()),
    }
}

/// All that a run wrote and showed.
pub(crate) struct Gathered {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) results: Vec<Arc<MimeBundle>>,
    pub(crate) error: Option<Arc<CellError>>,
    pub(crate) end: RunEnd,
    /// There was more than there is room for.
    pub(crate) truncated: bool,
    pub(crate) offset: u64,
}

/// Waits for its end. What one answer cannot hold is left out, and that is said.
pub(crate) async fn gather(call: &Call, mut attached: Attached, about: About) -> Result<Gathered, ApiError> {
    let most = call.limits().max_output;
    let (mut stdout, mut stderr, mut results, mut error) = (Vec::new(), Vec::new(), Vec::new(), None);
    let (mut truncated, mut output, mut shown) = (false, 0_u64, 0_u64);
    while let Some((offset, event)) = attached.next().await {
        match event {
            RunEvent::Started(_) => {}
            RunEvent::Item(Item::Stdout(bytes)) => {
                truncated |= !take(call, &mut stdout, &bytes, &mut output, most);
            }
            RunEvent::Item(Item::Stderr(bytes)) => {
                truncated |= !take(call, &mut stderr, &bytes, &mut output, most);
            }
            RunEvent::Item(Item::Result(bundle)) => {
                let size = bundle.parts.iter().map(|(_, data)| data.len() as u64).sum::<u64>();
                // It is held here and, in base64, in the answer.
                if shown + size <= MOST_RESULTS && call.share.grow(size).is_ok() {
                    shown += size;
                    results.push(bundle);
                } else {
                    truncated = true;
                }
            }
            RunEvent::Item(Item::Error(found)) => error = Some(found),
            RunEvent::Item(Item::Lost(_)) => truncated = true,
            RunEvent::End(end) => {
                refusal(&end, about)?;
                return Ok(Gathered { stdout, stderr, results, error, end, truncated, offset });
            }
        }
    }
    Err(ApiError::internal())
}

/// As many of these bytes as there is room for; whether that is all.
fn take(call: &Call, into: &mut Vec<u8>, bytes: &Bytes, output: &mut u64, most: u64) -> bool {
    let room = usize::try_from(most.saturating_sub(*output)).unwrap_or(usize::MAX).min(bytes.len());
    if room == 0 || call.share.grow(room as u64).is_err() {
        return bytes.is_empty();
    }
    *output += room as u64;
    into.extend_from_slice(bytes.get(..room).unwrap_or_default());
    room == bytes.len()
}

/// What is followed, and how.
pub(crate) struct Follow {
    pub(crate) run: Run,
    pub(crate) attached: Attached,
    pub(crate) about: About,
    pub(crate) kill: KillOnLeave,
    /// The server waits for it when it ends.
    pub(crate) foreground: bool,
}

/// Passes its events on: `started`, `stdout`, `stderr`, `result`, `error`, `lost`, `end`; or, instead of `end`, `failure`.
/// Each has as its id the offset to go on from.
pub(crate) fn follow(call: Call, follow: Follow) -> Response {
    let stall = call.limits().stall_timeout;
    let (sender, response) = sse::stream(call.peer().clone(), call.share.clone(), stall, None);
    let request_id = call.request_id();
    let foreground = follow.foreground.then(|| call.app.foreground());
    let pump = async move {
        // A panic must not leave the client with a stream that just stops.
        if AssertUnwindSafe(pump(&call, follow, foreground, &sender)).catch_unwind().await.is_err() {
            tracing::error!(%request_id, "panic while streaming");
            sender.last("failure", &ApiError::internal(), request_id).await;
        }
    };
    tokio::spawn(pump.in_current_span());
    response
}

/// Answers with what it writes to standard output, byte for byte, as it comes. That it cannot be started is an error;
/// whatever else hinders the whole of it cuts the answer off. Its end is told by `GET …/commands/{id}`.
pub(crate) async fn raw(call: Call, follow: Follow) -> Result<Response, ApiError> {
    let Follow { run, mut attached, about, kill, foreground } = follow;
    let foreground = foreground.then(|| call.app.foreground());
    let mut first = attached.next().await;
    if let Some((_, RunEvent::End(end))) = &first {
        refusal(end, about)?;
    }
    let id = HeaderValue::from_str(&run.id().to_string()).map_err(|_| ApiError::internal())?;
    let broken = |text: &str| std::io::Error::other(text.to_owned());
    let state = (call, attached, kill, foreground);
    let bytes = futures_util::stream::try_unfold(state, move |(call, mut attached, kill, foreground)| {
        let first = first.take();
        async move {
            let mut ahead = first;
            loop {
                let next = match ahead.take() {
                    Some(first) => Some(first),
                    None => attached.next().await,
                };
                let bytes = match next {
                    None => return Ok(None),
                    Some((_, RunEvent::End(end))) => {
                        kill.ended();
                        return match refusal(&end, about) {
                            Ok(()) => Ok(None),
                            Err(_) => Err(broken("the sandbox has ended")),
                        };
                    }
                    Some((_, RunEvent::Item(Item::Lost(_)))) => return Err(broken("output was lost")),
                    Some((_, RunEvent::Item(Item::Stdout(bytes)))) => bytes,
                    Some(_) => continue,
                };
                let held = call.share.part(call.peer(), bytes).map_err(|_| broken("the server holds too much"))?;
                return Ok(Some((held, (call, attached, kill, foreground))));
            }
        }
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (HeaderName::from_static(RUN_ID), id),
    ];
    Ok((headers, Body::from_stream(bytes)).into_response())
}

async fn pump(call: &Call, follow: Follow, _foreground: Option<Foreground>, sender: &Sender) {
    let Follow { run, mut attached, about, kill, .. } = follow;
    match pass_on(&run, &mut attached, sender, about).await {
        Ok(()) => kill.ended(),
        Err(Stop::Unsent(Unsent::Gone)) => {
            tracing::debug!(request_id = %call.request_id(), "the client left, or read too slowly");
        }
        Err(Stop::Unsent(Unsent::Full(full))) => sender.last("failure", &full.output_limit(), call.request_id()).await,
        Err(Stop::Failed(error)) => {
            kill.ended();
            sender.last("failure", &error, call.request_id()).await;
        }
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

/// Text of the two streams. A character that is split is held back, but never behind something else: an event's id is the
/// offset to go on from.
#[derive(Default)]
struct Streams {
    held: Pieces,
    of: Option<&'static str>,
}

impl Streams {
    /// What goes ahead of an event of `name`.
    fn switch(&mut self, name: Option<&'static str>) -> Option<(&'static str, Piece<'static>)> {
        if self.of == name {
            return None;
        }
        let of = std::mem::replace(&mut self.of, name)?;
        Some((of, self.held.finish()?))
    }
}

async fn pass_on(run: &Run, attached: &mut Attached, sender: &Sender, about: About) -> Result<(), Stop> {
    let mut alive = tokio::time::interval_at(Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
    let mut streams = Streams::default();
    let mut before = 0;
    loop {
        let next = tokio::select! {
            next = attached.next() => next,
            () = sender.closed() => return Err(Unsent::Gone.into()),
            _ = alive.tick() => {
                sender.keep_alive().await?;
                continue;
            }
        };
        let Some((offset, event)) = next else { return Ok(()) };
        let name = match &event {
            RunEvent::Item(Item::Stdout(_)) => Some("stdout"),
            RunEvent::Item(Item::Stderr(_)) => Some("stderr"),
            _ => None,
        };
        if let Some((of, piece)) = streams.switch(name) {
            sender.send_piece(of, Some(before), &piece).await?;
        }
        match event {
            RunEvent::Started(pid) => sender.send_at("started", offset, &StartedBody { id: run.id(), pid }).await?,
            RunEvent::Item(Item::Stdout(bytes) | Item::Stderr(bytes)) => {
                let piece = streams.held.push(&bytes);
                let sent = offset - streams.held.held() as u64;
                if let Some(piece) = piece {
                    sender.send_piece(name.unwrap_or_default(), Some(sent), &piece).await?;
                }
            }
            RunEvent::Item(Item::Result(bundle)) => sender.send_at("result", offset, &ResultBody(&bundle)).await?,
            RunEvent::Item(Item::Error(error)) => sender.send_at("error", offset, &CellErrorBody::of(&error)).await?,
            RunEvent::Item(Item::Lost(bytes)) => sender.send_at("lost", offset, &LostBody { bytes }).await?,
            RunEvent::End(end) => {
                refusal(&end, about).map_err(Stop::Failed)?;
                sender.send_at("end", offset, &RunEndBody::of(&end)).await?;
                return Ok(());
            }
        }
        before = offset;
    }
}
