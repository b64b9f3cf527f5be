//! `zeroboot mcp`: the Model Context Protocol on standard input and output, over a server's HTTP API.

use std::{
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use bytes::Bytes;
use rmcp::ServiceExt as _;
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    sync::OnceCell,
};
use zeroboot_mcp::{Api, Asker, Mcp, NoAnswer, Sent};

use crate::{
    cli::McpArgs,
    hint::hinted,
    sandbox::client::{Client, full},
};

/// Longest time until a server of our own answers.
const START: Duration = Duration::from_secs(120);
/// Longest time that it has to end.
const END: Duration = Duration::from_secs(10);

pub(crate) fn run(args: &McpArgs) -> anyhow::Result<u8> {
    let tokio = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    let done = tokio.block_on(serve(args));
    // A thread of it waits for standard input, which may never end.
    tokio.shutdown_background();
    done
}

async fn serve(args: &McpArgs) -> anyhow::Result<u8> {
    let remote = match &args.base_url {
        Some(url) => Remote { client: OnceCell::new_with(Some(Client::new(url)?)), own: None },
        None => Remote { client: OnceCell::new(), own: Some(Own::start(args)?) },
    };
    let remote = Arc::new(remote);
    let mcp = Mcp::new(remote.clone());
    let session = mcp.session();
    let mut signals = Signals::new()?;
    let served = tokio::select! {
        served = async { mcp.serve(rmcp::transport::stdio()).await?.waiting().await.map_err(anyhow::Error::from) } => served.map(drop),
        () = signals.next() => Ok(()),
    };
    session.end().await;
    drop(session);
    if let Some(own) = Arc::into_inner(remote).and_then(|remote| remote.own) {
        own.end().await;
    }
    served.context("speak MCP on standard input and output")?;
    Ok(0)
}

struct Signals(tokio::signal::unix::Signal, tokio::signal::unix::Signal);

impl Signals {
    fn new() -> std::io::Result<Signals> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Signals(signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?))
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
        }
    }
}

/// A server at the other end of a connection.
struct Remote {
    client: OnceCell<Client>,
    /// One that we started.
    own: Option<Own>,
}

impl Remote {
    async fn client(&self) -> anyhow::Result<&Client> {
        let connect = || async {
            let own = self.own.as_ref().context("there is no server")?;
            own.answers().await?;
            Client::new(&own.url())
        };
        self.client.get_or_try_init(connect).await
    }
}

impl Api for Remote {
    fn send<'a>(&'a self, _: &'a Asker, request: http::Request<Bytes>) -> Sent<'a> {
        Box::pin(async move {
            let send = async {
                let client = self.client().await?;
                let (head, body) = request.into_parts();
                let headers: Vec<(&str, String)> = head
                    .headers
                    .iter()
                    .map(|(name, value)| (name.as_str(), value.to_str().unwrap_or_default().to_owned()))
                    .collect();
                let answer = client.send(head.method, &head.uri.to_string(), &headers, full(body), None).await?;
                let mut out = http::Response::builder().status(answer.status());
                if let Some(headers) = out.headers_mut() {
                    headers.extend(answer.headers().iter().map(|(name, value)| (name.clone(), value.clone())));
                }
                anyhow::Ok(out.body(client.collect(answer).await?)?)
            };
            send.await.map_err(|error| NoAnswer(format!("{error:#}")))
        })
    }
}

/// A server that serves this process alone, on a socket in a directory of its own.
struct Own {
    folder: tempfile::TempDir,
    child: Child,
}

impl Own {
    fn start(args: &McpArgs) -> anyhow::Result<Own> {
        let folder = tempfile::Builder::new().prefix("zeroboot-mcp-").tempdir().context("make a directory")?;
        let mut command = Command::new(std::env::current_exe().context("find this program")?);
        command.arg("serve").arg("--listen").arg(format!("unix:{}", folder.path().join("socket").display()));
        // Nobody else reaches it, so it needs no keys. Standard output speaks MCP.
        command.args(&args.serve).env_remove("ZEROBOOT_API_KEYS_FILE").kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.spawn().context("start zeroboot serve")?;
        Ok(Own { folder, child })
    }

    fn url(&self) -> String {
        format!("unix:{}", self.folder.path().join("socket").display())
    }

    /// Waits until it takes connections.
    async fn answers(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        while UnixStream::connect(self.folder.path().join("socket")).await.is_err() {
            let ended = self.child.id().is_none_or(|pid| !is_alive(pid));
            if ended || begun.elapsed() > START {
                let text = if ended { "the server ended" } else { "the server does not answer" };
                return Err(hinted(text, "its log is on standard error; `zeroboot doctor` says what this host can do"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    async fn end(mut self) {
        if let Some(pid) = self.child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed())) {
            // It may have ended already.
            let _gone = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        if tokio::time::timeout(END, self.child.wait()).await.is_err() {
            let _killed = self.child.kill().await;
        }
    }
}

/// Whether a child runs: one that ended and was not waited for is a zombie.
fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}
