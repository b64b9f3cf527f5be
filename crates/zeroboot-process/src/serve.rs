//! The fork path of the process engine: one worker for each `Fork` message.
//!
//! ```text
//! zygote          serves the control channel; clones a worker into new namespaces
//!   └─ worker     enters the sandbox (`worker.rs`), forks the runner, becomes the agent
//!        └─ runner    returns from [`serve`]
//! ```

mod ahead;
mod worker;

use std::{
    io,
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::pipe::PipeFlags;
use zeroboot_sys::{
    arena,
    control::{self, Control, PROC_FD},
    jail::{self, Filter, JailError},
    process::{self, Forked},
};

use self::ahead::{Ahead, Rehearsed};
use crate::ids;

const SANDBOX_POLICY: &str = include_str!("../../../policy/process-sandbox.json");
/// The filter that is added on hosts without a cgroup.
const UNCOUNTED_POLICY: &str = include_str!("../../../policy/process-uncounted.json");

/// Moves the memory of this process into an image.
pub type Freeze = fn() -> io::Result<Frozen>;

/// What became of it.
#[derive(Debug)]
pub struct Frozen {
    /// In words.
    pub text: String,
    /// The memory that moved.
    pub moved: Vec<Range<usize>>,
}

/// Why serving ended or never began.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A policy or a jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The control channel or a system call.
    #[error("{0}")]
    Io(String, #[source] io::Error),
    /// The zygote has more than one thread.
    #[error("the warmed runtime has {0} threads; only a single-threaded process can be forked")]
    Threads(usize),
}

fn step(what: &str) -> impl FnOnce(io::Error) -> ServeError + '_ {
    move |error| ServeError::Io(format!("{what}: {error}"), error)
}

/// Where [`serve`] returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// In the zygote: the front is gone.
    FrontGone,
    /// In a runner: jailed, with its standard streams and its control pipes in place.
    Runner,
}

/// Serves the control channel until the front is gone. Returns in the zygote then, and in each runner that it forks.
///
/// `freeze` moves the warm memory into an image, and says what became of it. It is called before the fork of this number.
pub fn serve(control: &OwnedFd, mut freeze: Option<(Freeze, u64)>) -> Result<Served, ServeError> {
    let threads = std::fs::read_dir("/proc/self/task").map_err(step("list threads"))?.count();
    if threads != 1 {
        return Err(ServeError::Threads(threads));
    }
    let mut zygote = Zygote {
        filter: Filter::parse(SANDBOX_POLICY)?,
        uncounted_filter: Filter::parse(UNCOUNTED_POLICY)?,
        proc: process::inherited_fd(PROC_FD)
            .ok_or_else(|| step("find /proc")(io::Error::from_raw_os_error(rustix::io::Errno::BADF.raw_os_error())))?,
        ids: ids::mapped(),
        ahead: Ahead::default(),
    };
    process::ignore_children();
    let mut random = [0u8; 4];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| step("get random bytes")(e.into()))?;
    let mut count = u32::from_le_bytes(random);
    // From here on, so that nothing older is freed once the memory is an image.
    arena::begin().map_err(step("reserve memory"))?;
    let mut forks = 0u64;
    loop {
        let Some((message, mut fds)) = control::receive(control).map_err(step("read the control channel"))? else {
            return Ok(Served::FrontGone);
        };
        let Control::Fork { id } = message else { continue };
        if fds.is_empty() {
            let text = "the Fork message came without its socket".into();
            control::send(control, &Control::ForkFailed { id, text }, &[])
                .map_err(step("answer on the control channel"))?;
            continue;
        }
        if let Some((freeze, _)) = freeze.take_if(|(_, before)| forks >= *before) {
            // Forks are as right without, and slower.
            let text = match freeze() {
                Ok(Frozen { text, moved }) => match zygote.rehearse(&moved) {
                    Ok(Rehearsed::Known(ahead)) => {
                        zygote.ahead = ahead;
                        text + &zygote.ahead.words()
                    }
                    Ok(Rehearsed::Runner) => {
                        std::mem::forget(zygote);
                        return Ok(Served::Runner);
                    }
                    Err(error) => format!("{text}; no rehearsal: {error}"),
                },
                Err(error) => format!("no image: {error}"),
            };
            control::send(control, &Control::Image { text }, &[]).map_err(step("answer on the control channel"))?;
        }
        forks += 1;
        let socket = fds.remove(0);
        let cgroup = fds.pop();
        let outside = zygote.ids.map_or_else(|| rustix::process::geteuid().as_raw(), |ids| ids::BASE + count % ids);
        count = count.wrapping_add(1);
        match zygote.fork(socket, cgroup, outside) {
            Ok(Side::Runner) => {
                // Its descriptors are closed already, all at once.
                std::mem::forget(zygote);
                return Ok(Served::Runner);
            }
            Ok(Side::Zygote(pidfd)) => control::send(control, &Control::Forked { id }, &[pidfd.as_fd()]),
            Err(error) => control::send(control, &Control::ForkFailed { id, text: error.to_string() }, &[]),
        }
        .map_err(step("answer on the control channel"))?;
    }
}

/// The two processes in which [`Zygote::fork`] returns. The worker between them becomes the agent or ends.
enum Side {
    /// With the worker's pidfd.
    Zygote(OwnedFd),
    Runner,
}

struct Zygote {
    /// One for the agent, the runner and all that they start: the agent starts commands, whose filter can only be as wide
    /// as its own.
    filter: Filter,
    uncounted_filter: Filter,
    /// Our own `/proc`, for the children's id maps.
    proc: OwnedFd,
    /// How many users sandboxes can have.
    ids: Option<u32>,
    /// What is touched in each runner.
    ahead: Ahead,
}

impl Zygote {
    /// Makes one worker, and in it one runner.
    fn fork(&self, socket: OwnedFd, cgroup: Option<OwnedFd>, outside: u32) -> Result<Side, ServeError> {
        let (mapped, mapping) =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|e| step("make a pipe")(e.into()))?;
        match process::clone_into(process::SANDBOX_NAMESPACES).map_err(step("clone3"))? {
            Forked::Parent((pid, pidfd)) => {
                drop((mapped, socket, cgroup));
                if let Err(error) = jail::settle_child(self.proc.as_fd(), pid, pidfd.as_fd(), outside) {
                    kill(&pidfd);
                    return Err(step("write the id maps")(error));
                }
                // One byte lets the worker go on; a worker that is gone already shows on its socket.
                if rustix::io::write(&mapping, b"x").is_err() {
                    kill(&pidfd);
                }
                Ok(Side::Zygote(pidfd))
            }
            // The worker.
            Forked::Child => {
                drop(mapping);
                match self.worker(&mapped, socket, cgroup) {
                    Ok(()) => {
                        std::mem::forget(mapped);
                        Ok(Side::Runner)
                    }
                    Err((socket, error)) => {
                        report(&socket, &error.to_string());
                        process::exit_now(125)
                    }
                }
            }
        }
    }
}

fn kill(pidfd: &OwnedFd) {
    // The only failure is that it is gone already, which is what we want.
    let _gone = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
}

/// Says why there will be no sandbox. A reader that is gone needs no answer.
fn report(socket: &(impl AsFd + ?Sized), text: &str) {
    let mut bytes = Vec::new();
    zeroboot_proto::encode(&mut bytes, zeroboot_proto::Kind::Failure, text.as_bytes());
    let fd: BorrowedFd<'_> = socket.as_fd();
    let _gone = rustix::io::write(fd, &bytes);
}
