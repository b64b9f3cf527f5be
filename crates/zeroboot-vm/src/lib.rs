//! Engine 1: boot a Linux guest once, freeze it at its doorbell, fork it copy-on-write.
//!
//! One machine has one vCPU, a local APIC, memory and the doorbell. The order of a fork's steps is
//! [`Machine::new`], then [`VmState`]'s restore, then the clocks, then the mailbox.

pub mod bench;
mod boot;
mod build;
mod cpuid;
mod doorbell;
mod exits;
mod facts;
mod jail;
mod long_mode;
mod machine;
mod one_request;
mod probe;
mod session;
mod snapshot;
mod stand_in;
mod state;
mod worker;
mod zygote;

pub use boot::{LoadError, MAX_MEMORY, MIN_MEMORY};
pub use build::{BuildError, BuildOptions, Progress, RehearseError, build};
pub use cpuid::CpuDifference;
pub use doorbell::{Mailbox, MailboxError, fuzz_mailbox};
pub use exits::{Console, Exits, Stop};
pub use facts::{Difference, HostFacts};
pub use jail::{POLICY, VmJailError, workers_have_namespaces};
pub use machine::{Host, Machine};
pub use probe::{KvmProbe, probe, restores, restores_altered};
pub use session::{DEADLINE_GRACE, Front, Received, Session, SessionEnd, SessionError, SessionStats};
pub use snapshot::{
    FORMAT_VERSION, Fork, ForkError, FreezeError, LoadSnapshotError, MEMORY_FILE, Prefault, STATE_FILE, SaveError,
    Snapshot, SnapshotFacts, WorkingSet, fuzz_decode,
};
pub use state::{SaveStateError, StateTables, TR9, VmState};
pub use worker::{SocketFront, WorkerError, worker};
pub use zygote::{ZygoteError, zygote};
