//! A sandbox that lives: many runs and file operations side by side, each on a channel of its own. One thread, one poll.
//! See [`zeroboot_proto::live`] for what is said, and `live/` for the parts.
//!
//! Nothing is buffered without bound: output is read from a program only as far as its channel has credit, input is granted
//! as it is passed on. Nothing happens by a timer while nothing runs.

mod command;
mod context;
mod disk;
mod watchdog;

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::Signal;
use zeroboot_proto::live::{
    Change, ChangeKind, ContextOp, DEFAULT_CONTEXT, End, Entry, FileOp, How, MAX_CONTEXTS, MAX_NAME, MAX_OPEN,
    MAX_PENDING, Open, Refusal, Reply, Size, WINDOW, decode, decode_credit, encode, replies,
};
use zeroboot_proto::{Decoder, Identity, Kind, Limits, MAX_PAYLOAD, PayloadError, encode_on};

use self::command::{Program, Start};
use self::context::{Context, Phase, Said};
use self::disk::{Disk, Refused, Snapshot, Writing};
use self::watchdog::Watchdog;
use crate::limits::Ceilings;
use crate::place::Place;
use crate::processes::Processes;
use crate::runner::{Runner, Spawn};
use crate::supervise::Stop;
use crate::sys::{self, Setup};
use crate::transport::{Received, Transport};

/// Bytes of frames that may wait for the front. Above it the agent reads nothing that would become a frame.
const OUT_FULL: usize = 4 * MAX_PAYLOAD;
/// Most pipes of ended programs to which other programs may still write. The agent drops their output, so that they go on.
const MAX_LEFTOVERS: usize = 64;
/// Interval between comparisons of a watched directory, and how many times longer than a comparison it is at least.
const WATCH: Duration = Duration::from_millis(200);
const WATCH_SHARE: u32 = 20;

/// What it was told, and what was found out, before.
pub(crate) struct Born {
    pub(crate) identity: Identity,
    pub(crate) limits: Limits,
    pub(crate) ceilings: Ceilings,
    /// `NAME NUL VALUE`, over the template's.
    pub(crate) env: Vec<Vec<u8>>,
}

/// What a sandbox that lives is made of.
pub(crate) struct Birth<T> {
    pub(crate) transport: T,
    pub(crate) place: Place,
    pub(crate) processes: Processes,
    pub(crate) runner: Runner,
    pub(crate) from_runner: Decoder,
    pub(crate) from_front: Decoder,
    pub(crate) born: Born,
}

/// The whole state.
pub(crate) struct Live<T> {
    transport: T,
    place: Place,
    processes: Processes,
    born: Born,
    from_front: Decoder,
    out: Vec<u8>,
    contexts: Vec<Context>,
    channels: BTreeMap<u16, Channel>,
    pending: BTreeMap<u16, Pending>,
    pending_bytes: usize,
    leftovers: VecDeque<OwnedFd>,
    watchdog: Watchdog,
    buffer: Box<[u8]>,
}

/// What came ahead of an `Open`.
#[derive(Default)]
struct Pending {
    args: Vec<Vec<u8>>,
    env: Vec<Vec<u8>>,
    code: Vec<u8>,
}

struct Channel {
    /// Bytes that the front takes.
    credit: usize,
    begun: Instant,
    deadline: Option<Instant>,
    work: Work,
}

enum Work {
    /// A cell that waits for its context, or runs in it.
    Cell {
        context: String,
        code: Vec<u8>,
        timeout_ns: u64,
    },
    Program(Box<Program>),
    Read {
        ahead: Option<Vec<u8>>,
        file: File,
        left: u64,
    },
    Write(Writing),
    Watch {
        path: String,
        recursive: bool,
        seen: Snapshot,
        next: Instant,
        replies: VecDeque<Vec<u8>>,
    },
    /// Frames of a whole answer that wait for credit.
    Answer(VecDeque<Vec<u8>>),
}

/// What a descriptor is polled for.
#[derive(Clone, Copy, Debug)]
enum Source {
    Front,
    Heard(usize),
    Told(usize),
    ContextOutput(usize, bool),
    ContextEnd,
    Input(u16),
    Output(u16, bool),
    ProgramEnd,
    Leftover(usize),
}

impl<T: Transport> Live<T> {
    /// Over a warm runner that has its identity and environment.
    pub(crate) fn new(birth: Birth<T>) -> Live<T> {
        let home = birth.place.home().to_string_lossy().into_owned();
        let warm = Context::warm(DEFAULT_CONTEXT, home, birth.runner, birth.from_runner);
        Live {
            transport: birth.transport,
            place: birth.place,
            processes: birth.processes,
            watchdog: Watchdog::new(birth.born.limits.memory),
            born: birth.born,
            from_front: birth.from_front,
            out: Vec::new(),
            contexts: vec![warm],
            channels: BTreeMap::new(),
            pending: BTreeMap::new(),
            pending_bytes: 0,
            leftovers: VecDeque::new(),
            buffer: vec![0; MAX_PAYLOAD].into_boxed_slice(),
        }
    }

    /// Lives until the front is gone. No process of the sandbox is left when this returns.
    pub(crate) fn serve(mut self) -> Result<(), Stop> {
        let stop = match self.life() {
            Err(stop) => stop,
            Ok(never) => match never {},
        };
        self.processes.kill_all(|_, _| ());
        if let Stop::Failed(reason) = &stop {
            let text: String = reason.chars().take(MAX_PAYLOAD / 4).collect();
            encode_on(&mut self.out, 0, Kind::Failure, text.as_bytes());
            crate::supervise::flush(&mut self.out, &mut self.transport)?;
        }
        Err(stop)
    }

    fn life(&mut self) -> Result<std::convert::Infallible, Stop> {
        self.place.go_first()?;
        encode_on(&mut self.out, 0, Kind::Started, &[]);
        loop {
            self.take_frames()?;
            let more = self.advance()?;
            self.send()?;
            if self.transport.has_input() {
                self.receive()?;
                continue;
            }
            let now = Instant::now();
            let until = if more { Some(now) } else { self.due() };
            let seen = self.wait(until.map(|until| until.saturating_duration_since(now)))?;
            for (source, flags) in seen {
                self.handle(source, flags)?;
            }
            self.reap();
            self.tick(Instant::now());
        }
    }

    // ---- the front

    fn receive(&mut self) -> Result<(), Stop> {
        match self.transport.receive(&mut self.from_front)? {
            Received::Bytes | Received::Nothing => Ok(()),
            Received::Closed => Err(Stop::FrontGone),
        }
    }

    fn send(&mut self) -> Result<(), Stop> {
        while !self.out.is_empty() {
            let taken = self.transport.send(&self.out)?;
            self.out.drain(..taken);
            // A mailbox takes something each time.
            if taken == 0 {
                break;
            }
        }
        Ok(())
    }

    fn take_frames(&mut self) -> Result<(), Stop> {
        loop {
            let frame = self.from_front.next_on_any().map_err(|error| Stop::Failed(error.to_string()))?;
            let Some(frame) = frame else { return Ok(()) };
            let (channel, kind, payload) = (frame.channel, frame.kind, frame.payload.to_vec());
            self.take_frame(channel, kind, payload)?;
        }
    }

    fn take_frame(&mut self, id: u16, kind: Kind, payload: Vec<u8>) -> Result<(), Stop> {
        let malformed = |error: PayloadError| Stop::Failed(format!("{kind:?}: {error}"));
        if id == 0 {
            match kind {
                // Behind all that was said before.
                Kind::Freeze => encode_on(&mut self.out, 0, Kind::Frozen, &[]),
                Kind::Identity => {
                    let identity = Identity::decode(&payload).map_err(malformed)?;
                    self.become_other(identity)?;
                }
                _ => return Err(Stop::Failed(format!("{kind:?} came to a sandbox that lives"))),
            }
            return Ok(());
        }
        match kind {
            Kind::Arg | Kind::Env | Kind::Code => {
                self.pending_bytes += payload.len() + size_of::<Vec<u8>>();
                if self.pending_bytes > MAX_PENDING || self.pending.len() > MAX_OPEN {
                    return Err(Stop::Failed("more came ahead of an Open than is held".into()));
                }
                let pending = self.pending.entry(id).or_default();
                match kind {
                    Kind::Arg => pending.args.push(payload),
                    Kind::Env => pending.env.push(payload),
                    _ => pending.code.extend_from_slice(&payload),
                }
                return Ok(());
            }
            Kind::Open => return self.open(id, decode(&payload).map_err(malformed)?),
            _ => {}
        }
        // It may be on its way from before the channel's end.
        let Some(channel) = self.channels.get_mut(&id) else { return Ok(()) };
        self.watchdog.stir();
        match kind {
            Kind::Credit => {
                let more = usize::try_from(decode_credit(&payload).map_err(malformed)?).unwrap_or(usize::MAX);
                channel.credit = channel.credit.saturating_add(more);
            }
            Kind::Stdin => self.stdin(id, &payload),
            Kind::StdinEnd => self.stdin_end(id),
            Kind::Signal => {
                let number = payload.first().copied().unwrap_or_default();
                let context = match &channel.work {
                    Work::Cell { context, .. } => Some(context.clone()),
                    Work::Program(program) => {
                        if let Some(signal) = Signal::from_named_raw(i32::from(number)) {
                            program.signal(signal);
                        }
                        None
                    }
                    _ => None,
                };
                let context = context.and_then(|name| self.contexts.iter().find(|c| c.name == name));
                if let Some(context) = context.filter(|c| c.channel() == Some(id)) {
                    context.interrupt();
                }
            }
            Kind::Resize => {
                let size: Size = decode(&payload).map_err(malformed)?;
                if let Work::Program(program) = &channel.work {
                    program.resize(size);
                }
            }
            Kind::Close => self.close(id),
            _ => return Err(Stop::Failed(format!("{kind:?} came on a channel"))),
        }
        Ok(())
    }

    /// This is a fork of a checkpoint. No program has run in it yet: the agent goes first.
    fn become_other(&mut self, identity: Identity) -> Result<(), Stop> {
        self.place.apply_identity(&identity).map_err(Stop::failed)?;
        self.born.identity = identity;
        for at in 0..self.contexts.len() {
            let identity = self.identity_of_its_own().map_err(Stop::from)?;
            if let Some(context) = self.contexts.get_mut(at) {
                context.renew(&identity);
            }
        }
        Ok(())
    }

    /// That of this sandbox, with other random bytes.
    fn identity_of_its_own(&self) -> std::io::Result<Identity> {
        let mut identity = self.born.identity.clone();
        rustix::rand::getrandom(&mut identity.entropy, rustix::rand::GetRandomFlags::empty())?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        identity.realtime_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        Ok(identity)
    }

    fn open(&mut self, id: u16, open: Open) -> Result<(), Stop> {
        let pending = self.pending.remove(&id).unwrap_or_default();
        let bytes = |all: &[Vec<u8>]| all.iter().map(|one| one.len() + size_of::<Vec<u8>>()).sum::<usize>();
        let held = bytes(&pending.args) + bytes(&pending.env) + pending.code.len();
        self.pending_bytes = if self.pending.is_empty() { 0 } else { self.pending_bytes.saturating_sub(held) };
        if self.channels.contains_key(&id) {
            return Err(Stop::Failed(format!("channel {id} is open")));
        }
        self.watchdog.stir();
        if self.channels.len() >= MAX_OPEN {
            self.refuse(id, (Refusal::NoRoom, format!("the sandbox has {MAX_OPEN} things to do at once")));
            return Ok(());
        }
        let opened = match open {
            Open::Cell { context, timeout_ns } => self.open_cell(id, context, pending.code, timeout_ns),
            Open::Command { cwd, terminal, stdin, timeout_ns } => {
                let deadline = deadline(timeout_ns);
                self.open_program(id, pending, cwd, terminal, stdin).map(|work| Some((work, deadline)))
            }
            Open::Context(op) => self.context_op(op).map(|work| Some((work, None))),
            Open::File(op) => self.file_op(op).map(|work| Some((work, None))),
        };
        match opened {
            Ok(Some((work, deadline))) => {
                let channel = Channel { credit: WINDOW as usize, begun: Instant::now(), deadline, work };
                self.channels.insert(id, channel);
            }
            // The cell is in its place already.
            Ok(None) => {}
            Err(refused) => self.refuse(id, refused),
        }
        Ok(())
    }

    /// A channel that never was.
    fn refuse(&mut self, id: u16, (refusal, text): Refused) {
        let end = End { how: How::Refused(refusal, text), wall_ns: 0, context_lost: false };
        encode_on(&mut self.out, id, Kind::End, &encode(&end));
    }

    fn end(&mut self, id: u16, how: How, context_lost: bool) {
        let Some(channel) = self.channels.remove(&id) else { return };
        let wall_ns = u64::try_from(channel.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        encode_on(&mut self.out, id, Kind::End, &encode(&End { how, wall_ns, context_lost }));
        if let Work::Program(program) = channel.work {
            self.leftovers.extend(program.leftovers());
            while self.leftovers.len() > MAX_LEFTOVERS {
                self.leftovers.pop_front();
            }
        }
    }

    fn stdin(&mut self, id: u16, bytes: &[u8]) {
        let Some(channel) = self.channels.get_mut(&id) else { return };
        let taken = match &mut channel.work {
            Work::Program(program) => {
                program.input.extend(bytes);
                program.feed()
            }
            Work::Write(writing) => match writing.append(bytes) {
                Ok(()) => bytes.len(),
                Err((refusal, text)) => return self.end(id, How::Refused(refusal, text), false),
            },
            _ => bytes.len(),
        };
        grant(&mut self.out, id, taken);
    }

    fn stdin_end(&mut self, id: u16) {
        let Some(channel) = self.channels.get_mut(&id) else { return };
        match &mut channel.work {
            Work::Program(program) => {
                program.input_ended = true;
                let taken = program.feed();
                grant(&mut self.out, id, taken);
            }
            Work::Write(_) => {
                let done = Disk::new(&self.place).and_then(|disk| {
                    // Only a whole file gets its name, so it is taken out of the channel.
                    match std::mem::replace(&mut channel.work, Work::Answer(VecDeque::new())) {
                        Work::Write(writing) => writing.finish(&disk),
                        _ => Err((Refusal::Failed, "it is no longer written".into())),
                    }
                });
                match done {
                    Ok(entry) => channel.work = answer(vec![encode(&Reply::Entry(entry))]),
                    Err((refusal, text)) => self.end(id, How::Refused(refusal, text), false),
                }
            }
            _ => {}
        }
    }

    /// The channel has no reader any more.
    fn close(&mut self, id: u16) {
        let Some(channel) = self.channels.get_mut(&id) else { return };
        match &mut channel.work {
            Work::Cell { context, .. } => {
                let name = context.clone();
                let context = self.contexts.iter_mut().find(|c| c.name == name);
                match context {
                    Some(context) if context.channel() == Some(id) => context.stop(How::Closed),
                    other => {
                        if let Some(context) = other {
                            context.queue.retain(|waiting| *waiting != id);
                        }
                        self.end(id, How::Closed, false);
                    }
                }
            }
            // What it has written is still told.
            Work::Program(program) => program.kill(How::Closed),
            _ => self.end(id, How::Closed, false),
        }
    }

    // ---- contexts

    /// The cell goes to its context, which may have to be made.
    fn open_cell(
        &mut self,
        id: u16,
        name: String,
        code: Vec<u8>,
        timeout_ns: u64,
    ) -> Result<Option<(Work, Option<Instant>)>, Refused> {
        if !self.contexts.iter().any(|context| context.name == name) {
            if name != DEFAULT_CONTEXT {
                return Err((Refusal::NotFound, format!("no context is called {name:?}")));
            }
            self.new_context(&name, None)?;
        }
        let channel = Channel {
            credit: WINDOW as usize,
            begun: Instant::now(),
            deadline: None,
            work: Work::Cell { context: name.clone(), code, timeout_ns },
        };
        self.channels.insert(id, channel);
        if let Some(context) = self.contexts.iter_mut().find(|context| context.name == name) {
            context.queue.push_back(id);
        }
        Ok(None)
    }

    fn new_context(&mut self, name: &str, cwd: Option<String>) -> Result<(), Refused> {
        let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(good) {
            let text = format!("a context's name has 1 to {MAX_NAME} letters, digits, '-', '_' or '.'");
            return Err((Refusal::BadName, text));
        }
        if self.contexts.len() >= MAX_CONTEXTS {
            return Err((Refusal::NoRoom, format!("the sandbox has {MAX_CONTEXTS} contexts, the most it may have")));
        }
        let cwd = cwd.map_or_else(|| self.place.home(), |cwd| self.place.home().join(cwd));
        if !cwd.is_dir() {
            return Err((Refusal::NotFound, format!("the working directory {} is not there", cwd.display())));
        }
        let failed = |what: &str, error: std::io::Error| (Refusal::CannotStart, format!("cannot {what}: {error}"));
        let command = self.place.context().map_err(|error| failed("find the interpreter", error))?;
        let env = self.environ(&[]).map_err(|error| failed("read the environment", error))?;
        let setup = || Setup { limits: self.born.ceilings.of_a_program(&self.born.limits), terminal: false };
        let place = &self.place;
        let spawn = Spawn {
            command,
            cwd: Some(cwd.clone()),
            user: place.user(),
            env: Some(env),
            prepare: &|command| {
                sys::lead_session(command, setup());
                place.prepare(command);
            },
        };
        let runner = Runner::spawn(&spawn).map_err(|error| failed("start the interpreter", error))?;
        let identity = self.identity_of_its_own().map_err(|error| failed("get random bytes", error))?;
        let cwd = cwd.to_string_lossy().into_owned();
        self.contexts.push(Context::cold(name, cwd, runner, &identity, &self.born.env));
        Ok(())
    }

    fn context_op(&mut self, op: ContextOp) -> Result<Work, Refused> {
        let find = |contexts: &[Context], name: &str| {
            let found = contexts.iter().position(|context| context.name == name && context.condemned.is_none());
            found.ok_or_else(|| (Refusal::NotFound, format!("no context is called {name:?}")))
        };
        match op {
            ContextOp::Create { name, cwd } => {
                if self.contexts.iter().any(|context| context.name == name) {
                    return Err((Refusal::Exists, format!("a context is called {name:?} already")));
                }
                self.new_context(&name, cwd)?;
            }
            ContextOp::List => {
                let all = self.contexts.iter().map(Context::info).collect();
                return Ok(answer(vec![encode(&Reply::Contexts(all))]));
            }
            ContextOp::Interrupt { name } => {
                let at = find(&self.contexts, &name)?;
                if let Some(context) = self.contexts.get(at).filter(|context| context.channel().is_some()) {
                    context.interrupt();
                }
            }
            ContextOp::Restart { name } => {
                let at = find(&self.contexts, &name)?;
                let cwd = self.contexts.get(at).map(|context| context.cwd.clone());
                self.retire(at);
                self.new_context(&name, cwd)?;
            }
            ContextOp::Delete { name } => {
                let at = find(&self.contexts, &name)?;
                self.retire(at);
            }
        }
        Ok(answer(Vec::new()))
    }

    /// The interpreter goes, and its name is free at once.
    fn retire(&mut self, at: usize) {
        let context = self.contexts.remove(at);
        context.kill();
        if let Some(id) = context.channel() {
            self.end(id, How::Closed, true);
        }
        for id in &context.queue {
            self.end(*id, How::Closed, false);
        }
    }

    // ---- programs

    fn environ(&self, own: &[Vec<u8>]) -> std::io::Result<Vec<(OsString, OsString)>> {
        let mut env: BTreeMap<OsString, OsString> = self.place.environ()?.into_iter().collect();
        for variable in self.born.env.iter().chain(own) {
            let mut parts = variable.splitn(2, |&b| b == 0).map(|part| OsString::from_vec(part.to_vec()));
            env.insert(parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        }
        Ok(env.into_iter().collect())
    }

    fn open_program(
        &mut self,
        id: u16,
        pending: Pending,
        cwd: Option<String>,
        terminal: Option<Size>,
        stdin: bool,
    ) -> Result<Work, Refused> {
        let mut env = self.environ(&pending.env).map_err(|error| (Refusal::Failed, error.to_string()))?;
        if terminal.is_some() && !env.iter().any(|(name, _)| name == "TERM") {
            env.push(("TERM".into(), "xterm-256color".into()));
        }
        let setup = Setup { limits: self.born.ceilings.of_a_program(&self.born.limits), terminal: terminal.is_some() };
        let start = Start { words: pending.args, cwd, env, terminal, stdin, setup, place: &self.place };
        let program = Program::start(start)?;
        let pid = program.pid.as_raw_nonzero().get();
        encode_on(&mut self.out, id, Kind::Started, &pid.to_le_bytes());
        Ok(Work::Program(Box::new(program)))
    }

    // ---- files

    fn file_op(&mut self, op: FileOp) -> Result<Work, Refused> {
        let disk = Disk::new(&self.place)?;
        let one = |entry: Entry| answer(vec![encode(&Reply::Entry(entry))]);
        Ok(match op {
            FileOp::Read { path, offset, length } => {
                let (entry, file) = disk.read(&path, offset)?;
                Work::Read { ahead: Some(encode(&Reply::Entry(entry))), file, left: length }
            }
            FileOp::Write { path, mode } => Work::Write(disk.write(&path, mode)?),
            FileOp::Stat { path } => one(disk.stat(&path)?),
            FileOp::List { path, depth } => {
                let size = |entry: &Entry| entry.path.len() + entry.target.as_ref().map_or(0, String::len) + 40;
                answer(replies(disk.list(&path, depth)?, Reply::Entries, size))
            }
            FileOp::MakeDir { path } => one(disk.make_directory(&path)?),
            FileOp::Move { from, to } => one(disk.rename(&from, &to)?),
            FileOp::Remove { path, recursive } => {
                disk.remove(&path, recursive)?;
                answer(Vec::new())
            }
            FileOp::Chmod { path, mode } => one(disk.chmod(&path, mode)?),
            FileOp::Watch { path, recursive } => {
                let seen = disk.snapshot(&path, recursive)?;
                let replies = VecDeque::from([encode(&Reply::Changes(Vec::new()))]);
                Work::Watch { path, recursive, seen, next: Instant::now() + WATCH, replies }
            }
        })
    }

    // ---- what can go on without waiting

    /// Takes everything a step further. `true`: there is more to do at once.
    fn advance(&mut self) -> Result<bool, Stop> {
        let mut more = false;
        for at in 0..self.contexts.len() {
            self.advance_context(at);
        }
        self.contexts.retain(|context| context.status.is_none() || context.channel().is_some());
        let ids: Vec<u16> = self.channels.keys().copied().collect();
        for id in ids {
            if self.out.len() >= OUT_FULL {
                // The front takes it first.
                return Ok(self.transport.poll_fd().is_none());
            }
            more |= self.advance_channel(id);
        }
        Ok(more)
    }

    fn advance_context(&mut self, at: usize) {
        // What it said before its channel had credit for it.
        self.hear(at);
        loop {
            let Some(context) = self.contexts.get_mut(at) else { return };
            if let Some(status) = context.status {
                // What it had written is in the pipes.
                let own = || match command::how(status) {
                    How::Signaled(_) if context.condemned == Some(How::OutOfMemory) => How::OutOfMemory,
                    how => how,
                };
                let why = context.condemned.clone().unwrap_or_else(own);
                context.drain(why);
            }
            match &context.phase {
                Phase::Draining(id, how, [0, 0]) => {
                    let (id, how, lost) = (*id, how.clone(), context.status.is_some());
                    context.phase = Phase::Idle;
                    self.end(id, how, lost);
                }
                Phase::Draining(..) | Phase::Busy(_) => return self.flush_context(at),
                Phase::Idle | Phase::Starting(_) if context.status.is_some() || context.condemned.is_some() => {
                    let why = context.condemned.clone();
                    let why = why.unwrap_or_else(|| {
                        How::Refused(Refusal::CannotStart, "the interpreter of its context has ended".into())
                    });
                    for id in std::mem::take(&mut context.queue) {
                        self.end(id, why.clone(), true);
                    }
                    return;
                }
                Phase::Starting(_) => return self.flush_context(at),
                Phase::Idle => {
                    let Some(id) = context.queue.pop_front() else { return };
                    let Some(channel) = self.channels.get_mut(&id) else { continue };
                    let Work::Cell { code, timeout_ns, .. } = &mut channel.work else { continue };
                    context.begin(id, &std::mem::take(code));
                    channel.begun = Instant::now();
                    channel.deadline = deadline(*timeout_ns);
                    encode_on(&mut self.out, id, Kind::Started, &[]);
                    self.watchdog.stir();
                }
            }
        }
    }

    fn flush_context(&mut self, at: usize) {
        if let Some(context) = self.contexts.get_mut(at) {
            context.flush();
        }
    }

    /// `true`: it has more to do at once.
    fn advance_channel(&mut self, id: u16) -> bool {
        let Some(channel) = self.channels.get_mut(&id) else { return false };
        let out = &mut self.out;
        match &mut channel.work {
            Work::Cell { .. } => false,
            Work::Program(program) => {
                if let Some(how) = program.how() {
                    self.end(id, how, false);
                }
                false
            }
            Work::Write(_) => false,
            Work::Answer(frames) => {
                send_replies(out, id, &mut channel.credit, frames);
                if frames.is_empty() {
                    self.end(id, How::Done, false);
                }
                false
            }
            Work::Watch { replies, .. } => {
                send_replies(out, id, &mut channel.credit, replies);
                false
            }
            Work::Read { ahead, file, left } => {
                if let Some(reply) = ahead.take() {
                    encode_on(out, id, Kind::Reply, &reply);
                    channel.credit = channel.credit.saturating_sub(reply.len());
                }
                let most = usize::try_from(*left).unwrap_or(usize::MAX).min(channel.credit).min(self.buffer.len());
                if most == 0 {
                    if *left == 0 {
                        self.end(id, How::Done, false);
                    }
                    return false;
                }
                match disk::read(file, self.buffer.get_mut(..most).unwrap_or_default()) {
                    Ok(0) => self.end(id, How::Done, false),
                    Ok(n) => {
                        encode_on(out, id, Kind::Stdout, self.buffer.get(..n).unwrap_or_default());
                        channel.credit -= n;
                        *left -= n as u64;
                    }
                    Err(error) => self.end(id, How::Refused(Refusal::Failed, error.to_string()), false),
                }
                true
            }
        }
    }

    // ---- waiting

    /// When time has something to say.
    fn due(&self) -> Option<Instant> {
        let channels = self.channels.values().filter_map(|channel| match &channel.work {
            Work::Watch { next, replies, .. } if replies.is_empty() => Some(*next),
            _ => channel.deadline,
        });
        let contexts = self.contexts.iter().filter_map(Context::due);
        channels.chain(contexts).chain(self.watchdog.due()).min()
    }

    fn tick(&mut self, now: Instant) {
        for context in &mut self.contexts {
            context.tick(now);
        }
        let due = |channel: &Channel| channel.deadline.is_some_and(|deadline| now >= deadline);
        let passed: Vec<u16> = self.channels.iter().filter(|(_, channel)| due(channel)).map(|(id, _)| *id).collect();
        for id in passed {
            let Some(channel) = self.channels.get_mut(&id) else { continue };
            channel.deadline = None;
            match &mut channel.work {
                Work::Program(program) => program.kill(How::DeadlinePassed),
                Work::Cell { context, .. } => {
                    let name = context.clone();
                    if let Some(context) = self.contexts.iter_mut().find(|c| c.name == name && c.channel() == Some(id))
                    {
                        context.stop(How::DeadlinePassed);
                    }
                }
                _ => {}
            }
        }
        let running = |channel: &Channel| matches!(channel.work, Work::Cell { .. } | Work::Program(_));
        let waiting = (!self.channels.values().any(running)).then_some(self.contexts.len());
        self.watchdog.look(now, &mut self.processes, waiting);
        self.compare(now);
    }

    /// Compares watched directories with what was seen before.
    fn compare(&mut self, now: Instant) {
        let mut gone = Vec::new();
        for (id, channel) in &mut self.channels {
            let Work::Watch { path, recursive, seen, next, replies: waiting } = &mut channel.work else { continue };
            if now < *next || !waiting.is_empty() {
                continue;
            }
            match Disk::new(&self.place).and_then(|disk| disk.snapshot(path, *recursive)) {
                Ok(snapshot) => {
                    let found = disk::changes(seen, &snapshot);
                    *seen = snapshot;
                    if !found.is_empty() {
                        waiting.extend(replies(found, Reply::Changes, |change| change.path.len() + 8));
                    }
                }
                Err((Refusal::NoRoom, _)) => {
                    let lost = Change { path: path.clone(), kind: ChangeKind::Overflow };
                    waiting.push_back(encode(&Reply::Changes(vec![lost])));
                }
                Err((refusal, text)) => gone.push((*id, How::Refused(refusal, text))),
            }
            *next = Instant::now() + WATCH.max(now.elapsed() * WATCH_SHARE);
        }
        for (id, how) in gone {
            self.end(id, how, false);
        }
    }

    /// Everything that can be waited for, and how.
    fn sources(&self) -> Vec<(Source, BorrowedFd<'_>, PollFlags)> {
        let mut all = Vec::with_capacity(8 + 4 * self.channels.len());
        let room = self.out.len() < OUT_FULL;
        if let Some(fd) = self.transport.poll_fd() {
            let mut flags = PollFlags::IN;
            flags.set(PollFlags::OUT, !self.out.is_empty());
            all.push((Source::Front, fd, flags));
        } else if let Some(fd) = self.transport.wake_fd() {
            all.push((Source::Front, fd, PollFlags::IN));
        }
        for (at, context) in self.contexts.iter().enumerate() {
            let credit = context.channel().and_then(|id| self.channels.get(&id)).map(|channel| channel.credit);
            if room && context.is_heard(credit) {
                all.push((Source::Heard(at), context.runner.control_out.as_fd(), PollFlags::IN));
            }
            if !context.control_out.is_empty() {
                all.push((Source::Told(at), context.runner.control_in.as_fd(), PollFlags::OUT));
            }
            if let Some(fd) = context.runner.ended.as_ref().filter(|_| context.status.is_none()) {
                all.push((Source::ContextEnd, fd.as_fd(), PollFlags::IN));
            }
            if !room || credit.is_none_or(|credit| credit == 0) {
                continue;
            }
            for (stdout, end) in [(true, &context.runner.stdout), (false, &context.runner.stderr)] {
                if let Some(fd) = end {
                    all.push((Source::ContextOutput(at, stdout), fd.as_fd(), PollFlags::IN));
                }
            }
        }
        for (id, channel) in &self.channels {
            let Work::Program(program) = &channel.work else { continue };
            if program.status.is_none() {
                all.push((Source::ProgramEnd, program.ended.as_fd(), PollFlags::IN));
            }
            if let Some(fd) = program.stdin.as_ref().filter(|_| program.wants_to_write()) {
                all.push((Source::Input(*id), fd.as_fd(), PollFlags::OUT));
            }
            if !room || channel.credit == 0 {
                continue;
            }
            for (stdout, end) in [(true, &program.stdout), (false, &program.stderr)] {
                if let Some(fd) = end {
                    all.push((Source::Output(*id, stdout), fd.as_fd(), PollFlags::IN));
                }
            }
        }
        for (at, fd) in self.leftovers.iter().enumerate() {
            all.push((Source::Leftover(at), fd.as_fd(), PollFlags::IN));
        }
        all
    }

    fn wait(&self, timeout: Option<Duration>) -> Result<Vec<(Source, PollFlags)>, Stop> {
        let sources = self.sources();
        let mut fds: Vec<PollFd<'_>> =
            sources.iter().map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
        let timespec = timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
        match rustix::event::poll(&mut fds, timespec.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(std::io::Error::from(error).into()),
        }
        let seen = sources.iter().zip(&fds).map(|((source, ..), fd)| (*source, fd.revents()));
        Ok(seen.filter(|(_, flags)| !flags.is_empty()).collect())
    }

    fn handle(&mut self, source: Source, flags: PollFlags) -> Result<(), Stop> {
        let input = flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
        match source {
            Source::Front => {
                if self.transport.poll_fd().is_some() && flags.intersects(PollFlags::HUP | PollFlags::ERR) {
                    return Err(Stop::FrontGone);
                }
                if flags.contains(PollFlags::IN) {
                    self.receive()?;
                }
            }
            Source::Heard(at) => {
                if let Some(context) = self.contexts.get_mut(at).filter(|_| input) {
                    context.read_control(&mut self.buffer);
                }
                self.hear(at);
            }
            Source::Told(at) => {
                if let Some(context) = self.contexts.get_mut(at) {
                    context.flush();
                }
            }
            Source::ContextOutput(at, stdout) => {
                let Some(context) = self.contexts.get_mut(at) else { return Ok(()) };
                let Some(id) = context.channel() else { return Ok(()) };
                let Some(channel) = self.channels.get_mut(&id) else { return Ok(()) };
                let most = channel.credit.min(self.buffer.len());
                let read = context.read(stdout, self.buffer.get_mut(..most).unwrap_or_default());
                tell(&mut self.out, id, channel, stdout, self.buffer.get(..read.unwrap_or(0)).unwrap_or_default());
            }
            Source::Output(id, stdout) => {
                let Some(channel) = self.channels.get_mut(&id) else { return Ok(()) };
                let most = channel.credit.min(self.buffer.len());
                let Work::Program(program) = &mut channel.work else { return Ok(()) };
                let read = program.read(stdout, self.buffer.get_mut(..most).unwrap_or_default());
                tell(&mut self.out, id, channel, stdout, self.buffer.get(..read.unwrap_or(0)).unwrap_or_default());
            }
            Source::Input(id) => {
                let Some(channel) = self.channels.get_mut(&id) else { return Ok(()) };
                if let Work::Program(program) = &mut channel.work {
                    let taken = program.feed();
                    grant(&mut self.out, id, taken);
                }
            }
            Source::Leftover(at) => {
                let read = self.leftovers.get(at).map(|fd| rustix::io::read(fd, &mut self.buffer[..]));
                if !matches!(read, Some(Ok(1..) | Err(Errno::AGAIN | Errno::INTR))) {
                    self.leftovers.remove(at);
                }
            }
            // Both are seen by reaping.
            Source::ContextEnd | Source::ProgramEnd => {}
        }
        Ok(())
    }

    /// Passes on what a runner has said, as far as its channel has credit.
    fn hear(&mut self, at: usize) {
        while let Some(context) = self.contexts.get_mut(at) {
            let id = context.channel();
            let channel = id.and_then(|id| self.channels.get_mut(&id));
            if !context.is_heard(channel.as_ref().map(|channel| channel.credit)) || self.out.len() >= OUT_FULL {
                return;
            }
            let Some(said) = context.said() else { return };
            // What the cell wrote before it said this is in the pipes by now.
            if let (Said::Result(payload) | Said::Error(payload), Some(id)) = (&said, id) {
                self.catch_up(at, id, payload.len());
            }
            let Some(context) = self.contexts.get_mut(at) else { return };
            let channel = self.channels.get_mut(&id.unwrap_or_default());
            let (kind, payload) = match said {
                Said::Result(payload) => (Kind::Result, payload),
                Said::Error(payload) => (Kind::Error, payload),
                Said::Done(done) => {
                    let how = context.stopping.take().map_or(How::Cell(done), |stopping| stopping.why);
                    context.drain(how);
                    continue;
                }
                Said::Broken(text) => {
                    context.control_ended = true;
                    // One that was told to stop before it could take it as its cell's: it has stopped.
                    let broke = || How::Refused(Refusal::Failed, format!("the interpreter broke: {text}"));
                    let why = context.stopping.take().map_or_else(broke, |stopping| stopping.why);
                    context.condemn(why);
                    return;
                }
            };
            if let (Some(id), Some(channel)) = (id, channel) {
                encode_on(&mut self.out, id, kind, &payload);
                channel.credit = channel.credit.saturating_sub(payload.len());
            }
        }
    }

    /// Passes on the output of a cell that is there, so that it keeps its order with what its runner says: at most a
    /// read of each stream, and as far as there is credit beside what is said.
    fn catch_up(&mut self, at: usize, id: u16, said: usize) {
        for stdout in [true, false] {
            let (Some(context), Some(channel)) = (self.contexts.get_mut(at), self.channels.get_mut(&id)) else {
                return;
            };
            let end = if stdout { &context.runner.stdout } else { &context.runner.stderr };
            let there = end.as_ref().map_or(0, sys::waiting);
            let most = there.min(channel.credit.saturating_sub(said)).min(self.buffer.len());
            let read = context.read(stdout, self.buffer.get_mut(..most).unwrap_or_default());
            tell(&mut self.out, id, channel, stdout, self.buffer.get(..read.unwrap_or(0)).unwrap_or_default());
        }
    }

    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(rustix::process::WaitOptions::NOHANG) {
            let starved = self.watchdog.killed(pid);
            for channel in self.channels.values_mut() {
                if let Work::Program(program) = &mut channel.work
                    && program.pid == pid
                    && program.status.is_none()
                {
                    if starved {
                        program.killed.get_or_insert(How::OutOfMemory);
                    }
                    program.has_ended(status);
                }
            }
            for context in &mut self.contexts {
                if context.runner.pid == pid && context.status.is_none() {
                    if starved {
                        context.condemned.get_or_insert(How::OutOfMemory);
                    }
                    context.status = Some(status);
                }
            }
        }
    }
}

fn answer(frames: Vec<Vec<u8>>) -> Work {
    Work::Answer(frames.into())
}

/// Replies go as far as there is credit. Each is a frame at the most, which a window has room for once its caller has taken
/// what came before.
fn send_replies(out: &mut Vec<u8>, id: u16, credit: &mut usize, frames: &mut VecDeque<Vec<u8>>) {
    while out.len() < OUT_FULL && frames.front().is_some_and(|frame| frame.len() <= *credit) {
        let Some(frame) = frames.pop_front() else { return };
        encode_on(out, id, Kind::Reply, &frame);
        *credit -= frame.len();
    }
}

/// Output for the front.
fn tell(out: &mut Vec<u8>, id: u16, channel: &mut Channel, stdout: bool, bytes: &[u8]) {
    if !bytes.is_empty() {
        encode_on(out, id, if stdout { Kind::Stdout } else { Kind::Stderr }, bytes);
        channel.credit = channel.credit.saturating_sub(bytes.len());
    }
}

fn grant(out: &mut Vec<u8>, id: u16, bytes: usize) {
    if bytes > 0 {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        encode_on(out, id, Kind::Grant, &bytes.to_le_bytes());
    }
}

fn deadline(timeout_ns: u64) -> Option<Instant> {
    if timeout_ns == u64::MAX { None } else { Instant::now().checked_add(Duration::from_nanos(timeout_ns)) }
}
