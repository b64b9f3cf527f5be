//! Engine 1: boot a Linux guest once, freeze it at its doorbell, fork it copy-on-write.
//!
//! One machine has one vCPU, a local APIC, memory and the doorbell; and the wake line, an interrupt without a device. The order of a fork's steps is
//! [`Machine::new`], then [`VmState`]'s restore, then the clocks, then the mailbox.

mod acpi;
pub mod bench;
mod boot;
mod build;
mod checkpoint;
mod cpuid;
mod doorbell;
mod drive;
mod exec;
mod exits;
mod facts;
mod front;
mod jail;
mod live;
mod long_mode;
mod machine;
mod one_request;
mod phase;
mod probe;
mod snapshot;
mod stand_in;
mod state;
mod wake;
mod worker;
mod zygote;

pub use boot::{LoadError, MAX_MEMORY, MIN_MEMORY};
pub use build::{BuildError, BuildOptions, Progress, RehearseError, build};
pub use checkpoint::{Checkpoint, CheckpointError, Underway, fuzz_checkpoint};
pub use cpuid::CpuDifference;
pub use doorbell::{Mailbox, MailboxError, fuzz_mailbox};
pub use drive::{Session, SessionEnd, SessionError, SessionStats};
pub use exec::DEADLINE_GRACE;
pub use exits::{Console, Exits, Stop};
pub use facts::{Difference, HostFacts};
pub use front::{Front, Received};
pub use jail::{POLICY, RESTORE_POLICY, VmJailError, workers_have_namespaces};
pub use live::fuzz_live;
pub use machine::{Host, Machine};
pub use probe::{KvmProbe, probe, restores, restores_altered};
pub use snapshot::{
    FORMAT_VERSION, Fork, ForkError, FreezeError, LoadSnapshotError, MEMORY_FILE, Prefault, STATE_FILE, SaveError,
    Snapshot, SnapshotFacts, WorkingSet, fuzz_decode,
};
pub use state::{SaveStateError, StateTables, TR9, VmState};
pub use wake::{NoWakeLine, WakeVector, fuzz_boot_devices};
pub use worker::{SocketFront, WorkerError, worker, worker_of_checkpoint};
pub use zygote::{ZygoteError, zygote};
