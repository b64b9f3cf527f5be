//! Where log lines go: standard error, as text or JSON, and spans to a collector if one is named.

use std::{
    io::IsTerminal as _,
    sync::{Arc, Mutex, PoisonError},
};

use tracing_subscriber::{
    EnvFilter, Layer as _, fmt::MakeWriter, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

use crate::{LogFormat, otlp, otlp::OtlpError};

/// The default log filter.
pub const DEFAULT_FILTER: &str = "info";

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// Not a filter.
    #[error("{0:?} is not a log filter; write it like info or zeroboot_server=debug")]
    Filter(String, #[source] tracing_subscriber::filter::ParseError),
    /// There is a logger already.
    #[error("logging is set up already")]
    Twice(#[source] tracing_subscriber::util::TryInitError),
    /// The collector that was named.
    #[error(transparent)]
    Otlp(#[from] OtlpError),
}

/// Keeps the exporter. Dropping it sends the remaining spans.
#[derive(Debug, Default)]
pub struct LogGuard {
    provider: Option<opentelemetry_sdk::trace::SdkTracerProvider>,
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        if let Some(provider) = self.provider.take()
            && let Err(error) = provider.shutdown()
        {
            tracing::warn!(%error, "the last traces were not sent");
        }
    }
}

/// Log lines of one connection that are written once the answers that they are about are on their way: callers do not wait
/// for them. (A task for each line would wake another thread while an answer is made.)
#[derive(Clone, Debug, Default)]
pub(crate) struct Afterwards(Arc<Lines>);

#[derive(Default)]
struct Lines(Mutex<Vec<Box<dyn FnOnce() + Send>>>);

impl Afterwards {
    pub(crate) fn push(&self, line: impl FnOnce() + Send + 'static) {
        let span = tracing::Span::current();
        let mut lines = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.push(Box::new(move || span.in_scope(line)));
    }

    /// Writes the waiting lines.
    pub(crate) fn write(&self) {
        self.0.write();
    }
}

impl Lines {
    fn write(&self) {
        let lines = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        lines.into_iter().for_each(|line| line());
    }
}

impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lines")
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.write();
    }
}

/// Whether log lines have colours: for a person at a terminal who has not set `NO_COLOR`.
pub fn log_colours() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Sets the process's logger, which writes to `writer`. Call it inside the runtime, once, and keep the guard.
pub fn init_logging(
    format: LogFormat,
    filter: &str,
    otlp_endpoint: Option<&str>,
    writer: impl for<'a> MakeWriter<'a> + Send + Sync + 'static,
) -> Result<LogGuard, LogError> {
    let filter = EnvFilter::try_new(filter).map_err(|error| LogError::Filter(filter.to_owned(), error))?;
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(log_colours()).with_target(false);
    let lines = match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let registry = tracing_subscriber::registry().with(lines.with_filter(filter));
    let Some(endpoint) = otlp_endpoint else {
        registry.try_init().map_err(LogError::Twice)?;
        return Ok(LogGuard::default());
    };
    let provider = otlp::provider(endpoint)?;
    let tracer = opentelemetry::trace::TracerProvider::tracer(&provider, "zeroboot");
    let ours = tracing_subscriber::filter::Targets::new().with_target("zeroboot", tracing::Level::DEBUG);
    let spans = tracing_opentelemetry::layer().with_tracer(tracer).with_filter(ours);
    registry.with(spans).try_init().map_err(LogError::Twice)?;
    Ok(LogGuard { provider: Some(provider) })
}
