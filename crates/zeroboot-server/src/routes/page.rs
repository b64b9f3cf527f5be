//! `GET /`: a page to try code in a browser. It has only files of ours, which are in the binary, and calls the API as any
//! client does.

use std::sync::Arc;

use axum::{
    extract::{Path, State},
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};

use crate::{app::App, error::ApiError};

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

const INDEX: (&str, &str) = (HTML, include_str!("../page/index.html"));
/// What the page loads: name, type, content.
const FILES: [(&str, &str, &str); 8] = [
    ("api.js", SCRIPT, include_str!("../page/api.js")),
    ("dom.js", SCRIPT, include_str!("../page/dom.js")),
    ("live.js", SCRIPT, include_str!("../page/live.js")),
    ("main.js", SCRIPT, include_str!("../page/main.js")),
    ("output.js", SCRIPT, include_str!("../page/output.js")),
    ("snippets.js", SCRIPT, include_str!("../page/snippets.js")),
    ("page.css", "text/css; charset=utf-8", include_str!("../page/page.css")),
    ("icon.svg", "image/svg+xml", include_str!("../page/icon.svg")),
];

/// Code comes from this server alone, nothing inline runs, and nothing is asked of any other server. What a sandbox gave
/// back is shown as text, or as an image out of `blob:`.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

const HEADERS: [(HeaderName, &str); 6] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    // The next version has other files under the same names.
    (header::CACHE_CONTROL, "no-cache"),
];

pub(crate) async fn index(State(app): State<Arc<App>>) -> Response {
    file(&app, Some(INDEX))
}

pub(crate) async fn asset(State(app): State<Arc<App>>, Path(name): Path<String>) -> Response {
    let found = FILES.iter().find(|(known, ..)| *known == name);
    file(&app, found.map(|(_, kind, content)| (*kind, *content)))
}

fn file(app: &App, found: Option<(&'static str, &'static str)>) -> Response {
    let Some((kind, content)) = found.filter(|_| app.config.page) else {
        return ApiError::new("not_found", "The API has no such path; see /docs").into_response();
    };
    let mut response = ([(header::CONTENT_TYPE, kind)], content).into_response();
    let headers = HEADERS.into_iter().map(|(name, value)| (name, HeaderValue::from_static(value)));
    response.headers_mut().extend(headers);
    response
}
