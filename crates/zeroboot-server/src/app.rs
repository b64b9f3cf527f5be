//! What every route shares, the routes themselves, and what is done around each of them.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::{DefaultBodyLimit, MatchedPath, Request, State},
    http::{HeaderMap, HeaderValue, Version, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use tokio::sync::Notify;
use tower_http::catch_panic::CatchPanicLayer;
use uuid::Uuid;

use crate::{
    backend::Backend,
    budget::{Budget, Full, Share},
    canary::Canaries,
    client_addr::client_address,
    config::ServerConfig,
    error::ApiError,
    gate::{Caller, Gate, is_local_host},
    logging::Afterwards,
    metrics::Metrics,
    places::Visit,
    routes,
    wire::Catalog,
};

/// What every route shares.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) backend: Backend,
    pub(crate) config: ServerConfig,
    pub(crate) catalog: Catalog,
    pub(crate) gate: Gate,
    pub(crate) metrics: Metrics,
    pub(crate) budget: Arc<Budget>,
    pub(crate) canaries: Canaries,
    /// The shutdown signal came.
    pub(crate) draining: AtomicBool,
    pub(crate) started: Instant,
}

impl App {
    pub(crate) fn new(backend: Backend, config: ServerConfig, gate: Gate) -> App {
        let templates = backend.templates().into_iter().map(|status| (status.name, status.language)).collect();
        let catalog = Catalog { templates };
        App {
            gate,
            canaries: Canaries::new(&catalog, config.limits.default_memory),
            catalog,
            backend,
            budget: Budget::new(&config.limits),
            config,
            metrics: Metrics::new(),
            draining: AtomicBool::new(false),
            started: Instant::now(),
        }
    }

    /// What may be held for a request of this caller; refused when the server ends, or holds too much already.
    pub(crate) fn admit(&self, caller: &Caller) -> Result<Arc<Share>, ApiError> {
        self.check_open()?;
        self.budget.share(caller).map_err(Full::busy)
    }

    /// Who asks; refused without a key where the route and the server want one.
    fn let_in(
        &self,
        route: &str,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
        address: Option<IpAddr>,
    ) -> Result<Caller, ApiError> {
        // RFC 9112, 3.2: a proxy before us may go by the other one.
        if headers.get_all(header::HOST).iter().nth(1).is_some() {
            return Err(ApiError::new("invalid_request", "The request has more than one Host header"));
        }
        // Without keys a page of any name could ask for its own name to be this address, and would be let in.
        let proxied =
            |ip: &IpAddr| self.config.trusted_proxies.iter().any(|network| network.contains(&ip.to_canonical()));
        if !self.gate.has_keys()
            && peer.is_some_and(|ip| !proxied(&ip))
            && !headers.get(header::HOST).is_none_or(|host| is_local_host(host.as_bytes()))
        {
            let text = "This server has no keys, so it answers only under its address or localhost";
            return Err(ApiError::new("forbidden_host", text));
        }
        let open = match route {
            "/v1/health" | "/openapi.json" | "/docs" | NO_ROUTE => true,
            "/v1/metrics" => self.config.metrics_public,
            _ => false,
        };
        if open { Ok(Caller { key: None, address }) } else { self.gate.authenticate(headers, address) }
    }

    /// Refuses new execs once the shutdown signal came, and while nothing has run yet.
    pub(crate) fn check_open(&self) -> Result<(), ApiError> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(zeroboot_engine::ExecError::ShuttingDown.into());
        }
        if !self.canaries.proven() {
            let text = "No template could run code yet; the server's log says why";
            return Err(ApiError::new("not_ready", text).retry_after(Duration::from_secs(1)));
        }
        Ok(())
    }
}

/// The other end of a connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct Peer {
    /// `None`: a Unix socket.
    pub(crate) ip: Option<IpAddr>,
    /// Ends the connection at once.
    pub(crate) cut: Arc<Notify>,
    pub(crate) after: Afterwards,
    pub(crate) visit: Arc<Visit>,
}

/// What is known of a request besides what it says.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    /// Also in its answer's headers.
    pub(crate) request_id: Uuid,
    /// Whose it is: on a route that wants a key, and where there are keys, one with a key.
    pub(crate) caller: Caller,
    pub(crate) peer: Peer,
}

/// All routes.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/exec", post(routes::exec::exec))
        .route("/exec", post(routes::exec::exec))
        .route("/v1/exec/batch", post(routes::batch::batch))
        .route("/exec/batch", post(routes::batch::batch))
        .route("/v1/health", get(routes::status::health))
        .route("/health", get(routes::status::health))
        .route("/v1/metrics", get(routes::status::metrics))
        .route("/metrics", get(routes::status::metrics))
        .route("/openapi.json", get(routes::docs::openapi))
        .route("/docs", get(routes::docs::page))
        .fallback(async || ApiError::new("not_found", "There is nothing at this path; see /docs"))
        .method_not_allowed_fallback(async || {
            ApiError::new("method_not_allowed", "This path has another method; see the Allow header")
        })
        // The body is read under our own limit and time, after authentication.
        .layer(DefaultBodyLimit::disable())
        .layer(CatchPanicLayer::custom(|_panic: Box<dyn std::any::Any + Send>| ApiError::internal().into_response()))
        .layer(middleware::from_fn_with_state(app.clone(), around))
        .with_state(app)
}

/// The outermost layer: gives the request its id, lets only callers with a key through, renders errors, counts and logs
/// the answer. Never the path as it was sent, the query, a header or a body: they can hold code and keys.
async fn around(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let id = Uuid::now_v7();
    let (method, version) = (request.method().clone(), request.version());
    let route = request.extensions().get::<MatchedPath>().map_or(NO_ROUTE, |path| known_route(path.as_str()));
    let peer = request.extensions_mut().remove::<Peer>().unwrap_or_default();
    let client = client_address(peer.ip, request.headers(), &app.config.trusted_proxies);
    let after = peer.after.clone();
    let admitted = app.let_in(route, request.headers(), peer.ip, client);
    let caller = admitted.as_ref().map_or(Caller { key: None, address: client }, Caller::clone);
    let mut response = match admitted {
        Ok(caller) => {
            if caller.key.is_some() || !app.gate.has_keys() {
                peer.visit.prove();
            }
            request.extensions_mut().insert(Asked { request_id: id, caller, peer });
            next.run(request).await
        }
        Err(error) => error.into_response(),
    };
    let mut code = "";
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        code = error.code;
        response = error.render(id, response);
    }
    let mut text = Uuid::encode_buffer();
    if let Ok(value) = HeaderValue::from_str(id.hyphenated().encode_lower(&mut text)) {
        response.headers_mut().insert("x-request-id", value);
    }
    // A client that keeps its connection would come back to a server that ends. (HTTP/2 says it in a frame of its own.)
    if version < Version::HTTP_2 && app.draining.load(Ordering::Relaxed) {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    let status = response.status().as_u16();
    let time = start.elapsed();
    app.metrics.answered(route, status, time);
    after.push(move || {
        let client = client.map(tracing::field::display);
        tracing::info!(
            request_id = %id, %method, route, status, code, key = caller.key_id(), client,
            ms = time.as_secs_f64() * 1e3, "answered"
        );
    });
    response
}

/// Where no route is.
const NO_ROUTE: &str = "none";

/// Routes as they stand in logs and metrics: a fixed list, aliases under one name.
fn known_route(path: &str) -> &'static str {
    match path {
        "/v1/exec" | "/exec" => "/v1/exec",
        "/v1/exec/batch" | "/exec/batch" => "/v1/exec/batch",
        "/v1/health" | "/health" => "/v1/health",
        "/v1/metrics" | "/metrics" => "/v1/metrics",
        "/openapi.json" => "/openapi.json",
        "/docs" => "/docs",
        _ => "other",
    }
}

#[cfg(test)]
#[path = "app_tests.rs"]
mod tests;
