//! The bytes that the server holds for its callers: request bodies until their exec has ended, output while it is
//! collected, answers until they are taken. None of it is bounded by the sandboxes' own limits together, so it is counted
//! here, for all callers and for each key.

mod share;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};

pub(crate) use self::share::Share;
use crate::{config::RequestLimits, error::ApiError, gate::Caller, keys::Key};

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
        Ok(Arc::new(Share::new(self.clone(), caller.key.clone())))
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use tokio::time::timeout;

    use super::*;
    use crate::{
        keys::{KeyStore, NewKey},
        peer::Peer,
    };

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
