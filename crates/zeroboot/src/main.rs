//! `zeroboot`: runs untrusted code in sandboxes.

mod assets;
mod bench;
mod cli;
mod doctor;
mod env;
mod hint;
mod keys;
mod mcp;
mod printer;
mod resolve;
mod run;
mod sandbox;
mod serve;
mod template;
mod terminal;
mod units;
mod zygote;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser};

/// Exit status when zeroboot itself failed, as of `docker run` and `env`. Every other status is the code's.
pub(crate) const OWN_FAILURE: u8 = 125;

fn main() -> ExitCode {
    if let Some(cache) = zeroboot_template::paths::cache_dir() {
        zeroboot_process::keep_in(cache);
    }
    // Before anything else: a zygote must have one thread, and neither flags nor logs.
    if std::env::args_os().nth(1).is_some_and(|arg| arg == "__zygote") {
        return ExitCode::from(zygote::main());
    }
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to standard output and are no failure.
            let status = if error.use_stderr() { OWN_FAILURE } else { 0 };
            let _closed = error.print();
            return ExitCode::from(status);
        }
    };
    // `serve` has a log of its own making, and `bench` the same.
    if !matches!(cli.command, cli::Command::Serve(_) | cli::Command::Bench(_)) {
        let filter = tracing_subscriber::EnvFilter::try_from_env("ZEROBOOT_LOG")
            .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("error"));
        tracing_subscriber::fmt()
            .with_writer(std::io::stderr)
            .with_ansi(zeroboot_server::log_colours())
            .with_env_filter(filter)
            .init();
    }
    raise_descriptor_limit();
    let result = match cli.command {
        cli::Command::Run(args) => run::run(args),
        cli::Command::Serve(args) => serve::run(&args),
        cli::Command::Sandbox(args) => sandbox::run(args),
        cli::Command::Mcp(args) => mcp::run(&args),
        cli::Command::Env(args) => env::run(&args),
        cli::Command::Keys(command) => keys::run(command),
        cli::Command::Template(command) => template::run(command),
        cli::Command::Doctor(args) => doctor::run(&args),
        cli::Command::Bench(args) => bench::run(&args),
        cli::Command::Completions { shell } => completions(shell),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            printer::error(&error, hint::of(&error).as_deref());
            ExitCode::from(OWN_FAILURE)
        }
    }
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut cli::Cli::command(), "zeroboot", &mut script);
    match printer::stdout(&script) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(0),
    }
}

/// Three descriptors for each live sandbox: the usual soft limit of 1024 would end at some three hundred. Where the
/// hard limit is no higher, forks beyond it fail with their reason.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _as_it_was = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}
