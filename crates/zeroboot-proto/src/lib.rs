//! Frames: what server, worker, guest agent and runner say to each other.
//!
//! One frame is an 8-byte header and a payload of at most [`MAX_PAYLOAD`] bytes:
//!
//! ```text
//! offset 0  u32 LE  payload length in bytes
//! offset 4  u8      kind
//! offset 5  u8      zero
//! offset 6  u16 LE  channel; 0 is the sandbox itself
//! offset 8  payload
//! ```
//!
//! The same frames travel on the Unix socket between server and worker (both engines), through the
//! mailbox pages between VM worker and guest agent, and on the control descriptor between agent and
//! runner. A longer value (code, a file, a stream) is several frames of one kind, in order.
//!
//! A sandbox that runs one program speaks on channel 0 alone. One that lives ([`live`]) has a channel for each run and
//! each file operation.
//!
//! The sender of a sandbox-side frame is hostile: decoding never panics, never allocates by a length
//! that was not checked, and an unknown kind or a malformed payload is an error for the whole
//! connection.
#![no_std]

extern crate alloc;

mod frame;
pub mod live;
pub mod mailbox;
mod message;
pub mod pattern;
mod payload;

pub use frame::{
    Decoder, Frame, FrameError, HEADER_LEN, Header, Kind, MAX_FRAME, MAX_PAYLOAD, encode, encode_header, encode_on,
};
pub use message::{Command, ENDED, HINT, MAX_HINT, Message, Note};
pub use payload::{Ending, ExitReport, FileChunk, Identity, Limits, PayloadError};

/// The version of this protocol. Server, worker and agent of one build always agree; a template
/// records it, because it holds a frozen agent.
pub const VERSION: u16 = 2;
