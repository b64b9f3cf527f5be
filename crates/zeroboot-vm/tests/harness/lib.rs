//! Execs in forks of a template, the whole way but for the worker's process. Shared by the test files beside it.
#![allow(
    dead_code,
    clippy::print_stderr,
    clippy::type_complexity,
    reason = "each test file uses a part; tests speak to people"
)]

use std::{
    collections::{HashMap, HashSet},
    io::{self, Write as _},
    os::{fd::AsFd as _, unix::net::UnixStream},
    path::PathBuf,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use zeroboot_proto::{Decoder, Ending, ExitReport, FileChunk, Identity, Kind, Limits, Message, encode};
use zeroboot_sys::kick::{self, Kick};
use zeroboot_vm::{Front, Host, Prefault, Received, Session, SessionEnd, Snapshot};

pub(crate) struct Template {
    pub(crate) host: Host,
    pub(crate) snapshot: Snapshot,
}

/// Whether these tests are to run; says so when not.
pub(crate) fn wanted() -> bool {
    let on = |variable| std::env::var_os(variable).is_some_and(|v| v == "1");
    let wanted =
        std::env::var_os("ZEROBOOT_HOME").is_some() && (on("ZEROBOOT_NESTED") || on("ZEROBOOT_REQUIRE_TEMPLATES"));
    if !wanted {
        eprintln!("skipped: run it with cargo xtask nested-suite");
    }
    wanted
}

fn load(name: &'static str) -> Option<Template> {
    let home = PathBuf::from(std::env::var_os("ZEROBOOT_HOME").filter(|_| wanted())?);
    let host = Host::open().expect("a usable /dev/kvm");
    let snapshot = Snapshot::load(&host, &home.join("templates").join(name))
        .unwrap_or_else(|error| panic!("template {name}: {error}; {}", error.mend()));
    Some(Template { host, snapshot })
}

pub(crate) fn python() -> Option<&'static Template> {
    static TEMPLATE: OnceLock<Option<Template>> = OnceLock::new();
    TEMPLATE.get_or_init(|| load("python")).as_ref()
}

pub(crate) fn node() -> Option<&'static Template> {
    static TEMPLATE: OnceLock<Option<Template>> = OnceLock::new();
    TEMPLATE.get_or_init(|| load("node")).as_ref()
}

/// A request, with what most tests want already in it.
#[derive(Clone)]
pub(crate) struct Request {
    pub(crate) code: Vec<u8>,
    pub(crate) args: Vec<Vec<u8>>,
    pub(crate) env: Vec<(&'static str, &'static str)>,
    pub(crate) put: Vec<(&'static str, Vec<u8>)>,
    pub(crate) get: Vec<&'static str>,
    pub(crate) stdin: Option<Vec<u8>>,
    pub(crate) limits: Limits,
}

pub(crate) fn request(code: impl Into<Vec<u8>>) -> Request {
    Request {
        code: code.into(),
        args: vec![b"-c".to_vec()],
        env: Vec::new(),
        put: Vec::new(),
        get: Vec::new(),
        stdin: Some(Vec::new()),
        limits: Limits {
            wall_ns: 120_000_000_000,
            cpu_ns: u64::MAX,
            memory: 256 << 20,
            output: 16 << 20,
            file_size: 64 << 20,
            output_files: 16 << 20,
            processes: 64,
            open_files: 256,
        },
    }
}

impl Request {
    pub(crate) fn frames(&self) -> Vec<u8> {
        let mut entropy = [0; 64];
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty()).unwrap();
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty()).unwrap();
        let mut out = Vec::new();
        encode(&mut out, Kind::Identity, &Identity { entropy, realtime_ns: 0, sandbox_id: id }.encode());
        encode(&mut out, Kind::Limits, &self.limits.encode());
        for arg in &self.args {
            encode(&mut out, Kind::Arg, arg);
        }
        for (name, value) in &self.env {
            encode(&mut out, Kind::Env, format!("{name}\0{value}").as_bytes());
        }
        for (path, data) in &self.put {
            for (i, data) in data.chunks(60_000).enumerate() {
                let chunk = FileChunk { path: path.as_bytes(), data, mode: 0o644, append: i > 0, failed: false };
                encode(&mut out, Kind::Put, &chunk.encode());
            }
        }
        for path in &self.get {
            encode(&mut out, Kind::Get, path.as_bytes());
        }
        encode(&mut out, Kind::Code, &self.code);
        encode(&mut out, Kind::Run, b"");
        if let Some(stdin) = &self.stdin {
            if !stdin.is_empty() {
                encode(&mut out, Kind::Stdin, stdin);
            }
            encode(&mut out, Kind::StdinEnd, b"");
        }
        out
    }
}

/// What came of an exec.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) files: HashMap<String, Vec<u8>>,
    pub(crate) ending: Option<Ending>,
    pub(crate) failure: Option<String>,
    pub(crate) took: Duration,
    pub(crate) crash: Option<String>,
    pub(crate) hints: Vec<String>,
}

impl Answer {
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap().trim_end()
    }
    pub(crate) fn ok(self) -> Answer {
        let said = String::from_utf8_lossy(&self.stderr).into_owned();
        assert_eq!(
            self.ending,
            Some(Ending::Exited(0)),
            "{:?} {:?} {:?} {said}",
            self.failure,
            self.crash,
            self.text()
        );
        self
    }
}

struct Caller {
    input: Vec<u8>,
    decoder: Decoder,
    answer: Answer,
    /// Gives the next input once this many bytes of output have come.
    conversation: Vec<(usize, Vec<u8>)>,
    /// Written to when that is so: the other end kicks the vCPU, as the front's socket does.
    bell: UnixStream,
}

impl Front for Caller {
    fn receive(&mut self, into: &mut Vec<u8>, wait: bool) -> io::Result<Received> {
        if self.input.is_empty()
            && let Some((after, _)) = self.conversation.first()
            && self.answer.stdout.len() >= *after
        {
            self.input = self.conversation.remove(0).1;
        }
        if self.input.is_empty() {
            return Ok(if wait { Received::Gone } else { Received::Nothing });
        }
        // As a socket would: not all at once.
        let n = self.input.len().min(50_000);
        into.extend(self.input.drain(..n));
        Ok(Received::Bytes)
    }

    fn gone(&mut self) -> io::Result<bool> {
        Ok(false)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.decoder.feed(bytes);
        while let Some((kind, payload)) = self.decoder.next_frame().unwrap() {
            let answer = &mut self.answer;
            assert!(answer.ending.is_none() && answer.failure.is_none(), "{kind:?} after the last frame");
            match kind {
                Kind::Started => {}
                Kind::Stdout => answer.stdout.extend(payload),
                Kind::Stderr => answer.stderr.extend(payload),
                Kind::File => {
                    let chunk = FileChunk::decode(payload).unwrap();
                    let path = String::from_utf8(chunk.path.to_vec()).unwrap();
                    let path = if chunk.failed { format!("failed:{path}") } else { path };
                    answer.files.entry(path).or_default().extend(chunk.data);
                }
                Kind::Exit => answer.ending = Some(ExitReport::decode(payload).unwrap().ending),
                Kind::Crash => answer.crash = Some(String::from_utf8_lossy(payload).into_owned()),
                Kind::Failure => answer.failure = Some(String::from_utf8_lossy(payload).into_owned()),
                Kind::Note => match Message::decode(kind, payload).unwrap() {
                    Message::Hint(hint) => answer.hints.push(hint.into()),
                    other => panic!("{other:?}"),
                },
                other => panic!("{other:?}"),
            }
        }
        if self.conversation.first().is_some_and(|(after, _)| self.answer.stdout.len() >= *after) {
            self.bell.write_all(b"!").unwrap();
        }
        Ok(())
    }
}

pub(crate) fn converse(template: &Template, request: &Request, conversation: Vec<(usize, Vec<u8>)>) -> Answer {
    let mut fork = template.snapshot.fork(&template.host).unwrap();
    template.snapshot.prefault(&mut fork, Prefault::All).unwrap();
    let (bell, heard) = UnixStream::pair().unwrap();
    let mut caller =
        Caller { input: request.frames(), decoder: Decoder::new(), answer: Answer::default(), conversation, bell };
    let kick = Kick::new().unwrap();
    kick::on_activity(heard.as_fd()).unwrap();
    let start = Instant::now();
    let (end, _stats) = Session::new(&template.snapshot, &mut fork, &mut caller, &kick).run().unwrap();
    caller.answer.took = start.elapsed();
    match (end, caller.answer.ending) {
        (SessionEnd::Done(end), Some(said)) => assert_eq!(end, said),
        (SessionEnd::Failed, None) => {}
        other => panic!("{other:?}"),
    }
    caller.answer
}

pub(crate) fn exec(template: &Template, request: &Request) -> Answer {
    converse(template, request, Vec::new())
}

pub(crate) fn run(template: &Template, code: &str) -> Answer {
    exec(template, &request(code))
}

/// Runs code in this many forks (or in `ZEROBOOT_IDENTITY_FORKS`), two at a time; each of the first `lines` lines that it prints must be another one in
/// each fork. Gives what each fork printed, with the times before and after it.
pub(crate) fn all_differ(
    template: &Template,
    code: &str,
    lines: usize,
    forks: usize,
) -> Vec<(SystemTime, Answer, SystemTime)> {
    let forks: usize = std::env::var("ZEROBOOT_IDENTITY_FORKS").map_or(forks, |text| text.parse().unwrap());
    let left = AtomicUsize::new(forks);
    let answers = Mutex::new(Vec::new());
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
                    let before = SystemTime::now();
                    let answer = run(template, code).ok();
                    answers.lock().unwrap().push((before, answer, SystemTime::now()));
                }
            });
        }
    });
    let answers = answers.into_inner().unwrap();
    assert_eq!(answers.len(), forks);
    let mut seen: Vec<HashSet<&str>> = vec![HashSet::new(); lines];
    for (_, answer, _) in &answers {
        let printed: Vec<&str> = answer.text().lines().collect();
        assert!(printed.len() >= lines, "{answer:?}");
        for (value, seen) in printed.iter().zip(&mut seen) {
            assert!(seen.insert(value), "{value} twice");
        }
    }
    eprintln!("{forks} forks in {:?}", start.elapsed());
    answers
}
