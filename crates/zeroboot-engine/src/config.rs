//! What an engine is started with.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::SandboxBounds;

/// What stands between the code and the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// A KVM virtual machine for each sandbox.
    Vm,
    /// Namespaces, seccomp, Landlock and limits around a process; the host's kernel is shared.
    Process,
}

impl Isolation {
    /// The word that the API uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Isolation::Vm => "vm",
            Isolation::Process => "process",
        }
    }
}

/// What the hidden `zeroboot __zygote` command is told, as JSON: how to make the one template it holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "engine", rename_all = "snake_case", deny_unknown_fields)]
pub enum ZygoteSpec {
    /// The process engine: a runtime of the host, warmed.
    Process {
        /// `python` or `node`.
        runtime: String,
        /// The interpreter (absolute).
        interpreter: PathBuf,
        /// Host directories that the runtime needs: its prefix, its packages.
        paths: Vec<PathBuf>,
        /// Modules to import before the first fork; a trailing `?` makes one optional.
        warm: Vec<String>,
        /// Environment of the runtime.
        env: Vec<(String, String)>,
        /// Node packages: the directory that appears at `/node_modules`.
        #[serde(default)]
        node_modules: Option<PathBuf>,
    },
    /// The VM engine: a template directory.
    Vm {
        /// Holds `manifest.toml`, `memory.img`, `state.bin`.
        template: PathBuf,
    },
}

impl ZygoteSpec {
    /// The isolation that its sandboxes have.
    pub fn isolation(&self) -> Isolation {
        match self {
            ZygoteSpec::Process { .. } => Isolation::Process,
            ZygoteSpec::Vm { .. } => Isolation::Vm,
        }
    }
}

/// One template of an engine and its pool.
#[derive(Clone, Debug)]
pub struct TemplateConfig {
    /// What requests call it.
    pub name: String,
    /// The runtime's language: `python` or `node`.
    pub language: String,
    /// How its zygote makes it.
    pub spec: ZygoteSpec,
    /// Sandboxes kept ready.
    pub pool: usize,
}

/// What an engine is started with.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The program that has the `__zygote` command: ourselves.
    pub program: PathBuf,
    /// The templates.
    pub templates: Vec<TemplateConfig>,
    /// Most sandboxes alive at once that serve a request, all templates together.
    pub max_live: usize,
    /// Memory that live sandboxes may be promised, bytes, all templates together.
    pub max_memory: u64,
    /// Long-lived sandboxes, apart from those that serve one exec.
    pub sandboxes: SandboxBounds,
    /// How long a request may wait for admission before it is refused as busy.
    pub admission_wait: Duration,
    /// How long a template may take to warm up, and a sandbox to become ready.
    pub warm_timeout: Duration,
    /// Use cgroups where this host lets us.
    pub cgroups: bool,
}
