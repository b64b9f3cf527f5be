//! The host's half of the doorbell and the mailbox (layout: [`zeroboot_proto::mailbox`]).
//!
//! All that a guest can do here is harm itself. The page addresses are read once, from the trusted
//! template. Lengths are checked against the area; bytes are copied out once, before any of them is
//! looked at; and while the host copies, the only vCPU stands still.

use serde::{Deserialize, Serialize};
use zeroboot_proto::mailbox::{
    ABOUT_AT, AREA, AREA_PAGES, LENGTH_AT, MAGIC, MAX_ABOUT, MORE_AT, PAGE, TABLE_AT, VERSION,
};
use zeroboot_sys::memory::{GuestPhys, Mapping, OutOfBounds};

/// Why a mailbox cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MailboxError {
    /// The header does not begin with the magic number.
    #[error("no mailbox at guest address {0}")]
    NoMagic(GuestPhys),
    /// An agent of another version of Zeroboot.
    #[error("the guest's mailbox has version {0}; this program speaks version {VERSION}")]
    Version(u32),
    /// A page address is not a page of the guest's memory, or is given twice.
    #[error("the mailbox names {0} as a page")]
    BadPage(GuestPhys),
    /// More bytes than an area has.
    #[error("the guest announces {0} bytes in an area of {AREA}")]
    TooLong(u32),
    /// Outside of memory.
    #[error(transparent)]
    OutOfBounds(#[from] OutOfBounds),
}

/// Where a template's mailbox is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mailbox {
    header: u64,
    to_guest: Vec<u64>,
    from_guest: Vec<u64>,
}

impl Mailbox {
    /// At these pages, unchecked. For tests of what reads saved ones.
    #[cfg(test)]
    pub(crate) fn at(header: u64, to_guest: Vec<u64>, from_guest: Vec<u64>) -> Mailbox {
        Mailbox { header, to_guest, from_guest }
    }

    /// Reads the header that the agent announced with `Ready`.
    pub(crate) fn discover(memory: &Mapping, frame: u32) -> Result<Mailbox, MailboxError> {
        let header = GuestPhys(u64::from(frame) * PAGE as u64);
        if memory.read_u32(header)? != MAGIC {
            return Err(MailboxError::NoMagic(header));
        }
        match memory.read_u32(header.plus(4))? {
            VERSION => {}
            other => return Err(MailboxError::Version(other)),
        }
        let mut pages = Vec::with_capacity(2 * AREA_PAGES);
        for i in 0..2 * AREA_PAGES as u64 {
            pages.push(memory.read_u64(header.plus(TABLE_AT as u64 + 8 * i))?);
        }
        let from_guest = pages.split_off(AREA_PAGES);
        let mailbox = Mailbox { header: header.0, to_guest: pages, from_guest };
        mailbox.check(memory.len())?;
        Ok(mailbox)
    }

    /// What the runner said of itself when the template became ready.
    pub(crate) fn about(&self, memory: &Mapping) -> Result<Vec<u8>, MailboxError> {
        let len = memory.read_u32(GuestPhys(self.header).plus(ABOUT_AT as u64))?;
        if len as usize > MAX_ABOUT {
            return Err(MailboxError::TooLong(len));
        }
        let mut about = Vec::new();
        self.take(memory, len, &mut about)?;
        Ok(about)
    }

    /// Whether every page is a different whole page of `memory` bytes. A saved mailbox is checked as a
    /// discovered one is.
    pub(crate) fn check(&self, memory: u64) -> Result<(), MailboxError> {
        let mut pages: Vec<u64> = self.pages().collect();
        pages.sort_unstable();
        for (i, &page) in pages.iter().enumerate() {
            let twice = i > 0 && pages.get(i - 1) == Some(&page);
            let inside = page.checked_add(PAGE as u64).is_some_and(|end| end <= memory);
            if twice || !inside || !page.is_multiple_of(PAGE as u64) {
                return Err(MailboxError::BadPage(GuestPhys(page)));
            }
        }
        match (self.to_guest.len(), self.from_guest.len()) {
            (AREA_PAGES, AREA_PAGES) => Ok(()),
            _ => Err(MailboxError::BadPage(GuestPhys(self.header))),
        }
    }

    /// All its pages.
    pub(crate) fn pages(&self) -> impl Iterator<Item = u64> {
        std::iter::once(self.header).chain(self.to_guest.iter().copied()).chain(self.from_guest.iter().copied())
    }

    /// Puts at most [`AREA`] bytes for the guest. `more`: further bytes wait.
    pub(crate) fn put(&self, memory: &Mapping, bytes: &[u8], more: bool) -> Result<(), MailboxError> {
        for (page, chunk) in self.to_guest.iter().zip(bytes.chunks(PAGE)) {
            memory.write(GuestPhys(*page), chunk)?;
        }
        let header = GuestPhys(self.header);
        memory.write(header.plus(LENGTH_AT as u64), &(bytes.len().min(AREA) as u32).to_le_bytes())?;
        memory.write(header.plus(MORE_AT as u64), &u32::from(more).to_le_bytes())?;
        Ok(())
    }

    /// Copies `len` bytes from the guest into `out`, which is emptied first.
    pub(crate) fn take(&self, memory: &Mapping, len: u32, out: &mut Vec<u8>) -> Result<(), MailboxError> {
        let bytes = len as usize;
        if bytes > AREA {
            return Err(MailboxError::TooLong(len));
        }
        out.clear();
        out.resize(bytes, 0);
        for (page, chunk) in self.from_guest.iter().zip(out.chunks_mut(PAGE)) {
            memory.read(GuestPhys(*page), chunk)?;
        }
        Ok(())
    }
}

/// For the fuzzer and the tests: a megabyte of guest memory with `page` at the announced frame, looked at as
/// the host looks at it.
#[doc(hidden)]
pub fn fuzz_mailbox(page: &[u8], frame: u32, len: u32) -> bool {
    let memory = zeroboot_sys::memory::BootMemory::new(zeroboot_sys::memory::MiB(1)).and_then(|m| m.map());
    let Ok(memory) = memory else { return false };
    let at = GuestPhys(u64::from(frame % 256) * PAGE as u64);
    if memory.write(at, page.get(..page.len().min(PAGE)).unwrap_or_default()).is_err() {
        return false;
    }
    assert!(frame < 256 || Mailbox::discover(&memory, frame).is_err(), "a mailbox outside of memory");
    let Ok(mailbox) = Mailbox::discover(&memory, frame % 256) else { return false };
    let mut out = Vec::new();
    let about = mailbox.about(&memory).is_ok();
    let taken = mailbox.take(&memory, len, &mut out).is_ok();
    // What is inside can be written to as well.
    mailbox.put(&memory, page, true).is_ok() && about && taken
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(pages: impl Fn(usize) -> u64) -> Vec<u8> {
        let mut page = vec![0; PAGE];
        page[..4].copy_from_slice(&MAGIC.to_le_bytes());
        page[4..8].copy_from_slice(&VERSION.to_le_bytes());
        for i in 0..2 * AREA_PAGES {
            page[TABLE_AT + 8 * i..][..8].copy_from_slice(&pages(i).to_le_bytes());
        }
        page
    }

    #[test]
    fn a_mailbox_in_memory_is_taken_and_others_are_refused() {
        let good = |i: usize| 0x1_0000 + (i * PAGE) as u64;
        assert!(fuzz_mailbox(&header(good), 1, 65536));
        // A length above the area.
        assert!(!fuzz_mailbox(&header(good), 1, 65537));
        // The header page itself, twice the same, unaligned, beyond the end, at the end of all addresses.
        for bad in [0x1000, good(1), 0x1_0001, 1 << 20, u64::MAX - 4095, u64::MAX] {
            assert!(!fuzz_mailbox(&header(|i| if i == 0 { bad } else { good(i) }), 1, 0), "{bad:#x}");
        }
        let mut other = header(good);
        other[4] = 9;
        assert!(!fuzz_mailbox(&other, 1, 0));
    }

    proptest! {
        #[test]
        fn no_header_makes_the_host_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..600), frame: u32, len: u32, right: bool,
        ) {
            let mut page = bytes;
            if right && page.len() > 8 {
                page[..4].copy_from_slice(&MAGIC.to_le_bytes());
                page[4..8].copy_from_slice(&VERSION.to_le_bytes());
            }
            fuzz_mailbox(&page, frame, len);
        }
    }
}
