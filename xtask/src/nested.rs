//! The nested lane: a machine emulated in software, in which KVM is the hardware kind.
//!
//! ```text
//! this machine ── QEMU (TCG: AMD SVM, nested paging) ── L1: Debian's stock kernel, kvm_amd ── /dev/kvm ── our VMs
//! ```
//!
//! L1's root is this machine's own, read-only over 9p, under an overlay in memory: every tool and library here works
//! there at the same path, and what is written is thrown away. The shares (the repository, our cache directory) are
//! read-write at the same paths. There is no network in L1.
//!
//! Nothing is left behind, however a run ends: it has no temporary files (pipes and memory files only), and QEMU asks
//! the kernel to be killed with its parent ([`child`]).

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::{self, Read, Seek, SeekFrom, Write},
    os::{
        fd::AsRawFd,
        unix::{ffi::OsStrExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    fs::MemfdFlags,
    io::FdFlags,
    process::{Signal, set_parent_process_death_signal},
};
use zeroboot_template::cpio::{self, Entry};

mod parts;

use parts::{Flavour, Parts};

/// The hidden task that [`child`] is.
pub(crate) const CHILD: &str = "__bound-to-parent";
/// The lane itself failed; COMMAND did not run to its end.
const LANE_FAILED: u8 = 125;
const TIMED_OUT: u8 = 124;

const USAGE: &str = "\
cargo xtask nested [OPTION...] -- COMMAND [ARG...]

Runs COMMAND in a Linux machine that QEMU emulates in software, with AMD SVM and nested paging, so that it sees a
/dev/kvm of the hardware kind. Needs apt and dpkg-deb (Debian), no root and no KVM; QEMU, kernel and busybox are
fetched once with this machine's own package sources and unpacked below ~/.cache/zeroboot/nested, not installed.

COMMAND sees this machine's files (writes are thrown away), and read-write at the same paths: the repository, the
cache directory and each --share. Its directory is the present one, its standard input is empty, its standard output
and error and its exit status are passed on. `zeroboot` as COMMAND is this project's own binary, built first.
Templates that it builds are kept in ~/.cache/zeroboot/nested/home, for the next run (ZEROBOOT_HOME).

  --timeout SECONDS  of the whole run (900); exit status 124
  --memory SIZE      of the machine (3G)
  --cpus N           (1; with more, QEMU takes interrupts where it must not, and once in some hundred execs the
                     emulated machine or a VM in it crashes)
  --kernel VERSION   6.1 (default) or 6.12
  --share DIR        one more directory that is read-write; repeatable
  --env NAME=VALUE   set in COMMAND's environment, NAME alone passes ours on; repeatable. ZEROBOOT_*, RUST_LOG,
                     RUST_BACKTRACE, CI and NO_COLOR are passed on anyway
  --debug            build `zeroboot` without optimisation
  --console          show the machine's console on standard error
  --fetch-only       fetch what a run needs, and no more

Exit status: COMMAND's; 125 when the lane failed; 124 when the time ran out.
";

/// One run of the lane.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) command: Vec<OsString>,
    pub(crate) timeout: Duration,
    memory: String,
    cpus: String,
    flavour: Flavour,
    shares: Vec<PathBuf>,
    env: Vec<(OsString, OsString)>,
    show_console: bool,
}

impl Run {
    /// `command` with the defaults.
    pub(crate) fn new(command: Vec<OsString>) -> Run {
        Run {
            command,
            timeout: Duration::from_secs(900),
            memory: "3G".to_owned(),
            // With two, QEMU 10.0 now and then takes an interrupt between the end of VMRUN and KVM's STGI: with the
            // guest's GS base in the host's kernel. One of the two crashes.
            cpus: "1".to_owned(),
            flavour: Flavour::Linux6_1,
            shares: Vec::new(),
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
        Task::FetchOnly(flavour) => Parts::get(&cache_dir()?, flavour).map(|_| 0),
        Task::Run { mut run, debug } => {
            if run.command[0] == "zeroboot" {
                let zeroboot = build_zeroboot(debug)?;
                if let Err(error) = assemble_templates(&zeroboot) {
                    // The command may need none.
                    eprintln!("nested lane: {error:#}");
                }
                run.command[0] = zeroboot.into();
            }
            self::run(&run)
        }
    });
    match outcome {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("nested lane: {error:#}");
            ExitCode::from(LANE_FAILED)
        }
    }
}

/// Becomes the program in `args`, which is killed when our parent ends, however it ends.
pub(crate) fn child(mut args: impl Iterator<Item = OsString>) -> ExitCode {
    let parent = args.next().unwrap_or_default();
    let program = args.next().unwrap_or_default();
    let bound = set_parent_process_death_signal(Some(Signal::KILL));
    // The parent may have ended before the line above.
    let alive = rustix::process::getppid().is_some_and(|pid| parent == *pid.as_raw_nonzero().to_string());
    if bound.is_err() || !alive {
        return ExitCode::from(LANE_FAILED);
    }
    let error = Command::new(&program).args(args).exec();
    eprintln!("nested lane: cannot run {}: {error}", program.display());
    ExitCode::from(LANE_FAILED)
}

enum Task {
    Help,
    FetchOnly(Flavour),
    Run { run: Run, debug: bool },
}

fn parse(mut args: impl Iterator<Item = OsString>) -> Result<Task> {
    let mut run = Run::new(Vec::new());
    let (mut debug, mut fetch_only) = (false, false);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{} needs a value", arg.display()));
        match arg.to_str() {
            Some("--help" | "-h") => return Ok(Task::Help),
            Some("--debug") => debug = true,
            Some("--console") => run.show_console = true,
            Some("--fetch-only") => fetch_only = true,
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
    if fetch_only {
        return Ok(Task::FetchOnly(run.flavour));
    }
    ensure!(!run.command.is_empty(), "no COMMAND given\n\n{USAGE}");
    Ok(Task::Run { run, debug })
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

fn target_dir() -> Result<PathBuf> {
    Ok(std::env::var_os("CARGO_TARGET_DIR").map_or(repository()?.join("target"), PathBuf::from))
}

/// Builds the project's binary and says where it is.
pub(crate) fn build_zeroboot(debug: bool) -> Result<PathBuf> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["build", "--quiet", "--package", "zeroboot"]).current_dir(repository()?);
    if !debug {
        command.arg("--release");
    }
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
    let cache = cache_dir()?;
    let parts = Parts::get(&cache, run.flavour)?;
    let home = cache.join("home");
    fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
    let shares = shares(run, &cache)?;

    let mut initrd = memory_file("initrd")?;
    initrd.write_all(&parts.initrd)?;
    initrd.write_all(&job(run, &shares, &home)?)?;
    let mut console = memory_file("console")?;
    let (mut out, out_end) = inherited_pipe()?;
    let (mut err, err_end) = inherited_pipe()?;
    let (mut status, status_end) = inherited_pipe()?;
    let fd_path = |fd: &dyn AsRawFd| format!("/proc/self/fd/{}", fd.as_raw_fd());

    let mut qemu = Command::new(std::env::current_exe().context("cannot find this program")?);
    qemu.arg(CHILD).arg(std::process::id().to_string()).args(&parts.qemu);
    // kvm_amd needs a CPU with SVM; `max` has it, and AVX2. q35, because microvm has no nested paging that works.
    qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-M", "q35", "-smp", &run.cpus, "-m", &run.memory]);
    qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    qemu.arg("-serial").arg(format!("file:{}", fd_path(&console)));
    qemu.arg("-kernel").arg(&parts.kernel).arg("-initrd").arg(fd_path(&initrd)).args(["-append", KERNEL_PARAMETERS]);
    qemu.args(["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]);
    qemu.args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]);
    for (i, share) in shares.iter().enumerate() {
        // A comma in a QEMU option is written twice.
        let path = share.to_str().context("a shared directory's name is not UTF-8")?.replace(',', ",,");
        qemu.arg("-fsdev").arg(format!("local,id=share{i},path={path},security_model=none,multidevs=remap"));
        qemu.arg("-device").arg(format!("virtio-9p-pci,fsdev=share{i},mount_tag=share{i}"));
    }
    qemu.args(["-device", "virtio-serial-pci"]);
    for (name, pipe) in [("out", &out_end), ("err", &err_end), ("status", &status_end)] {
        qemu.arg("-chardev").arg(format!("file,id={name},path={}", fd_path(pipe)));
        qemu.arg("-device").arg(format!("virtserialport,chardev={name},name={name}"));
    }
    qemu.args(["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"]);
    let mut qemu = qemu.stdin(Stdio::null()).stdout(Stdio::null()).spawn().context("cannot start QEMU")?;
    // Now QEMU holds the only writing ends, and its end is the end of each stream.
    drop((out_end, err_end, status_end));

    let streams = [
        thread::spawn(move || pass_on(&mut out, io::stdout())),
        thread::spawn(move || pass_on(&mut err, io::stderr())),
    ];
    let in_time = wait(&mut qemu, Instant::now() + run.timeout)?;
    for stream in streams {
        // A thread that panicked has said so.
        stream.join().ok();
    }
    let mut said = String::new();
    status.read_to_string(&mut said).context("cannot read the exit status")?;
    let status = said.trim().parse::<u8>();
    if run.show_console || (status.is_err() && in_time) {
        let mut text = Vec::new();
        console.seek(SeekFrom::Start(0))?;
        console.read_to_end(&mut text)?;
        for line in String::from_utf8_lossy(&text).lines() {
            eprintln!("[console] {}", line.trim_end());
        }
    }
    match status {
        Ok(status) => Ok(status),
        Err(_) if !in_time => {
            eprintln!("nested lane: not done after {} s", run.timeout.as_secs());
            Ok(TIMED_OUT)
        }
        Err(_) => bail!("the machine ended before the command did"),
    }
}

/// Each with its reason.
const KERNEL_PARAMETERS: &str = concat!(
    "console=ttyS0 8250.nr_uarts=1 quiet loglevel=4 ", // what goes wrong is seen, and little else
    "panic=-1 oops=panic ",                            // with -no-reboot: the run ends at once
    "mitigations=off nokaslr ",                        // nothing to guard; speed
    "tsc=reliable no_timer_check ",                    // emulated clocks fail the kernel's checks under load
    "random.trust_cpu=on ",                            // no wait for entropy
    "cgroup_no_v1=all",                                // every controller in the v2 hierarchy
);

/// The directories that L1 can write to, outermost first.
fn shares(run: &Run, cache: &Path) -> Result<Vec<PathBuf>> {
    let mut all = vec![repository()?];
    all.push(cache.parent().context("the cache directory has no parent")?.to_owned());
    if let Some(target) = std::env::var_os("CARGO_TARGET_DIR") {
        all.push(fs::canonicalize(target).context("CARGO_TARGET_DIR")?);
    }
    all.extend(run.shares.iter().cloned());
    all.sort();
    let mut shares: Vec<PathBuf> = Vec::new();
    for share in all {
        if !shares.iter().any(|outer| share.starts_with(outer)) {
            shares.push(share);
        }
    }
    Ok(shares)
}

/// A second archive behind the constant one: what L1 is to do this time.
fn job(run: &Run, shares: &[PathBuf], home: &Path) -> Result<Vec<u8>> {
    let mut conf = Vec::new();
    let mut line = |parts: &[&[u8]]| {
        parts.iter().for_each(|part| conf.extend_from_slice(part));
        conf.push(b'\n');
    };
    line(&[b"mount_shares() {"]);
    for (i, share) in shares.iter().enumerate() {
        line(&[b"mount_share share", i.to_string().as_bytes(), b" ", &quoted(share.as_os_str())]);
    }
    line(&[b"}"]);

    let mut command = Vec::new();
    let mut line = |parts: &[&[u8]]| {
        parts.iter().for_each(|part| command.extend_from_slice(part));
        command.push(b'\n');
    };
    let cwd = std::env::current_dir().context("no working directory")?;
    line(&[b"cd ", &quoted(cwd.as_os_str()), b" || exit 125"]);
    for (name, value) in environment(run, home) {
        line(&[b"export ", name.as_bytes(), b"=", &quoted(&value)]);
    }
    let mut words: Vec<Vec<u8>> = vec![b"exec".to_vec()];
    words.extend(run.command.iter().map(|word| quoted(word)));
    line(&[&words.join(&b' ')]);

    let mut archive = cpio::Writer::new(Vec::new());
    archive.append(&Entry::file("job.conf", 0o644, &conf))?;
    archive.append(&Entry::file("job", 0o644, &command))?;
    Ok(archive.finish()?)
}

fn environment(run: &Run, home: &Path) -> Vec<(OsString, OsString)> {
    let passed = |name: &OsStr| {
        let name = name.as_bytes();
        // The last two say where programs and libraries of this machine are, and it is this machine's files that L1 sees.
        name.starts_with(b"ZEROBOOT_")
            || [&b"RUST_LOG"[..], b"RUST_BACKTRACE", b"CI", b"NO_COLOR", b"HOME", b"PATH"].contains(&name)
    };
    let mut env: Vec<(OsString, OsString)> = vec![
        ("PATH".into(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into()),
        ("LANG".into(), "C.UTF-8".into()),
        ("ZEROBOOT_HOME".into(), home.into()),
    ];
    if let Some(cache) = home.ancestors().nth(3) {
        env.push(("XDG_CACHE_HOME".into(), cache.into()));
    }
    env.extend(std::env::vars_os().filter(|(name, _)| passed(name)));
    env.push(("ZEROBOOT_NESTED".into(), "1".into()));
    // QEMU's emulation refuses port access from ring 3 when the saved TR is of type 11.
    env.push(("ZEROBOOT_TCG_TR9".into(), "1".into()));
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

/// A file without a name, which QEMU inherits.
fn memory_file(name: &str) -> Result<fs::File> {
    Ok(rustix::fs::memfd_create(name, MemfdFlags::empty()).context("cannot make a file in memory")?.into())
}

/// A pipe whose writing end QEMU inherits.
fn inherited_pipe() -> Result<(io::PipeReader, io::PipeWriter)> {
    let (reader, writer) = io::pipe().context("cannot make a pipe")?;
    rustix::io::fcntl_setfd(&writer, FdFlags::empty()).context("cannot keep a pipe open")?;
    Ok((reader, writer))
}

fn pass_on(from: &mut io::PipeReader, mut to: impl Write) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                if to.write_all(&buffer[..count]).and_then(|()| to.flush()).is_err() {
                    // Nobody listens any more. QEMU goes with us.
                    std::process::exit(i32::from(LANE_FAILED));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Waits for the end of the machine; `false` when the time ran out and it was ended.
fn wait(qemu: &mut Child, deadline: Instant) -> Result<bool> {
    while Instant::now() < deadline {
        if qemu.try_wait().context("cannot wait for QEMU")?.is_some() {
            return Ok(true);
        }
        thread::sleep(Duration::from_millis(20));
    }
    qemu.kill().context("cannot end QEMU")?;
    qemu.wait().context("cannot wait for QEMU")?;
    Ok(false)
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
        let Task::Run { run, debug: false } = parse(args.into_iter()).unwrap() else { panic!("not a run") };
        assert_eq!(run.command, ["ls", "--timeout"]);
        assert_eq!(run.timeout, Duration::from_secs(5));
        assert_eq!(run.env, [("A".into(), "b=c".into())]);
        assert!(parse(["--nonsense"].map(OsString::from).into_iter()).is_err());
        assert!(parse(std::iter::empty()).is_err());
    }
}
