//! Running the guest until something happens that is not just a legacy port access.

use zeroboot_proto::mailbox::{CONSOLE_PORT, DOORBELL_PORT, Ring};
use zeroboot_sys::kvm::{KvmError, VmExit};

use crate::Machine;

/// Line status register of the console: transmitter empty, always.
const CONSOLE_STATUS_PORT: u16 = CONSOLE_PORT + 5;
/// The keyboard controller's command port, by which x86 kernels reset a machine.
const KEYBOARD_PORT: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;
/// The sleep control register that our FADT names: any write is a power-off.
pub(crate) const POWER_PORT: u16 = 0x514;

/// What ended a stretch of running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The guest rang.
    Ring(Ring, u32),
    /// A kick: look at the deadline and the socket.
    Kicked,
    /// The guest is over: triple fault, reset, power-off.
    Shutdown,
    /// The guest rang a bell that does not exist, or KVM cannot go on with it.
    Broken {
        /// KVM's exit reason, or `u32::MAX` for a bad ring.
        reason: u32,
        /// KVM's detail, or the bell's value.
        detail: u64,
    },
}

/// The last bytes that a booting guest wrote to its console: bounded, and only kept for a failed build.
#[derive(Debug, Default)]
pub struct Console {
    bytes: Vec<u8>,
    keep: usize,
}

impl Console {
    /// Keeps the last `keep` bytes.
    pub fn new(keep: usize) -> Console {
        Console { bytes: Vec::new(), keep }
    }

    fn push(&mut self, data: &[u8]) {
        if self.keep == 0 {
            return;
        }
        if self.bytes.len() + data.len() > 2 * self.keep {
            self.bytes.drain(..self.bytes.len().saturating_sub(self.keep));
        }
        self.bytes.extend_from_slice(data.get(..data.len().min(self.keep)).unwrap_or_default());
    }

    /// What it said last, without control characters.
    pub fn text(&self) -> String {
        let from = self.bytes.len().saturating_sub(self.keep);
        let text = String::from_utf8_lossy(self.bytes.get(from..).unwrap_or_default());
        text.chars().filter(|c| !c.is_control() || *c == '\n').collect()
    }
}

/// Exits to user space since the machine was made, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exits {
    /// Doorbell rings.
    pub rings: u64,
    /// Console writes.
    pub console: u64,
    /// Other ports.
    pub ports: u64,
    /// Accesses where no memory is.
    pub mmio: u64,
    /// Kicks.
    pub kicks: u64,
}

impl Exits {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.rings + self.console + self.ports + self.mmio + self.kicks
    }
}

impl Machine {
    /// Runs the guest until it rings, ends, or is kicked. There is no device to emulate, but for the two that a template
    /// has while it boots: reads of any other port or address give all ones, writes go nowhere.
    pub fn run(&mut self, console: &mut Console, exits: &mut Exits) -> Result<Stop, KvmError> {
        loop {
            match self.vcpu.run()? {
                VmExit::Out { port: DOORBELL_PORT, data } => {
                    exits.rings += 1;
                    let value = match data {
                        [a, b, c, d] => u32::from_le_bytes([*a, *b, *c, *d]),
                        // A string instruction, or a byte: not our agent.
                        _ => 0,
                    };
                    return Ok(match Ring::decode(value) {
                        Some((ring, argument)) => Stop::Ring(ring, argument),
                        None => Stop::Broken { reason: u32::MAX, detail: value.into() },
                    });
                }
                VmExit::Out { port: CONSOLE_PORT, data } => {
                    exits.console += 1;
                    console.push(data);
                }
                VmExit::Out { port: KEYBOARD_PORT, data: [KEYBOARD_RESET] } => return Ok(Stop::Shutdown),
                VmExit::Out { port: POWER_PORT, .. } => return Ok(Stop::Shutdown),
                VmExit::Out { .. } => exits.ports += 1,
                VmExit::In { port, data } => {
                    exits.ports += 1;
                    data.fill(if port == CONSOLE_STATUS_PORT { 0x60 } else { 0xff });
                }
                VmExit::MmioRead { at, data } => {
                    exits.mmio += 1;
                    match &mut self.boot_devices {
                        Some(devices) => devices.read(at, data),
                        None => data.fill(0xff),
                    }
                }
                VmExit::MmioWrite { at, data } => {
                    exits.mmio += 1;
                    if let Some(devices) = &mut self.boot_devices {
                        devices.write(at, data);
                    }
                }
                VmExit::Kicked => {
                    exits.kicks += 1;
                    return Ok(Stop::Kicked);
                }
                VmExit::Shutdown | VmExit::Halt => return Ok(Stop::Shutdown),
                VmExit::Failed { reason, detail } => return Ok(Stop::Broken { reason, detail }),
            }
        }
    }
}
