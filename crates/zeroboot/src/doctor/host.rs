//! What a report says of the host: what decides how the VM engine behaves on it, and nothing that names whose it is.

use std::{fmt, fs};

use serde::Serialize;
use zeroboot_vm::{Host, HostFacts};

use crate::bench::stats;

/// Parameters of the KVM modules, each with what depends on it.
const PARAMETERS: &[(&str, &str)] = &[
    ("kvm/enable_pmu", "whether guests may have performance counters: which MSRs KVM gives"),
    ("kvm/ignore_msrs", "whether KVM takes MSRs that it does not have"),
    ("kvm/nx_huge_pages", "whether large pages are split when code on them runs"),
    ("kvm_intel/ept", "page tables by the CPU or by KVM"),
    ("kvm_intel/unrestricted_guest", "real mode by the CPU or with a task segment of KVM's"),
    ("kvm_intel/flexpriority", "whether the vCPU adds a memory slot"),
    ("kvm_intel/enable_apicv", "who delivers interrupts"),
    ("kvm_intel/pml", "how written pages are found"),
    ("kvm_amd/npt", "page tables by the CPU or by KVM"),
    ("kvm_amd/avic", "who delivers interrupts"),
];

/// The host, without names, addresses, serial numbers and users.
#[derive(Debug, Serialize)]
pub(super) struct About {
    zeroboot: &'static str,
    #[serde(flatten)]
    host: stats::HostFacts,
    /// Maker and model, which for a cloud's machine is its kind.
    machine: String,
    microcode: String,
    /// Parameters of the KVM modules: `module/name=value`.
    kvm_parameters: Vec<String>,
    /// What templates are bound to; `Err` if /dev/kvm cannot be opened.
    #[serde(skip_serializing_if = "Option::is_none")]
    bound: Option<HostFacts>,
}

impl About {
    pub(super) fn read(host: Option<&Host>) -> About {
        let line = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let machine = ["sys_vendor", "product_name"].map(|name| line(&format!("/sys/class/dmi/id/{name}")));
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let microcode = cpuinfo.lines().find_map(|l| l.strip_prefix("microcode")?.split_once(": "));
        let parameters = PARAMETERS.iter().filter_map(|(name, _)| {
            let (module, parameter) = name.split_once('/')?;
            let value = line(&format!("/sys/module/{module}/parameters/{parameter}"));
            (!value.is_empty()).then(|| format!("{name}={value}"))
        });
        About {
            zeroboot: env!("CARGO_PKG_VERSION"),
            host: stats::HostFacts::read(),
            machine: machine.join(" ").trim().to_owned(),
            microcode: microcode.map_or("unknown", |(_, value)| value).to_owned(),
            kvm_parameters: parameters.collect(),
            bound: host.map(HostFacts::read),
        }
    }
}

impl fmt::Display for About {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "zeroboot {} doctor --full", self.zeroboot)?;
        writeln!(f, "{}", self.host)?;
        if !self.machine.is_empty() {
            writeln!(f, "machine: {}", self.machine)?;
        }
        if let Some(bound) = &self.bound {
            writeln!(f, "cpu: {}, microcode {}, XSAVE {} bytes", bound.cpu, self.microcode, bound.xsave)?;
            writeln!(f, "kvm: {} {}", bound.kvm, self.kvm_parameters.join(" "))?;
            writeln!(f, "guests have: {}", bound.features)?;
        }
        Ok(())
    }
}

/// `text` with the home directory as `~`: it often holds the user's name.
pub(super) fn without_home(text: &str) -> String {
    match std::env::var("HOME") {
        Ok(home) if home.len() > 1 => text.replace(home.trim_end_matches('/'), "~"),
        _ => text.to_owned(),
    }
}
