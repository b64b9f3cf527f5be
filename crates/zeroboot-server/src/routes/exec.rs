//! `POST /v1/exec`.

use std::sync::Arc;

use axum::{Extension, body::Body, extract::State, http::HeaderMap, response::Response};
use tracing::Instrument as _;

use crate::{
    app::App,
    body::{json_response, read_body, serialize, wants_stream},
    budget::Full,
    error::ApiError,
    peer::Asked,
    routes::stream,
    under_way::UnderWay,
    wire::{self, ExecBody},
};

/// Runs one piece of code. The sandbox is taken only when the whole request is here.
pub(crate) async fn exec(
    State(app): State<Arc<App>>,
    Extension(asked): Extension<Asked>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    // All before the body, which is held too.
    let Asked { request_id, caller, peer } = &asked;
    let share = app.admit(caller)?;
    app.gate.charge(caller, 1)?;
    let mut place = app.gate.place(caller)?;
    let span = tracing::info_span!("http.exec", %request_id);
    async {
        let bytes = read_body(&headers, body, &app.config.limits, &share).await?;
        let body: ExecBody = wire::parse(&bytes)?;
        drop(bytes);
        let (request, template) =
            tracing::debug_span!("exec.request").in_scope(|| body.into_request(&app.catalog, &app.config.limits))?;
        app.check_open()?;
        app.gate.hold_memory(&mut place, caller, request.limits.memory)?;
        let under_way = UnderWay::new(app.clone(), &asked, template, place, share);
        if wants_stream(&headers) {
            return stream::start(under_way, request, peer.clone()).await;
        }
        let finished = under_way.collect(request, None).await?;
        tracing::debug_span!("exec.answer").in_scope(|| {
            let bytes = serialize(&finished)?;
            drop(finished);
            Ok(json_response(under_way.share.answer(peer, bytes).map_err(Full::output_limit)?))
        })
    }
    .instrument(span)
    .await
}
