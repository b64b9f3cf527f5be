//! The code interpreter: `/execute` and `/contexts`.

use std::{collections::BTreeMap, panic::AssertUnwindSafe};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, StatusCode},
    response::Response,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures_util::FutureExt as _;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::time::{Duration, Instant};
use tracing::Instrument as _;
use uuid::Uuid;
use zeroboot_engine::{
    Attached, CellStatus, ContextInfo, ContextOp, DEFAULT_CONTEXT, Item, MAX_ENV, MimeBundle, RunEnd, RunEvent, RunHow,
    RunSpec, Sandbox,
};

use super::{HOME, Target, filesystem::shown, process::Stop};
use crate::{
    answer::Pieces,
    call::Call,
    error::{About, ApiError},
    params::InPath,
    routes::follow::refusal,
    sse::{self, Sender},
    wire::FewNamed,
};

/// How often a client is told that a silent cell lives.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

#[derive(Deserialize)]
struct ExecuteBody {
    code: String,
    context_id: Option<String>,
    language: Option<String>,
    env_vars: Option<FewNamed<String, MAX_ENV>>,
}

/// What runs a piece of code.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// An interpreter that keeps its state.
    Context(String),
    /// A program that reads the code; it keeps nothing.
    Program(&'static [&'static str]),
}

/// The language by the name that E2B has for it.
fn language(of_ours: &str) -> &str {
    if of_ours == "node" { "javascript" } else { of_ours }
}

/// Where code of a language runs in a sandbox whose template has another, or the same.
fn place(asked: Option<&str>, own: &str) -> Result<Place, ApiError> {
    let asked = match asked.unwrap_or(own).to_ascii_lowercase().as_str() {
        "js" | "javascript" | "node" => "node",
        "ts" | "typescript" => "typescript",
        "py" | "python" => "python",
        "bash" | "sh" => "bash",
        "r" => "r",
        "java" => "java",
        _ => "",
    };
    match asked {
        same if same == own => Ok(Place::Context(DEFAULT_CONTEXT.into())),
        "node" => Ok(Place::Program(&["node", "-"])),
        "python" => Ok(Place::Program(&["python3", "-"])),
        // The code has no input, as a cell has none.
        "bash" => Ok(Place::Program(&["bash", "-c", r#"eval "$(cat)""#])),
        "typescript" | "r" | "java" => Err(ApiError::new(
            "not_supported",
            format!("No interpreter for {asked} is in the sandbox; there are python, javascript and bash"),
        )),
        _ => Err(ApiError::new("unknown_language", "Unknown language; there are python, javascript and bash")),
    }
}

pub(crate) async fn execute(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let asked: ExecuteBody = call.body(&headers, body).await?;
    let env = asked.env_vars.map(|FewNamed(env)| env).unwrap_or_default();
    let place = match (asked.context_id, asked.language) {
        (Some(_), Some(_)) => {
            return Err(ApiError::new("invalid_request", "give either context_id or language, not both"));
        }
        (Some(name), None) => {
            // Once the answer has begun there is no other status.
            all(&sandbox).await?.iter().find(|context| context.name == name).ok_or_else(unknown)?;
            Place::Context(name)
        }
        (None, language) => place(language.as_deref(), sandbox.language())?,
    };
    if asked.code.is_empty() {
        return Err(ApiError::new("empty_code", "There is no code"));
    }
    let scope = match &place {
        Place::Context(name) if !env.is_empty() => Some(Variables::set(&sandbox, name, &env).await?),
        _ => None,
    };
    let code = Bytes::from(asked.code);
    let spec = match &place {
        Place::Context(name) => RunSpec::Cell { context: name.clone(), code: code.clone(), timeout: None },
        Place::Program(argv) => RunSpec::Command {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            env: env.into_iter().collect(),
            cwd: Some(HOME.into()),
            terminal: None,
            stdin: true,
            timeout: None,
            tag: None,
        },
    };
    let about = if scope.is_some() || matches!(place, Place::Context(_)) { About::Context } else { About::Command };
    let (run, attached) = sandbox.start_attached(spec).await.map_err(|error| ApiError::of_run(error, about))?;
    if matches!(place, Place::Program(_)) {
        let run = run.clone();
        tokio::spawn(async move {
            // A program that has ended needs no more.
            if run.write(code).await.is_ok() {
                run.close_stdin().unwrap_or_default();
            }
        });
    }
    let stall = call.limits().stall_timeout;
    let kind = HeaderValue::from_static("application/x-ndjson");
    let (sender, response) = sse::stream_of(kind, call.peer().clone(), call.share.clone(), stall, None);
    let request_id = call.request_id();
    let pump = async move {
        let _foreground = call.app.foreground();
        let passed = AssertUnwindSafe(pass_on(attached, &sender, about)).catch_unwind().await;
        match passed {
            Ok(Ok(())) => run.forget(),
            Ok(Err(Stop::Left)) => {
                // Nobody waits for it: it is interrupted. It may have ended meanwhile.
                run.close().unwrap_or_default();
            }
            Ok(Err(Stop::Failed(_, text))) => {
                let error = Line::Error { name: "SandboxError", value: &text, traceback: "" };
                sender.last_bytes(line(&error), request_id).await;
            }
            Err(_panic) => {
                let error = Line::Error { name: "SandboxError", value: "Internal error", traceback: "" };
                sender.last_bytes(line(&error), request_id).await;
            }
        }
        if let Some(scope) = scope {
            scope.reset().await;
        }
    };
    tokio::spawn(pump.in_current_span());
    Ok(response)
}

/// Environment variables of one cell: set before it in the interpreter's own process, and set back after it.
struct Variables {
    sandbox: Sandbox,
    context: String,
}

const SET_PYTHON: &str = "(lambda os, new: (os.__dict__.setdefault('_zeroboot_env', []).append(\
     {name: os.environ.get(name) for name in new}), os.environ.update(new), None)[2])(__import__('os'), ";
const RESET_PYTHON: &str = "(lambda os: ([os.environ.pop(name, None) if value is None else \
     os.environ.__setitem__(name, value) for name, value in os.__dict__['_zeroboot_env'].pop().items()], None)[1])\
     (__import__('os'))";
const SET_NODE: &str = "void ((next) => { (process._zerobootEnv ??= []).push(Object.keys(next).map((name) => \
     [name, process.env[name]])); Object.assign(process.env, next); })(";
const RESET_NODE: &str = "void ((last) => { for (const [name, value] of last) { if (value === undefined) \
     delete process.env[name]; else process.env[name] = value; } })(process._zerobootEnv.pop())";

impl Variables {
    async fn set(sandbox: &Sandbox, context: &str, env: &BTreeMap<String, String>) -> Result<Variables, ApiError> {
        // JSON's text is Python's and JavaScript's as well.
        let words = serde_json::to_string(env).map_err(|_| ApiError::internal())?;
        let begin = if sandbox.language() == "node" { SET_NODE } else { SET_PYTHON };
        let scope = Variables { sandbox: sandbox.clone(), context: context.into() };
        scope.run(format!("{begin}{words})")).await?;
        Ok(scope)
    }

    async fn run(&self, code: String) -> Result<(), ApiError> {
        let spec = RunSpec::Cell { context: self.context.clone(), code: code.into(), timeout: None };
        let run = self.sandbox.start(spec).await.map_err(|error| ApiError::of_run(error, About::Context))?;
        let end = run.wait().await;
        run.forget();
        refusal(&end, About::Context)
    }

    async fn reset(self) {
        let code = if self.sandbox.language() == "node" { RESET_NODE } else { RESET_PYTHON };
        // The sandbox, or the interpreter, may be gone, and the variables with it.
        self.run(code.into()).await.unwrap_or_default();
    }
}

/// A line of the answer.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line<'a> {
    NumberOfExecutions { execution_count: u32 },
    Stdout { text: &'a str, timestamp: String },
    Stderr { text: &'a str, timestamp: String },
    Error { name: &'a str, value: &'a str, traceback: &'a str },
    Keepalive,
    EndOfExecution,
}

fn line(line: &impl Serialize) -> Vec<u8> {
    // Text and numbers always have a form in JSON.
    let mut bytes = serde_json::to_vec(line).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// Text of one of the two streams; bytes that are not UTF-8 are replaced, since a line has no place for them.
async fn text(sender: &Sender, is_error: bool, text: &str) -> Result<(), Stop> {
    let timestamp = Timestamp::now().to_string();
    let said = if is_error { Line::Stderr { text, timestamp } } else { Line::Stdout { text, timestamp } };
    Ok(sender.held(line(&said)).await?)
}

async fn pass_on(mut attached: Attached, sender: &Sender, about: About) -> Result<(), Stop> {
    let mut alive = tokio::time::interval_at(Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
    // Bytes of characters that are not whole yet.
    let mut held = [Pieces::default(), Pieces::default()];
    // The code's own error says why it ended.
    let mut explained = false;
    loop {
        let next = tokio::select! {
            next = attached.next() => next,
            () = sender.closed() => return Err(Stop::Left),
            _ = alive.tick() => {
                sender.held(line(&Line::Keepalive)).await?;
                continue;
            }
        };
        let Some((_, event)) = next else { return Ok(()) };
        match event {
            RunEvent::Started(_) => {}
            RunEvent::Item(Item::Stdout(bytes)) => {
                if let Some(piece) = held[0].push(&bytes) {
                    text(sender, false, &piece.into_text()).await?;
                }
            }
            RunEvent::Item(Item::Stderr(bytes)) => {
                if let Some(piece) = held[1].push(&bytes) {
                    text(sender, true, &piece.into_text()).await?;
                }
            }
            RunEvent::Item(Item::Result(bundle)) => sender.held(line(&result(&bundle))).await?,
            RunEvent::Item(Item::Error(error)) => {
                explained = true;
                let said = Line::Error { name: &error.name, value: &error.value, traceback: &error.traceback };
                sender.held(line(&said)).await?;
            }
            RunEvent::Item(Item::Lost(bytes)) => {
                let value = format!("A result or output of {bytes} bytes was too large, and is not here");
                sender.held(line(&Line::Error { name: "ResultTooLarge", value: &value, traceback: "" })).await?;
            }
            RunEvent::End(end) => {
                for (is_error, held) in [false, true].into_iter().zip(&mut held) {
                    if let Some(rest) = held.finish() {
                        text(sender, is_error, &rest.into_text()).await?;
                    }
                }
                refusal(&end, about)?;
                return finish(sender, &end, explained).await;
            }
        }
    }
}

async fn finish(sender: &Sender, end: &RunEnd, explained: bool) -> Result<(), Stop> {
    let failed = |name: &'static str, value: String| Some((name, value));
    let error = match &end.how {
        RunHow::Cell { status, execution_count } => {
            sender.held(line(&Line::NumberOfExecutions { execution_count: *execution_count })).await?;
            (*status == CellStatus::Interrupted)
                .then(|| ("KeyboardInterrupt", "The execution was interrupted".to_owned()))
        }
        RunHow::Exited(0) if !end.context_lost => None,
        RunHow::Exited(code) if end.context_lost => {
            failed("ContextRestarting", format!("The interpreter exited with status {code}, and begins anew"))
        }
        RunHow::Exited(code) => failed("ExecutionError", format!("exit status {code}")),
        RunHow::Signaled(number) => failed("ContextRestarting", format!("A signal ({number}) killed the interpreter")),
        RunHow::OutOfMemory => failed("OutOfMemory", "The sandbox was out of memory, and the code was killed".into()),
        RunHow::DeadlinePassed => failed("TimeoutError", "The time of the code has passed".into()),
        RunHow::Closed => failed("KeyboardInterrupt", "The execution was stopped".into()),
        // They were said before.
        RunHow::Refused(..) | RunHow::Gone(_) => None,
    };
    if let Some((name, value)) = error.filter(|_| !explained) {
        sender.held(line(&Line::Error { name, value: &value, traceback: "" })).await?;
    }
    Ok(sender.held(line(&Line::EndOfExecution)).await?)
}

/// The fields that E2B has for MIME types. Everything else goes into `extra`.
const FIELDS: [(&str, &str); 12] = [
    ("text/plain", "text"),
    ("text/html", "html"),
    ("text/markdown", "markdown"),
    ("image/svg+xml", "svg"),
    ("image/png", "png"),
    ("image/jpeg", "jpeg"),
    ("application/pdf", "pdf"),
    ("text/latex", "latex"),
    ("application/json", "json"),
    ("application/javascript", "javascript"),
    ("application/vnd.zeroboot.data+json", "data"),
    ("application/vnd.zeroboot.chart+json", "chart"),
];

fn result(bundle: &MimeBundle) -> Value {
    let (mut told, mut extra) = (Map::new(), Map::new());
    told.insert("type".into(), json!("result"));
    told.insert("is_main_result".into(), json!(bundle.main));
    for (mime, data) in &bundle.parts {
        let value = value(mime, data);
        match FIELDS.iter().find(|(known, _)| known == mime) {
            Some((_, "text")) => told.insert("text".into(), unquoted(value)),
            Some((_, field)) => told.insert((*field).into(), value),
            None => extra.insert(mime.clone(), value),
        };
    }
    told.insert("extra".into(), Value::Object(extra));
    Value::Object(told)
}

fn value(mime: &str, data: &[u8]) -> Value {
    match std::str::from_utf8(data) {
        Ok(text) if mime.ends_with("json") => serde_json::from_str(text).unwrap_or_else(|_| json!(text)),
        Ok(text) if crate::sandbox_answer::is_text(mime) => json!(text),
        _ => json!(STANDARD.encode(data)),
    }
}

/// Text of a string's value without its quotes, as E2B tells it.
fn unquoted(value: Value) -> Value {
    let Value::String(text) = &value else { return value };
    let inner = ['\'', '"'].iter().find_map(|quote| text.strip_prefix(*quote)?.strip_suffix(*quote));
    match inner {
        Some(inner) => json!(inner),
        None => value,
    }
}

/// A context.
#[derive(Serialize)]
struct ContextBody<'a> {
    id: &'a str,
    language: &'a str,
    cwd: String,
}

fn told<'a>(context: &'a ContextInfo, sandbox: &'a Sandbox) -> ContextBody<'a> {
    ContextBody { id: &context.name, language: language(sandbox.language()), cwd: shown(&context.cwd) }
}

async fn ask(sandbox: &Sandbox, op: ContextOp) -> Result<Vec<ContextInfo>, ApiError> {
    sandbox.context(op).await.map_err(|error| ApiError::of_run(error, About::Context))
}

async fn all(sandbox: &Sandbox) -> Result<Vec<ContextInfo>, ApiError> {
    ask(sandbox, ContextOp::List).await
}

fn unknown() -> ApiError {
    ApiError::new("context_not_found", "The sandbox has no context of this id")
}

#[derive(Default, Deserialize)]
struct NewContext {
    language: Option<String>,
    cwd: Option<String>,
}

pub(crate) async fn create(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let NewContext { language: asked, cwd } = call.body(&headers, body).await?;
    if !matches!(place(asked.as_deref(), sandbox.language())?, Place::Context(_)) {
        let text = format!("Only {} keeps its state in this sandbox: no other context can be made", sandbox.language());
        return Err(ApiError::new("not_supported", text));
    }
    let name = Uuid::now_v7().simple().to_string();
    let cwd = cwd.unwrap_or_else(|| HOME.into());
    ask(&sandbox, ContextOp::Create { name: name.clone(), cwd: Some(cwd.clone()) }).await?;
    let body = ContextBody { id: &name, language: language(sandbox.language()), cwd };
    call.json(StatusCode::OK, &body)
}

pub(crate) async fn contexts(call: Call, Target(sandbox): Target) -> Result<Response, ApiError> {
    let all = all(&sandbox).await?;
    call.json(StatusCode::OK, &all.iter().map(|context| told(context, &sandbox)).collect::<Vec<_>>())
}

pub(crate) async fn restart(_call: Call, Target(sandbox): Target, path: InPath) -> Result<StatusCode, ApiError> {
    ask(&sandbox, ContextOp::Restart { name: path.get("name").into() }).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn remove(_call: Call, Target(sandbox): Target, path: InPath) -> Result<StatusCode, ApiError> {
    ask(&sandbox, ContextOp::Delete { name: path.get("name").into() }).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_language_runs_in_its_interpreter_or_as_a_program_or_not_at_all() {
        let context = || Place::Context(DEFAULT_CONTEXT.into());
        assert_eq!(place(None, "python").unwrap(), context());
        assert_eq!(place(Some("Python"), "python").unwrap(), context());
        assert_eq!(place(Some("js"), "node").unwrap(), context());
        assert_eq!(place(Some("javascript"), "python").unwrap(), Place::Program(&["node", "-"]));
        assert!(matches!(place(Some("bash"), "node").unwrap(), Place::Program(_)));
        for (other, code) in [("r", "not_supported"), ("java", "not_supported"), ("cobol", "unknown_language")] {
            assert_eq!(place(Some(other), "python").unwrap_err().code, code);
        }
    }

    #[test]
    fn a_result_has_e2bs_fields() {
        let part = |mime: &str, data: &'static [u8]| (mime.to_owned(), Bytes::from_static(data));
        let bundle = MimeBundle {
            main: true,
            parts: vec![
                part("text/plain", b"'hi'"),
                part("image/png", b"\x89PNG"),
                part("application/json", br#"{"a": 1}"#),
                part("application/vnd.zeroboot.data+json", br#"{"a": [1]}"#),
                part("application/x-own", b"x"),
            ],
        };
        let told = result(&bundle);
        let wanted = json!({
            "type": "result", "is_main_result": true, "text": "hi", "png": "iVBORw==", "json": {"a": 1},
            "data": {"a": [1]}, "extra": {"application/x-own": "eA=="},
        });
        assert_eq!(told, wanted);
        assert_eq!(unquoted(json!("'it'")), json!("it"));
        assert_eq!(unquoted(json!("'")), json!("'"));
    }
}
