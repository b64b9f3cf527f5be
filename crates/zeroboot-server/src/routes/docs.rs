//! `GET /openapi.json` and `GET /docs`.

use axum::{
    http::header,
    response::{IntoResponse, Response},
};

/// The committed document; a test compares it with the one that the types give.
pub(crate) const OPENAPI: &str = include_str!("../../../../openapi/zeroboot.json");
/// One page without anything from elsewhere, so that it works offline.
const PAGE: &str = include_str!("docs.html");
/// Nothing may be loaded, nothing may run: the page is text.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

pub(crate) async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}

pub(crate) async fn page() -> Response {
    ([(header::CONTENT_TYPE, "text/html; charset=utf-8"), (header::CONTENT_SECURITY_POLICY, POLICY)], PAGE)
        .into_response()
}
