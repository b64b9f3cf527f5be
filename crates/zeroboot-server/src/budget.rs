//! The bytes that the server holds for its callers: request bodies until their exec has ended, output while it is
//! collected, answers until they are taken. None of it is bounded by the sandboxes' own limits together, so it is counted
//! here, for all callers and for each key.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};

use crate::{config::RequestLimits, error::ApiError, gate::Caller, keys::Key, peer::Peer};

/// Lowest rate at which a client may take a long answer, bytes a second.
const SLOWEST: u64 = 64 * 1024;
/// Bytes that every exec has from its start: an exec with little input and output never fails because others have much.
const RESERVE: u64 = 64 * 1024;
/// Interval between checks of the clocks of untaken answers.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Budget {
    most: u64,
    stall: Duration,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    all: u64,
    /// A key that holds nothing stays until the next look, so that an ordinary exec allocates nothing here.
    by_key: HashMap<String, u64>,
    clocks: HashMap<u64, Clock>,
    next_clock: u64,
}

/// When a client must have taken something, and how its connection is cut if it has not.
#[derive(Debug)]
struct Clock {
    until: Instant,
    cut: Arc<Notify>,
}

/// The budget has no room for more bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

impl Full {
    /// No code ran yet.
    pub(crate) fn busy(self) -> ApiError {
        let text = "The server holds as much input and output as it may";
        ApiError::new("busy", text).retry_after(Duration::from_secs(1))
    }

    /// Code ran.
    pub(crate) fn output_limit(self) -> ApiError {
        ApiError::new(
            "server_output_limit",
            "The server already holds its maximum of input and output, so it cannot hold this exec's output",
        )
    }
}

impl Budget {
    pub(crate) fn new(limits: &RequestLimits) -> Arc<Budget> {
        Arc::new(Budget { most: limits.max_held, stall: limits.stall_timeout, held: Mutex::default() })
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A share for one request, with its reserve. One key can have half of the budget at most: it cannot keep the others
    /// out.
    pub(crate) fn share(self: &Arc<Self>, caller: &Caller) -> Result<Arc<Share>, Full> {
        self.change(caller.key.as_deref(), 0, RESERVE)?;
        let (used, reserve) = (AtomicU64::new(0), AtomicU64::new(RESERVE));
        Ok(Arc::new(Share { budget: self.clone(), key: caller.key.clone(), used, reserve }))
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        let held = self.held();
        held.all == 0 && held.clocks.is_empty()
    }

    fn change(&self, key: Option<&Key>, from: u64, to: u64) -> Result<(), Full> {
        self.held().change(self.most, key, from, to)
    }

    /// Cuts the connections whose clients take too long, for as long as the server runs.
    pub(crate) async fn watch(&self) {
        loop {
            sleep(LOOK).await;
            let now = Instant::now();
            let mut held = self.held();
            held.clocks.retain(|_, clock| {
                let late = clock.until <= now;
                if late {
                    clock.cut.notify_one();
                }
                !late
            });
            held.by_key.retain(|_, own| *own > 0);
        }
    }
}

impl Held {
    fn change(&mut self, most: u64, key: Option<&Key>, from: u64, to: u64) -> Result<(), Full> {
        if to > from && self.all.saturating_add(to - from) > most {
            return Err(Full);
        }
        if let Some(key) = key {
            let own = match self.by_key.get_mut(&key.id) {
                Some(own) => own,
                None => self.by_key.entry(key.id.clone()).or_default(),
            };
            if to > from && own.saturating_add(to - from) > most / 2 {
                return Err(Full);
            }
            *own = own.saturating_sub(from).saturating_add(to);
        }
        self.all = self.all.saturating_sub(from).saturating_add(to);
        Ok(())
    }
}

/// What is held for one request. Dropping it gives everything back.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Arc<Budget>,
    key: Option<Arc<Key>>,
    /// Bytes in use. Changed only under the budget's lock, as is the next.
    used: AtomicU64,
    /// So much is counted even if less is in use.
    reserve: AtomicU64,
}

impl Share {
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

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;
    use crate::keys::{KeyStore, NewKey};

    fn budget(most: u64) -> Arc<Budget> {
        Budget::new(&RequestLimits { max_held: most, ..RequestLimits::default() })
    }

    fn caller(key: Option<Key>) -> Caller {
        Caller { key: key.map(Arc::new), address: None }
    }

    fn key() -> Key {
        let folder = tempfile::tempdir().unwrap();
        KeyStore::new(folder.path().join("k")).create(NewKey { name: "n".into(), ..NewKey::default() }).unwrap().1
    }

    #[test]
    fn what_finds_no_room_is_refused_and_what_goes_gives_room() {
        let (budget, caller) = (budget(2 * RESERVE), caller(None));
        let first = budget.share(&caller).unwrap();
        first.grow(RESERVE).unwrap();
        let second = budget.share(&caller).unwrap();
        let error = budget.share(&caller).unwrap_err().busy();
        assert_eq!((error.code, error.retry_after), ("busy", Some(Duration::from_secs(1))));
        assert_eq!(first.grow(1), Err(Full));
        // The reserve is there whatever the others hold.
        second.grow(RESERVE).unwrap();
        assert_eq!(second.grow(1), Err(Full));
        drop(second);
        first.grow(RESERVE).unwrap();
        drop(first);
        assert_eq!(budget.held().all, 0);
    }

    #[test]
    fn an_answer_counts_until_the_last_part_of_it_is_taken() {
        let (budget, caller) = (budget(4 * RESERVE), caller(None));
        let share = budget.share(&caller).unwrap();
        share.grow(2 * RESERVE).unwrap();
        let answer = share.answer(&Peer::default(), vec![0; 3 * RESERVE as usize]).unwrap();
        assert_eq!(budget.held().all, 3 * RESERVE);
        assert_eq!(share.part(&Peer::default(), vec![0; 2 * RESERVE as usize]), Err(Full));
        drop(share);
        let part = answer.slice(..1);
        drop(answer);
        assert_eq!(budget.held().all, 3 * RESERVE);
        assert_eq!(budget.held().clocks.len(), 1);
        drop(part);
        assert!(budget.is_empty());
    }

    #[test]
    fn what_one_takes_over_from_another_goes_to_nobody_else() {
        let (budget, caller) = (budget(4 * RESERVE), caller(None));
        let (whole, item) = (budget.share(&caller).unwrap(), budget.share(&caller).unwrap());
        item.grow(3 * RESERVE).unwrap();
        assert_eq!(budget.held().all, 4 * RESERVE);
        item.settle();
        whole.absorb(&item);
        assert_eq!((budget.held().all, whole.used.load(Ordering::Relaxed)), (3 * RESERVE, 3 * RESERVE));
        drop(item);
        assert_eq!(budget.held().all, 3 * RESERVE);
        drop(whole);
        assert!(budget.is_empty());
    }

    #[test]
    fn one_key_has_half_at_most() {
        let (budget, greedy, other) = (budget(8 * RESERVE), caller(Some(key())), caller(Some(key())));
        let share = budget.share(&greedy).unwrap();
        share.grow(4 * RESERVE).unwrap();
        assert_eq!(share.grow(1), Err(Full));
        assert!(budget.share(&greedy).is_err());
        budget.share(&other).unwrap().grow(4 * RESERVE).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_cut_off_and_one_that_does_is_not() {
        let (budget, caller) = (budget(1 << 30), caller(Some(key())));
        let watching = tokio::spawn({
            let budget = budget.clone();
            async move { budget.watch().await }
        });
        let (slow, quick) = (Peer::default(), Peer::default());
        let share = budget.share(&caller).unwrap();
        let held = share.answer(&slow, vec![0; 640 * 1024]).unwrap();
        drop(budget.share(&caller).unwrap().answer(&quick, vec![0; 640 * 1024]).unwrap());
        let limit = RequestLimits::default().stall_timeout + Duration::from_secs(10);
        assert!(timeout(limit - Duration::from_secs(1), slow.cut.notified()).await.is_err());
        timeout(Duration::from_secs(3), slow.cut.notified()).await.unwrap();
        assert!(timeout(limit * 2, quick.cut.notified()).await.is_err());
        drop((held, share));
        sleep(LOOK * 2).await;
        assert!(budget.is_empty());
        assert!(budget.held().by_key.is_empty());
        watching.abort();
    }
}
