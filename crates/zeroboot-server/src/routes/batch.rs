//! `POST /v1/exec/batch`.

use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use axum::{Extension, body::Body, extract::State, http::HeaderMap, response::Response};
use futures_util::{FutureExt as _, StreamExt as _, stream};
use serde::Serialize;
use tokio::time::{Instant, sleep};
use tracing::Instrument as _;

use crate::{
    answer::Finished,
    app::App,
    body::{json_response, read_body, serialize},
    budget::{Full, Share},
    error::{ApiError, ErrorBody},
    peer::Asked,
    under_way::UnderWay,
    wire::{self, ExecBody},
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
    Extension(asked): Extension<Asked>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let Asked { request_id, caller, peer } = &asked;
    let share = app.admit(caller)?;
    // The first one is paid before the body is read, the others when it is known how many there are.
    app.gate.charge(caller, 1)?;
    let limits = &app.config.limits;
    let span = tracing::info_span!("http.batch", %request_id);
    async {
        let bytes = read_body(&headers, body, limits, &share).await?;
        let executions = wire::parse_batch(&bytes, limits.max_batch)?;
        drop(bytes);
        app.gate.charge_rest(caller, executions.len() - 1)?;
        // Above the key's places the items would only wait for each other.
        let parallel = app
            .gate
            .most_at_once(caller)
            .map_or(limits.batch_parallel, |most| limits.batch_parallel.min(most as usize));
        let together =
            Together { output: AtomicU64::new(limits.max_batch_output), until: Instant::now() + limits.max_batch_time };
        let items = executions
            .into_iter()
            .enumerate()
            .map(|(at, body)| guarded(item(&app, &asked, body, &together)).map(move |done| (at, done)));
        let mut done: Vec<_> = stream::iter(items).buffer_unordered(parallel).collect().await;
        done.sort_unstable_by_key(|(at, _)| *at);
        let results = done.iter().map(|(_, result)| match result {
            Ok((finished, _)) => Item::Answer(finished),
            Err(error) => Item::Error(error.body(Some(*request_id))),
        });
        let bytes = serialize(&Results { results: results.collect() })?;
        done.iter().filter_map(|(_, result)| result.as_ref().ok()).for_each(|(_, item)| share.absorb(item));
        drop(done);
        Ok(json_response(share.answer(peer, bytes).map_err(Full::output_limit)?))
    }
    .instrument(span)
    .await
}

/// What the items have together.
struct Together {
    /// Bytes that they may still bring back.
    output: AtomicU64,
    /// From then on none begins.
    until: Instant,
}

/// An item's result, and what is held for it.
type Done = Result<(Finished, Arc<Share>), ApiError>;

/// A fault in one item is that item's error.
async fn guarded(item: impl Future<Output = Done>) -> Done {
    AssertUnwindSafe(item).catch_unwind().await.unwrap_or_else(|_| Err(ApiError::internal()))
}

async fn item(app: &Arc<App>, asked: &Asked, body: ExecBody, together: &Together) -> Done {
    let caller = &asked.caller;
    let (request, template) = body.into_request(&app.catalog, &app.config.limits)?;
    let now = Instant::now();
    if now >= together.until {
        let text = "The batch had too little time to begin this item";
        return Err(ApiError::new("busy", text).retry_after(Duration::from_secs(1)));
    }
    let until = (now + app.config.limits.batch_wait).min(together.until);
    let place = app.gate.wait_for_place(caller, request.limits.memory, until).await?;
    let share = loop {
        match app.budget.share(caller) {
            Ok(share) => break share,
            Err(full) if Instant::now() >= until => return Err(full.busy()),
            Err(_) => sleep(Duration::from_millis(50)).await,
        }
    };
    let under_way = UnderWay::new(app.clone(), asked, template, place, share.clone());
    // Items wait for each other's sandboxes. One that was refused as busy has not begun, so it may be tried again.
    loop {
        app.check_open()?;
        let result = under_way.collect(request.clone(), Some(&together.output)).await;
        match result {
            Err(error) if error.code == "busy" && Instant::now() < until => {
                let wait = error.retry_after.unwrap_or_default();
                sleep(wait.clamp(Duration::from_millis(5), Duration::from_millis(50))).await;
            }
            other => {
                share.settle();
                return other.map(|finished| (finished, share));
            }
        }
    }
}
