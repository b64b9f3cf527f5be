//! A kernel that can be entered at once: the ELF `vmlinux` inside a distribution's `vmlinuz`.

use std::io::{self, Read};

/// Why no kernel came out of a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// Neither an ELF nor a bzImage.
    #[error("not a kernel: neither an ELF file nor a bzImage")]
    NotAKernel,
    /// A bzImage, but no payload in it could be unpacked to an ELF file.
    #[error("the bzImage holds no ELF payload that is compressed with xz or zstd, or not at all")]
    NoPayload,
}

/// A `vmlinux` is not larger than this (a hostile file must not fill the memory).
const MOST: u64 = 512 << 20;
const ELF: &[u8] = b"\x7fELF";
const XZ: &[u8] = b"\xfd7zXZ\x00";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";

/// The ELF kernel in `file`, which is one already or a bzImage.
pub fn vmlinux(file: &[u8]) -> Result<Vec<u8>, KernelError> {
    if file.starts_with(ELF) {
        return Ok(file.to_vec());
    }
    // The setup header's magic, at 0x202 (kernel documentation: `arch/x86/boot`).
    if file.get(0x202..0x206) != Some(b"HdrS") {
        return Err(KernelError::NotAKernel);
    }
    // The payload's place is in the header too, but it is relative to the protected-mode code and its length includes
    // a trailer; looking for the magic is what the kernel's own `extract-vmlinux` does and needs neither.
    for (magic, unpack) in [(XZ, unxz as fn(&[u8]) -> io::Result<Vec<u8>>), (ZSTD, unzstd), (ELF, as_is)] {
        for at in positions(file, magic) {
            if let Some(payload) = file.get(at..)
                && let Ok(elf) = unpack(payload)
                && elf.starts_with(ELF)
            {
                return Ok(elf);
            }
        }
    }
    Err(KernelError::NoPayload)
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
        image[1024..1030].copy_from_slice(XZ);
        image[2048..2052].copy_from_slice(ZSTD);
        assert!(matches!(vmlinux(&image), Err(KernelError::NoPayload)));
    }

    #[test]
    fn a_kernel_tells_its_release() {
        let kernel = b"....Linux version %s (%s)....Linux version 6.1.0-42-cloud-amd64 (debian-kernel@lists.debian.org) gcc-12 and so on and so forth...........";
        assert_eq!(release(kernel).unwrap(), "6.1.0-42-cloud-amd64");
        assert_eq!(release(b"nothing"), None);
    }
}
