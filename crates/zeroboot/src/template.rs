//! `zeroboot template`: from packages to a frozen, warm virtual machine.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context;
use zeroboot_engine::{ExecRequest, SandboxSpec, cell_frames, request_frames};
use zeroboot_template::{
    Assembled, Built, KernelSource, Progress, Recipe, RootfsSource, Runtime, Sources, Store, StoreError, Template,
    WarmUp, assemble, paths,
};
use zeroboot_vm::{BuildOptions, Host};

use crate::{
    assets::ASSETS,
    cli::{AssembleArgs, TemplateCommand},
    hint::hinted,
    printer,
};

/// Longest time from a guest's first instruction until it is warm. (An emulated host is slow.)
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);

pub(crate) fn run(command: TemplateCommand) -> anyhow::Result<u8> {
    match command {
        TemplateCommand::Assemble(args) => {
            let recipe = recipe(&args)?;
            let made = assembled(&recipe, &sources(&args))?;
            printer::note(format_args!(
                "template {}: {}",
                recipe.name,
                if made.cached { "assembled before" } else { "assembled" }
            ));
            printer::line(made.kernel.display())?;
            printer::line(made.initramfs.display())?;
        }
        TemplateCommand::Build(args) => {
            let template = build(&store()?, &recipe(&args)?, &sources(&args))?;
            printer::line(template.dir.display())?;
        }
        TemplateCommand::List => list()?,
        TemplateCommand::Inspect { name, verify } => {
            let store = store()?;
            let template = if verify { store.verify(&name) } else { store.open(&name) }.map_err(refused)?;
            printer::stdout(template.manifest.to_toml()?.as_bytes())?;
            if verify {
                printer::note("memory and state match their hashes");
            }
        }
        TemplateCommand::Rm { name } => store()?.remove(&name).map_err(refused)?,
    }
    Ok(0)
}

fn store() -> anyhow::Result<Store> {
    Store::of_user().ok_or_else(|| hinted("cannot find a directory for templates", "set ZEROBOOT_HOME to a directory"))
}

fn refused(error: StoreError) -> anyhow::Error {
    match error.hint() {
        Some(hint) => hinted(error.to_string(), hint),
        None => error.into(),
    }
}

fn list() -> anyhow::Result<()> {
    let store = store()?;
    printer::line(format_args!("{:<20} {:<8} {:>10}  state", "NAME", "RUNTIME", "DISK MiB"))?;
    for listed in store.list().map_err(refused)? {
        let (runtime, state) = match &listed.template {
            Ok(template) => (template.manifest.recipe.runtime.as_str(), "ready".to_owned()),
            Err(error) => ("?", format!("refused: {error}")),
        };
        printer::line(format_args!("{:<20} {runtime:<8} {:>10}  {state}", listed.name, listed.disk >> 20))?;
    }
    Ok(())
}

/// A recipe of the user's own.
pub(crate) fn read_recipe(path: &Path) -> anyhow::Result<Recipe> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| hinted(format!("cannot read {}: {e}", path.display()), "--recipe takes a TOML file"))?;
    Recipe::from_toml(&text).with_context(|| format!("recipe {}", path.display()))
}

fn recipe(args: &AssembleArgs) -> anyhow::Result<Recipe> {
    match &args.recipe {
        Some(path) => {
            let mut recipe = read_recipe(path)?;
            recipe.name.clone_from(&args.name);
            Ok(recipe)
        }
        None => Recipe::embedded(&args.name).ok_or_else(|| {
            let names = Recipe::embedded_names().collect::<Vec<_>>().join(", ");
            hinted(format!("there is no recipe {:?}", args.name), format!("take one of {names}, or give --recipe FILE"))
        }),
    }
}

fn runner(runtime: Runtime) -> &'static [u8] {
    match runtime {
        Runtime::Python => ASSETS.runner_python,
        Runtime::Node => ASSETS.runner_node,
    }
}

fn sources(args: &AssembleArgs) -> Sources {
    Sources {
        rootfs: args.rootfs.clone().map_or(RootfsSource::Packages, RootfsSource::Directory),
        kernel: args.kernel.clone().map_or(KernelSource::Package, KernelSource::File),
        offline: args.offline,
        refresh: args.refresh,
    }
}

fn assembled(recipe: &Recipe, sources: &Sources) -> anyhow::Result<Assembled> {
    let cache = paths::cache_dir()
        .ok_or_else(|| hinted("cannot find a directory for the cache", "set XDG_CACHE_HOME or HOME to a directory"))?;
    let made =
        assemble(recipe, sources, ASSETS.agent, runner(recipe.runtime), &cache, &mut |progress| match progress {
            Progress::Step(text) => printer::note(format_args!("template {}: {text}", recipe.name)),
            Progress::Detail(text) => tracing::info!(template = recipe.name, "{text}"),
            _ => {}
        });
    made.map_err(|error| match error.hint() {
        Some(hint) => {
            let hint = hint.to_owned();
            hinted(format!("cannot assemble template {}: {:#}", recipe.name, anyhow::Error::from(error)), hint)
        }
        None => error.into(),
    })
}

/// Assembles, boots, warms, rehearses and freezes; shows progress on standard error.
fn build(store: &Store, recipe: &Recipe, sources: &Sources) -> anyhow::Result<Template> {
    let begin = Instant::now();
    let made = assembled(recipe, sources)?;
    let say = |text: String| printer::note(format_args!("template {}: {text}", recipe.name));
    let host = Host::open()?;
    let options = BuildOptions {
        kernel: made.kernel.clone(),
        initramfs: made.initramfs.clone(),
        memory: zeroboot_sys::memory::MiB(u64::from(recipe.memory_mib)),
        parameters: String::new(),
        timeout: BOOT_TIMEOUT,
    };
    let warming = Instant::now();
    let mut snapshot = zeroboot_vm::build(&host, &options, |progress| match progress {
        zeroboot_vm::Progress::Booting => say("booting".into()),
        zeroboot_vm::Progress::Ready { after, exits } => {
            say(format!("warm after {:.1} s ({exits} exits)", after.as_secs_f64()));
        }
        zeroboot_vm::Progress::Frozen => say("frozen".into()),
    })?;
    let warm_seconds = warming.elapsed().as_secs_f64();
    // One exec and one cell, each in a fork, show which pages every sandbox will need.
    let code = match recipe.runtime {
        Runtime::Python => "print(1)\n",
        Runtime::Node => "console.log(1)\n",
    };
    let mut request = ExecRequest::new(recipe.name.clone(), code);
    request.limits.timeout = BOOT_TIMEOUT;
    snapshot.rehearse(&host, &request_frames(&request, uuid::Uuid::now_v7())?)?;
    let cell = format!("{code}1\n");
    let cell = cell_frames(&SandboxSpec::new(recipe.name.clone()), cell.as_bytes(), uuid::Uuid::now_v7())?;
    snapshot.rehearse_cell(&host, &cell, BOOT_TIMEOUT)?;
    say("rehearsed; writing".into());

    let draft = store.begin(&recipe.name).map_err(refused)?;
    let facts = snapshot.save(draft.path())?;
    let about: serde_json::Value = serde_json::from_slice(snapshot.about()).unwrap_or_default();
    let words = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    let warm_up = WarmUp {
        runtime_version: words(&about["version"]).unwrap_or_default(),
        modules: about["warmed"].as_array().into_iter().flatten().filter_map(words).collect(),
        seconds: warm_seconds,
    };
    let built = Built {
        recipe: recipe.clone(),
        provenance: made.provenance,
        warm_up,
        memory_blake3: Some(facts.memory_blake3.clone()),
        snapshot: toml::Table::try_from(&facts)?,
        zeroboot: env!("CARGO_PKG_VERSION").into(),
    };
    let template = store.commit(draft, built).map_err(refused)?;
    say(format!("built in {:.1} s", begin.elapsed().as_secs_f64()));
    Ok(template)
}

/// The template of this name, built now if it is missing or was made of other parts than ours. `at`: the store, if it is
/// not the user's own.
pub(crate) fn ensure(at: Option<&Path>, name: &str) -> anyhow::Result<Template> {
    let store = at.map_or_else(store, |at| Ok(Store::at(at)))?;
    match (store.open(name), Recipe::embedded(name)) {
        // Of the user's own making: it is what it is.
        (Ok(template), None) => Ok(template),
        (Ok(template), Some(recipe)) if template.manifest.recipe != recipe => Ok(template),
        (opened, Some(recipe)) => keep_or_build(&store, opened, &recipe),
        (Err(error), _) => Err(refused(error)),
    }
}

/// The template of this recipe, built now if it is missing, or was made of another recipe or of other parts than ours.
pub(crate) fn ensure_recipe(at: Option<&Path>, recipe: &Recipe) -> anyhow::Result<Template> {
    let store = at.map_or_else(store, |at| Ok(Store::at(at)))?;
    let opened = store.open(&recipe.name);
    if opened.as_ref().is_ok_and(|template| template.manifest.recipe != *recipe) {
        printer::note(format_args!("the recipe of template {} has changed; building it again", recipe.name));
        return build(&store, recipe, &Sources::default());
    }
    keep_or_build(&store, opened, recipe)
}

fn keep_or_build(store: &Store, opened: Result<Template, StoreError>, recipe: &Recipe) -> anyhow::Result<Template> {
    let name = &recipe.name;
    match opened {
        Ok(template) if template.manifest.is_built_from(recipe, ASSETS.agent, runner(recipe.runtime)) => {
            return Ok(template);
        }
        Ok(_) => {
            printer::note(format_args!("template {name} was made by another version of zeroboot; building it again"));
        }
        Err(StoreError::Missing(_)) => {
            printer::note(format_args!("template {name} is missing; building it, once"));
        }
        Err(error) => return Err(refused(error)),
    }
    build(store, recipe, &Sources::default())
}
