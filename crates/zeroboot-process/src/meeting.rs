//! Sockets and FIFOs below the directories that a sandbox sees: processes of the host wait behind them, and a read-only
//! mount lets anyone use them. Each is covered by an empty file.
//!
//! To find them every directory is read: eight thousand in a Python's prefix. So what was found is kept in the cache, with
//! a stamp of each directory: a name that comes or goes changes its directory's ctime, which nobody can set. A directory
//! is then looked at instead of read, and read again when its stamp is another.
//!
//! What is kept can only be wrong if somebody else wrote it or if a directory can change without its stamp, so:
//!
//! | rule | against |
//! |---|---|
//! | the file is ours and nobody else may write it, and its directory is ours with mode 0700 | another user who hides a socket |
//! | a directory that changed in the last two seconds is not kept | two changes within one tick of the kernel's clock |
//! | only on file systems whose ctimes are the kernel's own ([`KEPT`]) | servers and FUSE, which say what they like |

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs,
    os::unix::{ffi::OsStrExt as _, fs::FileTypeExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use crate::cache::{self, Stamp};

/// First field of a file of the cache. Another format has another number.
const MAGIC: &[u8] = b"zeroboot meeting points 1";

/// File systems (`statfs(2)`) on which a change of a directory changes its ctime, by the kernel's clock.
const KEPT: &[(u64, &str)] = &[
    (0xef53, "ext2, ext3, ext4"),
    (0x5846_5342, "XFS"),
    (0x9123_683e, "btrfs"),
    (0xf2f5_2010, "F2FS"),
    (0x2fc1_2fc1, "ZFS"),
    (0x0102_1994, "tmpfs"),
    (0x794c_7630, "overlayfs: the stamp is that of the upper directory, or of the lower one, which does not change"),
];

/// A directory as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Directory {
    stamp: Stamp,
    directories: Vec<OsString>,
    /// Sockets and FIFOs.
    found: Vec<OsString>,
}

type Known = HashMap<PathBuf, Directory>;

/// Sockets and FIFOs at and below `path`. `cache`: a directory for what was found. A directory that we may not read is
/// skipped: the sandbox may not either.
pub(crate) fn points(path: &Path, cache: Option<&Path>) -> Vec<PathBuf> {
    let file = cache.map(|cache| file_of(cache, path));
    let before = file.as_deref().and_then(|file| load(file, path)).unwrap_or_default();
    let (found, seen, same) = walk(path, before);
    if let Some(file) = file
        && !same
    {
        // Without it the next one reads them all.
        let _not_kept = store(&file, path, &seen);
    }
    found
}

/// Gives what was found, what may be kept, and whether that is what was known before.
fn walk(path: &Path, mut known: Known) -> (Vec<PathBuf>, Known, bool) {
    let mut found = Vec::new();
    let mut seen = Known::with_capacity(known.len());
    let mut devices: HashMap<u64, bool> = HashMap::new();
    let mut same = true;
    let now = SystemTime::now();
    let mut waiting = vec![path.to_owned()];
    while let Some(path) = waiting.pop() {
        // Before it is read: what changes meanwhile makes the stamp an old one.
        let Ok(metadata) = path.symlink_metadata() else { continue };
        if !metadata.is_dir() {
            continue;
        }
        let stamp = Stamp::of(&metadata);
        let mut is_whole = true;
        let directory = match known.remove(&path).filter(|directory| directory.stamp == stamp) {
            Some(directory) => directory,
            None => {
                let Some((directory, whole)) = read(&path, stamp) else { continue };
                same = false;
                is_whole = whole;
                directory
            }
        };
        found.extend(directory.found.iter().map(|name| path.join(name)));
        waiting.extend(directory.directories.iter().map(|name| path.join(name)));
        let is_kept = *devices.entry(stamp.device).or_insert_with(|| may_be_kept(&path));
        if is_whole && is_kept && stamp.is_settled(now) {
            seen.insert(path, directory);
        }
    }
    (found, seen, same && known.is_empty())
}

/// `false`: there is more, which could not be read.
fn read(path: &Path, stamp: Stamp) -> Option<(Directory, bool)> {
    let mut directory = Directory { stamp, directories: Vec::new(), found: Vec::new() };
    let mut whole = true;
    for entry in fs::read_dir(path).ok()? {
        let Ok((name, kind)) = entry.and_then(|entry| Ok((entry.file_name(), entry.file_type()?))) else {
            whole = false;
            continue;
        };
        if kind.is_dir() {
            directory.directories.push(name);
        } else if kind.is_socket() || kind.is_fifo() {
            directory.found.push(name);
        }
    }
    Some((directory, whole))
}

fn may_be_kept(path: &Path) -> bool {
    rustix::fs::statfs(path)
        .is_ok_and(|fs| KEPT.iter().any(|(magic, _)| *magic == fs.f_type.cast_unsigned() & 0xffff_ffff))
}

fn file_of(place: &Path, path: &Path) -> PathBuf {
    cache::file(place, "meeting-points", path)
}

fn load(file: &Path, path: &Path) -> Option<Known> {
    decode(&cache::load(file, &[MAGIC, path.as_os_str().as_bytes()])?)
}

fn store(file: &Path, path: &Path, known: &Known) -> std::io::Result<()> {
    cache::store(file, &[MAGIC, path.as_os_str().as_bytes()], &encode(known))
}

fn decode(bytes: &[u8]) -> Option<Known> {
    let mut fields = bytes.split(|byte| *byte == 0);
    let text = |field: &[u8]| OsStr::from_bytes(field).to_owned();
    let mut known = Known::new();
    while let Some(path) = fields.next() {
        let mut words = std::str::from_utf8(fields.next()?).ok()?.split(' ');
        let stamp = Stamp::from_words(&mut words)?;
        let mut count = || words.next()?.parse::<usize>().ok();
        let (directories, found) = (count()?, count()?);
        let mut names = |count: usize| (0..count).map(|_| fields.next().map(text)).collect::<Option<Vec<_>>>();
        let directory = Directory { stamp, directories: names(directories)?, found: names(found)? };
        known.insert(PathBuf::from(text(path)), directory);
    }
    Some(known)
}

fn encode(known: &Known) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut field = |field: &[u8]| {
        bytes.extend_from_slice(field);
        bytes.push(0);
    };
    for (path, Directory { stamp, directories, found }) in known {
        field(path.as_os_str().as_bytes());
        field(format!("{} {} {}", stamp.words(), directories.len(), found.len()).as_bytes());
        for name in directories.iter().chain(found) {
            field(name.as_bytes());
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::{fs::PermissionsExt as _, net::UnixListener},
        time::Duration,
    };

    use super::*;

    /// A tree of four directories, and its cache.
    fn tree() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let (path, cache) = (folder.path().join("tree"), folder.path().join("cache"));
        for name in ["a/b", "c"] {
            fs::create_dir_all(path.join(name)).unwrap();
        }
        fs::write(path.join("a/file"), "").unwrap();
        (folder, path, cache)
    }

    fn settle() {
        // A ctime cannot be set, and a directory that changed just now is not kept.
        std::thread::sleep(Duration::from_millis(3100));
    }

    #[test]
    fn a_socket_that_comes_later_is_found_although_its_directory_is_kept() {
        let (_folder, path, cache) = tree();
        assert_eq!(points(&path, Some(&cache)), [] as [PathBuf; 0]);
        settle();
        // Read and kept, then known.
        assert_eq!(points(&path, Some(&cache)), [] as [PathBuf; 0]);
        let file = file_of(&cache, &path);
        let known = load(&file, &path).unwrap();
        assert_eq!(known.len(), 4, "{known:?}");
        let (_, _, same) = walk(&path, known.clone());
        assert!(same, "it read a directory again");
        let _listens = UnixListener::bind(path.join("a/b/socket")).unwrap();
        assert_eq!(points(&path, Some(&cache)), [path.join("a/b/socket")]);
        // The one that changed just now is not kept, the others are.
        let known = load(&file, &path).unwrap();
        assert!(!known.contains_key(&path.join("a/b")) && known.contains_key(&path.join("c")), "{known:?}");
        settle();
        assert_eq!(points(&path, Some(&cache)), [path.join("a/b/socket")]);
        // Now out of the cache.
        let (found, _, same) = walk(&path, load(&file, &path).unwrap());
        assert!(same && found == [path.join("a/b/socket")], "{found:?}");
        fs::remove_file(path.join("a/b/socket")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path.join("c/fifo"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o644),
            0,
        )
        .unwrap();
        // A whole directory that takes the place of another.
        fs::create_dir_all(path.join("other/b")).unwrap();
        let _listens = UnixListener::bind(path.join("other/b/new")).unwrap();
        fs::remove_dir_all(path.join("a")).unwrap();
        fs::rename(path.join("other"), path.join("a")).unwrap();
        let mut found = points(&path, Some(&cache));
        found.sort();
        assert_eq!(found, [path.join("a/b/new"), path.join("c/fifo")]);
    }

    #[test]
    fn what_another_could_have_written_is_not_believed() {
        let (_folder, path, cache) = tree();
        let _listens = UnixListener::bind(path.join("a/socket")).unwrap();
        let file = file_of(&cache, &path);
        // A cache that hides the socket, with the right stamps.
        let mut lies = Known::new();
        for name in ["", "a", "a/b", "c"] {
            let path = if name.is_empty() { path.clone() } else { path.join(name) };
            let stamp = Stamp::of(&path.symlink_metadata().unwrap());
            let (directory, _) = read(&path, stamp).unwrap();
            lies.insert(path, Directory { found: Vec::new(), ..directory });
        }
        store(&file, &path, &lies).unwrap();
        // So it would be, were it believed.
        assert_eq!(walk(&path, load(&file, &path).unwrap()).0, [] as [PathBuf; 0]);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o620)).unwrap();
        assert_eq!(load(&file, &path), None);
        assert_eq!(points(&path, Some(&cache)), [path.join("a/socket")]);
        // It was made anew, without directories that changed just now.
        store(&file, &path, &lies).unwrap();
        // Another tree's, one that was cut, and a link.
        assert_eq!(load(&file, Path::new("/elsewhere")), None);
        let bytes = fs::read(&file).unwrap();
        for length in 0..bytes.len() {
            fs::write(&file, &bytes[..length]).unwrap();
            assert!(load(&file, &path).is_none_or(|known| known.len() < lies.len()), "{length}");
        }
        fs::write(&file, &bytes).unwrap();
        assert_eq!(load(&file, &path), Some(lies));
        let folder = file.parent().unwrap();
        let link = folder.join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!(load(&link, &path), None);
        // A directory that others may enter, or that a link leads to, is neither read nor written.
        for mode in [0o755, 0o770, 0o1777] {
            fs::set_permissions(folder, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(load(&file, &path), None, "{mode:o}");
            assert!(store(&file, &path, &Known::new()).is_err(), "{mode:o}");
            assert_eq!(points(&path, Some(&cache)), [path.join("a/socket")]);
        }
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).unwrap();
        assert!(load(&file, &path).is_some());
        fs::rename(folder, cache.join("real")).unwrap();
        std::os::unix::fs::symlink(cache.join("real"), folder).unwrap();
        assert_eq!(load(&file, &path), None);
        assert!(store(&file, &path, &Known::new()).is_err());
        fs::remove_file(folder).unwrap();
        fs::rename(cache.join("real"), folder).unwrap();
        // Another user's, which only root can make.
        if rustix::process::geteuid().is_root() {
            for other in [file.as_path(), folder] {
                std::os::unix::fs::chown(other, Some(65_534), None).unwrap();
                assert_eq!(load(&file, &path), None, "{other:?}");
                std::os::unix::fs::chown(other, Some(0), None).unwrap();
            }
        }
        assert!(load(&file, &path).is_some());
    }

    #[test]
    fn without_a_place_for_a_cache_everything_is_read() {
        let (_folder, path, _) = tree();
        let _listens = UnixListener::bind(path.join("c/socket")).unwrap();
        for cache in [None, Some(Path::new("/proc/nowhere"))] {
            assert_eq!(points(&path, cache), [path.join("c/socket")]);
        }
    }
}
