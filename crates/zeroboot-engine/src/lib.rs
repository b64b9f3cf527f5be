//! The words of the domain and the machinery that is the same for both engines: requests, outcomes,
//! limits, admission, pools, deadlines, supervision of zygotes.

mod cgroup;
mod config;
mod engine;
mod execution;
mod forker;
mod live;
mod outcome;
mod reaper;
mod request;
mod spawn;
mod template;
mod worker;

pub use config::{EngineConfig, Isolation, TemplateConfig, ZygoteSpec};
pub use engine::{Engine, EngineStats, ExecError, StartError, TemplateStatus};
pub use execution::{Execution, StdinWriter, request_frames};
pub use live::{
    Activity, Attached, BranchError, BranchSpec, CellError, Checkpoint, CheckpointSpec, EndReason, Entries, FileReader,
    FileWriter, Hold, Item, MAX_TAG, MimeBundle, Run, RunEnd, RunError, RunEvent, RunHow, RunKind, RunSpec, RunStatus,
    Sandbox, SandboxBounds, SandboxLimits, SandboxSpec, Watch, cell_frames,
};
pub use outcome::{Collected, Event, Outcome, OutputFile, Report};
pub use request::{
    ExecRequest, INLINE_BASH, INLINE_TYPESCRIPT, InputFile, InvalidRequest, Limits, MAX_CODE, MAX_ENV, MAX_ENV_BYTES,
    MAX_FILES, MAX_FILES_BYTES, MAX_PATTERN_BYTES, MAX_PATTERNS, MIN_OPEN_FILES, Stdin,
};
pub use spawn::leave_ids_to_zygotes;
pub use zeroboot_proto::live::{
    CellStatus, Change, ChangeKind, ContextInfo, ContextOp, DEFAULT_CONTEXT, Entry, EntryKind, FileOp, Refusal, Size,
};
pub use zeroboot_sys::memory::give_back as give_memory_back;
