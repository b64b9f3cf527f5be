//! Checkpoints: moments of a sandbox that are kept, for sandboxes that begin there later, and to go back to.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

use uuid::Uuid;

use super::{
    BranchError, BranchSpec, Hold, Sandbox,
    branch::Moment,
    registry::{CheckpointPlace, Registry},
};
use crate::{ExecError, InvalidRequest};

/// What is asked for.
#[derive(Clone, Debug)]
pub struct CheckpointSpec {
    /// How long it is kept.
    pub lease: Duration,
    /// The caller's own words about it.
    pub metadata: BTreeMap<String, String>,
    /// Most checkpoints that may be kept of its owner.
    pub most_of_owner: Option<usize>,
    /// Counts the output that it keeps.
    pub hold: Option<Arc<dyn Hold>>,
}

#[derive(Debug)]
struct Kept {
    id: Uuid,
    parent: Option<Uuid>,
    metadata: BTreeMap<String, String>,
    created_at: SystemTime,
    expires_at: SystemTime,
    moment: Moment,
    _place: CheckpointPlace,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.moment.frozen.let_go();
    }
}

/// A moment of a sandbox that is kept until its lease ends or it is removed. Sandboxes that began there stay.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    kept: Arc<Kept>,
}

impl Checkpoint {
    /// Its id (UUIDv7).
    pub fn id(&self) -> Uuid {
        self.kept.id
    }

    /// The checkpoint that its sandbox had come from.
    pub fn parent(&self) -> Option<Uuid> {
        self.kept.parent
    }

    /// The sandbox that it is of.
    pub fn sandbox(&self) -> Uuid {
        self.kept.moment.facts.id
    }

    /// Its sandbox's template.
    pub fn template(&self) -> &str {
        &self.kept.moment.facts.template
    }

    /// Whose it is.
    pub fn owner(&self) -> &str {
        &self.kept.moment.facts.owner
    }

    /// Its owner's words.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.kept.metadata
    }

    /// Bytes of memory that it adds to what its sandbox was forked from.
    pub fn bytes(&self) -> u64 {
        self.kept.moment.bytes
    }

    /// When it was made.
    pub fn created_at(&self) -> SystemTime {
        self.kept.created_at
    }

    /// When it is removed.
    pub fn expires_at(&self) -> SystemTime {
        self.kept.expires_at
    }

    /// Makes sandboxes that begin there; all, or none.
    pub(crate) async fn restore(
        &self,
        registry: &Arc<Registry>,
        spec: BranchSpec,
    ) -> Result<Vec<Sandbox>, BranchError> {
        registry.or_forget(self, self.kept.moment.branch(registry, spec).await)
    }
}

impl Sandbox {
    /// Keeps this moment of it.
    pub(crate) async fn checkpoint(
        &self,
        registry: &Arc<Registry>,
        spec: CheckpointSpec,
    ) -> Result<Checkpoint, BranchError> {
        self.can_be_saved()?;
        if spec.lease.is_zero() {
            return Err(ExecError::from(InvalidRequest::ZeroTimeout).into());
        }
        if spec.lease > registry.bounds.max_lease {
            return Err(ExecError::from(InvalidRequest::LeaseTooLong(registry.bounds.max_lease)).into());
        }
        let place = registry.admit_checkpoint(self.owner(), spec.most_of_owner)?;
        let mut moment = self.moment(registry).await?;
        let (id, created_at) = (Uuid::now_v7(), SystemTime::now());
        let parent = moment.frozen.point.replace(id);
        self.handle.state().point = Some(id);
        moment.frozen.keep(spec.hold);
        let kept = Kept {
            id,
            parent,
            metadata: spec.metadata,
            created_at,
            expires_at: created_at + spec.lease,
            moment,
            _place: place,
        };
        let checkpoint = Checkpoint { kept: Arc::new(kept) };
        registry.keep(checkpoint.clone());
        tokio::spawn(expire(Arc::downgrade(registry), id, spec.lease));
        Ok(checkpoint)
    }

    /// Goes back to where it was: this one ends, and another has its id from then on. `None`: to the last checkpoint on its
    /// way here.
    pub(crate) async fn roll_back(
        &self,
        registry: &Arc<Registry>,
        to: Option<Checkpoint>,
        hold: Option<Arc<dyn Hold>>,
    ) -> Result<Sandbox, BranchError> {
        self.can_be_saved()?;
        let point = self.handle.state().point;
        let to = to.or_else(|| registry.find_checkpoint(point?)).ok_or(BranchError::NoCheckpoint)?;
        if to.owner() != self.owner() || to.sandbox() != self.id() && Some(to.id()) != point {
            return Err(BranchError::OfAnother);
        }
        registry.or_forget(&to, to.kept.moment.replace(registry, self, hold).await)
    }
}

async fn expire(registry: Weak<Registry>, id: Uuid, lease: Duration) {
    tokio::time::sleep(lease).await;
    if let Some(registry) = registry.upgrade() {
        registry.forget(id);
    }
}
