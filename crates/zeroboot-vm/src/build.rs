//! From a kernel and an initramfs to a snapshot: boot to the ready point, freeze there.

use std::{
    io,
    path::PathBuf,
    time::{Duration, Instant},
};

use zeroboot_proto::mailbox::Ring;
use zeroboot_sys::{
    kick::Kick,
    kvm::KvmError,
    memory::{BootMemory, MiB},
};

use crate::{
    Console, Exits, ForkError, FreezeError, Host, LoadError, Machine, NoWakeLine, Session, SessionEnd, SessionError,
    Snapshot, Stop, WorkingSet, boot, one_request::OneRequest, wake::BootDevices,
};

/// Bytes of console text that a failed build keeps.
const CONSOLE: usize = 16 * 1024;

/// What to boot.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// An uncompressed ELF kernel (`vmlinux`).
    pub kernel: PathBuf,
    /// The initramfs, whose `/init` is the agent.
    pub initramfs: PathBuf,
    /// Memory of the guest, and of every fork.
    pub memory: MiB,
    /// Kernel parameters beside ours.
    pub parameters: String,
    /// How long it may take to the ready point.
    pub timeout: Duration,
}

/// How far a build is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Kernel and initramfs are placed; the guest begins.
    Booting,
    /// It rang: the runtime is warm.
    Ready {
        /// Since `Booting`.
        after: Duration,
        /// Exits to user space on the way.
        exits: u64,
    },
    /// The state is saved and the memory sealed.
    Frozen,
}

/// Why a template could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// Kernel or initramfs cannot be placed.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// KVM failed.
    #[error("cannot make the virtual machine")]
    Kvm(#[from] KvmError),
    /// Memory or a timer could not be had.
    #[error("cannot get memory and a timer for the guest")]
    Host(#[source] io::Error),
    /// The guest ended or did something else than ring.
    #[error("the guest {what} instead of becoming ready{}", console_text(.console))]
    NotReady {
        /// What it did.
        what: String,
        /// The end of what it wrote to its console.
        console: String,
    },
    /// It became ready, but its forks could not be woken.
    #[error("the guest became ready and could not be woken in a fork")]
    NoWakeLine(#[from] NoWakeLine),
    /// It became ready but could not be frozen.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
}

fn console_text(console: &str) -> String {
    if console.trim().is_empty() { String::new() } else { format!("; its console's end:\n{}", console.trim_end()) }
}

/// Boots a guest to its ready point and freezes it there.
pub fn build(host: &Host, options: &BuildOptions, mut progress: impl FnMut(Progress)) -> Result<Snapshot, BuildError> {
    let read = |path: &PathBuf| std::fs::read(path).map_err(|source| LoadError::Read { path: path.clone(), source });
    let (kernel, initramfs) = (read(&options.kernel)?, read(&options.initramfs)?);
    let memory = BootMemory::new(options.memory).map_err(BuildError::Host)?;
    let mut machine = Machine::new(host, memory.map().map_err(BuildError::Host)?)?;
    let mut seed = [0; 32];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| BuildError::Host(e.into()))?;
    machine.boot_devices = Some(BootDevices::new());
    boot::load(&machine, &kernel, &initramfs, &options.parameters, seed)?;
    drop((kernel, initramfs));

    progress(Progress::Booting);
    let start = Instant::now();
    let kick = Kick::new().map_err(BuildError::Host)?;
    kick.after(options.timeout).map_err(BuildError::Host)?;
    let mut console = Console::new(CONSOLE);
    let mut exits = Exits::default();
    let argument = loop {
        let what = match machine.run(&mut console, &mut exits)? {
            Stop::Ring(Ring::Ready, argument) => break argument,
            Stop::Kicked if start.elapsed() < options.timeout => continue,
            Stop::Kicked => format!("ran for {} s", options.timeout.as_secs()),
            Stop::Shutdown => "shut down".to_owned(),
            Stop::Ring(ring, _) => format!("rang {ring:?}"),
            Stop::Broken { reason, detail } => format!("broke (KVM exit reason {reason}, {detail:#x})"),
        };
        return Err(BuildError::NotReady { what, console: console.text() });
    };
    kick.disarm().map_err(BuildError::Host)?;
    progress(Progress::Ready { after: start.elapsed(), exits: exits.total() });
    // From here on there is no device.
    let wake = machine.boot_devices.take().map_or(Err(NoWakeLine::Masked), |devices| devices.vector())?;
    let snapshot = Snapshot::freeze(host, machine, memory, argument, wake)?;
    progress(Progress::Frozen);
    Ok(snapshot)
}

/// Why the working set could not be recorded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RehearseError {
    /// The fork failed.
    #[error(transparent)]
    Fork(#[from] ForkError),
    /// The exec failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The timer or the page map could not be had.
    #[error("cannot observe the fork")]
    Observe(#[source] io::Error),
    /// The exec or the cell did not end as it should: the template is no good.
    #[error("the first exec or cell in a fork did not end well ({end:?}); it said: {said}")]
    Ended {
        /// How it ended.
        end: SessionEnd,
        /// Its output, shortened.
        said: String,
    },
}

impl Snapshot {
    /// Runs one exec in a fork, whose frames are `request`, and adds the pages that it touches to the working set. It must
    /// end with status 0. What a template gives as its first answer is thereby known before it is stored.
    pub fn rehearse(&mut self, host: &Host, request: &[u8]) -> Result<(), RehearseError> {
        let kick = Kick::new().map_err(RehearseError::Observe)?;
        let front = OneRequest::new(request);
        self.rehearse_with(host, &kick, front, |end, _| end == SessionEnd::Done(zeroboot_proto::Ending::Exited(0)))
    }

    /// The same with a sandbox that lives and the one cell that `request` has for it, which must end well within `timeout`.
    pub fn rehearse_cell(&mut self, host: &Host, request: &[u8], timeout: Duration) -> Result<(), RehearseError> {
        let kick = Kick::new().map_err(RehearseError::Observe)?;
        let front = OneRequest::leaving(request, &kick, timeout);
        self.rehearse_with(host, &kick, front, |end, front| end == SessionEnd::FrontGone && front.cell_was_good())
    }

    fn rehearse_with(
        &mut self,
        host: &Host,
        kick: &Kick,
        mut front: OneRequest<'_>,
        good: impl FnOnce(SessionEnd, &OneRequest<'_>) -> bool,
    ) -> Result<(), RehearseError> {
        let mut fork = self.fork(host)?;
        let (end, _stats) = Session::new(self, &mut fork, &mut front, kick).run()?;
        if !good(end, &front) {
            let mut said = String::from_utf8_lossy(&[front.complaints, front.stdout].concat()).into_owned();
            said.retain(|c| !c.is_control() || c == '\n');
            said.truncate(said.floor_char_boundary(2000));
            return Err(RehearseError::Ended { end, said });
        }
        let resident = fork.machine.memory.resident().map_err(RehearseError::Observe)?;
        self.body.working_set.add(&WorkingSet { written: resident.private, read: resident.shared });
        Ok(())
    }
}
