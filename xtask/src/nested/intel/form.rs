//! What the Intel lane runs when it is told no command.

use anyhow::Result;

use super::{boot, fetch, root};
use crate::{
    nested::{Cpu, Run},
    suite,
};

/// The short form: the parts of the VM engine with guests of a few bytes, and that KVM has here what it shall be seen with.
const SHORT: &str = r#"
exec 2>&1
parameter() { cat /sys/module/$1/parameters/$2; }
# What makes this lane worth having: without a virtual PMU the MSRs that KVM gives and does not take are not there.
intel_is_here() {
    grep -qw vmx /proc/cpuinfo && [ "$(parameter kvm enable_pmu)" = Y ] || { dmesg | grep -i perf; return 1; }
    for feature in ept unrestricted_guest enable_apicv pml; do
        [ "$(parameter kvm_intel $feature)" = Y ] || { echo "kvm_intel has no $feature"; return 1; }
    done
}
step kvm_intel intel_is_here
step byte_guests /tests/byte_guests --test-threads=1
step workers /tests/workers
step doctor zeroboot doctor
step bench zeroboot bench fork --engine vm --repeat 20
"#;

/// Runs it and gives the status.
pub(crate) fn form(run: &Run, _full: bool) -> Result<u8> {
    let Cpu::Intel(model) = run.cpu else { anyhow::bail!("only the Intel lane has a short form") };
    let parts = fetch(run)?;
    let disk = root::disk(run)?;
    let script = [suite::STEPS, SHORT, suite::STEPS_END].concat();
    let mut run = run.clone();
    run.env("ZEROBOOT_REQUIRE_KVM", "1");
    run.env("ZEROBOOT_FORKS", "20");
    run.env("ZEROBOOT_BIN", "/usr/bin/zeroboot");
    run.command = ["/bin/sh", "-c", &script].map(Into::into).to_vec();
    boot(&run, model, &parts, &disk)
}
