//! Runs the `zeroboot` command, and after each run looks for what it left behind. Shared by the test files beside it.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs,
    io::{BufRead as _, BufReader, Read, Write},
    os::unix::{
        fs::{PermissionsExt, chown},
        process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// How long what a run started may take to be gone, on a loaded machine too.
const PATIENCE: Duration = Duration::from_secs(30);
/// The user that nobody is.
const NOBODY: u32 = 65_534;

/// Who runs the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// Whoever runs the tests.
    Me,
    /// An ordinary user, when the tests run as root.
    Ordinary,
}

impl Who {
    /// An ordinary user. `None` when the tests run as one already: then [`Who::Me`] is the same.
    pub(crate) fn ordinary() -> Option<Who> {
        rustix::process::geteuid().is_root().then_some(Who::Ordinary)
    }
}

/// Where a `zeroboot serve` with a piped standard error listens, once it does. What it writes after that is read and dropped.
pub(crate) fn address_of(server: &mut Child) -> String {
    let mut words = BufReader::new(server.stderr.take().unwrap());
    let mut said = String::new();
    let address = loop {
        let from = said.len();
        assert!(words.read_line(&mut said).unwrap() > 0, "it ended: {said}");
        if let Some(at) = said[from..].split("zeroboot listens on ").nth(1) {
            break at.split_whitespace().next().unwrap().to_owned();
        }
    };
    std::thread::spawn(move || std::io::copy(&mut words, &mut std::io::sink()));
    address
}

/// A Python that this user can run: `ZEROBOOT_TEST_PYTHON`, else the first on the path.
pub(crate) fn python(who: Who) -> &'static str {
    static FOUND: [OnceLock<String>; 2] = [const { OnceLock::new() }; 2];
    FOUND[usize::from(who == Who::Ordinary)].get_or_init(|| {
        let named = std::env::var("ZEROBOOT_TEST_PYTHON").ok();
        let known = ["python3", "/usr/bin/python3", "/usr/local/bin/python3"].map(String::from);
        let usable = |python: &String| {
            // Through a shell: setpriv itself still has root's rights over files when it executes a program.
            let mut command = as_user(who, "sh");
            command.args(["-c", "exec \"$0\" -c 'import ctypes, ssl, zlib'", python]).current_dir("/");
            command.stderr(Stdio::null()).status().is_ok_and(|status| status.success())
        };
        named.into_iter().chain(known).find(usable).expect("no Python for the tests; ZEROBOOT_TEST_PYTHON names one")
    })
}

/// A command of this user's.
pub(crate) fn as_user(who: Who, program: impl AsRef<OsStr>) -> Command {
    if who == Who::Me {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &NOBODY.to_string(), "--regid", &NOBODY.to_string(), "--clear-groups"]);
    command.env("HOME", "/nonexistent").arg(program);
    command
}

/// What the command finds on its standard input.
enum Input {
    Bytes(Vec<u8>),
    Closed,
    Held,
}

/// One run of the command, built up.
pub(crate) struct Cli {
    who: Who,
    args: Vec<OsString>,
    input: Input,
    env: Vec<(OsString, OsString)>,
    dir: TempDir,
    may_leave: BTreeSet<OsString>,
    prefix: Vec<OsString>,
    pauses: bool,
}

impl Cli {
    /// `zeroboot run` on the process engine, with a Python that this user can run.
    pub(crate) fn run(who: Who) -> Cli {
        Cli::bare(who).args(["run", "--engine", "process", "--python", python(who)])
    }

    /// `zeroboot` without arguments.
    pub(crate) fn bare(who: Who) -> Cli {
        mounts_before();
        let dir = TempDir::new().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["work", "tmp"] {
            fs::create_dir(dir.path().join(name)).unwrap();
            if who == Who::Ordinary {
                chown(dir.path().join(name), Some(NOBODY), Some(NOBODY)).unwrap();
            }
        }
        let (args, env) = (Vec::new(), Vec::new());
        Cli {
            who,
            args,
            input: Input::Bytes(Vec::new()),
            env,
            dir,
            may_leave: BTreeSet::new(),
            prefix: Vec::new(),
            pauses: false,
        }
    }

    pub(crate) fn args(mut self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Cli {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }
    /// `-c CODE`.
    pub(crate) fn code(self, code: impl Into<OsString>) -> Cli {
        self.args([OsString::from("-c"), code.into()])
    }
    pub(crate) fn env(mut self, key: &str, value: &str) -> Cli {
        self.env.push((key.into(), value.into()));
        self
    }
    pub(crate) fn stdin(mut self, bytes: impl AsRef<[u8]>) -> Cli {
        self.input = Input::Bytes(bytes.as_ref().to_vec());
        self
    }
    /// Starts it with descriptor 0 closed.
    pub(crate) fn stdin_closed(mut self) -> Cli {
        self.input = Input::Closed;
        self
    }
    /// Starts it with an input that never ends.
    pub(crate) fn stdin_held(mut self) -> Cli {
        self.input = Input::Held;
        self
    }
    /// Nobody reads its output before [`Live::wait`].
    pub(crate) fn reader_pauses(mut self) -> Cli {
        self.pauses = true;
        self
    }
    /// Puts a file into the directory that the command is run in.
    pub(crate) fn file(mut self, name: &str, data: impl AsRef<[u8]>) -> Cli {
        fs::write(self.work().join(name), data).unwrap();
        self.may_leave.insert(name.into());
        self
    }
    /// A file that it is meant to make.
    pub(crate) fn makes(mut self, name: &str) -> Cli {
        self.may_leave.insert(name.into());
        self
    }
    /// A command that starts ours by exec.
    pub(crate) fn through(mut self, prefix: &[&str]) -> Cli {
        self.prefix = prefix.iter().map(OsString::from).collect();
        self
    }
    /// The directory that it runs in.
    pub(crate) fn work(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    /// Starts it.
    pub(crate) fn start(self) -> Live {
        // A resource limit that no kernel enforces (getrlimit(2)), but that every descendant inherits and everybody
        // can read: it finds whatever the run leaves behind.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let mark = u64::from(std::process::id()) * 100_000 + NEXT.fetch_add(1, Ordering::Relaxed);
        let mut command = as_user(self.who, "prlimit");
        command.arg(format!("--locks={mark}:{mark}"));
        command.args(&self.prefix);
        if matches!(self.input, Input::Closed) {
            command.args(["sh", "-c", "exec \"$0\" \"$@\" <&-"]);
        }
        command.arg(self.program()).args(&self.args);
        command.current_dir(self.work()).env("TMPDIR", self.dir.path().join("tmp"));
        command.env_remove("ZEROBOOT_PYTHON").env_remove("ZEROBOOT_ENGINE").envs(self.env.iter().cloned());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("setpriv and prlimit are part of util-linux");
        let mut stdin = child.stdin.take().unwrap();
        let mut held = None;
        match self.input {
            // From a thread of its own: it may write before it reads. That it does not read is its right.
            Input::Bytes(bytes) => drop(std::thread::spawn(move || drop(stdin.write_all(&bytes)))),
            Input::Closed => drop(stdin),
            Input::Held => held = Some(stdin),
        }
        let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (out, paused) = if self.pauses { (None, Some(out)) } else { (Some(collect(out)), None) };
        let leaves = Leaves { mark, front: child.id(), dir: self.dir, may_leave: self.may_leave };
        Live { child, out, paused, err: Some(collect(err)), leaves, held }
    }

    /// Runs it to its end and looks for what it left.
    pub(crate) fn go(self) -> Done {
        self.start().wait()
    }

    /// The command, where this user can read it.
    fn program(&self) -> PathBuf {
        let built = Path::new(env!("CARGO_BIN_EXE_zeroboot"));
        if self.who == Who::Me {
            return built.to_owned();
        }
        let reachable = self.dir.path().join("zeroboot");
        if fs::hard_link(built, &reachable).is_err() {
            fs::copy(built, &reachable).unwrap();
        }
        reachable
    }
}

fn collect(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// A run under way.
pub(crate) struct Live {
    child: Child,
    out: Option<JoinHandle<Vec<u8>>>,
    paused: Option<ChildStdout>,
    err: Option<JoinHandle<Vec<u8>>>,
    leaves: Leaves,
    held: Option<std::process::ChildStdin>,
}

impl Live {
    /// Waits until the code has made this file appear on the outside: a process of the run with this name.
    pub(crate) fn wait_for_process(&self, name: &str) {
        let started = Instant::now();
        while !self.leaves.processes().iter().any(|process| process.ends_with(&format!(" {name}"))) {
            assert!(started.elapsed() < PATIENCE * 2, "no process {name}: {:?}", self.leaves.processes());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    /// Waits until no process of it is left but the command and its zygote.
    pub(crate) fn wait_for_its_sandboxs_end(&self) {
        let started = Instant::now();
        while self.leaves.processes().len() > 2 {
            assert!(started.elapsed() < PATIENCE * 2, "still there: {:?}", self.leaves.processes());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    pub(crate) fn processes(&self) -> Vec<String> {
        self.leaves.processes()
    }
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }
    /// Waits for its end and looks for what it left.
    pub(crate) fn wait(mut self) -> Done {
        self.out = self.out.or_else(|| self.paused.take().map(collect));
        let status = self.child.wait().unwrap();
        drop(self.held.take());
        let [out, err] = [self.out.take(), self.err.take()].map(|t| t.unwrap().join().unwrap());
        let done = Done { status, out, err, dir: self.leaves.dir.path().to_owned(), leaves: Some(self.leaves) };
        done.leaves.as_ref().unwrap().check(&done);
        done
    }
}

/// A run that has ended and left nothing.
pub(crate) struct Done {
    status: ExitStatus,
    pub(crate) out: Vec<u8>,
    pub(crate) err: Vec<u8>,
    dir: PathBuf,
    /// Holds the directory.
    leaves: Option<Leaves>,
}

impl std::fmt::Debug for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let show = |bytes: &[u8]| String::from_utf8_lossy(bytes).chars().take(3000).collect::<String>();
        write!(f, "{}\n-- stdout\n{}\n-- stderr\n{}", self.status, show(&self.out), show(&self.err))
    }
}

impl Done {
    /// Exit status as a shell shows it.
    pub(crate) fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }
    pub(crate) fn out(&self) -> &str {
        std::str::from_utf8(&self.out).unwrap()
    }
    pub(crate) fn err(&self) -> &str {
        std::str::from_utf8(&self.err).unwrap()
    }
    /// Standard output of a run that must have ended well and silently.
    #[track_caller]
    pub(crate) fn good(&self) -> &str {
        assert!(self.code() == 0 && self.err.is_empty(), "{self:?}");
        self.out()
    }
    /// It must have ended with this status.
    #[track_caller]
    pub(crate) fn ended(&self, code: i32) -> &Done {
        assert_eq!(self.code(), code, "{self:?}");
        self
    }
    /// Standard error must say this.
    #[track_caller]
    pub(crate) fn says(&self, text: &str) -> &Done {
        assert!(self.err().contains(text), "not {text:?}: {self:?}");
        self
    }
    /// It must be a failure of ours: 125, nothing on standard output, one reason with this text, one hint.
    #[track_caller]
    pub(crate) fn refused(&self, reason: &str) -> &Done {
        self.ended(125).says(reason);
        assert!(self.out.is_empty(), "{self:?}");
        assert!(self.err().starts_with("error: ") && self.err().contains("\nhint: "), "{self:?}");
        assert_eq!(self.err().lines().count(), 2, "{self:?}");
        self
    }
    /// The directory that it ran in.
    pub(crate) fn work(&self) -> PathBuf {
        self.dir.join("work")
    }
    /// A file that it made in its working directory.
    pub(crate) fn made(&self, name: &str) -> Option<Vec<u8>> {
        fs::read(self.dir.join("work").join(name)).ok()
    }
}

/// Finds what a run leaves behind.
struct Leaves {
    mark: u64,
    front: u32,
    dir: TempDir,
    may_leave: BTreeSet<OsString>,
}

impl Leaves {
    /// Processes of this run: `pid name`.
    fn processes(&self) -> Vec<String> {
        let mark = self.mark.to_string();
        let marked = |pid: &str| {
            let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
            let line = limits.lines().find(|line| line.starts_with("Max file locks")).unwrap_or_default();
            line.split_whitespace().nth(3) == Some(&mark)
        };
        let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().into_string().ok());
        pids.filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
            .filter(|pid| marked(pid))
            .map(|pid| format!("{pid} {}", fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim()))
            .collect()
    }

    /// Everything of the run must be gone soon: the kernel takes a moment to end a pid namespace.
    fn check(&self, done: &Done) {
        let started = Instant::now();
        loop {
            let left = self.left();
            if left.is_empty() {
                return;
            }
            assert!(started.elapsed() < PATIENCE, "left behind: {left:#?}\nby {done:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn left(&self) -> Vec<String> {
        let mut left: Vec<String> = self.processes().into_iter().map(|p| format!("process {p}")).collect();
        left.extend(mounts().difference(mounts_before()).map(|mount| format!("mount {mount}")));
        cgroups(Path::new("/sys/fs/cgroup"), 6, &format!("zeroboot-{}", self.front), &mut left);
        let listing = |name: &str| fs::read_dir(self.dir.path().join(name)).unwrap().flatten().map(|e| e.file_name());
        left.extend(listing("tmp").map(|name| format!("temporary file {name:?}")));
        left.extend(listing("work").filter(|name| !self.may_leave.contains(name)).map(|name| format!("file {name:?}")));
        left
    }
}

/// Mounts of this host that look like ours: the root is put together on /sys.
fn mounts() -> BTreeSet<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let ours = |line: &&str| {
        let point = line.split_whitespace().nth(4).unwrap_or_default();
        line.contains("zeroboot")
            || point.starts_with("/home/sandbox")
            || point == "/sys"
            || point.starts_with("/sys/usr")
    };
    text.lines().filter(ours).map(str::to_owned).collect()
}

fn mounts_before() -> &'static BTreeSet<String> {
    static BEFORE: OnceLock<BTreeSet<String>> = OnceLock::new();
    BEFORE.get_or_init(mounts)
}

fn cgroups(dir: &Path, depth: u32, name: &str, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if entry.file_name() == name {
                found.push(format!("cgroup {}", entry.path().display()));
            } else if depth > 0 {
                cgroups(&entry.path(), depth - 1, name, found);
            }
        }
    }
}
