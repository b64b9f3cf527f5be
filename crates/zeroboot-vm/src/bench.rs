//! Measurements of the fork path, for `zeroboot bench`. Every fork that is timed is also entered, and what
//! its guest does is checked.
//!
//! All of it runs on one thread of one process with one idle VM open, as a zygote has. Durations only: what
//! to make of them is the caller's.

use std::time::{Duration, Instant};

use zeroboot_proto::{Ending, mailbox::Ring};
use zeroboot_sys::{
    kick::Kick,
    kvm::{KvmError, MsrTable},
    memory::Mapping,
};

use crate::{
    Console, Exits, Fork, ForkError, FreezeError, Host, Prefault, Session, SessionEnd, SessionError, Snapshot, Stop,
    VmState, machine::TSS, one_request::OneRequest,
};

pub use crate::stand_in::{ALIVE, StandIn, answer, input, nth_answer, stand_in, strewn};

/// Why a measurement is void.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// A fork failed.
    #[error(transparent)]
    Fork(#[from] ForkError),
    /// A KVM call outside of a fork failed.
    #[error("cannot set up the benchmark")]
    Kvm(#[from] KvmError),
    /// Memory or a timer could not be had.
    #[error("cannot set up the benchmark")]
    Host(#[from] std::io::Error),
    /// The stand-in guest could not be frozen.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// An exec failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A guest did something else than it should: the time means nothing.
    #[error("a forked guest did {0} instead of what it should")]
    WrongGuest(String),
}

/// The distribution of one step.
#[derive(Clone, Debug)]
pub struct Step {
    /// Its name.
    pub name: &'static str,
    /// One time a round.
    pub times: Vec<Duration>,
}

/// What [`forks`] measured, one entry a round.
#[derive(Clone, Debug, Default)]
pub struct Forks {
    /// Map the image, make the VM, restore everything, start the clocks: ready to enter the guest.
    pub unpooled: Vec<Duration>,
    /// The same by step.
    pub steps: Vec<Step>,
    /// The sum of that round's KVM calls and its `mmap`, each timed on its own, without anything between them.
    pub bare: Vec<Duration>,
    /// From a pooled fork and a request to the entry of the guest: mailbox and clocks.
    pub pooled: Vec<Duration>,
    /// From there to the guest's first ring.
    pub first_exit: Vec<Duration>,
    /// Taking an unpooled fork down.
    pub teardown: Vec<Duration>,
    /// The published prototype's order of calls with the same image and state: open the device, VM, irqchip,
    /// PIT, `mmap`, memory slot, vCPU, CPUID, state with seven MSRs.
    pub prototype: Vec<Duration>,
    /// Taking such a VM down.
    pub prototype_teardown: Vec<Duration>,
}

/// Measures forks of `snapshot`, which is either a real template (its guest waits for input: `Ring::Want` or
/// output follows) or a [`stand_in()`]. `request`: bytes of frames to put into the mailbox.
pub fn forks(host: &Host, snapshot: &Snapshot, request: &[u8], rounds: usize) -> Result<Forks, BenchError> {
    let idle = host.kvm().create_vm()?;
    let mut result = Forks::default();
    // Not counted: the first forks fill caches of the kernel.
    for round in 0..rounds + 5 {
        let mut steps: Vec<(&'static str, Duration)> = Vec::with_capacity(16);
        let start = Instant::now();
        let mut last = start;
        let fork = snapshot.fork_timed(host, &mut |name| {
            let now = Instant::now();
            steps.push((name, now - last));
            last = now;
        })?;
        snapshot.start_clocks(&fork)?;
        let end = Instant::now();
        steps.push(("clocks", end - last));
        let down = Instant::now();
        drop(fork);
        let down = down.elapsed();
        if round < 5 {
            continue;
        }
        result.unpooled.push(end - start);
        result.teardown.push(down);
        for (name, time) in steps {
            match result.steps.iter_mut().find(|step| step.name == name) {
                Some(step) => step.times.push(time),
                None => result.steps.push(Step { name, times: vec![time] }),
            }
        }
    }
    for _ in 0..rounds {
        result.bare.push(bare(host, snapshot)?);
    }
    for _ in 0..rounds {
        let mut fork = snapshot.fork(host)?;
        fork.machine.vcpu.complete_io()?;
        let start = Instant::now();
        enter(snapshot, &fork, request)?;
        let entered = Instant::now();
        first_stop(&mut fork)?;
        result.pooled.push(entered - start);
        result.first_exit.push(entered.elapsed());
    }
    for round in 0..rounds + 5 {
        let start = Instant::now();
        let prototype = Prototype::fork(snapshot)?;
        let made = start.elapsed();
        let down = Instant::now();
        drop(prototype);
        if round >= 5 {
            result.prototype.push(made);
            result.prototype_teardown.push(down.elapsed());
        }
    }
    drop(idle);
    Ok(result)
}

/// What a worker does between a request and the guest.
fn enter(snapshot: &Snapshot, fork: &Fork, request: &[u8]) -> Result<(), BenchError> {
    fork.mailbox.put(&fork.machine.memory, request, false).map_err(std::io::Error::other)?;
    Ok(snapshot.start_clocks(fork)?)
}

fn first_stop(fork: &mut Fork) -> Result<(), BenchError> {
    let kick = Kick::new()?;
    kick.after(Duration::from_secs(60))?;
    match fork.machine.run(&mut Console::default(), &mut Exits::default())? {
        Stop::Ring(Ring::Want | Ring::Output | Ring::Done, _) => Ok(()),
        other => Err(BenchError::WrongGuest(format!("{other:?}"))),
    }
}

/// The calls of a fork, each timed on its own, and nothing else.
fn bare(host: &Host, snapshot: &Snapshot) -> Result<Duration, BenchError> {
    let state = &snapshot.body.state;
    let mut sum = Duration::ZERO;
    macro_rules! timed {
        ($call:expr) => {{
            let start = Instant::now();
            let value = $call;
            sum += start.elapsed();
            value
        }};
    }
    let memory = timed!(Mapping::fork(&snapshot.image))?;
    let mut vm = timed!(host.kvm().create_vm())?;
    timed!(vm.set_logged_memory(memory))?;
    timed!(vm.set_tss_address(TSS))?;
    timed!(vm.split_irqchip())?;
    let vcpu = timed!(vm.create_vcpu())?;
    timed!(vcpu.set_cpuid(&snapshot.cpuid))?;
    timed!(vcpu.set_sregs(&state.sregs))?;
    if let Some(xcrs) = &state.xcrs {
        timed!(vcpu.set_xcrs(xcrs))?;
    }
    timed!(vcpu.set_xsave(&state.xsave))?;
    timed!(vcpu.set_lapic(&state.lapic))?;
    timed!(vcpu.set_msrs(snapshot.tables.msrs()))?;
    timed!(vcpu.set_debug_regs(&state.debug_regs))?;
    timed!(vcpu.set_regs(&state.regs))?;
    timed!(vcpu.set_events(&state.events))?;
    timed!(vcpu.set_mp_state(state.mp_state))?;
    let clock = zeroboot_sys::kvm::ClockData { clock: state.clock, ..Default::default() };
    timed!(vm.set_clock(&clock))?;
    timed!(vcpu.set_msrs(snapshot.tables.clock_msrs()))?;
    Ok(sum)
}

/// A VM made as the published prototype makes it (`src/vmm/kvm.rs`, lines 41 to 137 of its repository).
struct Prototype {
    _vcpu: zeroboot_sys::kvm::Vcpu,
    _vm: zeroboot_sys::kvm::Vm,
    _kvm: zeroboot_sys::kvm::Kvm,
}

impl Prototype {
    fn fork(snapshot: &Snapshot) -> Result<Prototype, BenchError> {
        // The seven that it restores: STAR, LSTAR, CSTAR, SYSCALL_MASK, KERNEL_GS_BASE, and the two of the clock.
        const MSRS: [u32; 7] =
            [0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0102, 0x4b56_4d00, 0x4b56_4d01];
        let state: &VmState = &snapshot.body.state;
        let kvm = zeroboot_sys::kvm::Kvm::open(std::path::Path::new("/dev/kvm"))?;
        let mut vm = kvm.create_vm()?;
        vm.full_irqchip_and_pit()?;
        vm.set_memory(Mapping::fork(&snapshot.image)?)?;
        let vcpu = vm.create_vcpu()?;
        // It reads the CPUID once.
        vcpu.set_cpuid(&snapshot.cpuid)?;
        vcpu.set_sregs(&state.sregs)?;
        if let Some(xcrs) = &state.xcrs {
            vcpu.set_xcrs(xcrs)?;
        }
        vcpu.set_xsave(&state.xsave)?;
        vcpu.set_regs(&state.regs)?;
        vcpu.set_lapic(&state.lapic)?;
        let seven: Vec<_> = state.msrs.iter().copied().filter(|(index, _)| MSRS.contains(index)).collect();
        vcpu.set_msrs(&MsrTable::new(&seven)?)?;
        vcpu.set_mp_state(state.mp_state)?;
        Ok(Prototype { _vcpu: vcpu, _vm: vm, _kvm: kvm })
    }
}

/// What one exec in a fresh fork cost.
#[derive(Clone, Debug)]
pub struct Exec {
    /// Making the fork.
    pub fork: Duration,
    /// Prefaulting its working set.
    pub prefault: Duration,
    /// From the request to the first byte of output.
    pub first_byte: Duration,
    /// From the request to the last byte.
    pub last_byte: Duration,
    /// Taking it down.
    pub teardown: Duration,
    /// Exits to user space.
    pub exits: Exits,
    /// Pages that were copied.
    pub private_pages: u64,
    /// Pages of the image that were mapped.
    pub shared_pages: u64,
    /// KVM's own counters: exits of all kinds, nested page faults and so on. Empty where it has none.
    pub kvm: Vec<(String, u64)>,
}

/// Runs one exec in a fresh fork of a real template, checks what it wrote to standard output and that it
/// ended with status 0.
pub fn exec(
    host: &Host,
    snapshot: &Snapshot,
    request: &[u8],
    expected: &[u8],
    prefault: Prefault,
) -> Result<Exec, BenchError> {
    let start = Instant::now();
    let mut fork = snapshot.fork(host)?;
    let made = start.elapsed();
    let start = Instant::now();
    snapshot.prefault(&mut fork, prefault)?;
    let prefaulted = start.elapsed();
    fork.machine.vcpu.complete_io()?;
    let kick = Kick::new()?;
    let start = Instant::now();
    let mut front = OneRequest::new(request);
    let (end, stats) = Session::new(snapshot, &mut fork, &mut front, &kick).run()?;
    let last_byte = start.elapsed();
    if end != SessionEnd::Done(Ending::Exited(0)) || front.stdout != expected {
        let said = String::from_utf8_lossy(&front.stdout).into_owned();
        return Err(BenchError::WrongGuest(format!("end as {end:?} with output {said:?}")));
    }
    let resident = fork.machine.memory.resident()?;
    let kvm = fork.machine.vcpu.stats().unwrap_or_default();
    let down = Instant::now();
    drop(fork);
    Ok(Exec {
        fork: made,
        prefault: prefaulted,
        first_byte: front.first.map_or(last_byte, |first| first - start),
        last_byte,
        teardown: down.elapsed(),
        exits: stats.exits,
        private_pages: resident.private_pages(),
        shared_pages: resident.shared_pages(),
        kvm,
    })
}
