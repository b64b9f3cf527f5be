//! Server-sent events.
//!
//! A task of its own moves events to the connection, so that a client that does not read cannot keep what it reads from:
//! the task gives up after a bounded time and cuts the connection.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use serde::Serialize;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use uuid::Uuid;

use crate::{
    answer::Piece,
    budget::{Full, Share},
    error::ApiError,
    peer::Peer,
};

/// Interval between keep-alives: proxies close connections that are silent for long.
pub(crate) const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Most events that wait for the connection. More would only cost memory: the kernel has its own buffer.
const WAITING: usize = 8;

/// Why an event was not sent.
#[derive(Debug)]
pub(crate) enum Unsent {
    /// The client is gone, or was cut off.
    Gone,
    /// The server has no room to hold it until the client takes it.
    Full(Full),
}

/// The writing end of a stream of events.
pub(crate) struct Sender {
    events: mpsc::Sender<Bytes>,
    stall: Duration,
    /// Bounds what a client can do that reads, but slowly.
    until: Option<Instant>,
    peer: Peer,
    share: Arc<Share>,
}

/// A stream of events, and the answer that it is.
pub(crate) fn stream(peer: Peer, share: Arc<Share>, stall: Duration, until: Option<Instant>) -> (Sender, Response) {
    stream_of(HeaderValue::from_static("text/event-stream"), peer, share, stall, until)
}

/// A stream of something else.
pub(crate) fn stream_of(
    content_type: HeaderValue,
    peer: Peer,
    share: Arc<Share>,
    stall: Duration,
    until: Option<Instant>,
) -> (Sender, Response) {
    let (events, mut receiver) = mpsc::channel::<Bytes>(WAITING);
    let stream = futures_util::stream::poll_fn(move |context| {
        receiver.poll_recv(context).map(|bytes| bytes.map(Ok::<_, Infallible>))
    });
    let headers = [
        (header::CONTENT_TYPE, content_type),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // nginx would hold the events back.
        (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (Sender { events, stall, until, peer, share }, (headers, Body::from_stream(stream)).into_response())
}

impl Sender {
    /// An event, which counts as held until the connection has written or dropped it, and has a clock of its own: also
    /// after the last one was handed over.
    pub(crate) async fn send(&self, name: &str, data: &impl Serialize) -> Result<(), Unsent> {
        self.held(event(name, None, data)?).await
    }

    /// The same, with the id that a client names when it comes back.
    pub(crate) async fn send_at(&self, name: &str, id: u64, data: &impl Serialize) -> Result<(), Unsent> {
        self.held(event(name, Some(id), data)?).await
    }

    /// The same for a piece of a stream.
    pub(crate) async fn send_piece(&self, name: &str, id: Option<u64>, piece: &Piece<'_>) -> Result<(), Unsent> {
        let size = match piece {
            Piece::Text(text) => text.len(),
            Piece::Base64(text) => text.len(),
        };
        // Most text has a few characters that JSON writes as two.
        self.held(event_in(Vec::with_capacity(size + size / 16 + 256), name, id, piece)?).await
    }

    /// Bytes that count as an event does.
    pub(crate) async fn held(&self, bytes: Vec<u8>) -> Result<(), Unsent> {
        let held = self.share.part(&self.peer, bytes).map_err(Unsent::Full)?;
        self.raw(held).await
    }

    /// Something that keeps the connection open.
    pub(crate) async fn keep_alive(&self) -> Result<(), Unsent> {
        self.raw(Bytes::from_static(b": keep-alive\n\n")).await
    }

    async fn raw(&self, bytes: Bytes) -> Result<(), Unsent> {
        let stalled = Instant::now() + self.stall;
        let until = self.until.map_or(stalled, |until| until.min(stalled));
        match timeout_at(until, self.events.send(bytes)).await {
            Ok(sent) => sent.map_err(|_| Unsent::Gone),
            Err(_) => {
                self.peer.cut.notify_one();
                Err(Unsent::Gone)
            }
        }
    }

    /// Returns when the client is gone.
    pub(crate) async fn closed(&self) {
        self.events.closed().await;
    }

    /// The last event, an error under this name. It is small, and is sent whether there is room or not.
    pub(crate) async fn last(&self, name: &str, error: &ApiError, request_id: Uuid) {
        let Ok(text) = event(name, None, &error.body(Some(request_id))) else { return };
        self.last_bytes(text, request_id).await;
    }

    /// Few bytes, the last, sent whether there is room or not.
    pub(crate) async fn last_bytes(&self, bytes: Vec<u8>, request_id: Uuid) {
        let sent = match self.share.part(&self.peer, bytes.clone()) {
            Ok(held) => self.raw(held).await,
            Err(Full) => self.raw(bytes.into()).await,
        };
        if sent.is_err() {
            tracing::debug!(%request_id, "the client left before the stream's last event");
        }
    }
}

fn event(name: &str, id: Option<u64>, data: &impl Serialize) -> Result<Vec<u8>, Unsent> {
    event_in(Vec::with_capacity(256), name, id, data)
}

/// Writes the event into this, which has room for what is known of its size.
fn event_in(mut text: Vec<u8>, name: &str, id: Option<u64>, data: &impl Serialize) -> Result<Vec<u8>, Unsent> {
    text.extend_from_slice(format!("event: {name}\n").as_bytes());
    if let Some(id) = id {
        text.extend_from_slice(format!("id: {id}\n").as_bytes());
    }
    text.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut text, data).map_err(|_| Unsent::Gone)?;
    text.extend_from_slice(b"\n\n");
    Ok(text)
}
