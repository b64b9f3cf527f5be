//! Watchers that are asked for what has changed: what came since the last question, up to a bound.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;
use uuid::Uuid;
use zeroboot_engine::Sandbox;

use super::{
    filesystem::{Changes, LOST, Watched},
    messages::FilesystemEvent,
};
use crate::{
    budget::{Full, Share},
    call::Call,
    error::ApiError,
};

/// Most watchers of one sandbox.
const MOST: usize = 32;
/// Bytes of changes that one holds, each with [`EACH`] besides its name. They count as held from the start.
const MOST_BYTES: usize = 256 * 1024;
const EACH: usize = 64;

#[derive(Debug, Default)]
pub(crate) struct Watchers(Mutex<HashMap<(Uuid, String), Arc<Watcher>>>);

#[derive(Debug)]
struct Watcher {
    waiting: Mutex<Waiting>,
    /// Dropped with it, which ends its task.
    _stop: oneshot::Sender<()>,
    _share: Arc<Share>,
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<FilesystemEvent>,
    bytes: usize,
    lost: bool,
    over: bool,
}

impl Waiting {
    fn push(&mut self, event: FilesystemEvent) {
        let size = EACH + event.name.len();
        if self.bytes + size > MOST_BYTES {
            // The rest would have holes anyway.
            self.lost = true;
            self.events.clear();
            self.bytes = 0;
            return;
        }
        if !self.lost {
            self.bytes += size;
            self.events.push_back(event);
        }
    }

    fn take(&mut self) -> Result<Vec<FilesystemEvent>, ApiError> {
        self.bytes = 0;
        if std::mem::take(&mut self.lost) {
            self.events.clear();
            return Err(ApiError::new("changes_lost", LOST));
        }
        if self.over && self.events.is_empty() {
            return Err(ApiError::new("file_not_found", "The watched directory is gone"));
        }
        Ok(std::mem::take(&mut self.events).into())
    }
}

fn waiting(watcher: &Watcher) -> MutexGuard<'_, Waiting> {
    watcher.waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watchers {
    fn all(&self) -> MutexGuard<'_, HashMap<(Uuid, String), Arc<Watcher>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes on until it is removed, or its sandbox has ended.
    pub(crate) fn add(&self, call: &Call, sandbox: &Sandbox, mut watched: Watched) -> Result<String, ApiError> {
        let share = call.app.budget.share(&call.asked.caller).map_err(Full::busy)?;
        share.grow(MOST_BYTES as u64).map_err(Full::busy)?;
        let (stop, mut stopped) = oneshot::channel();
        let watcher = Arc::new(Watcher { waiting: Mutex::default(), _stop: stop, _share: share });
        let key = (sandbox.id(), Uuid::now_v7().simple().to_string());
        {
            let mut all = self.all();
            if all.keys().filter(|(id, _)| *id == sandbox.id()).count() >= MOST {
                let text = format!("The sandbox has {MOST} watchers, which is as many as it may have");
                return Err(ApiError::new("too_many_runs", text));
            }
            all.insert(key.clone(), watcher.clone());
        }
        let weak = Arc::downgrade(&watcher);
        let (app, id, sandbox) = (call.app.clone(), key.clone(), sandbox.clone());
        tokio::spawn(async move {
            loop {
                let changes = tokio::select! {
                    changes = watched.next() => changes,
                    _ = &mut stopped => return,
                };
                let Some(watcher) = weak.upgrade() else { return };
                let mut waiting = waiting(&watcher);
                match changes {
                    Ok(Changes::Some(events)) => events.into_iter().for_each(|event| waiting.push(event)),
                    Ok(Changes::Lost) => waiting.lost = true,
                    Ok(Changes::End) | Err(_) => {
                        waiting.over = true;
                        break;
                    }
                }
            }
            // Until somebody has asked for the rest: at the latest, when the sandbox ends.
            tokio::select! {
                _ = &mut stopped => {}
                _ = sandbox.ended() => drop(app.e2b.watchers.all().remove(&id)),
            }
        });
        Ok(key.1)
    }

    /// What has changed since this was asked for the last time.
    pub(crate) fn take(&self, sandbox: Uuid, name: &str) -> Result<Vec<FilesystemEvent>, ApiError> {
        let found = self.all().get(&(sandbox, name.to_owned())).cloned();
        let watcher = found.ok_or_else(unknown)?;
        waiting(&watcher).take()
    }

    pub(crate) fn remove(&self, sandbox: Uuid, name: &str) -> Result<(), ApiError> {
        self.all().remove(&(sandbox, name.to_owned())).map(drop).ok_or_else(unknown)
    }
}

fn unknown() -> ApiError {
    ApiError::new("file_not_found", "The sandbox has no watcher of this id")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_bounded_and_said_once() {
        let mut waiting = Waiting::default();
        for at in 0..100_000 {
            waiting.push(FilesystemEvent { name: format!("file-{at}"), r#type: 1 });
            assert!(waiting.bytes <= MOST_BYTES);
        }
        assert_eq!(waiting.take().unwrap_err().code, "changes_lost");
        assert_eq!(waiting.take().unwrap(), []);
        waiting.push(FilesystemEvent { name: "a".into(), r#type: 1 });
        assert_eq!(waiting.take().unwrap().len(), 1);
        waiting.over = true;
        assert_eq!(waiting.take().unwrap_err().code, "file_not_found");
    }
}
