//! What is going on in one sandbox: its channels and its runs. It is pure bookkeeping behind a lock that is never held
//! over a wait; [`super::drive`] moves the bytes.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::{Bytes, BytesMut};
use tokio::sync::{Notify, mpsc, oneshot};
use uuid::Uuid;
use zeroboot_proto::{
    ExitReport, Frame, Kind, encode_header,
    live::{self, End, How, MAX_CHANNEL, MAX_OPEN, Open, Reply, ResultChunk, Size, WINDOW},
};

use super::{
    EndReason, Hold,
    branch::Roots,
    handle::ChannelKey,
    log::{CellError, Item, Log, MimeBundle, Place},
    run::{RunEnd, RunError, RunHow, RunKind, RunSpec, RunStatus, place_from},
};

/// Output of one run that is kept for readers that come later, bytes.
const KEPT: usize = 1024 * 1024;
/// The same for all runs of a sandbox together.
const KEPT_ALL: usize = 16 * 1024 * 1024;
/// Most bytes of one result.
pub(crate) const MAX_RESULT: usize = 32 * 1024 * 1024;
/// Most bytes of all results that are not whole yet.
const MAX_ASSEMBLING: usize = 2 * MAX_RESULT;
/// Most MIME types of one result.
const MAX_PARTS: usize = 64;
/// Most bytes of an answer's replies, such as the list of a large directory.
const MAX_REPLIES: usize = 64 * 1024 * 1024;
/// Ended runs that a sandbox remembers.
const REMEMBERED: usize = 256;
/// Channels that are kept free for short operations: an interrupt must find one.
const SPARE: usize = 32;
/// Step in which held bytes are counted, so that the budget of all sandboxes is not asked for each line.
const STEP: usize = 64 * 1024;

/// What a channel sent was none of what it may send: the sandbox has ended.
#[derive(Debug)]
pub(crate) struct Broken(pub(crate) String);

fn broken<T>(reason: impl Into<String>) -> Result<T, Broken> {
    Err(Broken(reason.into()))
}

/// What an operation is told.
#[derive(Debug)]
pub(crate) enum OpEvent {
    Reply(Reply, usize),
    Data(Bytes),
    End(End),
}

/// What is on a channel.
#[derive(Debug)]
enum Use {
    Run(Uuid),
    /// `None`: given up, only its end is waited for.
    Op(Option<mpsc::UnboundedSender<OpEvent>>),
}

#[derive(Debug)]
struct Channel {
    serial: u64,
    what: Use,
    /// Bytes of input that the sandbox takes.
    may_send: u64,
    takes_input: bool,
    /// The sandbox takes more input, or the channel has ended.
    writable: Arc<Notify>,
    /// Bytes that count, as they came, and as they were granted.
    received: u64,
    granted: u64,
    /// Bytes that an operation's caller took.
    taken: u64,
    closed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stdin {
    None,
    Open,
    Closed,
}

/// A result that is not whole yet.
#[derive(Clone, Debug, Default)]
struct Assembly {
    parts: Vec<(String, BytesMut)>,
    main: bool,
    weight: usize,
    /// It became too large: so many bytes were thrown away.
    lost: u64,
}

#[derive(Debug)]
pub(crate) struct RunState {
    id: Uuid,
    kind: RunKind,
    asked_at: SystemTime,
    channel: Option<ChannelKey>,
    stdin: Stdin,
    pub(crate) started: bool,
    pub(crate) pid: Option<u32>,
    pub(crate) log: Log,
    assembly: Assembly,
    /// Bytes of results that came.
    shown: u64,
    pub(crate) readers: BTreeMap<u64, Place>,
    pub(crate) end: Option<RunEnd>,
    changed: Arc<Notify>,
}

impl RunState {
    pub(crate) fn status(&self) -> RunStatus {
        RunStatus {
            id: self.id,
            kind: self.kind.clone(),
            asked_at: self.asked_at,
            started: self.started,
            pid: self.pid,
            first_offset: self.log.start(),
            offset: self.log.end().offset,
            end: self.end.clone(),
        }
    }

    pub(crate) fn stdin_key(&self) -> Result<ChannelKey, RunError> {
        match (self.stdin, self.channel) {
            (Stdin::Open, Some(key)) => Ok(key),
            _ => Err(RunError::NoStdin),
        }
    }

    /// The position of the slowest reader; the end, if the run has no reader.
    fn read_up_to(&self) -> Place {
        self.readers.values().copied().min_by_key(|place| place.offset).unwrap_or_else(|| self.log.end())
    }

    /// Bytes that were passed on. Results that no reader has taken yet hold up the next ones.
    fn consumed(&self) -> u64 {
        let read = self.read_up_to();
        let unread = self.log.end().shown.saturating_sub(read.shown);
        let shown = if unread < KEPT as u64 { self.shown } else { self.log.end().shown.min(read.shown) };
        read.stream + shown
    }

    fn weight(&self) -> usize {
        self.log.weight() + self.assembly.weight
    }

    /// Lets go of the oldest item, if no reader waits for it.
    fn shed(&mut self) -> bool {
        let read = self.read_up_to().offset;
        self.log.start_of_second().is_some_and(|second| second <= read) && self.log.pop()
    }
}

#[derive(Debug)]
struct Freeze {
    /// All that it was told before, and `Freeze`.
    sending: BytesMut,
    answer: oneshot::Sender<Result<State, String>>,
}

/// See the module's words.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) ended: Option<EndReason>,
    pub(crate) end_wanted: Option<EndReason>,
    pub(crate) expires: Instant,
    pub(crate) expires_at: SystemTime,
    idle_timeout: Option<Duration>,
    idle_since: Instant,
    /// The agent said that it lives.
    alive: bool,
    /// Frames on their way to the sandbox.
    pub(crate) outgoing: BytesMut,
    /// It is told to freeze: nothing of `outgoing` goes before its answer.
    freeze: Option<Freeze>,
    /// What it is branched by.
    pub(crate) roots: Option<Roots>,
    /// Its worker needs room for a checkpoint.
    pub(crate) saves: bool,
    /// The last checkpoint on its way here.
    pub(crate) point: Option<Uuid>,
    channels: BTreeMap<u16, Channel>,
    next_channel: u16,
    next_serial: u64,
    runs: BTreeMap<Uuid, RunState>,
    readers: usize,
    next_reader: u64,
    hold: Option<Arc<dyn Hold>>,
    counted: usize,
    /// Runs that were begun.
    begun: u64,
}

impl State {
    pub(crate) fn new(lease: Duration, idle_timeout: Option<Duration>, hold: Option<Arc<dyn Hold>>) -> State {
        let now = Instant::now();
        State {
            ended: None,
            end_wanted: None,
            expires: now + lease,
            expires_at: SystemTime::now() + lease,
            idle_timeout,
            idle_since: now,
            alive: false,
            outgoing: BytesMut::new(),
            freeze: None,
            roots: None,
            saves: false,
            point: None,
            channels: BTreeMap::new(),
            next_channel: 1,
            next_serial: 0,
            runs: BTreeMap::new(),
            readers: 0,
            next_reader: 0,
            hold,
            counted: 0,
            begun: 0,
        }
    }

    // ---- its time ----

    /// When it ends if nothing else happens, and why.
    pub(crate) fn deadline(&self) -> (Instant, EndReason) {
        let idle = self.idle_timeout.filter(|_| self.channels.is_empty() && self.readers == 0);
        match idle.map(|timeout| self.idle_since + timeout) {
            Some(idle) if idle < self.expires => (idle, EndReason::Idle),
            _ => (self.expires, EndReason::LeaseEnded),
        }
    }

    fn touch(&mut self) {
        self.idle_since = Instant::now();
    }

    // ---- its branches ----

    /// Has it saved behind all that was said before. One at a time. The answer is the bookkeeping of that moment.
    pub(crate) fn freeze(&mut self) -> Result<oneshot::Receiver<Result<State, String>>, EndReason> {
        if let Some(reason) = self.ended.or(self.end_wanted) {
            return Err(reason);
        }
        let (answer, frozen) = oneshot::channel();
        let mut sending = std::mem::take(&mut self.outgoing);
        sending.extend_from_slice(&encode_header(0, Kind::Freeze, 0));
        self.freeze = Some(Freeze { sending, answer });
        self.saves = true;
        Ok(frozen)
    }

    /// The bytes that may go now.
    pub(crate) fn sending(&mut self) -> &mut BytesMut {
        self.freeze.as_mut().map_or(&mut self.outgoing, |freeze| &mut freeze.sending)
    }

    /// Its worker has saved it, or says why not.
    fn frozen(&mut self, reason: &[u8]) -> Result<(), Broken> {
        match self.freeze.take() {
            Some(Freeze { sending, answer }) if sending.is_empty() => {
                let frozen = match reason {
                    [] => Ok(self.branched()),
                    reason => Err(clean(&String::from_utf8_lossy(reason))),
                };
                // Who asked may have given up.
                drop(answer.send(frozen));
                Ok(())
            }
            _ => broken("it came to rest before it was told to"),
        }
    }

    /// The same of a branch: what runs runs there, too, what it wrote so far is its past, and what it was not told yet it is
    /// told. Nobody reads it, and nobody waits there for an operation.
    pub(crate) fn branched(&self) -> State {
        let mut branch = State::new(Duration::ZERO, self.idle_timeout, None);
        (branch.alive, branch.point) = (self.alive, self.point);
        branch.outgoing = self.outgoing.clone();
        (branch.next_channel, branch.next_serial, branch.begun) = (self.next_channel, self.next_serial, self.begun);
        branch.runs = self.runs.iter().map(|(id, run)| (*id, run.branched())).collect();
        branch.channels = self.channels.iter().map(|(number, channel)| (*number, channel.branched())).collect();
        let keys = |(number, channel): (&u16, &Channel)| match channel.what {
            Use::Op(_) => Some(ChannelKey { number: *number, serial: channel.serial }),
            Use::Run(_) => None,
        };
        for key in branch.channels.iter().filter_map(keys).collect::<Vec<_>>() {
            branch.close(key);
        }
        for id in branch.runs.keys().copied().collect::<Vec<_>>() {
            branch.grant(id);
        }
        branch
    }

    /// Lets a branch live. `identity`: the frame that it is told first.
    pub(crate) fn begin(&mut self, lease: Duration, hold: Option<Arc<dyn Hold>>, identity: &[u8]) {
        let now = Instant::now();
        (self.expires, self.expires_at, self.idle_since) = (now + lease, SystemTime::now() + lease, now);
        self.hold = hold;
        let after = std::mem::take(&mut self.outgoing);
        self.outgoing.extend_from_slice(identity);
        self.outgoing.unsplit(after);
        self.settle(None);
    }

    /// Counts what it keeps for a checkpoint; what there is no room for falls out.
    pub(crate) fn keep(&mut self, hold: Option<Arc<dyn Hold>>) {
        self.hold = hold;
        self.settle(None);
    }

    /// Counts nothing any more.
    pub(crate) fn let_go(&mut self) {
        if let Some(hold) = self.hold.take() {
            hold.shrink(self.counted as u64);
        }
    }

    // ---- what is asked of it ----

    /// The end as a run sees it that is not known any more.
    pub(crate) fn gone(&self) -> RunEnd {
        let how = self.ended.map_or(RunHow::Closed, RunHow::Gone);
        RunEnd { how, wall: Duration::ZERO, context_lost: true }
    }

    fn check_open(&self) -> Result<(), RunError> {
        match self.ended.or(self.end_wanted) {
            Some(reason) => Err(RunError::Gone(reason)),
            None => Ok(()),
        }
    }

    /// A free channel.
    fn open(&mut self, what: Use, takes_input: bool, most: usize) -> Result<(u16, &Channel), RunError> {
        self.check_open()?;
        if self.channels.len() >= most {
            return Err(RunError::TooMany(most));
        }
        while self.channels.contains_key(&self.next_channel) {
            self.next_channel = self.next_channel % MAX_CHANNEL + 1;
        }
        let number = self.next_channel;
        self.next_channel = number % MAX_CHANNEL + 1;
        self.next_serial += 1;
        let channel = Channel {
            serial: self.next_serial,
            what,
            may_send: WINDOW.into(),
            takes_input,
            writable: Arc::default(),
            received: 0,
            granted: 0,
            taken: 0,
            closed: false,
        };
        Ok((number, self.channels.entry(number).or_insert(channel)))
    }

    pub(crate) fn start(&mut self, spec: RunSpec) -> Result<(Uuid, Arc<Notify>), RunError> {
        let id = Uuid::now_v7();
        let takes_input = matches!(&spec, RunSpec::Command { stdin, terminal, .. } if *stdin || terminal.is_some());
        let (number, channel) = self.open(Use::Run(id), takes_input, MAX_OPEN - SPARE)?;
        let key = ChannelKey { number, serial: channel.serial };
        let nanos =
            |time: Option<Duration>| time.map_or(u64::MAX, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        let (open, kind) = match spec {
            RunSpec::Cell { context, code, timeout } => {
                self.send(number, Kind::Code, &code);
                (Open::Cell { context: context.clone(), timeout_ns: nanos(timeout) }, RunKind::Cell { context })
            }
            RunSpec::Command { argv, env, cwd, terminal, stdin, timeout, tag } => {
                for arg in &argv {
                    self.send(number, Kind::Arg, arg.as_bytes());
                }
                for (key, value) in &env {
                    self.send(number, Kind::Env, format!("{key}\0{value}").as_bytes());
                }
                let open = Open::Command { cwd, terminal, stdin, timeout_ns: nanos(timeout) };
                (open, RunKind::Command { argv, tag, terminal: terminal.is_some() })
            }
        };
        self.send(number, Kind::Open, &live::encode(&open));
        let changed = Arc::new(Notify::new());
        let run = RunState {
            id,
            kind,
            asked_at: SystemTime::now(),
            channel: Some(key),
            stdin: if takes_input { Stdin::Open } else { Stdin::None },
            started: false,
            pid: None,
            log: Log::default(),
            assembly: Assembly::default(),
            shown: 0,
            readers: BTreeMap::new(),
            end: None,
            changed: changed.clone(),
        };
        self.runs.insert(id, run);
        self.begun += 1;
        Ok((id, changed))
    }

    /// Begins an operation on files or contexts. `long`: it is a stream.
    pub(crate) fn operate(
        &mut self,
        open: &Open,
        input: bool,
        long: bool,
    ) -> Result<(ChannelKey, mpsc::UnboundedReceiver<OpEvent>), RunError> {
        let (events, receiver) = mpsc::unbounded_channel();
        let most = if long { MAX_OPEN - SPARE } else { MAX_OPEN };
        let (number, channel) = self.open(Use::Op(Some(events)), input, most)?;
        let key = ChannelKey { number, serial: channel.serial };
        self.send(number, Kind::Open, &live::encode(open));
        Ok((key, receiver))
    }

    /// A frame on its way; a long payload is several.
    fn send(&mut self, channel: u16, kind: Kind, payload: &[u8]) {
        if payload.is_empty() {
            self.outgoing.extend_from_slice(&encode_header(channel, kind, 0));
        }
        for chunk in payload.chunks(zeroboot_proto::MAX_PAYLOAD) {
            self.outgoing.extend_from_slice(&encode_header(channel, kind, chunk.len()));
            self.outgoing.extend_from_slice(chunk);
        }
    }

    fn channel(&mut self, key: ChannelKey) -> Option<&mut Channel> {
        self.channels.get_mut(&key.number).filter(|channel| channel.serial == key.serial)
    }

    /// Sends as much of these bytes as the sandbox takes now; if that is nothing, what to wait for.
    pub(crate) fn input(&mut self, key: ChannelKey, bytes: &mut Bytes) -> Result<Option<Arc<Notify>>, RunError> {
        self.check_open()?;
        let Some(channel) = self.channel(key).filter(|channel| !channel.closed) else { return Err(RunError::Ended) };
        if !channel.takes_input {
            return Err(RunError::NoStdin);
        }
        let count = usize::try_from(channel.may_send).unwrap_or(usize::MAX).min(bytes.len());
        channel.may_send -= count as u64;
        if count == 0 && !bytes.is_empty() {
            return Ok(Some(channel.writable.clone()));
        }
        let part = bytes.split_to(count);
        if !part.is_empty() {
            self.send(key.number, Kind::Stdin, &part);
        }
        Ok(None)
    }

    /// The end of an operation's input.
    pub(crate) fn end_input(&mut self, key: ChannelKey) {
        if let Some(channel) = self.channel(key)
            && std::mem::take(&mut channel.takes_input)
        {
            self.send(key.number, Kind::StdinEnd, &[]);
        }
    }

    pub(crate) fn close_stdin(&mut self, id: Uuid, key: ChannelKey) {
        if let Some(run) = self.runs.get_mut(&id) {
            run.stdin = Stdin::Closed;
        }
        self.end_input(key);
    }

    pub(crate) fn signal(&mut self, id: Uuid, number: u8) -> Result<(), RunError> {
        let run = self.live_run(id)?;
        if matches!(run.kind, RunKind::Cell { .. }) {
            return Err(RunError::NotACommand);
        }
        if let Some(key) = run.channel {
            self.send(key.number, Kind::Signal, &[number]);
        }
        Ok(())
    }

    pub(crate) fn resize(&mut self, id: Uuid, size: Size) -> Result<(), RunError> {
        let run = self.live_run(id)?;
        if !matches!(run.kind, RunKind::Command { terminal: true, .. }) {
            return Err(RunError::NoTerminal);
        }
        if let Some(key) = run.channel {
            self.send(key.number, Kind::Resize, &live::encode(&size));
        }
        Ok(())
    }

    pub(crate) fn close_run(&mut self, id: Uuid) -> Result<(), RunError> {
        if let Some(key) = self.live_run(id)?.channel {
            self.close(key);
        }
        Ok(())
    }

    /// This channel has no reader any more.
    pub(crate) fn close(&mut self, key: ChannelKey) {
        let Some(channel) = self.channel(key) else { return };
        if let Use::Op(events) = &mut channel.what {
            *events = None;
        }
        if !std::mem::replace(&mut channel.closed, true) {
            channel.writable.notify_waiters();
            self.send(key.number, Kind::Close, &[]);
        }
    }

    /// An operation took bytes of its answer. Whether frames wait to be sent.
    pub(crate) fn took(&mut self, key: ChannelKey, count: usize) -> bool {
        let Some(channel) = self.channel(key) else { return false };
        channel.taken += count as u64;
        let taken = channel.taken;
        self.grant_up_to(key, taken)
    }

    pub(crate) fn run(&self, id: Uuid) -> Option<&RunState> {
        self.runs.get(&id)
    }

    /// A run that has not ended.
    pub(crate) fn live_run(&self, id: Uuid) -> Result<&RunState, RunError> {
        self.check_open()?;
        self.runs.get(&id).filter(|run| run.end.is_none()).ok_or(RunError::Ended)
    }

    pub(crate) fn changed(&self, id: Uuid) -> Option<Arc<Notify>> {
        Some(self.runs.get(&id)?.changed.clone())
    }

    pub(crate) fn statuses(&self) -> Vec<RunStatus> {
        self.runs.values().map(RunState::status).collect()
    }

    pub(crate) fn counts(&self) -> (usize, usize, u64) {
        let live = self.runs.values().filter(|run| run.end.is_none()).count();
        (live, self.channels.len(), self.begun)
    }

    /// Forgets a run that has ended and has no reader.
    pub(crate) fn forget(&mut self, id: Uuid) {
        if self.runs.get(&id).is_some_and(|run| run.end.is_some() && run.readers.is_empty()) {
            self.runs.remove(&id);
            self.settle(None);
        }
    }

    // ---- its readers ----

    pub(crate) fn attach(&mut self, id: Uuid, from: u64) -> u64 {
        self.next_reader += 1;
        if let Some(run) = self.runs.get_mut(&id) {
            run.readers.insert(self.next_reader, place_from(&run.log, from));
            self.readers += 1;
        }
        self.next_reader
    }

    /// Moves a reader on. Whether frames wait to be sent.
    pub(crate) fn advance(&mut self, id: Uuid, reader: u64, to: Place) -> bool {
        if let Some(place) = self.runs.get_mut(&id).and_then(|run| run.readers.get_mut(&reader)) {
            *place = to;
        }
        self.grant(id)
    }

    pub(crate) fn detach(&mut self, id: Uuid, reader: u64) {
        let Some(run) = self.runs.get_mut(&id) else { return };
        if run.readers.remove(&reader).is_none() {
            return;
        }
        self.readers -= 1;
        if self.ended.is_some() && run.readers.is_empty() {
            run.log.clear();
        }
        self.touch();
        self.grant(id);
        self.settle(Some(id));
    }

    /// Grants what was passed on. Whether a frame waits to be sent.
    fn grant(&mut self, id: Uuid) -> bool {
        let Some(run) = self.runs.get(&id) else { return false };
        let (Some(key), consumed) = (run.channel, run.consumed()) else { return false };
        self.grant_up_to(key, consumed)
    }

    fn grant_up_to(&mut self, key: ChannelKey, consumed: u64) -> bool {
        let Some(channel) = self.channel(key) else { return false };
        // What is granted may lag behind by a quarter of the window.
        let due = consumed.saturating_sub(channel.granted);
        if due < u64::from(WINDOW / 4) {
            return false;
        }
        channel.granted = consumed;
        let due = u32::try_from(due).unwrap_or(u32::MAX);
        self.send(key.number, Kind::Credit, &due.to_le_bytes());
        true
    }

    /// Holds no more than may be held: the oldest output that no reader waits for falls out.
    fn settle(&mut self, of: Option<Uuid>) {
        if let Some(run) = of.and_then(|id| self.runs.get_mut(&id)) {
            while run.log.weight() > KEPT && run.shed() {}
        }
        let mut weight: usize = self.runs.values().map(RunState::weight).sum();
        // The oldest run's first.
        for run in self.runs.values_mut() {
            while weight > KEPT_ALL {
                let before = run.weight();
                if !run.shed() {
                    break;
                }
                weight = weight - before + run.weight();
            }
        }
        let Some(hold) = self.hold.clone() else { return };
        let steps = |weight: usize| weight.div_ceil(STEP) * STEP;
        while steps(weight) > self.counted {
            if hold.grow((steps(weight) - self.counted) as u64) {
                self.counted = steps(weight);
                break;
            }
            // No room in the server: also what a reader still waits for falls out, and is said to be lost.
            let Some(run) = self.runs.values_mut().max_by_key(|run| run.log.weight()) else { break };
            let before = run.weight();
            if !run.log.pop() {
                run.assembly.throw_away();
                break;
            }
            weight = weight - before + run.weight();
        }
        if steps(weight) + STEP < self.counted {
            hold.shrink((self.counted - steps(weight)) as u64);
            self.counted = steps(weight);
        }
    }

    // ---- what it says ----

    /// Takes a frame. It is hostile.
    pub(crate) fn take(&mut self, frame: Frame<'_>) -> Result<(), Broken> {
        let Frame { channel: number, kind, payload } = frame;
        let misplaced = || broken(format!("it sent {kind:?} out of turn"));
        if number == 0 {
            return match kind {
                Kind::Started if !self.alive && payload.is_empty() => {
                    self.alive = true;
                    Ok(())
                }
                Kind::Frozen if self.alive => self.frozen(payload),
                // The agent's own words, or those of a guest that took it over.
                Kind::Failure => broken(format!("it failed: {}", clean(&String::from_utf8_lossy(payload)))),
                Kind::Exit => match ExitReport::decode(payload) {
                    Ok(report) => broken(format!("it ended: {:?}", report.ending)),
                    Err(error) => broken(error.to_string()),
                },
                _ => misplaced(),
            };
        }
        if !self.alive {
            return misplaced();
        }
        let Some(channel) = self.channels.get_mut(&number) else {
            return broken(format!("it sent {kind:?} on channel {number}, which is not open"));
        };
        match kind {
            Kind::Stdout | Kind::Stderr | Kind::Result | Kind::Reply => {
                channel.received += payload.len() as u64;
                if channel.received - channel.granted.min(channel.received) > WINDOW.into() {
                    return broken("it sent more than it was granted");
                }
            }
            Kind::Grant => {
                let Ok(more) = live::decode_credit(payload) else { return broken("malformed credit") };
                channel.may_send = channel.may_send.saturating_add(more.into());
                channel.writable.notify_waiters();
                return Ok(());
            }
            _ => {}
        }
        match &mut channel.what {
            Use::Run(id) => {
                let id = *id;
                self.take_of_run(number, id, kind, payload)
            }
            Use::Op(events) => {
                let event = match kind {
                    Kind::Reply => match live::decode::<Reply>(payload) {
                        Ok(reply) => OpEvent::Reply(reply, payload.len()),
                        Err(error) => return broken(error.to_string()),
                    },
                    Kind::Stdout => OpEvent::Data(Bytes::copy_from_slice(payload)),
                    Kind::End => OpEvent::End(decode_end(payload)?),
                    _ => return misplaced(),
                };
                if let Some(events) = events {
                    // Its caller may be gone at this moment; then it is closed at the next.
                    let _gone = events.send(event);
                }
                if kind == Kind::End {
                    self.free(number);
                }
                Ok(())
            }
        }
    }

    fn free(&mut self, number: u16) {
        if let Some(channel) = self.channels.remove(&number) {
            channel.writable.notify_waiters();
        }
        self.touch();
    }

    fn take_of_run(&mut self, number: u16, id: Uuid, kind: Kind, payload: &[u8]) -> Result<(), Broken> {
        let assembling: usize =
            if kind == Kind::Result { self.runs.values().map(|run| run.assembly.weight).sum() } else { 0 };
        let Some(run) = self.runs.get_mut(&id) else { return broken("a channel without a run") };
        let cell = matches!(run.kind, RunKind::Cell { .. });
        match kind {
            Kind::Started if !run.started => {
                run.started = true;
                run.pid = match (cell, payload.first_chunk()) {
                    (true, None) if payload.is_empty() => None,
                    (false, Some(pid)) if payload.len() == 4 => Some(u32::from_le_bytes(*pid)),
                    _ => return broken("malformed Started"),
                };
            }
            Kind::Stdout if run.started => run.log.push(Item::Stdout(Bytes::copy_from_slice(payload))),
            Kind::Stderr if run.started => run.log.push(Item::Stderr(Bytes::copy_from_slice(payload))),
            Kind::Result if run.started && cell => {
                let chunk = ResultChunk::decode(payload).map_err(|error| Broken(error.to_string()))?;
                run.shown += payload.len() as u64;
                if let Some(item) = run.assembly.take(&chunk, assembling)? {
                    run.log.push_shown(item, run.shown);
                }
            }
            Kind::Error if run.started && cell => {
                let Ok(error) = serde_json::from_slice::<CellError>(payload) else { return broken("malformed error") };
                run.log.push(Item::Error(Arc::new(error)));
            }
            Kind::End => {
                let end = decode_end(payload)?;
                let how = match end.how {
                    How::Cell(done) if cell => {
                        RunHow::Cell { status: done.status, execution_count: done.execution_count }
                    }
                    How::Exited(code) => RunHow::Exited(code),
                    How::Signaled(signal) => RunHow::Signaled(signal),
                    How::DeadlinePassed => RunHow::DeadlinePassed,
                    How::OutOfMemory => RunHow::OutOfMemory,
                    How::Closed => RunHow::Closed,
                    How::Refused(refusal, text) => RunHow::Refused(refusal, text),
                    How::Done | How::Cell(_) => return broken("a run that ended as what it is not"),
                };
                run.end_as(RunEnd { how, wall: Duration::from_nanos(end.wall_ns), context_lost: end.context_lost });
                self.free(number);
                self.remember();
            }
            _ => return broken(format!("it sent {kind:?} out of turn")),
        }
        if let Some(run) = self.runs.get(&id) {
            run.changed.notify_waiters();
        }
        self.grant(id);
        self.settle(Some(id));
        Ok(())
    }

    /// Forgets the oldest of too many runs that have ended.
    fn remember(&mut self) {
        let over = |run: &RunState| run.end.is_some() && run.readers.is_empty();
        let count = self.runs.values().filter(|run| run.end.is_some()).count();
        for _ in REMEMBERED..count {
            let Some(id) = self.runs.values().find(|run| over(run)).map(|run| run.id) else { return };
            self.runs.remove(&id);
        }
    }

    /// The sandbox has ended: everyone who waits hears of it.
    pub(crate) fn finish(&mut self, reason: EndReason) {
        self.ended = Some(reason);
        self.outgoing = BytesMut::new();
        // Who waits for a checkpoint hears of it; a zygote of a checkpoint ends when nobody needs it.
        (self.freeze, self.roots) = (None, None);
        // Operations see that nobody speaks to them any more.
        for channel in std::mem::take(&mut self.channels).into_values() {
            channel.writable.notify_waiters();
        }
        for run in self.runs.values_mut() {
            if run.end.is_none() {
                run.end_as(RunEnd { how: RunHow::Gone(reason), wall: Duration::ZERO, context_lost: true });
            }
            if run.readers.is_empty() {
                run.log.clear();
            }
            run.changed.notify_waiters();
        }
        self.settle(None);
        self.let_go();
    }
}

impl Channel {
    fn branched(&self) -> Channel {
        let what = match self.what {
            Use::Run(id) => Use::Run(id),
            Use::Op(_) => Use::Op(None),
        };
        Channel { what, writable: Arc::default(), ..*self }
    }
}

impl RunState {
    fn branched(&self) -> RunState {
        RunState {
            id: self.id,
            kind: self.kind.clone(),
            asked_at: self.asked_at,
            channel: self.channel,
            stdin: self.stdin,
            started: self.started,
            pid: self.pid,
            log: self.log.clone(),
            assembly: self.assembly.clone(),
            shown: self.shown,
            readers: BTreeMap::new(),
            end: self.end.clone(),
            changed: Arc::default(),
        }
    }

    fn end_as(&mut self, end: RunEnd) {
        self.end = Some(end);
        self.channel = None;
        self.stdin = Stdin::None;
        self.assembly = Assembly::default();
    }
}

impl Assembly {
    /// Takes a chunk; gives the result once it is whole. `all`: what all runs of the sandbox have in hand.
    fn take(&mut self, chunk: &ResultChunk<'_>, all: usize) -> Result<Option<Item>, Broken> {
        let size = chunk.mime.len() + chunk.data.len();
        let full = self.weight + size > MAX_RESULT || all + size > MAX_ASSEMBLING;
        if self.lost > 0 || full {
            self.lost += size as u64;
            self.throw_away();
        } else if chunk.append {
            match self.parts.last_mut() {
                Some((mime, data)) if mime == chunk.mime => data.extend_from_slice(chunk.data),
                _ => return broken("it continued a part of a result that it had not begun"),
            }
            self.weight += chunk.data.len();
        } else {
            if self.parts.len() == MAX_PARTS || self.parts.iter().any(|(mime, _)| mime == chunk.mime) {
                return broken("it sent a part of a result twice, or too many");
            }
            self.parts.push((chunk.mime.to_owned(), BytesMut::from(chunk.data)));
            self.weight += size;
        }
        self.main |= chunk.main;
        if !chunk.last {
            return Ok(None);
        }
        let whole = std::mem::take(self);
        if whole.lost > 0 {
            return Ok(Some(Item::Lost(whole.lost)));
        }
        let parts = whole.parts.into_iter().map(|(mime, data)| (mime, data.freeze())).collect();
        Ok(Some(Item::Result(Arc::new(MimeBundle { main: whole.main, parts }))))
    }

    fn throw_away(&mut self) {
        self.lost += self.weight as u64;
        self.weight = 0;
        self.parts.clear();
    }
}

fn decode_end(payload: &[u8]) -> Result<End, Broken> {
    let mut end: End = live::decode(payload).map_err(|error| Broken(error.to_string()))?;
    match &mut end.how {
        How::Exited(code) => *code &= 0xff,
        How::Signaled(signal) if !(1..=64).contains(signal) => return broken("no signal has this number"),
        How::Refused(_, text) => *text = clean(text),
        _ => {}
    }
    Ok(end)
}

/// Words of the sandbox: not many, and on one line.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect()
}

/// Whether so many bytes of replies are too many for one answer.
pub(crate) fn too_many_replies(bytes: usize) -> bool {
    bytes > MAX_REPLIES
}

#[cfg(test)]
impl State {
    pub(crate) fn set_next_channel(&mut self, number: u16) {
        self.next_channel = number;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zeroboot_proto::live::{CellDone, CellStatus, FileOp};

    use super::*;

    /// Payloads that some kind takes, and others.
    fn payload() -> impl Strategy<Value = Vec<u8>> {
        let chunk = (any::<bool>(), any::<bool>(), 0usize..3, proptest::collection::vec(any::<u8>(), 0..50));
        let chunk = chunk.prop_map(|(append, last, mime, data)| {
            let mime = ["text/plain", "text/html", "image/png"][mime];
            ResultChunk { main: true, append, last, mime, data: &data }.encode()
        });
        let end = prop_oneof![
            Just(How::Done),
            any::<i32>().prop_map(How::Exited),
            any::<i32>().prop_map(How::Signaled),
            Just(How::Cell(CellDone { status: CellStatus::Ok, execution_count: 1 })),
        ];
        let end = end.prop_map(|how| live::encode(&End { how, wall_ns: 1, context_lost: false }));
        prop_oneof![
            Just(Vec::new()),
            Just(vec![1, 0, 0, 0]),
            Just(br#"{"name":"a","value":"b","traceback":"c"}"#.to_vec()),
            proptest::collection::vec(any::<u8>(), 0..200),
            chunk,
            end,
        ]
    }

    proptest! {
        #[test]
        fn no_frames_make_the_bookkeeping_panic_or_miscount(
            frames in proptest::collection::vec((0u16..6, 0..Kind::ALL.len(), payload()), 0..60),
        ) {
            let mut state = State::new(Duration::from_secs(60), None, None);
            state.take(Frame { channel: 0, kind: Kind::Started, payload: &[] }).unwrap();
            let code = Bytes::from_static(b"1");
            let cell = RunSpec::Cell { context: "default".into(), code, timeout: None };
            let (first, _) = state.start(cell.clone()).unwrap();
            state.start(cell).unwrap();
            let read = Open::File(FileOp::Stat { path: "a".into() });
            let (_key, mut events) = state.operate(&read, false, false).unwrap();
            let reader = state.attach(first, 0);
            for (channel, kind, payload) in &frames {
                if state.take(Frame { channel: *channel, kind: Kind::ALL[*kind], payload }).is_err() {
                    break;
                }
                while let Ok(_event) = events.try_recv() {}
                if let Some((_, next)) = state.run(first).and_then(|run| run.log.read(run.readers[&reader])) {
                    state.advance(first, reader, next);
                }
            }
            let ended = state.statuses().iter().filter(|run| run.end.is_some()).count();
            prop_assert_eq!(state.counts().0 + ended, 2);
            state.detach(first, reader);
            state.finish(EndReason::Lost);
            prop_assert_eq!(state.counts().0, 0);
            prop_assert_eq!(state.statuses().iter().filter(|run| run.offset != run.first_offset).count(), 0);
        }
    }
}
