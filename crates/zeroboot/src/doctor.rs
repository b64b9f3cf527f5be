//! `zeroboot doctor`: what this host can do, what will be used, what to fix and how. It finds out by doing.

mod full;
mod host;

use std::{fmt, time::Duration};

use anyhow::Context;
use serde::Serialize;
use zeroboot_engine::{Engine, ExecRequest, Limits, Outcome};

use crate::{
    cli::{DoctorArgs, EngineChoice, Runtime},
    printer, resolve,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    /// It works, with less.
    Weaker,
    /// It does not work.
    Missing,
    /// It was not tried, for the reason given: nothing is known of it.
    NotRun,
}

impl Verdict {
    fn mark(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Weaker => "weaker",
            Verdict::Missing => "missing",
            Verdict::NotRun => "not run",
        }
    }
}

#[derive(Debug, Serialize)]
struct Check {
    what: &'static str,
    verdict: Verdict,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
}

#[derive(Debug, Serialize)]
struct Diagnosis {
    checks: Vec<Check>,
    /// The engine that `--engine auto` takes; none if nothing can run.
    engine: Option<&'static str>,
    why: String,
    /// With `--full`.
    #[serde(skip_serializing_if = "Option::is_none")]
    full: Option<full::Report>,
}

/// Prints the diagnosis; 1 if no engine works, or if a step of `--full` failed.
pub(crate) fn run(args: &DoctorArgs) -> anyhow::Result<u8> {
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let diagnosis = tokio.block_on(diagnose(args));
    let failed = diagnosis.full.as_ref().is_some_and(|report| report.failed() > 0);
    let status = u8::from(diagnosis.engine.is_none() || failed);
    let mut text = if args.json { serde_json::to_string_pretty(&diagnosis)? + "\n" } else { diagnosis.to_string() };
    if args.full {
        // It goes into an issue: the user's name is in paths of the home directory.
        text = host::without_home(&text);
    }
    printer::stdout(text.as_bytes())?;
    Ok(status)
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(report) = &self.full {
            writeln!(f, "{}", report.host)?;
        }
        for check in self.checks.iter().chain(self.full.iter().flat_map(|report| &report.steps)) {
            writeln!(f, "{:<7}  {:<18} {}", check.verdict.mark(), check.what, check.found)?;
            if let Some(mend) = &check.mend {
                writeln!(f, "{:28} to mend: {mend}", "")?;
            }
        }
        match self.engine {
            Some(engine) => writeln!(f, "\n`--engine auto` takes the {engine} engine: {}", self.why)?,
            None => writeln!(f, "\nNo engine works here: {}", self.why)?,
        }
        match &self.full {
            Some(report) => writeln!(f, "{}", report.summary()),
            None => Ok(()),
        }
    }
}

async fn diagnose(args: &DoctorArgs) -> Diagnosis {
    let mut checks = vec![kernel(), kvm(), worker_namespaces(), landlock(), users()];
    let mut works = false;
    for runtime in [Runtime::Python, Runtime::Node] {
        let (check, ok) = canary(runtime, args, &mut checks).await;
        checks.push(check);
        works |= ok;
    }
    let (engine, why) = match resolve::choose_engine(EngineChoice::Auto) {
        Ok((EngineChoice::Vm, why)) => (Some("vm"), why),
        Ok((_, why)) if works => (Some("process"), why),
        Ok((_, why)) => (None, format!("{why}, and the process engine ran no code")),
        Err(error) => (None, error.to_string()),
    };
    let full = if args.full { Some(full::report(&args.from).await) } else { None };
    Diagnosis { checks, engine, why, full }
}

fn kernel() -> Check {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let who = if rustix::process::geteuid().is_root() { "root" } else { "an ordinary user" };
    let found = format!("Linux {release}, as {who}");
    if version >= (5, 14) {
        Check { what: "kernel", verdict: Verdict::Ok, found, mend: None }
    } else {
        let mend = Some("Linux 5.14 or newer is needed (mount_setattr, per-namespace process limits)".into());
        Check { what: "kernel", verdict: Verdict::Missing, found, mend }
    }
}

fn kvm() -> Check {
    let finding = resolve::kvm_finding();
    Check {
        what: "/dev/kvm",
        verdict: if finding.works { Verdict::Ok } else { Verdict::Missing },
        found: finding.found,
        mend: finding.mend,
    }
}

fn worker_namespaces() -> Check {
    let what = "vm: namespaces";
    match zeroboot_vm::workers_have_namespaces() {
        Ok(()) => Check { what, verdict: Verdict::Ok, found: "each worker has its own".into(), mend: None },
        Err(error) => Check {
            what,
            verdict: Verdict::Weaker,
            found: format!("workers share their zygote's, if any ({error}); seccomp stands behind the VM"),
            mend: Some("allow unprivileged user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)".into()),
        },
    }
}

fn landlock() -> Check {
    match zeroboot_sys::jail::landlock_version() {
        0 => Check {
            what: "Landlock",
            verdict: Verdict::Weaker,
            found: "not in this kernel".into(),
            mend: Some("boot with lsm=...,landlock; without it the mount namespace alone guards files".into()),
        },
        version => Check {
            what: "Landlock",
            verdict: if version >= 6 { Verdict::Ok } else { Verdict::Weaker },
            found: format!(
                "version {version}{}",
                if version >= 6 { "" } else { " (6 also scopes signals and abstract sockets)" }
            ),
            mend: None,
        },
    }
}

fn users() -> Check {
    let what = "process: users";
    match zeroboot_process::shared_because() {
        None => Check { what, verdict: Verdict::Ok, found: "each sandbox has a user of the host of its own".into(), mend: None },
        Some(reason) => Check {
            what,
            verdict: Verdict::Weaker,
            found: format!("sandboxes share this user and its counts in the kernel (watches, timers, pipes): {reason}"),
            mend: Some(
                "run as root, with ambient CAP_SETUID and CAP_SETGID as deploy/systemd does, or with subordinate ids (usermod --add-subuids, package uidmap)"
                    .into(),
            ),
        },
    }
}

/// Runs a line of code through the process engine, as `run` would.
async fn canary(runtime: Runtime, args: &DoctorArgs, checks: &mut Vec<Check>) -> (Check, bool) {
    let what = match runtime {
        Runtime::Python => "process: python",
        Runtime::Node => "process: node",
    };
    let missing = |found: String, mend: Option<String>| (Check { what, verdict: Verdict::Missing, found, mend }, false);
    let template = match resolve::process_template(runtime, None, &args.from, None, 0) {
        Ok(template) => template,
        Err(error) => return missing(error.to_string(), crate::hint::of(&error)),
    };
    let interpreter = resolve::runtime_of(&template.spec);
    let limits = Limits { timeout: Duration::from_secs(10), ..Limits::default() };
    let config = match resolve::engine_config(vec![template], 1, limits.memory) {
        Ok(config) => config,
        Err(error) => return missing(error.to_string(), None),
    };
    let engine = match Engine::start(config).await {
        Ok(engine) => engine,
        Err(error) => {
            let error = anyhow::Error::from(error);
            return missing(format!("{error:#}"), Some("as root it needs nothing more; else allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, and on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0)".into()));
        }
    };
    if !checks.iter().any(|check| check.what == "cgroup v2") {
        checks.push(match engine.cgroup_obstacle() {
            None => Check {
                what: "cgroup v2",
                verdict: Verdict::Ok,
                found: "memory, pids and cpu for each sandbox".into(),
                mend: None,
            },
            Some(obstacle) => Check {
                what: "cgroup v2",
                verdict: Verdict::Weaker,
                found: format!("none: {obstacle}; rlimits and the agent's own watch hold the limits"),
                mend: Some(
                    "run as root or under systemd with Delegate=yes, with cgroup v2 controllers memory, pids, cpu"
                        .into(),
                ),
            },
        });
    }
    let code = match runtime {
        Runtime::Python => "print(6 * 7)",
        Runtime::Node => "console.log(6 * 7)",
    };
    let request = ExecRequest { limits, ..ExecRequest::new(runtime.name(), code) };
    let ran = async { engine.exec(request).await?.collect().await }.await;
    let status = engine.templates().pop();
    engine.shutdown(Duration::from_secs(1)).await;
    match ran {
        Ok(done) if done.report.outcome == (Outcome::Exited { code: 0 }) && done.stdout == b"42\n" => {
            let (version, warmed) = status.map(|status| (status.version, status.warmed)).unwrap_or_default();
            let warmed =
                if warmed.is_empty() { "nothing warmed".to_owned() } else { format!("warm: {}", warmed.join(", ")) };
            let fork = done.report.fork_time.as_secs_f64() * 1e3;
            let found =
                format!("{version} ({interpreter}): ran a line of code (fork {fork:.1} ms, not pooled); {warmed}");
            (Check { what, verdict: Verdict::Ok, found, mend: None }, true)
        }
        Ok(done) => missing(
            format!(
                "the code ended as {}: {}",
                done.report.outcome.as_str(),
                String::from_utf8_lossy(&done.stderr).trim()
            ),
            None,
        ),
        Err(error) => missing(error.to_string(), None),
    }
}
