//! The server's life: bind, check, serve, drain, end.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout, timeout_at},
};
use zeroboot_engine::{Engine, Isolation};

use crate::{
    app::App,
    backend::Backend,
    config::{ConfigError, Listen, ServerConfig},
    gate::Gate,
    keys::{KeyFileError, KeyRing},
    listen::{Bound, Closing, Connections, Tls, TlsError},
    notify::Manager,
    places::Places,
    router,
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
    watched: Watched,
    manager: Manager,
}

/// Interval between canaries while no template has run code yet.
const TRY_AGAIN: Duration = Duration::from_secs(1);
/// Interval at which a server that ends checks for running execs.
const LOOK: Duration = Duration::from_millis(10);

impl Server {
    /// Reads keys and certificates and binds every address. Nothing is answered yet.
    pub async fn bind(config: ServerConfig, engine: Engine) -> Result<Server, ServeError> {
        Server::with_backend(config, Backend::Engine(engine)).await
    }

    pub(crate) async fn with_backend(config: ServerConfig, backend: Backend) -> Result<Server, ServeError> {
        config.check()?;
        // Before the files are read: what changes from now on is seen as a change.
        let watched = Watched::new(&config);
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
        let shares_kernel = backend.templates().iter().any(|template| template.isolation == Isolation::Process);
        if let Some(reason) = backend.cgroup_obstacle().filter(|_| shares_kernel && ring.is_some()) {
            tracing::warn!(reason, "{}", crate::routes::status::NO_CGROUP);
        }
        let gate = Gate::new(ring, &config.limits, backend.stats());
        let app = Arc::new(App::new(backend, config, gate));
        Ok(Server { app, bound, tls, watched, manager: Manager::of_env() })
    }

    /// Where it listens: port 0 has become a number.
    pub fn addresses(&self) -> Vec<Listen> {
        self.bound.iter().filter_map(|bound| bound.address().ok()).collect()
    }

    /// Waits until a template has run code: from then on [`Server::run`] serves.
    pub fn ready(&self) -> impl Future<Output = ()> + use<> {
        self.app.canaries.passed()
    }

    /// Whether callers need a key.
    pub fn has_keys(&self) -> bool {
        self.app.gate.has_keys()
    }

    /// Serves until `shutdown` is ready, then drains: new execs are refused, those under way may end within the
    /// configured time, then whatever is left is ended. The engine goes on; its owner ends it.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
        let Server { app, bound, tls, mut watched, manager } = self;
        let manager = Arc::new(manager);
        let mut hangup =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()).map_err(ServeError::Signal)?;
        let addresses: Vec<String> = bound.iter().filter_map(|bound| Some(bound.address().ok()?.to_string())).collect();
        let (close, closing) = watch::channel(Closing::No);
        let (open, mut all_closed) = mpsc::channel::<()>(1);
        let connections = Arc::new(Connections {
            router: router::router(app.clone()),
            limits: app.config.limits.clone(),
            metrics: app.clone(),
            places: Places::new(app.config.limits.max_connections, app.config.limits.connections_per_address()),
            closing,
            open,
            tls: tls.clone(),
        });
        let mut background = tokio::task::JoinSet::new();
        let places = connections.places.clone();
        background.spawn(async move { places.tidy().await });
        let budget = app.budget.clone();
        background.spawn(async move { budget.watch().await });
        let reload_app = app.clone();
        background.spawn(async move {
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
        background.spawn(prove(app.clone(), manager.clone()));
        tracing::info!(?addresses, keys = app.gate.has_keys(), tls = app.config.tls.is_some(), "listening");

        shutdown.await;
        let begun = Instant::now();
        tracing::info!(live = app.backend.stats().live, "shutting down");
        manager.tell("STOPPING=1\nSTATUS=Draining");
        app.draining.store(true, Ordering::SeqCst);
        // Until execs have ended new connections are still answered, with 503: a balancer hears of it, a client may try
        // elsewhere.
        let until = begun + app.config.drain;
        while app.under_way() > 0 && Instant::now() < until {
            sleep(LOOK).await;
        }
        app.mcp_ends.cancel();
        // Streams and terminals end with their sandboxes, which end with the server.
        if let Some(engine) = app.backend.engine() {
            engine.end_sandboxes();
        }
        close.send_replace(Closing::Drain);
        let closed = timeout_at(until, all_closed.recv()).await;
        background.abort_all();
        while background.join_next().await.is_some() {}
        if closed.is_err() {
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

/// Runs the canaries until the server ends. `READY=1` is said when the first of them passes.
async fn prove(app: Arc<App>, manager: Arc<Manager>) {
    if let Some(engine) = app.backend.engine() {
        manager.tell("STATUS=Warming the templates");
        // Which of them failed, their canaries say.
        let _failed = engine.warm().await;
    }
    let mut results = app.canaries.results(&app.backend, Duration::ZERO).await;
    for (health, template) in results.iter().zip(&app.catalog.templates) {
        tracing::info!(template = &*template.name, ready = health.result.is_ok(), "first canary");
    }
    let mut ready = false;
    while !app.draining.load(Ordering::SeqCst) {
        if !ready && results.iter().any(|health| health.result.is_ok()) {
            ready = true;
            manager.tell("READY=1\nSTATUS=Serving");
        }
        if !ready {
            let reasons: Vec<String> =
                results.iter().filter_map(|health| Some(health.result.as_ref().err()?.to_string())).collect();
            // One line: another would be a message of its own.
            let reasons = reasons.join("; ").replace(char::is_control, " ");
            manager.tell(&format!("STATUS=No template runs code: {reasons}"));
        }
        sleep(if ready { app.config.canary_interval } else { TRY_AGAIN }).await;
        results = app.canaries.results(&app.backend, Duration::ZERO).await;
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
#[derive(Debug)]
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

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::SocketAddr,
        os::unix::net::UnixDatagram,
    };

    use tokio::sync::oneshot;

    use super::*;
    use crate::{
        fake::Fake,
        keys::{KeyStore, NewKey},
    };

    fn config() -> ServerConfig {
        let listen = vec![Listen::Tcp(([127, 0, 0, 1], 0).into())];
        ServerConfig { listen, reload_interval: Duration::from_millis(10), ..ServerConfig::default() }
    }

    fn address(server: &Server) -> SocketAddr {
        match server.addresses()[..] {
            [Listen::Tcp(address)] => address,
            _ => panic!("one TCP address"),
        }
    }

    /// The status and text of an answer to a request over a new connection.
    async fn ask(address: SocketAddr, method: &'static str, path: &'static str, header: String) -> (u16, String) {
        let ask = move || {
            let mut stream = std::net::TcpStream::connect(address).unwrap();
            let body = r#"{"code": "hi"}"#;
            let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{header}");
            let rest = format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            stream.write_all((head + &rest).as_bytes()).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            (text[9..12].parse().unwrap(), text)
        };
        tokio::task::spawn_blocking(ask).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_server_is_ready_when_a_template_runs_code_and_not_before() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("notify");
        let told = UnixDatagram::bind(&socket).unwrap();
        told.set_nonblocking(true).unwrap();
        let next = async || {
            let mut buffer = [0; 400];
            for _ in 0..2000 {
                if let Ok(count) = told.recv(&mut buffer) {
                    return String::from_utf8_lossy(&buffer[..count]).into_owned();
                }
                sleep(Duration::from_millis(5)).await;
            }
            panic!("nothing was told");
        };
        let fake = Arc::new(Fake::default());
        fake.broken.store(true, Ordering::SeqCst);
        let mut server = Server::with_backend(config(), Backend::Fake(fake.clone())).await.unwrap();
        server.manager = Manager(Some(socket.into()));
        let address = address(&server);
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(server.run(async move { stopped.await.unwrap_or_default() }));
        assert_eq!(
            next().await,
            "STATUS=No template runs code: the sandbox failed: broken on purpose; the sandbox failed: broken on purpose"
        );
        assert_eq!(ask(address, "GET", "/v1/health", String::new()).await.0, 503);
        let (status, text) = ask(address, "POST", "/v1/exec", String::new()).await;
        assert!(status == 503 && text.contains("not_ready"), "{text}");
        fake.broken.store(false, Ordering::SeqCst);
        let mut words = next().await;
        while words.starts_with("STATUS=No") {
            words = next().await;
        }
        assert_eq!(words, "READY=1\nSTATUS=Serving");
        assert_eq!(ask(address, "POST", "/v1/exec", String::new()).await.0, 200);
        stop.send(()).unwrap();
        running.await.unwrap().unwrap();
        assert_eq!(next().await, "STOPPING=1\nSTATUS=Draining");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_key_that_comes_while_the_server_starts_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        let store = KeyStore::new(&path);
        let new = |name: &str| NewKey { name: name.into(), ..NewKey::default() };
        store.create(new("first")).unwrap();
        let config = ServerConfig { keys_file: Some(path), ..config() };
        let server = Server::with_backend(config, Backend::Fake(Arc::default())).await.unwrap();
        let address = address(&server);
        let (token, _) = store.create(new("second")).unwrap();
        let running = tokio::spawn(server.run(std::future::pending()));
        for _ in 0..1000 {
            if ask(address, "POST", "/v1/exec", format!("Authorization: Bearer {token}\r\n")).await.0 == 200 {
                running.abort();
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("the key is not known");
    }
}
