use std::path::Path;

use super::*;

/// Features of user code: a program may have chosen its code by them, so no rule takes one away.
const USER: &str = "sse sse2 sse3 ssse3 sse4_1 sse4_2 sse4a pclmulqdq fma cx16 movbe popcnt aes xsave osxsave avx f16c rdrand \
    fsgsbase bmi1 bmi2 avx2 erms avx512f avx512dq rdseed adx avx512ifma clflushopt clwb avx512cd sha_ni avx512bw avx512vl \
    avx512vbmi pku ospke avx512_vbmi2 gfni vaes vpclmulqdq avx512_vnni avx512_bitalg avx512_vpopcntdq rdpid cldemote movdiri \
    movdir64b fsrm avx512_vp2intersect serialize avx512_fp16 avx_vnni avx512_bf16 avx_ifma avx_vnni_int8 avx_ne_convert \
    xsaveopt xsavec xgetbv1 lahf_lm abm 3dnowprefetch rdtscp lm syscall clzero wbnoinvd xcr0_x87 xcr0_sse xcr0_avx \
    xcr0_opmask xcr0_zmm_hi256 xcr0_hi16_zmm xcr0_pkru prefetchi sha512 sm3 sm4 cmpccxadd avx_vnni_int16 fma4 xop tbm";

/// One logical CPU of a recorded one.
struct Recorded {
    name: String,
    entries: Vec<CpuidEntry>,
}

/// Every file, each of its logical CPUs.
fn recorded() -> Vec<Vec<Recorded>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/cpuid");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|ext| ext == "txt"));
    files.sort();
    let all: Vec<_> = files.iter().map(|path| parse(path)).collect();
    assert!(all.len() >= 16, "the recorded CPUs are missing");
    all
}

fn parse(path: &Path) -> Vec<Recorded> {
    let stem = path.file_stem().unwrap().to_str().unwrap();
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.lines().any(|line| line.starts_with("# Source: ")), "{stem} does not say where it comes from");
    let number = |text: &str| {
        let digits = text.trim_start_matches(|c: char| c.is_alphabetic() && c != 'x');
        let digits = digits.trim_start_matches('=').trim_start_matches("0x").trim_end_matches(':');
        u32::from_str_radix(digits, 16).unwrap_or_else(|_| panic!("{stem}: {text}"))
    };
    let mut cpus: Vec<Recorded> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some(cpu) = line.strip_prefix("CPU ") {
            cpus.push(Recorded { name: format!("{stem} cpu {}", cpu.trim_end_matches(':')), entries: Vec::new() });
            continue;
        }
        let words: Vec<u32> =
            line.split_whitespace().map(|w| number(w.split_once('=').map_or(w, |(_, value)| value))).collect();
        let [function, index, eax, ebx, ecx, edx] = words[..] else { panic!("{stem}: {line}") };
        let entry = CpuidEntry { function, index, eax, ebx, ecx, edx, ..Default::default() };
        cpus.last_mut().unwrap_or_else(|| panic!("{stem} begins without CPU n:")).entries.push(entry);
    }
    cpus
}

fn guest(entries: &[CpuidEntry]) -> Vec<CpuidEntry> {
    let mut entries = entries.to_vec();
    apply(&mut entries);
    entries
}

fn entry(entries: &[CpuidEntry], leaf: u32, index: u32) -> CpuidEntry {
    entries.iter().find(|e| (e.function, e.index) == (leaf, index)).copied().unwrap_or_default()
}

/// Leaf 7 of a CPU that has everything, for a rule on its own.
fn has(entries: &[CpuidEntry], name: &str) -> bool {
    names(entries).contains(&name)
}

#[test]
fn each_rule_names_a_feature_and_has_a_reason() {
    for (name, why) in HIDDEN.iter().chain(SHOWN) {
        assert!(features::find(name).is_some() && !why.is_empty(), "{name}");
        let leaf = features::find(name).unwrap().leaf;
        assert!(LEAVES.iter().any(|(other, ..)| *other == leaf), "{name} is of a leaf that no guest has");
    }
    assert!(AMX.iter().all(|name| features::find(name).is_some()));
    assert!(LEAVES.iter().all(|(_, _, why)| !why.is_empty()));
    assert!(LEAVES.is_sorted_by_key(|(leaf, ..)| leaf));
    for field in FIELDS {
        assert!(!field.why.is_empty());
        assert!(LEAVES.iter().any(|(leaf, ..)| *leaf == field.leaf), "{:#x}", field.leaf);
        assert_eq!(field.keep & field.put, 0);
    }
    for name in USER.split_whitespace() {
        assert!(features::find(name).is_some(), "{name}");
        assert!(HIDDEN.iter().all(|(hidden, _)| *hidden != name), "{name}");
    }
}

#[test]
fn on_every_recorded_cpu_a_guest_has_what_user_code_may_use_and_nothing_that_is_hidden() {
    for Recorded { name, entries } in recorded().into_iter().flatten() {
        let guest = guest(&entries);
        for feature in USER.split_whitespace() {
            assert_eq!(has(&guest, feature), has(&entries, feature), "{name}: {feature}");
        }
        for (feature, _) in HIDDEN {
            assert!(!has(&guest, feature), "{name}: {feature}");
        }
        for (feature, _) in SHOWN {
            assert!(has(&guest, feature), "{name}: {feature}");
        }
        // Performance counters, traces, enclaves, virtual machines, encrypted memory, hardware feedback.
        for leaf in [0xa, 0x12, 0x14, 0x1a, 0x1b, 0x1c, 0x23, 0x8000_000a, 0x8000_001b, 0x8000_001f, 0x8000_0022] {
            assert!(guest.iter().all(|e| e.function != leaf), "{name}: {leaf:#x}");
        }
    }
}

#[test]
fn on_every_recorded_cpu_a_guest_is_one_cpu() {
    for Recorded { name, entries } in recorded().into_iter().flatten() {
        let guest = guest(&entries);
        assert_eq!(entry(&guest, 1, 0).ebx >> 16, 1, "{name}: one logical CPU with APIC id 0");
        assert_eq!(entry(&guest, 1, 0).ebx & 0xffff, entry(&entries, 1, 0).ebx & 0xffff, "{name}: the size of CLFLUSH");
        for e in guest.iter().filter(|e| matches!(e.function, 4 | 0x8000_001d)) {
            assert_eq!(e.eax >> 14, 0, "{name}: {:#x}.{} is shared", e.function, e.index);
            let before = entry(&entries, e.function, e.index);
            assert_eq!((e.ebx, e.ecx), (before.ebx, before.ecx), "{name}: the sizes of its caches are its own");
        }
        if entry(&guest, 0, 0).eax >= 0xb {
            let levels: Vec<_> =
                guest.iter().filter(|e| e.function == 0xb).map(|e| (e.eax, e.ebx, e.ecx, e.edx)).collect();
            assert_eq!(levels, [(0, 1, 0x100, 0), (0, 1, 0x201, 0)], "{name}");
        }
        assert!(guest.iter().all(|e| !matches!(e.function, 0x1f | 0x8000_001e | 0x8000_0026)), "{name}");
        assert_eq!(entry(&guest, 0x8000_0008, 0).ecx, 0, "{name}");
    }
}

#[test]
fn on_every_recorded_cpu_the_state_to_save_is_whole() {
    for Recorded { name, entries } in recorded().into_iter().flatten() {
        let guest = guest(&entries);
        let main = entry(&guest, 0xd, 0);
        // What XSETBV refuses by halves.
        for (bits, what) in [(3 << 3, "MPX"), (7 << 5, "AVX-512"), (XCR0_AMX, "AMX")] {
            assert!(main.eax & bits == 0 || main.eax & bits == bits, "{name}: {what} by halves");
        }
        let xcr0 = u64::from(main.eax) | u64::from(main.edx) << 32;
        let end = (2..63).filter(|i| xcr0 >> i & 1 == 1).map(|i| {
            let part = entry(&guest, 0xd, i);
            part.eax + part.ebx
        });
        assert_eq!(main.ecx, end.fold(576, u32::max), "{name}: bytes of the XSAVE area");
        assert_eq!((main.ebx, entry(&guest, 0xd, 1).ebx), (0, 0), "{name}");
    }
}

#[test]
fn the_cores_of_one_recorded_cpu_make_guests_of_one_kind() {
    let mut hybrid = 0;
    for cpus in recorded() {
        let first = guest(&cpus[0].entries);
        for other in &cpus[1..] {
            hybrid += u32::from(entry(&cpus[0].entries, 4, 0) != entry(&other.entries, 4, 0));
            let difference = CpuDifference::between(&first, &guest(&other.entries));
            assert_eq!(difference, None, "{} and {}", cpus[0].name, other.name);
        }
    }
    assert!(hybrid >= 4, "hybrid CPUs are among the recorded");
}

#[test]
fn amx_is_there_whole_or_not_at_all() {
    let all = recorded();
    let sapphire_rapids = &all.iter().flatten().find(|cpu| cpu.name.starts_with("sapphire-rapids")).unwrap().entries;
    assert!(AMX[..3].iter().all(|name| has(sapphire_rapids, name)));
    // The CPU's own: both parts of the state. What a process with the permission is shown.
    let whole = guest(sapphire_rapids);
    assert!(["amx_tile", "amx_bf16", "amx_int8", "xfd", "xcr0_tiledata"].iter().all(|name| has(&whole, name)));
    assert_eq!(entry(&whole, 0xd, 0).ecx, 0x2b00);
    assert_ne!(entry(&whole, 0x1d, 1).eax, 0);
    for (hidden, what) in [
        (1 << 18, "as Linux 5.17 to 6.3 shows it without the permission"),
        (1 << 17, "the other half"),
        (3 << 17, "none"),
    ] {
        let mut shown = sapphire_rapids.clone();
        shown.iter_mut().filter(|e| (e.function, e.index) == (0xd, 0)).for_each(|e| e.eax &= !hidden);
        let guest = guest(&shown);
        let left: Vec<_> =
            names(&guest).into_iter().filter(|n| n.contains("amx") || n.contains("tile") || *n == "xfd").collect();
        assert!(left.is_empty(), "{what}: {left:?}");
        assert!(guest.iter().all(|e| !matches!((e.function, e.index), (0x1d | 0x1e, _) | (0xd, 17 | 18))), "{what}");
        assert_eq!(entry(&guest, 0xd, 0).ecx, 0xa88, "{what}: the area ends with PKRU's part");
    }
}

#[test]
fn a_cpu_that_differs_is_told_by_the_names_of_its_features() {
    let all = recorded();
    let of = |name: &str| guest(&all.iter().flatten().find(|cpu| cpu.name.starts_with(name)).unwrap().entries);
    let (skylake, ice_lake) = (of("skylake-sp"), of("ice-lake-sp"));
    let there = CpuDifference::between(&ice_lake, &skylake).unwrap();
    for name in ["avx512_vbmi2", "gfni", "vaes", "sha_ni"] {
        assert!(there.missing_here.contains(&name), "{there:?}");
    }
    let back = CpuDifference::between(&skylake, &ice_lake).unwrap();
    assert_eq!((&back.missing_here, &back.only_here), (&there.only_here, &there.missing_here));
    let text = there.to_string();
    assert!(text.contains("it was built with") && text.contains("gfni") && text.len() < 600, "{text}");
    assert_eq!(CpuDifference::between(&skylake, &skylake), None);
    // A word without names is told as it is.
    let mut other = skylake.clone();
    other.iter_mut().filter(|e| (e.function, e.index) == (0xd, 2)).for_each(|e| e.ebx = 0x999);
    let text = CpuDifference::between(&skylake, &other).unwrap().to_string();
    assert_eq!(text, "its CPUID has 0xd.2 ebx 0x240, here 0x999");
}
