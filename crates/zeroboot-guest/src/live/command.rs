//! A program on pipes or on a terminal.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags, Signal, WaitStatus};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use zeroboot_proto::live::{How, Refusal, Size};

use crate::place::Place;
use crate::sys::{self, Setup};

/// Most bytes that a terminal can still hold when its program ends.
const TERMINAL_HOLDS: usize = 64 * 1024;
/// Ctrl-D: the end of input on a terminal.
const END_OF_INPUT: u8 = 4;

/// How to start a program.
pub(super) struct Start<'a> {
    pub(super) words: Vec<Vec<u8>>,
    pub(super) cwd: Option<String>,
    pub(super) env: Vec<(OsString, OsString)>,
    pub(super) terminal: Option<Size>,
    pub(super) stdin: bool,
    pub(super) setup: Setup,
    pub(super) place: &'a Place,
}

/// A program that was started.
pub(super) struct Program {
    pub(super) pid: Pid,
    /// Readable once it has ended.
    pub(super) ended: OwnedFd,
    pub(super) stdin: Option<OwnedFd>,
    pub(super) stdout: Option<OwnedFd>,
    pub(super) stderr: Option<OwnedFd>,
    terminal: bool,
    /// Input that it has not taken.
    pub(super) input: VecDeque<u8>,
    pub(super) input_ended: bool,
    pub(super) status: Option<WaitStatus>,
    /// Bytes of stdout and stderr that are still its own when it has ended: others may write on.
    pub(super) left: [usize; 2],
    /// Why it was killed.
    pub(super) killed: Option<How>,
}

impl Program {
    pub(super) fn start(start: Start<'_>) -> Result<Program, (Refusal, String)> {
        let mut words = start.words.into_iter().map(OsString::from_vec);
        let name = words.next().filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| (Refusal::CannotStart, "no program is named".to_owned()))?;
        let home = start.place.home();
        let cwd = start.cwd.map_or_else(|| home.clone(), |cwd| home.join(cwd));
        let mut command = Command::new(&name);
        command.args(words).current_dir(&cwd).env_clear().envs(start.env);
        if let Some((uid, gid)) = start.place.user() {
            command.uid(uid).gid(gid);
        }
        let failed = |error: io::Error| refusal(&error, &name, &cwd);
        let (stdin, stdout, stderr) = match start.terminal {
            Some(size) => terminal(&mut command, size, start.place).map_err(failed)?,
            None => pipes(&mut command, start.stdin).map_err(failed)?,
        };
        sys::lead_session(&mut command, start.setup);
        start.place.prepare(&mut command);
        let child = command.spawn().map_err(failed)?;
        // The other ends of the pipes.
        drop(command);
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| (Refusal::Failed, "it has no process id".to_owned()))?;
        let ended = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|error| failed(error.into()))?;
        Ok(Program {
            pid,
            ended,
            stdin,
            stdout,
            stderr,
            terminal: start.terminal.is_some(),
            input: VecDeque::new(),
            input_ended: !start.stdin && start.terminal.is_none(),
            status: None,
            left: [0; 2],
            killed: None,
        })
    }

    /// Writes what it takes. How many bytes it took, or that will never be taken.
    pub(super) fn feed(&mut self) -> usize {
        let mut taken = 0;
        while let Some(fd) = &self.stdin {
            if self.input.is_empty() {
                if self.input_ended {
                    if !self.terminal {
                        self.stdin = None;
                    } else if rustix::io::write(fd, &[END_OF_INPUT]).is_ok() {
                        // Its other direction goes on.
                        self.input_ended = false;
                    }
                }
                break;
            }
            match rustix::io::write(fd, self.input.as_slices().0) {
                Ok(n) => {
                    self.input.drain(..n);
                    taken += n;
                }
                Err(Errno::AGAIN | Errno::INTR) => break,
                // It does not read. That is its right.
                Err(_) => self.stdin = None,
            }
        }
        if self.stdin.is_none() {
            taken += self.input.len();
            self.input.clear();
        }
        taken
    }

    /// Whether there is something that it did not take at once.
    pub(super) fn wants_to_write(&self) -> bool {
        !self.input.is_empty() || self.input_ended
    }

    pub(super) fn signal(&self, signal: Signal) {
        // To its session's first group: a shell's jobs have groups of their own, which it passes signals on to. Gone
        // already is what a signal may find.
        rustix::process::kill_process_group(self.pid, signal).ok();
    }

    pub(super) fn kill(&mut self, why: How) {
        self.killed.get_or_insert(why);
        self.signal(Signal::KILL);
    }

    pub(super) fn resize(&self, size: Size) {
        if let Some(fd) = self.stdin.as_ref().filter(|_| self.terminal) {
            // A terminal that is gone needs no size.
            rustix::termios::tcsetwinsize(fd, winsize(size)).ok();
        }
    }

    /// It was reaped. What it wrote is in its pipes.
    pub(super) fn has_ended(&mut self, status: WaitStatus) {
        self.status = Some(status);
        self.stdin = None;
        let pipe = |fd: &Option<OwnedFd>| fd.as_ref().map_or(0, sys::waiting);
        self.left = match (&self.stdout, self.terminal) {
            (Some(_), true) => [TERMINAL_HOLDS, 0],
            _ => [pipe(&self.stdout), pipe(&self.stderr)],
        };
    }

    /// Reads once, at most `most` bytes. `None`: nothing now.
    pub(super) fn read(&mut self, stdout: bool, buffer: &mut [u8]) -> Option<usize> {
        let at = usize::from(!stdout);
        let left = self.left.get_mut(at)?;
        let over = self.status.is_some();
        let most = if over { (*left).min(buffer.len()) } else { buffer.len() };
        let end = if stdout { &mut self.stdout } else { &mut self.stderr };
        let read = rustix::io::read(end.as_ref()?, buffer.get_mut(..most)?);
        match read {
            Ok(n) if n > 0 => {
                *left = left.saturating_sub(n);
                Some(n)
            }
            Err(Errno::INTR) => None,
            Err(Errno::AGAIN) => {
                *left = 0;
                None
            }
            // EIO: a terminal without a program.
            Ok(_) | Err(_) => {
                *left = 0;
                *end = None;
                None
            }
        }
    }

    /// It has ended and all its output was read.
    pub(super) fn how(&self) -> Option<How> {
        let status = self.status.filter(|_| self.left == [0; 2])?;
        Some(self.killed.clone().unwrap_or_else(|| how(status)))
    }

    /// The reading ends that programs which it has left behind may still write to.
    pub(super) fn leftovers(self) -> impl Iterator<Item = OwnedFd> {
        // A terminal is hung up, as when its window is closed.
        let keep = !self.terminal;
        [self.stdout, self.stderr].into_iter().flatten().filter(move |_| keep)
    }
}

/// A status in the words of a channel's end.
pub(super) fn how(status: WaitStatus) -> How {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => How::Exited(code & 0xff),
        (None, Some(signal)) => How::Signaled(signal),
        (None, None) => How::Signaled(Signal::KILL.as_raw()),
    }
}

type Ends = (Option<OwnedFd>, Option<OwnedFd>, Option<OwnedFd>);

fn pipes(command: &mut Command, stdin: bool) -> io::Result<Ends> {
    let ours = |fd: &OwnedFd| -> io::Result<()> {
        let flags = rustix::fs::fcntl_getfl(fd)?;
        Ok(rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
    };
    let input = if stdin {
        let (theirs, end) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        ours(&end)?;
        command.stdin(Stdio::from(theirs));
        Some(end)
    } else {
        command.stdin(Stdio::null());
        None
    };
    let (stdout, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    ours(&stdout)?;
    command.stdout(Stdio::from(theirs));
    let (stderr, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    ours(&stderr)?;
    command.stderr(Stdio::from(theirs));
    Ok((input, Some(stdout), Some(stderr)))
}

fn terminal(command: &mut Command, size: Size, place: &Place) -> io::Result<Ends> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&ours)?;
    let theirs = rustix::pty::ioctl_tiocgptpeer(&ours, flags)?;
    if let Some((uid, gid)) = place.user() {
        let owner = (Some(rustix::fs::Uid::from_raw(uid)), Some(rustix::fs::Gid::from_raw(gid)));
        rustix::fs::fchown(&theirs, owner.0, owner.1)?;
    }
    rustix::termios::tcsetwinsize(&ours, winsize(size))?;
    let flags = rustix::fs::fcntl_getfl(&ours)?;
    rustix::fs::fcntl_setfl(&ours, flags | OFlags::NONBLOCK)?;
    command.stdin(Stdio::from(theirs.try_clone()?));
    command.stdout(Stdio::from(theirs.try_clone()?));
    command.stderr(Stdio::from(theirs));
    Ok((Some(ours.try_clone()?), Some(ours), None))
}

fn winsize(size: Size) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}

fn refusal(error: &io::Error, name: &OsString, cwd: &Path) -> (Refusal, String) {
    let name = PathBuf::from(name);
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        _ if !cwd.is_dir() => (Refusal::NotFound, format!("the working directory {} is not there", cwd.display())),
        Some(Errno::NOENT) => (Refusal::CannotStart, format!("{}: no such program in this sandbox", name.display())),
        Some(Errno::ACCESS) => (Refusal::CannotStart, format!("{}: not a program that may be run", name.display())),
        Some(Errno::AGAIN) => (Refusal::NoRoom, "the sandbox has as many processes as it may have".into()),
        Some(Errno::NOMEM) => (Refusal::NoRoom, "the sandbox has no memory left".into()),
        Some(Errno::MFILE | Errno::NFILE | Errno::NOSPC) => {
            (Refusal::NoRoom, "the sandbox has no descriptors or terminals left".into())
        }
        Some(Errno::TOOBIG) => (Refusal::CannotStart, "arguments and environment are too long together".into()),
        _ => (Refusal::CannotStart, format!("{}: {error}", name.display())),
    }
}
