//! Drives `zeroboot-guest spawn` over a socket, as the front would. Shared by the test files beside it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use zeroboot_proto::{Decoder, Ending, ExitReport, FileChunk, Identity, Kind, Limits, MAX_PAYLOAD, Message, encode};

/// No answer of an agent takes this long, on a loaded machine either.
const PATIENCE: Duration = Duration::from_secs(120);

/// Limits that no test reaches unless it means to.
pub(crate) const LIMITS: Limits = Limits {
    wall_ns: 100_000_000_000,
    cpu_ns: u64::MAX,
    memory: 4 << 30,
    output: 64 << 20,
    file_size: 1 << 30,
    output_files: 64 << 20,
    processes: u32::MAX,
    open_files: 1024,
};

/// Where the repository is.
pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// `ZEROBOOT_TEST_PYTHON`, or the first on the path.
pub(crate) fn python() -> String {
    std::env::var("ZEROBOOT_TEST_PYTHON").unwrap_or_else(|_| "python3".into())
}

/// `ZEROBOOT_TEST_NODE`, or the first on the path.
pub(crate) fn node() -> String {
    std::env::var("ZEROBOOT_TEST_NODE").unwrap_or_else(|_| "node".into())
}

/// What the front has got.
#[derive(Default)]
pub(crate) struct Answer {
    pub(crate) ready: String,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) files: BTreeMap<String, Result<Vec<u8>, String>>,
    pub(crate) report: Option<ExitReport>,
    pub(crate) failure: Option<String>,
    pub(crate) hint: Option<String>,
    /// Kinds as they came, repeats left out.
    pub(crate) order: Vec<Kind>,
    /// Frames of standard output.
    pub(crate) stdout_frames: usize,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).chars().take(2000).collect::<String>();
        f.debug_struct("Answer")
            .field("report", &self.report)
            .field("failure", &self.failure)
            .field("order", &self.order)
            .field("stdout", &text(&self.stdout))
            .field("stderr", &text(&self.stderr))
            .finish_non_exhaustive()
    }
}

impl Answer {
    pub(crate) fn out(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
    pub(crate) fn err(&self) -> &str {
        std::str::from_utf8(&self.stderr).unwrap()
    }
    pub(crate) fn ending(&self) -> Ending {
        self.report.unwrap_or_else(|| panic!("no Exit frame: {self:?}")).ending
    }
    /// Standard output of a run that must have ended well and silently.
    pub(crate) fn good(&self) -> &str {
        assert_eq!((self.ending(), self.err()), (Ending::Exited(0), ""), "{self:?}");
        self.out()
    }
}

/// An agent with a warm runner.
pub(crate) struct Sandbox {
    pub(crate) front: UnixStream,
    pub(crate) agent: Child,
    pub(crate) dir: TempDir,
    decoder: Decoder,
    answer: Answer,
}

/// One request, built up.
#[derive(Clone)]
pub(crate) struct Request {
    pub(crate) limits: Limits,
    frames: Vec<u8>,
    name: String,
    args: Vec<String>,
    code: Vec<u8>,
    stdin: Vec<u8>,
    keep_stdin_open: bool,
}

impl Request {
    pub(crate) fn new(code: impl AsRef<[u8]>) -> Request {
        Request {
            limits: LIMITS,
            frames: Vec::new(),
            name: "-c".into(),
            args: Vec::new(),
            code: code.as_ref().to_vec(),
            stdin: Vec::new(),
            keep_stdin_open: false,
        }
    }
    pub(crate) fn limits(mut self, change: impl FnOnce(&mut Limits)) -> Request {
        change(&mut self.limits);
        self
    }
    pub(crate) fn named(mut self, name: &str) -> Request {
        self.name = name.into();
        self
    }
    pub(crate) fn arg(mut self, arg: &str) -> Request {
        self.args.push(arg.into());
        self
    }
    pub(crate) fn env(mut self, key: &str, value: &str) -> Request {
        encode(&mut self.frames, Kind::Env, format!("{key}\0{value}").as_bytes());
        self
    }
    pub(crate) fn put(mut self, path: &str, data: &[u8]) -> Request {
        let room = MAX_PAYLOAD - FileChunk::OVERHEAD - path.len();
        // An empty file is one empty chunk.
        for (at, data) in data.chunks(room).chain(data.is_empty().then_some(&[][..])).enumerate() {
            let chunk = FileChunk { path: path.as_bytes(), data, mode: 0o644, append: at > 0, failed: false };
            encode(&mut self.frames, Kind::Put, &chunk.encode());
        }
        self
    }
    pub(crate) fn get(mut self, path: &str) -> Request {
        encode(&mut self.frames, Kind::Get, path.as_bytes());
        self
    }
    pub(crate) fn stdin(mut self, bytes: impl AsRef<[u8]>) -> Request {
        self.stdin = bytes.as_ref().to_vec();
        self
    }
    pub(crate) fn keep_stdin_open(mut self) -> Request {
        self.keep_stdin_open = true;
        self
    }
    /// All frames up to and with `Run`.
    fn head(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode(&mut bytes, Kind::Limits, &self.limits.encode());
        encode(&mut bytes, Kind::Identity, &identity().encode());
        bytes.extend_from_slice(&self.frames);
        for arg in std::iter::once(&self.name).chain(&self.args) {
            encode(&mut bytes, Kind::Arg, arg.as_bytes());
        }
        encode(&mut bytes, Kind::Code, &self.code);
        encode(&mut bytes, Kind::Run, &[]);
        bytes
    }
}

/// Fresh each time.
pub(crate) fn identity() -> Identity {
    let mut entropy = [0; 64];
    std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut entropy).unwrap();
    let mut sandbox_id = [0; 16];
    sandbox_id.copy_from_slice(&entropy[..16]);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    Identity { entropy, realtime_ns: now.as_nanos() as u64, sandbox_id }
}

impl Sandbox {
    pub(crate) fn python(warm: &str) -> Sandbox {
        Sandbox::start(&[], &[&python(), "-E", "-s", "-X", "utf8", zeroboot_runtimes::PYTHON_PATH, "--warm", warm])
    }

    pub(crate) fn node(options: &[&str], arguments: &[&str]) -> Sandbox {
        let node = node();
        // The second is for import() in Node 18; later ones need it no more.
        let mut command = vec![node.as_str(), "--no-deprecation", "--experimental-vm-modules"];
        command.extend(options);
        command.push(zeroboot_runtimes::NODE_PATH);
        command.extend(arguments);
        Sandbox::start(&[], &command)
    }

    /// `wrapper` is a command that runs the agent, such as one that makes a pid namespace.
    pub(crate) fn start(wrapper: &[&str], runner: &[&str]) -> Sandbox {
        let dir = TempDir::new().unwrap();
        let (front, theirs) = UnixStream::pair().unwrap();
        front.set_read_timeout(Some(PATIENCE)).unwrap();
        front.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut command = Command::new("sh");
        // A shell moves the socket to descriptor 3, so that no unsafe code is needed here.
        command.args(["-c", "exec 3<&0 0</dev/null; exec \"$@\"", "sh"]);
        command.args(wrapper).arg(env!("CARGO_BIN_EXE_zeroboot-guest")).args(["spawn", "--"]).args(runner);
        command.current_dir(dir.path()).env("HOME", dir.path()).env("TMPDIR", dir.path());
        let agent = command.stdin(Stdio::from(OwnedFd::from(theirs))).spawn().unwrap();
        Sandbox { front, agent, dir, decoder: Decoder::new(), answer: Answer::default() }
    }

    /// Sends the request and waits for the last frame.
    pub(crate) fn run(mut self, request: Request) -> Answer {
        self.wait_for(Kind::Ready);
        self.send(&request);
        self.finish()
    }

    pub(crate) fn send(&mut self, request: &Request) {
        self.front.write_all(&request.head()).unwrap();
        let mut rest = Vec::new();
        if !request.stdin.is_empty() {
            encode(&mut rest, Kind::Stdin, &request.stdin);
        }
        if !request.keep_stdin_open {
            encode(&mut rest, Kind::StdinEnd, &[]);
        }
        // From a thread of its own: a program may write before it reads.
        let mut front = self.front.try_clone().unwrap();
        std::thread::spawn(move || drop(front.write_all(&rest)));
    }

    pub(crate) fn send_frame(&mut self, kind: Kind, payload: &[u8]) {
        let mut bytes = Vec::new();
        encode(&mut bytes, kind, payload);
        self.front.write_all(&bytes).unwrap();
    }

    /// Takes frames until one of this kind has come.
    pub(crate) fn wait_for(&mut self, wanted: Kind) {
        while self.answer.order.last() != Some(&wanted) {
            assert!(self.step(), "the agent closed before {wanted:?}: {:?}", self.answer);
        }
    }

    /// Takes frames until standard output ends in `text`.
    pub(crate) fn wait_for_output(&mut self, text: &str) {
        while !self.answer.stdout.ends_with(text.as_bytes()) {
            assert!(self.step(), "the agent closed before it wrote {text:?}: {:?}", self.answer);
        }
    }

    pub(crate) fn finish(mut self) -> Answer {
        while self.answer.report.is_none() && self.answer.failure.is_none() && self.step() {}
        // The agent ends its sandbox now; frames after the last one would be a fault.
        let order = self.answer.order.len();
        self.hang_up();
        while self.step() {}
        assert_eq!(self.answer.order.len(), order, "{:?}", self.answer);
        assert!(self.agent.wait().is_ok());
        std::mem::take(&mut self.answer)
    }

    /// Gives the agent nobody to talk to.
    pub(crate) fn hang_up(&mut self) {
        self.front.shutdown(Shutdown::Both).unwrap();
    }

    fn step(&mut self) -> bool {
        let mut moved = false;
        while let Some((kind, payload)) = self.decoder.next_frame().unwrap() {
            moved = true;
            let answer = &mut self.answer;
            if answer.order.last() != Some(&kind) {
                answer.order.push(kind);
            }
            match Message::decode(kind, payload).unwrap() {
                Message::Ready => answer.ready = String::from_utf8(payload.to_vec()).unwrap(),
                Message::Started => {}
                Message::Stdout(bytes) => {
                    answer.stdout.extend_from_slice(bytes);
                    answer.stdout_frames += 1;
                }
                Message::Stderr(bytes) => answer.stderr.extend_from_slice(bytes),
                Message::File(chunk) => {
                    let path = String::from_utf8(chunk.path.to_vec()).unwrap();
                    if chunk.failed {
                        let reason = String::from_utf8(chunk.data.to_vec()).unwrap();
                        answer.files.insert(path, Err(reason));
                    } else if let Ok(data) = answer.files.entry(path).or_insert_with(|| Ok(Vec::new())) {
                        data.extend_from_slice(chunk.data);
                    }
                }
                Message::Exit(report) => answer.report = Some(report),
                Message::Failure(text) => answer.failure = Some(text.to_string()),
                Message::Hint(text) => answer.hint = Some(text.to_owned()),
                Message::Note(_) | Message::Ended(_) | Message::Crash(_) => {
                    panic!("{kind:?} is not the agent's to send")
                }
            }
        }
        if moved {
            return true;
        }
        let mut buffer = [0; 65536];
        match self.front.read(&mut buffer) {
            Ok(0) => false,
            Ok(n) => {
                self.decoder.feed(&buffer[..n]);
                true
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => false,
            Err(error) => panic!("no frame from the agent: {error}: {:?}", self.answer),
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // A test that failed half way: the agent ends its sandbox when the front goes.
        self.front.shutdown(Shutdown::Both).ok();
        self.agent.wait().ok();
    }
}
