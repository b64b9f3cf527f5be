//! The control channel between the front process and a zygote: a `SOCK_SEQPACKET` pair on which one
//! message is one packet, with descriptors beside it.
//!
//! ```text
//! front  -> zygote   Fork{id}            + [worker socket, cgroup.procs if there is a cgroup]
//! zygote -> front    Forked{id}          + [pidfd of the worker, its delta if it is a VM]
//! zygote -> front    ForkFailed{id,text}
//! zygote -> front    Image{text}         once, before the second fork
//! front  -> zygote   Checkpoint{id}      + [control channel of the new zygote, delta]
//! zygote -> front    Forked{id}          + [pidfd of the zygote of the checkpoint]
//! its zygote -> front   Taken{bytes}     first of all: the delta was copied and is empty again
//! ```
//!
//! The zygote ends when the channel is at its end: the front is gone. What the zygote says of its
//! warm-up goes as `Ready` or `Failure` frames on a second socket, [`REPORT_FD`].

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Where a zygote finds the socket for its `Ready` or `Failure` frame.
pub const REPORT_FD: i32 = 3;
/// Where a zygote finds its control channel.
pub const CONTROL_FD: i32 = 4;
/// Where a zygote's runtime finds a `/proc` in which it may write its children's maps. The one that it sees is read-only.
pub const PROC_FD: i32 = 5;

/// Longest text of a message, bytes.
const MAX_TEXT: usize = 2048;
const MAX_FDS: usize = 2;

/// What travels on the control channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// Make a worker.
    Fork {
        /// Chosen by the front.
        id: u64,
    },
    /// A worker was made.
    Forked {
        /// As asked.
        id: u64,
    },
    /// No worker was made.
    ForkFailed {
        /// As asked.
        id: u64,
        /// Why.
        text: String,
    },
    /// Make a zygote of a checkpoint: what its delta holds over the memory of this one.
    Checkpoint {
        /// Chosen by the front.
        id: u64,
    },
    /// From a zygote of a checkpoint: it has taken its delta.
    Taken {
        /// Bytes of pages.
        bytes: u64,
    },
    /// What became of the warm memory: how much the forks share from now on, and what could not be moved.
    Image {
        /// For the log.
        text: String,
    },
}

impl Control {
    fn encode(&self) -> Vec<u8> {
        let (tag, id, text) = match self {
            Control::Fork { id } => (1u8, id, ""),
            Control::Forked { id } => (2, id, ""),
            Control::ForkFailed { id, text } => (3, id, text.as_str()),
            Control::Image { text } => (4, &0, text.as_str()),
            Control::Checkpoint { id } => (5, id, ""),
            Control::Taken { bytes } => (6, bytes, ""),
        };
        let mut out = vec![tag];
        out.extend_from_slice(&id.to_le_bytes());
        out.extend_from_slice(text.as_bytes().get(..MAX_TEXT).unwrap_or(text.as_bytes()));
        out
    }

    fn decode(bytes: &[u8]) -> Option<Control> {
        let (&tag, rest) = bytes.split_first()?;
        let (id, text) = rest.split_first_chunk::<8>()?;
        let id = u64::from_le_bytes(*id);
        match tag {
            1 if text.is_empty() => Some(Control::Fork { id }),
            2 if text.is_empty() => Some(Control::Forked { id }),
            3 => Some(Control::ForkFailed { id, text: String::from_utf8_lossy(text).into_owned() }),
            5 if text.is_empty() => Some(Control::Checkpoint { id }),
            6 if text.is_empty() => Some(Control::Taken { bytes: id }),
            4 if id == 0 => Some(Control::Image { text: String::from_utf8_lossy(text).into_owned() }),
            _ => None,
        }
    }
}

/// Sends one message with up to two descriptors. The descriptors stay the caller's.
pub fn send(channel: impl AsFd, message: &Control, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors for one control message"));
    }
    let bytes = message.encode();
    let sent = rustix::io::retry_on_intr(|| {
        sendmsg(channel.as_fd(), &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)
    })?;
    if sent == bytes.len() { Ok(()) } else { Err(io::Error::other("control message was cut short")) }
}

/// Receives one message and its descriptors (close-on-exec). `None`: the other side is gone. If this process may have no
/// more descriptors and one was lost, none is given: nobody goes on with a part of them.
pub fn receive(channel: impl AsFd) -> io::Result<Option<(Control, Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0u8; 16 + MAX_TEXT];
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(channel.as_fd(), &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        fds.clear();
    }
    let message = bytes.get(..received.bytes).and_then(Control::decode);
    match message {
        Some(message) => Ok(Some((message, fds))),
        None => Err(io::Error::other("malformed control message")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    #[test]
    fn messages_and_descriptors_arrive_as_sent() {
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let (r, w) = rustix::pipe::pipe().unwrap();
        send(&a, &Control::Fork { id: 7 }, &[w.as_fd()]).unwrap();
        send(&a, &Control::ForkFailed { id: 8, text: "no".into() }, &[]).unwrap();
        send(&a, &Control::Image { text: "9 KiB".into() }, &[]).unwrap();
        drop((a, w));
        let (message, fds) = receive(&b).unwrap().unwrap();
        assert_eq!((message, fds.len()), (Control::Fork { id: 7 }, 1));
        rustix::io::write(&fds[0], b"x").unwrap();
        let mut byte = [0];
        assert_eq!(rustix::io::read(&r, &mut byte).unwrap(), 1);
        assert_eq!(receive(&b).unwrap().unwrap().0, Control::ForkFailed { id: 8, text: "no".into() });
        assert_eq!(receive(&b).unwrap().unwrap().0, Control::Image { text: "9 KiB".into() });
        assert!(receive(&b).unwrap().is_none());
    }
}
