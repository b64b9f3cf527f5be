//! `POST /v1/exec/batch`.

use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use axum::{Extension, body::Body, extract::State, http::HeaderMap, response::Response};
use futures_util::{FutureExt as _, StreamExt as _, stream};
use serde::Serialize;
use tokio::time::Instant;
use tracing::Instrument as _;
use uuid::Uuid;

use crate::{
    answer::Finished,
    app::{App, Peer, RequestId},
    error::{ApiError, ErrorBody},
    gate::Caller,
    routes::exec::{UnderWay, json_response, read_json, serialize},
    wire::{BatchBody, ExecBody, Object},
};

#[derive(Serialize)]
struct Results<'a> {
    results: Vec<Item<'a>>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Item<'a> {
    Answer(&'a Finished),
    Error(ErrorBody<'a>),
}

/// Runs several pieces of code, each in its own sandbox. Each item has its own result or error.
pub(crate) async fn batch(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Extension(RequestId(request_id)): Extension<RequestId>,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    app.check_admits(&caller)?;
    // The first one is paid before the body is read, the others when it is known how many there are.
    app.gate.charge(&caller, 1)?;
    let limits = &app.config.limits;
    let span = tracing::info_span!("http.batch", %request_id);
    async {
        let BatchBody { executions } = read_json(&headers, body, limits).await?;
        if executions.is_empty() {
            return Err(ApiError::new("invalid_request", "executions: at least one is needed"));
        }
        if executions.len() > limits.max_batch {
            let text = format!("executions: {} are more than the {} of one batch", executions.len(), limits.max_batch);
            return Err(ApiError::new("batch_too_large", text));
        }
        if executions.len() > 1 {
            app.gate.charge(&caller, executions.len() - 1)?;
        }
        let budget = AtomicU64::new(limits.max_batch_output);
        let items = executions.into_iter().map(|Object(body)| guarded(item(&app, &caller, request_id, body, &budget)));
        let done: Vec<Result<Finished, ApiError>> = stream::iter(items).buffered(limits.batch_parallel).collect().await;
        let results = done.iter().map(|result| match result {
            Ok(finished) => Item::Answer(finished),
            Err(error) => Item::Error(error.body(Some(request_id))),
        });
        let bytes = serialize(&Results { results: results.collect() })?;
        Ok(json_response(app.unsent.hold(&caller, &peer, bytes)))
    }
    .instrument(span)
    .await
}

/// A fault in one item is that item's error.
async fn guarded(item: impl Future<Output = Result<Finished, ApiError>>) -> Result<Finished, ApiError> {
    AssertUnwindSafe(item).catch_unwind().await.unwrap_or_else(|_| Err(ApiError::internal()))
}

async fn item(
    app: &Arc<App>,
    caller: &Caller,
    request_id: Uuid,
    body: ExecBody,
    budget: &AtomicU64,
) -> Result<Finished, ApiError> {
    let (request, template) = body.into_request(&app.catalog, &app.config.limits)?;
    let place = app.gate.wait_for_place(caller).await?;
    let under_way = UnderWay::new(app.clone(), request_id, template, place);
    // Items wait for each other's sandboxes. One that was refused as busy has not begun, so it may be tried again.
    let until = Instant::now() + app.config.limits.batch_wait;
    loop {
        app.check_open()?;
        let result = under_way.collect(request.clone(), Some(budget)).await;
        match result {
            Err(error) if error.code == "busy" && Instant::now() < until => {
                tokio::time::sleep(
                    error.retry_after.unwrap_or_default().clamp(Duration::from_millis(5), Duration::from_millis(50)),
                )
                .await;
            }
            other => return other,
        }
    }
}
