//! Listening: TCP, TLS and Unix sockets, and one task for each connection.

mod bind;
mod stalling;
mod tls;

use std::{future::poll_fn, pin::pin, sync::Arc, time::Duration};

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
    time::{sleep, timeout},
};
use tower::Service as _;

pub use self::tls::TlsError;
pub(crate) use self::{bind::Bound, tls::Tls};
use self::{bind::Stream, stalling::Stalling};
use crate::{
    client_addr::limit_name,
    config::RequestLimits,
    metrics::Metrics,
    peer::Peer,
    places::{Heads, Places},
};

/// Timeout of a TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Most bytes of a request's head.
const MOST_HEAD: usize = 64 * 1024;

/// How far the server's end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Closing {
    No,
    /// Connections end after the request that they are at.
    Drain,
    /// Connections end.
    Now,
}

/// What every connection shares.
pub(crate) struct Connections {
    pub(crate) router: Router,
    pub(crate) limits: RequestLimits,
    pub(crate) metrics: Arc<crate::app::App>,
    pub(crate) tls: Option<Arc<Tls>>,
    pub(crate) places: Arc<Places>,
    /// Whether connections shall end, and how soon.
    pub(crate) closing: watch::Receiver<Closing>,
    /// Every connection holds a clone: when all are gone, the channel is closed.
    pub(crate) open: tokio::sync::mpsc::Sender<()>,
}

impl Connections {
    fn metrics(&self) -> &Metrics {
        &self.metrics.metrics
    }

    /// Accepts until the server closes.
    pub(crate) async fn accept(self: Arc<Self>, bound: Bound) {
        let mut closing = self.closing.clone();
        loop {
            let next = async {
                // Room first: connections above the limit wait in the kernel's queue, not in our memory.
                let room = self.places.room().await;
                bound.accept().await.map(|accepted| (room, accepted))
            };
            let accepted = tokio::select! {
                accepted = next => accepted,
                _ = closing.wait_for(|closing| *closing != Closing::No) => return,
            };
            match accepted {
                Ok((room, (stream, peer))) => {
                    let proxies = &self.metrics.config.trusted_proxies;
                    let ip = peer.ip.filter(|ip| !proxies.iter().any(|network| network.contains(&ip.to_canonical())));
                    // Without a place it is closed at once: its address has all that it may have.
                    if let Some(place) = room.enter(ip.map(|ip| limit_name(Some(ip)))) {
                        let place = Arc::new(place);
                        let peer = Peer { visit: place.visit.clone(), _place: Some(place), ..peer };
                        tokio::spawn(self.clone().connection(stream, peer));
                    }
                }
                Err(error) => {
                    // Out of descriptors, for example. Trying again at once would only burn the CPU.
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    async fn connection(self: Arc<Self>, stream: Stream, peer: Peer) {
        let _entered = self.metrics().connection();
        let visit = peer.visit.clone();
        tokio::select! {
            () = self.connected(stream, peer) => {}
            () = visit.ended() => tracing::debug!("a connection without a key is ended"),
        }
    }

    async fn connected(&self, stream: Stream, peer: Peer) {
        let stall = self.limits.stall_timeout;
        match stream {
            Stream::Unix(stream) => self.serve(Stalling::new(stream, stall), peer, false).await,
            Stream::Tcp(stream) => match &self.tls {
                None => self.serve(Stalling::new(stream, stall), peer, false).await,
                Some(tls) => match timeout(HANDSHAKE, tls.acceptor().accept(Stalling::new(stream, stall))).await {
                    Ok(Ok(stream)) => {
                        let two = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                        self.serve(stream, peer, two).await;
                    }
                    Ok(Err(error)) => tracing::debug!(%error, "TLS handshake failed"),
                    Err(_) => tracing::debug!("TLS handshake took too long"),
                },
            },
        }
    }

    async fn serve<I: AsyncRead + AsyncWrite + Unpin + Send + 'static>(&self, io: I, peer: Peer, two: bool) {
        let (cut, after) = (peer.cut.clone(), peer.after.clone());
        let router = self.router.clone();
        let busy = peer.visit.clone();
        let service = hyper::service::service_fn({
            let busy = busy.clone();
            move |mut request: hyper::Request<hyper::body::Incoming>| {
                request.extensions_mut().insert(peer.clone());
                let under_way = busy.enter();
                let answer = router.clone().call(request);
                async move {
                    let answer = answer.await;
                    drop(under_way);
                    answer
                }
            }
        });
        let io = TokioIo::new(Heads { io, visit: (!two).then(|| busy.clone()) });
        let open = self.open.clone();
        let phase = |wanted: Closing| {
            let mut closing = self.closing.clone();
            // An error means that the server is gone altogether, which is closing as well.
            async move { closing.wait_for(|phase| *phase >= wanted).await.map(drop).unwrap_or_default() }
        };
        macro_rules! drive {
            ($connection:expr) => {{
                let mut connection = pin!($connection);
                // Whatever it had to write is written when it waits.
                macro_rules! run {
                    () => {
                        poll_fn(|context| {
                            let poll = connection.as_mut().poll(context);
                            after.write();
                            poll
                        })
                    };
                }
                let ended = async {
                    tokio::select! {
                        () = cut.notified() => {}
                        () = phase(Closing::Now) => {}
                    }
                };
                let ending = async {
                    tokio::select! {
                        () = phase(Closing::Drain) => true,
                        () = busy.idle_for(self.limits.header_timeout), if two => busy.ever(),
                    }
                };
                tokio::select! {
                    result = async {
                        tokio::select! {
                            result = run!() => result,
                            graceful = ending => {
                                if !graceful {
                                    // Not even HTTP/2's first words came: nothing that could be closed gracefully.
                                    return Ok(());
                                }
                                connection.as_mut().graceful_shutdown();
                                run!().await
                            }
                        }
                    } => result,
                    () = ended => return,
                }
            }};
        }
        let result = if two {
            let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .keep_alive_interval(self.limits.header_timeout)
                .max_concurrent_streams(128)
                .max_header_list_size(MOST_HEAD as u32);
            drive!(builder.serve_connection(io, service))
        } else {
            let mut builder = hyper::server::conn::http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(self.limits.header_timeout).max_buf_size(MOST_HEAD);
            drive!(builder.serve_connection(io, service).with_upgrades())
        };
        drop(open);
        if let Err(error) = result {
            tracing::debug!(%error, "connection ended");
        }
    }
}
