//! `/v1/sandboxes/{id}/checkpoints`, `/v1/checkpoints`, `/v1/checkpoints/{id}` and `…/restore`.

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode},
    response::Response,
};
use zeroboot_engine::CheckpointSpec;

use super::sandboxes::{admit, begun, refused};
use crate::{
    budget::Full,
    call::Call,
    error::ApiError,
    params::{InPath, InQuery},
    sandbox_answer::{CheckpointAnswer, CheckpointList},
    sandbox_wire::{BranchBody, CheckpointBody, owner},
};

pub(crate) async fn create(call: Call, path: InPath, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let sandbox = call.sandbox(&path)?;
    let body: CheckpointBody = call.body(&headers, body).await?;
    let (app, caller) = (&call.app, &call.asked.caller);
    let spec = body.into_spec(&app.config.limits, caller)?;
    app.check_open()?;
    let hold = app.budget.share(caller).map_err(Full::busy)?;
    let made = call.engine()?.checkpoint(&sandbox, CheckpointSpec { hold: Some(hold), ..spec }).await;
    let checkpoint = made.map_err(|error| refused(&call, sandbox.id(), error))?;
    tracing::info!(
        request_id = %call.request_id(), sandbox_id = %sandbox.id(), checkpoint_id = %checkpoint.id(),
        bytes = checkpoint.bytes(), key = caller.key_id(), "checkpoint made"
    );
    call.json(StatusCode::CREATED, &CheckpointAnswer::of(&checkpoint))
}

pub(crate) async fn list(call: Call, mut query: InQuery) -> Result<Response, ApiError> {
    let sandbox = match query.text("sandbox_id")? {
        None => None,
        Some(text) => {
            let id = text.parse::<uuid::Uuid>();
            Some(id.map_err(|_| ApiError::new("invalid_request", "sandbox_id is not the id of a sandbox"))?)
        }
    };
    query.end()?;
    let mut own = call.engine()?.checkpoints();
    own.retain(|checkpoint| {
        checkpoint.owner() == owner(&call.asked.caller) && sandbox.is_none_or(|id| checkpoint.sandbox() == id)
    });
    let checkpoints = own.iter().map(CheckpointAnswer::of).collect();
    call.json(StatusCode::OK, &CheckpointList { checkpoints })
}

pub(crate) async fn show(call: Call, path: InPath) -> Result<Response, ApiError> {
    let checkpoint = call.checkpoint(path.id("id"))?;
    call.json(StatusCode::OK, &CheckpointAnswer::of(&checkpoint))
}

pub(crate) async fn delete(call: Call, path: InPath) -> Result<StatusCode, ApiError> {
    let checkpoint = call.checkpoint(path.id("id"))?;
    call.engine()?.forget(&checkpoint);
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn restore(call: Call, path: InPath, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let checkpoint = call.checkpoint(path.id("id"))?;
    let body: BranchBody = call.body(&headers, body).await?;
    let spec = admit(&call, body.into_spec(&call.app.config.limits, &call.asked.caller)?)?;
    let made = call.engine()?.restore(&checkpoint, spec).await;
    begun(&call, made.map_err(|error| refused(&call, checkpoint.id(), error))?)
}
