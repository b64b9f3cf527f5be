//! What workers are forked by: the zygote of a template, or that of a checkpoint. The two are asked in the same way.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::{
    io::unix::AsyncFd,
    net::UnixStream,
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
};
use zeroboot_sys::control::{self, Control};

use crate::{
    cgroup::Cgroup,
    reaper::{kill, watch},
    template::Shared,
    worker::{UnreadyError, Worker},
};

/// Forks asked of a zygote that it has not answered. So few that neither side's socket can be full of them: else both
/// could wait for the other to read.
const MOST_PENDING: usize = 64;

/// Why there is no fork, or no zygote of a checkpoint. No code ran.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ForkError {
    #[error("the engine is shutting down")]
    ShuttingDown,
    #[error("the zygote ended")]
    ZygoteEnded,
    /// Why the zygote is down.
    #[error("{0}")]
    Down(String),
    #[error("cannot ask the zygote: {0}")]
    Ask(#[source] io::Error),
    /// The zygote's own words.
    #[error("{0}")]
    Refused(String),
    /// The answer came without what belongs to it.
    #[error("this process may have no more descriptors")]
    NoDescriptor,
    #[error("cannot take the worker over: {0}")]
    Adopt(#[source] io::Error),
    #[error(transparent)]
    Unready(#[from] UnreadyError),
    #[error("cannot speak with the zygote of the checkpoint: {0}")]
    Checkpoint(#[source] io::Error),
    #[error("the zygote of the checkpoint ended")]
    CheckpointEnded,
    #[error("the checkpoint was not taken in {} s", .0.as_secs())]
    CheckpointSilent(Duration),
}

/// Why a zygote is given up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ZygoteLost {
    #[error("the zygote spoke out of turn")]
    OutOfTurn,
    #[error("the zygote ended")]
    Ended,
    #[error("the zygote's control channel failed: {0}")]
    Channel(#[source] io::Error),
    #[error("the zygote has not answered for {} s", .0.as_secs())]
    Silent(Duration),
}

type Answer<T> = oneshot::Sender<Result<T, ForkError>>;

/// What a zygote is asked for.
#[derive(Debug)]
pub(crate) enum Request {
    Fork(Answer<Worker>),
    /// A zygote of a checkpoint, with the other end of its control channel and what it is to take in. The answer is its
    /// pidfd.
    Checkpoint(OwnedFd, Arc<OwnedFd>, Answer<OwnedFd>),
}

impl Request {
    /// The caller may have given up.
    pub(crate) fn refuse(self, reason: ForkError) {
        match self {
            Request::Fork(answer) => drop(answer.send(Err(reason))),
            Request::Checkpoint(.., answer) => drop(answer.send(Err(reason))),
        }
    }
}

/// Asks a zygote. It lives as long as somebody has this.
#[derive(Debug)]
pub(crate) struct Forker {
    requests: mpsc::Sender<Request>,
    shared: Arc<Shared>,
    /// Of a checkpoint: what made its zygote, which ends with it, and the memory that it holds.
    above: Option<(Arc<Forker>, OwnedSemaphorePermit)>,
}

impl Forker {
    /// Of a template's zygote; the queue is for [`serve`].
    pub(crate) fn new(shared: Arc<Shared>) -> (Forker, mpsc::Receiver<Request>) {
        let (requests, queue) = mpsc::channel(256);
        (Forker { requests, shared, above: None }, queue)
    }

    /// A fresh sandbox that is ready for its request, and what its runner says of itself.
    pub(crate) async fn fork(&self) -> Result<(Worker, Vec<u8>), ForkError> {
        let (answer, worker) = oneshot::channel();
        self.ask(Request::Fork(answer)).await?;
        let mut worker = worker.await.map_err(|_| ForkError::ZygoteEnded)??;
        let info = worker.ready(self.shared.warm_timeout).await?;
        Ok((worker, info))
    }

    /// A zygote of the checkpoint that lies in `delta`, which is empty again afterwards. `memory` is for as much as a
    /// checkpoint can have; what is not needed of it is given back.
    pub(crate) async fn checkpoint(
        self: &Arc<Self>,
        delta: Arc<OwnedFd>,
        mut memory: OwnedSemaphorePermit,
    ) -> Result<(Arc<Forker>, u64), ForkError> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|error| ForkError::Checkpoint(error.into()))?;
        rustix::io::ioctl_fionbio(&ours, true).map_err(|error| ForkError::Checkpoint(error.into()))?;
        let control = watch(ours).map_err(ForkError::Checkpoint)?;
        let (answer, pidfd) = oneshot::channel();
        self.ask(Request::Checkpoint(theirs, delta, answer)).await?;
        let pidfd = KillOnDrop(pidfd.await.map_err(|_| ForkError::ZygoteEnded)??);
        let timeout = self.shared.warm_timeout;
        let taken = match tokio::time::timeout(timeout, next_message(&control)).await {
            Ok(Ok(Some((Control::Taken { bytes }, _)))) => bytes,
            Ok(Ok(Some((Control::ForkFailed { text, .. }, _)))) => return Err(ForkError::Refused(text)),
            Ok(Ok(_)) => return Err(ForkError::CheckpointEnded),
            Ok(Err(error)) => return Err(ForkError::Checkpoint(error)),
            Err(_) => return Err(ForkError::CheckpointSilent(timeout)),
        };
        let needed = usize::try_from(taken.div_ceil(1024 * 1024)).unwrap_or(usize::MAX);
        drop(memory.split(memory.num_permits().saturating_sub(needed)));
        let (requests, queue) = mpsc::channel(256);
        tokio::spawn(keep(Arc::clone(&self.shared), control, pidfd, queue));
        let above = Some((Arc::clone(self), memory));
        Ok((Arc::new(Forker { requests, shared: Arc::clone(&self.shared), above }), taken))
    }

    /// How many checkpoints lie between this and its template.
    pub(crate) fn depth(&self) -> usize {
        self.above.as_ref().map_or(0, |(above, _)| above.depth() + 1)
    }

    async fn ask(&self, request: Request) -> Result<(), ForkError> {
        self.requests.send(request).await.map_err(|_| ForkError::ShuttingDown)
    }
}

/// Serves the zygote of a checkpoint until nobody asks any more; then it ends.
async fn keep(shared: Arc<Shared>, control: AsyncFd<OwnedFd>, pidfd: KillOnDrop, mut queue: mpsc::Receiver<Request>) {
    let Err(lost) = serve(&shared, &control, &mut queue).await else { return };
    let reason = lost.to_string();
    tracing::warn!(reason, "the zygote of a checkpoint is down");
    // Its sandboxes end with it.
    drop((control, pidfd));
    while let Some(request) = queue.recv().await {
        request.refuse(ForkError::Down(reason.clone()));
    }
}

/// The zygote of a checkpoint is no child of ours: its parent has it waited for.
#[derive(Debug)]
struct KillOnDrop(OwnedFd);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        kill(&self.0);
    }
}

enum Pending {
    Fork { answer: Answer<Worker>, socket: OwnedFd, cgroup: Option<Cgroup> },
    Checkpoint(Answer<OwnedFd>),
}

impl Pending {
    /// The caller may have given up: its worker is dropped, and so killed.
    fn made(self, shared: &Shared, fds: Vec<OwnedFd>) {
        let mut fds = fds.into_iter();
        match (self, fds.next(), fds.next()) {
            (Pending::Fork { answer, socket, cgroup }, Some(pidfd), delta) => {
                let worker =
                    adopt(socket).map(|socket| Worker::new(socket, pidfd, cgroup, Arc::clone(&shared.reaper), delta));
                drop(answer.send(worker.map_err(ForkError::Adopt)));
            }
            (Pending::Checkpoint(answer), Some(pidfd), _) => drop(answer.send(Ok(pidfd))),
            // Without its socket a worker ends.
            (pending, None, _) => pending.failed(ForkError::NoDescriptor),
        }
    }

    fn failed(self, reason: ForkError) {
        match self {
            Pending::Fork { answer, .. } => drop(answer.send(Err(reason))),
            Pending::Checkpoint(answer) => drop(answer.send(Err(reason))),
        }
    }
}

/// Passes requests to one zygote until it dies (`Err`) or nobody asks any more (`Ok`).
pub(crate) async fn serve(
    shared: &Shared,
    zygote: &AsyncFd<OwnedFd>,
    queue: &mut mpsc::Receiver<Request>,
) -> Result<(), ZygoteLost> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut pending: HashMap<u64, Pending> = HashMap::new();
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            request = queue.recv(), if pending.len() < MOST_PENDING => {
                let Some(request) = request else { return Ok(()) };
                if pending.is_empty() {
                    heard = Instant::now();
                }
                let id = NEXT.fetch_add(1, Ordering::Relaxed);
                if let Some(asked) = ask(shared, zygote, id, request).await {
                    pending.insert(id, asked);
                }
            }
            message = next_message(zygote) => {
                heard = Instant::now();
                match message {
                    Ok(Some((Control::Forked { id }, fds))) => {
                        if let Some(asked) = pending.remove(&id) {
                            asked.made(shared, fds);
                        }
                    }
                    Ok(Some((Control::ForkFailed { id, text }, _))) => {
                        if let Some(asked) = pending.remove(&id) {
                            asked.failed(ForkError::Refused(text));
                        }
                    }
                    Ok(Some((Control::Image { text }, _))) => tracing::info!(image = text, "the template's memory is shared"),
                    Ok(Some(_)) => return Err(ZygoteLost::OutOfTurn),
                    Ok(None) => return Err(ZygoteLost::Ended),
                    Err(error) => return Err(ZygoteLost::Channel(error)),
                }
            }
            // A fork takes far less than warming up.
            () = tokio::time::sleep_until((heard + shared.warm_timeout).into()), if !pending.is_empty() => {
                return Err(ZygoteLost::Silent(shared.warm_timeout));
            }
        }
    }
}

async fn next_message(zygote: &AsyncFd<OwnedFd>) -> io::Result<Option<(Control, Vec<OwnedFd>)>> {
    loop {
        let mut guard = zygote.readable().await?;
        if let Ok(message) = guard.try_io(|fd| control::receive(fd.get_ref())) {
            return message;
        }
    }
}

/// Sends one request; gives what waits for its answer. `None`: it could not be sent, and was refused.
async fn ask(shared: &Shared, zygote: &AsyncFd<OwnedFd>, id: u64, request: Request) -> Option<Pending> {
    match request {
        Request::Fork(answer) => match ask_fork(shared, zygote, id).await {
            Ok((socket, cgroup)) => Some(Pending::Fork { answer, socket, cgroup }),
            Err(error) => {
                drop(answer.send(Err(ForkError::Ask(error))));
                None
            }
        },
        Request::Checkpoint(its_control, delta, answer) => {
            match send(zygote, &Control::Checkpoint { id }, &[its_control.as_fd(), delta.as_fd()]).await {
                Ok(()) => Some(Pending::Checkpoint(answer)),
                Err(error) => {
                    drop(answer.send(Err(ForkError::Ask(error))));
                    None
                }
            }
        }
    }
}

/// Sends one fork request; gives our end of the worker's socket and its cgroup.
async fn ask_fork(shared: &Shared, zygote: &AsyncFd<OwnedFd>, id: u64) -> io::Result<(OwnedFd, Option<Cgroup>)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let (cgroup, procs) = match &shared.cgroups {
        Some(cgroups) => cgroups.make(id).map(|(group, procs)| (Some(group), Some(procs)))?,
        None => (None, None),
    };
    let mut fds = vec![theirs.as_fd()];
    fds.extend(procs.as_ref().map(AsFd::as_fd));
    send(zygote, &Control::Fork { id }, &fds).await?;
    Ok((ours, cgroup))
}

async fn send(zygote: &AsyncFd<OwnedFd>, message: &Control, fds: &[std::os::fd::BorrowedFd<'_>]) -> io::Result<()> {
    loop {
        let mut guard = zygote.writable().await?;
        if let Ok(sent) = guard.try_io(|fd| control::send(fd.get_ref(), message, fds)) {
            return sent;
        }
    }
}

fn adopt(socket: OwnedFd) -> io::Result<UnixStream> {
    let socket = std::os::unix::net::UnixStream::from(socket);
    socket.set_nonblocking(true)?;
    UnixStream::from_std(socket)
}
