//! How a vCPU begins in 64-bit mode: as a kernel's boot protocol asks, and as the probe's few bytes of code need it.

use zeroboot_sys::kvm::{Segment, Sregs};

/// Present and writable.
pub(crate) const KERNEL: u64 = 3;
/// The same, for ring 3 as well.
pub(crate) const USER: u64 = 7;

/// Three pages of page tables for address `at`: the first GiB, one to one, in pages of 2 MiB.
pub(crate) fn identity_map(at: u64, access: u64) -> Vec<u8> {
    const LARGE: u64 = 1 << 7;
    let mut entries = vec![0u64; 2 * 512];
    for (level, entry) in entries.iter_mut().step_by(512).enumerate() {
        *entry = (at + 0x1000 * (level as u64 + 1)) | access;
    }
    entries.extend((0..512).map(|page| page << 21 | LARGE | access));
    entries.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// Paging with the tables at `tables`, flat segments with these selectors, a task segment.
pub(crate) fn enter(sregs: &mut Sregs, tables: u64, code: u16, data: u16, task: u16) {
    let base = &mut sregs.base;
    base.cs =
        Segment { limit: u32::MAX, selector: code, type_: 11, present: 1, s: 1, l: 1, g: 1, ..Default::default() };
    let data =
        Segment { limit: u32::MAX, selector: data, type_: 3, present: 1, s: 1, db: 1, g: 1, ..Default::default() };
    (base.ds, base.es, base.fs, base.gs, base.ss) = (data, data, data, data, data);
    base.tr = Segment { limit: 0x67, selector: task, type_: 11, present: 1, ..Default::default() };
    base.cr3 = tables;
    base.cr4 = 1 << 5; // PAE
    base.cr0 = 0x8005_0033; // PG, AM, WP, NE, ET, MP, PE
    base.efer = 1 << 8 | 1 << 10; // LME, LMA
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_map_leads_from_its_root_to_each_large_page() {
        let bytes = identity_map(0x3_0000, KERNEL);
        let entry =
            |table: usize, index: usize| u64::from_le_bytes(bytes[table * 4096 + index * 8..][..8].try_into().unwrap());
        assert_eq!((entry(0, 0), entry(1, 0)), (0x3_1003, 0x3_2003));
        assert_eq!((entry(0, 1), entry(1, 511)), (0, 0));
        assert_eq!((entry(2, 0), entry(2, 1), entry(2, 511)), (0x83, 0x20_0083, 0x3fe0_0083));
        assert_eq!(bytes.len(), 3 * 4096);
    }
}
