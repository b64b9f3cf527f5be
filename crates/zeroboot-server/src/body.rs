//! Bodies of requests and answers.

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Body as _;
use serde::Serialize;

use crate::{
    budget::{Full, Share},
    config::RequestLimits,
    error::ApiError,
};

/// Whether the client asks for events.
pub(crate) fn wants_stream(headers: &HeaderMap) -> bool {
    wants(headers, "text/event-stream")
}

/// Whether the client asks for bytes as they are.
pub(crate) fn wants_bytes(headers: &HeaderMap) -> bool {
    wants(headers, "application/octet-stream")
}

fn wants(headers: &HeaderMap, wanted: &str) -> bool {
    let accepts = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepts.flat_map(|line| line.split(',')).any(|word| {
        let kind = word.split(';').next().unwrap_or_default().trim();
        kind.eq_ignore_ascii_case(wanted)
    })
}

/// The next bytes of a body that is passed on as it comes; `None` at its end.
pub(crate) async fn next_bytes(body: &mut Body, limits: &RequestLimits) -> Result<Option<Bytes>, ApiError> {
    loop {
        let frame = tokio::time::timeout(limits.body_timeout, body.frame()).await.map_err(|_| too_slow())?;
        let Some(frame) = frame else { return Ok(None) };
        if let Ok(data) = frame.map_err(|_| not_whole())?.into_data() {
            return Ok(Some(data));
        }
    }
}

fn too_slow() -> ApiError {
    ApiError::new("body_timeout", "The body took too long to arrive")
}

fn not_whole() -> ApiError {
    ApiError::new("invalid_request", "The body did not arrive whole")
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
    read_whole(body, limits, share).await
}

/// Reads a body of any type: below the limit, in time, and as long as there is room for it.
pub(crate) async fn read_whole(body: Body, limits: &RequestLimits, share: &Share) -> Result<Vec<u8>, ApiError> {
    let read = tokio::time::timeout(limits.body_timeout, read_frames(body, limits.max_body, share)).await;
    read.map_err(|_| too_slow())?
}

async fn read_frames(mut body: Body, most: usize, share: &Share) -> Result<Vec<u8>, ApiError> {
    let too_large = || ApiError::new("body_too_large", format!("The body is larger than {most} bytes"));
    if body.size_hint().lower() > most as u64 {
        return Err(too_large());
    }
    let mut whole = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| not_whole())?;
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
