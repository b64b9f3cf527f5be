//! The machine with an Intel CPU: Bochs emulates VMX with EPT, unrestricted guests, APICv and PML, and a PMU.
//!
//! L1's root is a small system in memory, unpacked from an archive that is the machine's disk: busybox, `zeroboot`, the
//! test programs, their libraries. There is no way to share files with it, and no network in it.
//!
//! Each quirk of Bochs is dealt with here, in [`bochs`] or in `intel.sh`, once and with its reason.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use super::{
    Run, cache_dir,
    emulator::Emulator,
    environment, job,
    parts::{Linux, SUITE, apt, cached, explain, unpack},
};

mod bochs;
mod form;
mod iso;
mod root;

pub(super) use form::form;

/// What the BIOS starts: Bochs' BIOS itself, one for the screen that ISOLINUX writes to, ISOLINUX.
const FIRMWARE: [&str; 4] = ["bochsbios", "vgabios", "isolinux", "syslinux-common"];
/// Loaded in this order, after what they depend on.
const MODULES: [&str; 4] = [
    "ata_piix",  // the disk's bus
    "sd_mod",    // the disk
    "kvm-intel", // what it is all about
    "tun",       // harmless, and a test may ask for it
];
const MACHINE: &str = include_str!("intel.sh");
const MSRS: &str = include_str!("intel/msrs.txt");

/// Which CPU is emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Model {
    /// AVX-512, XSAVES, protection keys, APICv, PML.
    SkylakeX,
    /// AVX2; APICv and PML as well.
    Broadwell,
}

impl Model {
    fn name(self) -> &'static str {
        match self {
            Model::SkylakeX => "corei7_skylake_x",
            Model::Broadwell => "broadwell_ult",
        }
    }
}

/// Each with its reason.
const KERNEL_PARAMETERS: &str = concat!(
    "console=ttyS0,115200 8250.nr_uarts=4 quiet loglevel=4 ", // what goes wrong is seen, and little else
    "panic=-1 oops=panic reboot=t ",                          // by a triple fault, where Bochs ends: at once
    "mitigations=off nokaslr ",                               // nothing to guard; speed
    "tsc=reliable no_timer_check ",                           // emulated clocks fail the kernel's checks
    "tsc_early_khz=1000000 ", // one tick an instruction, as `ips` says; CPUID says what the real CPU's clock would be
    "nmi_watchdog=0 ",        // it counts with a PMU that does not count
    "random.trust_cpu=on ",   // no wait for entropy
    "cgroup_no_v1=all",       // every controller in the v2 hierarchy
);

/// What a run needs.
pub(super) struct Parts {
    bochs: PathBuf,
    firmware: PathBuf,
    kernel: Vec<u8>,
    initrd: Vec<u8>,
}

/// Fetches and builds what is missing.
pub(super) fn fetch(run: &Run) -> Result<Parts> {
    let cache = cache_dir()?;
    let firmware = cached(&cache, "bochs-firmware", |dir| {
        let apt = apt(&cache, &[SUITE])?;
        let packages: Result<Vec<_>> = FIRMWARE.iter().map(|name| explain(apt.candidate(name))).collect();
        unpack(&apt, "Bochs' firmware", &packages?, dir)
    })?;
    let linux = Linux::get(&cache, run.flavour)?;
    Ok(Parts {
        bochs: bochs::build(&cache)?,
        firmware,
        kernel: linux.bzimage()?,
        initrd: linux.initrd(&cache, &MODULES, MACHINE)?,
    })
}

/// Runs a command there and gives its exit status.
pub(super) fn run(run: &Run, model: Model) -> Result<u8> {
    let parts = fetch(run)?;
    let disk = root::disk(run)?;
    boot(run, model, &parts, &disk)
}

fn boot(run: &Run, model: Model, parts: &Parts, disk: &[u8]) -> Result<u8> {
    let defaults = [
        ("PATH", "/usr/bin:/bin"), // before busybox, which has some of the same names
        ("LANG", "C.UTF-8"),
        ("HOME", "/root"),
        ("XDG_CACHE_HOME", root::CACHE),
    ];
    let defaults = defaults.map(|(name, value)| (name.into(), value.into())).to_vec();
    // A store in memory; ours is out of reach.
    let variables = environment(run, defaults, &[], &[("ZEROBOOT_HOME", "/dev/shm/zeroboot")]);
    let job = job(run, b"", Path::new("/root"), &variables)?;

    let firmware = |path: &str| {
        let path = parts.firmware.join(path);
        fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let boot = format!("DEFAULT linux\nLABEL linux\nKERNEL LINUX\nINITRD INITRD\nAPPEND {KERNEL_PARAMETERS}\n");
    let cd = iso::image(&[
        ("ISOLINUX.BIN", &firmware("usr/lib/ISOLINUX/isolinux.bin")?),
        ("LDLINUX.C32", &firmware("usr/lib/syslinux/modules/bios/ldlinux.c32")?),
        ("ISOLINUX.CFG", boot.as_bytes()),
        ("LINUX", &parts.kernel),
        ("INITRD", &[&parts.initrd[..], &job].concat()),
    ]);

    let mut emulator = Emulator::new([parts.bochs.clone().into_os_string()])?;
    let cd = emulator.file("cd", &[&cd])?;
    let disk = emulator.file("disk", &[disk])?;
    let msrs = emulator.file("msrs", &[bochs_msrs(MSRS)?.as_bytes()])?;
    let log = emulator.log()?;
    let ports = [emulator.console(), emulator.out(), emulator.err(), emulator.status()];
    let configuration = configuration(model, parts, &cd, &disk, &msrs, &log, &ports);
    let configuration = emulator.file("configuration", &[configuration.as_bytes()])?;
    emulator.command().args(["-q", "-f", &configuration]);
    emulator.run(run.timeout, run.show_console)
}

fn configuration(
    model: Model,
    parts: &Parts,
    cd: &str,
    disk: &str,
    msrs: &str,
    log: &str,
    ports: &[String; 4],
) -> String {
    let (model, firmware) = (model.name(), parts.firmware.display());
    let mut text = format!(
        "config_interface: textconfig
display_library: nogui
# It can have no more.
memory: guest=2048, host=2048
romimage: file={firmware}/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file={firmware}/usr/share/vgabios/vgabios.stdvga.bin
# The more instructions a second of the machine's has, the less often its timer ticks. A restart (a kernel that panics) is
# a triple fault, which ends Bochs. An MSR that no CPU of this kind has faults, as it would.
cpu: model={model}, count=1, ips=1000000000, reset_on_triple_fault=0, ignore_bad_msrs=0, msrs={msrs}
# Time passes by instructions, and begins at a fixed one: the machine is the same in each run.
clock: sync=none, time0=1764000000
boot: cdrom
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=disk, path={disk}, mode=flat
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
ata1-master: type=cdrom, path={cd}, status=inserted
pci: enabled=1, chipset=i440fx
log: {log}
panic: action=fatal
error: action=report
# With its words about instructions per second the signal handler waits for a lock that its own thread may hold.
info: action=ignore
debug: action=ignore
speaker: enabled=0
"
    );
    for (i, port) in ports.iter().enumerate() {
        writeln!(text, "com{}: enabled=1, mode=file, dev={port}", i + 1).expect("a string takes everything");
    }
    text
}

/// Our list of MSRs as Bochs reads one: address, type, value at reset, bits that fault, bits that are not kept; 32 bits each.
fn bochs_msrs(list: &str) -> Result<String> {
    let mut text = String::new();
    for line in list.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let entry = || -> Option<(u32, u32, u64, u64)> {
            let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x").unwrap_or(word), 16).ok();
            let mut words = line.split_whitespace();
            let (addresses, value) = (words.next()?, hex(words.next()?)?);
            let (first, last) = addresses.split_once('-').unwrap_or((addresses, addresses));
            // Written, and as it was.
            let ignored = if words.next()? == "ro" { u64::MAX } else { 0 };
            Some((hex(first)?.try_into().ok()?, hex(last)?.try_into().ok()?, value, ignored))
        };
        let Some((first, last, value, ignored)) = entry() else { bail!("not an MSR and its reason: {line}") };
        for address in first..=last {
            let (high, low, ignored) = (value >> 32, value & 0xffff_ffff, ignored as u32);
            writeln!(text, "{address:#05x} 0 {high:08x} {low:08x} 00000000 00000000 {ignored:08x} {ignored:08x}")?;
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_msrs_is_one_that_bochs_reads() {
        let text = bochs_msrs(MSRS).unwrap();
        let mut addresses: Vec<&str> = text.lines().map(|line| line.split(' ').next().unwrap()).collect();
        assert!(text.contains("0x345 0 00000000 000032c4 00000000 00000000 00000000 00000000\n"));
        assert!(text.contains("0x08b 0 7f000000 00000000 00000000 00000000 ffffffff ffffffff\n"));
        let all = addresses.len();
        addresses.sort_unstable();
        addresses.dedup();
        assert_eq!(addresses.len(), all, "Bochs takes each MSR once");
        assert!(bochs_msrs("0x345 0x1").is_err(), "a line without a reason");
    }
}
