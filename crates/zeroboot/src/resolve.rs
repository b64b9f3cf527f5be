//! From what the user asked for to a template of an engine.

use std::{path::Path, time::Duration};

use anyhow::Context;
use zeroboot_engine::{EngineConfig, SandboxBounds, TemplateConfig, ZygoteSpec};
use zeroboot_process::HostRuntime;
use zeroboot_template::Recipe;
use zeroboot_vm::KvmProbe;

use crate::{
    cli::{EngineChoice, Runtime, TemplateArgs},
    hint::hinted,
    printer,
};

/// Modules that Python agents use most, and what runs cells. Warmed where they are installed.
pub(crate) const PYTHON_WARM: [&str; 3] = ["numpy", "pandas", CELLS];
/// What the cells of a Python context are run with, where it is installed.
const CELLS: &str = "IPython";

impl Runtime {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Runtime::Python => "python",
            Runtime::Node => "node",
        }
    }
}

impl From<zeroboot_template::Runtime> for Runtime {
    fn from(runtime: zeroboot_template::Runtime) -> Runtime {
        match runtime {
            zeroboot_template::Runtime::Python => Runtime::Python,
            zeroboot_template::Runtime::Node => Runtime::Node,
        }
    }
}

/// The recipe that a command names: by a file, by a template's name, or by packages. None: the runtime as it is.
pub(crate) fn chosen_recipe(
    file: Option<&Path>,
    template: Option<&str>,
    runtime: Runtime,
    with: &[String],
) -> anyhow::Result<Option<Recipe>> {
    match (file, template) {
        (Some(file), _) => crate::template::read_recipe(file).map(Some),
        (None, Some(name)) => Ok(Recipe::embedded(name)),
        (None, None) if with.is_empty() => Ok(None),
        (None, None) => with_packages(runtime, with).map(Some),
    }
}

/// The runtime's own recipe and these packages. Its name says what is in it.
fn with_packages(runtime: Runtime, with: &[String]) -> anyhow::Result<Recipe> {
    let mut packages: Vec<String> = Vec::new();
    for part in with.iter().flat_map(|one| one.split(',')).map(str::trim).filter(|part| !part.is_empty()) {
        match packages.last_mut() {
            // `pandas>=2,<3` is one package.
            Some(last) if part.starts_with(['<', '>', '=', '!', '~']) => {
                last.push(',');
                last.push_str(part);
            }
            _ => packages.push(part.to_owned()),
        }
    }
    packages.sort();
    packages.dedup();
    let mut recipe = Recipe::embedded(runtime.name()).context("find the runtime's recipe")?;
    let hash = packages
        .iter()
        .flat_map(|name| name.bytes().chain([0]))
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    recipe.name = format!("{}-with-{hash:016x}", runtime.name());
    match runtime {
        Runtime::Python => recipe.pip = packages,
        Runtime::Node => recipe.npm = packages,
    }
    recipe.checked().map_err(|error| {
        hinted(error.to_string(), "--with takes packages as pip and npm do, such as pandas or lodash@4")
    })
}

/// What /dev/kvm of this host is worth.
pub(crate) struct KvmFinding {
    pub(crate) works: bool,
    pub(crate) found: String,
    pub(crate) mend: Option<String>,
}

/// Tests /dev/kvm by using it. That takes some milliseconds.
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
    let given = [
        ("--python", from.python.is_some()),
        ("--node", from.node.is_some()),
        ("--warm", from.warm.is_some()),
        ("--warm-env", !from.warm_env.is_empty()),
    ];
    match given.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((flag, _)) => Err(hinted(
            format!("{flag} works with the process engine only, and this run uses the VM engine"),
            "use --engine process, or build a template that has it (see docs/templates.md)",
        )),
    }
}

/// A VM template by name, built now if it is missing. `store`: where, if not in the user's own.
pub(crate) fn vm_template(store: Option<&Path>, name: &str, pool: usize) -> anyhow::Result<TemplateConfig> {
    Ok(of_vm(name, crate::template::ensure(store, name)?, pool))
}

/// A VM template of a recipe, built now if it is missing.
pub(crate) fn vm_recipe(store: Option<&Path>, recipe: &Recipe, pool: usize) -> anyhow::Result<TemplateConfig> {
    Ok(of_vm(&recipe.name, crate::template::ensure_recipe(store, recipe)?, pool))
}

fn of_vm(name: &str, template: zeroboot_template::Template, pool: usize) -> TemplateConfig {
    TemplateConfig {
        name: name.into(),
        language: template.manifest.recipe.runtime.as_str().into(),
        spec: ZygoteSpec::Vm { template: template.dir },
        pool,
    }
}

/// What a command asks for.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) runtime: Runtime,
    pub(crate) recipe: Option<&'a Recipe>,
    pub(crate) template: Option<&'a str>,
}

/// The one template of a command that ends: nothing is pooled. `mentioned` as for [`process_template`].
pub(crate) fn template(
    engine: EngineChoice,
    asked: Asked<'_>,
    from: &TemplateArgs,
    mentioned: Option<&[u8]>,
) -> anyhow::Result<TemplateConfig> {
    let Asked { runtime, recipe, template } = asked;
    if engine == EngineChoice::Vm {
        refuse_process_flags(from)?;
        return match recipe {
            // An embedded one may have been built with a recipe of the user's own.
            Some(recipe) if template.is_none() => vm_recipe(None, recipe, 0),
            _ => vm_template(None, template.unwrap_or(runtime.name()), 0),
        };
    }
    if let (Some(name), None) = (template, recipe) {
        let names = Recipe::embedded_names().collect::<Vec<_>>().join(", ");
        return Err(hinted(
            format!("no recipe is called {name:?}, and templates that were built are the VM engine's"),
            format!("take one of {names}, name a recipe's file with --recipe, or use --engine vm"),
        ));
    }
    let runtime = recipe.map_or(runtime, |recipe| recipe.runtime.into());
    let mut made = process_template(runtime, recipe, from, mentioned, 0)?;
    if let Some(recipe) = recipe {
        made.name.clone_from(&recipe.name);
    }
    Ok(made)
}

/// The interpreter of a template of the process engine; the directory of a VM's.
pub(crate) fn runtime_of(spec: &ZygoteSpec) -> String {
    match spec {
        ZygoteSpec::Process { interpreter, .. } => interpreter.display().to_string(),
        ZygoteSpec::Vm { template } => template.display().to_string(),
    }
}

/// This host's memory, bytes.
pub(crate) fn total_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
    kib.unwrap_or(1 << 20) * 1024
}

/// A process template of a runtime of this host, and of what a recipe puts on top of it. `mentioned`: warm only what
/// this code names (a single run).
pub(crate) fn process_template(
    runtime: Runtime,
    recipe: Option<&Recipe>,
    from: &TemplateArgs,
    mentioned: Option<&[u8]>,
    pool: usize,
) -> anyhow::Result<TemplateConfig> {
    let mut host: HostRuntime = match runtime {
        Runtime::Python => zeroboot_process::python(from.python.as_deref())?,
        Runtime::Node => zeroboot_process::node(from.node.as_deref())?,
    };
    let mut node_modules = None;
    if let Some(recipe) = recipe {
        let mut say = |text: &str| printer::note(format_args!("zeroboot: {text}"));
        if !recipe.pip.is_empty() {
            host = zeroboot_process::python_environment(&host, &recipe.pip, &cache()?, &mut say)?;
        }
        if !recipe.npm.is_empty() {
            node_modules = Some(zeroboot_process::node_environment(&host, &recipe.npm, &cache()?, &mut say)?);
        }
    }
    let is_mentioned = |module: &str| {
        let name = module.split(['.', '?']).next().unwrap_or(module);
        mentioned.is_none_or(|code| contains(code, name.as_bytes()))
    };
    // What an embedded recipe warms may be missing: it was made for both engines.
    let of_recipe = recipe.map(|recipe| recipe.warm.as_slice()).unwrap_or_default();
    let warm: Vec<String> = match &from.warm {
        Some(names) => names.iter().filter(|name| !name.is_empty()).cloned().collect(),
        None => {
            let names: Vec<&str> = of_recipe.iter().map(|name| name.trim_end_matches('?')).collect();
            let more: &[&str] = match runtime {
                Runtime::Node => &[],
                Runtime::Python if names.is_empty() => &PYTHON_WARM,
                // A first cell needs it, whatever the recipe is for.
                Runtime::Python if !names.contains(&CELLS) => &[CELLS],
                Runtime::Python => &[],
            };
            names.iter().chain(more).filter(|name| is_mentioned(name)).map(|name| format!("{name}?")).collect()
        }
    };
    let mut env: Vec<(String, String)> =
        recipe.iter().flat_map(|recipe| recipe.env.iter().map(|(key, value)| (key.clone(), value.clone()))).collect();
    env.extend(from.warm_env.iter().cloned());
    Ok(TemplateConfig {
        name: runtime.name().into(),
        language: runtime.name().into(),
        spec: ZygoteSpec::Process {
            runtime: host.language.into(),
            interpreter: host.interpreter,
            paths: host.paths,
            warm,
            env,
            node_modules,
        },
        pool,
    })
}

fn cache() -> anyhow::Result<std::path::PathBuf> {
    zeroboot_template::paths::cache_dir()
        .ok_or_else(|| hinted("there is no place for a cache", "set XDG_CACHE_HOME or HOME to a directory"))
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
