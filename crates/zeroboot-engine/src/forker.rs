//! What workers are forked by: the zygote of a template, or that of a checkpoint. The two are asked in the same way.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
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
    worker::Worker,
};

/// Forks asked of a zygote that it has not answered. So few that neither side's socket can be full of them: else both
/// could wait for the other to read.
const MOST_PENDING: usize = 64;

/// What a zygote is asked for.
#[derive(Debug)]
pub(crate) enum Request {
    Fork(oneshot::Sender<Result<Worker, String>>),
    /// A zygote of a checkpoint, with the other end of its control channel and what it is to take in. The answer is its
    /// pidfd.
    Checkpoint(OwnedFd, Arc<OwnedFd>, oneshot::Sender<Result<OwnedFd, String>>),
}

impl Request {
    /// The caller may have given up.
    pub(crate) fn refuse(self, reason: &str) {
        match self {
            Request::Fork(answer) => drop(answer.send(Err(reason.to_owned()))),
            Request::Checkpoint(.., answer) => drop(answer.send(Err(reason.to_owned()))),
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
    pub(crate) async fn fork(&self) -> Result<(Worker, Vec<u8>), String> {
        let (answer, worker) = oneshot::channel();
        self.ask(Request::Fork(answer)).await?;
        let mut worker = worker.await.map_err(|_| "the zygote ended".to_owned())??;
        let info = worker.ready(self.shared.warm_timeout).await?;
        Ok((worker, info))
    }

    /// A zygote of the checkpoint that lies in `delta`, which is empty again afterwards. `memory` is for as much as a
    /// checkpoint can have; what is not needed of it is given back.
    pub(crate) async fn checkpoint(
        self: &Arc<Self>,
        delta: Arc<OwnedFd>,
        mut memory: OwnedSemaphorePermit,
    ) -> Result<(Arc<Forker>, u64), String> {
        let broken = |error: io::Error| format!("cannot speak with the zygote of the checkpoint: {error}");
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|error| broken(error.into()))?;
        rustix::io::ioctl_fionbio(&ours, true).map_err(|error| broken(error.into()))?;
        let control = watch(ours).map_err(broken)?;
        let (answer, pidfd) = oneshot::channel();
        self.ask(Request::Checkpoint(theirs, delta, answer)).await?;
        let pidfd = KillOnDrop(pidfd.await.map_err(|_| "the zygote ended".to_owned())??);
        let timeout = self.shared.warm_timeout;
        let taken = match tokio::time::timeout(timeout, next_message(&control)).await {
            Ok(Ok(Some((Control::Taken { bytes }, _)))) => bytes,
            Ok(Ok(Some((Control::ForkFailed { text, .. }, _)))) => return Err(text),
            Ok(Ok(_)) => return Err("the zygote of the checkpoint ended".into()),
            Ok(Err(error)) => return Err(broken(error)),
            Err(_) => return Err(format!("the checkpoint was not taken in {} s", timeout.as_secs())),
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

    async fn ask(&self, request: Request) -> Result<(), String> {
        self.requests.send(request).await.map_err(|_| "the engine is shutting down".to_owned())
    }
}

/// Serves the zygote of a checkpoint until nobody asks any more; then it ends.
async fn keep(shared: Arc<Shared>, control: AsyncFd<OwnedFd>, pidfd: KillOnDrop, mut queue: mpsc::Receiver<Request>) {
    let Err(reason) = serve(&shared, &control, &mut queue).await else { return };
    tracing::warn!(reason, "the zygote of a checkpoint is down");
    // Its sandboxes end with it.
    drop((control, pidfd));
    while let Some(request) = queue.recv().await {
        request.refuse(&reason);
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
    Fork { answer: oneshot::Sender<Result<Worker, String>>, socket: OwnedFd, cgroup: Option<Cgroup> },
    Checkpoint(oneshot::Sender<Result<OwnedFd, String>>),
}

impl Pending {
    /// The caller may have given up: its worker is dropped, and so killed.
    fn made(self, shared: &Shared, fds: Vec<OwnedFd>) {
        let mut fds = fds.into_iter();
        // Without its socket a worker ends.
        let lost = || "this process may have no more descriptors".to_owned();
        match (self, fds.next(), fds.next()) {
            (Pending::Fork { answer, socket, cgroup }, Some(pidfd), delta) => {
                let worker =
                    adopt(socket).map(|socket| Worker::new(socket, pidfd, cgroup, Arc::clone(&shared.reaper), delta));
                drop(answer.send(worker.map_err(|error| error.to_string())));
            }
            (Pending::Checkpoint(answer), Some(pidfd), _) => drop(answer.send(Ok(pidfd))),
            (pending, None, _) => pending.failed(lost()),
        }
    }

    fn failed(self, reason: String) {
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
) -> Result<(), String> {
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
                            asked.failed(text);
                        }
                    }
                    Ok(Some((Control::Image { text }, _))) => tracing::info!(image = text, "the template's memory is shared"),
                    Ok(Some(_)) => return Err("the zygote spoke out of turn".into()),
                    Ok(None) => return Err("the zygote ended".into()),
                    Err(error) => return Err(format!("the zygote's control channel failed: {error}")),
                }
            }
            // A fork takes far less than warming up.
            () = tokio::time::sleep_until((heard + shared.warm_timeout).into()), if !pending.is_empty() => {
                return Err(format!("the zygote has not answered for {} s", shared.warm_timeout.as_secs()));
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
                drop(answer.send(Err(format!("cannot ask the zygote for a fork: {error}"))));
                None
            }
        },
        Request::Checkpoint(its_control, delta, answer) => {
            match send(zygote, &Control::Checkpoint { id }, &[its_control.as_fd(), delta.as_fd()]).await {
                Ok(()) => Some(Pending::Checkpoint(answer)),
                Err(error) => {
                    drop(answer.send(Err(format!("cannot ask the zygote for one of a checkpoint: {error}"))));
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
