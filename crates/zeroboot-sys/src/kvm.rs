//! KVM handles as values: [`Kvm`] the device, [`Vm`] with its memory, [`Vcpu`] with its `kvm_run`.
//!
//! Each wraps one system call or none; what to call in which order is `zeroboot-vm`'s business.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    rc::Rc,
    sync::atomic::AtomicU8,
};

use kvm_bindings as kb;
use kvm_ioctls as ki;

use crate::{
    kick,
    memory::{GuestPhys, Mapping},
};

pub use kvm_bindings::{
    kvm_clock_data as ClockData, kvm_cpuid_entry2 as CpuidEntry, kvm_debugregs as DebugRegs, kvm_dtable as Dtable,
    kvm_lapic_state as LapicState, kvm_mp_state as MpState, kvm_regs as Regs, kvm_segment as Segment,
    kvm_vcpu_events as VcpuEvents, kvm_xcrs as Xcrs,
};

/// System registers: `struct kvm_sregs` and what KVM_GET_SREGS2 has beyond it.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Sregs {
    /// Segments, tables, control registers, EFER, APIC_BASE. `interrupt_bitmap` is always zero: pending
    /// interrupts are part of the events.
    pub base: kb::kvm_sregs,
    /// Of `struct kvm_sregs2`: whether `pdptrs` are valid.
    pub flags: u64,
    /// Page directory pointers of a guest in PAE mode, which are not in its memory any more.
    pub pdptrs: [u64; 4],
}

/// One of `struct kvm_sregs` and `struct kvm_sregs2`, with what both have taken from the other.
macro_rules! shared_sregs {
    ($to:ident from $from:ident, $($field:ident: $value:expr),+) => {
        shared_sregs!(
            $to $from [cs ds es fs gs ss tr ldt gdt idt cr0 cr2 cr3 cr4 cr8 efer apic_base] $($field: $value),+
        )
    };
    ($to:ident $from:ident [$($shared:ident)+] $($field:ident: $value:expr),+) => {
        kb::$to { $($shared: $from.$shared,)+ $($field: $value),+ }
    };
}

/// A KVM call that failed.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed")]
pub struct KvmError {
    /// The call's name as in the kernel's documentation.
    pub call: &'static str,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

type Result<T> = std::result::Result<T, KvmError>;

fn named<T>(call: &'static str, result: std::result::Result<T, ki::Error>) -> Result<T> {
    result.map_err(|e| KvmError { call, source: io::Error::from_raw_os_error(e.errno()) })
}

fn last(call: &'static str) -> KvmError {
    KvmError { call, source: io::Error::last_os_error() }
}

fn wrong(call: &'static str, text: String) -> KvmError {
    KvmError { call, source: io::Error::other(text) }
}

// Calls that kvm-ioctls does not have, or only for a fixed size. Numbers: _IOR/_IOW/_IOWR of 0xae.
const KVM_GET_SREGS2: libc::c_ulong = 0x8140_aecc;
const KVM_SET_SREGS2: libc::c_ulong = 0x4140_aecd;
const KVM_GET_XSAVE2: libc::c_ulong = 0x9000_aecf;
const KVM_GET_XSAVE: libc::c_ulong = 0x9000_aea4;
const KVM_SET_XSAVE: libc::c_ulong = 0x5000_aea5;
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
const KVM_PRE_FAULT_MEMORY: libc::c_ulong = 0xc040_aed5;
/// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, Linux 5.0; 1: reading the log does not clear it.
const KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: u32 = 168;
const KVM_CAP_SREGS2: libc::c_ulong = 200;
const KVM_CAP_XSAVE2: libc::c_ulong = 208;
const KVM_CAP_PRE_FAULT_MEMORY: libc::c_ulong = 236;
/// Where a device writes a message-signalled interrupt for the local APIC with id 0.
const LOCAL_APIC: u32 = 0xfee0_0000;
/// Most MSRs that one KVM_SET_MSRS takes (`MAX_IO_MSRS` in the kernel).
const MAX_MSRS: usize = 256;
/// Bytes of the part of the XSAVE area that every KVM has.
pub const XSAVE_MIN: usize = 4096;
/// More than any CPU's XSAVE area (AMX brings it to about 11 KiB).
pub const XSAVE_MAX: usize = 64 * 1024;

/// What this KVM can do that not every KVM can.
#[derive(Clone, Copy, Debug)]
pub struct Caps {
    /// KVM_GET_SREGS2, Linux 5.14.
    pub sregs2: bool,
    /// Bytes of the XSAVE area (4096 without KVM_CAP_XSAVE2).
    pub xsave: usize,
    /// KVM_PRE_FAULT_MEMORY, Linux 6.11 with a two-dimensional page table.
    pub pre_fault: bool,
    /// Extended control registers.
    pub xcrs: bool,
    /// The TSC's rate for a guest can be set.
    pub tsc_control: bool,
    /// A log of written pages that stays when it is read, Linux 5.0.
    pub dirty_log: bool,
}

/// The open `/dev/kvm`.
#[derive(Debug)]
pub struct Kvm {
    fd: ki::Kvm,
    caps: Caps,
}

impl Kvm {
    /// Opens the device and checks that it speaks the one stable version of the API.
    pub fn open(device: &Path) -> Result<Kvm> {
        use std::os::unix::ffi::OsStrExt;
        let name = std::ffi::CString::new(device.as_os_str().as_bytes())
            .map_err(|e| KvmError { call: "open", source: io::Error::new(io::ErrorKind::InvalidInput, e) })?;
        let fd = named("open", ki::Kvm::new_with_path(&name))?;
        match fd.get_api_version() {
            12 => {}
            other => return Err(wrong("KVM_GET_API_VERSION", format!("version {other} instead of 12"))),
        }
        let caps = Caps {
            sregs2: fd.check_extension_raw(KVM_CAP_SREGS2) > 0,
            xsave: usize::try_from(fd.check_extension_raw(KVM_CAP_XSAVE2)).unwrap_or(0).max(XSAVE_MIN),
            pre_fault: fd.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY) > 0,
            xcrs: fd.check_extension(ki::Cap::Xcrs),
            tsc_control: fd.check_extension(ki::Cap::TscControl),
            dirty_log: fd.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into()) & 1 == 1,
        };
        for (cap, name) in [
            (ki::Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
            (ki::Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (ki::Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (ki::Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
            (ki::Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
        ] {
            if !fd.check_extension(cap) {
                return Err(wrong("KVM_CHECK_EXTENSION", format!("this KVM has no {name}")));
            }
        }
        Ok(Kvm { fd, caps })
    }

    /// What it can do.
    pub fn caps(&self) -> Caps {
        self.caps
    }

    /// What KVM can show a guest of this CPU.
    pub fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>> {
        Ok(named("KVM_GET_SUPPORTED_CPUID", self.fd.get_supported_cpuid(kb::KVM_MAX_CPUID_ENTRIES))?
            .as_slice()
            .to_vec())
    }

    /// The MSRs that hold state of a guest.
    pub fn msr_index_list(&self) -> Result<Vec<u32>> {
        Ok(named("KVM_GET_MSR_INDEX_LIST", self.fd.get_msr_index_list())?.as_slice().to_vec())
    }

    /// A VM without memory, interrupts or CPU.
    pub fn create_vm(&self) -> Result<Vm> {
        // KVM_CREATE_VM ends with EINTR when a signal comes at the wrong moment (the kernel's
        // mm_take_all_locks); it changed nothing then.
        let mut tries = 0;
        loop {
            match self.fd.create_vm() {
                Err(e) if e.errno() == libc::EINTR && tries < 5 => tries += 1,
                other => return Ok(Vm { fd: named("KVM_CREATE_VM", other)?, memory: None, caps: self.caps }),
            }
        }
    }
}

/// A virtual machine and the memory it sees from address 0.
#[derive(Debug)]
pub struct Vm {
    // Drop order: the VM's descriptor before our share of the memory that it maps.
    fd: ki::VmFd,
    memory: Option<Rc<Mapping>>,
    caps: Caps,
}

impl Vm {
    /// Gives the VM its one memory slot, from guest address 0.
    pub fn set_memory(&mut self, memory: Mapping) -> Result<()> {
        self.set_slot(memory, 0)
    }

    /// The same, and lets KVM note the pages that are written from now on: by the guest, or by KVM for it.
    pub fn set_logged_memory(&mut self, memory: Mapping) -> Result<()> {
        if !self.caps.dirty_log {
            return Err(wrong("KVM_CHECK_EXTENSION", "this KVM has no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2".into()));
        }
        // Before the slot: without it, reading the log would clear it.
        let cap =
            kb::kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args: [1, 0, 0, 0], ..Default::default() };
        named("KVM_ENABLE_CAP(MANUAL_DIRTY_LOG_PROTECT2)", self.fd.enable_cap(&cap))?;
        self.set_slot(memory, kb::KVM_MEM_LOG_DIRTY_PAGES)
    }

    fn set_slot(&mut self, memory: Mapping, flags: u32) -> Result<()> {
        if self.memory.is_some() {
            return Err(wrong("KVM_SET_USER_MEMORY_REGION", "the VM has its memory already".into()));
        }
        let region = kb::kvm_userspace_memory_region {
            slot: 0,
            flags,
            guest_phys_addr: 0,
            memory_size: memory.len(),
            userspace_addr: memory.host_address(),
        };
        let memory = Rc::new(memory);
        // SAFETY: the region is one live mapping of ours. It stays mapped as long as the VM can use it:
        // this value and each of its vCPUs hold a share of it, and KVM runs a guest only through those.
        named("KVM_SET_USER_MEMORY_REGION", unsafe { self.fd.set_user_memory_region(region) })?;
        self.memory = Some(memory);
        Ok(())
    }

    /// The memory, once set.
    pub fn memory(&self) -> Option<&Rc<Mapping>> {
        self.memory.as_ref()
    }

    /// A bit for each page that was written since [`Vm::set_logged_memory`]. What this process wrote by itself is not
    /// among them.
    pub fn dirty_log(&self) -> Result<Vec<u64>> {
        let length = self.memory.as_ref().map_or(0, |memory| memory.len());
        named("KVM_GET_DIRTY_LOG", self.fd.get_dirty_log(0, usize::try_from(length).unwrap_or(0)))
    }

    /// Three pages below 4 GiB for KVM's own task segment: Intel CPUs without unrestricted guest run real mode with it.
    /// Elsewhere KVM takes the call and does nothing.
    pub fn set_tss_address(&self, at: GuestPhys) -> Result<()> {
        let at = usize::try_from(at.0).map_err(|e| wrong("KVM_SET_TSS_ADDR", e.to_string()))?;
        named("KVM_SET_TSS_ADDR", self.fd.set_tss_address(at))
    }

    /// An in-kernel LAPIC and nothing else: no PIC, no IOAPIC, no routes.
    pub fn split_irqchip(&self) -> Result<()> {
        let cap = kb::kvm_enable_cap { cap: kb::KVM_CAP_SPLIT_IRQCHIP, args: [0; 4], ..Default::default() };
        named("KVM_ENABLE_CAP(SPLIT_IRQCHIP)", self.fd.enable_cap(&cap))
    }

    /// PIC, IOAPIC and PIT in the kernel. Only for the benchmark that replays the prototype's order.
    pub fn full_irqchip_and_pit(&self) -> Result<()> {
        named("KVM_CREATE_IRQCHIP", self.fd.create_irq_chip())?;
        let config = kb::kvm_pit_config { flags: kb::KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        named("KVM_CREATE_PIT2", self.fd.create_pit2(config))
    }

    /// The one vCPU. The memory must be set: the vCPU keeps it mapped.
    pub fn create_vcpu(&self) -> Result<Vcpu> {
        let memory = self.memory.clone().ok_or_else(|| wrong("KVM_CREATE_VCPU", "the VM has no memory yet".into()))?;
        let fd = named("KVM_CREATE_VCPU", self.fd.create_vcpu(0))?;
        Ok(Vcpu { fd, _memory: memory, caps: self.caps })
    }

    /// Sends the vCPU's local APIC an edge interrupt with this vector. `false`: the APIC does not take it, since the
    /// guest has turned it off.
    pub fn raise(&self, vector: u8) -> Result<bool> {
        // Physical destination 0, fixed delivery: KVM reads no more of an MSI.
        let msi = kb::kvm_msi { address_lo: LOCAL_APIC, data: vector.into(), ..Default::default() };
        match self.fd.signal_msi(msi) {
            Ok(delivered) => Ok(delivered > 0),
            // What `kvm_irq_delivery_to_apic` says (-1) when no APIC has that address.
            Err(error) if error.errno() == libc::EPERM => Ok(false),
            Err(error) => named("KVM_SIGNAL_MSI", Err(error)),
        }
    }

    /// The VM's kvm-clock.
    pub fn clock(&self) -> Result<ClockData> {
        named("KVM_GET_CLOCK", self.fd.get_clock())
    }

    /// Sets the kvm-clock.
    pub fn set_clock(&self, clock: &ClockData) -> Result<()> {
        named("KVM_SET_CLOCK", self.fd.set_clock(clock))
    }
}

/// Why the vCPU left guest mode.
#[derive(Debug)]
pub enum VmExit<'a> {
    /// It wrote to a port: all bytes, `size` at a time.
    Out {
        /// The port.
        port: u16,
        /// The bytes.
        data: &'a [u8],
    },
    /// It reads from a port: the bytes to fill.
    In {
        /// The port.
        port: u16,
        /// Filled by the caller before the next run.
        data: &'a mut [u8],
    },
    /// It reads where no memory is.
    MmioRead {
        /// The address.
        at: GuestPhys,
        /// Filled by the caller before the next run.
        data: &'a mut [u8],
    },
    /// It writes where no memory is.
    MmioWrite {
        /// The address.
        at: GuestPhys,
        /// The bytes, 8 at most.
        data: &'a [u8],
    },
    /// A triple fault, or a reset by one.
    Shutdown,
    /// HLT without an in-kernel LAPIC (never with our shape).
    Halt,
    /// A signal: the deadline, or something on the socket.
    Kicked,
    /// KVM cannot go on: an emulation failure or a failed entry.
    Failed {
        /// The kernel's `exit_reason`.
        reason: u32,
        /// `suberror` or the hardware's reason.
        detail: u64,
    },
}

/// A virtual CPU.
#[derive(Debug)]
pub struct Vcpu {
    // Drop order: descriptor and kvm_run mapping first, then our share of the memory.
    fd: ki::VcpuFd,
    _memory: Rc<Mapping>,
    caps: Caps,
}

impl Vcpu {
    /// Enters the guest until it leaves.
    pub fn run(&mut self) -> Result<VmExit<'_>> {
        let immediate_exit = &raw mut self.fd.get_kvm_run().immediate_exit;
        // SAFETY: a byte of the kvm_run mapping, which lives as long as self.fd, and which the kernel only reads.
        let immediate_exit = unsafe { AtomicU8::from_ptr(immediate_exit) };
        if let Err(error) = kick::aimed(immediate_exit, || self.fd.run().map(|_| ())) {
            return match error.errno() {
                libc::EINTR => {
                    kick::take_pending();
                    Ok(VmExit::Kicked)
                }
                _ => named("KVM_RUN", Err(error)),
            };
        }
        Ok(self.exit())
    }

    /// What the last run left in `kvm_run`.
    fn exit(&mut self) -> VmExit<'_> {
        let run = self.fd.get_kvm_run();
        let reason = run.exit_reason;
        match reason {
            kb::KVM_EXIT_IO => {
                // SAFETY: exit_reason names this member of the union.
                let io = unsafe { run.__bindgen_anon_1.io };
                let len = io.count as usize * usize::from(io.size);
                // SAFETY: for KVM_EXIT_IO the kernel puts `count * size` bytes at `data_offset` of the
                // mapping (its own page behind kvm_run), which lives as long as the borrow of self.
                let data = unsafe {
                    std::slice::from_raw_parts_mut((&raw mut *run).cast::<u8>().add(io.data_offset as usize), len)
                };
                if u32::from(io.direction) == kb::KVM_EXIT_IO_OUT {
                    VmExit::Out { port: io.port, data }
                } else {
                    VmExit::In { port: io.port, data }
                }
            }
            kb::KVM_EXIT_MMIO => {
                // SAFETY: exit_reason names this member of the union.
                let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
                let at = GuestPhys(mmio.phys_addr);
                let len = (mmio.len as usize).min(mmio.data.len());
                let data = mmio.data.get_mut(..len).unwrap_or_default();
                if mmio.is_write != 0 { VmExit::MmioWrite { at, data } } else { VmExit::MmioRead { at, data } }
            }
            kb::KVM_EXIT_SHUTDOWN => VmExit::Shutdown,
            // Sent for a guest's reset or power-off where KVM itself implements one.
            kb::KVM_EXIT_SYSTEM_EVENT => VmExit::Shutdown,
            kb::KVM_EXIT_HLT => VmExit::Halt,
            kb::KVM_EXIT_INTR => VmExit::Kicked,
            kb::KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: exit_reason names this member of the union.
                let detail = unsafe { run.__bindgen_anon_1.internal.suberror };
                VmExit::Failed { reason, detail: detail.into() }
            }
            kb::KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: exit_reason names this member of the union.
                let detail = unsafe { run.__bindgen_anon_1.fail_entry.hardware_entry_failure_reason };
                VmExit::Failed { reason, detail }
            }
            _ => VmExit::Failed { reason, detail: 0 },
        }
    }

    /// Lets KVM finish the port or memory access of the last exit without running the guest. Without it a
    /// saved state would do the access again in every fork. Where none is pending it has KVM do what it does
    /// once, at the first run of a VM: since Linux 6.14 that makes a kernel thread.
    pub fn complete_io(&mut self) -> Result<()> {
        self.fd.set_kvm_immediate_exit(1);
        let result = self.fd.run().map(|_| ()).map_err(|e| e.errno());
        self.fd.set_kvm_immediate_exit(0);
        match result {
            Err(libc::EINTR) => Ok(()),
            Err(errno) => Err(KvmError { call: "KVM_RUN", source: io::Error::from_raw_os_error(errno) }),
            Ok(()) => Err(wrong("KVM_RUN", "it ran on instead of finishing the pending access".into())),
        }
    }

    /// What the guest sees of the CPU. Before any other state.
    pub fn set_cpuid(&self, entries: &CpuidTable) -> Result<()> {
        named("KVM_SET_CPUID2", self.fd.set_cpuid2(&entries.0))
    }

    /// General registers.
    pub fn regs(&self) -> Result<Regs> {
        named("KVM_GET_REGS", self.fd.get_regs())
    }

    /// Sets the general registers.
    pub fn set_regs(&self, regs: &Regs) -> Result<()> {
        named("KVM_SET_REGS", self.fd.set_regs(regs))
    }

    /// System registers. On a kernel without KVM_GET_SREGS2 (before 5.14) its extra fields are zero.
    pub fn sregs(&self) -> Result<Sregs> {
        if !self.caps.sregs2 {
            let mut base = named("KVM_GET_SREGS", self.fd.get_sregs())?;
            base.interrupt_bitmap = [0; 4];
            return Ok(Sregs { base, flags: 0, pdptrs: [0; 4] });
        }
        let mut s = kb::kvm_sregs2::default();
        // SAFETY: the vCPU's descriptor, and a live struct of the size that the number encodes.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_GET_SREGS2, &raw mut s) } < 0 {
            return Err(last("KVM_GET_SREGS2"));
        }
        let base = shared_sregs!(kvm_sregs from s, interrupt_bitmap: [0; 4]);
        Ok(Sregs { base, flags: s.flags, pdptrs: s.pdptrs })
    }

    /// Sets the system registers.
    pub fn set_sregs(&self, sregs: &Sregs) -> Result<()> {
        let s = &sregs.base;
        if !self.caps.sregs2 {
            return named("KVM_SET_SREGS", self.fd.set_sregs(s));
        }
        let s = shared_sregs!(kvm_sregs2 from s, flags: sregs.flags, pdptrs: sregs.pdptrs);
        // SAFETY: the vCPU's descriptor, and a live struct of the size that the number encodes.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_SET_SREGS2, &raw const s) } < 0 {
            return Err(last("KVM_SET_SREGS2"));
        }
        Ok(())
    }

    /// Extended control registers, if the CPU has them.
    pub fn xcrs(&self) -> Result<Option<Xcrs>> {
        if self.caps.xcrs { named("KVM_GET_XCRS", self.fd.get_xcrs()).map(Some) } else { Ok(None) }
    }

    /// Sets the extended control registers.
    pub fn set_xcrs(&self, xcrs: &Xcrs) -> Result<()> {
        named("KVM_SET_XCRS", self.fd.set_xcrs(xcrs))
    }

    /// FPU, SSE, AVX and whatever else the XSAVE area of this CPU holds: [`Caps::xsave`] bytes.
    pub fn xsave(&self) -> Result<Vec<u8>> {
        let mut area = vec![0u64; self.caps.xsave.div_ceil(8)];
        let (number, call) = match self.caps.xsave {
            XSAVE_MIN => (KVM_GET_XSAVE, "KVM_GET_XSAVE"),
            _ => (KVM_GET_XSAVE2, "KVM_GET_XSAVE2"),
        };
        // SAFETY: the kernel writes the size that KVM_CAP_XSAVE2 told (4096 for KVM_GET_XSAVE), which is
        // what `area` holds.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), number, area.as_mut_ptr()) } < 0 {
            return Err(last(call));
        }
        Ok(area.iter().flat_map(|word| word.to_ne_bytes()).collect())
    }

    /// Sets the XSAVE area. `area` must have exactly [`Caps::xsave`] bytes: the kernel reads that many,
    /// whatever we give.
    pub fn set_xsave(&self, area: &[u8]) -> Result<()> {
        if area.len() != self.caps.xsave.next_multiple_of(8) {
            return Err(wrong(
                "KVM_SET_XSAVE",
                format!("the saved area has {} bytes, this host's has {}", area.len(), self.caps.xsave),
            ));
        }
        // SAFETY: the kernel reads at most the size that KVM_CAP_XSAVE2 told, checked above.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_SET_XSAVE, area.as_ptr()) } < 0 {
            return Err(last("KVM_SET_XSAVE"));
        }
        Ok(())
    }

    /// The local APIC's registers.
    pub fn lapic(&self) -> Result<LapicState> {
        named("KVM_GET_LAPIC", self.fd.get_lapic())
    }

    /// Sets the local APIC's registers.
    pub fn set_lapic(&self, lapic: &LapicState) -> Result<()> {
        named("KVM_SET_LAPIC", self.fd.set_lapic(lapic))
    }

    /// One MSR; `None` if this guest's CPU does not have it.
    pub fn msr(&self, index: u32) -> Result<Option<u64>> {
        let entry = kb::kvm_msr_entry { index, ..Default::default() };
        let mut msrs = kb::Msrs::from_entries(&[entry]).map_err(|e| wrong("KVM_GET_MSRS", format!("{e:?}")))?;
        let read = named("KVM_GET_MSRS", self.fd.get_msrs(&mut msrs))?;
        Ok(msrs.as_slice().first().filter(|_| read == 1).map(|m| m.data))
    }

    /// These MSRs, all of which this guest's CPU has, in their order.
    pub fn msrs(&self, indices: &[u32]) -> Result<Vec<u64>> {
        let mut values = Vec::with_capacity(indices.len());
        for part in indices.chunks(MAX_MSRS) {
            let entries: Vec<_> = part.iter().map(|&index| kb::kvm_msr_entry { index, ..Default::default() }).collect();
            let mut msrs = kb::Msrs::from_entries(&entries).map_err(|e| wrong("KVM_GET_MSRS", format!("{e:?}")))?;
            let read = named("KVM_GET_MSRS", self.fd.get_msrs(&mut msrs))?;
            if let Some(missing) = part.get(read) {
                return Err(wrong("KVM_GET_MSRS", format!("the host does not give MSR {missing:#x}")));
            }
            values.extend(msrs.as_slice().iter().map(|msr| msr.data));
        }
        Ok(values)
    }

    /// Sets one MSR. `false` where the kernel refuses it.
    pub fn set_msr(&self, index: u32, data: u64) -> Result<bool> {
        let entry = kb::kvm_msr_entry { index, data, ..Default::default() };
        let msrs = kb::Msrs::from_entries(&[entry]).map_err(|e| wrong("KVM_SET_MSRS", format!("{e:?}")))?;
        Ok(named("KVM_SET_MSRS", self.fd.set_msrs(&msrs))? == 1)
    }

    /// Sets MSRs in this order. An MSR that the kernel refuses is an error that names it.
    pub fn set_msrs(&self, list: &MsrTable) -> Result<()> {
        for part in &list.0 {
            let done = named("KVM_SET_MSRS", self.fd.set_msrs(part))?;
            if let Some(refused) = part.as_slice().get(done) {
                return Err(wrong("KVM_SET_MSRS", format!("the host refuses MSR {:#x}", refused.index)));
            }
        }
        Ok(())
    }

    /// Pending exceptions, interrupts, NMIs and their blocking.
    pub fn events(&self) -> Result<VcpuEvents> {
        named("KVM_GET_VCPU_EVENTS", self.fd.get_vcpu_events())
    }

    /// Sets the pending events.
    pub fn set_events(&self, events: &VcpuEvents) -> Result<()> {
        named("KVM_SET_VCPU_EVENTS", self.fd.set_vcpu_events(events))
    }

    /// Debug registers.
    pub fn debug_regs(&self) -> Result<DebugRegs> {
        named("KVM_GET_DEBUGREGS", self.fd.get_debug_regs())
    }

    /// Sets the debug registers.
    pub fn set_debug_regs(&self, regs: &DebugRegs) -> Result<()> {
        named("KVM_SET_DEBUGREGS", self.fd.set_debug_regs(regs))
    }

    /// Running, halted, waiting for SIPI.
    pub fn mp_state(&self) -> Result<MpState> {
        named("KVM_GET_MP_STATE", self.fd.get_mp_state())
    }

    /// Sets the running state.
    pub fn set_mp_state(&self, state: MpState) -> Result<()> {
        named("KVM_SET_MP_STATE", self.fd.set_mp_state(state))
    }

    /// The guest's TSC rate in kHz.
    pub fn tsc_khz(&self) -> Result<u32> {
        named("KVM_GET_TSC_KHZ", self.fd.get_tsc_khz())
    }

    /// Has KVM scale the guest's TSC to this rate, where the hardware can.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<()> {
        named("KVM_SET_TSC_KHZ", self.fd.set_tsc_khz(khz))
    }

    /// Fills the second-level page table for a range ahead of time. `false` where the host cannot.
    pub fn pre_fault(&self, at: GuestPhys, len: u64) -> Result<bool> {
        #[repr(C)]
        struct Range {
            gpa: u64,
            size: u64,
            flags: u64,
            padding: [u64; 5],
        }
        if !self.caps.pre_fault {
            return Ok(false);
        }
        let mut range = Range { gpa: at.0, size: len, flags: 0, padding: [0; 5] };
        while range.size > 0 {
            // SAFETY: the vCPU's descriptor and a live struct of the documented layout. The kernel moves
            // gpa and size on as it goes.
            if unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_PRE_FAULT_MEMORY, &raw mut range) } < 0 {
                match io::Error::last_os_error().raw_os_error() {
                    Some(libc::EINTR | libc::EAGAIN) => continue,
                    Some(libc::EOPNOTSUPP) => return Ok(false),
                    _ => return Err(last("KVM_PRE_FAULT_MEMORY")),
                }
            }
        }
        Ok(true)
    }

    /// KVM's own counters of this vCPU that are not zero: `(name, value)`.
    pub fn stats(&self) -> Result<Vec<(String, u64)>> {
        // SAFETY: the vCPU's descriptor; no argument.
        let fd = unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_GET_STATS_FD, 0) };
        if fd < 0 {
            return Err(last("KVM_GET_STATS_FD"));
        }
        // SAFETY: the kernel just gave us this descriptor.
        let file = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        parse_stats(&file).map_err(|source| KvmError { call: "read of the KVM statistics", source })
    }
}

/// The binary statistics format: Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD.
fn parse_stats(file: &std::fs::File) -> io::Result<Vec<(String, u64)>> {
    use std::os::unix::fs::FileExt;
    let word = |at: u64| -> io::Result<u32> {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, at)?;
        Ok(u32::from_le_bytes(bytes))
    };
    let (name_size, count) = (u64::from(word(4)?), u64::from(word(8)?));
    let (descriptors, data) = (u64::from(word(16)?), u64::from(word(20)?));
    let mut stats = Vec::new();
    for i in 0..count.min(1024) {
        let at = descriptors + i * (16 + name_size);
        let size = word(at + 4)? >> 16;
        let offset = u64::from(word(at + 8)?);
        if size != 1 {
            continue;
        }
        let mut value = [0; 8];
        file.read_exact_at(&mut value, data + offset)?;
        let mut name = vec![0; name_size.min(256) as usize];
        file.read_exact_at(&mut name, at + 16)?;
        name.truncate(name.iter().position(|&b| b == 0).unwrap_or(name.len()));
        if value != [0; 8] {
            stats.push((String::from_utf8_lossy(&name).into_owned(), u64::from_le_bytes(value)));
        }
    }
    Ok(stats)
}

/// CPUID in the form that the kernel takes, made once per template.
#[derive(Debug)]
pub struct CpuidTable(kb::CpuId);

impl CpuidTable {
    /// From a list of at most 256 entries.
    pub fn new(entries: &[CpuidEntry]) -> Result<CpuidTable> {
        kb::CpuId::from_entries(entries).map(CpuidTable).map_err(|e| wrong("KVM_SET_CPUID2", format!("{e:?}")))
    }
}

/// MSRs in the form that the kernel takes, made once per template.
#[derive(Debug)]
pub struct MsrTable(Vec<kb::Msrs>);

impl MsrTable {
    /// From `(index, value)` in the order in which they are to be set.
    pub fn new(list: &[(u32, u64)]) -> Result<MsrTable> {
        let parts = list.chunks(MAX_MSRS).map(|part| {
            let entries: Vec<_> =
                part.iter().map(|&(index, data)| kb::kvm_msr_entry { index, data, ..Default::default() }).collect();
            kb::Msrs::from_entries(&entries).map_err(|e| wrong("KVM_SET_MSRS", format!("{e:?}")))
        });
        Ok(MsrTable(parts.collect::<Result<_>>()?))
    }
}
