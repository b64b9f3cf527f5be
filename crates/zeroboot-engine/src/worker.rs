//! One sandbox as the front sees it: a socket and a pidfd.

use std::{
    io,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{io::AsyncReadExt, net::UnixStream, sync::OwnedSemaphorePermit};
use zeroboot_proto::{Decoder, FrameError, Message};

use crate::{
    cgroup::Cgroup,
    reaper::{Reaper, Remains, Watched, kill},
};

/// A live sandbox. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) socket: UnixStream,
    pub(crate) decoder: Decoder,
    /// Where a VM's worker puts a checkpoint.
    pub(crate) delta: Option<Arc<OwnedFd>>,
    leash: Leash,
}

/// A worker's process, and what it is charged for. Dropping it kills the process.
#[derive(Debug)]
struct Leash {
    pidfd: Arc<OwnedFd>,
    cgroup: Option<Cgroup>,
    /// Given back when the process is gone.
    permits: Vec<OwnedSemaphorePermit>,
    reaper: Arc<Reaper>,
    ended: Option<UnixStream>,
}

/// Why a worker did not become ready.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnreadyError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Its own words.
    #[error("{0}")]
    Failed(String),
    #[error("it sent something else than Ready")]
    OutOfTurn,
    #[error("not ready after {} s", .0.as_secs())]
    Timeout(Duration),
    #[error("it ended before it was ready")]
    Ended,
    #[error("its socket failed: {0}")]
    Socket(#[source] io::Error),
}

impl Worker {
    pub(crate) fn new(
        socket: UnixStream,
        pidfd: OwnedFd,
        cgroup: Option<Cgroup>,
        reaper: Arc<Reaper>,
        delta: Option<OwnedFd>,
    ) -> Worker {
        let leash = Leash { pidfd: Arc::new(pidfd), cgroup, permits: Vec::new(), reaper, ended: None };
        Worker { socket, decoder: Decoder::new(), delta: delta.map(Arc::new), leash }
    }

    /// Charges it for what it holds.
    pub(crate) fn charge(&mut self, permits: Vec<OwnedSemaphorePermit>) {
        self.leash.permits = permits;
    }

    /// Lets it go after its last frame: it is killed when the answer had time to go out.
    pub(crate) fn ended(self) {
        let Worker { socket, decoder: _, delta: _, mut leash } = self;
        leash.ended = Some(socket);
    }

    /// Waits for its `Ready` frame; gives the frame's payload, which the runner wrote.
    pub(crate) async fn ready(&mut self, timeout: Duration) -> Result<Vec<u8>, UnreadyError> {
        let deadline = Instant::now() + timeout;
        let mut chunk = [0; 4096];
        loop {
            match self.decoder.next_frame() {
                Err(error) => return Err(error.into()),
                Ok(Some((kind, payload))) => match Message::decode(kind, payload) {
                    Ok(Message::Ready) => return Ok(payload.to_vec()),
                    Ok(Message::Failure(text)) => return Err(UnreadyError::Failed(text.to_owned())),
                    _ => return Err(UnreadyError::OutOfTurn),
                },
                Ok(None) => {
                    let read = tokio::time::timeout_at(deadline.into(), self.socket.read(&mut chunk)).await;
                    match read {
                        Err(_) => return Err(UnreadyError::Timeout(timeout)),
                        Ok(Ok(n @ 1..)) => self.decoder.feed(chunk.get(..n).unwrap_or_default()),
                        Ok(Ok(0)) => return Err(UnreadyError::Ended),
                        Ok(Err(error)) => return Err(UnreadyError::Socket(error)),
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
        self.leash.cgroup.as_ref().map_or(Ok(()), |group| group.limit(limits))
    }

    /// Sets the memory that it may have, where there is a group.
    pub(crate) fn limit_memory(&self, bytes: u64) -> io::Result<()> {
        self.leash.cgroup.as_ref().map_or(Ok(()), |group| group.limit_memory(bytes))
    }

    /// Whether the kernel killed something in it for want of memory.
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        self.leash.cgroup.as_ref().is_some_and(Cgroup::ran_out_of_memory)
    }

    /// Kills it within a second after that time, whoever looks after it then; until the guard is dropped.
    pub(crate) fn kill_after(&self, when: Instant) -> Watched {
        Reaper::kill_after(&self.leash.reaper, when, &self.leash.pidfd)
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        if self.ended.is_none() {
            kill(&self.pidfd);
        }
        self.reaper.take(Remains {
            pidfd: Arc::clone(&self.pidfd),
            ended: self.ended.take(),
            cgroup: self.cgroup.take(),
            permits: std::mem::take(&mut self.permits),
            span: tracing::debug_span!("exec.reap"),
        });
    }
}
