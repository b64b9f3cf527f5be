//! One fork and its front: frames from the front go into the mailbox, frames from the guest come out of it, and the host
//! enforces what it was told to, whatever the guest does.
//!
//! ```text
//!          Identity … Run               Exit
//!   setup ───────────────▶ exec ────────────────────▶ over
//!     │ │                   │ deadline, output limit, bad frame, guest gone: an Exit of our own
//!     │ │  Identity … Live
//!     │ └────────────────▶ live ────────────────────▶ over
//!     │                         bad frame, guest gone: a Crash
//!     └──▶ over: Failure
//! ```
//!
//! A sandbox that lives can be saved: the front says `Freeze`, which the guest answers at rest; if it has not within a bound,
//! it is saved where it stands. Then it runs on. A fork of that checkpoint begins in `live`, and with an `Identity`.
//!
//! An idle guest sleeps inside KVM_RUN and costs nothing. Bytes of the front kick it out (SIGIO); they are taken, the wake
//! line is raised, and the guest comes for them with [`Ring::Want`].

use std::{
    collections::VecDeque,
    error::Error as _,
    io,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use zeroboot_proto::{
    Decoder, Ending, Frame, FrameError, Identity, Kind, encode, encode_header,
    mailbox::{AREA, Ring},
};
use zeroboot_sys::kick::{Kick, take_pending};

use crate::{
    Console, Exits, Fork, Front, MailboxError, Received, Snapshot, Stop, Underway, checkpoint,
    live::Live,
    phase::{Phase, Verdict},
};

/// See [`Session::with_setup_timeout`].
const SETUP_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of a guest's console that are kept to explain its crash.
const LAST_WORDS: usize = 4096;
/// How long a guest may take to come to rest for a checkpoint, before it is saved where it stands.
const REST: Duration = Duration::from_secs(1);
/// Bytes of frames that wait for the guest before the front is made to wait.
const INPUT_WATERMARK: usize = 4 * AREA;

/// How a session ended for the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionEnd {
    /// The last frame is sent.
    Done(Ending),
    /// The guest said `Failure`, or broke before it took its request: the sandbox could not do what it was asked.
    Failed,
    /// A sandbox that lived broke. The front has the reason.
    Crashed,
    /// The front closed its end, so no caller waits for an answer.
    FrontGone,
}

/// Why a session could not be carried through. The front sees the socket close.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The front's socket broke.
    #[error("the connection to the front failed")]
    Front(#[source] io::Error),
    /// The front sent bytes that are not a frame: a bug in Zeroboot.
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

/// Counters of a session.
#[derive(Clone, Copy, Debug, Default)]
pub struct SessionStats {
    /// Exits to user space.
    pub exits: Exits,
    /// How often the wake line was raised.
    pub raised: u64,
    /// From the first entry to the last exit.
    pub run: Duration,
}

/// Drives one fork for one front.
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
    phase: Phase,
    /// The front waits for a checkpoint: when the guest is saved where it stands.
    freeze_at: Option<Instant>,
    setup_timeout: Duration,
    stats: SessionStats,
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
            phase: Phase::new(),
            freeze_at: None,
            setup_timeout: SETUP_TIMEOUT,
            stats: SessionStats::default(),
        }
    }

    /// Goes on with what was under way at a checkpoint.
    pub fn going_on(mut self, underway: Underway) -> Session<'a, F> {
        let Underway { channels, to_guest, from_guest } = underway;
        self.phase = Phase::Live(Live::go_on(channels));
        self.to_guest = to_guest.into();
        self.from_guest.feed(&from_guest);
        self
    }

    /// How long a guest may take from its first instruction to the end of taking its request, and from there, if it is to
    /// live, to its `Started`. A minute else.
    pub fn with_setup_timeout(mut self, timeout: Duration) -> Session<'a, F> {
        self.setup_timeout = timeout;
        self
    }

    /// Takes the request, runs it, and sends everything up to the last frame.
    pub fn run(mut self) -> Result<(SessionEnd, SessionStats), SessionError> {
        let end = self.drive()?;
        Ok((end, self.stats))
    }

    fn drive(&mut self) -> Result<SessionEnd, SessionError> {
        // Nothing of the guest runs before a request is there: its clocks start then.
        let goes_on = self.phase.is_nameless();
        if if goes_on { self.wait_for_name()? } else { self.fill(true)? } {
            return Ok(SessionEnd::FrontGone);
        }
        let entered = Instant::now();
        self.phase.enter(entered + self.setup_timeout);
        self.snapshot.start_clocks(self.fork)?;
        if !goes_on {
            self.hand_over()?;
        }
        // Where it goes on, its mailbox may hold what it has not taken yet. It is woken, and asks.
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
                // Also of a guest that rings all the time: bytes of the front are taken whatever it does.
                Stop::Kicked => {
                    if self.fill(false)? {
                        return Ok(SessionEnd::FrontGone);
                    }
                    // After `fill`, which forgets pending kicks: one that came before it is seen here.
                    if self.is_late() {
                        return self.finish(Ending::DeadlinePassed, None);
                    }
                    self.freeze_if_due()?;
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
            if let Some(end) = self.forward()? {
                return Ok(end);
            }
            match ring {
                Ring::Want => {
                    self.raised = false;
                    // Until `Run` or `Live` the guest has nothing to do but wait for us; after it, it has.
                    let wait = self.phase.is_setup() && self.to_guest.is_empty();
                    if self.fill(wait)? {
                        return Ok(SessionEnd::FrontGone);
                    }
                    self.hand_over()?;
                }
                Ring::Output => self.put(&[], !self.to_guest.is_empty())?,
                // The last bytes held no last frame.
                Ring::Done | Ring::Ready => return self.crashed("its last frames held no end".into()),
            }
            // A guest that rings all the time is never kicked out by the timer: look at the clock here too. After
            // `fill`, which forgets pending kicks.
            if self.is_late() {
                return self.finish(Ending::DeadlinePassed, None);
            }
            self.freeze_if_due()?;
        }
    }

    /// Saves a guest that has not come to rest in time.
    fn freeze_if_due(&mut self) -> Result<(), SessionError> {
        if self.freeze_at.is_some_and(|at| Instant::now() >= at) { self.freeze() } else { Ok(()) }
    }

    /// Saves the guest as it stands, and tells the front.
    fn freeze(&mut self) -> Result<(), SessionError> {
        self.freeze_at = None;
        self.arm()?;
        let Phase::Live(live) = &mut self.phase else { return Ok(()) };
        let underway = Underway {
            channels: live.frozen().clone(),
            to_guest: self.to_guest.iter().copied().collect(),
            from_guest: self.from_guest.rest().to_vec(),
        };
        let mut why = String::new();
        if let Err(error) = checkpoint::save(self.fork, self.snapshot, underway) {
            why = error.to_string();
            let mut source = error.source();
            while let Some(error) = source {
                why = format!("{why}: {error}");
                source = error.source();
            }
        }
        let mut out = Vec::new();
        encode(&mut out, Kind::Frozen, why.as_bytes());
        self.send(&out)
    }

    /// Raises the wake line where bytes wait for a guest that may sleep. Until `Run` or `Live` it asks by itself. Once is
    /// enough: the agent forgets the line before it rings [`Ring::Want`], not after, and is given what waits at that ring.
    fn wake(&mut self) -> Result<(), SessionError> {
        if !self.phase.is_setup() && !self.raised && !self.to_guest.is_empty() {
            // A guest that turned its local APIC off sleeps on: it harms itself.
            let _heard = self.fork.wake()?;
            self.raised = true;
            self.stats.raised += 1;
        }
        Ok(())
    }

    /// Sets the timer to the deadline.
    fn arm(&self) -> Result<(), SessionError> {
        match self.phase.deadline().into_iter().chain(self.freeze_at).min() {
            Some(at) => self.kick.after(at.saturating_duration_since(Instant::now())),
            None => self.kick.disarm(),
        }
        .map_err(SessionError::Timer)
    }

    /// Whether the deadline has passed.
    fn is_late(&self) -> bool {
        self.phase.deadline().is_some_and(|at| Instant::now() >= at)
    }

    /// Waits until the guest has an identity of its own. `true`: the front is gone.
    fn wait_for_name(&mut self) -> Result<bool, SessionError> {
        let mut bytes = Vec::new();
        while self.phase.is_nameless() {
            if self.front.receive(&mut bytes, true).map_err(SessionError::Front)? == Received::Gone {
                return Ok(true);
            }
            self.from_front.feed(&bytes);
            bytes.clear();
            self.take_frames()?;
        }
        Ok(false)
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
                Received::Nothing => return Ok(false),
                Received::Bytes => {}
            }
            self.from_front.feed(&bytes);
            bytes.clear();
            self.take_frames()?;
            // Part of a frame is not enough to go on with.
            wait = wait && self.to_guest.is_empty();
        }
        // The front's end lies behind bytes that are not received while the guest takes none, perhaps never.
        self.front.gone().map_err(SessionError::Front)
    }

    /// Checks the front's frames and lets them wait for the guest.
    fn take_frames(&mut self) -> Result<(), SessionError> {
        while let Some(frame) = self.from_front.next_on_any()? {
            if !self.phase.front_says(&frame)? {
                continue;
            }
            let Frame { channel, kind, payload } = frame;
            self.to_guest.extend(encode_header(channel, kind, payload.len()));
            if kind == Kind::Identity {
                let mut identity = Identity::decode(payload).map_err(|_| SessionError::FrontOrder(kind))?;
                // The time of now, not of when the request was written: it may have waited.
                identity.realtime_ns = realtime_ns();
                self.to_guest.extend(identity.encode());
            } else {
                self.to_guest.extend(payload);
            }
            if kind == Kind::Freeze {
                self.freeze_at = Some(Instant::now() + REST);
                self.arm()?;
            }
            if self.phase.begin(kind, self.setup_timeout) {
                // Whatever brought us here: until now the timer was at the end of the setup.
                self.arm()?;
            }
        }
        Ok(())
    }

    /// Puts the next bytes into the mailbox.
    fn hand_over(&mut self) -> Result<(), SessionError> {
        let n = self.to_guest.len().min(AREA);
        let bytes: Vec<u8> = self.to_guest.drain(..n).collect();
        if self.to_guest.is_empty() {
            // A sandbox that lives may wait for long with nothing in it.
            self.to_guest.shrink_to(AREA);
        }
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
    fn forward(&mut self) -> Result<Option<SessionEnd>, SessionError> {
        let mut out = Vec::new();
        let verdict = loop {
            let frame = match self.from_guest.next_on_any() {
                Ok(Some(frame)) => frame,
                Ok(None) => break Verdict::Go,
                Err(error) => break Verdict::Crashed(error.to_string()),
            };
            match self.phase.guest_says(&frame, &mut out) {
                Verdict::Go => {}
                // Its deadline is gone.
                Verdict::Lives => self.arm()?,
                Verdict::AtRest => {
                    // What it said before is the checkpoint's past on every branch.
                    if !out.is_empty() {
                        self.send(&std::mem::take(&mut out))?;
                    }
                    self.freeze()?;
                }
                last => break last,
            }
        };
        if !out.is_empty() {
            self.send(&out)?;
        }
        match verdict {
            Verdict::Go | Verdict::Lives | Verdict::AtRest => Ok(None),
            Verdict::Over(end) => Ok(Some(end)),
            Verdict::Ended(ending) => self.finish(ending, None).map(Some),
            Verdict::Crashed(why) => self.crashed(why).map(Some),
        }
    }

    fn crashed(&mut self, why: String) -> Result<SessionEnd, SessionError> {
        self.finish(Ending::Crashed, Some(why))
    }

    /// Ends the session from the host's side.
    fn finish(&mut self, ending: Ending, why: Option<String>) -> Result<SessionEnd, SessionError> {
        let mut out = Vec::new();
        if let Some(why) = why {
            encode(&mut out, Kind::Crash, why.as_bytes());
        }
        let end = self.phase.end(ending, &mut out);
        self.send(&out)?;
        Ok(end)
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), SessionError> {
        self.front.send(bytes).map_err(SessionError::Front)
    }
}

fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
