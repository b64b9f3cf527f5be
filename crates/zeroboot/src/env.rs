//! `zeroboot env`: what code finds inside a template, as a sandbox of it says.

use std::fmt::{self, Write as _};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use zeroboot_engine::{Engine, ExecRequest, Limits};

use crate::{
    cli::{EngineChoice, EnvArgs, Runtime},
    hint::hinted,
    printer, resolve,
};

const PROBE_PYTHON: &str = include_str!("env/probe.py");
const PROBE_NODE: &str = include_str!("env/probe.js");

/// What the probe says.
#[derive(Debug, Deserialize, Serialize)]
struct Inside {
    interpreter: String,
    path: String,
    packages: Vec<String>,
    writable: Vec<Place>,
    working_directory: String,
    file_mib: Option<u64>,
    open_files: Option<u64>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Place {
    path: String,
    mib: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Facts {
    template: String,
    engine: &'static str,
    /// Modules that are imported before any code comes.
    warm: Vec<String>,
    #[serde(flatten)]
    inside: Inside,
    /// The limits of a run that names none.
    default_memory_mib: u64,
    default_processes: u32,
    default_timeout_seconds: u64,
    network: &'static str,
}

pub(crate) fn run(args: &EnvArgs) -> anyhow::Result<u8> {
    let runtime = args.runtime.unwrap_or(Runtime::Python);
    let recipe = resolve::chosen_recipe(args.recipe.as_deref(), args.template.as_deref(), runtime, &args.with)?;
    let (engine, _why) = resolve::choose_engine(args.from.engine.unwrap_or_default())?;
    let template = resolve::template(
        engine,
        resolve::Asked { runtime, recipe: recipe.as_ref(), template: args.template.as_deref() },
        &args.from,
        None,
    )?;
    let code = if template.language == "python" { PROBE_PYTHON } else { PROBE_NODE };
    let request = ExecRequest::new(template.name.clone(), code);
    let limits = Limits::default();
    let name = template.name.clone();
    let config = resolve::engine_config(vec![template], 1, limits.memory)?;
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let (done, warm) = tokio.block_on(async {
        let engine = Engine::start(config).await?;
        let done = engine.exec(request).await?.collect().await?;
        let warm = engine.templates().into_iter().flat_map(|status| status.warmed).collect();
        engine.shutdown(std::time::Duration::from_secs(1)).await;
        anyhow::Ok((done, warm))
    })?;
    let inside = serde_json::from_slice(&done.stdout).map_err(|_| {
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        hinted(format!("the sandbox did not say what it holds: {}", said.trim()), "`zeroboot doctor` shows what works")
    })?;
    let facts = Facts {
        template: name,
        engine: if engine == EngineChoice::Vm { "vm" } else { "process" },
        warm,
        inside,
        default_memory_mib: limits.memory >> 20,
        default_processes: limits.processes,
        default_timeout_seconds: limits.timeout.as_secs(),
        network: "none but the sandbox's own loopback",
    };
    printer::line(if args.json {
        serde_json::to_string_pretty(&facts)?
    } else {
        facts.to_string().trim_end().to_owned()
    })?;
    Ok(0)
}

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inside { interpreter, path, packages, writable, working_directory, file_mib, open_files } = &self.inside;
        let mut row = |what: &str, text: &str| writeln!(f, "{what:<18} {text}");
        row("template", &format!("{} ({} engine)", self.template, self.engine))?;
        row("interpreter", &format!("{interpreter}, {path}"))?;
        row("warm", &if self.warm.is_empty() { "nothing".into() } else { self.warm.join(", ") })?;
        row("working directory", working_directory)?;
        let mut places = String::new();
        for place in writable {
            let size = place.mib.map_or_else(String::new, |mib| format!(" ({mib} MiB)"));
            let comma = if places.is_empty() { "" } else { ", " };
            write!(places, "{comma}{}{size}", place.path)?;
        }
        row("writable", &places)?;
        row("network", self.network)?;
        let number = |value: &Option<u64>| value.map_or("no limit".to_owned(), |value| value.to_string());
        row(
            "limits",
            &format!(
                "memory {} MiB, processes {}, timeout {} s, file size {} MiB, open files {}",
                self.default_memory_mib,
                self.default_processes,
                self.default_timeout_seconds,
                number(file_mib),
                number(open_files)
            ),
        )?;
        row("packages", &format!("{}", packages.len()))?;
        packages.iter().try_for_each(|package| writeln!(f, "  {package}"))
    }
}
