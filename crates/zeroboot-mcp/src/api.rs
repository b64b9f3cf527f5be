//! Requests to the HTTP API, and what it answers.

use std::{pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header, request::Parts};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};

/// Longest time of all retries of a request that the server refuses for now.
const MAX_RETRY: Duration = Duration::from_secs(10);
const KEPT: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Whose request it is: the head of the MCP client's own one, where that came over HTTP.
pub type Asker = Option<Arc<Parts>>;

/// Why a request has no answer, in words for the asker.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NoAnswer(pub String);

/// Why a session may not begin, in words for the asker.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NoSession(pub String);

/// What [`Api::send`] gives.
pub type Sent<'a> = Pin<Box<dyn Future<Output = Result<Response<Bytes>, NoAnswer>> + Send + 'a>>;

/// The HTTP API of a Zeroboot server, in this process or at the other end of a connection.
pub trait Api: Send + Sync + 'static {
    /// Sends a request in the name of `asker`; gives any answer.
    fn send<'a>(&'a self, asker: &'a Asker, request: Request<Bytes>) -> Sent<'a>;

    /// A session of `asker` begins; what this gives is dropped when it has ended.
    fn begin(&self, _asker: &Asker) -> Result<Box<dyn std::any::Any + Send>, NoSession> {
        Ok(Box::new(()))
    }
}

/// Why a tool could not do its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// A stable word; those of docs/api.md, or `no_answer`.
    pub(crate) code: String,
    pub(crate) cause: String,
    /// Set where the server's log has more.
    pub(crate) request_id: Option<String>,
}

impl Failure {
    pub(crate) fn new(code: &str, cause: impl Into<String>) -> Failure {
        Failure { code: code.into(), cause: cause.into(), request_id: None }
    }

    fn of(status: StatusCode, body: &[u8]) -> Failure {
        let fields: Value = serde_json::from_slice(body).unwrap_or_default();
        let text = |name: &str| fields.get(name).and_then(Value::as_str).map(str::to_owned);
        let mut cause = text("error").unwrap_or_else(|| format!("the server answered with HTTP {status}"));
        if let Some(reason) = text("reason") {
            cause.push_str(&format!(" ({reason})"));
        }
        Failure { code: text("code").unwrap_or_else(|| "no_answer".into()), cause, request_id: text("request_id") }
    }

    /// What the caller can do.
    fn remediation(&self) -> &'static str {
        match self.code.as_str() {
            "sandbox_not_found" | "sandbox_gone" => {
                "make another with create_sandbox; its files and variables are gone"
            }
            "context_not_found" => "leave `context` out, or name one that was made",
            "file_not_found" => "paths are absolute, or relative to the sandbox's home; look with exec and `ls`",
            "wrong_kind" => "name a file, not a directory",
            "unknown_language" => "use python, javascript or bash",
            "unknown_template" => "leave `template` out",
            "invalid_timeout" | "invalid_limits" => "ask for less",
            "too_many_sandboxes" => "end one with kill_sandbox",
            "unauthorized" => {
                "the MCP server needs an API key: ZEROBOOT_API_KEY, or the header Authorization over HTTP"
            }
            "needs_vm_engine" | "cannot_branch" => {
                "this sandbox cannot be forked: make another with create_sandbox, and do its steps again there"
            }
            "no_room" => "remove files or end processes in the sandbox, or make one with more memory",
            "rate_limited" | "concurrency_limited" | "busy" | "not_ready" | "too_many_streams" => "try again later",
            "no_answer" => "check that the Zeroboot server runs",
            "body_too_large" | "file_too_large" => "send less at once",
            _ => "change the call as the cause says",
        }
    }

    pub(crate) fn value(&self) -> Value {
        let mut value = json!({"code": self.code, "cause": self.cause, "remediation": self.remediation()});
        if let Some(id) = &self.request_id {
            value["request_id"] = json!(id);
        }
        value
    }
}

/// The API as one asker sees it.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) api: Arc<dyn Api>,
    pub(crate) asker: Asker,
}

impl Client {
    /// A request; gives the body of a good answer. Waits a while for what the server refuses for now.
    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        headers: &[(header::HeaderName, &str)],
        body: Bytes,
    ) -> Result<Bytes, Failure> {
        let mut waited = Duration::ZERO;
        loop {
            let mut request = Request::builder().method(method.clone()).uri(path);
            for (name, value) in headers {
                request = request.header(name, *value);
            }
            let request = request.body(body.clone()).map_err(|error| Failure::new("bad_path", error.to_string()))?;
            let answer = self
                .api
                .send(&self.asker, request)
                .await
                .map_err(|NoAnswer(cause)| Failure::new("no_answer", cause))?;
            let status = answer.status();
            if status.is_success() {
                return Ok(answer.into_body());
            }
            let later = [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(&status);
            let after = answer.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
            let failure = Failure::of(status, answer.body());
            match after.map(|seconds: u64| Duration::from_secs(seconds).max(Duration::from_millis(100))) {
                Some(wait) if later && waited + wait <= MAX_RETRY => {
                    waited += wait;
                    tokio::time::sleep(wait).await;
                }
                _ => return Err(failure),
            }
        }
    }

    /// The same with JSON both ways.
    pub(crate) async fn json(&self, method: Method, path: &str, body: &Value) -> Result<Value, Failure> {
        let headers = [(header::CONTENT_TYPE, "application/json")];
        let answer = self.ask(method, path, &headers, body.to_string().into()).await?;
        if answer.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&answer).map_err(|_| Failure::new("no_answer", "the server's answer is not JSON"))
    }
}

/// `/v1/sandboxes/ID/part/...`, escaped.
pub fn path(id: &str, parts: &[&str]) -> String {
    below("/v1/sandboxes", id, parts)
}

/// The path of a checkpoint, or of something of it.
pub fn checkpoint(id: &str, parts: &[&str]) -> String {
    below("/v1/checkpoints", id, parts)
}

fn below(root: &str, id: &str, parts: &[&str]) -> String {
    let mut path = root.to_owned();
    for part in [id].iter().chain(parts) {
        path.push('/');
        path.extend(utf8_percent_encode(part, &KEPT));
    }
    path
}

/// A path with a query.
pub fn query(path: &str, pairs: &[(&str, &str)]) -> String {
    let mut out = path.to_owned();
    for (index, (name, value)) in pairs.iter().enumerate() {
        out.push(if index == 0 { '?' } else { '&' });
        out.push_str(name);
        out.push('=');
        out.extend(utf8_percent_encode(value, &KEPT));
    }
    out
}

/// The path of a file in a sandbox.
pub(crate) fn file(id: &str, name: &str) -> String {
    query(&path(id, &["files"]), &[("path", name)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_cannot_lead_elsewhere() {
        assert_eq!(path("../x?y#z", &["run"]), "/v1/sandboxes/..%2Fx%3Fy%23z/run");
        assert_eq!(file("a", "b c&path=d"), "/v1/sandboxes/a/files?path=b%20c%26path%3Dd");
    }

    #[test]
    fn a_failure_says_what_to_do() {
        let body = br#"{"error":"The sandbox has ended","code":"sandbox_gone","reason":"idle","request_id":"7"}"#;
        let value = Failure::of(StatusCode::GONE, body).value();
        assert_eq!(value["cause"], "The sandbox has ended (idle)");
        assert_eq!((&value["code"], &value["request_id"]), (&json!("sandbox_gone"), &json!("7")));
        assert!(value["remediation"].as_str().is_some_and(|text| text.contains("create_sandbox")));
        assert_eq!(Failure::of(StatusCode::BAD_GATEWAY, b"<html>").code, "no_answer");
    }
}
