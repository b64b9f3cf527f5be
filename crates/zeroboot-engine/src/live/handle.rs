//! What the clones of a sandbox, its runs and the task that moves its bytes share.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use tokio::sync::Notify;
use uuid::Uuid;

use super::{SandboxLimits, run::RunError, state::State};
use crate::Isolation;

/// Most bytes of frames that wait until the sandbox reads them. Above it no more input becomes frames.
const MOST_OUTGOING: usize = 1024 * 1024;

/// A channel, and which use of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChannelKey {
    pub(crate) number: u16,
    pub(crate) serial: u64,
}

/// What is known of a sandbox from its start.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) id: Uuid,
    pub(crate) template: String,
    pub(crate) language: String,
    pub(crate) isolation: Isolation,
    pub(crate) owner: String,
    pub(crate) metadata: std::collections::BTreeMap<String, String>,
    pub(crate) limits: SandboxLimits,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) created_at: SystemTime,
    pub(crate) pooled: bool,
    pub(crate) fork_time: Duration,
    pub(crate) max_lease: Duration,
    /// The sandbox that it is a branch of.
    pub(crate) origin: Option<Uuid>,
}

#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) facts: Facts,
    state: Mutex<State>,
    /// Held from the moment at which it is told to freeze until its delta is empty again.
    pub(crate) freezing: tokio::sync::Mutex<()>,
    /// Frames wait to be sent, or something is to be looked at.
    pub(crate) wake: Notify,
    /// Frames were sent.
    pub(crate) drained: Notify,
    /// It has ended.
    pub(crate) ended: Notify,
}

impl Handle {
    pub(crate) fn new(facts: Facts, state: State) -> Handle {
        let (wake, drained, ended) = (Notify::new(), Notify::new(), Notify::new());
        Handle { facts, state: Mutex::new(state), freezing: tokio::sync::Mutex::default(), wake, drained, ended }
    }

    /// Never held over a wait.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the task look.
    pub(crate) fn poke(&self) {
        self.wake.notify_one();
    }

    /// Does this once few enough frames wait for the sandbox to read them.
    pub(crate) async fn when_drained<T>(&self, mut what: impl FnMut(&mut State) -> T) -> T {
        loop {
            let drained = self.drained.notified();
            tokio::pin!(drained);
            drained.as_mut().enable();
            {
                let mut state = self.state();
                if state.outgoing.len() < MOST_OUTGOING {
                    return what(&mut state);
                }
            }
            drained.await;
        }
    }

    /// Sends bytes of input as the sandbox takes them.
    pub(crate) async fn send(self: &Arc<Self>, key: ChannelKey, mut bytes: Bytes) -> Result<(), RunError> {
        while !bytes.is_empty() {
            // At most so much at once, so that input does not fill the queue that others wait for.
            let mut part = bytes.split_to(bytes.len().min(64 * 1024));
            while !part.is_empty() {
                let waiting = self.when_drained(|state| state.input(key, &mut part)).await?;
                match waiting {
                    None => self.poke(),
                    Some(writable) => {
                        let notified = writable.notified();
                        tokio::pin!(notified);
                        notified.as_mut().enable();
                        // It may have come in between.
                        if self.state().input(key, &mut part)?.is_some() {
                            notified.await;
                        } else {
                            self.poke();
                        }
                    }
                }
            }
        }
        Ok(())
    }
}
