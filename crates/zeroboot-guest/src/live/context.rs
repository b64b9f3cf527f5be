//! A context: an interpreter that runs cells one after the other and keeps its state.
//!
//! ```text
//! Starting --Ready--> Idle --a cell waits--> Busy --Done--> Draining --all its output is read--> Idle
//!     |                 |                      |                 |
//!     +-----------------+----------------------+-----------------+--- its process ends ---> Gone
//! ```

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Signal, WaitStatus};
use zeroboot_proto::live::{CellDone, ContextInfo, How, Refusal, ResultChunk};
use zeroboot_proto::{Decoder, Identity, Kind, MAX_PAYLOAD, Message, encode};

use crate::runner::Runner;
use crate::sys;

/// Longest time from an interrupt to the end of the cell.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
/// Longest start of an interpreter.
pub(super) const START: Duration = Duration::from_secs(60);

/// What a context does.
#[derive(Debug)]
pub(super) enum Phase {
    /// It starts, and is given up at this time.
    Starting(Instant),
    Idle,
    /// It runs the cell of this channel.
    Busy(u16),
    /// That cell is over; so many bytes of stdout and stderr are still its own.
    Draining(u16, How, [usize; 2]),
}

/// A cell that was told to stop.
#[derive(Debug)]
pub(super) struct Stopping {
    pub(super) why: How,
    pub(super) kill_at: Instant,
}

pub(super) struct Context {
    pub(super) name: String,
    pub(super) cwd: String,
    pub(super) runner: Runner,
    pub(super) phase: Phase,
    /// Channels of cells that wait.
    pub(super) queue: VecDeque<u16>,
    pub(super) executions: u32,
    pub(super) stopping: Option<Stopping>,
    pub(super) status: Option<WaitStatus>,
    /// It is not to come back, and why.
    pub(super) condemned: Option<How>,
    from_runner: Decoder,
    /// Frames for the runner.
    pub(super) control_out: Vec<u8>,
    pub(super) control_ended: bool,
    /// What it is told before its first cell.
    preamble: Option<Vec<u8>>,
}

/// What a runner said.
pub(super) enum Said {
    /// For the front, on the cell's channel.
    Result(Vec<u8>),
    Error(Vec<u8>),
    Done(CellDone),
    /// It cannot go on.
    Broken(String),
}

impl Context {
    /// Over the warm runner of the template, which has its identity and environment.
    pub(super) fn warm(name: &str, cwd: String, runner: Runner, from_runner: Decoder) -> Context {
        let mut preamble = Vec::new();
        encode(&mut preamble, Kind::Serve, &[]);
        Context::new(name, cwd, runner, from_runner, Phase::Idle, preamble)
    }

    /// Over a runner that was just started.
    pub(super) fn cold(name: &str, cwd: String, runner: Runner, identity: &Identity, env: &[Vec<u8>]) -> Context {
        let mut preamble = Vec::new();
        encode(&mut preamble, Kind::Identity, &identity.encode());
        for variable in env {
            encode(&mut preamble, Kind::Env, variable);
        }
        encode(&mut preamble, Kind::Serve, &[]);
        let phase = Phase::Starting(Instant::now() + START);
        Context::new(name, cwd, runner, Decoder::new(), phase, preamble)
    }

    fn new(name: &str, cwd: String, runner: Runner, from_runner: Decoder, phase: Phase, preamble: Vec<u8>) -> Context {
        Context {
            name: name.to_owned(),
            cwd,
            runner,
            phase,
            queue: VecDeque::new(),
            executions: 0,
            stopping: None,
            status: None,
            condemned: None,
            from_runner,
            control_out: Vec::new(),
            control_ended: false,
            preamble: Some(preamble),
        }
    }

    pub(super) fn info(&self) -> ContextInfo {
        ContextInfo {
            name: self.name.clone(),
            cwd: self.cwd.clone(),
            busy: !matches!(self.phase, Phase::Idle | Phase::Starting(_)),
            waiting: u32::try_from(self.queue.len()).unwrap_or(u32::MAX),
            executions: self.executions,
        }
    }

    /// The channel of the cell that it runs, or whose output it still reads.
    pub(super) fn channel(&self) -> Option<u16> {
        match &self.phase {
            Phase::Busy(channel) | Phase::Draining(channel, ..) => Some(*channel),
            Phase::Starting(_) | Phase::Idle => None,
        }
    }

    /// Gives it a cell. It is idle.
    pub(super) fn begin(&mut self, channel: u16, code: &[u8]) {
        if let Some(preamble) = self.preamble.take() {
            self.control_out.extend_from_slice(&preamble);
        }
        encode(&mut self.control_out, Kind::Code, code);
        encode(&mut self.control_out, Kind::Cell, &[]);
        self.phase = Phase::Busy(channel);
        self.executions += 1;
        self.stopping = None;
    }

    /// Sends what its pipe takes.
    pub(super) fn flush(&mut self) {
        let mut sent = 0;
        while let Some(rest) = self.control_out.get(sent..).filter(|rest| !rest.is_empty()) {
            match rustix::io::write(&self.runner.control_in, rest) {
                Ok(n) => sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                // It is going: its end says so.
                Err(_) => sent = self.control_out.len(),
            }
        }
        self.control_out.drain(..sent);
    }

    /// Reads its pipe once.
    pub(super) fn read_control(&mut self, buffer: &mut [u8]) {
        match rustix::io::read(&self.runner.control_out, &mut *buffer) {
            Ok(0) => self.control_ended = true,
            Ok(n) => self.from_runner.feed(buffer.get(..n).unwrap_or_default()),
            // EAGAIN, EINTR; whatever else is wrong shows as the end of its process.
            Err(_) => {}
        }
    }

    /// The next thing that it says. The code can say anything in its name, and harms itself only.
    pub(super) fn said(&mut self) -> Option<Said> {
        loop {
            let (kind, payload) = match self.from_runner.next_frame() {
                Ok(frame) => frame?,
                Err(error) => return Some(Said::Broken(error.to_string())),
            };
            let busy = matches!(self.phase, Phase::Busy(_));
            let said = match kind {
                Kind::Ready if matches!(self.phase, Phase::Starting(_)) => {
                    self.phase = Phase::Idle;
                    continue;
                }
                Kind::Result if busy && ResultChunk::decode(payload).is_ok() => Said::Result(payload.to_vec()),
                Kind::Error if busy => Said::Error(payload.to_vec()),
                Kind::Done if busy => match CellDone::decode(payload) {
                    Ok(done) => Said::Done(done),
                    Err(_) => Said::Broken("a malformed end of a cell".into()),
                },
                Kind::Failure => match Message::decode(kind, payload) {
                    Ok(Message::Failure(text)) => Said::Broken(text.to_owned()),
                    _ => Said::Broken("a malformed failure".into()),
                },
                // `Started`, and what a program may have written before or after its time.
                _ => continue,
            };
            return Some(said);
        }
    }

    /// The cell is over; what it wrote is in the pipes.
    pub(super) fn drain(&mut self, how: How) {
        if let Phase::Busy(channel) = self.phase {
            let pipe = |fd: &Option<std::os::fd::OwnedFd>| fd.as_ref().map_or(0, sys::waiting);
            self.phase = Phase::Draining(channel, how, [pipe(&self.runner.stdout), pipe(&self.runner.stderr)]);
        }
    }

    /// Reads once of what belongs to its cell, at most `buffer`. `None`: nothing now.
    pub(super) fn read(&mut self, stdout: bool, buffer: &mut [u8]) -> Option<usize> {
        let end = if stdout { &mut self.runner.stdout } else { &mut self.runner.stderr };
        let mut most = buffer.len();
        let mut left = match &mut self.phase {
            Phase::Draining(_, _, left) => left.get_mut(usize::from(!stdout)),
            _ => None,
        };
        if let Some(left) = &left {
            most = most.min(**left);
        }
        if most == 0 {
            return None;
        }
        let mut close = false;
        let read = match rustix::io::read(end.as_ref()?, buffer.get_mut(..most)?) {
            Ok(0) => {
                close = true;
                None
            }
            Ok(n) => Some(n),
            Err(Errno::INTR) => return None,
            Err(_) => None,
        };
        if let Some(left) = &mut left {
            // Nothing there although there was: somebody else read it.
            **left = read.map_or(0, |n| left.saturating_sub(n));
        }
        if close {
            *end = None;
        }
        read
    }

    /// Its sandbox has become another. Its runner makes its generators new: at once, also in the middle of a cell, and again
    /// when it reads this, whatever the code has done to the signal.
    pub(super) fn renew(&mut self, identity: &Identity) {
        encode(&mut self.control_out, Kind::Identity, &identity.encode());
        self.flush();
        // A runner that is not a context yet has run no code, and takes the frame before any.
        if self.preamble.is_none() && self.status.is_none() {
            rustix::process::kill_process(self.runner.pid, Signal::URG).ok();
        }
    }

    /// Sends SIGINT to its interpreter.
    pub(super) fn interrupt(&self) {
        rustix::process::kill_process(self.runner.pid, Signal::INT).ok();
    }

    /// Tells its cell to stop.
    pub(super) fn stop(&mut self, why: How) {
        if matches!(self.phase, Phase::Busy(_)) && self.stopping.is_none() {
            self.stopping = Some(Stopping { why, kill_at: Instant::now() + PATIENCE });
            self.interrupt();
        }
    }

    /// Kills its interpreter and what is in its session's first group.
    pub(super) fn kill(&self) {
        // A warm runner in a VM has no group of its own.
        rustix::process::kill_process_group(self.runner.pid, Signal::KILL).ok();
        rustix::process::kill_process(self.runner.pid, Signal::KILL).ok();
    }

    /// It is not to come back: what runs in it ends with `why`.
    pub(super) fn condemn(&mut self, why: How) {
        self.condemned.get_or_insert(why);
        self.kill();
    }

    /// When time has something to say to it.
    pub(super) fn due(&self) -> Option<Instant> {
        match (&self.phase, &self.stopping) {
            (Phase::Starting(until), _) => Some(*until),
            (Phase::Busy(_), Some(stopping)) => Some(stopping.kill_at),
            _ => None,
        }
    }

    /// What time has to say to it.
    pub(super) fn tick(&mut self, now: Instant) {
        if self.due().is_some_and(|due| now >= due) && self.condemned.is_none() {
            let why = match self.stopping.take() {
                Some(stopping) => stopping.why,
                None => How::Refused(Refusal::CannotStart, "the interpreter did not start in time".into()),
            };
            self.condemn(why);
        }
    }

    /// Whether its pipe may be read: a result needs room for a whole frame.
    pub(super) fn is_heard(&self, credit: Option<usize>) -> bool {
        let draining = matches!(self.phase, Phase::Draining(..));
        !self.control_ended && !draining && credit.is_none_or(|credit| credit >= MAX_PAYLOAD)
    }
}
