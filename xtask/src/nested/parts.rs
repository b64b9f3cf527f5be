//! What a lane is made of: an emulator, a kernel and its modules, busybox. Fetched once as Debian packages with the mirror
//! and the keys of this machine, unpacked into the cache, never installed.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use zeroboot_template::{
    apt::{self, Apt, AptError, Package},
    cpio::{self, Entry},
    kernel,
};

/// The release that everything comes from, whatever this machine runs: the lane is the same everywhere.
pub(crate) const SUITE: &str = "bookworm";
pub(crate) const BACKPORTS: &str = "bookworm-backports";
const INIT: &str = include_str!("init.sh");

/// Which kernel L1 runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// Debian 12's.
    Linux6_1,
    /// Its backports'; has KVM_PRE_FAULT_MEMORY.
    Linux6_12,
}

impl Flavour {
    pub(crate) fn parse(text: &str) -> Result<Flavour> {
        match text {
            "6.1" => Ok(Flavour::Linux6_1),
            "6.12" => Ok(Flavour::Linux6_12),
            _ => bail!("no kernel {text} here: 6.1 or 6.12"),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Flavour::Linux6_1 => "6.1",
            Flavour::Linux6_12 => "6.12",
        }
    }

    fn suite(self) -> &'static str {
        match self {
            Flavour::Linux6_1 => SUITE,
            Flavour::Linux6_12 => BACKPORTS,
        }
    }
}

/// Debian's stock kernel, unpacked.
pub(crate) struct Linux(PathBuf);

impl Linux {
    /// Fetches it when it is not there.
    pub(crate) fn get(cache: &Path, flavour: Flavour) -> Result<Linux> {
        let dir = cached(cache, &format!("linux-{}", flavour.name()), |dir| {
            let apt = apt(cache, &[flavour.suite()])?;
            let name = apt.stands_for("linux-image-amd64")?;
            unpack(&apt, &name, &[apt.candidate(&name)?], dir)?;
            let image = fs::read(dir.join("boot").join(name.replacen("linux-image", "vmlinuz", 1)))?;
            fs::write(dir.join("vmlinux"), kernel::vmlinux(&image)?)?;
            // Most of the modules' 400 MB.
            for part in ["drivers/gpu", "drivers/media", "drivers/net/ethernet", "drivers/net/wireless", "sound"] {
                let tree = dir.join("lib/modules").join(name.replacen("linux-image-", "", 1)).join("kernel").join(part);
                fs::remove_dir_all(&tree).with_context(|| format!("no {}", tree.display()))?;
            }
            Ok(())
        })?;
        Ok(Linux(dir))
    }

    /// The kernel as an ELF file.
    pub(crate) fn vmlinux(&self) -> PathBuf {
        self.0.join("vmlinux")
    }

    /// The kernel as a boot loader takes it.
    pub(crate) fn bzimage(&self) -> Result<Vec<u8>> {
        let boot = self.0.join("boot");
        for file in fs::read_dir(&boot)? {
            let file = file?;
            if file.file_name().to_string_lossy().starts_with("vmlinuz-") {
                return fs::read(file.path()).context("cannot read the kernel");
            }
        }
        bail!("no kernel in {}", boot.display())
    }

    /// The first root file system: busybox, the modules in the order in which they load, the init script, and what it
    /// asks of this kind of machine.
    pub(crate) fn initrd(&self, cache: &Path, modules: &[&str], machine: &str) -> Result<Vec<u8>> {
        let busybox = cached(cache, "busybox", |dir| {
            let apt = apt(cache, &[SUITE])?;
            unpack(&apt, "busybox", &[apt.candidate("busybox-static")?], dir)
        })?;
        let busybox =
            ["bin/busybox", "usr/bin/busybox"].iter().map(|path| busybox.join(path)).find(|path| path.exists());
        let busybox = fs::read(busybox.context("no busybox in its package")?)?;
        initrd(&self.0, &busybox, modules, machine)
    }
}

fn initrd(linux: &Path, busybox: &[u8], modules: &[&str], machine: &str) -> Result<Vec<u8>> {
    let mut tree = BTreeMap::new();
    let mut builtin = Vec::new();
    for release in fs::read_dir(linux.join("lib/modules"))? {
        let release = release?.path();
        modules_in(&release, &mut tree)?;
        let list = fs::read_to_string(release.join("modules.builtin")).unwrap_or_default();
        builtin.extend(list.lines().filter_map(|line| module_name(line.rsplit('/').next()?)));
    }
    let mut loaded: Vec<(String, Vec<u8>)> = Vec::new();
    for module in modules {
        load(module, &tree, &builtin, &mut loaded)?;
    }
    let order: String = loaded.iter().map(|(name, _)| format!("{name}\n")).collect();

    let mut archive = cpio::Writer::new(Vec::new());
    for dir in ["bin", "dev", "modules", "proc", "sys"] {
        archive.append(&Entry::directory(dir, 0o755))?;
    }
    archive.append(&Entry::char_device("dev/console", 0o600, 5, 1))?;
    archive.append(&Entry::file("bin/busybox", 0o755, busybox))?;
    archive.append(&Entry::file("init", 0o755, INIT.as_bytes()))?;
    archive.append(&Entry::file("machine.sh", 0o644, machine.as_bytes()))?;
    archive.append(&Entry::file("modules/order", 0o644, order.as_bytes()))?;
    for (name, bytes) in &loaded {
        archive.append(&Entry::file(&format!("modules/{name}.ko"), 0o644, bytes))?;
    }
    Ok(archive.finish()?)
}

fn load(
    name: &str,
    tree: &BTreeMap<String, PathBuf>,
    builtin: &[String],
    loaded: &mut Vec<(String, Vec<u8>)>,
) -> Result<()> {
    let name = name.replace('-', "_");
    if builtin.contains(&name) || loaded.iter().any(|(known, _)| *known == name) {
        return Ok(());
    }
    let path = tree.get(&name).with_context(|| format!("the kernel has no module {name}"))?;
    let mut bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    if path.extension().is_some_and(|extension| extension == "xz") {
        bytes = kernel::unxz(&bytes).with_context(|| format!("cannot unpack {}", path.display()))?;
    }
    let mark = b"\0depends=";
    let depends = bytes.windows(mark.len()).position(|window| window == mark).map(|at| &bytes[at + mark.len()..]);
    let depends = depends.and_then(|rest| rest.split(|byte| *byte == 0).next()).unwrap_or_default();
    for needed in String::from_utf8_lossy(depends).split(',').filter(|needed| !needed.is_empty()) {
        load(needed, tree, builtin, loaded)?;
    }
    loaded.push((name, bytes));
    Ok(())
}

fn modules_in(dir: &Path, tree: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            modules_in(&entry.path(), tree)?;
        } else if let Some(name) = entry.file_name().to_str().and_then(module_name) {
            tree.insert(name, entry.path());
        }
    }
    Ok(())
}

fn module_name(file: &str) -> Option<String> {
    let name = file.strip_suffix(".xz").unwrap_or(file).strip_suffix(".ko")?;
    Some(name.replace('-', "_"))
}

pub(crate) fn apt(cache: &Path, suites: &[&str]) -> Result<Apt> {
    refreshed(Apt::suites(&cache.join("apt").join(suites.join("+")), suites))
}

/// The source packages of a suite.
pub(crate) fn source_apt(cache: &Path, suite: &str) -> Result<Apt> {
    refreshed(Apt::source_suite(&cache.join("apt").join(format!("{suite}-source")), suite))
}

fn refreshed(apt: Result<Apt, AptError>) -> Result<Apt> {
    let apt = explain(apt)?;
    explain(apt.refresh(Duration::from_secs(24 * 3600)))?;
    Ok(apt)
}

pub(crate) fn unpack(apt: &Apt, what: &str, packages: &[Package], into: &Path) -> Result<()> {
    eprintln!("nested lane: fetching {what} (once)");
    for file in explain(apt.fetch(packages))? {
        explain(apt::unpack_into(&file, into))?;
        // The archive is of no more use: the unpacked files are the cache.
        fs::remove_file(&file)?;
    }
    Ok(())
}

pub(crate) fn explain<T>(result: Result<T, AptError>) -> Result<T> {
    result.map_err(|error| match error.hint() {
        Some(hint) => anyhow::Error::from(error).context(format!("hint: {hint}")),
        None => error.into(),
    })
}

/// A directory that exists only when it is complete.
pub(crate) fn cached(cache: &Path, name: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let dir = cache.join(name);
    if dir.exists() {
        return Ok(dir);
    }
    let lock = fs::File::create(cache.join(format!("{name}.lock")))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
    let partial = cache.join(format!("{name}.partial"));
    if !dir.exists() {
        // Of a run that was ended.
        if partial.exists() {
            fs::remove_dir_all(&partial)?;
        }
        fs::create_dir_all(&partial)?;
        fill(&partial).with_context(|| format!("cannot fetch {name}"))?;
        fs::rename(&partial, &dir)?;
    }
    Ok(dir)
}
