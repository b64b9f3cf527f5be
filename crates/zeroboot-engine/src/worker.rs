//! One sandbox as the front sees it: a socket and a pidfd.

use std::{
    io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::process::{Signal, pidfd_send_signal};
use tokio::{
    io::{AsyncReadExt, unix::AsyncFd},
    net::UnixStream,
    sync::{OwnedSemaphorePermit, mpsc},
};
use tracing::Instrument as _;
use zeroboot_proto::{Decoder, Message};

use crate::cgroup::Cgroup;

/// Registers a descriptor with the reactor.
#[expect(deprecated, reason = "its replacement is unsafe; an OwnedFd never changes the descriptor it names")]
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}

/// What is left of a worker when it is dropped: waited for and cleared away off the response path.
#[derive(Debug)]
pub(crate) struct Remains {
    pidfd: OwnedFd,
    cgroup: Option<Cgroup>,
    permits: Vec<OwnedSemaphorePermit>,
    /// Made where the worker was dropped, so that it belongs to that exec.
    span: tracing::Span,
}

impl Remains {
    /// Waits for the process's end, then lets go of everything it was charged for.
    pub(crate) async fn clear(self) {
        let span = self.span.clone();
        self.wait_and_let_go().instrument(span).await;
    }

    async fn wait_and_let_go(self) {
        match watch(self.pidfd) {
            Ok(pidfd) => {
                if let Err(error) = pidfd.readable().await {
                    tracing::warn!(%error, "cannot wait for a worker");
                }
            }
            Err(error) => tracing::warn!(%error, "cannot wait for a worker"),
        }
        drop((self.cgroup, self.permits));
    }
}

/// A kill to come.
#[derive(Debug)]
pub(crate) struct KillTimer(tokio::task::JoinHandle<()>);

impl Drop for KillTimer {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A live sandbox. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) socket: UnixStream,
    pub(crate) decoder: Decoder,
    /// What this sandbox is charged for: given back when its process is gone.
    pub(crate) permits: Vec<OwnedSemaphorePermit>,
    pidfd: Option<OwnedFd>,
    cgroup: Option<Cgroup>,
    reaper: mpsc::UnboundedSender<Remains>,
}

impl Worker {
    pub(crate) fn new(
        socket: UnixStream,
        pidfd: OwnedFd,
        cgroup: Option<Cgroup>,
        reaper: mpsc::UnboundedSender<Remains>,
    ) -> Worker {
        Worker { socket, decoder: Decoder::new(), permits: Vec::new(), pidfd: Some(pidfd), cgroup, reaper }
    }

    /// Waits for its `Ready` frame; gives the frame's payload, which the runner wrote.
    pub(crate) async fn ready(&mut self, timeout: Duration) -> Result<Vec<u8>, String> {
        let deadline = Instant::now() + timeout;
        let mut chunk = [0; 4096];
        loop {
            match self.decoder.next_frame() {
                Err(error) => return Err(error.to_string()),
                Ok(Some((kind, payload))) => match Message::decode(kind, payload) {
                    Ok(Message::Ready) => return Ok(payload.to_vec()),
                    Ok(Message::Failure(text)) => return Err(text.to_owned()),
                    _ => return Err("it sent something else than Ready".into()),
                },
                Ok(None) => {
                    let read = tokio::time::timeout_at(deadline.into(), self.socket.read(&mut chunk)).await;
                    match read {
                        Err(_) => return Err(format!("not ready after {} s", timeout.as_secs())),
                        Ok(Ok(n @ 1..)) => self.decoder.feed(chunk.get(..n).unwrap_or_default()),
                        Ok(Ok(0)) => return Err("it ended before it was ready".into()),
                        Ok(Err(error)) => return Err(format!("its socket failed: {error}")),
                    }
                }
            }
        }
    }

    /// Whether a pooled worker still waits: its socket has nothing to say.
    pub(crate) fn is_waiting(&self) -> bool {
        let mut byte = [0; 1];
        matches!(self.socket.try_read(&mut byte), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Sets the request's limits on the group, where there is one.
    pub(crate) fn limit(&self, limits: &crate::Limits) -> io::Result<()> {
        self.cgroup.as_ref().map_or(Ok(()), |group| group.limit(limits))
    }

    /// Whether the kernel killed something in it for want of memory.
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        self.cgroup.as_ref().is_some_and(Cgroup::ran_out_of_memory)
    }

    /// Kills it at that time, whoever looks after it then; until the guard is dropped.
    pub(crate) fn kill_at(&self, when: Instant) -> io::Result<KillTimer> {
        let pidfd = self.pidfd.as_ref().map(OwnedFd::try_clone).transpose()?;
        Ok(KillTimer(tokio::spawn(async move {
            tokio::time::sleep_until(when.into()).await;
            if let Some(pidfd) = pidfd {
                // Gone already is what we want.
                let _gone = pidfd_send_signal(pidfd, Signal::KILL);
            }
        })))
    }

    /// Kills it now.
    pub(crate) fn kill(&self) {
        if let Some(pidfd) = &self.pidfd {
            // Gone already is what we want.
            let _gone = pidfd_send_signal(pidfd, Signal::KILL);
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
        if let Some(pidfd) = self.pidfd.take() {
            let remains = Remains {
                pidfd,
                cgroup: self.cgroup.take(),
                permits: std::mem::take(&mut self.permits),
                span: tracing::info_span!("exec.reap"),
            };
            // The reaper ends with the engine only; then everything goes at once.
            let _ended = self.reaper.send(remains);
        }
    }
}
