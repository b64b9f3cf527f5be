//! Guests of a few bytes in a memory of the size and fill of a real template: what hosts that cannot run a Linux guest
//! are measured with. They behave as a template's agent does:
//!
//! ```text
//! one program   ready ─▶ says `alive` ─▶ sleeps until the wake line ─▶ answers its input ─▶ is done
//! a live one    ready ─▶ `Live` ─▶ sleeps until the wake line ─▶ answers what a channel asks ─▶ sleeps …
//! ```
//!
//! The live one says `Frozen` to `Freeze`, and goes on at an `Identity`.

use std::io;

use zeroboot_proto::{
    Ending, ExitReport, HEADER_LEN, Identity, Kind, encode, encode_header,
    live::{self, End, How},
    mailbox::{AREA_PAGES, DOORBELL_PORT, LENGTH_AT, MAGIC, Ring, TABLE_AT, VERSION},
};
use zeroboot_sys::{
    kvm::Regs,
    memory::{BootMemory, GuestPhys, MiB},
};

use crate::{Console, Exits, Host, Machine, Snapshot, Stop, WakeVector, WorkingSet, bench::BenchError};

const CODE: u16 = 0x1000;
const HEADER: u16 = 0x2000;
const TO_GUEST: u16 = 0x3000;
const FROM_GUEST: u16 = 0x4000;
/// The frames of an answer, put together when the template is made.
const ANSWER: u16 = 0x5000;
/// A byte of the template's memory that each fork counts up at each answer.
const COUNTER: u16 = 0x6000;
const STACK: u16 = 0x7000;
/// Where the other pages of the areas lie: never used.
const REST: u64 = 0x1_0000;
const FILL: u64 = 1 << 20;
/// The wake line's.
const VECTOR: u8 = 0x20;
/// Digits of the input.
const DIGITS: u16 = 6;
/// A header of a frame, and where its kind and channel are.
const FRAME: u16 = HEADER_LEN as u16;
const KIND_AT: u16 = 4;
const CHANNEL_AT: u16 = 6;

/// What the stand-in for one program says when it lives.
pub const ALIVE: &str = "alive\n";

/// Which of the two guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StandIn {
    /// For one program: takes [`input`] as standard input, and its output is [`ALIVE`] and [`answer`].
    Program,
    /// For a sandbox that lives: takes [`input`] as the first frame of a channel, and answers with `Started`, [`answer`] as
    /// `Stdout`, and `End`. At most nine times.
    Live,
}

/// The input that it waits for.
pub fn input(number: usize) -> String {
    format!("{number:06}\n")
}

/// What it answers the first time: a letter for each digit of the input, and how often its own memory was counted up.
pub fn answer(number: usize) -> String {
    nth_answer(number, 1)
}

/// What it answers the `nth` time.
pub fn nth_answer(number: usize, nth: u8) -> String {
    let letters: String = input(number).trim_end().bytes().map(|digit| char::from(digit - b'0' + b'A')).collect();
    format!("{letters}{nth}\n")
}

/// Makes the template. `filled` of its memory is not zero; a worker has `working_set` before its guest runs.
pub fn stand_in(
    host: &Host,
    what: StandIn,
    size: MiB,
    filled: MiB,
    working_set: WorkingSet,
) -> Result<Snapshot, BenchError> {
    let memory = BootMemory::new(size)?;
    let mut machine = Machine::new(host, memory.map()?)?;
    let put = |at: u64, bytes: &[u8]| machine.memory().write(GuestPhys(at), bytes).map_err(io::Error::other);

    let mut pages = [[0; 8]; 2 * AREA_PAGES];
    for (i, page) in pages.iter_mut().enumerate() {
        let at = match i {
            0 => u64::from(TO_GUEST),
            AREA_PAGES => u64::from(FROM_GUEST),
            _ => REST + 4096 * i as u64,
        };
        *page = at.to_le_bytes();
    }
    put(HEADER.into(), &MAGIC.to_le_bytes())?;
    put(u64::from(HEADER) + 4, &VERSION.to_le_bytes())?;
    put(u64::from(HEADER) + TABLE_AT as u64, pages.as_flattened())?;

    let (first, answer) = frames(what);
    put(FROM_GUEST.into(), &first)?;
    put(ANSWER.into(), &answer.concat())?;
    put(COUNTER.into(), b"0")?;
    let (code, interrupt) = program(what, first.len() as u16, &answer.map(|frame| frame.len() as u16));
    put(CODE.into(), &code)?;
    // Real mode's vector: offset and segment.
    put(u64::from(VECTOR) * 4, &u32::from(interrupt).to_le_bytes())?;
    for page in 0..filled.bytes().min(size.bytes().saturating_sub(FILL)) / 4096 {
        put(FILL + page * 4096, &(page + 1).to_le_bytes())?;
    }

    let vcpu = machine.vcpu();
    let mut sregs = vcpu.sregs()?;
    (sregs.base.cs.base, sregs.base.cs.selector) = (0, 0);
    // x2APIC: its registers are MSRs, in reach of real mode.
    sregs.base.apic_base |= 1 << 10 | 1 << 11;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&Regs { rip: CODE.into(), rsp: STACK.into(), rflags: 2, ..Default::default() })?;
    let argument = match machine.run(&mut Console::default(), &mut Exits::default())? {
        Stop::Ring(Ring::Ready, argument) => argument,
        other => return Err(BenchError::WrongGuest(format!("{other:?}"))),
    };
    let wake = WakeVector::try_from(VECTOR).map_err(io::Error::other)?;
    let mut snapshot = Snapshot::freeze(host, machine, memory, argument, wake)?;
    snapshot.body.working_set = working_set;
    Ok(snapshot)
}

/// The first bytes, and the frames of an answer: one before its text, the text, one behind it.
fn frames(what: StandIn) -> (Vec<u8>, [Vec<u8>; 3]) {
    let (mut first, mut before, mut text, mut behind) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    encode(&mut first, Kind::Started, b"");
    encode(&mut text, Kind::Stdout, answer(0).as_bytes());
    match what {
        StandIn::Program => {
            encode(&mut first, Kind::Stdout, ALIVE.as_bytes());
            let report = ExitReport { ending: Ending::Exited(0), wall_ns: 1, cpu_ns: 1, peak_memory: 4096 };
            encode(&mut behind, Kind::Exit, &report.encode());
        }
        StandIn::Live => {
            encode(&mut before, Kind::Started, &1u32.to_le_bytes());
            let end = End { how: How::Exited(0), wall_ns: 1, context_lost: false };
            encode(&mut behind, Kind::End, &live::encode(&end));
        }
    }
    (first, [before, text, behind])
}

/// `written` and `read` pages in runs of four, strewn over the filled memory as those of a real exec are.
pub fn strewn(filled: MiB, written: u32, read: u32) -> WorkingSet {
    let runs = (written + read).div_ceil(4).max(1);
    let step = (filled.bytes() / 4096) as u32 / runs;
    let mut runs = (0..runs).map(|i| ((FILL / 4096) as u32 + i * step, 4));
    WorkingSet { written: runs.by_ref().take(written.div_ceil(4) as usize).collect(), read: runs.collect() }
}

/// The guest's code, for [`CODE`], and the address of its interrupt handler. Lengths are those of its frames.
fn program(what: StandIn, first: u16, answer: &[u16; 3]) -> (Vec<u8>, u16) {
    let mut code = Vec::new();
    // The APIC on.
    wrmsr(&mut code, 0x80f, 0x1ff);
    ring(&mut code, Ring::Ready, u32::from(HEADER >> 12));
    if what == StandIn::Live {
        // The host answers with the request.
        ring(&mut code, Ring::Want, 0);
    }
    ring(&mut code, Ring::Output, first.into());
    let poll = code.len();
    let jump_to_poll = |code: &mut Vec<u8>| {
        code.push(0xe9);
        let next = code.len() + 2;
        code.extend((poll as u16).wrapping_sub(next as u16).to_le_bytes());
    };
    ring(&mut code, Ring::Want, 0);
    // mov ax, [length]; test ax, ax; jnz over the next 6 bytes; sti; hlt; cli; jmp poll
    code.push(0xa1);
    code.extend((HEADER + LENGTH_AT as u16).to_le_bytes());
    code.extend([0x85, 0xc0, 0x75, 6, 0xfb, 0xf4, 0xfa]);
    jump_to_poll(&mut code);
    // mov bx, 0: where what it was asked begins.
    code.extend([0xbb, 0, 0]);
    if what == StandIn::Live {
        // cmp byte [kind], Identity; jne over the next 12 bytes; mov bx, its length; cmp [length], bx; jne over 3; jmp poll
        let identity = FRAME + Identity::LEN as u16;
        code.extend([0x80, 0x3e]);
        code.extend((TO_GUEST + KIND_AT).to_le_bytes());
        code.extend([Kind::Identity as u8, 0x75, 12, 0xbb]);
        code.extend(identity.to_le_bytes());
        code.extend([0x39, 0x1e]);
        code.extend((HEADER + LENGTH_AT as u16).to_le_bytes());
        code.extend([0x75, 3]);
        jump_to_poll(&mut code);
        // cmp byte [bx + kind], Freeze; jne over it
        code.extend([0x80, 0xbf]);
        code.extend((TO_GUEST + KIND_AT).to_le_bytes());
        code.extend([Kind::Freeze as u8, 0x75, 0]);
        let jump = code.len();
        // Its answer into the area: mov dword [at], value
        let frozen = encode_header(0, Kind::Frozen, 0);
        for (at, word) in [0, 4].into_iter().zip(frozen.as_chunks::<4>().0) {
            code.extend([0x66, 0xc7, 0x06]);
            code.extend((FROM_GUEST + at).to_le_bytes());
            code.extend(word);
        }
        ring(&mut code, Ring::Output, frozen.len() as u32);
        jump_to_poll(&mut code);
        let length = (code.len() - jump) as u8;
        if let Some(over) = code.get_mut(jump - 1) {
            *over = length;
        }
    }
    // inc byte [COUNTER]
    code.extend([0xfe, 0x06]);
    code.extend(COUNTER.to_le_bytes());
    // The frames into the area: mov si, ANSWER; mov di, FROM_GUEST; mov cx, length; rep movsb
    let (si, di, cx) = (0xbe, 0xbf, 0xb9);
    let mov = |code: &mut Vec<u8>, register: u8, value: u16| {
        code.push(register);
        code.extend(value.to_le_bytes());
    };
    mov(&mut code, si, ANSWER);
    mov(&mut code, di, FROM_GUEST);
    mov(&mut code, cx, answer.iter().sum());
    code.extend([0xf3, 0xa4]);
    let [before, text, _] = *answer;
    if what == StandIn::Live {
        // Each on the channel that asked: mov ax, [bx + channel]; mov [channel], ax
        code.extend([0x8b, 0x87]);
        code.extend((TO_GUEST + CHANNEL_AT).to_le_bytes());
        for frame in [0, before, before + text] {
            code.push(0xa3);
            code.extend((FROM_GUEST + frame + CHANNEL_AT).to_le_bytes());
        }
    }
    // Behind both frames' headers, a letter for a digit: 1: lodsb; add al, 'A' - '0'; stosb; loop 1b
    // lea si, [bx + …]
    code.extend([0x8d, 0xb7]);
    code.extend((TO_GUEST + FRAME).to_le_bytes());
    mov(&mut code, di, FROM_GUEST + before + FRAME);
    mov(&mut code, cx, DIGITS);
    code.extend([0xac, 0x04, b'A' - b'0', 0xaa, 0xe2, 0xfa]);
    // mov al, [COUNTER]; stosb
    code.push(0xa0);
    code.extend(COUNTER.to_le_bytes());
    code.push(0xaa);
    let length = answer.iter().copied().map(u32::from).sum();
    match what {
        StandIn::Program => ring(&mut code, Ring::Done, length),
        StandIn::Live => {
            ring(&mut code, Ring::Output, length);
            jump_to_poll(&mut code);
        }
    }
    // The handler: end of interrupt; iret
    let interrupt = CODE + code.len() as u16;
    wrmsr(&mut code, 0x80b, 0);
    code.push(0xcf);
    (code, interrupt)
}

/// `mov dx, port; mov eax, value; out dx, eax`
fn ring(code: &mut Vec<u8>, ring: Ring, argument: u32) {
    code.push(0xba);
    code.extend(DOORBELL_PORT.to_le_bytes());
    code.extend([0x66, 0xb8]);
    code.extend(ring.encode(argument).to_le_bytes());
    code.extend([0x66, 0xef]);
}

/// `mov ecx, msr; mov eax, value; xor edx, edx; wrmsr`
fn wrmsr(code: &mut Vec<u8>, msr: u32, value: u32) {
    code.extend([0x66, 0xb9]);
    code.extend(msr.to_le_bytes());
    code.extend([0x66, 0xb8]);
    code.extend(value.to_le_bytes());
    code.extend([0x66, 0x31, 0xd2, 0x0f, 0x30]);
}
