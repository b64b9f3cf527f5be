//! Contexts of a sandbox: `…/contexts`.

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode},
    response::Response,
};
use uuid::Uuid;
use zeroboot_engine::{ContextInfo, ContextOp, Sandbox};

use crate::{
    call::Call,
    error::{About, ApiError},
    params::InPath,
    sandbox_answer::{ContextBodyOut, ContextList},
    sandbox_wire::ContextBody,
};

async fn ask(sandbox: &Sandbox, op: ContextOp) -> Result<Vec<ContextInfo>, ApiError> {
    sandbox.context(op).await.map_err(|error| ApiError::of_run(error, About::Context))
}

async fn one(call: &Call, sandbox: &Sandbox, name: &str, status: StatusCode) -> Result<Response, ApiError> {
    let all = ask(sandbox, ContextOp::List).await?;
    let found = all.iter().find(|context| context.name == name);
    let found = found.ok_or_else(|| ApiError::new("context_not_found", "The context has already ended"))?;
    call.json(status, &ContextBodyOut::of(found))
}

pub(crate) async fn list(call: Call, path: InPath) -> Result<Response, ApiError> {
    let all = ask(&call.sandbox(&path)?, ContextOp::List).await?;
    call.json(StatusCode::OK, &ContextList { contexts: all.iter().map(ContextBodyOut::of).collect() })
}

pub(crate) async fn create(call: Call, path: InPath, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let sandbox = call.sandbox(&path)?;
    let ContextBody { name, cwd } = call.body(&headers, body).await?;
    let name = name.unwrap_or_else(|| format!("context-{}", Uuid::now_v7().simple()));
    ask(&sandbox, ContextOp::Create { name: name.clone(), cwd }).await?;
    one(&call, &sandbox, &name, StatusCode::CREATED).await
}

pub(crate) async fn interrupt(call: Call, path: InPath) -> Result<StatusCode, ApiError> {
    ask(&call.sandbox(&path)?, ContextOp::Interrupt { name: path.get("name").into() }).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn restart(call: Call, path: InPath) -> Result<Response, ApiError> {
    let (sandbox, name) = (call.sandbox(&path)?, path.get("name"));
    ask(&sandbox, ContextOp::Restart { name: name.into() }).await?;
    one(&call, &sandbox, name, StatusCode::OK).await
}

pub(crate) async fn delete(call: Call, path: InPath) -> Result<StatusCode, ApiError> {
    ask(&call.sandbox(&path)?, ContextOp::Delete { name: path.get("name").into() }).await?;
    Ok(StatusCode::NO_CONTENT)
}
