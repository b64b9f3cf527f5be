//! Branching: a sandbox that lives is frozen, goes on, and others begin where it stood.
//!
//! ```text
//! Freeze ─▶ its worker: the agent comes to rest, or is stopped; memory and state into the delta; Frozen
//!        ─▶ its zygote: one of the checkpoint, which takes the delta in
//!        ─▶ that zygote: the children, each with an identity of its own before anything in it runs
//! ```
//!
//! From `Freeze` to `Frozen` nothing else is written to the sandbox, and what it says up to `Frozen` it said before. So the
//! bookkeeping of that moment is right for it and for each child: no byte of output is lost, and none comes twice.
//!
//! A [`Moment`] is what all verbs have in common: a branch begins at one and lets it go, a [`Checkpoint`](super::Checkpoint)
//! keeps it, and a rollback or a promotion begins at one under an id that is known.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Weak},
    time::{Duration, Instant, SystemTime},
};

use uuid::Uuid;
use zeroboot_sys::delta;

use super::{
    Hold, Sandbox, SandboxSpec,
    handle::{Facts, Handle},
    registry::{Admitted, Registry},
    state::State,
};
use crate::{
    EndReason, ExecError, Isolation,
    forker::{ForkError, Forker},
    worker::Worker,
};

/// How long a worker may take to save its sandbox. It stops the guest itself long before.
const SAVING: Duration = Duration::from_secs(60);
/// Most checkpoints between a sandbox and its template. Each is a process that stays while the sandbox lives.
pub(crate) const MAX_DEPTH: usize = 64;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct BranchSpec {
    /// How many.
    pub count: usize,
    /// How long each lives, unless its lease is extended.
    pub lease: Duration,
    /// The caller's own words about them, in place of the origin's.
    pub metadata: Option<std::collections::BTreeMap<String, String>>,
    /// Most sandboxes that may live of its owner.
    pub most_of_owner: Option<usize>,
    /// Counts what is held for the readers of each: as many as `count`, or none.
    pub holds: Vec<Arc<dyn Hold>>,
}

/// Why there are no branches. The sandbox goes on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BranchError {
    /// It is not in a VM.
    #[error(
        "only a sandbox of the VM engine can be branched: the kernel that a process shares with others cannot be saved"
    )]
    NeedsVmEngine,
    /// Its runtime's generators cannot be made new while it runs.
    #[error("a sandbox of {0} cannot be branched: its generators of random numbers would be the same in every branch")]
    SameRandomness(String),
    /// It is a branch of too many branches.
    #[error("it lies {MAX_DEPTH} branches below its template, which is as deep as one may lie")]
    TooDeep,
    /// It has ended.
    #[error("the sandbox has ended")]
    Gone(EndReason),
    /// What held the checkpoint has ended.
    #[error("the process that held the checkpoint has ended: {0}")]
    CheckpointGone(String),
    /// Its owner has as many as one may have.
    #[error("its owner already has {0} checkpoints, the most that one may have")]
    TooManyCheckpoints(usize),
    /// A sandbox goes back only to where it was.
    #[error("the checkpoint is of another sandbox; restore it instead")]
    OfAnother,
    /// There is nothing to go back to.
    #[error("no checkpoint is kept of the sandbox")]
    NoCheckpoint,
    /// There is no id to take over.
    #[error("the sandbox is not a branch, so it has no origin whose id it could take over")]
    NotABranch,
    /// There is no room for them.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// It could not be saved, or gave no child.
    #[error("cannot branch the sandbox: {0}")]
    Failed(String),
}

impl From<ForkError> for BranchError {
    fn from(error: ForkError) -> BranchError {
        match error {
            ForkError::Down(reason) => BranchError::CheckpointGone(reason),
            ForkError::ZygoteEnded | ForkError::ShuttingDown => BranchError::CheckpointGone(error.to_string()),
            error => BranchError::Failed(error.to_string()),
        }
    }
}

/// What a sandbox is branched by.
#[derive(Clone, Debug)]
pub(crate) struct Roots {
    /// What forked it, and stays while it lives.
    pub(crate) forker: Arc<Forker>,
    /// Where its worker puts a checkpoint.
    pub(crate) delta: Arc<OwnedFd>,
}

/// A moment of a sandbox, at which others may begin.
#[derive(Debug)]
pub(crate) struct Moment {
    /// What was known of the sandbox.
    pub(crate) facts: Facts,
    /// What forks from there.
    pub(crate) forker: Arc<Forker>,
    /// The bookkeeping of that moment.
    pub(crate) frozen: State,
    /// Bytes of memory that it adds to what its sandbox was forked from.
    pub(crate) bytes: u64,
}

/// Who a sandbox that begins at a moment is, if it is none that is new.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known {
    pub(crate) id: Uuid,
    pub(crate) origin: Option<Uuid>,
    pub(crate) created_at: SystemTime,
}

impl Moment {
    /// Makes sandboxes that begin here; all, or none.
    pub(crate) async fn begin(
        &self,
        registry: &Arc<Registry>,
        spec: SandboxSpec,
        admitted: Vec<Admitted>,
        holds: Vec<Arc<dyn Hold>>,
        known: Option<Known>,
    ) -> Result<Vec<Sandbox>, BranchError> {
        let asked = Instant::now();
        let forks = admitted.into_iter().map(|(place, permits)| {
            let forker = Arc::clone(&self.forker);
            tokio::spawn(async move {
                let (worker, _) = forker.fork().await?;
                Ok::<_, ForkError>((worker, place, permits, asked.elapsed()))
            })
        });
        let mut children = Vec::new();
        for fork in forks.collect::<Vec<_>>() {
            let made = fork.await.map_err(|error| BranchError::Failed(error.to_string()))?;
            let (mut worker, place, permits, fork_time): (Worker, _, _, _) = made?;
            worker.charge(permits);
            worker
                .limit(&self.facts.limits.of_exec())
                .map_err(|error| BranchError::Failed(format!("set its cgroup limits: {error}")))?;
            children.push((worker, place, fork_time));
        }
        let mut holds = holds.into_iter();
        let mut made = Vec::with_capacity(children.len());
        for (worker, place, fork_time) in children {
            let spec = SandboxSpec { hold: holds.next(), ..spec.clone() };
            match registry.launch_branch(worker, spec, self, known, fork_time, place) {
                Ok(sandbox) => made.push(sandbox),
                Err(error) => {
                    end_all(made).await;
                    return Err(BranchError::Failed(format!("make its identity: {error}")));
                }
            }
        }
        Ok(made)
    }

    /// Sandboxes that are new.
    pub(crate) async fn branch(&self, registry: &Arc<Registry>, spec: BranchSpec) -> Result<Vec<Sandbox>, BranchError> {
        let (as_child, admitted) = admit(registry, &self.facts, &spec)?;
        self.begin(registry, as_child, admitted, spec.holds, None).await
    }

    /// One that takes the place of `sandbox`, which ends: the same id, lease and words.
    pub(crate) async fn replace(
        &self,
        registry: &Arc<Registry>,
        sandbox: &Sandbox,
        hold: Option<Arc<dyn Hold>>,
    ) -> Result<Sandbox, BranchError> {
        let Facts { id, origin, created_at, ref metadata, .. } = sandbox.handle.facts;
        let spec = SandboxSpec { metadata: metadata.clone(), ..child_of(&self.facts, sandbox.lease_left()) };
        let known = Known { id, origin, created_at };
        let made = self.begin_one(registry, spec, hold, known).await?;
        unless_ended(made, sandbox).await
    }

    /// One sandbox of an owner who has one less in a moment.
    async fn begin_one(
        &self,
        registry: &Arc<Registry>,
        spec: SandboxSpec,
        hold: Option<Arc<dyn Hold>>,
        known: Known,
    ) -> Result<Sandbox, BranchError> {
        spec.check(&registry.bounds).map_err(ExecError::from)?;
        let admitted = vec![registry.admit(&spec)?];
        let made = self.begin(registry, spec, admitted, hold.into_iter().collect(), Some(known)).await?;
        made.into_iter().next().ok_or_else(|| BranchError::Failed("no sandbox was made".into()))
    }
}

/// Ends sandboxes that nobody waits for.
pub(crate) async fn end_all(unwanted: Vec<Sandbox>) {
    for sandbox in unwanted {
        sandbox.end(EndReason::Requested).await;
    }
}

/// Ends the one whose place was taken. If it had ended meanwhile for another reason, so does its successor: it was deleted, or
/// its time was over.
async fn unless_ended(successor: Sandbox, of: &Sandbox) -> Result<Sandbox, BranchError> {
    match of.end(EndReason::Replaced).await {
        EndReason::Replaced => Ok(successor),
        reason => {
            successor.end(reason).await;
            Err(BranchError::Gone(reason))
        }
    }
}

/// What a child is to be, unless the caller says otherwise.
fn child_of(facts: &Facts, lease: Duration) -> SandboxSpec {
    SandboxSpec {
        limits: facts.limits,
        lease,
        idle_timeout: facts.idle_timeout,
        owner: facts.owner.clone(),
        metadata: facts.metadata.clone(),
        ..SandboxSpec::new(facts.template.clone())
    }
}

/// The right to as many children as are asked for.
fn admit(
    registry: &Arc<Registry>,
    facts: &Facts,
    spec: &BranchSpec,
) -> Result<(SandboxSpec, Vec<Admitted>), BranchError> {
    let mut child = child_of(facts, spec.lease);
    child.most_of_owner = spec.most_of_owner;
    if let Some(metadata) = &spec.metadata {
        child.metadata.clone_from(metadata);
    }
    child.check(&registry.bounds).map_err(ExecError::from)?;
    let admitted = (0..spec.count).map(|_| registry.admit(&child)).collect::<Result<_, ExecError>>()?;
    Ok((child, admitted))
}

impl Sandbox {
    /// Whether it can be saved at all.
    pub(crate) fn can_be_saved(&self) -> Result<(), BranchError> {
        let facts = &self.handle.facts;
        if facts.isolation != Isolation::Vm {
            return Err(BranchError::NeedsVmEngine);
        }
        if facts.language != "python" {
            return Err(BranchError::SameRandomness(facts.language.clone()));
        }
        self.end_reason().map_or(Ok(()), |reason| Err(BranchError::Gone(reason)))
    }

    /// Makes others that begin where this one is now; all, or none.
    pub(crate) async fn branch(&self, registry: &Arc<Registry>, spec: BranchSpec) -> Result<Vec<Sandbox>, BranchError> {
        self.can_be_saved()?;
        // Before it is stopped for nothing.
        let (as_child, admitted) = admit(registry, &self.handle.facts, &spec)?;
        let moment = self.moment(registry).await?;
        moment.begin(registry, as_child, admitted, spec.holds, None).await
    }

    /// Takes over the id of the sandbox that it is a branch of, which ends. It goes on under that id.
    pub(crate) async fn promote(
        &self,
        registry: &Arc<Registry>,
        hold: Option<Arc<dyn Hold>>,
    ) -> Result<Sandbox, BranchError> {
        self.can_be_saved()?;
        let facts = &self.handle.facts;
        let id = facts.origin.ok_or(BranchError::NotABranch)?;
        let origin = registry.find(id);
        let known = Known {
            id,
            origin: origin.as_ref().and_then(|origin| origin.handle.facts.origin),
            created_at: facts.created_at,
        };
        let moment = self.moment(registry).await?;
        let made = moment.begin_one(registry, child_of(facts, self.lease_left()), hold, known).await?;
        if let Some(origin) = origin {
            origin.end(EndReason::Replaced).await;
        }
        unless_ended(made, self).await
    }

    fn lease_left(&self) -> Duration {
        self.handle.state().expires.saturating_duration_since(Instant::now())
    }

    /// Saves it, and lets it go on.
    pub(crate) async fn moment(&self, registry: &Arc<Registry>) -> Result<Moment, BranchError> {
        // A checkpoint has at most what its sandbox may have; the surplus goes back when it is there.
        let memory = registry.admit_memory(self.handle.facts.limits.memory)?;
        // Its worker has room for one at a time.
        let _alone = self.handle.freezing.lock().await;
        let roots = self.handle.state().roots.clone();
        let roots = roots.ok_or_else(|| self.gone_or("its worker has nowhere to save it"))?;
        if roots.forker.depth() >= MAX_DEPTH {
            return Err(BranchError::TooDeep);
        }
        let frozen = self.handle.state().freeze().map_err(BranchError::Gone)?;
        self.handle.poke();
        let _room = Room(Arc::downgrade(&self.handle), Arc::clone(&roots.delta));
        let frozen = match tokio::time::timeout(SAVING, frozen).await {
            Ok(Ok(Ok(frozen))) => frozen,
            Ok(Ok(Err(reason))) => return Err(BranchError::Failed(reason)),
            Ok(Err(_ended)) => return Err(self.gone_or("it ended meanwhile")),
            Err(_elapsed) => {
                // What it was not told since cannot be told any more: nobody knows what it has taken.
                self.handle.state().end_wanted.get_or_insert(EndReason::Lost);
                self.handle.poke();
                return Err(BranchError::Failed(format!("its worker did not save it in {} s", SAVING.as_secs())));
            }
        };
        let (forker, bytes) = roots.forker.checkpoint(roots.delta, memory).await?;
        tracing::debug!(sandbox_id = %self.id(), bytes, depth = forker.depth(), "checkpoint taken");
        Ok(Moment { facts: self.handle.facts.clone(), forker, frozen, bytes })
    }

    fn gone_or(&self, reason: &str) -> BranchError {
        self.end_reason().map_or_else(|| BranchError::Failed(reason.to_owned()), BranchError::Gone)
    }
}

/// While it lives, a sandbox's worker may have its memory twice: once more in its delta, which is charged to it.
struct Room(Weak<Handle>, Arc<OwnedFd>);

impl Drop for Room {
    fn drop(&mut self) {
        // Empty already, if all went well. Before the limit is as it was.
        if let Err(error) = delta::empty(&self.1) {
            tracing::warn!(%error, "cannot empty the delta of a sandbox");
        }
        if let Some(handle) = self.0.upgrade() {
            handle.state().saves = false;
            handle.poke();
        }
    }
}
