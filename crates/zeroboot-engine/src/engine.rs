//! The engine: templates, their pools, and execs.
//! (Interface first; the bodies follow in the next commits.)

use std::time::Duration;

use bytes::Bytes;

use crate::{Collected, EngineConfig, Event, ExecRequest, InvalidRequest, Isolation};

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The program could not be started.
    #[error("cannot start a zygote")]
    Spawn(#[source] std::io::Error),
    /// A template could not be made: the zygote's own words.
    #[error("template {template}: {reason}")]
    Template {
        /// Its name.
        template: String,
        /// The zygote's words.
        reason: String,
        /// What the user can do.
        hint: Option<String>,
    },
}

/// Why an exec gave no outcome.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecError {
    /// The caller's mistake.
    #[error(transparent)]
    Invalid(#[from] InvalidRequest),
    /// No such template.
    #[error("no template is called {0:?}")]
    UnknownTemplate(String),
    /// Every place is taken and none came free in time.
    #[error("all {live} sandboxes are in use")]
    Busy {
        /// Sandboxes that serve requests.
        live: usize,
        /// When to try again.
        retry_after: Duration,
    },
    /// The template's zygote is down and being restarted.
    #[error("template {template} is not ready: {reason}")]
    NotReady {
        /// Its name.
        template: String,
        /// Why.
        reason: String,
    },
    /// A sandbox could not be forked, or broke before the code ran.
    #[error("the sandbox failed: {0}")]
    Sandbox(String),
    /// The engine is shutting down.
    #[error("shutting down")]
    ShuttingDown,
}

/// What a template is doing now.
#[derive(Clone, Debug)]
pub struct TemplateStatus {
    /// Its name.
    pub name: String,
    /// `python` or `node`.
    pub language: String,
    /// What stands around its sandboxes.
    pub isolation: Isolation,
    /// Its zygote is up and forks.
    pub ready: bool,
    /// Why it is not.
    pub reason: Option<String>,
    /// Runtime version as the runner reports it, such as `Python 3.11.7`.
    pub version: String,
    /// Modules that were warmed.
    pub warmed: Vec<String>,
    /// Resident memory of the zygote, bytes.
    pub memory: u64,
    /// Sandboxes waiting.
    pub pool_ready: usize,
    /// Sandboxes that should wait.
    pub pool_target: usize,
    /// Sandboxes forked since the start.
    pub forks: u64,
    /// Times the zygote was restarted.
    pub restarts: u64,
}

/// Counters of the whole engine.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineStats {
    /// Sandboxes that serve a request now.
    pub live: usize,
    /// Memory promised to them, bytes.
    pub promised_memory: u64,
    /// Requests refused as busy since the start.
    pub refused: u64,
}

/// A running engine. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct Engine {}

impl Engine {
    /// Starts the zygotes, waits until every template is warm, and begins to fill the pools.
    pub async fn start(config: EngineConfig) -> Result<Engine, StartError> {
        let _config = config;
        todo!()
    }

    /// Takes a sandbox and starts the code in it. Dropping the [`Execution`] kills the sandbox.
    pub async fn exec(&self, request: ExecRequest) -> Result<Execution, ExecError> {
        let _request = request;
        todo!()
    }

    /// The templates, in the order of the configuration.
    pub fn templates(&self) -> Vec<TemplateStatus> {
        todo!()
    }

    /// Counters.
    pub fn stats(&self) -> EngineStats {
        todo!()
    }

    /// Refuses new execs, waits up to `drain` for the live ones, then kills all that is left.
    pub async fn shutdown(&self, drain: Duration) {
        let _drain = drain;
        todo!()
    }
}

/// An exec under way.
#[derive(Debug)]
pub struct Execution {}

impl Execution {
    /// The exec's id (UUIDv7).
    pub fn id(&self) -> uuid::Uuid {
        todo!()
    }

    /// The isolation of its sandbox.
    pub fn isolation(&self) -> Isolation {
        todo!()
    }

    /// The next event; `None` after `End`. Cancel safe. An error means that the sandbox failed
    /// (infrastructure), never that the code did.
    pub async fn next(&mut self) -> Result<Option<Event>, ExecError> {
        todo!()
    }

    /// The writing end of a streamed standard input ([`crate::Stdin::Stream`]), once.
    pub fn stdin(&mut self) -> Option<StdinWriter> {
        todo!()
    }

    /// Reads everything.
    pub async fn collect(self) -> Result<Collected, ExecError> {
        todo!()
    }
}

/// Feeds a streamed standard input. Dropping it is the end of the input.
#[derive(Debug)]
pub struct StdinWriter {}

impl StdinWriter {
    /// Waits until the sandbox takes these bytes. `false`: it reads no more.
    pub async fn write(&mut self, bytes: Bytes) -> bool {
        let _bytes = bytes;
        todo!()
    }
}
