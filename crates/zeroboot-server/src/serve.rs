//! The server's life: bind, check, serve, drain, end.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{
    sync::{Semaphore, mpsc, watch},
    time::{Instant, timeout},
};
use zeroboot_engine::Engine;

use crate::{
    app::{self, App},
    backend::Backend,
    config::{ConfigError, Listen, ServerConfig},
    gate::Gate,
    keys::{KeyFileError, KeyRing},
    listen::{Bound, Closing, Connections, Tls, TlsError},
    notify::notify,
};

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The key file.
    #[error(transparent)]
    Keys(#[from] KeyFileError),
    /// The certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// An address.
    #[error("cannot listen on {0}")]
    Bind(Listen, #[source] io::Error),
    /// The SIGHUP handler.
    #[error("cannot handle SIGHUP")]
    Signal(#[source] io::Error),
}

/// A server that is bound and not yet serving.
#[derive(Debug)]
pub struct Server {
    app: Arc<App>,
    bound: Vec<Bound>,
    tls: Option<Arc<Tls>>,
}

/// Binds and serves until `shutdown` is ready, then drains. The engine is shut down with it.
pub async fn serve(config: ServerConfig, engine: Engine, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
    let result = Server::bind(config, engine.clone()).await?.run(shutdown).await;
    engine.shutdown(Duration::from_secs(1)).await;
    result
}

impl Server {
    /// Reads keys and certificates and binds every address. Nothing is answered yet.
    pub async fn bind(config: ServerConfig, engine: Engine) -> Result<Server, ServeError> {
        Server::with_backend(config, Backend::Engine(engine)).await
    }

    pub(crate) async fn with_backend(config: ServerConfig, backend: Backend) -> Result<Server, ServeError> {
        config.check()?;
        let ring = config.keys_file.as_deref().map(load_keys).transpose()?;
        if ring.is_none() {
            tracing::warn!(
                "no keys are configured: everyone who can reach this server can run code; only local addresses are listened on"
            );
        }
        let tls = config.tls.as_ref().map(Tls::load).transpose()?.map(Arc::new);
        let mut bound = Vec::new();
        for listen in &config.listen {
            let made = Bound::bind(listen, config.socket_mode).await;
            bound.push(made.map_err(|error| ServeError::Bind(listen.clone(), error))?);
        }
        let gate = Gate::new(ring, &config.limits);
        Ok(Server { app: Arc::new(App::new(backend, config, gate)), bound, tls })
    }

    /// Where it listens: port 0 has become a number.
    pub fn addresses(&self) -> Vec<Listen> {
        self.bound.iter().filter_map(|bound| bound.address().ok()).collect()
    }

    /// Whether callers need a key.
    pub fn has_keys(&self) -> bool {
        self.app.gate.has_keys()
    }

    /// Serves until `shutdown` is ready, then drains: new execs are refused, those under way may end within the
    /// configured time, then whatever is left is ended. The engine goes on; its owner ends it.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
        let Server { app, bound, tls } = self;
        let mut hangup =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()).map_err(ServeError::Signal)?;
        let addresses: Vec<String> = bound.iter().filter_map(|bound| Some(bound.address().ok()?.to_string())).collect();
        let (close, closing) = watch::channel(Closing::No);
        let (open, mut all_closed) = mpsc::channel::<()>(1);
        let connections = Arc::new(Connections {
            router: app::router(app.clone()),
            limits: app.config.limits.clone(),
            metrics: app.clone(),
            places: Arc::new(Semaphore::new(app.config.limits.max_connections.min(Semaphore::MAX_PERMITS))),
            closing,
            open,
            tls: tls.clone(),
        });
        let mut background = tokio::task::JoinSet::new();
        let canary_app = app.clone();
        let first = canary_app.canaries.results(&app.backend, Duration::ZERO).await;
        for (health, (template, _)) in first.iter().zip(&app.catalog.templates) {
            tracing::info!(template, ready = health.result.is_ok(), "first canary");
        }
        background.spawn(async move {
            loop {
                tokio::time::sleep(canary_app.config.canary_interval).await;
                canary_app.canaries.results(&canary_app.backend, Duration::ZERO).await;
            }
        });
        let budget = app.budget.clone();
        background.spawn(async move { budget.watch().await });
        let reload_app = app.clone();
        background.spawn(async move {
            let mut watched = Watched::new(&reload_app.config);
            loop {
                let asked = tokio::select! {
                    _ = hangup.recv() => true,
                    () = tokio::time::sleep(reload_app.config.reload_interval) => false,
                };
                watched.look(&reload_app, tls.as_deref(), asked);
            }
        });
        for one in bound {
            background.spawn(connections.clone().accept(one));
        }
        drop(connections);
        tracing::info!(?addresses, keys = app.gate.has_keys(), tls = app.config.tls.is_some(), "listening");
        notify("READY=1\nSTATUS=Serving");

        shutdown.await;
        let begun = Instant::now();
        tracing::info!(live = app.backend.stats().live, "shutting down");
        notify("STOPPING=1\nSTATUS=Draining");
        app.draining.store(true, Ordering::SeqCst);
        close.send_replace(Closing::Drain);
        background.abort_all();
        while background.join_next().await.is_some() {}
        let drain = app.config.drain;
        if timeout(drain, all_closed.recv()).await.is_err() {
            tracing::warn!("requests are still under way; ending them");
        }
        // Ending a connection drops its exec, which ends its sandbox.
        close.send_replace(Closing::Now);
        if timeout(Duration::from_secs(5), all_closed.recv()).await.is_err() {
            tracing::warn!("a connection did not end");
        }
        tracing::info!(seconds = begun.elapsed().as_secs_f64(), "ended");
        Ok(())
    }
}

fn load_keys(path: &Path) -> Result<KeyRing, KeyFileError> {
    let ring = KeyRing::load(path)?;
    let file = path.display();
    if ring.is_plain() {
        tracing::warn!(%file, "the key file holds keys in clear; make hashed ones with `zeroboot keys create`");
    }
    if fs::metadata(path).is_ok_and(|metadata| metadata.mode() & 0o007 != 0) {
        tracing::warn!(%file, "every user of this machine can use the key file; chmod 600 it");
    }
    match ring.keys().count() {
        0 => tracing::warn!(%file, "the key file holds no key: nobody can run code"),
        count => tracing::info!(%file, count, "keys read"),
    }
    Ok(ring)
}

/// What tells one state of a file from another.
type Stamp = Option<(u64, u64, i64, i64)>;

fn stamp(path: &Path) -> Stamp {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec()))
}

/// Files that are read again when they change.
struct Watched {
    keys: Option<(PathBuf, Stamp)>,
    tls: Option<([PathBuf; 2], [Stamp; 2])>,
}

impl Watched {
    fn new(config: &ServerConfig) -> Watched {
        let tls = config.tls.as_ref().map(|tls| [tls.cert.clone(), tls.key.clone()]);
        Watched {
            keys: config.keys_file.clone().map(|path| {
                let stamp = stamp(&path);
                (path, stamp)
            }),
            tls: tls.map(|paths| {
                let stamps = [stamp(&paths[0]), stamp(&paths[1])];
                (paths, stamps)
            }),
        }
    }

    /// Reads again what changed, or everything if `asked`.
    fn look(&mut self, app: &App, tls: Option<&Tls>, asked: bool) {
        if let Some((path, last)) = &mut self.keys {
            let now = stamp(path);
            if asked || now != *last {
                *last = now;
                match app.gate.reload(path) {
                    Ok(count) => tracing::info!(count, "keys read again"),
                    Err(error) => failed(app, &error, "the key file cannot be used; the keys read before stay in use"),
                }
            }
        }
        if let (Some((paths, last)), Some(tls)) = (&mut self.tls, tls) {
            let now = [stamp(&paths[0]), stamp(&paths[1])];
            if asked || now != *last {
                *last = now;
                match tls.reload() {
                    Ok(()) => tracing::info!("certificates read again"),
                    Err(error) => failed(app, &error, "the certificates cannot be used; those read before stay in use"),
                }
            }
        }
    }
}

fn failed(app: &App, error: &dyn std::error::Error, text: &'static str) {
    app.metrics.reload_failures.inc();
    let source = error.source().map(tracing::field::display);
    tracing::error!(%error, source, text);
}
