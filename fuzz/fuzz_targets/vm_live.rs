//! What a worker lets pass between a front and a guest that lives: any frames of both.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    zeroboot_vm::fuzz_live(bytes);
});
