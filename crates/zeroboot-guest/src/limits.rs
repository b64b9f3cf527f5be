//! Resource limits of the runner, set from outside just before the run.

use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
use zeroboot_proto::Limits;

use crate::processes::data_size;
use crate::runner::Runner;

/// Sets them on the runner, whose children inherit them. `used` is its CPU time until now.
pub(crate) fn apply(runner: &Runner, limits: &Limits, used: Duration) -> Result<(), String> {
    let same_user = runner.uid() == Some(rustix::process::getuid().as_raw());
    // What the warm runtime has mapped is not the program's doing.
    let data = data_size(runner.pid).unwrap_or(0);
    // The kernel's own check is in whole seconds and per process: it is the second line behind the watchdog.
    let cpu = Duration::from_nanos(limits.cpu_ns).saturating_add(used).as_secs().saturating_add(2);
    let rows = [
        // Not 0: a core_pattern that is a program is started at any limit but 1 (core(5)), with the code's memory as its
        // input and outside of the sandbox.
        (Resource::Core, Some(1), "core size"),
        (Resource::Fsize, finite(limits.file_size), "file size"),
        (Resource::Nofile, finite32(limits.open_files), "open files"),
        // The agent counts too when it is the same user.
        (Resource::Nproc, finite32(limits.processes).map(|n| n + u64::from(same_user)), "processes"),
        (Resource::Data, finite(limits.memory).map(|n| n.saturating_add(data)), "memory"),
        (Resource::Cpu, finite(limits.cpu_ns).map(|_| cpu), "CPU time"),
    ];
    for (resource, value, what) in rows {
        let Some(value) = value else { continue };
        // Never above what is allowed already, which is the same for this process: that would need a capability.
        let value = getrlimit(resource).maximum.map_or(value, |max| value.min(max));
        // Hard one second above soft for CPU time: SIGXCPU comes first and tells what happened.
        let maximum = if matches!(resource, Resource::Cpu) { value.saturating_add(1) } else { value };
        prlimit(Some(runner.pid), resource, Rlimit { current: Some(value), maximum: Some(maximum) })
            .map_err(|error| format!("cannot set the limit for {what}: {error}"))?;
    }
    Ok(())
}

fn finite(value: u64) -> Option<u64> {
    (value != u64::MAX).then_some(value)
}

fn finite32(value: u32) -> Option<u64> {
    (value != u32::MAX).then_some(u64::from(value))
}
