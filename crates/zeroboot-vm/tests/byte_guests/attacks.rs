//! Guests that do to their machine what they can: every part of it that a guest reaches, in each mode of its CPU. What comes
//! of it is their own: an end that the test names, and a host that makes the next sandbox as before.

use super::*;

/// Where [`prologue`] puts things.
const GDT: u16 = 0x1008;
const GDTR: u16 = 0x1028;
const NO_IDT: u16 = 0x102e;
/// Skips the instruction of two bytes that could not be done.
const SKIPS_TWO: u16 = 0x1034;
/// Page tables, beside what the mailbox uses.
const TABLES: u64 = 0x6000;
/// Selectors: flat code and data of 32 bits, code of 64.
const CODE_32: u16 = 0x08;
const DATA: u16 = 0x10;
const CODE_64: u16 = 0x18;

impl Asm {
    fn words(self, words: &[u16]) -> Asm {
        words.iter().fold(self, |asm, word| asm.raw(&word.to_le_bytes()))
    }
    /// `cli; lgdt; lidt` of nothing; then protected mode with flat segments. What follows is code of 32 bits.
    fn protected(self) -> Asm {
        let asm = self.raw(&[0xfa, 0x0f, 0x01, 0x16]).words(&[GDTR]).raw(&[0x0f, 0x01, 0x1e]).words(&[NO_IDT]);
        // mov eax, cr0; or eax, 1; mov cr0, eax
        let asm = asm.raw(&[0x0f, 0x20, 0xc0, 0x66, 0x83, 0xc8, 0x01, 0x0f, 0x22, 0xc0]);
        let next = CODE as u32 + asm.0.len() as u32 + 8;
        let asm = asm.raw(&[0x66, 0xea]).raw(&next.to_le_bytes()).words(&[CODE_32]);
        // mov ax, data; mov ds, ax; mov es, ax; mov ss, ax
        asm.raw(&[0x66, 0xb8]).words(&[DATA]).raw(&[0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0])
    }
    /// From protected mode: pages by [`TABLES`], with these bits of CR4.
    fn paged(self, cr4: u8) -> Asm {
        let asm = self.raw(&[0x0f, 0x20, 0xe0, 0x83, 0xc8, cr4, 0x0f, 0x22, 0xe0]);
        let asm = asm.raw(&[0xb8]).raw(&(TABLES as u32).to_le_bytes()).raw(&[0x0f, 0x22, 0xd8]);
        // mov eax, cr0; or eax, PG; mov cr0, eax; jmp to the next
        asm.raw(&[0x0f, 0x20, 0xc0, 0x0d, 0, 0, 0, 0x80, 0x0f, 0x22, 0xc0, 0xeb, 0])
    }
    /// From real mode: long mode. What follows is code of 64 bits.
    fn long(self) -> Asm {
        let asm = self.store(TABLES, 0x8003).store(0x8000, 0x9003).store(0x9000, 0x0083).protected();
        // mov ecx, EFER; rdmsr; or eax, LME; wrmsr
        let asm = asm.raw(&[0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32, 0x0d, 0, 1, 0, 0, 0x0f, 0x30]).paged(0x20);
        let next = CODE as u32 + asm.0.len() as u32 + 7;
        asm.raw(&[0xea]).raw(&next.to_le_bytes()).words(&[CODE_64])
    }
    /// Rings in protected or long mode.
    fn ring_wide(self, value: u32) -> Asm {
        self.raw(&[0x66, 0xba]).words(&[DOORBELL_PORT]).raw(&[0xb8]).raw(&value.to_le_bytes()).raw(&[0xef])
    }
    /// Reads and writes ports from `first` on, `step` apart, except for the doorbell, while `again` (a jump's opcode behind
    /// the sum, or behind a test) says so.
    fn ports(self, first: u16, step: u8, again: &[u8]) -> Asm {
        let asm = self.raw(&[0xba]).words(&[first]);
        let begin = asm.0.len();
        let asm = asm.raw(&[0x81, 0xfa]).words(&[DOORBELL_PORT]).raw(&[0x74, 9]);
        // in al, dx; out dx, al; in eax, dx; mov ax, 1234h; out dx, eax
        let asm = asm.raw(&[0xec, 0xee, 0x66, 0xed, 0xb8, 0x34, 0x12, 0x66, 0xef]);
        let asm = asm.raw(&[0x83, 0xc2, step]).raw(again);
        let back = (begin as i32 - asm.0.len() as i32 - 1) as i8;
        asm.raw(&back.to_le_bytes())
    }
    /// Reads each of these MSRs, writes what it read, and its opposite.
    fn msrs(self, first: u32, end: u32) -> Asm {
        let asm = self.raw(&[0x66, 0xb9]).raw(&first.to_le_bytes());
        asm.raw(&[0x0f, 0x32, 0x0f, 0x30, 0x66, 0xf7, 0xd0, 0x0f, 0x30, 0x66, 0x41])
            .raw(&[0x66, 0x81, 0xf9])
            .raw(&end.to_le_bytes())
            .raw(&[0x75, 0xec])
    }
    fn cpuid(self, first: u32, end: u32) -> Asm {
        let asm = self.raw(&[0x66, 0xbe]).raw(&first.to_le_bytes());
        // mov eax, esi; xor ecx, ecx; cpuid; mov eax, esi; mov ecx, 5; cpuid; inc esi; cmp esi, end; jne
        asm.raw(&[0x66, 0x89, 0xf0, 0x66, 0x31, 0xc9, 0x0f, 0xa2])
            .raw(&[0x66, 0x89, 0xf0, 0x66, 0xb9, 5, 0, 0, 0, 0x0f, 0xa2, 0x66, 0x46])
            .raw(&[0x66, 0x81, 0xfe])
            .raw(&end.to_le_bytes())
            .raw(&[0x75, 0xe2])
    }
    /// Writes ones over the mailbox's header, both tables of areas included.
    fn rewrites_its_mailbox(self) -> Asm {
        let words = (TABLE_AT + 16 * AREA_PAGES) as u64 / 2;
        // mov di, header; mov cx, words; mov ax, -1; cld; rep stosw
        self.raw(&[0xbf])
            .words(&[HEADER as u16])
            .raw(&[0xb9])
            .words(&[words as u16])
            .raw(&[0xb8, 0xff, 0xff, 0xfc, 0xf3, 0xab])
    }
}

/// Descriptors and a handler; then a run that has started and whose end is written and only has to be rung.
fn prologue() -> Asm {
    let flat = |access: u16, flags: u16| [0xffff, 0, access << 8, flags << 4 | 0xf];
    let mut asm = Asm::default().raw(&[0xe9, 0x3d, 0]).raw(&[0; 5]);
    assert_eq!(CODE as usize + asm.0.len(), usize::from(GDT));
    for descriptor in [[0; 4], flat(0x9a, 0xc), flat(0x92, 0xc), flat(0x9a, 0xa)] {
        asm = asm.words(&descriptor);
    }
    // Of a #GP's three words the first is where to return to.
    let handler = [0x55, 0x89, 0xe5, 0x83, 0x46, 0x02, 0x02, 0x5d, 0xcf];
    asm = asm.words(&[31, GDT, 0]).words(&[0, 0, 0]).raw(&handler).raw(&[0; 3]);
    assert_eq!(asm.0.len(), 0x40);
    let mut started = Vec::new();
    encode(&mut started, Kind::Started, b"");
    let mut asm = asm.store(13 * 4, SKIPS_TWO).store(13 * 4 + 2, 0).ready().send(Ring::Output, &started);
    let mut end = exit_frame(0);
    end.resize(end.len().next_multiple_of(2), 0);
    for (i, pair) in end.chunks(2).enumerate() {
        asm = asm.store(FROM_GUEST + 2 * i as u64, u16::from_le_bytes([pair[0], pair[1]]));
    }
    asm
}

fn done() -> u32 {
    Ring::Done.encode(exit_frame(0).len() as u32)
}

const SHORT: Duration = Duration::from_millis(100);
const LONG: Duration = Duration::from_secs(120);

#[test]
fn guests_that_attack_their_machine_harm_only_themselves() {
    // In an emulated machine this did not end in ten minutes, so it runs on the host's own KVM only.
    if std::env::var_os("ZEROBOOT_NESTED").is_some() {
        return;
    }
    let Some(host) = host() else { return };
    let _alone = lock();
    let good = Ending::Exited(0);
    let healthy = |name: &str| {
        let (end, _) = exec(&host, &prologue().ring(done()), limits(LONG));
        assert_eq!(end, SessionEnd::Done(good), "the next sandbox after: {name}");
    };
    healthy("nothing");
    // Mappings only: tests that wait for their turn hold descriptors.
    let before = resources().1;
    let lidt = |asm: Asm| asm.raw(&[0x0f, 0x01, 0x1e]).words(&[NO_IDT]);
    let attacks: [(&str, Asm, Duration, &[Ending]); 13] = [
        ("its end in protected mode", prologue().protected().ring_wide(done()), LONG, &[good]),
        ("its end in long mode", prologue().long().ring_wide(done()), LONG, &[good]),
        (
            "ports",
            // Until the sum carries; while bit 10 is clear.
            prologue()
                .ports(0, 1, &[0xf6, 0xc6, 0x04, 0x74])
                .ports(0, 7, &[0x73])
                .ports(0xfc00, 1, &[0x73])
                .ring(done()),
            LONG,
            &[good],
        ),
        (
            "addresses without memory",
            // mov esi, 1 MiB; read and write [esi], a byte and four; add esi, 1 MiB and 4; jnc
            prologue()
                .protected()
                .raw(&[0xbe, 0, 0, 0x10, 0, 0x8b, 0x06, 0x88, 0x06, 0x89, 0x06, 0x81, 0xc6, 4, 0, 0x10, 0, 0x73, 0xf2])
                .ring_wide(done()),
            LONG,
            &[good],
        ),
        (
            "MSRs",
            // One of them turns the APIC off, which ends the guest of an emulator; one is long mode.
            prologue()
                .msrs(0xc000_0000, 0xc000_0200)
                .msrs(0xc001_0000, 0xc001_0200)
                .msrs(0x4000_0000, 0x4000_0200)
                .msrs(0x4b56_4d00, 0x4b56_4d10)
                .msrs(0, 0x1000)
                .ring(done()),
            LONG,
            &[good, Ending::Crashed],
        ),
        (
            "CPUID",
            prologue().cpuid(0, 0x100).cpuid(0x4000_0000, 0x4000_0100).cpuid(0x8000_0000, 0x8000_0100).ring(done()),
            LONG,
            &[good],
        ),
        ("its mailbox's header", prologue().rewrites_its_mailbox().ring(done()), LONG, &[good]),
        ("a triple fault in real mode", lidt(prologue()).raw(&[0xcc]), LONG, &[Ending::Crashed]),
        ("a triple fault in protected mode", prologue().protected().raw(&[0x0f, 0x0b]), LONG, &[Ending::Crashed]),
        ("a triple fault in long mode", prologue().long().raw(&[0x0f, 0x0b]), LONG, &[Ending::Crashed]),
        ("a halt without interrupts", prologue().raw(&[0xfa, 0xf4]), SHORT, &[Ending::DeadlinePassed]),
        (
            "a loop without interrupts in long mode",
            prologue().long().raw(&[0xeb, 0xfe]),
            SHORT,
            &[Ending::DeadlinePassed],
        ),
        (
            "code where there is no memory",
            // A far jump to 1 GiB, where all is ones.
            prologue().protected().raw(&[0xea, 0, 0, 0, 0x40]).words(&[CODE_32]),
            SHORT,
            &[Ending::Crashed, Ending::DeadlinePassed],
        ),
    ];
    for (name, guest, wall, endings) in attacks {
        let start = Instant::now();
        let (end, script) = exec(&host, &guest, limits(wall));
        assert!(endings.iter().any(|ending| end == SessionEnd::Done(*ending)), "{name}: {end:?}");
        assert_eq!(SessionEnd::Done(script.ending().unwrap()), end, "{name}");
        eprintln!("{name}: {end:?} after {:?}", start.elapsed());
        healthy(name);
        // The tests beside this one have some for a moment.
        let begun = Instant::now();
        while resources().1 > before {
            assert!(begun.elapsed() < LONG, "{} mappings after {name}, {before} before", resources().1);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
