//! What a snapshot depends on in its host. A snapshot is only loaded where all of it is the same.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Host, cpuid};

/// The host that a snapshot was made on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Vendor, family, model, stepping.
    pub cpu: String,
    /// What the kernel calls the CPU.
    pub cpu_name: String,
    /// The kernel's release.
    pub kernel: String,
    /// The KVM modules that are loaded, such as `kvm_amd`: hardware kinds and software kinds restore
    /// different states.
    pub kvm: String,
    /// The features of the CPU that guests see, by name. For people: what is compared is CPUID itself.
    pub features: String,
    /// Bytes of the XSAVE area.
    pub xsave: u64,
}

impl HostFacts {
    /// The facts of this host.
    pub fn read(host: &Host) -> HostFacts {
        let uname = rustix::system::uname();
        let mut modules: Vec<String> = std::fs::read_dir("/sys/module")
            .map(|dir| {
                dir.filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                    .filter(|name| name.starts_with("kvm_"))
                    .collect()
            })
            .unwrap_or_default();
        modules.sort_unstable();
        let mut cpu = String::from("unknown");
        for e in host.cpuid() {
            match e.function {
                0 => {
                    let name: Vec<u8> = [e.ebx, e.edx, e.ecx].iter().flat_map(|w| w.to_le_bytes()).collect();
                    cpu = String::from_utf8_lossy(&name).into_owned();
                }
                1 => {
                    let (base, extended) = ((e.eax >> 8) & 0xf, (e.eax >> 20) & 0xff);
                    let family = if base == 0xf { base + extended } else { base };
                    let model = (e.eax >> 4) & 0xf | (e.eax >> 12) & 0xf0;
                    cpu = format!("{cpu} family {family} model {model} stepping {}", e.eax & 0xf);
                }
                _ => {}
            }
        }
        HostFacts {
            cpu,
            cpu_name: cpu_name(),
            kernel: uname.release().to_string_lossy().into_owned(),
            kvm: if modules.is_empty() { "built in".into() } else { modules.join(" ") },
            features: cpuid::names(host.cpuid()).join(" "),
            xsave: host.kvm().caps().xsave as u64,
        }
    }

    /// The first fact in which `here` differs. CPUID is compared on its own ([`CpuDifference::between`]).
    pub fn differs(&self, here: &HostFacts) -> Option<Difference> {
        let differ = |what, saved: &dyn fmt::Display, here: &dyn fmt::Display| {
            Some(Difference { what, saved: saved.to_string(), here: here.to_string() })
        };
        // The order is from the cause to its consequences. Names and features are for people only.
        if self.kvm != here.kvm {
            return differ("KVM backend", &self.kvm, &here.kvm);
        }
        if self.cpu != here.cpu {
            return differ("CPU", &self.cpu, &here.cpu);
        }
        if self.kernel != here.kernel {
            return differ("host kernel", &self.kernel, &here.kernel);
        }
        if self.xsave != here.xsave {
            return differ("XSAVE size", &self.xsave, &here.xsave);
        }
        None
    }
}

/// A fact that is not the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Which.
    pub what: &'static str,
    /// Where the template was built.
    pub saved: String,
    /// Here.
    pub here: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "its {} is {}, this host's is {}", self.what, self.saved, self.here)
    }
}

fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':'));
    line.map(|(_, name)| name.trim().to_owned()).unwrap_or_default()
}
