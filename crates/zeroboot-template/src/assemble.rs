//! From a recipe to what a VM boots: a kernel and an initramfs. Needs the network (once) and no KVM.
//!
//! ```text
//! CACHE/apt/                           apt's private directory: lists, archives
//! CACHE/kernels/PACKAGE_VERSION        kernels, unpacked
//! CACHE/rootfs/NAME-KEY/               a recipe's root file system as an archive (KEY: recipe and package versions)
//! CACHE/assembled/NAME-KEY/            kernel + root file system + agent + runner (KEY: all that was asked for)
//! ```
//!
//! Each of these directories appears whole or not at all, and a copy of CACHE on another machine works there.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::{
    apt::{self, Apt, AptError},
    cpio,
    kernel::{self, KernelError},
    recipe::Recipe,
    rootfs::{self, Contents, RootfsError, io_error},
    tree::Tree,
    unpack::Root,
};

/// Part of the names of what is in the cache: when the code that makes a root file system changes, so do they.
const RULES: [&[u8]; 4] =
    [include_bytes!("rootfs.rs"), include_bytes!("unpack.rs"), include_bytes!("tree.rs"), include_bytes!("cpio.rs")];
/// Age up to which an assembly is used as it is. An older one is made again from newer packages.
const FRESH: Duration = Duration::from_secs(7 * 24 * 3600);
/// Age up to which package lists are used as they are.
const LISTS_FRESH: Duration = Duration::from_secs(24 * 3600);
/// Names of packages with a kernel for virtual machines: Debian's, Ubuntu's, any.
const KERNELS: [&str; 3] = ["linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64"];
/// First inode of the overlay: above those of any root file system, since both become one archive.
const OVERLAY_INODES: u32 = 1 << 24;
/// Least memory that a guest needs besides its root file system.
const KERNEL_AND_MORE: u64 = 128 << 20;
const KERNEL_FILE: &str = "vmlinux";
const INITRAMFS_FILE: &str = "initramfs.cpio";
const PROVENANCE_FILE: &str = "provenance.toml";

/// Where the root file system comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RootfsSource {
    /// The recipe's packages, with the package sources of this machine.
    #[default]
    Packages,
    /// A directory that holds one; the recipe's package lists are not looked at.
    Directory(PathBuf),
}

/// Where the kernel comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KernelSource {
    /// The distribution's package for virtual machines.
    #[default]
    Package,
    /// A file: `vmlinux` (ELF) or a bzImage.
    File(PathBuf),
}

/// Where things come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// The root file system.
    pub rootfs: RootfsSource,
    /// The kernel.
    pub kernel: KernelSource,
    /// What is in the cache is good enough, however old.
    pub offline: bool,
    /// Newer packages are looked for, however fresh the cache is.
    pub refresh: bool,
}

/// What is said while it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress<'a> {
    /// A step that takes a while begins.
    Step(&'a str),
    /// The step that goes on, in more detail.
    Detail(&'a str),
}

/// What a VM boots.
#[derive(Clone, Debug)]
pub struct Assembled {
    /// An ELF `vmlinux`.
    pub kernel: PathBuf,
    /// An archive in the `newc` format, not compressed.
    pub initramfs: PathBuf,
    /// Where it all came from.
    pub provenance: Provenance,
    /// It was in the cache.
    pub cached: bool,
}

/// Where a template's parts came from; goes into its manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// `packages`, or a directory's path.
    pub rootfs: String,
    /// A package with its version, or a file's path.
    pub kernel: String,
    /// The kernel's release, as `uname -r` says it.
    pub kernel_release: String,
    /// Hashes (BLAKE3).
    pub kernel_blake3: String,
    /// Of the whole initramfs.
    pub initramfs_blake3: String,
    /// Of the agent.
    pub agent_blake3: String,
    /// Of the runner.
    pub runner_blake3: String,
    /// Seconds since 1970.
    pub assembled_at: u64,
    /// Debian packages: name, version, architecture.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub packages: Vec<String>,
    /// Python packages: name, version.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pip: Vec<String>,
    /// Node packages: name, version.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub npm: Vec<String>,
}

/// Why nothing was assembled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AssembleError {
    /// No root file system.
    #[error("no root file system")]
    Rootfs(#[source] RootfsError),
    /// No kernel package.
    #[error("no kernel package")]
    KernelPackage(#[source] AptError),
    /// A kernel that is none.
    #[error("cannot use the kernel {0}")]
    Kernel(PathBuf, #[source] KernelError),
    /// The guest could not unpack it.
    #[error("memory_mib = {has} is too little for a root file system of {size} MiB")]
    Memory {
        /// The recipe's, MiB.
        has: u32,
        /// The initramfs's, MiB.
        size: u64,
    },
    /// The cache.
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

impl AssembleError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            AssembleError::Rootfs(error) => error.hint(),
            AssembleError::KernelPackage(AptError::NoPackage(_)) => Some("give a kernel with --kernel FILE"),
            AssembleError::KernelPackage(error) => error.hint(),
            AssembleError::Kernel(..) => Some("--kernel takes an ELF vmlinux or a bzImage for x86-64"),
            AssembleError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("the disk is full; XDG_CACHE_HOME moves the cache directory")
            }
            AssembleError::Memory { .. } => Some(
                "memory_mib must be at least twice that and 128 more: the image and what is unpacked of it are there at once",
            ),
            AssembleError::Io { .. } => None,
        }
    }
}

// Two enums with the same fields: a path in the cache is the same matter for both.
impl From<RootfsError> for AssembleError {
    fn from(error: RootfsError) -> AssembleError {
        match error {
            RootfsError::Io { what, path, source } => AssembleError::Io { what, path, source },
            error => AssembleError::Rootfs(error),
        }
    }
}

/// Assembles what the recipe's template boots. `agent` becomes `/init`; `runner` is the recipe's runtime's.
pub fn assemble(
    recipe: &Recipe,
    sources: &Sources,
    agent: &[u8],
    runner: &[u8],
    cache: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Assembled, AssembleError> {
    let all = cache.join("assembled");
    let overlay = overlay(recipe, agent, runner).map_err(io_err("write", &all))?;
    let name = format!("{}-{}", recipe.name, input_key(recipe, sources, &overlay)?);
    let dir = all.join(&name);
    // A directory may have changed since, and to see that takes as long as to read it.
    let repeatable = sources.rootfs == RootfsSource::Packages;
    if repeatable && !sources.refresh {
        match open(&dir) {
            Some(assembled) if sources.offline || is_fresh(&assembled.provenance) => return Ok(assembled),
            _ => {}
        }
    }
    let mut setup = Setup { cache, sources, apt: None };
    let hashes = (hash(agent), hash(runner));
    let assembled = setup.assemble(recipe, &overlay, hashes, &all, &dir, progress);
    match (assembled, open(&dir)) {
        // The network is down: what was assembled before is still what was asked for.
        (Err(_), Some(older)) if repeatable && !sources.refresh => {
            progress(Progress::Detail("newer packages cannot be fetched; using what was assembled before"));
            Ok(older)
        }
        (result, _) => result,
    }
}

struct Setup<'a> {
    cache: &'a Path,
    sources: &'a Sources,
    apt: Option<Apt>,
}

impl Setup<'_> {
    fn assemble(
        &mut self,
        recipe: &Recipe,
        overlay: &[u8],
        (agent_blake3, runner_blake3): (String, String),
        all: &Path,
        dir: &Path,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Assembled, AssembleError> {
        progress(Progress::Step("kernel"));
        let (kernel, kernel_name) = self.kernel(progress)?;
        progress(Progress::Step("root file system"));
        let (base, contents, rootfs_name) = self.base(recipe, all, progress)?;

        progress(Progress::Step("initramfs"));
        let partial = partial_dir(all)?;
        let kernel_bytes = fs::read(&kernel).map_err(io_err("read", &kernel))?;
        let kernel_file = partial.path().join(KERNEL_FILE);
        if fs::hard_link(&kernel, &kernel_file).is_err() {
            put(&kernel_file, &[&kernel_bytes])?;
        }
        let base = fs::read(base.path()).map_err(io_err("read", base.path()))?;
        // One archive: the tools that list one stop at the first end.
        let base = base.strip_suffix(cpio::END.as_slice()).unwrap_or(&base);
        let parts: [&[u8]; 2] = [base, overlay];
        let size = (base.len() + overlay.len()) as u64;
        if 2 * size + KERNEL_AND_MORE > u64::from(recipe.memory_mib) << 20 {
            return Err(AssembleError::Memory { has: recipe.memory_mib, size: size.div_ceil(1 << 20) });
        }
        put(&partial.path().join(INITRAMFS_FILE), &parts)?;
        let mut hasher = blake3::Hasher::new();
        parts.iter().for_each(|part| {
            hasher.update(part);
        });

        let provenance = Provenance {
            rootfs: rootfs_name,
            kernel: kernel_name,
            kernel_release: kernel::release(&kernel_bytes).unwrap_or_default(),
            kernel_blake3: hash(&kernel_bytes),
            initramfs_blake3: hasher.finalize().to_hex().to_string(),
            agent_blake3,
            runner_blake3,
            assembled_at: now(),
            packages: contents.packages,
            pip: contents.pip,
            npm: contents.npm,
        };
        let text = toml::to_string(&provenance).map_err(io::Error::other).map_err(io_err("write", dir))?;
        put(&partial.path().join(PROVENANCE_FILE), &[text.as_bytes()])?;
        forget_older(all, &recipe.name);
        publish(partial, dir)?;
        Ok(Assembled { cached: false, ..open(dir).ok_or_else(|| vanished(dir))? })
    }

    /// An ELF kernel's file, and its name.
    fn kernel(&mut self, progress: &mut dyn FnMut(Progress<'_>)) -> Result<(PathBuf, String), AssembleError> {
        let kernels = self.cache.join("kernels");
        fs::create_dir_all(&kernels).map_err(io_err("make", &kernels))?;
        let unpack = |file: &[u8], of: &Path, into: &Path| {
            let elf = kernel::vmlinux(file).map_err(|error| AssembleError::Kernel(of.to_owned(), error))?;
            put_atomically(into, &elf)
        };
        if let KernelSource::File(path) = &self.sources.kernel {
            let bytes = fs::read(path).map_err(io_err("read", path))?;
            let into = kernels.join(format!("file_{}", &hash(&bytes)[..16]));
            if !into.exists() {
                unpack(&bytes, path, &into)?;
            }
            return Ok((into, path.display().to_string()));
        }
        let apt = self.apt().map_err(AssembleError::KernelPackage)?;
        let mut found = Err(AptError::NoPackage(KERNELS[0].to_owned()));
        for meta in KERNELS {
            found = apt.stands_for(meta).and_then(|name| apt.candidate(&name));
            if found.is_ok() {
                break;
            }
        }
        let package = found.map_err(AssembleError::KernelPackage)?;
        let into = kernels.join(format!("{}_{}", package.name, package.version.replace(':', "%3a")));
        if !into.exists() {
            progress(Progress::Detail(&format!("fetching {} {}", package.name, package.version)));
            let files = apt.fetch(std::slice::from_ref(&package)).map_err(AssembleError::KernelPackage)?;
            for file in files {
                let image = apt::read_file(&file, "boot/vmlinuz-*").map_err(AssembleError::KernelPackage)?;
                unpack(&image, &file, &into)?;
            }
        }
        Ok((into, format!("{} {}", package.name, package.version)))
    }

    /// The root file system without agent and runner, as an archive.
    fn base(
        &mut self,
        recipe: &Recipe,
        all: &Path,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(Base, Contents, String), AssembleError> {
        if let RootfsSource::Directory(root) = &self.sources.rootfs {
            let mut tree = Tree::of(root).map_err(io_err("read", root))?;
            rootfs::finish(&mut tree, recipe)?;
            fs::create_dir_all(all).map_err(io_err("make", all))?;
            let file = tempfile::Builder::new().prefix(".rootfs-").tempfile_in(all).map_err(io_err("write", all))?;
            tree.write(BufWriter::new(&file)).map_err(io_err("write", file.path()))?;
            return Ok((Base::Temporary(file.into_temp_path()), Contents::default(), root.display().to_string()));
        }
        let rootfs = self.cache.join("rootfs");
        fs::create_dir_all(&rootfs).map_err(io_err("make", &rootfs))?;
        let refresh = self.sources.refresh;
        let apt = self.apt().map_err(RootfsError::from)?;
        progress(Progress::Detail("choosing packages"));
        let packages = rootfs::packages(apt, recipe).map_err(RootfsError::from)?;
        let mut key = blake3::Hasher::new();
        RULES.iter().for_each(|rules| {
            key.update(blake3::hash(rules).as_bytes());
        });
        for list in [&recipe.pip, &recipe.npm] {
            key.update(&(list.len() as u64).to_le_bytes());
            list.iter().for_each(|item| {
                key.update(item.as_bytes()).update(&[0]);
            });
        }
        for package in &packages {
            key.update(format!("{} {} {}\n", package.name, package.version, package.architecture).as_bytes());
        }
        let dir = rootfs.join(format!("{}-{}", recipe.name, &key.finalize().to_hex()[..16]));
        let archive = dir.join("rootfs.cpio");
        let listed = dir.join("contents.toml");
        // Packages' versions are in the key; those of pip and npm are not known before.
        if !dir.exists() || (refresh && !(recipe.pip.is_empty() && recipe.npm.is_empty())) {
            let partial = partial_dir(&rootfs)?;
            let root = tempfile::Builder::new().prefix(".unpacked-").tempdir_in(&rootfs);
            let root = root.map_err(io_err("make", &rootfs))?;
            let mut tree = Root::new(root.path()).map_err(io_err("use", root.path()))?;
            let mut note = |text: &str| progress(Progress::Detail(text));
            let contents = rootfs::build(apt, &packages, recipe, &mut tree, &mut note)?;
            note("packing");
            let mut tree = Tree::of(root.path()).map_err(io_err("read", root.path()))?;
            rootfs::finish(&mut tree, recipe)?;
            let path = partial.path().join("rootfs.cpio");
            let file = File::create(&path).map_err(io_err("write", &path))?;
            tree.write(BufWriter::with_capacity(1 << 20, &file)).map_err(io_err("write", &path))?;
            file.sync_all().map_err(io_err("write", &path))?;
            let text = toml::to_string(&Listed::from(&contents)).map_err(io::Error::other);
            put(&partial.path().join("contents.toml"), &[text.map_err(io_err("write", &listed))?.as_bytes()])?;
            forget_older(&rootfs, &recipe.name);
            publish(partial, &dir)?;
        }
        let text = fs::read_to_string(&listed).map_err(io_err("read", &listed))?;
        let contents: Listed = toml::from_str(&text).map_err(io::Error::other).map_err(io_err("read", &listed))?;
        Ok((Base::Cached(archive), contents.into(), "packages".to_owned()))
    }

    fn apt(&mut self) -> Result<&Apt, AptError> {
        if self.apt.is_none() {
            let apt = Apt::machine(&self.cache.join("apt"))?;
            let age = if self.sources.refresh { Duration::ZERO } else { LISTS_FRESH };
            apt.refresh(if self.sources.offline { Duration::MAX } else { age })?;
            self.apt = Some(apt);
        }
        // Just put there.
        self.apt.as_ref().ok_or(AptError::NoProgram("apt-get"))
    }
}

enum Base {
    Cached(PathBuf),
    Temporary(tempfile::TempPath),
}

impl Base {
    fn path(&self) -> &Path {
        match self {
            Base::Cached(path) => path,
            Base::Temporary(path) => path,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Listed {
    packages: Vec<String>,
    pip: Vec<String>,
    npm: Vec<String>,
}

impl From<&Contents> for Listed {
    fn from(contents: &Contents) -> Listed {
        let Contents { packages, pip, npm } = contents.clone();
        Listed { packages, pip, npm }
    }
}

impl From<Listed> for Contents {
    fn from(listed: Listed) -> Contents {
        Contents { packages: listed.packages, pip: listed.pip, npm: listed.npm }
    }
}

/// What goes over a root file system: the agent, the runner, and what the agent starts it with.
fn overlay(recipe: &Recipe, agent: &[u8], runner: &[u8]) -> io::Result<Vec<u8>> {
    // As /proc/PID/cmdline: nothing to parse, nothing to escape.
    let with_ends =
        |words: &mut dyn Iterator<Item = String>| words.flat_map(|word| (word + "\0").into_bytes()).collect();
    let argv: Vec<u8> = with_ends(&mut recipe.runner_argv().into_iter());
    let environ = recipe.runner_environ().into_iter().map(|(name, value)| format!("{name}={value}"));
    let environ: Vec<u8> = with_ends(&mut { environ });
    let mut tree = Tree::default();
    tree.file("init", 0o755, agent);
    tree.file(recipe.runtime.runner(), 0o644, runner);
    tree.file("etc/zeroboot/argv", 0o644, argv);
    tree.file("etc/zeroboot/context", 0o644, with_ends(&mut recipe.context_argv().into_iter()));
    tree.file("etc/zeroboot/environ", 0o644, environ);
    let mut bytes = Vec::new();
    tree.write_from(OVERLAY_INODES, &mut bytes)?;
    Ok(bytes)
}

/// Names everything that was asked for.
fn input_key(recipe: &Recipe, sources: &Sources, overlay: &[u8]) -> Result<String, AssembleError> {
    let mut hasher = blake3::Hasher::new();
    let recipe = toml::to_string(recipe).map_err(io::Error::other).map_err(io_err("write", Path::new("recipe")))?;
    for part in RULES.into_iter().chain([recipe.as_bytes(), overlay]) {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    if let RootfsSource::Directory(dir) = &sources.rootfs {
        hasher.update(b"rootfs").update(dir.as_os_str().as_encoded_bytes());
    }
    if let KernelSource::File(file) = &sources.kernel {
        hasher.update(b"kernel").update(&fs::read(file).map_err(io_err("read", file))?);
    }
    Ok(hasher.finalize().to_hex()[..16].to_owned())
}

fn open(dir: &Path) -> Option<Assembled> {
    let provenance = toml::from_str(&fs::read_to_string(dir.join(PROVENANCE_FILE)).ok()?).ok()?;
    let (kernel, initramfs) = (dir.join(KERNEL_FILE), dir.join(INITRAMFS_FILE));
    (kernel.exists() && initramfs.exists()).then_some(Assembled { kernel, initramfs, provenance, cached: true })
}

fn is_fresh(provenance: &Provenance) -> bool {
    now().saturating_sub(provenance.assembled_at) < FRESH.as_secs()
}

/// Takes away what the same recipe's earlier assemblies left (they are large), but for the latest few: another version
/// of the program may be using one.
fn forget_older(all: &Path, name: &str) {
    const KEPT: usize = 2;
    let Ok(entries) = fs::read_dir(all) else { return };
    let ours = |name_of: &std::ffi::OsStr| {
        name_of.to_str().and_then(|known| known.rsplit_once('-')).is_some_and(|(known, _)| known == name)
    };
    let mut older: Vec<(SystemTime, PathBuf)> = entries
        .flatten()
        .filter(|entry| ours(&entry.file_name()))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    older.sort();
    for (_, path) in older.iter().rev().skip(KEPT) {
        // It only costs space, and the next time is another chance.
        fs::remove_dir_all(path).ok();
    }
}

fn partial_dir(parent: &Path) -> Result<tempfile::TempDir, AssembleError> {
    fs::create_dir_all(parent).map_err(io_err("make", parent))?;
    tempfile::Builder::new().prefix(".partial-").tempdir_in(parent).map_err(io_err("make", parent))
}

/// Gives a complete directory its name. When another process was faster, its is as good.
fn publish(partial: tempfile::TempDir, dir: &Path) -> Result<(), AssembleError> {
    if dir.exists() {
        fs::remove_dir_all(dir).map_err(io_err("replace", dir))?;
    }
    let partial = partial.keep();
    match fs::rename(&partial, dir) {
        Ok(()) => Ok(()),
        Err(error) => {
            // The error that counts is the other one.
            fs::remove_dir_all(&partial).ok();
            if dir.exists() { Ok(()) } else { Err(io_err("make", dir)(error)) }
        }
    }
}

fn put(path: &Path, parts: &[&[u8]]) -> Result<(), AssembleError> {
    let write = || {
        let mut file = File::create(path)?;
        parts.iter().try_for_each(|part| file.write_all(part))?;
        file.sync_all()
    };
    write().map_err(io_err("write", path))
}

fn put_atomically(path: &Path, bytes: &[u8]) -> Result<(), AssembleError> {
    let write = || {
        let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error).map(|_| ())
    };
    write().map_err(io_err("write", path))
}

fn io_err(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> AssembleError {
    let error = io_error(what, path);
    move |source| error(source).into()
}

fn vanished(dir: &Path) -> AssembleError {
    io_err("find", dir)(io::ErrorKind::NotFound.into())
}

fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
