//! An exec from its admission to its answer.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use uuid::Uuid;
use zeroboot_engine::{Event, ExecRequest, OutputFile, Report};

use crate::{
    answer::{Finished, Text, is_truncated},
    app::App,
    backend::Run,
    budget::Share,
    error::ApiError,
    gate::Place,
    logging::Afterwards,
    peer::Asked,
    wire::Named,
};

/// An exec that is counted and logged, however it ends. Dropping it gives back the key's place and lowers the gauge.
pub(crate) struct UnderWay {
    pub(crate) app: Arc<App>,
    pub(crate) request_id: Uuid,
    pub(crate) template: Named,
    pub(crate) share: Arc<Share>,
    after: Afterwards,
    _place: Place,
    _entered: crate::metrics::Entered,
}

impl UnderWay {
    pub(crate) fn new(app: Arc<App>, asked: &Asked, template: Named, place: Place, share: Arc<Share>) -> UnderWay {
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
            tracing::warn!(request_id = %self.request_id, template = &*self.template.name, code = api.code, ?reason, "no outcome");
        }
        api
    }

    /// Counts an exec whose output is not taken.
    pub(crate) fn refused(&self, error: ApiError) -> ApiError {
        self.app.metrics.failed(error.code);
        tracing::warn!(request_id = %self.request_id, template = &*self.template.name, code = error.code, "its output is not taken");
        error
    }

    /// Counts and logs an exec that came to an outcome.
    pub(crate) fn ended(&self, run: &Run, report: &Report) {
        self.app.canaries.worked(&self.template.name);
        self.app.metrics.finished(&self.template.name, run.isolation(), report);
        let (template, report) = (self.template.name.clone(), report.clone());
        let (request_id, id, isolation) = (self.request_id, run.id(), run.isolation().as_str());
        self.after.push(move || {
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            tracing::info!(
                %request_id, exec_id = %id, template = &*template, isolation, outcome = report.outcome.as_str(),
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
                    self.refused(ApiError::new("batch_output_limit", "The batch has reached its maximum of output"))
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
                    let cut = is_truncated(report.outcome);
                    return Ok(Finished {
                        id: run.id(),
                        template: self.template.name.to_string(),
                        language: self.template.language.to_string(),
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
