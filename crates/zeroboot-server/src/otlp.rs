//! Spans to an OpenTelemetry collector: OTLP, protobuf over plain HTTP.

use std::time::Duration;

use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};

/// Timeout of one delivery. The exporter has its own thread, so a collector that hangs costs spans, not execs.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Most bytes of a collector's answer that are read.
const MOST_ANSWER: u64 = 16 * 1024;

/// Why traces cannot be sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OtlpError {
    /// Not an address that we can send to.
    #[error(
        "{0:?} is no OTLP endpoint such as http://127.0.0.1:4318 (plain HTTP: for TLS put a collector on this host)"
    )]
    Endpoint(String),
    /// The exporter.
    #[error("cannot make the exporter of traces")]
    Exporter(#[source] opentelemetry_otlp::ExporterBuildError),
}

/// What sends spans, in batches, every few seconds and when it is shut down.
pub(crate) fn provider(endpoint: &str) -> Result<SdkTracerProvider, OtlpError> {
    let host = endpoint.trim_end_matches('/').strip_prefix("http://").filter(|host| !host.is_empty());
    let host = host.ok_or_else(|| OtlpError::Endpoint(endpoint.to_owned()))?;
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_http()
        .with_http_client(Plain::new())
        .with_endpoint(format!("http://{host}/v1/traces"))
        .build()
        .map_err(OtlpError::Exporter)?;
    let resource = Resource::builder().with_service_name("zeroboot").build();
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
}

/// A client that blocks, as the exporter's own thread may. The exporter's usual ones bring a TLS stack and fifty crates.
#[derive(Debug)]
struct Plain(ureq::Agent);

impl Plain {
    fn new() -> Plain {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .max_redirects(0)
            // What the environment says of proxies is not for a collector on this host.
            .proxy(None);
        Plain(config.build().into())
    }
}

#[async_trait::async_trait]
impl HttpClient for Plain {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let mut answer = self.0.run(request.map(Vec::from))?;
        let body = answer.body_mut().with_config().limit(MOST_ANSWER).read_to_vec()?;
        Ok(Response::builder().status(answer.status()).body(body.into())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_http_is_an_endpoint() {
        for bad in ["", "127.0.0.1:4318", "https://collector:4318", "http://", "grpc://a:4317"] {
            assert!(matches!(provider(bad), Err(OtlpError::Endpoint(_))), "{bad}");
        }
        assert!(provider("http://127.0.0.1:4318/").is_ok());
    }
}
