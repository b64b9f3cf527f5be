//! Contexts of a sandbox: `…/contexts`.

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode},
    response::Response,
};
use uuid::Uuid;
use zeroboot_engine::{ContextInfo, ContextOp, Sandbox};

use crate::{
    error::{About, ApiError},
    params::InPath,
    sandbox_answer::{ContextBodyOut, ContextList},
    sandbox_wire::ContextBody,
    visit::Visit,
};

async fn ask(sandbox: &Sandbox, op: ContextOp) -> Result<Vec<ContextInfo>, ApiError> {
    sandbox.context(op).await.map_err(|error| ApiError::of_run(error, About::Context))
}

async fn one(visit: &Visit, sandbox: &Sandbox, name: &str, status: StatusCode) -> Result<Response, ApiError> {
    let all = ask(sandbox, ContextOp::List).await?;
    let found = all.iter().find(|context| context.name == name);
    let found = found.ok_or_else(|| ApiError::new("context_not_found", "The context is gone already"))?;
    visit.json(status, &ContextBodyOut::of(found))
}

pub(crate) async fn list(visit: Visit, path: InPath) -> Result<Response, ApiError> {
    let all = ask(&visit.sandbox(&path)?, ContextOp::List).await?;
    visit.json(StatusCode::OK, &ContextList { contexts: all.iter().map(ContextBodyOut::of).collect() })
}

pub(crate) async fn create(visit: Visit, path: InPath, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let sandbox = visit.sandbox(&path)?;
    let ContextBody { name, cwd } = visit.body(&headers, body).await?;
    let name = name.unwrap_or_else(|| format!("context-{}", Uuid::now_v7().simple()));
    ask(&sandbox, ContextOp::Create { name: name.clone(), cwd }).await?;
    one(&visit, &sandbox, &name, StatusCode::CREATED).await
}

pub(crate) async fn interrupt(visit: Visit, path: InPath) -> Result<StatusCode, ApiError> {
    ask(&visit.sandbox(&path)?, ContextOp::Interrupt { name: path.get("name").into() }).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn restart(visit: Visit, path: InPath) -> Result<Response, ApiError> {
    let (sandbox, name) = (visit.sandbox(&path)?, path.get("name"));
    ask(&sandbox, ContextOp::Restart { name: name.into() }).await?;
    one(&visit, &sandbox, name, StatusCode::OK).await
}

pub(crate) async fn delete(visit: Visit, path: InPath) -> Result<StatusCode, ApiError> {
    ask(&visit.sandbox(&path)?, ContextOp::Delete { name: path.get("name").into() }).await?;
    Ok(StatusCode::NO_CONTENT)
}
