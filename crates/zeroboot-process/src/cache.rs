//! What need not be found out again, in the user's cache: files of ours, with stamps of what they were found from.

use std::{
    ffi::OsStr,
    fs::{self, Metadata},
    io::{self, Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::{
            ffi::OsStrExt as _,
            fs::{DirBuilderExt as _, MetadataExt as _},
        },
    },
    path::{Path, PathBuf},
    sync::OnceLock,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::fs::{AtFlags, Mode, OFlags};

/// Most bytes of a file of the cache.
const LARGEST: u64 = 64 << 20;
/// What changed so lately may change again within the same tick of the kernel's clock.
const SETTLED: Duration = Duration::from_secs(2);

static PLACE: OnceLock<PathBuf> = OnceLock::new();

/// Names the directory for what need not be found out again. Without it everything is found out each time.
pub fn keep_in(directory: PathBuf) {
    // The first one stays.
    let _kept = PLACE.set(directory);
}

pub(crate) fn place() -> Option<&'static Path> {
    PLACE.get().map(PathBuf::as_path)
}

/// What tells one state of a file or directory from another. Nobody can set a ctime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) seconds: i64,
    pub(crate) nanoseconds: i64,
}

impl Stamp {
    pub(crate) fn of(metadata: &Metadata) -> Stamp {
        Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            seconds: metadata.ctime(),
            nanoseconds: metadata.ctime_nsec(),
        }
    }

    /// Whether another change would have another stamp.
    pub(crate) fn is_settled(&self, now: SystemTime) -> bool {
        let Ok(seconds) = u64::try_from(self.seconds) else { return false };
        let changed = UNIX_EPOCH + Duration::from_secs(seconds);
        now.duration_since(changed).is_ok_and(|age| age > SETTLED)
    }

    pub(crate) fn words(&self) -> String {
        let [device, inode] = [self.device, self.inode].map(u64::cast_signed);
        format!("{device} {inode} {} {}", self.seconds, self.nanoseconds)
    }

    pub(crate) fn from_words<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<Stamp> {
        let mut number = || words.next()?.parse::<i64>().ok();
        let (device, inode) = (number()?.cast_unsigned(), number()?.cast_unsigned());
        Some(Stamp { device, inode, seconds: number()?, nanoseconds: number()? })
    }
}

/// The file for what was found out about `path`.
pub(crate) fn file(place: &Path, kind: &str, path: &Path) -> PathBuf {
    // The file itself says whose it is, too.
    place.join(kind).join(blake3::hash(path.as_os_str().as_bytes()).to_hex().as_str())
}

/// The directory of a file of the cache. It is ours, and nobody else may enter it, so what lies in it is from us. The
/// file is then opened through it: its name can be made to lead elsewhere, what is open cannot.
fn folder_of(file: &Path) -> io::Result<(OwnedFd, &OsStr)> {
    let (Some(folder), Some(name)) = (file.parent(), file.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = rustix::fs::open(folder, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&folder)?;
    if stat.st_uid != rustix::process::geteuid().as_raw() || stat.st_mode & 0o777 != 0o700 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok((folder, name))
}

/// The fields of a file that begins with `head`, each ended by a NUL; nothing unless the file and its directory are ours,
/// nobody else may write them, and it is whole.
pub(crate) fn load(file: &Path, head: &[&[u8]]) -> Option<Vec<u8>> {
    let (folder, name) = folder_of(file).ok()?;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = fs::File::from(rustix::fs::openat(folder, name, flags, Mode::empty()).ok()?);
    let metadata = opened.metadata().ok()?;
    let ours = metadata.uid() == rustix::process::geteuid().as_raw() && metadata.mode() & 0o022 == 0;
    if !metadata.is_file() || !ours || metadata.len() > LARGEST {
        return None;
    }
    let mut bytes = Vec::new();
    opened.take(LARGEST).read_to_end(&mut bytes).ok()?;
    let start = joined(head);
    bytes.strip_prefix(start.as_slice())?.strip_suffix(b"\0").map(<[u8]>::to_vec)
}

fn joined(fields: &[&[u8]]) -> Vec<u8> {
    fields.iter().flat_map(|field| field.iter().copied().chain([0])).collect()
}

/// Whole or not at all: another process may read it. Not where others may enter the directory.
pub(crate) fn store(file: &Path, head: &[&[u8]], fields: &[u8]) -> io::Result<()> {
    let folder = file.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let (folder, name) = folder_of(file)?;
    let beside = format!(".{}", std::process::id());
    let written = (|| {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut new = fs::File::from(rustix::fs::openat(&folder, &beside, flags, Mode::from_raw_mode(0o600))?);
        new.write_all(&joined(head))?;
        new.write_all(fields)?;
        Ok(rustix::fs::renameat(&folder, &beside, &folder, name)?)
    })();
    if written.is_err() {
        // It may not be there at all.
        let _gone = rustix::fs::unlinkat(&folder, &beside, AtFlags::empty());
    }
    written
}
