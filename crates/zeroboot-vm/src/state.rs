//! The saved state of a machine: everything that KVM holds about the vCPU and the VM, except memory.
//!
//! Save and restore stand side by side, and each order has its cause beside it.

use serde::{Deserialize, Serialize};
use zeroboot_sys::{
    kvm::{ClockData, DebugRegs, KvmError, LapicState, MpState, MsrTable, Regs, Sregs, Vcpu, VcpuEvents, Xcrs},
    memory::{BootMemory, MiB},
};

use crate::{Host, Machine};

/// MSR_IA32_TSC: the guest's time stamp counter.
pub(crate) const MSR_TSC: u32 = 0x10;
/// MSR_IA32_TSC_DEADLINE: when the local APIC's timer fires, in units of the TSC.
pub(crate) const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// For the nested lane only: QEMU's TCG looks at the I/O permission bitmap only of a task segment of type 9
/// (available), while KVM reports 11 (busy), as real CPUs want it. With 11 every port access of the agent
/// in a restored guest is a fault there; with 9 hardware refuses to enter the guest.
pub const TR9: &str = "ZEROBOOT_TCG_TR9";

/// Everything that KVM holds about a paused machine, except memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    pub(crate) mp_state: MpState,
    pub(crate) regs: Regs,
    pub(crate) sregs: Sregs,
    pub(crate) xsave: Vec<u8>,
    pub(crate) xcrs: Option<Xcrs>,
    pub(crate) lapic: LapicState,
    pub(crate) events: VcpuEvents,
    pub(crate) debug_regs: DebugRegs,
    /// All MSRs that this guest has and a fork takes, but the two of the clock.
    pub(crate) msrs: Vec<(u32, u64)>,
    /// Those that KVM gave and does not take, of a state that was just saved.
    #[serde(skip)]
    pub(crate) left_out: Vec<u32>,
    pub(crate) tsc: u64,
    pub(crate) tsc_deadline: u64,
    pub(crate) tsc_khz: u32,
    /// kvm-clock, nanoseconds.
    pub(crate) clock: u64,
}

/// Why the state of a machine could not be saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveStateError {
    /// KVM did not give a part of it.
    #[error("cannot save the state of the vCPU")]
    Kvm(#[from] KvmError),
    /// A fork would go on without a part of it.
    #[error(
        "the guest has {saved:#x} in MSR {index:#x}, and this host's KVM does not set it in a fork, {}; report it with the \
         output of `zeroboot doctor`, and use --engine process meanwhile",
        found(.fork)
    )]
    Msr {
        /// Its number.
        index: u32,
        /// Its value in the guest.
        saved: u64,
        /// What it is in a fork, if it can be read there.
        fork: Option<u64>,
    },
}

fn found(fork: &Option<u64>) -> String {
    fork.map_or_else(|| "which does not have it".into(), |value| format!("which has {value:#x}"))
}

impl VmState {
    /// All zero. For tests of the formats, and the fuzzer.
    pub(crate) fn empty() -> VmState {
        VmState {
            mp_state: MpState::default(),
            regs: Regs::default(),
            sregs: Sregs::default(),
            xsave: vec![0; 4096],
            xcrs: Some(Xcrs::default()),
            lapic: LapicState::default(),
            events: VcpuEvents::default(),
            debug_regs: DebugRegs::default(),
            msrs: vec![(0xc000_0080, 0xd01)],
            left_out: Vec::new(),
            tsc: 1,
            tsc_deadline: 2,
            tsc_khz: 3,
            clock: 4,
        }
    }

    /// The state of a machine that stopped at a ring, as far as a fork takes it; all of it, or an error.
    pub fn save(host: &Host, machine: &mut Machine) -> Result<VmState, SaveStateError> {
        let size = MiB(machine.memory.len().div_ceil(MiB(1).bytes()));
        VmState::read(host, machine)?.tried(host, size)
    }

    /// Without the MSRs that a fork refuses and has the saved value of anyway: KVM gives some that it does not take.
    /// A fork must take every other, and says so here and not at the first exec. (docs/adr/0014)
    #[doc(hidden)]
    pub fn tried(mut self, host: &Host, memory: MiB) -> Result<VmState, SaveStateError> {
        let failed = |source| KvmError { call: "mmap", source };
        // As large as the guest's, and all holes: the MSRs that hold addresses are checked against it, and the
        // wall clock's is written through.
        let memory = BootMemory::new(memory).and_then(|memory| memory.map()).map_err(failed)?;
        let scratch = Machine::new(host, memory)?;
        self.restore_to_msrs(&scratch, &mut |_| ())?;
        let mut kept = Vec::with_capacity(self.msrs.len());
        for &(index, saved) in &self.msrs {
            if scratch.vcpu.set_msr(index, saved)? {
                kept.push((index, saved));
                continue;
            }
            // Read only now: what came before may have set it, as the system registers set EFER and APIC_BASE.
            match scratch.vcpu.msr(index)? {
                Some(value) if value == saved => self.left_out.push(index),
                fork => return Err(SaveStateError::Msr { index, saved, fork }),
            }
        }
        self.msrs = kept;
        Ok(self)
    }

    /// The MSRs, without those of the clock.
    pub fn msrs(&self) -> &[(u32, u64)] {
        &self.msrs
    }

    /// The MSRs that KVM gave of this machine and does not take, if the state was just saved: none of them is needed.
    pub fn left_out(&self) -> &[u32] {
        &self.left_out
    }

    /// With one more. For tests of what a state does that a host does not take.
    #[doc(hidden)]
    pub fn with_msr(mut self, index: u32, value: u64) -> VmState {
        self.msrs.push((index, value));
        self
    }

    /// The state of a fork of this one that runs: its MSRs are those that forks take, and no others. Only by calls that a
    /// jailed worker may make.
    pub(crate) fn of_fork(&self, machine: &mut Machine) -> Result<VmState, KvmError> {
        let clock = [MSR_TSC, MSR_TSC_DEADLINE];
        let indices: Vec<u32> = self.msrs.iter().map(|&(index, _)| index).chain(clock).collect();
        VmState::read_with(machine, |vcpu| {
            let values = vcpu.msrs(&indices)?;
            Ok((indices.iter().copied().zip(values).collect(), self.tsc_khz))
        })
    }

    /// Whether a fork of this one can have had that state. It comes from a worker that its guest may own.
    pub(crate) fn may_become(&self, other: &VmState) -> Result<(), &'static str> {
        let msrs = |state: &VmState| state.msrs.iter().map(|&(index, _)| index).collect::<Vec<_>>();
        if msrs(self) != msrs(other) {
            return Err("it has other MSRs than its template");
        }
        if (self.xsave.len(), self.xcrs.is_some()) != (other.xsave.len(), other.xcrs.is_some()) {
            return Err("it has another extended state than its template");
        }
        if self.tsc_khz != other.tsc_khz {
            return Err("its TSC has another rate than its template's");
        }
        Ok(())
    }

    /// All that KVM gives.
    fn read(host: &Host, machine: &mut Machine) -> Result<VmState, KvmError> {
        let list = host.kvm().msr_index_list()?;
        VmState::read_with(machine, |vcpu| {
            let mut msrs = Vec::new();
            for index in list {
                // One at a time: KVM_GET_MSRS stops at the first that this guest's CPUID does not have, and the
                // list names what the host could have.
                msrs.extend(vcpu.msr(index)?.map(|value| (index, value)));
            }
            Ok((msrs, vcpu.tsc_khz()?))
        })
    }

    /// All of it. `msrs` gives them, and the TSC's rate.
    fn read_with(
        machine: &mut Machine,
        msrs: impl FnOnce(&Vcpu) -> Result<(Vec<(u32, u64)>, u32), KvmError>,
    ) -> Result<VmState, KvmError> {
        // The exit's port access is still pending in KVM: without this each fork would repeat it.
        machine.vcpu.complete_io()?;
        let vcpu = &machine.vcpu;
        // First: reading it folds a pending INIT or SIPI into the rest of the state.
        let mp_state = vcpu.mp_state()?;
        let regs = vcpu.regs()?;
        let mut sregs = vcpu.sregs()?;
        if sregs.base.tr.type_ == 11 && std::env::var_os(TR9).is_some_and(|v| v == "1") {
            sregs.base.tr.type_ = 9;
        }
        let xsave = vcpu.xsave()?;
        let xcrs = vcpu.xcrs()?;
        let (mut msrs, tsc_khz) = msrs(vcpu)?;
        let (mut tsc, mut tsc_deadline) = (0, 0);
        msrs.retain(|&(index, value)| match index {
            MSR_TSC => {
                tsc = value;
                false
            }
            MSR_TSC_DEADLINE => {
                tsc_deadline = value;
                false
            }
            _ => true,
        });
        // The LAPIC after the MSRs: a timer that fires between the two puts its interrupt into the LAPIC and zero into
        // the deadline. In this order the interrupt is saved, at worst with the deadline that it came from, and the
        // guest gets one tick too many; in the other both would be lost, and with them every further tick.
        let lapic = vcpu.lapic()?;
        // After both: KVM may move a pending timer interrupt into the events on the way.
        let events = vcpu.events()?;
        let debug_regs = vcpu.debug_regs()?;
        // Last: the guest's clock stands still from here on.
        let clock = machine.vm.clock()?.clock;
        Ok(VmState {
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            lapic,
            events,
            debug_regs,
            msrs,
            left_out: Vec::new(),
            tsc,
            tsc_deadline,
            tsc_khz,
            clock,
        })
    }

    /// Puts everything back but the clocks. `step` hears the name of each step once it is done.
    pub(crate) fn restore(
        &self,
        tables: &StateTables,
        machine: &Machine,
        step: &mut dyn FnMut(&'static str),
    ) -> Result<(), KvmError> {
        self.restore_to_msrs(machine, step)?;
        let vcpu = &machine.vcpu;
        vcpu.set_msrs(&tables.msrs)?;
        step("msrs");
        vcpu.set_debug_regs(&self.debug_regs)?;
        // Registers after everything that may touch RIP or RFLAGS on the way (debug registers with
        // single-step, system registers).
        vcpu.set_regs(&self.regs)?;
        // Events after the LAPIC and the registers: KVM_SET_REGS drops a pending exception.
        vcpu.set_events(&self.events)?;
        // Last: the vCPU is runnable only with everything in place.
        vcpu.set_mp_state(self.mp_state)?;
        step("rest");
        Ok(())
    }

    /// The part of [`VmState::restore`] before the MSRs.
    fn restore_to_msrs(&self, machine: &Machine, step: &mut dyn FnMut(&'static str)) -> Result<(), KvmError> {
        let vcpu = &machine.vcpu;
        // System registers first: they carry APIC_BASE, and KVM_SET_LAPIC reads the register page as an
        // xAPIC's or x2APIC's according to it. EFER and CR4 decide what later values are accepted.
        vcpu.set_sregs(&self.sregs)?;
        step("sregs");
        // XCR0 before the XSAVE area: KVM takes only features that XCR0 enables.
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs)?;
        }
        vcpu.set_xsave(&self.xsave)?;
        step("xsave");
        // The LAPIC before TSC_DEADLINE: KVM drops a deadline unless the timer's LVT entry is in
        // TSC-deadline mode.
        vcpu.set_lapic(&self.lapic)?;
        step("lapic");
        Ok(())
    }

    /// Starts the guest's clocks where the snapshot stopped them. Separate, because a pooled fork waits:
    /// its clocks start when it is taken, and no timer that came due meanwhile fires in a burst.
    pub(crate) fn restore_clocks(&self, tables: &StateTables, machine: &Machine) -> Result<(), KvmError> {
        // kvm-clock goes on from its saved value: no flags, so no jump by the host's wall clock. The wall
        // clock is part of the identity, which the agent sets.
        machine.vm.set_clock(&ClockData { clock: self.clock, ..Default::default() })?;
        // The TSC before the deadline, which is a value of the TSC.
        machine.vcpu.set_msrs(&tables.clock_msrs)
    }
}

/// Parts of a [`VmState`] in the form that the kernel takes, made once per template.
#[derive(Debug)]
pub struct StateTables {
    msrs: MsrTable,
    clock_msrs: MsrTable,
}

impl StateTables {
    /// From a state.
    pub fn new(state: &VmState) -> Result<StateTables, KvmError> {
        // The TSC twice. KVM takes a value within a second of what the TSC would have come to since the last write
        // for an attempt to synchronise two vCPUs, and lets it go on as it was; the making of the vCPU is such a
        // write, of 0 (kvm_synchronize_tsc). Linux 6.7 exempts the first write of user space. Half the range away
        // is never within a second, neither from where it was nor to where it goes.
        Ok(StateTables {
            msrs: MsrTable::new(&state.msrs)?,
            clock_msrs: MsrTable::new(&[
                (MSR_TSC, state.tsc ^ 1 << 63),
                (MSR_TSC, state.tsc),
                (MSR_TSC_DEADLINE, state.tsc_deadline),
            ])?,
        })
    }

    /// All but the clock's.
    pub(crate) fn msrs(&self) -> &MsrTable {
        &self.msrs
    }

    /// The clock's.
    pub(crate) fn clock_msrs(&self) -> &MsrTable {
        &self.clock_msrs
    }
}
