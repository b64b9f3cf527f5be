//! The host's half of the mailbox: any header page, any announced frame number and length.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((frame, rest)) = bytes.split_first_chunk() else { return };
    let Some((len, page)) = rest.split_first_chunk() else { return };
    zeroboot_vm::fuzz_mailbox(page, u32::from_le_bytes(*frame), u32::from_le_bytes(*len));
});
