//! Files of a sandbox that lives, as the code itself could touch them: with the code's rights, and no magic links.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use zeroboot_proto::live::{Change, ChangeKind, Entry, EntryKind, MAX_ENTRIES, Refusal};

use crate::place::Place;
use crate::sys::AsUser;

/// Longest path.
const MAX_PATH: usize = 4096;
/// Deepest directory that is walked into.
const MAX_DEPTH: usize = 128;
/// Most files below a directory that is watched.
const MAX_WATCHED: usize = 20_000;
const PROC_MAGIC: u64 = 0x9fa0;

/// Why nothing was done.
pub(super) type Refused = (Refusal, String);
type Answer<T> = Result<T, Refused>;

/// Access to files as the code has it.
pub(super) struct Disk {
    home: PathBuf,
    /// Held: the rights of the code.
    _user: AsUser,
}

/// A directory, opened, and the name of something in it.
struct Named {
    directory: OwnedFd,
    name: OsString,
    /// The whole path, for people.
    path: PathBuf,
}

impl Disk {
    pub(super) fn new(place: &Place) -> Answer<Disk> {
        let user = AsUser::new(place.user());
        if !user.holds(place.user()) {
            return Err((Refusal::Failed, "the agent cannot take the rights of the code".into()));
        }
        Ok(Disk { home: place.home(), _user: user })
    }

    fn path(&self, path: &str) -> Answer<PathBuf> {
        if path.is_empty() || path.len() > MAX_PATH || path.contains('\0') {
            return Err((Refusal::BadName, format!("a path has 1 to {MAX_PATH} bytes and no NUL")));
        }
        // Without the dots that mean nothing.
        Ok(self.home.join(path).components().collect())
    }

    fn open(&self, path: &Path, flags: OFlags) -> Answer<OwnedFd> {
        // openat2 refuses flags that mean nothing beside O_PATH.
        let reading = if flags.contains(OFlags::PATH) { OFlags::empty() } else { OFlags::NONBLOCK | OFlags::NOCTTY };
        let flags = flags | reading | OFlags::CLOEXEC;
        let fd =
            rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS).map_err(refused(path))?;
        // What /proc shows of the agent is not the code's.
        let kind = rustix::fs::fstatfs(&fd).map_err(refused(path))?.f_type as u64;
        if kind == PROC_MAGIC {
            return Err((Refusal::NotAllowed, format!("{}: files of /proc are for programs to read", path.display())));
        }
        Ok(fd)
    }

    fn named(&self, path: &str) -> Answer<Named> {
        let path = self.path(path)?;
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err((Refusal::BadName, format!("{} has no name", path.display())));
        };
        let directory = self.open(parent, OFlags::PATH | OFlags::DIRECTORY)?;
        Ok(Named { directory, name: name.to_owned(), path: path.clone() })
    }

    pub(super) fn stat(&self, path: &str) -> Answer<Entry> {
        let full = self.path(path)?;
        if full.file_name().is_none() {
            let fd = self.open(&full, OFlags::PATH)?;
            let stat = rustix::fs::fstat(&fd).map_err(refused(&full))?;
            return Ok(entry(&full, &stat, None));
        }
        self.named(path)?.entry()
    }

    /// A regular file from `offset` on.
    pub(super) fn read(&self, path: &str, offset: u64) -> Answer<(Entry, File)> {
        let full = self.path(path)?;
        let fd = self.open(&full, OFlags::RDONLY)?;
        let stat = rustix::fs::fstat(&fd).map_err(refused(&full))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {}
            FileType::Directory => return Err((Refusal::WrongKind, format!("{} is a directory", full.display()))),
            _ => return Err((Refusal::WrongKind, format!("{} is not a regular file", full.display()))),
        }
        let mut file = File::from(fd);
        if offset > 0 {
            file.seek(SeekFrom::Start(offset)).map_err(|error| failed(&full, &error))?;
        }
        Ok((entry(&full, &stat, None), file))
    }

    /// Begins a file that appears under its name when it is whole.
    pub(super) fn write(&self, path: &str, mode: Option<u16>) -> Answer<Writing> {
        let full = self.path(path)?;
        if let Some(parent) = full.parent() {
            self.make_directories(parent.to_owned())?;
        }
        let named = self.named(path)?;
        let there = rustix::fs::statat(&named.directory, &named.name, AtFlags::SYMLINK_NOFOLLOW).ok();
        let mode = match (mode, &there) {
            (Some(mode), _) => mode & 0o777,
            (None, Some(stat)) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {
                (stat.st_mode & 0o777) as u16
            }
            (None, _) => 0o644,
        };
        match there.map(|stat| FileType::from_raw_mode(stat.st_mode)) {
            None | Some(FileType::RegularFile | FileType::Symlink) => {}
            Some(FileType::Directory) => {
                return Err((Refusal::WrongKind, format!("{} is a directory", named.path.display())));
            }
            Some(_) => return Err((Refusal::WrongKind, format!("{} is not a regular file", named.path.display()))),
        }
        let mut random = [0; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).map_err(refused(&named.path))?;
        let temporary = OsString::from(format!(".zeroboot-{:016x}", u64::from_le_bytes(random)));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&named.directory, &temporary, flags, Mode::from_raw_mode(0o600))
            .map_err(refused(&named.path))?;
        Ok(Writing { named, temporary, file: Some(File::from(fd)), mode })
    }

    pub(super) fn list(&self, path: &str, depth: u16) -> Answer<Vec<Entry>> {
        let full = self.path(path)?;
        let directory = self.open(&full, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut found = Vec::new();
        walk(&directory, &full, usize::from(depth.max(1)), MAX_ENTRIES, &mut found)?;
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }

    pub(super) fn make_directory(&self, path: &str) -> Answer<Entry> {
        self.make_directories(self.path(path)?)?;
        self.stat(path)
    }

    fn make_directories(&self, path: PathBuf) -> Answer<()> {
        let mut missing = Vec::new();
        let mut at = path.clone();
        // From the deepest directory that is there.
        let mut directory = loop {
            match self.open(&at, OFlags::PATH | OFlags::DIRECTORY) {
                Ok(fd) => break fd,
                Err((Refusal::NotFound, _)) if at.file_name().is_some() => {
                    missing.push(at.file_name().unwrap_or_default().to_owned());
                    at.pop();
                }
                Err((Refusal::NotFound, text)) => return Err((Refusal::BadName, text)),
                Err(other) => return Err(other),
            }
        };
        for name in missing.iter().rev() {
            match rustix::fs::mkdirat(&directory, name, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(refused(&path)(error)),
            }
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            directory = rustix::fs::openat(&directory, name, flags, Mode::empty()).map_err(refused(&path))?;
        }
        Ok(())
    }

    pub(super) fn rename(&self, from: &str, to: &str) -> Answer<Entry> {
        let (from, to) = (self.named(from)?, self.named(to)?);
        rustix::fs::renameat(&from.directory, &from.name, &to.directory, &to.name).map_err(|error| match error {
            Errno::NOENT => refused(&from.path)(error),
            error => refused(&to.path)(error),
        })?;
        to.entry()
    }

    pub(super) fn remove(&self, path: &str, recursive: bool) -> Answer<()> {
        let named = self.named(path)?;
        match rustix::fs::unlinkat(&named.directory, &named.name, AtFlags::empty()) {
            Err(Errno::ISDIR | Errno::PERM) => {}
            other => return other.map_err(refused(&named.path)),
        }
        if recursive {
            empty(&named.directory, &named.name, MAX_DEPTH).map_err(refused(&named.path))?;
        }
        rustix::fs::unlinkat(&named.directory, &named.name, AtFlags::REMOVEDIR).map_err(refused(&named.path))
    }

    pub(super) fn chmod(&self, path: &str, mode: u16) -> Answer<Entry> {
        let named = self.named(path)?;
        rustix::fs::chmodat(
            &named.directory,
            &named.name,
            Mode::from_raw_mode(u32::from(mode & 0o777)),
            AtFlags::empty(),
        )
        .map_err(refused(&named.path))?;
        self.stat(path)
    }

    /// What is below a directory, for comparing.
    pub(super) fn snapshot(&self, path: &str, recursive: bool) -> Answer<Snapshot> {
        let full = self.path(path)?;
        let directory = self.open(&full, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut found = Vec::new();
        let depth = if recursive { MAX_DEPTH } else { 1 };
        walk(&directory, &full, depth, MAX_WATCHED, &mut found)?;
        Ok(found.into_iter().map(|entry| (entry.path.clone(), entry)).collect())
    }
}

pub(super) type Snapshot = BTreeMap<String, Entry>;

/// What made one of the other.
pub(super) fn changes(before: &Snapshot, now: &Snapshot) -> Vec<Change> {
    let change = |path: &String, kind| Change { path: path.clone(), kind };
    let mut all = Vec::new();
    for (path, entry) in now {
        match before.get(path) {
            None => all.push(change(path, ChangeKind::Created)),
            Some(old) if old != entry && !(old.kind == EntryKind::Directory && entry.kind == EntryKind::Directory) => {
                all.push(change(path, ChangeKind::Modified));
            }
            Some(_) => {}
        }
    }
    all.extend(before.keys().filter(|path| !now.contains_key(*path)).map(|path| change(path, ChangeKind::Removed)));
    all
}

/// A file that is being written under another name.
pub(super) struct Writing {
    named: Named,
    temporary: OsString,
    file: Option<File>,
    mode: u16,
}

impl Writing {
    pub(super) fn append(&mut self, bytes: &[u8]) -> Answer<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        file.write_all(bytes).map_err(|error| failed(&self.named.path, &error))
    }

    pub(super) fn finish(mut self, _disk: &Disk) -> Answer<Entry> {
        let Some(file) = self.file.take() else { return Err((Refusal::Failed, "it was finished before".into())) };
        let moved = rustix::fs::fchmod(&file, Mode::from_raw_mode(u32::from(self.mode))).and_then(|()| {
            rustix::fs::renameat(&self.named.directory, &self.temporary, &self.named.directory, &self.named.name)
        });
        if let Err(error) = moved {
            self.file = Some(file);
            return Err(refused(&self.named.path)(error));
        }
        self.named.entry()
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if self.file.is_some() {
            // The code may have removed it.
            rustix::fs::unlinkat(&self.named.directory, &self.temporary, AtFlags::empty()).ok();
        }
    }
}

impl Named {
    fn entry(&self) -> Answer<Entry> {
        let stat =
            rustix::fs::statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW).map_err(refused(&self.path))?;
        let target = link_target(&self.directory, &self.name, &stat);
        Ok(entry(&self.path, &stat, target))
    }
}

fn link_target(directory: impl AsFd, name: &OsStr, stat: &Stat) -> Option<String> {
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        return None;
    }
    let target = rustix::fs::readlinkat(directory, name, Vec::new()).ok()?;
    Some(target.to_string_lossy().into_owned())
}

fn entry(path: &Path, stat: &Stat, target: Option<String>) -> Entry {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => EntryKind::File,
        FileType::Directory => EntryKind::Directory,
        FileType::Symlink => EntryKind::Link,
        _ => EntryKind::Other,
    };
    Entry {
        path: path.to_string_lossy().into_owned(),
        kind,
        size: u64::try_from(stat.st_size).unwrap_or(0),
        mode: (stat.st_mode & 0o777) as u16,
        modified_ms: stat.st_mtime.saturating_mul(1000).saturating_add((stat.st_mtime_nsec / 1_000_000) as i64),
        uid: stat.st_uid,
        gid: stat.st_gid,
        target,
    }
}

/// What is in a directory and, down to `depth`, in its directories. Links are not followed; a directory that cannot be read
/// is an entry and no more.
fn walk(directory: &OwnedFd, path: &Path, depth: usize, most: usize, found: &mut Vec<Entry>) -> Answer<()> {
    let mut below = Vec::new();
    for item in Dir::read_from(directory).map_err(refused(path))? {
        let item = item.map_err(refused(path))?;
        let name = item.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        if found.len() >= most {
            return Err((Refusal::NoRoom, format!("{} has more than {most} files in it", path.display())));
        }
        let name = OsStr::from_bytes(name);
        // Gone meanwhile.
        let Ok(stat) = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        let target = link_target(directory, name, &stat);
        let entry = entry(&path.join(name), &stat, target);
        if entry.kind == EntryKind::Directory && depth > 1 {
            below.push(name.to_owned());
        }
        found.push(entry);
    }
    for name in below {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        if let Ok(directory) = rustix::fs::openat(directory, &name, flags, Mode::empty()) {
            walk(&directory, &path.join(&name), depth - 1, most, found)?;
        }
    }
    Ok(())
}

/// Removes everything in a directory, without following a link.
fn empty(parent: impl AsFd, name: &OsStr, depth: usize) -> Result<(), Errno> {
    if depth == 0 {
        return Err(Errno::NAMETOOLONG);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    for item in Dir::read_from(&directory)? {
        let item = item?;
        let name = item.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        let name = OsString::from_vec(name.to_vec());
        match rustix::fs::unlinkat(&directory, &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR | Errno::PERM) => {
                empty(&directory, &name, depth - 1)?;
                rustix::fs::unlinkat(&directory, &name, AtFlags::REMOVEDIR)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

pub(super) fn read(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn failed(path: &Path, error: &io::Error) -> Refused {
    match error.raw_os_error() {
        Some(code) => refused(path)(Errno::from_raw_os_error(code)),
        None => (Refusal::Failed, format!("{}: {error}", path.display())),
    }
}

/// A path in an error comes back to the one who named it, and into no log.
fn refused(path: &Path) -> impl Fn(Errno) -> Refused + '_ {
    move |error| {
        let (refusal, text) = match error {
            Errno::NOENT => (Refusal::NotFound, "no such file or directory"),
            Errno::EXIST => (Refusal::Exists, "there is one already"),
            Errno::ACCESS | Errno::PERM | Errno::ROFS => {
                (Refusal::NotAllowed, "not allowed to the code in this sandbox")
            }
            Errno::LOOP => (Refusal::NotAllowed, "too many symbolic links, or one of the kernel's own"),
            Errno::NOTDIR => (Refusal::WrongKind, "part of it is not a directory"),
            Errno::ISDIR => (Refusal::WrongKind, "it is a directory"),
            Errno::NXIO => (Refusal::WrongKind, "it is not a regular file"),
            Errno::NOTEMPTY => (Refusal::NotEmpty, "the directory is not empty"),
            Errno::NOSPC | Errno::DQUOT | Errno::FBIG => (Refusal::NoRoom, "no room left in the sandbox"),
            Errno::NOMEM | Errno::MFILE | Errno::NFILE => {
                (Refusal::NoRoom, "the sandbox has no memory or descriptors left")
            }
            Errno::NAMETOOLONG => (Refusal::BadName, "a name is longer than 255 bytes, or too deep"),
            Errno::INVAL => (Refusal::BadName, "not possible with these paths"),
            _ => return (Refusal::Failed, format!("{}: {error}", path.display())),
        };
        (refusal, format!("{}: {text}", path.display()))
    }
}
