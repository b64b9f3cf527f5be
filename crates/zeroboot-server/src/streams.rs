//! Requests about sandboxes that a key has open: each can be a stream that stays for hours.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use crate::{error::ApiError, gate::Caller};

#[derive(Debug)]
pub(crate) struct Streams {
    most: usize,
    open: Mutex<HashMap<String, usize>>,
}

/// An open request. Dropping it gives its place back.
#[derive(Debug)]
pub(crate) struct Open {
    streams: Arc<Streams>,
    key: Option<String>,
}

impl Streams {
    pub(crate) fn new(most: usize) -> Arc<Streams> {
        Arc::new(Streams { most, open: Mutex::default() })
    }

    /// Refused if the key has too many. Without keys only connections and the held bytes are limited.
    pub(crate) fn enter(self: &Arc<Self>, caller: &Caller) -> Result<Open, ApiError> {
        let key = caller.key.as_ref().map(|key| key.id.clone());
        if let Some(key) = &key {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            let count = open.entry(key.clone()).or_default();
            if *count >= self.most {
                let text = format!("This key already has its maximum of {} open requests about sandboxes", self.most);
                return Err(ApiError::new("too_many_streams", text).retry_after(Duration::from_secs(1)));
            }
            *count += 1;
        }
        Ok(Open { streams: self.clone(), key })
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let Some(key) = self.key.take() else { return };
        let mut open = self.streams.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                open.remove(&key);
            }
        }
    }
}
