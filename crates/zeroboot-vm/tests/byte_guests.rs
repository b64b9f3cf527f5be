//! Guests of a few bytes of real-mode code on the local `/dev/kvm`: everything about forks that needs no
//! Linux in them. Without the device the tests say so and pass, unless `ZEROBOOT_REQUIRE_KVM=1`.
#![allow(clippy::print_stderr, clippy::type_complexity, reason = "tests speak to people")]

use std::{
    collections::VecDeque,
    io,
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use zeroboot_proto::{
    Decoder, Ending, ExitReport, Frame, Identity, Kind, Limits, MAX_PAYLOAD, encode, encode_on,
    live::{self, End, How},
    mailbox::{AREA_PAGES, DOORBELL_PORT, MAGIC, Ring, TABLE_AT, VERSION},
};
use zeroboot_sys::{
    kick::Kick,
    kvm::{MsrTable, Regs},
    memory::{BootMemory, GuestPhys, MiB},
};
use zeroboot_vm::{Console, Exits, Front, Host, Machine, Received, Session, SessionEnd, Snapshot, Stop, WakeVector};

#[path = "byte_guests/attacks.rs"]
mod attacks;

const HEADER: u64 = 0x2000;
const TO_GUEST: u64 = 0x3000;
const FROM_GUEST: u64 = 0x4000;
const CODE: u64 = 0x1000;
/// A word that guests count in.
const COUNTER: u64 = 0x5000;

/// Tests that count descriptors or mappings must not overlap with others.
fn lock() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn host() -> Option<Host> {
    match Host::open() {
        Ok(host) => Some(host),
        Err(error) if std::env::var_os("ZEROBOOT_REQUIRE_KVM").is_some_and(|v| v == "1") => {
            panic!("ZEROBOOT_REQUIRE_KVM=1 and {error}: {:?}", std::error::Error::source(&error))
        }
        Err(error) => {
            eprintln!("skipped: no usable /dev/kvm ({error})");
            None
        }
    }
}

/// Assembles guests. Real mode, all segments at 0.
#[derive(Clone, Default)]
struct Asm(Vec<u8>);

impl Asm {
    fn raw(mut self, bytes: &[u8]) -> Asm {
        self.0.extend_from_slice(bytes);
        self
    }
    /// `mov dx, doorbell; mov eax, value; out dx, eax`
    fn ring(self, value: u32) -> Asm {
        self.raw(&[0xba])
            .raw(&DOORBELL_PORT.to_le_bytes())
            .raw(&[0x66, 0xb8])
            .raw(&value.to_le_bytes())
            .raw(&[0x66, 0xef])
    }
    fn ready(self) -> Asm {
        self.ring(Ring::Ready.encode((HEADER >> 12) as u32))
    }
    /// `mov word [address], value`
    fn store(self, address: u64, value: u16) -> Asm {
        self.raw(&[0xc7, 0x06]).raw(&(address as u16).to_le_bytes()).raw(&value.to_le_bytes())
    }
    /// `inc word [address]`
    fn increment(self, address: u64) -> Asm {
        self.raw(&[0xff, 0x06]).raw(&(address as u16).to_le_bytes())
    }
    /// Writes bytes into the area from the guest and rings.
    fn send(self, ring: Ring, bytes: &[u8]) -> Asm {
        let mut asm = self;
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().next_multiple_of(2), 0);
        for (i, pair) in padded.chunks(2).enumerate() {
            asm = asm.store(FROM_GUEST + 2 * i as u64, u16::from_le_bytes([pair[0], pair[1]]));
        }
        asm.ring(ring.encode(bytes.len() as u32))
    }
    /// `mov ecx, msr; mov eax, value; xor edx, edx; wrmsr`
    fn wrmsr(self, msr: u32, value: u32) -> Asm {
        self.raw(&[0x66, 0xb9])
            .raw(&msr.to_le_bytes())
            .raw(&[0x66, 0xb8])
            .raw(&value.to_le_bytes())
            .raw(&[0x66, 0x31, 0xd2, 0x0f, 0x30])
    }
    /// Turns the local APIC on, as an x2APIC, with a handler that ends the wake line's interrupt and returns.
    fn hears_the_wake_line(self) -> Asm {
        const HANDLER: u64 = 0x6000;
        let handler = Asm::default().wrmsr(0x80b, 0).raw(&[0xcf]);
        let mut asm = self.wrmsr(0x1b, 0xfee0_0d00).wrmsr(0x80f, 0x1ff);
        for (i, pair) in handler.0.chunks(2).enumerate() {
            asm = asm.store(HANDLER + 2 * i as u64, u16::from_le_bytes([pair[0], pair[1]]));
        }
        let vector = 4 * u64::from(vector().get());
        asm.store(vector, HANDLER as u16).store(vector + 2, 0)
    }
    /// Takes what the mailbox holds and sleeps, until it held something and the host has no more. Adds all lengths up in
    /// [`COUNTER`], 32 bits. `looks`: begins with what is there already.
    fn takes_all(self, looks: bool) -> Asm {
        let (counter, length, more) = (COUNTER as u16, HEADER as u16 + 0x800, HEADER as u16 + 0x804);
        let want = Asm::default().ring(Ring::Want.encode(0));
        let body = want
            // mov eax, [length]; add [counter], eax; test eax, eax; jz sleep
            .raw(&[0x66, 0xa1])
            .raw(&length.to_le_bytes())
            .raw(&[0x66, 0x01, 0x06])
            .raw(&counter.to_le_bytes())
            .raw(&[0x66, 0x85, 0xc0, 0x74, 9])
            // mov eax, [more]; test eax, eax; jz done
            .raw(&[0x66, 0xa1])
            .raw(&more.to_le_bytes())
            .raw(&[0x66, 0x85, 0xc0, 0x74, 5])
            // sleep: sti; hlt; cli; jmp to the beginning
            .raw(&[0xfb, 0xf4, 0xfa, 0xeb]);
        let back = 0u8.wrapping_sub(body.0.len() as u8 + 1);
        let skip = if looks { vec![0xeb, 11] } else { Vec::new() };
        self.raw(&skip).raw(&body.0).raw(&[back])
    }
    fn spin_without_interrupts(self) -> Asm {
        self.raw(&[0xfa, 0xeb, 0xfe])
    }
}

fn header_page() -> Vec<u8> {
    let mut page = vec![0; 4096];
    page[..4].copy_from_slice(&MAGIC.to_le_bytes());
    page[4..8].copy_from_slice(&VERSION.to_le_bytes());
    for i in 0..AREA_PAGES {
        let to = if i == 0 { TO_GUEST } else { 0x2_0000 + 0x1000 * i as u64 };
        let from = if i == 0 { FROM_GUEST } else { 0x4_0000 + 0x1000 * i as u64 };
        page[TABLE_AT + 8 * i..][..8].copy_from_slice(&to.to_le_bytes());
        page[TABLE_AT + 8 * (AREA_PAGES + i)..][..8].copy_from_slice(&from.to_le_bytes());
    }
    page
}

/// The wake line's, for guests that hear it and others.
fn vector() -> WakeVector {
    WakeVector::new(0x33).unwrap()
}

/// Boots a guest and stops it at its first ring.
fn boot(host: &Host, code: &Asm) -> (Machine, BootMemory, Stop) {
    let memory = BootMemory::new(MiB(1)).unwrap();
    let mut machine = Machine::new(host, memory.map().unwrap()).unwrap();
    machine.memory().write(GuestPhys(HEADER), &header_page()).unwrap();
    machine.memory().write(GuestPhys(CODE), &code.0).unwrap();
    let vcpu = machine.vcpu();
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.base.cs.base, sregs.base.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&Regs { rip: CODE, rsp: 0x7000, rflags: 2, ..Default::default() }).unwrap();
    // A kick of this thread's session before, that came when it was over.
    zeroboot_sys::kick::take_pending();
    let stop = machine.run(&mut Console::default(), &mut Exits::default()).unwrap();
    (machine, memory, stop)
}

fn snapshot(host: &Host, code: &Asm) -> Snapshot {
    let (machine, memory, stop) = boot(host, code);
    let Stop::Ring(Ring::Ready, argument) = stop else { panic!("{stop:?}") };
    Snapshot::freeze(host, machine, memory, argument, vector()).unwrap()
}

/// Forks, starts the clocks and runs to the next stop.
fn next_stop(host: &Host, snapshot: &Snapshot, fork: &mut zeroboot_vm::Fork) -> Stop {
    let _ = host;
    snapshot.start_clocks(fork).unwrap();
    fork.machine().run(&mut Console::default(), &mut Exits::default()).unwrap()
}

fn word(fork: &mut zeroboot_vm::Fork, at: u64) -> u16 {
    let mut bytes = [0; 2];
    fork.machine().memory().read(GuestPhys(at), &mut bytes).unwrap();
    u16::from_le_bytes(bytes)
}

/// A front that has said everything at once and keeps what it hears.
#[derive(Default)]
struct Script {
    input: VecDeque<Vec<u8>>,
    heard: Vec<u8>,
    gone: bool,
}

impl Script {
    fn request(limits: Limits) -> Script {
        let mut bytes = Vec::new();
        encode(
            &mut bytes,
            Kind::Identity,
            &Identity { entropy: [1; 64], realtime_ns: 0, sandbox_id: [2; 16] }.encode(),
        );
        encode(&mut bytes, Kind::Limits, &limits.encode());
        encode(&mut bytes, Kind::Code, b"the code");
        encode(&mut bytes, Kind::Run, b"");
        Script { input: [bytes].into(), ..Script::default() }
    }
    fn frames(&self) -> Vec<(Kind, Vec<u8>)> {
        let mut decoder = Decoder::new();
        decoder.feed(&self.heard);
        let mut frames = Vec::new();
        while let Some((kind, payload)) = decoder.next_frame().unwrap() {
            frames.push((kind, payload.to_vec()));
        }
        frames
    }
    fn all_frames(&self) -> Vec<(u16, Kind, Vec<u8>)> {
        let mut decoder = Decoder::new();
        decoder.feed(&self.heard);
        let mut frames = Vec::new();
        while let Some(frame) = decoder.next_on_any().unwrap() {
            frames.push((frame.channel, frame.kind, frame.payload.to_vec()));
        }
        frames
    }
    fn ending(&self) -> Option<Ending> {
        let frames = self.frames();
        let (kind, payload) = frames.last()?;
        (*kind == Kind::Exit).then(|| ExitReport::decode(payload).unwrap().ending)
    }
}

impl Front for Script {
    fn receive(&mut self, into: &mut Vec<u8>, wait: bool) -> io::Result<Received> {
        match self.input.pop_front() {
            Some(bytes) => {
                into.extend_from_slice(&bytes);
                Ok(Received::Bytes)
            }
            None if self.gone || wait => Ok(Received::Gone),
            None => Ok(Received::Nothing),
        }
    }
    fn gone(&mut self) -> io::Result<bool> {
        Ok(self.gone)
    }
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.heard.extend_from_slice(bytes);
        Ok(())
    }
}

fn limits(wall: Duration) -> Limits {
    Limits {
        wall_ns: wall.as_nanos() as u64,
        cpu_ns: u64::MAX,
        memory: u64::MAX,
        output: 1000,
        file_size: u64::MAX,
        output_files: 1000,
        processes: 1,
        open_files: 1,
    }
}

/// Forks a guest and runs a request in it.
fn exec(host: &Host, guest: &Asm, limits: Limits) -> (SessionEnd, Script) {
    let snapshot = snapshot(host, guest);
    let mut fork = snapshot.fork(host).unwrap();
    let kick = Kick::new().unwrap();
    let mut script = Script::request(limits);
    let (end, _) = Session::new(&snapshot, &mut fork, &mut script, &kick).run().unwrap();
    (end, script)
}

fn exit_frame(code: i32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let report = ExitReport { ending: Ending::Exited(code), wall_ns: 1, cpu_ns: 2, peak_memory: 3 };
    encode(&mut bytes, Kind::Exit, &report.encode());
    bytes
}

#[test]
fn a_fork_goes_on_behind_the_ring_that_froze_it() {
    let Some(host) = host() else { return };
    // If the ring were repeated in the fork, the first stop would be Ready again.
    let snapshot = snapshot(&host, &Asm::default().ready().ring(Ring::Want.encode(7)).ring(Ring::Done.encode(9)));
    let mut fork = snapshot.fork(&host).unwrap();
    assert_eq!(next_stop(&host, &snapshot, &mut fork), Stop::Ring(Ring::Want, 7));
    let stop = fork.machine().run(&mut Console::default(), &mut Exits::default()).unwrap();
    assert_eq!(stop, Stop::Ring(Ring::Done, 9));
}

#[test]
fn two_forks_share_nothing_and_the_image_stays_as_it_was() {
    let Some(host) = host() else { return };
    let snapshot = snapshot(
        &host,
        &Asm::default()
            .store(COUNTER, 40)
            .ready()
            .increment(COUNTER)
            .ring(Ring::Want.encode(0))
            .increment(COUNTER)
            .ring(Ring::Done.encode(0)),
    );
    let (mut a, mut b) = (snapshot.fork(&host).unwrap(), snapshot.fork(&host).unwrap());
    assert_eq!(next_stop(&host, &snapshot, &mut a), Stop::Ring(Ring::Want, 0));
    assert_eq!((word(&mut a, COUNTER), word(&mut b, COUNTER)), (41, 40));
    assert_eq!(next_stop(&host, &snapshot, &mut b), Stop::Ring(Ring::Want, 0));
    b.machine().run(&mut Console::default(), &mut Exits::default()).unwrap();
    assert_eq!((word(&mut a, COUNTER), word(&mut b, COUNTER)), (41, 42));
    let mut image = [0; 2];
    snapshot.image().read(GuestPhys(COUNTER), &mut image).unwrap();
    assert_eq!(u16::from_le_bytes(image), 40);
}

#[test]
fn an_exec_takes_its_request_and_gives_its_output_and_status() {
    let Some(host) = host() else { return };
    let mut out = Vec::new();
    encode(&mut out, Kind::Started, b"");
    encode(&mut out, Kind::Stdout, b"hello");
    encode(&mut out, Kind::Stderr, b"oops");
    let guest = Asm::default().ready().send(Ring::Output, &out).send(Ring::Done, &exit_frame(3));
    let (end, script) = exec(&host, &guest, limits(Duration::from_secs(5)));
    assert_eq!(end, SessionEnd::Done(Ending::Exited(3)));
    let kinds: Vec<_> = script.frames().into_iter().collect();
    assert_eq!(kinds[1], (Kind::Stdout, b"hello".to_vec()));
    assert_eq!(kinds[2], (Kind::Stderr, b"oops".to_vec()));
    assert_eq!(script.ending(), Some(Ending::Exited(3)));
}

#[test]
fn a_guest_that_spins_without_interrupts_is_stopped_at_its_deadline() {
    let Some(host) = host() else { return };
    let wall = Duration::from_millis(30);
    let mut late = Vec::new();
    for _ in 0..5 {
        let snapshot = snapshot(&host, &Asm::default().ready().spin_without_interrupts());
        let mut fork = snapshot.fork(&host).unwrap();
        let kick = Kick::new().unwrap();
        let mut script = Script::request(limits(wall));
        let start = Instant::now();
        let (end, _) = Session::new(&snapshot, &mut fork, &mut script, &kick).run().unwrap();
        assert_eq!(end, SessionEnd::Done(Ending::DeadlinePassed));
        assert_eq!(script.ending(), Some(Ending::DeadlinePassed));
        late.push(start.elapsed().saturating_sub(wall + zeroboot_vm::DEADLINE_GRACE));
    }
    // The machine is shared: the best of five tells what the mechanism does, the worst what the load does.
    assert!(*late.iter().min().unwrap() < Duration::from_millis(30), "{late:?}");
}

#[test]
fn a_kick_that_comes_before_the_guest_is_entered_is_not_lost() {
    let Some(host) = host() else { return };
    let snapshot = snapshot(&host, &Asm::default().ready().spin_without_interrupts());
    let kick = Kick::new().unwrap();
    for micros in [1, 20, 50, 100, 200, 400] {
        let mut fork = snapshot.fork(&host).unwrap();
        kick.after(Duration::from_micros(micros)).unwrap();
        // Long over when the guest is entered.
        std::thread::sleep(Duration::from_millis(1));
        let start = Instant::now();
        assert_eq!(next_stop(&host, &snapshot, &mut fork), Stop::Kicked);
        assert!(start.elapsed() < Duration::from_secs(1));
    }
}

#[test]
fn guests_that_lie_harm_only_themselves() {
    let Some(host) = host() else { return };
    let garbage = [0xffu8; 16];
    let mut early = Vec::new();
    encode(&mut early, Kind::Code, b"not a message");
    for (name, guest) in [
        ("length above the area", Asm::default().ready().ring(Ring::Output.encode(65 * 1024))),
        ("largest length", Asm::default().ready().ring(Ring::Output.encode(0xff_ffff))),
        ("no such bell", Asm::default().ready().ring(0xffff_ff77)),
        ("ready twice", Asm::default().ready().ready()),
        ("garbage", Asm::default().ready().send(Ring::Output, &garbage)),
        ("a frame of the other direction", Asm::default().ready().send(Ring::Output, &early)),
        ("done without a last frame", Asm::default().ready().ring(Ring::Done.encode(0))),
        // `out dx, al`, then `rep outsd`: not the agent's instruction.
        ("a byte", Asm::default().ready().raw(&[0xba]).raw(&DOORBELL_PORT.to_le_bytes()).raw(&[0xee])),
        (
            "a string",
            Asm::default().ready().raw(&[0xba]).raw(&DOORBELL_PORT.to_le_bytes()).raw(&[0xb9, 4, 0, 0x66, 0xf3, 0x6f]),
        ),
    ] {
        let (end, script) = exec(&host, &guest, limits(Duration::from_secs(5)));
        assert_eq!(end, SessionEnd::Done(Ending::Crashed), "{name}");
        assert_eq!(script.ending(), Some(Ending::Crashed), "{name}");
    }
}

#[test]
fn a_guest_that_rings_for_ever_is_stopped_at_its_deadline() {
    let Some(host) = host() else { return };
    // inc ax would change the value: jump back to the ring. 12 bytes: mov dx (3), mov eax (6), out (2).
    let guest = Asm::default().ready().ring(Ring::Want.encode(0)).raw(&[0xeb, 0xf3]);
    let (end, _) = exec(&host, &guest, limits(Duration::from_millis(50)));
    assert_eq!(end, SessionEnd::Done(Ending::DeadlinePassed));
}

/// A front that has something to say later, or leaves without a word.
struct Later {
    script: Script,
    at: Instant,
    then: Option<Vec<u8>>,
    leaves: bool,
}

impl Front for Later {
    fn receive(&mut self, into: &mut Vec<u8>, wait: bool) -> io::Result<Received> {
        if Instant::now() >= self.at {
            self.script.input.extend(self.then.take());
            self.script.gone = self.leaves;
        }
        self.script.receive(into, wait)
    }
    fn gone(&mut self) -> io::Result<bool> {
        Ok(self.leaves && Instant::now() >= self.at)
    }
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.script.send(bytes)
    }
}

#[test]
fn a_guest_that_sleeps_is_woken_for_input_that_comes_while_it_runs() {
    let Some(host) = host() else { return };
    let guest = Asm::default().hears_the_wake_line().ready().takes_all(false).send(Ring::Done, &exit_frame(0));
    let snapshot = snapshot(&host, &guest);
    let mut fork = snapshot.fork(&host).unwrap();
    let mut stdin = Vec::new();
    encode(&mut stdin, Kind::Stdin, b"a line\n");
    let after = Duration::from_millis(30);
    let mut front = Later {
        script: Script::request(limits(Duration::from_secs(20))),
        at: Instant::now() + after,
        then: Some(stdin.clone()),
        leaves: false,
    };
    // As the socket's signal.
    let (kick, arrival) = (Kick::new().unwrap(), Kick::new().unwrap());
    arrival.after(after).unwrap();
    let start = Instant::now();
    let (end, stats) = Session::new(&snapshot, &mut fork, &mut front, &kick).run().unwrap();
    assert_eq!(end, SessionEnd::Done(Ending::Exited(0)));
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert_eq!((word(&mut fork, COUNTER) as usize, stats.raised), (stdin.len(), 1));
}

#[test]
fn a_guest_that_sleeps_with_bytes_left_is_woken_until_it_has_all() {
    let Some(host) = host() else { return };
    let guest = Asm::default().hears_the_wake_line().ready().takes_all(true).send(Ring::Done, &exit_frame(0));
    let snapshot = snapshot(&host, &guest);
    let mut fork = snapshot.fork(&host).unwrap();
    let mut script = Script::request(limits(Duration::from_secs(20)));
    let request = script.input[0].len();
    let mut stdin = Vec::new();
    encode(&mut stdin, Kind::Stdin, &[b'x'; 200_000]);
    script.input[0].extend(&stdin);
    let (end, stats) = Session::new(&snapshot, &mut fork, &mut script, &Kick::new().unwrap()).run().unwrap();
    assert_eq!(end, SessionEnd::Done(Ending::Exited(0)));
    let taken = fork.machine().memory().read_u32(GuestPhys(COUNTER)).unwrap() as usize;
    // Four pieces: the first was there at the entry, and one interrupt went ahead of each other.
    assert_eq!((taken, stats.raised), (request + stdin.len(), 3));
}

#[test]
fn a_line_that_is_raised_before_the_first_entry_is_not_lost() {
    let Some(host) = host() else { return };
    let snapshot = snapshot(
        &host,
        &Asm::default().hears_the_wake_line().ready().raw(&[0xfb, 0xf4, 0xfa]).ring(Ring::Done.encode(1)),
    );
    for times in [1, 3] {
        let mut fork = snapshot.fork(&host).unwrap();
        for _ in 0..times {
            assert!(fork.wake().unwrap());
        }
        let kick = Kick::new().unwrap();
        kick.after(Duration::from_secs(20)).unwrap();
        assert_eq!(next_stop(&host, &snapshot, &mut fork), Stop::Ring(Ring::Done, 1));
    }
}

#[test]
fn a_guest_that_turned_its_apic_off_does_not_hear_and_harms_only_itself() {
    let Some(host) = host() else { return };
    let off = |asm: Asm| asm.spin_without_interrupts();
    for (name, guest) in [
        ("by its spurious vector register", off(Asm::default().hears_the_wake_line().ready().wrmsr(0x80f, 0xff))),
        ("as a whole", off(Asm::default().hears_the_wake_line().ready().wrmsr(0x1b, 0xfee0_0000))),
    ] {
        let snapshot = snapshot(&host, &guest);
        let mut fork = snapshot.fork(&host).unwrap();
        let mut script = Script::request(limits(Duration::from_millis(50)));
        let mut stdin = Vec::new();
        encode(&mut stdin, Kind::Stdin, &[b'x'; 100_000]);
        script.input[0].extend(&stdin);
        let (end, stats) = Session::new(&snapshot, &mut fork, &mut script, &Kick::new().unwrap()).run().unwrap();
        assert_eq!(stats.raised, 1, "{name}");
        assert_eq!(end, SessionEnd::Done(Ending::DeadlinePassed), "{name}");
        assert!(!fork.wake().unwrap(), "{name}");
    }
}

/// Limits, identity, an environment and `Live`, and a command on channel 7.
fn live_request() -> Vec<u8> {
    let mut bytes = Script::request(limits(Duration::from_millis(1))).input.remove(0).unwrap();
    // In the place of `Code` and `Run`.
    bytes.truncate(bytes.len() - 2 * zeroboot_proto::HEADER_LEN - b"the code".len());
    encode(&mut bytes, Kind::Env, b"NAME\0value");
    encode(&mut bytes, Kind::Live, b"");
    encode_on(&mut bytes, 7, Kind::Arg, b"true");
    let command = live::Open::Command { cwd: None, terminal: None, stdin: true, timeout_ns: u64::MAX };
    encode_on(&mut bytes, 7, Kind::Open, &live::encode(&command));
    bytes
}

/// Forks a guest and lets it live.
fn live(host: &Host, guest: &Asm) -> (SessionEnd, Script) {
    let snapshot = snapshot(host, guest);
    let mut fork = snapshot.fork(host).unwrap();
    let mut script = Script { input: [live_request()].into(), ..Script::default() };
    let kick = Kick::new().unwrap();
    let (end, _) = Session::new(&snapshot, &mut fork, &mut script, &kick).run().unwrap();
    (end, script)
}

fn on(channel: u16, kind: Kind, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_on(&mut bytes, channel, kind, payload);
    bytes
}

/// A guest that says that it lives.
fn alive() -> Asm {
    Asm::default().ready().send(Ring::Output, &on(0, Kind::Started, b""))
}

impl Asm {
    /// The keyboard controller's reset.
    fn reset(self) -> Asm {
        self.raw(&[0xb0, 0xfe, 0xe6, 0x64])
    }
    /// The same ring again and again: `mov dx, mov eax, out` are 11 bytes.
    fn ring_for_ever(self, value: u32) -> Asm {
        self.ring(value).raw(&[0xeb, 0xf3])
    }
}

#[test]
fn a_guest_that_lives_is_heard_on_its_channels_up_to_its_crash() {
    let Some(host) = host() else { return };
    let end = live::encode(&End { how: How::Exited(0), wall_ns: 1, context_lost: false });
    let frames = [on(7, Kind::Started, &[1, 0, 0, 0]), on(7, Kind::Stdout, b"out"), on(7, Kind::End, &end)].concat();
    let (session, script) = live(&host, &alive().send(Ring::Output, &frames).reset());
    assert_eq!(session, SessionEnd::Crashed);
    let heard = script.all_frames();
    let kinds: Vec<_> = heard.iter().map(|(channel, kind, _)| (*channel, *kind)).collect();
    let expected = [(0, Kind::Started), (7, Kind::Started), (7, Kind::Stdout), (7, Kind::End), (0, Kind::Crash)];
    assert_eq!(kinds, expected);
    assert_eq!(heard[2].2, b"out");
    assert!(String::from_utf8_lossy(&heard[4].2).contains("it shut down"));
}

#[test]
fn guests_that_live_and_lie_harm_only_themselves() {
    let Some(host) = host() else { return };
    let says = |frames: Vec<u8>| alive().send(Ring::Output, &frames);
    // A whole area's frame, again and again.
    let full = Ring::Output.encode(MAX_PAYLOAD as u32 + 8);
    let flood = alive()
        .store(FROM_GUEST, MAX_PAYLOAD as u16)
        .store(FROM_GUEST + 2, 0)
        .store(FROM_GUEST + 4, Kind::Stdout as u16)
        .store(FROM_GUEST + 6, 7)
        .ring_for_ever(full);
    for (name, guest, why) in [
        ("another channel", says(on(8, Kind::Stdout, b"x")), "channel 8 that is not open"),
        ("a channel of its own choice", says(on(0x8007, Kind::Stdout, b"x")), "channel 32775 that is not open"),
        ("an exec's end", says(on(0, Kind::Exit, &[0; 29])), "Exit frame out of order"),
        ("an exec's end on a channel", says(on(7, Kind::Exit, &[0; 29])), "Exit frame of channel 7 out of order"),
        ("an exec's output", says(on(0, Kind::Stdout, b"x")), "Stdout frame out of order"),
        ("its worker's word", says(on(0, Kind::Crash, b"x")), "Crash frame out of order"),
        ("a frame of the other direction", says(on(7, Kind::Stdin, b"x")), "Stdin frame of channel 7 out of order"),
        ("to live twice", says(on(0, Kind::Started, b"")), "Started frame out of order"),
        ("a malformed end", says(on(7, Kind::End, &[0xff; 9])), "End frame of channel 7 that is malformed"),
        ("more than its credit", flood, "Stdout frame of channel 7 beyond its credit"),
        ("garbage", says(vec![0xff; 16]), "payload of 4294967295 bytes"),
        ("a length above the area", alive().ring(Ring::Output.encode(65 * 1024)), "65 * 1024 = 66560"),
        ("ready again", alive().ready(), "Ready"),
        ("done", alive().ring(Ring::Done.encode(0)), "held no end"),
        ("no such bell", alive().ring(0xffff_ff77), "it broke"),
    ] {
        let (end, script) = live(&host, &guest);
        assert_eq!(end, SessionEnd::Crashed, "{name}");
        let heard = script.all_frames();
        let (channel, kind, payload) = heard.last().unwrap();
        let said = String::from_utf8_lossy(payload);
        assert_eq!((*channel, *kind), (0, Kind::Crash), "{name}: {said}");
        assert!(why.split(" = ").any(|why| said.contains(why)), "{name}: {said}");
        // Nothing of what was wrong went on.
        let allowed = if name == "more than its credit" { 5 } else { 0 };
        let kinds: Vec<_> = heard.iter().map(|(channel, kind, _)| (*channel, *kind)).collect();
        assert_eq!(kinds.len(), 2 + allowed, "{name}: {kinds:?}");
    }
}

#[test]
fn a_guest_that_does_not_come_to_live_is_a_failure() {
    let Some(host) = host() else { return };
    for (guest, crash) in [
        (Asm::default().ready().send(Ring::Output, &on(7, Kind::Stdout, b"early")), true),
        (Asm::default().ready().reset(), true),
        (Asm::default().ready().send(Ring::Done, &on(0, Kind::Failure, b"cannot live")), false),
    ] {
        let (end, script) = live(&host, &guest);
        assert_eq!(end, SessionEnd::Failed);
        let heard = script.all_frames();
        let kinds: Vec<_> = heard.iter().map(|(channel, kind, _)| (*channel, *kind)).collect();
        let expected = if crash { vec![(0, Kind::Crash), (0, Kind::Failure)] } else { vec![(0, Kind::Failure)] };
        assert_eq!(kinds, expected);
        assert!(crash || heard[0].2 == b"cannot live");
    }
}

#[test]
fn only_a_guest_that_does_not_come_to_live_has_a_deadline() {
    let Some(host) = host() else { return };
    let (setup, whole) = (Duration::from_millis(50), Duration::from_millis(300));
    for (guest, expected) in [
        (Asm::default().ready().spin_without_interrupts(), SessionEnd::Failed),
        (Asm::default().ready().ring_for_ever(Ring::Output.encode(0)), SessionEnd::Failed),
        (alive().spin_without_interrupts(), SessionEnd::FrontGone),
        (alive().ring_for_ever(Ring::Output.encode(0)), SessionEnd::FrontGone),
    ] {
        let snapshot = snapshot(&host, &guest);
        let mut fork = snapshot.fork(&host).unwrap();
        let script = Script { input: [live_request()].into(), ..Script::default() };
        let mut front = Later { script, at: Instant::now() + whole, then: None, leaves: true };
        // As the socket's signal.
        let (kick, departure) = (Kick::new().unwrap(), Kick::new().unwrap());
        departure.after(whole).unwrap();
        let start = Instant::now();
        let session = Session::new(&snapshot, &mut fork, &mut front, &kick).with_setup_timeout(setup);
        let (end, _) = session.run().unwrap();
        assert_eq!(end, expected);
        let long = start.elapsed() >= whole;
        assert_eq!(long, expected == SessionEnd::FrontGone, "{:?}", start.elapsed());
    }
}

/// Three guests that keep the worker busy, and one that takes nothing of what it is sent: the front's departure is seen, and
/// what it says is taken.
#[test]
fn no_guest_keeps_its_front_from_being_heard() {
    let Some(host) = host() else { return };
    let after = Duration::from_millis(50);
    let large = on(7, Kind::Stdin, &[b'x'; 400_000]);
    for (name, guest, input) in [
        ("output", alive().ring_for_ever(Ring::Output.encode(0)), Vec::new()),
        ("wants", alive().ring_for_ever(Ring::Want.encode(0)), Vec::new()),
        ("port accesses", alive().raw(&[0xe4, 0x70, 0xeb, 0xfc]), Vec::new()),
        ("takes nothing", alive().spin_without_interrupts(), large.clone()),
        ("takes nothing and rings", alive().ring_for_ever(Ring::Output.encode(0)), large),
    ] {
        let snapshot = snapshot(&host, &guest);
        let mut fork = snapshot.fork(&host).unwrap();
        let script = Script { input: [live_request(), input].into(), ..Script::default() };
        let mut front = Later { script, at: Instant::now() + after, then: None, leaves: true };
        let (kick, departure) = (Kick::new().unwrap(), Kick::new().unwrap());
        departure.after(after).unwrap();
        let start = Instant::now();
        let (end, _) = Session::new(&snapshot, &mut fork, &mut front, &kick).run().unwrap();
        assert_eq!(end, SessionEnd::FrontGone, "{name}");
        assert!(start.elapsed() < Duration::from_secs(5), "{name}: {:?}", start.elapsed());
    }
    // And what it says: a guest that rings all the time gets it by its next `Want`, by the wake line in between.
    let guest = Asm::default().hears_the_wake_line().ready().send(Ring::Output, &on(0, Kind::Started, b""));
    let snapshot = snapshot(&host, &guest.takes_all(false).reset());
    let mut fork = snapshot.fork(&host).unwrap();
    let stdin = on(7, Kind::Stdin, b"a line\n");
    let script = Script { input: [live_request()].into(), ..Script::default() };
    let mut front = Later { script, at: Instant::now() + after, then: Some(stdin.clone()), leaves: false };
    let (kick, arrival) = (Kick::new().unwrap(), Kick::new().unwrap());
    arrival.after(after).unwrap();
    let (end, stats) = Session::new(&snapshot, &mut fork, &mut front, &kick).run().unwrap();
    assert_eq!((end, stats.raised), (SessionEnd::Crashed, 1));
    assert_eq!(usize::from(word(&mut fork, COUNTER)), stdin.len());
}

#[test]
fn a_sandbox_without_an_identity_never_lives() {
    let Some(host) = host() else { return };
    let snapshot = snapshot(&host, &alive().reset());
    for kind in [Kind::Identity, Kind::Limits] {
        let mut decoder = Decoder::new();
        decoder.feed(&live_request());
        let mut bytes = Vec::new();
        while let Some(Frame { channel, kind: found, payload }) = decoder.next_on_any().unwrap() {
            if found != kind {
                encode_on(&mut bytes, channel, found, payload);
            }
        }
        let mut fork = snapshot.fork(&host).unwrap();
        let mut script = Script { input: [bytes].into(), ..Script::default() };
        assert!(Session::new(&snapshot, &mut fork, &mut script, &Kick::new().unwrap()).run().is_err(), "{kind:?}");
        assert!(script.heard.is_empty());
    }
}

#[test]
fn a_triple_fault_and_a_reset_are_a_crash_at_once() {
    let Some(host) = host() else { return };
    // lidt [zero limit]; int3 cannot be delivered.
    let reset = Asm::default().ready().raw(&[0xb0, 0xfe, 0xe6, 0x64]);
    let start = Instant::now();
    let (end, _) = exec(&host, &reset, limits(Duration::from_secs(20)));
    assert_eq!(end, SessionEnd::Done(Ending::Crashed));
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn output_beyond_the_limit_is_cut_there_and_ends_the_run() {
    let Some(host) = host() else { return };
    let mut out = Vec::new();
    encode(&mut out, Kind::Stdout, &[b'x'; 60]);
    // 60 bytes again and again: the 17th is cut.
    let mut guest = Asm::default().ready().send(Ring::Output, &out);
    let ring = Asm::default().ring(Ring::Output.encode(out.len() as u32));
    guest = guest.raw(&ring.0).raw(&[0xeb, 0x100u16.wrapping_sub(ring.0.len() as u16 + 2) as u8]);
    let (end, script) = exec(&host, &guest, limits(Duration::from_secs(5)));
    assert_eq!(end, SessionEnd::Done(Ending::OutputLimit));
    let total: usize = script.frames().iter().filter(|(kind, _)| *kind == Kind::Stdout).map(|(_, p)| p.len()).sum();
    assert_eq!(total, 1000);
}

#[test]
fn a_request_reaches_the_guest_with_the_time_of_now() {
    let Some(host) = host() else { return };
    let snapshot = snapshot(&host, &Asm::default().ready().send(Ring::Done, &exit_frame(0)));
    let mut fork = snapshot.fork(&host).unwrap();
    let mut script = Script::request(limits(Duration::from_secs(5)));
    let before = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    Session::new(&snapshot, &mut fork, &mut script, &Kick::new().unwrap()).run().unwrap();
    let len = fork.machine().memory().read_u32(GuestPhys(HEADER + 0x800)).unwrap();
    let mut bytes = vec![0; len as usize];
    fork.machine().memory().read(GuestPhys(TO_GUEST), &mut bytes).unwrap();
    let mut decoder = Decoder::new();
    decoder.feed(&bytes);
    let (kind, payload) = decoder.next_frame().unwrap().unwrap();
    assert_eq!(kind, Kind::Identity);
    let identity = Identity::decode(payload).unwrap();
    assert!(identity.realtime_ns >= before && identity.realtime_ns < before + 10_000_000_000);
    assert_eq!(identity.entropy, [1; 64]);
}

#[test]
fn code_without_an_identity_never_reaches_a_guest() {
    let Some(host) = host() else { return };
    let snapshot = snapshot(&host, &Asm::default().ready().send(Ring::Done, &exit_frame(0)));
    let mut fork = snapshot.fork(&host).unwrap();
    let mut bytes = Vec::new();
    encode(&mut bytes, Kind::Limits, &limits(Duration::from_secs(1)).encode());
    encode(&mut bytes, Kind::Run, b"");
    let mut script = Script { input: [bytes].into(), ..Script::default() };
    assert!(Session::new(&snapshot, &mut fork, &mut script, &Kick::new().unwrap()).run().is_err());
    assert!(script.heard.is_empty());
}

#[test]
fn every_piece_of_state_comes_back() {
    let Some(host) = host() else { return };
    let (mut machine, memory, stop) = boot(&host, &Asm::default().ready().ring(Ring::Done.encode(0)));
    let Stop::Ring(_, argument) = stop else { panic!("{stop:?}") };
    // Values that a fresh vCPU does not have.
    machine.vcpu().complete_io().unwrap();
    let vcpu = machine.vcpu();
    let mut regs = vcpu.regs().unwrap();
    (regs.rbx, regs.r15) = (0x1234_5678_9abc_def0, 0xfeed_face_cafe_beef);
    vcpu.set_regs(&regs).unwrap();
    let mut sregs = vcpu.sregs().unwrap();
    sregs.base.cr2 = 0xdead_b000;
    vcpu.set_sregs(&sregs).unwrap();
    let mut debug = vcpu.debug_regs().unwrap();
    debug.db[0] = 0x1111_2222;
    vcpu.set_debug_regs(&debug).unwrap();
    let mut lapic = vcpu.lapic().unwrap();
    // Task priority.
    lapic.regs[0x80] = 0x20;
    vcpu.set_lapic(&lapic).unwrap();
    let mut xsave = vcpu.xsave().unwrap();
    // XMM0, and the header's bit that says that it is there.
    xsave[160..176].copy_from_slice(&[0xa5; 16]);
    xsave[512] |= 2;
    vcpu.set_xsave(&xsave).unwrap();
    // The task priority is CR8 as well.
    let sregs = vcpu.sregs().unwrap();
    let before = (regs, sregs, debug, lapic.regs[0x80], vcpu.msr(0x10).unwrap().unwrap());
    let snapshot = Snapshot::freeze(&host, machine, memory, argument, vector()).unwrap();

    let mut fork = snapshot.fork(&host).unwrap();
    snapshot.start_clocks(&fork).unwrap();
    let vcpu = fork.machine().vcpu();
    assert_eq!(vcpu.regs().unwrap(), before.0);
    assert_eq!(vcpu.sregs().unwrap(), before.1);
    assert_eq!(vcpu.debug_regs().unwrap(), before.2);
    assert_eq!(vcpu.lapic().unwrap().regs[0x80], before.3);
    assert_eq!(vcpu.xsave().unwrap()[160..176], [0xa5; 16]);
    assert_eq!(
        vcpu.xcrs().unwrap().map(|x| x.xcrs[0].value),
        snapshot.fork(&host).unwrap().machine().vcpu().xcrs().unwrap().map(|x| x.xcrs[0].value)
    );
    // The clock stood still while frozen, and goes on: it is behind a clock that had gone on all the time.
    let tsc = vcpu.msr(0x10).unwrap().unwrap();
    assert!(tsc >= before.4 && tsc < before.4 + 3_000_000_000, "{} {tsc}", before.4);
}

/// KVM gives some MSRs that it does not take: IA32_PERF_STATUS on every host, IA32_PERF_CAPABILITIES of a guest without
/// performance counters on Intel's. With such a one in the state no fork is possible.
#[test]
fn an_msr_that_no_fork_takes_is_left_out_if_a_fork_has_its_value_and_named_if_not() {
    const PERF_STATUS: u32 = 0x198;
    let Some(host) = host() else { return };
    let snapshot = snapshot(&host, &Asm::default().ready().ring(Ring::Done.encode(0)));
    let state = snapshot.state();
    let mut fork = snapshot.fork(&host).unwrap();
    let vcpu = fork.machine().vcpu();
    let value = vcpu.msr(PERF_STATUS).unwrap().expect("every KVM has IA32_PERF_STATUS");
    assert!(!vcpu.set_msr(PERF_STATUS, value).unwrap(), "this KVM takes IA32_PERF_STATUS");

    let tried = state.clone().with_msr(PERF_STATUS, value).tried(&host, MiB(1)).unwrap();
    // Where KVM has a virtual PMU the state itself has left one out.
    let left_out = [state.left_out(), &[PERF_STATUS]].concat();
    assert_eq!((tried.msrs(), tried.left_out()), (state.msrs(), &left_out[..]));
    let error = state.clone().with_msr(PERF_STATUS, value + 1).tried(&host, MiB(1)).unwrap_err().to_string();
    assert!(error.contains("MSR 0x198") && error.contains(&format!("{:#x}", value + 1)), "{error}");
    // One that does not exist can be read nowhere.
    let error = state.clone().with_msr(0x4fff_fff0, 1).tried(&host, MiB(1)).unwrap_err().to_string();
    assert!(error.contains("MSR 0x4ffffff0") && error.contains("does not have it"), "{error}");
}

/// Linux before 6.7 takes a TSC of user space that is about as old as the vCPU for the vCPU's own.
#[test]
fn a_forks_tsc_begins_where_the_snapshots_ended_however_long_the_fork_waits() {
    let Some(host) = host() else { return };
    let guest = Asm::default().ready().ring(Ring::Done.encode(0));
    let far = 1 << 60;
    let (mut other, ..) = boot(&host, &guest);
    other.vcpu().set_msrs(&MsrTable::new(&[(0x10, far)]).unwrap()).unwrap();
    if other.vcpu().msr(0x10).unwrap().unwrap() < far {
        eprintln!("skipped: this KVM's guests have the host's TSC");
        return;
    }
    let (mut machine, memory, stop) = boot(&host, &guest);
    let Stop::Ring(_, argument) = stop else { panic!("{stop:?}") };
    machine.vcpu().complete_io().unwrap();
    let khz = u64::from(machine.vcpu().tsc_khz().unwrap());
    // No more than this host's own clock says, and a millisecond for the difference of their rates.
    let ticks = |since: Instant| khz * (since.elapsed().as_micros() as u64 + 1000) / 1000;
    let freezing = Instant::now();
    let frozen = machine.vcpu().msr(0x10).unwrap().unwrap();
    let snapshot = Snapshot::freeze(&host, machine, memory, argument, vector()).unwrap();
    let saved_by = frozen + ticks(freezing);
    for wait in [0, 700] {
        let mut fork = snapshot.fork(&host).unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        let starting = Instant::now();
        snapshot.start_clocks(&fork).unwrap();
        let tsc = fork.machine().vcpu().msr(0x10).unwrap().unwrap();
        let at_most = saved_by + ticks(starting);
        assert!(tsc >= frozen && tsc <= at_most, "after {wait} ms: {frozen} {tsc} {at_most}");
    }
}

#[test]
fn a_saved_snapshot_loads_forks_and_is_refused_when_damaged() {
    let Some(host) = host() else { return };
    let snapshot =
        snapshot(&host, &Asm::default().store(COUNTER, 77).ready().increment(COUNTER).ring(Ring::Done.encode(0)));
    let dir = tempfile::tempdir().unwrap();
    let facts = snapshot.save(dir.path()).unwrap();
    assert!(facts.memory_stored_bytes < facts.memory_bytes);
    // The store's manifest has the engine's hash in it, and computes its own where it has none.
    let image = std::fs::File::open(dir.path().join("memory.img")).unwrap();
    assert_eq!(zeroboot_template::memory_hash(&image).unwrap(), facts.memory_blake3);
    let loaded = Snapshot::load(&host, dir.path()).unwrap();
    let mut fork = loaded.fork(&host).unwrap();
    assert_eq!(next_stop(&host, &loaded, &mut fork), Stop::Ring(Ring::Done, 0));
    assert_eq!(word(&mut fork, COUNTER), 78);

    let state = dir.path().join("state.bin");
    let good = std::fs::read(&state).unwrap();
    let refused = |bytes: &[u8]| {
        std::fs::write(&state, bytes).unwrap();
        Snapshot::load(&host, dir.path()).unwrap_err().to_string()
    };
    for cut in [0, 1, 7, 8, 12, 40, 48, good.len() / 2, good.len() - 1] {
        assert!(refused(&good[..cut]).contains("damaged"), "{cut}");
    }
    for at in (0..good.len()).step_by(211).chain([8]) {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        let text = refused(&bad);
        assert!(text.contains("damaged") || text.contains("version"), "{at}: {text}");
    }
    assert!(refused(&[&good[..], b"x"].concat()).contains("longer"));
    std::fs::write(&state, &good).unwrap();

    let memory = dir.path().join("memory.img");
    let image = std::fs::read(&memory).unwrap();
    let mut bad = image.clone();
    bad[CODE as usize] ^= 1;
    std::fs::write(&memory, &bad).unwrap();
    assert!(Snapshot::load(&host, dir.path()).unwrap_err().to_string().contains("checksum"));
    std::fs::write(&memory, &image[..image.len() - 4096]).unwrap();
    assert!(Snapshot::load(&host, dir.path()).unwrap_err().to_string().contains("length"));
    // Zero pages that are stored instead of holes are the same memory.
    std::fs::write(&memory, &image).unwrap();
    Snapshot::load(&host, dir.path()).unwrap();
}

/// Descriptors and mappings of this process.
fn resources() -> (usize, usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    (
        std::fs::read_dir("/proc/self/fd").unwrap().count(),
        maps.lines().filter(|l| l.contains("zeroboot-image") || l.contains("kvm")).count(),
    )
}

#[test]
fn thousands_of_forks_that_end_or_fail_leave_nothing_behind() {
    let _alone = lock();
    let Some(host) = host() else { return };
    let snapshot = snapshot(&host, &Asm::default().ready().ring(Ring::Done.encode(0)));
    // A state that the kernel refuses half way: the machine exists by then.
    let broken = snapshot.with_refused_state().unwrap();
    let before = resources();
    let start = Instant::now();
    let (mut good, mut failed) = (0, 0);
    let wanted = std::env::var("ZEROBOOT_FORKS").ok().and_then(|v| v.parse().ok()).unwrap_or(10_000);
    while good + failed < wanted && start.elapsed() < Duration::from_secs(40) {
        let mut fork = snapshot.fork(&host).unwrap();
        assert_eq!(next_stop(&host, &snapshot, &mut fork), Stop::Ring(Ring::Done, 0));
        drop(fork);
        broken.fork(&host).unwrap_err();
        (good, failed) = (good + 1, failed + 1);
    }
    eprintln!("{good} forks and {failed} failed ones in {:.1} s", start.elapsed().as_secs_f32());
    // Other tests of this binary come and go; what a leak would leave is thousands.
    let after = resources();
    assert!(after.0 < before.0 + 100 && after.1 < before.1 + 100, "{before:?} {after:?}");
}

#[test]
fn the_probe_forks_its_guest_and_notices_a_state_that_a_fork_does_not_take() {
    let Some(host) = host() else { return };
    zeroboot_vm::restores(&host).unwrap();
    let reason = zeroboot_vm::restores_altered(&host, |state| state.with_msr(0x198, 1)).unwrap_err();
    assert!(reason.contains("refuses MSR 0x198"), "{reason}");
    // What doctor and `auto` say then.
    let probe = zeroboot_vm::KvmProbe::NoRestore { reason };
    assert!(probe.verdict().unwrap_err().contains("does not restore one that it saved: KVM_SET_MSRS failed"));
    assert!(probe.mend().unwrap().contains("--engine process"));
}

#[test]
fn the_probe_says_what_this_kvm_is_in_a_moment() {
    let Some(_host) = host() else { return };
    let start = Instant::now();
    let found = zeroboot_vm::probe();
    let took = start.elapsed();
    eprintln!("{found:?} in {took:?}");
    assert!(took < Duration::from_millis(500));
    // In the nested lane KVM is the hardware kind; on a host with the software backend it is not.
    if std::env::var_os("ZEROBOOT_NESTED").is_some() {
        assert!(matches!(found, zeroboot_vm::KvmProbe::Works { .. }), "{found:?}");
    }
    if std::path::Path::new("/sys/module/kvm_pvm").exists() {
        assert!(matches!(found, zeroboot_vm::KvmProbe::SoftwareOnly { .. }), "{found:?}");
        assert!(found.verdict().is_err());
    }
}
