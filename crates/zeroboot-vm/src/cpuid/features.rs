//! The names of CPUID's feature bits, for the rules and for messages. Linux's names, where it has one.

use zeroboot_sys::kvm::CpuidEntry;

/// A register of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Reg {
    pub(crate) const ALL: [Reg; 4] = [Reg::Eax, Reg::Ebx, Reg::Ecx, Reg::Edx];

    pub(crate) fn of(self, entry: &CpuidEntry) -> u32 {
        match self {
            Reg::Eax => entry.eax,
            Reg::Ebx => entry.ebx,
            Reg::Ecx => entry.ecx,
            Reg::Edx => entry.edx,
        }
    }

    pub(crate) fn in_mut(self, entry: &mut CpuidEntry) -> &mut u32 {
        match self {
            Reg::Eax => &mut entry.eax,
            Reg::Ebx => &mut entry.ebx,
            Reg::Ecx => &mut entry.ecx,
            Reg::Edx => &mut entry.edx,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Reg::Eax => "eax",
            Reg::Ebx => "ebx",
            Reg::Ecx => "ecx",
            Reg::Edx => "edx",
        }
    }
}

/// Where a feature's bit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bit {
    pub(crate) leaf: u32,
    pub(crate) index: u32,
    pub(crate) reg: Reg,
    pub(crate) mask: u32,
}

/// A register of which each bit is a feature: names from bit 0 on, `-` for a bit without a name of its own.
struct Word {
    leaf: u32,
    index: u32,
    reg: Reg,
    names: &'static str,
}

const fn word(leaf: u32, index: u32, reg: Reg, names: &'static str) -> Word {
    Word { leaf, index, reg, names }
}

/// Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E; for 0x40000001 Documentation/virt/kvm/x86/cpuid.rst.
const WORDS: &[Word] = &[
    word(
        1,
        0,
        Reg::Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds acpi mmx fxsr \
         sse sse2 ss ht tm ia64 pbe",
    ),
    word(
        1,
        0,
        Reg::Ecx,
        "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 \
         sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    word(
        7,
        0,
        Reg::Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx \
         rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd \
         sha_ni avx512bw avx512vl",
    ),
    word(
        7,
        0,
        Reg::Ecx,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni \
         avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid key_locker bus_lock_detect cldemote - movdiri \
         movdir64b enqcmd sgx_lc pks",
    ),
    word(
        7,
        0,
        Reg::Edx,
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear \
         rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 \
         avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities ssbd",
    ),
    word(
        7,
        1,
        Reg::Eax,
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred \
         lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam msrlist - - invd_disable movrs",
    ),
    word(
        7,
        1,
        Reg::Edx,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - utmr prefetchiti user_msr - \
         uiret_uif cet_sss avx10 - apx_f - mwait - - - - - - - -",
    ),
    word(7, 2, Reg::Edx, "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    word(
        0xd,
        0,
        Reg::Eax,
        "xcr0_x87 xcr0_sse xcr0_avx xcr0_bndregs xcr0_bndcsr xcr0_opmask xcr0_zmm_hi256 xcr0_hi16_zmm - xcr0_pkru - \
         - - - - - - xcr0_tilecfg xcr0_tiledata xcr0_apx",
    ),
    word(0xd, 1, Reg::Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    word(0xd, 1, Reg::Ecx, "- - - - - - - - xss_pt - xss_pasid xss_cet_u xss_cet_s xss_hdc xss_uintr xss_lbr xss_hwp"),
    word(
        0x4000_0001,
        0,
        Reg::Eax,
        "kvmclock kvm_nopiodelay kvm_mmu_op kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - \
         kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int \
         kvm_msi_ext_dest_id kvm_hc_map_gpa kvm_migration_control - - - - - - kvmclock_stable",
    ),
    word(
        0x8000_0001,
        0,
        Reg::Ecx,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp \
         fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    word(
        0x8000_0001,
        0,
        Reg::Edx,
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    word(0x8000_0007, 0, Reg::Edx, "- - - - - - - - invariant_tsc"),
    word(
        0x8000_0008,
        0,
        Reg::Ebx,
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp ibrs_always_on \
         stibp_always_on ibrs_preferred ibrs_same_mode - - - ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no \
         ibpb_ret",
    ),
    word(
        0x8000_0021,
        0,
        Reg::Eax,
        "no_nested_data_bp fs_gs_base_ns lfence_rdtsc smm_page_cfg_lock - verw_clear null_sel_clr_base upper_addr_ignore \
         autoibrs no_smm_ctl_msr fsrs_amd fsrc_amd - prefetch_ctl_msr - - - epsf - - prefetchi - - - eraps - - sbpb \
         ibpb_brtype srso_no srso_user_kernel_no",
    ),
];

/// The name of a bit, if it has one.
pub(crate) fn name(leaf: u32, index: u32, reg: Reg, bit: u32) -> Option<&'static str> {
    let word = WORDS.iter().find(|w| (w.leaf, w.index, w.reg) == (leaf, index, reg))?;
    word.names.split_whitespace().nth(bit as usize).filter(|name| *name != "-")
}

/// Where the bit of this name is.
pub(crate) fn find(name: &str) -> Option<Bit> {
    WORDS.iter().find_map(|word| {
        let bit = word.names.split_whitespace().position(|other| other == name && other != "-")?;
        Some(Bit { leaf: word.leaf, index: word.index, reg: word.reg, mask: 1 << bit })
    })
}

/// Every feature with a name that is on, in the order of the leaves.
pub(crate) fn on(entries: &[CpuidEntry]) -> Vec<&'static str> {
    let mut found = Vec::new();
    for word in WORDS {
        let entry = entries.iter().find(|e| (e.function, e.index) == (word.leaf, word.index));
        let value = entry.map_or(0, |entry| word.reg.of(entry));
        let names = word.names.split_whitespace().enumerate();
        found.extend(names.filter(|&(bit, name)| value >> bit & 1 == 1 && name != "-").map(|(_, name)| name));
    }
    found
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_name_means_one_bit() {
        let mut seen = HashSet::new();
        for word in WORDS {
            let names: Vec<_> = word.names.split_whitespace().collect();
            assert!(names.len() <= 32, "{:#x}.{} {:?}", word.leaf, word.index, word.reg);
            for name in names.into_iter().filter(|name| *name != "-") {
                assert!(seen.insert(name), "{name} twice");
            }
        }
    }

    #[test]
    fn bits_that_manuals_number_have_their_name() {
        for (name, leaf, index, reg, bit) in [
            ("pbe", 1, 0, Reg::Edx, 31),
            ("pdcm", 1, 0, Reg::Ecx, 15),
            ("hypervisor", 1, 0, Reg::Ecx, 31),
            ("avx2", 7, 0, Reg::Ebx, 5),
            ("avx512vl", 7, 0, Reg::Ebx, 31),
            ("waitpkg", 7, 0, Reg::Ecx, 5),
            ("sgx_lc", 7, 0, Reg::Ecx, 30),
            ("amx_bf16", 7, 0, Reg::Edx, 22),
            ("amx_tile", 7, 0, Reg::Edx, 24),
            ("amx_int8", 7, 0, Reg::Edx, 25),
            ("ssbd", 7, 0, Reg::Edx, 31),
            ("amx_fp16", 7, 1, Reg::Eax, 21),
            ("avx_ifma", 7, 1, Reg::Eax, 23),
            ("amx_complex", 7, 1, Reg::Edx, 8),
            ("avx10", 7, 1, Reg::Edx, 19),
            ("xcr0_tilecfg", 0xd, 0, Reg::Eax, 17),
            ("xcr0_tiledata", 0xd, 0, Reg::Eax, 18),
            ("xfd", 0xd, 1, Reg::Eax, 4),
            ("kvmclock_stable", 0x4000_0001, 0, Reg::Eax, 24),
            ("svm", 0x8000_0001, 0, Reg::Ecx, 2),
            ("perfctr_core", 0x8000_0001, 0, Reg::Ecx, 23),
            ("perfctr_llc", 0x8000_0001, 0, Reg::Ecx, 28),
            ("rdtscp", 0x8000_0001, 0, Reg::Edx, 27),
            ("ibpb_ret", 0x8000_0008, 0, Reg::Ebx, 30),
            ("srso_no", 0x8000_0021, 0, Reg::Eax, 29),
        ] {
            assert_eq!(find(name), Some(Bit { leaf, index, reg, mask: 1 << bit }), "{name}");
            assert_eq!(self::name(leaf, index, reg, bit), Some(name));
        }
        assert_eq!((find("-"), find("no_such_feature")), (None, None));
    }
}
