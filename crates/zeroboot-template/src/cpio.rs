//! An archive in the `newc` format, which the Linux kernel unpacks into its first root file system
//! (kernel documentation: `driver-api/early-userspace/buffer-format`).
//!
//! The writer is deterministic: the same entries in the same order give the same bytes. Inode numbers count up,
//! times are zero unless given, so that the archive's hash names its content.

use std::io::{self, Write};

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind<'a> {
    /// A directory.
    Directory,
    /// A file and its bytes.
    File(&'a [u8]),
    /// A symbolic link and its target.
    Symlink(&'a [u8]),
    /// A character device.
    CharDevice {
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
}

/// One entry.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// The path, relative, without a leading slash.
    pub path: &'a [u8],
    /// Permission bits; the type comes from `kind`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds.
    pub mtime: u32,
    /// What it is.
    pub kind: Kind<'a>,
}

impl<'a> Entry<'a> {
    /// A directory of root's.
    pub fn directory(path: &'a str, mode: u32) -> Entry<'a> {
        Entry::new(path, mode, Kind::Directory)
    }

    /// A file of root's.
    pub fn file(path: &'a str, mode: u32, bytes: &'a [u8]) -> Entry<'a> {
        Entry::new(path, mode, Kind::File(bytes))
    }

    /// A symbolic link.
    pub fn symlink(path: &'a str, target: &'a str) -> Entry<'a> {
        Entry::new(path, 0o777, Kind::Symlink(target.as_bytes()))
    }

    /// A character device of root's.
    pub fn char_device(path: &'a str, mode: u32, major: u32, minor: u32) -> Entry<'a> {
        Entry::new(path, mode, Kind::CharDevice { major, minor })
    }

    fn new(path: &'a str, mode: u32, kind: Kind<'a>) -> Entry<'a> {
        Entry { path: path.as_bytes(), mode, uid: 0, gid: 0, mtime: 0, kind }
    }
}

/// How every archive ends.
pub const END: &[u8; 124] = b"07070100000000000000000000000000000000000000010000000000000000\
00000000000000000000000000000000\
0000000b00000000TRAILER!!!\0\0\0\0";

/// Writes an archive.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    inode: u32,
    written: u64,
}

impl<W: Write> Writer<W> {
    /// An empty archive.
    pub fn new(out: W) -> Writer<W> {
        Writer::continuing(out, 0)
    }

    /// What will lie behind an archive without its [`END`]: inode numbers go on after `inode`.
    pub fn continuing(out: W, inode: u32) -> Writer<W> {
        Writer { out, inode, written: 0 }
    }

    /// Adds an entry. Paths and link targets with a NUL byte, and files of 4 GiB and more, do not fit the format.
    pub fn append(&mut self, entry: &Entry<'_>) -> io::Result<()> {
        const DIRECTORY: u32 = 0o040_000;
        const FILE: u32 = 0o100_000;
        const SYMLINK: u32 = 0o120_000;
        const CHAR_DEVICE: u32 = 0o020_000;
        let (kind, data, device): (u32, &[u8], (u32, u32)) = match entry.kind {
            Kind::Directory => (DIRECTORY, &[], (0, 0)),
            Kind::File(bytes) => (FILE, bytes, (0, 0)),
            Kind::Symlink(target) => (SYMLINK, target, (0, 0)),
            Kind::CharDevice { major, minor } => (CHAR_DEVICE, &[], (major, minor)),
        };
        if entry.path.is_empty() || entry.path.contains(&0) || entry.path.starts_with(b"/") {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a relative path"));
        }
        self.inode += 1;
        let links = if kind == DIRECTORY { 2 } else { 1 };
        self.header(entry, self.inode, kind | (entry.mode & 0o7777), links, data, device)
    }

    /// Ends the archive and gives back what it was written to.
    pub fn finish(mut self) -> io::Result<W> {
        self.put(END)?;
        Ok(self.out)
    }

    fn header(
        &mut self,
        entry: &Entry<'_>,
        inode: u32,
        mode: u32,
        links: u32,
        data: &[u8],
        device: (u32, u32),
    ) -> io::Result<()> {
        let too_large = || io::Error::new(io::ErrorKind::FileTooLarge, "too large for a cpio archive");
        let size = u32::try_from(data.len()).map_err(|_| too_large())?;
        let name_size = u32::try_from(entry.path.len() + 1).map_err(|_| too_large())?;
        let fields =
            [inode, mode, entry.uid, entry.gid, links, entry.mtime, size, 0, 0, device.0, device.1, name_size, 0];
        let mut header = String::with_capacity(110);
        header.push_str("070701");
        for field in fields {
            use std::fmt::Write as _;
            write!(header, "{field:08x}").map_err(io::Error::other)?;
        }
        self.put(header.as_bytes())?;
        self.put(entry.path)?;
        self.put(&[0])?;
        self.pad()?;
        self.put(data)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    // Header with name, and data, each end on a multiple of four.
    fn pad(&mut self) -> io::Result<()> {
        let missing = (4 - self.written % 4) % 4;
        self.put(&[0; 3][..missing as usize])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A reader of just what the writer writes.
    fn read(mut bytes: &[u8]) -> Vec<(Vec<u8>, u32, Vec<u8>)> {
        let total = bytes.len();
        let mut entries = Vec::new();
        loop {
            let field = |i: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * i..14 + 8 * i]).unwrap();
                u32::from_str_radix(text, 16).unwrap() as usize
            };
            assert_eq!(&bytes[..6], b"070701");
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = bytes[110..110 + name_size - 1].to_vec();
            assert_eq!(bytes[110 + name_size - 1], 0);
            let align = |n: usize| n.div_ceil(4) * 4;
            let start = align(110 + name_size);
            let data = bytes[start..start + size].to_vec();
            let done = name == b"TRAILER!!!";
            bytes = &bytes[align(start + size)..];
            assert_eq!((total - bytes.len()) % 4, 0);
            if done {
                assert!(bytes.is_empty());
                return entries;
            }
            entries.push((name, mode as u32, data));
        }
    }

    proptest! {
        #[test]
        fn what_is_written_can_be_read(
            files in prop::collection::vec(("[a-z]{1,9}(/[a-zA-Z0-9._-]{1,30}){0,4}", 0u32..0o10000, prop::collection::vec(any::<u8>(), 0..300)), 0..12)
        ) {
            let mut writer = Writer::new(Vec::new());
            for (path, mode, data) in &files {
                writer.append(&Entry::file(path, *mode, data)).unwrap();
            }
            let entries = read(&writer.finish().unwrap());
            let expected: Vec<_> = files.into_iter().map(|(p, m, d)| (p.into_bytes(), 0o100_000 | m, d)).collect();
            prop_assert_eq!(entries, expected);
        }
    }

    #[test]
    fn a_path_that_leaves_the_archive_is_refused() {
        let mut writer = Writer::new(Vec::new());
        assert!(writer.append(&Entry::directory("/etc", 0o755)).is_err());
        assert!(writer.append(&Entry::directory("", 0o755)).is_err());
        assert!(writer.append(&Entry::file("a\0b", 0o644, b"")).is_err());
    }

    #[test]
    fn the_end_is_an_entry_like_any_other() {
        let mut writer = Writer::new(Vec::new());
        let end = Entry { path: b"TRAILER!!!", mode: 0, uid: 0, gid: 0, mtime: 0, kind: Kind::File(&[]) };
        writer.header(&end, 0, 0, 1, &[], (0, 0)).unwrap();
        assert_eq!(writer.out.as_slice(), END);
    }

    #[test]
    fn each_kind_has_its_type_bits() {
        let mut writer = Writer::new(Vec::new());
        writer.append(&Entry::directory("dev", 0o755)).unwrap();
        writer.append(&Entry::char_device("dev/null", 0o666, 1, 3)).unwrap();
        writer.append(&Entry::symlink("bin", "usr/bin")).unwrap();
        let modes: Vec<u32> = read(&writer.finish().unwrap()).iter().map(|entry| entry.1).collect();
        assert_eq!(modes, [0o040_755, 0o020_666, 0o120_777]);
    }
}
