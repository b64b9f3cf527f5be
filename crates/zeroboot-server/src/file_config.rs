//! The configuration file's shape. Every key is optional, an unknown one is an error.

use std::{path::PathBuf, time::Duration};

use serde::Deserialize;

use crate::config::{ConfigError, ServerConfig, TlsFiles, networks};

/// The whole file. The server reads all but `[engine]` and `[[template]]`, which are for the caller that starts the engine.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FileConfig {
    /// Addresses: `127.0.0.1:8080`, `unix:/run/zeroboot/zeroboot.sock`.
    pub listen: Option<Vec<String>>,
    /// Mode of Unix sockets, octal, as text: `"0660"`.
    pub socket_mode: Option<String>,
    /// The key file.
    pub keys_file: Option<PathBuf>,
    /// Networks of proxies whose forwarded headers count.
    pub trusted_proxies: Option<Vec<String>>,
    /// `/v1/metrics` needs no key.
    pub metrics_public: Option<bool>,
    /// `GET /` is the page to try code on.
    pub page: Option<bool>,
    /// How long live requests may take to end after the shutdown signal.
    pub drain_seconds: Option<f64>,
    /// How often each template's canary runs.
    pub canary_interval_seconds: Option<f64>,
    /// How often the key file and the certificates are looked at.
    pub reload_interval_seconds: Option<f64>,
    /// Certificates.
    pub tls: Option<TlsSection>,
    /// Bounds.
    pub limits: LimitsSection,
    /// Logs.
    pub log: LogSection,
    /// The engine.
    pub engine: EngineSection,
    /// The templates to serve, instead of the default ones.
    pub template: Vec<TemplateSection>,
}

/// `[tls]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSection {
    /// Certificate chain (PEM).
    pub cert: PathBuf,
    /// Private key (PEM).
    pub key: PathBuf,
}

/// `[limits]`: see [`crate::RequestLimits`] for the meaning of each.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "each field is the one of RequestLimits with its unit in the name")]
pub struct LimitsSection {
    pub default_timeout_seconds: Option<f64>,
    pub max_timeout_seconds: Option<f64>,
    pub max_body_bytes: Option<usize>,
    pub max_batch: Option<usize>,
    pub batch_parallel: Option<usize>,
    pub batch_wait_seconds: Option<f64>,
    pub max_batch_seconds: Option<f64>,
    pub max_batch_output_bytes: Option<u64>,
    pub default_memory_mb: Option<u64>,
    pub max_memory_mb: Option<u64>,
    pub default_processes: Option<u32>,
    pub max_processes: Option<u32>,
    pub default_output_bytes: Option<u64>,
    pub max_output_bytes: Option<u64>,
    pub default_file_size_mb: Option<u64>,
    pub max_file_size_mb: Option<u64>,
    pub default_open_files: Option<u32>,
    pub max_open_files: Option<u32>,
    pub key_rate: Option<f64>,
    pub key_concurrency: Option<u32>,
    pub anonymous_rate: Option<f64>,
    pub demo_per_minute: Option<f64>,
    pub max_connections: Option<usize>,
    pub max_connections_per_address: Option<usize>,
    pub header_timeout_seconds: Option<f64>,
    pub body_timeout_seconds: Option<f64>,
    pub stall_timeout_seconds: Option<f64>,
    pub max_held_mb: Option<u64>,
    pub default_lease_seconds: Option<f64>,
    pub max_lease_seconds: Option<f64>,
    pub max_sandboxes_per_key: Option<usize>,
    pub max_checkpoints_per_key: Option<usize>,
    pub max_streams_per_key: Option<usize>,
}

/// `[log]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogSection {
    /// `text` or `json`.
    pub format: Option<crate::LogFormat>,
    /// A filter such as `info` or `zeroboot_server=debug`.
    pub filter: Option<String>,
    /// Where OTLP traces go, such as `http://127.0.0.1:4318`; without it there are none.
    pub otlp_endpoint: Option<String>,
}

/// `[engine]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineSection {
    /// `auto`, `vm` or `process`.
    pub kind: Option<String>,
    /// Most sandboxes that serve a request at once.
    pub max_live: Option<usize>,
    /// Memory that live sandboxes may be promised, MiB.
    pub max_memory_mb: Option<u64>,
    /// Most long-lived sandboxes at once, apart from those that serve one exec.
    pub max_sandboxes: Option<usize>,
    /// Most checkpoints of those that are kept at once.
    pub max_checkpoints: Option<usize>,
    /// Memory that those may be promised, MiB; half of `max_memory_mb` if absent.
    pub sandbox_memory_mb: Option<u64>,
    /// How long a request may wait for admission.
    pub admission_wait_seconds: Option<f64>,
    /// How long a template may take to warm up.
    pub warm_timeout_seconds: Option<f64>,
    /// Sandboxes kept ready of each template that names no number.
    pub pool: Option<usize>,
    /// Where template directories are.
    pub store: Option<PathBuf>,
}

/// One `[[template]]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateSection {
    /// What requests call it.
    pub name: String,
    /// `python` or `node`; the name if absent.
    #[serde(default)]
    pub language: Option<String>,
    /// The VM engine: its directory.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// The process engine: the interpreter.
    #[serde(default)]
    pub interpreter: Option<PathBuf>,
    /// Python packages as `pip install` takes them; wheels only.
    #[serde(default)]
    pub pip: Vec<String>,
    /// Node packages as `npm install` takes them; their install scripts are not run.
    #[serde(default)]
    pub npm: Vec<String>,
    /// The VM engine: Debian packages.
    #[serde(default)]
    pub packages: Vec<String>,
    /// The VM engine: memory of a sandbox, MiB.
    #[serde(default)]
    pub memory_mib: Option<u32>,
    /// Modules to import ahead.
    #[serde(default)]
    pub warm: Option<Vec<String>>,
    /// Environment of the runtime.
    #[serde(default)]
    pub env: std::collections::BTreeMap<String, String>,
    /// Sandboxes kept ready.
    #[serde(default)]
    pub pool: Option<usize>,
}

/// A number of seconds from the file.
fn seconds(name: &'static str, value: Option<f64>, into: &mut Duration) -> Result<(), ConfigError> {
    if let Some(value) = value {
        *into = Duration::try_from_secs_f64(value).map_err(|_| ConfigError::Range(name, "a number of seconds"))?;
    }
    Ok(())
}

fn put<T: Copy>(value: Option<T>, into: &mut T) {
    if let Some(value) = value {
        *into = value;
    }
}

impl FileConfig {
    /// Puts what the file says over `config`.
    pub(crate) fn apply(&self, config: &mut ServerConfig) -> Result<(), ConfigError> {
        if let Some(listen) = &self.listen {
            config.listen = listen.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        }
        if let Some(mode) = &self.socket_mode {
            let bits = u32::from_str_radix(mode, 8).ok().filter(|bits| *bits <= 0o777);
            config.socket_mode = bits.ok_or_else(|| ConfigError::Mode(mode.clone()))?;
        }
        if let Some(proxies) = &self.trusted_proxies {
            config.trusted_proxies = networks(proxies)?;
        }
        config.keys_file.clone_from(&self.keys_file);
        config.tls = self.tls.clone().map(|tls| TlsFiles { cert: tls.cert, key: tls.key });
        put(self.metrics_public, &mut config.metrics_public);
        put(self.page, &mut config.page);
        seconds("drain_seconds", self.drain_seconds, &mut config.drain)?;
        seconds("canary_interval_seconds", self.canary_interval_seconds, &mut config.canary_interval)?;
        seconds("reload_interval_seconds", self.reload_interval_seconds, &mut config.reload_interval)?;

        let (from, to) = (&self.limits, &mut config.limits);
        seconds("default_timeout_seconds", from.default_timeout_seconds, &mut to.default_timeout)?;
        seconds("max_timeout_seconds", from.max_timeout_seconds, &mut to.max_timeout)?;
        seconds("batch_wait_seconds", from.batch_wait_seconds, &mut to.batch_wait)?;
        seconds("max_batch_seconds", from.max_batch_seconds, &mut to.max_batch_time)?;
        seconds("header_timeout_seconds", from.header_timeout_seconds, &mut to.header_timeout)?;
        seconds("body_timeout_seconds", from.body_timeout_seconds, &mut to.body_timeout)?;
        seconds("stall_timeout_seconds", from.stall_timeout_seconds, &mut to.stall_timeout)?;
        seconds("default_lease_seconds", from.default_lease_seconds, &mut to.default_lease)?;
        seconds("max_lease_seconds", from.max_lease_seconds, &mut to.max_lease)?;
        put(from.max_sandboxes_per_key, &mut to.max_sandboxes_per_key);
        put(from.max_checkpoints_per_key, &mut to.max_checkpoints_per_key);
        put(from.max_streams_per_key, &mut to.max_streams_per_key);
        put(from.max_body_bytes, &mut to.max_body);
        put(from.max_batch, &mut to.max_batch);
        put(from.batch_parallel, &mut to.batch_parallel);
        put(from.max_batch_output_bytes, &mut to.max_batch_output);
        put(from.default_memory_mb.map(mebibytes), &mut to.default_memory);
        put(from.max_memory_mb.map(mebibytes), &mut to.max_memory);
        put(from.default_processes, &mut to.default_processes);
        put(from.max_processes, &mut to.max_processes);
        put(from.default_output_bytes, &mut to.default_output);
        put(from.max_output_bytes, &mut to.max_output);
        put(from.default_file_size_mb.map(mebibytes), &mut to.default_file_size);
        put(from.max_file_size_mb.map(mebibytes), &mut to.max_file_size);
        put(from.default_open_files, &mut to.default_open_files);
        put(from.max_open_files, &mut to.max_open_files);
        put(from.key_rate, &mut to.key_rate);
        put(from.demo_per_minute, &mut to.demo_per_minute);
        put(from.max_connections, &mut to.max_connections);
        put(from.max_connections_per_address.map(Some), &mut to.max_connections_per_address);
        put(from.max_held_mb.map(mebibytes), &mut to.max_held);
        put(from.key_concurrency.map(Some), &mut to.key_concurrency);
        put(from.anonymous_rate.map(Some), &mut to.anonymous_rate);
        Ok(())
    }
}

/// MiB as bytes; saturates, so that a silly number stays a large one.
fn mebibytes(count: u64) -> u64 {
    count.saturating_mul(1024 * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_refused() {
        for text in
            ["lisen = []", "[limits]\nmax_bdy = 1", "[[template]]\nname = \"a\"\npol = 1", "[tls]\ncert = \"a\""]
        {
            assert!(toml::from_str::<FileConfig>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn every_part_of_a_full_file_is_taken() {
        let text = r#"
            listen = ["127.0.0.1:9000"]
            socket_mode = "0600"
            trusted_proxies = ["10.0.0.0/8"]
            drain_seconds = 1.5
            [tls]
            cert = "/c"
            key = "/k"
            [limits]
            max_timeout_seconds = 60
            key_concurrency = 4
            default_memory_mb = 64
            [log]
            format = "json"
            [engine]
            kind = "process"
            [[template]]
            name = "python"
            warm = ["numpy"]
        "#;
        let file: FileConfig = toml::from_str(text).unwrap();
        let mut config = ServerConfig::default();
        file.apply(&mut config).unwrap();
        assert_eq!(config.socket_mode, 0o600);
        assert_eq!(config.drain, Duration::from_millis(1500));
        assert_eq!(config.limits.max_timeout, Duration::from_secs(60));
        assert_eq!(config.limits.key_concurrency, Some(4));
        assert_eq!(config.limits.default_memory, 64 << 20);
        assert!(config.tls.is_some());
        config.check().unwrap();
    }

    #[test]
    fn a_number_of_seconds_that_is_none_is_refused() {
        for text in ["drain_seconds = -1", "drain_seconds = nan", "socket_mode = \"999\""] {
            let file: FileConfig = toml::from_str(text).unwrap();
            assert!(file.apply(&mut ServerConfig::default()).is_err(), "{text}");
        }
    }

    /// The block of a document that begins after `start`, without the indentation that it has there.
    fn block(text: &str, start: &str, end: &str) -> String {
        let from = text.find(start).unwrap() + start.len();
        let lines = text[from..].split(end).next().unwrap().lines();
        lines.map(|line| format!("{}\n", line.trim_start())).collect()
    }

    #[test]
    fn the_documented_defaults_are_the_defaults() {
        let text = block(include_str!("../../../docs/deployment.md"), "```toml\n", "```");
        let file: FileConfig = toml::from_str(&text).unwrap();
        let mut config = ServerConfig::default();
        config.limits.max_batch = 1; // To see that the file is taken at all.
        file.apply(&mut config).unwrap();
        assert_eq!(config, ServerConfig::default());
        // What is commented out there is understood too.
        let all = text.replace("# [[", "[[").lines().fold(String::new(), |all, line| {
            let line = line.strip_prefix("# ").filter(|rest| rest.contains(" = ")).unwrap_or(line);
            all + line + "\n"
        });
        let file: FileConfig = toml::from_str(&all).unwrap();
        assert_eq!((file.template.len(), file.limits.key_concurrency), (1, Some(32)));
    }

    #[test]
    fn the_files_in_deploy_are_valid() {
        let kubernetes = block(include_str!("../../../deploy/kubernetes/zeroboot.yaml"), "zeroboot.toml: |\n", "---");
        for text in [include_str!("../../../deploy/systemd/zeroboot.toml"), &kubernetes] {
            let file: FileConfig = toml::from_str(text).unwrap();
            let keys = crate::Overrides { keys_file: Some("/keys".into()), ..crate::Overrides::default() };
            ServerConfig::resolve(&file, crate::Overrides::default(), keys).unwrap();
        }
    }
}
