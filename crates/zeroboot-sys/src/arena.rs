//! An allocator for a library in a process whose memory is going to be moved into an image.
//!
//! The fork server allocates for each fork. In the C library's heap that would write to pages of the image, and a
//! mapping that was written to once has its page tables copied at every fork.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

/// Bytes of address space. Only the used part is touched.
const SIZE: usize = 16 << 20;
/// Size classes: powers of two from 16 bytes to 2^20.
const SMALLEST: u32 = 4;
const CLASSES: usize = 17;

/// The C library's allocator until [`begin`], and from then on this module's own memory.
pub struct Arena;

struct State {
    locked: AtomicBool,
    /// 0: not begun.
    start: AtomicUsize,
    next: AtomicUsize,
    /// For now the C library's allocator serves.
    aside: AtomicBool,
    /// Of each class the block freed last, whose first word leads to the one before.
    free: [AtomicUsize; CLASSES],
}

static STATE: State = State {
    locked: AtomicBool::new(false),
    start: AtomicUsize::new(0),
    next: AtomicUsize::new(0),
    aside: AtomicBool::new(false),
    free: [const { AtomicUsize::new(0) }; CLASSES],
};

/// Allocates from this module's own memory from now on. What was allocated before stays where it is.
pub fn begin() -> std::io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping that nobody else knows.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), SIZE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    STATE.next.store(at as usize, Ordering::Relaxed);
    STATE.start.store(at as usize, Ordering::Release);
    Ok(())
}

/// Runs `work` with the C library's allocator, for much that is gone or never freed before memory is moved: what the
/// arena has used once is copied at each fork.
pub fn aside<T>(work: impl FnOnce() -> T) -> T {
    STATE.aside.store(true, Ordering::Relaxed);
    let done = work();
    STATE.aside.store(false, Ordering::Relaxed);
    done
}

/// Where that memory is; empty before [`begin`].
pub fn range() -> std::ops::Range<usize> {
    let start = STATE.start.load(Ordering::Acquire);
    start..if start == 0 { 0 } else { start + SIZE }
}

/// The class of a layout; `None` if it is too large.
fn class(layout: Layout) -> Option<usize> {
    let bits = layout.size().max(layout.align()).max(1).next_power_of_two().trailing_zeros();
    let class = bits.saturating_sub(SMALLEST) as usize;
    (class < CLASSES).then_some(class)
}

struct Lock;

impl Lock {
    fn take() -> Lock {
        while STATE.locked.swap(true, Ordering::Acquire) {
            std::hint::spin_loop();
        }
        Lock
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        STATE.locked.store(false, Ordering::Release);
    }
}

// SAFETY: a block is of a power of two at least as large as size and alignment, at an address that is a multiple of it
// (or of a page), is given out once until it is freed, and lies in a mapping that lives as long as the process. What is
// not from there goes back to `System`, which it came from.
unsafe impl GlobalAlloc for Arena {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let ours = range();
        let Some(class) = class(layout).filter(|_| !ours.is_empty() && !STATE.aside.load(Ordering::Relaxed)) else {
            // SAFETY: as the caller promises.
            return unsafe { System.alloc(layout) };
        };
        let _lock = Lock::take();
        let Some(free) = STATE.free.get(class) else { return std::ptr::null_mut() };
        let first = free.load(Ordering::Relaxed);
        if first != 0 {
            // SAFETY: a freed block of ours holds the address of the next in its first word.
            free.store(unsafe { *(first as *const usize) }, Ordering::Relaxed);
            return first as *mut u8;
        }
        let size = 1usize << (class as u32 + SMALLEST);
        let at = STATE.next.load(Ordering::Relaxed).next_multiple_of(size);
        if at + size > ours.end {
            drop(_lock);
            // SAFETY: as the caller promises.
            return unsafe { System.alloc(layout) };
        }
        STATE.next.store(at + size, Ordering::Relaxed);
        at as *mut u8
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if !range().contains(&(at as usize)) {
            // SAFETY: not from the arena, so from `System`.
            return unsafe { System.dealloc(at, layout) };
        }
        let Some(free) = class(layout).and_then(|class| STATE.free.get(class)) else { return };
        let _lock = Lock::take();
        // SAFETY: a block of at least 16 bytes, aligned as that, that nobody uses any more.
        unsafe { *at.cast::<usize>() = free.load(Ordering::Relaxed) };
        free.store(at as usize, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_do_not_overlap_are_aligned_and_are_used_again() {
        let (arena, layout) = (Arena, |size, align| Layout::from_size_align(size, align).unwrap());
        // SAFETY: every block is used within its size, and freed with its layout.
        unsafe {
            let before = arena.alloc(layout(100, 8));
            begin().unwrap();
            let mut blocks = Vec::new();
            for i in 0..1000usize {
                let layout = layout(1 + i * 7 % 5000, 1 << (i % 7));
                let block = arena.alloc(layout);
                assert!(range().contains(&(block as usize)) && (block as usize).is_multiple_of(layout.align()));
                block.write_bytes(i as u8, layout.size());
                blocks.push((block, layout, i as u8));
            }
            for (block, layout, byte) in &blocks {
                assert!(std::slice::from_raw_parts(*block, layout.size()).iter().all(|b| b == byte));
            }
            for (block, layout, _) in blocks {
                arena.dealloc(block, layout);
            }
            // So much at once would not fit a thousand times.
            for _ in 0..1000 {
                let block = arena.alloc(layout(1 << 19, 8));
                assert!(range().contains(&(block as usize)));
                arena.dealloc(block, layout(1 << 19, 8));
            }
            let aside = aside(|| arena.alloc(layout(100, 8)));
            assert!(!range().contains(&(aside as usize)));
            arena.dealloc(aside, layout(100, 8));
            let large = arena.alloc(layout(64 << 20, 8));
            assert!(!large.is_null() && !range().contains(&(large as usize)));
            arena.dealloc(large, layout(64 << 20, 8));
            arena.dealloc(before, layout(100, 8));
        }
    }
}
