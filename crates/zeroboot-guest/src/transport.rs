//! How frames travel between the agent and the front.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{RecvFlags, SendFlags};
use zeroboot_proto::Decoder;

/// What [`Transport::receive`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// Bytes were fed to the decoder.
    Bytes,
    /// Nothing now.
    Nothing,
    /// The front is gone: everything in the sandbox has to end.
    Closed,
}

/// A way to the front. Two kinds: a socket, which is polled; and a mailbox, which has no descriptor and moves
/// bytes only when the agent rings ([`Transport::send`] and [`Transport::receive`] do).
pub(crate) trait Transport {
    /// What to poll for input and for room, if there is such a thing. With `None`, `receive` is called until the run
    /// begins whenever the agent has nothing else to do, and then when `wake_fd` is readable.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>>;

    /// What is readable when there may be input, for a transport that is not polled itself. `receive` resets it.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Feeds what has come to `decoder`. A transport with a descriptor must not block; one without may (a VM
    /// stands still meanwhile: this is where a template is frozen).
    fn receive(&mut self, decoder: &mut Decoder) -> io::Result<Received>;

    /// Whether [`Transport::receive`] has something without waiting: it came along with what was sent.
    fn has_input(&self) -> bool {
        false
    }

    /// Takes a prefix of `frames` (whole frames when the call began with whole frames) and says how long it was.
    /// 0: no room now, poll for it. One without a descriptor must take something.
    fn send(&mut self, frames: &[u8]) -> io::Result<usize>;
}

/// A Unix stream socket: the process engine, and tests.
pub(crate) struct SocketTransport {
    socket: OwnedFd,
    buffer: Box<[u8]>,
}

impl SocketTransport {
    /// Over a connected stream socket.
    pub(crate) fn new(socket: OwnedFd) -> SocketTransport {
        SocketTransport { socket, buffer: vec![0; 64 * 1024].into_boxed_slice() }
    }
}

impl Transport for SocketTransport {
    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.socket.as_fd())
    }

    fn receive(&mut self, decoder: &mut Decoder) -> io::Result<Received> {
        match rustix::net::recv(&self.socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => Ok(Received::Closed),
            Ok((n, _)) => {
                decoder.feed(self.buffer.get(..n).unwrap_or_default());
                Ok(Received::Bytes)
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(Received::Nothing),
            Err(rustix::io::Errno::CONNRESET | rustix::io::Errno::PIPE) => Ok(Received::Closed),
            Err(error) => Err(error.into()),
        }
    }

    fn send(&mut self, frames: &[u8]) -> io::Result<usize> {
        match rustix::net::send(&self.socket, frames, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(n) => Ok(n),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }
}
