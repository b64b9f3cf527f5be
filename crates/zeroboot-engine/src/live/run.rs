//! Runs: what may be started in a sandbox that lives, and the handle to one that was.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use tokio::sync::Notify;
use uuid::Uuid;
use zeroboot_proto::live::{CellStatus, Refusal, Size};

use super::{
    EndReason,
    handle::{ChannelKey, Handle},
    log::{Item, Place},
    state::State,
};
use crate::{
    InvalidRequest,
    request::{check_args, check_env, check_text},
};

/// Most bytes of a run's tag.
pub const MAX_TAG: usize = 256;

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunSpec {
    /// A cell of a context. It waits until the context's cells before it are over.
    Cell {
        /// The context's name.
        context: String,
        /// The code.
        code: Bytes,
        /// Timeout; `None`: as long as the sandbox lives.
        timeout: Option<Duration>,
    },
    /// A program.
    Command {
        /// The program and its arguments.
        argv: Vec<String>,
        /// Added to the sandbox's environment.
        env: Vec<(String, String)>,
        /// Where it runs; the home directory if `None`.
        cwd: Option<String>,
        /// On a terminal of this size, else on pipes.
        terminal: Option<Size>,
        /// Standard input follows; else it is at its end. A terminal has one anyway.
        stdin: bool,
        /// Timeout; `None`: as long as the sandbox lives.
        timeout: Option<Duration>,
        /// The caller's own word for it.
        tag: Option<String>,
    },
}

impl RunSpec {
    /// Whether this can be sent to a sandbox; the reason if not.
    pub fn check(&self) -> Result<(), InvalidRequest> {
        let timeout = match self {
            RunSpec::Cell { context, code, timeout } => {
                check_text(code)?;
                check_context_name(context)?;
                timeout
            }
            RunSpec::Command { argv, env, cwd, terminal, stdin: _, timeout, tag } => {
                if argv.first().is_none_or(String::is_empty) {
                    return Err(InvalidRequest::NoProgram);
                }
                check_args(argv)?;
                check_env(env)?;
                if cwd.as_ref().is_some_and(|cwd| !is_path(cwd)) {
                    return Err(InvalidRequest::BadDirectory);
                }
                if tag.as_ref().is_some_and(|tag| tag.len() > MAX_TAG) {
                    return Err(InvalidRequest::TagTooLong);
                }
                if let Some(size) = terminal {
                    check_size(*size)?;
                }
                timeout
            }
        };
        if timeout.is_some_and(|timeout| timeout.is_zero()) { Err(InvalidRequest::ZeroTimeout) } else { Ok(()) }
    }
}

/// A name that a context can have.
pub(crate) fn check_context_name(name: &str) -> Result<(), InvalidRequest> {
    let good = !name.is_empty()
        && name.len() <= zeroboot_proto::live::MAX_NAME
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if good { Ok(()) } else { Err(InvalidRequest::BadContextName) }
}

/// A terminal that has room for a character.
pub(crate) fn check_size(size: Size) -> Result<(), InvalidRequest> {
    if size.columns == 0 || size.rows == 0 { Err(InvalidRequest::BadTerminal) } else { Ok(()) }
}

/// A path that a sandbox can be asked for. It is resolved inside.
pub(crate) fn is_path(path: &str) -> bool {
    !path.is_empty() && path.len() <= 4096 && !path.contains('\0')
}

/// Why something in a sandbox was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The sandbox has ended.
    #[error("the sandbox has ended: {}", .0.as_str())]
    Gone(EndReason),
    /// The caller's mistake.
    #[error(transparent)]
    Invalid(#[from] InvalidRequest),
    /// The sandbox's words, for people.
    #[error("{1}")]
    Refused(Refusal, String),
    /// As many runs and file operations are under way as a sandbox may have.
    #[error("the sandbox already has its maximum of {0} runs and file operations")]
    TooMany(usize),
    /// The run has ended.
    #[error("the run has ended")]
    Ended,
    /// The run has no standard input, or it is at its end.
    #[error("the run's standard input is closed")]
    NoStdin,
    /// The run has no terminal.
    #[error("the run has no terminal")]
    NoTerminal,
    /// The run is a cell: contexts are interrupted instead.
    #[error("the run is a cell; interrupt its context instead")]
    NotACommand,
    /// No signal has this number.
    #[error("signal {0} is not between 1 and 64")]
    BadSignal(i32),
}

/// What a run is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// A cell.
    Cell {
        /// Its context.
        context: String,
    },
    /// A program.
    Command {
        /// The program and its arguments.
        argv: Vec<String>,
        /// The caller's own word for it.
        tag: Option<String>,
        /// It has a terminal.
        terminal: bool,
    },
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunEnd {
    /// How.
    pub how: RunHow,
    /// Duration, by the sandbox's clock.
    pub wall: Duration,
    /// A cell's interpreter is gone, and with it its state.
    pub context_lost: bool,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunHow {
    /// A cell is over, and its context waits for the next.
    Cell {
        /// How.
        status: CellStatus,
        /// Its number in its context; the first is 1.
        execution_count: u32,
    },
    /// A program, or a context's interpreter, ended with this status, 0 to 255.
    Exited(i32),
    /// A signal killed it.
    Signaled(i32),
    /// Its time passed.
    DeadlinePassed,
    /// It was killed for want of memory.
    OutOfMemory,
    /// It was closed.
    Closed,
    /// It was not started. The text says why, for people.
    Refused(Refusal, String),
    /// The sandbox ended.
    Gone(EndReason),
}

/// A run as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunStatus {
    /// Its id.
    pub id: Uuid,
    /// What it is.
    pub kind: RunKind,
    /// When it was asked for.
    pub asked_at: SystemTime,
    /// It has begun.
    pub started: bool,
    /// A command's process, once it has begun.
    pub pid: Option<u32>,
    /// Offset of the oldest output that is still held.
    pub first_offset: u64,
    /// Offset behind the newest output.
    pub offset: u64,
    /// How it ended.
    pub end: Option<RunEnd>,
}

/// What happens in a run, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunEvent {
    /// It has begun; a command's process id.
    Started(Option<u32>),
    /// It wrote or showed something.
    Item(Item),
    /// It has ended. The last event.
    End(RunEnd),
}

/// A run. Dropping it lets the run go on.
#[derive(Clone, Debug)]
pub struct Run {
    pub(crate) handle: Arc<Handle>,
    pub(crate) id: Uuid,
    pub(crate) changed: Arc<Notify>,
}

impl Run {
    /// Its id.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// As it is now; `None` once its sandbox has forgotten it.
    pub fn status(&self) -> Option<RunStatus> {
        self.handle.state().run(self.id).map(super::state::RunState::status)
    }

    /// Follows its output from an offset on. Offsets count the bytes of standard output and standard error together, in
    /// the order in which they came; a result and an error count as one. An offset that is not reached yet is the end.
    pub fn attach(&self, from: u64) -> Attached {
        let mut state = self.handle.state();
        let reader = state.attach(self.id, from);
        drop(state);
        Attached { run: self.clone(), reader, started: false, over: false }
    }

    /// Waits until it has ended.
    pub async fn wait(&self) -> RunEnd {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let state = self.handle.state();
                match state.run(self.id) {
                    Some(run) => {
                        if let Some(end) = &run.end {
                            return end.clone();
                        }
                    }
                    None => return state.gone(),
                }
            }
            changed.await;
        }
    }

    /// Writes to its standard input; waits while the program does not read.
    pub async fn write(&self, bytes: Bytes) -> Result<(), RunError> {
        let key = self.stdin()?;
        self.handle.send(key, bytes).await
    }

    /// Its standard input is at its end.
    pub fn close_stdin(&self) -> Result<(), RunError> {
        let key = self.stdin()?;
        let mut state = self.handle.state();
        state.close_stdin(self.id, key);
        drop(state);
        self.handle.poke();
        Ok(())
    }

    fn stdin(&self) -> Result<ChannelKey, RunError> {
        let state = self.handle.state();
        let run = state.live_run(self.id)?;
        run.stdin_key()
    }

    /// Sends a signal to its processes: those of a terminal's foreground, if it has one.
    pub fn signal(&self, signal: i32) -> Result<(), RunError> {
        let number = u8::try_from(signal).ok().filter(|number| (1..=64).contains(number));
        let number = number.ok_or(RunError::BadSignal(signal))?;
        self.tell(|state, id| state.signal(id, number))
    }

    /// Sets the size of its terminal.
    pub fn resize(&self, size: Size) -> Result<(), RunError> {
        check_size(size)?;
        self.tell(|state, id| state.resize(id, size))
    }

    /// Kills it, because no caller waits for it any more. Its end still comes.
    pub fn close(&self) -> Result<(), RunError> {
        self.tell(State::close_run)
    }

    /// Lets its sandbox forget it once it has ended and has no reader.
    pub fn forget(&self) {
        self.handle.state().forget(self.id);
    }

    fn tell(&self, what: impl FnOnce(&mut State, Uuid) -> Result<(), RunError>) -> Result<(), RunError> {
        what(&mut self.handle.state(), self.id)?;
        self.handle.poke();
        Ok(())
    }
}

/// A reader of a run. While there is one, the run waits for it instead of losing output.
#[derive(Debug)]
pub struct Attached {
    run: Run,
    reader: u64,
    started: bool,
    over: bool,
}

impl Attached {
    /// The next event and the offset behind it; `None` after [`RunEvent::End`]. Cancel safe.
    pub async fn next(&mut self) -> Option<(u64, RunEvent)> {
        if self.over {
            return None;
        }
        let run = self.run.clone();
        loop {
            let changed = run.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(event) = self.poll() {
                return Some(event);
            }
            changed.await;
        }
    }

    /// What can be had without waiting.
    fn poll(&mut self) -> Option<(u64, RunEvent)> {
        let mut state = self.run.handle.state();
        let Some(run) = state.run(self.run.id) else {
            self.over = true;
            return Some((0, RunEvent::End(state.gone())));
        };
        let at = run.readers.get(&self.reader).copied().unwrap_or_default();
        if run.started && !self.started {
            self.started = true;
            return Some((at.offset, RunEvent::Started(run.pid)));
        }
        if let Some((item, next)) = run.log.read(at) {
            let poke = state.advance(self.run.id, self.reader, next);
            drop(state);
            if poke {
                self.run.handle.poke();
            }
            return Some((next.offset, RunEvent::Item(item)));
        }
        let end = run.end.clone()?;
        self.over = true;
        Some((at.offset, RunEvent::End(end)))
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.run.handle.state().detach(self.run.id, self.reader);
        // Output that waited for this reader, or a sandbox that is idle now.
        self.run.handle.poke();
    }
}

/// The place of a reader that wants everything from this offset on.
pub(crate) fn place_from(log: &super::log::Log, from: u64) -> Place {
    let end = log.end();
    if from >= end.offset {
        return end;
    }
    // An offset that fell out is kept, so that the loss is said.
    Place { offset: from, ..log.place(from) }
}
