//! The two devices that a template has while it boots: any reads and writes of its guest.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    zeroboot_vm::fuzz_boot_devices(bytes);
});
