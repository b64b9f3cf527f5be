//! From what the user asked for to a template of an engine.

use std::{path::Path, time::Duration};

use anyhow::Context;
use zeroboot_engine::{EngineConfig, SandboxBounds, TemplateConfig, ZygoteSpec};
use zeroboot_process::HostRuntime;
use zeroboot_vm::KvmProbe;

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

/// Looks at /dev/kvm by using it: some milliseconds.
pub(crate) fn kvm_finding() -> KvmFinding {
    let probe = zeroboot_vm::probe();
    let found = match (&probe, probe.verdict()) {
        (KvmProbe::Works { loops_per_second, port_exit }, _) => {
            format!(
                "runs guests at speed ({} million loops a second, an exit in {port_exit:.1?})",
                loops_per_second / 1_000_000
            )
        }
        (_, verdict) => verdict.err().unwrap_or_default(),
    };
    KvmFinding { works: matches!(probe, KvmProbe::Works { .. }), found, mend: probe.mend().map(str::to_owned) }
}

/// The engine that `auto` means here, and why. `vm` where it cannot work is refused with the reason.
pub(crate) fn choose_engine(choice: EngineChoice) -> anyhow::Result<(EngineChoice, String)> {
    if choice == EngineChoice::Process {
        return Ok((EngineChoice::Process, "asked for".into()));
    }
    let kvm = kvm_finding();
    match choice {
        EngineChoice::Vm if !kvm.works => {
            let hint = kvm.mend.unwrap_or_else(|| "use --engine process".into());
            Err(hinted(format!("the VM engine cannot run here: {}", kvm.found), hint))
        }
        EngineChoice::Auto if !kvm.works => Ok((EngineChoice::Process, kvm.found)),
        _ => Ok((EngineChoice::Vm, kvm.found)),
    }
}

/// Flags that would change nothing are refused: a VM's runtime and modules are those of its template.
pub(crate) fn refuse_process_flags(from: &TemplateArgs) -> anyhow::Result<()> {
    let given = [("--python", from.python.is_some()), ("--node", from.node.is_some()), ("--warm", from.warm.is_some())];
    match given.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((flag, _)) => Err(hinted(
            format!("{flag} is the process engine's, and the VM engine was chosen"),
            "use --engine process, or build a template with what it shall have (see docs/templates.md)",
        )),
    }
}

/// A VM template by name, built now if it is missing. `store`: where, if not in the user's own.
pub(crate) fn vm_template(store: Option<&Path>, name: &str, pool: usize) -> anyhow::Result<TemplateConfig> {
    let template = crate::template::ensure(store, name)?;
    Ok(TemplateConfig {
        name: name.into(),
        language: template.manifest.recipe.runtime.as_str().into(),
        spec: ZygoteSpec::Vm { template: template.dir },
        pool,
    })
}

/// This host's memory, bytes.
pub(crate) fn total_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
    kib.unwrap_or(1 << 20) * 1024
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
        sandboxes: SandboxBounds { memory: max_memory / 2, ..SandboxBounds::default() },
        admission_wait: Duration::from_secs(5),
        warm_timeout: Duration::from_secs(60),
        cgroups: true,
    })
}
