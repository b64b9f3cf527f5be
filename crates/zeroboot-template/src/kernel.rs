//! A kernel that can be entered at once: the ELF `vmlinux` inside a distribution's `vmlinuz`.

use std::io::{self, Read};

/// Why no kernel came out of a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// Neither an ELF nor a bzImage.
    #[error("this is not a kernel: it is neither an ELF file nor a bzImage")]
    NotAKernel,
    /// A bzImage, but no payload in it could be unpacked to an ELF file.
    #[error("the bzImage has no ELF payload that is uncompressed or compressed with lz4, xz or zstd")]
    NoPayload,
    /// The payload does not unpack.
    #[error("the bzImage's payload is damaged")]
    Unpack(#[source] io::Error),
}

/// Most bytes of a `vmlinux`: a hostile file must not fill the memory.
const MOST: u64 = 512 << 20;
const ELF: &[u8] = b"\x7fELF";
const XZ: &[u8] = b"\xfd7zXZ\x00";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
/// The "legacy" frame, which the kernel's build uses.
const LZ4: &[u8] = b"\x02\x21\x4c\x18";

/// The ELF kernel in `file`, which is one already or a bzImage (kernel documentation: `arch/x86/boot`).
pub fn vmlinux(file: &[u8]) -> Result<Vec<u8>, KernelError> {
    if file.starts_with(ELF) {
        return Ok(file.to_vec());
    }
    if file.get(0x202..0x206) != Some(b"HdrS") {
        return Err(KernelError::NotAKernel);
    }
    let payload = payload(file).ok_or(KernelError::NoPayload)?;
    let unpack = match payload {
        _ if payload.starts_with(XZ) => unxz,
        _ if payload.starts_with(ZSTD) => unzstd,
        _ if payload.starts_with(LZ4) => unlz4,
        _ if payload.starts_with(ELF) => as_is,
        _ => return Err(KernelError::NoPayload),
    };
    let elf = unpack(payload).map_err(KernelError::Unpack)?;
    if elf.starts_with(ELF) { Ok(elf) } else { Err(KernelError::NoPayload) }
}

/// The compressed kernel, by the setup header's `setup_sects`, `payload_offset` and `payload_length`.
fn payload(file: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(file.get(at..at + 4)?.try_into().ok()?) as usize);
    // Zero stands for four, for historical reasons.
    let sectors = match *file.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = ((sectors + 1) * 512).checked_add(word(0x248)?)?;
    file.get(start..start.checked_add(word(0x24c)?)?)
}

/// The release (`6.1.0-42-cloud-amd64`) that a `vmlinux` says it is.
pub fn release(vmlinux: &[u8]) -> Option<String> {
    let mark = b"Linux version ";
    positions(vmlinux, mark).find_map(|at| {
        let rest = vmlinux.get(at + mark.len()..at + mark.len() + 80)?;
        let word = rest.split(|byte| *byte == b' ').next()?;
        let text = std::str::from_utf8(word).ok()?;
        // The format string of the same banner is in the kernel too: "%s".
        text.starts_with(|c: char| c.is_ascii_digit()).then(|| text.to_owned())
    })
}

/// Unpacks an xz stream; bytes after it are left alone.
pub fn unxz(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    lzma_rust2::XzReader::new(bytes, false).take(MOST).read_to_end(&mut out)?;
    Ok(out)
}

fn unzstd(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    let decoder = ruzstd::decoding::StreamingDecoder::new(bytes).map_err(io::Error::other)?;
    decoder.take(MOST).read_to_end(&mut out)?;
    Ok(out)
}

/// Blocks, each with its compressed length before it, of 8 MiB each but for the last. What follows the last (the kernel
/// appends the unpacked size) is not a whole block.
fn unlz4(bytes: &[u8]) -> io::Result<Vec<u8>> {
    const BLOCK: usize = 8 << 20;
    let mut rest = bytes.get(LZ4.len()..).unwrap_or_default();
    let mut out = Vec::new();
    while let Some((length, tail)) = rest.split_first_chunk::<4>() {
        let Some((block, tail)) = tail.split_at_checked(u32::from_le_bytes(*length) as usize) else { break };
        let block = lz4_flex::block::decompress(block, BLOCK).map_err(io::Error::other)?;
        let last = block.len() < BLOCK;
        out.extend_from_slice(&block);
        if out.len() as u64 > MOST {
            return Err(io::Error::other("too large"));
        }
        if last {
            break;
        }
        rest = tail;
    }
    Ok(out)
}

fn as_is(bytes: &[u8]) -> io::Result<Vec<u8>> {
    Ok(bytes.to_vec())
}

fn positions<'a>(haystack: &'a [u8], needle: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    haystack.windows(needle.len()).enumerate().filter(move |(_, window)| *window == needle).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_elf_is_taken_as_it_is() {
        assert_eq!(vmlinux(b"\x7fELF rest").unwrap(), b"\x7fELF rest");
    }

    #[test]
    fn other_files_are_refused() {
        assert!(matches!(vmlinux(b""), Err(KernelError::NotAKernel)));
        assert!(matches!(vmlinux(&[0; 4096]), Err(KernelError::NotAKernel)));
        let mut image = vec![0; 4096];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        assert!(matches!(vmlinux(&image), Err(KernelError::NoPayload)));
        // A payload that is cut short.
        image[0x24c..0x250].copy_from_slice(&64u32.to_le_bytes());
        for magic in [XZ, ZSTD, LZ4] {
            image[2560..2560 + magic.len()].copy_from_slice(magic);
            assert!(vmlinux(&image).is_err());
        }
        // One that lies about its length.
        image[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(vmlinux(&image), Err(KernelError::NoPayload)));
    }

    #[test]
    fn a_kernel_tells_its_release() {
        let kernel = b"....Linux version %s (%s)....Linux version 6.1.0-42-cloud-amd64 (debian-kernel@lists.debian.org) gcc-12 and so on and so forth...........";
        assert_eq!(release(kernel).unwrap(), "6.1.0-42-cloud-amd64");
        assert_eq!(release(b"nothing"), None);
    }
}
