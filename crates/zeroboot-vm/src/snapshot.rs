//! A frozen machine: how it is made and forked. Its files: `file`.

use std::io;

use serde::{Deserialize, Serialize};
use zeroboot_sys::{
    delta::{Delta, DeltaMapping},
    kvm::{CpuidEntry, CpuidTable, KvmError},
    memory::{BootMemory, GuestPhys, Mapping, MemoryImage, PAGE},
};

use crate::{Host, HostFacts, Machine, Mailbox, MailboxError, SaveStateError, StateTables, VmState, WakeVector};

mod file;
mod working_set;

pub use file::{FORMAT_VERSION, LoadSnapshotError, MEMORY_FILE, STATE_FILE, SaveError, SnapshotFacts, fuzz_decode};
pub use working_set::WorkingSet;

/// A frozen machine, ready to be forked.
#[derive(Debug)]
pub struct Snapshot {
    pub(crate) image: MemoryImage,
    pub(crate) body: Body,
    pub(crate) tables: StateTables,
    /// The guest's CPU as it was when the template booted: a fork on another core of a hybrid CPU still has it.
    pub(crate) cpuid: CpuidTable,
    /// The guest's TSC rate, where this host's own is another and the hardware scales it.
    tsc_khz: Option<u32>,
}

/// What `state.bin` holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Body {
    pub(crate) host: HostFacts,
    pub(crate) protocol: u16,
    pub(crate) memory: u64,
    pub(crate) memory_hash: [u8; 32],
    pub(crate) cpuid: Vec<CpuidEntry>,
    pub(crate) state: VmState,
    pub(crate) mailbox: Mailbox,
    pub(crate) wake: WakeVector,
    pub(crate) about: Vec<u8>,
    pub(crate) working_set: WorkingSet,
}

/// Why a machine could not be frozen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// The state could not be had, or a fork would not take it.
    #[error(transparent)]
    State(#[from] SaveStateError),
    /// The state could not be put into the form that the kernel takes.
    #[error("cannot prepare the state of the vCPU")]
    Kvm(#[from] KvmError),
    /// The agent announced no usable mailbox.
    #[error("the guest's mailbox cannot be used")]
    Mailbox(#[from] MailboxError),
    /// The memory could not be sealed or read.
    #[error("cannot freeze the guest's memory")]
    Memory(#[from] io::Error),
}

impl Snapshot {
    /// Freezes a machine that rang `Ready` with this argument, and that waits for interrupts with this vector.
    pub fn freeze(
        host: &Host,
        mut machine: Machine,
        memory: BootMemory,
        argument: u32,
        wake: WakeVector,
    ) -> Result<Snapshot, FreezeError> {
        let mailbox = Mailbox::discover(&machine.memory, argument)?;
        let about = mailbox.about(&machine.memory)?;
        let state = VmState::save(host, &mut machine)?;
        // The last mapping of the boot memory must be gone before it can be sealed.
        drop(machine);
        let image = MemoryImage::seal(memory)?;
        let memory_hash = file::memory_hash(&image)?;
        let (tables, cpuid) = (StateTables::new(&state)?, CpuidTable::new(host.cpuid())?);
        let body = Body {
            host: HostFacts::read(host),
            protocol: zeroboot_proto::VERSION,
            memory: image.len(),
            memory_hash,
            cpuid: host.cpuid().to_vec(),
            state,
            mailbox,
            wake,
            about,
            working_set: WorkingSet::default(),
        };
        Ok(Snapshot { image, body, tables, cpuid, tsc_khz: None })
    }

    /// The same snapshot with a state that every kernel refuses late in the restore. For tests of what a
    /// failed fork leaves behind.
    #[doc(hidden)]
    pub fn with_refused_state(&self) -> Result<Snapshot, FreezeError> {
        let mut body = self.body.clone();
        // As if it had been saved without a trial. No CPU has this MSR.
        body.state.msrs.push((0x4fff_fff0, 1));
        let (tables, cpuid) = (StateTables::new(&body.state)?, CpuidTable::new(&body.cpuid)?);
        Ok(Snapshot { image: self.image.try_clone()?, body, tables, cpuid, tsc_khz: self.tsc_khz })
    }

    /// The frozen memory.
    pub fn image(&self) -> &MemoryImage {
        &self.image
    }

    /// The saved state.
    pub fn state(&self) -> &VmState {
        &self.body.state
    }

    /// What the runner said of itself when it was warm: the payload of its `Ready` frame.
    pub fn about(&self) -> &[u8] {
        &self.body.about
    }

    /// The pages that an exec and a cell touch.
    pub fn working_set(&self) -> &WorkingSet {
        &self.body.working_set
    }

    /// A new machine around a private view of the memory, with everything restored but the clocks.
    pub fn fork(&self, host: &Host) -> Result<Fork, ForkError> {
        self.fork_timed(host, &mut |_| ())
    }

    /// As [`Snapshot::fork`]; `step` hears the name of each step once it is done.
    pub fn fork_timed(&self, host: &Host, step: &mut dyn FnMut(&'static str)) -> Result<Fork, ForkError> {
        let memory = Mapping::fork(&self.image)?;
        step("map");
        let fork = self.fork_over(host, memory, step)?;
        self.body.state.restore(&self.tables, &fork.machine, step)?;
        Ok(fork)
    }

    /// A new machine around this memory, with nothing restored.
    pub(crate) fn fork_over(
        &self,
        host: &Host,
        memory: Mapping,
        step: &mut dyn FnMut(&'static str),
    ) -> Result<Fork, ForkError> {
        let machine = Machine::of_fork(host, &self.cpuid, memory, step)?;
        if let Some(khz) = self.tsc_khz {
            // Before the TSC itself, which KVM keeps in the guest's rate.
            machine.vcpu.set_tsc_khz(khz)?;
            step("tsc_rate");
        }
        let (mailbox, wake) = (self.body.mailbox.clone(), self.body.wake);
        Ok(Fork { machine, mailbox, wake, delta: None, went_on: None })
    }

    /// Starts a fork's clocks where the snapshot, or its checkpoint, stopped them. The last step before the guest runs.
    pub fn start_clocks(&self, fork: &Fork) -> Result<(), ForkError> {
        let (state, tables) = match fork.went_on.as_deref() {
            Some((state, tables)) => (state, tables),
            None => (&self.body.state, &self.tables),
        };
        Ok(state.restore_clocks(tables, &fork.machine)?)
    }

    /// Copies and maps the pages that an exec and a first cell are known to touch. Spends memory of a waiting fork on time of
    /// a running one.
    pub fn prefault(&self, fork: &mut Fork, what: Prefault) -> Result<(), ForkError> {
        if what == Prefault::Nothing {
            return Ok(());
        }
        let set = &self.body.working_set;
        let range = |&(page, pages): &(u32, u32)| (GuestPhys(u64::from(page) * PAGE as u64), pages as usize * PAGE);
        for (at, len) in set.written.iter().map(range) {
            fork.machine.memory.populate_write(at, len)?;
            fork.machine.vcpu.pre_fault(at, len as u64)?;
        }
        if what == Prefault::All {
            for (at, len) in set.read.iter().map(range) {
                fork.machine.memory.populate_read(at, len)?;
                fork.machine.vcpu.pre_fault(at, len as u64)?;
            }
        }
        Ok(())
    }
}

/// Which pages of the working set a fork gets ahead of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prefault {
    /// None: the smallest idle fork.
    #[default]
    Nothing,
    /// Those that are written: private copies.
    Written,
    /// Those that are written or read.
    All,
}

/// Why a fork failed. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// The memory could not be mapped or populated.
    #[error("cannot map the template's memory")]
    Map(#[from] io::Error),
    /// KVM refused a step.
    #[error("cannot make the virtual machine")]
    Kvm(#[from] KvmError),
}

/// A machine that was forked from a snapshot.
#[derive(Debug)]
pub struct Fork {
    pub(crate) machine: Machine,
    pub(crate) mailbox: Mailbox,
    pub(crate) wake: WakeVector,
    /// Where a checkpoint of it goes.
    pub(crate) delta: Option<DeltaMapping>,
    /// Of a checkpoint: the state that it goes on from, in place of its template's.
    pub(crate) went_on: Option<Box<(VmState, StateTables)>>,
}

impl Fork {
    /// The machine.
    pub fn machine(&mut self) -> &mut Machine {
        &mut self.machine
    }

    /// Lets it be saved there.
    pub fn save_into(&mut self, delta: &Delta) -> io::Result<()> {
        self.delta = Some(delta.map()?);
        Ok(())
    }

    /// Wakes its guest, if that waits. `false`: it has turned its local APIC off and does not hear.
    pub fn wake(&self) -> Result<bool, KvmError> {
        self.machine.vm.raise(self.wake.get())
    }

    /// Its mailbox.
    pub fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }
}
