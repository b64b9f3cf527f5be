//! Starting zygotes. The kernel kills a zygote when the *thread* that started it ends, so one thread that
//! lives as long as the engine starts them all.

use std::{
    io::{self, Read, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::Duration,
};

use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
    thread::CapabilitySet,
};
use tokio::{
    io::{AsyncReadExt, unix::AsyncFd},
    net::UnixStream,
    sync::oneshot,
};
use zeroboot_proto::{Decoder, FrameError, Message};

use crate::{ZygoteSpec, reaper::watch};

/// Most bytes of a zygote's standard error that are kept for an error text.
const STDERR_KEPT: usize = 4096;

type Job = (Command, oneshot::Sender<io::Result<Child>>);

/// The thread that starts zygotes. When it is dropped, they die.
#[derive(Debug)]
pub(crate) struct Spawner {
    jobs: Mutex<mpsc::Sender<Job>>,
    program: PathBuf,
}

/// The thread that [`leave_ids_to_zygotes`] started, until an engine takes it.
static STARTED: Mutex<Option<mpsc::Sender<Job>>> = Mutex::new(None);

/// Where an ordinary user was given the capabilities to hand out user ids: leaves them to the one thread that starts
/// zygotes and takes them from the calling thread, and so from all that it starts. Called while there is no other.
pub fn leave_ids_to_zygotes() -> io::Result<()> {
    let given = rustix::thread::capabilities(None)?.permitted;
    if rustix::process::geteuid().is_root() || given.is_empty() {
        return Ok(());
    }
    let jobs = start_thread()?;
    *STARTED.lock().unwrap_or_else(PoisonError::into_inner) = Some(jobs);
    zeroboot_sys::process::keep_capabilities(CapabilitySet::empty())
}

fn start_thread() -> io::Result<mpsc::Sender<Job>> {
    let (jobs, queue) = mpsc::channel::<Job>();
    std::thread::Builder::new().name("zygotes".into()).spawn(move || {
        for (mut command, answer) in queue {
            // Nobody waits any more: the child's handle is dropped, and its control channel with it.
            let _gone = answer.send(command.spawn());
        }
    })?;
    Ok(jobs)
}

impl Spawner {
    pub(crate) fn new(program: &Path) -> io::Result<Spawner> {
        let started = STARTED.lock().unwrap_or_else(PoisonError::into_inner).take();
        let jobs = started.map_or_else(start_thread, Ok)?;
        Ok(Spawner { jobs: Mutex::new(jobs), program: program.to_owned() })
    }

    /// Starts a zygote and waits until its template is warm.
    pub(crate) async fn start(&self, spec: &ZygoteSpec, warm_timeout: Duration) -> Result<Zygote, ZygoteError> {
        let pair = |kind| socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).map_err(io::Error::from);
        let (report, report_theirs) = pair(SocketType::STREAM).map_err(ZygoteError::Spawn)?;
        let (control, control_theirs) = pair(SocketType::SEQPACKET).map_err(ZygoteError::Spawn)?;
        let mut command = Command::new(&self.program);
        command.arg("__zygote").env_clear().stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        // The zygote's root plan asks where home and the cache are; nothing else of our environment goes on.
        let passed = |key: &std::ffi::OsStr| {
            key == "HOME" || key == "XDG_CACHE_HOME" || key == "ZEROBOOT_TCG_TR9" || key == IMAGE_AT_ONCE
        };
        command.envs(std::env::vars_os().filter(|(key, _)| passed(key)));
        zeroboot_sys::process::as_zygote(&mut command, report_theirs, control_theirs);
        let (answer, child) = oneshot::channel();
        let sent = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).send((command, answer));
        sent.map_err(|_| ZygoteError::Spawn(io::Error::other("the spawning thread ended")))?;
        let mut child =
            child.await.map_err(|e| ZygoteError::Spawn(io::Error::other(e)))?.map_err(ZygoteError::Spawn)?;

        if let Some(mut stdin) = child.stdin.take() {
            let json = serde_json::to_vec(spec).map_err(|e| ZygoteError::Spawn(e.into()))?;
            stdin.write_all(&json).map_err(ZygoteError::Spawn)?;
        }
        let stderr = Arc::new(Mutex::new(Vec::new()));
        if let Some(mut pipe) = child.stderr.take() {
            let kept = Arc::clone(&stderr);
            std::thread::Builder::new()
                .name("zygote-stderr".into())
                .spawn(move || {
                    let mut chunk = [0; 1024];
                    while let Ok(n @ 1..) = pipe.read(&mut chunk) {
                        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                        kept.extend_from_slice(chunk.get(..n).unwrap_or_default());
                        let over = kept.len().saturating_sub(STDERR_KEPT);
                        kept.drain(..over);
                    }
                })
                .map_err(ZygoteError::Spawn)?;
        }
        rustix::io::ioctl_fionbio(&control, true).map_err(|e| ZygoteError::Spawn(e.into()))?;
        let mut zygote =
            Zygote { control: watch(control).map_err(ZygoteError::Spawn)?, child: KillOnDrop(child), stderr };
        let report = std::os::unix::net::UnixStream::from(report);
        report.set_nonblocking(true).map_err(ZygoteError::Spawn)?;
        let mut report = UnixStream::from_std(report).map_err(ZygoteError::Spawn)?;
        match tokio::time::timeout(warm_timeout, read_report(&mut report)).await {
            Ok(Ok(())) => {
                if matches!(spec, ZygoteSpec::Process { .. }) && !zygote.gives_ids() {
                    tracing::warn!(
                        "sandboxes of this template share one user of the host: there are no ids for them, or none that can read \
                         the runtime's directories"
                    );
                }
                Ok(zygote)
            }
            Ok(Err(ZygoteError::Ended(_))) => Err(ZygoteError::Ended(zygote.last_words())),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(ZygoteError::Timeout(warm_timeout)),
        }
    }
}

/// Waits for the `Ready` frame.
async fn read_report(report: &mut UnixStream) -> Result<(), ZygoteError> {
    let mut decoder = Decoder::new();
    let mut chunk = [0; 1024];
    loop {
        match decoder.next_frame() {
            Ok(Some((kind, payload))) => match Message::decode(kind, payload) {
                Ok(Message::Ready) => return Ok(()),
                Ok(Message::Failure(text)) => return Err(ZygoteError::Failed(text.to_owned())),
                _ => return Err(ZygoteError::OutOfTurn),
            },
            Ok(None) => match report.read(&mut chunk).await {
                Ok(n @ 1..) => decoder.feed(chunk.get(..n).unwrap_or_default()),
                Ok(0) | Err(_) => return Err(ZygoteError::Ended(String::new())),
            },
            Err(error) => return Err(error.into()),
        }
    }
}

/// With this variable a process template's memory becomes an image before the first fork instead of the second, so that
/// tests of `zeroboot run` are tests of an image.
const IMAGE_AT_ONCE: &str = "ZEROBOOT_TEST_IMAGE";

/// Why a zygote could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ZygoteError {
    #[error("cannot start a zygote: {0}")]
    Spawn(#[source] io::Error),
    /// Its own words.
    #[error("{0}")]
    Failed(String),
    /// Its last words.
    #[error("{0}")]
    Ended(String),
    #[error("it sent something else than Ready")]
    OutOfTurn,
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("not warm after {} s", .0.as_secs())]
    Timeout(Duration),
}

/// A running zygote. Dropping it kills it, and with it the workers it made.
#[derive(Debug)]
pub(crate) struct Zygote {
    pub(crate) control: AsyncFd<OwnedFd>,
    child: KillOnDrop,
    stderr: Arc<Mutex<Vec<u8>>>,
}

#[derive(Debug)]
struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        // It may have ended by itself; the wait leaves no zombie. Killed, it is gone in no time.
        let _gone = self.0.kill();
        let _status = self.0.wait();
    }
}

impl Zygote {
    pub(crate) fn pid(&self) -> u32 {
        self.child.0.id()
    }

    /// Whether it kept the capabilities to give each sandbox a user of its own.
    fn gives_ids(&self) -> bool {
        const SETUID_AND_SETGID: u64 = 1 << 7 | 1 << 6;
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap_or_default();
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let effective = effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
        effective.is_some_and(|bits| bits & SETUID_AND_SETGID == SETUID_AND_SETGID)
    }

    /// What it wrote to its standard error before it ended, or how it ended.
    fn last_words(&mut self) -> String {
        // The thread that reads the pipe may still be at it.
        std::thread::sleep(Duration::from_millis(20));
        let kept = self.stderr.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&kept).trim().to_owned();
        if !text.is_empty() {
            return text;
        }
        match self.child.0.try_wait() {
            Ok(Some(status)) => format!("its zygote ended: {status}"),
            _ => "its zygote closed its report without a word".into(),
        }
    }
}
