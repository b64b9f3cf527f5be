//! What this host's KVM is good for, found out by running a few bytes of guest code on it.

use std::{
    io,
    path::Path,
    time::{Duration, Instant},
};

use zeroboot_sys::{
    kick::Kick,
    kvm::{Kvm, KvmError, Regs},
    memory::{BootMemory, GuestPhys, Mapping, MemoryImage, MiB},
};

use crate::{Console, Exits, Host, Machine, SaveStateError, StateTables, Stop, VmState, long_mode};

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvmProbe {
    /// No `/dev/kvm`.
    Absent,
    /// There is one, and this user may not open it.
    NoPermission,
    /// It is there and cannot be used at all.
    Unusable {
        /// Why.
        reason: String,
    },
    /// Guest code runs, but not as a processor would run it: no stock Linux can.
    SoftwareOnly {
        /// What is wrong.
        reason: String,
    },
    /// Guests run, and cannot be forked: what KVM gave of one, it does not take back.
    NoRestore {
        /// What is wrong.
        reason: String,
    },
    /// A stock Linux runs here, and can be forked.
    Works {
        /// Loop iterations of supervisor-mode code in a second.
        loops_per_second: u64,
        /// Time of one port exit to this program and back.
        port_exit: Duration,
    },
}

impl KvmProbe {
    /// Whether the VM engine can be used, with the words for why not.
    pub fn verdict(&self) -> Result<(), String> {
        match self {
            KvmProbe::Works { .. } => Ok(()),
            KvmProbe::Absent => Err("this host has no /dev/kvm".into()),
            KvmProbe::NoPermission => Err("/dev/kvm may not be opened by this user".into()),
            KvmProbe::Unusable { reason } => Err(format!("/dev/kvm cannot be used: {reason}")),
            KvmProbe::SoftwareOnly { reason } => {
                Err(format!("this host's KVM is a software imitation that cannot run a stock Linux: {reason}"))
            }
            KvmProbe::NoRestore { reason } => {
                Err(format!("this host's KVM runs a guest but does not restore one that it saved: {reason}"))
            }
        }
    }

    /// What the user can do about it.
    pub fn mend(&self) -> Option<&'static str> {
        match self {
            KvmProbe::Works { .. } => None,
            KvmProbe::Absent => Some(
                "turn on virtualisation in the firmware, or nested virtualisation for this VM, and load kvm_intel or kvm_amd",
            ),
            KvmProbe::NoPermission => {
                Some("add the user to the kvm group: sudo usermod -aG kvm $USER, then log in again")
            }
            KvmProbe::Unusable { .. } => Some("look for kvm in the kernel's log: sudo dmesg | grep -i kvm"),
            KvmProbe::SoftwareOnly { .. } => Some("use --engine process here, or a host with VT-x or SVM"),
            KvmProbe::NoRestore { .. } => Some(
                "use --engine process here, and report it with the output of `zeroboot doctor`: it is a bug of ours or of the host's kernel",
            ),
        }
    }
}

/// The loop's iterations: half a millisecond on hardware, half a second in an instruction emulator.
const LOOPS: u64 = 1_000_000;
/// An emulator is stopped after this time; a slow but real processor has done its loop by then.
const PATIENCE: Duration = Duration::from_millis(25);
/// Below it supervisor code is not run by the processor. Emulators reach 3 million instructions; a real
/// processor that is itself emulated (QEMU's TCG) some 100 million.
const SLOWEST: u64 = 20_000_000;

/// A busy host can keep a real processor from us for all of that time; an emulator is slow each time.
const ATTEMPTS: usize = 3;

const DOORBELL_EAX: u32 = 0x0500_0004;

/// Runs the probe. Takes about 10 ms where it works, 150 where it does not, half a second at most.
pub fn probe() -> KvmProbe {
    let device = Path::new("/dev/kvm");
    if let Err(error) = Kvm::open(device) {
        return match error.source.kind() {
            io::ErrorKind::NotFound => KvmProbe::Absent,
            io::ErrorKind::PermissionDenied => KvmProbe::NoPermission,
            // The device node without its module.
            _ if matches!(error.source.raw_os_error(), Some(6 | 19)) => KvmProbe::Absent,
            _ => unusable(&error),
        };
    }
    match run() {
        Ok(probe) => probe,
        Err(error) => unusable(&error),
    }
}

fn unusable(error: &KvmError) -> KvmProbe {
    KvmProbe::Unusable { reason: format!("{error}: {}", error.source) }
}

fn run() -> Result<KvmProbe, KvmError> {
    let host = Host::open()?;
    let kick = Kick::new().map_err(|source| KvmError { call: "timer_create", source })?;
    let (loops_per_second, port_exit) = match patiently(|| supervisor_loop(&host, &kick))? {
        Ok(speed) => speed,
        Err(reason) => return Ok(KvmProbe::SoftwareOnly { reason }),
    };
    if let Err(reason) = patiently(|| system_call(&host, &kick))? {
        return Ok(KvmProbe::SoftwareOnly { reason });
    }
    Ok(match patiently(|| Ok(restores(&host)))? {
        Ok(()) => KvmProbe::Works { loops_per_second, port_exit },
        Err(reason) => KvmProbe::NoRestore { reason },
    })
}

/// Whether a guest that was saved goes on in a fork, on this KVM. Says what failed if not.
pub fn restores(host: &Host) -> Result<(), String> {
    restores_altered(host, |state| state)
}

/// The same of a state that is altered between: for tests of what the probe notices.
#[doc(hidden)]
pub fn restores_altered(host: &Host, alter: impl FnOnce(VmState) -> VmState) -> Result<(), String> {
    let kick = Kick::new().map_err(|error| format!("no timer: {error}"))?;
    save_and_restore(host, &kick, alter).and_then(|wrong| wrong.map_or(Ok(()), Err))
}

const CODE: u64 = 0x1000;
const STACK: u64 = 0x8000;
const ENTRY: u64 = 0x3000;
const USER: u64 = 0x4000;
const TABLES: u64 = 0x1_0000;
const GDT: u64 = 0x2_0000;

/// A machine in 64-bit mode with its memory mapped one to one for ring 3 as well, at the start of `CODE`.
fn machine(host: &Host, code: &[(u64, &[u8])]) -> Result<Machine, KvmError> {
    Ok(machine_with_memory(host, code)?.0)
}

fn machine_with_memory(host: &Host, code: &[(u64, &[u8])]) -> Result<(Machine, BootMemory), KvmError> {
    let failed = |source| KvmError { call: "mmap", source };
    let memory = BootMemory::new(MiB(2)).map_err(failed)?;
    let mut machine = Machine::new(host, memory.map().map_err(failed)?)?;
    let put = |at: u64, bytes: &[u8]| machine.memory().write(GuestPhys(at), bytes);
    let written = (|| {
        for (at, bytes) in code {
            put(*at, bytes)?;
        }
        put(TABLES, &long_mode::identity_map(TABLES, long_mode::USER))?;
        // 0x08, 0x10: ring 0 code and data; 0x1b, 0x23: ring 3 data and code, in the order that STAR wants.
        for (i, descriptor) in
            [0, 0x00af_9b00_0000_ffffu64, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff]
                .iter()
                .enumerate()
        {
            put(GDT + 8 * i as u64, &descriptor.to_le_bytes())?;
        }
        Ok(())
    })();
    written.map_err(|e: zeroboot_sys::memory::OutOfBounds| KvmError { call: "write", source: io::Error::other(e) })?;
    let vcpu = machine.vcpu();
    let mut sregs = vcpu.sregs()?;
    long_mode::enter(&mut sregs, TABLES, 8, 16, 0);
    (sregs.base.gdt.base, sregs.base.gdt.limit) = (GDT, 39);
    // SCE: system calls on.
    sregs.base.efer |= 1;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&Regs { rip: CODE, rsp: STACK, rflags: 2, ..Default::default() })?;
    Ok((machine, memory))
}

/// `mov dx, 0x510; mov eax, DOORBELL_EAX; out dx, eax`
fn ring() -> Vec<u8> {
    ring_with(DOORBELL_EAX)
}

fn ring_with(eax: u32) -> Vec<u8> {
    let mut code = vec![0x66, 0xba];
    code.extend(zeroboot_proto::mailbox::DOORBELL_PORT.to_le_bytes());
    code.push(0xb8);
    code.extend(eax.to_le_bytes());
    code.push(0xef);
    code
}

type Found<T> = Result<Result<T, String>, KvmError>;

fn patiently<T>(attempt: impl Fn() -> Found<T>) -> Found<T> {
    let mut found = attempt()?;
    for _ in 1..ATTEMPTS {
        if found.is_ok() {
            break;
        }
        found = attempt()?;
    }
    Ok(found)
}

/// The speed of a loop in ring 0, and the time of a port exit.
fn supervisor_loop(host: &Host, kick: &Kick) -> Found<(u64, Duration)> {
    let failed = |source| KvmError { call: "timer_settime", source };
    // ring; mov ecx, LOOPS; 1: dec ecx; jnz 1b; ring; ring
    let mut code = ring();
    code.push(0xb9);
    code.extend((LOOPS as u32).to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, 0xfc]);
    code.extend(ring());
    code.extend(ring());
    let mut machine = machine(host, &[(CODE, &code)])?;
    let (mut console, mut exits) = (Console::default(), Exits::default());
    let mut next = |machine: &mut Machine| machine.run(&mut console, &mut exits);
    // The first entry pays for mapping the page.
    if let Some(reason) = wrong(next(&mut machine)?) {
        return Ok(Err(reason));
    }
    kick.after(PATIENCE).map_err(failed)?;
    let start = Instant::now();
    let stop = next(&mut machine)?;
    let elapsed = start.elapsed();
    kick.disarm().map_err(failed)?;
    let done = match stop {
        Stop::Kicked => LOOPS.saturating_sub(machine.vcpu().regs()?.rcx & 0xffff_ffff),
        stop => match wrong(stop) {
            Some(reason) => return Ok(Err(reason)),
            None => LOOPS,
        },
    };
    let per_second = (done as f64 / elapsed.as_secs_f64()) as u64;
    if per_second < SLOWEST {
        return Ok(Err(format!(
            "supervisor-mode code runs at {:.1} million loops a second, in an instruction emulator",
            per_second as f64 / 1e6
        )));
    }
    let start = Instant::now();
    if let Some(reason) = wrong(next(&mut machine)?) {
        return Ok(Err(reason));
    }
    Ok(Ok((per_second, start.elapsed())))
}

/// Whether `syscall` from ring 3 arrives in ring 0 with ring 0's code segment.
fn system_call(host: &Host, kick: &Kick) -> Found<()> {
    const EFER_STAR: u32 = 0xc000_0081;
    const LSTAR: u32 = 0xc000_0082;
    let failed = |source| KvmError { call: "timer_settime", source };
    // Ring 0: go to USER in ring 3 by `sysretq`: rcx = USER, r11 = flags.
    let mut start = vec![0x48, 0xc7, 0xc1];
    start.extend((USER as u32).to_le_bytes());
    start.extend([0x49, 0xc7, 0xc3, 2, 0, 0, 0]);
    start.extend([0x48, 0x0f, 0x07]);
    // Ring 3: syscall.
    let user = [0x0f, 0x05, 0xeb, 0xfe];
    // Ring 0 again: mov bx, cs; ring.
    let mut entry = vec![0x8c, 0xcb];
    entry.extend(ring());
    let mut machine = machine(host, &[(CODE, &start), (USER, &user), (ENTRY, &entry)])?;
    // sysretq takes CS from bits 63:48 plus 16 and SS plus 8; syscall takes CS from bits 47:32.
    let star = 0x10u64 << 48 | 0x08u64 << 32;
    let msrs = zeroboot_sys::kvm::MsrTable::new(&[(EFER_STAR, star), (LSTAR, ENTRY)])?;
    machine.vcpu().set_msrs(&msrs)?;
    kick.after(PATIENCE).map_err(failed)?;
    let stop = machine.run(&mut Console::default(), &mut Exits::default())?;
    kick.disarm().map_err(failed)?;
    if let Some(reason) = wrong(stop) {
        return Ok(Err(format!("a system call does not arrive: {reason}")));
    }
    let cs = machine.vcpu().regs()?.rbx & 0xffff;
    if cs != 8 {
        return Ok(Err(format!("a system call arrives with code segment {cs:#x} instead of the kernel's")));
    }
    Ok(Ok(()))
}

/// Stops a guest at a ring, saves it, restores it in a fork of its memory and lets it go on. What is wrong, if anything.
fn save_and_restore(
    host: &Host,
    kick: &Kick,
    alter: impl FnOnce(VmState) -> VmState,
) -> Result<Option<String>, String> {
    const WORD: u64 = 0x5000;
    const RBX: u32 = 0x1234_5678;
    let io = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    let kvm = |error: KvmError| format!("{error}: {}", error.source);
    // mov ebx, RBX; inc dword [WORD]; ring; inc dword [WORD]; ring with another argument
    let increment = [&[0xff, 0x04, 0x25][..], &(WORD as u32).to_le_bytes()].concat();
    let mut code = vec![0xbb];
    code.extend(RBX.to_le_bytes());
    code.extend([increment.clone(), ring(), increment, ring_with(DOORBELL_EAX + 0x100)].concat());
    let (mut machine, memory) = machine_with_memory(host, &[(CODE, &code)]).map_err(kvm)?;
    let run = |machine: &mut Machine| -> Result<Stop, String> {
        kick.after(PATIENCE * 4).map_err(io("timer_settime"))?;
        let stop = machine.run(&mut Console::default(), &mut Exits::default()).map_err(kvm)?;
        kick.disarm().map_err(io("timer_settime"))?;
        Ok(stop)
    };
    let first = run(&mut machine)?;
    if let Some(reason) = wrong(first) {
        return Ok(Some(reason));
    }
    let state = VmState::save(host, &mut machine).map_err(|error| match &error {
        SaveStateError::Kvm(source) => kvm_chain(&error, source),
        _ => error.to_string(),
    })?;
    drop(machine);
    let image = MemoryImage::seal(memory).map_err(io("cannot seal the guest's memory"))?;
    let state = alter(state);
    let tables = StateTables::new(&state).map_err(kvm)?;
    let memory = Mapping::fork(&image).map_err(io("cannot map the guest's memory"))?;
    let mut fork = Machine::new(host, memory).map_err(kvm)?;
    state.restore(&tables, &fork, &mut |_| ()).map_err(kvm)?;
    state.restore_clocks(&tables, &fork).map_err(kvm)?;
    let second = run(&mut fork)?;
    if let Some(reason) = wrong(second) {
        return Ok(Some(format!("in the fork, {reason}")));
    }
    let word = fork.memory().read_u32(GuestPhys(WORD)).map_err(|error| error.to_string())?;
    let rbx = fork.vcpu().regs().map_err(kvm)?.rbx;
    Ok(if second == first {
        Some("the fork repeats what the saved guest had done".into())
    } else if (word, rbx) != (2, RBX.into()) {
        Some(format!("the fork goes on with other registers or memory ({word}, {rbx:#x})"))
    } else {
        None
    })
}

fn kvm_chain(error: &SaveStateError, source: &KvmError) -> String {
    format!("{error}: {source}: {}", source.source)
}

/// What is wrong with a stop that should have been the probe's ring.
fn wrong(stop: Stop) -> Option<String> {
    match stop {
        Stop::Ring(..) => None,
        Stop::Kicked => Some("guest code does not come to its end".into()),
        Stop::Shutdown => Some("guest code ended in a triple fault".into()),
        Stop::Broken { reason, detail } => Some(format!("KVM gave up (exit reason {reason}, {detail:#x})")),
    }
}
