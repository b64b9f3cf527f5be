//! Resource limits of the runner, set from outside just before the run.

use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
use zeroboot_proto::Limits;

use crate::processes::data_size;
use crate::runner::Runner;

const RESOURCES: [Resource; 6] =
    [Resource::Core, Resource::Fsize, Resource::Nofile, Resource::Nproc, Resource::Data, Resource::Cpu];

/// The kernel refused a limit.
#[derive(Debug, thiserror::Error)]
#[error("cannot set the limit for {what}: {source}")]
pub(crate) struct LimitError {
    what: &'static str,
    source: Errno,
}

/// What the limits start from. Nothing changes it between `Ready` and `Run`, so it is found out at `Ready`.
pub(crate) struct Ceilings {
    /// The runner is of the agent's user.
    same_user: bool,
    /// What the warm runtime has mapped, which is not the program's doing.
    data: u64,
    /// What is allowed already, which is the same for this process: more would need a capability.
    maximum: [Option<u64>; RESOURCES.len()],
}

impl Ceilings {
    /// Of a warm runner.
    pub(crate) fn take(runner: &Runner) -> Ceilings {
        Ceilings {
            same_user: runner.uid() == Some(rustix::process::getuid().as_raw()),
            data: data_size(runner.pid).unwrap_or(0),
            maximum: RESOURCES.map(|resource| getrlimit(resource).maximum),
        }
    }

    /// Sets the limits on the runner, whose children inherit them. `used` is its CPU time until now.
    pub(crate) fn apply(&self, runner: &Runner, limits: &Limits, used: Duration) -> Result<(), LimitError> {
        for (resource, limit, what) in self.of(limits, used, self.data) {
            prlimit(Some(runner.pid), resource, limit).map_err(|source| LimitError { what, source })?;
        }
        Ok(())
    }

    /// What a program has that is started from now on, for itself to set.
    pub(crate) fn of_a_program(&self, limits: &Limits) -> Vec<(Resource, Rlimit)> {
        self.of(limits, Duration::ZERO, 0).into_iter().map(|(resource, limit, _)| (resource, limit)).collect()
    }

    fn of(&self, limits: &Limits, used: Duration, data: u64) -> Vec<(Resource, Rlimit, &'static str)> {
        // The kernel's own check is in whole seconds and per process: it is the second line behind the watchdog.
        let cpu = Duration::from_nanos(limits.cpu_ns).saturating_add(used).as_secs().saturating_add(2);
        // In the order of RESOURCES.
        let rows = [
            // Not 0: a core_pattern that is a program is started at any limit but 1 (core(5)), with the code's memory as
            // its input and outside of the sandbox.
            (Some(1), "core size"),
            (finite(limits.file_size), "file size"),
            (finite32(limits.open_files), "open files"),
            // The agent counts too when it is the same user.
            (finite32(limits.processes).map(|n| n + u64::from(self.same_user)), "processes"),
            (finite(limits.memory).map(|n| n.saturating_add(data)), "memory"),
            (finite(limits.cpu_ns).map(|_| cpu), "CPU time"),
        ];
        let mut all = Vec::with_capacity(rows.len());
        for ((resource, ceiling), (value, what)) in RESOURCES.into_iter().zip(self.maximum).zip(rows) {
            let Some(value) = value else { continue };
            // A process sandbox has it from its worker, and its filter lets nobody change it.
            if matches!(resource, Resource::Core) && ceiling == Some(value) {
                continue;
            }
            let value = ceiling.map_or(value, |max| value.min(max));
            // Hard one second above soft for CPU time: SIGXCPU comes first and tells what happened.
            let maximum = if matches!(resource, Resource::Cpu) { value.saturating_add(1) } else { value };
            all.push((resource, Rlimit { current: Some(value), maximum: Some(maximum) }, what));
        }
        all
    }
}

fn finite(value: u64) -> Option<u64> {
    (value != u64::MAX).then_some(value)
}

fn finite32(value: u32) -> Option<u64> {
    (value != u32::MAX).then_some(u64::from(value))
}
