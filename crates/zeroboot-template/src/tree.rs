//! A root file system as a list of what is in it: files of a directory on this machine, and entries of our own over them.
//! The directory is only read. Who owns its files here does not matter: in the guest they are root's.

use std::{
    collections::BTreeMap,
    fs, io,
    io::Write,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::PermissionsExt,
    },
    path::{Path, PathBuf},
};

use crate::cpio::{self, Entry, Kind};

/// Every file's time: images are reproducible, and a ZIP archive of such a file is possible (1980 is its year zero).
const MTIME: u32 = 1_577_836_800;
/// The user that code runs as.
pub(crate) const SANDBOX: u32 = 1000;

#[derive(Clone, Debug)]
enum Node {
    Host(PathBuf),
    Directory { mode: u32, owner: u32 },
    File { mode: u32, bytes: Vec<u8> },
    Symlink(Vec<u8>),
    CharDevice { mode: u32, major: u32, minor: u32 },
}

/// A root file system.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tree {
    // A directory's path is a prefix of what is in it, so it comes first.
    nodes: BTreeMap<Vec<u8>, Node>,
}

impl Tree {
    /// Everything below a directory, sockets, pipes and devices left out.
    pub(crate) fn of(dir: &Path) -> io::Result<Tree> {
        let mut tree = Tree::default();
        tree.walk(dir, &mut Vec::new())?;
        Ok(tree)
    }

    fn walk(&mut self, dir: &Path, prefix: &mut Vec<u8>) -> io::Result<()> {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if !(kind.is_dir() || kind.is_file() || kind.is_symlink()) {
                continue;
            }
            let length = prefix.len();
            prefix.extend_from_slice(entry.file_name().as_bytes());
            self.nodes.insert(prefix.clone(), Node::Host(entry.path()));
            if kind.is_dir() {
                prefix.push(b'/');
                self.walk(&entry.path(), prefix)?;
            }
            prefix.truncate(length);
        }
        Ok(())
    }

    pub(crate) fn contains(&self, path: &str) -> bool {
        self.nodes.contains_key(path.as_bytes())
    }

    pub(crate) fn text(&self, path: &str) -> Option<String> {
        match self.nodes.get(path.as_bytes())? {
            // A link would be followed on this host, not in the tree.
            Node::Host(host) if !fs::symlink_metadata(host).ok()?.is_file() => None,
            Node::Host(host) => fs::read_to_string(host).ok(),
            Node::File { bytes, .. } => String::from_utf8(bytes.clone()).ok(),
            _ => None,
        }
    }

    /// Takes out a path and all below it.
    pub(crate) fn remove(&mut self, path: &str) {
        let below = format!("{path}/").into_bytes();
        self.nodes.retain(|known, _| known != path.as_bytes() && !known.starts_with(&below));
    }

    pub(crate) fn directory(&mut self, path: &str, mode: u32, owner: u32) {
        self.put(path, Node::Directory { mode, owner });
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, bytes: impl Into<Vec<u8>>) {
        self.put(path, Node::File { mode, bytes: bytes.into() });
    }

    pub(crate) fn symlink(&mut self, path: &str, target: &str) {
        self.put(path, Node::Symlink(target.as_bytes().to_vec()));
    }

    pub(crate) fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.put(path, Node::CharDevice { mode, major, minor });
    }

    fn put(&mut self, path: &str, node: Node) {
        for (at, _) in path.match_indices('/') {
            let parent = path.as_bytes()[..at].to_vec();
            self.nodes.entry(parent).or_insert(Node::Directory { mode: 0o755, owner: 0 });
        }
        self.nodes.insert(path.as_bytes().to_vec(), node);
    }

    /// Writes the tree as an archive.
    pub(crate) fn write(&self, out: impl Write) -> io::Result<()> {
        self.write_from(0, out)
    }

    /// Writes the tree as an archive whose inode numbers begin behind a given one.
    pub(crate) fn write_from(&self, inode: u32, out: impl Write) -> io::Result<()> {
        let mut archive = cpio::Writer::continuing(out, inode);
        for (path, node) in &self.nodes {
            let (bytes, target);
            let (mode, owner, kind) = match node {
                Node::Host(host) => {
                    let meta = fs::symlink_metadata(host)?;
                    // Nothing in a sandbox is set-uid: no_new_privs would ignore it.
                    let mode = meta.permissions().mode() & 0o1777;
                    if meta.is_dir() {
                        (mode, 0, Kind::Directory)
                    } else if meta.is_symlink() {
                        target = fs::read_link(host)?.into_os_string().into_vec();
                        (0o777, 0, Kind::Symlink(&target))
                    } else {
                        bytes = fs::read(host)?;
                        (mode, 0, Kind::File(&bytes))
                    }
                }
                Node::Directory { mode, owner } => (*mode, *owner, Kind::Directory),
                Node::File { mode, bytes } => (*mode, 0, Kind::File(bytes)),
                Node::Symlink(target) => (0o777, 0, Kind::Symlink(target)),
                Node::CharDevice { mode, major, minor } => {
                    (*mode, 0, Kind::CharDevice { major: *major, minor: *minor })
                }
            };
            archive.append(&Entry { path, mode, uid: owner, gid: owner, mtime: MTIME, kind })?;
        }
        archive.finish()?.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_same_tree_gives_the_same_bytes() {
        let make = |names: &[&str]| {
            let dir = tempfile::tempdir().unwrap();
            for name in names {
                fs::create_dir_all(dir.path().join("d")).unwrap();
                fs::write(dir.path().join(name), name).unwrap();
            }
            symlink("d/b", dir.path().join("link")).unwrap();
            let mut tree = Tree::of(dir.path()).unwrap();
            tree.directory("home/sandbox", 0o700, SANDBOX);
            tree.char_device("dev/null", 0o666, 1, 3);
            let mut bytes = Vec::new();
            tree.write(&mut bytes).unwrap();
            bytes
        };
        assert_eq!(make(&["a", "d/b", "z"]), make(&["z", "a", "d/b"]));
    }

    #[test]
    fn a_link_is_no_text_of_the_tree() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("secret"), "of the host").unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        symlink(dir.path().join("secret"), root.join("passwd")).unwrap();
        fs::write(root.join("group"), "of the tree").unwrap();
        let tree = Tree::of(&root).unwrap();
        assert_eq!((tree.text("passwd"), tree.text("group").as_deref()), (None, Some("of the tree")));
    }

    #[test]
    fn our_entries_lie_over_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        fs::write(dir.path().join("etc/hosts"), "theirs").unwrap();
        let mut tree = Tree::of(dir.path()).unwrap();
        assert_eq!(tree.text("etc/hosts").unwrap(), "theirs");
        tree.file("etc/hosts", 0o644, "ours");
        tree.file("etc/a/b", 0o644, "deep");
        assert_eq!(tree.text("etc/hosts").unwrap(), "ours");
        assert!(tree.contains("etc/a"));
        tree.remove("etc/a");
        assert!(!tree.contains("etc/a/b") && tree.contains("etc/hosts"));
        assert_eq!(fs::read_to_string(dir.path().join("etc/hosts")).unwrap(), "theirs");
    }
}
