//! `/v1/sandboxes`, `/v1/sandboxes/{id}`, `…/extend`, `…/branch`, `…/rollback` and `…/promote`.

use std::{sync::Arc, time::Instant};

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode},
    response::Response,
};
use uuid::Uuid;
use zeroboot_engine::{BranchError, BranchSpec, EndReason, Hold, Sandbox, SandboxSpec};

use crate::{
    budget::Full,
    call::Call,
    error::{About, ApiError},
    params::{InPath, InQuery},
    sandbox_answer::{SandboxBody, SandboxList},
    sandbox_wire::{BranchBody, CreateBody, ExtendBody, RollBackBody, owner},
};

/// Most sandboxes of one page, and the default.
const MOST_LISTED: u64 = 1000;
const LISTED: u64 = 100;

pub(crate) async fn create(call: Call, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let body: CreateBody = call.body(&headers, body).await?;
    let (app, caller) = (&call.app, &call.asked.caller);
    let spec = body.into_spec(&app.catalog, &app.config.limits, caller)?;
    let sandbox = make(&call, spec).await?;
    call.json(StatusCode::CREATED, &SandboxBody::of(&sandbox))
}

/// Makes a sandbox for the caller.
pub(crate) async fn make(call: &Call, spec: SandboxSpec) -> Result<Sandbox, ApiError> {
    let app = &call.app;
    app.check_open()?;
    // Its own share: it stays when this request is over.
    let held = app.budget.share(&call.asked.caller).map_err(Full::busy)?;
    let made = call.engine()?.create(SandboxSpec { hold: Some(held), ..spec }).await;
    let sandbox = made.map_err(|error| {
        let reason: String = error.to_string().chars().take(300).collect();
        let api = ApiError::from(error);
        if api.status.is_server_error() {
            tracing::warn!(request_id = %call.request_id(), code = api.code, ?reason, "no sandbox");
        }
        api
    })?;
    watch(call, sandbox.clone());
    Ok(sandbox)
}

/// Counts and logs its start and, whenever that is, its end.
fn watch(call: &Call, sandbox: Sandbox) {
    let (app, begun) = (call.app.clone(), Instant::now());
    let (id, template, isolation) = (sandbox.id(), sandbox.template().to_owned(), sandbox.isolation());
    app.metrics.sandbox_made(&template, isolation);
    tracing::info!(
        request_id = %call.request_id(), sandbox_id = %id, template, isolation = isolation.as_str(),
        key = call.asked.caller.key_id(), pooled = sandbox.pooled(), "sandbox made"
    );
    tokio::spawn(async move {
        let reason = sandbox.ended().await;
        let (lived, runs) = (begun.elapsed(), sandbox.activity().begun);
        app.metrics.sandbox_ended(&template, isolation, reason, lived);
        tracing::info!(
            sandbox_id = %id, template, isolation = isolation.as_str(), reason = reason.as_str(),
            seconds = lived.as_secs_f64(), runs, "sandbox ended"
        );
    });
}

pub(crate) async fn branch(call: Call, path: InPath, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let origin = call.sandbox(&path)?;
    let body: BranchBody = call.body(&headers, body).await?;
    let spec = admit(&call, body.into_spec(&call.app.config.limits, &call.asked.caller)?)?;
    let made = call.engine()?.branch(&origin, spec).await;
    begun(&call, made.map_err(|error| refused(&call, origin.id(), error))?)
}

/// The right to as many sandboxes as are asked for, with a share of their own for each.
pub(super) fn admit(call: &Call, mut spec: BranchSpec) -> Result<BranchSpec, ApiError> {
    let (app, caller) = (&call.app, &call.asked.caller);
    // The first is this request's own.
    app.gate.charge_rest(caller, spec.count - 1)?;
    app.check_open()?;
    for _ in 0..spec.count {
        spec.holds.push(app.budget.share(caller).map_err(Full::busy)?);
    }
    Ok(spec)
}

/// Answers with sandboxes that have begun elsewhere than in a pool.
pub(super) fn begun(call: &Call, made: Vec<Sandbox>) -> Result<Response, ApiError> {
    for sandbox in &made {
        watch(call, sandbox.clone());
    }
    let sandboxes = made.iter().map(SandboxBody::of).collect();
    call.json(StatusCode::CREATED, &SandboxList { sandboxes, next_cursor: None })
}

/// Why there is none, and in the log what the caller is not told.
pub(super) fn refused(call: &Call, of: Uuid, error: BranchError) -> ApiError {
    let reason: String = error.to_string().chars().take(300).collect();
    let api = ApiError::from(error);
    if api.status.is_server_error() {
        tracing::warn!(request_id = %call.request_id(), %of, code = api.code, ?reason, "no branch");
    }
    api
}

pub(crate) async fn roll_back(call: Call, path: InPath, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let sandbox = call.sandbox(&path)?;
    let body: RollBackBody = call.body(&headers, body).await?;
    let to = body.checkpoint_id.map(|id| call.checkpoint(Some(id))).transpose()?;
    let hold: Arc<dyn Hold> = call.app.budget.share(&call.asked.caller).map_err(Full::busy)?;
    let made = call.engine()?.roll_back(&sandbox, to, Some(hold)).await;
    replaced(&call, &sandbox, made)
}

pub(crate) async fn promote(call: Call, path: InPath) -> Result<Response, ApiError> {
    let branch = call.sandbox(&path)?;
    let hold: Arc<dyn Hold> = call.app.budget.share(&call.asked.caller).map_err(Full::busy)?;
    let made = call.engine()?.promote(&branch, Some(hold)).await;
    replaced(&call, &branch, made)
}

fn replaced(call: &Call, of: &Sandbox, made: Result<Sandbox, BranchError>) -> Result<Response, ApiError> {
    let sandbox = made.map_err(|error| refused(call, of.id(), error))?;
    watch(call, sandbox.clone());
    call.json(StatusCode::OK, &SandboxBody::of(&sandbox))
}

pub(crate) async fn list(call: Call, mut query: InQuery) -> Result<Response, ApiError> {
    let wanted = query.all("metadata");
    let wanted: Vec<(&str, &str)> = wanted.iter().filter_map(|pair| pair.split_once('=')).collect();
    let limit = query.number("limit", 1..=MOST_LISTED)?.unwrap_or(LISTED);
    let cursor = match query.text("cursor")? {
        None => None,
        Some(text) => {
            let id = text.parse::<Uuid>();
            Some(id.map_err(|_| ApiError::new("invalid_request", "cursor is not one that this list gave"))?)
        }
    };
    query.end()?;
    let mut own = call.engine()?.sandboxes();
    own.retain(|sandbox| {
        sandbox.owner() == owner(&call.asked.caller)
            && cursor.is_none_or(|cursor| sandbox.id() > cursor)
            && wanted.iter().all(|(name, value)| sandbox.metadata().get(*name).is_some_and(|known| known == value))
    });
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = own.len() > limit;
    own.truncate(limit);
    let next_cursor = own.last().filter(|_| more).map(Sandbox::id);
    call.json(StatusCode::OK, &SandboxList { sandboxes: own.iter().map(SandboxBody::of).collect(), next_cursor })
}

pub(crate) async fn show(call: Call, path: InPath) -> Result<Response, ApiError> {
    let sandbox = call.sandbox(&path)?;
    call.json(StatusCode::OK, &SandboxBody::of(&sandbox))
}

pub(crate) async fn delete(call: Call, path: InPath) -> Result<StatusCode, ApiError> {
    call.sandbox(&path)?.end(EndReason::Requested).await;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn extend(call: Call, path: InPath, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let sandbox = call.sandbox(&path)?;
    let body: ExtendBody = call.body(&headers, body).await?;
    let lease = body.lease(call.limits())?;
    sandbox.extend(lease).map_err(|error| ApiError::of_run(error, About::Command))?;
    call.json(StatusCode::OK, &SandboxBody::of(&sandbox))
}
