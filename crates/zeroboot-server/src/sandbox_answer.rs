//! Answers about long-lived sandboxes, as they go over the wire.

use std::{collections::BTreeMap, time::SystemTime};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use serde::{Serialize, Serializer, ser::SerializeMap as _};
use utoipa::ToSchema;
use uuid::Uuid;
use zeroboot_engine::{
    CellError, CellStatus, Change, ChangeKind, Checkpoint, ContextInfo, Entry, EntryKind, MimeBundle, RunEnd, RunHow,
    RunKind, RunStatus, Sandbox,
};

use crate::answer::{EncodingBody, Text, milliseconds};

/// A long-lived sandbox.
#[derive(Serialize, ToSchema)]
#[schema(as = Sandbox)]
pub(crate) struct SandboxBody<'a> {
    /// UUIDv7.
    id: Uuid,
    template: &'a str,
    language: &'a str,
    /// The engine between the code and the host.
    #[schema(value_type = crate::answer::IsolationName)]
    isolation: &'static str,
    /// Always `running`: for a sandbox that has ended the answer is 410.
    #[schema(value_type = SandboxState)]
    state: &'static str,
    /// RFC 3339.
    #[schema(format = DateTime)]
    created_at: String,
    /// When its lease ends, RFC 3339.
    #[schema(format = DateTime)]
    expires_at: String,
    idle_timeout_seconds: Option<f64>,
    metadata: &'a BTreeMap<String, String>,
    limits: SandboxLimitsBody,
    /// Whether it was waiting in a pool.
    pooled: bool,
    /// Time until it was ready, milliseconds.
    fork_time_ms: f64,
    /// Number of runs that have not ended.
    runs: usize,
    /// The sandbox that it is a branch of.
    branch_of: Option<Uuid>,
    /// The last checkpoint that was made of it, or that it began at.
    checkpoint_id: Option<Uuid>,
}

#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) enum SandboxState {
    Running,
}

#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
#[expect(dead_code, reason = "only its schema is used; a test compares it with EndReason::ALL")]
pub(crate) enum EndReasonName {
    LeaseEnded,
    Idle,
    Requested,
    Lost,
    OutOfMemory,
    ShuttingDown,
    Replaced,
}

/// What a sandbox may use.
#[derive(Serialize, ToSchema)]
#[schema(as = SandboxLimits)]
pub(crate) struct SandboxLimitsBody {
    memory_mb: u64,
    processes: u32,
    /// Size of the largest file that can be written, bytes.
    file_size_mb: u64,
    /// Most open descriptors of one process.
    open_files: u32,
}

const MIB: u64 = 1024 * 1024;

impl SandboxBody<'_> {
    pub(crate) fn of(sandbox: &Sandbox) -> SandboxBody<'_> {
        let limits = sandbox.limits();
        SandboxBody {
            id: sandbox.id(),
            template: sandbox.template(),
            language: sandbox.language(),
            isolation: sandbox.isolation().as_str(),
            state: "running",
            created_at: rfc3339(sandbox.created_at()),
            expires_at: rfc3339(sandbox.expires_at()),
            idle_timeout_seconds: sandbox.idle_timeout().map(|time| time.as_secs_f64()),
            metadata: sandbox.metadata(),
            limits: SandboxLimitsBody {
                memory_mb: limits.memory / MIB,
                processes: limits.processes,
                file_size_mb: limits.file_size / MIB,
                open_files: limits.open_files,
            },
            pooled: sandbox.pooled(),
            fork_time_ms: milliseconds(sandbox.fork_time()),
            runs: sandbox.activity().runs,
            branch_of: sandbox.origin(),
            checkpoint_id: sandbox.checkpointed(),
        }
    }
}

/// The sandboxes of a key.
#[derive(Serialize, ToSchema)]
#[schema(as = SandboxList)]
pub(crate) struct SandboxList<'a> {
    /// The oldest first.
    pub(crate) sandboxes: Vec<SandboxBody<'a>>,
    /// If there are more: the `cursor` of the next request.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub(crate) next_cursor: Option<Uuid>,
}

/// A moment of a sandbox that is kept.
#[derive(Serialize, ToSchema)]
#[schema(as = Checkpoint)]
pub(crate) struct CheckpointAnswer<'a> {
    /// UUIDv7.
    id: Uuid,
    /// The sandbox that it is of.
    sandbox_id: Uuid,
    /// The checkpoint that its sandbox had come from: checkpoints are trees.
    parent_id: Option<Uuid>,
    template: &'a str,
    /// RFC 3339.
    #[schema(format = DateTime)]
    created_at: String,
    /// When it is removed, RFC 3339.
    #[schema(format = DateTime)]
    expires_at: String,
    metadata: &'a BTreeMap<String, String>,
    /// Bytes of memory that it adds to what its sandbox was forked from.
    memory_bytes: u64,
}

impl CheckpointAnswer<'_> {
    pub(crate) fn of(checkpoint: &Checkpoint) -> CheckpointAnswer<'_> {
        CheckpointAnswer {
            id: checkpoint.id(),
            sandbox_id: checkpoint.sandbox(),
            parent_id: checkpoint.parent(),
            template: checkpoint.template(),
            created_at: rfc3339(checkpoint.created_at()),
            expires_at: rfc3339(checkpoint.expires_at()),
            metadata: checkpoint.metadata(),
            memory_bytes: checkpoint.bytes(),
        }
    }
}

/// The checkpoints of a key.
#[derive(Serialize, ToSchema)]
#[schema(as = CheckpointList)]
pub(crate) struct CheckpointList<'a> {
    /// The oldest first.
    pub(crate) checkpoints: Vec<CheckpointAnswer<'a>>,
}

fn rfc3339(time: SystemTime) -> String {
    // A time that no clock of ours shows.
    Timestamp::try_from(time).unwrap_or_default().to_string()
}

fn rfc3339_ms(ms: i64) -> String {
    // Any program can set a file's time; not each is a date.
    Timestamp::from_millisecond(ms).unwrap_or_default().to_string()
}

/// Most bytes of JSON that is sent as a value. Longer JSON stays text: as a value it takes many times its bytes.
const MOST_JSON: usize = 1024 * 1024;

/// A result: its types by name, text as it is, JSON as JSON, and everything else in base64.
#[derive(Debug)]
pub(crate) struct ResultBody<'a>(pub(crate) &'a MimeBundle);

/// Schema of [`ResultBody`].
#[derive(ToSchema)]
#[schema(as = Result)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) struct ResultSchema {
    /// Whether this is the value of the cell's last expression. Otherwise the cell displayed it.
    is_main: bool,
    #[serde(rename = "text/plain")]
    text_plain: Option<String>,
    #[serde(rename = "text/html")]
    text_html: Option<String>,
    #[serde(rename = "text/markdown")]
    text_markdown: Option<String>,
    #[serde(rename = "text/latex")]
    text_latex: Option<String>,
    #[serde(rename = "image/svg+xml")]
    image_svg: Option<String>,
    /// Base64.
    #[serde(rename = "image/png")]
    image_png: Option<String>,
    /// Base64.
    #[serde(rename = "image/jpeg")]
    image_jpeg: Option<String>,
    /// Base64.
    #[serde(rename = "application/pdf")]
    application_pdf: Option<String>,
    #[serde(rename = "application/javascript")]
    application_javascript: Option<String>,
    /// The value itself.
    #[serde(rename = "application/json")]
    application_json: Option<serde_json::Value>,
}

impl Serialize for ResultBody<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.parts.len() + 1))?;
        map.serialize_entry("is_main", &self.0.main)?;
        for (mime, data) in &self.0.parts {
            // Its own word would be taken for ours.
            if mime == "is_main" {
                continue;
            }
            match std::str::from_utf8(data) {
                Ok(text) if mime == "application/json" && text.len() <= MOST_JSON => {
                    match serde_json::from_str::<serde_json::Value>(text) {
                        Ok(value) => map.serialize_entry(mime, &value)?,
                        Err(_) => map.serialize_entry(mime, text)?,
                    }
                }
                Ok(text) if is_text(mime) => map.serialize_entry(mime, text)?,
                _ => map.serialize_entry(mime, &STANDARD.encode(data))?,
            }
        }
        map.end()
    }
}

pub(crate) fn is_text(mime: &str) -> bool {
    mime.starts_with("text/")
        || matches!(mime, "image/svg+xml" | "application/javascript" | "application/json")
        || mime.ends_with("+json")
        || mime.ends_with("+xml")
}

/// The text that represents a result.
pub(crate) fn plain_text(bundle: &MimeBundle) -> Option<String> {
    let (_, data) = bundle.parts.iter().find(|(mime, _)| mime == "text/plain")?;
    Some(String::from_utf8_lossy(data).into_owned())
}

/// An uncaught error.
#[derive(Serialize, ToSchema)]
#[schema(as = CellError)]
pub(crate) struct CellErrorBody<'a> {
    /// Its type, such as `ValueError`.
    name: &'a str,
    value: &'a str,
    traceback: &'a str,
}

impl<'a> CellErrorBody<'a> {
    pub(crate) fn of(error: &'a CellError) -> CellErrorBody<'a> {
        CellErrorBody { name: &error.name, value: &error.value, traceback: &error.traceback }
    }
}

/// How a run ended.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RunEnd)]
pub(crate) struct RunEndBody {
    /// A cell is `ok`, `error` or `interrupted`, or its interpreter ended as a command does. A command `exited`, was
    /// `signaled`, ran `deadline_passed` or `out_of_memory`, or was `closed`.
    #[schema(value_type = RunOutcomeName)]
    outcome: &'static str,
    /// The program's own status; 128 + signal; 124 on timeout; 137 if it was killed for another reason.
    exit_code: i32,
    /// The signal that ended it.
    signal: Option<i32>,
    /// A cell's number in its context; the first is 1.
    execution_count: Option<u32>,
    /// Whether the cell's interpreter ended and its state is lost. The next cell of the context gets a new one.
    context_lost: bool,
    wall_time_ms: f64,
}

#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) enum RunOutcomeName {
    Ok,
    Error,
    Interrupted,
    Exited,
    Signaled,
    DeadlinePassed,
    OutOfMemory,
    Closed,
}

impl RunEndBody {
    pub(crate) fn of(end: &RunEnd) -> RunEndBody {
        let (outcome, exit_code) = match &end.how {
            RunHow::Cell { status: CellStatus::Ok, .. } => ("ok", 0),
            RunHow::Cell { status: CellStatus::Error, .. } => ("error", 1),
            RunHow::Cell { status: CellStatus::Interrupted, .. } => ("interrupted", 130),
            RunHow::Exited(code) => ("exited", *code),
            RunHow::Signaled(signal) => ("signaled", 128 + signal),
            RunHow::DeadlinePassed => ("deadline_passed", 124),
            RunHow::OutOfMemory => ("out_of_memory", 137),
            // The last two are answered as errors.
            RunHow::Closed | RunHow::Refused(..) | RunHow::Gone(_) => ("closed", 137),
        };
        RunEndBody {
            outcome,
            exit_code,
            signal: if let RunHow::Signaled(signal) = end.how { Some(signal) } else { None },
            execution_count: match end.how {
                RunHow::Cell { execution_count, .. } => Some(execution_count),
                _ => None,
            },
            context_lost: end.context_lost,
            wall_time_ms: milliseconds(end.wall),
        }
    }
}

/// A run's output, gathered.
#[derive(Serialize, ToSchema)]
#[schema(as = Output)]
pub(crate) struct OutputBody<'a> {
    /// Standard output, exactly; base64 if `encoding.stdout` says so.
    stdout: &'a str,
    /// Standard error, exactly; base64 if `encoding.stderr` says so.
    stderr: &'a str,
    encoding: EncodingBody,
    /// Whether there was more output than one answer brings.
    truncated: bool,
    /// The offset at which its output ends, for `…/output?offset=`.
    output_offset: u64,
}

impl<'a> OutputBody<'a> {
    pub(crate) fn of(stdout: &'a Text, stderr: &'a Text, truncated: bool, output_offset: u64) -> OutputBody<'a> {
        let encoding = EncodingBody { stdout: stdout.encoding, stderr: stderr.encoding };
        OutputBody { stdout: &stdout.text, stderr: &stderr.text, encoding, truncated, output_offset }
    }
}

/// The result of a cell. The status is 200 even if the cell failed; `outcome` says so.
#[derive(Serialize, ToSchema)]
#[schema(as = CellAnswer)]
pub(crate) struct CellAnswer<'a> {
    pub(crate) id: Uuid,
    pub(crate) context: &'a str,
    #[serde(flatten)]
    pub(crate) end: RunEndBody,
    #[serde(flatten)]
    pub(crate) output: OutputBody<'a>,
    /// What the cell showed, in order.
    #[schema(value_type = Vec<ResultSchema>)]
    pub(crate) results: Vec<ResultBody<'a>>,
    /// The text of the last expression's value.
    pub(crate) value: Option<String>,
    /// The uncaught error of the cell.
    pub(crate) error: Option<CellErrorBody<'a>>,
}

/// The result of a command. The status is 200 whatever the program's status is; `exit_code` has that.
#[derive(Serialize, ToSchema)]
#[schema(as = CommandAnswer)]
pub(crate) struct CommandAnswer<'a> {
    pub(crate) id: Uuid,
    pub(crate) pid: Option<u32>,
    #[serde(flatten)]
    pub(crate) end: RunEndBody,
    #[serde(flatten)]
    pub(crate) output: OutputBody<'a>,
}

/// A command as it is now.
#[derive(Serialize, ToSchema)]
#[schema(as = Command)]
pub(crate) struct CommandBodyOut<'a> {
    id: Uuid,
    /// Its process id inside the sandbox.
    pid: Option<u32>,
    tag: Option<&'a str>,
    argv: &'a [String],
    /// Whether it has a terminal.
    terminal: bool,
    #[schema(value_type = CommandState)]
    state: &'static str,
    #[serde(flatten)]
    end: Option<RunEndBody>,
    /// The offset at which its output ends.
    output_offset: u64,
    /// The offset at which the output that the server still holds begins.
    first_offset: u64,
    /// RFC 3339.
    #[schema(format = DateTime)]
    started_at: String,
}

#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) enum CommandState {
    Running,
    Ended,
}

impl<'a> CommandBodyOut<'a> {
    /// `None`: it is a cell.
    pub(crate) fn of(status: &'a RunStatus) -> Option<CommandBodyOut<'a>> {
        let RunKind::Command { argv, tag, terminal } = &status.kind else { return None };
        Some(CommandBodyOut {
            id: status.id,
            pid: status.pid,
            tag: tag.as_deref(),
            argv,
            terminal: *terminal,
            state: if status.end.is_some() { "ended" } else { "running" },
            end: status.end.as_ref().map(RunEndBody::of),
            output_offset: status.offset,
            first_offset: status.first_offset,
            started_at: rfc3339(status.asked_at),
        })
    }
}

/// The commands of a sandbox: those that run, and the last that have ended.
#[derive(Serialize, ToSchema)]
#[schema(as = CommandList)]
pub(crate) struct CommandList<'a> {
    /// The oldest first.
    pub(crate) commands: Vec<CommandBodyOut<'a>>,
}

/// A context as it is now.
#[derive(Serialize, ToSchema)]
#[schema(as = Context)]
pub(crate) struct ContextBodyOut<'a> {
    name: &'a str,
    cwd: &'a str,
    /// Whether a cell runs in it.
    busy: bool,
    /// Number of cells that wait for it.
    waiting: u32,
    /// Number of cells that its interpreter has begun.
    executions: u32,
}

impl<'a> ContextBodyOut<'a> {
    pub(crate) fn of(info: &'a ContextInfo) -> ContextBodyOut<'a> {
        let ContextInfo { name, cwd, busy, waiting, executions } = info;
        ContextBodyOut { name, cwd, busy: *busy, waiting: *waiting, executions: *executions }
    }
}

#[derive(Serialize, ToSchema)]
#[schema(as = ContextList)]
pub(crate) struct ContextList<'a> {
    pub(crate) contexts: Vec<ContextBodyOut<'a>>,
}

/// A file.
#[derive(Serialize, ToSchema)]
#[schema(as = Entry)]
pub(crate) struct EntryBody<'a> {
    /// Absolute. Bytes that are not UTF-8 are replaced.
    path: &'a str,
    /// The last part of its path.
    name: &'a str,
    #[schema(value_type = EntryKindName)]
    kind: &'static str,
    /// Bytes.
    size: u64,
    /// Permission bits, octal.
    mode: String,
    /// RFC 3339.
    #[schema(format = DateTime)]
    modified_at: String,
    uid: u32,
    gid: u32,
    /// Target of a link.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    target: Option<&'a str>,
}

#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) enum EntryKindName {
    File,
    Directory,
    Link,
    Other,
}

impl<'a> EntryBody<'a> {
    pub(crate) fn of(entry: &'a Entry) -> EntryBody<'a> {
        EntryBody {
            path: &entry.path,
            name: entry.path.rsplit('/').next().unwrap_or_default(),
            kind: match entry.kind {
                EntryKind::File => "file",
                EntryKind::Directory => "directory",
                EntryKind::Link => "link",
                EntryKind::Other => "other",
            },
            size: entry.size,
            mode: format!("{:03o}", entry.mode & 0o7777),
            modified_at: rfc3339_ms(entry.modified_ms),
            uid: entry.uid,
            gid: entry.gid,
            target: entry.target.as_deref(),
        }
    }
}

/// What is in a directory.
#[derive(Serialize, ToSchema)]
#[schema(as = EntryList)]
pub(crate) struct EntryList<'a> {
    pub(crate) entries: Vec<EntryBody<'a>>,
}

/// The data of an event of a watch.
#[derive(Serialize, ToSchema)]
#[schema(as = Change)]
pub(crate) struct ChangeBody<'a> {
    path: &'a str,
}

impl<'a> ChangeBody<'a> {
    /// Also the event's name.
    pub(crate) fn of(change: &'a Change) -> (&'static str, ChangeBody<'a>) {
        let name = match change.kind {
            ChangeKind::Created => "created",
            ChangeKind::Modified => "modified",
            ChangeKind::Removed => "removed",
            ChangeKind::Overflow => "overflow",
        };
        (name, ChangeBody { path: &change.path })
    }
}

/// The event `started`.
#[derive(Serialize, ToSchema)]
#[schema(as = RunStarted)]
pub(crate) struct StartedBody {
    pub(crate) id: Uuid,
    /// A command's process id inside the sandbox.
    pub(crate) pid: Option<u32>,
}

/// The event `lost`.
#[derive(Serialize, ToSchema)]
#[schema(as = OutputLost)]
pub(crate) struct LostBody {
    /// Bytes of output that the server no longer holds, or that were too large to hold.
    pub(crate) bytes: u64,
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use zeroboot_engine::EndReason;

    use super::*;

    #[test]
    fn a_result_is_text_json_or_base64_by_its_type() {
        let part = |mime: &str, data: &'static [u8]| (mime.to_owned(), Bytes::from_static(data));
        let bundle = MimeBundle {
            main: true,
            parts: vec![
                part("text/plain", b"42"),
                part("application/json", b"{\"a\": [1]}"),
                part("image/png", b"\x89P"),
                part("text/html", b"\xff"),
                part("is_main", b"no"),
            ],
        };
        let expected = serde_json::json!({
            "is_main": true, "text/plain": "42", "application/json": {"a": [1]}, "image/png": "iVA=", "text/html": "/w==",
        });
        assert_eq!(serde_json::to_value(ResultBody(&bundle)).unwrap(), expected);
        let broken = MimeBundle { main: false, parts: vec![part("application/json", b"{")] };
        assert_eq!(serde_json::to_value(ResultBody(&broken)).unwrap()["application/json"], "{");
    }

    #[test]
    fn the_schema_knows_every_reason_of_an_end() {
        let value: serde_json::Value = serde_json::from_str(&crate::openapi_json().unwrap()).unwrap();
        let reasons = EndReason::ALL.map(EndReason::as_str);
        assert_eq!(value["components"]["schemas"]["EndReasonName"]["enum"], serde_json::json!(reasons));
    }
}
