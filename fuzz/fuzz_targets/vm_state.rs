//! The reader of `state.bin`: any bytes, and any body behind a checksum that fits.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    zeroboot_vm::fuzz_decode(bytes);
});
