//! What is held for one request, and for how long a client may leave its answer untaken.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::time::Instant;

use super::{Budget, Clock, Full, Held, RESERVE};
use crate::{keys::Key, peer::Peer};

/// Lowest rate at which a client may take a long answer, bytes a second.
const SLOWEST: u64 = 64 * 1024;

/// What is held for one request. Dropping it gives everything back.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Arc<Budget>,
    key: Option<Arc<Key>>,
    /// Bytes in use. Changed only under the budget's lock, as is the next.
    pub(super) used: AtomicU64,
    /// So much is counted even if less is in use.
    reserve: AtomicU64,
}

impl Share {
    /// Of a request whose reserve is counted already.
    pub(super) fn new(budget: Arc<Budget>, key: Option<Arc<Key>>) -> Share {
        Share { budget, key, used: AtomicU64::new(0), reserve: AtomicU64::new(RESERVE) }
    }

    fn counted(&self, used: u64) -> u64 {
        used.max(self.reserve.load(Ordering::Relaxed))
    }

    fn set(&self, held: &mut Held, used: u64) -> Result<(), Full> {
        let before = self.counted(self.used.load(Ordering::Relaxed));
        held.change(self.budget.most, self.key.as_deref(), before, self.counted(used))?;
        self.used.store(used, Ordering::Relaxed);
        Ok(())
    }

    /// Counts bytes that will now be held.
    pub(crate) fn grow(&self, bytes: u64) -> Result<(), Full> {
        if bytes == 0 {
            return Ok(());
        }
        let mut held = self.budget.held();
        let used = self.used.load(Ordering::Relaxed).saturating_add(bytes);
        self.set(&mut held, used)
    }

    fn shrink(&self, bytes: u64) {
        let mut held = self.budget.held();
        let used = self.used.load(Ordering::Relaxed).saturating_sub(bytes);
        // Less always has room.
        self.set(&mut held, used).unwrap_or_default();
    }

    /// The exec has ended: only what is in use is counted from now on.
    pub(crate) fn settle(&self) {
        let mut held = self.budget.held();
        let used = self.used.load(Ordering::Relaxed);
        let before = self.counted(used);
        self.reserve.store(0, Ordering::Relaxed);
        // Less always has room.
        held.change(self.budget.most, self.key.as_deref(), before, used).unwrap_or_default();
    }

    /// Takes over all that another has in use: no moment is between in which it could go to somebody else.
    pub(crate) fn absorb(&self, other: &Share) {
        let mut held = self.budget.held();
        let taken = other.used.load(Ordering::Relaxed);
        // What is given back is at least what is taken.
        other.set(&mut held, 0).unwrap_or_default();
        let used = self.used.load(Ordering::Relaxed).saturating_add(taken);
        self.set(&mut held, used).unwrap_or_default();
    }

    /// The bytes of a whole answer, in the place of all that was held for its request.
    pub(crate) fn answer(self: &Arc<Self>, peer: &Peer, bytes: impl Into<Bytes>) -> Result<Bytes, Full> {
        // The reserve goes last: a small answer has room in it.
        let held = self.hold(peer, bytes, |_used, size| size)?;
        self.settle();
        Ok(held)
    }

    /// A part of an answer, besides what is held.
    pub(crate) fn part(self: &Arc<Self>, peer: &Peer, bytes: impl Into<Bytes>) -> Result<Bytes, Full> {
        self.hold(peer, bytes, u64::saturating_add)
    }

    /// Bytes for a client, counted until the connection has written or dropped them. A client that takes them too slowly
    /// loses its connection.
    fn hold(
        self: &Arc<Self>,
        peer: &Peer,
        bytes: impl Into<Bytes>,
        used: impl Fn(u64, u64) -> u64,
    ) -> Result<Bytes, Full> {
        let bytes = bytes.into();
        let size = bytes.len() as u64;
        let until = Instant::now() + self.budget.stall + Duration::from_secs(size / SLOWEST);
        let mut held = self.budget.held();
        self.set(&mut held, used(self.used.load(Ordering::Relaxed), size))?;
        let clock = held.next_clock;
        held.next_clock += 1;
        held.clocks.insert(clock, Clock { until, cut: peer.cut.clone() });
        Ok(Bytes::from_owner(Untaken { bytes, clock, share: self.clone() }))
    }
}

/// What a sandbox holds for those who read its output.
impl zeroboot_engine::Hold for Share {
    fn grow(&self, bytes: u64) -> bool {
        Share::grow(self, bytes).is_ok()
    }

    fn shrink(&self, bytes: u64) {
        Share::shrink(self, bytes);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let used = self.counted(self.used.load(Ordering::Relaxed));
        // Less always has room.
        self.budget.change(self.key.as_deref(), used, 0).unwrap_or_default();
    }
}

/// Dropping it gives back what was counted, and ends its clock.
struct Untaken {
    bytes: Bytes,
    clock: u64,
    share: Arc<Share>,
}

impl AsRef<[u8]> for Untaken {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Untaken {
    fn drop(&mut self) {
        self.share.budget.held().clocks.remove(&self.clock);
        self.share.shrink(self.bytes.len() as u64);
    }
}
