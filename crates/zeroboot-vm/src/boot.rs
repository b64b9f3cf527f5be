//! Placing a Linux kernel in guest memory: the 64-bit boot protocol (Documentation/arch/x86/boot.rst).

use std::path::PathBuf;

use zeroboot_sys::{
    kvm::{Dtable, Regs},
    memory::{GuestPhys, MiB, OutOfBounds},
};

use crate::{Machine, acpi, long_mode};

/// Kernel parameters, each with its reason. None is needed for function.
const PARAMETERS: &[&str] = &[
    // Two exits for each character printed while booting.
    "quiet",
    // A panic's last words reach the console port, for the log.
    "earlyprintk=ttyS0,keep",
    // A panic restarts at once, and a restart is a triple fault: the worker sees the end without delay.
    "panic=-1",
    "reboot=t",
    // No device exists: do not probe for a PCI bus, serial ports and a keyboard controller.
    "pci=off",
    "8250.nr_uarts=0",
    "i8042.noaux",
    "i8042.nokbd",
    "i8042.nopnp",
    // The host keeps the TSC; calibrating and watching it again costs boot time and timers.
    "tsc=reliable",
    "no_timer_check",
    // The self-tests of the crypto library: boot time.
    "cryptomgr.notests",
    // One sandbox is one VM: a guest kernel that protects itself from its only user buys nothing. The
    // host's own mitigations stand between guests.
    "mitigations=off",
    // The watchdogs wake up forever and take a fork's pause for a hang.
    "nowatchdog",
    // A huge page that is touched once is 512 pages copied in the fork.
    "transparent_hugepage=never",
    // Zeroing each kernel allocation protects from other users of the same kernel; there are none, and
    // each page zeroed is a page copied.
    "init_on_alloc=0",
    "audit=0",
    // Its averages wake the guest every two seconds, and nobody reads them. With the agent's settings of `/proc/sys` an
    // idle guest was not woken once in 20 s.
    "psi=0",
];

const GDT: u64 = 0x500;
const STACK: u64 = 0x8000;
const ZERO_PAGE: u64 = 0x1_0000;
const COMMAND_LINE: u64 = 0x2_0000;
const SETUP_DATA: u64 = 0x2_1000;
const PAGE_TABLES: u64 = 0x3_0000;
/// Where conventional memory ends; above are only the tables at [`acpi::AT`].
const LOW_MEMORY_END: u64 = 0x9_f000;
const HIGH_MEMORY: u64 = 0x10_0000;
/// The kernel's x86-64 limit is 2048 bytes including the NUL.
const MAX_COMMAND_LINE: usize = 2047;
/// One slot from address 0 must end below the local APIC's page and the rest of the 32-bit device hole.
pub const MAX_MEMORY: MiB = MiB(3072);
/// Less does not hold a kernel and its initramfs.
pub const MIN_MEMORY: MiB = MiB(64);

/// Why a kernel cannot be placed.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not an ELF file that can be entered.
    #[error("the kernel is not an uncompressed x86-64 ELF file (vmlinux): {0}")]
    NotElf(&'static str),
    /// The guest's memory is too small or too large.
    #[error(
        "kernel and initramfs need more than the {0} MiB of the template, or it has more than {max} MiB",
        max = MAX_MEMORY.0
    )]
    Memory(u64),
    /// Above the kernel's limit.
    #[error("the kernel command line has {0} bytes; the limit is {MAX_COMMAND_LINE}")]
    CommandLine(usize),
    /// The state of the vCPU could not be set.
    #[error("cannot set the first state of the vCPU")]
    Kvm(#[from] zeroboot_sys::kvm::KvmError),
}

/// Writes kernel, initramfs, tables and boot parameters, and points the vCPU at the entry.
pub(crate) fn load(
    machine: &Machine,
    kernel: &[u8],
    initramfs: &[u8],
    extra_parameters: &str,
    seed: [u8; 32],
) -> Result<(), LoadError> {
    let memory = machine.memory();
    let size = memory.len();
    let too_small = |_: OutOfBounds| LoadError::Memory(size >> 20);
    if size > MAX_MEMORY.bytes() || size < MIN_MEMORY.bytes() {
        return Err(LoadError::Memory(size >> 20));
    }
    let put = |at: u64, bytes: &[u8]| memory.write(GuestPhys(at), bytes).map_err(too_small);

    let (entry, end) = elf(kernel, |at, bytes| put(at, bytes))?;

    // The initramfs at the very top, out of the way of the kernel's decompression and early allocations.
    let length = initramfs.len() as u64;
    let initramfs_at = size.checked_sub(length).map(|at| at & !0xfff).filter(|&at| at > end);
    let initramfs_at = initramfs_at.ok_or(LoadError::Memory(size >> 20))?;
    put(initramfs_at, initramfs)?;

    let mut line = PARAMETERS.join(" ");
    if !extra_parameters.is_empty() {
        line.push(' ');
        line.push_str(extra_parameters);
    }
    if line.len() > MAX_COMMAND_LINE {
        return Err(LoadError::CommandLine(line.len()));
    }
    put(COMMAND_LINE, line.as_bytes())?;
    put(COMMAND_LINE + line.len() as u64, &[0])?;

    // struct setup_data of type SETUP_RNG_SEED (9): the kernel's generator is seeded before its first use.
    // Forks get their own entropy with their identity.
    let mut setup_data = Vec::new();
    setup_data.extend_from_slice(&0u64.to_le_bytes());
    setup_data.extend_from_slice(&9u32.to_le_bytes());
    setup_data.extend_from_slice(&32u32.to_le_bytes());
    setup_data.extend_from_slice(&seed);
    put(SETUP_DATA, &setup_data)?;

    let low = |value: u64| (value as u32).to_le_bytes();
    for (offset, bytes) in [
        (0x070, &acpi::AT.to_le_bytes()[..]),   // acpi_rsdp_addr
        (0x1e8, &[2]),                          // e820_entries
        (0x1fe, &0xaa55u16.to_le_bytes()),      // boot_flag
        (0x202, b"HdrS"),                       // header
        (0x206, &0x020fu16.to_le_bytes()),      // version of the protocol
        (0x210, &[0xff]),                       // type_of_loader: undefined
        (0x211, &[1]),                          // loadflags: LOADED_HIGH
        (0x218, &low(initramfs_at)),            // ramdisk_image
        (0x21c, &low(length)),                  // ramdisk_size
        (0x228, &low(COMMAND_LINE)),            // cmd_line_ptr
        (0x230, &0x0100_0000u32.to_le_bytes()), // kernel_alignment
        (0x238, &low(line.len() as u64)),       // cmdline_size
        (0x250, &SETUP_DATA.to_le_bytes()),     // setup_data
        (0x2d0, &e820(0, LOW_MEMORY_END)),
        (0x2d0 + 20, &e820(HIGH_MEMORY, size - HIGH_MEMORY)),
    ] {
        put(ZERO_PAGE + offset, bytes)?;
    }

    for (at, table) in acpi::tables() {
        put(at, &table)?;
    }
    enter(machine, entry, &put)
}

/// One RAM entry of the memory map.
fn e820(at: u64, size: u64) -> [u8; 20] {
    let mut entry = [0; 20];
    entry[..8].copy_from_slice(&at.to_le_bytes());
    entry[8..16].copy_from_slice(&size.to_le_bytes());
    entry[16] = 1;
    entry
}

/// Copies the loadable segments to their physical addresses; the entry and the end of the last segment.
fn elf(file: &[u8], mut put: impl FnMut(u64, &[u8]) -> Result<(), LoadError>) -> Result<(u64, u64), LoadError> {
    use LoadError::NotElf;
    let short = NotElf("it ends early");
    let word = |at: u64, len: usize| -> Result<u64, LoadError> {
        let start = usize::try_from(at).map_err(|_| NotElf("it ends early"))?;
        let bytes = file.get(start..start.saturating_add(len)).ok_or(NotElf("it ends early"))?;
        Ok(bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    };
    if file.get(..4) != Some(b"\x7fELF") {
        return Err(NotElf("wrong magic number"));
    }
    if file.get(4..6) != Some(&[2, 1]) || word(18, 2)? != 62 {
        return Err(NotElf("not 64-bit little-endian x86-64"));
    }
    let (entry, headers, count) = (word(24, 8)?, word(32, 8)?, word(56, 2)?);
    if word(54, 2)? != 56 {
        return Err(NotElf("program headers of an unknown size"));
    }
    let mut end = 0;
    for i in 0..count {
        let at = headers.checked_add(i * 56).ok_or(NotElf("it ends early"))?;
        const PT_LOAD: u64 = 1;
        if word(at, 4)? != PT_LOAD {
            continue;
        }
        let (offset, phys, in_file, in_memory) =
            (word(at + 8, 8)?, word(at + 24, 8)?, word(at + 32, 8)?, word(at + 40, 8)?);
        if phys < HIGH_MEMORY {
            return Err(NotElf("a segment below 1 MiB"));
        }
        let start = usize::try_from(offset).map_err(|_| NotElf("it ends early"))?;
        let len = usize::try_from(in_file).map_err(|_| NotElf("it ends early"))?;
        let bytes = file.get(start..start.saturating_add(len)).ok_or(NotElf("it ends early"))?;
        put(phys, bytes)?;
        end = end.max(phys.saturating_add(in_memory));
    }
    if end == 0 { Err(short) } else { Ok((entry, end)) }
}

/// 64-bit mode with an identity map of the first GiB, as the boot protocol asks.
fn enter(machine: &Machine, entry: u64, put: &impl Fn(u64, &[u8]) -> Result<(), LoadError>) -> Result<(), LoadError> {
    put(PAGE_TABLES, &long_mode::identity_map(PAGE_TABLES, long_mode::KERNEL))?;

    // __BOOT_CS at 0x10, __BOOT_DS at 0x18, a TSS at 0x20.
    for (at, descriptor) in
        [(0x10, 0x00af_9b00_0000_ffffu64), (0x18, 0x00cf_9300_0000_ffff), (0x20, 0x0000_8b00_0000_0067)]
    {
        put(GDT + at, &descriptor.to_le_bytes())?;
    }
    let mut sregs = machine.vcpu.sregs()?;
    long_mode::enter(&mut sregs, PAGE_TABLES, 0x10, 0x18, 0x20);
    sregs.base.gdt = Dtable { base: GDT, limit: 0x2f, ..Default::default() };
    sregs.base.idt = Dtable::default();
    machine.vcpu.set_sregs(&sregs)?;
    machine.vcpu.set_regs(&Regs { rip: entry, rsi: ZERO_PAGE, rsp: STACK, rflags: 2, ..Default::default() })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_kernel_is_refused_with_words() {
        for file in [&b""[..], b"\x7fELF", b"\x1f\x8b\x08", &[0; 4096]] {
            assert!(matches!(elf(file, |_, _| Ok(())), Err(LoadError::NotElf(_))));
        }
    }

    proptest::proptest! {
        #[test]
        fn no_file_makes_the_elf_reader_panic(mut bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400)) {
            let magic = b"\x7fELF\x02\x01";
            let n = magic.len().min(bytes.len());
            bytes[..n].copy_from_slice(&magic[..n]);
            if bytes.len() > 56 {
                bytes[18..20].copy_from_slice(&[62, 0]);
                bytes[54..56].copy_from_slice(&[56, 0]);
            }
            let _ = elf(&bytes, |_, _| Ok(()));
        }
    }
}
