//! The nested suite: everything that needs a real `/dev/kvm`, in the lane, in one boot of it.
//!
//! 1. here: `zeroboot` is built, the templates' kernel and root file systems are assembled (network, no KVM) and tested,
//!    the test programs are compiled
//! 2. in the lane: the templates are booted and frozen, a first exec in each, then every test program
//!
//! A test program belongs to the lane when its file is `crates/*/tests/nested*.rs`, or is listed in [`ALSO`]. It finds
//! `ZEROBOOT_BIN` (the binary), `ZEROBOOT_HOME` (a store with the templates `python` and `node`, in memory),
//! `ZEROBOOT_TEST_ENGINE=vm` (for tests that run on either engine), `ZEROBOOT_NESTED=1` and `ZEROBOOT_REQUIRE_KVM=1`
//! (fail, do not skip) in its environment.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::nested::{self, Run};

/// Test programs that run elsewhere too, and mean more here.
const ALSO: [&str; 4] = ["byte_guests", "workers", "http", "http_kill"];
/// With `--more`: too long in an emulated machine for each change.
const MORE: &str = "sandboxes";
/// What runs of a test program unless `--more` or `--only` asks for all of it: what the engine decides, once. The other tests
/// ask the server about keys, listening and its own limits, or take minutes on an emulated CPU.
const SHORT: [(&str, &[&str]); 2] = [
    ("http", &["exec::", "slow::a_client_that_leaves"]),
    ("http_kill", &["a_killed_worker_ends", "no_sandbox_survives"]),
];
/// Contexts that the lane has alive at once: an interpreter takes many seconds to start on an emulated CPU.
const CONTEXTS: &str = "8";
const TEMPLATES: [&str; 2] = ["python", "node"];
/// What a first exec in each template must print.
const FIRST_EXECS: [(&str, &str, &str); 2] = [
    ("python", "import numpy as np; print(int((np.arange(6).reshape(2,3) @ np.ones(3)).sum()))", "15"),
    ("node", "console.log([1,2,3].map(x => x * 14)[2])", "42"),
];

/// `step NAME COMMAND...` runs a command and says what became of it; `exec_prints RUNTIME CODE OUTPUT` is one.
pub(crate) const STEPS: &str = "failed=
step() {
    name=$1; shift
    started=$(cut -d. -f1 /proc/uptime)
    if \"$@\"; then word=passed; else word=FAILED; failed=\"$failed $name\"; fi
    echo \"== $name: $word ($(($(cut -d. -f1 /proc/uptime) - started)) s)\"
}
exec_prints() {
    got=$(\"$ZEROBOOT_BIN\" run --engine vm --runtime \"$1\" -c \"$2\") && [ \"$got\" = \"$3\" ] && return
    echo \"printed '$got', not '$3'\"
    return 1
}
";
pub(crate) const STEPS_END: &str = "[ -z \"$failed\" ] || { echo \"failed:$failed\"; exit 1; }\n";

const USAGE: &str = "\
cargo xtask nested-suite [OPTION...] [FILTER]

Builds zeroboot, assembles its templates, and runs in the nested lane: the templates' builds, a first exec in each,
and every test program for the lane (crates/*/tests/nested*.rs, byte_guests, workers, http, http_kill, sandboxes), those tests
that match FILTER.

  --debug            the debug build of zeroboot
  --kernel VERSION   of the lane (6.1)
  --timeout SECONDS  of the lane (2400)
  --memory SIZE      of the lane (5G)
  --more             also `sandboxes`, and all of `http` and `http_kill`; give it a longer --timeout
  --only PROGRAM     of the test programs, this one; may be repeated. `sandboxes` needs no --more then
  --no-templates     neither assemble nor build templates, nor test what they are made of
";

/// `cargo xtask nested-suite`.
pub(crate) fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    match run(args) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("nested suite: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut args: impl Iterator<Item = OsString>) -> Result<u8> {
    let (mut debug, mut templates, mut more, mut filter) = (false, true, false, None);
    let mut only = Vec::new();
    let mut lane = Run::new(Vec::new());
    lane.timeout = Duration::from_secs(2400);
    lane.set_memory("5G");
    while let Some(arg) = args.next() {
        let mut value = || args.next().and_then(|value| value.into_string().ok()).context("an option needs a value");
        match arg.to_str() {
            Some("--help" | "-h") => {
                print!("{USAGE}");
                return Ok(0);
            }
            Some("--debug") => debug = true,
            Some("--more") => more = true,
            Some("--only") => only.push(value()?),
            Some("--no-templates") => templates = false,
            Some("--kernel") => lane.set_kernel(&value()?)?,
            Some("--memory") => lane.set_memory(&value()?),
            Some("--timeout") => lane.timeout = Duration::from_secs(value()?.parse().context("--timeout")?),
            Some(word) if !word.starts_with('-') && filter.is_none() => filter = Some(word.to_owned()),
            _ => bail!("what is {}?\n\n{USAGE}", arg.display()),
        }
    }

    let zeroboot = timed("zeroboot is built", || nested::build_zeroboot(debug))?;
    if templates {
        timed("the templates are assembled", || nested::assemble_templates(&zeroboot))?;
        timed("what they are made of is tested", assembly_tests)?;
    }
    let programs = timed("the test programs are built", || test_programs(&wanted(more, &only)?))?;
    let filters = |program: &str| match &filter {
        Some(filter) => vec![filter.as_str()],
        None if more || !only.is_empty() => Vec::new(),
        None => SHORT.iter().find(|(name, _)| *name == program).map(|(_, tests)| tests.to_vec()).unwrap_or_default(),
    };
    lane.command = vec!["/bin/sh".into(), "-c".into(), script(templates, &programs, filters)?.into()];
    lane.env("ZEROBOOT_BIN", &zeroboot);
    lane.env("ZEROBOOT_HOME", "/dev/shm/zeroboot");
    lane.env("ZEROBOOT_REQUIRE_KVM", "1");
    lane.env("ZEROBOOT_TEST_ENGINE", "vm");
    lane.env("ZEROBOOT_TEST_CONTEXTS", CONTEXTS);
    timed("the lane is done", || nested::run(&lane))
}

fn timed<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let done = work()?;
    eprintln!("nested suite: {what} ({:.1} s)", start.elapsed().as_secs_f64());
    Ok(done)
}

/// The tests that need package mirrors, which `cargo test` leaves out.
fn assembly_tests() -> Result<()> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["test", "--quiet", "--workspace", "--test", "assemble", "--", "--ignored"]);
    let status = cargo.current_dir(nested::repository()?).status().context("cannot run cargo")?;
    ensure!(status.success(), "the assembly tests failed (they need cpio, unshare, pip and npm)");
    Ok(())
}

pub(crate) struct Program {
    pub(crate) name: String,
    pub(crate) executable: PathBuf,
    directory: PathBuf,
}

/// The names of the lane's test programs.
fn wanted(more: bool, only: &[String]) -> Result<Vec<String>> {
    let repository = nested::repository()?;
    let mut wanted: Vec<String> =
        ALSO.iter().chain((more || !only.is_empty()).then_some(&MORE)).map(|test| (*test).to_owned()).collect();
    for package in names_in(&repository.join("crates"))? {
        for file in names_in(&repository.join("crates").join(&package).join("tests"))? {
            wanted.extend(file.strip_suffix(".rs").filter(|test| test.starts_with("nested")).map(str::to_owned));
        }
    }
    if let Some(unknown) = only.iter().find(|name| !wanted.contains(name)) {
        bail!("the lane has no test program {unknown}");
    }
    wanted.retain(|test| only.is_empty() || only.contains(test));
    Ok(wanted)
}

/// Compiles test programs and says where they are. Of the whole workspace, as `cargo test` does: with the features of one
/// package alone, its dependencies would be compiled once more.
pub(crate) fn test_programs(wanted: &[String]) -> Result<Vec<Program>> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["test", "--no-run", "--quiet", "--workspace", "--message-format=json-render-diagnostics"]);
    cargo.current_dir(nested::repository()?);
    for test in wanted {
        cargo.args(["--test", test]);
    }
    let output = cargo.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "the test programs do not build");
    let text = String::from_utf8_lossy(&output.stdout);
    let programs: Vec<Program> = text.lines().filter_map(program).collect();
    for test in wanted {
        ensure!(programs.iter().any(|program| program.name == *test), "cargo built no test {test}");
    }
    Ok(programs)
}

/// A test program, out of a line of cargo's.
fn program(line: &str) -> Option<Program> {
    let message: Value = serde_json::from_str(line).ok()?;
    let target = message.get("target")?;
    let is_test = target.get("kind")?.as_array()?.iter().any(|kind| kind == "test");
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    Some(Program {
        name: text(target.get("name")).filter(|_| is_test)?,
        executable: text(message.get("executable"))?.into(),
        directory: Path::new(&text(message.get("manifest_path"))?).parent()?.to_owned(),
    })
}

/// The names in a directory, sorted; none when it is not there.
fn names_in(dir: &Path) -> Result<Vec<String>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        names.extend(entry?.file_name().into_string().ok());
    }
    names.sort();
    Ok(names)
}

/// What runs in the lane. Every step runs, whatever became of those before; the status says whether all succeeded.
fn script<'a>(templates: bool, programs: &[Program], filters: impl Fn(&str) -> Vec<&'a str>) -> Result<String> {
    let quote = nested::quoted_text;
    let mut script = String::from(STEPS);
    if templates {
        for name in TEMPLATES {
            script += &format!("step template-{name} \"$ZEROBOOT_BIN\" template build {name} --offline\n");
        }
        for (runtime, code, expected) in FIRST_EXECS {
            script +=
                &format!("step first-exec-{runtime} exec_prints {runtime} {} {}\n", quote(code)?, quote(expected)?);
        }
    }
    for Program { name, executable, directory } in programs {
        let text = |path: &Path| quote(path.to_str().context("a path is not UTF-8")?);
        script += &format!("cd {} || exit 125\n", text(directory)?);
        script += &format!("step {name} {}", text(executable)?);
        for filter in filters(name) {
            script += &format!(" {}", quote(filter)?);
        }
        // An emulated CPU: tests that measure time must not disturb each other.
        script += " --test-threads=1\n";
    }
    script += STEPS_END;
    Ok(script)
}
