//! What a server is started with: defaults, then the file, then the environment, then flags.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;

use crate::file_config::FileConfig;

/// Names of the environment variables that the server reads.
pub mod env {
    /// Path of the configuration file (TOML).
    pub const CONFIG: &str = "ZEROBOOT_CONFIG";
    /// Addresses to listen on, separated by commas: `127.0.0.1:8080` or `unix:/run/zeroboot.sock`.
    pub const LISTEN: &str = "ZEROBOOT_LISTEN";
    /// Path of the key file; the original's name.
    pub const API_KEYS_FILE: &str = "ZEROBOOT_API_KEYS_FILE";
    /// Certificate chain (PEM).
    pub const TLS_CERT: &str = "ZEROBOOT_TLS_CERT";
    /// Private key (PEM).
    pub const TLS_KEY: &str = "ZEROBOOT_TLS_KEY";
    /// Addresses or networks of proxies whose forwarded headers count, separated by commas.
    pub const TRUSTED_PROXIES: &str = "ZEROBOOT_TRUSTED_PROXIES";
    /// Where OTLP traces go, such as `http://127.0.0.1:4318`.
    pub const OTLP_ENDPOINT: &str = "ZEROBOOT_OTLP_ENDPOINT";
}

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// An address and port. Port 0 takes any free one.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl Listen {
    /// Whether only this machine's users can reach it.
    pub fn is_local(&self) -> bool {
        match self {
            Listen::Unix(_) => true,
            Listen::Tcp(address) => match address.ip() {
                IpAddr::V4(ip) => ip.is_loopback(),
                IpAddr::V6(ip) => ip.is_loopback() || ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback()),
            },
        }
    }
}

impl FromStr for Listen {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Listen, ConfigError> {
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() {
                return Err(ConfigError::Listen(text.into()));
            }
            return Ok(Listen::Unix(path.into()));
        }
        let text = text.strip_prefix("localhost:").map_or_else(|| text.to_owned(), |port| format!("127.0.0.1:{port}"));
        text.parse().map(Listen::Tcp).map_err(|_| ConfigError::Listen(text))
    }
}

impl std::fmt::Display for Listen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Listen::Tcp(address) => write!(f, "{address}"),
            Listen::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Certificate files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificate chain (PEM), the server's own first.
    pub cert: PathBuf,
    /// Its private key (PEM).
    pub key: PathBuf,
}

/// What a request may ask for, and what a client may cost.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestLimits {
    /// Timeout of an exec that names none.
    pub default_timeout: Duration,
    /// The longest timeout that may be asked for.
    pub max_timeout: Duration,
    /// Bytes of one request body.
    pub max_body: usize,
    /// Items of one batch.
    pub max_batch: usize,
    /// Items of one batch that run at once.
    pub batch_parallel: usize,
    /// How long a batch item may wait for a place of its key and a free sandbox before it is refused.
    pub batch_wait: Duration,
    /// How long after a batch's body has arrived its items may begin; what has not by then is answered `busy`.
    pub max_batch_time: Duration,
    /// Bytes of output and files that one batch may bring back in all.
    pub max_batch_output: u64,
    /// Memory of a sandbox that names none, bytes.
    pub default_memory: u64,
    /// The most memory that may be asked for, bytes.
    pub max_memory: u64,
    /// Processes of a sandbox that names none.
    pub default_processes: u32,
    /// The most processes that may be asked for.
    pub max_processes: u32,
    /// Bytes of output of an exec that names none.
    pub default_output: u64,
    /// The most bytes of output that may be asked for.
    pub max_output: u64,
    /// Bytes of the largest file that an exec may write which names none.
    pub default_file_size: u64,
    /// The largest file that may be asked for, bytes.
    pub max_file_size: u64,
    /// Open descriptors of a process of an exec that names none.
    pub default_open_files: u32,
    /// The most open descriptors that may be asked for.
    pub max_open_files: u32,
    /// Execs a second of a key without its own rate.
    pub key_rate: f64,
    /// Execs at once of a key that has no number of its own; `None`: where there are several keys, half of the engine's
    /// sandboxes and memory, else only the engine's admission limits it.
    pub key_concurrency: Option<u32>,
    /// Execs a second of all callers when no keys are configured; `None`: only the engine's admission limits them.
    pub anonymous_rate: Option<f64>,
    /// Execs a minute of a `zb_demo_` key from one client address.
    pub demo_per_minute: f64,
    /// Connections at once; further ones wait in the kernel's queue.
    pub max_connections: usize,
    /// Connections at once from one client address (an IPv6 /64), but for trusted proxies; `None`: half of all.
    pub max_connections_per_address: Option<usize>,
    /// How long a client may take to send its request's head (or its next one on an idle connection).
    pub header_timeout: Duration,
    /// How long a client may take to send a whole body.
    pub body_timeout: Duration,
    /// How long a client may take none of its answer before its connection is cut.
    pub stall_timeout: Duration,
    /// Bytes held for callers at once: request bodies until their exec has ended, output while it is collected, answers
    /// until they are taken. What finds no room is refused. One key may have half.
    pub max_held: u64,
    /// Lease of a sandbox that names none.
    pub default_lease: Duration,
    /// The longest lease that may be asked for.
    pub max_lease: Duration,
    /// Most long-lived sandboxes of one key at once.
    pub max_sandboxes_per_key: usize,
    /// Most checkpoints of one key at once.
    pub max_checkpoints_per_key: usize,
    /// Requests about sandboxes that one key may have open at once: streams, terminals, answers that are waited for.
    pub max_streams_per_key: usize,
}

impl Default for RequestLimits {
    fn default() -> RequestLimits {
        const MIB: u64 = 1024 * 1024;
        let sandbox = zeroboot_engine::Limits::default();
        RequestLimits {
            default_timeout: sandbox.timeout,
            max_timeout: Duration::from_secs(300),
            max_body: 32 * MIB as usize,
            max_batch: 100,
            batch_parallel: 16,
            batch_wait: Duration::from_secs(30),
            max_batch_time: Duration::from_secs(600),
            max_batch_output: 64 * MIB,
            default_memory: sandbox.memory,
            max_memory: 2048 * MIB,
            default_processes: sandbox.processes,
            max_processes: 256,
            default_output: sandbox.output,
            max_output: 64 * MIB,
            default_file_size: sandbox.file_size,
            max_file_size: 1024 * MIB,
            default_open_files: sandbox.open_files,
            max_open_files: 1024,
            key_rate: 100.0,
            key_concurrency: None,
            anonymous_rate: None,
            demo_per_minute: 10.0,
            max_connections: 4096,
            max_connections_per_address: None,
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(30),
            max_held: 512 * MIB,
            default_lease: Duration::from_secs(300),
            max_lease: zeroboot_engine::SandboxBounds::default().max_lease,
            max_sandboxes_per_key: 16,
            max_checkpoints_per_key: 64,
            max_streams_per_key: 128,
        }
    }
}

impl RequestLimits {
    /// Connections that one client address may have.
    pub(crate) fn connections_per_address(&self) -> usize {
        self.max_connections_per_address.unwrap_or(self.max_connections.div_ceil(2))
    }
}

/// What a server is started with. [`ServerConfig::resolve`] makes one from file, environment and flags.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerConfig {
    /// Where to listen.
    pub listen: Vec<Listen>,
    /// Mode bits of Unix sockets.
    pub socket_mode: u32,
    /// The keys. `None`: no authentication, and then only local listeners are allowed.
    pub keys_file: Option<PathBuf>,
    /// Proxies whose forwarded headers count.
    pub trusted_proxies: Vec<IpNet>,
    /// `/v1/metrics` needs no key.
    pub metrics_public: bool,
    /// `GET /` is the page to try code on.
    pub page: bool,
    /// TLS on the TCP listeners.
    pub tls: Option<TlsFiles>,
    /// Bounds on requests and clients.
    pub limits: RequestLimits,
    /// How long live requests may take to end after the shutdown signal.
    pub drain: Duration,
    /// How often each template's canary runs.
    pub canary_interval: Duration,
    /// How often the key file and certificates are looked at for changes.
    pub reload_interval: Duration,
}

impl Default for ServerConfig {
    fn default() -> ServerConfig {
        ServerConfig {
            listen: vec![Listen::Tcp(SocketAddr::from(([127, 0, 0, 1], 8080)))],
            socket_mode: 0o660,
            keys_file: None,
            trusted_proxies: Vec::new(),
            metrics_public: false,
            page: true,
            tls: None,
            limits: RequestLimits::default(),
            drain: Duration::from_secs(30),
            canary_interval: Duration::from_secs(10),
            reload_interval: Duration::from_secs(2),
        }
    }
}

/// Settings that flags or the environment can give. A field that is set wins over the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// `--listen`, any number of times.
    pub listen: Vec<String>,
    /// `--keys-file`.
    pub keys_file: Option<PathBuf>,
    /// `--tls-cert`.
    pub tls_cert: Option<PathBuf>,
    /// `--tls-key`.
    pub tls_key: Option<PathBuf>,
    /// `--trusted-proxy`, any number of times.
    pub trusted_proxies: Vec<String>,
}

impl Overrides {
    /// Reads the variables of [`env`]; `lookup` is `std::env::var_os` outside tests.
    pub fn from_env(lookup: impl Fn(&str) -> Option<std::ffi::OsString>) -> Overrides {
        let path = |name| lookup(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let list = |name| {
            let text = lookup(name).unwrap_or_default();
            let words = text.to_string_lossy();
            words.split(',').map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned).collect()
        };
        Overrides {
            listen: list(env::LISTEN),
            keys_file: path(env::API_KEYS_FILE),
            tls_cert: path(env::TLS_CERT),
            tls_key: path(env::TLS_KEY),
            trusted_proxies: list(env::TRUSTED_PROXIES),
        }
    }

    /// These, and what `weaker` says where these say nothing.
    #[must_use]
    pub fn over(self, weaker: Overrides) -> Overrides {
        fn list(strong: Vec<String>, weak: Vec<String>) -> Vec<String> {
            if strong.is_empty() { weak } else { strong }
        }
        Overrides {
            listen: list(self.listen, weaker.listen),
            keys_file: self.keys_file.or(weaker.keys_file),
            tls_cert: self.tls_cert.or(weaker.tls_cert),
            tls_key: self.tls_key.or(weaker.tls_key),
            trusted_proxies: list(self.trusted_proxies, weaker.trusted_proxies),
        }
    }
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {0}")]
    Read(PathBuf, #[source] std::io::Error),
    /// The file is not what it should be.
    #[error("the configuration file {0} is not valid")]
    Parse(PathBuf, #[source] toml::de::Error),
    /// Not an address.
    #[error("{0:?} is not an address to listen on; give ADDRESS:PORT or unix:/PATH")]
    Listen(String),
    /// Not a network.
    #[error("{0:?} is neither an address nor a network such as 10.0.0.0/8")]
    Network(String),
    /// Only one of two TLS files.
    #[error("TLS needs both a certificate and a key file")]
    HalfTls,
    /// A number that cannot work.
    #[error("{0} must be {1}")]
    Range(&'static str, &'static str),
    /// Not an octal mode.
    #[error("socket_mode {0:?} is not an octal mode such as \"0660\"")]
    Mode(String),
    /// Open to the network without keys.
    #[error(
        "{0} can be reached from other machines, and no keys are configured: make keys with `zeroboot keys create` \
         and give --keys-file, or listen on 127.0.0.1 or a Unix socket"
    )]
    Open(Listen),
}

impl ServerConfig {
    /// Puts together defaults, file, environment and flags, in rising order, and checks the result.
    pub fn resolve(file: &FileConfig, environment: Overrides, flags: Overrides) -> Result<ServerConfig, ConfigError> {
        let mut config = ServerConfig::default();
        file.apply(&mut config)?;
        let set = flags.over(environment);
        if !set.listen.is_empty() {
            config.listen = set.listen.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        }
        if set.keys_file.is_some() {
            config.keys_file = set.keys_file;
        }
        if !set.trusted_proxies.is_empty() {
            config.trusted_proxies = networks(&set.trusted_proxies)?;
        }
        let (file_cert, file_key) = config.tls.take().map(|tls| (tls.cert, tls.key)).unzip();
        config.tls = match (set.tls_cert.or(file_cert), set.tls_key.or(file_key)) {
            (Some(cert), Some(key)) => Some(TlsFiles { cert, key }),
            (None, None) => None,
            _ => return Err(ConfigError::HalfTls),
        };
        config.check()?;
        Ok(config)
    }

    /// Whether this can be served safely.
    pub fn check(&self) -> Result<(), ConfigError> {
        use ConfigError::Range;
        let limits = &self.limits;
        if self.keys_file.is_none()
            && let Some(open) = self.listen.iter().find(|listen| !listen.is_local())
        {
            return Err(ConfigError::Open(open.clone()));
        }
        if self.listen.is_empty() {
            return Err(Range("listen", "at least one address"));
        }
        if limits.default_timeout.is_zero() || limits.default_timeout > limits.max_timeout {
            return Err(Range("default_timeout_seconds", "above zero and at most max_timeout_seconds"));
        }
        if limits.default_memory > limits.max_memory
            || limits.default_processes > limits.max_processes
            || limits.default_output > limits.max_output
            || limits.default_file_size > limits.max_file_size
            || limits.default_open_files > limits.max_open_files
        {
            return Err(Range("each default limit", "at most its maximum"));
        }
        // For the sandbox's agent 0 is no limit.
        if limits.default_file_size == 0 {
            return Err(Range("default_file_size_mb", "above zero"));
        }
        if limits.default_open_files < zeroboot_engine::MIN_OPEN_FILES {
            return Err(Range("default_open_files", "at least 32"));
        }
        if limits.max_body < 1024
            || limits.max_batch == 0
            || limits.batch_parallel == 0
            || limits.max_connections == 0
            || limits.max_connections_per_address == Some(0)
            || limits.key_concurrency == Some(0)
        {
            return Err(Range(
                "max_body_bytes, max_batch, batch_parallel, max_connections, max_connections_per_address and key_concurrency",
                "above zero",
            ));
        }
        if limits.default_lease.is_zero() || limits.default_lease > limits.max_lease {
            return Err(Range("default_lease_seconds", "above zero and at most max_lease_seconds"));
        }
        if limits.max_sandboxes_per_key == 0 || limits.max_streams_per_key == 0 {
            return Err(Range("max_sandboxes_per_key and max_streams_per_key", "above zero"));
        }
        // An exec's input and output, which is in its answer twice.
        let one = limits.default_output.saturating_mul(2).saturating_add(limits.max_body as u64);
        if limits.max_held / 2 < one {
            let need =
                "at least twice max_body_bytes and four times default_output_bytes together: one key has half of it";
            return Err(Range("max_held_mb", need));
        }
        let rates = [Some(limits.key_rate), limits.anonymous_rate, Some(limits.demo_per_minute)];
        if rates.into_iter().flatten().any(|rate| !(rate > 0.0 && rate.is_finite())) {
            return Err(Range("a rate", "a number above zero"));
        }
        let times = [limits.header_timeout, limits.body_timeout, limits.stall_timeout, self.canary_interval];
        if times.iter().any(Duration::is_zero) || self.reload_interval.is_zero() {
            return Err(Range("a timeout or interval", "above zero"));
        }
        Ok(())
    }
}

/// Reads addresses and networks.
pub(crate) fn networks(words: &[String]) -> Result<Vec<IpNet>, ConfigError> {
    let one = |word: &String| {
        word.parse::<IpNet>()
            .or_else(|_| word.parse::<IpAddr>().map(IpNet::from))
            .map_err(|_| ConfigError::Network(word.clone()))
    };
    words.iter().map(one).collect()
}

/// Reads a configuration file; see [`FileConfig`].
pub fn read_config(path: &Path) -> Result<FileConfig, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read(path.into(), error))?;
    toml::from_str(&text).map_err(|error| ConfigError::Parse(path.into(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(listen: &str) -> Overrides {
        Overrides { listen: vec![listen.into()], ..Overrides::default() }
    }

    #[test]
    fn without_keys_only_local_addresses_are_allowed() {
        let file = FileConfig::default();
        for open in ["0.0.0.0:8080", "[::]:80", "192.168.1.1:80"] {
            let error = ServerConfig::resolve(&file, Overrides::default(), flags(open)).unwrap_err();
            assert!(matches!(error, ConfigError::Open(_)), "{open}: {error}");
            let keys = Overrides { keys_file: Some("/keys".into()), ..flags(open) };
            assert!(ServerConfig::resolve(&file, Overrides::default(), keys).is_ok());
        }
        for local in ["127.0.0.1:0", "127.9.9.9:1", "[::1]:80", "unix:/run/x.sock", "localhost:80"] {
            assert!(ServerConfig::resolve(&file, Overrides::default(), flags(local)).is_ok(), "{local}");
        }
    }

    #[test]
    fn flags_win_over_the_environment_and_that_over_the_file() {
        let file: FileConfig = toml::from_str("listen = [\"127.0.0.1:1\"]\nkeys_file = \"/file\"").unwrap();
        let environment = Overrides::from_env(|name| match name {
            env::LISTEN => Some("127.0.0.1:2, unix:/a".into()),
            env::API_KEYS_FILE => Some("/env".into()),
            _ => None,
        });
        let config = ServerConfig::resolve(&file, environment.clone(), Overrides::default()).unwrap();
        assert_eq!(config.listen.len(), 2);
        assert_eq!(config.keys_file, Some("/env".into()));
        let config = ServerConfig::resolve(&file, environment, flags("127.0.0.1:3")).unwrap();
        assert_eq!(config.listen, ["127.0.0.1:3".parse().unwrap()]);
        let config = ServerConfig::resolve(&file, Overrides::default(), Overrides::default()).unwrap();
        assert_eq!(config.keys_file, Some("/file".into()));
    }

    #[test]
    fn addresses_that_are_none_are_refused() {
        for text in ["", "8080", "127.0.0.1", "127.0.0.1:99999", "unix:", "host.example:80"] {
            assert!(text.parse::<Listen>().is_err(), "{text:?}");
        }
        assert!(networks(&["10.0.0.0/33".into()]).is_err());
        assert!(networks(&["10.0.0.0/8".into(), "::1".into()]).is_ok());
    }

    #[test]
    fn a_body_that_could_never_be_held_stops_the_start() {
        let resolve = |text: &str| {
            let file: FileConfig = toml::from_str(text).unwrap();
            ServerConfig::resolve(&file, Overrides::default(), Overrides::default())
        };
        let error = resolve("[limits]\nmax_held_mb = 127").unwrap_err().to_string();
        assert!(error.starts_with("max_held_mb must be at least twice max_body_bytes and four times"), "{error}");
        assert!(resolve("[limits]\nmax_held_mb = 128").is_ok());
        assert!(resolve("[limits]\nkey_concurrency = 0").is_err());
    }

    #[test]
    fn tls_needs_both_files() {
        let half = Overrides { tls_cert: Some("/c".into()), ..Overrides::default() };
        let error = ServerConfig::resolve(&FileConfig::default(), Overrides::default(), half).unwrap_err();
        assert!(matches!(error, ConfigError::HalfTls));
    }
}
