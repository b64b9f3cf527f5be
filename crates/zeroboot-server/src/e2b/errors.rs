//! Errors as E2B's SDKs read them.

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::Response,
};
use serde_json::json;

use crate::error::ApiError;

/// How an error is written: which of E2B's services is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// `{"code": status, "message"}`.
    Control,
    /// The same, and a sandbox that is gone is 502.
    Sandbox,
    /// `{"code": word, "message"}`.
    Connect,
}

/// What Connect calls it.
pub(crate) fn connect_code(error: &ApiError) -> &'static str {
    match (error.code, error.status.as_u16()) {
        ("sandbox_gone" | "sandbox_not_found", _) => "unavailable",
        ("body_timeout", _) => "deadline_exceeded",
        ("changes_lost", _) => "data_loss",
        ("context_exists" | "file_exists", _) => "already_exists",
        ("run_ended" | "run_not_found", _) => "not_found",
        ("no_stdin" | "no_terminal" | "not_empty", _) => "failed_precondition",
        (_, 400 | 409 | 415 | 416) => "invalid_argument",
        (_, 401) => "unauthenticated",
        (_, 403) => "permission_denied",
        (_, 404 | 405) => "not_found",
        (_, 413 | 429 | 507) => "resource_exhausted",
        (_, 501) => "unimplemented",
        (_, 502 | 503) => "unavailable",
        _ => "internal",
    }
}

/// The status that the Connect protocol has for a code.
fn status_of(code: &str) -> StatusCode {
    match code {
        "invalid_argument" | "failed_precondition" => StatusCode::BAD_REQUEST,
        "unauthenticated" => StatusCode::UNAUTHORIZED,
        "permission_denied" => StatusCode::FORBIDDEN,
        "not_found" => StatusCode::NOT_FOUND,
        "already_exists" => StatusCode::CONFLICT,
        "resource_exhausted" => StatusCode::TOO_MANY_REQUESTS,
        "unimplemented" => StatusCode::NOT_IMPLEMENTED,
        "unavailable" => StatusCode::SERVICE_UNAVAILABLE,
        "deadline_exceeded" => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The whole answer.
pub(crate) fn render(form: Form, error: &ApiError, mut response: Response) -> Response {
    let gone = matches!(error.code, "sandbox_gone" | "sandbox_not_found");
    let (status, body) = match form {
        // Their gateway's answer for it: the SDKs look for the status and for these words.
        Form::Sandbox | Form::Connect if gone => (
            StatusCode::BAD_GATEWAY,
            json!({"code": 502, "message": format!("The sandbox was not found: {}", error.message)}),
        ),
        Form::Connect => {
            let code = connect_code(error);
            (status_of(code), json!({"code": code, "message": error.message}))
        }
        Form::Control if gone => (StatusCode::NOT_FOUND, json!({"code": 404, "message": error.message})),
        // A template that is not there is not the request's form.
        Form::Control if error.code == "unknown_template" => {
            (StatusCode::NOT_FOUND, json!({"code": 404, "message": error.message}))
        }
        Form::Control | Form::Sandbox => {
            (error.status, json!({"code": error.status.as_u16(), "message": error.message}))
        }
    };
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().remove(header::CONTENT_LENGTH);
    *response.body_mut() = Body::from(body.to_string());
    response
}
