//! The agent: supervises one runner for one request, as PID 1 of a process sandbox or of a VM.
//!
//! ```text
//! zeroboot-guest                  (as PID 1) of a VM: makes the machine, starts the runner
//! zeroboot-guest sandbox PID [uncounted]  the runner runs already, as a child of this process
//! zeroboot-guest spawn [--] CMD...    starts the runner itself (tests)
//! ```
//!
//! Descriptor 3 is the front's socket. `sandbox` also takes our ends of the runner's pipes: 4 (control, to it), 5 (control, from
//! it), 6 (its stdin), 7 and 8 (its stdout and stderr); and with `uncounted` behind the PID, where no cgroup counts its memory, what
//! shows that of its sockets: 9 and 10 (`/proc/net/sockstat`, `sockstat6`), 11 (a `sock_diag` socket). The working directory is the
//! program's.

mod files;
mod kernel_memory;
mod limits;
mod live;
mod machine;
mod place;
mod processes;
mod runner;
mod supervise;
mod sys;
mod transport;
mod vm;

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Pid};

use crate::files::Files;
use crate::kernel_memory::KernelMemory;
use crate::place::Place;
use crate::processes::Processes;
use crate::runner::{Runner, Spawn};
use crate::supervise::{Stop, Supervisor};
use crate::transport::SocketTransport;

/// The front's socket.
const FRONT_FD: i32 = 3;

/// Exit status when the front has ended or was told a failure.
const STATUS_STOPPED: u8 = 1;
/// Exit status when the agent was started wrongly.
const STATUS_USAGE: u8 = 2;

/// Why the agent cannot start. Only its standard error can be told: there is no transport yet.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("usage: zeroboot-guest sandbox PID | spawn [--] COMMAND...")]
    Usage,
    #[error("descriptor {0}: {1}")]
    Descriptor(i32, #[source] io::Error),
    #[error("dumpable: {0}")]
    Dumpable(#[source] Errno),
    #[error("cannot adopt orphans: {0}")]
    Orphans(#[source] io::Error),
    #[error("bad runner pid")]
    BadPid,
    #[error("cannot take the runner over: {0}")]
    Adopt(#[source] io::Error),
    #[error("cannot start the runner: {0}")]
    Spawn(#[source] io::Error),
    #[error("working directory: {0}")]
    NoDirectory(#[source] io::Error),
    #[error("working directory {0:?}: {1}")]
    Directory(PathBuf, #[source] io::Error),
}

fn main() -> ExitCode {
    // The kernel of a VM starts us as `/init`, without a mode.
    if std::process::id() == 1 && std::env::args_os().len() <= 1 {
        return ExitCode::from(machine::main());
    }
    match start() {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(Stop::Failed(_) | Stop::FrontGone)) => ExitCode::from(STATUS_STOPPED),
        Err(error) => {
            let line = format!("zeroboot-guest: {error}\n");
            if rustix::io::write(rustix::stdio::stderr(), line.as_bytes()).is_err() {
                // Not even stderr: the status has to do.
            }
            ExitCode::from(STATUS_USAGE)
        }
    }
}

fn start() -> Result<Result<(), Stop>, StartError> {
    // Before tracing is forbidden: up to Linux 6.3 rustix reads /proc/self/auxv, which is then out of reach, and aborts.
    let _read_now = rustix::param::page_size();
    let front = inherited(FRONT_FD)?;
    // The program may run as the same user: it must not look into this process or trace it.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(StartError::Dumpable)?;
    let mut processes = Processes::new().map_err(StartError::Orphans)?;
    let mut args = std::env::args_os().skip(1);
    let mode = args.next().unwrap_or_default();
    let (place, runner) = match mode.to_str() {
        Some("sandbox") => {
            let runner = adopt(args.next())?;
            if args.next().is_some_and(|word| word == "uncounted") {
                processes.count_kernel_memory(KernelMemory::new(inherited(9)?, inherited(10)?, inherited(11)?));
            }
            (Place::Process, runner)
        }
        Some("spawn") => {
            let command: Vec<OsString> = args.skip_while(|a| a == "--").collect();
            let spawn = Spawn { command: command.clone(), cwd: None, user: None, env: None, prepare: &|_| () };
            let runner = Runner::spawn(&spawn).map_err(StartError::Spawn)?;
            (Place::Test(command), runner)
        }
        _ => return Err(StartError::Usage),
    };
    let cwd = std::env::current_dir().map_err(StartError::NoDirectory)?;
    let files = Files::new(&cwd, None).map_err(|error| StartError::Directory(cwd, error))?;
    Ok(Supervisor::new(SocketTransport::new(front), place, runner, processes, files).serve())
}

fn adopt(pid: Option<OsString>) -> Result<Runner, StartError> {
    let pid = pid.as_ref().and_then(|p| p.to_str()?.parse().ok()).and_then(Pid::from_raw).ok_or(StartError::BadPid)?;
    let control = [inherited(4)?, inherited(5)?];
    Runner::adopt(pid, control, inherited(6)?, inherited(7)?, inherited(8)?).map_err(StartError::Adopt)
}

fn inherited(number: i32) -> Result<OwnedFd, StartError> {
    sys::inherited(number).map_err(|error| StartError::Descriptor(number, error))
}
