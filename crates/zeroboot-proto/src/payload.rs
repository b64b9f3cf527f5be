//! Payloads with a shape: limits, identity, file chunks, the exit report. All integers are little endian.

use alloc::vec::Vec;

/// A payload that is not what its kind asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PayloadError(pub &'static str);

impl core::fmt::Display for PayloadError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "malformed {} frame", self.0)
    }
}

impl core::error::Error for PayloadError {}

/// Takes fixed-size fields from the front of a payload.
struct Reader<'a>(&'a [u8], &'static str);

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], PayloadError> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(PayloadError(self.1))?;
        self.0 = rest;
        Ok(*head)
    }
    fn bytes(&mut self, n: usize) -> Result<&'a [u8], PayloadError> {
        let (head, rest) = self.0.split_at_checked(n).ok_or(PayloadError(self.1))?;
        self.0 = rest;
        Ok(head)
    }
    fn u8(&mut self) -> Result<u8, PayloadError> {
        Ok(u8::from_le_bytes(self.array()?))
    }
    fn u16(&mut self) -> Result<u16, PayloadError> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    fn u32(&mut self) -> Result<u32, PayloadError> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    fn u64(&mut self) -> Result<u64, PayloadError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    fn i32(&mut self) -> Result<i32, PayloadError> {
        Ok(i32::from_le_bytes(self.array()?))
    }
    fn end(self) -> Result<(), PayloadError> {
        if self.0.is_empty() { Ok(()) } else { Err(PayloadError(self.1)) }
    }
}

/// What the sandbox enforces. `u64::MAX` / `u32::MAX` mean no limit of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Timeout of the run, nanoseconds.
    pub wall_ns: u64,
    /// CPU time of all the sandbox's processes, nanoseconds.
    pub cpu_ns: u64,
    /// Memory of all the sandbox's processes, bytes.
    pub memory: u64,
    /// Bytes of standard output and standard error together.
    pub output: u64,
    /// Bytes of the largest file that can be written.
    pub file_size: u64,
    /// Bytes of all output files that are brought back.
    pub output_files: u64,
    /// Processes and threads alive at once.
    pub processes: u32,
    /// Open descriptors of one process.
    pub open_files: u32,
}

impl Limits {
    /// The payload of a `Limits` frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(56);
        for field in [self.wall_ns, self.cpu_ns, self.memory, self.output, self.file_size, self.output_files] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(&self.processes.to_le_bytes());
        out.extend_from_slice(&self.open_files.to_le_bytes());
        out
    }

    /// Reads the payload of a `Limits` frame.
    pub fn decode(payload: &[u8]) -> Result<Limits, PayloadError> {
        let mut r = Reader(payload, "limits");
        let limits = Limits {
            wall_ns: r.u64()?,
            cpu_ns: r.u64()?,
            memory: r.u64()?,
            output: r.u64()?,
            file_size: r.u64()?,
            output_files: r.u64()?,
            processes: r.u32()?,
            open_files: r.u32()?,
        };
        r.end()?;
        Ok(limits)
    }
}

/// What must differ between two forks of one template, applied before any user code.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    /// Fresh host entropy for the kernel's and the runtime's generators.
    pub entropy: [u8; 64],
    /// Wall clock, nanoseconds since 1970 (UTC).
    pub realtime_ns: u64,
    /// The sandbox's UUID; host name and boot id derive from it.
    pub sandbox_id: [u8; 16],
}

impl core::fmt::Debug for Identity {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        // The entropy is a secret: it never reaches a log.
        f.debug_struct("Identity").field("realtime_ns", &self.realtime_ns).finish_non_exhaustive()
    }
}

impl Identity {
    /// Bytes of the payload.
    pub const LEN: usize = 64 + 8 + 16;

    /// The payload of an `Identity` frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Identity::LEN);
        out.extend_from_slice(&self.entropy);
        out.extend_from_slice(&self.realtime_ns.to_le_bytes());
        out.extend_from_slice(&self.sandbox_id);
        out
    }

    /// Reads the payload of an `Identity` frame.
    pub fn decode(payload: &[u8]) -> Result<Identity, PayloadError> {
        let mut r = Reader(payload, "identity");
        let identity = Identity { entropy: r.array()?, realtime_ns: r.u64()?, sandbox_id: r.array()? };
        r.end()?;
        Ok(identity)
    }

    /// The host name of this sandbox: `sandbox-` and the last 12 hex digits of its id.
    pub fn host_name(&self) -> alloc::string::String {
        let id = u64::from_be_bytes(self.sandbox_id.last_chunk().copied().unwrap_or_default());
        alloc::format!("sandbox-{:012x}", id & 0xffff_ffff_ffff)
    }
}

/// A piece of a file on its way in (`Put`) or out (`File`):
/// `u8 flags · u16 mode · u16 path length · path · data`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileChunk<'a> {
    /// Path, relative to the working directory or absolute inside the sandbox.
    pub path: &'a [u8],
    /// The bytes of this chunk.
    pub data: &'a [u8],
    /// Permission bits (the low nine).
    pub mode: u16,
    /// Not the first chunk of this file.
    pub append: bool,
    /// Outgoing only: the file could not be read; `data` is the reason (UTF-8).
    pub failed: bool,
}

impl<'a> FileChunk<'a> {
    /// Bytes before path and data.
    pub const OVERHEAD: usize = 5;
    /// Longest path.
    pub const MAX_PATH: usize = 4096;
    const APPEND: u8 = 1;
    const FAILED: u8 = 2;

    /// The payload of a `Put` or `File` frame. `path` must be at most [`Self::MAX_PATH`] and the whole
    /// at most [`crate::MAX_PAYLOAD`].
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::OVERHEAD + self.path.len() + self.data.len());
        out.push((u8::from(self.append) * Self::APPEND) | (u8::from(self.failed) * Self::FAILED));
        out.extend_from_slice(&self.mode.to_le_bytes());
        out.extend_from_slice(&(self.path.len() as u16).to_le_bytes());
        out.extend_from_slice(self.path);
        out.extend_from_slice(self.data);
        out
    }

    /// Reads the payload of a `Put` or `File` frame.
    pub fn decode(payload: &'a [u8]) -> Result<FileChunk<'a>, PayloadError> {
        let mut r = Reader(payload, "file");
        let flags = r.u8()?;
        let mode = r.u16()?;
        let len = usize::from(r.u16()?);
        let path = r.bytes(len)?;
        if flags & !(Self::APPEND | Self::FAILED) != 0
            || path.is_empty()
            || len > Self::MAX_PATH
            || path.contains(&0)
            || mode & !0o777 != 0
        {
            return Err(PayloadError("file"));
        }
        Ok(FileChunk { path, data: r.0, mode, append: flags & Self::APPEND != 0, failed: flags & Self::FAILED != 0 })
    }
}

/// How a run ended, as the sandbox tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The process ended with this status (0 to 255).
    Exited(i32),
    /// A signal killed it.
    Signaled(i32),
    /// The wall-time limit passed.
    DeadlinePassed,
    /// The CPU-time limit passed.
    CpuLimit,
    /// It wrote more than the output limit.
    OutputLimit,
    /// It needed more memory than it may have. The value is the exit status if it ended by itself
    /// (an uncaught `MemoryError`), 137 if it was killed.
    OutOfMemory(i32),
    /// The sandbox itself broke: guest panic, triple fault, agent or runner gone.
    Crashed,
}

/// The last frame of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitReport {
    /// How it ended.
    pub ending: Ending,
    /// Time from `Run` to the end, nanoseconds, by the sandbox's clock.
    pub wall_ns: u64,
    /// CPU time of all its processes, nanoseconds; 0 if unknown.
    pub cpu_ns: u64,
    /// Peak resident memory, bytes; 0 if unknown.
    pub peak_memory: u64,
}

impl ExitReport {
    /// The payload of an `Exit` frame: `u8 ending · i32 value · 3 × u64`.
    pub fn encode(&self) -> Vec<u8> {
        let (tag, value) = match self.ending {
            Ending::Exited(code) => (0u8, code),
            Ending::Signaled(signal) => (1, signal),
            Ending::DeadlinePassed => (2, 0),
            Ending::CpuLimit => (3, 0),
            Ending::OutputLimit => (4, 0),
            Ending::OutOfMemory(code) => (5, code),
            Ending::Crashed => (6, 0),
        };
        let mut out = Vec::with_capacity(29);
        out.push(tag);
        out.extend_from_slice(&value.to_le_bytes());
        for field in [self.wall_ns, self.cpu_ns, self.peak_memory] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out
    }

    /// Reads the payload of an `Exit` frame. Statuses are reduced to 0..=255 and signals must be 1..=64.
    pub fn decode(payload: &[u8]) -> Result<ExitReport, PayloadError> {
        let mut r = Reader(payload, "exit");
        let tag = r.u8()?;
        let value = r.i32()?;
        let ending = match tag {
            0 => Ending::Exited(value & 0xff),
            1 if (1..=64).contains(&value) => Ending::Signaled(value),
            2 => Ending::DeadlinePassed,
            3 => Ending::CpuLimit,
            4 => Ending::OutputLimit,
            5 => Ending::OutOfMemory(value & 0xff),
            6 => Ending::Crashed,
            _ => return Err(PayloadError("exit")),
        };
        let report = ExitReport { ending, wall_ns: r.u64()?, cpu_ns: r.u64()?, peak_memory: r.u64()? };
        r.end()?;
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn limits_identity_and_exit_come_back_as_sent() {
        let limits = Limits {
            wall_ns: 1,
            cpu_ns: 2,
            memory: 3,
            output: 4,
            file_size: 5,
            output_files: 6,
            processes: 7,
            open_files: 8,
        };
        assert_eq!(Limits::decode(&limits.encode()), Ok(limits));
        let identity = Identity { entropy: [9; 64], realtime_ns: 10, sandbox_id: [0xab; 16] };
        assert_eq!(Identity::decode(&identity.encode()), Ok(identity.clone()));
        assert_eq!(identity.host_name(), "sandbox-abababababab");
        for ending in [
            Ending::Exited(3),
            Ending::Signaled(9),
            Ending::DeadlinePassed,
            Ending::CpuLimit,
            Ending::OutputLimit,
            Ending::OutOfMemory(137),
            Ending::Crashed,
        ] {
            let report = ExitReport { ending, wall_ns: 1, cpu_ns: 2, peak_memory: 3 };
            assert_eq!(ExitReport::decode(&report.encode()), Ok(report));
        }
    }

    #[test]
    fn a_lying_path_length_is_refused() {
        assert!(FileChunk::decode(&[0, 0, 0, 255, 255, b'a']).is_err());
        assert!(FileChunk::decode(&[0, 0, 0, 0, 0]).is_err());
        assert!(FileChunk::decode(&[4, 0, 0, 1, 0, b'a']).is_err());
    }

    proptest! {
        #[test]
        fn file_chunks_come_back_as_sent(
            path in proptest::collection::vec(1u8.., 1..100),
            data in proptest::collection::vec(any::<u8>(), 0..200),
            mode in 0u16..=0o777, append: bool, failed: bool,
        ) {
            let chunk = FileChunk { path: &path, data: &data, mode, append, failed };
            let bytes = chunk.encode();
            prop_assert_eq!(FileChunk::decode(&bytes), Ok(chunk));
        }

        #[test]
        fn no_payload_makes_a_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = FileChunk::decode(&bytes);
            let _ = ExitReport::decode(&bytes);
            let _ = Limits::decode(&bytes);
            let _ = Identity::decode(&bytes);
        }
    }
}
