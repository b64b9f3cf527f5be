//! The runner's process and the descriptors that lead to it. None is a socket: through one the code could send descriptors,
//! which this process would have to close, for as long as that takes.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::fs::OFlags;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags};

use crate::sys;

/// First of the two descriptors of a runner's control pipes: it hears the agent there, and speaks on the next one.
const RUNNER_CONTROL: i32 = 3;

/// A live runner.
pub(crate) struct Runner {
    /// Its process.
    pub(crate) pid: Pid,
    /// Readable once it has ended. `None` where the kernel or a filter has no pidfds: the watchdog tick finds out then.
    pub(crate) ended: Option<OwnedFd>,
    /// Frames to it: a pipe's write end.
    pub(crate) control_in: OwnedFd,
    /// Frames from it: a pipe's read end.
    pub(crate) control_out: OwnedFd,
    /// Write end; `None` once closed.
    pub(crate) stdin: Option<OwnedFd>,
    /// Read end; `None` at its end.
    pub(crate) stdout: Option<OwnedFd>,
    /// Read end; `None` at its end.
    pub(crate) stderr: Option<OwnedFd>,
}

/// How to start a runner.
pub(crate) struct Spawn<'a> {
    /// Program and arguments.
    pub(crate) command: Vec<OsString>,
    /// Working directory; the agent's if `None`.
    pub(crate) cwd: Option<PathBuf>,
    /// User and group to become; the agent's if `None`.
    pub(crate) user: Option<(u32, u32)>,
    /// Environment to replace the agent's; inherited if `None`.
    pub(crate) env: Option<Vec<(OsString, OsString)>>,
    /// What else its start needs.
    pub(crate) prepare: &'a dyn Fn(&mut Command),
}

impl Runner {
    /// Takes over a runner that runs already as a child of this process.
    pub(crate) fn adopt(
        pid: Pid,
        [control_in, control_out]: [OwnedFd; 2],
        stdin: OwnedFd,
        stdout: OwnedFd,
        stderr: OwnedFd,
    ) -> io::Result<Runner> {
        for end in [&control_in, &control_out, &stdin, &stdout, &stderr] {
            let flags = rustix::fs::fcntl_getfl(end)?;
            // Of our own ends only: the runner's are other open files.
            rustix::fs::fcntl_setfl(end, flags | OFlags::NONBLOCK)?;
        }
        let ended = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok();
        let [stdin, stdout, stderr] = [stdin, stdout, stderr].map(Some);
        Ok(Runner { pid, ended, control_in, control_out, stdin, stdout, stderr })
    }

    /// Starts one.
    pub(crate) fn spawn(spawn: &Spawn<'_>) -> io::Result<Runner> {
        let (program, args) = spawn.command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let (control_in_theirs, control_in) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let (control_out, control_out_theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let (stdin_theirs, stdin) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let (stdout, stdout_theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let (stderr, stderr_theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let mut command = Command::new(program);
        command.args(args);
        command.stdin(Stdio::from(stdin_theirs));
        command.stdout(Stdio::from(stdout_theirs));
        command.stderr(Stdio::from(stderr_theirs));
        if let Some(cwd) = &spawn.cwd {
            command.current_dir(cwd);
        }
        if let Some(env) = &spawn.env {
            command.env_clear();
            command.envs(env.iter().map(|(k, v)| (k, v)));
        }
        if let Some((uid, gid)) = spawn.user {
            command.uid(uid).gid(gid);
        }
        sys::give_descriptors(&mut command, [control_in_theirs, control_out_theirs], RUNNER_CONTROL);
        (spawn.prepare)(&mut command);
        let child = command.spawn()?;
        // Dropping `Child` neither waits nor kills: the supervisor reaps every process itself.
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
        drop(command);
        Runner::adopt(pid, [control_in, control_out], stdin, stdout, stderr)
    }

    /// User id of the runner, from `/proc`.
    pub(crate) fn uid(&self) -> Option<u32> {
        use std::os::unix::fs::MetadataExt;
        Some(std::fs::metadata(format!("/proc/{}", self.pid)).ok()?.uid())
    }
}

/// Whether a read of `fd` would not block now.
pub(crate) fn readable(fd: impl AsFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&Timespec::default())), Ok(n) if n > 0)
}
