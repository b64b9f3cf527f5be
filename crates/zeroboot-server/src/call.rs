//! A request about sandboxes: who asks, what is held for it, and which sandbox it is about.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::FromRequestParts,
    http::{HeaderMap, StatusCode, request::Parts},
    response::Response,
};
use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;
use zeroboot_engine::{Checkpoint, Engine, Sandbox};

use crate::{
    app::App,
    body::{json_response, read_body, serialize},
    budget::{Full, Share},
    config::RequestLimits,
    error::ApiError,
    params::InPath,
    peer::{Asked, Peer},
    sandbox_wire::owner,
    streams::Open,
    wire,
};

/// A request that was let in: it was charged to its key, and counts as open until this is dropped.
pub(crate) struct Call {
    pub(crate) app: Arc<App>,
    pub(crate) asked: Asked,
    pub(crate) share: Arc<Share>,
    _open: Open,
}

impl FromRequestParts<Arc<App>> for Call {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Call, ApiError> {
        let asked = parts.extensions.get::<Asked>().cloned().ok_or_else(ApiError::internal)?;
        let share = app.admit(&asked.caller)?;
        app.gate.charge(&asked.caller, 1)?;
        let open = app.streams.enter(&asked.caller)?;
        Ok(Call { app: app.clone(), asked, share, _open: open })
    }
}

impl Call {
    pub(crate) fn limits(&self) -> &RequestLimits {
        &self.app.config.limits
    }

    pub(crate) fn peer(&self) -> &Peer {
        &self.asked.peer
    }

    pub(crate) fn request_id(&self) -> Uuid {
        self.asked.request_id
    }

    pub(crate) fn engine(&self) -> Result<&Engine, ApiError> {
        self.app.backend.engine().ok_or_else(ApiError::internal)
    }

    /// The sandbox that the path names. That of another key is not there.
    pub(crate) fn sandbox(&self, path: &InPath) -> Result<Sandbox, ApiError> {
        let found = match path.id("id") {
            Some(id) => self.engine()?.find(id).filter(|sandbox| sandbox.owner() == owner(&self.asked.caller)),
            None => None,
        };
        let sandbox = found.ok_or_else(|| ApiError::new("sandbox_not_found", "No sandbox has this id"))?;
        match sandbox.end_reason() {
            Some(reason) => Err(ApiError::gone(reason)),
            None => Ok(sandbox),
        }
    }

    /// A checkpoint by its id. That of another key is not there.
    pub(crate) fn checkpoint(&self, id: Option<Uuid>) -> Result<Checkpoint, ApiError> {
        let found = match id {
            Some(id) => self.engine()?.find_checkpoint(id).filter(|one| one.owner() == owner(&self.asked.caller)),
            None => None,
        };
        found.ok_or_else(|| ApiError::new("checkpoint_not_found", "No checkpoint has this id"))
    }

    /// The JSON body.
    pub(crate) async fn body<T: DeserializeOwned>(&self, headers: &HeaderMap, body: Body) -> Result<T, ApiError> {
        let bytes = read_body(headers, body, self.limits(), &self.share).await?;
        wire::parse(&bytes)
    }

    /// A whole answer.
    pub(crate) fn json(&self, status: StatusCode, value: &impl Serialize) -> Result<Response, ApiError> {
        let bytes = serialize(value)?;
        let mut response = json_response(self.share.answer(self.peer(), bytes).map_err(Full::output_limit)?);
        *response.status_mut() = status;
        Ok(response)
    }
}
