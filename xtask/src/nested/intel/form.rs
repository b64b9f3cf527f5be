//! What the Intel lane runs when it is told no command.
//!
//! Seconds inside are the machine's, one for 10^9 instructions: on a quiet host each takes some ten of ours.

use std::time::Duration;

use anyhow::{Result, bail};

use super::{Model, boot, fetch, root};
use crate::{
    nested::{Cpu, LANE_FAILED, Run},
    suite,
};

/// What each script begins with. Both streams are one, in order: a serial port passes on letter by letter.
const BEGIN: &str = r#"
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
"#;

/// The short form: the parts of the VM engine, with guests of a few bytes.
const SHORT: &str = r#"
step byte_guests /tests/byte_guests --test-threads=1
step workers /tests/workers
step doctor zeroboot doctor
step bench zeroboot bench fork --engine vm --stand-in --repeat 20
"#;

/// The same guests where KVM does more itself: real mode without unrestricted guests, and shadow page tables.
const OTHER_MODES: &str = r#"
kvm_with() {
    rmmod kvm_intel && rmmod kvm && insmod /modules/kvm.ko && insmod /modules/kvm_intel.ko $1=0 || return
    chmod 666 /dev/kvm
    [ "$(parameter kvm_intel $1)" = N ]
}
for mode in unrestricted_guest ept; do
    step without-$mode kvm_with $mode
    step byte_guests-without-$mode /tests/byte_guests --test-threads=1
    step workers-without-$mode /tests/workers
done
"#;

/// The Python template the whole way, and its behaviour as far as the time goes. There is no room for a second template.
const TEMPLATE: &str = r#"
step template-python zeroboot template build python --offline
step first-exec exec_prints python 'print(6*7)' 42
step numpy exec_prints python 'import numpy as np; print(int((np.arange(6).reshape(2,3) @ np.ones(3)).sum()))' 15
step doctor-full zeroboot doctor --full
now() { cut -d. -f1 /proc/uptime; }
until=$(($(now) + 120))
identity=forks_of_one_template_share_no_random_number_and_no_name
all=$(/tests/nested_linux --list | sed -n 's/: test$//p')
for test in $identity $(echo "$all" | grep -v -e node -e $identity); do
    if [ $(now) -lt $until ]; then
        step $test /tests/nested_linux --exact $test
    else
        echo "== $test: not run, the time is up"
    fi
done
"#;

/// Runs the short or the full form and gives the status.
pub(crate) fn form(run: &Run, full: bool) -> Result<u8> {
    let Cpu::Intel(model) = run.cpu else { bail!("only the Intel lane runs without a command") };
    let mut run = run.clone();
    run.env("ZEROBOOT_REQUIRE_KVM", "1");
    run.env("ZEROBOOT_BIN", "/usr/bin/zeroboot");
    // Of thousands: each fork that fails and ends is the same here.
    run.env("ZEROBOOT_FORKS", "20");
    run.env("ZEROBOOT_IDENTITY_FORKS", "20");
    if !full {
        return boot_script(&run, model, &[SHORT]);
    }

    let second = if model == Model::SkylakeX { Model::Broadwell } else { Model::SkylakeX };
    let mut newer = run.clone();
    newer.set_kernel("6.12")?;
    let mut template = run.clone();
    template.templates = true;
    template.timeout = run.timeout.max(Duration::from_secs(3600));
    let boots: [(&str, &Run, Model, &[&str]); 4] = [
        ("short, and KVM's other modes", &run, model, &[SHORT, OTHER_MODES]),
        ("kernel 6.12", &newer, model, &[SHORT]),
        ("a second CPU", &run, second, &[SHORT]),
        ("template", &template, model, &[TEMPLATE]),
    ];
    let mut status = 0;
    let mut summary = Vec::new();
    for (what, run, model, scripts) in boots {
        eprintln!("==== {what} ({})", model.name());
        // The others run whatever became of this one.
        let ended = boot_script(run, model, scripts).unwrap_or_else(|error| {
            eprintln!("nested lane: {error:#}");
            LANE_FAILED
        });
        status = status.max(ended);
        summary.push(format!("{what}: {}", if ended == 0 { "passed".to_owned() } else { format!("status {ended}") }));
    }
    summary.iter().for_each(|line| eprintln!("==== {line}"));
    Ok(status)
}

fn boot_script(run: &Run, model: Model, scripts: &[&str]) -> Result<u8> {
    let parts = fetch(run)?;
    let disk = root::disk(run)?;
    let script = [&[suite::STEPS, BEGIN], scripts, &[suite::STEPS_END]].concat().concat();
    let mut run = run.clone();
    run.command = ["/bin/sh", "-c", &script].map(Into::into).to_vec();
    boot(&run, model, &parts, &disk)
}
