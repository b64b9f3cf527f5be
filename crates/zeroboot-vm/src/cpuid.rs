//! What a guest sees of the CPU: what KVM supports, with a short list of changes.

use zeroboot_sys::kvm::{CpuidEntry, Kvm, KvmError};

/// Changes bits of one register of one leaf.
struct Patch {
    leaf: u32,
    apply: fn(&mut CpuidEntry),
}

/// Each line has its reason. There is no line that hides a feature of the CPU from user code.
const PATCHES: &[Patch] = &[
    // x2APIC (21): LAPIC registers are MSRs, saved as such, and its access needs no instruction emulator.
    // TSC deadline (24): the one timer of the shape. Hypervisor present (31): the guest looks for KVM's
    // leaves. KVM reports the first two as supported only in some versions; it has both with a LAPIC.
    Patch { leaf: 1, apply: |e| e.ecx |= 1 << 21 | 1 << 24 | 1 << 31 },
    // APIC id 0 and one logical CPU: the entry otherwise shows the host CPU that was asked.
    Patch { leaf: 1, apply: |e| e.ebx = (e.ebx & 0xffff) | 1 << 16 },
    // x2APIC id 0, as above.
    Patch { leaf: 0xb, apply: |e| e.edx = 0 },
    Patch { leaf: 0x1f, apply: |e| e.edx = 0 },
    // ARAT: the LAPIC timer never stops, so the kernel needs no broadcast timer.
    Patch { leaf: 6, apply: |e| e.eax |= 1 << 2 },
    // Bytes of the enabled XSAVE features depend on XCR0 of whoever asks; KVM computes it for the guest.
    Patch {
        leaf: 0xd,
        apply: |e| {
            if e.index == 0 {
                e.ebx = 0
            }
        },
    },
    // KVM features: kvm-clock (0, 3), no delay on port 0x80 (1), stable clock (24). No async page faults,
    // steal time or paravirtual EOI: each is one more place in guest memory that KVM writes.
    Patch {
        leaf: 0x4000_0001,
        apply: |e| {
            e.eax &= 1 | 1 << 1 | 1 << 3 | 1 << 24;
            e.edx = 0
        },
    },
    // Topology of the AMD kind: extended APIC id 0, as leaf 0xb.
    Patch {
        leaf: 0x8000_001e,
        apply: |e| {
            e.eax = 0;
            e.ebx = 0;
            e.ecx = 0
        },
    },
];

/// The guest's CPUID on this host. Asked once per template: on a virtual host each CPUID instruction
/// traps to the next host, and the list needs hundreds.
pub(crate) fn for_guest(kvm: &Kvm) -> Result<Vec<CpuidEntry>, KvmError> {
    let mut entries = kvm.supported_cpuid()?;
    for entry in &mut entries {
        for patch in PATCHES.iter() {
            if patch.leaf == entry.function {
                (patch.apply)(entry);
            }
        }
    }
    Ok(entries)
}
