//! The command line.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use zeroboot_engine::MIN_OPEN_FILES;
use zeroboot_server::env;

use crate::{sandbox::args::SandboxArgs, units};

/// Run untrusted code in a fresh sandbox that starts from a pool in under a millisecond.
#[derive(Debug, Parser)]
#[command(name = "zeroboot", version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run one piece of code in a fresh sandbox.
    ///
    /// The output arrives byte for byte. zeroboot exits with the code's status, with 124 on timeout, with 137 if the
    /// sandbox was killed, and with 125 if zeroboot itself failed.
    Run(RunArgs),

    /// Serve the HTTP API.
    Serve(ServeArgs),

    /// Make long-lived sandboxes on a server, and work in them.
    Sandbox(SandboxArgs),

    /// Speak the Model Context Protocol on standard input and output, so that an agent can run code.
    ///
    /// Without --base-url it starts a server of its own, which ends with it.
    Mcp(McpArgs),

    /// Show what code finds inside: interpreter, packages, limits, writable places.
    ///
    /// It asks a sandbox, so it shows what is there and not what should be.
    Env(EnvArgs),

    /// Make, list and revoke the API's keys.
    #[command(subcommand)]
    Keys(KeysCommand),

    /// Build, list, inspect and remove templates of the VM engine.
    #[command(subcommand)]
    Template(TemplateCommand),

    /// Show what this host can do, which engine is used, and what to fix.
    ///
    /// With --full it also tries the VM engine: forks, identity, deadlines, speed. That takes under a minute and
    /// prints a report for an issue.
    Doctor(DoctorArgs),

    /// Measure forks, execs and density on this host, and check every answer.
    Bench(BenchArgs),

    /// Print the completion script of a shell. Use it as in `source <(zeroboot completions bash)`.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Args, Debug)]
pub(crate) struct McpArgs {
    /// The server to use: http://HOST:PORT, https://HOST or unix:PATH. Its key is in ZEROBOOT_API_KEY.
    #[arg(long, value_name = "URL", env = "ZEROBOOT_BASE_URL")]
    pub(crate) base_url: Option<String>,

    /// Arguments of `zeroboot serve` for a server of its own.
    #[arg(last = true, value_name = "ARG", conflicts_with = "base_url")]
    pub(crate) serve: Vec<std::ffi::OsString>,
}

#[derive(Args, Debug)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    pub(crate) from: TemplateArgs,

    /// Try the VM engine on this host, and print a report to paste into an issue.
    #[arg(long)]
    pub(crate) full: bool,

    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchWhat {
    /// From the request to the first byte of output, against a fresh interpreter.
    Exec,
    /// CPU time of one exec, of all processes together.
    Cpu,
    /// A pooled checkout against an unpooled fork.
    Fork,
    /// Many sandboxes alive at once: their start, their cost, their end.
    Density,
    /// What the HTTP server adds to the direct path.
    Serve,
    /// Sandboxes that live, on a server of its own: creation, cells, commands, terminals, streams, and many that are idle.
    Live,
}

#[derive(Args, Debug)]
pub(crate) struct BenchArgs {
    /// What to measure [default: everything].
    #[arg(value_enum)]
    pub(crate) what: Vec<BenchWhat>,

    #[command(flatten)]
    pub(crate) from: TemplateArgs,

    /// Repetitions of each measurement.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(5..=100_000))]
    pub(crate) repeat: u32,

    /// Sandboxes alive at once in the density measurement.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) alive: u32,

    /// Measure forks of a guest of a few bytes in an image of a template's size, without a template: `fork` and `density`
    /// of the VM engine. This is the default where KVM cannot run Linux.
    #[arg(long)]
    pub(crate) stand_in: bool,

    /// `live`: also serve with this program, an older zeroboot, and run one-shot execs on both by turns.
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) against: Option<PathBuf>,

    /// `live`: MiB of output that are streamed.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(8..=65_536))]
    pub(crate) stream_mb: u32,

    /// `live`: sandboxes that are idle at once; 0 leaves that measurement out.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub(crate) idle: u32,

    /// `live`: seconds that they are looked at.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub(crate) idle_seconds: u32,

    /// Also write the result, with the host's facts, as JSON to this file.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

/// The engine between the code and the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineChoice {
    /// `vm` where /dev/kvm works at speed, else `process`.
    #[default]
    Auto,
    /// A KVM virtual machine for each sandbox.
    Vm,
    /// Namespaces, seccomp and Landlock around a process; the host's kernel is shared.
    Process,
}

/// The language of the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Runtime {
    /// Python 3.9 or newer.
    Python,
    /// Node.js 18 or newer.
    #[value(aliases = ["javascript", "js"])]
    Node,
}

/// What `zeroboot run` takes as the language: a runtime, or what runs in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Language {
    /// Python 3.9 or newer.
    Python,
    /// Node.js 18 or newer.
    #[value(aliases = ["javascript", "js"])]
    Node,
    /// TypeScript, by the stripping of types of Node.js 22.18 or newer.
    #[value(alias = "ts")]
    Typescript,
    /// The shell of a Python template.
    #[value(aliases = ["sh", "shell"])]
    Bash,
}

impl Language {
    /// Whose template it runs in.
    pub(crate) fn runtime(self) -> Runtime {
        match self {
            Language::Python | Language::Bash => Runtime::Python,
            Language::Node | Language::Typescript => Runtime::Node,
        }
    }
}

/// Where sandboxes come from.
#[derive(Args, Debug)]
pub(crate) struct TemplateArgs {
    /// The engine between the code and the host [default: auto, or that of the configuration].
    #[arg(long, value_enum, env = "ZEROBOOT_ENGINE")]
    pub(crate) engine: Option<EngineChoice>,

    /// The Python of the process engine: an interpreter, or a virtualenv's directory.
    #[arg(long, value_name = "PATH", env = "ZEROBOOT_PYTHON")]
    pub(crate) python: Option<PathBuf>,

    /// The Node of the process engine.
    #[arg(long, value_name = "PATH", env = "ZEROBOOT_NODE")]
    pub(crate) node: Option<PathBuf>,

    /// Modules to import before any code comes (comma separated) [Python default: numpy, pandas and
    /// IPython, where they are installed].
    #[arg(long, value_name = "MODULES", value_delimiter = ',')]
    pub(crate) warm: Option<Vec<String>>,

    /// An environment variable of the runtime, already there while modules are imported (process engine). May be
    /// repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = units::variable)]
    pub(crate) warm_env: Vec<(String, String)>,
}

#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    /// The code.
    #[arg(short = 'c', value_name = "CODE", allow_hyphen_values = true)]
    pub(crate) code: Option<OsString>,

    /// A file with the code, or - for standard input, and then its arguments. With -c all of them are arguments.
    #[arg(value_name = "FILE] [ARG", trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<OsString>,

    /// Open the interpreter's prompt on our terminal, after the code if there is any.
    #[arg(short = 'i', long, conflicts_with_all = ["timeout", "cpu_time", "max_output", "stdin", "get", "json", "verbose"])]
    pub(crate) interactive: bool,

    /// The language [default: that of the file's name, else python].
    #[arg(long, value_enum)]
    pub(crate) runtime: Option<Language>,

    /// A template by name, instead of a runtime: python, node, data-science, or one that was built (VM engine).
    #[arg(long, value_name = "NAME", conflicts_with = "runtime")]
    pub(crate) template: Option<String>,

    /// Packages for this run (comma separated), as pip or npm takes them, such as pandas or lodash@4. They are
    /// installed once and kept in the cache. May be repeated.
    #[arg(long, value_name = "PACKAGES", conflicts_with = "template")]
    pub(crate) with: Vec<String>,

    /// A recipe (TOML) to run in; what it names is installed once and kept in the cache.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["template", "runtime", "with"])]
    pub(crate) recipe: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) from: TemplateArgs,

    /// Timeout of the code, such as 500ms, 2s, 1m.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = units::duration)]
    pub(crate) timeout: Duration,

    /// CPU time that the code may use [default: the timeout].
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub(crate) cpu_time: Option<Duration>,

    /// Memory that the code may use, such as 256M, 2G.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::memory)]
    pub(crate) memory: u64,

    /// Processes and threads that the code may have at once.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) processes: u32,

    /// Bytes of output that the code may write.
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = units::size)]
    pub(crate) max_output: u64,

    /// The largest file that the code may write, such as 200M.
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = units::size)]
    pub(crate) max_file: u64,

    /// Descriptors that one process may have open.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(i64::from(MIN_OPEN_FILES)..))]
    pub(crate) open_files: u32,

    /// An environment variable for the code; KEY alone passes on your own value. May be repeated.
    #[arg(short = 'e', long = "env", value_name = "KEY[=VALUE]")]
    pub(crate) env: Vec<String>,

    /// A file for the code's standard input [default: the standard input of zeroboot].
    #[arg(long, value_name = "FILE")]
    pub(crate) stdin: Option<PathBuf>,

    /// A file or a directory to put into the working directory, under its own name or NAME. The files of `.` get no
    /// directory. Links in a directory are left out. May be repeated.
    #[arg(long = "put", value_name = "FILE[:NAME]")]
    pub(crate) put: Vec<String>,

    /// A file to bring back from the working directory, to its own name or FILE. A directory or a pattern, such as
    /// 'out/*.png' (`**` means any directories), brings new files, which keep their paths, below FILE if it is given.
    /// May be repeated. The command fails when one brings nothing.
    #[arg(long = "get", value_name = "NAME[:FILE]")]
    pub(crate) get: Vec<String>,

    /// Bring back all new files of the working directory, into DIR. The command fails when there are none.
    #[arg(long, value_name = "DIR")]
    pub(crate) get_all: Option<String>,

    /// Print one JSON object instead of the output: the API's answer.
    #[arg(long)]
    pub(crate) json: bool,

    /// Print the cost of the run on standard error: engine, fork, exec, total.
    #[arg(short, long)]
    pub(crate) verbose: bool,
}

#[derive(Args, Debug)]
pub(crate) struct EnvArgs {
    /// The language.
    #[arg(long, value_enum)]
    pub(crate) runtime: Option<Runtime>,

    /// A template by name, instead of a runtime.
    #[arg(long, value_name = "NAME", conflicts_with = "runtime")]
    pub(crate) template: Option<String>,

    /// Packages as for `zeroboot run --with`.
    #[arg(long, value_name = "PACKAGES", conflicts_with = "template")]
    pub(crate) with: Vec<String>,

    /// A recipe (TOML).
    #[arg(long, value_name = "FILE", conflicts_with_all = ["template", "runtime", "with"])]
    pub(crate) recipe: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) from: TemplateArgs,

    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ServeArgs {
    /// An address to listen on: ADDRESS:PORT or unix:PATH. May be repeated [default: 127.0.0.1:8080].
    #[arg(long, value_name = "WHERE")]
    pub(crate) listen: Vec<String>,

    /// A configuration file (TOML).
    #[arg(long, value_name = "FILE", env = env::CONFIG)]
    pub(crate) config: Option<PathBuf>,

    /// The key file (see `zeroboot keys`). Without one, the server listens on local addresses only
    /// [env: ZEROBOOT_API_KEYS_FILE].
    #[arg(long, value_name = "FILE")]
    pub(crate) keys_file: Option<PathBuf>,

    /// TLS: the certificate chain (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,

    /// TLS: the private key of the certificate (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,

    /// A proxy (address or CIDR) whose forwarded headers count. May be repeated.
    #[arg(long, value_name = "CIDR")]
    pub(crate) trusted_proxy: Vec<String>,

    /// Sandboxes kept ready for each template [default: 4].
    #[arg(long, value_name = "N")]
    pub(crate) pool: Option<usize>,

    /// Long-lived sandboxes at once [default: 64].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_sandboxes: Option<u32>,

    #[command(flatten)]
    pub(crate) from: TemplateArgs,
}

#[derive(Args, Debug)]
pub(crate) struct KeyFileArgs {
    /// The key file [default: the `keys_file` of the server's configuration].
    #[arg(long, value_name = "FILE", env = env::API_KEYS_FILE)]
    pub(crate) keys_file: Option<PathBuf>,

    /// The server's configuration file.
    #[arg(long, value_name = "FILE", env = env::CONFIG)]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Make a key and print it. Only this command shows it: the file holds only its hash.
    Create {
        #[command(flatten)]
        file: KeyFileArgs,
        /// The owner of the key.
        name: String,
        /// Time until the key expires, such as 24h.
        #[arg(long, value_name = "TIME", value_parser = units::duration)]
        expires_in: Option<Duration>,
        /// Most requests a second.
        #[arg(long, value_name = "N")]
        rate: Option<f64>,
        /// Most execs at once.
        #[arg(long, value_name = "N")]
        concurrency: Option<u32>,
        /// A demo key: 10 execs a minute for each client address, unless the server says otherwise.
        #[arg(long)]
        demo: bool,
        /// A key whose form E2B's SDKs accept: e2b_ and hexadecimal digits.
        #[arg(long, conflicts_with = "demo")]
        e2b: bool,
    },
    /// List the keys.
    List {
        #[command(flatten)]
        file: KeyFileArgs,
    },
    /// Revoke a key by its id. A running server notices within seconds.
    Revoke {
        #[command(flatten)]
        file: KeyFileArgs,
        /// The id that `list` shows.
        id: String,
    },
}

#[derive(Args, Clone, Debug)]
pub(crate) struct AssembleArgs {
    /// The template's name. `python` and `node` come with zeroboot.
    pub(crate) name: String,

    /// Your own recipe (TOML).
    #[arg(long, value_name = "FILE")]
    pub(crate) recipe: Option<PathBuf>,

    /// A directory that holds a root file system, instead of packages.
    #[arg(long, value_name = "DIR")]
    pub(crate) rootfs: Option<PathBuf>,

    /// A kernel: vmlinux (ELF) or bzImage, instead of the distribution's.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,

    /// Use only what is in the cache, and not the network.
    #[arg(long)]
    pub(crate) offline: bool,

    /// Look for newer packages, even if the cache has some.
    #[arg(long, conflicts_with = "offline")]
    pub(crate) refresh: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TemplateCommand {
    /// Make the root file system and the kernel of a template (needs the network, not KVM).
    Assemble(AssembleArgs),
    /// Assemble, boot, warm and freeze a template (needs KVM).
    Build(AssembleArgs),
    /// List the templates.
    List,
    /// Show the manifest of a template.
    Inspect {
        /// The template's name.
        name: String,
        /// Also read all of its memory and compare the hash.
        #[arg(long)]
        verify: bool,
    },
    /// Remove a template.
    Rm {
        /// The template's name.
        name: String,
    },
}
