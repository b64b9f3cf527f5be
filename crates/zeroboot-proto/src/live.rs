//! What is said in a sandbox that lives.
//!
//! ```text
//! front   0: Limits Identity Env* Live
//! agent   0: Started
//! front   7: Arg* Env* Code* Open(what)        7 is free: the front has seen no frame of it, or its End
//! agent   7: Started                           runs only
//! front   7: Stdin* StdinEnd Signal Resize     in any order, as it suits
//! agent   7: Stdout* Stderr* Result* Error Reply*
//! front   7: Close                             nobody waits any more
//! agent   7: End                               the last frame; 7 is free again
//! ```
//!
//! The front chooses channels, from 1 to [`MAX_CHANNEL`]. What does not begin a channel and names one that is not open is
//! left alone: it was on its way when the channel ended. An `Open` on a channel that is open, and a payload that is
//! malformed, end the sandbox.
//!
//! **Credit.** The bytes of `Stdout`, `Stderr`, `Result` and `Reply` on one channel, and those of `Stdin` in the other
//! direction, may be ahead of what the receiver has granted by [`WINDOW`] at the most. The front grants with `Credit`,
//! the agent with `Grant`, when it has passed bytes on. So a reader that is slow on one channel holds up no other.
//!
//! Typed payloads are [postcard](https://postcard.jamesmunns.com/wire-format). What comes from a sandbox is hostile: it is
//! decoded from one frame, so that a length can lie by no more than a frame's.

use alloc::{string::String, vec::Vec};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{MAX_PAYLOAD, PayloadError};

/// The highest channel.
pub const MAX_CHANNEL: u16 = 0x7fff;
/// Most channels that are open at once.
pub const MAX_OPEN: usize = 256;
/// Bytes that a sender may be ahead of what the receiver has granted.
pub const WINDOW: u32 = 256 * 1024;
/// Most bytes of all `Arg`, `Env` and `Code` that wait for their `Open`.
pub const MAX_PENDING: usize = 32 * 1024 * 1024;
/// Name of the context that exists from the start: the warm interpreter.
pub const DEFAULT_CONTEXT: &str = "default";
/// Most bytes of a context's name.
pub const MAX_NAME: usize = 64;
/// Most contexts of a sandbox.
pub const MAX_CONTEXTS: usize = 64;
/// Most entries that one list of a directory has.
pub const MAX_ENTRIES: usize = 100_000;

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// What a channel is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Open {
    /// The `Code` frames as a cell of a context. `End` is `Cell`, `Ended` or a refusal.
    Cell {
        /// The context's name.
        context: String,
        /// Timeout; the cell is then interrupted, and its interpreter killed if that does not help. `u64::MAX`: none.
        timeout_ns: u64,
    },
    /// The `Arg` frames as a program with its arguments; `Env` frames are added to the sandbox's environment.
    /// `Started` holds its process id (`u32` LE). `End` is `Ended` or a refusal.
    Command {
        /// Where it runs; the home directory if `None`.
        cwd: Option<String>,
        /// On a terminal of this size; its output is all `Stdout`. Else on pipes.
        terminal: Option<Size>,
        /// Standard input follows. Else it is at its end (on a terminal there is always one).
        stdin: bool,
        /// Timeout; all its processes are then killed. `u64::MAX`: none.
        timeout_ns: u64,
    },
    /// Something about contexts. Answered by `Reply`s.
    Context(ContextOp),
    /// Something about files.
    File(FileOp),
}

/// Something about contexts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContextOp {
    /// A new interpreter.
    Create {
        /// Its name, new.
        name: String,
        /// Its working directory; the home directory if `None`.
        cwd: Option<String>,
    },
    /// All of them: `Reply::Contexts`.
    List,
    /// Interrupts the cell that runs.
    Interrupt {
        /// Whose.
        name: String,
    },
    /// A new interpreter in the place of this one. What it ran is over.
    Restart {
        /// Which.
        name: String,
    },
    /// Ends the interpreter.
    Delete {
        /// Which.
        name: String,
    },
}

/// Something about files. Paths are absolute, or relative to the home directory. Resolved as the user of the code, without
/// magic links; `End` is `Done` or a refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileOp {
    /// A regular file: `Reply::Entry`, then its bytes as `Stdout`.
    Read {
        /// Which.
        path: String,
        /// First byte.
        offset: u64,
        /// Most bytes.
        length: u64,
    },
    /// A regular file, made with its parents and written from `Stdin` up to `StdinEnd`; then `Reply::Entry`. It appears
    /// under its name when it is whole.
    Write {
        /// Which.
        path: String,
        /// Permission bits; those of the file that was there, or 0644, if `None`.
        mode: Option<u16>,
    },
    /// `Reply::Entry`, of the link itself if it is one.
    Stat {
        /// Which.
        path: String,
    },
    /// What is in a directory: `Reply::Entries`.
    List {
        /// Which.
        path: String,
        /// 1: what is in it, 2: also what is in its directories, and so on.
        depth: u16,
    },
    /// A directory and its parents. It may be there.
    MakeDir {
        /// Which.
        path: String,
    },
    /// Gives it another name; replaces a file of that name.
    Move {
        /// Which.
        from: String,
        /// Its new name.
        to: String,
    },
    /// Removes a file, or a directory with all that is in it.
    Remove {
        /// Which.
        path: String,
        /// Also a directory that is not empty.
        recursive: bool,
    },
    /// Sets the permission bits.
    Chmod {
        /// Which.
        path: String,
        /// The low nine bits.
        mode: u16,
    },
    /// What changes below a directory, as `Reply::Changes`, until `Close`. The first, empty one says that it is watched.
    Watch {
        /// Which.
        path: String,
        /// Also in its directories.
        recursive: bool,
    },
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// One file.
    Entry(Entry),
    /// Some of a directory's. More may follow.
    Entries(Vec<Entry>),
    /// All contexts.
    Contexts(Vec<ContextInfo>),
    /// What has changed.
    Changes(Vec<Change>),
}

/// What a name in a file system stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A socket, FIFO or device.
    Other,
}

/// A file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Absolute. Bytes that are not UTF-8 are replaced.
    pub path: String,
    /// What it is.
    pub kind: EntryKind,
    /// Bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u16,
    /// Last change, milliseconds since 1970.
    pub modified_ms: i64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Where a link leads.
    pub target: Option<String>,
}

/// What happened to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChangeKind {
    /// It is there now.
    Created,
    /// Its bytes, or its permissions, are others.
    Modified,
    /// It is gone.
    Removed,
    /// Changes were lost: look again.
    Overflow,
}

/// A change below a watched directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Of which file.
    pub path: String,
    /// What.
    pub kind: ChangeKind,
}

/// A context, as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextInfo {
    /// Its name.
    pub name: String,
    /// Where it began.
    pub cwd: String,
    /// A cell runs in it.
    pub busy: bool,
    /// Cells that wait for it.
    pub waiting: u32,
    /// Cells that have begun in its interpreter.
    pub executions: u32,
}

/// Why nothing was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// No such file, or no such context.
    NotFound,
    /// The name is taken.
    Exists,
    /// The operation is not allowed; the code in the sandbox may not do it either.
    NotAllowed,
    /// It is a directory, or not one, or not a regular file.
    WrongKind,
    /// A directory is not empty.
    NotEmpty,
    /// No room: disk, processes, memory, descriptors, contexts.
    NoRoom,
    /// The path or name is none.
    BadName,
    /// The program could not be started.
    CannotStart,
    /// Anything else.
    Failed,
}

/// How what ran on a channel came to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum How {
    /// Done as asked: files and contexts.
    Done,
    /// A cell is over, and its context waits for the next.
    Cell(CellDone),
    /// A program ended with this status, 0 to 255.
    Exited(i32),
    /// A signal killed it.
    Signaled(i32),
    /// Its time passed.
    DeadlinePassed,
    /// It was killed for want of memory.
    OutOfMemory,
    /// It was closed by the front.
    Closed,
    /// Nothing was done. The text says why, for people.
    Refused(Refusal, String),
}

/// The last frame of a channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// How.
    pub how: How,
    /// Duration, nanoseconds.
    pub wall_ns: u64,
    /// A cell's interpreter is gone, and with it its state: it ended, or had to be killed.
    pub context_lost: bool,
}

/// How a cell ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CellStatus {
    /// Without an error.
    Ok,
    /// With an uncaught error.
    Error,
    /// It was interrupted.
    Interrupted,
}

/// A cell's end, as its runner says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CellDone {
    /// How.
    pub status: CellStatus,
    /// Its number in its context; the first is 1.
    pub execution_count: u32,
}

impl CellDone {
    /// Reads the payload of a `Done` frame.
    pub fn decode(payload: &[u8]) -> Result<CellDone, PayloadError> {
        let malformed = PayloadError("done");
        let (status, count) = payload.split_first().ok_or(malformed)?;
        let status = match status {
            0 => CellStatus::Ok,
            1 => CellStatus::Error,
            2 => CellStatus::Interrupted,
            _ => return Err(malformed),
        };
        let count = count.try_into().map_err(|_| malformed)?;
        Ok(CellDone { status, execution_count: u32::from_le_bytes(count) })
    }
}

/// A piece of what a cell shows: `u8 flags · u8 length of the MIME type · MIME type · data`. A result is one MIME bundle: each of its
/// types in one or more chunks, the last of all with `last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResultChunk<'a> {
    /// The value of the cell's last expression; else something that it displayed.
    pub main: bool,
    /// Goes on with the data of the chunk before.
    pub append: bool,
    /// The last chunk of this result.
    pub last: bool,
    /// Such as `text/plain`.
    pub mime: &'a str,
    /// Text is UTF-8.
    pub data: &'a [u8],
}

impl<'a> ResultChunk<'a> {
    const MAIN: u8 = 1;
    const APPEND: u8 = 2;
    const LAST: u8 = 4;

    /// Reads the payload of a `Result` frame.
    pub fn decode(payload: &'a [u8]) -> Result<ResultChunk<'a>, PayloadError> {
        let malformed = PayloadError("result");
        let [flags, len, rest @ ..] = payload else { return Err(malformed) };
        let (mime, data) = rest.split_at_checked(usize::from(*len)).ok_or(malformed)?;
        let mime = core::str::from_utf8(mime).map_err(|_| malformed)?;
        let known = flags & !(Self::MAIN | Self::APPEND | Self::LAST) == 0;
        let printable = mime.bytes().all(|b| b.is_ascii_graphic());
        if !known || mime.is_empty() || !printable {
            return Err(malformed);
        }
        let has = |flag| flags & flag != 0;
        Ok(ResultChunk { main: has(Self::MAIN), append: has(Self::APPEND), last: has(Self::LAST), mime, data })
    }

    /// The payload of a `Result` frame.
    pub fn encode(&self) -> Vec<u8> {
        let flag = |set: bool, flag: u8| u8::from(set) * flag;
        let mut out = Vec::with_capacity(2 + self.mime.len() + self.data.len());
        out.push(flag(self.main, Self::MAIN) | flag(self.append, Self::APPEND) | flag(self.last, Self::LAST));
        out.push(self.mime.len() as u8);
        out.extend_from_slice(self.mime.as_bytes());
        out.extend_from_slice(self.data);
        out
    }
}

/// The payload of a typed frame: [`Open`], [`Size`], [`Reply`], [`End`].
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    // Only types that say they cannot be serialised fail, and ours do not.
    postcard::to_allocvec(value).unwrap_or_default()
}

/// Reads the payload of a typed frame. Bytes behind the value are malformed.
pub fn decode<T: DeserializeOwned>(payload: &[u8]) -> Result<T, PayloadError> {
    match postcard::take_from_bytes(payload) {
        Ok((value, [])) => Ok(value),
        _ => Err(PayloadError("typed")),
    }
}

/// Reads the payload of `Credit` and `Grant`.
pub fn decode_credit(payload: &[u8]) -> Result<u32, PayloadError> {
    Ok(u32::from_le_bytes(payload.try_into().map_err(|_| PayloadError("credit"))?))
}

/// Puts entries into as many replies as frames need.
pub fn replies<T>(items: Vec<T>, wrap: fn(Vec<T>) -> Reply, size: fn(&T) -> usize) -> Vec<Vec<u8>> {
    let (mut out, mut part, mut held) = (Vec::new(), Vec::new(), 0);
    for item in items {
        let bytes = size(&item);
        if held + bytes > MAX_PAYLOAD / 2 && !part.is_empty() {
            out.push(encode(&wrap(core::mem::take(&mut part))));
            held = 0;
        }
        held += bytes;
        part.push(item);
    }
    out.push(encode(&wrap(part)));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn typed_payloads_come_back_as_sent_and_nothing_may_follow_them() {
        let open = Open::Command {
            cwd: Some("/tmp".into()),
            terminal: Some(Size { columns: 80, rows: 24 }),
            stdin: true,
            timeout_ns: u64::MAX,
        };
        let mut bytes = encode(&open);
        assert_eq!(decode::<Open>(&bytes), Ok(open));
        bytes.push(0);
        assert!(decode::<Open>(&bytes).is_err());
        let end = End { how: How::Refused(Refusal::NotFound, "no".into()), wall_ns: 3, context_lost: false };
        assert_eq!(decode::<End>(&encode(&end)), Ok(end));
    }

    #[test]
    fn a_cells_end_is_five_bytes() {
        let done = CellDone { status: CellStatus::Interrupted, execution_count: 7 };
        assert_eq!(CellDone::decode(&[2, 7, 0, 0, 0]), Ok(done));
        for bad in [&[][..], &[3, 0, 0, 0, 0], &[0, 0, 0, 0], &[0, 0, 0, 0, 0, 0]] {
            assert!(CellDone::decode(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_result_with_a_lying_length_or_a_strange_type_is_refused() {
        for bad in [&[][..], &[0], &[0, 0], &[0, 9, b'a'], &[8, 1, b'a'], &[0, 1, b' '], &[0, 1, 0xff]] {
            assert!(ResultChunk::decode(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn many_entries_are_many_frames() {
        let entry = |n: usize| Change { path: alloc::format!("{n:0>900}"), kind: ChangeKind::Created };
        let all: Vec<Change> = (0..200).map(entry).collect();
        let parts = replies(all.clone(), Reply::Changes, |change| change.path.len() + 8);
        assert!(parts.len() > 1 && parts.iter().all(|part| part.len() <= MAX_PAYLOAD));
        let back: Vec<Change> = parts
            .iter()
            .flat_map(|part| match decode(part) {
                Ok(Reply::Changes(changes)) => changes,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(back, all);
    }

    proptest! {
        #[test]
        fn results_come_back_as_sent(
            main: bool, append: bool, last: bool, mime in "[a-z]{1,20}/[a-z+]{1,20}",
            data in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let chunk = ResultChunk { main, append, last, mime: &mime, data: &data };
            let bytes = chunk.encode();
            prop_assert_eq!(ResultChunk::decode(&bytes), Ok(chunk));
        }

        #[test]
        fn no_payload_makes_a_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode::<Open>(&bytes);
            let _ = decode::<Reply>(&bytes);
            let _ = decode::<End>(&bytes);
            let _ = decode::<Size>(&bytes);
            let _ = CellDone::decode(&bytes);
            let _ = ResultChunk::decode(&bytes);
            let _ = decode_credit(&bytes);
        }
    }
}
