//! The other end of a worker's socket, as its session sees it.

use std::io;

/// The other end: the server, or a test. Whenever there is something to receive, or its end is there, it kicks the thread of
/// the session ([`zeroboot_sys::kick`]): a guest that waits for input asks for none.
pub trait Front {
    /// Appends what has come to `into`. With `wait` it blocks until something has.
    fn receive(&mut self, into: &mut Vec<u8>, wait: bool) -> io::Result<Received>;
    /// Sends all of `bytes`.
    fn send(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Whether the other end is closed, even if there are bytes of it that [`Front::receive`] was not called for.
    fn gone(&mut self) -> io::Result<bool>;
}

/// What [`Front::receive`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Bytes, appended.
    Bytes,
    /// Nothing now.
    Nothing,
    /// The other end is closed.
    Gone,
}
