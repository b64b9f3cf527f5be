//! The long-lived sandboxes, and for a while those that have ended: their owners may ask why.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, SystemTime},
};

use bytes::{Bytes, BytesMut};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use uuid::Uuid;
use zeroboot_proto::{
    Kind, encode, encode_on,
    live::{self, DEFAULT_CONTEXT, Open},
};

use super::{
    BranchError, Checkpoint, EndReason, Sandbox, SandboxBounds, SandboxSpec,
    branch::{Known, Moment, Roots},
    drive::drive,
    handle::{Facts, Handle},
    state::State,
};
use crate::{ExecError, Isolation, execution::identity, forker::Forker, worker::Worker};

/// Ended sandboxes that are remembered.
const REMEMBERED: usize = 1000;
const MIB: u64 = 1024 * 1024;

/// Where a sandbox came from.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) language: String,
    pub(crate) isolation: Isolation,
    pub(crate) pooled: bool,
    pub(crate) fork_time: Duration,
    /// What forked it.
    pub(crate) forker: Option<Arc<Forker>>,
}

#[derive(Debug)]
pub(crate) struct Registry {
    pub(crate) bounds: SandboxBounds,
    places: Arc<Semaphore>,
    memory: Arc<Semaphore>,
    /// Places of checkpoints.
    kept: Arc<Semaphore>,
    all: Mutex<All>,
}

#[derive(Debug, Default)]
struct All {
    known: HashMap<Uuid, Sandbox>,
    ended: VecDeque<Arc<Handle>>,
    owners: HashMap<(What, String), usize>,
    checkpoints: BTreeMap<Uuid, Checkpoint>,
}

/// What an owner has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum What {
    Sandbox,
    Checkpoint,
}

/// The right to one more of an owner's. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct OwnerPlace {
    registry: Weak<Registry>,
    what: (What, String),
}

impl Drop for OwnerPlace {
    fn drop(&mut self) {
        let Some(registry) = self.registry.upgrade() else { return };
        let mut all = registry.all();
        if let Some(count) = all.owners.get_mut(&self.what) {
            *count -= 1;
            if *count == 0 {
                all.owners.remove(&self.what);
            }
        }
    }
}

/// The right to one more sandbox, and to its memory.
pub(crate) type Admitted = (OwnerPlace, Vec<OwnedSemaphorePermit>);

/// The right to one more checkpoint. Its memory is its zygote's.
#[derive(Debug)]
pub(crate) struct CheckpointPlace {
    _of_owner: OwnerPlace,
    _one: OwnedSemaphorePermit,
}

impl Registry {
    pub(crate) fn new(bounds: SandboxBounds) -> Arc<Registry> {
        Arc::new(Registry {
            bounds,
            places: Arc::new(Semaphore::new(bounds.most.min(Semaphore::MAX_PERMITS))),
            memory: Arc::new(Semaphore::new(((bounds.memory / MIB) as usize).min(Semaphore::MAX_PERMITS))),
            kept: Arc::new(Semaphore::new(bounds.checkpoints.min(Semaphore::MAX_PERMITS))),
            all: Mutex::default(),
        })
    }

    fn all(&self) -> MutexGuard<'_, All> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The right to one more sandbox. A caller never waits for it: sandboxes can live for hours.
    pub(crate) fn admit(self: &Arc<Self>, spec: &SandboxSpec) -> Result<Admitted, ExecError> {
        let busy = |_| ExecError::Busy { live: self.live(), retry_after: Duration::from_secs(1) };
        let place = self
            .place_of_owner((What::Sandbox, spec.owner.clone()), spec.most_of_owner)
            .map_err(ExecError::TooManySandboxes)?;
        let mib = u32::try_from(spec.limits.memory.div_ceil(MIB)).unwrap_or(u32::MAX);
        let one = self.places.clone().try_acquire_owned().map_err(busy)?;
        let memory = self.memory.clone().try_acquire_many_owned(mib).map_err(busy)?;
        Ok((place, vec![one, memory]))
    }

    /// Else how many there may be.
    fn place_of_owner(self: &Arc<Self>, what: (What, String), most: Option<usize>) -> Result<OwnerPlace, usize> {
        let mut all = self.all();
        let count = all.owners.entry(what.clone()).or_default();
        if let Some(most) = most.filter(|most| *count >= *most) {
            return Err(most);
        }
        *count += 1;
        Ok(OwnerPlace { registry: Arc::downgrade(self), what })
    }

    /// The right to one more checkpoint.
    pub(crate) fn admit_checkpoint(
        self: &Arc<Self>,
        owner: &str,
        most: Option<usize>,
    ) -> Result<CheckpointPlace, BranchError> {
        let of_owner =
            self.place_of_owner((What::Checkpoint, owner.to_owned()), most).map_err(BranchError::TooManyCheckpoints)?;
        let one = self
            .kept
            .clone()
            .try_acquire_owned()
            .map_err(|_| BranchError::TooManyCheckpoints(self.bounds.checkpoints))?;
        Ok(CheckpointPlace { _of_owner: of_owner, _one: one })
    }

    /// The right to memory of no sandbox: a checkpoint's.
    pub(crate) fn admit_memory(&self, bytes: u64) -> Result<OwnedSemaphorePermit, ExecError> {
        let mib = u32::try_from(bytes.div_ceil(MIB)).unwrap_or(u32::MAX);
        let busy = |_| ExecError::Busy { live: self.live(), retry_after: Duration::from_secs(1) };
        self.memory.clone().try_acquire_many_owned(mib).map_err(busy)
    }

    /// Lets a worker live.
    pub(crate) fn launch(
        self: &Arc<Self>,
        worker: Worker,
        mut spec: SandboxSpec,
        origin: Origin,
        place: OwnerPlace,
    ) -> io::Result<Sandbox> {
        let who = Known { id: Uuid::now_v7(), origin: None, created_at: SystemTime::now() };
        let frames = live_frames(&spec, who.id)?;
        let mut state = State::new(spec.lease, spec.idle_timeout, spec.hold.take());
        state.outgoing = BytesMut::from(Bytes::from(frames));
        Ok(self.add(who, worker, spec, origin, state, place))
    }

    /// Lets a worker live that goes on where another sandbox stood.
    pub(crate) fn launch_branch(
        self: &Arc<Self>,
        worker: Worker,
        mut spec: SandboxSpec,
        moment: &Moment,
        known: Option<Known>,
        fork_time: Duration,
        place: OwnerPlace,
    ) -> io::Result<Sandbox> {
        let who = known.unwrap_or_else(|| Known {
            id: Uuid::now_v7(),
            origin: Some(moment.facts.id),
            created_at: SystemTime::now(),
        });
        let mut name = Vec::new();
        encode(&mut name, Kind::Identity, &identity(who.id)?.encode());
        let mut state = moment.frozen.branched();
        state.begin(spec.lease, spec.hold.take(), &name);
        let origin = Origin {
            language: moment.facts.language.clone(),
            isolation: moment.facts.isolation,
            pooled: false,
            fork_time,
            forker: Some(Arc::clone(&moment.forker)),
        };
        Ok(self.add(who, worker, spec, origin, state, place))
    }

    fn add(
        self: &Arc<Self>,
        who: Known,
        worker: Worker,
        spec: SandboxSpec,
        from: Origin,
        mut state: State,
        place: OwnerPlace,
    ) -> Sandbox {
        let delta = worker.delta.clone();
        state.roots = from.forker.zip(delta).map(|(forker, delta)| Roots { forker, delta });
        let facts = Facts {
            id: who.id,
            template: spec.template,
            language: from.language,
            isolation: from.isolation,
            owner: spec.owner,
            metadata: spec.metadata,
            limits: spec.limits,
            idle_timeout: spec.idle_timeout,
            created_at: who.created_at,
            pooled: from.pooled,
            fork_time: from.fork_time,
            max_lease: self.bounds.max_lease,
            origin: who.origin,
        };
        let sandbox = Sandbox { handle: Arc::new(Handle::new(facts, state)) };
        let displaced = self.all().known.insert(who.id, sandbox.clone());
        if let Some(Sandbox { handle }) = displaced {
            // Found by nobody from here on, so it must not live: also where two took its place at once.
            handle.state().end_wanted.get_or_insert(EndReason::Replaced);
            handle.poke();
        }
        let task = Task {
            handle: sandbox.handle.clone(),
            worker: Some(worker),
            reason: EndReason::Lost,
            registry: Arc::downgrade(self),
            _place: place,
        };
        tokio::spawn(task.run());
        sandbox
    }

    /// Those that live, the oldest first.
    pub(crate) fn sandboxes(&self) -> Vec<Sandbox> {
        let mut all: Vec<Sandbox> =
            self.all().known.values().filter(|sandbox| sandbox.end_reason().is_none()).cloned().collect();
        all.sort_by_key(Sandbox::id);
        all
    }

    /// One that lives, or has ended not long ago.
    pub(crate) fn find(&self, id: Uuid) -> Option<Sandbox> {
        self.all().known.get(&id).cloned()
    }

    /// How many live, or are on their way.
    pub(crate) fn live(&self) -> usize {
        self.bounds.most.saturating_sub(self.places.available_permits())
    }

    /// Memory promised to them, bytes.
    pub(crate) fn promised(&self) -> u64 {
        let most = (self.bounds.memory / MIB).min(Semaphore::MAX_PERMITS as u64);
        most.saturating_sub(self.memory.available_permits() as u64) * MIB
    }

    /// The checkpoints, the oldest first.
    pub(crate) fn checkpoints(&self) -> Vec<Checkpoint> {
        self.all().checkpoints.values().cloned().collect()
    }

    /// How many there are, and the memory that they add, bytes.
    pub(crate) fn kept(&self) -> (usize, u64) {
        let all = self.all();
        (all.checkpoints.len(), all.checkpoints.values().map(Checkpoint::bytes).sum())
    }

    pub(crate) fn find_checkpoint(&self, id: Uuid) -> Option<Checkpoint> {
        self.all().checkpoints.get(&id).cloned()
    }

    pub(crate) fn keep(&self, checkpoint: Checkpoint) {
        self.all().checkpoints.insert(checkpoint.id(), checkpoint);
    }

    /// Lets a checkpoint go. `false`: there is none.
    pub(crate) fn forget(&self, id: Uuid) -> bool {
        // Dropped without the lock: its place takes it.
        let forgotten = self.all().checkpoints.remove(&id);
        forgotten.is_some()
    }

    /// Passes a result on, and lets a checkpoint go whose zygote is gone.
    pub(crate) fn or_forget<T>(&self, of: &Checkpoint, result: Result<T, BranchError>) -> Result<T, BranchError> {
        if let Err(BranchError::CheckpointGone(_)) = result {
            self.forget(of.id());
        }
        result
    }

    /// Ends all of them, and lets the checkpoints go.
    pub(crate) fn end_all(&self, reason: EndReason) {
        let checkpoints = std::mem::take(&mut self.all().checkpoints);
        drop(checkpoints);
        for sandbox in self.all().known.values() {
            sandbox.handle.state().end_wanted.get_or_insert(reason);
            sandbox.handle.poke();
        }
    }

    fn retire(&self, handle: &Arc<Handle>) {
        let mut all = self.all();
        // Another one may have its id.
        if all.knows(handle) {
            all.ended.push_back(Arc::clone(handle));
        }
        while all.ended.len() > REMEMBERED {
            if let Some(old) = all.ended.pop_front().filter(|old| all.knows(old)) {
                all.known.remove(&old.facts.id);
            }
        }
    }
}

impl All {
    fn knows(&self, handle: &Arc<Handle>) -> bool {
        self.known.get(&handle.facts.id).is_some_and(|known| Arc::ptr_eq(&known.handle, handle))
    }
}

/// What moves a sandbox's bytes. However it ends, also by a panic, everyone who waits hears of it.
struct Task {
    handle: Arc<Handle>,
    worker: Option<Worker>,
    reason: EndReason,
    registry: Weak<Registry>,
    _place: OwnerPlace,
}

impl Task {
    async fn run(mut self) {
        if let Some(worker) = &self.worker {
            self.reason = drive(&self.handle, worker).await;
        }
        tracing::debug!(sandbox_id = %self.handle.facts.id, reason = self.reason.as_str(), "sandbox ended");
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        // Killed before anyone hears that it has ended.
        self.worker = None;
        self.handle.state().finish(self.reason);
        if let Some(registry) = self.registry.upgrade() {
            registry.retire(&self.handle);
        }
        self.handle.drained.notify_waiters();
        self.handle.ended.notify_waiters();
    }
}

/// A sandbox that lives and its first cell, in its default context, as the frames that it takes.
pub fn cell_frames(spec: &SandboxSpec, code: &[u8], id: Uuid) -> io::Result<Vec<u8>> {
    let mut out = live_frames(spec, id)?;
    let open = Open::Cell { context: DEFAULT_CONTEXT.into(), timeout_ns: u64::MAX };
    encode_on(&mut out, 1, Kind::Code, code);
    encode_on(&mut out, 1, Kind::Open, &live::encode(&open));
    Ok(out)
}

/// What a sandbox is told before it lives.
fn live_frames(spec: &SandboxSpec, id: Uuid) -> io::Result<Vec<u8>> {
    let limits = zeroboot_proto::Limits {
        wall_ns: u64::MAX,
        cpu_ns: u64::MAX,
        memory: spec.limits.memory,
        output: u64::MAX,
        file_size: spec.limits.file_size,
        output_files: u64::MAX,
        processes: spec.limits.processes,
        open_files: spec.limits.open_files,
    };
    let mut out = Vec::with_capacity(512);
    encode(&mut out, Kind::Limits, &limits.encode());
    encode(&mut out, Kind::Identity, &identity(id)?.encode());
    for (key, value) in &spec.env {
        encode(&mut out, Kind::Env, format!("{key}\0{value}").as_bytes());
    }
    encode(&mut out, Kind::Live, &[]);
    Ok(out)
}
