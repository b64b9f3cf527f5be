//! A server with the process engine, in this process; its zygotes are the real program.

use std::{
    io::{BufReader, Write},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::sync::Notify;
use zeroboot_engine::{Engine, EngineConfig, TemplateConfig, ZygoteSpec};
use zeroboot_server::{Listen, ServeError, Server, ServerConfig};

use crate::client::{self, Answer};

pub(crate) const JSON: &str = "Content-Type: application/json";

/// How a test's server differs from the default one.
pub(crate) struct Setup {
    pub(crate) config: ServerConfig,
    pub(crate) node: bool,
    pub(crate) pool: usize,
    pub(crate) max_live: usize,
    pub(crate) admission_wait: Duration,
}

impl Default for Setup {
    fn default() -> Setup {
        let listen = vec![Listen::Tcp(([127, 0, 0, 1], 0).into())];
        Setup {
            // No canary but the first: it would be counted among the live sandboxes.
            config: ServerConfig { listen, canary_interval: Duration::from_secs(3600), ..ServerConfig::default() },
            node: false,
            pool: 2,
            max_live: 16,
            admission_wait: Duration::from_secs(20),
        }
    }
}

pub(crate) struct Fixture {
    pub(crate) address: SocketAddr,
    pub(crate) engine: Engine,
    stop: Arc<Notify>,
    server: Option<std::thread::JoinHandle<Result<(), ServeError>>>,
}

fn template(host: zeroboot_process::HostRuntime, pool: usize) -> TemplateConfig {
    TemplateConfig {
        name: host.language.into(),
        language: host.language.into(),
        spec: ZygoteSpec::Process {
            runtime: host.language.into(),
            interpreter: host.interpreter,
            paths: host.paths,
            warm: Vec::new(),
            env: Vec::new(),
        },
        pool,
    }
}

impl Setup {
    pub(crate) fn start(self) -> Fixture {
        let mut templates = vec![template(zeroboot_process::python(None).unwrap(), self.pool)];
        if self.node {
            templates.push(template(zeroboot_process::node(None).unwrap(), 1));
        }
        let engine_config = EngineConfig {
            program: env!("CARGO_BIN_EXE_zeroboot").into(),
            templates,
            max_live: self.max_live,
            max_memory: 64 << 30,
            admission_wait: self.admission_wait,
            warm_timeout: Duration::from_secs(60),
            cgroups: false,
        };
        let stop = Arc::new(Notify::new());
        let (tell, told) = std::sync::mpsc::channel();
        let stopped = stop.clone();
        let config = self.config;
        let server = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                let engine = Engine::start(engine_config).await.unwrap();
                let server = Server::bind(config, engine.clone()).await?;
                tell.send((server.addresses(), engine)).unwrap();
                server.run(stopped.notified()).await
            })
        });
        let (listens, engine) = told.recv().expect("the server did not start");
        let tcp = listens.iter().find_map(|listen| match listen {
            Listen::Tcp(address) => Some(*address),
            Listen::Unix(_) => None,
        });
        let address = tcp.expect("a TCP address");
        let fixture = Fixture { address, engine, stop, server: Some(server) };
        // Anything is answered only after the first canary. (A TLS server answers this with an end of the connection.)
        let mut stream = client::connect(address);
        stream.write_all(&client::request("GET", "/v1/health", &[], b"")).unwrap();
        let _answered = client::read_answer(&mut BufReader::new(stream));
        fixture.wait_for_live(0, Duration::from_secs(20));
        fixture
    }
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
