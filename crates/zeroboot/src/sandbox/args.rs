//! The command line of `zeroboot sandbox`.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{Args, Subcommand};

use crate::{cli::Runtime, units};

/// The server to talk to.
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
    /// Run code in a context of a sandbox, which keeps its state, and print the value of the last expression.
    ///
    /// The exit status is 0 for success, 1 for an error that the code did not catch, 124 on timeout, 130 for an interrupt,
    /// 137 if the context was lost, and 125 if zeroboot itself failed. Ctrl-C interrupts the code.
    Run(RunArgs),
    /// Run a program in a sandbox and exit with its status, with 124 on timeout, or with 137 if it was killed.
    Exec(ExecArgs),
    /// Open a terminal in a sandbox.
    Shell(ShellArgs),
    /// Copy files into or out of a sandbox. One side is ID:PATH; the other is a local path, or - for standard input or output.
    Cp(CpArgs),
    /// List the sandboxes of the key.
    #[command(visible_alias = "ls")]
    List {
        /// Show only sandboxes with this label. May be repeated.
        #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
        labels: Vec<(String, String)>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show everything that the server knows about a sandbox.
    Show {
        /// The sandbox.
        id: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Set the lease of a sandbox to this time from now.
    Extend {
        /// The sandbox.
        id: String,
        /// The new lease, such as 30m.
        #[arg(value_parser = units::duration)]
        time: Duration,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Make sandboxes that begin where one is now, and print their ids. It goes on.
    ///
    /// VM engine. They have its memory, files, processes and contexts, and the secrets in them. All are made, or none.
    Branch(BranchArgs),
    /// Keep this moment of a sandbox, and print the checkpoint's id. It goes on.
    ///
    /// VM engine. A checkpoint has what a branch would have. The server keeps it in memory.
    Checkpoint(CheckpointArgs),
    /// List, show and remove checkpoints.
    #[command(subcommand)]
    Checkpoints(CheckpointsCommand),
    /// Make sandboxes that begin at a checkpoint, and print their ids.
    Restore(BranchArgs),
    /// Take a sandbox back to a checkpoint of it. It keeps its id; what runs in it now ends.
    Rollback {
        /// The sandbox.
        id: String,
        /// The checkpoint [default: the last on its way here].
        checkpoint: Option<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Let a branch take over the id of its origin, which ends, and print that id.
    Promote {
        /// The branch.
        id: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// End sandboxes.
    Rm {
        /// The sandboxes.
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
    /// Print the output of a command, follow it to its end, and exit with its status.
    Logs {
        /// The sandbox.
        id: String,
        /// The command's id, as `exec --detach` and `ps` print it.
        command: String,
        /// The first byte to print.
        #[arg(long, value_name = "BYTES", default_value_t = 0)]
        offset: u64,
    },
    /// Send a signal to a command.
    Kill {
        /// The sandbox.
        id: String,
        /// The command's id.
        command: String,
        /// The signal's name or number.
        #[arg(short, long, default_value = "KILL")]
        signal: String,
    },
}

#[derive(Args, Debug)]
pub(crate) struct CreateArgs {
    /// A template by its name [default: the server's].
    #[arg(long, value_name = "NAME")]
    pub(crate) template: Option<String>,

    /// A language, instead of a template.
    #[arg(long, value_enum, conflicts_with = "template")]
    pub(crate) runtime: Option<Runtime>,

    /// The lease: how long the sandbox may live, such as 10m, 2h.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = units::duration)]
    pub(crate) timeout: Duration,

    /// End the sandbox also when it was idle for this time.
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub(crate) idle_timeout: Option<Duration>,

    /// An environment variable for everything in the sandbox; KEY alone passes on your own value. May be repeated.
    #[arg(short = 'e', long = "env", value_name = "KEY[=VALUE]")]
    pub(crate) env: Vec<String>,

    /// A label, for `list --label`. May be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
    pub(crate) labels: Vec<(String, String)>,

    /// Memory that the sandbox may use, such as 256M, 2G [default: the server's].
    #[arg(long, value_name = "SIZE", value_parser = units::size)]
    pub(crate) memory: Option<u64>,

    /// Processes and threads that the sandbox may have at once [default: the server's].
    #[arg(long, value_name = "N")]
    pub(crate) processes: Option<u32>,

    /// Print JSON: everything that the server knows about the sandbox.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct CheckpointArgs {
    /// The sandbox.
    pub(crate) id: String,

    /// How long it is kept, such as 10m, 2h.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = units::duration)]
    pub(crate) timeout: Duration,

    /// A label. May be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
    pub(crate) labels: Vec<(String, String)>,

    /// Print JSON: all that the server says of it.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Subcommand, Debug)]
pub(crate) enum CheckpointsCommand {
    /// List the checkpoints of the key, or of one sandbox.
    #[command(visible_alias = "ls")]
    List {
        /// The sandbox.
        id: Option<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show everything that the server knows about a checkpoint.
    Show {
        /// The checkpoint.
        id: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Remove checkpoints. Sandboxes that began there stay.
    Rm {
        /// The checkpoints.
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
}

#[derive(Args, Debug)]
pub(crate) struct BranchArgs {
    /// The sandbox, or the checkpoint.
    pub(crate) id: String,

    /// How many.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100))]
    pub(crate) count: u64,

    /// How long each may live, such as 10m, 2h.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = units::duration)]
    pub(crate) timeout: Duration,

    /// A label, for `list --label`, in place of the origin's. May be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
    pub(crate) labels: Vec<(String, String)>,

    /// Print JSON: all that the server says of them.
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

    /// The context to run in.
    #[arg(long, value_name = "NAME")]
    pub(crate) context: Option<String>,

    /// Timeout of the code, such as 500ms, 2s, 1m. The code is then interrupted.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = units::duration)]
    pub(crate) timeout: Duration,

    /// Print one JSON object instead of the output: the API's answer, with all results.
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

    /// The working directory [default: the home directory].
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<String>,

    /// An environment variable; KEY alone passes on your own value. May be repeated.
    #[arg(short = 'e', long = "env", value_name = "KEY[=VALUE]")]
    pub(crate) env: Vec<String>,

    /// Timeout of the program, such as 500ms, 2s, 1m. The program is then killed [default: no timeout].
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub(crate) timeout: Option<Duration>,

    /// Run the program in the background and print its id. Its standard input is empty.
    #[arg(short, long, conflicts_with = "json")]
    pub(crate) detach: bool,

    /// A label that `ps` shows.
    #[arg(long)]
    pub(crate) tag: Option<String>,

    /// Print one JSON object instead of the output: the API's answer. The program's standard input is empty.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ShellArgs {
    /// The sandbox.
    pub(crate) id: String,

    /// A line of shell to run instead of a shell.
    pub(crate) command: Option<String>,

    /// The working directory [default: the home directory].
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct CpArgs {
    /// The sources; the last path is the target.
    #[arg(required = true, num_args = 2.., value_name = "SOURCE")]
    pub(crate) paths: Vec<String>,

    /// Copy directories, with all that is in them.
    #[arg(short, long)]
    pub(crate) recursive: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ContextsCommand {
    /// List the contexts.
    #[command(visible_alias = "ls")]
    List {
        /// The sandbox.
        id: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Make a context and print its name.
    Create {
        /// The sandbox.
        id: String,
        /// The context's name [default: the server chooses one].
        name: Option<String>,
        /// The working directory [default: the home directory].
        #[arg(long, value_name = "DIR")]
        cwd: Option<String>,
    },
    /// Interrupt the code that runs in a context. The context keeps its state.
    Interrupt {
        /// The sandbox.
        id: String,
        /// The context's name.
        #[arg(default_value = "default")]
        name: String,
    },
    /// Replace the interpreter of a context by a new one. The context loses its state.
    Restart {
        /// The sandbox.
        id: String,
        /// The context's name.
        #[arg(default_value = "default")]
        name: String,
    },
    /// End a context.
    #[command(visible_alias = "delete")]
    Rm {
        /// The sandbox.
        id: String,
        /// The context's name.
        name: String,
    },
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("write it as KEY=VALUE".into()),
    }
}
