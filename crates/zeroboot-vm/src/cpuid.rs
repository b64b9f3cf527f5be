//! What a guest sees of the CPU: what KVM supports, by a list of leaves and a list of changes.
//!
//! Everything here is data with a reason a line. docs/adr/0015 compares it with what Firecracker and Cloud Hypervisor do.

mod features;

use std::fmt;

use features::Reg;
use zeroboot_sys::kvm::{CpuidEntry, Kvm, KvmError};

/// What becomes of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaf {
    /// The guest has it, with the changes below. A template is bound to it.
    Bound,
    /// The guest has it. It describes and promises nothing, and differs between the cores of one hybrid CPU: a
    /// template is not bound to it.
    Described,
}

/// The leaves that a guest has. Every other is empty: what a new leaf of a new KVM means is looked at first.
const LEAVES: &[(u32, Leaf, &str)] = &[
    (0, Leaf::Bound, "vendor and largest leaf"),
    (1, Leaf::Bound, "family, model and features"),
    (2, Leaf::Described, "caches of Intel CPUs, the old way"),
    (4, Leaf::Described, "caches of Intel CPUs: C libraries choose how to copy memory by their sizes"),
    (6, Leaf::Bound, "power: that the timer never stops"),
    (7, Leaf::Bound, "features"),
    (0xb, Leaf::Bound, "topology: one CPU"),
    (0xd, Leaf::Bound, "XSAVE: what there is to save, and where"),
    (0x1d, Leaf::Bound, "AMX: palettes, where there is AMX"),
    (0x1e, Leaf::Bound, "AMX: tile multiplication, where there is AMX"),
    (0x24, Leaf::Bound, "AVX10: version and vector length"),
    (0x4000_0000, Leaf::Bound, "that the hypervisor is KVM"),
    (0x4000_0001, Leaf::Bound, "features of KVM"),
    (0x8000_0000, Leaf::Bound, "largest extended leaf"),
    (0x8000_0001, Leaf::Bound, "features"),
    (0x8000_0002, Leaf::Described, "the CPU's name"),
    (0x8000_0003, Leaf::Described, "the CPU's name"),
    (0x8000_0004, Leaf::Described, "the CPU's name"),
    (0x8000_0005, Leaf::Described, "caches of AMD CPUs"),
    (0x8000_0006, Leaf::Described, "caches: level 2 of Intel's and AMD's"),
    (0x8000_0007, Leaf::Bound, "whether the TSC has one rate"),
    (0x8000_0008, Leaf::Bound, "sizes of addresses; features"),
    (0x8000_0019, Leaf::Described, "TLBs of AMD CPUs"),
    (0x8000_001a, Leaf::Described, "which instructions are fast on AMD CPUs"),
    (0x8000_001d, Leaf::Described, "caches of AMD CPUs"),
    (0x8000_0021, Leaf::Bound, "features"),
    (0xc000_0000, Leaf::Bound, "largest leaf of VIA and Zhaoxin"),
    (0xc000_0001, Leaf::Bound, "PadLock instructions of VIA and Zhaoxin"),
];

/// Features that the shape of the machine has, whatever KVM says of them.
const SHOWN: &[(&str, &str)] = &[
    ("x2apic", "LAPIC registers are MSRs, saved as such, and their access needs no instruction emulator; KVM has it"),
    ("tsc_deadline_timer", "the one timer of the shape; KVM has it with a LAPIC, and reports it only in some versions"),
    ("hypervisor", "the guest looks for KVM's leaves"),
];

/// Features that no guest has. But for enclaves and the wait instructions all of them are a kernel's.
const HIDDEN: &[(&str, &str)] = &[
    (
        "vmx",
        "no virtual machines in a guest: the code that emulates VT-x for it is the part of KVM with the most holes",
    ),
    ("svm", "as vmx"),
    ("pdcm", "no performance counters: KVM would program the host's, and they tell of what the host does besides"),
    ("perfctr_core", "as pdcm, AMD's"),
    ("perfctr_nb", "as pdcm, AMD's"),
    ("perfctr_llc", "as pdcm, AMD's"),
    ("ds", "the buffer of the performance counters, which KVM offers with a virtual PMU"),
    ("dtes64", "as ds"),
    ("arch_lbr", "records of branches: as pdcm"),
    ("intel_pt", "a trace of all branches: KVM would run the host's tracer for it"),
    ("sgx", "there is no enclave memory in a guest, and an enclave could not be forked"),
    ("sgx_lc", "as sgx"),
    ("waitpkg", "UMWAIT and TPAUSE idle a physical CPU from ring 3, without an exit"),
    ("ht", "one logical CPU"),
    ("cmp_legacy", "one core"),
];

/// Only together with both parts of the AMX state. KVM of Linux 5.17 to 6.3 shows the tiles' configuration on its own to a
/// process without the permission (ARCH_REQ_XCOMP_GUEST_PERM) for their data; a guest's XSETBV of one bit faults.
const AMX: &[&str] = &["amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "amx_complex", "xfd"];
/// Bits of XCR0 of the AMX state, which are also the numbers of their entries of leaf 0xd.
const XCR0_AMX: u32 = 3 << 17;

/// A part of a register that is set to a value: what `keep` does not hold is taken from `put`.
struct Field {
    leaf: u32,
    /// `None`: in each entry of the leaf.
    index: Option<u32>,
    reg: Reg,
    keep: u32,
    put: u32,
    #[cfg_attr(not(test), expect(dead_code, reason = "for people, and for the test that each rule has one"))]
    why: &'static str,
}

const fn field(leaf: u32, index: Option<u32>, reg: Reg, keep: u32, put: u32, why: &'static str) -> Field {
    Field { leaf, index, reg, keep, put, why }
}

const FIELDS: &[Field] = &[
    field(1, None, Reg::Ebx, 0xffff, 1 << 16, "APIC id 0 and one logical CPU; otherwise of the CPU that was asked"),
    field(4, None, Reg::Eax, 0x3fff, 0, "no CPU shares a cache with the guest's one"),
    field(6, None, Reg::Eax, 0, 1 << 2, "ARAT: the LAPIC timer never stops; no other power management"),
    field(6, None, Reg::Ebx, 0, 0, "no thermal interrupts"),
    field(6, None, Reg::Ecx, 0, 0, "no measured frequency, no energy bias"),
    field(6, None, Reg::Edx, 0, 0, "no hardware feedback, whose row is another on each core"),
    field(0xd, Some(0), Reg::Ebx, 0, 0, "size for the XCR0 of who asks; KVM computes it for the guest"),
    field(0xd, Some(1), Reg::Ebx, 0, 0, "as above, with XSS"),
    field(
        0x4000_0001,
        None,
        Reg::Eax,
        1 | 1 << 1 | 1 << 3 | 1 << 24,
        0,
        "KVM's clock, stable, and no delay on port 0x80. Asynchronous page faults, steal time, EOI and the like are each one more \
         place in guest memory that KVM writes",
    ),
    field(0x4000_0001, None, Reg::Edx, 0, 0, "hints for a host without overcommitment"),
    field(0x8000_0007, None, Reg::Eax, 0, 0, "no power management"),
    field(0x8000_0007, None, Reg::Ebx, 0, 0, "no recovery from machine checks"),
    field(0x8000_0007, None, Reg::Ecx, 0, 0, "no power management"),
    field(0x8000_0007, None, Reg::Edx, 1 << 8, 0, "invariant TSC; no power management"),
    field(0x8000_0008, None, Reg::Ecx, 0, 0, "one core"),
    field(0x8000_0008, None, Reg::Edx, 0, 0, "no RDPRU"),
    field(0x8000_001d, None, Reg::Eax, 0x3fff, 0, "no CPU shares a cache with the guest's one"),
];

/// The entries of leaf 0xb: one thread in one core in one package, x2APIC id 0. KVM of Linux 6.2 and later gives none of
/// them, earlier ones those of the core that was asked. Leaf 0x1f would say the same and is left out.
const TOPOLOGY: &[(u32, [u32; 4])] = &[(0, [0, 1, 0x100, 0]), (1, [0, 1, 0x201, 0])];

/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`: the entry is one of several of its leaf.
const SIGNIFICANT_INDEX: u32 = 1;

/// The guest's CPUID on this host. Asked once per template: on a virtual host each CPUID instruction
/// traps to the next host, and the list needs hundreds.
pub(crate) fn for_guest(kvm: &Kvm) -> Result<Vec<CpuidEntry>, KvmError> {
    let mut entries = kvm.supported_cpuid()?;
    apply(&mut entries);
    Ok(entries)
}

fn apply(entries: &mut Vec<CpuidEntry>) {
    entries.retain(|entry| LEAVES.iter().any(|(leaf, ..)| *leaf == entry.function));
    for (name, _) in HIDDEN {
        set(entries, name, false);
    }
    for (name, _) in SHOWN {
        set(entries, name, true);
    }
    for field in FIELDS {
        let wanted = |e: &&mut CpuidEntry| e.function == field.leaf && field.index.is_none_or(|index| index == e.index);
        for entry in entries.iter_mut().filter(wanted) {
            let reg = field.reg.in_mut(entry);
            *reg = *reg & field.keep | field.put;
        }
    }
    amx(entries);
    topology(entries);
}

fn set(entries: &mut [CpuidEntry], name: &str, on: bool) {
    // A test looks up each name of the lists above.
    let Some(bit) = features::find(name) else { return };
    if let Some(entry) = entries.iter_mut().find(|e| (e.function, e.index) == (bit.leaf, bit.index)) {
        let reg = bit.reg.in_mut(entry);
        *reg = if on { *reg | bit.mask } else { *reg & !bit.mask };
    }
}

fn amx(entries: &mut Vec<CpuidEntry>) {
    let Some(at) = entries.iter().position(|e| (e.function, e.index) == (0xd, 0)) else { return };
    if entries[at].eax & XCR0_AMX == XCR0_AMX {
        return;
    }
    entries[at].eax &= !XCR0_AMX;
    // The XSAVE area of all features together ends with the last of them; without any it is the legacy area and the header.
    let xcr0 = u64::from(entries[at].eax) | u64::from(entries[at].edx) << 32;
    let parts = entries.iter().filter(|e| e.function == 0xd && (2..63).contains(&e.index) && xcr0 >> e.index & 1 == 1);
    entries[at].ecx = parts.map(|e| e.eax.saturating_add(e.ebx)).fold(576, u32::max);
    for name in AMX {
        set(entries, name, false);
    }
    entries.retain(|e| !matches!((e.function, e.index), (0xd, 17 | 18) | (0x1d | 0x1e, _)));
}

fn topology(entries: &mut Vec<CpuidEntry>) {
    entries.retain(|e| e.function != 0xb);
    let largest = entries.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    if largest >= 0xb {
        entries.extend(TOPOLOGY.iter().map(|&(index, [eax, ebx, ecx, edx])| CpuidEntry {
            function: 0xb,
            index,
            flags: SIGNIFICANT_INDEX,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }));
    }
}

/// The names of the features that a guest has, for people.
pub(crate) fn names(entries: &[CpuidEntry]) -> Vec<&'static str> {
    features::on(entries)
}

/// In what the CPU of a template differs from that of guests here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuDifference {
    /// Features that only the template's has.
    pub missing_here: Vec<&'static str>,
    /// Features that only this host's guests have.
    pub only_here: Vec<&'static str>,
    /// Other words of CPUID, such as `0xd.0 ecx: 0x240 here 0x340`.
    pub other: Vec<String>,
}

impl CpuDifference {
    /// None where a template of one CPU runs on the other.
    pub fn between(template: &[CpuidEntry], here: &[CpuidEntry]) -> Option<CpuDifference> {
        let bound = |e: &&CpuidEntry| LEAVES.iter().any(|(leaf, what, _)| *leaf == e.function && *what == Leaf::Bound);
        let mut keys: Vec<(u32, u32)> =
            template.iter().chain(here).filter(bound).map(|e| (e.function, e.index)).collect();
        keys.sort_unstable();
        keys.dedup();
        let mut found = CpuDifference::default();
        for (leaf, index) in keys {
            let of = |list: &[CpuidEntry]| list.iter().find(|e| (e.function, e.index) == (leaf, index)).copied();
            let (saved, now) = (of(template).unwrap_or_default(), of(here).unwrap_or_default());
            for reg in Reg::ALL {
                let (saved, now) = (reg.of(&saved), reg.of(&now));
                let mut nameless = false;
                for bit in (0..32).filter(|bit| (saved ^ now) >> bit & 1 == 1) {
                    match features::name(leaf, index, reg, bit) {
                        Some(name) if saved >> bit & 1 == 1 => found.missing_here.push(name),
                        Some(name) => found.only_here.push(name),
                        None => nameless = true,
                    }
                }
                if nameless {
                    found.other.push(format!("{leaf:#x}.{index} {} {saved:#x}, here {now:#x}", reg.name()));
                }
            }
        }
        (found != CpuDifference::default()).then_some(found)
    }
}

impl fmt::Display for CpuDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // As many as anyone reads in one line.
        const MOST: usize = 24;
        let mut parts = Vec::new();
        let list = |names: &[&str]| {
            let more = names.len().saturating_sub(MOST);
            let names = names.iter().take(MOST).copied().collect::<Vec<_>>().join(" ");
            if more == 0 { names } else { format!("{names} and {more} more") }
        };
        if !self.missing_here.is_empty() {
            parts.push(format!("it was built with {}, which guests here do not have", list(&self.missing_here)));
        }
        if !self.only_here.is_empty() {
            parts.push(format!("it was built without {}, which guests here have", list(&self.only_here)));
        }
        if !self.other.is_empty() {
            let words: Vec<&str> = self.other.iter().map(String::as_str).collect();
            // Next to named features the sizes and numbers that follow from them say nothing more.
            if parts.is_empty() {
                parts.push(format!("its CPUID has {}", list(&words)));
            }
        }
        f.write_str(&parts.join("; "))
    }
}

#[cfg(test)]
#[path = "cpuid/tests.rs"]
mod tests;
