//! From a cold runner to a request: `Ready` is waited for, then the front's frames up to `Run` or `Live` are taken and
//! passed on to the runner. No user code runs yet, so the runner is believed.

use zeroboot_proto::{Command, Identity, Kind, Limits, MAX_PAYLOAD, Message, encode};

use super::frames::next;
use super::wait::{Interest, Seen};
use super::{Prepared, Stop, Supervisor};
use crate::limits::Ceilings;
use crate::processes::oom_kills;
use crate::runner::readable;
use crate::transport::Transport;

/// Bytes of input that may come before `Run`.
const STDIN_EARLY: usize = 1024 * 1024;

/// What the front asked for, up to `Run`.
#[derive(Default)]
pub(super) struct Request {
    pub(super) limits: Option<Limits>,
    pub(super) identity: Option<Identity>,
    /// Paths of output files.
    pub(super) wanted: Vec<Vec<u8>>,
    /// The code has its name.
    named: bool,
    /// As it came.
    pub(super) env: Vec<Vec<u8>>,
    /// The request is for a long-lived sandbox, not for one program.
    pub(super) live: bool,
}

impl<T: Transport> Supervisor<T> {
    /// Waits until the runner is ready.
    pub(super) fn warm_up(&mut self) -> Result<(), Stop> {
        let in_vm = self.in_vm();
        loop {
            let seen = self.wait(Interest { output: true, ..Interest::default() }, None)?;
            // Whatever an import prints is nobody's output.
            self.hear(&seen)?;
            if let Some((kind, payload)) = next(&mut self.from_runner)? {
                return match Message::decode(kind, payload) {
                    Ok(Message::Ready) => {
                        self.prepared = Some(Prepared {
                            ceilings: Ceilings::take(&self.runner),
                            memory: self.processes.usage_at_end().memory,
                            // A VM stands still from here to the request. Elsewhere it would be the count of a past time.
                            oom_kills: if in_vm { oom_kills() } else { None },
                        });
                        encode(&mut self.out, Kind::Ready, payload);
                        self.stderr_tail.clear();
                        self.flush_front()?;
                        // In a VM each fork begins here.
                        self.processes.rest(self.prepared.as_ref().map_or(0, |prepared| prepared.memory));
                        Ok(())
                    }
                    Ok(Message::Failure(text)) => Err(Stop::Failed(text.to_string())),
                    _ => Err(Stop::Failed(format!("the runner sent {kind:?} instead of Ready"))),
                };
            }
            if seen.ended || self.control_ended {
                return Err(self.runner_gone("before it was ready"));
            }
        }
    }

    /// Takes the request.
    pub(super) fn load(&mut self) -> Result<Request, Stop> {
        let mut request = Request::default();
        loop {
            while let Some((kind, payload)) = next(&mut self.from_front)? {
                match Command::decode(kind, payload).map_err(Stop::failed)? {
                    Command::Limits(limits) => request.limits = Some(limits),
                    Command::Identity(identity) => {
                        self.place.apply_identity(&identity).map_err(Stop::failed)?;
                        request.identity = Some(identity);
                        encode(&mut self.control_out, kind, payload);
                    }
                    Command::Env(..) => {
                        encode(&mut self.control_out, kind, payload);
                        request.env.push(payload.to_vec());
                    }
                    Command::Arg(word) => {
                        if !std::mem::replace(&mut request.named, true) {
                            self.files.code_is(word);
                        }
                        encode(&mut self.control_out, kind, payload);
                    }
                    Command::Code(_) => encode(&mut self.control_out, kind, payload),
                    Command::Put(chunk) => self.files.put(&chunk).map_err(Stop::failed)?,
                    Command::Get(path) => request.wanted.push(path.to_vec()),
                    Command::Stdin(bytes) => {
                        if self.stdin.len() + bytes.len() > STDIN_EARLY {
                            return Err(Stop::Failed("more standard input came before Run than is held".into()));
                        }
                        self.stdin.extend(bytes);
                    }
                    Command::StdinEnd => self.stdin_ended = true,
                    Command::Run => {
                        self.files.close();
                        return Ok(request);
                    }
                    Command::Live => {
                        request.live = true;
                        break;
                    }
                }
                if self.control_out.len() > MAX_PAYLOAD {
                    self.flush_control()?;
                }
            }
            // What came together is passed on together: fewer switches between agent and runner.
            self.flush_control()?;
            if request.live {
                return Ok(request);
            }
            if self.in_vm() {
                self.receive()?;
                continue;
            }
            let seen = self.wait(Interest { front_input: true, output: true, ..Interest::default() }, None)?;
            self.before_user_code(&seen)?;
            if seen.front {
                self.receive()?;
            }
        }
    }

    /// Reads what the runner has said.
    fn hear(&mut self, seen: &Seen) -> Result<(), Stop> {
        if seen.stdout {
            self.read_output(true)?;
        }
        if seen.stderr {
            self.read_output(false)?;
        }
        if seen.control {
            self.read_control()?;
        }
        Ok(())
    }

    /// Handles what a runner may do between `Ready` and `Started`: talk on stderr, fail, die.
    pub(super) fn before_user_code(&mut self, seen: &Seen) -> Result<(), Stop> {
        self.hear(seen)?;
        if let Some((kind, payload)) = next(&mut self.from_runner)? {
            return Err(Stop::Failed(match Message::decode(kind, payload) {
                Ok(Message::Failure(text)) => text.to_string(),
                _ => format!("the runner sent {kind:?} while it was given a request"),
            }));
        }
        if seen.ended || self.control_ended {
            return Err(self.runner_gone("while it was given a request"));
        }
        Ok(())
    }

    /// The runner ended too early: how, and what it said last.
    pub(super) fn runner_gone(&mut self, when: &str) -> Stop {
        self.kill_all();
        while self.runner.stderr.as_ref().is_some_and(readable) && matches!(self.read_output(false), Ok(n) if n > 0) {}
        let how = match self.status {
            Some(s) if s.exited() => format!("with status {}", s.exit_status().unwrap_or(0)),
            Some(s) => format!("by signal {}", s.terminating_signal().unwrap_or(0)),
            None => "without a status".to_string(),
        };
        let said = String::from_utf8_lossy(&self.stderr_tail);
        let said = said.trim();
        let colon = if said.is_empty() { "" } else { ": " };
        Stop::Failed(format!("the runner ended {when} ({how}){colon}{said}"))
    }
}
