//! What a guest sees of the CPU: what KVM supports, with a short list of changes.

use zeroboot_sys::kvm::{CpuidEntry, Kvm, KvmError};

/// Changes bits of one register of one leaf.
struct Patch {
    leaf: u32,
    apply: fn(&mut CpuidEntry),
}

/// Each line has its reason. There is no line that hides an instruction from user code: what is hidden is a kernel's.
const PATCHES: &[Patch] = &[
    // x2APIC (21): LAPIC registers are MSRs, saved as such, and its access needs no instruction emulator.
    // TSC deadline (24): the one timer of the shape. Hypervisor present (31): the guest looks for KVM's
    // leaves. KVM reports the first two as supported only in some versions; it has both with a LAPIC.
    Patch { leaf: 1, apply: |e| e.ecx |= 1 << 21 | 1 << 24 | 1 << 31 },
    // No virtual machines in a guest: the code that emulates VT-x (5) and SVM (2 of the extended leaf) for it is the
    // part of KVM with the most holes, and no guest of ours has a use for it. Leaf 0x8000000a describes SVM.
    Patch { leaf: 1, apply: |e| e.ecx &= !(1 << 5) },
    Patch { leaf: 0x8000_0001, apply: |e| e.ecx &= !(1 << 2) },
    Patch { leaf: 0x8000_000a, apply: nothing },
    // No performance counters: KVM would program the host's for it, and they tell of what the host does besides.
    // Leaf 0xa describes Intel's, with their capabilities' MSR (PDCM, 15), leaf 0x80000022 AMD's, with the core's
    // own (23).
    Patch { leaf: 0xa, apply: nothing },
    Patch { leaf: 1, apply: |e| e.ecx &= !(1 << 15) },
    Patch { leaf: 0x8000_0022, apply: nothing },
    Patch { leaf: 0x8000_0001, apply: |e| e.ecx &= !(1 << 23) },
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

/// The leaf says that there is nothing.
fn nothing(e: &mut CpuidEntry) {
    (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0);
}

/// The guest's CPUID on this host. Asked once per template: on a virtual host each CPUID instruction
/// traps to the next host, and the list needs hundreds.
pub(crate) fn for_guest(kvm: &Kvm) -> Result<Vec<CpuidEntry>, KvmError> {
    let mut entries = kvm.supported_cpuid()?;
    patch(&mut entries);
    Ok(entries)
}

fn patch(entries: &mut [CpuidEntry]) {
    for entry in entries {
        for patch in PATCHES.iter() {
            if patch.leaf == entry.function {
                (patch.apply)(entry);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_ones(function: u32) -> CpuidEntry {
        CpuidEntry { function, eax: !0, ebx: !0, ecx: !0, edx: !0, ..Default::default() }
    }

    /// Of a host that has everything.
    fn guest(function: u32) -> CpuidEntry {
        let mut entries = [all_ones(function)];
        patch(&mut entries);
        entries[0]
    }

    #[test]
    fn a_guest_is_offered_neither_virtual_machines_nor_performance_counters() {
        let (vmx, pdcm, svm, perf_core) = (1 << 5, 1 << 15, 1 << 2, 1 << 23);
        assert_eq!(guest(1).ecx & (vmx | pdcm), 0);
        assert_eq!(guest(0x8000_0001).ecx & (svm | perf_core), 0);
        for leaf in [0xa, 0x8000_000a, 0x8000_0022] {
            let entry = guest(leaf);
            assert_eq!([entry.eax, entry.ebx, entry.ecx, entry.edx], [0; 4], "{leaf:#x}");
        }
    }

    #[test]
    fn no_feature_of_user_code_is_hidden() {
        // SSE3 to SSE4.2, FMA, AES, XSAVE, AVX, RDRAND and what the machine's shape adds.
        assert_eq!(guest(1).ecx, !(1 << 5 | 1 << 15));
        assert_eq!(guest(7), all_ones(7));
        assert_eq!(guest(0x8000_0001).ecx, !(1 << 2 | 1 << 23));
    }
}
