//! The ends of sandboxes: those that have ended or were given up are waited for and cleared away, those that overstay are
//! killed. All of it off the path of an answer.

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::process::{Signal, pidfd_send_signal};
use tokio::{
    io::unix::AsyncFd,
    net::UnixStream,
    sync::{OwnedSemaphorePermit, mpsc},
};
use tracing::Instrument as _;

use crate::cgroup::Cgroup;

/// How long a sandbox that has ended keeps its socket, and so stays as it is. Taking it apart costs more CPU time than most
/// runs: its answer goes out first. (The agent and a VM's worker wait for it, for up to a second.)
const LINGER: Duration = Duration::from_millis(1);
/// Interval between searches for sandboxes that should have ended.
const LOOK: Duration = Duration::from_secs(1);

/// Registers a descriptor with the reactor.
#[expect(deprecated, reason = "its replacement is unsafe; an owned descriptor never changes the one that it names")]
pub(crate) fn watch<T: std::os::fd::AsRawFd>(fd: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::new(fd)
}

/// Kills a process.
pub(crate) fn kill(pidfd: &OwnedFd) {
    // Gone already is what we want.
    let _gone = pidfd_send_signal(pidfd, Signal::KILL);
}

/// The parts of a worker that remain when it is dropped.
#[derive(Debug)]
pub(crate) struct Remains {
    pub(crate) pidfd: Arc<OwnedFd>,
    /// Of a worker whose exec came to its end; the others are killed already.
    pub(crate) ended: Option<UnixStream>,
    pub(crate) cgroup: Option<Cgroup>,
    pub(crate) permits: Vec<OwnedSemaphorePermit>,
    /// Made where the worker was dropped, so that it belongs to that exec.
    pub(crate) span: tracing::Span,
}

impl Remains {
    /// Waits for the process's end, then lets go of everything it was charged for.
    async fn clear(self) {
        if let Some(socket) = self.ended {
            tokio::time::sleep(LINGER).await;
            kill(&self.pidfd);
            drop(socket);
        }
        match watch(self.pidfd) {
            Ok(pidfd) => {
                if let Err(error) = pidfd.readable().await {
                    tracing::warn!(%error, "cannot wait for a worker");
                }
            }
            Err(error) => tracing::warn!(%error, "cannot wait for a worker"),
        }
        drop(self.permits);
        if let Some(cgroup) = self.cgroup {
            cgroup.remove().await;
        }
    }
}

/// Takes the remaining parts of workers, and knows the latest end of each.
#[derive(Debug)]
pub(crate) struct Reaper {
    remains: mpsc::UnboundedSender<Remains>,
    /// Remains that are not cleared away yet.
    uncleared: Arc<AtomicUsize>,
    /// A timer for each would wake another thread in the middle of an exec.
    latest: Mutex<HashMap<u64, (Instant, Arc<OwnedFd>)>>,
    next: AtomicU64,
}

impl Reaper {
    /// With the tasks that do its work until it is dropped.
    pub(crate) fn start() -> Arc<Reaper> {
        let (remains, mut queue) = mpsc::unbounded_channel::<Remains>();
        let uncleared = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&uncleared);
        tokio::spawn(async move {
            while let Some(remains) = queue.recv().await {
                let (span, count) = (remains.span.clone(), Arc::clone(&count));
                let clear = async move {
                    remains.clear().await;
                    count.fetch_sub(1, Ordering::Relaxed);
                };
                tokio::spawn(clear.instrument(span));
            }
        });
        let reaper = Arc::new(Reaper { remains, uncleared, latest: Mutex::default(), next: AtomicU64::new(0) });
        tokio::spawn(look_for_late_ones(Arc::downgrade(&reaper)));
        reaper
    }

    /// Whether nothing is left of any worker that was dropped.
    pub(crate) fn is_done(&self) -> bool {
        self.uncleared.load(Ordering::Relaxed) == 0
    }

    pub(crate) fn take(&self, remains: Remains) {
        self.uncleared.fetch_add(1, Ordering::Relaxed);
        // Its task ends with the runtime only; then everything goes at once.
        let _ended = self.remains.send(remains);
    }

    /// Kills a process once that time has passed, until the guard is dropped.
    pub(crate) fn kill_after(this: &Arc<Reaper>, when: Instant, pidfd: &Arc<OwnedFd>) -> Watched {
        let id = this.next.fetch_add(1, Ordering::Relaxed);
        this.latest().insert(id, (when, Arc::clone(pidfd)));
        Watched { reaper: Arc::clone(this), id }
    }

    fn latest(&self) -> MutexGuard<'_, HashMap<u64, (Instant, Arc<OwnedFd>)>> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn look_for_late_ones(reaper: Weak<Reaper>) {
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(reaper) = reaper.upgrade() else { return };
        let now = Instant::now();
        reaper.latest().values().filter(|(when, _)| *when <= now).for_each(|(_, pidfd)| kill(pidfd));
    }
}

/// A kill to come.
#[derive(Debug)]
pub(crate) struct Watched {
    reaper: Arc<Reaper>,
    id: u64,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.reaper.latest().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_that_overstays_is_killed_and_one_that_is_looked_after_is_not() {
        let reaper = Reaper::start();
        let sleeper = || std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pidfd = |child: &std::process::Child| {
            let pid = rustix::process::Pid::from_child(child);
            Arc::new(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap())
        };
        let (mut late, mut kept) = (sleeper(), sleeper());
        let _late = Reaper::kill_after(&reaper, Instant::now(), &pidfd(&late));
        drop(Reaper::kill_after(&reaper, Instant::now(), &pidfd(&kept)));
        assert_eq!(reaper.latest().len(), 1);
        let status = tokio::task::spawn_blocking(move || late.wait().unwrap()).await.unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
        assert!(kept.try_wait().unwrap().is_none());
        kept.kill().unwrap();
        kept.wait().unwrap();
    }
}
