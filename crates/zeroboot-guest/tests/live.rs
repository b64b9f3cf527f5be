//! A sandbox that lives, spoken to as the server does.

#[path = "harness/lib.rs"]
#[allow(dead_code)]
mod harness;

use std::collections::BTreeMap;
use std::io::{Read, Write};

use harness::{LIMITS, Sandbox, identity};
use zeroboot_proto::live::{
    CellStatus, ContextOp, DEFAULT_CONTEXT, End, Entry, EntryKind, FileOp, How, Open, Refusal, Reply, ResultChunk,
    Size, WINDOW, decode, encode as typed,
};
use zeroboot_proto::{Decoder, Kind, Limits, encode, encode_on};

/// What came on a channel.
#[derive(Default)]
struct Heard {
    pid: Option<i32>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    results: Vec<BTreeMap<String, Vec<u8>>>,
    error: Option<String>,
    replies: Vec<Reply>,
    granted: u64,
    end: Option<End>,
    last: bool,
    /// Kinds as they came.
    order: Vec<Kind>,
}

impl std::fmt::Debug for Heard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).chars().take(500).collect::<String>();
        let replies: String = format!("{:?}", self.replies).chars().take(1000).collect();
        write!(f, "{:?} {:?} {:?} ", self.pid, text(&self.stdout), text(&self.stderr))?;
        write!(f, "{} results {:?} {replies} {:?}", self.results.len(), self.error, self.end)
    }
}

impl Heard {
    fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
    fn how(&self) -> How {
        self.end.clone().unwrap_or_else(|| panic!("no end: {self:?}")).how
    }
    fn value(&self) -> &str {
        let bundle = self.results.last().unwrap_or_else(|| panic!("no result: {self:?}"));
        std::str::from_utf8(&bundle["text/plain"]).unwrap()
    }
}

struct Live {
    sandbox: Sandbox,
    decoder: Decoder,
    heard: BTreeMap<u16, Heard>,
    next: u16,
    /// Channels that are not granted anything.
    stalled: Vec<u16>,
    failure: Option<String>,
    /// How often it has come to rest.
    frozen: usize,
}

impl Live {
    fn python() -> Live {
        Live::with(LIMITS, &[])
    }

    fn with(limits: Limits, env: &[&str]) -> Live {
        let mut sandbox = Sandbox::python("");
        sandbox.wait_for(Kind::Ready);
        let mut bytes = Vec::new();
        encode(&mut bytes, Kind::Limits, &limits.encode());
        encode(&mut bytes, Kind::Identity, &identity().encode());
        for variable in env {
            encode(&mut bytes, Kind::Env, variable.as_bytes());
        }
        encode(&mut bytes, Kind::Live, &[]);
        sandbox.front.write_all(&bytes).unwrap();
        let (decoder, heard, stalled) = (Decoder::new(), BTreeMap::new(), Vec::new());
        Live { sandbox, decoder, heard, next: 0, stalled, failure: None, frozen: 0 }
    }

    fn send(&mut self, channel: u16, kind: Kind, payload: &[u8]) {
        let mut bytes = Vec::new();
        encode_on(&mut bytes, channel, kind, payload);
        self.sandbox.front.write_all(&bytes).unwrap();
    }

    fn open(&mut self, open: &Open) -> u16 {
        self.next += 1;
        self.open_on(self.next, open);
        self.next
    }

    fn open_on(&mut self, channel: u16, open: &Open) {
        self.heard.insert(channel, Heard::default());
        self.send(channel, Kind::Open, &typed(open));
    }

    fn cell(&mut self, context: &str, code: &str) -> u16 {
        self.cell_within(context, code, u64::MAX)
    }

    fn cell_within(&mut self, context: &str, code: &str, timeout_ns: u64) -> u16 {
        let channel = self.next + 1;
        self.send(channel, Kind::Code, code.as_bytes());
        self.open(&Open::Cell { context: context.into(), timeout_ns })
    }

    fn run(&mut self, code: &str) -> Heard {
        let channel = self.cell(DEFAULT_CONTEXT, code);
        self.finish(channel)
    }

    fn start(&mut self, argv: &[&str], terminal: Option<Size>, stdin: bool, timeout_ns: u64) -> u16 {
        let channel = self.next + 1;
        for arg in argv {
            self.send(channel, Kind::Arg, arg.as_bytes());
        }
        self.open(&Open::Command { cwd: None, terminal, stdin, timeout_ns })
    }

    fn exec(&mut self, argv: &[&str]) -> Heard {
        let channel = self.start(argv, None, false, u64::MAX);
        self.finish(channel)
    }

    fn file(&mut self, op: FileOp) -> Heard {
        let channel = self.open(&Open::File(op));
        self.finish(channel)
    }

    fn context(&mut self, op: ContextOp) -> Heard {
        let channel = self.open(&Open::Context(op));
        self.finish(channel)
    }

    fn write(&mut self, path: &str, bytes: &[u8]) -> Heard {
        let channel = self.open(&Open::File(FileOp::Write { path: path.into(), mode: None }));
        let mut sent = 0u64;
        for chunk in bytes.chunks(32 * 1024) {
            while sent + chunk.len() as u64 > u64::from(WINDOW) + self.heard[&channel].granted {
                if self.heard[&channel].end.is_some() {
                    return self.heard.remove(&channel).unwrap();
                }
                self.step();
            }
            self.send(channel, Kind::Stdin, chunk);
            sent += chunk.len() as u64;
        }
        self.send(channel, Kind::StdinEnd, &[]);
        self.finish(channel)
    }

    fn finish(&mut self, channel: u16) -> Heard {
        self.until(|live| live.heard[&channel].end.is_some());
        self.heard.remove(&channel).unwrap()
    }

    fn until(&mut self, done: impl Fn(&Live) -> bool) {
        while !done(self) {
            assert!(self.step(), "the agent closed: {:?}", self.failure);
        }
    }

    /// Takes what has come; `false` once the agent is gone.
    fn step(&mut self) -> bool {
        let mut moved = false;
        let mut grants = Vec::new();
        while let Some(frame) = self.decoder.next_on_any().unwrap() {
            moved = true;
            let (id, kind, payload) = (frame.channel, frame.kind, frame.payload);
            if id == 0 {
                match kind {
                    Kind::Started => {}
                    Kind::Frozen => self.frozen += 1,
                    Kind::Failure => self.failure = Some(String::from_utf8(payload.to_vec()).unwrap()),
                    other => panic!("{other:?} on channel 0"),
                }
                continue;
            }
            let heard = self.heard.get_mut(&id).unwrap_or_else(|| panic!("{kind:?} on a channel that is not open"));
            assert!(heard.end.is_none(), "{kind:?} after the end");
            let mut consumed = payload.len();
            heard.order.push(kind);
            match kind {
                Kind::Started => {
                    heard.pid = payload.try_into().ok().map(i32::from_le_bytes);
                    consumed = 0;
                }
                Kind::Stdout => heard.stdout.extend_from_slice(payload),
                Kind::Stderr => heard.stderr.extend_from_slice(payload),
                Kind::Result => {
                    let chunk = ResultChunk::decode(payload).unwrap();
                    if heard.results.is_empty() || heard.last {
                        heard.results.push(BTreeMap::new());
                    }
                    heard.last = chunk.last;
                    let bundle = heard.results.last_mut().unwrap();
                    bundle.entry(chunk.mime.to_owned()).or_default().extend_from_slice(chunk.data);
                }
                Kind::Error => heard.error = Some(String::from_utf8(payload.to_vec()).unwrap()),
                Kind::Reply => heard.replies.push(decode(payload).unwrap()),
                Kind::Grant => {
                    heard.granted += u64::from(u32::from_le_bytes(payload.try_into().unwrap()));
                    consumed = 0;
                }
                Kind::End => {
                    heard.end = Some(decode(payload).unwrap());
                    consumed = 0;
                }
                other => panic!("{other:?} on a channel"),
            }
            if consumed > 0 && !self.stalled.contains(&id) {
                grants.push((id, consumed as u32));
            }
        }
        for (id, bytes) in grants {
            self.send(id, Kind::Credit, &bytes.to_le_bytes());
        }
        if moved {
            return true;
        }
        let mut buffer = [0; 65536];
        match self.sandbox.front.read(&mut buffer) {
            Ok(0) => false,
            Ok(n) => {
                self.decoder.feed(&buffer[..n]);
                true
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => false,
            Err(error) => panic!("nothing from the agent: {error}: {:?}", self.heard),
        }
    }
}

fn entry(heard: &Heard) -> &Entry {
    match heard.replies.as_slice() {
        [Reply::Entry(entry)] => entry,
        other => panic!("{other:?} {:?}", heard.end),
    }
}

const SECOND: u64 = 1_000_000_000;

#[test]
fn cells_keep_their_state_and_give_the_value_of_the_last_expression() {
    let mut live = Live::python();
    assert_eq!(live.run("x = 41").results.len(), 0);
    for n in 1..=100 {
        assert_eq!(live.run("x += 1\nx").value(), (41 + n).to_string());
    }
    let heard = live.run("import sys; print('out'); print('err', file=sys.stderr); 1/0");
    assert_eq!((heard.out().as_str(), heard.stderr.as_slice()), ("out\n", &b"err\n"[..]));
    let error = heard.error.clone().unwrap();
    assert!(error.contains("ZeroDivisionError") && error.contains("division by zero"), "{error}");
    assert!(matches!(heard.how(), How::Cell(done) if done.status == CellStatus::Error && done.execution_count == 102));
    assert_eq!(live.run("x").value(), "141");
}

#[test]
fn what_a_cell_prints_is_told_before_what_it_shows_after_it() {
    let mut live = Live::python();
    let heard = live.run("print('first')\ndisplay(1)\nprint('second')\n2");
    let told = |wanted: Kind| heard.order.iter().position(|kind| *kind == wanted);
    assert!(told(Kind::Stdout) < told(Kind::Result), "{:?}", heard.order);
    assert_eq!((heard.out().as_str(), heard.value()), ("first\nsecond\n", "2"));
}

#[test]
fn a_command_has_its_streams_apart_and_its_own_status() {
    let mut live = Live::with(LIMITS, &["FROM\0sandbox"]);
    let heard = live.exec(&["sh", "-c", "echo out; echo err >&2; echo $FROM; exit 3"]);
    assert_eq!((heard.out().as_str(), heard.stderr.as_slice()), ("out\nsandbox\n", &b"err\n"[..]));
    assert_eq!(heard.how(), How::Exited(3));
    assert!(heard.pid.unwrap() > 0);
    assert_eq!(live.exec(&["sh", "-c", "kill -9 $$"]).how(), How::Signaled(9));
    let refused = live.exec(&["no-such-program"]);
    assert!(matches!(refused.how(), How::Refused(Refusal::CannotStart, text) if text.contains("no-such-program")));
    assert!(matches!(live.exec(&[]).how(), How::Refused(Refusal::CannotStart, _)));
}

#[test]
fn input_reaches_a_command_as_it_comes_and_ends_when_it_is_told_to() {
    let mut live = Live::python();
    let channel = live.start(&["cat"], None, true, u64::MAX);
    live.send(channel, Kind::Stdin, b"one\n");
    live.until(|live| live.heard[&channel].stdout == b"one\n");
    live.send(channel, Kind::Stdin, b"two\n");
    live.send(channel, Kind::StdinEnd, &[]);
    let heard = live.finish(channel);
    assert_eq!((heard.out().as_str(), heard.how(), heard.granted), ("one\ntwo\n", How::Exited(0), 8));
}

#[test]
fn a_command_is_killed_with_all_its_processes_when_its_time_has_passed_or_nobody_waits() {
    let mut live = Live::python();
    let channel = live.start(&["sh", "-c", "sleep 1000 & sleep 1000"], None, false, SECOND / 5);
    assert_eq!(live.finish(channel).how(), How::DeadlinePassed);
    let channel = live.start(&["sh", "-c", "echo begun; sleep 1000"], None, false, u64::MAX);
    live.until(|live| live.heard[&channel].stdout == b"begun\n");
    live.send(channel, Kind::Close, &[]);
    assert_eq!(live.finish(channel).how(), How::Closed);
    let left = live.exec(&["sh", "-c", "ps -eo ppid,args | grep -c '[s]leep 1000' || true"]);
    assert_eq!(left.out(), "0\n");
}

#[test]
fn what_a_command_leaves_behind_goes_on_and_holds_up_nobody() {
    let mut live = Live::python();
    let heard = live.exec(&["sh", "-c", "(while :; do echo noise; sleep 0.01; done) & echo $!"]);
    assert_eq!(heard.how(), How::Exited(0));
    let pid = heard.out().lines().find(|line| *line != "noise").unwrap().to_owned();
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(live.exec(&["kill", "-0", &pid]).how(), How::Exited(0));
    assert_eq!(live.exec(&["kill", "-9", &pid]).how(), How::Exited(0));
}

#[test]
fn a_terminal_is_one_with_a_size_that_changes_and_control_keys() {
    let mut live = Live::python();
    let size = Size { columns: 91, rows: 17 };
    let channel = live.start(
        &["sh", "-c", "stty size; trap 'echo int' INT; read x; stty size; echo $x"],
        Some(size),
        true,
        u64::MAX,
    );
    live.until(|live| live.heard[&channel].out().contains("17 91"));
    live.send(channel, Kind::Resize, &typed(&Size { columns: 40, rows: 9 }));
    live.send(channel, Kind::Stdin, b"hello\n");
    let heard = live.finish(channel);
    assert!(heard.out().contains("9 40\r\nhello\r\n"), "{}", heard.out());
    assert_eq!(heard.how(), How::Exited(0));
    let channel = live.start(&["cat"], Some(size), true, u64::MAX);
    live.send(channel, Kind::Stdin, b"\x03");
    assert_eq!(live.finish(channel).how(), How::Signaled(2));
    let channel = live.start(&["cat"], Some(size), true, u64::MAX);
    live.send(channel, Kind::StdinEnd, &[]);
    assert_eq!(live.finish(channel).how(), How::Exited(0));
}

#[test]
fn a_reader_that_stalls_one_channel_holds_up_that_channel_alone() {
    let mut live = Live::python();
    let slow = live.start(&["sh", "-c", "yes | head -c 3000000"], None, false, u64::MAX);
    live.stalled.push(slow);
    live.until(|live| live.heard[&slow].stdout.len() == WINDOW as usize);
    for n in 0..20 {
        assert_eq!(live.run(&format!("{n} * 2")).value(), (n * 2).to_string());
        assert_eq!(live.exec(&["echo", &n.to_string()]).out(), format!("{n}\n"));
    }
    assert_eq!(live.heard[&slow].stdout.len(), WINDOW as usize, "not a byte more than was granted");
    live.stalled.clear();
    live.send(slow, Kind::Credit, &WINDOW.to_le_bytes());
    let heard = live.finish(slow);
    assert_eq!((heard.stdout.len(), heard.how()), (3_000_000, How::Exited(0)));
}

#[test]
fn files_are_written_read_listed_moved_and_removed() {
    let mut live = Live::python();
    let big: Vec<u8> = (0..3_000_000u32).map(|n| n as u8 ^ (n >> 8) as u8).collect();
    let written = live.write("a/b/big.bin", &big);
    assert_eq!((written.how(), entry(&written).size, entry(&written).mode), (How::Done, 3_000_000, 0o644));
    let read = live.file(FileOp::Read { path: "a/b/big.bin".into(), offset: 0, length: u64::MAX });
    assert!(read.stdout == big && read.how() == How::Done);
    let part = live.file(FileOp::Read { path: "a/b/big.bin".into(), offset: 1_000_000, length: 5 });
    assert_eq!(part.stdout, big[1_000_000..1_000_005]);
    assert_eq!(entry(&part).size, 3_000_000);
    assert_eq!(live.file(FileOp::MakeDir { path: "a/c/d".into() }).how(), How::Done);
    let list = live.file(FileOp::List { path: "./a".into(), depth: 2 });
    let Some(Reply::Entries(entries)) = list.replies.first() else { panic!("{list:?}") };
    let names: Vec<_> = entries.iter().map(|e| (e.path.rsplit('/').next().unwrap(), e.kind)).collect();
    assert_eq!(
        names,
        [
            ("b", EntryKind::Directory),
            ("big.bin", EntryKind::File),
            ("c", EntryKind::Directory),
            ("d", EntryKind::Directory)
        ]
    );
    assert_eq!(live.file(FileOp::Move { from: "a/b/big.bin".into(), to: "a/c/x".into() }).how(), How::Done);
    assert_eq!(live.file(FileOp::Chmod { path: "a/c/x".into(), mode: 0o600 }).how(), How::Done);
    assert_eq!(entry(&live.file(FileOp::Stat { path: "a/c/x".into() })).mode, 0o600);
    let full = live.file(FileOp::Remove { path: "a".into(), recursive: false });
    assert!(matches!(full.how(), How::Refused(Refusal::NotEmpty, _)), "{full:?}");
    assert_eq!(live.file(FileOp::Remove { path: "a".into(), recursive: true }).how(), How::Done);
    let gone = live.file(FileOp::Stat { path: "a".into() });
    assert!(matches!(gone.how(), How::Refused(Refusal::NotFound, _)), "{gone:?}");
}

#[test]
fn a_file_that_is_not_written_to_its_end_never_appears() {
    let mut live = Live::python();
    let channel = live.open(&Open::File(FileOp::Write { path: "half".into(), mode: None }));
    live.send(channel, Kind::Stdin, b"half of it");
    live.send(channel, Kind::Close, &[]);
    assert_eq!(live.finish(channel).how(), How::Closed);
    let list = live.file(FileOp::List { path: ".".into(), depth: 1 });
    assert_eq!(list.replies, [Reply::Entries(Vec::new())]);
}

#[test]
fn paths_that_lead_to_the_agent_itself_or_nowhere_are_refused() {
    let mut live = Live::python();
    live.exec(&["sh", "-c", "ln -s /proc/1 one; ln -s /proc/self/fd/3 socket; ln -s loop loop; mkfifo fifo"]);
    for (path, refusal) in [
        ("/proc/self/mem", Refusal::NotAllowed),
        ("/proc/1/environ", Refusal::NotAllowed),
        ("one/environ", Refusal::NotAllowed),
        ("/proc/self/fd/3", Refusal::NotAllowed),
        ("socket", Refusal::NotAllowed),
        ("loop", Refusal::NotAllowed),
        ("fifo", Refusal::WrongKind),
        (".", Refusal::WrongKind),
        ("", Refusal::BadName),
        ("a\0b", Refusal::BadName),
        ("no/such", Refusal::NotFound),
    ] {
        let heard = live.file(FileOp::Read { path: path.into(), offset: 0, length: 10 });
        assert!(matches!(heard.how(), How::Refused(r, _) if r == refusal), "{path:?}: {heard:?}");
        assert!(heard.stdout.is_empty());
    }
}

#[test]
fn a_watched_directory_tells_what_changes_in_it() {
    let mut live = Live::python();
    let channel = live.open(&Open::File(FileOp::Watch { path: ".".into(), recursive: true }));
    live.until(|live| !live.heard[&channel].replies.is_empty());
    live.exec(&["sh", "-c", "mkdir d; echo 1 > d/f"]);
    let changed = |live: &Live, text: &str| format!("{:?}", live.heard[&channel].replies).contains(text);
    live.until(|live| changed(live, "d/f\", kind: Created"));
    live.exec(&["sh", "-c", "echo 22 > d/f"]);
    live.until(|live| changed(live, "d/f\", kind: Modified"));
    live.exec(&["rm", "-r", "d"]);
    live.until(|live| changed(live, "d/f\", kind: Removed"));
    live.send(channel, Kind::Close, &[]);
    assert_eq!(live.finish(channel).how(), How::Closed);
}

#[test]
fn a_cell_is_interrupted_at_its_timeout_and_its_context_lives_on() {
    let mut live = Live::python();
    live.run("x = 5");
    let channel = live.cell_within(DEFAULT_CONTEXT, "while True: pass", SECOND / 5);
    let heard = live.finish(channel);
    assert!(heard.how() == How::DeadlinePassed && !heard.end.unwrap().context_lost);
    assert_eq!(live.run("x").value(), "5");
    // One that does not heed it is killed, and that is said; a fresh interpreter takes its place.
    let code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: time.sleep(1)";
    let channel = live.cell_within(DEFAULT_CONTEXT, code, SECOND / 5);
    let heard = live.finish(channel);
    assert!(heard.how() == How::DeadlinePassed && heard.end.unwrap().context_lost);
    assert_eq!(live.run("'x' in globals()").value(), "False");
}

#[test]
fn an_interpreter_that_ends_by_itself_is_said_to_be_lost() {
    let mut live = Live::python();
    let heard = live.run("import os; print('last words', flush=True); os._exit(7)");
    assert_eq!((heard.out().as_str(), heard.how()), ("last words\n", How::Exited(7)));
    assert!(heard.end.unwrap().context_lost);
    assert_eq!(live.run("6 * 7").value(), "42");
}

#[test]
fn contexts_have_states_of_their_own_and_are_made_restarted_and_deleted() {
    let mut live = Live::python();
    live.exec(&["mkdir", "sub"]);
    live.run("x = 'default'");
    for n in 0..50 {
        assert_eq!(live.context(ContextOp::Create { name: format!("c{n}"), cwd: Some("sub".into()) }).how(), How::Done);
    }
    let cells: Vec<u16> =
        (0..50).map(|n| live.cell(&format!("c{n}"), &format!("x = {n}; import os; os.getcwd()"))).collect();
    for channel in cells {
        assert!(live.finish(channel).value().contains("/sub"));
    }
    for n in [0, 17, 49] {
        let channel = live.cell(&format!("c{n}"), "x");
        assert_eq!(live.finish(channel).value(), n.to_string());
    }
    assert_eq!(live.run("x").value(), "'default'");
    let again = live.context(ContextOp::Create { name: "c0".into(), cwd: None });
    assert!(matches!(again.how(), How::Refused(Refusal::Exists, _)));
    let list = live.context(ContextOp::List);
    let [Reply::Contexts(all)] = list.replies.as_slice() else { panic!("{list:?}") };
    assert_eq!((all.len(), all[1].name.as_str(), all[1].executions), (51, "c0", 2));
    assert_eq!(live.context(ContextOp::Restart { name: "c0".into() }).how(), How::Done);
    let channel = live.cell("c0", "'x' in globals()");
    assert_eq!(live.finish(channel).value(), "False");
    let busy = live.cell("c1", "import time; time.sleep(1000)");
    let waiting = live.cell("c1", "1");
    assert_eq!(live.context(ContextOp::Delete { name: "c1".into() }).how(), How::Done);
    assert_eq!((live.finish(busy).how(), live.finish(waiting).how()), (How::Closed, How::Closed));
    let channel = live.cell("c1", "1");
    assert!(matches!(live.finish(channel).how(), How::Refused(Refusal::NotFound, _)));
    for name in ["", "a b", "x/y", &"n".repeat(65)] {
        let bad = live.context(ContextOp::Create { name: name.into(), cwd: None });
        assert!(matches!(bad.how(), How::Refused(Refusal::BadName, _)), "{name:?}");
    }
}

#[test]
fn an_interrupt_ends_the_cell_and_not_the_next() {
    let mut live = Live::python();
    let busy = live.cell(DEFAULT_CONTEXT, "print('begun', flush=True)\nwhile True: pass");
    let next = live.cell(DEFAULT_CONTEXT, "'next'");
    live.until(|live| live.heard[&busy].stdout == b"begun\n");
    assert_eq!(live.context(ContextOp::Interrupt { name: DEFAULT_CONTEXT.into() }).how(), How::Done);
    let heard = live.finish(busy);
    assert!(matches!(heard.how(), How::Cell(done) if done.status == CellStatus::Interrupted), "{heard:?}");
    assert!(heard.error.unwrap().contains("KeyboardInterrupt"));
    assert_eq!(live.finish(next).value(), "'next'");
}

#[test]
fn the_largest_process_goes_when_memory_is_over_its_limit_and_the_sandbox_lives() {
    let mut live = Live::with(Limits { memory: 300 << 20, ..LIMITS }, &[]);
    live.run("x = 1");
    // Below the limit of each process, above that of the sandbox.
    let eater = "import time; b = bytearray(200 << 20)\nfor i in range(0, len(b), 4096): b[i] = 1\ntime.sleep(1000)";
    let python = harness::python();
    let eaters: Vec<u16> = (0..2).map(|_| live.start(&[&python, "-c", eater], None, false, u64::MAX)).collect();
    live.until(|live| eaters.iter().any(|id| live.heard[id].end.is_some()));
    let (over, on): (Vec<u16>, Vec<u16>) = eaters.iter().partition(|id| live.heard[id].end.is_some());
    assert_eq!((over.len(), on.len()), (1, 1));
    assert_eq!(live.finish(over[0]).how(), How::OutOfMemory);
    assert_eq!(live.run("x + 1").value(), "2");
    live.send(on[0], Kind::Close, &[]);
    assert_eq!(live.finish(on[0]).how(), How::Closed);
    let own = live.run("y = bytearray(1 << 30)");
    assert!(own.error.unwrap().contains("MemoryError"));
    assert_eq!(live.run("x + 2").value(), "3");
}

#[test]
fn twenty_times_twenty_interleaved_things_get_their_own_answers() {
    let mut live = Live::python();
    let mut open = Vec::new();
    for n in 0..100u32 {
        open.push((live.cell(DEFAULT_CONTEXT, &format!("print('cell-{n}')")), format!("cell-{n}\n")));
        open.push((live.start(&["echo", &format!("cmd-{n}")], None, false, u64::MAX), format!("cmd-{n}\n")));
        if open.len() > 60 {
            let (channel, expected) = open.remove((n as usize * 7) % open.len());
            assert_eq!(live.finish(channel).out(), expected);
        }
    }
    for (channel, expected) in open {
        assert_eq!(live.finish(channel).out(), expected);
    }
}

#[test]
fn a_cell_whose_output_is_large_loses_none_of_it() {
    let mut live = Live::python();
    let heard = live.run("print('x' * 5_000_000)\n'done'");
    assert_eq!((heard.stdout.len(), heard.value()), (5_000_001, "'done'"));
    let heard = live.run("'y' * 1_000_000");
    assert_eq!(heard.value().len(), 1_000_002);
}

#[test]
fn words_for_a_channel_that_has_ended_are_left_alone_and_its_number_is_free() {
    let mut live = Live::python();
    live.next = 6;
    assert_eq!(live.exec(&["true"]).how(), How::Exited(0));
    for kind in [Kind::Stdin, Kind::StdinEnd, Kind::Signal, Kind::Close] {
        live.send(7, kind, b"\x0f");
    }
    live.send(7, Kind::Credit, &5u32.to_le_bytes());
    live.next = 6;
    assert_eq!(live.exec(&["echo", "again"]).out(), "again\n");
}

#[test]
fn a_sandbox_that_becomes_another_makes_the_generators_of_its_contexts_new() {
    let mut live = Live::python();
    let kept = "import random, signal\nrandom.seed(1)\nmine = [random.Random(1)]\n";
    let is_new = "[g.random() != random.Random(1).random() for g in (random, mine[0])]";
    for name in ["busy", "deaf", "own"] {
        assert_eq!(live.context(ContextOp::Create { name: name.into(), cwd: None }).how(), How::Done);
    }
    live.run(kept);
    // Its signal is the code's own business: then it is told before its next cell.
    let deaf = live.cell("deaf", &format!("{kept}signal.signal(signal.SIGURG, signal.SIG_IGN)"));
    live.finish(deaf);
    let wait = "state = random.getstate()\nprint('begun', flush=True)\n\
                while random.getstate() == state: pass\nrandom.seed(7)\nprint('renewed')";
    let busy = live.cell("busy", &format!("{kept}{wait}"));
    live.until(|live| live.heard[&busy].out() == "begun\n");
    live.send(0, Kind::Freeze, &[]);
    live.until(|live| live.frozen == 1);
    live.send(0, Kind::Identity, &identity().encode());
    // In the middle of its cell, and what the code does afterwards stays.
    assert_eq!(live.finish(busy).out(), "begun\nrenewed\n");
    let seeded = live
        .cell("busy", "random.random() == random.Random(7).random(), mine[0].random() == random.Random(1).random()");
    assert_eq!(live.finish(seeded).value(), "(True, False)");
    assert_eq!(live.run(is_new).value(), "[True, True]");
    let deaf = live.cell("deaf", is_new);
    assert_eq!(live.finish(deaf).value(), "[True, True]");
    // One that nothing ran in yet.
    let own = live.cell("own", &format!("{kept}{is_new}"));
    assert_eq!(live.finish(own).value(), "[False, False]");
    // Again, and what is seeded afterwards is left alone.
    live.send(0, Kind::Freeze, &[]);
    live.until(|live| live.frozen == 2);
    live.send(0, Kind::Identity, &identity().encode());
    assert_eq!(live.run(&format!("{kept}{is_new}")).value(), "[False, False]");
}

#[test]
fn a_front_that_breaks_the_protocol_is_told_and_nothing_is_left() {
    for (channel, kind, payload, word) in
        [(3, Kind::Open, vec![99], "Open"), (0, Kind::Identity, vec![], "Identity"), (5, Kind::Run, vec![], "Run")]
    {
        let mut live = Live::python();
        if kind == Kind::Run {
            live.open_on(5, &Open::File(FileOp::Watch { path: ".".into(), recursive: false }));
        }
        live.send(channel, kind, &payload);
        while live.step() {}
        assert!(live.failure.as_ref().is_some_and(|text| text.contains(word)), "{:?}", live.failure);
    }
}
