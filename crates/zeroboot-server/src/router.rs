//! The routes, and what is done around each of them.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use axum::{
    Router,
    extract::{DefaultBodyLimit, MatchedPath, Request, State},
    http::{HeaderValue, Version, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use hyper::body::Body as _;
use tower::ServiceExt as _;
use tower_http::catch_panic::CatchPanicLayer;
use uuid::Uuid;

use crate::{
    app::{App, NO_ROUTE},
    client_addr::client_address,
    e2b::{self, Form},
    error::ApiError,
    gate::Caller,
    peer::{Asked, Peer},
    routes,
};

/// All routes: ours and those of E2B's control plane, and, for requests to a sandbox, those of E2B's sandboxes.
pub(crate) fn router(app: Arc<App>) -> Router {
    let own = finish(api(), app.clone(), Surface::Api);
    let api = finish(e2b::control(api()).merge(routes::mcp::route(own, &app)), app.clone(), Surface::Api);
    let sandbox = finish(e2b::sandbox(), app, Surface::Sandbox);
    Router::new().fallback(async move |request: Request| {
        let router = if e2b::is_for_a_sandbox(&request) { &sandbox } else { &api };
        // It cannot fail.
        let Ok(response) = router.clone().oneshot(request).await;
        response
    })
}

/// What a request speaks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Surface {
    /// The server.
    Api,
    /// A sandbox, as E2B's SDKs do.
    Sandbox,
}

fn api() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/exec", post(routes::exec::exec))
        .route("/exec", post(routes::exec::exec))
        .route("/v1/exec/batch", post(routes::batch::batch))
        .route("/exec/batch", post(routes::batch::batch))
        .route("/v1/health", get(routes::status::health))
        .route("/health", get(routes::status::health))
        .route("/v1/metrics", get(routes::status::metrics))
        .route("/metrics", get(routes::status::metrics))
        .route("/v1/sandboxes", get(routes::sandboxes::list).post(routes::sandboxes::create))
        .route("/v1/sandboxes/{id}", get(routes::sandboxes::show).delete(routes::sandboxes::delete))
        .route("/v1/sandboxes/{id}/extend", post(routes::sandboxes::extend))
        .route("/v1/sandboxes/{id}/branch", post(routes::sandboxes::branch))
        .route("/v1/sandboxes/{id}/rollback", post(routes::sandboxes::roll_back))
        .route("/v1/sandboxes/{id}/promote", post(routes::sandboxes::promote))
        .route("/v1/sandboxes/{id}/checkpoints", post(routes::checkpoints::create))
        .route("/v1/checkpoints", get(routes::checkpoints::list))
        .route("/v1/checkpoints/{id}", get(routes::checkpoints::show).delete(routes::checkpoints::delete))
        .route("/v1/checkpoints/{id}/restore", post(routes::checkpoints::restore))
        .route("/v1/sandboxes/{id}/run", post(routes::runs::run))
        .route("/v1/sandboxes/{id}/contexts", get(routes::contexts::list).post(routes::contexts::create))
        .route("/v1/sandboxes/{id}/contexts/{name}", delete(routes::contexts::delete))
        .route("/v1/sandboxes/{id}/contexts/{name}/interrupt", post(routes::contexts::interrupt))
        .route("/v1/sandboxes/{id}/contexts/{name}/restart", post(routes::contexts::restart))
        .route("/v1/sandboxes/{id}/commands", get(routes::runs::list).post(routes::runs::start))
        .route("/v1/sandboxes/{id}/commands/{run}", get(routes::runs::show).delete(routes::runs::kill))
        .route("/v1/sandboxes/{id}/commands/{run}/output", get(routes::runs::output))
        .route("/v1/sandboxes/{id}/commands/{run}/stdin", post(routes::runs::stdin))
        .route("/v1/sandboxes/{id}/commands/{run}/signal", post(routes::runs::signal))
        .route("/v1/sandboxes/{id}/commands/{run}/resize", post(routes::runs::resize))
        .route("/v1/sandboxes/{id}/commands/{run}/terminal", get(routes::terminal::attach))
        .route("/v1/sandboxes/{id}/terminal", get(routes::terminal::start))
        .route(
            "/v1/sandboxes/{id}/files",
            get(routes::files::read).put(routes::files::write).delete(routes::files::remove),
        )
        .route("/v1/sandboxes/{id}/files/stat", get(routes::files::stat))
        .route("/v1/sandboxes/{id}/files/list", get(routes::files::list))
        .route("/v1/sandboxes/{id}/files/mkdir", post(routes::files::mkdir))
        .route("/v1/sandboxes/{id}/files/move", post(routes::files::rename))
        .route("/v1/sandboxes/{id}/files/chmod", post(routes::files::chmod))
        .route("/v1/sandboxes/{id}/files/watch", get(routes::files::watch))
        .route("/openapi.json", get(routes::docs::openapi))
        .route("/docs", get(routes::docs::page))
        .route("/", get(routes::page::index))
        .route("/page/{file}", get(routes::page::asset))
}

fn finish(routes: Router<Arc<App>>, app: Arc<App>, surface: Surface) -> Router {
    routes
        .fallback(async || ApiError::new("not_found", "The API has no such path; see /docs"))
        .method_not_allowed_fallback(async || {
            ApiError::new("method_not_allowed", "This path does not take this method; see the Allow header")
        })
        // The body is read under our own limit and time, after authentication.
        .layer(DefaultBodyLimit::disable())
        .layer(CatchPanicLayer::custom(|_panic: Box<dyn std::any::Any + Send>| ApiError::internal().into_response()))
        .layer(middleware::from_fn_with_state((app.clone(), surface), around))
        .with_state(app)
}

/// The outermost layer: gives the request its id, lets only callers with a key through, renders errors, counts and logs
/// the answer. Never the path as it was sent, the query, a header or a body: they can hold code and keys.
async fn around(State((app, surface)): State<(Arc<App>, Surface)>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let id = Uuid::now_v7();
    let (method, version) = (request.method().clone(), request.version());
    let matched = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let (route, form) = match surface {
        Surface::Api => {
            let control = matched.and_then(e2b::control_route);
            (control.or_else(|| matched.map(known_route)).unwrap_or(NO_ROUTE), control.map(|_| Form::Control))
        }
        Surface::Sandbox => {
            let (route, form) = e2b::sandbox_route(matched.unwrap_or_default());
            (route, Some(form))
        }
    };
    let peer = request.extensions_mut().remove::<Peer>().unwrap_or_default();
    let client = client_address(peer.ip, request.headers(), &app.config.trusted_proxies);
    let after = peer.after.clone();
    let has_body = !request.body().is_end_stream();
    let admitted = match surface {
        Surface::Api => app.let_in(route, request.headers(), peer.ip, client),
        Surface::Sandbox => e2b::let_in(&app, &mut request, peer.ip, client),
    };
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
        response = match form {
            None => error.render(id, response),
            Some(form) => e2b::render(form, &error, response),
        };
    }
    let mut text = Uuid::encode_buffer();
    if let Ok(value) = HeaderValue::from_str(id.hyphenated().encode_lower(&mut text)) {
        response.headers_mut().insert("x-request-id", value);
    }
    // A client that keeps its connection would come back to a server that ends. (HTTP/2 says it in a frame of its own.)
    let ends = app.draining.load(Ordering::Relaxed);
    // A sandbox can refuse before its request's body was read; hyper closes such a connection, and a client that was not
    // told would send its next request into it.
    let refused = response.status().is_client_error()
        || (form.is_some() && response.status().is_server_error())
        || response.extensions().get::<e2b::Unread>().is_some();
    let unread = has_body && refused && (form.is_some() || SANDBOX_ROUTES.contains(&route));
    if version < Version::HTTP_2 && (ends || unread) {
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

/// Those of sandboxes, as they stand in logs and metrics.
const SANDBOX_ROUTES: [&str; 30] = [
    "/v1/sandboxes",
    "/v1/sandboxes/{id}",
    "/v1/sandboxes/{id}/extend",
    "/v1/sandboxes/{id}/branch",
    "/v1/sandboxes/{id}/rollback",
    "/v1/sandboxes/{id}/promote",
    "/v1/sandboxes/{id}/checkpoints",
    "/v1/checkpoints",
    "/v1/checkpoints/{id}",
    "/v1/checkpoints/{id}/restore",
    "/v1/sandboxes/{id}/run",
    "/v1/sandboxes/{id}/contexts",
    "/v1/sandboxes/{id}/contexts/{name}",
    "/v1/sandboxes/{id}/contexts/{name}/interrupt",
    "/v1/sandboxes/{id}/contexts/{name}/restart",
    "/v1/sandboxes/{id}/commands",
    "/v1/sandboxes/{id}/commands/{run}",
    "/v1/sandboxes/{id}/commands/{run}/output",
    "/v1/sandboxes/{id}/commands/{run}/stdin",
    "/v1/sandboxes/{id}/commands/{run}/signal",
    "/v1/sandboxes/{id}/commands/{run}/resize",
    "/v1/sandboxes/{id}/commands/{run}/terminal",
    "/v1/sandboxes/{id}/terminal",
    "/v1/sandboxes/{id}/files",
    "/v1/sandboxes/{id}/files/stat",
    "/v1/sandboxes/{id}/files/list",
    "/v1/sandboxes/{id}/files/mkdir",
    "/v1/sandboxes/{id}/files/move",
    "/v1/sandboxes/{id}/files/chmod",
    "/v1/sandboxes/{id}/files/watch",
];

/// Routes as they stand in logs and metrics: a fixed list, aliases under one name.
fn known_route(path: &str) -> &'static str {
    match path {
        "/v1/exec" | "/exec" => "/v1/exec",
        "/v1/exec/batch" | "/exec/batch" => "/v1/exec/batch",
        "/v1/health" | "/health" => "/v1/health",
        "/v1/metrics" | "/metrics" => "/v1/metrics",
        "/openapi.json" => "/openapi.json",
        "/docs" => "/docs",
        "/mcp" => "/mcp",
        "/" => "/",
        "/page/{file}" => "/page/{file}",
        _ => SANDBOX_ROUTES.iter().find(|known| **known == path).copied().unwrap_or("other"),
    }
}

#[cfg(test)]
#[path = "router_tests.rs"]
mod tests;
