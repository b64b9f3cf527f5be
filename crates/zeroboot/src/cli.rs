//! The command line.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::units;

/// Sandboxes in well under a millisecond for code that nobody vouches for.
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
    /// Its output comes out byte for byte and its exit status is ours: 124 for a passed time limit, 137 for a
    /// killed sandbox, 125 for our own failure.
    Run(RunArgs),

    /// Show what this host can do, what will be used, and what to fix.
    Doctor(DoctorArgs),

    /// Measure forks, execs and density on this host; every answer is checked.
    Bench(BenchArgs),
}

#[derive(Args, Debug)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    pub(crate) from: TemplateArgs,

    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchWhat {
    /// From the request to the first byte of output, against a fresh interpreter.
    Exec,
    /// A pooled checkout against an unpooled fork.
    Fork,
    /// Many sandboxes alive at once: how fast they come, what each costs, how fast they go.
    Density,
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

    /// Also write the result, with the host's facts, as JSON to this file.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

/// Which engine holds the code in.
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
    #[value(alias = "javascript")]
    Node,
}

/// Where sandboxes come from.
#[derive(Args, Debug)]
pub(crate) struct TemplateArgs {
    /// What holds the code in.
    #[arg(long, value_enum, default_value_t, env = "ZEROBOOT_ENGINE")]
    pub(crate) engine: EngineChoice,

    /// The Python of the process engine: an interpreter, or a virtualenv's bin/python.
    #[arg(long, value_name = "PATH", env = "ZEROBOOT_PYTHON")]
    pub(crate) python: Option<PathBuf>,

    /// The Node of the process engine.
    #[arg(long, value_name = "PATH", env = "ZEROBOOT_NODE")]
    pub(crate) node: Option<PathBuf>,

    /// Modules to import before any code comes (comma separated) [Python default: numpy and pandas, where
    /// they are installed].
    #[arg(long, value_name = "MODULES", value_delimiter = ',')]
    pub(crate) warm: Option<Vec<String>>,
}

#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    /// The code itself.
    #[arg(short = 'c', value_name = "CODE", allow_hyphen_values = true)]
    pub(crate) code: Option<OsString>,

    /// A file with the code (- for standard input), and its arguments; with -c all are arguments.
    #[arg(value_name = "FILE] [ARG", trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<OsString>,

    /// The language [default: by the file's name, else python].
    #[arg(long, value_enum)]
    pub(crate) runtime: Option<Runtime>,

    /// A template by name, instead of a runtime (VM engine).
    #[arg(long, value_name = "NAME", conflicts_with = "runtime")]
    pub(crate) template: Option<String>,

    #[command(flatten)]
    pub(crate) from: TemplateArgs,

    /// Wall time that the code may take, such as 500ms, 2s, 1m.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = units::duration)]
    pub(crate) timeout: Duration,

    /// CPU time that the code may take [default: as the timeout].
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub(crate) cpu_time: Option<Duration>,

    /// Memory that the code may use, such as 256M, 2G.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::size)]
    pub(crate) memory: u64,

    /// Processes and threads that may be alive at once.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) processes: u32,

    /// Bytes of output that the code may write.
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = units::size)]
    pub(crate) max_output: u64,

    /// An environment variable for the code; KEY alone passes ours on. May be repeated.
    #[arg(short = 'e', long = "env", value_name = "KEY[=VALUE]")]
    pub(crate) env: Vec<String>,

    /// A file for the code's standard input [default: our own].
    #[arg(long, value_name = "FILE")]
    pub(crate) stdin: Option<PathBuf>,

    /// A file to put into the working directory, under its own name or NAME. May be repeated.
    #[arg(long = "put", value_name = "FILE[:NAME]")]
    pub(crate) put: Vec<String>,

    /// A file to bring back from the working directory, to its own name or FILE. May be repeated.
    #[arg(long = "get", value_name = "NAME[:FILE]")]
    pub(crate) get: Vec<String>,

    /// Print one JSON object instead of the output: the API's result.
    #[arg(long)]
    pub(crate) json: bool,

    /// Say on standard error what it cost: engine, fork, exec, total.
    #[arg(short, long)]
    pub(crate) verbose: bool,
}
