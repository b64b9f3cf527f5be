//! The state that a worker leaves of a running sandbox: any bytes, since a guest may own the worker.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _taken = zeroboot_vm::fuzz_checkpoint(bytes);
});
