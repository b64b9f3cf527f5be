//! `POST /v1/exec`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    Extension,
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Body as _;
use serde::Serialize;
use tracing::Instrument as _;
use uuid::Uuid;
use zeroboot_engine::{Event, ExecRequest, OutputFile, Report};

use crate::{
    answer::{Finished, Text, is_truncated},
    app::{App, Asked},
    backend::Run,
    budget::{Full, Share},
    config::RequestLimits,
    error::ApiError,
    gate::Place,
    logging::Afterwards,
    routes::stream,
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

/// Whether the client asks for events.
fn wants_stream(headers: &HeaderMap) -> bool {
    let accepts = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepts.flat_map(|line| line.split(',')).any(|word| {
        let kind = word.split(';').next().unwrap_or_default().trim();
        kind.eq_ignore_ascii_case("text/event-stream")
    })
}

/// Reads a body: the right type, below the limit, in time, and as long as there is room for it.
pub(crate) async fn read_body(
    headers: &HeaderMap,
    body: Body,
    limits: &RequestLimits,
    share: &Share,
) -> Result<Vec<u8>, ApiError> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    // Strict, because a web page can send a body of any other type to us without being asked by a preflight.
    if !kind.eq_ignore_ascii_case("application/json") {
        return Err(ApiError::new("unsupported_media_type", "The body must have Content-Type: application/json"));
    }
    let read = tokio::time::timeout(limits.body_timeout, read_frames(body, limits.max_body, share)).await;
    read.map_err(|_| ApiError::new("body_timeout", "The body took too long to arrive"))?
}

async fn read_frames(mut body: Body, most: usize, share: &Share) -> Result<Vec<u8>, ApiError> {
    let too_large = || ApiError::new("body_too_large", format!("The body is larger than {most} bytes"));
    if body.size_hint().lower() > most as u64 {
        return Err(too_large());
    }
    let mut whole = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| ApiError::new("invalid_request", "The body did not arrive whole"))?;
        let Ok(data) = frame.into_data() else { continue };
        if whole.len() + data.len() > most {
            return Err(too_large());
        }
        share.grow(data.len() as u64).map_err(Full::busy)?;
        whole.extend_from_slice(&data);
    }
    Ok(whole)
}

pub(crate) fn serialize(value: &impl Serialize) -> Result<Vec<u8>, ApiError> {
    serde_json::to_vec(value).map_err(|_| ApiError::internal())
}

pub(crate) fn json_response(text: Bytes) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], text).into_response()
}

/// An exec that is counted and logged, however it ends. Dropping it gives back the key's place and lowers the gauge.
pub(crate) struct UnderWay {
    pub(crate) app: Arc<App>,
    pub(crate) request_id: Uuid,
    /// The template's place in the catalog.
    pub(crate) template: usize,
    pub(crate) share: Arc<Share>,
    after: Afterwards,
    _place: Place,
    _entered: crate::metrics::Entered,
}

impl UnderWay {
    pub(crate) fn new(app: Arc<App>, asked: &Asked, template: usize, place: Place, share: Arc<Share>) -> UnderWay {
        let entered = app.metrics.enter();
        let (request_id, after) = (asked.request_id, asked.peer.after.clone());
        UnderWay { app, request_id, template, share, after, _place: place, _entered: entered }
    }

    /// Takes a sandbox.
    pub(crate) async fn begin(&self, request: ExecRequest) -> Result<Run, ApiError> {
        self.app.backend.exec(request).await.map_err(|error| self.failed(error))
    }

    /// Counts and logs an exec that came to no outcome.
    pub(crate) fn failed(&self, error: zeroboot_engine::ExecError) -> ApiError {
        let reason = match &error {
            // Words of our own; those of `Invalid` can quote the request.
            zeroboot_engine::ExecError::Invalid(_) => "invalid request".to_owned(),
            // A broken guest's words can be in it: not too many of them, and no line of their own in the log.
            other => other.to_string().chars().take(300).collect(),
        };
        let api = ApiError::from(error);
        if api.status.is_server_error() {
            self.app.metrics.failed(api.code);
            let (template, _) = self.app.catalog.get(self.template);
            tracing::warn!(request_id = %self.request_id, template, code = api.code, ?reason, "no outcome");
        }
        api
    }

    /// Counts an exec whose output is not taken.
    pub(crate) fn refused(&self, error: ApiError) -> ApiError {
        self.app.metrics.failed(error.code);
        let (template, _) = self.app.catalog.get(self.template);
        tracing::warn!(request_id = %self.request_id, template, code = error.code, "its output is not taken");
        error
    }

    /// Counts and logs an exec that came to an outcome.
    pub(crate) fn ended(&self, run: &Run, report: &Report) {
        let (template, _) = self.app.catalog.get(self.template);
        self.app.canaries.worked(self.template);
        self.app.metrics.finished(template, run.isolation(), report);
        let (app, report) = (self.app.clone(), report.clone());
        let (at, request_id, id, isolation) = (self.template, self.request_id, run.id(), run.isolation().as_str());
        self.after.push(move || {
            let (template, _) = app.catalog.get(at);
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            tracing::info!(
                %request_id, exec_id = %id, template, isolation, outcome = report.outcome.as_str(),
                exit_code = report.outcome.exit_code(), pooled = report.pooled, fork_ms = ms(report.fork_time),
                exec_ms = ms(report.exec_time), total_ms = ms(report.total_time), "ended"
            );
        });
    }

    /// Runs it to its end and keeps everything. `budget`: bytes that this and others may still bring back together.
    pub(crate) async fn collect(&self, request: ExecRequest, budget: Option<&AtomicU64>) -> Result<Finished, ApiError> {
        let mut run = self.begin(request).await?;
        let (mut stdout, mut stderr, mut files) = (Vec::new(), Vec::new(), Vec::<OutputFile>::new());
        loop {
            let event = run.next().await.map_err(|error| self.failed(error))?;
            let size = match &event {
                Some(Event::Stdout(bytes) | Event::Stderr(bytes)) => bytes.len(),
                Some(Event::File(file)) => file.data.as_ref().map_or(0, Bytes::len),
                _ => 0,
            };
            if let Some(budget) = budget {
                let left =
                    budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(size as u64));
                left.map_err(|_| {
                    self.refused(ApiError::new("batch_output_limit", "The batch brings back too much output"))
                })?;
            }
            // It is in the answer twice.
            let twice = matches!(event, Some(Event::Stdout(_)));
            let held = self.share.grow(size as u64 * (1 + u64::from(twice)));
            held.map_err(|full| self.refused(full.output_limit()))?;
            match event {
                Some(Event::Started) => {}
                Some(Event::Stdout(bytes)) => stdout.extend_from_slice(&bytes),
                Some(Event::Stderr(bytes)) => stderr.extend_from_slice(&bytes),
                Some(Event::File(file)) => files.push(file),
                Some(Event::End(report)) if report.lost => return Err(self.failed(lost())),
                Some(Event::End(report)) => {
                    self.ended(&run, &report);
                    let (template, language) = self.app.catalog.get(self.template);
                    let cut = is_truncated(report.outcome);
                    return Ok(Finished {
                        id: run.id(),
                        template: template.into(),
                        language: language.into(),
                        isolation: run.isolation(),
                        stdout: Text::of(stdout, cut),
                        stderr: Text::of(stderr, cut),
                        files,
                        report,
                    });
                }
                None => return Err(self.failed(zeroboot_engine::ExecError::Sandbox("no end event".into()))),
            }
        }
    }
}

/// A worker that vanished while the code ran: ours to answer for, not an outcome of the code.
pub(crate) fn lost() -> zeroboot_engine::ExecError {
    zeroboot_engine::ExecError::Sandbox("the worker vanished while the code ran".into())
}
