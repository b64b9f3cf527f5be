//! `GET /v1/health` and `GET /v1/metrics`.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
};

use axum::{
    Extension,
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;
use zeroboot_engine::Isolation;

use crate::{
    app::App,
    body::{json_response, serialize},
    error::ApiError,
    metrics::Format,
    peer::Asked,
};

/// Whether code can be run.
#[derive(Serialize, ToSchema)]
#[schema(as = Health)]
pub(crate) struct HealthBody<'a> {
    /// `ok`: every template runs code. `degraded`: some do; `reasons` says why. `unavailable`: none does (status 503).
    /// `warming`: the server started a moment ago, and requests wait until it is ready (status 503).
    /// `shutting_down`: the server ends (status 503).
    status: HealthStatus,
    /// Why it is not `ok`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    reasons: Vec<String>,
    /// What is weaker here than it could be, for callers with a key.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    warnings: Vec<String>,
    /// By name.
    templates: BTreeMap<&'a str, TemplateBody<'a>>,
    /// Sandboxes that serve a request now.
    live: usize,
    uptime_seconds: u64,
    /// The server's version.
    version: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum HealthStatus {
    Ok,
    Degraded,
    Unavailable,
    Warming,
    ShuttingDown,
}

/// One template.
#[derive(Serialize, ToSchema)]
#[schema(as = TemplateHealth)]
pub(crate) struct TemplateBody<'a> {
    /// It is up, and a canary exec just passed.
    ready: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    reason: Option<Cow<'a, str>>,
    language: &'a str,
    /// The engine: the same word as `isolation`.
    #[schema(value_type = crate::answer::IsolationName)]
    engine: &'static str,
    #[schema(value_type = crate::answer::IsolationName)]
    isolation: &'static str,
    /// The runtime's own version.
    version: &'a str,
    /// Modules that are imported already.
    warmed: &'a [String],
    /// `numpy` is one of them; the original's field.
    numpy: bool,
    /// Resident memory of the template.
    memory_mb: f64,
    /// Sandboxes waiting.
    pool_ready: usize,
    /// Sandboxes that should wait.
    pool_target: usize,
    /// Sandboxes forked since the start.
    forks: u64,
    /// Restarts of its zygote since the start.
    restarts: u64,
    /// Sandboxes of it that live, apart from those that serve one exec.
    sandboxes: usize,
    /// Age of the canary's result; 0 while there is none.
    canary_age_seconds: f64,
}

/// What everyone may know of a template that is down. The engine's own text names processes and paths of the host.
const NOT_UP: &str = "it is not up; the server's log says why";
const WARMING: &str = "it is warming";
const CANARY_FAILED: &str = "its canary exec failed; the server's log says why";

/// The warning of a server that serves tenants without cgroups.
pub(crate) const NO_CGROUP: &str = "sandboxes have no cgroup: their agents count the memory that the kernel holds for them, some milliseconds \
     late, and nothing shares the CPUs out; one key's code can take memory and time from all; see docs/threat-model.md";

pub(crate) async fn health(
    State(app): State<Arc<App>>,
    Extension(Asked { caller, .. }): Extension<Asked>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    // Without keys every caller is of this machine.
    let told = app.gate.authenticate(&headers, caller.address).is_ok();
    // Old results are made new on the spot, so `ready` never rests on one that is older than two rounds. While the
    // templates warm a canary would wait for them.
    let warming = !app.canaries.tried() && app.backend.templates().iter().any(|template| !template.ready);
    let canaries =
        if warming { Vec::new() } else { app.canaries.results(&app.backend, app.config.canary_interval * 2).await };
    let canaries = canaries.iter().map(Some).chain(std::iter::repeat(None));
    let statuses = app.backend.templates();
    let sandboxes = app.backend.engine().map(zeroboot_engine::Engine::sandboxes).unwrap_or_default();
    let mut templates = BTreeMap::new();
    let mut reasons = Vec::new();
    for (status, canary) in statuses.iter().zip(canaries) {
        let reason: Option<Cow<'_, str>> = match (&status.reason, canary.map(|canary| &canary.result)) {
            (_, None) => Some(WARMING.into()),
            (reason, _) if !status.ready => Some(reason.as_deref().filter(|_| told).unwrap_or(NOT_UP).into()),
            (_, Some(Err(error))) => Some(if told { error.to_string().into() } else { CANARY_FAILED.into() }),
            _ => None,
        };
        if let Some(reason) = &reason {
            reasons.push(format!("template {}: {reason}", status.name));
        }
        let body = TemplateBody {
            ready: reason.is_none(),
            reason,
            language: &status.language,
            engine: status.isolation.as_str(),
            isolation: status.isolation.as_str(),
            version: &status.version,
            warmed: &status.warmed,
            // Such as `numpy 2.4.6`.
            numpy: status.warmed.iter().any(|module| module.split(" ").next() == Some("numpy")),
            memory_mb: (status.memory as f64 / (1024.0 * 1024.0) * 10.0).round() / 10.0,
            pool_ready: status.pool_ready,
            pool_target: status.pool_target,
            forks: status.forks,
            restarts: status.restarts,
            sandboxes: sandboxes.iter().filter(|sandbox| sandbox.template() == status.name).count(),
            canary_age_seconds: canary.map_or(0.0, |canary| (canary.at.elapsed().as_secs_f64() * 10.0).round() / 10.0),
        };
        templates.insert(status.name.as_str(), body);
    }
    let ready = templates.values().filter(|template| template.ready).count();
    let status = match ready {
        _ if app.draining.load(Ordering::Relaxed) => HealthStatus::ShuttingDown,
        _ if warming => HealthStatus::Warming,
        0 => HealthStatus::Unavailable,
        _ if ready < templates.len() => HealthStatus::Degraded,
        _ => HealthStatus::Ok,
    };
    let shares_kernel = statuses.iter().any(|status| status.isolation == Isolation::Process);
    let obstacle = app.backend.cgroup_obstacle().filter(|_| told && shares_kernel && app.gate.has_keys());
    let warnings: Vec<String> = obstacle.map(|why| format!("{NO_CGROUP} ({why})")).into_iter().collect();
    let mut response = json_response(
        serialize(&HealthBody {
            status,
            reasons,
            warnings,
            templates,
            live: app.backend.stats().live,
            uptime_seconds: app.started.elapsed().as_secs(),
            version: env!("CARGO_PKG_VERSION"),
        })?
        .into(),
    );
    if matches!(status, HealthStatus::Unavailable | HealthStatus::Warming | HealthStatus::ShuttingDown) {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    Ok(response)
}

pub(crate) async fn metrics(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let format = if accept.contains("application/openmetrics-text") { Format::OpenMetrics } else { Format::Text };
    let canaries = app.canaries.last().await;
    let templates: Vec<_> = app.backend.templates().into_iter().zip(canaries).collect();
    let sandboxes = app.backend.engine().map(zeroboot_engine::Engine::sandboxes).unwrap_or_default();
    let text = app.metrics.encode(&templates, &sandboxes, app.backend.stats(), format);
    ([(header::CONTENT_TYPE, format.content_type())], text).into_response()
}
