//! A PID 1 for bringing up the VM engine without a runtime: echoes the code in upper case, with a sleep,
//! a boot id and random bytes.
#![allow(dead_code)]

#[path = "../src/vm.rs"]
mod vm;

use std::{io::Read, time::Duration};

use zeroboot_proto::{Decoder, Ending, ExitReport, Identity, Kind, encode, mailbox::Ring};

fn main() {
    if let Err(error) = run() {
        vm::console(&format!("agent: {error}"));
    }
}

fn run() -> std::io::Result<()> {
    let mut vm = vm::Vm::start()?;
    vm.ready(b"echo")?;
    let mut input = Vec::new();
    vm.take_input(&mut input);
    let mut decoder = Decoder::new();
    let mut code = Vec::new();
    'request: loop {
        decoder.feed(&input);
        while let Some((kind, payload)) = decoder.next_frame().map_err(std::io::Error::other)? {
            match kind {
                Kind::Identity => vm::apply_identity(&Identity::decode(payload).map_err(std::io::Error::other)?)?,
                Kind::Code => code.extend_from_slice(payload),
                Kind::Run => break 'request,
                _ => {}
            }
        }
        input.clear();
        vm.exchange(Ring::Want, &[], &mut input);
    }
    let mut out = Vec::new();
    encode(&mut out, Kind::Started, b"");
    if code.starts_with(b"info") {
        let start = std::time::Instant::now();
        std::thread::sleep(Duration::from_millis(100));
        let slept = start.elapsed();
        let mut random = [0; 8];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
        let text = format!(
            "slept {slept:?} random {random:x?} boot_id {} host {} time {:?} clock {}",
            std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim(),
            std::fs::read_to_string("/proc/sys/kernel/hostname")?.trim(),
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH),
            std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")?.trim(),
        );
        encode(&mut out, Kind::Stdout, text.as_bytes());
    } else if code.starts_with(b"spin") {
        loop {
            std::hint::spin_loop();
        }
    } else if code.starts_with(b"die") {
        return Ok(());
    } else {
        encode(&mut out, Kind::Stdout, &code.to_ascii_uppercase());
    }
    let report = ExitReport { ending: Ending::Exited(0), wall_ns: 1, cpu_ns: 1, peak_memory: 1 };
    encode(&mut out, Kind::Exit, &report.encode());
    // A long echo does not fit into one ring.
    let mut chunks = out.chunks(zeroboot_proto::mailbox::AREA).peekable();
    while let Some(chunk) = chunks.next() {
        let ring = if chunks.peek().is_some() { Ring::Output } else { Ring::Done };
        vm.exchange(ring, chunk, &mut input);
    }
    Ok(())
}
