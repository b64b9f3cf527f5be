//! A server of its own process, and sandboxes on it.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hyper::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::text;
use crate::{
    cli::{BenchArgs, EngineChoice},
    sandbox::client::{Client, path},
};

/// Time to warm a template, on a busy machine too.
const START: Duration = Duration::from_secs(120);
/// Time to drain and end.
const END: Duration = Duration::from_secs(20);

pub(super) struct Server {
    pub(super) client: Client,
    child: Child,
    _dir: TempDir,
}

impl Server {
    /// Starts `PROGRAM serve` with one template and no canary that would run beside what is measured.
    pub(super) async fn start(
        program: &Path,
        args: &BenchArgs,
        engine: EngineChoice,
        pool: usize,
    ) -> anyhow::Result<Server> {
        let dir = tempfile::Builder::new().prefix("zeroboot-bench-").tempdir().context("make a directory")?;
        let config = dir.path().join("zeroboot.toml");
        let mut toml = String::from("canary_interval_seconds = 3600\n");
        if args.idle > 0 && pool == 0 {
            let memory = args.idle.saturating_mul(1024);
            toml += &format!(
                "[engine]\nmax_sandboxes = {}\nmax_memory_mb = {}\nsandbox_memory_mb = {memory}\n",
                args.idle,
                u64::from(memory) * 2
            );
        }
        let kind = if engine == EngineChoice::Vm { "vm" } else { "process" };
        toml += "[[template]]\nname = \"python\"\n";
        if let Some(warm) = args.from.warm.as_ref().filter(|_| kind == "process") {
            toml += &format!("warm = {}\n", json!(warm));
        }
        std::fs::write(&config, toml).context("write the server's configuration")?;
        let log = std::fs::File::create(dir.path().join("log")).context("make the server's log")?;
        let mut command = Command::new(program);
        command.args(["serve", "--listen", "127.0.0.1:0", "--engine", kind, "--pool", &pool.to_string(), "--config"]);
        command.arg(&config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        if let Some(python) = args.from.python.as_ref().filter(|_| kind == "process") {
            command.arg("--python").arg(python);
        }
        let child = command.spawn().with_context(|| format!("start {}", program.display()))?;
        let client = Client::new("http://127.0.0.1")?;
        let mut server = Server { client, child, _dir: dir };
        let begin = Instant::now();
        loop {
            let log = std::fs::read_to_string(server._dir.path().join("log")).unwrap_or_default();
            if let Some(found) = log.lines().find_map(|line| line.split_once("listens on ")) {
                let address = found.1.split_whitespace().next().unwrap_or_default();
                let base_url = format!("http://{}", address.trim_start_matches("http://"));
                server.client = Client::new(&base_url)?;
                break;
            }
            let ended = server.child.try_wait()?.is_some();
            let end = log.chars().rev().take(2000).collect::<Vec<_>>().into_iter().rev().collect::<String>();
            ensure!(!ended && begin.elapsed() < START, "{} serves nothing: {end}", program.display());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        server.pool_is_full().await?;
        Ok(server)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the next checkout is a pooled one.
    pub(super) async fn pool_is_full(&self) -> anyhow::Result<()> {
        let begin = Instant::now();
        loop {
            // It answers with an error while it warms.
            let health = self.client.json(Method::GET, "/v1/health", None).await.unwrap_or_default();
            let template = &health["templates"]["python"];
            if template["ready"] == true && template["pool_ready"] == template["pool_target"] {
                return Ok(());
            }
            if begin.elapsed() > START {
                bail!("the pool does not fill: {health}");
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap_or_default();
        let begin = Instant::now();
        while begin.elapsed() < END && self.child.try_wait().is_ok_and(|status| status.is_none()) {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.child.kill().unwrap_or_default();
        self.child.wait().map(drop).unwrap_or_default();
    }
}

/// A sandbox that lives. It ends with its server, at the latest.
pub(super) struct Sandbox<'a> {
    pub(super) server: &'a Server,
    pub(super) facts: Value,
    id: String,
}

impl<'a> Sandbox<'a> {
    pub(super) async fn create(server: &'a Server) -> anyhow::Result<Sandbox<'a>> {
        let body = json!({ "timeout_seconds": 3600 });
        let facts = server.client.json(Method::POST, "/v1/sandboxes", Some(&body)).await?;
        Ok(Sandbox { server, id: text(&facts, "id")?, facts })
    }

    pub(super) fn path(&self, parts: &[&str]) -> String {
        path(&self.id, parts)
    }

    pub(super) async fn end(self) -> anyhow::Result<()> {
        self.server.client.json(Method::DELETE, &self.path(&[]), None).await?;
        Ok(())
    }
}
