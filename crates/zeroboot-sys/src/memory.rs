//! Guest memory: the image (shared, read-only) and a mapping (one private copy-on-write view) are two
//! types, so that nothing that a fork does can reach the image.
//!
//! No reference into guest memory is ever handed out: a guest may change it between two reads. Bytes
//! are copied in and out, each range checked.

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::NonNull,
};

/// A guest-physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestPhys(pub u64);

impl GuestPhys {
    /// This address plus `bytes`; saturates, so that a bounds check refuses what overflows.
    pub fn plus(self, bytes: u64) -> GuestPhys {
        GuestPhys(self.0.saturating_add(bytes))
    }
}

impl std::fmt::Display for GuestPhys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// An amount of memory in mebibytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MiB(pub u64);

impl MiB {
    /// The same in bytes.
    pub fn bytes(self) -> u64 {
        self.0 << 20
    }
}

/// A range that is not inside guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfBounds {
    /// Where it begins.
    pub at: GuestPhys,
    /// Its bytes.
    pub len: usize,
}

impl std::fmt::Display for OutOfBounds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes at guest address {} are outside of its memory", self.len, self.at)
    }
}

impl std::error::Error for OutOfBounds {}

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// What `/proc/PID/maps` calls an image.
pub(crate) const IMAGE_NAME: &CStr = c"zeroboot-image";

/// The frozen memory of a template: a memfd sealed against writing and resizing. All forks map it.
///
/// Sealed, because a file that shrinks under a mapping kills its reader with SIGBUS, and one that
/// changes would change every fork.
#[derive(Debug)]
pub struct MemoryImage {
    fd: OwnedFd,
    len: usize,
}

impl MemoryImage {
    /// Freezes the memory that a template was booted in. Its mappings must be gone: the kernel refuses the
    /// seal while a writable shared one exists.
    pub fn seal(memory: BootMemory) -> io::Result<MemoryImage> {
        MemoryImage::seal_fd(memory.fd, memory.len)
    }

    /// Copies `len` bytes of a file into a new sealed memfd; holes stay holes. `check` sees every byte in
    /// order (holes as `None` with their length), so that what was verified is what the forks run.
    pub fn load(file: &File, len: u64, mut check: impl FnMut(Result<&[u8], u64>)) -> io::Result<MemoryImage> {
        use std::os::unix::fs::FileExt;
        let size = page_multiple(len)?;
        let fd = memfd(IMAGE_NAME, size)?;
        let mut chunk = vec![0u8; 1 << 20];
        let mut at = 0u64;
        while at < len {
            let data = match seek(file, at, libc::SEEK_DATA) {
                // Whole pages, also on a file system with smaller blocks.
                Ok(data) => (data & !(PAGE as u64 - 1)).min(len),
                // ENXIO: only a hole is left.
                Err(e) if e.raw_os_error() == Some(libc::ENXIO) => len,
                Err(e) => return Err(e),
            };
            if data > at {
                check(Err(data - at));
            }
            at = data;
            if at == len {
                break;
            }
            let end = seek(file, at, libc::SEEK_HOLE)?.next_multiple_of(PAGE as u64).min(len);
            while at < end {
                let want = usize::try_from(end - at).unwrap_or(chunk.len()).min(chunk.len());
                let part = chunk.get_mut(..want).unwrap_or_default();
                file.read_exact_at(part, at)?;
                check(Ok(part));
                let mut done = 0;
                while done < part.len() {
                    let rest = part.get(done..).unwrap_or_default();
                    let n = rustix::io::pwrite(&fd, rest, at + done as u64)?;
                    if n == 0 {
                        return Err(io::ErrorKind::WriteZero.into());
                    }
                    done += n;
                }
                at += want as u64;
            }
        }
        MemoryImage::seal_fd(fd, size)
    }

    fn seal_fd(fd: OwnedFd, len: usize) -> io::Result<MemoryImage> {
        use rustix::fs::SealFlags as S;
        rustix::fs::fcntl_add_seals(&fd, S::SHRINK | S::GROW | S::WRITE | S::SEAL)?;
        Ok(MemoryImage { fd, len })
    }

    /// Another handle to the same image.
    pub fn try_clone(&self) -> io::Result<MemoryImage> {
        Ok(MemoryImage { fd: self.fd.try_clone()?, len: self.len })
    }

    /// Bytes of guest memory.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether its length is zero (never, for an image that was made here).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The ranges that hold data, in order: `(offset, length)`.
    pub fn data_ranges(&self) -> io::Result<Vec<(u64, u64)>> {
        // A second open file description of its own offset is not needed: lseek with SEEK_DATA and
        // SEEK_HOLE is given an absolute start each time.
        let file = File::from(self.fd.try_clone()?);
        let mut ranges = Vec::new();
        let mut at = 0;
        while at < self.len() {
            let start = match seek(&file, at, libc::SEEK_DATA) {
                Ok(start) => start,
                Err(e) if e.raw_os_error() == Some(libc::ENXIO) => break,
                Err(e) => return Err(e),
            };
            let end = seek(&file, start, libc::SEEK_HOLE)?.min(self.len());
            ranges.push((start, end.saturating_sub(start)));
            at = end;
        }
        Ok(ranges)
    }

    /// Reads bytes of the image.
    pub fn read(&self, at: GuestPhys, out: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = out.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let n = rustix::io::pread(&self.fd, rest, at.0 + done as u64)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += n;
        }
        Ok(())
    }
}

impl AsFd for MemoryImage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The memory that a template boots in: a memfd, mapped shared and writable until it is sealed into a
/// [`MemoryImage`].
#[derive(Debug)]
pub struct BootMemory {
    fd: OwnedFd,
    len: usize,
}

impl BootMemory {
    /// New zero memory.
    pub fn new(size: MiB) -> io::Result<BootMemory> {
        let len = page_multiple(size.bytes())?;
        Ok(BootMemory { fd: memfd(IMAGE_NAME, len)?, len })
    }

    /// A shared view: what is written here is what [`MemoryImage::seal`] freezes.
    pub fn map(&self) -> io::Result<Mapping> {
        Mapping::map(Some(self.fd.as_fd()), self.len, libc::MAP_SHARED)
    }
}

/// One view of guest memory, page aligned. Freed with the value.
///
/// Invariant: `base` is the start of a mapping of `len` bytes that this value alone owns and that is
/// readable and writable until drop.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory that belongs to this value; no thread-local state is involved.
unsafe impl Send for Mapping {}

impl Mapping {
    /// A private copy-on-write view of an image. Nothing is copied until it is written.
    pub fn fork(image: &MemoryImage) -> io::Result<Mapping> {
        // NORESERVE: a fork is promised the template's size but touches a few pages; admission counts
        // the memory, not the kernel's commit limit.
        Mapping::map(Some(image.as_fd()), image.len, libc::MAP_PRIVATE | libc::MAP_NORESERVE)
    }

    pub(crate) fn map(fd: Option<BorrowedFd<'_>>, len: usize, flags: i32) -> io::Result<Mapping> {
        let flags = if fd.is_some() { flags } else { flags | libc::MAP_ANONYMOUS };
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that exists.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                fd.map_or(-1, |fd| fd.as_raw_fd()),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::InvalidData)?;
        let mapping = Mapping { base, len };
        // Guest memory in a core dump of a worker would be user data on disk.
        mapping.advise(0, len, libc::MADV_DONTDUMP)?;
        Ok(mapping)
    }

    /// Bytes of guest memory.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether its length is zero (never).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The host address, for the memory slot.
    pub(crate) fn host_address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Where `[at, at + len)` begins on the host, if all of it is inside.
    fn range(&self, at: GuestPhys, len: usize) -> Result<*mut u8, OutOfBounds> {
        let error = OutOfBounds { at, len };
        let start = usize::try_from(at.0).map_err(|_| error)?;
        let end = start.checked_add(len).ok_or(error)?;
        if end > self.len {
            return Err(error);
        }
        // SAFETY: start <= len of the mapping, so the pointer stays inside of it or one past its end.
        Ok(unsafe { self.base.as_ptr().add(start) })
    }

    /// Copies bytes out of guest memory.
    pub fn read(&self, at: GuestPhys, out: &mut [u8]) -> Result<(), OutOfBounds> {
        let from = self.range(at, out.len())?;
        // SAFETY: `range` checked that `from` has `out.len()` readable bytes, `out` is ours and cannot
        // overlap a mapping that no reference ever points into.
        unsafe { copy_volatile(from, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Copies bytes into guest memory. It takes `&self` because the guest changes the same bytes anyway.
    pub fn write(&self, at: GuestPhys, bytes: &[u8]) -> Result<(), OutOfBounds> {
        let to = self.range(at, bytes.len())?;
        // SAFETY: as in `read`, the other way round; the mapping is writable.
        unsafe { copy_volatile(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// Copies a range of another view of the same memory, or a larger one, to the same place here.
    pub(crate) fn copy_from(&self, other: &Mapping, at: GuestPhys, len: usize) -> Result<(), OutOfBounds> {
        let (from, to) = (other.range(at, len)?, self.range(at, len)?);
        // SAFETY: `range` checked both; two mappings never overlap.
        unsafe { copy_volatile(from, to, len) };
        Ok(())
    }

    /// Reads a file's bytes to the same offset here.
    pub(crate) fn fill_from(&self, file: BorrowedFd<'_>, at: GuestPhys, len: usize) -> io::Result<()> {
        let to = self.range(at, len).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        let mut done = 0;
        while done < len {
            let offset = libc::off_t::try_from(at.0 + done as u64).map_err(io::Error::other)?;
            // SAFETY: `range` checked that `to` has `len` writable bytes, which no reference points into.
            let n = unsafe { libc::pread(file.as_raw_fd(), to.add(done).cast(), len - done, offset) };
            match usize::try_from(n) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// A little-endian u32.
    pub fn read_u32(&self, at: GuestPhys) -> Result<u32, OutOfBounds> {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// A little-endian u64.
    pub fn read_u64(&self, at: GuestPhys) -> Result<u64, OutOfBounds> {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Makes private copies of these pages now, so that the guest's first write does not fault on the
    /// host (`MADV_POPULATE_WRITE`, Linux 5.14).
    pub fn populate_write(&self, at: GuestPhys, len: usize) -> io::Result<()> {
        self.advise_at(at, len, libc::MADV_POPULATE_WRITE)
    }

    /// Maps these pages of the image now (`MADV_POPULATE_READ`).
    pub fn populate_read(&self, at: GuestPhys, len: usize) -> io::Result<()> {
        self.advise_at(at, len, libc::MADV_POPULATE_READ)
    }

    fn advise_at(&self, at: GuestPhys, len: usize, advice: i32) -> io::Result<()> {
        let start = self.range(at, len).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        self.advise(start as usize - self.base.as_ptr() as usize, len, advice)
    }

    fn advise(&self, offset: usize, len: usize, advice: i32) -> io::Result<()> {
        debug_assert!(offset + len <= self.len);
        // SAFETY: the range is inside our mapping, and none of the advices used here (DONTDUMP,
        // POPULATE_READ, POPULATE_WRITE) changes what the memory holds.
        let r = unsafe { libc::madvise(self.base.as_ptr().add(offset).cast(), len, advice) };
        if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// What this process has of the image: private copies and merely mapped pages.
    pub fn resident(&self) -> io::Result<Resident> {
        const PRESENT: u64 = 1 << 63;
        const SWAPPED: u64 = 1 << 62;
        const SHARED: u64 = 1 << 61;
        let file = File::open("/proc/self/pagemap")?;
        let mut resident = Resident::default();
        let first = self.base.as_ptr() as u64 / PAGE as u64;
        let mut entries = vec![0u8; 8 * 512];
        for start in (0..self.len / PAGE).step_by(512) {
            let count = (self.len / PAGE - start).min(512);
            let part = entries.get_mut(..count * 8).unwrap_or_default();
            std::os::unix::fs::FileExt::read_exact_at(&file, part, (first + start as u64) * 8)?;
            for (i, entry) in part.as_chunks::<8>().0.iter().enumerate() {
                let entry = u64::from_le_bytes(*entry);
                if entry & (PRESENT | SWAPPED) == 0 {
                    continue;
                }
                let list = if entry & SHARED == 0 { &mut resident.private } else { &mut resident.shared };
                let page = (start + i) as u32;
                match list.last_mut() {
                    Some((from, pages)) if *from + *pages == page => *pages += 1,
                    _ => list.push((page, 1)),
                }
            }
        }
        Ok(resident)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no pointer into it outlives the value (none is handed out, and
        // `kvm::Vm` owns its mapping for as long as KVM knows its address).
        let r = unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert_eq!(r, 0);
    }
}

/// Pages of a mapping that exist, as runs of `(first page, pages)`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// Private copies: written by this fork.
    pub private: Vec<(u32, u32)>,
    /// Pages of the image that are mapped here: read by this fork.
    pub shared: Vec<(u32, u32)>,
}

impl Resident {
    /// Pages that were copied.
    pub fn private_pages(&self) -> u64 {
        self.private.iter().map(|&(_, n)| u64::from(n)).sum()
    }

    /// Pages that are only mapped.
    pub fn shared_pages(&self) -> u64 {
        self.shared.iter().map(|&(_, n)| u64::from(n)).sum()
    }
}

/// Copies with volatile accesses: the compiler must neither read a guest's byte twice nor assume that it
/// stays.
///
/// # Safety
/// `from` is readable and `to` writable for `len` bytes, and they do not overlap.
unsafe fn copy_volatile(from: *const u8, to: *mut u8, len: usize) {
    let mut at = 0;
    while len - at >= 8 {
        // SAFETY: at + 8 <= len. Both sides may be unaligned, so the volatile access is done on an array
        // of bytes, which has alignment one; LLVM makes one 8-byte move of it.
        unsafe { to.add(at).cast::<[u8; 8]>().write_volatile(from.add(at).cast::<[u8; 8]>().read_volatile()) };
        at += 8;
    }
    while at < len {
        // SAFETY: at < len.
        unsafe { to.add(at).write_volatile(from.add(at).read_volatile()) };
        at += 1;
    }
}

pub(crate) fn page_multiple(len: u64) -> io::Result<usize> {
    match usize::try_from(len) {
        Ok(len) if len > 0 && len.is_multiple_of(PAGE) => Ok(len),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "guest memory must be a positive number of whole pages")),
    }
}

pub(crate) fn memfd(name: &CStr, len: usize) -> io::Result<OwnedFd> {
    // SAFETY: the name is a valid C string; the result is checked.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor; nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::fs::ftruncate(&fd, len as u64)?;
    Ok(fd)
}

pub(crate) fn seek(file: &File, at: u64, whence: i32) -> io::Result<u64> {
    let at = libc::off_t::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: a plain system call on a descriptor that we hold.
    let r = unsafe { libc::lseek(file.as_raw_fd(), at, whence) };
    u64::try_from(r).map_err(|_| io::Error::last_os_error())
}

/// Gives the pages that the C library keeps of what was freed back to the system. It looks through its whole heap, for
/// some milliseconds.
pub fn give_back() {
    // SAFETY: takes a number and locks the heap by itself. Whether there was anything to give does not matter.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(byte: u8) -> MemoryImage {
        let memory = BootMemory::new(MiB(1)).unwrap();
        memory.map().unwrap().write(GuestPhys(0x1000), &[byte; 100]).unwrap();
        MemoryImage::seal(memory).unwrap()
    }

    #[test]
    fn writes_in_one_mapping_reach_neither_the_image_nor_another() {
        let image = image(7);
        let (a, b) = (Mapping::fork(&image).unwrap(), Mapping::fork(&image).unwrap());
        a.write(GuestPhys(0x1001), b"hello").unwrap();
        let mut bytes = [0; 6];
        b.read(GuestPhys(0x1000), &mut bytes).unwrap();
        assert_eq!(bytes, [7; 6]);
        image.read(GuestPhys(0x1000), &mut bytes).unwrap();
        assert_eq!(bytes, [7; 6]);
        a.read(GuestPhys(0x1000), &mut bytes).unwrap();
        assert_eq!(&bytes, b"\x07hello");
    }

    #[test]
    fn an_image_cannot_be_changed_or_resized() {
        let image = image(7);
        assert!(rustix::io::pwrite(&image, b"x", 0).is_err());
        assert!(rustix::fs::ftruncate(&image, 0).is_err());
        assert!(Mapping::map(Some(image.as_fd()), image.len, libc::MAP_SHARED).is_err());
    }

    #[test]
    fn a_range_outside_of_memory_is_refused() {
        let m = Mapping::fork(&image(0)).unwrap();
        let end = m.len();
        for (at, len) in [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX - 3, 8), (0, end as usize + 1)] {
            assert_eq!(m.read(GuestPhys(at), &mut vec![0; len]), Err(OutOfBounds { at: GuestPhys(at), len }));
            assert!(m.write(GuestPhys(at), &vec![0; len]).is_err());
            assert!(m.populate_write(GuestPhys(at), len).is_err());
        }
        assert_eq!(m.read(GuestPhys(end), &mut []), Ok(()));
    }

    #[test]
    fn odd_offsets_and_lengths_copy_every_byte() {
        let m = Mapping::fork(&image(0)).unwrap();
        let bytes: Vec<u8> = (0..=255).collect();
        for at in 0..9 {
            for len in [0, 1, 7, 8, 9, 63, 255] {
                m.write(GuestPhys(at), &bytes[..len]).unwrap();
                let mut back = vec![0; len];
                m.read(GuestPhys(at), &mut back).unwrap();
                assert_eq!(back, bytes[..len]);
            }
        }
    }

    #[test]
    fn a_loaded_image_has_the_files_bytes_and_its_holes() {
        let mut path = std::env::temp_dir();
        path.push(format!("zeroboot-image-test-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[9; 5000], 0x8000).unwrap();
        let (mut data, mut hole) = (0, 0);
        let image = MemoryImage::load(&file, 1 << 20, |part| match part {
            Ok(bytes) => data += bytes.len() as u64,
            Err(len) => hole += len,
        })
        .unwrap();
        assert_eq!(data + hole, 1 << 20);
        let mut bytes = [0; 5001];
        image.read(GuestPhys(0x8000), &mut bytes).unwrap();
        assert_eq!((bytes[4999], bytes[5000]), (9, 0));
        assert!(image.data_ranges().unwrap().iter().map(|r| r.1).sum::<u64>() < 1 << 20);
    }

    #[test]
    fn pages_that_were_written_count_as_private() {
        let m = Mapping::fork(&image(1)).unwrap();
        m.write(GuestPhys(0x5000), &[1]).unwrap();
        m.write(GuestPhys(0x6000), &[1]).unwrap();
        let r = m.resident().unwrap();
        assert_eq!((r.private.as_slice(), r.private_pages()), ([(5, 2)].as_slice(), 2));
        m.populate_write(GuestPhys(0x10000), 2 * PAGE).unwrap();
        assert_eq!(m.resident().unwrap().private_pages(), 4);
    }
}
