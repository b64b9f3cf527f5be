//! The HTTP client of `zeroboot sandbox`: hyper over a connection of our own making.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::{
    Method, Request, Response, Uri,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
    header::{AUTHORIZATION, HOST, HeaderValue, RETRY_AFTER, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, RootCertStore, pki_types::ServerName},
};

pub(crate) use zeroboot_mcp::{checkpoint, path, query};

use crate::hint::hinted;

/// The body of a request.
pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Timeout of a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Timeout of an answer to a request that the server can answer at once.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Longest time of all retries of a request that the server refuses for now.
const MAX_RETRY: Duration = Duration::from_secs(10);
/// Most bytes of an answer that is not a stream.
const MAX_ANSWER: usize = 256 << 20;

/// What the server refused.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Refused {
    pub(crate) status: u16,
    pub(crate) code: String,
    pub(crate) message: String,
    pub(crate) reason: Option<String>,
    pub(crate) request_id: Option<String>,
    /// Nothing was done, and it may be asked for again after this time.
    pub(crate) retry_after: Option<Duration>,
}

impl Refused {
    /// Out of the server's `{"error", "code", "request_id"}`, an answer or an event of a stream.
    pub(crate) fn of(status: u16, fields: &Value) -> Refused {
        let text = |name: &str| fields.get(name).and_then(Value::as_str).map(str::to_owned);
        Refused {
            status,
            code: text("code").unwrap_or_default(),
            message: text("error").unwrap_or_else(|| format!("the server answered with HTTP {status}")),
            reason: text("reason"),
            request_id: text("request_id"),
            retry_after: None,
        }
    }

    /// What to do about it.
    pub(crate) fn hint(&self) -> String {
        match self.code.as_str() {
            "sandbox_not_found" => "`zeroboot sandbox list` shows the sandboxes of your key".into(),
            "sandbox_gone" => match self.reason.as_deref() {
                Some("lease_ended") => "give the next one more time: create --timeout, or extend".into(),
                Some("idle") => "give the next one more time: create --idle-timeout".into(),
                _ => "`zeroboot sandbox create` makes another".into(),
            },
            "context_not_found" => "`zeroboot sandbox contexts list ID` shows its contexts".into(),
            "run_not_found" => "`zeroboot sandbox ps ID` shows its commands".into(),
            "file_not_found" => "paths are absolute, or relative to the sandbox's home directory".into(),
            "too_many_sandboxes" => "`zeroboot sandbox rm ID` ends one".into(),
            "cannot_start" => "name a program of the sandbox; `-- sh -c '...'` for a line of shell".into(),
            "unauthorized" => "ZEROBOOT_API_KEY must hold a key of this server".into(),
            "not_found" if self.status == 404 => {
                "check that the server is a Zeroboot of the same version as this command".into()
            }
            "" => "is the server a Zeroboot?".into(),
            code => match &self.request_id {
                Some(id) => format!("the server calls this {code}; its log has it as request {id}"),
                None => format!("the server calls this {code}; docs/api.md says more"),
            },
        }
    }
}

enum Place {
    Tcp { host: String, port: u16, tls: bool },
    Unix(PathBuf),
}

/// A server, and the connections to it that are free.
pub(crate) struct Client {
    place: Place,
    /// As the user wrote it.
    named: String,
    /// In front of each path.
    prefix: String,
    host: HeaderValue,
    key: Option<HeaderValue>,
    tls: Option<Arc<ClientConfig>>,
    free: Mutex<Vec<SendRequest<Body>>>,
}

impl Client {
    pub(crate) fn new(base_url: &str) -> anyhow::Result<Client> {
        let named = base_url.trim().trim_end_matches('/').to_owned();
        let wrong = |why: &str| {
            hinted(
                format!("{named:?} is not an address of a server: {why}"),
                "write it like http://127.0.0.1:8080, https://host or unix:/run/zeroboot.sock",
            )
        };
        let (place, prefix, host) = if let Some(path) = named.strip_prefix("unix:") {
            (Place::Unix(path.into()), String::new(), "localhost".to_owned())
        } else {
            let uri: Uri = named.parse().map_err(|_| wrong("it cannot be read"))?;
            let tls = match uri.scheme_str() {
                Some("http") => false,
                Some("https") => true,
                _ => return Err(wrong("it must begin with http://, https:// or unix:")),
            };
            let authority = uri.authority().ok_or_else(|| wrong("it names no host"))?;
            let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
            let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
            // An address that was copied from an example of the API.
            let prefix = uri.path().trim_end_matches('/').trim_end_matches("/v1").to_owned();
            (Place::Tcp { host, port, tls }, prefix, authority.as_str().to_owned())
        };
        let key = std::env::var(KEY).unwrap_or_default();
        let key = match key.trim() {
            "" => None,
            key => {
                let mut value = HeaderValue::from_str(&format!("Bearer {key}")).map_err(|_| {
                    hinted(format!("{KEY} has characters that a key cannot have"), "`zeroboot keys create` makes a key")
                })?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        let tls = if matches!(place, Place::Tcp { tls: true, .. }) { Some(Arc::new(trust()?)) } else { None };
        let host = HeaderValue::from_str(&host).map_err(|_| wrong("its host has strange characters"))?;
        Ok(Client { place, named, prefix, host, key, tls, free: Mutex::new(Vec::new()) })
    }

    /// Sends a request; gives any answer, once its head is there.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, String)],
        body: Body,
        patience: Option<Duration>,
    ) -> anyhow::Result<Response<Incoming>> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.prefix))
            .header(HOST, &self.host)
            .header(USER_AGENT, concat!("zeroboot/", env!("CARGO_PKG_VERSION")));
        if let Some(key) = &self.key {
            request = request.header(AUTHORIZATION, key);
        }
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let request = request.body(body).context("make the request")?;
        let mut sender = match self.take() {
            Some(sender) => sender,
            None => timeout(CONNECT, self.connect()).await.map_err(|_| self.unreachable("it takes too long"))??,
        };
        let answer = sender.send_request(request);
        let answer = match patience {
            Some(patience) => timeout(patience, answer).await.map_err(|_| self.silent())?,
            None => answer.await,
        };
        let answer = answer.map_err(|error| self.broke(&error))?;
        if let Ok(mut free) = self.free.lock() {
            free.push(sender);
        }
        Ok(answer)
    }

    /// A request with a JSON body, or none; gives the JSON of a good answer, `null` where it has no body.
    pub(crate) async fn json(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        self.json_within(method, path, body, Some(PATIENCE)).await
    }

    pub(crate) async fn json_within(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        patience: Option<Duration>,
    ) -> anyhow::Result<Value> {
        let ask = || async {
            let headers = json_headers(body);
            let body = body.map_or_else(empty, |body| full(body.to_string()));
            let answer = self.send(method.clone(), path, &headers, body, None).await?;
            let bytes = self.collect(self.good(answer).await?).await?;
            if bytes.is_empty() {
                return Ok(Value::Null);
            }
            serde_json::from_slice(&bytes).with_context(|| format!("the answer of {} is not JSON", self.named))
        };
        let work = patiently(ask);
        match patience {
            Some(patience) => timeout(patience, work).await.map_err(|_| self.silent())?,
            None => work.await,
        }
    }

    /// The answer, if it is good: its body is still to be read.
    pub(crate) async fn good(&self, answer: Response<Incoming>) -> anyhow::Result<Response<Incoming>> {
        let status = answer.status().as_u16();
        if (200..300).contains(&status) || status == 101 {
            return Ok(answer);
        }
        let after = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let bytes = timeout(PATIENCE, self.collect(answer)).await.map_err(|_| self.silent())??;
        let mut refused = Refused::of(status, &serde_json::from_slice(&bytes).unwrap_or(Value::Null));
        refused.retry_after = after.map(Duration::from_secs).filter(|_| status == 429 || status == 503);
        Err(refused.into())
    }

    pub(crate) async fn collect(&self, answer: Response<Incoming>) -> anyhow::Result<Bytes> {
        let limited = http_body_util::Limited::new(answer.into_body(), MAX_ANSWER);
        let whole =
            limited.collect().await.map_err(|error| anyhow::anyhow!("read the answer of {}: {error}", self.named))?;
        Ok(whole.to_bytes())
    }

    pub(crate) fn broke(&self, error: &hyper::Error) -> anyhow::Error {
        hinted(
            format!("the connection to {} broke: {}", self.named, chain(error)),
            "the server may have done what the request asked for",
        )
    }

    pub(crate) fn silent(&self) -> anyhow::Error {
        hinted(format!("{} does not answer", self.named), "the server may have done what the request asked for")
    }

    fn unreachable(&self, why: &str) -> anyhow::Error {
        hinted(
            format!("no server at {}: {why}", self.named),
            "start one with `zeroboot serve`, or name another in ZEROBOOT_BASE_URL or with --base-url",
        )
    }

    fn distrusted(&self, error: &io::Error) -> anyhow::Error {
        hinted(
            format!("cannot make a TLS connection to {}: {error}", self.named),
            "this host must trust the server's certificate; SSL_CERT_FILE can name a file of trusted certificates",
        )
    }

    fn take(&self) -> Option<SendRequest<Body>> {
        let mut free = self.free.lock().ok()?;
        let at = free.iter().position(SendRequest::is_ready)?;
        Some(free.swap_remove(at))
    }

    async fn connect(&self) -> anyhow::Result<SendRequest<Body>> {
        let failed = |error: io::Error| self.unreachable(&error.to_string());
        match &self.place {
            Place::Unix(path) => handshake(UnixStream::connect(path).await.map_err(failed)?).await,
            Place::Tcp { host, port, .. } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(failed)?;
                // Keys that are typed are small, and must not wait for each other.
                stream.set_nodelay(true).map_err(failed)?;
                match &self.tls {
                    None => handshake(stream).await,
                    Some(config) => {
                        let name = ServerName::try_from(host.clone()).map_err(|e| self.unreachable(&e.to_string()))?;
                        let connector = TlsConnector::from(config.clone());
                        let secured = connector.connect(name, stream).await;
                        handshake(secured.map_err(|error| self.distrusted(&error))?).await
                    }
                }
            }
        }
    }
}

/// The key's environment variable.
const KEY: &str = "ZEROBOOT_API_KEY";

async fn handshake(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> anyhow::Result<SendRequest<Body>> {
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.context("speak HTTP")?;
    tokio::spawn(async move {
        // Its end, good or bad, is seen where its answer is read.
        let _told_there = connection.with_upgrades().await;
    });
    Ok(sender)
}

/// The certificates that this host trusts.
fn trust() -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    for certificate in found.certs {
        // A certificate that cannot be read is not trusted.
        let _unreadable = roots.add(certificate);
    }
    if roots.is_empty() {
        return Err(hinted("this host trusts no certificate", "install ca-certificates, or set SSL_CERT_FILE"));
    }
    Ok(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth())
}

/// Asks again what the server refused for now, and did not do.
pub(crate) async fn patiently<T, F: Future<Output = anyhow::Result<T>>>(
    mut ask: impl FnMut() -> F,
) -> anyhow::Result<T> {
    let mut waited = Duration::ZERO;
    loop {
        let error = match ask().await {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        let wait = error.downcast_ref::<Refused>().and_then(|refused| refused.retry_after);
        match wait.map(|wait| wait.max(Duration::from_millis(100))) {
            Some(wait) if waited + wait <= MAX_RETRY => {
                waited += wait;
                tokio::time::sleep(wait).await;
            }
            _ => return Err(error),
        }
    }
}

pub(crate) fn empty() -> Body {
    full(Bytes::new())
}

pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

pub(crate) fn json_headers(body: Option<&Value>) -> Vec<(&'static str, String)> {
    body.map(|_| ("content-type", "application/json".to_owned())).into_iter().collect()
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(cause) = at {
        text = format!("{text}: {cause}");
        at = cause.source();
    }
    text
}
