//! A server in this process; its zygotes are the real program. The engine is `process`, or what `ZEROBOOT_TEST_ENGINE`
//! says: `vm` takes the templates in `ZEROBOOT_HOME`, as the nested lane makes them.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::sync::Notify;
use zeroboot_engine::{Engine, EngineConfig, Isolation, SandboxBounds, TemplateConfig, ZygoteSpec};
use zeroboot_server::{Listen, ServeError, Server, ServerConfig};

use crate::client::{self, Answer};

pub(crate) const JSON: &str = "Content-Type: application/json";

/// How a test's server differs from the default one.
pub(crate) struct Setup {
    pub(crate) config: ServerConfig,
    /// With an engine that no other test uses. With a pool or limits of its own it has one anyway.
    pub(crate) own_engine: bool,
    pub(crate) node: bool,
    pub(crate) pool: usize,
    pub(crate) max_live: usize,
    pub(crate) sandboxes: SandboxBounds,
    pub(crate) admission_wait: Duration,
}

impl Default for Setup {
    fn default() -> Setup {
        let listen = vec![Listen::Tcp(([127, 0, 0, 1], 0).into())];
        Setup {
            // No canary but the first: it would be counted among the live sandboxes.
            config: ServerConfig { listen, canary_interval: Duration::from_secs(3600), ..ServerConfig::default() },
            own_engine: false,
            node: false,
            pool: POOL,
            max_live: MAX_LIVE,
            sandboxes: SandboxBounds::default(),
            admission_wait: ADMISSION_WAIT,
        }
    }
}

const POOL: usize = 2;
const MAX_LIVE: usize = 16;
const ADMISSION_WAIT: Duration = Duration::from_secs(20);

pub(crate) struct Fixture {
    pub(crate) address: SocketAddr,
    pub(crate) engine: Engine,
    stop: Arc<Notify>,
    server: Option<std::thread::JoinHandle<Result<(), ServeError>>>,
}

/// The engine under test.
pub(crate) fn isolation() -> Isolation {
    match std::env::var("ZEROBOOT_TEST_ENGINE").as_deref() {
        Ok("vm") => Isolation::Vm,
        Ok("process") | Err(_) => Isolation::Process,
        Ok(other) => panic!("ZEROBOOT_TEST_ENGINE={other}: vm or process"),
    }
}

/// A time that the process engine takes on an ordinary host, for the engine and host under test: in the nested lane
/// the host is emulated.
pub(crate) fn patience(ordinary: Duration) -> Duration {
    if isolation() == Isolation::Vm { ordinary * 10 } else { ordinary }
}

fn template(language: &str, pool: usize) -> TemplateConfig {
    if isolation() == Isolation::Vm {
        let home = std::env::var_os("ZEROBOOT_HOME").expect("ZEROBOOT_HOME names the templates' store");
        let template = std::path::Path::new(&home).join("templates").join(language);
        return TemplateConfig {
            name: language.into(),
            language: language.into(),
            spec: ZygoteSpec::Vm { template },
            pool,
        };
    }
    let host = match language {
        "node" => zeroboot_process::node(None).unwrap(),
        _ => zeroboot_process::python(std::env::var_os("ZEROBOOT_TEST_PYTHON").map(PathBuf::from).as_deref()).unwrap(),
    };
    TemplateConfig {
        name: host.language.into(),
        language: host.language.into(),
        spec: ZygoteSpec::Process {
            runtime: host.language.into(),
            interpreter: host.interpreter,
            paths: host.paths,
            warm: Vec::new(),
            env: Vec::new(),
            node_modules: None,
        },
        pool,
    }
}

impl Setup {
    pub(crate) fn start(self) -> Fixture {
        let usual = (self.pool, self.max_live, self.admission_wait) == (POOL, MAX_LIVE, ADMISSION_WAIT);
        // A VM's template takes seconds to load in the nested lane.
        let shared = (isolation() == Isolation::Vm && usual && !self.own_engine).then(shared_engine);
        let engine_config = self.engine_config();
        let stop = Arc::new(Notify::new());
        let (tell, told) = std::sync::mpsc::channel();
        let (tell_ready, ready) = std::sync::mpsc::channel();
        let stopped = stop.clone();
        let config = self.config;
        let server = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                let engine = match &shared {
                    Some(engine) => engine.clone(),
                    None => Engine::start(engine_config).await.unwrap(),
                };
                let server = Server::bind(config, engine.clone()).await?;
                tell.send((server.addresses(), engine.clone())).unwrap();
                let ready = server.ready();
                tokio::spawn(async move {
                    ready.await;
                    // A test that failed does not wait for it.
                    let _gone = tell_ready.send(());
                });
                let result = server.run(stopped.notified()).await;
                if shared.is_none() {
                    engine.shutdown(Duration::from_secs(1)).await;
                }
                result
            })
        });
        let (listens, engine) = told.recv().expect("the server did not start");
        let tcp = listens.iter().find_map(|listen| match listen {
            Listen::Tcp(address) => Some(*address),
            Listen::Unix(_) => None,
        });
        let address = tcp.expect("a TCP address");
        let fixture = Fixture { address, engine, stop, server: Some(server) };
        ready.recv_timeout(patience(Duration::from_secs(60))).expect("no canary passed");
        fixture.wait_for_live(0, patience(Duration::from_secs(20)));
        fixture
    }

    pub(crate) fn engine_config(&self) -> EngineConfig {
        let mut templates = vec![template("python", self.pool)];
        if self.node {
            templates.push(template("node", 1));
        }
        EngineConfig {
            program: env!("CARGO_BIN_EXE_zeroboot").into(),
            templates,
            max_live: self.max_live,
            max_memory: 64 << 30,
            sandboxes: self.sandboxes,
            admission_wait: self.admission_wait,
            warm_timeout: patience(Duration::from_secs(60)),
            cgroups: false,
        }
    }
}

/// One engine for all tests that want the usual one. They look at what is alive in it: one test at a time.
fn shared_engine() -> Engine {
    static SHARED: OnceLock<(tokio::runtime::Runtime, Engine)> = OnceLock::new();
    let (_, engine) = SHARED.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let setup = Setup { node: true, ..Setup::default() };
        let engine = runtime.block_on(Engine::start(setup.engine_config())).unwrap();
        (runtime, engine)
    });
    engine.clone()
}

impl Fixture {
    pub(crate) fn new() -> Fixture {
        Setup::default().start()
    }

    pub(crate) fn post(&self, path: &str, body: &Value, headers: &[&str]) -> Answer {
        let headers: Vec<&str> = [JSON].iter().chain(headers).copied().collect();
        client::exchange(self.address, &client::request("POST", path, &headers, body.to_string().as_bytes()))
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        client::exchange(self.address, &client::request("GET", path, &[], b""))
    }

    /// Runs a request that must be answered with 200.
    pub(crate) fn exec(&self, body: &Value) -> Value {
        let answer = self.post("/v1/exec", body, &[]);
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()
    }

    pub(crate) fn run(&self, code: &str) -> Value {
        self.exec(&json!({ "code": code }))
    }

    pub(crate) fn live(&self) -> usize {
        self.engine.stats().live
    }

    /// Waits until so many sandboxes serve requests.
    pub(crate) fn wait_for_live(&self, count: usize, most: Duration) {
        wait_for(&format!("{count} live sandboxes"), most, || self.live() == count);
    }

    /// Begins to shut down; the server's result comes from [`Fixture::join`].
    pub(crate) fn stop(&self) {
        self.stop.notify_one();
    }

    pub(crate) fn join(mut self) {
        self.server.take().unwrap().join().unwrap().unwrap();
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.stop.notify_one();
        if let Some(server) = self.server.take()
            && !std::thread::panicking()
        {
            server.join().unwrap().unwrap();
        }
    }
}

pub(crate) fn wait_for(what: &str, most: Duration, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < most, "no {what} within {most:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
