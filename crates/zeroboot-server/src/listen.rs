//! Listening: TCP, TLS and Unix sockets, and one task for each connection.

use std::{
    fs,
    future::poll_fn,
    io::{self, BufReader},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    pin::{Pin, pin},
    sync::{Arc, PoisonError, RwLock},
    task::{Context, Poll},
    time::Duration,
};

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::watch,
    time::{Sleep, sleep, timeout},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{self, pki_types::pem::PemObject as _},
};
use tower::Service as _;

use crate::{
    client_addr::limit_name,
    config::{Listen, RequestLimits, TlsFiles},
    metrics::Metrics,
    peer::Peer,
    places::{Heads, Places},
};

/// Timeout of a TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Most bytes of a request's head.
const MOST_HEAD: usize = 64 * 1024;

/// A bound socket.
#[derive(Debug)]
pub(crate) enum Bound {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// Removes a socket's file when the server ends, if the file is still ours.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode) {
            // Someone else may be quicker; a file that is gone is what we want.
            fs::remove_file(&self.path).unwrap_or_default();
        }
    }
}

impl Bound {
    pub(crate) async fn bind(listen: &Listen, mode: u32) -> io::Result<Bound> {
        match listen {
            Listen::Tcp(address) => Ok(Bound::Tcp(TcpListener::bind(address).await?)),
            Listen::Unix(path) => bind_unix(path, mode),
        }
    }

    /// Where it really listens: port 0 has become a number.
    pub(crate) fn address(&self) -> io::Result<Listen> {
        match self {
            Bound::Tcp(listener) => listener.local_addr().map(Listen::Tcp),
            Bound::Unix(_, file) => Ok(Listen::Unix(file.path.clone())),
        }
    }

    async fn accept(&self) -> io::Result<(Stream, Peer)> {
        match self {
            Bound::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                // Answers are written whole; waiting for more would only cost time.
                stream.set_nodelay(true)?;
                Ok((Stream::Tcp(stream), Peer { ip: Some(address.ip()), ..Peer::default() }))
            }
            Bound::Unix(listener, _) => Ok((Stream::Unix(listener.accept().await?.0), Peer::default())),
        }
    }
}

/// Binds under another name, sets the mode and renames: no process can connect before the mode is right, and a socket that
/// a killed server left behind is replaced. One that still answers is not.
fn bind_unix(path: &Path, mode: u32) -> io::Result<Bound> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"));
        }
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another server listens there"));
        }
        Ok(_) => {}
    }
    let mut hidden = path.as_os_str().to_owned();
    hidden.push(format!(".{}", std::process::id()));
    let hidden = PathBuf::from(hidden);
    match fs::remove_file(&hidden) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&hidden)?;
    let ready = fs::set_permissions(&hidden, fs::Permissions::from_mode(mode))
        .and_then(|()| fs::symlink_metadata(&hidden))
        .and_then(|metadata| fs::rename(&hidden, path).map(|()| metadata.ino()));
    match ready {
        Ok(inode) => Ok(Bound::Unix(listener, SocketFile { path: path.into(), inode })),
        Err(error) => {
            fs::remove_file(&hidden).unwrap_or_default();
            Err(error)
        }
    }
}

/// The certificates now in use. New connections take the newest.
#[derive(Debug)]
pub(crate) struct Tls {
    files: TlsFiles,
    current: RwLock<Arc<rustls::ServerConfig>>,
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] rustls::pki_types::pem::Error),
    /// They do not fit together.
    #[error("the certificate and the key cannot be used")]
    Unfit(#[source] rustls::Error),
}

impl Tls {
    pub(crate) fn load(files: &TlsFiles) -> Result<Tls, TlsError> {
        Ok(Tls { files: files.clone(), current: RwLock::new(read_tls(files)?) })
    }

    pub(crate) fn reload(&self) -> Result<(), TlsError> {
        let new = read_tls(&self.files)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    fn acceptor(&self) -> TlsAcceptor {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone().into()
    }
}

fn read_tls(files: &TlsFiles) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let open = |path: &PathBuf| {
        let file = fs::File::open(path)
            .map_err(|error| TlsError::Read(path.clone(), rustls::pki_types::pem::Error::Io(error)))?;
        Ok::<_, TlsError>(BufReader::new(file))
    };
    let chain = CertificateDer::pem_reader_iter(open(&files.cert)?).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|error| TlsError::Read(files.cert.clone(), error))?;
    let key =
        PrivateKeyDer::from_pem_reader(open(&files.key)?).map_err(|error| TlsError::Read(files.key.clone(), error))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(TlsError::Unfit)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

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

/// A stream whose writes fail if the other side takes nothing for too long.
struct Stalling<I> {
    io: I,
    stall: Duration,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<I> Stalling<I> {
    fn new(io: I, stall: Duration) -> Stalling<I> {
        Stalling { io, stall, timer: None }
    }

    fn watch<T>(&mut self, context: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.timer = None;
            return result;
        }
        let stall = self.stall;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(stall)));
        match timer.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Stalling<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Stalling<I> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write(context, bytes);
        self.watch(context, result)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write_vectored(context, slices);
        self.watch(context, result)
    }
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.io).poll_flush(context);
        self.watch(context, result)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.io).poll_shutdown(context);
        self.watch(context, result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_unix_socket_has_its_mode_replaces_a_stale_one_and_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.sock");
        let first = bind_unix(&path, 0o660).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o660);
        assert_eq!(bind_unix(&path, 0o660).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let Bound::Unix(listener, file) = first else { panic!("not a Unix socket") };
        // As after kill -9: the file stays, nobody listens.
        std::mem::forget(file);
        drop(listener);
        assert!(path.exists());
        let second = bind_unix(&path, 0o600).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        drop(second);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_file_that_is_no_socket_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "mine").unwrap();
        assert!(bind_unix(&path, 0o660).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }
}
