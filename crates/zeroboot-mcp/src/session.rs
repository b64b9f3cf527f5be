//! What a session has made, and its end.

use std::{
    any::Any,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use http::Method;
use serde_json::Value;

use crate::api::{Client, Failure, path};

/// The sandboxes of a session. Those that are not kept end with it.
#[derive(Default)]
pub struct Session {
    made: Mutex<Vec<Made>>,
    /// Whether there is a session. A client without one sends each request for itself, and its sandboxes end with their leases.
    begun: AtomicBool,
    /// What the server gave for it.
    ticket: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Clone)]
struct Made {
    id: String,
    client: Client,
    keep: bool,
}

impl Session {
    /// From now on the sandboxes end with the session.
    pub(crate) fn begin(&self, ticket: Box<dyn Any + Send>) {
        *self.ticket.lock().unwrap_or_else(PoisonError::into_inner) = Some(ticket);
        self.begun.store(true, Ordering::Relaxed);
    }

    /// Ends the sandboxes that are not kept. A session ends by itself when it is dropped; this waits for it.
    pub async fn end(&self) {
        for made in self.take() {
            // One that has ended is what we want, and the lease ends what cannot be reached.
            let _gone = end(&made.client, &made.id).await;
        }
    }

    fn take(&self) -> Vec<Made> {
        let mut made = self.made();
        let all = std::mem::take(&mut *made);
        if self.begun.load(Ordering::Relaxed) {
            all.into_iter().filter(|made| !made.keep).collect()
        } else {
            Vec::new()
        }
    }

    fn made(&self) -> std::sync::MutexGuard<'_, Vec<Made>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, id: &str, client: &Client, keep: bool) {
        self.made().push(Made { id: id.into(), client: client.clone(), keep });
    }

    pub(crate) fn forget(&self, id: &str) {
        self.made().retain(|made| made.id != id);
    }

    /// The sandboxes that this session made.
    pub(crate) fn ids(&self) -> Vec<String> {
        self.made().iter().map(|made| made.id.clone()).collect()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let left = self.take();
        if let Ok(runtime) = tokio::runtime::Handle::try_current().map_err(drop)
            && !left.is_empty()
        {
            runtime.spawn(async move {
                for made in left {
                    let _gone = end(&made.client, &made.id).await;
                }
            });
        }
    }
}

/// Ends a sandbox.
pub(crate) async fn end(client: &Client, id: &str) -> Result<(), Failure> {
    client.ask(Method::DELETE, &path(id, &[]), &[], Bytes::new()).await.map(drop)
}

/// A sandbox for one call: it ends when this is dropped, whether the call came to its end or was cancelled.
pub(crate) struct Fresh {
    pub(crate) id: String,
    client: Client,
    session: Arc<Session>,
}

impl Fresh {
    /// In a task of its own: a call that is cancelled while the server makes the sandbox must not lose it.
    pub(crate) async fn make(client: &Client, body: Value, session: &Arc<Session>) -> Result<Fresh, Failure> {
        let (client, session) = (client.clone(), session.clone());
        let making = tokio::spawn(async move {
            let made = client.json(Method::POST, "/v1/sandboxes", &body).await?;
            let id = made.get("id").and_then(Value::as_str).unwrap_or_default().to_owned();
            session.add(&id, &client, false);
            Ok(Fresh { id, client, session })
        });
        making.await.map_err(|error| Failure::new("internal", error.to_string()))?
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        let (id, client, session) = (self.id.clone(), self.client.clone(), self.session.clone());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if end(&client, &id).await.is_ok() {
                    session.forget(&id);
                }
            });
        }
    }
}
