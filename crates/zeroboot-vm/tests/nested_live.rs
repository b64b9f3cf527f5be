//! Sandboxes that live in forks of the real Python template, in the nested lane or on any host whose KVM runs Linux: the
//! agent inside, the session outside, and a front in this file. See `nested_linux.rs` for when they run.
#![allow(clippy::print_stderr, reason = "tests speak to people")]

#[path = "harness/lib.rs"]
mod harness;

use std::{
    collections::HashMap,
    io::{Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

use zeroboot_proto::{
    Decoder, Kind, encode, encode_on,
    live::{
        CellStatus, ContextOp, End, FileOp, How, Open, Refusal, Reply, ResultChunk, Size, WINDOW, decode,
        decode_credit, encode as encode_typed,
    },
};
use zeroboot_sys::kick::{self, Kick};
use zeroboot_vm::{Prefault, Session, SessionEnd, SessionStats, SocketFront};

use crate::harness::{Template, python, request};

/// What came on a channel.
#[derive(Default)]
struct Heard {
    pid: Option<u32>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    results: Vec<(String, Vec<u8>)>,
    errors: Vec<Vec<u8>>,
    replies: Vec<Reply>,
    granted: u64,
    fed: u64,
    end: Option<End>,
    /// Its reader takes nothing: no credit.
    stalled: bool,
}

impl Heard {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
    fn plain(&self) -> Option<&str> {
        let result = self.results.iter().find(|(mime, _)| mime == "text/plain")?;
        std::str::from_utf8(&result.1).ok()
    }
}

/// The front of one sandbox.
struct Client {
    socket: UnixStream,
    decoder: Decoder,
    channels: HashMap<u16, Heard>,
    next: u16,
    crash: Option<String>,
}

impl Client {
    fn begin(socket: UnixStream) -> Client {
        // The request of an exec, up to its code.
        let mut whole = Decoder::new();
        whole.feed(&request("").frames());
        let mut bytes = Vec::new();
        while let Some((kind, payload)) = whole.next_frame().unwrap() {
            if matches!(kind, Kind::Limits | Kind::Identity) {
                encode(&mut bytes, kind, payload);
            }
        }
        encode(&mut bytes, Kind::Env, b"FROM_BIRTH\0yes");
        encode(&mut bytes, Kind::Live, b"");
        socket.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        let mut client = Client { socket, decoder: Decoder::new(), channels: HashMap::new(), next: 1, crash: None };
        client.send(&bytes);
        client.channels.insert(0, Heard::default());
        client.until(0, |heard| heard.pid.is_some());
        client
    }

    fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    fn open(&mut self, before: &[(Kind, &[u8])], open: &Open) -> u16 {
        let channel = self.next;
        self.next += 1;
        let mut bytes = Vec::new();
        for (kind, payload) in before {
            encode_on(&mut bytes, channel, *kind, payload);
        }
        encode_on(&mut bytes, channel, Kind::Open, &encode_typed(open));
        self.channels.insert(channel, Heard::default());
        self.send(&bytes);
        channel
    }

    fn cell_in(&mut self, context: &str, code: &str) -> u16 {
        let open = Open::Cell { context: context.to_owned(), timeout_ns: u64::MAX };
        self.open(&[(Kind::Code, code.as_bytes())], &open)
    }

    /// Runs a cell in the default context to its end.
    fn cell(&mut self, code: &str) -> Heard {
        let channel = self.cell_in("default", code);
        self.ended(channel)
    }

    fn command_with(&mut self, words: &[&str], terminal: Option<Size>, stdin: bool) -> u16 {
        let words: Vec<_> = words.iter().map(|word| (Kind::Arg, word.as_bytes())).collect();
        self.open(&words, &Open::Command { cwd: None, terminal, stdin, timeout_ns: u64::MAX })
    }

    fn command(&mut self, words: &[&str]) -> Heard {
        let channel = self.command_with(words, None, false);
        self.ended(channel)
    }

    fn file(&mut self, op: FileOp) -> Heard {
        let channel = self.open(&[], &Open::File(op));
        self.ended(channel)
    }

    fn say(&mut self, channel: u16, kind: Kind, payload: &[u8]) {
        let mut bytes = Vec::new();
        encode_on(&mut bytes, channel, kind, payload);
        self.send(&bytes);
    }

    /// As far as the sandbox takes it.
    fn stdin(&mut self, channel: u16, bytes: &[u8]) {
        for chunk in bytes.chunks(32 * 1024) {
            self.until(channel, |heard| {
                heard.fed + chunk.len() as u64 <= heard.granted + u64::from(WINDOW) || heard.end.is_some()
            });
            self.say(channel, Kind::Stdin, chunk);
            self.channels.get_mut(&channel).unwrap().fed += chunk.len() as u64;
        }
    }

    fn ended(&mut self, channel: u16) -> Heard {
        self.until(channel, |heard| heard.end.is_some());
        self.channels.remove(&channel).unwrap()
    }

    #[track_caller]
    fn until(&mut self, channel: u16, mut done: impl FnMut(&Heard) -> bool) {
        while !done(&self.channels[&channel]) {
            self.hear();
        }
    }

    /// One frame.
    fn hear(&mut self) {
        let mut chunk = [0; 16 * 1024];
        let frame = loop {
            if let Some(frame) = self.decoder.next_on_any().unwrap() {
                break (frame.channel, frame.kind, frame.payload.to_vec());
            }
            match self.socket.read(&mut chunk).unwrap() {
                0 => panic!("the sandbox is gone: {:?}", self.crash),
                n => self.decoder.feed(&chunk[..n]),
            }
        };
        let (channel, kind, payload) = frame;
        if kind == Kind::Crash || kind == Kind::Failure {
            self.crash = Some(String::from_utf8_lossy(&payload).into_owned());
            return;
        }
        let heard = self.channels.get_mut(&channel).unwrap_or_else(|| panic!("{kind:?} on {channel}"));
        match kind {
            Kind::Started => {
                heard.pid = Some(payload.try_into().map_or(0, u32::from_le_bytes));
                return;
            }
            Kind::Stdout => heard.stdout.extend(&payload),
            Kind::Stderr => heard.stderr.extend(&payload),
            Kind::Result => {
                let part = ResultChunk::decode(&payload).unwrap();
                match heard.results.last_mut().filter(|_| part.append) {
                    Some((_, data)) => data.extend(part.data),
                    None => heard.results.push((part.mime.to_owned(), part.data.to_vec())),
                }
            }
            Kind::Error => heard.errors.push(payload.clone()),
            Kind::Reply => heard.replies.push(decode(&payload).unwrap()),
            Kind::Grant => heard.granted += u64::from(decode_credit(&payload).unwrap()),
            Kind::End => heard.end = Some(decode(&payload).unwrap()),
            other => panic!("{other:?}"),
        }
        if !heard.stalled && !matches!(kind, Kind::Grant | Kind::End) {
            self.say(channel, Kind::Credit, &(payload.len() as u32).to_le_bytes());
        }
    }
}

/// What a session came to.
struct Over {
    end: SessionEnd,
    stats: SessionStats,
    /// KVM's own counters.
    kvm: Vec<(String, u64)>,
    /// Pages that were copied.
    private: u64,
}

/// A session on a thread, and its front on this one.
fn session<T>(template: &'static Template, prefault: Prefault, front: impl FnOnce(UnixStream) -> T) -> (T, Over) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let session = std::thread::spawn(move || {
        let mut fork = template.snapshot.fork(&template.host).unwrap();
        template.snapshot.prefault(&mut fork, prefault).unwrap();
        let kick = Kick::new().unwrap();
        kick::on_activity(theirs.as_fd()).unwrap();
        let mut socket = SocketFront::new(theirs.as_fd());
        let (end, stats) = Session::new(&template.snapshot, &mut fork, &mut socket, &kick).run().unwrap();
        let private = fork.machine().memory().resident().unwrap().private_pages();
        Over { end, stats, kvm: fork.machine().vcpu().stats().unwrap_or_default(), private }
    });
    let result = front(ours);
    (result, session.join().unwrap())
}

/// Lets a fork live, and a front with it.
fn alive<T>(template: &'static Template, front: impl FnOnce(&mut Client) -> T) -> (T, Over) {
    alive_with(template, Prefault::All, front)
}

fn alive_with<T>(template: &'static Template, prefault: Prefault, front: impl FnOnce(&mut Client) -> T) -> (T, Over) {
    let (result, over) = session(template, prefault, |socket| {
        let mut client = Client::begin(socket);
        let result = front(&mut client);
        assert_eq!(client.crash, None);
        result
    });
    assert_eq!(over.end, SessionEnd::FrontGone);
    (result, over)
}

fn how(heard: &Heard) -> &How {
    &heard.end.as_ref().unwrap().how
}

#[test]
fn cells_keep_their_state_and_an_error_leaves_it_usable() {
    let Some(python) = python() else { return };
    alive(python, |sandbox| {
        let begin = Instant::now();
        assert!(sandbox.cell("x = 41\nimport os").results.is_empty());
        let first = begin.elapsed();
        let answer = sandbox.cell("x + 1");
        assert_eq!(answer.plain(), Some("42"));
        let How::Cell(done) = how(&answer) else { panic!("{:?}", answer.end) };
        assert_eq!((done.status, done.execution_count), (CellStatus::Ok, 2));
        let answer = sandbox.cell("1/0");
        assert!(String::from_utf8_lossy(&answer.errors[0]).contains("ZeroDivisionError"));
        let answer = sandbox.cell("print(os.environ['FROM_BIRTH'], os.getuid(), x)");
        assert_eq!(answer.text(), "yes 1000 41\n");
        for n in 0..30 {
            assert_eq!(sandbox.cell(&format!("x += 1; x - {n}")).plain(), Some("42"));
        }
        eprintln!("first cell {first:?}, 34 in {:?}", begin.elapsed());
        // One that does not end by itself.
        let busy = sandbox.cell_in("default", "import time\nprint('on', flush=True)\ntime.sleep(1000)");
        sandbox.until(busy, |heard| !heard.stdout.is_empty());
        sandbox.open(&[], &Open::Context(ContextOp::Interrupt { name: "default".into() }));
        let answer = sandbox.ended(busy);
        assert!(matches!(how(&answer), How::Cell(done) if done.status != CellStatus::Ok), "{:?}", answer.end);
        assert_eq!(sandbox.cell("x").plain(), Some("71"));
    });
}

#[test]
fn commands_have_streams_a_status_input_and_signals() {
    let Some(python) = python() else { return };
    alive(python, |sandbox| {
        let answer = sandbox.command(&["sh", "-c", "echo out; echo err >&2; exit 3"]);
        assert_eq!(
            (answer.text(), answer.stderr.as_slice(), how(&answer)),
            ("out\n", b"err\n".as_slice(), &How::Exited(3))
        );
        assert!(answer.pid.is_some_and(|pid| pid > 1));
        assert!(matches!(how(&sandbox.command(&["/no/such/program"])), How::Refused(Refusal::CannotStart, _)));
        // Nothing of ours is in reach of a program.
        let answer = sandbox.command(&["sh", "-c", "cat /dev/hpet; echo x > /dev/port; kill -9 1; id -u"]);
        assert_eq!(answer.text(), "1000\n");
        assert_eq!(String::from_utf8_lossy(&answer.stderr).matches("ermi").count(), 3, "{:?}", answer.stderr);
        // A megabyte and a half through `cat`, under both directions' credit.
        let data: Vec<u8> = (0..1_500_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
        let cat = sandbox.command_with(&["cat"], None, true);
        sandbox.stdin(cat, &data);
        sandbox.say(cat, Kind::StdinEnd, b"");
        let answer = sandbox.ended(cat);
        assert!(answer.stdout == data && how(&answer) == &How::Exited(0), "{} bytes", answer.stdout.len());
        assert_eq!(answer.granted, data.len() as u64);
        let sleeper = sandbox.command_with(&["sleep", "1000"], None, false);
        sandbox.until(sleeper, |heard| heard.pid.is_some());
        sandbox.say(sleeper, Kind::Signal, &[15]);
        assert_eq!(how(&sandbox.ended(sleeper)), &How::Signaled(15));
        let sleeper = sandbox.command_with(&["sleep", "1000"], None, false);
        sandbox.say(sleeper, Kind::Close, b"");
        assert_eq!(how(&sandbox.ended(sleeper)), &How::Closed);
    });
}

#[test]
fn a_reader_that_stalls_holds_up_its_channel_alone() {
    let Some(python) = python() else { return };
    alive(python, |sandbox| {
        let large = sandbox.command_with(&["sh", "-c", "yes | head -c 3000000"], None, false);
        sandbox.channels.get_mut(&large).unwrap().stalled = true;
        for n in 0..200 {
            assert_eq!(sandbox.cell(&format!("{n} * {n}")).plain(), Some((n * n).to_string().as_str()));
            // Ten at least, and more until the command has come to speak.
            if n >= 10 && !sandbox.channels[&large].stdout.is_empty() {
                break;
            }
        }
        let held = &sandbox.channels[&large];
        let stalled = held.stdout.len();
        assert!(stalled as u32 <= WINDOW && stalled > 0 && held.end.is_none(), "{stalled}");
        sandbox.channels.get_mut(&large).unwrap().stalled = false;
        sandbox.say(large, Kind::Credit, &(stalled as u32).to_le_bytes());
        let begin = Instant::now();
        let answer = sandbox.ended(large);
        assert_eq!((answer.stdout.len(), how(&answer)), (3_000_000, &How::Exited(0)));
        eprintln!("{} bytes in {:?}", 3_000_000 - stalled, begin.elapsed());
    });
}

#[test]
fn files_go_in_and_out_as_they_are() {
    let Some(python) = python() else { return };
    alive(python, |sandbox| {
        let data: Vec<u8> = (0..2_000_000u32).map(|i| ((i * 11) >> 2) as u8).collect();
        let path = || "a/b.bin".to_owned();
        let write = sandbox.open(&[], &Open::File(FileOp::Write { path: path(), mode: Some(0o600) }));
        sandbox.stdin(write, &data);
        sandbox.say(write, Kind::StdinEnd, b"");
        let written = sandbox.ended(write);
        assert_eq!(how(&written), &How::Done);
        assert!(matches!(&written.replies[0], Reply::Entry(entry) if entry.size == 2_000_000 && entry.mode == 0o600));
        let read = sandbox.file(FileOp::Read { path: path(), offset: 5, length: u64::MAX });
        assert!(read.stdout == data[5..] && how(&read) == &How::Done);
        assert_eq!(sandbox.cell("len(open('a/b.bin','rb').read())").plain(), Some("2000000"));
        let gone = sandbox.file(FileOp::Stat { path: "not/there".into() });
        assert!(matches!(how(&gone), How::Refused(Refusal::NotFound, _)));
        let listed = sandbox.file(FileOp::List { path: ".".into(), depth: 2 });
        let Reply::Entries(entries) = &listed.replies[0] else { panic!("{:?}", listed.replies) };
        assert!(entries.iter().any(|entry| entry.path.ends_with("/a/b.bin")), "{entries:?}");
        assert_eq!(how(&sandbox.file(FileOp::Remove { path: "a".into(), recursive: true })), &How::Done);
    });
}

/// The front's kick and one interrupt; then the agent's rings for the byte, for its grant and with its echo.
#[test]
fn an_echo_on_a_terminal_costs_at_most_three_doorbells() {
    let Some(python) = python() else { return };
    let terminal = |sandbox: &mut Client, echoes: usize| {
        let cat = sandbox.command_with(&["cat"], Some(Size { columns: 80, rows: 24 }), true);
        sandbox.until(cat, |heard| heard.pid.is_some());
        let mut times = Vec::new();
        for n in 0..echoes {
            // While nothing happens: the guest sleeps.
            std::thread::sleep(Duration::from_millis(60));
            let heard = sandbox.channels[&cat].stdout.len();
            let begin = Instant::now();
            sandbox.channels.get_mut(&cat).unwrap().stalled = true;
            sandbox.say(cat, Kind::Stdin, &[b'a' + (n % 26) as u8]);
            sandbox.until(cat, |all| all.stdout.len() > heard);
            times.push(begin.elapsed());
        }
        sandbox.say(cat, Kind::Close, b"");
        sandbox.ended(cat);
        times.sort_unstable();
        times
    };
    let (_, Over { stats: none, .. }) = alive(python, |sandbox| terminal(sandbox, 0));
    let (times, Over { stats: some, .. }) = alive(python, |sandbox| terminal(sandbox, 100));
    let each = |all: u64, base: u64| all.saturating_sub(base) as f64 / 100.0;
    let rings = each(some.exits.rings, none.exits.rings);
    eprintln!(
        "an echo: {:?} at p50, {:?} at p99; {rings:.2} doorbells, {:.2} kicks, {:.2} wakes, {:.2} exits in all",
        times[50],
        times[98],
        each(some.exits.kicks, none.exits.kicks),
        each(some.raised, none.raised),
        each(some.exits.total(), none.exits.total()),
    );
    assert!(rings <= 3.0, "{rings}");
    assert!(some.raised >= 100);
}

#[test]
fn a_terminal_has_its_size_and_its_keys() {
    let Some(python) = python() else { return };
    alive(python, |sandbox| {
        let code = "trap 'echo resized $(stty size)' WINCH; stty size; while :; do sleep 0.05; done";
        let shell = sandbox.command_with(&["sh", "-c", code], Some(Size { columns: 91, rows: 33 }), true);
        let says = |sandbox: &mut Client, text: &str| {
            let text = text.to_owned();
            sandbox.until(shell, move |heard| heard.text().contains(&text));
        };
        says(sandbox, "33 91");
        sandbox.say(shell, Kind::Resize, &encode_typed(&Size { columns: 132, rows: 50 }));
        says(sandbox, "resized 50 132");
        // Ctrl-C.
        sandbox.stdin(shell, &[3]);
        let answer = sandbox.ended(shell);
        assert!(matches!(how(&answer), How::Signaled(2) | How::Exited(130)), "{:?}", answer.end);
    });
}

#[test]
fn an_idle_sandbox_is_hardly_ever_awake() {
    let Some(python) = python() else { return };
    const SECONDS: u64 = 20;
    let mut counts = Vec::new();
    for seconds in [0, SECONDS] {
        let (_, Over { stats, kvm, .. }) = alive(python, |sandbox| {
            sandbox.cell("x = 1");
            // The agent's watchdog looks ever less often, and then no more.
            std::thread::sleep(Duration::from_secs(5));
            std::thread::sleep(Duration::from_secs(seconds));
            assert_eq!(sandbox.cell("x + 1").plain(), Some("2"));
        });
        let kvm: HashMap<_, _> = kvm.into_iter().collect();
        let count = |name: &str| kvm.get(name).copied().unwrap_or_default();
        counts.push([stats.exits.total(), count("halt_exits"), count("exits")]);
    }
    let [user, halts, exits] = std::array::from_fn(|i| counts[1][i].saturating_sub(counts[0][i]));
    eprintln!(
        "idle for {SECONDS} s: {user} exits to the worker, slept {halts} times, {exits} exits of all kinds; in all {counts:?}"
    );
    assert!(user <= 10, "{user}");
    // None was seen; what comes before differs a little from run to run.
    assert!(halts <= SECONDS / 2, "{halts}");
}

/// A measure, in pages, since time says little in the lane: what is not in the working set of an exec is copied on the way.
#[test]
fn a_first_cell_copies_about_as_many_pages_as_an_exec() {
    let Some(python) = python() else { return };
    let (_, exec) = session(python, Prefault::Nothing, |mut socket| {
        socket.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        socket.write_all(&request("print(1)").frames()).unwrap();
        // To its end: the session lets go of the socket.
        socket.read_to_end(&mut Vec::new()).unwrap();
    });
    assert_eq!(exec.end, SessionEnd::Done(zeroboot_proto::Ending::Exited(0)));
    let (_, born) = alive_with(python, Prefault::Nothing, |_| ());
    let (_, cell) = alive_with(python, Prefault::Nothing, |sandbox| {
        assert_eq!(sandbox.cell("print(1)").text(), "1\n");
    });
    let (_, ahead) = alive(python, |_| ());
    let (_, rest) = alive(python, |sandbox| {
        assert_eq!(sandbox.cell("print(1)").text(), "1\n");
    });
    eprintln!(
        "pages copied: {} by an exec, {} until it lives, {} with its first cell, {} of them not ahead",
        exec.private,
        born.private,
        cell.private,
        rest.private.saturating_sub(ahead.private),
    );
    assert!(cell.private < 2 * exec.private);
}
