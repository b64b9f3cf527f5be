//! A directory of built templates.
//!
//! ```text
//! STORE/NAME/manifest.toml  memory.img  state.bin
//! STORE/.building-NAME-…    one under way, or left by a build that was ended: cleared by the next build of NAME
//! STORE/.lock-NAME          held during a build
//! ```
//!
//! A template appears at once, by a rename; one that is replaced stays whole for those who have its files open.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::fs::{CWD, FlockOperation, RenameFlags};

use crate::{
    assemble::Provenance,
    manifest::{FORMAT, FileFacts, MOST_BYTES, Manifest, ManifestError, WarmUp},
    recipe::{Recipe, is_template_name},
};

const MANIFEST_FILE: &str = "manifest.toml";
/// The frozen memory, in a template's directory.
pub const MEMORY_FILE: &str = "memory.img";
/// The frozen state of the CPU and the devices.
pub const STATE_FILE: &str = "state.bin";

/// Why a template cannot be had, or kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Not a template's name.
    #[error("{0:?} cannot be a template's name")]
    Name(String),
    /// There is none.
    #[error("there is no template {0}")]
    Missing(String),
    /// A file of it is not there.
    #[error("template {name} is not complete: it has no {file}")]
    Incomplete {
        /// The template.
        name: String,
        /// The file.
        file: &'static str,
    },
    /// Its manifest.
    #[error("the manifest of template {name} cannot be used")]
    Manifest {
        /// The template.
        name: String,
        /// Why not.
        source: ManifestError,
    },
    /// A file is not what the manifest says.
    #[error("template {name} is damaged: {file} {what}")]
    Damaged {
        /// The template.
        name: String,
        /// The file.
        file: &'static str,
        /// What is wrong.
        what: &'static str,
    },
    /// The disk.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl StoreError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            StoreError::Missing(name) => Some(format!("zeroboot template build {name}")),
            StoreError::Incomplete { name, .. }
            | StoreError::Damaged { name, .. }
            | StoreError::Manifest { name, .. } => Some(format!("zeroboot template build {name}, which replaces it")),
            StoreError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("the disk is full; ZEROBOOT_HOME names another directory for templates".to_owned())
            }
            StoreError::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some("ZEROBOOT_HOME names a directory for templates that is yours".to_owned())
            }
            StoreError::Name(_) | StoreError::Io { .. } => None,
        }
    }
}

/// A directory of templates.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

/// A template that passed the quick checks.
#[derive(Clone, Debug)]
pub struct Template {
    /// Its directory.
    pub dir: PathBuf,
    /// What it says of itself.
    pub manifest: Manifest,
}

/// A line of the list.
#[derive(Debug)]
pub struct Listed {
    /// The name.
    pub name: String,
    /// What it is, or why it is refused.
    pub template: Result<Template, StoreError>,
    /// What it takes of the disk, bytes.
    pub disk: u64,
}

/// A template being built. Dropped before [`Store::commit`], it is gone.
#[derive(Debug)]
pub struct Draft {
    name: String,
    dir: tempfile::TempDir,
    _lock: File,
}

impl Draft {
    /// Where `memory.img` and `state.bin` go.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// What the builder knows of a finished template.
#[derive(Clone, Debug)]
pub struct Built {
    /// What it was made by.
    pub recipe: Recipe,
    /// What it was made from.
    pub provenance: Provenance,
    /// How it was warmed.
    pub warm_up: WarmUp,
    /// [`memory_hash`] of `memory.img`, when it is known already.
    pub memory_blake3: Option<String>,
    /// What the VM engine says of the snapshot.
    pub snapshot: toml::Table,
    /// The version of Zeroboot.
    pub zeroboot: String,
}

impl Store {
    /// The store in this directory, which need not exist yet.
    pub fn at(dir: impl Into<PathBuf>) -> Store {
        Store { dir: dir.into() }
    }

    /// The user's store ([`crate::paths::templates_dir`]).
    pub fn of_user() -> Option<Store> {
        crate::paths::templates_dir().map(Store::at)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Begins a template. Waits while another process builds one of the same name.
    pub fn begin(&self, name: &str) -> Result<Draft, StoreError> {
        check_name(name)?;
        fs::create_dir_all(&self.dir).map_err(io_error("make", &self.dir))?;
        let path = self.dir.join(format!(".lock-{name}"));
        let lock = File::create(&path).map_err(io_error("make", &path))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).map_err(|e| io_error("lock", &path)(e.into()))?;
        let prefix = format!(".building-{name}-");
        for entry in fs::read_dir(&self.dir).map_err(io_error("read", &self.dir))?.flatten() {
            // Of a build that was ended: we hold the lock, so none goes on. (A name may be another's beginning:
            // what follows ours has no '-' in it.)
            let left = entry.file_name().to_str().and_then(|known| known.strip_prefix(&prefix)).map(str::to_owned);
            if left.is_some_and(|rest| !rest.contains('-')) {
                fs::remove_dir_all(entry.path()).map_err(io_error("remove", &entry.path()))?;
            }
        }
        let dir =
            tempfile::Builder::new().prefix(&prefix).tempdir_in(&self.dir).map_err(io_error("make", &self.dir))?;
        Ok(Draft { name: name.to_owned(), dir, _lock: lock })
    }

    /// Gives a finished template its manifest and its name. It replaces an older one.
    pub fn commit(&self, draft: Draft, built: Built) -> Result<Template, StoreError> {
        let name = draft.name.clone();
        let file = |file: &'static str| {
            let path = draft.path().join(file);
            match File::open(&path) {
                Ok(file) => Ok((file, path)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    Err(StoreError::Incomplete { name: name.clone(), file })
                }
                Err(error) => Err(io_error("read", &path)(error)),
            }
        };
        let (memory, path) = file(MEMORY_FILE)?;
        let memory_blake3 = match built.memory_blake3 {
            Some(hash) => hash,
            None => memory_hash(&memory).map_err(io_error("read", &path))?,
        };
        let memory_bytes = memory.metadata().map_err(io_error("read", &path))?.len();
        let (state_file, path) = file(STATE_FILE)?;
        let state = file_facts(&state_file).map_err(io_error("read", &path))?;
        let manifest = Manifest {
            format: FORMAT,
            name: name.clone(),
            runtime: built.recipe.runtime,
            engine: "vm".to_owned(),
            zeroboot: built.zeroboot,
            built_at: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            memory: FileFacts { bytes: memory_bytes, blake3: memory_blake3 },
            state,
            warm_up: built.warm_up,
            recipe: built.recipe,
            provenance: built.provenance,
            snapshot: built.snapshot,
        };
        let path = draft.path().join(MANIFEST_FILE);
        let write = || {
            let text = manifest.to_toml().map_err(io::Error::other)?;
            // What cannot be read back must not be written.
            Manifest::from_toml(&text).map_err(io::Error::other)?;
            fs::write(&path, text)?;
            for file in [&memory, &state_file, &File::open(&path)?, &File::open(draft.path())?] {
                file.sync_all()?;
            }
            Ok(())
        };
        write().map_err(io_error("write", &path))?;
        let dir = self.dir.join(&name);
        self.publish(draft.path(), &dir).map_err(io_error("make", &dir))?;
        // What is left of the draft: nothing, or the template that was replaced. `Draft` removes it.
        Ok(Template { dir, manifest })
    }

    fn publish(&self, new: &Path, dir: &Path) -> io::Result<()> {
        if !dir.exists() {
            fs::rename(new, dir)?;
        } else if rustix::fs::renameat_with(CWD, new, CWD, dir, RenameFlags::EXCHANGE).is_err() {
            // A file system that cannot exchange (9p): for an instant there is no template of the name.
            let old = self.dir.join(new.with_extension("old").file_name().unwrap_or_default());
            fs::rename(dir, &old)?;
            fs::rename(new, dir)?;
            fs::remove_dir_all(&old)?;
        }
        File::open(&self.dir)?.sync_all()
    }

    /// The template of this name, after the quick checks: manifest, lengths, the state's hash. The memory's hash is
    /// checked by the engine as it loads it, and by [`Store::verify`].
    pub fn open(&self, name: &str) -> Result<Template, StoreError> {
        check_name(name)?;
        let dir = self.dir.join(name);
        if !dir.is_dir() {
            return Err(StoreError::Missing(name.to_owned()));
        }
        let damaged = |file, what| StoreError::Damaged { name: name.to_owned(), file, what };
        let open = |file: &'static str| {
            File::open(dir.join(file)).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => StoreError::Incomplete { name: name.to_owned(), file },
                _ => io_error("read", &dir.join(file))(error),
            })
        };
        let mut text = String::new();
        let manifest = open(MANIFEST_FILE)?;
        match manifest.take(MOST_BYTES).read_to_string(&mut text) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(damaged(MANIFEST_FILE, "is not text"));
            }
            Err(error) => return Err(io_error("read", &dir.join(MANIFEST_FILE))(error)),
        }
        let manifest = Manifest::from_toml(&text);
        let manifest = manifest.map_err(|source| StoreError::Manifest { name: name.to_owned(), source })?;
        if manifest.name != name {
            return Err(damaged(MANIFEST_FILE, "is that of another template"));
        }
        let memory = open(MEMORY_FILE)?.metadata().map_err(io_error("read", &dir.join(MEMORY_FILE)))?;
        if memory.len() != manifest.memory.bytes {
            return Err(damaged(MEMORY_FILE, "has another length than the manifest says"));
        }
        let state = open(STATE_FILE)?;
        let length = state.metadata().map_err(io_error("read", &dir.join(STATE_FILE)))?.len();
        if length != manifest.state.bytes {
            return Err(damaged(STATE_FILE, "has another length than the manifest says"));
        }
        if file_facts(&state).map_err(io_error("read", &dir.join(STATE_FILE)))? != manifest.state {
            return Err(damaged(STATE_FILE, "has another hash than the manifest says"));
        }
        Ok(Template { dir, manifest })
    }

    /// As [`Store::open`], and reads the whole memory.
    pub fn verify(&self, name: &str) -> Result<Template, StoreError> {
        let template = self.open(name)?;
        let path = template.dir.join(MEMORY_FILE);
        let memory = File::open(&path).map_err(io_error("read", &path))?;
        if memory_hash(&memory).map_err(io_error("read", &path))? != template.manifest.memory.blake3 {
            let what = "has another hash than the manifest says";
            return Err(StoreError::Damaged { name: name.to_owned(), file: MEMORY_FILE, what });
        }
        Ok(template)
    }

    /// All templates by name, the broken ones with what is wrong with them.
    pub fn list(&self) -> Result<Vec<Listed>, StoreError> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(io_error("read", &self.dir))?,
        };
        let mut names: Vec<String> =
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.retain(|name| is_template_name(name) && self.dir.join(name).is_dir());
        names.sort();
        let listed = |name: String| Listed { template: self.open(&name), disk: disk(&self.dir.join(&name)), name };
        Ok(names.into_iter().map(listed).collect())
    }

    /// Removes a template, broken or not.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        check_name(name)?;
        let dir = self.dir.join(name);
        // Out of sight first: half a template must not be found.
        let gone = self.dir.join(format!(".building-{name}-removed{}", std::process::id()));
        match fs::rename(&dir, &gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(StoreError::Missing(name.to_owned())),
            result => result.map_err(io_error("remove", &dir))?,
        }
        fs::remove_dir_all(&gone).map_err(io_error("remove", &gone))
    }
}

/// BLAKE3 over the pages of a memory image that are not all zero, each behind its number (u32, little endian): the same
/// whether a page of zeros is stored or a hole. The VM engine computes the same.
pub fn memory_hash(file: &File) -> io::Result<String> {
    const PAGE: usize = 4096;
    let mut hasher = blake3::Hasher::new();
    let mut chunk = vec![0; 256 * PAGE];
    let mut page = 0u32;
    let mut file = file;
    loop {
        let mut filled = 0;
        while filled < chunk.len() {
            match file.read(&mut chunk[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        for bytes in chunk[..filled].chunks(PAGE) {
            if bytes.iter().any(|byte| *byte != 0) {
                hasher.update(&page.to_le_bytes()).update(bytes);
            }
            page = page.checked_add(1).ok_or(io::ErrorKind::FileTooLarge)?;
        }
        if filled < chunk.len() {
            return Ok(hasher.finalize().to_hex().to_string());
        }
    }
}

fn file_facts(file: &File) -> io::Result<FileFacts> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file)?;
    Ok(FileFacts { bytes: hasher.count(), blake3: hasher.finalize().to_hex().to_string() })
}

fn disk(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|meta| meta.blocks() * 512).sum()
}

fn check_name(name: &str) -> Result<(), StoreError> {
    if is_template_name(name) { Ok(()) } else { Err(StoreError::Name(name.to_owned())) }
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built() -> Built {
        let example = crate::manifest::tests::example();
        Built {
            recipe: example.recipe,
            provenance: example.provenance,
            warm_up: example.warm_up,
            memory_blake3: None,
            snapshot: example.snapshot,
            zeroboot: example.zeroboot,
        }
    }

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path().join("templates"));
        (dir, store)
    }

    fn fill(draft: &Draft, byte: u8) {
        let mut memory = vec![0; 1 << 16];
        memory[8192] = byte;
        fs::write(draft.path().join(MEMORY_FILE), memory).unwrap();
        fs::write(draft.path().join(STATE_FILE), [byte; 100]).unwrap();
    }

    fn names(store: &Store) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(store.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_committed_template_can_be_opened_replaced_and_removed() {
        let (_dir, store) = store();
        assert!(store.list().unwrap().is_empty());
        assert!(matches!(store.open("python"), Err(StoreError::Missing(_))));
        for byte in [1, 2] {
            let draft = store.begin("python").unwrap();
            fill(&draft, byte);
            store.commit(draft, built()).unwrap();
            let template = store.verify("python").unwrap();
            assert_eq!(fs::read(template.dir.join(STATE_FILE)).unwrap(), [byte; 100]);
        }
        // Nothing but the template and the lock.
        assert_eq!(names(&store), [".lock-python", "python"]);
        let list = store.list().unwrap();
        assert!(list.len() == 1 && list[0].template.is_ok() && list[0].disk > 0);
        store.remove("python").unwrap();
        assert_eq!(names(&store), [".lock-python"]);
        assert!(matches!(store.remove("python"), Err(StoreError::Missing(_))));
    }

    #[test]
    fn an_abandoned_build_leaves_nothing() {
        let (_dir, store) = store();
        let draft = store.begin("python").unwrap();
        fill(&draft, 1);
        drop(draft);
        assert!(store.list().unwrap().is_empty());
        // Of a process that was killed.
        fs::create_dir(store.path().join(".building-python-abc")).unwrap();
        fs::create_dir(store.path().join(".building-python-big-abc")).unwrap();
        drop(store.begin("python").unwrap());
        assert_eq!(names(&store), [".building-python-big-abc", ".lock-python"]);
    }

    #[test]
    fn a_commit_without_its_files_is_refused() {
        let (_dir, store) = store();
        let draft = store.begin("python").unwrap();
        fs::write(draft.path().join(MEMORY_FILE), [0; 4096]).unwrap();
        let refused = store.commit(draft, built()).unwrap_err();
        assert!(matches!(refused, StoreError::Incomplete { file: STATE_FILE, .. }));
        assert!(store.list().unwrap().is_empty());
    }

    #[test]
    fn damage_is_found_and_named() {
        let (_dir, store) = store();
        let refused_after = |damage: fn(&Path)| {
            let draft = store.begin("python").unwrap();
            fill(&draft, 7);
            let template = store.commit(draft, built()).unwrap();
            damage(&template.dir);
            let error = store.verify("python").unwrap_err();
            assert!(error.hint().unwrap().contains("template build python"));
            error.to_string()
        };
        let text = refused_after(|dir| fs::remove_file(dir.join(STATE_FILE)).unwrap());
        assert_eq!(text, "template python is not complete: it has no state.bin");
        let text = refused_after(|dir| fs::remove_file(dir.join(MANIFEST_FILE)).unwrap());
        assert_eq!(text, "template python is not complete: it has no manifest.toml");
        let text = refused_after(|dir| fs::write(dir.join(MANIFEST_FILE), "format = 9").unwrap());
        assert_eq!(text, "the manifest of template python cannot be used");
        let text = refused_after(|dir| fs::write(dir.join(MANIFEST_FILE), [0xff, 0xfe]).unwrap());
        assert_eq!(text, "template python is damaged: manifest.toml is not text");
        let text = refused_after(|dir| fs::write(dir.join(STATE_FILE), [8; 100]).unwrap());
        assert_eq!(text, "template python is damaged: state.bin has another hash than the manifest says");
        let text = refused_after(|dir| fs::write(dir.join(MEMORY_FILE), [0; 4096]).unwrap());
        assert_eq!(text, "template python is damaged: memory.img has another length than the manifest says");
        let text = refused_after(|dir| fs::write(dir.join(MEMORY_FILE), vec![0; 1 << 16]).unwrap());
        assert_eq!(text, "template python is damaged: memory.img has another hash than the manifest says");
        // The list shows it with its reason, and it can be removed.
        assert!(store.list().unwrap()[0].template.is_ok(), "the quick checks do not read the memory");
        store.remove("python").unwrap();
    }

    #[test]
    fn a_copied_directory_is_not_the_template_it_says() {
        let (_dir, store) = store();
        let draft = store.begin("python").unwrap();
        fill(&draft, 1);
        let template = store.commit(draft, built()).unwrap();
        fs::rename(template.dir, store.path().join("other")).unwrap();
        let refused = store.open("other").unwrap_err().to_string();
        assert_eq!(refused, "template other is damaged: manifest.toml is that of another template");
    }

    #[test]
    fn no_name_leaves_the_store() {
        let (_dir, store) = store();
        for name in ["", ".", "..", "../x", "a/b", ".lock-x", "A"] {
            assert!(matches!(store.open(name), Err(StoreError::Name(_))), "{name}");
            assert!(matches!(store.remove(name), Err(StoreError::Name(_))), "{name}");
            assert!(matches!(store.begin(name), Err(StoreError::Name(_))), "{name}");
        }
    }

    #[test]
    fn a_hole_hashes_as_zeros_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let mut bytes = vec![0; 3 << 20];
        bytes[(2 << 20) + 5] = 9;
        fs::write(path("full"), &bytes).unwrap();
        let sparse = File::create_new(path("sparse")).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&sparse, &[9], (2 << 20) + 5).unwrap();
        sparse.set_len(3 << 20).unwrap();
        let hash = |name: &str| memory_hash(&File::open(path(name)).unwrap()).unwrap();
        assert_eq!(hash("full"), hash("sparse"));
        let page = (2u32 << 20) / 4096;
        let expected = [&page.to_le_bytes(), &bytes[2 << 20..][..4096]].concat();
        assert_eq!(hash("full"), blake3::hash(&expected).to_hex().as_str());
    }
}
