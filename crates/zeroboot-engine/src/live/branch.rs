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

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use rustix::fs::{FallocateFlags, fallocate, fstat};
use tokio::sync::OwnedSemaphorePermit;

use super::{
    Hold, Sandbox, SandboxSpec,
    handle::Handle,
    registry::{OwnerPlace, Registry},
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
    /// There is no room for them.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// It could not be saved, or gave no child.
    #[error("cannot branch the sandbox: {0}")]
    Failed(String),
}

impl From<ForkError> for BranchError {
    fn from(error: ForkError) -> BranchError {
        BranchError::Failed(error.to_string())
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

/// A child that is not launched yet.
struct Child {
    worker: Worker,
    place: OwnerPlace,
    fork_time: Duration,
}

impl Sandbox {
    /// Makes others that begin where this one is now; all, or none.
    pub(crate) async fn branch(&self, registry: &Arc<Registry>, spec: BranchSpec) -> Result<Vec<Sandbox>, BranchError> {
        let facts = &self.handle.facts;
        if facts.isolation != Isolation::Vm {
            return Err(BranchError::NeedsVmEngine);
        }
        if facts.language != "python" {
            return Err(BranchError::SameRandomness(facts.language.clone()));
        }
        if let Some(reason) = self.end_reason() {
            return Err(BranchError::Gone(reason));
        }
        let asked = Instant::now();
        let metadata = spec.metadata.unwrap_or_else(|| facts.metadata.clone());
        let as_child = SandboxSpec {
            limits: facts.limits,
            lease: spec.lease,
            idle_timeout: facts.idle_timeout,
            owner: facts.owner.clone(),
            most_of_owner: spec.most_of_owner,
            metadata,
            ..SandboxSpec::new(facts.template.clone())
        };
        as_child.check(&registry.bounds).map_err(ExecError::from)?;
        let admitted: Vec<_> = (0..spec.count).map(|_| registry.admit(&as_child)).collect::<Result<_, ExecError>>()?;
        // A checkpoint has at most what its sandbox may have; the surplus goes back when it is there.
        let memory = registry.admit_memory(facts.limits.memory)?;
        let (forker, frozen) = self.checkpoint(memory).await?;
        let mut children = Vec::with_capacity(spec.count);
        let forks = admitted.into_iter().map(|(place, permits)| {
            let forker = Arc::clone(&forker);
            tokio::spawn(async move { forker.fork().await.map(|(worker, _)| (worker, place, permits)) })
        });
        for fork in forks.collect::<Vec<_>>() {
            let made = fork.await.map_err(|error| BranchError::Failed(error.to_string()))?;
            let (mut worker, place, permits) = made?;
            worker.charge(permits);
            worker
                .limit(&facts.limits.of_exec())
                .map_err(|error| BranchError::Failed(format!("set its cgroup limits: {error}")))?;
            children.push(Child { worker, place, fork_time: asked.elapsed() });
        }
        let mut holds = spec.holds.into_iter();
        let mut branches = Vec::with_capacity(spec.count);
        for Child { worker, place, fork_time } in children {
            let spec = SandboxSpec { hold: holds.next(), ..as_child.clone() };
            match registry.launch_branch(worker, spec, (self, &frozen), &forker, fork_time, place) {
                Ok(branch) => branches.push(branch),
                Err(error) => {
                    for branch in branches {
                        branch.end(EndReason::Requested).await;
                    }
                    return Err(BranchError::Failed(format!("make its identity: {error}")));
                }
            }
        }
        Ok(branches)
    }

    /// Saves it, and lets it go on. Gives what forks from there, and the bookkeeping of that moment.
    async fn checkpoint(&self, memory: OwnedSemaphorePermit) -> Result<(Arc<Forker>, State), BranchError> {
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
        Ok((forker, frozen))
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
        if let Err(error) = empty(&self.1) {
            tracing::warn!(%error, "cannot empty the delta of a sandbox");
        }
        if let Some(handle) = self.0.upgrade() {
            handle.state().saves = false;
            handle.poke();
        }
    }
}

fn empty(delta: &OwnedFd) -> io::Result<()> {
    let length = u64::try_from(fstat(delta)?.st_size).unwrap_or(0);
    Ok(fallocate(delta, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, length)?)
}
