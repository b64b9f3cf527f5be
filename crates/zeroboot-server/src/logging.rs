//! Where log lines go: standard error, as text or JSON, and (with the feature `otlp`) spans to a collector.

use tracing_subscriber::{EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::LogFormat;

/// What is logged if nothing is said.
pub const DEFAULT_FILTER: &str = "info";

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// Not a filter.
    #[error("{0:?} is no log filter such as info or zeroboot_server=debug")]
    Filter(String, #[source] tracing_subscriber::filter::ParseError),
    /// There is a logger already.
    #[error("logging is set up already")]
    Twice(#[source] tracing_subscriber::util::TryInitError),
    /// A collector was named, and this build cannot send to one.
    #[error("this build has no OTLP traces; build it with --features otlp")]
    NoOtlp,
    /// The exporter.
    #[cfg(feature = "otlp")]
    #[error("cannot send traces")]
    Otlp(#[source] opentelemetry_otlp::ExporterBuildError),
}

/// Keeps the exporter; dropping it sends what is left.
#[derive(Debug, Default)]
pub struct LogGuard {
    #[cfg(feature = "otlp")]
    provider: Option<opentelemetry_sdk::trace::SdkTracerProvider>,
}

#[cfg(feature = "otlp")]
impl Drop for LogGuard {
    fn drop(&mut self) {
        if let Some(provider) = self.provider.take()
            && let Err(error) = provider.shutdown()
        {
            tracing::warn!(%error, "the last traces were not sent");
        }
    }
}

/// Sets the process's logger. Call it inside the runtime, once, and keep the guard.
pub fn init_logging(format: LogFormat, filter: &str, otlp_endpoint: Option<&str>) -> Result<LogGuard, LogError> {
    let filter = EnvFilter::try_new(filter).map_err(|error| LogError::Filter(filter.to_owned(), error))?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
    let lines = match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let registry = tracing_subscriber::registry().with(lines.with_filter(filter));
    let Some(endpoint) = otlp_endpoint else {
        registry.try_init().map_err(LogError::Twice)?;
        return Ok(LogGuard::default());
    };
    #[cfg(not(feature = "otlp"))]
    {
        drop((registry, endpoint));
        Err(LogError::NoOtlp)
    }
    #[cfg(feature = "otlp")]
    {
        let provider = otlp(endpoint).map_err(LogError::Otlp)?;
        let tracer = opentelemetry::trace::TracerProvider::tracer(&provider, "zeroboot");
        let spans = tracing_opentelemetry::layer()
            .with_tracer(tracer)
            .with_filter(tracing_subscriber::filter::Targets::new().with_target("zeroboot", tracing::Level::DEBUG));
        registry.with(spans).try_init().map_err(LogError::Twice)?;
        Ok(LogGuard { provider: Some(provider) })
    }
}

#[cfg(feature = "otlp")]
fn otlp(endpoint: &str) -> Result<opentelemetry_sdk::trace::SdkTracerProvider, opentelemetry_otlp::ExporterBuildError> {
    use opentelemetry_otlp::WithExportConfig as _;
    let endpoint = format!("{}/v1/traces", endpoint.trim_end_matches('/'));
    let exporter = opentelemetry_otlp::SpanExporter::builder().with_http().with_endpoint(endpoint).build()?;
    let resource = opentelemetry_sdk::Resource::builder().with_service_name("zeroboot").build();
    Ok(opentelemetry_sdk::trace::SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(resource)
        .build())
}
