//! Waiting: one poll over everything that can wake the agent.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::watchdog::TICK;
use super::{Stop, Supervisor};
use crate::transport::Transport;

/// What [`Supervisor::wait`] saw. A closed descriptor counts as readable.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) front: bool,
    pub(super) control: bool,
    pub(super) stdout: bool,
    pub(super) stderr: bool,
    pub(super) stdin: bool,
    pub(super) ended: bool,
}

/// What [`Supervisor::wait`] waits for, beside the runner's end and the front's.
#[derive(Clone, Copy, Default)]
pub(super) struct Interest {
    pub(super) front_input: bool,
    pub(super) control_room: bool,
    pub(super) output: bool,
    pub(super) stdin_room: bool,
}

impl<T: Transport> Supervisor<T> {
    /// Waits for something to do. The front's end is always watched, and is [`Stop::FrontGone`].
    pub(super) fn wait(&mut self, interest: Interest, timeout: Option<Duration>) -> Result<Seen, Stop> {
        #[derive(Clone, Copy, PartialEq)]
        enum Who {
            Front,
            Control,
            ControlRoom,
            Stdout,
            Stderr,
            Stdin,
            Ended,
        }
        let mut who = Vec::with_capacity(6);
        let mut fds = Vec::with_capacity(6);
        let front = self.transport.poll_fd();
        if let Some(fd) = &front {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, interest.front_input);
            flags.set(PollFlags::OUT, !self.out.is_empty());
            who.push(Who::Front);
            fds.push(PollFd::new(fd, flags));
        }
        // Behind the end of standard input nothing is fetched that would reset it.
        let wake = self.transport.wake_fd().filter(|_| interest.front_input && !self.stdin_ended);
        if let Some(fd) = &wake {
            who.push(Who::Front);
            fds.push(PollFd::new(fd, PollFlags::IN));
        }
        if !self.control_ended {
            who.push(Who::Control);
            fds.push(PollFd::new(&self.runner.control_out, PollFlags::IN));
        }
        if interest.control_room {
            who.push(Who::ControlRoom);
            fds.push(PollFd::new(&self.runner.control_in, PollFlags::OUT));
        }
        for (name, end) in [(Who::Stdout, &self.runner.stdout), (Who::Stderr, &self.runner.stderr)] {
            if let Some(fd) = end.as_ref().filter(|_| interest.output) {
                who.push(name);
                fds.push(PollFd::new(fd, PollFlags::IN));
            }
        }
        if let Some(fd) = self.runner.stdin.as_ref().filter(|_| interest.stdin_room) {
            who.push(Who::Stdin);
            fds.push(PollFd::new(fd, PollFlags::OUT));
        }
        if let Some(fd) = &self.runner.ended {
            who.push(Who::Ended);
            fds.push(PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN));
        }
        // Without a pidfd the end is found by looking.
        let blind = self.runner.ended.is_none();
        let timeout = if blind { Some(timeout.unwrap_or(TICK).min(TICK)) } else { timeout };
        let timespec = timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
        match rustix::event::poll(&mut fds, timespec.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let mut seen = Seen { ended: blind, ..Seen::default() };
        for (name, fd) in who.iter().zip(&fds) {
            let events = fd.revents();
            let input = events.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
            match name {
                Who::Front => {
                    if events.intersects(PollFlags::HUP | PollFlags::ERR) {
                        return Err(Stop::FrontGone);
                    }
                    seen.front = events.contains(PollFlags::IN);
                }
                Who::Control => seen.control = input,
                Who::ControlRoom => {}
                Who::Stdout => seen.stdout = input,
                Who::Stderr => seen.stderr = input,
                Who::Stdin => seen.stdin = events.intersects(PollFlags::OUT | PollFlags::ERR),
                Who::Ended => seen.ended = input,
            }
        }
        drop(fds);
        if blind {
            self.reap();
            seen.ended = self.status.is_some();
        }
        Ok(seen)
    }
}
