//! The nested lane: a machine emulated in software, in which KVM is the hardware kind.
//!
//! ```text
//! this machine ── QEMU (TCG: AMD SVM, nested paging) ── L1: Debian's stock kernel, kvm_amd   ── /dev/kvm ── our VMs
//! this machine ── Bochs (Intel VMX, EPT, APICv, PML) ── L1: Debian's stock kernel, kvm_intel ── /dev/kvm ── our VMs
//! ```
//!
//! Nothing is left behind, however a run ends: it has no temporary files (pipes and memory files only), and the emulator
//! asks the kernel to be killed with its parent ([`child`]).

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use zeroboot_template::cpio::{self, Entry};

mod amd;
mod emulator;
mod intel;
mod parts;

pub(crate) use emulator::child;
use parts::Flavour;

/// The hidden task that [`child`] is.
pub(crate) const CHILD: &str = "__bound-to-parent";
/// The lane itself failed; COMMAND did not run to its end.
const LANE_FAILED: u8 = 125;
const TIMED_OUT: u8 = 124;

const USAGE: &str = "\
cargo xtask nested [OPTION...] -- COMMAND [ARG...]
cargo xtask nested --cpu intel [--full] [OPTION...] [-- COMMAND [ARG...]]

Runs COMMAND in a Linux machine that is emulated in software with its virtualisation, so that it sees a /dev/kvm of the
hardware kind. Needs apt and dpkg-deb (Debian), no root and no KVM. The emulator, the kernel and busybox are fetched once
with this machine's own package sources and unpacked below ~/.cache/zeroboot/nested, not installed.

COMMAND's standard input is empty, its standard output and error and its exit status are passed on. `zeroboot` as COMMAND
is this project's own binary, built first.

AMD, the default (QEMU): COMMAND sees this machine's files (writes are thrown away), and read-write at the same paths: the
repository, the cache directory and each --share. Its directory is the present one. Templates that it builds are kept in
~/.cache/zeroboot/nested/home, for the next run (ZEROBOOT_HOME).

Intel (Bochs, built once; needs g++, make and xz): COMMAND sees a small system: busybox, zeroboot, and in /tests the programs
byte_guests, workers and nested_linux. Without COMMAND the lane's short form runs: byte_guests, workers, doctor, a fork
benchmark.

  --cpu CPU          amd (default), intel (a Skylake server) or intel-broadwell
  --full             Intel without COMMAND: template, behaviour, identity, kernel 6.12, a second CPU, KVM's other modes
  --templates        Intel: put the assembled template `python` into the machine, for its build with --offline
  --timeout SECONDS  of the whole run (900); exit status 124
  --memory SIZE      of the machine (3G; Intel always has 2G)
  --cpus N           AMD (1; with more, QEMU takes interrupts where it must not, and once in some hundred execs the
                     emulated machine or a VM in it crashes)
  --kernel VERSION   6.1 (default) or 6.12
  --share DIR        AMD: one more directory that is read-write; repeatable
  --env NAME=VALUE   set in COMMAND's environment, NAME alone passes ours on; repeatable. ZEROBOOT_*, RUST_LOG,
                     RUST_BACKTRACE, CI and NO_COLOR are passed on anyway
  --debug            build `zeroboot` without optimisation
  --console          show the machine's console on standard error
  --fetch-only       fetch and build what a run needs, and no more

Exit status: COMMAND's; 125 when the lane failed; 124 when the time ran out.
";

/// Whose virtualisation the machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cpu {
    Amd,
    Intel(intel::Model),
}

impl Cpu {
    fn parse(text: &str) -> Result<Cpu> {
        match text {
            "amd" => Ok(Cpu::Amd),
            "intel" => Ok(Cpu::Intel(intel::Model::SkylakeX)),
            "intel-broadwell" => Ok(Cpu::Intel(intel::Model::Broadwell)),
            _ => bail!("no CPU {text} here: amd, intel or intel-broadwell"),
        }
    }
}

/// One run of the lane.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) command: Vec<OsString>,
    pub(crate) timeout: Duration,
    cpu: Cpu,
    memory: String,
    cpus: String,
    flavour: Flavour,
    shares: Vec<PathBuf>,
    /// Whether the Python template, assembled, is in the Intel machine. The AMD machine has this machine's files.
    templates: bool,
    /// Whether programs are built without optimisation.
    debug: bool,
    env: Vec<(OsString, OsString)>,
    show_console: bool,
}

impl Run {
    /// `command` with the defaults.
    pub(crate) fn new(command: Vec<OsString>) -> Run {
        Run {
            command,
            timeout: Duration::from_secs(900),
            cpu: Cpu::Amd,
            memory: "3G".to_owned(),
            // With two, QEMU 10.0 now and then takes an interrupt between the end of VMRUN and KVM's STGI: with the
            // guest's GS base in the host's kernel. One of the two crashes.
            cpus: "1".to_owned(),
            flavour: Flavour::Linux6_1,
            shares: Vec::new(),
            templates: false,
            debug: false,
            env: Vec::new(),
            show_console: false,
        }
    }

    pub(crate) fn set_memory(&mut self, size: &str) {
        size.clone_into(&mut self.memory);
    }

    pub(crate) fn set_kernel(&mut self, version: &str) -> Result<()> {
        self.flavour = Flavour::parse(version)?;
        Ok(())
    }

    /// Sets a variable in the command's environment.
    pub(crate) fn env(&mut self, name: impl Into<OsString>, value: impl Into<OsString>) {
        self.env.push((name.into(), value.into()));
    }
}

/// `cargo xtask nested`.
pub(crate) fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let outcome = parse(args).and_then(|task| match task {
        Task::Help => {
            print!("{USAGE}");
            Ok(0)
        }
        Task::FetchOnly(run) => match run.cpu {
            Cpu::Amd => amd::fetch(&run).map(|_| 0),
            Cpu::Intel(_) => intel::fetch(&run).map(|_| 0),
        },
        Task::Run(mut run) => {
            if run.cpu == Cpu::Amd && run.command[0] == "zeroboot" {
                let zeroboot = build_zeroboot(run.debug)?;
                if let Err(error) = assemble_templates(&zeroboot) {
                    // The command may need none.
                    eprintln!("nested lane: {error:#}");
                }
                run.command[0] = zeroboot.into();
            }
            self::run(&run)
        }
        Task::Form { run, full } => intel::form(&run, full),
    });
    match outcome {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("nested lane: {error:#}");
            ExitCode::from(LANE_FAILED)
        }
    }
}

enum Task {
    Help,
    FetchOnly(Run),
    Run(Run),
    /// What the Intel lane runs when it is told no command.
    Form {
        run: Run,
        full: bool,
    },
}

fn parse(mut args: impl Iterator<Item = OsString>) -> Result<Task> {
    let mut run = Run::new(Vec::new());
    let (mut fetch_only, mut full) = (false, false);
    let (mut for_amd, mut for_intel) = (None, None);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{} needs a value", arg.display()));
        match arg.to_str() {
            Some("--memory" | "--cpus" | "--share") => for_amd = Some(arg.clone()),
            Some("--full" | "--templates") => for_intel = Some(arg.clone()),
            _ => {}
        }
        match arg.to_str() {
            Some("--help" | "-h") => return Ok(Task::Help),
            Some("--debug") => run.debug = true,
            Some("--console") => run.show_console = true,
            Some("--fetch-only") => fetch_only = true,
            Some("--full") => full = true,
            Some("--templates") => run.templates = true,
            Some("--cpu") => run.cpu = Cpu::parse(&text(value()?)?)?,
            Some("--timeout") => run.timeout = Duration::from_secs(number(&value()?)?),
            Some("--memory") => run.set_memory(&text(value()?)?),
            Some("--cpus") => run.cpus = number(&value()?)?.to_string(),
            Some("--kernel") => run.set_kernel(&text(value()?)?)?,
            Some("--share") => run.shares.push(fs::canonicalize(value()?).context("--share")?),
            Some("--env") => {
                let pair = value()?;
                let bytes = pair.as_bytes();
                match bytes.iter().position(|byte| *byte == b'=') {
                    Some(at) => run.env(OsStr::from_bytes(&bytes[..at]), OsStr::from_bytes(&bytes[at + 1..])),
                    None => {
                        let value =
                            std::env::var_os(&pair).with_context(|| format!("{} is not set", pair.display()))?;
                        run.env(pair, value);
                    }
                }
            }
            Some("--") => {
                run.command = args.collect();
                break;
            }
            Some(option) if option.starts_with('-') => bail!("no option is called {option}\n\n{USAGE}"),
            _ => {
                run.command.push(arg);
                run.command.extend(args);
                break;
            }
        }
    }
    let (misplaced, cpu) = if run.cpu == Cpu::Amd { (for_intel, "amd") } else { (for_amd, "intel") };
    if let Some(option) = misplaced {
        bail!("{} means nothing with --cpu {cpu}", option.display());
    }
    ensure!(!full || run.command.is_empty(), "--full is what the lane runs without a COMMAND");
    if fetch_only {
        return Ok(Task::FetchOnly(run));
    }
    if run.command.is_empty() && run.cpu != Cpu::Amd {
        return Ok(Task::Form { run, full });
    }
    ensure!(!run.command.is_empty(), "no COMMAND given\n\n{USAGE}");
    Ok(Task::Run(run))
}

fn text(value: OsString) -> Result<String> {
    value.into_string().ok().context("not a text")
}

fn number(value: &OsStr) -> Result<u64> {
    value.to_str().and_then(|text| text.parse().ok()).with_context(|| format!("{} is no number", value.display()))
}

/// The repository.
pub(crate) fn repository() -> Result<PathBuf> {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    fs::canonicalize(xtask.parent().context("no repository")?).context("cannot find the repository")
}

/// Where the lane keeps what it fetched.
pub(crate) fn cache_dir() -> Result<PathBuf> {
    let cache = zeroboot_template::paths::cache_dir().context("neither XDG_CACHE_HOME nor HOME is set")?;
    let dir = cache.join("nested");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    fs::canonicalize(dir).context("cannot find the cache directory")
}

pub(crate) fn target_dir() -> Result<PathBuf> {
    Ok(std::env::var_os("CARGO_TARGET_DIR").map_or(repository()?.join("target"), PathBuf::from))
}

/// Builds the project's binary and says where it is.
pub(crate) fn build_zeroboot(debug: bool) -> Result<PathBuf> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // The one that `cargo test` makes is there already, with the same features; a test program asks for it.
    let debug_build = ["test", "--no-run", "--quiet", "--workspace", "--test", "run"].as_slice();
    let release_build = ["build", "--quiet", "--package", "zeroboot", "--release"].as_slice();
    command.args(if debug { debug_build } else { release_build }).current_dir(repository()?);
    ensure!(command.status().context("cannot run cargo")?.success(), "zeroboot does not build");
    Ok(target_dir()?.join(if debug { "debug" } else { "release" }).join("zeroboot"))
}

/// What the templates are made from is fetched here: there is no network in the lane. Then it is in the cache.
pub(crate) fn assemble_templates(zeroboot: &Path) -> Result<()> {
    for name in ["python", "node"] {
        let status = Command::new(zeroboot).args(["template", "assemble", name]).stdout(Stdio::null()).status();
        ensure!(status.context("cannot run zeroboot")?.success(), "zeroboot template assemble {name} failed");
    }
    Ok(())
}

/// Runs a command in the lane and gives its exit status.
pub(crate) fn run(run: &Run) -> Result<u8> {
    match run.cpu {
        Cpu::Amd => amd::run(run),
        Cpu::Intel(model) => intel::run(run, model),
    }
}

/// A second archive behind the constant one: what L1 is to do this time.
fn job(run: &Run, conf: &[u8], directory: &Path, environment: &[(OsString, OsString)]) -> Result<Vec<u8>> {
    let mut command = Vec::new();
    let mut line = |parts: &[&[u8]]| {
        parts.iter().for_each(|part| command.extend_from_slice(part));
        command.push(b'\n');
    };
    line(&[b"cd ", &quoted(directory.as_os_str()), b" || exit 125"]);
    for (name, value) in environment {
        line(&[b"export ", name.as_bytes(), b"=", &quoted(value)]);
    }
    let mut words: Vec<Vec<u8>> = vec![b"exec".to_vec()];
    words.extend(run.command.iter().map(|word| quoted(word)));
    line(&[&words.join(&b' ')]);

    let mut archive = cpio::Writer::new(Vec::new());
    archive.append(&Entry::file("job.conf", 0o644, conf))?;
    archive.append(&Entry::file("job", 0o644, &command))?;
    Ok(archive.finish()?)
}

/// What a command finds in its environment: `defaults`, what of ours is passed on, `machine`, and what the run sets.
fn environment(
    run: &Run,
    defaults: Vec<(OsString, OsString)>,
    also: &[&str],
    machine: &[(&str, &str)],
) -> Vec<(OsString, OsString)> {
    let passed = |name: &OsStr| {
        name.as_bytes().starts_with(b"ZEROBOOT_")
            || ["RUST_LOG", "RUST_BACKTRACE", "CI", "NO_COLOR"].iter().chain(also).any(|known| name == *known)
    };
    let mut env = defaults;
    env.extend(std::env::vars_os().filter(|(name, _)| passed(name)));
    env.push(("ZEROBOOT_NESTED".into(), "1".into()));
    env.extend(machine.iter().map(|(name, value)| (name.into(), value.into())));
    env.extend(run.env.iter().cloned());
    env
}

/// As [`quoted`].
pub(crate) fn quoted_text(word: &str) -> Result<String> {
    Ok(String::from_utf8(quoted(OsStr::new(word)))?)
}

/// A word for a POSIX shell.
fn quoted(word: &OsStr) -> Vec<u8> {
    let mut out = vec![b'\''];
    for byte in word.as_bytes() {
        match byte {
            b'\'' => out.extend_from_slice(b"'\\''"),
            byte => out.push(*byte),
        }
    }
    out.push(b'\'');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_survives_the_shell() {
        for word in ["plain", "", "two words", "it's", "$(id) `id` \\ \" ; \n end"] {
            let mut script = b"printf %s ".to_vec();
            script.extend(quoted(OsStr::new(word)));
            let output = Command::new("sh").arg("-c").arg(OsStr::from_bytes(&script)).output().unwrap();
            assert_eq!(output.stdout, word.as_bytes());
        }
    }

    #[test]
    fn options_end_where_the_command_begins() {
        let args = ["--timeout", "5", "--env", "A=b=c", "--", "ls", "--timeout"].map(OsString::from);
        let Task::Run(run) = parse(args.into_iter()).unwrap() else { panic!("not a run") };
        assert_eq!(run.command, ["ls", "--timeout"]);
        assert_eq!(run.timeout, Duration::from_secs(5));
        assert_eq!(run.env, [("A".into(), "b=c".into())]);
        assert!(parse(["--nonsense"].map(OsString::from).into_iter()).is_err());
        assert!(parse(std::iter::empty()).is_err());
    }
    #[test]
    fn an_option_of_the_other_cpu_is_refused() {
        let parsed = |words: &str| parse(words.split(' ').map(OsString::from));
        assert!(matches!(parsed("--cpu intel --full"), Ok(Task::Form { full: true, .. })));
        assert!(matches!(parsed("--cpu intel -- true"), Ok(Task::Run(Run { cpu: Cpu::Intel(_), .. }))));
        for wrong in
            ["--cpu intel --memory 3G", "--full", "--templates -- true", "--cpu intel --full -- true", "--cpu z80"]
        {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }
}
