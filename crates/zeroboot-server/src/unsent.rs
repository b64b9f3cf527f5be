//! Answers that their clients have not taken yet. Such memory outlives its sandbox, so admission does not bound it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use tokio::{sync::oneshot, time::timeout};

use crate::{app::Peer, config::RequestLimits, error::ApiError, gate::Caller};

/// The slowest that a client may take a long answer, bytes a second.
const SLOWEST: u64 = 64 * 1024;

#[derive(Debug)]
pub(crate) struct Unsent {
    most: u64,
    stall: Duration,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    all: u64,
    by_key: HashMap<String, u64>,
}

impl Unsent {
    pub(crate) fn new(limits: &RequestLimits) -> Arc<Unsent> {
        Arc::new(Unsent { most: limits.max_unsent, stall: limits.stall_timeout, held: Mutex::default() })
    }

    /// Refuses new execs while clients leave too much untaken. One key can hold half of it at most: it cannot keep the
    /// others out.
    pub(crate) fn check(&self, caller: &Caller) -> Result<(), ApiError> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let own = held.by_key.get(caller.key_id()).copied().unwrap_or_default();
        if held.all < self.most && (caller.key.is_none() || own < self.most / 2) {
            return Ok(());
        }
        let text = "Too many answers wait for their clients to take them";
        Err(ApiError::new("busy", text).retry_after(Duration::from_secs(1)))
    }

    /// The bytes of an answer, counted until the connection has written or dropped them. A client that takes them too
    /// slowly loses its connection.
    pub(crate) fn hold(self: &Arc<Self>, caller: &Caller, peer: &Peer, bytes: Vec<u8>) -> Bytes {
        let size = bytes.len() as u64;
        let key = caller.key_id().to_owned();
        {
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            held.all += size;
            *held.by_key.entry(key.clone()).or_default() += size;
        }
        let (taken, wait) = oneshot::channel::<()>();
        let (cut, time) = (peer.cut.clone(), self.stall + Duration::from_secs(size / SLOWEST));
        tokio::spawn(async move {
            if timeout(time, wait).await.is_err() {
                cut.notify_one();
            }
        });
        Bytes::from_owner(Answer { bytes, key, unsent: self.clone(), _taken: taken })
    }
}

/// Dropping it gives back what was counted, and ends its clock.
struct Answer {
    bytes: Vec<u8>,
    key: String,
    unsent: Arc<Unsent>,
    _taken: oneshot::Sender<()>,
}

impl AsRef<[u8]> for Answer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        let size = self.bytes.len() as u64;
        let mut held = self.unsent.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.all = held.all.saturating_sub(size);
        if let Some(own) = held.by_key.get_mut(&self.key) {
            *own = own.saturating_sub(size);
            if *own == 0 {
                held.by_key.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unsent(most: u64) -> Arc<Unsent> {
        Unsent::new(&RequestLimits { max_unsent: most, ..RequestLimits::default() })
    }

    #[tokio::test]
    async fn execs_are_refused_while_answers_are_not_taken_and_admitted_when_they_are() {
        let (unsent, caller) = (unsent(100), Caller { key: None, address: None });
        let first = unsent.hold(&caller, &Peer::default(), vec![0; 99]);
        assert_eq!(first.len(), 99);
        unsent.check(&caller).unwrap();
        let second = unsent.hold(&caller, &Peer::default(), vec![0; 1]);
        let error = unsent.check(&caller).unwrap_err();
        assert_eq!((error.code, error.retry_after), ("busy", Some(Duration::from_secs(1))));
        // A part of it that is still somewhere counts as all of it.
        let part = first.slice(..1);
        drop(first);
        unsent.check(&caller).unwrap_err();
        drop(part);
        unsent.check(&caller).unwrap();
        drop(second);
        assert_eq!(unsent.held.lock().unwrap().all, 0);
        assert!(unsent.held.lock().unwrap().by_key.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_cut_off_and_one_that_does_is_not() {
        let (unsent, caller) = (unsent(1 << 30), Caller { key: None, address: None });
        let (slow, quick) = (Peer::default(), Peer::default());
        let held = unsent.hold(&caller, &slow, vec![0; 640 * 1024]);
        drop(unsent.hold(&caller, &quick, vec![0; 640 * 1024]));
        let limit = RequestLimits::default().stall_timeout + Duration::from_secs(10);
        assert!(timeout(limit - Duration::from_secs(1), slow.cut.notified()).await.is_err());
        timeout(Duration::from_secs(2), slow.cut.notified()).await.unwrap();
        assert!(timeout(limit * 2, quick.cut.notified()).await.is_err());
        drop(held);
    }
}
