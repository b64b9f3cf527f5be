//! What every route shares.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::http::{HeaderMap, header};
use tokio_util::sync::CancellationToken;
use zeroboot_engine::TemplateStatus;

use crate::{
    backend::Backend,
    budget::{Budget, Full, Share},
    canary::Canaries,
    config::ServerConfig,
    error::ApiError,
    gate::{Caller, Gate, is_local_host},
    metrics::Metrics,
    streams::Streams,
    wire::{Catalog, Named},
};

/// Where no route is, in logs and metrics.
pub(crate) const NO_ROUTE: &str = "none";

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
    /// Cancelled when sessions of the Model Context Protocol are to end.
    pub(crate) mcp_ends: CancellationToken,
    pub(crate) started: Instant,
    pub(crate) streams: Arc<Streams>,
    pub(crate) e2b: crate::e2b::Shared,
    /// Requests that wait for the end of a run.
    waiting: Arc<AtomicUsize>,
}

/// A request that waits for the end of a run: the server's end waits for it.
#[derive(Debug)]
pub(crate) struct Foreground(Arc<AtomicUsize>);

impl Drop for Foreground {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl App {
    pub(crate) fn new(backend: Backend, config: ServerConfig, gate: Gate) -> App {
        let named = |status: TemplateStatus| Named { name: status.name.into(), language: status.language.into() };
        let templates = backend.templates().into_iter().map(named).collect();
        let catalog = Catalog { templates };
        App {
            gate,
            canaries: Canaries::new(&catalog, config.limits.default_memory),
            catalog,
            backend,
            budget: Budget::new(&config.limits),
            streams: Streams::new(config.limits.max_streams_per_key),
            config,
            e2b: crate::e2b::Shared::default(),
            metrics: Metrics::new(),
            draining: AtomicBool::new(false),
            mcp_ends: CancellationToken::new(),
            started: Instant::now(),
            waiting: Arc::default(),
        }
    }

    pub(crate) fn foreground(&self) -> Foreground {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        Foreground(self.waiting.clone())
    }

    /// Execs and runs whose end somebody waits for.
    pub(crate) fn under_way(&self) -> usize {
        usize::try_from(self.metrics.under_way()).unwrap_or(0) + self.waiting.load(Ordering::SeqCst)
    }

    /// What may be held for a request of this caller; refused when the server ends, or holds too much already.
    pub(crate) fn admit(&self, caller: &Caller) -> Result<Arc<Share>, ApiError> {
        self.check_open()?;
        self.budget.share(caller).map_err(Full::busy)
    }

    /// Who asks; refused without a key where the route and the server want one.
    pub(crate) fn let_in(
        &self,
        route: &str,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
        address: Option<IpAddr>,
    ) -> Result<Caller, ApiError> {
        self.check_host(headers, peer)?;
        let open = match route {
            "/v1/health" | "/openapi.json" | "/docs" | "/" | "/page/{file}" | NO_ROUTE => true,
            "/v1/metrics" => self.config.metrics_public,
            _ => false,
        };
        if open { Ok(Caller { key: None, address }) } else { self.gate.authenticate(headers, address) }
    }

    /// Refuses a request under a name that this server is not to answer to.
    pub(crate) fn check_host(&self, headers: &HeaderMap, peer: Option<IpAddr>) -> Result<(), ApiError> {
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
        Ok(())
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
