//! What came of an exec.

use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;

/// How an exec ended. All of these are answers, none is an error of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub enum Outcome {
    /// The code ended with this status.
    Exited {
        /// 0 to 255.
        code: i32,
    },
    /// A signal killed the code.
    Signaled {
        /// The signal's number.
        signal: i32,
    },
    /// The wall-time limit passed.
    DeadlinePassed,
    /// The CPU-time limit passed.
    CpuLimit,
    /// It wrote more than the output limit; what came before is kept.
    OutputLimit,
    /// It needed more memory than it may have.
    OutOfMemory {
        /// Its exit status: its own if the runtime raised an error, 137 if it was killed.
        code: i32,
    },
    /// The sandbox itself ended: guest panic, worker gone.
    Crashed,
}

impl Outcome {
    /// The word that the API uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Exited { .. } => "exited",
            Outcome::Signaled { .. } => "signaled",
            Outcome::DeadlinePassed => "deadline_passed",
            Outcome::CpuLimit => "cpu_limit",
            Outcome::OutputLimit => "output_limit",
            Outcome::OutOfMemory { .. } => "out_of_memory",
            Outcome::Crashed => "crashed",
        }
    }

    /// Every word of [`Outcome::as_str`], for metrics and schemas.
    pub const NAMES: [&str; 7] =
        ["exited", "signaled", "deadline_passed", "cpu_limit", "output_limit", "out_of_memory", "crashed"];

    /// The exit status as a shell would show it: the code's own, 128 + signal, 124 for a passed limit
    /// of time, 137 for a sandbox that was killed.
    pub fn exit_code(self) -> i32 {
        match self {
            Outcome::Exited { code } | Outcome::OutOfMemory { code } => code,
            Outcome::Signaled { signal } => 128 + signal,
            Outcome::DeadlinePassed | Outcome::CpuLimit => 124,
            Outcome::OutputLimit | Outcome::Crashed => 137,
        }
    }
}

/// What an exec cost and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// How it ended.
    pub outcome: Outcome,
    /// The worker vanished without a word, so `outcome` is [`Outcome::Crashed`]: our failure, not the code's.
    pub lost: bool,
    /// A sandbox was waiting in the pool.
    pub pooled: bool,
    /// From the request's admission until a sandbox was ready: a pool checkout or a fork.
    pub fork_time: Duration,
    /// From the `Run` frame to the `Exit` frame, by the host's clock.
    pub exec_time: Duration,
    /// From [`crate::Engine::exec`] to the last frame.
    pub total_time: Duration,
    /// CPU time of the sandbox's processes; zero if unknown.
    pub cpu_time: Duration,
    /// Peak resident memory in bytes; zero if unknown.
    pub peak_memory: u64,
    /// What its runner has to say about an uncaught error: one line of printable text. The code can forge it.
    pub hint: Option<Box<str>>,
}

/// A file that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputFile {
    /// As it was asked for.
    pub path: String,
    /// Its bytes, or why it could not be read.
    pub data: Result<Bytes, String>,
}

/// What happens during an exec, in order: `Started`, then any of the others, then one `End`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The code runs.
    Started,
    /// Bytes of standard output.
    Stdout(Bytes),
    /// Bytes of standard error.
    Stderr(Bytes),
    /// A file, after the code's end.
    File(OutputFile),
    /// The last event.
    End(Report),
}

/// A whole exec, gathered by [`crate::Execution::collect`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collected {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// The files asked for.
    pub files: Vec<OutputFile>,
    /// How it ended and what it cost.
    pub report: Report,
}
