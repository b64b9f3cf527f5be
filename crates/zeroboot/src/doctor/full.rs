//! `zeroboot doctor --full`: the VM engine tried on this host, step by step, in under a minute. The process engine's
//! forks go through the same checks.
//!
//! A step that cannot be tried says why and counts as not run, never as passed.

use std::{
    collections::HashSet,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, bail, ensure};
use serde::Serialize;
use tokio::task::JoinSet;
use zeroboot_engine::{Engine, ExecRequest, Outcome, TemplateConfig, ZygoteSpec, request_frames};
use zeroboot_sys::memory::MiB;
use zeroboot_template::{Runtime, Store, StoreError};
use zeroboot_vm::{Host, Snapshot, WorkingSet, bench};

use super::{Check, Verdict, host::About};
use crate::{
    bench::{Results, density, start, vm},
    cli::{self, TemplateArgs},
    printer, resolve,
};

/// Forks of each kind.
const FORKS: usize = 200;
/// Forks alive at once.
const AT_ONCE: usize = 20;
/// Longest time for the forks of one step. If it passes, the step makes fewer forks, and the report says how many.
const BUDGET: Duration = Duration::from_secs(12);
/// Memory of the little template, and how much of it is not zero.
const LITTLE: (MiB, MiB) = (MiB(16), MiB(4));
/// Timeout of the runs that never end by themselves.
const TIMEOUT: Duration = Duration::from_millis(300);
/// Latest end of such a run after its timeout. The host may be busy; without a working deadline the run has no end.
const LATE: Duration = Duration::from_secs(2);

#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) host: About,
    pub(super) steps: Vec<Check>,
}

impl Report {
    /// Steps that were tried and failed.
    pub(super) fn failed(&self) -> usize {
        self.count(Verdict::Missing)
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.steps.iter().filter(|step| step.verdict == verdict).count()
    }

    pub(super) fn summary(&self) -> String {
        format!(
            "Steps of --full: {} passed, {} failed, {} not run. To report it, paste all of this into an issue: it holds facts of \
             the host, and no names, keys or addresses.",
            self.count(Verdict::Ok) + self.count(Verdict::Weaker),
            self.failed(),
            self.count(Verdict::NotRun)
        )
    }
}

/// What a step found, or why it failed.
type Found = anyhow::Result<String>;

fn step(what: &'static str, found: Found) -> Check {
    match found {
        Ok(found) => Check { what, verdict: Verdict::Ok, found, mend: None },
        Err(error) => Check {
            what,
            verdict: Verdict::Missing,
            found: format!("{error:#}"),
            mend: Some("report it with all of this output; use --engine process meanwhile".into()),
        },
    }
}

fn not_run(what: &'static str, why: impl Into<String>, mend: Option<&str>) -> Check {
    Check { what, verdict: Verdict::NotRun, found: why.into(), mend: mend.map(str::to_owned) }
}

/// Tries everything that can be tried here.
pub(super) async fn report(from: &TemplateArgs) -> Report {
    const LATER: [&str; 5] = ["save and restore", "little template", "little forks", "deadlines", "fork speed"];
    printer::note("doctor: trying the engines; this takes up to a minute");
    let process = match resolve::process_template(cli::Runtime::Python, None, from, None, 0) {
        Ok(template) => step("process forks", real(template, Runtime::Python).await),
        Err(error) => not_run("process forks", format!("{error:#}"), None),
    };
    let host = match Host::open() {
        Ok(host) => host,
        Err(error) => {
            let why = format!("/dev/kvm cannot be used: {error}: {}", error.source);
            let steps = LATER.into_iter().chain(["python template", "node template"]);
            let steps = steps.map(|what| not_run(what, why.clone(), None)).chain([process]).collect();
            return Report { host: About::read(None), steps };
        }
    };
    let mut steps = vec![step(
        "save and restore",
        zeroboot_vm::restores(&host).map(|()| "a saved guest goes on in a fork".into()).map_err(anyhow::Error::msg),
    )];
    match little(&host) {
        Ok((found, snapshot)) => {
            steps.push(step("little template", Ok(found)));
            let (forks, deadlines) = little_forks(&snapshot).await;
            steps.push(step("little forks", forks));
            steps.push(step("deadlines", deadlines));
        }
        Err(error) => {
            steps.push(step("little template", Err(error)));
            steps.extend(["little forks", "deadlines"].map(|what| not_run(what, "there is no little template", None)));
        }
    }
    let kvm = resolve::kvm_finding();
    let mut python = None;
    for (what, name, runtime) in
        [("python template", "python", Runtime::Python), ("node template", "node", Runtime::Node)]
    {
        let template = Store::of_user().context("cannot find a directory for templates").map(|store| store.open(name));
        steps.push(match template {
            _ if !kvm.works => {
                not_run(what, format!("no Linux guest can run here: {}", kvm.found), kvm.mend.as_deref())
            }
            Ok(Err(StoreError::Missing(_))) => not_run(
                what,
                format!("there is no template {name}"),
                Some(if name == "python" {
                    "build it, once, and run this again: zeroboot template build python"
                } else {
                    "build it, once, and run this again: zeroboot template build node"
                }),
            ),
            Ok(Err(error)) => step(what, Err(error.into())),
            Err(error) => not_run(what, format!("{error:#}"), Some("set ZEROBOOT_HOME to a directory")),
            Ok(Ok(template)) => {
                let config = TemplateConfig {
                    name: name.into(),
                    language: name.into(),
                    spec: ZygoteSpec::Vm { template: template.dir.clone() },
                    pool: 0,
                };
                let found = real(config, runtime).await;
                if name == "python" && found.is_ok() {
                    python = Some(template.dir);
                }
                step(what, found)
            }
        });
    }
    let speed = speed(&host, python.as_deref()).map(|found| match kvm.works {
        true => found,
        false => format!("{found}. This KVM is not the hardware kind: the ratio says something, the times do not"),
    });
    steps.push(step("fork speed", speed));
    steps.push(process);
    Report { host: About::read(Some(&host)), steps }
}

/// A template of a few bytes.
fn little(host: &Host) -> anyhow::Result<(String, Snapshot)> {
    let begin = Instant::now();
    let snapshot = bench::stand_in(host, bench::StandIn::Program, LITTLE.0, LITTLE.1, WorkingSet::default())?;
    let took = begin.elapsed().as_secs_f64() * 1e3;
    let state = snapshot.state();
    let left_out: Vec<String> = state.left_out().iter().map(|index| format!("{index:#x}")).collect();
    let left_out = if left_out.is_empty() { "none".into() } else { left_out.join(" ") };
    let msrs = state.msrs().len() + 2;
    Ok((
        format!("made in {took:.0} ms with {msrs} MSRs; left out, since KVM gives but does not take them: {left_out}"),
        snapshot,
    ))
}

/// Jailed forks of the little template through the engine: each has a memory and an answer of its own, and an end.
async fn little_forks(snapshot: &Snapshot) -> (Found, Found) {
    let engine = async {
        let (template, place) = vm::stored(snapshot)?;
        anyhow::Ok((start(&template, 0, AT_ONCE).await?, place))
    };
    let (engine, _place) = match engine.await {
        Ok(started) => started,
        Err(error) => {
            let error = format!("{error:#}");
            return (Err(anyhow::Error::msg(error.clone())), Err(anyhow::Error::msg(error)));
        }
    };
    let forks = in_batches(|number| {
        let engine = engine.clone();
        async move {
            // A generous deadline: the guest looks for its input once a second.
            let one = density::start_with(&engine, vm::PROGRAM, Duration::from_secs(30)).await?;
            density::answer(one, vm::PROGRAM, number).await
        }
    })
    .await
    .map(|(done, took)| format!("{}, each with its own answer and memory, in {took:.1} s", counted(done.len())));
    let deadlines = deadlines(&engine, |engine| async move {
        let one = density::start_with(&engine, vm::PROGRAM, TIMEOUT).await?;
        // The guest waits for an input that does not come.
        let done = one.execution.collect().await?;
        drop(one.stdin);
        Ok(done.report.outcome)
    })
    .await;
    engine.shutdown(Duration::from_secs(2)).await;
    (forks, deadlines)
}

fn counted(done: usize) -> String {
    if done >= FORKS {
        format!("{done} jailed forks")
    } else {
        format!("{done} jailed forks ({FORKS} would take too long here)")
    }
}

/// Runs `one` for each number below [`FORKS`], [`AT_ONCE`] at a time, until the budget is used up. What they gave, and
/// the seconds that it took.
async fn in_batches<T, F>(one: impl Fn(usize) -> F) -> anyhow::Result<(Vec<T>, f64)>
where
    T: Send + 'static,
    F: Future<Output = anyhow::Result<T>> + Send + 'static,
{
    let begin = Instant::now();
    let mut all = Vec::with_capacity(FORKS);
    while all.len() < FORKS && (all.is_empty() || begin.elapsed() < BUDGET) {
        let mut batch = JoinSet::new();
        for number in all.len()..(all.len() + AT_ONCE).min(FORKS) {
            batch.spawn(one(number));
        }
        while let Some(done) = batch.join_next().await {
            all.push(done.context("a task ended")??);
        }
    }
    Ok((all, begin.elapsed().as_secs_f64()))
}

/// Three runs that do not end by themselves.
async fn deadlines<F>(engine: &Engine, run: impl Fn(Engine) -> F) -> Found
where
    F: Future<Output = anyhow::Result<Outcome>>,
{
    let mut late = Duration::ZERO;
    for _ in 0..3 {
        let begin = Instant::now();
        let outcome = run(engine.clone()).await?;
        ensure!(outcome == Outcome::DeadlinePassed, "a run without an end ended as {}", outcome.as_str());
        late = late.max(begin.elapsed().saturating_sub(TIMEOUT));
    }
    ensure!(late < LATE, "a run ended {} ms after its timeout of {} ms", late.as_millis(), TIMEOUT.as_millis());
    Ok(format!("3 runs without an end were ended at {} ms, {} ms late at most", TIMEOUT.as_millis(), late.as_millis()))
}

/// The forks of a real template: all differ in what must differ, have the time of now, and end at their deadline.
async fn real(template: TemplateConfig, runtime: Runtime) -> Found {
    // The clock, then what must be another value in each fork.
    const PYTHON: &str = "import os, random, secrets, tempfile, time, uuid\nprint(time.time())\nprint(random.getrandbits(128))\n\
        print(secrets.token_hex(16))\nprint(uuid.uuid4())\nprint(os.urandom(16).hex())\nprint(tempfile.NamedTemporaryFile().name)\n";
    const NODE: &str = "const c = require('crypto'); console.log(Date.now() / 1000); console.log(Math.random());\n\
        console.log(c.randomUUID()); console.log(c.randomBytes(16).toString('hex'))\n";
    let (code, spin) = match runtime {
        Runtime::Python => (PYTHON, "while True: pass\n"),
        Runtime::Node => (NODE, "for (;;) {}\n"),
    };
    let name = template.name.clone();
    let begin = Instant::now();
    let engine = start(&template, 4, AT_ONCE + 4).await?;
    let loaded = begin.elapsed().as_secs_f64();
    let found = async {
        let (answers, took) = in_batches(|_| {
            let (engine, name) = (engine.clone(), name.clone());
            async move {
                let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
                let before = now();
                let done = engine.exec(ExecRequest::new(name, code)).await?.collect().await?;
                ensure!(
                    done.report.outcome == Outcome::Exited { code: 0 },
                    "a fork ended as {}: {}",
                    done.report.outcome.as_str(),
                    String::from_utf8_lossy(&done.stderr).trim()
                );
                Ok((before, String::from_utf8_lossy(&done.stdout).into_owned(), now()))
            }
        })
        .await?;
        let values = distinct(&answers)?;
        let deadline = deadlines(&engine, |engine| {
            let mut request = ExecRequest::new(name.clone(), spin);
            request.limits.timeout = TIMEOUT;
            async move { Ok(engine.exec(request).await?.collect().await?.report.outcome) }
        })
        .await?;
        Ok(format!(
            "loaded in {loaded:.1} s; {}, {values} values different in each and the clock right, in {took:.1} s; {deadline}",
            counted(answers.len())
        ))
    }
    .await;
    engine.shutdown(Duration::from_secs(2)).await;
    found
}

/// How many values each answer has, all of them different from those of all others, behind a clock between the times
/// before and after.
fn distinct(answers: &[(f64, String, f64)]) -> anyhow::Result<usize> {
    let mut seen = HashSet::new();
    let mut values = 0;
    for (before, text, after) in answers {
        let mut lines = text.lines();
        let clock: f64 = lines.next().and_then(|line| line.parse().ok()).context("a fork did not print its time")?;
        // A second for the rounding of a clock and for its setting.
        if clock < before - 1.0 || clock > after + 1.0 {
            bail!("a fork's clock is wrong by {:.1} s", (clock - before).abs().min((clock - after).abs()));
        }
        let lines: Vec<&str> = lines.collect();
        values = lines.len();
        for (number, line) in lines.into_iter().enumerate() {
            ensure!(seen.insert((number, line)), "value {number} is the same in two forks");
        }
    }
    ensure!(values > 0, "a fork printed no value");
    Ok(values)
}

/// The fork path against the prototype's order of calls, on the Python template or on a stand-in of its size.
fn speed(host: &Host, python: Option<&std::path::Path>) -> Found {
    let (snapshot, of) = match python {
        Some(dir) => (Snapshot::load(host, dir)?, "the python template"),
        None => {
            let (size, filled) = vm::STAND_IN;
            (
                bench::stand_in(host, bench::StandIn::Program, size, filled, WorkingSet::default())?,
                "a guest of a few bytes in the python template's size",
            )
        }
    };
    let request = request_frames(&ExecRequest::new("python", "print(1)\n"), uuid::Uuid::now_v7())?;
    // A few first: they say how many more there is time for.
    let begin = Instant::now();
    bench::forks(host, &snapshot, &request, 5)?;
    let each = begin.elapsed() / 10;
    let rounds = (BUDGET.as_secs_f64() / each.as_secs_f64().max(1e-6)) as usize;
    let rounds = rounds.clamp(5, FORKS);
    let forks = bench::forks(host, &snapshot, &request, rounds)?;
    let mut table = Results::default();
    let mut quantiles = |times| {
        let p50 = table.row("", times);
        (p50, table.last_p99())
    };
    let (ours, prototype) = (quantiles(forks.unpooled), quantiles(forks.prototype));
    let pooled = quantiles(forks.pooled);
    let slowest =
        forks.steps.into_iter().map(|step| (quantiles(step.times).0, step.name)).max_by(|a, b| a.0.total_cmp(&b.0));
    let slowest = slowest.map_or(String::new(), |(ms, name)| format!("; its slowest step is {name} ({ms:.3})"));
    Ok(format!(
        "{rounds} forks of {of}, ms at p50 and p99: unpooled {:.3} {:.3}, pooled {:.3} {:.3}, the prototype's order {:.3} {:.3} ({:.1} times \
         ours at p50){slowest}",
        ours.0,
        ours.1,
        pooled.0,
        pooled.1,
        prototype.0,
        prototype.1,
        prototype.0 / ours.0
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_that_two_forks_share_and_a_clock_that_is_wrong_are_found() {
        let answer = |text: &str| (100.0, text.to_owned(), 101.0);
        assert_eq!(distinct(&[answer("100.5\na\nb\n"), answer("100.6\nc\nd\n")]).unwrap(), 2);
        // The same value in another place is another one.
        assert_eq!(distinct(&[answer("100.5\na\nb\n"), answer("100.6\nb\na\n")]).unwrap(), 2);
        let wrong = |answers: &[(f64, String, f64)]| distinct(answers).unwrap_err().to_string();
        assert!(wrong(&[answer("100.5\na\nb\n"), answer("100.6\nc\nb\n")]).contains("value 1 is the same"));
        assert!(wrong(&[answer("90.0\na\n")]).contains("wrong by 10.0 s"));
        assert!(wrong(&[answer("100.5\n")]).contains("no value"));
        assert!(wrong(&[answer("what\na\n")]).contains("did not print its time"));
    }
}
