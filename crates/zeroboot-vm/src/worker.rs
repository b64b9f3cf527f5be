//! The worker: one process, one VM, one sandbox.
//!
//! ```text
//! forked ─▶ VM made, memory mapped, state restored ─▶ jailed ─▶ `Ready` ─▶ waits (the pool)
//!        ─▶ request ─▶ clocks start ─▶ guest runs ─▶ last frame ─▶ front gone ─▶ end of the process
//! ```
//!
//! A sandbox that lives has no last frame but `Crash` or `Failure`: its front ends it by going, or by killing the worker.
//!
//! It frees nothing: the end of the process does, off the path of the answer.

use std::{
    io,
    mem::ManuallyDrop,
    os::fd::BorrowedFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send},
};
use zeroboot_proto::{Kind, encode};
use zeroboot_sys::{
    delta::Delta,
    jail::Filter,
    kick::{self, Kick},
};

use crate::{
    Checkpoint, CheckpointError, Fork, ForkError, Front, Host, Prefault, Received, Session, SessionEnd, SessionError,
    Snapshot, Underway, jail, jail::VmJailError,
};

/// Longest time from the last frame until the front closes its end.
const LINGER: Duration = Duration::from_secs(1);

/// Why a worker ended without an answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The VM could not be made.
    #[error(transparent)]
    Fork(#[from] ForkError),
    /// The timer or the socket's signal could not be set up.
    #[error("cannot set up the kick of the vCPU")]
    Kick(#[source] io::Error),
    /// The jail could not be closed: no guest instruction was run.
    #[error("cannot close the worker's jail")]
    Jail(#[from] VmJailError),
    /// The checkpoint gave no machine.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The exec could not be carried through.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The front's socket broke.
    #[error("cannot tell the front that the worker is ready")]
    Socket(#[source] io::Error),
}

/// Makes a VM, jails this process, waits for a request on `socket` and carries it through. Call it in a
/// process that exists for nothing else, with one thread, and that only tells how it ended and ends itself
/// when this returns: the filter admits no more.
pub fn worker(
    host: Host,
    snapshot: &Snapshot,
    socket: BorrowedFd<'_>,
    prefault: Prefault,
    filter: &Filter,
    delta: Delta,
) -> Result<SessionEnd, WorkerError> {
    let kick = Kick::new().map_err(WorkerError::Kick)?;
    let mut fork = snapshot.fork(&host)?;
    // The VM is made: the worker needs the device no more.
    drop(host);
    snapshot.prefault(&mut fork, prefault)?;
    fork.save_into(&delta).map_err(ForkError::from)?;
    drop(delta);
    // What KVM does once, at the first run, it does now.
    fork.machine.vcpu.complete_io().map_err(ForkError::from)?;
    kick::on_activity(socket).map_err(WorkerError::Kick)?;
    // What their ends would call (close, timer_delete), the filter forbids.
    let (fork, kick) = (ManuallyDrop::new(fork), ManuallyDrop::new(kick));
    jail::close(filter)?;
    serve(snapshot, fork, None, socket, &kick)
}

/// As [`worker`], for a fork that goes on from a checkpoint. What another worker wrote is read and restored in this one's
/// jail: `restoring` is the filter until then.
pub fn worker_of_checkpoint(
    host: Host,
    snapshot: &Snapshot,
    checkpoint: Checkpoint,
    socket: BorrowedFd<'_>,
    (restoring, filter): (&Filter, &Filter),
    delta: Delta,
) -> Result<SessionEnd, WorkerError> {
    let kick = Kick::new().map_err(WorkerError::Kick)?;
    let (mut fork, state) = checkpoint.machine(&host, snapshot)?;
    drop(host);
    fork.save_into(&delta).map_err(ForkError::from)?;
    drop(delta);
    kick::on_activity(socket).map_err(WorkerError::Kick)?;
    let (mut fork, kick) = (ManuallyDrop::new(fork), ManuallyDrop::new(kick));
    jail::close_but_for_restoring(restoring)?;
    let underway = fork.go_on_from(&state, snapshot)?;
    fork.machine.vcpu.complete_io().map_err(ForkError::from)?;
    jail::restored(filter)?;
    serve(snapshot, fork, Some(underway), socket, &kick)
}

/// In the jail.
fn serve(
    snapshot: &Snapshot,
    mut fork: ManuallyDrop<Fork>,
    underway: Option<Underway>,
    socket: BorrowedFd<'_>,
    kick: &Kick,
) -> Result<SessionEnd, WorkerError> {
    let mut front = SocketFront::new(socket);
    let mut ready = Vec::new();
    encode(&mut ready, Kind::Ready, snapshot.about());
    front.send(&ready).map_err(WorkerError::Socket)?;
    let mut session = Session::new(snapshot, &mut fork, &mut front, kick);
    if let Some(underway) = underway {
        session = session.going_on(underway);
    }
    let (end, _stats) = session.run()?;
    // No exec's answer waits for a teardown after a crash, and its socket is to close.
    if end != SessionEnd::Crashed {
        front.linger();
    }
    Ok(end)
}

/// The front at the other end of a stream socket that does not block.
#[derive(Debug)]
pub struct SocketFront<'a> {
    socket: BorrowedFd<'a>,
}

impl<'a> SocketFront<'a> {
    /// Over a connected stream socket, of which [`kick::on_activity`] tells.
    pub fn new(socket: BorrowedFd<'a>) -> SocketFront<'a> {
        SocketFront { socket }
    }

    /// Waits until the front has gone. It does so, or kills this process, when its own caller has the answer: taking a VM
    /// apart would be in the way.
    fn linger(&self) {
        let until = Instant::now() + LINGER;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            // No events: the end alone. Nothing that fails here is worth more than going on to the end.
            if poll(&mut [PollFd::new(&self.socket, PollFlags::empty())], Some(&left)) != Err(Errno::INTR) {
                return;
            }
        }
    }

    /// Waits for `events`, through any number of kicks.
    fn wait(&self, events: PollFlags) -> io::Result<()> {
        loop {
            match poll(&mut [PollFd::new(&self.socket, events)], None) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Front for SocketFront<'_> {
    fn receive(&mut self, into: &mut Vec<u8>, wait: bool) -> io::Result<Received> {
        let mut chunk = [0u8; 16 * 1024];
        loop {
            match recv(self.socket, &mut chunk, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Ok(Received::Gone),
                Ok((n, _)) => {
                    into.extend_from_slice(chunk.get(..n).unwrap_or_default());
                    return Ok(Received::Bytes);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if wait => self.wait(PollFlags::IN)?,
                Err(Errno::AGAIN) => return Ok(Received::Nothing),
                Err(Errno::CONNRESET) => return Ok(Received::Gone),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn gone(&mut self) -> io::Result<bool> {
        let mut socket = [PollFd::new(&self.socket, PollFlags::empty())];
        match poll(&mut socket, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            // A kick: its cause is looked at later.
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
            Ok(_) => Ok(socket[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)),
        }
    }

    fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match send(self.socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                // The guest stands still while the front is slow: that is an exec's backpressure. The front of a sandbox
                // that lives always receives, whatever its own readers do, since credit bounds what may come on each
                // channel: so it cannot wait for us here.
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
