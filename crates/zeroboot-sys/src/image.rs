//! Moves memory of this process into a sealed memfd that is mapped `MAP_PRIVATE` at the same addresses.
//!
//! A fork copies the page tables of anonymous memory, and its end takes them down again. A private mapping of a file
//! that was never written to has nothing to copy: a child's page tables hold what the child uses.

use std::{
    io,
    ops::Range,
    os::fd::{AsRawFd, OwnedFd},
};

use rustix::fs::SealFlags;

use crate::memory::{IMAGE_NAME, PAGE, memfd};

/// Size and alignment of a large page.
const LARGE: usize = 2 << 20;
/// Ranges further apart are not at their distance in the file.
const FAR: usize = 64 << 20;

/// What a range may be used for, as its mapping has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// It can be written.
    pub write: bool,
    /// It can be executed.
    pub execute: bool,
}

/// A part of this process's memory that moves: whole pages, readable, within one mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    /// Its addresses.
    pub at: Range<usize>,
    /// How it will be mapped.
    pub access: Access,
}

/// Moves `moves`, which are in the order of their addresses and do not overlap, and seals the file. The process has one
/// thread. A range that the kernel refuses to read or to map stays as it is; the result is the ranges that moved.
///
/// What is moved must not be memory that its owner expects zeros of after `MADV_DONTNEED`: the file's bytes come back.
pub fn move_into_file(moves: &[Move]) -> io::Result<Vec<Range<usize>>> {
    let (offsets, size) = places(moves);
    let mut moved = Vec::with_capacity(moves.len());
    let file = memfd(IMAGE_NAME, size)?;
    // Large pages are made of what the file holds, and not of what is mapped already.
    let copied: Vec<bool> = moves.iter().zip(&offsets).map(|(one, offset)| copy(&file, &one.at, *offset)).collect();
    if let Ok(view) = View::new(&file, size) {
        view.use_large_pages(moves, &offsets);
    }
    // From here to the end nothing is allocated and no handler runs, so nothing is written to a range between its second
    // copy and its mapping.
    let _quiet = Quiet::new()?;
    for ((one, offset), copied) in moves.iter().zip(offsets).zip(copied) {
        if copied && (!one.access.write || copy(&file, &one.at, offset)) && map(&file, one, offset) {
            moved.push(one.at.clone());
        }
    }
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(moved)
}

/// What is done with pages ahead of their use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// They are mapped.
    Read,
    /// Each becomes a copy of this process's own.
    Write,
}

/// Faults pages in, many at once. Nothing that a program can see changes. Linux 5.14.
pub fn touch(at: Range<usize>, how: Touch) -> io::Result<()> {
    let advice = match how {
        Touch::Read => libc::MADV_POPULATE_READ,
        Touch::Write => libc::MADV_POPULATE_WRITE,
    };
    // SAFETY: the advice changes no byte. Where the range is not mapped, or not so, the kernel says so.
    match unsafe { libc::madvise(at.start as *mut libc::c_void, at.len(), advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Where each range lies in the file, and the file's size. Addresses and offsets are equal modulo a large page, and
/// neighbours stay neighbours, so that they can be one mapping.
fn places(moves: &[Move]) -> (Vec<u64>, usize) {
    let mut offsets = Vec::with_capacity(moves.len());
    // Of the cluster: its first address, rounded down, and that one's place.
    let (mut base, mut place) = (0, 0);
    let mut end = 0;
    for Move { at, .. } in moves {
        if offsets.is_empty() || at.start - end > FAR {
            place += (end - base).next_multiple_of(LARGE);
            base = at.start & !(LARGE - 1);
        }
        offsets.push((place + (at.start - base)) as u64);
        end = at.end;
    }
    (offsets, (place + (end - base)).next_multiple_of(LARGE))
}

/// A shared mapping of the whole file, at a multiple of a large page.
struct View {
    reserved: *mut libc::c_void,
    at: usize,
    size: usize,
}

impl View {
    fn new(file: &OwnedFd, size: usize) -> io::Result<View> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: address space that nobody else knows, and then a part of it.
        unsafe {
            let reserved = libc::mmap(std::ptr::null_mut(), size + LARGE, libc::PROT_NONE, flags, -1, 0);
            if reserved == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            let at = (reserved as usize).next_multiple_of(LARGE);
            let view = View { reserved, at, size };
            let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
            if libc::mmap(at as *mut libc::c_void, size, access, flags, file.as_raw_fd(), 0) == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            Ok(view)
        }
    }

    /// Where the kernel can (Linux 6.1 and later, enough memory in one piece): a child then has 512 pages by one fault.
    fn use_large_pages(&self, moves: &[Move], offsets: &[u64]) {
        let mut from = 0;
        for (one, offset) in moves.iter().zip(offsets) {
            let (start, end) = (*offset as usize & !(LARGE - 1), *offset as usize + one.at.len());
            for large in (start.max(from)..end).step_by(LARGE).take_while(|large| large + LARGE <= self.size) {
                // SAFETY: within the mapping; the bytes stay what they are. A refusal leaves small pages.
                unsafe { libc::madvise((self.at + large) as *mut libc::c_void, LARGE, libc::MADV_COLLAPSE) };
                from = large + LARGE;
            }
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nobody has a pointer into it.
        unsafe { libc::munmap(self.reserved, self.size + LARGE) };
    }
}

/// Whether all of it was readable: a mapping can reach beyond the end of its file.
fn copy(file: &OwnedFd, at: &Range<usize>, offset: u64) -> bool {
    let mut done = 0;
    while done < at.len() {
        // SAFETY: the kernel reads the range and says EFAULT if it cannot.
        let n = unsafe {
            libc::pwrite(
                file.as_raw_fd(),
                (at.start + done) as *const libc::c_void,
                at.len() - done,
                (offset + done as u64) as libc::off_t,
            )
        };
        match usize::try_from(n) {
            Ok(n @ 1..) => done += n,
            _ => return false,
        }
    }
    true
}

/// Whether the file took the range's place.
fn map(file: &OwnedFd, one: &Move, offset: u64) -> bool {
    let mut protection = libc::PROT_READ;
    if one.access.write {
        protection |= libc::PROT_WRITE;
    }
    if one.access.execute {
        protection |= libc::PROT_EXEC;
    }
    // SAFETY: the range holds the same bytes afterwards: they were copied just before, this is the only thread and no
    // signal comes. Who has references into it notices nothing.
    let mapped = unsafe {
        libc::mmap(
            one.at.start as *mut libc::c_void,
            one.at.len(),
            protection,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    mapped != libc::MAP_FAILED
}

/// For its life no signal is delivered: a handler could write to what has just been copied.
struct Quiet(libc::sigset_t);

impl Quiet {
    fn new() -> io::Result<Quiet> {
        // SAFETY: both sets are plain data and outlive the calls.
        unsafe {
            let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&raw mut all);
            if libc::sigprocmask(libc::SIG_SETMASK, &raw const all, &raw mut before) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Quiet(before))
        }
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        // SAFETY: the set was given by the kernel.
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

/// The pages at the thread pointer, which the kernel itself writes to (restartable sequences) whenever it moves the
/// thread to another CPU.
pub fn thread_pages() -> Range<usize> {
    // SAFETY: takes nothing. In glibc and musl the handle is the thread pointer.
    let at = unsafe { libc::pthread_self() } as usize & !(PAGE - 1);
    // The C library's thread-local variables lie just before it, its own record of the thread behind.
    at.saturating_sub(PAGE)..at.saturating_add(2 * PAGE)
}

/// Whether `word` stands in readable memory of this process that nothing writes to.
pub fn contains(at: Range<usize>, word: &[u8]) -> bool {
    // SAFETY: the caller got the range from the kernel as a readable mapping of a file, which this, the only thread,
    // does not take away meanwhile; memmem reads within it.
    let found = unsafe { libc::memmem(at.start as *const libc::c_void, at.len(), word.as_ptr().cast(), word.len()) };
    !found.is_null()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: usize, end: usize) -> Move {
        Move { at: start..end, access: Access { write: true, execute: false } }
    }

    #[test]
    fn neighbours_stay_neighbours_and_every_offset_is_congruent() {
        let moves =
            [at(0x7000, 0x9000), at(0x9000, 0xa000), at(0x40_0000, 0x40_1000), at(0x7f00_0020_3000, 0x7f00_0020_5000)];
        let (offsets, size) = places(&moves);
        assert_eq!(offsets, [0x7000, 0x9000, 0x40_0000, 0x60_3000]);
        assert_eq!(size, 0x80_0000);
        for (one, offset) in moves.iter().zip(offsets) {
            assert_eq!(one.at.start % LARGE, offset as usize % LARGE);
        }
    }

    #[test]
    fn moved_memory_keeps_its_bytes_stays_private_and_has_no_pages_of_its_own() {
        let len = 64 * PAGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh mapping, used within its bounds, by this thread only.
        let bytes = unsafe {
            let p = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert_ne!(p, libc::MAP_FAILED);
            std::slice::from_raw_parts_mut(p.cast::<u8>(), len)
        };
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = (i / 7) as u8;
        }
        let start = bytes.as_ptr() as usize;
        let moved = move_into_file(&[at(start, start + len)]).unwrap();
        assert_eq!(moved, std::slice::from_ref(&(start..start + len)));
        assert!(bytes.iter().enumerate().all(|(i, &byte)| byte == (i / 7) as u8));
        assert_eq!(anonymous_kb(start), 0);
        bytes[0] = 99;
        bytes[PAGE] = 98;
        assert_eq!(anonymous_kb(start), 8);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps.lines().find(|line| line.starts_with(&format!("{start:x}-"))).unwrap();
        assert!(line.contains("rw-p") && line.contains("/memfd:zeroboot-image"), "{line}");
    }

    fn anonymous_kb(start: usize) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&format!("{start:x}-")));
        let line = lines.find(|line| line.starts_with("Anonymous:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}
