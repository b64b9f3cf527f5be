//! Frames that come out of the sandbox, and what they mean for the exec. They are hostile: a frame that is malformed,
//! misplaced or above a limit ends the sandbox.

use bytes::Bytes;
use zeroboot_proto::{Ending, ExitReport, Message};

use super::{Execution, OUTPUT_SLACK, files::Chunk};
use crate::{Event, ExecError, Isolation, Outcome};

/// What a frame means.
enum Step {
    Started,
    Output(Event),
    File(Chunk),
    Hint(Box<str>),
    Crash(String),
    Exit(ExitReport),
    Broken(String),
}

impl Execution {
    /// Turns the frames that are there into events.
    pub(super) fn take_frames(&mut self) -> Result<(), ExecError> {
        // At most a few at a time, so that a flood is passed on as it comes.
        while self.queue.len() < 16 {
            let Some(worker) = &mut self.worker else { return Ok(()) };
            let step = match worker.decoder.next_frame() {
                Ok(None) => return Ok(()),
                Err(error) => Step::Broken(error.to_string()),
                Ok(Some((kind, payload))) => match Message::decode(kind, payload) {
                    Err(error) => Step::Broken(error.to_string()),
                    Ok(Message::Started) if !self.started => Step::Started,
                    Ok(Message::Stdout(bytes)) if self.started => {
                        Step::Output(Event::Stdout(Bytes::copy_from_slice(bytes)))
                    }
                    Ok(Message::Stderr(bytes)) if self.started => {
                        Step::Output(Event::Stderr(Bytes::copy_from_slice(bytes)))
                    }
                    Ok(Message::File(chunk)) if self.started => Step::File(Chunk {
                        path: String::from_utf8_lossy(chunk.path).into_owned(),
                        data: chunk.data.to_vec(),
                        append: chunk.append,
                        failed: chunk.failed,
                    }),
                    // A limit can pass while the identity is still being applied.
                    Ok(Message::Exit(report)) if self.started || !matches!(report.ending, Ending::Exited(_)) => {
                        Step::Exit(report)
                    }
                    Ok(Message::Hint(text)) if self.started && self.hint.is_none() => Step::Hint(text.into()),
                    // A VM's worker says it once; nobody else has a guest.
                    Ok(Message::Crash(why)) if self.isolation == Isolation::Vm && !self.crash_heard => {
                        Step::Crash(String::from_utf8_lossy(why).chars().take(600).collect())
                    }
                    Ok(Message::Failure(text)) => Step::Broken(text.to_owned()),
                    // The kind alone: a payload is the code's own words.
                    Ok(_) => Step::Broken(format!("it sent {kind:?} out of turn")),
                },
            };
            match step {
                Step::Started => {
                    self.started = true;
                    self.queue.push_back(Event::Started);
                }
                Step::Output(event) => {
                    if let Event::Stdout(bytes) | Event::Stderr(bytes) = &event {
                        self.output += bytes.len() as u64;
                    }
                    if self.output > self.limits.output.saturating_add(OUTPUT_SLACK) {
                        self.end(Outcome::OutputLimit, None);
                        return Ok(());
                    }
                    self.queue.push_back(event);
                }
                Step::File(chunk) => {
                    if let Err(error) = self.files.take(chunk, &mut self.queue) {
                        return self.broken(&error.to_string());
                    }
                }
                Step::Hint(hint) => self.hint = Some(hint),
                Step::Crash(reason) => {
                    self.crash_heard = true;
                    tracing::warn!(exec_id = %self.id, ?reason, "the guest crashed");
                }
                Step::Exit(report) => self.end(outcome(report.ending), Some(report)),
                Step::Broken(reason) => return self.broken(&reason),
            }
        }
        Ok(())
    }
}

fn outcome(ending: Ending) -> Outcome {
    match ending {
        Ending::Exited(code) => Outcome::Exited { code },
        Ending::Signaled(signal) => Outcome::Signaled { signal },
        Ending::DeadlinePassed => Outcome::DeadlinePassed,
        Ending::CpuLimit => Outcome::CpuLimit,
        Ending::OutputLimit => Outcome::OutputLimit,
        Ending::OutOfMemory(code) => Outcome::OutOfMemory { code },
        Ending::Crashed => Outcome::Crashed,
    }
}
