//! E2B's wire, so that its SDKs work as they are: an adapter over the sandboxes that live.
//!
//! | plane | who is asked | routes | key |
//! |---|---|---|---|
//! | control | the server | [`control`] | `X-API-KEY` |
//! | sandbox | a sandbox, named by `E2b-Sandbox-Id` or by `Host: {port}-{id}.…` | [`sandbox`] | its access token |
//!
//! The SDKs send no key to a sandbox. Its token is derived from its id and a secret of this process, so that nothing is
//! kept for it, and it ends with the sandbox. A key that is revoked takes its sandboxes' tokens with it.

mod connect;
mod control;
mod errors;
mod files;
mod filesystem;
mod interpreter;
mod messages;
mod process;
mod watchers;

use std::{net::IpAddr, sync::Arc};

use axum::{
    Router,
    extract::{FromRequestParts, Request},
    http::{HeaderMap, header, request::Parts},
    routing::{any, delete, get, post},
};
use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use uuid::Uuid;
use zeroboot_engine::Sandbox;

pub(crate) use self::{
    connect::Unread,
    errors::{Form, render},
};
use crate::{app::App, error::ApiError, gate::Caller, sandbox_wire::owner};

/// Ports of a sandbox's services.
const ENVD_PORT: u16 = 49983;
const INTERPRETER_PORT: u16 = 49999;
/// The version of E2B's agent whose calls are answered. SDKs offer what that version had: 0.6.2 would be metadata of files.
pub(crate) const ENVD_VERSION: &str = "0.6.1";
/// The home directory by the name that E2B has for it: a link.
pub(crate) const HOME: &str = "/home/user";

/// What E2B's routes share.
#[derive(Debug)]
pub(crate) struct Shared {
    secret: [u8; 32],
    pub(crate) watchers: watchers::Watchers,
}

impl Default for Shared {
    fn default() -> Shared {
        let mut secret = [0; 32];
        // Without entropy of the kernel nothing else of this process works either.
        if let Err(error) = getrandom::fill(&mut secret) {
            panic!("the kernel gives no random bytes: {error}");
        }
        Shared { secret, watchers: watchers::Watchers::default() }
    }
}

impl Shared {
    /// The access token of a sandbox.
    pub(crate) fn token(&self, id: Uuid) -> String {
        blake3::keyed_hash(&self.secret, id.as_bytes()).to_hex().to_string()
    }
}

/// Routes of the control plane, as they stand in logs and metrics.
const CONTROL_ROUTES: &[&str] = &[
    "/sandboxes",
    "/v2/sandboxes",
    "/sandboxes/metrics",
    "/sandboxes/{id}",
    "/sandboxes/{id}/timeout",
    "/sandboxes/{id}/refreshes",
    "/sandboxes/{id}/connect",
    "/v2/sandboxes/{id}/connect",
    "/sandboxes/{id}/resume",
    "/sandboxes/{id}/pause",
    "/sandboxes/{id}/fork",
    "/sandboxes/{id}/snapshots",
    "/sandboxes/{id}/network",
    "/sandboxes/{id}/metrics",
    "/sandboxes/{id}/logs",
    "/v2/sandboxes/{id}/logs",
    "/snapshots",
    "/templates",
    "/v2/templates",
    "/v3/templates",
    "/templates/{*rest}",
    "/v2/templates/{*rest}",
    "/volumes",
    "/volumes/{*rest}",
    "/secrets",
    "/secrets/{*rest}",
    "/teams",
    "/teams/{*rest}",
];

/// Routes of a sandbox, and their names in logs and metrics.
const SANDBOX_ROUTES: &[(&str, &str)] = &[
    ("/health", "e2b/health"),
    ("/metrics", "e2b/metrics"),
    ("/envs", "e2b/envs"),
    ("/files", "e2b/files"),
    ("/execute", "e2b/execute"),
    ("/contexts", "e2b/contexts"),
    ("/contexts/{name}", "e2b/contexts/{name}"),
    ("/contexts/{name}/restart", "e2b/contexts/{name}/restart"),
    ("/process.Process/Start", "e2b/process/Start"),
    ("/process.Process/Connect", "e2b/process/Connect"),
    ("/process.Process/List", "e2b/process/List"),
    ("/process.Process/SendInput", "e2b/process/SendInput"),
    ("/process.Process/StreamInput", "e2b/process/StreamInput"),
    ("/process.Process/SendSignal", "e2b/process/SendSignal"),
    ("/process.Process/Update", "e2b/process/Update"),
    ("/process.Process/CloseStdin", "e2b/process/CloseStdin"),
    ("/filesystem.Filesystem/Stat", "e2b/filesystem/Stat"),
    ("/filesystem.Filesystem/MakeDir", "e2b/filesystem/MakeDir"),
    ("/filesystem.Filesystem/Move", "e2b/filesystem/Move"),
    ("/filesystem.Filesystem/ListDir", "e2b/filesystem/ListDir"),
    ("/filesystem.Filesystem/Remove", "e2b/filesystem/Remove"),
    ("/filesystem.Filesystem/WatchDir", "e2b/filesystem/WatchDir"),
    ("/filesystem.Filesystem/CreateWatcher", "e2b/filesystem/CreateWatcher"),
    ("/filesystem.Filesystem/GetWatcherEvents", "e2b/filesystem/GetWatcherEvents"),
    ("/filesystem.Filesystem/RemoveWatcher", "e2b/filesystem/RemoveWatcher"),
];

/// The name of a route of the control plane.
pub(crate) fn control_route(path: &str) -> Option<&'static str> {
    CONTROL_ROUTES.iter().find(|known| **known == path).copied()
}

/// The name of a route of a sandbox, and how its errors are written.
pub(crate) fn sandbox_route(path: &str) -> (&'static str, Form) {
    let form = if path.contains('.') { Form::Connect } else { Form::Sandbox };
    let known = SANDBOX_ROUTES.iter().find(|(known, _)| *known == path);
    (known.map_or(crate::app::NO_ROUTE, |(_, name)| name), form)
}

/// Adds the control plane.
pub(crate) fn control(router: Router<Arc<App>>) -> Router<Arc<App>> {
    use control::*;
    router
        .route("/sandboxes", get(list_running).post(create))
        .route("/v2/sandboxes", get(list).post(create))
        .route("/sandboxes/metrics", get(metrics))
        .route("/sandboxes/{id}", get(show).delete(kill))
        .route("/sandboxes/{id}/timeout", post(set_timeout))
        .route("/sandboxes/{id}/refreshes", post(refresh))
        .route("/sandboxes/{id}/connect", post(connect))
        .route("/v2/sandboxes/{id}/connect", post(connect))
        .route("/sandboxes/{id}/resume", post(connect))
        .route("/sandboxes/{id}/pause", post(pause))
        .route("/sandboxes/{id}/fork", post(fork))
        .route("/sandboxes/{id}/snapshots", post(snapshot))
        .route("/sandboxes/{id}/network", axum::routing::put(network))
        .route("/sandboxes/{id}/metrics", get(metrics))
        .route("/sandboxes/{id}/logs", get(logs))
        .route("/v2/sandboxes/{id}/logs", get(logs))
        .route("/snapshots", get(snapshots))
        .route("/templates", get(templates).post(build))
        .route("/v2/templates", get(templates).post(build))
        .route("/v3/templates", post(build))
        .route("/templates/{*rest}", any(build))
        .route("/v2/templates/{*rest}", any(build))
        .route("/volumes", any(volumes))
        .route("/volumes/{*rest}", any(volumes))
        .route("/secrets", any(secrets))
        .route("/secrets/{*rest}", any(secrets))
        .route("/teams", any(teams))
        .route("/teams/{*rest}", any(teams))
}

/// The routes of a sandbox.
pub(crate) fn sandbox() -> Router<Arc<App>> {
    Router::new()
        .route("/health", get(files::health))
        .route("/metrics", get(files::metrics))
        .route("/envs", get(files::envs))
        .route("/files", get(files::read).post(files::write))
        .route("/execute", post(interpreter::execute))
        .route("/contexts", get(interpreter::contexts).post(interpreter::create))
        .route("/contexts/{name}", delete(interpreter::remove))
        .route("/contexts/{name}/restart", post(interpreter::restart))
        .route("/process.Process/Start", post(process::start))
        .route("/process.Process/Connect", post(process::connect))
        .route("/process.Process/List", post(process::list))
        .route("/process.Process/SendInput", post(process::send_input))
        .route("/process.Process/StreamInput", post(process::stream_input))
        .route("/process.Process/SendSignal", post(process::send_signal))
        .route("/process.Process/Update", post(process::update))
        .route("/process.Process/CloseStdin", post(process::close_stdin))
        .route("/filesystem.Filesystem/Stat", post(filesystem::stat))
        .route("/filesystem.Filesystem/MakeDir", post(filesystem::make_dir))
        .route("/filesystem.Filesystem/Move", post(filesystem::rename))
        .route("/filesystem.Filesystem/ListDir", post(filesystem::list_dir))
        .route("/filesystem.Filesystem/Remove", post(filesystem::remove))
        .route("/filesystem.Filesystem/WatchDir", post(filesystem::watch_dir))
        .route("/filesystem.Filesystem/CreateWatcher", post(filesystem::create_watcher))
        .route("/filesystem.Filesystem/GetWatcherEvents", post(filesystem::watcher_events))
        .route("/filesystem.Filesystem/RemoveWatcher", post(filesystem::remove_watcher))
}

/// The sandbox that a request on the sandbox plane is about.
#[derive(Clone, Debug)]
pub(crate) struct Target(pub(crate) Sandbox);

impl<S: Send + Sync> FromRequestParts<S> for Target {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Target, ApiError> {
        parts.extensions.get::<Target>().cloned().ok_or_else(ApiError::internal)
    }
}

/// Whether a request speaks to a sandbox and not to the server.
pub(crate) fn is_for_a_sandbox(request: &Request) -> bool {
    named(request.headers()).is_some()
}

/// The sandbox and the port that a request names: by headers, or by its host, which says both.
fn named(headers: &HeaderMap) -> Option<(&str, &str)> {
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    if let Some(id) = text("e2b-sandbox-id") {
        return Some((id, text("e2b-sandbox-port").unwrap_or("49983")));
    }
    let (label, _) = text(header::HOST.as_str())?.split_once('.')?;
    let (port, id) = label.split_once('-')?;
    let is_port = (1..=5).contains(&port.len()) && port.bytes().all(|byte| byte.is_ascii_digit());
    (is_port && id.parse::<Uuid>().is_ok()).then_some((id, port))
}

/// Lets a request to a sandbox in that shows its token, or whose address was signed with it. Leaves the sandbox with the
/// request, and answers whose it is.
pub(crate) fn let_in(
    app: &App,
    request: &mut Request,
    peer: Option<IpAddr>,
    address: Option<IpAddr>,
) -> Result<Caller, ApiError> {
    let headers = request.headers();
    let by_host = !headers.contains_key("e2b-sandbox-id");
    // Under a name of its own no page of another name reaches it, and it wants a token anyway.
    if !by_host {
        app.check_host(headers, peer)?;
    }
    let (id, port) = named(headers).ok_or_else(ApiError::internal)?;
    let missing = || ApiError::new("sandbox_not_found", "no sandbox has this id");
    let sandbox = id.parse().ok().and_then(|id| app.backend.engine()?.find(id)).ok_or_else(missing)?;
    if let Some(reason) = sandbox.end_reason() {
        return Err(ApiError::gone(reason));
    }
    let caller = match (sandbox.owner(), app.gate.has_keys()) {
        ("", false) => Caller { key: None, address },
        (owner, _) => {
            let key = app.gate.usable(owner);
            let key =
                key.ok_or_else(|| ApiError::new("unauthorized", "The key of this sandbox is not valid any more"))?;
            Caller { key: Some(key), address }
        }
    };
    debug_assert_eq!(owner(&caller), sandbox.owner());
    let path = request.uri().path();
    let token = app.e2b.token(sandbox.id());
    let shown = ["x-access-token", "e2b-traffic-access-token"].iter().filter_map(|name| headers.get(*name));
    let known = shown.into_iter().any(|shown| bool::from(shown.as_bytes().ct_eq(token.as_bytes())));
    if !known && path != "/health" {
        let operation = if request.method() == axum::http::Method::GET { "read" } else { "write" };
        let query = request.uri().query().unwrap_or_default();
        if path != "/files" || !is_signed(query, operation, &token, jiff::Timestamp::now()) {
            return Err(ApiError::new("unauthorized", "The access token of the sandbox is missing or wrong"));
        }
    }
    match port.parse() {
        Ok(ENVD_PORT | INTERPRETER_PORT) => {}
        _ => {
            let text = "The sandbox is running but port is not open: only its own services can be reached from outside";
            return Err(ApiError::new("not_supported", text));
        }
    }
    request.extensions_mut().insert(Target(sandbox));
    Ok(caller)
}

/// Whether an address of a file was signed: `v1_` and the SHA-256 of `path:operation:user:token[:expiration]`.
fn is_signed(query: &str, operation: &str, token: &str, now: jiff::Timestamp) -> bool {
    let all: Vec<(String, String)> = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    let get = |name: &str| {
        let mut found = all.iter().filter(|(known, _)| known == name).map(|(_, value)| value.as_str());
        // Twice: what was signed need not be what is done.
        match (found.next(), found.next()) {
            (first, None) => Ok(first),
            _ => Err(()),
        }
    };
    let (Ok(path), Ok(user), Ok(Some(signature)), Ok(until)) =
        (get("path"), get("username"), get("signature"), get("signature_expiration"))
    else {
        return false;
    };
    let mut signed = format!("{}:{operation}:{}:{token}", path.unwrap_or_default(), user.unwrap_or_default());
    if let Some(until) = until {
        if until.parse::<i64>().map_or(true, |until| until <= now.as_second()) {
            return false;
        }
        signed.push(':');
        signed.push_str(until);
    }
    let wanted = format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(signed.as_bytes())));
    bool::from(signature.as_bytes().ct_eq(wanted.as_bytes()))
}

/// The user that a request wants to be. A sandbox has one.
pub(crate) fn check_user(name: &str) -> Result<(), ApiError> {
    match name {
        "" | "user" | "sandbox" => Ok(()),
        other => {
            let other: String = other.chars().take(60).collect();
            let text = format!("The sandbox has one user, \"user\": nothing can be done as {other:?}");
            Err(ApiError::new("not_supported", text))
        }
    }
}

/// The user in `Authorization: Basic`.
pub(crate) fn check_basic_user(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(given) = headers.get(header::AUTHORIZATION) else { return Ok(()) };
    let decoded = given.to_str().ok().and_then(|text| {
        let (scheme, encoded) = text.split_once(' ')?;
        let bytes = base64::engine::general_purpose::STANDARD.decode(encoded.trim()).ok()?;
        scheme.eq_ignore_ascii_case("basic").then(|| String::from_utf8(bytes).ok()).flatten()
    });
    let decoded =
        decoded.ok_or_else(|| ApiError::new("unauthorized", "Authorization must be Basic, with a user's name"))?;
    check_user(decoded.split(':').next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_names_its_sandbox_by_headers_or_by_host() {
        let id = "0197a3c2b1f47e6c9d3f0123456789ab";
        let of = |pairs: &[(&'static str, &str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.insert(*name, value.parse().unwrap());
            }
            named(&headers).map(|(id, port)| (id.to_owned(), port.to_owned()))
        };
        let found = |port: &str| Some((id.to_owned(), port.to_owned()));
        assert_eq!(of(&[("e2b-sandbox-id", id), ("e2b-sandbox-port", "49999")]), found("49999"));
        assert_eq!(of(&[("e2b-sandbox-id", id)]), found("49983"));
        assert_eq!(of(&[("host", &format!("3000-{id}.sandbox.example:8080"))]), found("3000"));
        for host in
            ["localhost", "127.0.0.1:3000", "x-y.example", &format!("300000-{id}.example"), &format!("a-{id}.b")]
        {
            assert_eq!(of(&[("host", host)]), None, "{host}");
        }
    }

    #[test]
    fn a_signature_is_for_one_path_one_operation_and_one_time() {
        let now = jiff::Timestamp::from_second(1000).unwrap();
        let sign = |text: &str| format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(text)));
        let query =
            |pairs: &[(&str, &str)]| form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish();
        let signature = sign("a b:read:user:token:1001");
        let good = [("path", "a b"), ("username", "user"), ("signature", &signature), ("signature_expiration", "1001")];
        assert!(is_signed(&query(&good), "read", "token", now));
        assert!(!is_signed(&query(&good), "write", "token", now));
        assert!(!is_signed(&query(&good), "read", "other", now));
        assert!(!is_signed(&query(&good), "read", "token", now + jiff::SignedDuration::from_secs(1)));
        assert!(!is_signed(&query(&[good.as_slice(), &[("path", "c")]].concat()), "read", "token", now));
        assert!(!is_signed(&query(&good[..3]), "read", "token", now));
        let forever = sign("a:read::token");
        assert!(is_signed(&query(&[("path", "a"), ("signature", &forever)]), "read", "token", now));
        assert!(!is_signed(&query(&[("path", "b"), ("signature", &forever)]), "read", "token", now));
    }
}
