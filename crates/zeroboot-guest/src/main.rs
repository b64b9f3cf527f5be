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
use std::process::ExitCode;

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

fn main() -> ExitCode {
    // The kernel of a VM starts us as `/init`, without a mode.
    if std::process::id() == 1 && std::env::args_os().len() <= 1 {
        return ExitCode::from(machine::main());
    }
    match start() {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(Stop::Failed(_) | Stop::FrontGone)) => ExitCode::from(STATUS_STOPPED),
        Err(reason) => {
            // There is nobody else to tell: no transport yet.
            let line = format!("zeroboot-guest: {reason}\n");
            if rustix::io::write(rustix::stdio::stderr(), line.as_bytes()).is_err() {
                // Not even stderr: the status has to do.
            }
            ExitCode::from(STATUS_USAGE)
        }
    }
}

fn start() -> Result<Result<(), Stop>, String> {
    // Before tracing is forbidden: up to Linux 6.3 rustix reads /proc/self/auxv, which is then out of reach, and aborts.
    let _read_now = rustix::param::page_size();
    let front = sys::inherited(FRONT_FD).map_err(|error| format!("descriptor {FRONT_FD}: {error}"))?;
    // The program may run as the same user: it must not look into this process or trace it.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(|e| format!("dumpable: {e}"))?;
    let mut processes = Processes::new().map_err(|error| format!("cannot adopt orphans: {error}"))?;
    let mut args = std::env::args_os().skip(1);
    let mode = args.next().unwrap_or_default();
    let (place, runner) = match mode.to_str() {
        Some("sandbox") => {
            let runner = adopt(args.next())?;
            if args.next().is_some_and(|word| word == "uncounted") {
                let fd = |n| sys::inherited(n).map_err(|error| format!("descriptor {n}: {error}"));
                processes.count_kernel_memory(KernelMemory::new(fd(9)?, fd(10)?, fd(11)?));
            }
            (Place::Process, runner)
        }
        Some("spawn") => {
            let command: Vec<OsString> = args.skip_while(|a| a == "--").collect();
            let spawn = Spawn { command: command.clone(), cwd: None, user: None, env: None, prepare: &|_| () };
            let runner = Runner::spawn(&spawn).map_err(|error| format!("cannot start the runner: {error}"))?;
            (Place::Test(command), runner)
        }
        _ => return Err("usage: zeroboot-guest sandbox PID | spawn [--] COMMAND...".into()),
    };
    let cwd = std::env::current_dir().map_err(|error| format!("working directory: {error}"))?;
    let files = Files::new(&cwd, None).map_err(|error| format!("working directory {cwd:?}: {error}"))?;
    Ok(Supervisor::new(SocketTransport::new(front), place, runner, processes, files).serve())
}

fn adopt(pid: Option<OsString>) -> Result<Runner, String> {
    let pid = pid.as_ref().and_then(|p| p.to_str()?.parse().ok()).and_then(Pid::from_raw).ok_or("bad runner pid")?;
    let mut fds = (4..=8).map(|n| sys::inherited(n).map_err(|e| format!("descriptor {n}: {e}")));
    let mut next = || fds.next().ok_or_else(String::new)?;
    Runner::adopt(pid, [next()?, next()?], next()?, next()?, next()?)
        .map_err(|error| format!("cannot take the runner over: {error}"))
}
