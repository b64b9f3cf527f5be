//! Writing into a directory what others packed: every path is resolved inside of it.
//!
//! Packages follow one another into one tree, and the first may bring a link that the second writes through. So the
//! kernel never gets a package's path as it is: each entry's directory is opened with `RESOLVE_IN_ROOT` (openat2(2)),
//! for which the tree's top is `/`, and the entry itself is made anew in it.

use std::{
    ffi::{OsStr, OsString},
    fs,
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::PermissionsExt,
        },
    },
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid},
    io::Errno,
};
use tar::EntryType;

/// User and group of an unpacked tree where we are root: it is no account's, and lies behind the ids of sandboxes.
/// What a package's program can do to files as this user it can do to the tree alone.
const OWNER: u32 = 1_790_000_000;
/// Most bytes of one tree. An archive of a few kilobytes can expand to more than any disk has.
const MOST_BYTES: u64 = 8 << 30;

/// The top of a tree.
#[derive(Debug)]
pub(crate) struct Root {
    dir: OwnedFd,
    path: PathBuf,
    owner: Option<u32>,
    left: u64,
}

impl Root {
    /// An empty directory. Where the caller may give files away, the tree is another user's than the caller's.
    pub(crate) fn new(path: &Path) -> io::Result<Root> {
        let root = Root::of(path)?;
        let given = rustix::fs::fchown(&root.dir, Some(Uid::from_raw(OWNER)), Some(Gid::from_raw(OWNER)));
        Ok(Root { owner: given.ok().map(|()| OWNER), ..root })
    }

    /// A directory, whose new files are the caller's.
    pub(crate) fn of(path: &Path) -> io::Result<Root> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty())?;
        Ok(Root { dir, path: path.to_owned(), owner: None, left: MOST_BYTES })
    }

    /// Where it is on this machine. Nothing below it is safe to open by its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The directory.
    pub(crate) fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// User and group that its files have on this machine.
    pub(crate) fn owner(&self) -> (u32, u32) {
        match self.owner {
            Some(id) => (id, id),
            None => (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()),
        }
    }

    /// Whether something is there, behind links, too.
    pub(crate) fn contains(&self, path: impl AsRef<Path>) -> bool {
        inside(path.as_ref()).and_then(|path| self.open(&path, OFlags::PATH)).is_ok()
    }

    /// The target of a link.
    pub(crate) fn read_link(&self, path: impl AsRef<Path>) -> io::Result<PathBuf> {
        let (parent, name) = self.existing(path.as_ref())?;
        Ok(OsString::from_vec(rustix::fs::readlinkat(&parent, name, Vec::new())?.into_bytes()).into())
    }

    /// A directory and those above it. One that is there stays, behind a link, too (a merged `/usr`).
    pub(crate) fn directory(&mut self, path: impl AsRef<Path>, mode: u32) -> io::Result<()> {
        let path = inside(path.as_ref())?;
        self.open_directory(&path, mode).map(drop)
    }

    /// A link, in place of what was there.
    pub(crate) fn symlink(&mut self, path: impl AsRef<Path>, target: &Path) -> io::Result<()> {
        let (parent, name) = self.place(path.as_ref())?;
        rustix::fs::symlinkat(target, &parent, &name)?;
        self.give(&parent, &name)
    }

    /// A file, in place of what was there: never written into, which a hard link or a symbolic one would share.
    pub(crate) fn file(&mut self, path: impl AsRef<Path>, mode: u32, mut bytes: impl Read) -> io::Result<()> {
        let (parent, name) = self.place(path.as_ref())?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::openat(&parent, &name, flags, Mode::from_raw_mode(0o600))?);
        self.left -= io::copy(&mut (&mut bytes).take(self.left), &mut file)?;
        if self.left == 0 && bytes.read(&mut [0])? != 0 {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "the packages are too large for a root file system",
            ));
        }
        // We read it later, whoever may not.
        file.set_permissions(fs::Permissions::from_mode(mode & 0o777 | 0o400))?;
        self.give(&parent, &name)
    }

    /// Another name of a file of the tree.
    fn hard_link(&mut self, path: &Path, of: &Path) -> io::Result<()> {
        let (from, known) = self.existing(of)?;
        let (parent, name) = self.place(path)?;
        Ok(rustix::fs::linkat(&from, known, &parent, name, AtFlags::empty())?)
    }

    /// Copies a directory of this machine that no stranger can write to.
    pub(crate) fn copy(&mut self, from: &Path, to: impl AsRef<Path>) -> io::Result<()> {
        let to = to.as_ref();
        self.directory(to, 0o755)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            let (source, target, kind) = (entry.path(), to.join(entry.file_name()), entry.file_type()?);
            if kind.is_dir() {
                self.copy(&source, &target)?;
            } else if kind.is_symlink() {
                self.symlink(&target, &fs::read_link(&source)?)?;
            } else if kind.is_file() {
                let file = File::open(&source)?;
                let mode = file.metadata()?.permissions().mode();
                self.file(&target, mode, file)?;
            }
        }
        Ok(())
    }

    /// Unpacks an archive but for paths that match a pattern (see [`matches`]). Devices, sockets and FIFOs are left out.
    pub(crate) fn unpack(&mut self, archive: impl Read, exclude: &[&str]) -> io::Result<()> {
        let mut archive = tar::Archive::new(archive);
        for entry in archive.entries()? {
            let mut entry = entry?;
            let path = PathBuf::from(OsStr::from_bytes(&entry.path_bytes()));
            if exclude.iter().any(|pattern| matches(pattern, &path)) {
                continue;
            }
            let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
            let mode = entry.header().mode()?;
            let target = entry.link_name_bytes().map(|name| PathBuf::from(OsStr::from_bytes(&name)));
            match (entry.header().entry_type(), target) {
                (EntryType::Directory, _) => self.directory(&path, mode & 0o1777 | 0o700),
                (EntryType::Regular | EntryType::Continuous, _) => self.file(&path, mode, &mut entry),
                (EntryType::Symlink, Some(target)) => self.symlink(&path, &target),
                (EntryType::Link, Some(target)) => self.hard_link(&path, &target),
                _ => Ok(()),
            }
            .map_err(named)?;
        }
        Ok(())
    }

    fn open(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(rustix::fs::openat2(&self.dir, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
    }

    /// The directory of a path that is there, and the name in it.
    fn existing(&self, path: &Path) -> io::Result<(OwnedFd, OsString)> {
        let path = inside(path)?;
        let (parent, name) = split(&path)?;
        Ok((self.open(parent, OFlags::PATH | OFlags::DIRECTORY)?, name.to_owned()))
    }

    /// The directory of a path, made if need be, and the name in it, which is free now.
    fn place(&mut self, path: &Path) -> io::Result<(OwnedFd, OsString)> {
        let path = inside(path)?;
        let (parent, name) = split(&path)?;
        let parent = self.open_directory(parent, 0o755)?;
        match rustix::fs::unlinkat(&parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok((parent, name.to_owned())),
            Err(error) => Err(error.into()),
        }
    }

    fn open_directory(&mut self, path: &Path, mode: u32) -> io::Result<OwnedFd> {
        match self.open(path, OFlags::PATH | OFlags::DIRECTORY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => return result,
        }
        let (above, name) = split(path)?;
        let above = self.open_directory(above, 0o755)?;
        rustix::fs::mkdirat(&above, name, Mode::from_raw_mode(mode))?;
        // The mask of new files is the caller's; a directory of the tree has the mode that it has everywhere.
        let made =
            rustix::fs::openat(&above, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        rustix::fs::fchmod(&made, Mode::from_raw_mode(mode))?;
        self.give(&above, name)?;
        Ok(made)
    }

    fn give(&self, parent: &OwnedFd, name: impl AsRef<OsStr>) -> io::Result<()> {
        let Some(owner) = self.owner else { return Ok(()) };
        let (user, group) = (Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)));
        Ok(rustix::fs::chownat(parent, name.as_ref(), user, group, AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

/// The path as one below the tree's top.
fn inside(path: &Path) -> io::Result<PathBuf> {
    let mut below = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => below.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "a path with `..`"));
            }
        }
    }
    Ok(below)
}

fn split(path: &Path) -> io::Result<(&Path, &OsStr)> {
    let name =
        path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a path below the top"))?;
    Ok((path.parent().unwrap_or(Path::new("")), name))
}

/// Whether a path, or a directory above it, is what the pattern says. `*` stands for any bytes, `/` included.
pub(crate) fn matches(pattern: &str, path: &Path) -> bool {
    let Ok(path) = inside(path) else { return false };
    path.ancestors().any(|path| glob(pattern.as_bytes(), path.as_os_str().as_bytes()))
}

fn glob(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|skip| text.get(skip..).is_some_and(|text| glob(rest, text))),
        Some((byte, rest)) => text.split_first().is_some_and(|(first, text)| first == byte && glob(rest, text)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    struct Hostile {
        host: tempfile::TempDir,
        top: PathBuf,
        root: Root,
    }

    /// A tree beside a directory that no package may reach.
    fn tree() -> Hostile {
        let host = tempfile::tempdir().unwrap();
        fs::create_dir(host.path().join("host")).unwrap();
        fs::write(host.path().join("host/secret"), "of the host").unwrap();
        let top = host.path().join("tree");
        fs::create_dir(&top).unwrap();
        let root = Root::new(&top).unwrap();
        Hostile { host, top, root }
    }

    impl Hostile {
        fn outside(&self) -> Vec<String> {
            let mut names: Vec<String> = fs::read_dir(self.host.path().join("host"))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            assert_eq!(fs::read_to_string(self.host.path().join("host/secret")).unwrap(), "of the host");
            names
        }
    }

    enum Packed<'a> {
        File(&'a str, &'a str),
        Directory(&'a str),
        Symlink(&'a str, &'a str),
        Hard(&'a str, &'a str),
    }

    /// An archive as no tool would write one.
    fn archive(entries: &[Packed<'_>]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for entry in entries {
            let (path, kind, link, bytes) = match entry {
                Packed::File(path, bytes) => (path, EntryType::Regular, "", *bytes),
                Packed::Directory(path) => (path, EntryType::Directory, "", ""),
                Packed::Symlink(path, to) => (path, EntryType::Symlink, *to, ""),
                Packed::Hard(path, to) => (path, EntryType::Link, *to, ""),
            };
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(0o755);
            header.set_size(bytes.len() as u64);
            let old = header.as_old_mut();
            old.name[..path.len()].copy_from_slice(path.as_bytes());
            old.linkname[..link.len()].copy_from_slice(link.as_bytes());
            header.set_cksum();
            builder.append(&header, bytes.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn a_file_behind_another_packages_link_stays_in_the_tree() {
        for up in ["", "../..", "../../../../../../../../../.."] {
            let mut hostile = tree();
            let host = hostile.host.path().join("host");
            let target = format!("{up}{}", host.display());
            hostile.root.unpack(&archive(&[Packed::Symlink("./usr/share/x", &target)])[..], &[]).unwrap();
            // A directory of the tree that has the same path is the only place that it can mean.
            hostile.root.directory(&host, 0o755).unwrap();
            hostile.root.unpack(&archive(&[Packed::File("./usr/share/x/evil", "evil")])[..], &[]).unwrap();
            assert_eq!(hostile.outside(), ["secret"]);
            let inside = hostile.top.join(host.strip_prefix("/").unwrap()).join("evil");
            assert_eq!(fs::read_to_string(inside).unwrap(), "evil");
        }
    }

    #[test]
    fn a_hard_link_takes_no_file_of_the_host_in() {
        let mut hostile = tree();
        let secret = hostile.host.path().join("host/secret");
        let (secret, host) = (secret.to_str().unwrap(), hostile.host.path().join("host"));
        for entries in [
            &[Packed::Hard("stolen", secret)][..],
            &[Packed::Symlink("way", host.to_str().unwrap()), Packed::Hard("stolen", "way/secret")],
            &[Packed::Hard("stolen", "../host/secret")],
        ] {
            assert!(hostile.root.unpack(&archive(entries)[..], &[]).is_err());
            assert!(!hostile.top.join("stolen").exists());
        }
        assert_eq!(fs::metadata(secret).unwrap().nlink(), 1);
    }

    #[test]
    fn no_path_leaves_the_tree_by_itself() {
        let mut hostile = tree();
        let host = hostile.host.path().join("host/evil");
        assert!(hostile.root.unpack(&archive(&[Packed::File("../host/evil", "evil")])[..], &[]).is_err());
        hostile.root.unpack(&archive(&[Packed::File(host.to_str().unwrap(), "evil")])[..], &[]).unwrap();
        assert_eq!(hostile.outside(), ["secret"]);
        assert!(hostile.root.contains(&host));
    }

    #[test]
    fn a_file_is_never_written_through_a_link() {
        let mut hostile = tree();
        let secret = hostile.host.path().join("host/secret");
        symlink(&secret, hostile.top.join("name")).unwrap();
        hostile.root.unpack(&archive(&[Packed::File("kept", "one"), Packed::Hard("other", "kept")])[..], &[]).unwrap();
        let over = [Packed::File("name", "evil"), Packed::File("other", "two")];
        hostile.root.unpack(&archive(&over)[..], &[]).unwrap();
        hostile.outside();
        let text = |name: &str| fs::read_to_string(hostile.top.join(name)).unwrap();
        assert_eq!([text("name"), text("kept"), text("other")], ["evil", "one", "two"]);
    }

    #[test]
    fn links_to_directories_of_the_tree_stay() {
        let mut hostile = tree();
        hostile.root.directory("usr/lib", 0o755).unwrap();
        hostile.root.symlink("lib", Path::new("usr/lib")).unwrap();
        let merged = [Packed::Directory("./lib"), Packed::File("./lib/libc.so.6", "c"), Packed::Directory("./lib/x")];
        hostile.root.unpack(&archive(&merged)[..], &[]).unwrap();
        assert_eq!(fs::read_to_string(hostile.top.join("usr/lib/libc.so.6")).unwrap(), "c");
        assert!(hostile.top.join("lib").is_symlink() && hostile.top.join("usr/lib/x").is_dir());
    }

    #[test]
    fn devices_stay_out_and_patterns_leave_out_what_is_below() {
        let mut hostile = tree();
        let mut device = tar::Header::new_gnu();
        device.set_path("disk").unwrap();
        device.set_entry_type(EntryType::Block);
        device.set_mode(0o666);
        device.set_size(0);
        device.set_cksum();
        let mut bytes = tar::Builder::new(Vec::new());
        bytes.append(&device, io::empty()).unwrap();
        hostile.root.unpack(&bytes.into_inner().unwrap()[..], &[]).unwrap();
        let doc = [Packed::Directory("./usr/share/doc"), Packed::File("./usr/share/doc/x/y", "")];
        hostile.root.unpack(&archive(&doc)[..], &["usr/share/doc"]).unwrap();
        assert_eq!(fs::read_dir(&hostile.top).unwrap().count(), 0);
        for (pattern, path, whether) in [
            ("usr/lib/*.a", "./usr/lib/libc.a", true),
            ("usr/lib/*.a", "usr/lib/a/libc.a", true),
            ("usr/lib/*.a", "usr/lib/libc.so", false),
            ("usr/lib/python3*/test", "usr/lib/python3.11/test/x.py", true),
            ("boot", "bootstrap", false),
        ] {
            assert_eq!(matches(pattern, Path::new(path)), whether, "{pattern} {path}");
        }
    }

    #[test]
    fn a_tree_has_a_size() {
        let mut hostile = tree();
        hostile.root.left = 10;
        hostile.root.file("fits", 0o644, &[1; 10][..]).unwrap();
        assert!(hostile.root.file("not", 0o644, &[1][..]).is_err());
        hostile.root.left = 10;
        let error = hostile.root.file("bomb", 0o644, io::repeat(0)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }
}
