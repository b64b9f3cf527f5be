//! What the lane is made of: QEMU, a kernel and its modules, busybox. Fetched once as Debian packages with the mirror and
//! the keys of this machine, unpacked into the cache, never installed.

use std::{
    collections::BTreeMap,
    ffi::OsString,
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
const SUITE: &str = "bookworm";
const BACKPORTS: &str = "bookworm-backports";
/// Not 7.2: it does not honour the intercept of XSETBV, so that a guest's guest loses XSAVE and AVX.
const QEMU: [&str; 4] = [
    "qemu-system-x86/bookworm-backports",
    "qemu-system-common/bookworm-backports",
    "qemu-system-data/bookworm-backports",
    "seabios/bookworm-backports",
];
const INIT: &str = include_str!("init.sh");

/// Loaded in this order, after what they depend on.
const MODULES: [&str; 8] = [
    "virtio_pci",     // the bus of all the following
    "9p",             // files
    "9pnet_virtio",   //
    "virtio_console", // standard output and error, the exit status
    "virtio_rng",     // entropy
    "overlay",        // writes over a read-only root
    "kvm-amd",        // what it is all about
    "tun",            // harmless, and a test may ask for it
];

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

/// What a run needs.
pub(crate) struct Parts {
    /// QEMU's command, without options that say what to emulate.
    pub(crate) qemu: Vec<OsString>,
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: Vec<u8>,
}

impl Parts {
    /// Fetches what is missing.
    pub(crate) fn get(cache: &Path, flavour: Flavour) -> Result<Parts> {
        let qemu = cached(cache, "qemu", |dir| {
            let apt = apt(cache, &[BACKPORTS, SUITE])?;
            unpack(&apt, "QEMU", &apt.closure(&QEMU)?, dir)
        })?;
        let busybox = cached(cache, "busybox", |dir| {
            let apt = apt(cache, &[SUITE])?;
            unpack(&apt, "busybox", &[apt.candidate("busybox-static")?], dir)
        })?;
        let linux = cached(cache, &format!("linux-{}", flavour.name()), |dir| {
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
        let busybox =
            ["bin/busybox", "usr/bin/busybox"].iter().map(|path| busybox.join(path)).find(|path| path.exists());
        let busybox = fs::read(busybox.context("no busybox in its package")?)?;
        Ok(Parts { qemu: qemu_command(&qemu), kernel: linux.join("vmlinux"), initrd: initrd(&linux, &busybox)? })
    }
}

/// With its own dynamic loader and libraries: whatever this machine has or lacks.
fn qemu_command(root: &Path) -> Vec<OsString> {
    let mut libraries = OsString::new();
    for dir in ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"] {
        if !libraries.is_empty() {
            libraries.push(":");
        }
        libraries.push(root.join(dir));
    }
    let loader = ["lib64/ld-linux-x86-64.so.2", "usr/lib64/ld-linux-x86-64.so.2"].map(|path| root.join(path));
    let [first, second] = loader;
    let loader = if first.exists() { first } else { second };
    vec![
        loader.into(),
        "--library-path".into(),
        libraries,
        root.join("usr/bin/qemu-system-x86_64").into(),
        "-L".into(),
        root.join("usr/share/qemu").into(),
        "-L".into(),
        root.join("usr/share/seabios").into(),
    ]
}

/// The first root file system: busybox, the modules in the order in which they load, the init script.
fn initrd(linux: &Path, busybox: &[u8]) -> Result<Vec<u8>> {
    let mut tree = BTreeMap::new();
    let mut builtin = Vec::new();
    for release in fs::read_dir(linux.join("lib/modules"))? {
        let release = release?.path();
        modules_in(&release, &mut tree)?;
        let list = fs::read_to_string(release.join("modules.builtin")).unwrap_or_default();
        builtin.extend(list.lines().filter_map(|line| module_name(line.rsplit('/').next()?)));
    }
    let mut loaded: Vec<(String, Vec<u8>)> = Vec::new();
    for module in MODULES {
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

fn apt(cache: &Path, suites: &[&str]) -> Result<Apt> {
    let apt = explain(Apt::suites(&cache.join("apt").join(suites.join("+")), suites))?;
    explain(apt.refresh(Duration::from_secs(24 * 3600)))?;
    Ok(apt)
}

fn unpack(apt: &Apt, what: &str, packages: &[Package], into: &Path) -> Result<()> {
    eprintln!("nested lane: fetching {what} (once)");
    for file in explain(apt.fetch(packages))? {
        explain(apt::unpack_to(&file, into))?;
        // The archive is of no more use: the unpacked files are the cache.
        fs::remove_file(&file)?;
    }
    Ok(())
}

fn explain<T>(result: Result<T, AptError>) -> Result<T> {
    result.map_err(|error| match error.hint() {
        Some(hint) => anyhow::Error::from(error).context(format!("hint: {hint}")),
        None => error.into(),
    })
}

/// A directory that exists only when it is complete.
fn cached(cache: &Path, name: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
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
