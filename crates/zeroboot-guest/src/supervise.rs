//! One sandbox's life, from the runner's `Ready` to the last frame.
//!
//! ```text
//! WarmingUp --Ready--> Loading --Run--> Running --runner ended--> Finishing --front gone--> done
//!     |                   |                |  limit: kill all        |
//!     +---- Failure ------+----------------+        (front gone: kill all, done)
//! ```
//!
//! Nothing is buffered without bound: while the front does not take frames, the program's output is not read;
//! while the program does not take input, the front's frames are not read.
//!
//! | file | duty |
//! |---|---|
//! | `request.rs` | from a cold runner to a request |
//! | `run.rs` | the run, and how it ended |
//! | `watchdog.rs` | samples of its memory and CPU time |
//! | `streams.rs` | its output and input |
//! | `frames.rs` | frames to and from the front and the runner |
//! | `wait.rs` | what the agent waits for |

mod frames;
mod request;
mod run;
mod streams;
mod wait;
mod watchdog;

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use rustix::process::{Pid, WaitStatus};
use zeroboot_proto::{Decoder, Kind, MAX_PAYLOAD, encode};

pub(crate) use self::frames::flush;
use crate::files::Files;
use crate::limits::Ceilings;
use crate::live::{Birth, Born, Live};
use crate::place::Place;
use crate::processes::Processes;
use crate::runner::Runner;
use crate::transport::Transport;

/// Why the supervision ended without an `Exit` frame.
#[derive(Debug)]
pub(crate) enum Stop {
    /// Said to the front in a `Failure` frame.
    Failed(String),
    /// The front is gone.
    FrontGone,
}

impl Stop {
    pub(crate) fn failed(error: impl std::error::Error) -> Stop {
        Stop::Failed(error.to_string())
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Stop {
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Stop::FrontGone,
            _ => Stop::Failed(error.to_string()),
        }
    }
}

/// What a run needs to know of the warm runner. The agent finds it out before the request, when no client waits.
struct Prepared {
    ceilings: Ceilings,
    memory: u64,
    oom_kills: Option<u64>,
}

/// The agent's whole state.
pub(crate) struct Supervisor<T> {
    transport: T,
    place: Place,
    runner: Runner,
    processes: Processes,
    files: Files,
    from_front: Decoder,
    from_runner: Decoder,
    /// Frames for the front that it has not taken.
    out: Vec<u8>,
    /// Frames for the runner.
    control_out: Vec<u8>,
    stdin: VecDeque<u8>,
    stdin_ended: bool,
    control_ended: bool,
    prepared: Option<Prepared>,
    status: Option<WaitStatus>,
    stderr_tail: Vec<u8>,
    buffer: Box<[u8]>,
}

impl<T: Transport> Supervisor<T> {
    /// Over a live runner.
    pub(crate) fn new(transport: T, place: Place, runner: Runner, processes: Processes, files: Files) -> Supervisor<T> {
        Supervisor {
            transport,
            place,
            runner,
            processes,
            files,
            from_front: Decoder::new(),
            from_runner: Decoder::new(),
            out: Vec::new(),
            control_out: Vec::new(),
            stdin: VecDeque::new(),
            stdin_ended: false,
            control_ended: false,
            prepared: None,
            status: None,
            stderr_tail: Vec::new(),
            buffer: vec![0; MAX_PAYLOAD].into_boxed_slice(),
        }
    }

    /// Serves one request. Whatever happens, no process of the sandbox is left when this returns, and the front,
    /// if it is still there, has got its last frame.
    pub(crate) fn serve(mut self) -> Result<(), Stop> {
        let result = match self.life() {
            Ok(Some(born)) => {
                let live = Live::new(Birth {
                    transport: self.transport,
                    place: self.place,
                    processes: self.processes,
                    runner: self.runner,
                    from_runner: self.from_runner,
                    from_front: self.from_front,
                    born,
                });
                return live.serve();
            }
            Ok(None) => Ok(()),
            Err(stop) => Err(stop),
        };
        self.kill_all();
        if let Err(Stop::Failed(reason)) = &result {
            let text: String = reason.chars().take(MAX_PAYLOAD / 4).collect();
            encode(&mut self.out, Kind::Failure, text.as_bytes());
            self.flush_front()?;
        }
        result
    }

    /// One program's life; or what a sandbox is born with that is to live on.
    fn life(&mut self) -> Result<Option<Born>, Stop> {
        self.warm_up()?;
        let request = self.load()?;
        if !request.live {
            return self.run(request).map(|()| None);
        }
        let missing = || Stop::Failed("Live came without an Identity or Limits".into());
        let identity = request.identity.ok_or_else(missing)?;
        let limits = request.limits.ok_or_else(missing)?;
        let prepared = self.prepared.take().ok_or_else(missing)?;
        self.processes.limit(limits.memory);
        let used = self.processes.cpu_of(self.runner.pid);
        prepared.ceilings.apply(&self.runner, &limits, used).map_err(Stop::failed)?;
        Ok(Some(Born { identity, limits, ceilings: prepared.ceilings, env: request.env }))
    }

    /// Whether this is PID 1 of a VM. Frames travel in the mailbox there, and the agent has no socket to poll.
    fn in_vm(&self) -> bool {
        matches!(self.place, Place::Vm)
    }

    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(rustix::process::WaitOptions::NOHANG) {
            note_end(&mut self.status, self.runner.pid, pid, status);
        }
    }

    fn kill_all(&mut self) {
        let (status, runner) = (&mut self.status, self.runner.pid);
        self.processes.kill_all(|pid, s| note_end(status, runner, pid, s));
    }
}

fn note_end(status: &mut Option<WaitStatus>, runner: Pid, pid: Pid, ended: WaitStatus) {
    if pid == runner {
        *status = Some(ended);
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
