//! The host's half of the mailbox: any header page, any announced frame number and length.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: (u32, u32, Vec<u8>)| {
    let (frame, len, page) = input;
    zeroboot_vm::fuzz_mailbox(&page, frame, len);
});
