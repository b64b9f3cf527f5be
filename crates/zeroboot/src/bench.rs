//! `zeroboot bench`: each measurement checks the answers that it times, and compares two ways in one run.

mod cpu;
pub(crate) mod density;
mod exec;
mod live;
pub(crate) mod stats;
pub(crate) mod vm;

use std::{sync::Mutex, time::Duration};

use anyhow::{Context, ensure};
use clap::ValueEnum as _;
use serde::Serialize;
use zeroboot_engine::{Engine, ExecRequest, Outcome, TemplateConfig};

use crate::{
    cli::{BenchArgs, BenchWhat, EngineChoice, Runtime},
    printer, resolve,
};
use stats::Summary;

/// One line of the table: a distribution, in milliseconds unless said otherwise.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    name: String,
    #[serde(flatten)]
    summary: Summary,
}

/// One figure.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    name: String,
    value: f64,
    unit: &'static str,
}

#[derive(Debug, Default, Serialize)]
pub(crate) struct Results {
    rows: Vec<Row>,
    figures: Vec<Figure>,
}

impl Results {
    pub(crate) fn row(&mut self, name: impl Into<String>, times: Vec<Duration>) -> f64 {
        let summary = Summary::of(times);
        let p50 = summary.p50;
        self.rows.push(Row { name: name.into(), summary });
        p50
    }

    /// The p99 of the row added last, milliseconds.
    pub(crate) fn last_p99(&self) -> f64 {
        self.rows.last().map_or(f64::NAN, |row| row.summary.p99)
    }

    pub(crate) fn figure(&mut self, name: impl Into<String>, value: f64, unit: &'static str) {
        self.figures.push(Figure { name: name.into(), value, unit });
    }
}

#[derive(Debug, Serialize)]
struct Document<'a> {
    zeroboot: &'static str,
    host: stats::HostFacts,
    engine: &'static str,
    results: &'a Results,
}

pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<u8> {
    let wants = |what| args.what.is_empty() || args.what.contains(&what);
    // Forks, and how many can live, can be measured where no Linux guest can run.
    let possible = args.from.engine == Some(EngineChoice::Vm)
        && !args.what.is_empty()
        && args.what.iter().all(|what| matches!(what, BenchWhat::Fork | BenchWhat::Density));
    if args.stand_in && !possible {
        anyhow::bail!("--stand-in is for the vm engine's forks: zeroboot bench fork density --engine vm --stand-in");
    }
    let stand_in = possible && (args.stand_in || !resolve::kvm_finding().works);
    let (engine, why) = if stand_in {
        let guest = "a guest of a few bytes in an image of a template's size";
        let asked = if args.stand_in { "as asked" } else { "no Linux guest can run here" };
        (EngineChoice::Vm, format!("{guest}: {asked}"))
    } else {
        resolve::choose_engine(args.from.engine.unwrap_or_default())?
    };
    // As the service writes it, and to nobody: what it costs is in the figures.
    let log = std::fs::File::options().write(true).open("/dev/null").context("open /dev/null")?;
    let format = zeroboot_server::LogFormat::default();
    let _flushes = zeroboot_server::init_logging(format, zeroboot_server::DEFAULT_FILTER, None, Mutex::new(log))?;
    let host = stats::HostFacts::read();
    let name = if engine == EngineChoice::Vm { "vm" } else { "process" };
    printer::line(&host)?;
    printer::line(format_args!("engine {name}: {why}"))?;
    printer::line(size(args, stand_in))?;
    let mut results = Results::default();
    if engine == EngineChoice::Vm && wants(BenchWhat::Fork) {
        vm::fork_path(args, stand_in, &mut results)?;
    }
    if !stand_in {
        through_the_engine(args, engine, &mut results)?;
    } else if wants(BenchWhat::Density) {
        runtime()?.block_on(vm::stand_in_density(args, &mut results))?;
    }
    print_table(&results)?;
    if let Some(path) = &args.json {
        let document = Document { zeroboot: env!("CARGO_PKG_VERSION"), host, engine: name, results: &results };
        std::fs::write(path, serde_json::to_vec_pretty(&document)?)
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(0)
}

/// How large it will be, before it begins.
fn size(args: &BenchArgs, stand_in: bool) -> String {
    let wants = |what| args.what.is_empty() || args.what.contains(&what);
    let timed = [BenchWhat::Exec, BenchWhat::Cpu, BenchWhat::Fork, BenchWhat::Serve];
    let names = timed.map(|what| (what, what.to_possible_value()));
    let names: Vec<String> = names
        .iter()
        .filter(|(what, _)| wants(*what) && (!stand_in || *what == BenchWhat::Fork))
        .filter_map(|(_, value)| Some(value.as_ref()?.get_name().to_owned()))
        .collect();
    let mut parts = Vec::new();
    if !names.is_empty() {
        parts.push(format!("{}: {} repetitions each (--repeat)", names.join(", "), args.repeat));
    }
    if wants(BenchWhat::Density) {
        let (alive, gib) = (args.alive, f64::from(args.alive) * DENSITY_MIB / 1024.0);
        parts.push(format!("density: up to {alive} sandboxes alive at once (--alive), which takes some {gib:.1} GiB"));
    }
    format!("{}\n", parts.join("; "))
}

/// Memory, MiB, that a sandbox of the density measurement takes from the host, page tables included: the largest figure in
/// docs/benchmarks.md, rounded up.
const DENSITY_MIB: f64 = 5.0;

/// The measurements that are the same for both engines.
fn through_the_engine(args: &BenchArgs, engine: EngineChoice, results: &mut Results) -> anyhow::Result<()> {
    let template = match engine {
        EngineChoice::Vm => resolve::vm_template(None, "python", 0)?,
        _ => resolve::process_template(Runtime::Python, None, &args.from, None, 0)?,
    };
    let wants = |what| args.what.is_empty() || args.what.contains(&what);
    let tokio = runtime()?;
    tokio.block_on(async {
        if wants(BenchWhat::Exec) {
            exec::first_output(args, &template, results).await?;
        }
        if wants(BenchWhat::Cpu) {
            cpu::of_an_exec(args, &template, results).await?;
        }
        if wants(BenchWhat::Fork) {
            exec::pooled_and_not(args, &template, results).await?;
        }
        if wants(BenchWhat::Serve) {
            exec::server(args, &template, results).await?;
        }
        if wants(BenchWhat::Density) {
            density::alive_at_once(args, &template, density::PYTHON, "", results).await?;
        }
        if wants(BenchWhat::Live) {
            live::measure(args, engine, results).await?;
        }
        anyhow::Ok(())
    })?;
    tokio.shutdown_background();
    Ok(())
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()
}

fn print_table(results: &Results) -> anyhow::Result<()> {
    printer::line(format_args!("{:<64} {:>6} {:>9} {:>9} {:>9} {:>9}  (ms)", "", "n", "p50", "p95", "p99", "worst"))?;
    for Row { name, summary: s } in &results.rows {
        printer::line(format_args!(
            "{name:<64} {:>6} {:>9.3} {:>9.3} {:>9.3} {:>9.3}",
            s.n, s.p50, s.p95, s.p99, s.worst
        ))?;
    }
    for Figure { name, value, unit } in &results.figures {
        printer::line(format_args!("{name:<64} {value:>16.2} {unit}"))?;
    }
    Ok(())
}

/// An engine with one template and a pool of this size.
pub(crate) async fn start(template: &TemplateConfig, pool: usize, live: usize) -> anyhow::Result<Engine> {
    let template = TemplateConfig { pool, ..template.clone() };
    let mut config = resolve::engine_config(vec![template], live, (live as u64) << 30)?;
    config.admission_wait = Duration::from_secs(60);
    Ok(Engine::start(config).await?)
}

/// Runs `code` and checks what it prints.
pub(crate) async fn checked(
    engine: &Engine,
    code: &'static str,
    expected: &[u8],
) -> anyhow::Result<zeroboot_engine::Report> {
    let done = engine.exec(ExecRequest::new("python", code)).await?.collect().await?;
    ensure!(
        done.report.outcome == Outcome::Exited { code: 0 } && done.stdout == expected,
        "a measured exec gave a wrong answer: {:?}, {:?}, {:?}",
        done.report.outcome,
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr)
    );
    Ok(done.report)
}
