//! The few ACPI tables without which Linux does not start its local APIC's timer, or finds no wake line.
//!
//! RSDP, XSDT, MADT with one local APIC and the boot-time IOAPIC, hardware-reduced FADT, DSDT with the power-off state
//! and the boot-time HPET. Without a MADT the kernel runs without its local APIC and no timer ever fires. Without a
//! hardware-reduced FADT it spends 40 000 exits on a CMOS clock that does not exist.

use crate::{
    exits::POWER_PORT,
    wake::{HPET, IOAPIC, LINE},
};

/// Where the RSDP is; the others follow it. Above conventional memory.
pub(crate) const AT: u64 = 0xe_0000;
const XSDT: u64 = AT + 0x100;
const MADT: u64 = AT + 0x200;
const FADT: u64 = AT + 0x300;
const DSDT: u64 = AT + 0x600;
const LOCAL_APIC: u32 = 0xfee0_0000;

/// All tables and where they go.
pub(crate) fn tables() -> [(u64, Vec<u8>); 5] {
    let pointers: Vec<u8> = [FADT, MADT].iter().flat_map(|at| at.to_le_bytes()).collect();
    [
        (MADT, table(b"APIC", 4, &madt())),
        (DSDT, table(b"DSDT", 2, &dsdt())),
        (FADT, table(b"FACP", 6, &fadt())),
        (XSDT, table(b"XSDT", 1, &pointers)),
        (AT, rsdp()),
    ]
}

fn madt() -> Vec<u8> {
    let mut madt = Vec::new();
    madt.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    madt.extend_from_slice(&0u32.to_le_bytes()); // flags: no pair of 8259s
    madt.extend_from_slice(&[0, 8, 0, 0, 1, 0, 0, 0]); // processor 0 has APIC id 0, enabled
    madt.extend_from_slice(&[4, 6, 0xff, 0, 0, 1]); // NMI on LINT1 of every processor
    madt.extend_from_slice(&[1, 12, 1, 0]); // an IOAPIC with id 1, here, and its first pin is interrupt 0
    madt.extend_from_slice(&IOAPIC.to_le_bytes());
    madt.extend_from_slice(&0u32.to_le_bytes());
    madt
}

fn dsdt() -> Vec<u8> {
    // Name (\_S5, Package () { 5, 0, 0, 0 }): what to write into the sleep control register to power off.
    let mut dsdt = b"\x08_S5_\x12\x07\x04\x0a\x05\x00\x00\x00".to_vec();

    // ResourceTemplate () { Memory32Fixed (ReadWrite, HPET),
    //                       Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { LINE } }
    // Without the interrupt, the driver takes some pin of the IOAPIC, as a level.
    let mut resources = vec![0x86, 9, 0, 1];
    resources.extend_from_slice(&HPET.0.to_le_bytes());
    resources.extend_from_slice(&HPET.1.to_le_bytes());
    resources.extend_from_slice(&[0x89, 6, 0, 0b0011, 1]);
    resources.extend_from_slice(&u32::from(LINE).to_le_bytes());
    resources.extend_from_slice(&[0x79, 0]); // the end, without a checksum

    // Scope (\_SB) { Device (WAKE) { Name (_HID, EisaId ("PNP0103")) Name (_CRS, resources) } }
    let mut device = b"WAKE\x08_HID\x0c\x41\xd0\x01\x03\x08_CRS".to_vec();
    let mut buffer = vec![0x0a, resources.len() as u8];
    buffer.append(&mut resources);
    device.append(&mut package(b"\x11", &buffer));
    let mut scope = b"\\_SB_".to_vec();
    scope.append(&mut package(b"\x5b\x82", &device));
    dsdt.append(&mut package(b"\x10", &scope));
    dsdt
}

/// A term of AML with its length, which counts itself. In one byte it is below 64.
fn package(opcode: &[u8], body: &[u8]) -> Vec<u8> {
    let length = 1 + body.len();
    assert!(length < 64);
    [opcode, &[length as u8], body].concat()
}

fn fadt() -> [u8; 276 - 36] {
    let mut fadt = [0u8; 276 - 36];
    let mut field = |at: usize, bytes: &[u8]| fadt[at - 36..at - 36 + bytes.len()].copy_from_slice(bytes);
    field(40, &(DSDT as u32).to_le_bytes());
    field(109, &(1u16 << 2 | 1 << 3 | 1 << 5).to_le_bytes()); // no VGA, no MSI, no CMOS clock
    field(112, &(1u32 << 20 | 1 << 4 | 1 << 5).to_le_bytes()); // HW_REDUCED_ACPI; no power or sleep button
    field(131, &[5]); // minor version
    field(140, &DSDT.to_le_bytes());
    // Generic addresses of the sleep control and status registers: I/O space, 8 bits, byte access.
    for (at, port) in [(244, POWER_PORT), (256, POWER_PORT + 1)] {
        field(at, &[1, 8, 0, 1]);
        field(at + 4, &u64::from(port).to_le_bytes());
    }
    fadt
}

fn rsdp() -> Vec<u8> {
    let mut rsdp = [0u8; 36];
    rsdp[..8].copy_from_slice(b"RSD PTR ");
    rsdp[9..15].copy_from_slice(b"ZEROBT");
    rsdp[15] = 2;
    rsdp[20..24].copy_from_slice(&36u32.to_le_bytes());
    rsdp[24..32].copy_from_slice(&XSDT.to_le_bytes());
    rsdp[8] = checksum(&rsdp[..20]);
    rsdp[32] = checksum(&rsdp);
    rsdp.to_vec()
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)).wrapping_neg()
}

/// An ACPI table: the common header and a body.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(36 + body.len());
    bytes.extend_from_slice(signature);
    bytes.extend_from_slice(&(36 + body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&[revision, 0]);
    bytes.extend_from_slice(b"ZEROBTZEROBOOT ");
    bytes.truncate(10 + 14);
    bytes.extend_from_slice(&1u32.to_le_bytes());
    bytes.extend_from_slice(b"ZBT ");
    bytes.extend_from_slice(&1u32.to_le_bytes());
    bytes.extend_from_slice(body);
    let sum = checksum(&bytes);
    if let Some(byte) = bytes.get_mut(9) {
        *byte = sum;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn each_table_sums_to_zero_has_its_length_and_overlaps_no_other() {
        let mut all = tables();
        all.sort_by_key(|(at, _)| *at);
        for pair in all.windows(2) {
            assert!(pair[0].0 + pair[0].1.len() as u64 <= pair[1].0, "{:#x} overlaps", pair[0].0);
        }
        for (at, bytes) in all {
            assert_eq!(bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)), 0, "{at:#x}");
            let length = if at == AT { &bytes[20..24] } else { &bytes[4..8] };
            assert_eq!(length, (bytes.len() as u32).to_le_bytes(), "{at:#x}");
        }
    }

    #[test]
    fn the_madt_has_one_apic_its_nmi_and_the_ioapic() {
        let madt = madt();
        assert_eq!(hex(&madt[..8]), "0000e0fe00000000");
        // Type, length, the rest, up to the very end.
        let (mut entries, mut rest) = (Vec::new(), &madt[8..]);
        while !rest.is_empty() {
            let (entry, after) = rest.split_at(rest[1].into());
            entries.push(hex(entry));
            rest = after;
        }
        assert_eq!(entries, ["0008000001000000", "0406ff000001", "010c01000000c0fe00000000"]);
    }

    /// The bytes that Linux 6.1 and 6.12 were seen to make `/dev/hpet` of.
    #[test]
    fn the_dsdt_names_the_hpet_and_its_interrupt() {
        let expected = [
            "085f53355f1207040a05000000", // \_S5
            "10375c5f53425f",             // Scope, 55 bytes, \_SB_
            "5b822f57414b45",             // Device, 47 bytes, WAKE
            "085f4849440c41d00103",       // _HID
            "085f435253111a0a17",         // _CRS, a buffer of 26 and 23 bytes
            "860900010000d0fe00040000",   // Memory32Fixed
            "890600030101000000",         // Interrupt
            "7900",
        ];
        assert_eq!(hex(&dsdt()), expected.concat());
    }

    #[test]
    #[should_panic]
    fn a_term_too_long_for_one_byte_of_length_is_not_written_wrong() {
        package(b"\x10", &[0; 63]);
    }
}
