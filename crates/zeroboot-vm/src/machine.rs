//! The shape of the machine: one vCPU, a local APIC and nothing else, memory from address 0.

use std::{path::Path, rc::Rc};

use zeroboot_sys::{
    kvm::{CpuidEntry, CpuidTable, Kvm, KvmError, Vcpu, Vm},
    memory::{BootMemory, GuestPhys, Mapping, MiB},
};

use crate::wake::BootDevices;

/// Address of KVM's task segment: behind KVM's own identity map at 0xfffbc000, above all memory that a guest can have.
pub(crate) const TSS: GuestPhys = GuestPhys(0xfffb_d000);

/// The KVM device with what every VM of this process needs, read once.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    cpuid: Vec<CpuidEntry>,
    cpuid_table: CpuidTable,
}

impl Host {
    /// Opens `/dev/kvm` and reads the CPUID.
    pub fn open() -> Result<Host, KvmError> {
        let kvm = Kvm::open(Path::new("/dev/kvm"))?;
        let cpuid = crate::cpuid::for_guest(&kvm)?;
        let cpuid_table = CpuidTable::new(&cpuid)?;
        Ok(Host { kvm, cpuid, cpuid_table })
    }

    /// The device.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The TSC's rate that a guest has here, in kHz.
    pub(crate) fn tsc_khz(&self) -> Result<u32, KvmError> {
        let failed = |source| KvmError { call: "mmap", source };
        let memory = BootMemory::new(MiB(1)).and_then(|memory| memory.map()).map_err(failed)?;
        Machine::new(self, memory)?.vcpu.tsc_khz()
    }

    /// What guests of this host see of its CPU.
    pub fn cpuid(&self) -> &[CpuidEntry] {
        &self.cpuid
    }
}

/// A virtual machine with its vCPU.
#[derive(Debug)]
pub struct Machine {
    // Drop order: the vCPU (its descriptor and its kvm_run mapping each pin the VM), then the VM.
    pub(crate) vcpu: Vcpu,
    pub(crate) vm: Vm,
    pub(crate) memory: Rc<Mapping>,
    /// Only while a template boots: a fork has no device.
    pub(crate) boot_devices: Option<BootDevices>,
}

impl Machine {
    /// Makes the VM in the cheap order and without state.
    pub fn new(host: &Host, memory: Mapping) -> Result<Machine, KvmError> {
        Machine::made(host, &host.cpuid_table, memory, false, &mut |_| ())
    }

    /// A fork's: with the CPU of its template, and a log of the pages that it writes. `step` hears the name of each step
    /// once it is done.
    pub(crate) fn of_fork(
        host: &Host,
        cpuid: &CpuidTable,
        memory: Mapping,
        step: &mut dyn FnMut(&'static str),
    ) -> Result<Machine, KvmError> {
        Machine::made(host, cpuid, memory, true, step)
    }

    fn made(
        host: &Host,
        cpuid: &CpuidTable,
        memory: Mapping,
        logged: bool,
        step: &mut dyn FnMut(&'static str),
    ) -> Result<Machine, KvmError> {
        let mut vm = host.kvm.create_vm()?;
        step("create_vm");
        // The slot before anything that has to do with interrupts: enabling an irqchip queues an SRCU
        // callback, and a slot change that finds one pending waits for its grace period (7 ms and more).
        if logged {
            vm.set_logged_memory(memory)?
        } else {
            vm.set_memory(memory)?
        }
        step("memory_slot");
        // Before the irqchip, as the memory: where the CPU has no unrestricted guest it adds a slot. Without it KVM
        // would keep the segment in the guest's page 0 there.
        vm.set_tss_address(TSS)?;
        step("tss_address");
        // Before the vCPU: KVM refuses a split irqchip once one exists.
        vm.split_irqchip()?;
        step("split_irqchip");
        let vcpu = vm.create_vcpu()?;
        step("create_vcpu");
        // Before any other state: what KVM accepts as state depends on what the guest's CPU has.
        vcpu.set_cpuid(cpuid)?;
        step("set_cpuid");
        let memory = match vm.memory() {
            Some(memory) => Rc::clone(memory),
            // set_memory above succeeded.
            None => unreachable!("a VM whose memory was just set has it"),
        };
        Ok(Machine { vcpu, vm, memory, boot_devices: None })
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Mapping {
        &self.memory
    }

    /// The vCPU.
    pub fn vcpu(&mut self) -> &mut Vcpu {
        &mut self.vcpu
    }
}
