//! The VM engine's fork path, step by step, against its bare calls and the prototype's order of calls.

use std::path::PathBuf;

use anyhow::Context;
use zeroboot_engine::{ExecRequest, TemplateConfig, ZygoteSpec, request_frames};
use zeroboot_sys::memory::MiB;
use zeroboot_vm::{
    Host, Prefault, Snapshot, WorkingSet,
    bench::{self, StandIn},
};

use super::{
    Results,
    density::{self, Program},
};
use crate::cli::BenchArgs;

/// Memory of the stand-in template, and how much of it is not zero: as the Python template has.
pub(crate) const STAND_IN: (MiB, MiB) = (MiB(512), MiB(200));
/// Pages that `print(1)` writes and reads in the Python template (docs/adr/0010).
const WORKING_SET: (u32, u32) = (855, 2335);

/// What a stand-in does.
pub(crate) const PROGRAM: Program =
    Program { code: "not looked at", alive: bench::ALIVE, input: bench::input, answer: bench::answer };

/// Keeps stand-ins alive at once: bare forks, and forks that have the pages of an exec ahead of it, as real ones do.
pub(crate) async fn stand_in_density(args: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    for (label, (written, read)) in [("bare: ", (0, 0)), ("pages ahead: ", WORKING_SET)] {
        let pages = bench::strewn(STAND_IN.1, written, read);
        let (template, _place) =
            stored(&bench::stand_in(&Host::open()?, StandIn::Program, STAND_IN.0, STAND_IN.1, pages)?)?;
        density::alive_at_once(args, &template, PROGRAM, label, results).await?;
    }
    Ok(())
}

/// A stand-in as a template that an engine can be started with. Its files go with the second value.
pub(crate) fn stored(snapshot: &Snapshot) -> anyhow::Result<(TemplateConfig, Place)> {
    let place = Place(std::env::temp_dir().join(format!("zeroboot-bench-{}", uuid::Uuid::now_v7())));
    std::fs::create_dir(&place.0).context("make a directory for the stand-in")?;
    snapshot.save(&place.0)?;
    let spec = ZygoteSpec::Vm { template: place.0.clone() };
    Ok((TemplateConfig { name: "python".into(), language: "python".into(), spec, pool: 0 }, place))
}

/// A directory that goes with the value.
pub(crate) struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        // In the temporary directory: what cannot be removed there is the host's to clear away.
        let _left = std::fs::remove_dir_all(&self.0);
    }
}

/// Measures on the Python template, or on a guest of a few bytes in an image of its size.
pub(crate) fn fork_path(args: &BenchArgs, stand_in: bool, results: &mut Results) -> anyhow::Result<()> {
    let host = Host::open()?;
    let request = request_frames(&ExecRequest::new("python", "print(1)\n"), uuid::Uuid::now_v7())?;
    let snapshot = if stand_in {
        bench::stand_in(&host, StandIn::Program, STAND_IN.0, STAND_IN.1, WorkingSet::default())?
    } else {
        Snapshot::load(&host, &crate::template::ensure(None, "python")?.dir).context("load the python template")?
    };
    let forks = bench::forks(&host, &snapshot, &request, args.repeat as usize)?;
    let unpooled = results.row("vm: unpooled fork, ready to enter the guest", forks.unpooled);
    let p99 = results.last_p99();
    for step in forks.steps {
        results.row(format!("vm:   step: {}", step.name), step.times);
    }
    let bare = results.row("vm: the bare sum of its calls", forks.bare);
    let pooled = results.row("vm: pooled checkout to guest entry", forks.pooled);
    results.row("vm: guest entry to its first exit", forks.first_exit);
    results.row("vm: teardown", forks.teardown);
    let prototype = results.row("vm: the prototype's order of calls", forks.prototype);
    let prototype_p99 = results.last_p99();
    results.row("vm: its teardown", forks.prototype_teardown);
    results.figure("vm: prototype's order / unpooled fork, p50", prototype / unpooled, "times");
    results.figure("vm: prototype's order / unpooled fork, p99", prototype_p99 / p99, "times");
    results.figure("vm: unpooled fork / bare sum, p50", unpooled / bare, "times");
    results.figure("vm: pooled checkout / unpooled fork, p50", pooled / unpooled, "times");
    if stand_in {
        return Ok(());
    }
    for (prefault, name) in [
        (Prefault::Nothing, "no prefault"),
        (Prefault::Written, "written pages prefaulted"),
        (Prefault::All, "written and read pages prefaulted"),
    ] {
        let (mut first, mut last) = (Vec::new(), Vec::new());
        let mut seen = None;
        for _ in 0..args.repeat.min(50) {
            let exec = bench::exec(&host, &snapshot, &request, b"1\n", prefault)?;
            first.push(exec.first_byte);
            last.push(exec.last_byte);
            seen = Some(exec);
        }
        results.row(format!("vm: print(1) to first byte, {name}"), first);
        results.row(format!("vm: print(1) to last byte, {name}"), last);
        if let Some(exec) = seen {
            results.figure(format!("vm: print(1), {name}: pages copied"), exec.private_pages as f64, "pages");
            results.figure(format!("vm: print(1), {name}: pages mapped"), exec.shared_pages as f64, "pages");
        }
    }
    Ok(())
}
