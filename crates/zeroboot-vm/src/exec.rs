//! What the host owes an exec: its order of frames, its deadline, its bounds of output and files.

use std::time::{Duration, Instant};

use zeroboot_proto::{Ending, ExitReport, Frame, FrameError, Kind, Limits, Message, encode};

use crate::{
    SessionEnd, SessionError,
    phase::{NEVER, Verdict},
};

/// The agent's own enforcement of the wall-time limit comes first, since it can tell what the code had used;
/// the host ends the machine this much later.
pub const DEADLINE_GRACE: Duration = Duration::from_millis(100);
/// Bytes of files beyond the limit that do not count as a crash: the agent keeps the limit, and reports it for each file.
const FILES_GRACE: u64 = 1 << 20;

/// One program from its `Run` to its `Exit`.
#[derive(Debug)]
pub(crate) struct Exec {
    limits: Limits,
    started: Instant,
    pub(crate) deadline: Instant,
    output: u64,
    files: u64,
    hinted: bool,
}

impl Exec {
    /// `Run` goes to the guest.
    pub(crate) fn begin(limits: Limits) -> Exec {
        let started = Instant::now();
        let wall = Duration::from_nanos(limits.wall_ns).saturating_add(DEADLINE_GRACE);
        // A limit beyond what a clock can hold is none.
        let deadline = started.checked_add(wall).unwrap_or(started + NEVER);
        Exec { limits, started, deadline, output: 0, files: 0, hinted: false }
    }

    /// What the front may still say.
    pub(crate) fn front_says(&self, frame: &Frame<'_>) -> Result<(), SessionError> {
        match (frame.channel, frame.kind) {
            (0, Kind::Stdin | Kind::StdinEnd) => Ok(()),
            (_, kind) => Err(SessionError::FrontOrder(kind)),
        }
    }

    /// Puts what may be sent on of a frame into `out`.
    pub(crate) fn guest_says(&mut self, frame: &Frame<'_>, out: &mut Vec<u8>) -> Verdict {
        let Frame { channel, kind, payload } = *frame;
        if channel != 0 {
            return Verdict::Crashed(FrameError::Channel(channel).to_string());
        }
        let Ok(message) = Message::decode(kind, payload) else {
            return Verdict::Crashed(format!("a malformed {kind:?} frame"));
        };
        match message {
            Message::Started => encode(out, kind, payload),
            Message::Stdout(data) | Message::Stderr(data) => {
                let allowed = self.limits.output.saturating_sub(self.output);
                self.output = self.output.saturating_add(data.len() as u64);
                let n = usize::try_from(allowed).unwrap_or(usize::MAX).min(data.len());
                if n > 0 {
                    encode(out, kind, data.get(..n).unwrap_or_default());
                }
                if n < data.len() {
                    return Verdict::Ended(Ending::OutputLimit);
                }
            }
            Message::File(chunk) => {
                self.files = self.files.saturating_add(chunk.data.len() as u64);
                if self.files > self.limits.output_files.saturating_add(FILES_GRACE) {
                    return Verdict::Crashed("more bytes of files than the limit".into());
                }
                encode(out, kind, payload);
            }
            // Once, ahead of the end.
            Message::Hint(_) if !self.hinted => {
                self.hinted = true;
                encode(out, kind, payload);
            }
            Message::Exit(report) => {
                encode(out, kind, payload);
                return Verdict::Over(SessionEnd::Done(report.ending));
            }
            Message::Failure(_) => {
                encode(out, kind, payload);
                return Verdict::Over(SessionEnd::Failed);
            }
            _ => return Verdict::out_of_order(kind),
        }
        Verdict::Go
    }

    /// The last frame, where the host ends it.
    pub(crate) fn end(&self, ending: Ending, out: &mut Vec<u8>) {
        let wall_ns = u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let report = ExitReport { ending, wall_ns, cpu_ns: 0, peak_memory: 0 };
        encode(out, Kind::Exit, &report.encode());
    }
}
