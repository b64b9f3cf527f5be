//! Errors as callers see them: one JSON shape, one stable code each, and the one map from the engine's errors.

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use uuid::Uuid;
use zeroboot_engine::{BranchError, EndReason, ExecError, InvalidRequest, Refusal, RunError};

/// Every code that an answer can carry, with its status and meaning: for the reference and the tests.
pub const ERROR_CODES: &[(&str, u16, &str)] = &[
    ("invalid_json", 400, "the body is not JSON"),
    ("invalid_request", 400, "a field is missing, unknown or of the wrong type; the text names it"),
    ("empty_code", 400, "the code is empty"),
    ("invalid_code", 400, "the code is too long, has a NUL byte, or is not UTF-8"),
    ("invalid_timeout", 400, "the timeout is zero, negative or above the maximum"),
    ("invalid_limits", 400, "a limit is zero or above the maximum"),
    ("invalid_env", 400, "an environment variable or argument cannot be passed to a process, or there are too many"),
    (
        "invalid_files",
        400,
        "a path leaves the working directory or is not a valid path, or there are too many files or bytes",
    ),
    ("unknown_language", 400, "no template serves this language"),
    ("unknown_template", 400, "no template has this name"),
    ("bad_path", 400, "the path or name is empty, too long or has a NUL byte"),
    ("cannot_start", 400, "the program could not be started; the text says why"),
    ("not_a_websocket", 400, "this path takes WebSocket requests only"),
    ("batch_too_large", 400, "the batch has more items than a batch may have"),
    ("unauthorized", 401, "the key is missing, unknown, revoked or expired"),
    ("forbidden_origin", 403, "a web page of another site may not use a server without keys"),
    ("forbidden_host", 403, "the Host of a request to a server without keys is neither an address nor localhost"),
    ("not_found", 404, "the API has no such path"),
    ("method_not_allowed", 405, "the path does not take this method"),
    ("body_timeout", 408, "the body took too long to arrive"),
    ("body_too_large", 413, "the body is above the limit"),
    ("unsupported_media_type", 415, "the Content-Type of the body is not application/json"),
    ("sandbox_not_found", 404, "no sandbox of this key has this id"),
    ("checkpoint_not_found", 404, "no checkpoint of this key has this id, or none is kept of the sandbox"),
    ("context_not_found", 404, "the sandbox has no context of this name"),
    ("run_not_found", 404, "the sandbox has no command of this id, or has forgotten it"),
    ("file_not_found", 404, "the sandbox has no file of this name"),
    ("not_allowed", 403, "the operation is not allowed; the code in the sandbox may not do it either"),
    ("context_exists", 409, "the sandbox already has a context of this name"),
    ("file_exists", 409, "the sandbox already has a file of this name"),
    ("wrong_kind", 409, "the path is a directory where a file is needed, or the reverse, or not a regular file"),
    ("not_empty", 409, "the directory is not empty"),
    ("run_ended", 409, "the command has ended"),
    (
        "cannot_branch",
        409,
        "the sandbox cannot be saved or promoted: its runtime is not Python, it lies 64 branches below its template, or it is not a branch",
    ),
    ("cannot_roll_back", 409, "the checkpoint is of another sandbox"),
    ("no_stdin", 409, "the command has no standard input, or it is closed"),
    ("no_terminal", 409, "the command has no terminal"),
    ("checkpoint_gone", 410, "the process that held the checkpoint has ended, and the checkpoint with it"),
    (
        "sandbox_gone",
        410,
        "the sandbox has ended; `reason` is lease_ended, idle, requested, lost, out_of_memory, shutting_down or replaced",
    ),
    ("range_not_satisfiable", 416, "the file has no bytes in this range"),
    ("rate_limited", 429, "too many requests of this key a second; see Retry-After"),
    ("concurrency_limited", 429, "too many execs of this key at once, or too much memory for them; see Retry-After"),
    ("too_many_sandboxes", 429, "this key already has its maximum of sandboxes"),
    ("too_many_checkpoints", 429, "this key, or the server, already has its maximum of checkpoints"),
    ("too_many_runs", 429, "the sandbox already has its maximum of runs and file operations"),
    ("too_many_streams", 429, "this key already has its maximum of open requests about sandboxes; see Retry-After"),
    ("internal", 500, "a fault of the server"),
    (
        "branch_failed",
        500,
        "the sandbox could not be saved, or gave no branch; it goes on unless `sandbox_gone` follows",
    ),
    ("operation_failed", 500, "the sandbox could not do it; the text says why"),
    ("sandbox_failed", 500, "the sandbox broke; the code may have run in part"),
    ("batch_output_limit", 500, "the batch reached its maximum of output before this item ended"),
    (
        "server_output_limit",
        500,
        "the server held its maximum for all callers, or half of it for this key, before this exec ended",
    ),
    ("needs_vm_engine", 501, "only a sandbox of the VM engine can do this; the text says why"),
    ("busy", 503, "every sandbox is in use, or the server holds its maximum of input and output; see Retry-After"),
    ("not_ready", 503, "the template cannot give a sandbox now; see Retry-After"),
    ("shutting_down", 503, "the server is shutting down; see Retry-After"),
    ("no_room", 507, "the sandbox has no room left: disk, processes, memory, descriptors or contexts"),
];

/// Codes of E2B's routes alone, with their status. There they are words of E2B's own (`e2b/errors.rs`).
const E2B_CODES: &[(&str, u16)] = &[("changes_lost", 500), ("not_supported", 501)];

/// An answer that is not 200.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) code: &'static str,
    pub(crate) message: String,
    pub(crate) retry_after: Option<Duration>,
    /// Why a sandbox has ended.
    pub(crate) reason: Option<&'static str>,
}

/// The body of such an answer.
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = Error)]
pub(crate) struct ErrorBody<'a> {
    /// What went wrong, for people.
    pub(crate) error: &'a str,
    /// What went wrong, for programs; stable.
    pub(crate) code: &'a str,
    /// Also in the header `X-Request-Id` and in the server's log.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = true, nullable = false)]
    pub(crate) request_id: Option<Uuid>,
    /// With `sandbox_gone`: why the sandbox ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<crate::sandbox_answer::EndReasonName>, nullable = false)]
    pub(crate) reason: Option<&'static str>,
}

impl ApiError {
    /// The status is the one that [`ERROR_CODES`], or [`E2B_CODES`], has for the code.
    pub(crate) fn new(code: &'static str, message: impl Into<String>) -> ApiError {
        let own = ERROR_CODES.iter().map(|(known, status, _)| (*known, *status));
        let known = own.chain(E2B_CODES.iter().copied()).find(|(known, _)| *known == code);
        debug_assert!(known.is_some(), "{code} is missing in ERROR_CODES");
        let status = known.and_then(|(_, status)| StatusCode::from_u16(status).ok());
        let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        ApiError { status, code, message: message.into(), retry_after: None, reason: None }
    }

    pub(crate) fn retry_after(mut self, wait: Duration) -> ApiError {
        self.retry_after = Some(wait);
        self
    }

    pub(crate) fn internal() -> ApiError {
        ApiError::new("internal", "Internal error")
    }

    pub(crate) fn body(&self, request_id: Option<Uuid>) -> ErrorBody<'_> {
        ErrorBody { error: &self.message, code: self.code, request_id, reason: self.reason }
    }

    /// The whole answer. Handlers return the error itself; the outermost layer, which knows the id, calls this.
    pub(crate) fn render(&self, request_id: Uuid, mut response: Response) -> Response {
        let body = serde_json::to_vec(&self.body(Some(request_id))).unwrap_or_default();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response.headers_mut().remove(header::CONTENT_LENGTH);
        *response.body_mut() = Body::from(body);
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        let headers = response.headers_mut();
        if let Some(wait) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(whole_seconds(wait)));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(self);
        response
    }
}

/// Whole seconds, rounded up, at least one: what `Retry-After` can say.
pub(crate) fn whole_seconds(wait: Duration) -> u64 {
    (wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(1)
}

impl From<ExecError> for ApiError {
    fn from(error: ExecError) -> ApiError {
        match error {
            ExecError::Invalid(invalid) => ApiError::new(invalid_code(&invalid), invalid.to_string()),
            ExecError::UnknownTemplate(_) => ApiError::new("unknown_template", error.to_string()),
            ExecError::Busy { retry_after, .. } => {
                ApiError::new("busy", "All sandboxes are in use").retry_after(retry_after)
            }
            ExecError::TooManySandboxes(_) => ApiError::new("too_many_sandboxes", error.to_string()),
            ExecError::NotReady { ref template, .. } => {
                ApiError::new("not_ready", format!("Template {template} is not ready"))
                    .retry_after(Duration::from_secs(1))
            }
            ExecError::ShuttingDown => {
                ApiError::new("shutting_down", "The server is shutting down").retry_after(Duration::from_secs(1))
            }
            // The engine's words are for the log: they name processes and paths of the host.
            ExecError::Sandbox(_) => {
                ApiError::new("sandbox_failed", "The sandbox failed; the code may have run in part")
            }
            _ => ApiError::internal(),
        }
    }
}

impl From<BranchError> for ApiError {
    fn from(error: BranchError) -> ApiError {
        let code = match error {
            BranchError::Exec(error) => return ApiError::from(error),
            BranchError::Gone(reason) => return ApiError::gone(reason),
            // The engine's words are for the log.
            BranchError::Failed(_) => return ApiError::new("branch_failed", "The sandbox could not be branched"),
            BranchError::NeedsVmEngine => "needs_vm_engine",
            BranchError::SameRandomness(_) | BranchError::TooDeep | BranchError::NotABranch => "cannot_branch",
            // The same.
            BranchError::CheckpointGone(_) => {
                return ApiError::new("checkpoint_gone", "The process that held the checkpoint has ended");
            }
            BranchError::TooManyCheckpoints(_) => "too_many_checkpoints",
            BranchError::OfAnother => "cannot_roll_back",
            BranchError::NoCheckpoint => "checkpoint_not_found",
            _ => return ApiError::internal(),
        };
        ApiError::new(code, error.to_string())
    }
}

/// What a refusal of a sandbox is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum About {
    Command,
    Context,
    File,
}

impl ApiError {
    /// The sandbox has ended.
    pub(crate) fn gone(reason: EndReason) -> ApiError {
        let text = match reason {
            EndReason::LeaseEnded => "The sandbox's lease has ended",
            EndReason::Idle => "The sandbox was idle for its idle timeout",
            EndReason::Requested => "The sandbox was deleted",
            EndReason::Lost => "The sandbox broke",
            EndReason::OutOfMemory => "The sandbox ran out of memory and was ended",
            EndReason::ShuttingDown => "The server is shutting down, and ended the sandbox",
            EndReason::Replaced => "The sandbox was rolled back, or a branch took over its id: ask again",
        };
        ApiError { reason: Some(reason.as_str()), ..ApiError::new("sandbox_gone", text) }
    }

    /// Something in a sandbox was not done.
    pub(crate) fn of_run(error: RunError, about: About) -> ApiError {
        let code = match &error {
            RunError::Gone(reason) => return ApiError::gone(*reason),
            RunError::Invalid(invalid) => invalid_code(invalid),
            RunError::Refused(refusal, _) => return ApiError::refused(*refusal, &error.to_string(), about),
            RunError::TooMany(_) => "too_many_runs",
            RunError::Ended => "run_ended",
            RunError::NoStdin => "no_stdin",
            RunError::NoTerminal => "no_terminal",
            RunError::BadSignal(_) => "invalid_request",
            _ => return ApiError::internal(),
        };
        ApiError::new(code, error.to_string())
    }

    /// The sandbox's own words: what it was asked is the caller's.
    pub(crate) fn refused(refusal: Refusal, text: &str, about: About) -> ApiError {
        let code = match (refusal, about) {
            (Refusal::NotFound, About::Context) => "context_not_found",
            (Refusal::NotFound, About::File) => "file_not_found",
            (Refusal::NotFound | Refusal::CannotStart, About::Command) => "cannot_start",
            (Refusal::CannotStart, _) => "operation_failed",
            (Refusal::Exists, About::Context) => "context_exists",
            (Refusal::Exists, _) => "file_exists",
            (Refusal::NotAllowed, _) => "not_allowed",
            (Refusal::WrongKind, _) => "wrong_kind",
            (Refusal::NotEmpty, _) => "not_empty",
            (Refusal::NoRoom, _) => "no_room",
            (Refusal::BadName, _) => "bad_path",
            (Refusal::Failed, _) => "operation_failed",
        };
        ApiError::new(code, text)
    }
}

fn invalid_code(error: &InvalidRequest) -> &'static str {
    use InvalidRequest as E;
    match error {
        E::EmptyCode => "empty_code",
        E::CodeTooLong(_) | E::CodeHasNul(_) | E::CodeNotUtf8(_) => "invalid_code",
        E::ZeroTimeout | E::LeaseTooLong(_) => "invalid_timeout",
        E::TooMuchMemory { .. } => "invalid_limits",
        E::BadEnv(_) | E::EnvTooLong(_) | E::BadArgument | E::TooManyVariables => "invalid_env",
        E::BadDirectory => "bad_path",
        E::FilesTooLarge(_) | E::BadPath(_) | E::TooManyFiles | E::FileAndFolder(_) => "invalid_files",
        _ => "invalid_request",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_callers_mistakes_are_4xx_and_ours_5xx() {
        let cases = [
            (ExecError::Invalid(InvalidRequest::EmptyCode), 400, "empty_code"),
            (ExecError::Invalid(InvalidRequest::BadPath("..".into())), 400, "invalid_files"),
            (ExecError::UnknownTemplate("x".into()), 400, "unknown_template"),
            (ExecError::Busy { live: 3, retry_after: Duration::from_millis(1500) }, 503, "busy"),
            (ExecError::NotReady { template: "python".into(), reason: "/secret/path".into() }, 503, "not_ready"),
            (ExecError::Sandbox("pid 3 /secret/path".into()), 500, "sandbox_failed"),
            (ExecError::ShuttingDown, 503, "shutting_down"),
        ];
        for (error, status, code) in cases {
            let api = ApiError::from(error);
            assert_eq!((api.status.as_u16(), api.code), (status, code));
            assert!(!api.message.contains("/secret"), "{}", api.message);
            assert_eq!(api.retry_after.is_some(), status == 503);
        }
    }

    #[test]
    fn why_there_is_no_branch_is_told_without_the_hosts_words() {
        let cases = [
            (BranchError::NeedsVmEngine, 501, "needs_vm_engine"),
            (BranchError::SameRandomness("node".into()), 409, "cannot_branch"),
            (BranchError::TooDeep, 409, "cannot_branch"),
            (BranchError::NotABranch, 409, "cannot_branch"),
            (BranchError::OfAnother, 409, "cannot_roll_back"),
            (BranchError::NoCheckpoint, 404, "checkpoint_not_found"),
            (BranchError::TooManyCheckpoints(3), 429, "too_many_checkpoints"),
            (BranchError::CheckpointGone("pid 3 /secret/path".into()), 410, "checkpoint_gone"),
            (BranchError::Gone(EndReason::Idle), 410, "sandbox_gone"),
            (BranchError::Failed("pid 3 /secret/path".into()), 500, "branch_failed"),
            (BranchError::Exec(ExecError::TooManySandboxes(3)), 429, "too_many_sandboxes"),
        ];
        for (error, status, code) in cases {
            let api = ApiError::from(error);
            assert_eq!((api.status.as_u16(), api.code), (status, code));
            assert!(!api.message.contains("/secret"), "{}", api.message);
        }
    }

    #[test]
    fn retry_after_is_never_zero_and_never_too_short() {
        assert_eq!(whole_seconds(Duration::ZERO), 1);
        assert_eq!(whole_seconds(Duration::from_millis(1)), 1);
        assert_eq!(whole_seconds(Duration::from_millis(1001)), 2);
        assert_eq!(whole_seconds(Duration::from_secs(2)), 2);
    }

    #[test]
    fn the_reference_explains_every_code() {
        let reference = include_str!("../../../docs/api.md");
        for (code, status, meaning) in ERROR_CODES {
            assert!(reference.contains(&format!("| `{code}` | {status} | {meaning} |")), "docs/api.md lacks {code}");
        }
    }
}
