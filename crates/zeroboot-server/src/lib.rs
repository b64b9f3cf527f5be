//! The HTTP API: routes, keys, limits, errors to status, metrics, listening. Knows the engine, not KVM.
#![forbid(unsafe_code)]

mod answer;
mod client_addr;
mod config;
mod error;
mod file_config;
mod keys;
mod limiter;
mod wire;

pub use config::{ConfigError, DEFAULT_LISTEN, Listen, Overrides, RequestLimits, ServerConfig, TlsFiles, env, read_config};
pub use error::ERROR_CODES;
pub use file_config::{EngineSection, FileConfig, LimitsSection, LogSection, TemplateSection, TlsSection};
pub use keys::{DEMO_PREFIX, Key, KeyFileError, KeyRing, KeyStore, LIVE_PREFIX, Lookup, NewKey};

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
