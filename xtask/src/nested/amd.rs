//! The machine with an AMD CPU: QEMU's TCG emulates SVM and nested paging.
//!
//! L1's root is this machine's own, read-only over 9p, under an overlay in memory: every tool and library here works
//! there at the same path, and what is written is thrown away. The shares (the repository, our cache directory) are
//! read-write at the same paths. There is no network in L1.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::{
    Run, cache_dir,
    emulator::Emulator,
    environment, job,
    parts::{BACKPORTS, Linux, SUITE, apt, cached, explain, unpack},
    quoted, repository,
};

/// Not 7.2: it does not honour the intercept of XSETBV, so that a guest's guest loses XSAVE and AVX.
const QEMU: [&str; 4] = [
    "qemu-system-x86/bookworm-backports",
    "qemu-system-common/bookworm-backports",
    "qemu-system-data/bookworm-backports",
    "seabios/bookworm-backports",
];
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

const MACHINE: &str = include_str!("amd.sh");

/// What a run needs.
pub(super) struct Parts {
    /// QEMU's command, without options that say what to emulate.
    qemu: Vec<OsString>,
    kernel: PathBuf,
    initrd: Vec<u8>,
}

/// Fetches what is missing.
pub(super) fn fetch(run: &Run) -> Result<Parts> {
    let cache = cache_dir()?;
    let qemu = cached(&cache, "qemu", |dir| {
        let apt = apt(&cache, &[BACKPORTS, SUITE])?;
        unpack(&apt, "QEMU", &explain(apt.closure(&QEMU))?, dir)
    })?;
    let linux = Linux::get(&cache, run.flavour)?;
    let initrd = linux.initrd(&cache, &MODULES, MACHINE)?;
    Ok(Parts { qemu: qemu_command(&qemu), kernel: linux.vmlinux(), initrd })
}

/// Runs a command there and gives its exit status.
pub(super) fn run(run: &Run) -> Result<u8> {
    let cache = cache_dir()?;
    let parts = fetch(run)?;
    let home = cache.join("home");
    fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
    let shares = shares(run, &cache)?;
    let cwd = std::env::current_dir().context("no working directory")?;
    let job = job(run, &mounts(&shares), &cwd, &variables(run, &home))?;

    let mut emulator = Emulator::new(parts.qemu)?;
    let initrd = emulator.file("initrd", &[&parts.initrd, &job])?;
    let ports = [("out", emulator.out()), ("err", emulator.err()), ("status", emulator.status())];
    let console = emulator.console();
    let qemu = emulator.command();
    // kvm_amd needs a CPU with SVM; `max` has it, and AVX2. q35, because microvm has no nested paging that works.
    qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-M", "q35", "-smp", &run.cpus, "-m", &run.memory]);
    qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    qemu.arg("-serial").arg(format!("file:{console}"));
    qemu.arg("-kernel").arg(&parts.kernel).args(["-initrd", &initrd, "-append", KERNEL_PARAMETERS]);
    qemu.args(["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]);
    qemu.args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]);
    for (i, share) in shares.iter().enumerate() {
        // A comma in a QEMU option is written twice.
        let path = share.to_str().context("a shared directory's name is not UTF-8")?.replace(',', ",,");
        qemu.arg("-fsdev").arg(format!("local,id=share{i},path={path},security_model=none,multidevs=remap"));
        qemu.arg("-device").arg(format!("virtio-9p-pci,fsdev=share{i},mount_tag=share{i}"));
    }
    qemu.args(["-device", "virtio-serial-pci"]);
    for (name, pipe) in ports {
        qemu.arg("-chardev").arg(format!("file,id={name},path={pipe}"));
        qemu.arg("-device").arg(format!("virtserialport,chardev={name},name={name}"));
    }
    qemu.args(["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"]);
    emulator.run(run.timeout, run.show_console)
}

/// Each with its reason.
const KERNEL_PARAMETERS: &str = concat!(
    "console=ttyS0 8250.nr_uarts=1 quiet loglevel=4 ", // what goes wrong is seen, and little else
    "panic=-1 oops=panic ",                            // with -no-reboot: the run ends at once
    "mitigations=off nokaslr ",                        // nothing to guard; speed
    "tsc=reliable no_timer_check ",                    // emulated clocks fail the kernel's checks under load
    "random.trust_cpu=on ",                            // no wait for entropy
    "cgroup_no_v1=all",                                // every controller in the v2 hierarchy
);

/// The directories that L1 can write to, outermost first.
fn shares(run: &Run, cache: &Path) -> Result<Vec<PathBuf>> {
    let mut all = vec![repository()?];
    all.push(cache.parent().context("the cache directory has no parent")?.to_owned());
    if let Some(target) = std::env::var_os("CARGO_TARGET_DIR") {
        all.push(fs::canonicalize(target).context("CARGO_TARGET_DIR")?);
    }
    all.extend(run.shares.iter().cloned());
    all.sort();
    let mut shares: Vec<PathBuf> = Vec::new();
    for share in all {
        if !shares.iter().any(|outer| share.starts_with(outer)) {
            shares.push(share);
        }
    }
    Ok(shares)
}

/// The directories, as the init script mounts them.
fn mounts(shares: &[PathBuf]) -> Vec<u8> {
    let mut conf = b"mount_shares() {\n".to_vec();
    for (i, share) in shares.iter().enumerate() {
        conf.extend(format!("mount_share share{i} ").into_bytes());
        conf.extend(quoted(share.as_os_str()));
        conf.push(b'\n');
    }
    conf.extend(b"}\n");
    conf
}

fn variables(run: &Run, home: &Path) -> Vec<(OsString, OsString)> {
    let mut defaults: Vec<(OsString, OsString)> = vec![
        ("PATH".into(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into()),
        ("LANG".into(), "C.UTF-8".into()),
        ("ZEROBOOT_HOME".into(), home.into()),
    ];
    if let Some(cache) = home.ancestors().nth(3) {
        defaults.push(("XDG_CACHE_HOME".into(), cache.into()));
    }
    // The first two say where programs and libraries of this machine are, and it is this machine's files that L1 sees.
    // QEMU's emulation refuses port access from ring 3 when the saved TR is of type 11.
    environment(run, defaults, &["HOME", "PATH"], &[("ZEROBOOT_TCG_TR9", "1")])
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
