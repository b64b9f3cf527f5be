//! Doorbell and mailbox: how frames cross the border of a VM.
//!
//! The agent owns one I/O port, the doorbell, and [`PAGES`] pinned pages, the mailbox: one header page,
//! [`AREA_PAGES`] pages towards the guest, [`AREA_PAGES`] pages from it. One 32-bit write to the port is
//! one exit; its value is a [`Ring`] in the low byte and an argument in the other 24 bits.
//!
//! ```text
//! header page, all little endian
//!   0x000  u32  MAGIC
//!   0x004  u32  VERSION
//!   0x008  u64 x 2*AREA_PAGES  guest-physical addresses: first the pages towards the guest, then the others
//!   0x800  u32  bytes in the area towards the guest   (host writes, guest reads after each ring)
//!   0x804  u32  1: the host has more bytes waiting     (ring Want to get them)
//!   0x808  u32  at `Ready`: bytes in the area from the guest, which are what the runner says of itself
//! ```
//!
//! The host reads addresses once, when the template rings `Ready`, and never again: a fork cannot move
//! its mailbox. At each later ring it copies the announced bytes out, once, before it looks at any of
//! them, and then fills the other area with what it has for the guest. A frame may be cut anywhere: both
//! areas carry a stream of bytes.

use crate::MAX_FRAME;

/// The doorbell's I/O port.
pub const DOORBELL_PORT: u16 = 0x510;
/// The port of the write-only boot console (a serial port's data register).
pub const CONSOLE_PORT: u16 = 0x3f8;
/// First word of the header page: `ZBMB`.
pub const MAGIC: u32 = u32::from_le_bytes(*b"ZBMB");
/// Version of this layout; a template records it.
pub const VERSION: u32 = 1;
/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Bytes of each area: one frame of the largest size.
pub const AREA: usize = MAX_FRAME;
/// Pages of each area.
pub const AREA_PAGES: usize = AREA / PAGE;
/// All pages: the header and the two areas.
pub const PAGES: usize = 1 + 2 * AREA_PAGES;
/// Where the page addresses begin in the header.
pub const TABLE_AT: usize = 8;
/// Where the length of the bytes towards the guest is in the header.
pub const LENGTH_AT: usize = 0x800;
/// Where the `more` flag is in the header.
pub const MORE_AT: usize = 0x804;

/// Where the length of the runner's own description is in the header, at `Ready`.
pub const ABOUT_AT: usize = 0x808;
/// Most bytes of that description.
pub const MAX_ABOUT: usize = 4096;

/// Why the guest rings. The argument is the number of bytes in the area from the guest, except for `Ready`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Ring {
    /// The template is warm. The argument is the header page's frame number. The snapshot is taken here.
    Ready = 1,
    /// Bytes for the host; the guest takes no input now.
    Output = 2,
    /// Bytes for the host, if any, and the guest takes input.
    Want = 3,
    /// The last bytes: the run is over.
    Done = 4,
}

impl Ring {
    /// The doorbell's value.
    pub fn encode(self, argument: u32) -> u32 {
        u32::from(self as u8) | argument << 8
    }

    /// The ring and its argument, if the low byte is one.
    pub fn decode(value: u32) -> Option<(Ring, u32)> {
        let ring = match value & 0xff {
            1 => Ring::Ready,
            2 => Ring::Output,
            3 => Ring::Want,
            4 => Ring::Done,
            _ => return None,
        };
        Some((ring, value >> 8))
    }
}

const _: () = assert!(AREA.is_multiple_of(PAGE) && TABLE_AT + 2 * AREA_PAGES * 8 <= LENGTH_AT);
// The largest argument of Output, Want and Done.
const _: () = assert!(AREA < 1 << 24);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_comes_back_as_sent() {
        for ring in [Ring::Ready, Ring::Output, Ring::Want, Ring::Done] {
            assert_eq!(Ring::decode(ring.encode(AREA as u32)), Some((ring, AREA as u32)));
        }
        assert_eq!(Ring::decode(0), None);
        assert_eq!(Ring::decode(0xffff_ffff), None);
    }
}
