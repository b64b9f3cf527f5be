//! The wake line: how the host wakes a guest that waits for input.
//!
//! While a template boots, there are an IOAPIC that only remembers and an HPET that only answers its driver's probe. The
//! agent holds `/dev/hpet`, whose driver counts interrupts and, in periodic mode on an edge, touches no register. In a
//! fork there is neither device: the host sends the interrupt whose vector the guest had put into the IOAPIC
//! ([`Vm::raise`](zeroboot_sys::kvm::Vm::raise)), and the agent's `poll` ends. Why so: docs/adr/0017.

use serde::{Deserialize, Serialize};
use zeroboot_sys::memory::GuestPhys;

/// Where the MADT says that the IOAPIC is.
pub(crate) const IOAPIC: u32 = 0xfec0_0000;
/// Where the DSDT says that the HPET is, and how many bytes of registers it has.
pub(crate) const HPET: (u32, u32) = (0xfed0_0000, 0x400);
/// The pin of the IOAPIC, and so the interrupt, that the DSDT gives the HPET. Not 0, which is no interrupt for Linux.
pub(crate) const LINE: u8 = 1;
/// Pins of the IOAPIC: 0 and the line.
const PINS: usize = LINE as usize + 1;

/// IOAPIC: selects the register behind [`WINDOW`].
const SELECT: u64 = IOAPIC as u64;
const WINDOW: u64 = IOAPIC as u64 + 0x10;
/// Registers of the IOAPIC behind the window. From [`ROUTES`] on there are two words a pin.
const ID: u8 = 0;
const VERSION: u8 = 1;
const ROUTES: u8 = 0x10;
/// Version 0x11, which has no register for an end of interrupt, and the highest pin.
const VERSION_VALUE: u32 = (PINS as u32 - 1) << 16 | 0x11;

/// HPET: capabilities.
const CAPABILITIES: u64 = HPET.0 as u64;
/// A tick of 10,000,000 fs, a vendor, a 64-bit counter, one timer.
const CAPABILITIES_VALUE: u64 = 10_000_000 << 32 | 0x5a42 << 16 | 1 << 13 | 1;
const CONFIGURATION: u64 = HPET.0 as u64 + 0x10;
const COUNTER: u64 = HPET.0 as u64 + 0xf0;
const TIMER_CONFIGURATION: u64 = HPET.0 as u64 + 0x100;
const TIMER_COMPARATOR: u64 = HPET.0 as u64 + 0x108;
/// The timer can be periodic and has 64 bits. Always read as set.
const TIMER_CAN: u64 = 1 << 4 | 1 << 5;
/// The timer's interrupt is a level. Always read as clear: the driver would ask the device at each interrupt.
const TIMER_LEVEL: u64 = 1 << 1;
/// Ticks by which the counter grows at each read, 2 ms: the driver's calibration, which waits for 1 ms of it, ends at once.
const TICKS_A_READ: u64 = 200_000;

/// The interrupt vector of a template's wake line. Never one of a processor's exceptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct WakeVector(u8);

impl WakeVector {
    /// `None` below 0x20.
    pub fn new(vector: u8) -> Option<WakeVector> {
        (vector >= 0x20).then_some(WakeVector(vector))
    }

    /// Its number.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<u8> for WakeVector {
    type Error = NoWakeLine;

    fn try_from(vector: u8) -> Result<WakeVector, NoWakeLine> {
        WakeVector::new(vector).ok_or(NoWakeLine::Exception(vector))
    }
}

impl From<WakeVector> for u8 {
    fn from(vector: WakeVector) -> u8 {
        vector.0
    }
}

/// Why a guest cannot be woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoWakeLine {
    /// The guest does not wait for the interrupt.
    #[error("it left interrupt {LINE} masked; does its kernel have CONFIG_HPET?")]
    Masked,
    /// Vectors below 0x20 are the processor's own.
    #[error("it gave interrupt {LINE} the vector {0:#04x}, which is an exception's")]
    Exception(u8),
    /// Not an edge, or a delivery that is not to a vector.
    #[error("it asked for an interrupt that is not an edge with a vector (IOAPIC route {0:#x})")]
    Kind(u32),
}

/// The registers of both devices. What the guest writes is remembered, and nothing happens.
#[derive(Clone, Debug)]
pub(crate) struct BootDevices {
    select: u8,
    id: u32,
    /// Low and high word of each pin's route.
    routes: [[u32; 2]; PINS],
    configuration: u64,
    timer_configuration: u64,
    comparator: u64,
    counter: u64,
}

impl BootDevices {
    /// As after a reset: each pin is masked.
    pub(crate) fn new() -> BootDevices {
        BootDevices {
            select: 0,
            id: 0,
            routes: [[MASKED, 0]; PINS],
            configuration: 0,
            timer_configuration: 0,
            comparator: 0,
            counter: 0,
        }
    }

    /// Answers a read of at most 8 bytes. All ones where there is no register.
    pub(crate) fn read(&mut self, at: GuestPhys, data: &mut [u8]) {
        // Of a register of 64 bits, the upper half can be read alone.
        let (register, skip) = (at.0 & !4, (at.0 & 4) as usize);
        let value = match register {
            SELECT => self.select.into(),
            WINDOW => match self.select {
                ID => self.id.into(),
                VERSION => VERSION_VALUE.into(),
                other => self.route(other).map_or(u64::MAX, |word| u64::from(*word)),
            },
            CAPABILITIES => CAPABILITIES_VALUE,
            CONFIGURATION => self.configuration,
            COUNTER => {
                self.counter = self.counter.wrapping_add(TICKS_A_READ);
                self.counter
            }
            TIMER_CONFIGURATION => self.timer_configuration & !TIMER_LEVEL | TIMER_CAN,
            TIMER_COMPARATOR => self.comparator,
            _ => u64::MAX,
        };
        let mut bytes = value.to_le_bytes().into_iter().skip(skip);
        data.fill_with(|| bytes.next().unwrap_or(0xff));
    }

    /// Remembers a write of at most 8 bytes. One where there is no register goes nowhere.
    pub(crate) fn write(&mut self, at: GuestPhys, data: &[u8]) {
        let mut value = data.iter().take(8).rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte));
        let register = at.0 & !4;
        let stored = match register {
            SELECT if at.0 == SELECT => return self.select = value as u8,
            WINDOW if at.0 == WINDOW => {
                match self.select {
                    ID => self.id = value as u32,
                    other => {
                        if let Some(word) = self.route(other) {
                            *word = value as u32;
                        }
                    }
                }
                return;
            }
            CONFIGURATION => &mut self.configuration,
            COUNTER => &mut self.counter,
            TIMER_CONFIGURATION => &mut self.timer_configuration,
            TIMER_COMPARATOR => &mut self.comparator,
            _ => return,
        };
        // Bytes that are not written stay: a register of 64 bits can be written by halves.
        let bits = 8 * data.len().min(8) as u32;
        let mut mask = u64::MAX.checked_shr(64 - bits).unwrap_or(0);
        if at.0 & 4 != 0 {
            (mask, value) = (mask << 32, value << 32);
        }
        *stored = *stored & !mask | value & mask;
    }

    /// One word of a pin's route, by the number of its register.
    fn route(&mut self, register: u8) -> Option<&mut u32> {
        let index = usize::from(register.checked_sub(ROUTES)?);
        self.routes.get_mut(index / 2)?.get_mut(index % 2)
    }

    /// The vector that the guest gave the wake line. Each kernel chooses its own.
    pub(crate) fn vector(&self) -> Result<WakeVector, NoWakeLine> {
        let [route, _destination] = self.routes[usize::from(LINE)];
        if route & MASKED != 0 {
            return Err(NoWakeLine::Masked);
        }
        // Delivery modes 0 (fixed) and 1 (lowest priority) are the same for one CPU.
        if route & LEVEL != 0 || route >> 8 & 7 > 1 {
            return Err(NoWakeLine::Kind(route));
        }
        WakeVector::try_from(route as u8)
    }
}

/// Bits of a route's low word.
const MASKED: u32 = 1 << 16;
const LEVEL: u32 = 1 << 15;

/// For the fuzzer and the tests: any accesses of a booting guest, 10 bytes each.
#[doc(hidden)]
pub fn fuzz_boot_devices(accesses: &[u8]) {
    let mut devices = BootDevices::new();
    for access in accesses.as_chunks::<10>().0 {
        let [what, at, value @ ..] = access;
        // Mostly where registers are, and now and then beside them or astride them.
        let base = if what & 1 == 0 { u64::from(IOAPIC) } else { u64::from(HPET.0) };
        let at = GuestPhys(base.wrapping_add(u64::from(*at) << (what >> 1 & 3)));
        let length = usize::from(what >> 3 & 15).min(8);
        if what & 0x80 == 0 {
            devices.write(at, value.get(..length).unwrap_or_default());
        } else {
            devices.read(at, &mut [0; 8][..length]);
        }
        if let Ok(vector) = devices.vector() {
            assert!(vector.get() >= 0x20);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(devices: &mut BootDevices, at: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        devices.read(GuestPhys(at), &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    fn write(devices: &mut BootDevices, at: u64, value: u64, len: usize) {
        devices.write(GuestPhys(at), &value.to_le_bytes()[..len]);
    }

    fn ioapic(devices: &mut BootDevices, register: u8) -> u64 {
        write(devices, SELECT, register.into(), 4);
        read(devices, WINDOW, 4)
    }

    fn set_ioapic(devices: &mut BootDevices, register: u8, value: u32) {
        write(devices, SELECT, register.into(), 4);
        write(devices, WINDOW, value.into(), 4);
    }

    #[test]
    fn the_ioapic_is_what_linux_probes_for() {
        let mut devices = BootDevices::new();
        // `io_apic_get_redir_entries` and `ioapic_valid`: two pins; all ones would be no IOAPIC.
        assert_eq!(ioapic(&mut devices, VERSION), 0x0001_0011);
        set_ioapic(&mut devices, ID, 1 << 24);
        assert_eq!(ioapic(&mut devices, ID), 1 << 24);
        // `clear_IO_APIC` masks and reads back.
        for pin in 0..2 {
            assert_eq!(ioapic(&mut devices, ROUTES + 2 * pin), u64::from(MASKED));
            set_ioapic(&mut devices, ROUTES + 2 * pin + 1, 0x0100_0000);
            assert_eq!(ioapic(&mut devices, ROUTES + 2 * pin + 1), 0x0100_0000);
        }
        // There is no third pin.
        assert_eq!(ioapic(&mut devices, ROUTES + 4), u64::from(u32::MAX));
        set_ioapic(&mut devices, ROUTES + 4, 0x21);
        assert_eq!(devices.vector(), Err(NoWakeLine::Masked));
    }

    #[test]
    fn the_hpet_is_what_its_driver_probes_for() {
        let mut devices = BootDevices::new();
        let at = u64::from(HPET.0);
        // Femtoseconds a tick, revision 1 and one timer (`hpet_alloc` reads 64 bits, others 32 twice).
        assert_eq!(read(&mut devices, at, 8), 0x0098_9680_5a42_2001);
        assert_eq!((read(&mut devices, at, 4), read(&mut devices, at + 4, 4)), (0x5a42_2001, 10_000_000));
        // Its calibration waits for the counter: one that stood still would hang the boot.
        let (first, second) = (read(&mut devices, COUNTER, 8), read(&mut devices, COUNTER, 8));
        assert!(second - first > 1_000_000_000_000 / 10_000_000, "less than 1 ms in {first} to {second}");
        // `hpet_ioctl_ieon` sets periodic mode and enables the interrupt, on an edge whatever was asked for.
        write(&mut devices, TIMER_CONFIGURATION, TIMER_LEVEL | 1 << 2 | 1 << 3 | 1 << 6, 8);
        assert_eq!(read(&mut devices, TIMER_CONFIGURATION, 8), 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6);
        write(&mut devices, TIMER_COMPARATOR, 0x1_2345_6789, 8);
        assert_eq!(read(&mut devices, TIMER_COMPARATOR, 8), 0x1_2345_6789);
        // By halves.
        write(&mut devices, TIMER_COMPARATOR + 4, 0xffff_fffe, 4);
        assert_eq!(read(&mut devices, TIMER_COMPARATOR, 8), 0xffff_fffe_2345_6789);
        write(&mut devices, CONFIGURATION, 1, 8);
        assert_eq!(read(&mut devices, CONFIGURATION, 8), 1);
        // Nothing else is there.
        assert_eq!((read(&mut devices, at + 0x20, 8), read(&mut devices, at + 0x120, 8)), (u64::MAX, u64::MAX));
    }

    #[test]
    fn the_vector_is_the_one_that_the_kernel_chose_or_the_guest_cannot_be_woken() {
        let with = |route: u32| {
            let mut devices = BootDevices::new();
            set_ioapic(&mut devices, ROUTES + 2 * LINE, route);
            devices.vector()
        };
        assert_eq!(BootDevices::new().vector(), Err(NoWakeLine::Masked));
        // 6.12 and 6.1; lowest priority and a logical destination.
        for (route, vector) in [(0x20, 0x20), (0x21, 0x21), (0x9ff, 0xff)] {
            assert_eq!(with(route), Ok(WakeVector(vector)));
        }
        assert_eq!(with(0x21 | MASKED), Err(NoWakeLine::Masked));
        for vector in [0, 0x1f] {
            assert_eq!(with(vector), Err(NoWakeLine::Exception(vector as u8)));
        }
        // A level, an SMI, an NMI, a message of the old PIC.
        for route in [0x21 | LEVEL, 0x221, 0x421, 0x721] {
            assert_eq!(with(route), Err(NoWakeLine::Kind(route)));
        }
        // The other pin's route is another matter.
        let mut devices = BootDevices::new();
        set_ioapic(&mut devices, ROUTES, 0x30);
        assert_eq!(devices.vector(), Err(NoWakeLine::Masked));
    }

    proptest! {
        #[test]
        fn no_access_of_a_guest_makes_the_devices_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            fuzz_boot_devices(&bytes);
        }

        #[test]
        fn accesses_beside_the_devices_change_nothing(at: u64, value: u64, len in 0usize..=8) {
            let near = |base: u32| at.wrapping_sub(base.into()) < 0x1000;
            prop_assume!(!near(IOAPIC) && !near(HPET.0));
            let mut devices = BootDevices::new();
            write(&mut devices, at, value, len);
            prop_assert_eq!(read(&mut devices, at, 8), u64::MAX);
            prop_assert_eq!(format!("{devices:?}"), format!("{:?}", BootDevices::new()));
        }

        #[test]
        fn what_is_written_to_a_register_is_read_back(value: u64, len in 1usize..=8, high: bool) {
            let len = if high { len.min(4) } else { len };
            for at in [CONFIGURATION, TIMER_COMPARATOR] {
                let mut devices = BootDevices::new();
                write(&mut devices, at, u64::MAX, 8);
                write(&mut devices, at + 4 * u64::from(high), value, len);
                let mut expected = [0xff; 8];
                expected[4 * usize::from(high)..][..len].copy_from_slice(&value.to_le_bytes()[..len]);
                prop_assert_eq!(read(&mut devices, at, 8), u64::from_le_bytes(expected));
            }
        }
    }
}
