//! Requests about long-lived sandboxes, as they come over the wire.

use std::{collections::BTreeMap, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use serde::Deserialize;
use utoipa::ToSchema;
use uuid::Uuid;
use zeroboot_engine::{
    BranchSpec, CheckpointSpec, DEFAULT_CONTEXT, MAX_ENV, RunSpec, SandboxLimits, SandboxSpec, Size,
};

use crate::{
    config::RequestLimits,
    error::ApiError,
    gate::Caller,
    wire::{Catalog, Few, FewNamed, Object, descriptors, positive, whole, within},
};

/// Most labels of one sandbox, and most bytes of one.
pub(crate) const MAX_METADATA: usize = 32;
const MAX_WORD: usize = 512;
const MIB: u64 = 1024 * 1024;

/// A long-lived sandbox.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = CreateSandbox)]
pub(crate) struct CreateBody {
    /// The template's name.
    pub(crate) template: Option<String>,
    /// The language, instead of a template; `python` if neither is given.
    #[schema(example = "python")]
    pub(crate) language: Option<String>,
    /// Lease in seconds; it can be extended. The default is 300 and the maximum 86400 unless configured otherwise.
    #[schema(exclusive_minimum = 0)]
    pub(crate) timeout_seconds: Option<f64>,
    /// The sandbox also ends after this many seconds without a run, a file operation or an open stream.
    #[schema(exclusive_minimum = 0)]
    pub(crate) idle_timeout_seconds: Option<f64>,
    /// Environment variables of everything in it, added to the template's.
    #[schema(value_type = Option<std::collections::BTreeMap<String, String>>)]
    pub(crate) env: Option<FewNamed<String, MAX_ENV>>,
    /// Labels of the caller's choice. The list of sandboxes can be filtered by them.
    #[schema(value_type = Option<std::collections::BTreeMap<String, String>>)]
    pub(crate) metadata: Option<FewNamed<String, MAX_METADATA>>,
    /// Memory of all its processes, MiB.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    pub(crate) memory_mb: Option<u64>,
    /// Processes and threads at once.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    pub(crate) processes: Option<u64>,
    /// The largest file that it may write, MiB.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    pub(crate) file_size_mb: Option<u64>,
    /// Open descriptors of one process.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 32)]
    pub(crate) open_files: Option<u64>,
}

impl CreateBody {
    pub(crate) fn into_spec(
        self,
        catalog: &Catalog,
        bounds: &RequestLimits,
        caller: &Caller,
    ) -> Result<SandboxSpec, ApiError> {
        let template = catalog.choose(self.language.as_deref(), self.template.as_deref())?;
        let metadata = metadata(self.metadata)?;
        let memory = self.memory_mb.map(|count| count.saturating_mul(MIB));
        let usual = SandboxLimits::default();
        let processes = u64::from(usual.processes).min(bounds.max_processes.into());
        let processes = within("processes", self.processes, processes, bounds.max_processes.into(), 1)?;
        let most = bounds.max_file_size;
        let file_size = self.file_size_mb.map(|count| count.saturating_mul(MIB));
        let file_size = within("file_size_mb", file_size, usual.file_size.min(most), most, MIB)?;
        let most = bounds.max_open_files;
        let open_files = descriptors("open_files", self.open_files, usual.open_files.min(most), most)?;
        Ok(SandboxSpec {
            env: self.env.map(|FewNamed(env)| env).unwrap_or_default().into_iter().collect(),
            limits: SandboxLimits {
                memory: within("memory_mb", memory, bounds.default_memory, bounds.max_memory, MIB)?,
                processes: u32::try_from(processes).unwrap_or(bounds.max_processes),
                file_size,
                open_files,
            },
            lease: lease(self.timeout_seconds, bounds)?,
            idle_timeout: match self.idle_timeout_seconds {
                None => None,
                Some(given) => Some(seconds("idle_timeout_seconds", given, bounds.max_lease)?),
            },
            owner: owner(caller).to_owned(),
            most_of_owner: caller.key.is_some().then_some(bounds.max_sandboxes_per_key),
            metadata,
            ..SandboxSpec::new(&*template.name)
        })
    }
}

/// The owner of the caller's sandboxes.
pub(crate) fn owner(caller: &Caller) -> &str {
    caller.key.as_ref().map_or("", |key| &key.id)
}

fn seconds(name: &str, given: f64, most: Duration) -> Result<Duration, ApiError> {
    positive(given).filter(|time| *time <= most).ok_or_else(|| {
        ApiError::new("invalid_timeout", format!("{name} must be above 0 and at most {}", most.as_secs_f64()))
    })
}

fn lease(given: Option<f64>, bounds: &RequestLimits) -> Result<Duration, ApiError> {
    given.map_or(Ok(bounds.default_lease), |given| seconds("timeout_seconds", given, bounds.max_lease))
}

/// How long a checkpoint is kept that names no time.
const KEPT: Duration = Duration::from_secs(3600);
/// Most branches of one request.
pub(crate) const MAX_BRANCHES: u64 = 100;

/// Sandboxes that begin where another one is.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BranchSandbox)]
pub(crate) struct BranchBody {
    /// How many; all are made, or none.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1, maximum = 100)]
    count: Option<u64>,
    /// How long each lives, in seconds, unless its lease is extended; 300 and at most 86400 unless configured otherwise.
    #[schema(exclusive_minimum = 0)]
    timeout_seconds: Option<f64>,
    /// Words of the caller's own, in place of the origin's.
    #[schema(value_type = Option<std::collections::BTreeMap<String, String>>)]
    metadata: Option<FewNamed<String, MAX_METADATA>>,
}

impl BranchBody {
    pub(crate) fn into_spec(self, bounds: &RequestLimits, caller: &Caller) -> Result<BranchSpec, ApiError> {
        let count = self.count.unwrap_or(1);
        if !(1..=MAX_BRANCHES).contains(&count) {
            let text = format!("count must be from 1 to {MAX_BRANCHES}");
            return Err(ApiError::new("invalid_request", text));
        }
        Ok(BranchSpec {
            count: usize::try_from(count).unwrap_or(1),
            lease: lease(self.timeout_seconds, bounds)?,
            metadata: self.metadata.map(|words| metadata(Some(words))).transpose()?,
            most_of_owner: caller.key.is_some().then_some(bounds.max_sandboxes_per_key),
            holds: Vec::new(),
        })
    }
}

/// A moment of a sandbox that is to be kept.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = CreateCheckpoint)]
pub(crate) struct CheckpointBody {
    /// How long it is kept, in seconds; 3600, or the longest lease if that is shorter.
    #[schema(exclusive_minimum = 0)]
    timeout_seconds: Option<f64>,
    /// Words of the caller's own.
    #[schema(value_type = Option<std::collections::BTreeMap<String, String>>)]
    metadata: Option<FewNamed<String, MAX_METADATA>>,
}

impl CheckpointBody {
    pub(crate) fn into_spec(self, bounds: &RequestLimits, caller: &Caller) -> Result<CheckpointSpec, ApiError> {
        let given = self.timeout_seconds;
        let usual = KEPT.min(bounds.max_lease);
        Ok(CheckpointSpec {
            lease: given.map_or(Ok(usual), |given| seconds("timeout_seconds", given, bounds.max_lease))?,
            metadata: metadata(self.metadata)?,
            most_of_owner: caller.key.is_some().then_some(bounds.max_checkpoints_per_key),
            hold: None,
        })
    }
}

/// Where a sandbox is to go back to.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RollBackSandbox)]
pub(crate) struct RollBackBody {
    /// A checkpoint of this sandbox; without it the last on its way here.
    pub(crate) checkpoint_id: Option<Uuid>,
}

/// Words of the caller's own.
fn metadata(given: Option<FewNamed<String, MAX_METADATA>>) -> Result<BTreeMap<String, String>, ApiError> {
    let metadata = given.map(|FewNamed(words)| words).unwrap_or_default();
    let long = |(name, value): (&String, &String)| name.is_empty() || name.len().max(value.len()) > MAX_WORD;
    if metadata.len() > MAX_METADATA || metadata.iter().any(long) {
        let text = format!("metadata: at most {MAX_METADATA} words, each of 1 to {MAX_WORD} bytes");
        return Err(ApiError::new("invalid_request", text));
    }
    Ok(metadata)
}

/// A longer, or shorter, lease.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ExtendSandbox)]
pub(crate) struct ExtendBody {
    /// Seconds from now.
    #[schema(exclusive_minimum = 0)]
    timeout_seconds: f64,
}

impl ExtendBody {
    pub(crate) fn lease(&self, bounds: &RequestLimits) -> Result<Duration, ApiError> {
        lease(Some(self.timeout_seconds), bounds)
    }
}

/// A cell.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RunCell)]
pub(crate) struct RunBody {
    /// The code.
    #[schema(example = "x = 41")]
    code: String,
    /// The context that it runs in.
    context: Option<String>,
    /// Timeout in seconds; the cell is then interrupted. If absent, the server's default for execs.
    #[schema(exclusive_minimum = 0)]
    timeout_seconds: Option<f64>,
    /// Answer with events, as `Accept: text/event-stream` does.
    #[serde(default)]
    pub(crate) stream: bool,
}

impl RunBody {
    pub(crate) fn into_spec(self, bounds: &RequestLimits) -> Result<RunSpec, ApiError> {
        let timeout = match self.timeout_seconds {
            None => bounds.default_timeout,
            Some(given) => seconds("timeout_seconds", given, bounds.max_lease)?,
        };
        Ok(RunSpec::Cell {
            context: self.context.unwrap_or_else(|| DEFAULT_CONTEXT.into()),
            code: Bytes::from(self.code),
            timeout: Some(timeout),
        })
    }
}

/// A terminal's size.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TerminalSize)]
pub(crate) struct SizeBody {
    /// Characters in a line.
    #[schema(minimum = 1)]
    pub(crate) columns: u16,
    /// Lines.
    #[schema(minimum = 1)]
    pub(crate) rows: u16,
}

impl From<SizeBody> for Size {
    fn from(body: SizeBody) -> Size {
        Size { columns: body.columns, rows: body.rows }
    }
}

/// A program: `argv`, or `command` for a shell.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = StartCommand)]
pub(crate) struct CommandBody {
    /// The program and its arguments.
    #[schema(value_type = Option<Vec<String>>, min_items = 1)]
    argv: Option<Few<String, MAX_ENV>>,
    /// A line for `/bin/sh`, instead of `argv`.
    command: Option<String>,
    /// Its working directory; if absent, the home directory.
    cwd: Option<String>,
    /// Environment variables, added to the sandbox's.
    #[schema(value_type = Option<std::collections::BTreeMap<String, String>>)]
    env: Option<FewNamed<String, MAX_ENV>>,
    /// Standard input, as text.
    stdin: Option<String>,
    /// Standard input, as base64.
    stdin_base64: Option<String>,
    /// More input follows by `…/stdin`.
    #[serde(default)]
    keep_stdin_open: bool,
    /// Runs it on a terminal of this size. All of its output is `stdout`.
    #[schema(value_type = Option<SizeBody>)]
    terminal: Option<Object<SizeBody>>,
    /// Timeout in seconds; if absent, the program may run as long as the sandbox lives.
    #[schema(exclusive_minimum = 0)]
    timeout_seconds: Option<f64>,
    /// Answer when the program has started, not when it has ended.
    #[serde(default)]
    pub(crate) background: bool,
    /// Answer with events, as `Accept: text/event-stream` does.
    #[serde(default)]
    pub(crate) stream: bool,
    /// A label of the caller's choice.
    tag: Option<String>,
    /// Kill the program when this request's client goes away.
    #[serde(default)]
    pub(crate) end_with_client: bool,
}

/// Standard input of a command.
#[derive(Debug)]
pub(crate) struct Input {
    pub(crate) bytes: Bytes,
    pub(crate) keep_open: bool,
}

/// A shell's own program and arguments for a line.
pub(crate) fn shell(line: &str) -> Vec<String> {
    vec!["/bin/sh".into(), "-c".into(), line.into()]
}

impl CommandBody {
    pub(crate) fn into_spec(self, bounds: &RequestLimits) -> Result<(RunSpec, Option<Input>), ApiError> {
        let invalid = |text: &str| ApiError::new("invalid_request", text);
        let argv = match (self.argv, self.command) {
            (Some(Few(argv)), None) => argv,
            (None, Some(line)) => shell(&line),
            _ => return Err(invalid("give either argv or command")),
        };
        let given = match (self.stdin, self.stdin_base64) {
            (Some(_), Some(_)) => return Err(invalid("give either stdin or stdin_base64")),
            (Some(text), None) => Some(Bytes::from(text)),
            (None, Some(text)) => {
                let bytes = STANDARD.decode(text).map_err(|_| invalid("stdin_base64: invalid base64"))?;
                Some(Bytes::from(bytes))
            }
            (None, None) => None,
        };
        if self.background && self.stream {
            return Err(invalid("give either background or stream"));
        }
        let keep_open = self.keep_stdin_open;
        let terminal = self.terminal.map(|Object(size)| Size::from(size));
        let input = (given.is_some() || keep_open)
            .then(|| Input { bytes: given.unwrap_or_default(), keep_open: keep_open || terminal.is_some() });
        let timeout =
            self.timeout_seconds.map(|given| seconds("timeout_seconds", given, bounds.max_lease)).transpose()?;
        let spec = RunSpec::Command {
            argv,
            env: self.env.map(|FewNamed(env)| env).unwrap_or_default().into_iter().collect(),
            cwd: self.cwd,
            terminal,
            stdin: input.is_some(),
            timeout,
            tag: self.tag,
        };
        Ok((spec, input))
    }
}

/// A signal: its name or number.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = SendSignal)]
pub(crate) struct SignalBody {
    /// Such as `SIGINT`, `INT` or 2.
    signal: SignalName,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
#[schema(as = SignalName)]
pub(crate) enum SignalName {
    /// Its number.
    Number(i32),
    /// Its name, with or without `SIG`.
    Name(String),
}

/// Signals of Linux on x86-64, from 1 on.
const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM",
    "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO",
    "PWR", "SYS",
];

impl SignalBody {
    pub(crate) fn number(&self) -> Result<i32, ApiError> {
        self.signal.number()
    }
}

impl SignalName {
    pub(crate) fn number(&self) -> Result<i32, ApiError> {
        let unknown = || ApiError::new("invalid_request", "signal: give a signal's name, or a number from 1 to 64");
        match self {
            SignalName::Number(number) if (1..=64).contains(number) => Ok(*number),
            SignalName::Number(_) => Err(unknown()),
            SignalName::Name(name) => {
                let name = name.strip_prefix("SIG").unwrap_or(name);
                let at = SIGNALS.iter().position(|known| *known == name).ok_or_else(unknown)?;
                i32::try_from(at + 1).map_err(|_| unknown())
            }
        }
    }
}

/// A new context.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = CreateContext)]
pub(crate) struct ContextBody {
    /// Its name: 1 to 64 letters, digits, `-`, `_` or `.`. If absent, the server chooses one.
    pub(crate) name: Option<String>,
    /// Its working directory; if absent, the home directory.
    pub(crate) cwd: Option<String>,
}

/// A path.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = MakeDirectory)]
pub(crate) struct PathBody {
    /// Absolute, or relative to the home directory.
    pub(crate) path: String,
}

/// A file's new name.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = MoveFile)]
pub(crate) struct MoveBody {
    /// The present path.
    pub(crate) from: String,
    /// The new path. A file that has this path is replaced.
    pub(crate) to: String,
}

/// A file's permissions.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ChangeMode)]
pub(crate) struct ChmodBody {
    /// The present path.
    pub(crate) path: String,
    /// Octal, such as `"755"`.
    #[schema(pattern = "^[0-7]{1,4}$")]
    pub(crate) mode: String,
}

/// Permission bits in octal.
pub(crate) fn mode(text: &str) -> Result<u16, ApiError> {
    let digits = !text.is_empty() && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
    let bits = u16::from_str_radix(text, 8).ok().filter(|bits| digits && *bits <= 0o777);
    bits.ok_or_else(|| ApiError::new("invalid_request", "mode must be octal, from 0 to 777"))
}
