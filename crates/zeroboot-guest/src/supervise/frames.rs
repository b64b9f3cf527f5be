//! Frames between the front, the agent and the runner: the transport, and the runner's two control pipes.

use std::io;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use zeroboot_proto::{Decoder, Kind};

use super::wait::{Interest, Seen};
use super::{Stop, Supervisor};
use crate::transport::{Received, Transport};

impl<T: Transport> Supervisor<T> {
    /// Takes what the front has sent.
    pub(super) fn receive(&mut self) -> Result<(), Stop> {
        match self.transport.receive(&mut self.from_front)? {
            Received::Bytes | Received::Nothing => Ok(()),
            Received::Closed => Err(Stop::FrontGone),
        }
    }

    /// Blocks until the front has taken everything.
    pub(super) fn flush_front(&mut self) -> Result<(), Stop> {
        Ok(flush(&mut self.out, &mut self.transport)?)
    }

    /// Takes what the runner has sent.
    pub(super) fn read_control(&mut self) -> Result<(), Stop> {
        while !self.control_ended {
            match rustix::io::read(&self.runner.control_out, &mut self.buffer[..]) {
                Ok(0) => self.control_ended = true,
                Ok(n) => {
                    self.from_runner.feed(self.buffer.get(..n).unwrap_or_default());
                    // A program that floods the pipe is heard a piece at a time.
                    break;
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        Ok(())
    }

    /// Blocks until the runner has taken everything.
    pub(super) fn flush_control(&mut self) -> Result<(), Stop> {
        let mut at = 0;
        while let Some(rest) = self.control_out.get(at..).filter(|r| !r.is_empty()) {
            match rustix::io::write(&self.runner.control_in, rest) {
                Ok(n) => at += n,
                Err(Errno::AGAIN | Errno::INTR) => {
                    let interest = Interest { control_room: true, output: true, ..Interest::default() };
                    let seen = self.wait(interest, None)?;
                    self.before_user_code(&seen)?;
                }
                Err(_) => {
                    // It is going: its last words, if any, are the reason.
                    self.read_control()?;
                    self.before_user_code(&Seen { ended: true, ..Seen::default() })?;
                }
            }
        }
        self.control_out.clear();
        Ok(())
    }
}

/// Blocks until the front has taken everything.
pub(crate) fn flush(out: &mut Vec<u8>, transport: &mut impl Transport) -> io::Result<()> {
    while !out.is_empty() {
        let taken = transport.send(out)?;
        out.drain(..taken);
        if taken == 0
            && let Some(fd) = transport.poll_fd()
        {
            match rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::OUT)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

/// The next whole frame.
pub(super) fn next(decoder: &mut Decoder) -> Result<Option<(Kind, &[u8])>, Stop> {
    decoder.next_frame().map_err(Stop::failed)
}
