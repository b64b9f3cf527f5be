//! Frames as typed values: [`Command`] towards the sandbox, [`Message`] from it.

use crate::{ExitReport, FileChunk, Identity, Kind, Limits, PayloadError};

/// What a runner tells its agent beside its output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Note {
    /// The code ended by an uncaught out-of-memory error of its language.
    OutOfMemory = 1,
}

/// First byte of a note of two that says that the program has ended; the second is its status.
pub const ENDED: u8 = 2;

/// First byte of a note that is a hint; one line of text follows.
pub const HINT: u8 = 3;
/// Most bytes of a hint's text.
pub const MAX_HINT: usize = 400;

/// One frame towards the sandbox.
#[derive(Debug, PartialEq, Eq)]
pub enum Command<'a> {
    /// Bytes of the code.
    Code(&'a [u8]),
    /// One argument.
    Arg(&'a [u8]),
    /// One environment variable.
    Env(&'a [u8], &'a [u8]),
    /// A chunk of a file to write.
    Put(FileChunk<'a>),
    /// A path to bring back.
    Get(&'a [u8]),
    /// Bytes for standard input.
    Stdin(&'a [u8]),
    /// Standard input is at its end.
    StdinEnd,
    /// What to enforce.
    Limits(Limits),
    /// What must differ per fork.
    Identity(Identity),
    /// Start.
    Run,
    /// Live on.
    Live,
}

impl<'a> Command<'a> {
    /// Reads a frame of a kind below 0x80.
    pub fn decode(kind: Kind, payload: &'a [u8]) -> Result<Command<'a>, PayloadError> {
        Ok(match kind {
            Kind::Code => Command::Code(payload),
            Kind::Arg if !payload.contains(&0) => Command::Arg(payload),
            Kind::Env => {
                let at = payload.iter().position(|&b| b == 0).ok_or(PayloadError("env"))?;
                let (key, rest) = payload.split_at_checked(at).ok_or(PayloadError("env"))?;
                let value = rest.get(1..).unwrap_or_default();
                if key.is_empty() || key.contains(&b'=') || value.contains(&0) {
                    return Err(PayloadError("env"));
                }
                Command::Env(key, value)
            }
            Kind::Put => Command::Put(FileChunk::decode(payload)?),
            Kind::Get if !payload.is_empty() && payload.len() <= FileChunk::MAX_PATH && !payload.contains(&0) => {
                Command::Get(payload)
            }
            Kind::Stdin => Command::Stdin(payload),
            Kind::StdinEnd => Command::StdinEnd,
            Kind::Limits => Command::Limits(Limits::decode(payload)?),
            Kind::Identity => Command::Identity(Identity::decode(payload)?),
            Kind::Run => Command::Run,
            Kind::Live if payload.is_empty() => Command::Live,
            _ => return Err(PayloadError("command")),
        })
    }
}

/// One frame from the sandbox. Hostile.
#[derive(Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// Warm and waiting.
    Ready,
    /// The run has begun.
    Started,
    /// Bytes of standard output.
    Stdout(&'a [u8]),
    /// Bytes of standard error.
    Stderr(&'a [u8]),
    /// A chunk of an output file.
    File(FileChunk<'a>),
    /// How it ended.
    Exit(ExitReport),
    /// The sandbox could not do what was asked.
    Failure(&'a str),
    /// Why a worker calls its guest crashed. A guest can have a say in it.
    Crash(&'a [u8]),
    /// A runner's note to its agent.
    Note(Note),
    /// A runner's word to its agent: the program has ended with this status and has written all its output, and its
    /// process waits to be thrown away.
    Ended(u8),
    /// One line about an uncaught error, where the sandbox knows more than the code does: printable text.
    Hint(&'a str),
}

impl<'a> Message<'a> {
    /// Reads a frame of a kind from 0x80.
    pub fn decode(kind: Kind, payload: &'a [u8]) -> Result<Message<'a>, PayloadError> {
        Ok(match kind {
            Kind::Ready => Message::Ready,
            Kind::Started => Message::Started,
            Kind::Stdout => Message::Stdout(payload),
            Kind::Stderr => Message::Stderr(payload),
            Kind::File => Message::File(FileChunk::decode(payload)?),
            Kind::Exit => Message::Exit(ExitReport::decode(payload)?),
            Kind::Failure => Message::Failure(core::str::from_utf8(payload).map_err(|_| PayloadError("failure"))?),
            Kind::Crash => Message::Crash(payload),
            Kind::Note if payload == [Note::OutOfMemory as u8] => Message::Note(Note::OutOfMemory),
            Kind::Note if payload.len() == 2 && payload.first() == Some(&ENDED) => {
                Message::Ended(payload.last().copied().unwrap_or_default())
            }
            Kind::Note if payload.first() == Some(&HINT) => Message::Hint(hint(payload)?),
            _ => return Err(PayloadError("message")),
        })
    }
}

/// It is shown to people: no control character, and nothing that turns the direction of a text.
fn hint(payload: &[u8]) -> Result<&str, PayloadError> {
    let text = core::str::from_utf8(payload.get(1..).unwrap_or_default()).map_err(|_| PayloadError("hint"))?;
    let unfit =
        |c: char| c.is_control() || ('\u{2028}'..='\u{202e}').contains(&c) || ('\u{2066}'..='\u{2069}').contains(&c);
    if text.is_empty() || text.len() > MAX_HINT || text.contains(unfit) {
        return Err(PayloadError("hint"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_environment_variable_is_split_at_its_first_nul() {
        assert_eq!(Command::decode(Kind::Env, b"A\0b=c"), Ok(Command::Env(b"A", b"b=c")));
        assert!(Command::decode(Kind::Env, b"A=B\0c").is_err());
        assert!(Command::decode(Kind::Env, b"\0c").is_err());
        assert!(Command::decode(Kind::Env, b"A").is_err());
    }

    #[test]
    fn a_command_is_not_a_message() {
        assert!(Command::decode(Kind::Stdout, b"x").is_err());
        assert!(Message::decode(Kind::Code, b"x").is_err());
    }

    #[test]
    fn a_note_is_exactly_its_bytes() {
        assert_eq!(Message::decode(Kind::Note, &[1]), Ok(Message::Note(Note::OutOfMemory)));
        for bad in [&b""[..], b"\0", b"\x01\0", b"\x02", b"\x02\0\0", b"\x03", b"\x03\0"] {
            assert!(Message::decode(Kind::Note, bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_hint_is_one_line_of_text() {
        assert_eq!(Message::decode(Kind::Note, b"\x03read this"), Ok(Message::Hint("read this")));
        let long = [&[HINT][..], &[b'x'; MAX_HINT + 1]].concat();
        for bad in [&b"\x03a\nb"[..], b"\x03\x1b[2J", b"\x03\xff", "\u{3}a\u{202e}b".as_bytes(), &long] {
            assert!(Message::decode(Kind::Note, bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn the_end_of_a_program_is_told_with_any_status(status in any::<u8>()) {
            let note = [ENDED, status];
            prop_assert_eq!(Message::decode(Kind::Note, &note), Ok(Message::Ended(status)));
        }

        #[test]
        fn no_frame_makes_them_panic(kind in 0..Kind::ALL.len(), bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Command::decode(Kind::ALL[kind], &bytes);
            let _ = Message::decode(Kind::ALL[kind], &bytes);
        }
    }
}
