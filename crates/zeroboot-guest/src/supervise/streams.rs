//! The program's streams: output into frames for the front, under its limit; input from the front's frames.

use std::io;

use rustix::io::Errno;
use zeroboot_proto::{Command, Ending, Kind, MAX_PAYLOAD, encode};

use super::frames::next;
use super::run::Run;
use super::{Stop, Supervisor};
use crate::transport::Transport;

/// Bytes of output that may wait for the front. Above it the agent does not read the program's pipes.
pub(super) const OUT_FULL: usize = MAX_PAYLOAD;
/// Bytes of input that may wait for the program. Above it the agent does not read from the front.
pub(super) const STDIN_FULL: usize = MAX_PAYLOAD;
/// Bytes of a failed runner's stderr that go into the report.
const STDERR_KEPT: usize = 4096;

impl<T: Transport> Supervisor<T> {
    /// One read of a stream into a frame for the front. The output limit is exact.
    /// Says how many bytes were read.
    pub(super) fn pump(&mut self, run: &mut Run, stdout: bool) -> Result<usize, Stop> {
        // `Started` was sent before the first byte of output: it must not come after it.
        if !run.begun {
            self.read_control()?;
            self.notes(run)?;
        }
        let n = self.read_output(stdout)?;
        let data = self.buffer.get(..n).unwrap_or_default();
        let allowed = usize::try_from(run.output_left).unwrap_or(usize::MAX).min(n);
        if allowed > 0 {
            let kind = if stdout { Kind::Stdout } else { Kind::Stderr };
            encode(&mut self.out, kind, data.get(..allowed).unwrap_or_default());
            run.output_left -= allowed as u64;
        }
        if allowed < n && run.stopped.is_none() {
            run.stopped = Some(Ending::OutputLimit);
        }
        Ok(n)
    }

    /// Reads once into `buffer`; closes our end at the stream's. Keeps the tail of stderr.
    pub(super) fn read_output(&mut self, stdout: bool) -> Result<usize, Stop> {
        let end = if stdout { &mut self.runner.stdout } else { &mut self.runner.stderr };
        let Some(fd) = end else { return Ok(0) };
        match rustix::io::read(&*fd, &mut self.buffer[..]) {
            Ok(0) => {
                *end = None;
                Ok(0)
            }
            Ok(n) => {
                if !stdout {
                    self.stderr_tail.extend_from_slice(self.buffer.get(..n).unwrap_or_default());
                    let extra = self.stderr_tail.len().saturating_sub(STDERR_KEPT);
                    self.stderr_tail.drain(..extra);
                }
                Ok(n)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    /// The rest of both streams, once no writer is alive or is going to write again.
    pub(super) fn drain(&mut self, run: &mut Run) -> Result<(), Stop> {
        for stdout in [true, false] {
            loop {
                if run.output_left == 0 && run.stopped.is_some() {
                    break;
                }
                // 0: at its end, or nothing more. Our ends do not block.
                if self.pump(run, stdout)? == 0 {
                    break;
                }
                if self.out.len() >= OUT_FULL {
                    self.flush_front()?;
                }
            }
        }
        Ok(())
    }

    /// Takes the input that the front has sent.
    pub(super) fn take_stdin(&mut self) -> Result<(), Stop> {
        while let Some((kind, payload)) = next(&mut self.from_front)? {
            match Command::decode(kind, payload) {
                Ok(Command::Stdin(bytes)) => {
                    // After its end, or once the program has closed it, input goes nowhere.
                    if !self.stdin_ended && self.runner.stdin.is_some() {
                        self.stdin.extend(bytes);
                    }
                }
                Ok(Command::StdinEnd) => self.stdin_ended = true,
                _ => return Err(Stop::Failed(format!("{kind:?} came during the run"))),
            }
        }
        Ok(())
    }

    /// Gives the program as much input as it takes now.
    pub(super) fn feed_stdin(&mut self) {
        while let Some(fd) = &self.runner.stdin {
            if self.stdin.is_empty() {
                if self.stdin_ended {
                    self.runner.stdin = None;
                }
                return;
            }
            match rustix::io::write(fd, self.stdin.as_slices().0) {
                Ok(n) => drop(self.stdin.drain(..n)),
                Err(Errno::AGAIN | Errno::INTR) => return,
                // EPIPE: the program does not read. That is its right.
                Err(_) => {
                    self.runner.stdin = None;
                    self.stdin.clear();
                }
            }
        }
    }
}
