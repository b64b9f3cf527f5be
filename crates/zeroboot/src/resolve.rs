//! From what the user asked for to a template of an engine.

use std::time::Duration;

use anyhow::Context;
use zeroboot_engine::{EngineConfig, TemplateConfig, ZygoteSpec};
use zeroboot_process::HostRuntime;

use crate::{
    cli::{EngineChoice, Runtime, TemplateArgs},
    hint::hinted,
};

/// Modules that Python agents use most. Warmed where they are installed.
pub(crate) const PYTHON_WARM: [&str; 2] = ["numpy", "pandas"];

impl Runtime {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Runtime::Python => "python",
            Runtime::Node => "node",
        }
    }
}

/// What /dev/kvm of this host is worth.
pub(crate) struct KvmFinding {
    pub(crate) works: bool,
    pub(crate) found: String,
    pub(crate) mend: Option<String>,
}

/// Looks at /dev/kvm by using it.
pub(crate) fn kvm_finding() -> KvmFinding {
    KvmFinding { works: false, found: "not probed: this build has no VM engine".into(), mend: None }
}

/// The engine that `auto` means here, and why.
pub(crate) fn choose_engine(choice: EngineChoice) -> anyhow::Result<(EngineChoice, String)> {
    match choice {
        EngineChoice::Process => Ok((EngineChoice::Process, "asked for".into())),
        EngineChoice::Vm => Err(hinted("the VM engine is not part of this build", "use --engine process")),
        EngineChoice::Auto => Ok((EngineChoice::Process, "this build has no VM engine".into())),
    }
}

/// A process template of a runtime of this host. `mentioned`: warm only what this code names (a single run).
pub(crate) fn process_template(
    runtime: Runtime,
    from: &TemplateArgs,
    mentioned: Option<&[u8]>,
    pool: usize,
) -> anyhow::Result<TemplateConfig> {
    let host: HostRuntime = match runtime {
        Runtime::Python => zeroboot_process::python(from.python.as_deref())?,
        Runtime::Node => zeroboot_process::node(from.node.as_deref())?,
    };
    let warm = match (&from.warm, runtime) {
        (Some(names), _) => names.iter().filter(|name| !name.is_empty()).cloned().collect(),
        (None, Runtime::Node) => Vec::new(),
        (None, Runtime::Python) => PYTHON_WARM
            .iter()
            .filter(|name| mentioned.is_none_or(|code| contains(code, name.as_bytes())))
            .map(|name| format!("{name}?"))
            .collect(),
    };
    Ok(TemplateConfig {
        name: runtime.name().into(),
        language: runtime.name().into(),
        spec: ZygoteSpec::Process {
            runtime: host.language.into(),
            interpreter: host.interpreter,
            paths: host.paths,
            warm,
            env: Vec::new(),
        },
        pool,
    })
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// An engine with these templates and room for `max_live` sandboxes of `max_memory` bytes together.
pub(crate) fn engine_config(
    templates: Vec<TemplateConfig>,
    max_live: usize,
    max_memory: u64,
) -> anyhow::Result<EngineConfig> {
    Ok(EngineConfig {
        program: std::env::current_exe().context("find our own program")?,
        templates,
        max_live,
        max_memory,
        admission_wait: Duration::from_secs(5),
        warm_timeout: Duration::from_secs(60),
        cgroups: true,
    })
}
