//! Long-lived sandboxes: many runs, files and terminals in one, until its lease ends.
//!
//! [`Sandbox`] and [`Run`] are handles: clones of one thing, cheap. The task of [`drive`] moves the bytes. All that both
//! know stands in [`state::State`].

mod branch;
mod checkpoint;
mod drive;
mod handle;
mod log;
mod ops;
mod registry;
mod run;
mod state;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fmt,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use uuid::Uuid;

use self::handle::Handle;
pub use self::registry::cell_frames;
pub(crate) use self::{
    branch::end_all,
    registry::{Origin, Registry},
};
pub use self::{
    branch::{BranchError, BranchSpec},
    checkpoint::{Checkpoint, CheckpointSpec},
    log::{CellError, Item, MimeBundle},
    ops::{Entries, FileReader, FileWriter, Watch},
    run::{Attached, MAX_TAG, Run, RunEnd, RunError, RunEvent, RunHow, RunKind, RunSpec, RunStatus},
};
use crate::{InvalidRequest, Isolation, Limits, request::check_env};

/// Most long-lived sandboxes, and what they may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SandboxBounds {
    /// Most of them at once.
    pub most: usize,
    /// Memory that they may be promised, bytes: apart from that of execs.
    pub memory: u64,
    /// Most checkpoints that are kept of them. Each is a process; its memory counts in `memory`.
    pub checkpoints: usize,
    /// The longest lease.
    pub max_lease: Duration,
}

impl Default for SandboxBounds {
    fn default() -> SandboxBounds {
        SandboxBounds {
            most: 64,
            memory: 64 * 512 * 1024 * 1024,
            checkpoints: 256,
            max_lease: Duration::from_secs(24 * 3600),
        }
    }
}

/// What a sandbox may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SandboxLimits {
    /// Memory of all its processes, bytes.
    pub memory: u64,
    /// Processes and threads alive at once.
    pub processes: u32,
    /// Bytes of the largest file that can be written.
    pub file_size: u64,
    /// Open descriptors of one process.
    pub open_files: u32,
}

impl Default for SandboxLimits {
    fn default() -> SandboxLimits {
        let Limits { memory, processes, file_size, open_files, .. } = Limits::default();
        // A shell, a server, an editor: more than one exec's.
        SandboxLimits { memory, processes: processes * 2, file_size: file_size * 4, open_files: open_files * 4 }
    }
}

impl SandboxLimits {
    /// As those of an exec that never ends by itself.
    pub(crate) fn of_exec(self) -> Limits {
        let SandboxLimits { memory, processes, file_size, open_files } = self;
        Limits {
            memory,
            processes,
            file_size,
            open_files,
            timeout: Duration::MAX,
            output: u64::MAX,
            ..Limits::default()
        }
    }
}

/// Counts bytes that are held for those who read a sandbox's output.
pub trait Hold: Send + Sync + fmt::Debug {
    /// Counts `bytes` more. `false`: the budget has no room for them.
    fn grow(&self, bytes: u64) -> bool;
    /// Counts `bytes` less.
    fn shrink(&self, bytes: u64);
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct SandboxSpec {
    /// The name of a template.
    pub template: String,
    /// Environment variables of all its runs, added to the template's.
    pub env: Vec<(String, String)>,
    /// What it may use.
    pub limits: SandboxLimits,
    /// How long it lives, unless the lease is extended.
    pub lease: Duration,
    /// It ends after so long without a run, a file operation or a reader.
    pub idle_timeout: Option<Duration>,
    /// Whose it is: a word of the caller's.
    pub owner: String,
    /// Most sandboxes that may live of this owner.
    pub most_of_owner: Option<usize>,
    /// The caller's own words about it.
    pub metadata: BTreeMap<String, String>,
    /// Counts what is held for its readers.
    pub hold: Option<Arc<dyn Hold>>,
}

impl SandboxSpec {
    /// With default limits, without an owner, for five minutes.
    pub fn new(template: impl Into<String>) -> SandboxSpec {
        SandboxSpec {
            template: template.into(),
            env: Vec::new(),
            limits: SandboxLimits::default(),
            lease: Duration::from_secs(300),
            idle_timeout: None,
            owner: String::new(),
            most_of_owner: None,
            metadata: BTreeMap::new(),
            hold: None,
        }
    }

    pub(crate) fn check(&self, bounds: &SandboxBounds) -> Result<(), InvalidRequest> {
        check_env(&self.env)?;
        if self.lease.is_zero() || self.idle_timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Err(InvalidRequest::ZeroTimeout);
        }
        if self.lease > bounds.max_lease {
            return Err(InvalidRequest::LeaseTooLong(bounds.max_lease));
        }
        if self.limits.memory > bounds.memory {
            return Err(InvalidRequest::TooMuchMemory { asked: self.limits.memory, limit: bounds.memory });
        }
        Ok(())
    }
}

/// Why a sandbox ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EndReason {
    /// Its lease was over.
    LeaseEnded,
    /// Nothing happened in it for its idle timeout.
    Idle,
    /// Its owner wanted it.
    Requested,
    /// It broke: its worker vanished, or spoke nonsense.
    Lost,
    /// The kernel killed it for want of memory.
    OutOfMemory,
    /// The engine ended.
    ShuttingDown,
    /// Another one has its id: it was rolled back, or a branch was promoted.
    Replaced,
}

impl EndReason {
    /// Every reason.
    pub const ALL: [EndReason; 7] = [
        EndReason::LeaseEnded,
        EndReason::Idle,
        EndReason::Requested,
        EndReason::Lost,
        EndReason::OutOfMemory,
        EndReason::ShuttingDown,
        EndReason::Replaced,
    ];

    /// The word that the API uses.
    pub fn as_str(self) -> &'static str {
        match self {
            EndReason::LeaseEnded => "lease_ended",
            EndReason::Idle => "idle",
            EndReason::Requested => "requested",
            EndReason::Lost => "lost",
            EndReason::OutOfMemory => "out_of_memory",
            EndReason::ShuttingDown => "shutting_down",
            EndReason::Replaced => "replaced",
        }
    }
}

/// A sandbox that lives. Dropping it lets it live on.
#[derive(Clone, Debug)]
pub struct Sandbox {
    handle: Arc<Handle>,
}

/// What goes on in a sandbox now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// Runs that have not ended.
    pub runs: usize,
    /// Runs and operations on files and contexts that are under way.
    pub channels: usize,
    /// Runs since its start.
    pub begun: u64,
}

impl Sandbox {
    /// Its id (UUIDv7).
    pub fn id(&self) -> Uuid {
        self.handle.facts.id
    }

    /// Its template's name.
    pub fn template(&self) -> &str {
        &self.handle.facts.template
    }

    /// Its template's language.
    pub fn language(&self) -> &str {
        &self.handle.facts.language
    }

    /// What stands around it.
    pub fn isolation(&self) -> Isolation {
        self.handle.facts.isolation
    }

    /// Whose it is.
    pub fn owner(&self) -> &str {
        &self.handle.facts.owner
    }

    /// Its owner's words.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.handle.facts.metadata
    }

    /// What it may use.
    pub fn limits(&self) -> SandboxLimits {
        self.handle.facts.limits
    }

    /// It ends after so long without anything happening.
    pub fn idle_timeout(&self) -> Option<Duration> {
        self.handle.facts.idle_timeout
    }

    /// When it was made.
    pub fn created_at(&self) -> SystemTime {
        self.handle.facts.created_at
    }

    /// The last checkpoint that was made of it, or that it began at.
    pub fn checkpointed(&self) -> Option<Uuid> {
        self.handle.state().point
    }

    /// The sandbox that it is a branch of.
    pub fn origin(&self) -> Option<Uuid> {
        self.handle.facts.origin
    }

    /// It was waiting in the pool.
    pub fn pooled(&self) -> bool {
        self.handle.facts.pooled
    }

    /// How long it took to get it.
    pub fn fork_time(&self) -> Duration {
        self.handle.facts.fork_time
    }

    /// When its lease ends.
    pub fn expires_at(&self) -> SystemTime {
        self.handle.state().expires_at
    }

    /// Lets its lease end so long from now.
    pub fn extend(&self, lease: Duration) -> Result<(), RunError> {
        if lease.is_zero() {
            return Err(InvalidRequest::ZeroTimeout.into());
        }
        let most = self.handle.facts.max_lease;
        if lease > most {
            return Err(InvalidRequest::LeaseTooLong(most).into());
        }
        let mut state = self.handle.state();
        if let Some(reason) = state.ended.or(state.end_wanted) {
            return Err(RunError::Gone(reason));
        }
        state.expires = Instant::now() + lease;
        state.expires_at = SystemTime::now() + lease;
        drop(state);
        self.handle.poke();
        Ok(())
    }

    /// Why it ended; `None` while it lives.
    pub fn end_reason(&self) -> Option<EndReason> {
        let state = self.handle.state();
        state.ended.or(state.end_wanted)
    }

    /// What goes on in it.
    pub fn activity(&self) -> Activity {
        let (runs, channels, begun) = self.handle.state().counts();
        Activity { runs, channels, begun }
    }

    /// Starts a run in it. The run goes on until it ends, whether or not a reader follows it.
    pub async fn start(&self, spec: RunSpec) -> Result<Run, RunError> {
        spec.check()?;
        let mut spec = Some(spec);
        let begin = |state: &mut state::State| match spec.take() {
            Some(spec) => state.start(spec),
            None => Err(RunError::Ended),
        };
        let (id, changed) = self.handle.when_drained(begin).await?;
        self.handle.poke();
        Ok(Run { handle: self.handle.clone(), id, changed })
    }

    /// Starts a run together with its first reader, which misses none of its output.
    pub async fn start_attached(&self, spec: RunSpec) -> Result<(Run, Attached), RunError> {
        let run = self.start(spec).await?;
        let attached = run.attach(0);
        Ok((run, attached))
    }

    /// A run that it still knows.
    pub fn run(&self, id: Uuid) -> Option<Run> {
        let changed = self.handle.state().changed(id)?;
        Some(Run { handle: self.handle.clone(), id, changed })
    }

    /// All runs that it still knows, the oldest first.
    pub fn runs(&self) -> Vec<RunStatus> {
        self.handle.state().statuses()
    }

    /// Ends it, and waits until nothing of it can be used any more.
    pub async fn end(&self, reason: EndReason) -> EndReason {
        self.handle.state().end_wanted.get_or_insert(reason);
        self.handle.poke();
        self.ended().await
    }

    /// Waits until it has ended.
    pub async fn ended(&self) -> EndReason {
        loop {
            let ended = self.handle.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if let Some(reason) = self.handle.state().ended {
                return reason;
            }
            ended.await;
        }
    }
}
