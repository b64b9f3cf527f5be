//! The header and the incremental decoder.

use alloc::vec::Vec;

/// Bytes of a frame header.
pub const HEADER_LEN: usize = 8;
/// Most bytes of a whole frame: the mailbox data area of a VM holds one.
pub const MAX_FRAME: usize = 64 * 1024;
/// Most bytes of one payload.
pub const MAX_PAYLOAD: usize = MAX_FRAME - HEADER_LEN;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $value:literal),* $(,)?) => {
        /// What a frame carries. Values below 0x80 go towards the sandbox, the others come from it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Kind { $($(#[$doc])* $name = $value),* }

        impl Kind {
            /// Every kind, for tests and fuzzing.
            pub const ALL: &'static [Kind] = &[$(Kind::$name),*];

            /// The kind with this number, if there is one.
            pub fn from_u8(value: u8) -> Option<Kind> {
                match value { $($value => Some(Kind::$name),)* _ => None }
            }
        }
    };
}

kinds! {
    /// Bytes of the code; several frames append.
    Code = 0x01,
    /// One argument (UTF-8 or not); the first is `argv[0]`.
    Arg = 0x02,
    /// One environment variable: `KEY NUL VALUE`.
    Env = 0x03,
    /// A chunk of a file to write before the run: [`crate::FileChunk`].
    Put = 0x04,
    /// A path to bring back after the run.
    Get = 0x05,
    /// Bytes for standard input.
    Stdin = 0x06,
    /// Standard input is at its end.
    StdinEnd = 0x07,
    /// [`crate::Limits`].
    Limits = 0x08,
    /// [`crate::Identity`]: what must differ in each fork. Before any user code.
    Identity = 0x09,
    /// Start the run: no more `Code`, `Arg`, `Env`, `Put`, `Get` follow.
    Run = 0x0a,
    /// Agent to runner: the working directory to go to, before `Serve`.
    Cwd = 0x0b,
    /// Agent to runner, instead of `Run`: be a context, which runs cells until the channel ends.
    Serve = 0x0c,
    /// Agent to runner: run the `Code` that came before as a cell. Answered by `Result`s, at most one `Error`, one `Done`.
    Cell = 0x0d,
    /// The sandbox lives on instead of running one program: from now on, channels. See [`crate::live`].
    Live = 0x0e,
    /// Begins what a channel is for: [`crate::live::Open`], after its `Arg`, `Env` and `Code`.
    Open = 0x0f,
    /// A signal's number, one byte, for the run of this channel.
    Signal = 0x10,
    /// A terminal's new size: [`crate::live::Size`].
    Resize = 0x11,
    /// This channel has no reader any more: its run is stopped. It still ends with `End`.
    Close = 0x12,
    /// Bytes that the front takes more on this channel: `u32`.
    Credit = 0x13,
    /// Come to rest for a checkpoint: what was said before this is over, and the answer is `Frozen`. Nothing follows before it.
    Freeze = 0x14,

    /// The worker (or the runner) is warm and waits for a request. Empty payload.
    Ready = 0x81,
    /// The run has begun. Empty payload.
    Started = 0x82,
    /// Bytes of standard output.
    Stdout = 0x83,
    /// Bytes of standard error.
    Stderr = 0x84,
    /// A chunk of a file that was asked for: [`crate::FileChunk`].
    File = 0x85,
    /// How the run ended: [`crate::ExitReport`]. The last frame.
    Exit = 0x86,
    /// The sandbox could not do what it was asked: UTF-8 text. The last frame.
    Failure = 0x87,
    /// Runner to agent: one byte, [`crate::Note`], or [`crate::ENDED`] and a status.
    Note = 0x88,
    /// Worker to front, ahead of [`Kind::Exit`]: why it calls the guest crashed; text for the log.
    Crash = 0x89,
    /// Part of what a cell shows: [`crate::live::ResultChunk`].
    Result = 0x8a,
    /// The uncaught error of a cell: JSON, `{"name", "value", "traceback"}`.
    Error = 0x8b,
    /// Runner to agent: the cell is over. `u8` status, `u32` execution count: [`crate::live::CellDone`].
    Done = 0x8c,
    /// Part of an answer: [`crate::live::Reply`].
    Reply = 0x8d,
    /// The last frame of a channel: [`crate::live::End`].
    End = 0x8e,
    /// Bytes that the sandbox takes more on this channel: `u32`.
    Grant = 0x8f,
    /// The sandbox is at rest: what comes after this was written after the checkpoint, if there is one. From a worker: the
    /// checkpoint was taken, or why not, as UTF-8 text.
    Frozen = 0x90,
}

/// Why bytes are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// The header names a payload above [`MAX_PAYLOAD`].
    TooLong(u32),
    /// No [`Kind`] has this number.
    UnknownKind(u8),
    /// The reserved header byte is not zero.
    Reserved,
    /// A frame of this channel came where only the sandbox itself (channel 0) speaks.
    Channel(u16),
}

impl core::fmt::Display for FrameError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            FrameError::TooLong(n) => write!(f, "frame payload of {n} bytes is above the limit of {MAX_PAYLOAD}"),
            FrameError::UnknownKind(k) => write!(f, "unknown frame kind {k:#04x}"),
            FrameError::Reserved => f.write_str("the reserved header byte is not zero"),
            FrameError::Channel(n) => write!(f, "a frame of channel {n} where there are no channels"),
        }
    }
}

impl core::error::Error for FrameError {}

/// A checked frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the payload is.
    pub kind: Kind,
    /// What it belongs to; 0 is the sandbox itself.
    pub channel: u16,
    /// Payload bytes, at most [`MAX_PAYLOAD`].
    pub len: usize,
}

impl Header {
    /// Checks the eight bytes of a header.
    pub fn parse(bytes: [u8; HEADER_LEN]) -> Result<Header, FrameError> {
        let [a, b, c, d, kind, reserved, lo, hi] = bytes;
        let len = u32::from_le_bytes([a, b, c, d]);
        if len as usize > MAX_PAYLOAD {
            return Err(FrameError::TooLong(len));
        }
        if reserved != 0 {
            return Err(FrameError::Reserved);
        }
        let kind = Kind::from_u8(kind).ok_or(FrameError::UnknownKind(kind))?;
        Ok(Header { kind, channel: u16::from_le_bytes([lo, hi]), len: len as usize })
    }
}

/// The header of a payload of `len` bytes, which must be at most [`MAX_PAYLOAD`].
pub fn encode_header(channel: u16, kind: Kind, len: usize) -> [u8; HEADER_LEN] {
    debug_assert!(len <= MAX_PAYLOAD);
    let [a, b, c, d] = (len as u32).to_le_bytes();
    let [lo, hi] = channel.to_le_bytes();
    [a, b, c, d, kind as u8, 0, lo, hi]
}

/// Appends `data` to `out` as frames of `kind` of the sandbox itself, split at [`MAX_PAYLOAD`]; an empty `data` is one
/// empty frame.
pub fn encode(out: &mut Vec<u8>, kind: Kind, data: &[u8]) {
    encode_on(out, 0, kind, data);
}

/// As [`encode`], on a channel.
pub fn encode_on(out: &mut Vec<u8>, channel: u16, kind: Kind, data: &[u8]) {
    if data.is_empty() {
        out.extend_from_slice(&encode_header(channel, kind, 0));
    }
    for chunk in data.chunks(MAX_PAYLOAD) {
        out.extend_from_slice(&encode_header(channel, kind, chunk.len()));
        out.extend_from_slice(chunk);
    }
}

/// A whole frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// What it belongs to; 0 is the sandbox itself.
    pub channel: u16,
    /// What the payload is.
    pub kind: Kind,
    /// Its bytes.
    pub payload: &'a [u8],
}

/// Turns a stream of bytes into frames. Holds at most one frame's bytes beyond what was fed.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that were handed out already.
    taken: usize,
}

impl Decoder {
    /// An empty decoder.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// Takes bytes as they came.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.taken > 0 {
            self.buffer.drain(..self.taken);
            self.taken = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame of the sandbox itself, or `None` until more bytes come. A frame of a channel is an error:
    /// for streams without channels. After an error the stream is lost.
    pub fn next_frame(&mut self) -> Result<Option<(Kind, &[u8])>, FrameError> {
        match self.next_on_any()? {
            Some(Frame { channel: 0, kind, payload }) => Ok(Some((kind, payload))),
            Some(frame) => Err(FrameError::Channel(frame.channel)),
            None => Ok(None),
        }
    }

    /// The next whole frame and its channel, or `None` until more bytes come. After an error the stream is lost.
    pub fn next_on_any(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        let rest = self.buffer.get(self.taken..).unwrap_or_default();
        let Some((header, after)) = rest.split_first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let header = Header::parse(*header)?;
        let Some(payload) = after.get(..header.len) else {
            return Ok(None);
        };
        self.taken += HEADER_LEN + header.len;
        Ok(Some(Frame { channel: header.channel, kind: header.kind, payload }))
    }

    /// Bytes that were fed and not handed out.
    pub fn rest(&self) -> &[u8] {
        self.buffer.get(self.taken..).unwrap_or_default()
    }

    /// Whether bytes of an unfinished frame are held.
    pub fn is_mid_frame(&self) -> bool {
        self.buffer.len() > self.taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_length_above_the_limit_is_refused_before_any_payload_comes() {
        let mut decoder = Decoder::new();
        decoder.feed(&[0xff, 0xff, 0xff, 0x7f, 0x83, 0, 0, 0]);
        assert_eq!(decoder.next_frame(), Err(FrameError::TooLong(0x7fff_ffff)));
    }

    #[test]
    fn reserved_bytes_and_unknown_kinds_are_refused() {
        assert_eq!(Header::parse([0, 0, 0, 0, 0x83, 1, 0, 0]), Err(FrameError::Reserved));
        assert_eq!(Header::parse([0, 0, 0, 0, 0x70, 0, 0, 0]), Err(FrameError::UnknownKind(0x70)));
    }

    #[test]
    fn a_channel_comes_back_as_sent_and_is_refused_where_there_are_none() {
        let mut bytes = Vec::new();
        encode_on(&mut bytes, 0x8001, Kind::Stdout, b"x");
        let mut decoder = Decoder::new();
        decoder.feed(&bytes);
        assert_eq!(decoder.next_on_any(), Ok(Some(Frame { channel: 0x8001, kind: Kind::Stdout, payload: b"x" })));
        decoder.feed(&bytes);
        assert_eq!(decoder.next_frame(), Err(FrameError::Channel(0x8001)));
    }

    #[test]
    fn a_long_value_is_split_and_an_empty_one_is_one_frame() {
        let mut bytes = Vec::new();
        encode(&mut bytes, Kind::Code, &alloc::vec![7; MAX_PAYLOAD + 1]);
        encode(&mut bytes, Kind::Run, &[]);
        let mut decoder = Decoder::new();
        decoder.feed(&bytes);
        let mut lens = Vec::new();
        while let Some((kind, payload)) = decoder.next_frame().unwrap() {
            lens.push((kind, payload.len()));
        }
        assert_eq!(lens, [(Kind::Code, MAX_PAYLOAD), (Kind::Code, 1), (Kind::Run, 0)]);
        assert!(!decoder.is_mid_frame());
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting_of_the_stream(
            values in proptest::collection::vec((0..Kind::ALL.len(), proptest::collection::vec(any::<u8>(), 0..300)), 0..20),
            cut in 1usize..64,
        ) {
            let mut bytes = Vec::new();
            for (kind, data) in &values {
                encode(&mut bytes, Kind::ALL[*kind], data);
            }
            let mut decoder = Decoder::new();
            let mut seen = Vec::new();
            for chunk in bytes.chunks(cut) {
                decoder.feed(chunk);
                while let Some((kind, payload)) = decoder.next_frame().unwrap() {
                    seen.push((kind, payload.to_vec()));
                }
            }
            let sent: Vec<_> = values.into_iter().map(|(kind, data)| (Kind::ALL[kind], data)).collect();
            prop_assert_eq!(seen, sent);
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000), cut in 1usize..200) {
            let mut decoder = Decoder::new();
            for chunk in bytes.chunks(cut) {
                decoder.feed(chunk);
                while let Ok(Some(_)) = decoder.next_frame() {}
            }
        }
    }
}
