//! What a sandbox is for, as far as its front has said it, and what may therefore be said.

use std::time::{Duration, Instant};

use zeroboot_proto::{Ending, Frame, Kind, Limits, encode};

use crate::{SessionEnd, SessionError, exec::Exec, live::Live};

/// A timeout longer than any sandbox.
pub(crate) const NEVER: Duration = Duration::from_secs(86_400 * 365);

/// Where a session is.
#[derive(Debug)]
pub(crate) enum Phase {
    /// Before `Run` or `Live`: no code of the user's runs.
    Setup(Setup),
    /// One program.
    Exec(Exec),
    /// A sandbox that lives.
    Live(Live),
}

/// What has to be known before any code runs.
#[derive(Debug)]
pub(crate) struct Setup {
    limits: Option<Limits>,
    identified: bool,
    deadline: Instant,
}

/// What a frame of the guest's leads to.
#[derive(Debug, PartialEq)]
pub(crate) enum Verdict {
    /// On to the next.
    Go,
    /// The same, and the setup of a sandbox that lives is over.
    Lives,
    /// The guest has come to rest and can be saved.
    AtRest,
    /// It was the last.
    Over(SessionEnd),
    /// The host ends the exec.
    Ended(Ending),
    /// The host calls the guest crashed.
    Crashed(String),
}

impl Verdict {
    pub(crate) fn out_of_order(kind: Kind) -> Verdict {
        Verdict::Crashed(format!("a {kind:?} frame out of order"))
    }
}

impl Phase {
    /// Nothing was said.
    pub(crate) fn new() -> Phase {
        Phase::Setup(Setup { limits: None, identified: false, deadline: Instant::now() + NEVER })
    }

    pub(crate) fn is_setup(&self) -> bool {
        matches!(self, Phase::Setup(_))
    }

    /// It goes on from a checkpoint and has not been told who it is: no instruction of it may run.
    pub(crate) fn is_nameless(&self) -> bool {
        matches!(self, Phase::Live(live) if live.nameless)
    }

    /// The guest runs from now on, and has this long for its setup, unless it is over.
    pub(crate) fn enter(&mut self, deadline: Instant) {
        if let Phase::Setup(setup) = self {
            setup.deadline = deadline;
        }
    }

    /// When the host ends it.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match self {
            Phase::Setup(setup) => Some(setup.deadline),
            Phase::Exec(exec) => Some(exec.deadline),
            Phase::Live(live) => live.setup_ends,
        }
    }

    /// Whether the guest is to have a frame of the front's.
    pub(crate) fn front_says(&mut self, frame: &Frame<'_>) -> Result<bool, SessionError> {
        match self {
            Phase::Setup(setup) => setup.front_says(frame).map(|()| true),
            Phase::Exec(exec) => exec.front_says(frame).map(|()| true),
            Phase::Live(live) => live.front_says(frame),
        }
    }

    /// Goes on to the next phase, if this kind of frame ends the setup. `true`: its deadline is another one.
    pub(crate) fn begin(&mut self, kind: Kind, setup_timeout: Duration) -> bool {
        let Phase::Setup(Setup { limits: Some(limits), .. }) = self else { return false };
        *self = match kind {
            Kind::Run => Phase::Exec(Exec::begin(*limits)),
            Kind::Live => Phase::Live(Live::begin(Instant::now() + setup_timeout)),
            _ => return false,
        };
        true
    }

    /// Puts what may be sent on of a guest's frame into `out`.
    pub(crate) fn guest_says(&mut self, frame: &Frame<'_>, out: &mut Vec<u8>) -> Verdict {
        match self {
            Phase::Setup(setup) => setup.guest_says(frame, out),
            Phase::Exec(exec) => exec.guest_says(frame, out),
            Phase::Live(live) => live.guest_says(frame, out),
        }
    }

    /// Puts the last frame into `out`, where the host ends it.
    pub(crate) fn end(&self, ending: Ending, out: &mut Vec<u8>) -> SessionEnd {
        match self {
            Phase::Exec(exec) => {
                exec.end(ending, out);
                SessionEnd::Done(ending)
            }
            Phase::Live(Live { setup_ends: None, .. }) => SessionEnd::Crashed,
            // Nothing of the user's has run: that the sandbox broke is our failure, not an outcome.
            Phase::Setup(_) | Phase::Live(_) => {
                encode(out, Kind::Failure, b"the sandbox ended before it took its request");
                SessionEnd::Failed
            }
        }
    }
}

impl Setup {
    /// User code needs its own identity and limits.
    fn front_says(&mut self, frame: &Frame<'_>) -> Result<(), SessionError> {
        let order = || SessionError::FrontOrder(frame.kind);
        match (frame.channel, frame.kind) {
            (0, Kind::Identity) => self.identified = true,
            (0, Kind::Limits) => self.limits = Some(Limits::decode(frame.payload).map_err(|_| order())?),
            (0, Kind::Run | Kind::Live) if self.identified && self.limits.is_some() => {}
            (0, Kind::Code | Kind::Arg | Kind::Env | Kind::Put | Kind::Get | Kind::Stdin | Kind::StdinEnd) => {}
            _ => return Err(order()),
        }
        Ok(())
    }

    fn guest_says(&self, frame: &Frame<'_>, out: &mut Vec<u8>) -> Verdict {
        match (frame.channel, frame.kind) {
            (0, Kind::Failure) if std::str::from_utf8(frame.payload).is_ok() => {
                encode(out, Kind::Failure, frame.payload);
                Verdict::Over(SessionEnd::Failed)
            }
            // Nothing can have begun.
            (_, kind) => Verdict::out_of_order(kind),
        }
    }
}
