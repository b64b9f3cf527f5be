//! Drives a runner as a context, over its control socket, as the agent does. Shared by the test files beside it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// No answer of a runner takes this long, on a loaded machine either.
const PATIENCE: Duration = Duration::from_secs(120);
const MAX_PAYLOAD: usize = 64 * 1024 - 8;

pub(crate) const OK: u8 = 0;
pub(crate) const FAILED: u8 = 1;
pub(crate) const INTERRUPTED: u8 = 2;

// The kinds that a context adds, beside those of zeroboot-proto.
const CODE: u8 = 0x01;
const ENV: u8 = 0x03;
const IDENTITY: u8 = 0x09;
const CWD: u8 = 0x0b;
const SERVE: u8 = 0x0c;
const CELL: u8 = 0x0d;
const READY: u8 = 0x81;
const STARTED: u8 = 0x82;
const FAILURE: u8 = 0x87;
const RESULT: u8 = 0x8a;
const ERROR: u8 = 0x8b;
const DONE: u8 = 0x8c;

/// One MIME bundle.
#[derive(Debug, Default)]
pub(crate) struct Bundle {
    pub(crate) is_value: bool,
    pub(crate) parts: BTreeMap<String, Vec<u8>>,
}

impl Bundle {
    pub(crate) fn text(&self, kind: &str) -> &str {
        std::str::from_utf8(self.parts.get(kind).unwrap_or_else(|| panic!("no {kind}: {:?}", self.parts.keys())))
            .unwrap()
    }
}

/// What a cell answered.
#[derive(Debug, Default)]
pub(crate) struct Cell {
    pub(crate) status: u8,
    pub(crate) count: u32,
    pub(crate) bundles: Vec<Bundle>,
    /// Its JSON.
    pub(crate) error: Option<String>,
}

impl Cell {
    /// The text of the value of a cell that went well and showed nothing else.
    pub(crate) fn value(&self) -> &str {
        assert!(self.status == OK && self.error.is_none(), "{self:?}");
        match &self.bundles[..] {
            [] => "",
            [bundle] if bundle.is_value => bundle.text("text/plain"),
            _ => panic!("{self:?}"),
        }
    }
    pub(crate) fn error(&self) -> &str {
        self.error.as_deref().unwrap_or_else(|| panic!("no error: {self:?}"))
    }
    /// Whether the error has this name.
    pub(crate) fn failed_with(&self, name: &str) -> bool {
        self.status == FAILED && self.error().replace("\": \"", "\":\"").contains(&format!("\"name\":\"{name}\""))
    }
}

/// A runner that serves cells.
pub(crate) struct Context {
    pub(crate) child: Child,
    pub(crate) dir: TempDir,
    pub(crate) ready: String,
    control: UnixStream,
    output: [Arc<Mutex<Vec<u8>>>; 2],
    counted: u32,
}

impl Context {
    /// Starts `command` in a directory of its own and makes it a context.
    pub(crate) fn start(command: &[&str], env: &[(&str, &str)]) -> Context {
        let mut context = Context::ready(command, env);
        context.identity();
        context.send(SERVE, &[]);
        assert_eq!(context.frame(), (STARTED, Vec::new()));
        context
    }

    /// Starts it up to the ready point.
    pub(crate) fn ready(command: &[&str], env: &[(&str, &str)]) -> Context {
        let dir = TempDir::new().unwrap();
        let (control, theirs) = UnixStream::pair().unwrap();
        control.set_read_timeout(Some(PATIENCE)).unwrap();
        // The shell moves the socket to descriptors 3 and 4 and is then the runner.
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec 3<&0 4<&0 0</dev/null; exec \"$@\"", "sh"]).args(command).current_dir(dir.path());
        shell.env("HOME", dir.path()).env("TMPDIR", dir.path()).envs(env.iter().copied());
        shell.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = shell.spawn().unwrap();
        let pipes: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        let output = pipes.map(|mut pipe| {
            let kept = Arc::new(Mutex::new(Vec::new()));
            let keep = kept.clone();
            std::thread::spawn(move || {
                let mut buffer = [0; 65536];
                while let Ok(n @ 1..) = pipe.read(&mut buffer) {
                    keep.lock().unwrap().extend_from_slice(&buffer[..n]);
                }
            });
            kept
        });
        let mut context = Context { child, dir, ready: String::new(), control, output, counted: 0 };
        let (kind, payload) = context.frame();
        assert_eq!(kind, READY, "{}", String::from_utf8_lossy(&payload));
        context.ready = String::from_utf8(payload).unwrap();
        context
    }

    pub(crate) fn send(&mut self, kind: u8, payload: &[u8]) {
        let mut frame = (payload.len() as u32).to_le_bytes().to_vec();
        frame.extend_from_slice(&[kind, 0, 0, 0]);
        frame.extend_from_slice(payload);
        self.control.write_all(&frame).unwrap();
    }

    fn frame(&mut self) -> (u8, Vec<u8>) {
        let mut header = [0; 8];
        self.control.read_exact(&mut header).unwrap_or_else(|e| panic!("{e}: {}", self.err()));
        let mut payload = vec![0; u32::from_le_bytes(header[..4].try_into().unwrap()) as usize];
        assert!(payload.len() <= MAX_PAYLOAD && header[5..] == [0; 3], "{header:?}");
        self.control.read_exact(&mut payload).unwrap();
        (header[4], payload)
    }

    pub(crate) fn identity(&mut self) {
        let mut payload = [0; 88];
        std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut payload[..64]).unwrap();
        self.send(IDENTITY, &payload);
    }

    pub(crate) fn env(&mut self, key: &str, value: &str) {
        self.send(ENV, format!("{key}\0{value}").as_bytes());
    }

    /// Asks for a working directory and to serve; the text of a refusal.
    pub(crate) fn serve_in(&mut self, directory: &str) -> Result<(), String> {
        self.send(CWD, directory.as_bytes());
        self.send(SERVE, &[]);
        match self.frame() {
            (STARTED, _) => Ok(()),
            (FAILURE, text) => Err(String::from_utf8(text).unwrap()),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn begin(&mut self, code: impl AsRef<[u8]>) {
        for chunk in code.as_ref().chunks(MAX_PAYLOAD) {
            self.send(CODE, chunk);
        }
        self.send(CELL, &[]);
    }

    pub(crate) fn end(&mut self) -> Cell {
        let (mut cell, mut open, mut part) = (Cell::default(), None::<Bundle>, String::new());
        loop {
            let (kind, payload) = self.frame();
            match kind {
                RESULT => {
                    let (flags, length) = (payload[0], payload[1] as usize);
                    let name = String::from_utf8(payload[2..2 + length].to_vec()).unwrap();
                    let bundle = open.get_or_insert_with(Bundle::default);
                    bundle.is_value = flags & 1 != 0;
                    if flags & 2 == 0 {
                        assert!(bundle.parts.insert(name.clone(), Vec::new()).is_none(), "{name} twice");
                        part = name;
                    } else {
                        assert_eq!(part, name);
                    }
                    bundle.parts.get_mut(&part).unwrap().extend_from_slice(&payload[2 + length..]);
                    if flags & 4 != 0 {
                        cell.bundles.extend(open.take());
                    }
                }
                ERROR => assert!(cell.error.replace(String::from_utf8(payload).unwrap()).is_none()),
                DONE => {
                    assert!(open.is_none(), "a bundle without an end");
                    cell.status = payload[0];
                    cell.count = u32::from_le_bytes(payload[1..].try_into().unwrap());
                    self.counted += 1;
                    assert_eq!(cell.count, self.counted);
                    return cell;
                }
                other => panic!("kind {other:#x}: {}", String::from_utf8_lossy(&payload)),
            }
        }
    }

    pub(crate) fn run(&mut self, code: impl AsRef<[u8]>) -> Cell {
        self.begin(code);
        self.end()
    }

    /// Sends SIGINT once the cell has written `word` to its standard output.
    pub(crate) fn interrupted(&mut self, code: &str, word: &str) -> Cell {
        self.begin(code);
        self.wait_for(word);
        // It has to be in what it does next.
        std::thread::sleep(Duration::from_millis(100));
        self.interrupt();
        self.end()
    }

    pub(crate) fn interrupt(&self) {
        assert!(Command::new("kill").args(["-INT", &self.child.id().to_string()]).status().unwrap().success());
    }

    pub(crate) fn out(&self) -> String {
        String::from_utf8(self.output[0].lock().unwrap().clone()).unwrap()
    }
    pub(crate) fn err(&self) -> String {
        String::from_utf8_lossy(&self.output[1].lock().unwrap()).into_owned()
    }

    /// Waits until standard output or standard error holds `word`.
    pub(crate) fn wait_for(&self, word: &str) {
        let since = Instant::now();
        while !self.out().contains(word) && !self.err().contains(word) {
            assert!(since.elapsed() < PATIENCE, "no {word:?}: {:?} {:?}", self.out(), self.err());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Hangs up. The status of the process.
    pub(crate) fn close(mut self) -> Option<i32> {
        self.control.shutdown(Shutdown::Both).unwrap();
        self.child.wait().unwrap().code()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // After a test that failed half way.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// `ZEROBOOT_TEST_PYTHON`, or the virtual environment of the test command.
pub(crate) fn python() -> String {
    let made = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/test-venv/bin/python");
    std::env::var("ZEROBOOT_TEST_PYTHON").unwrap_or_else(|_| made.into())
}
