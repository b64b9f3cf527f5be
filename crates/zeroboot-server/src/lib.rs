//! The HTTP API: routes, keys, limits, errors to status, metrics, listening. Knows the engine, not KVM.
#![forbid(unsafe_code)]

mod answer;
mod app;
mod backend;
mod body;
mod budget;
mod call;
mod canary;
mod client_addr;
mod config;
mod e2b;
mod error;
#[cfg(test)]
mod fake;
mod file_config;
mod gate;
mod keys;
mod limiter;
mod listen;
mod logging;
mod metrics;
mod notify;
mod openapi;
mod openapi_sandboxes;
mod otlp;
mod overhead;
mod params;
mod peer;
mod places;
mod router;
mod routes;
mod sandbox_answer;
mod sandbox_wire;
mod serve;
mod sse;
mod streams;
mod under_way;

mod wire;

pub use answer::answer;
pub use config::{ConfigError, Listen, Overrides, RequestLimits, ServerConfig, TlsFiles, env, read_config};
pub use error::ERROR_CODES;
pub use file_config::{EngineSection, FileConfig, LimitsSection, LogSection, TemplateSection, TlsSection};
pub use keys::{
    DEMO_PREFIX, E2B_PREFIX, Key, KeyFileError, KeyFileFault, KeyRing, KeyStore, LIVE_PREFIX, Lookup, NewKey,
};
pub use listen::TlsError;
pub use logging::{DEFAULT_FILTER, LogError, LogGuard, init_logging, log_colours};
pub use metrics::names as metric_names;
pub use openapi::openapi_json;
pub use otlp::OtlpError;
pub use overhead::{Overhead, OverheadError, measure_overhead};
pub use serve::{ServeError, Server};
pub use wire::nearest;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}
