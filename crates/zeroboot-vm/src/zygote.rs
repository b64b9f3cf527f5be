//! The zygote: a process that holds one template and forks a worker for each `Fork` message, and for each `Checkpoint` a
//! zygote of that checkpoint: the same again, over other memory and with another state. (docs/adr/0019)

use std::{
    error::Error,
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::process::{PidfdFlags, getpid, pidfd_open};
use zeroboot_proto::{Kind, encode};
use zeroboot_sys::{
    control::{self, Control},
    delta::Delta,
    jail::{Filter, JailError},
    kvm::{KvmError, Vm},
    memory::Mapping,
    process::{self, Forked, WORKER_NAMESPACES},
};

use crate::{Checkpoint, Host, LoadSnapshotError, Prefault, Snapshot, WorkerError, jail, jail::VmJailError, worker};

/// Why a zygote did not come up, or ended before its front.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ZygoteError {
    /// No usable KVM.
    #[error("cannot use /dev/kvm")]
    Kvm(#[from] KvmError),
    /// The template was refused.
    #[error(transparent)]
    Template(#[from] LoadSnapshotError),
    /// The zygote's own jail.
    #[error(transparent)]
    Jail(#[from] VmJailError),
    /// The worker's policy does not compile.
    #[error(transparent)]
    Policy(#[from] JailError),
    /// The process has threads; it could not be forked soundly.
    #[error("the zygote has {0} threads; only a single-threaded process can be forked")]
    Threads(usize),
    /// The control channel or the report broke.
    #[error("cannot {0}")]
    Channel(&'static str, #[source] io::Error),
}

impl ZygoteError {
    /// The whole chain in one line, with what to do.
    fn text(&self) -> String {
        let mut text = chain(self);
        if let ZygoteError::Template(error) = self {
            text.push_str("; ");
            text.push_str(error.mend());
        }
        text
    }
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// Loads the template, tells `report`, and serves `control` until the front is gone.
///
/// The two are the descriptors that `zeroboot_sys::process::as_zygote` placed; every higher one is closed.
pub fn zygote(template: &Path, prefault: Prefault, report: OwnedFd, control: OwnedFd) -> Result<(), ZygoteError> {
    // Whatever the front or its parent left open would reach every worker.
    let first = control::CONTROL_FD.max(control::REPORT_FD).unsigned_abs() + 1;
    process::close_from(first).map_err(|e| ZygoteError::Channel("close inherited descriptors", e))?;
    let zygote = match Zygote::start(template, prefault) {
        Ok(zygote) => zygote,
        Err(error) => {
            tell(&report, Kind::Failure, error.text().as_bytes())?;
            return Err(error);
        }
    };
    tell(&report, Kind::Ready, zygote.snapshot.about())?;
    drop(report);
    zygote.serve(control)
}

fn tell(report: &OwnedFd, kind: Kind, payload: &[u8]) -> Result<(), ZygoteError> {
    let mut frame = Vec::new();
    encode(&mut frame, kind, payload.get(..payload.len().min(zeroboot_proto::MAX_PAYLOAD)).unwrap_or_default());
    let failed = |error| ZygoteError::Channel("report to the front", error);
    match rustix::io::retry_on_intr(|| rustix::io::write(report, &frame)) {
        Ok(n) if n == frame.len() => Ok(()),
        Ok(_) => Err(failed(io::ErrorKind::WriteZero.into())),
        Err(error) => Err(failed(error.into())),
    }
}

/// The filter of a worker while it restores a checkpoint.
type Restoring = Filter;

/// Everything that a worker inherits.
struct Zygote {
    host: Host,
    snapshot: Snapshot,
    filter: Filter,
    prefault: Prefault,
    /// Whether this host gives workers their own namespaces.
    separated: bool,
    /// A zygote of a checkpoint has none: it is as soon to go as a worker, and so are the workers that it makes.
    oom: Option<OomScore>,
    /// What its workers go on from; none in a template's zygote.
    checkpoint: Option<(Checkpoint, Restoring)>,
    /// This process, for a worker to see whether it has ended.
    own: OwnedFd,
    /// One idle VM is kept: with none alive anywhere KVM switches virtualisation off on every CPU and on
    /// again for the next, which doubles the cost of KVM_CREATE_VM.
    idle: Vm,
}

impl Zygote {
    fn start(template: &Path, prefault: Prefault) -> Result<Zygote, ZygoteError> {
        let filter = Filter::parse(jail::POLICY)?;
        let host = Host::open()?;
        let snapshot = Snapshot::load(&host, template)?;
        let idle = host.kvm().create_vm()?;
        let threads = std::fs::read_dir("/proc/self/task")
            .map_err(|error| ZygoteError::Channel("list the zygote's threads", error))?
            .count();
        if threads != 1 {
            return Err(ZygoteError::Threads(threads));
        }
        let failed = |what| move |error| ZygoteError::Channel(what, error);
        let own = pidfd_open(getpid(), PidfdFlags::empty()).map_err(|e| failed("open its own pidfd")(e.into()))?;
        let oom = OomScore::open().map_err(failed("open its own oom_score_adj"))?;
        jail::strip_zygote()?;
        process::ignore_children();
        let separated = jail::own_namespaces().is_ok();
        let oom = Some(oom);
        Ok(Zygote { host, snapshot, filter, prefault, separated, oom, checkpoint: None, own, idle })
    }

    fn fork(&self) -> io::Result<Forked<OwnedFd>> {
        if self.separated {
            return process::clone_into(WORKER_NAMESPACES).map(|forked| match forked {
                Forked::Child => Forked::Child,
                Forked::Parent((_, pidfd)) => Forked::Parent(pidfd),
            });
        }
        // A container's filter that refuses namespaces may refuse clone3 as a whole.
        Ok(match process::fork()? {
            Forked::Child => Forked::Child,
            Forked::Parent(pid) => Forked::Parent(pidfd_open(pid, PidfdFlags::empty())?),
        })
    }

    /// Does `fork` while children are made the first to go when the host runs out of memory.
    fn first_to_go<T>(&self, fork: impl FnOnce() -> io::Result<Forked<T>>) -> io::Result<Forked<T>> {
        let Some(oom) = &self.oom else { return fork() };
        match oom.first_to_go().and_then(|()| fork()) {
            Ok(Forked::Child) => Ok(Forked::Child),
            forked => oom.as_before().and(forked),
        }
    }

    fn serve(self, control: OwnedFd) -> Result<(), ZygoteError> {
        let broken = |error| ZygoteError::Channel("speak on the control channel", error);
        loop {
            let Some((message, fds)) = control::receive(&control).map_err(broken)? else {
                return Ok(());
            };
            let mut fds = fds.into_iter();
            match (message, fds.next(), fds.next()) {
                (Control::Fork { id }, Some(socket), cgroup) => {
                    let delta = Delta::new(self.snapshot.image().len());
                    let forked = delta.and_then(|delta| Ok((self.first_to_go(|| self.fork())?, delta)));
                    match forked {
                        Ok((Forked::Child, delta)) => {
                            drop(control);
                            self.become_worker(socket, cgroup, delta);
                        }
                        Ok((Forked::Parent(pidfd), delta)) => {
                            let fds = [pidfd.as_fd(), delta.as_fd()];
                            control::send(&control, &Control::Forked { id }, &fds).map_err(broken)?;
                        }
                        Err(error) => failed(&control, id, error.to_string()).map_err(broken)?,
                    }
                }
                (Control::Checkpoint { id }, Some(its_control), Some(delta)) => match self.first_to_go(process::fork) {
                    Ok(Forked::Child) => {
                        drop(control);
                        self.become_zygote(its_control, delta);
                    }
                    Ok(Forked::Parent(pid)) => match pidfd_open(pid, PidfdFlags::empty()) {
                        Ok(pidfd) => control::send(&control, &Control::Forked { id }, &[pidfd.as_fd()]),
                        Err(error) => failed(&control, id, error.to_string()),
                    }
                    .map_err(broken)?,
                    Err(error) => failed(&control, id, error.to_string()).map_err(broken)?,
                },
                (Control::Fork { id } | Control::Checkpoint { id }, ..) => {
                    failed(&control, id, "its message came without its descriptors".into()).map_err(broken)?;
                }
                _ => {}
            }
        }
    }

    fn become_worker(self, socket: OwnedFd, cgroup: Option<OwnedFd>, delta: Delta) -> ! {
        let Zygote { host, snapshot, filter, prefault, separated: _, oom, checkpoint, own, idle } = self;
        drop((oom, idle));
        let started = (|| -> io::Result<()> {
            jail::enter(own.as_fd())?;
            drop(own);
            if let Some(cgroup) = cgroup {
                // 0: the writer itself.
                rustix::io::write(&cgroup, b"0")?;
            }
            Ok(())
        })();
        let end = started.map_err(|error| error.to_string()).and_then(|()| {
            let told = |error: WorkerError| chain(&error);
            match checkpoint {
                None => worker::worker(host, &snapshot, socket.as_fd(), prefault, &filter, delta).map_err(told),
                Some((checkpoint, restoring)) => {
                    let filters = (&restoring, &filter);
                    worker::worker_of_checkpoint(host, &snapshot, checkpoint, socket.as_fd(), filters, delta)
                        .map_err(told)
                }
            }
        });
        let failure = match end {
            Ok(_end) => process::exit_now(0),
            Err(failure) => failure,
        };
        let mut frame = Vec::new();
        encode(&mut frame, Kind::Failure, failure.as_bytes());
        // If the front is gone nobody needs the reason.
        let _gone = rustix::net::send(&socket, &frame, rustix::net::SendFlags::NOSIGNAL);
        process::exit_now(1)
    }

    /// Takes the delta in, says so, and serves forks that go on from there, until its own front is gone.
    fn become_zygote(self, control: OwnedFd, delta: OwnedFd) -> ! {
        let made = (|| -> io::Result<(Zygote, u64)> {
            process::die_with_parent()?;
            if process::has_ended(self.own.as_fd())? {
                return Err(io::Error::other("the zygote of its template is gone"));
            }
            let Zygote { host, snapshot, filter, prefault, separated, oom, checkpoint, own, idle } = self;
            // Those of the zygote of the template: else each worker would have them.
            drop((oom, own));
            let (base, restoring) = match checkpoint {
                Some((checkpoint, restoring)) => (checkpoint.into_view(), restoring),
                None => {
                    (Mapping::fork(snapshot.image())?, Filter::parse(jail::RESTORE_POLICY).map_err(io::Error::other)?)
                }
            };
            let delta = Delta::from_fd(delta, base.len())?;
            let (checkpoint, bytes) = Checkpoint::take(base, &delta)?;
            // The memory is charged to the sandbox that filled it, which goes on.
            delta.empty()?;
            let own = pidfd_open(getpid(), PidfdFlags::empty())?;
            let checkpoint = Some((checkpoint, restoring));
            Ok((Zygote { host, snapshot, filter, prefault, separated, oom: None, checkpoint, own, idle }, bytes))
        })();
        let served = match made {
            Ok((zygote, bytes)) => {
                control::send(&control, &Control::Taken { bytes }, &[]).is_ok() && zygote.serve(control).is_ok()
            }
            Err(error) => {
                // If its front is gone nobody needs the reason.
                let _gone = failed(&control, 0, error.to_string());
                false
            }
        };
        process::exit_now(i32::from(!served))
    }
}

fn failed(control: &OwnedFd, id: u64, text: String) -> io::Result<()> {
    control::send(control, &Control::ForkFailed { id, text }, &[])
}

/// Workers go first when the host runs out of memory: before the server and the zygote. A worker cannot ask for that
/// itself, since the files in `/proc` of a process that may not be traced are root's. So it inherits it: the zygote has
/// that score itself while it makes one. (Of equal scores the kernel takes the largest, and a worker has more memory.)
struct OomScore {
    file: File,
    before: String,
}

impl OomScore {
    fn open() -> io::Result<OomScore> {
        let path = "/proc/self/oom_score_adj";
        Ok(OomScore { before: std::fs::read_to_string(path)?, file: File::options().write(true).open(path)? })
    }

    fn first_to_go(&self) -> io::Result<()> {
        (&self.file).write_all(b"1000")
    }

    fn as_before(&self) -> io::Result<()> {
        (&self.file).write_all(self.before.as_bytes())
    }
}
