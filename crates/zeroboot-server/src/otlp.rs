//! Spans to an OpenTelemetry collector: OTLP, protobuf over plain HTTP.

use std::{
    io::{self, Read as _, Write as _},
    net::{TcpStream, ToSocketAddrs as _},
    time::Duration,
};

use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};

/// For each step of a delivery. The exporter has a thread of its own; a collector that hangs costs spans, not execs.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of a collector's answer that are read, about.
const MOST_ANSWER: usize = 16 * 1024;

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
        .with_http_client(Plain)
        .with_endpoint(format!("http://{host}/v1/traces"))
        .build()
        .map_err(OtlpError::Exporter)?;
    let resource = Resource::builder().with_service_name("zeroboot").build();
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
}

/// One request on one connection: a batch every few seconds needs no client of fifty crates.
#[derive(Debug)]
struct Plain;

#[async_trait::async_trait]
impl HttpClient for Plain {
    /// Blocks: it is called on the exporter's own thread.
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let uri = request.uri();
        let host = uri.host().ok_or("an endpoint without a host")?;
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let address = (bare, uri.port_u16().unwrap_or(80)).to_socket_addrs()?.next();
        let address = address.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the collector has no address"))?;
        let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let authority = uri.authority().map_or(host, |authority| authority.as_str());
        let mut head = format!(
            "{} {path} HTTP/1.1\r\nhost: {authority}\r\nconnection: close\r\ncontent-length: {}\r\n",
            request.method(),
            request.body().len()
        )
        .into_bytes();
        for (name, value) in request.headers() {
            head.extend_from_slice(name.as_str().as_bytes());
            head.extend_from_slice(b": ");
            head.extend_from_slice(value.as_bytes());
            head.extend_from_slice(b"\r\n");
        }
        head.extend_from_slice(b"\r\n");
        stream.write_all(&head)?;
        stream.write_all(request.body())?;
        // As far as the end of its head: one that keeps the connection open is not waited for.
        let mut answer = Vec::new();
        let mut chunk = [0; 1024];
        while answer.len() < MOST_ANSWER && !answer.windows(4).any(|at| at == b"\r\n\r\n") {
            match stream.read(&mut chunk)? {
                0 => break,
                count => answer.extend_from_slice(chunk.get(..count).unwrap_or_default()),
            }
        }
        Ok(Response::builder()
            .status(status(&answer).ok_or("the collector's answer is not HTTP")?)
            .body(Bytes::new())?)
    }
}

/// Of `HTTP/1.1 200 OK`. What follows says nothing that a sender could use.
fn status(answer: &[u8]) -> Option<u16> {
    let line = answer.split(|byte| *byte == b'\r').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    words.next()?.strip_prefix("HTTP/1.")?;
    words.next()?.parse().ok()
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

    #[test]
    fn the_status_is_read_and_nothing_else() {
        assert_eq!(status(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"), Some(200));
        assert_eq!(status(b"HTTP/1.0 503 \r\n\r\n"), Some(503));
        assert_eq!(status(b"SSH-2.0-x\r\n"), None);
        assert_eq!(status(b""), None);
    }
}
