//! The command line of `zeroboot sandbox`.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{Args, Subcommand};

use crate::{cli::Runtime, units};

/// Which server.
#[derive(Args, Debug)]
pub(crate) struct ServerArgs {
    /// The server: http://HOST:PORT, https://HOST or unix:PATH. Its key is in ZEROBOOT_API_KEY.
    #[arg(long, global = true, value_name = "URL", env = "ZEROBOOT_BASE_URL", default_value = "http://127.0.0.1:8080")]
    pub(crate) base_url: String,
}

#[derive(Args, Debug)]
pub(crate) struct SandboxArgs {
    #[command(flatten)]
    pub(crate) server: ServerArgs,

    #[command(subcommand)]
    pub(crate) command: SandboxCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SandboxCommand {
    /// Make a sandbox and print its id.
    Create(CreateArgs),
    /// Run code in a context of a sandbox, which keeps its state; print the value of the last expression.
    ///
    /// The exit status is 0, 1 for an error that the code did not catch, 124 for a passed timeout, 130 for an interrupt,
    /// 137 for a context that was lost, 125 for our own failure. Ctrl-C interrupts the code.
    Run(RunArgs),
    /// Run a program in a sandbox. Its exit status is ours: 124 for a passed timeout, 137 for a killed one.
    Exec(ExecArgs),
    /// Open a terminal in a sandbox.
    Shell(ShellArgs),
    /// Copy files into a sandbox, or out of one: one side is ID:PATH, the other a local path, or - for our own streams.
    Cp(CpArgs),
    /// List the sandboxes of the key.
    #[command(visible_alias = "ls")]
    List {
        /// Only those with this label. May be repeated.
        #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
        labels: Vec<(String, String)>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show all that the server says of a sandbox.
    Show {
        /// Its id.
        id: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Let a sandbox live for this time from now on.
    Extend {
        /// Its id.
        id: String,
        /// Such as 30m.
        #[arg(value_parser = units::duration)]
        time: Duration,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// End sandboxes.
    Rm {
        /// Their ids.
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
    /// List, make, interrupt, restart and delete the contexts of a sandbox.
    #[command(subcommand)]
    Contexts(ContextsCommand),
    /// List the commands of a sandbox.
    Ps {
        /// The sandbox.
        id: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print the output of a command, and follow it to its end. Its exit status is ours.
    Logs {
        /// The sandbox.
        id: String,
        /// The command's id, as `exec --detach` and `ps` print it.
        command: String,
        /// First byte.
        #[arg(long, value_name = "BYTES", default_value_t = 0)]
        offset: u64,
    },
    /// Send a signal to a command.
    Kill {
        /// The sandbox.
        id: String,
        /// The command's id.
        command: String,
        /// Its name or number.
        #[arg(short, long, default_value = "KILL")]
        signal: String,
    },
}

#[derive(Args, Debug)]
pub(crate) struct CreateArgs {
    /// A template by name [default: the server's].
    #[arg(long, value_name = "NAME")]
    pub(crate) template: Option<String>,

    /// A language, instead of a template.
    #[arg(long, value_enum, conflicts_with = "template")]
    pub(crate) runtime: Option<Runtime>,

    /// How long it may live, such as 10m, 2h.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = units::duration)]
    pub(crate) timeout: Duration,

    /// It also ends when nothing was asked of it for this time.
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub(crate) idle_timeout: Option<Duration>,

    /// An environment variable for all that runs in it; KEY alone passes ours on. May be repeated.
    #[arg(short = 'e', long = "env", value_name = "KEY[=VALUE]")]
    pub(crate) env: Vec<String>,

    /// A label, for `list --label`. May be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
    pub(crate) labels: Vec<(String, String)>,

    /// Memory that it may use, such as 256M, 2G [default: the server's].
    #[arg(long, value_name = "SIZE", value_parser = units::size)]
    pub(crate) memory: Option<u64>,

    /// Processes and threads that may be alive in it at once [default: the server's].
    #[arg(long, value_name = "N")]
    pub(crate) processes: Option<u32>,

    /// Print JSON: all that the server says of it.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    /// The sandbox.
    pub(crate) id: String,

    /// The code itself.
    #[arg(short = 'c', value_name = "CODE", allow_hyphen_values = true, conflicts_with = "file")]
    pub(crate) code: Option<String>,

    /// A file with the code (- for standard input).
    #[arg(required_unless_present = "code")]
    pub(crate) file: Option<PathBuf>,

    /// Which context.
    #[arg(long, value_name = "NAME")]
    pub(crate) context: Option<String>,

    /// Time that the code may take, such as 500ms, 2s, 1m. It is then interrupted.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = units::duration)]
    pub(crate) timeout: Duration,

    /// Print one JSON object instead of the output: the API's result, with pictures and all.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ExecArgs {
    /// The sandbox.
    pub(crate) id: String,

    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    pub(crate) argv: Vec<OsString>,

    /// Where it runs [default: the home directory].
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<String>,

    /// An environment variable; KEY alone passes ours on. May be repeated.
    #[arg(short = 'e', long = "env", value_name = "KEY[=VALUE]")]
    pub(crate) env: Vec<String>,

    /// Time that it may take, such as 500ms, 2s, 1m. It is then killed [default: as long as the sandbox lives].
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub(crate) timeout: Option<Duration>,

    /// Leave it in the background and print its id. Its standard input is empty.
    #[arg(short, long, conflicts_with = "json")]
    pub(crate) detach: bool,

    /// A word for `ps`.
    #[arg(long)]
    pub(crate) tag: Option<String>,

    /// Print one JSON object instead of the output: the API's result. Its standard input is empty.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ShellArgs {
    /// The sandbox.
    pub(crate) id: String,

    /// A line of shell to run instead of a shell.
    pub(crate) command: Option<String>,

    /// Where it runs [default: the home directory].
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct CpArgs {
    /// What to copy. The last one is where to.
    #[arg(required = true, num_args = 2.., value_name = "SOURCE")]
    pub(crate) paths: Vec<String>,

    /// Copy directories, with all that is in them.
    #[arg(short, long)]
    pub(crate) recursive: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ContextsCommand {
    /// List them.
    #[command(visible_alias = "ls")]
    List {
        /// The sandbox.
        id: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Make one and print its name.
    Create {
        /// The sandbox.
        id: String,
        /// Its name [default: the server gives one].
        name: Option<String>,
        /// Where it begins [default: the home directory].
        #[arg(long, value_name = "DIR")]
        cwd: Option<String>,
    },
    /// Interrupt the code that runs in one. Its state stays.
    Interrupt {
        /// The sandbox.
        id: String,
        /// Its name.
        #[arg(default_value = "default")]
        name: String,
    },
    /// A new interpreter in the place of one. Its state is gone.
    Restart {
        /// The sandbox.
        id: String,
        /// Its name.
        #[arg(default_value = "default")]
        name: String,
    },
    /// End one.
    #[command(visible_alias = "delete")]
    Rm {
        /// The sandbox.
        id: String,
        /// Its name.
        name: String,
    },
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("write it as KEY=VALUE".into()),
    }
}
