//! Files into the working directory before the run, and out of it after.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid};
use rustix::io::Errno;
use zeroboot_proto::pattern::{MAX_FOUND, is_meant, is_pattern};
use zeroboot_proto::{FileChunk, Kind, MAX_PAYLOAD, encode};

/// Most entries of directories that are looked at for one pattern.
const MAX_SEEN: usize = 100_000;

/// An input file could not be written. The text comes into the host's log, so it does not have the file's name.
#[derive(Debug, thiserror::Error)]
#[error("cannot write an input file: {0}")]
pub(crate) struct PutError(#[from] io::Error);

/// A pattern would have to be compared with too many entries.
#[derive(Debug, thiserror::Error)]
#[error("the working directory has more than {} entries", MAX_SEEN)]
struct TooManyEntries;

/// The working directory.
pub(crate) struct Files {
    root: OwnedFd,
    path: Vec<u8>,
    owner: Option<(u32, u32)>,
    writing: Option<(Vec<u8>, std::fs::File)>,
    /// What was put in, as it was then. Patterns leave it out as long as it stays so.
    put: HashMap<Vec<u8>, Option<Version>>,
    /// What was brought back.
    brought: BTreeSet<Vec<u8>>,
}

/// Inode, size and time of the last change: what differs when a file was written to.
type Version = (u64, i64, i64, u64);

fn version(stat: &Stat) -> Version {
    (stat.st_ino, stat.st_size, stat.st_mtime, stat.st_mtime_nsec)
}

/// Why a path is not a file to bring back.
enum Unfit {
    Directory,
    Other(String),
}

impl Files {
    /// Over `cwd`. New files are given to `owner`, if that is another user than this process's.
    pub(crate) fn new(cwd: &Path, owner: Option<(u32, u32)>) -> io::Result<Files> {
        let root = rustix::fs::open(cwd, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let path = cwd.as_os_str().as_bytes().to_vec();
        Ok(Files { root, path, owner, writing: None, put: HashMap::new(), brought: BTreeSet::new() })
    }

    /// Writes one chunk.
    pub(crate) fn put(&mut self, chunk: &FileChunk<'_>) -> Result<(), PutError> {
        let continues = matches!(&self.writing, Some((path, _)) if chunk.append && path == chunk.path);
        if !continues {
            let file = self.create(chunk)?;
            self.put.insert(chunk.path.to_vec(), None);
            self.writing = Some((chunk.path.to_vec(), file));
        }
        let Some((_, file)) = &mut self.writing else { return Ok(()) };
        Ok(file.write_all(chunk.data)?)
    }

    /// No more `put`.
    pub(crate) fn close(&mut self) {
        self.writing = None;
        for (path, seen) in &mut self.put {
            let path = OsStr::from_bytes(path);
            *seen = rustix::fs::statat(&self.root, path, AtFlags::SYMLINK_NOFOLLOW).ok().map(|stat| version(&stat));
        }
    }

    /// A file that the runner makes, of the code itself: patterns leave it out.
    pub(crate) fn code_is(&mut self, name: &[u8]) {
        let name = name.rsplit(|&b| b == b'/').next().unwrap_or_default();
        self.put.entry(name.to_vec()).or_insert(None);
    }

    fn create(&self, chunk: &FileChunk<'_>) -> io::Result<std::fs::File> {
        let parts = self.parts(chunk.path)?;
        let (last, parents) = parts.split_last().ok_or(io::ErrorKind::InvalidInput)?;
        let mut dir =
            rustix::fs::openat(&self.root, ".", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        for part in parents {
            match rustix::fs::mkdirat(&dir, *part, Mode::from_raw_mode(0o755)) {
                Ok(()) => self.give(&dir, part)?,
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            // One name at a time and no symbolic links: nothing that a template holds can lead out.
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            dir = rustix::fs::openat(&dir, *part, flags, Mode::empty())?;
        }
        let how = if chunk.append { OFlags::APPEND } else { OFlags::CREATE | OFlags::TRUNC };
        let flags = how | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&dir, *last, flags, Mode::from_raw_mode(0o600))?;
        if !chunk.append {
            let mode = if chunk.mode == 0 { 0o644 } else { chunk.mode & 0o777 };
            rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode.into()))?;
            self.give(&dir, last)?;
        }
        Ok(fd.into())
    }

    fn give(&self, dir: impl AsFd, name: &OsStr) -> io::Result<()> {
        if let Some((uid, gid)) = self.owner {
            let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            rustix::fs::chownat(dir, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }

    /// The names of a path below the working directory.
    fn parts<'a>(&self, path: &'a [u8]) -> io::Result<Vec<&'a OsStr>> {
        let outside = || io::Error::other("the path leaves the working directory");
        let path = match path.strip_prefix(b"/") {
            None => path,
            Some(_) => {
                path.strip_prefix(self.path.as_slice()).and_then(|p| p.strip_prefix(b"/")).ok_or_else(outside)?
            }
        };
        let parts: Vec<&[u8]> = path.split(|&b| b == b'/').filter(|p| !p.is_empty() && *p != b".").collect();
        if parts.is_empty() || parts.contains(&b"..".as_slice()) {
            return Err(outside());
        }
        Ok(parts.into_iter().map(OsStr::from_bytes).collect())
    }

    /// Opens a file to bring back, and its size. Called when no process of the sandbox is left.
    fn open(&self, path: &[u8]) -> Result<(std::fs::File, u64, u16), Unfit> {
        let text = |error: Errno| {
            Unfit::Other(match error {
                Errno::NOENT => "no such file".to_string(),
                Errno::XDEV | Errno::LOOP => "a symbolic link leads out of the working directory".to_string(),
                other => other.to_string(),
            })
        };
        let parts = self.parts(path).map_err(|e| Unfit::Other(e.to_string()))?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let joined = parts.join(OsStr::new("/"));
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let fd = match rustix::fs::openat2(&self.root, &*joined, flags, Mode::empty(), resolve) {
            // No openat2 (an old kernel or a filter): step by step, and then no symbolic link at all is followed.
            Err(Errno::NOSYS | Errno::PERM) => self.walk(&parts, flags),
            other => other,
        }
        .map_err(text)?;
        let stat = rustix::fs::fstat(&fd).map_err(text)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Unfit::Directory),
            _ => return Err(Unfit::Other("it is not a regular file".into())),
        }
        Ok((fd.into(), stat.st_size as u64, (stat.st_mode & 0o777) as u16))
    }

    fn walk(&self, parts: &[&OsStr], flags: OFlags) -> Result<OwnedFd, Errno> {
        let (last, parents) = parts.split_last().ok_or(Errno::INVAL)?;
        let step = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut dir = rustix::fs::openat(&self.root, ".", step, Mode::empty())?;
        for part in parents {
            dir = rustix::fs::openat(&dir, *part, step, Mode::empty())?;
        }
        rustix::fs::openat(&dir, *last, flags | OFlags::NOFOLLOW, Mode::empty())
    }

    /// The files below the working directory that are meant, in order, without those that were put in and stayed as they
    /// were. Symbolic links are not followed. Called when no process of the sandbox is left.
    fn find(&self, pattern: &[u8]) -> Result<BTreeSet<Vec<u8>>, TooManyEntries> {
        let mut found = BTreeSet::new();
        let mut waiting = vec![Vec::new()];
        let mut seen = 0;
        while let Some(directory) = waiting.pop() {
            let at: &OsStr = if directory.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(&directory) };
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let opened = rustix::fs::openat(&self.root, at, flags, Mode::empty()).and_then(Dir::new);
            // One that the code made unreadable has no files to bring.
            let Ok(entries) = opened else { continue };
            for entry in entries.flatten() {
                let name = entry.file_name().to_bytes();
                let separator: &[u8] = if directory.is_empty() { b"" } else { b"/" };
                let path = [&directory[..], separator, name].concat();
                // A name that is not UTF-8 has no place in an answer.
                let fits = path.len() <= FileChunk::MAX_PATH && std::str::from_utf8(&path).is_ok();
                if name == b"." || name == b".." || !fits {
                    continue;
                }
                seen += 1;
                if seen > MAX_SEEN {
                    return Err(TooManyEntries);
                }
                let stat = rustix::fs::statat(&self.root, OsStr::from_bytes(&path), AtFlags::SYMLINK_NOFOLLOW);
                let Ok(stat) = stat else { continue };
                match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Directory => waiting.push(path),
                    FileType::RegularFile if is_meant(pattern, &path) && self.is_new(&path, &stat) => {
                        found.insert(path);
                    }
                    _ => {}
                }
            }
        }
        Ok(found)
    }

    fn is_new(&self, path: &[u8], stat: &Stat) -> bool {
        match self.put.get(path) {
            None => true,
            // The code's own file.
            Some(None) => false,
            Some(Some(then)) => *then != version(stat),
        }
    }

    /// Sends what a path of `output_files` means as `File` frames: a file; the files of a directory or a pattern; or one
    /// failed chunk with the reason. `budget` is what all files may still take.
    pub(crate) fn get(
        &mut self,
        path: &[u8],
        budget: &mut u64,
        mut send: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let several = match self.open(path) {
            Err(Unfit::Directory) => true,
            Err(Unfit::Other(_)) => is_pattern(path),
            Ok(_) => false,
        };
        if !several {
            // A pattern before it may have brought it.
            return if self.brought.insert(path.to_vec()) { self.send(path, budget, &mut send) } else { Ok(()) };
        }
        let mut refuse = |reason: &str| {
            let (data, mut frames) = (reason.as_bytes(), Vec::new());
            let chunk = FileChunk { path, data, mode: 0, append: false, failed: true };
            encode(&mut frames, Kind::File, &chunk.encode());
            send(&frames)
        };
        let found = match self.find(path) {
            Ok(found) if found.is_empty() => return refuse("no new file is meant by it"),
            Ok(found) => found,
            Err(error) => return refuse(&error.to_string()),
        };
        let new: Vec<Vec<u8>> = found.difference(&self.brought).cloned().collect();
        if self.brought.len() + new.len() > MAX_FOUND {
            return refuse(&format!("with its {} files there are more than {MAX_FOUND}", new.len()));
        }
        for path in new {
            self.send(&path, budget, &mut send)?;
            self.brought.insert(path);
        }
        Ok(())
    }

    fn send(&self, path: &[u8], budget: &mut u64, mut send: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut frames = Vec::new();
        let mut chunk = |data: &[u8], mode: u16, append: bool, failed: bool| {
            frames.clear();
            encode(&mut frames, Kind::File, &FileChunk { path, data, mode, append, failed }.encode());
            send(&frames)
        };
        let (mut file, size, mode) = match self.open(path) {
            Ok(opened) => opened,
            Err(Unfit::Directory) => return chunk(b"it is a directory", 0, false, true),
            Err(Unfit::Other(reason)) => return chunk(reason.as_bytes(), 0, false, true),
        };
        if size > *budget {
            let reason = format!("it has {size} bytes; the output files may have {budget} bytes more");
            return chunk(reason.as_bytes(), 0, false, true);
        }
        let mut buffer = vec![0; MAX_PAYLOAD - FileChunk::OVERHEAD - path.len()];
        let mut append = false;
        loop {
            let room = usize::try_from(*budget).unwrap_or(usize::MAX).min(buffer.len());
            let n = match file.read(buffer.get_mut(..room).unwrap_or_default()) {
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return chunk(error.to_string().as_bytes(), 0, append, true),
            };
            if n == 0 && append {
                return Ok(());
            }
            *budget -= n as u64;
            chunk(buffer.get(..n).unwrap_or_default(), mode, append, false)?;
            if n == 0 {
                return Ok(());
            }
            append = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_file_that_cannot_be_written_is_not_said() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = Files::new(folder.path(), None).unwrap();
        let mut put = |path: &'static str| {
            let chunk = FileChunk { path: path.as_bytes(), data: b"x", mode: 0o644, append: false, failed: false };
            files.put(&chunk)
        };
        put("secret").unwrap();
        let error = put("secret/secret").unwrap_err().to_string();
        assert!(error.starts_with("cannot write an input file: ") && !error.contains("secret"), "{error}");
    }
}
