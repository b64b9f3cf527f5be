//! One exec in one fork: frames from the front go into the mailbox, frames from the guest come out of it,
//! and the host enforces what it was told to, whatever the guest does.
//!
//! ```text
//!            Identity … Run                    Exit | Failure
//!   waiting ───────────────▶ running ──────────────────────────▶ over
//!      │                        │ deadline, output limit, bad frame, guest gone
//!      └────────────────────────┴──▶ over, with an Exit frame of our own
//! ```

use std::{
    collections::VecDeque,
    io,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use zeroboot_proto::{
    Decoder, Ending, ExitReport, FrameError, Identity, Kind, Limits, Message, encode, encode_header,
    mailbox::{AREA, Ring},
};
use zeroboot_sys::kick::{Kick, take_pending};

use crate::{Console, Exits, Fork, MailboxError, Snapshot, Stop};

/// The agent's own enforcement of the wall-time limit comes first, since it can tell what the code had used;
/// the host ends the machine this much later.
pub const DEADLINE_GRACE: Duration = Duration::from_millis(100);
/// How long a guest may take from its first instruction to the end of taking its request.
const SETUP_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of a guest's console that are kept to explain its crash.
const LAST_WORDS: usize = 4096;
/// Bytes of frames that wait for the guest before the front is made to wait.
const INPUT_WATERMARK: usize = 4 * AREA;

/// The other end: the server, or a test.
pub trait Front {
    /// Appends what has come to `into`. With `wait` it blocks until something has.
    fn receive(&mut self, into: &mut Vec<u8>, wait: bool) -> io::Result<Received>;
    /// Sends all of `bytes`.
    fn send(&mut self, bytes: &[u8]) -> io::Result<()>;
}

/// What [`Front::receive`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Bytes, appended.
    Bytes,
    /// Nothing now.
    Nothing,
    /// The other end is closed.
    Gone,
}

/// How an exec ended for the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionEnd {
    /// The last frame is sent.
    Done(Ending),
    /// The guest said `Failure`: the sandbox could not do what it was asked.
    Failed,
    /// The front closed its end: nobody waits for an answer.
    FrontGone,
}

/// Why an exec could not be carried through. The front sees the socket close.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The front's socket broke.
    #[error("the connection to the front failed")]
    Front(#[source] io::Error),
    /// The front sent what is no frame: a bug of ours.
    #[error("the front sent a malformed frame")]
    FrontFrame(#[from] FrameError),
    /// The front sent a frame out of order: a bug of ours.
    #[error("the front sent a {0:?} frame where it may not")]
    FrontOrder(Kind),
    /// KVM failed.
    #[error("the virtual machine failed")]
    Kvm(#[from] zeroboot_sys::kvm::KvmError),
    /// The timer failed.
    #[error("the deadline timer failed")]
    Timer(#[source] io::Error),
    /// The clocks could not be started.
    #[error("cannot start the guest's clocks")]
    Clocks(#[from] crate::ForkError),
}

/// Counters of an exec.
#[derive(Clone, Copy, Debug, Default)]
pub struct SessionStats {
    /// Exits to user space.
    pub exits: Exits,
    /// How often the wake line was raised.
    pub raised: u64,
    /// From the first entry to the last exit.
    pub run: Duration,
}

/// Drives one fork through one exec.
pub struct Session<'a, F> {
    snapshot: &'a Snapshot,
    fork: &'a mut Fork,
    front: &'a mut F,
    kick: &'a Kick,
    from_front: Decoder,
    /// Bytes of frames that wait for the guest.
    to_guest: VecDeque<u8>,
    /// The wake line was raised, and the guest has not rung [`Ring::Want`] since.
    raised: bool,
    from_guest: Decoder,
    limits: Option<Limits>,
    identified: bool,
    /// When `Run` went to the guest.
    started: Option<Instant>,
    deadline: Instant,
    output: u64,
    files: u64,
    stats: SessionStats,
    /// Why the guest is called crashed.
    crash: Option<String>,
}

/// What handling a guest's frames led to.
enum Flow {
    Continue,
    Over(SessionEnd),
}

impl<'a, F: Front> Session<'a, F> {
    /// A session that has not begun. `kick` belongs to this thread.
    pub fn new(snapshot: &'a Snapshot, fork: &'a mut Fork, front: &'a mut F, kick: &'a Kick) -> Session<'a, F> {
        Session {
            snapshot,
            fork,
            front,
            kick,
            from_front: Decoder::new(),
            to_guest: VecDeque::new(),
            raised: false,
            from_guest: Decoder::new(),
            limits: None,
            identified: false,
            started: None,
            deadline: Instant::now() + SETUP_TIMEOUT,
            output: 0,
            files: 0,
            stats: SessionStats::default(),
            crash: None,
        }
    }

    /// Takes the request, runs it, and sends everything up to the last frame.
    pub fn run(mut self) -> Result<(SessionEnd, SessionStats), SessionError> {
        let end = self.drive()?;
        Ok((end, self.stats))
    }

    fn drive(&mut self) -> Result<SessionEnd, SessionError> {
        // Nothing of the guest runs before a request is there: its clocks start then.
        if self.fill(true)? {
            return Ok(SessionEnd::FrontGone);
        }
        let entered = Instant::now();
        self.deadline = match self.started {
            Some(_) => self.deadline,
            None => entered + SETUP_TIMEOUT,
        };
        self.snapshot.start_clocks(self.fork)?;
        self.hand_over()?;
        let result = self.run_guest();
        self.stats.run = entered.elapsed();
        self.kick.disarm().map_err(SessionError::Timer)?;
        result
    }

    fn run_guest(&mut self) -> Result<SessionEnd, SessionError> {
        let mut console = Console::new(LAST_WORDS);
        let mut bytes = Vec::with_capacity(AREA);
        self.arm()?;
        loop {
            self.wake()?;
            let stop = self.fork.machine.run(&mut console, &mut self.stats.exits)?;
            let (ring, len) = match stop {
                Stop::Ring(ring, len) => (ring, len),
                Stop::Kicked => {
                    if self.fill(false)? {
                        return Ok(SessionEnd::FrontGone);
                    }
                    // After `fill`, which forgets pending kicks: one that came before it is seen here.
                    if Instant::now() >= self.deadline {
                        return self.finish(Ending::DeadlinePassed);
                    }
                    continue;
                }
                Stop::Shutdown => {
                    let said = console.text();
                    // A panic's reason stands ahead of its trace.
                    let words = said.find("Kernel panic").and_then(|at| said.get(at..)).unwrap_or(&said);
                    return self.crashed(format!("it shut down, saying {words:?}"));
                }
                Stop::Broken { reason, detail } => {
                    return self.crashed(format!("it broke (KVM exit reason {reason}, {detail:#x})"));
                }
            };
            // A fork rings `Ready` never again.
            let taken = match ring {
                Ring::Ready => Err(MailboxError::TooLong(len)),
                _ => self.fork.mailbox.take(&self.fork.machine.memory, len, &mut bytes),
            };
            if let Err(error) = taken {
                return self.crashed(format!("{ring:?} with {error}"));
            }
            self.from_guest.feed(&bytes);
            match self.forward()? {
                Flow::Continue => {}
                Flow::Over(end) => return Ok(end),
            }
            match ring {
                Ring::Want => {
                    self.raised = false;
                    // Until `Run` the guest has nothing to do but wait for us; after it, it has.
                    let wait = self.started.is_none() && self.to_guest.is_empty();
                    if self.fill(wait)? {
                        return Ok(SessionEnd::FrontGone);
                    }
                    self.hand_over()?;
                }
                Ring::Output => self.put(&[], !self.to_guest.is_empty())?,
                // The last bytes held no last frame.
                Ring::Done | Ring::Ready => return self.crashed("its last frames held no end".into()),
            }
            // A guest that rings all the time is never kicked out: look at the clock here too. After `fill`,
            // which forgets pending kicks.
            if Instant::now() >= self.deadline {
                return self.finish(Ending::DeadlinePassed);
            }
        }
    }

    /// Raises the wake line where bytes wait for a guest that may sleep. Until `Run` it asks by itself. Once is enough: the
    /// agent forgets the line before it rings [`Ring::Want`], not after, and is given what waits at that ring.
    fn wake(&mut self) -> Result<(), SessionError> {
        if self.started.is_some() && !self.raised && !self.to_guest.is_empty() {
            // A guest that turned its local APIC off sleeps on: it harms itself.
            let _heard = self.fork.wake()?;
            self.raised = true;
            self.stats.raised += 1;
        }
        Ok(())
    }

    /// Sets the timer to the deadline.
    fn arm(&self) -> Result<(), SessionError> {
        self.kick.after(self.deadline.saturating_duration_since(Instant::now())).map_err(SessionError::Timer)
    }

    /// Takes what the front has sent. `true`: the front is gone.
    fn fill(&mut self, wait: bool) -> Result<bool, SessionError> {
        // What has come by now is read below, so its kick has done its work; and the caller looks at the
        // deadline afterwards.
        take_pending();
        let mut bytes = Vec::new();
        let mut wait = wait;
        while self.to_guest.len() < INPUT_WATERMARK {
            match self.front.receive(&mut bytes, wait).map_err(SessionError::Front)? {
                Received::Gone => return Ok(true),
                Received::Nothing => break,
                Received::Bytes => {}
            }
            self.from_front.feed(&bytes);
            bytes.clear();
            while let Some((kind, payload)) = self.from_front.next_frame()? {
                let order = || SessionError::FrontOrder(kind);
                match kind {
                    Kind::Identity => {
                        let mut identity = Identity::decode(payload).map_err(|_| order())?;
                        // The time of now, not of when the request was written: it may have waited.
                        identity.realtime_ns = realtime_ns();
                        let payload = identity.encode();
                        self.to_guest.extend(encode_header(0, kind, payload.len()));
                        self.to_guest.extend(payload);
                        self.identified = true;
                        continue;
                    }
                    Kind::Limits => self.limits = Some(Limits::decode(payload).map_err(|_| order())?),
                    // No user code without an identity of its own and limits.
                    Kind::Run if !self.identified || self.limits.is_none() || self.started.is_some() => {
                        return Err(order());
                    }
                    Kind::Run => {
                        let limits = self.limits.ok_or_else(order)?;
                        let now = Instant::now();
                        self.started = Some(now);
                        let wall = Duration::from_nanos(limits.wall_ns).saturating_add(DEADLINE_GRACE);
                        // A limit beyond what a clock can hold is none.
                        self.deadline = now.checked_add(wall).unwrap_or(now + Duration::from_secs(86_400 * 365));
                    }
                    Kind::Stdin | Kind::StdinEnd => {}
                    Kind::Code | Kind::Arg | Kind::Env | Kind::Put | Kind::Get if self.started.is_none() => {}
                    _ => return Err(order()),
                }
                self.to_guest.extend(encode_header(0, kind, payload.len()));
                self.to_guest.extend(payload);
                // Whatever brought us here: until now the timer was at the end of the setup.
                if kind == Kind::Run {
                    self.arm()?;
                }
            }
            // Part of a frame is not enough to go on with.
            wait = wait && self.to_guest.is_empty();
        }
        Ok(false)
    }

    /// Puts the next bytes into the mailbox.
    fn hand_over(&mut self) -> Result<(), SessionError> {
        let n = self.to_guest.len().min(AREA);
        let bytes: Vec<u8> = self.to_guest.drain(..n).collect();
        let more = !self.to_guest.is_empty() || self.from_front.is_mid_frame();
        self.put(&bytes, more)
    }

    fn put(&mut self, bytes: &[u8], more: bool) -> Result<(), SessionError> {
        match self.fork.mailbox.put(&self.fork.machine.memory, bytes, more) {
            Ok(()) => Ok(()),
            // Checked when the snapshot was loaded.
            Err(error) => Err(SessionError::Front(io::Error::other(error))),
        }
    }

    /// Checks and sends on the guest's frames.
    fn forward(&mut self) -> Result<Flow, SessionError> {
        let limits = self.limits;
        let mut out = Vec::new();
        let mut ending = None;
        loop {
            let (kind, payload) = match self.from_guest.next_frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(error) => {
                    self.crash = Some(error.to_string());
                    ending = Some(Ending::Crashed);
                    break;
                }
            };
            let Ok(message) = Message::decode(kind, payload) else {
                self.crash = Some(format!("a malformed {kind:?} frame"));
                ending = Some(Ending::Crashed);
                break;
            };
            match message {
                // Before `Run` nothing can have begun.
                Message::Started if self.started.is_some() => encode(&mut out, kind, payload),
                Message::Stdout(data) | Message::Stderr(data) if self.started.is_some() => {
                    let allowed = limits.map_or(0, |l| l.output).saturating_sub(self.output);
                    self.output = self.output.saturating_add(data.len() as u64);
                    let n = usize::try_from(allowed).unwrap_or(usize::MAX).min(data.len());
                    if n > 0 {
                        encode(&mut out, kind, data.get(..n).unwrap_or_default());
                    }
                    if n < data.len() {
                        ending = Some(Ending::OutputLimit);
                        break;
                    }
                }
                Message::File(chunk) if self.started.is_some() => {
                    self.files = self.files.saturating_add(chunk.data.len() as u64);
                    // The agent keeps to the limit and says so per file; a guest that does not is not our agent.
                    if self.files > limits.map_or(0, |l| l.output_files).saturating_add(1 << 20) {
                        self.crash = Some("more bytes of files than the limit".into());
                        ending = Some(Ending::Crashed);
                        break;
                    }
                    encode(&mut out, kind, payload);
                }
                Message::Exit(report) if self.started.is_some() => {
                    encode(&mut out, kind, payload);
                    self.send(&out)?;
                    return Ok(Flow::Over(SessionEnd::Done(report.ending)));
                }
                Message::Failure(_) => {
                    encode(&mut out, kind, payload);
                    self.send(&out)?;
                    return Ok(Flow::Over(SessionEnd::Failed));
                }
                _ => {
                    self.crash = Some(format!("a {kind:?} frame out of order"));
                    ending = Some(Ending::Crashed);
                    break;
                }
            }
        }
        if !out.is_empty() {
            self.send(&out)?;
        }
        match ending {
            Some(ending) => self.finish(ending).map(Flow::Over),
            None => Ok(Flow::Continue),
        }
    }

    fn crashed(&mut self, why: String) -> Result<SessionEnd, SessionError> {
        self.crash = Some(why);
        self.finish(Ending::Crashed)
    }

    /// Ends the exec from the host's side.
    fn finish(&mut self, ending: Ending) -> Result<SessionEnd, SessionError> {
        let mut out = Vec::new();
        if let Some(why) = self.crash.take() {
            encode(&mut out, Kind::Crash, why.as_bytes());
        }
        match self.started {
            Some(started) => {
                let wall_ns = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
                let report = ExitReport { ending, wall_ns, cpu_ns: 0, peak_memory: 0 };
                encode(&mut out, Kind::Exit, &report.encode());
            }
            // Nothing of the user's has run: that the sandbox broke is our failure, not an outcome.
            None => encode(&mut out, Kind::Failure, b"the sandbox ended before it took its request"),
        }
        self.send(&out)?;
        Ok(match self.started {
            Some(_) => SessionEnd::Done(ending),
            None => SessionEnd::Failed,
        })
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), SessionError> {
        self.front.send(bytes).map_err(SessionError::Front)
    }
}

fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
