//! Boots a kernel and an initramfs with the echo agent, freezes, forks, asks. For working on the engine.
#![allow(clippy::print_stdout)]
use std::{
    error::Error,
    io,
    path::PathBuf,
    time::{Duration, Instant},
};
use zeroboot_proto::{Identity, Kind, Limits, encode};
use zeroboot_sys::{kick::Kick, memory::MiB};
use zeroboot_vm::{BuildOptions, Front, Host, Prefault, Received, Session, build};

struct Once {
    request: Vec<u8>,
    heard: Vec<u8>,
}
impl Front for Once {
    fn receive(&mut self, into: &mut Vec<u8>, wait: bool) -> io::Result<Received> {
        if self.request.is_empty() {
            return Ok(if wait { Received::Gone } else { Received::Nothing });
        }
        into.append(&mut self.request);
        Ok(Received::Bytes)
    }
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.heard.extend_from_slice(bytes);
        if std::env::var_os("STOP").is_some() && bytes.windows(4).any(|w| w == b"STOP") {
            return Err(io::Error::other("stop"));
        }
        Ok(())
    }
}
fn request(code: &[u8], seed: u8) -> Vec<u8> {
    let mut r = Vec::new();
    encode(&mut r, Kind::Identity, &Identity { entropy: [seed; 64], realtime_ns: 0, sandbox_id: [seed; 16] }.encode());
    encode(
        &mut r,
        Kind::Limits,
        &Limits {
            wall_ns: 10_000_000_000,
            cpu_ns: u64::MAX,
            memory: 400 << 20,
            output: 1 << 24,
            file_size: 1 << 20,
            output_files: 1 << 20,
            processes: 64,
            open_files: 256,
        }
        .encode(),
    );
    encode(&mut r, Kind::Arg, b"-c");
    encode(&mut r, Kind::Code, code);
    encode(&mut r, Kind::StdinEnd, b"");
    encode(&mut r, Kind::Run, b"");
    r
}
fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let kernel = PathBuf::from(args.next().ok_or("kernel")?);
    let initramfs = PathBuf::from(args.next().ok_or("initramfs")?);
    let memory = MiB(args.next().ok_or("MiB")?.parse()?);
    let parameters = args.next().unwrap_or_default();
    let codes: Vec<String> = args.collect();
    let host = Host::open()?;
    let options = BuildOptions { kernel, initramfs, memory, parameters, timeout: Duration::from_secs(300) };
    let start = Instant::now();
    let mut snapshot = match build(&host, &options, |p| println!("{:?} {p:?}", start.elapsed())) {
        Ok(snapshot) => snapshot,
        Err(error) => {
            println!("{error} {:?}", error.source());
            std::process::exit(1)
        }
    };
    println!("about: {}", String::from_utf8_lossy(snapshot.about()));
    snapshot.rehearse(&host, &request(codes[0].as_bytes(), 1))?;
    println!(
        "working set: {} written, {} read",
        snapshot.working_set().written_pages(),
        snapshot.working_set().read_pages()
    );
    let dir = std::env::temp_dir().join("zb-bringup");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir(&dir)?;
    let start = Instant::now();
    let facts = snapshot.save(&dir)?;
    println!(
        "save {:?} {} MiB stored of {}",
        start.elapsed(),
        facts.memory_stored_bytes >> 20,
        facts.memory_bytes >> 20
    );
    let start = Instant::now();
    let snapshot = zeroboot_vm::Snapshot::load(&host, &dir)?;
    println!("load {:?}", start.elapsed());
    for code in &codes {
        for prefault in [Prefault::Nothing, Prefault::Written, Prefault::All] {
            let mut steps = Vec::new();
            let t0 = Instant::now();
            let mut last = t0;
            let mut fork = snapshot.fork_timed(&host, &mut |s| {
                let n = Instant::now();
                steps.push((s, (n - last).as_micros()));
                last = n;
            })?;
            let forked = t0.elapsed();
            let t0 = Instant::now();
            snapshot.prefault(&mut fork, prefault)?;
            let prefaulted = t0.elapsed();
            let mut front =
                Once { request: request(code.as_bytes(), t0.elapsed().subsec_nanos() as u8), heard: Vec::new() };
            let kick = Kick::new()?;
            let t0 = Instant::now();
            let r = Session::new(&snapshot, &mut fork, &mut front, &kick).run();
            if let Err(e) = &r {
                println!("{code} stopped: {e}");
            }
            let (end, stats) = r.unwrap_or((zeroboot_vm::SessionEnd::Failed, Default::default()));
            println!(
                "{code:?} {prefault:?}: {end:?} fork {forked:?} prefault {prefaulted:?} session {:?} run {:?} exits {:?}",
                t0.elapsed(),
                stats.run,
                stats.exits
            );
            let mut decoder = zeroboot_proto::Decoder::new();
            decoder.feed(&front.heard);
            while let Some((kind, payload)) = decoder.next_frame()? {
                println!(
                    "  {kind:?} {}",
                    if kind == Kind::Exit {
                        format!("{:?}", zeroboot_proto::ExitReport::decode(payload))
                    } else {
                        String::from_utf8_lossy(&payload[..payload.len().min(2000)]).into_owned()
                    }
                );
            }
            let r = fork.machine().memory().resident()?;
            if std::env::var_os("RANGES").is_some() {
                let mut by = std::collections::BTreeMap::new();
                for (p, n) in &r.private {
                    for i in *p..*p + *n {
                        *by.entry(i / 512).or_insert(0) += 1;
                    }
                }
                println!("  private pages by 2 MiB: {by:?}");
                let mut hist = std::collections::BTreeMap::new();
                let mut shown = 0;
                for (p, n) in &r.private {
                    for i in *p..*p + *n {
                        let (mut a, mut b) = (vec![0u8; 4096], vec![0u8; 4096]);
                        let at = zeroboot_sys::memory::GuestPhys(u64::from(i) * 4096);
                        fork.machine().memory().read(at, &mut a)?;
                        snapshot.image().read(at, &mut b)?;
                        let d: Vec<usize> = (0..512).filter(|w| a[w * 8..w * 8 + 8] != b[w * 8..w * 8 + 8]).collect();
                        let zero = a.iter().all(|b| *b == 0);
                        *hist
                            .entry((
                                if (58352..67584).contains(&i) { "heap" } else { "else" },
                                if zero {
                                    9999
                                } else if d.len() < 4 {
                                    d.len()
                                } else {
                                    d.len().next_power_of_two()
                                },
                            ))
                            .or_insert(0) += 1;
                        if (58352..67584).contains(&i) && !d.is_empty() && shown < 40 {
                            shown += 1;
                            let w = d[d.len() / 2];
                            println!(
                                "   page {i:#x} words {} at {:?}: {:x?} -> {:x?}",
                                d.len(),
                                &d[..d.len().min(6)],
                                &b[w * 8..w * 8 + 8],
                                &a[w * 8..w * 8 + 8]
                            );
                        }
                    }
                }
                println!("  words changed: {hist:?}");
            }
            println!(
                "  private {} shared {} kvm {:?}",
                r.private_pages(),
                r.shared_pages(),
                fork.machine()
                    .vcpu()
                    .stats()?
                    .iter()
                    .filter(|(n, _)| !n.contains("_ns") && !n.contains("hist"))
                    .collect::<Vec<_>>()
            );
        }
    }
    Ok(())
}
