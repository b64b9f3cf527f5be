//! The way of a running guest's memory out of its worker: a sparse shared memfd with the guest's pages at their own
//! offsets, and behind them the state of its vCPU.
//!
//! ```text
//! 0 … memory          pages that the guest has changed; everything else is a hole
//! memory … +TAIL      u32 length, then as many bytes: the state
//! ```
//!
//! A worker maps it before its jail and holds no descriptor of it. What it writes there is hostile: who takes it in copies
//! it once, and looks at nothing twice.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::fs::{FallocateFlags, SealFlags};

use crate::memory::{GuestPhys, Mapping, OutOfBounds, PAGE, memfd, page_multiple, seek};

/// Bytes behind the memory.
const TAIL: usize = 1 << 20;
/// Most bytes of a state.
pub const MAX_STATE: usize = TAIL - 4;

/// The memfd.
#[derive(Debug)]
pub struct Delta {
    fd: OwnedFd,
    memory: usize,
}

impl Delta {
    /// An empty one for a guest with so many bytes of memory. Its length is sealed: a file that shrinks under a mapping
    /// kills its reader.
    pub fn new(memory: u64) -> io::Result<Delta> {
        let memory = page_multiple(memory)?;
        let fd = memfd(c"zeroboot-delta", memory + TAIL)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(Delta { fd, memory })
    }

    /// One that another process made.
    pub fn from_fd(fd: OwnedFd, memory: u64) -> io::Result<Delta> {
        let memory = page_multiple(memory)?;
        let sealed = rustix::fs::fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK | SealFlags::GROW);
        let length = u64::try_from(rustix::fs::fstat(&fd)?.st_size).unwrap_or(0);
        if !sealed || length != (memory + TAIL) as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not a delta of a guest of this size"));
        }
        Ok(Delta { fd, memory })
    }

    /// The worker's view.
    pub fn map(&self) -> io::Result<DeltaMapping> {
        let mapping = Mapping::map(Some(self.fd.as_fd()), self.memory + TAIL, libc::MAP_SHARED | libc::MAP_NORESERVE)?;
        Ok(DeltaMapping { mapping, memory: self.memory })
    }

    /// Copies all its pages into a view of the same guest's memory. Gives the bytes.
    pub fn copy_into(&self, memory: &Mapping) -> io::Result<u64> {
        if memory.len() != self.memory as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the memory has another size than the delta's"));
        }
        let file = File::from(self.fd.try_clone()?);
        let (mut at, end, mut copied) = (0u64, self.memory as u64, 0u64);
        loop {
            let data = match seek(&file, at, libc::SEEK_DATA) {
                Ok(data) if data < end => data,
                // The tail, or nothing more.
                Ok(_) => return Ok(copied),
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(copied),
                Err(error) => return Err(error),
            };
            at = seek(&file, data, libc::SEEK_HOLE)?.min(end);
            let length = usize::try_from(at.saturating_sub(data)).unwrap_or(0);
            memory.fill_from(self.fd.as_fd(), GuestPhys(data), length)?;
            copied += length as u64;
        }
    }

    /// The bytes of the state.
    pub fn state(&self) -> io::Result<Vec<u8>> {
        let mut length = [0; 4];
        self.read_exact(&mut length, self.memory)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_STATE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the state is longer than any"));
        }
        let mut state = vec![0; length];
        self.read_exact(&mut state, self.memory + 4)?;
        Ok(state)
    }

    fn read_exact(&self, mut out: &mut [u8], at: usize) -> io::Result<()> {
        let mut at = at as u64;
        while !out.is_empty() {
            match rustix::io::retry_on_intr(|| rustix::io::pread(&self.fd, &mut *out, at))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => {
                    at += n as u64;
                    out = out.get_mut(n..).unwrap_or_default();
                }
            }
        }
        Ok(())
    }

    /// Gives all its memory back. It can be filled again.
    pub fn empty(&self) -> io::Result<()> {
        empty(&self.fd)
    }
}

/// The same for who knows its descriptor alone.
pub fn empty(delta: impl AsFd) -> io::Result<()> {
    let length = u64::try_from(rustix::fs::fstat(&delta)?.st_size).unwrap_or(0);
    Ok(rustix::fs::fallocate(delta, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, length)?)
}

impl AsFd for Delta {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A worker's view of its delta.
#[derive(Debug)]
pub struct DeltaMapping {
    mapping: Mapping,
    memory: usize,
}

impl DeltaMapping {
    /// Copies a page of the guest's.
    pub fn put_page(&self, memory: &Mapping, page: u64) -> Result<(), OutOfBounds> {
        let at = GuestPhys(page.saturating_mul(PAGE as u64));
        if at.0 >= self.memory as u64 {
            return Err(OutOfBounds { at, len: PAGE });
        }
        self.mapping.copy_from(memory, at, PAGE)
    }

    /// Puts the state behind the memory. Without effect if it is longer than [`MAX_STATE`].
    pub fn put_state(&self, state: &[u8]) -> Result<(), OutOfBounds> {
        let tail = GuestPhys(self.memory as u64);
        let length = u32::try_from(state.len()).unwrap_or(u32::MAX);
        if state.len() > MAX_STATE {
            return Err(OutOfBounds { at: tail, len: state.len() });
        }
        self.mapping.write(tail.plus(4), state)?;
        self.mapping.write(tail, &length.to_le_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{BootMemory, MemoryImage, MiB};

    fn image(byte: u8) -> MemoryImage {
        let memory = BootMemory::new(MiB(1)).unwrap();
        memory.map().unwrap().write(GuestPhys(0), &vec![byte; 1 << 20]).unwrap();
        MemoryImage::seal(memory).unwrap()
    }

    #[test]
    fn pages_and_state_arrive_and_nothing_else_changes() {
        let image = image(1);
        let origin = Mapping::fork(&image).unwrap();
        origin.write(GuestPhys(0x3000), &[7; 4096]).unwrap();
        origin.write(GuestPhys(0xff000), &[8; 4096]).unwrap();
        let delta = Delta::new(origin.len()).unwrap();
        let out = delta.map().unwrap();
        for page in [3, 0xff] {
            out.put_page(&origin, page).unwrap();
        }
        out.put_state(b"the state").unwrap();
        assert!(out.put_page(&origin, 0x100).is_err(), "a page behind the memory");
        assert!(out.put_state(&vec![0; MAX_STATE + 1]).is_err());

        let child = Mapping::fork(&image).unwrap();
        assert_eq!(delta.copy_into(&child).unwrap(), 2 * 4096);
        assert_eq!(delta.state().unwrap(), b"the state");
        let byte = |at| {
            let mut byte = [0];
            child.read(GuestPhys(at), &mut byte).unwrap();
            byte[0]
        };
        assert_eq!([0x2fff, 0x3000, 0x3fff, 0x4000, 0xfefff, 0xff000].map(byte), [1, 7, 7, 1, 1, 8]);
        // What the origin writes there afterwards reaches no child.
        origin.write(GuestPhys(0x3000), &[9; 4096]).unwrap();
        out.put_page(&origin, 3).unwrap();
        assert_eq!(byte(0x3000), 7);

        delta.empty().unwrap();
        let fresh = Mapping::fork(&image).unwrap();
        assert_eq!(delta.copy_into(&fresh).unwrap(), 0);
        assert_eq!(delta.state().unwrap(), b"");
    }

    #[test]
    fn a_length_that_cannot_be_and_a_file_that_is_no_delta_are_refused() {
        let delta = Delta::new(1 << 20).unwrap();
        rustix::io::pwrite(&delta, &u32::MAX.to_le_bytes(), 1 << 20).unwrap();
        assert_eq!(delta.state().unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(delta.copy_into(&BootMemory::new(MiB(2)).unwrap().map().unwrap()).is_err());
        let fd = delta.as_fd().try_clone_to_owned().unwrap();
        assert!(Delta::from_fd(fd, 2 << 20).is_err(), "of another size");
        assert!(Delta::from_fd(memfd(c"x", (1 << 20) + TAIL).unwrap(), 1 << 20).is_err(), "not sealed");
        assert!(Delta::from_fd(delta.as_fd().try_clone_to_owned().unwrap(), 1 << 20).is_ok());
    }
}
