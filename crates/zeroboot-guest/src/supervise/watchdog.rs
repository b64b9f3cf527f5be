//! The watchdog of a run: samples its memory and CPU time, often while it works and seldom while it is idle.

use std::time::{Duration, Instant};

use zeroboot_proto::Ending;

use super::run::Run;
use super::{Supervisor, nanos};
use crate::transport::Transport;

/// Interval between samples of memory and CPU time during a run.
pub(super) const TICK: Duration = Duration::from_millis(20);
/// Longest interval between samples of an idle run: a thousand idle sandboxes must not keep the host busy.
const IDLE_TICK: Duration = Duration::from_millis(320);
/// CPU time between two samples below which the run is idle.
const IDLE_CPU: Duration = Duration::from_millis(1);
/// Interval between cheap checks of an idle run. A run that used more CPU time than [`STIR`] is sampled at once, so
/// that a burst of memory after a pause is seen about as soon as any.
const GLIMPSE: Duration = Duration::from_millis(40);
const STIR: Duration = Duration::from_micros(500);

/// When a run is sampled next.
pub(super) struct Samples {
    next: Instant,
    next_glimpse: Instant,
    /// Present interval between samples.
    tick: Duration,
    /// CPU time and memory at the last sample.
    last: (Duration, u64),
}

impl Samples {
    /// Of a run that starts now.
    pub(super) fn begin(started: Instant) -> Samples {
        Samples { next: started + TICK, next_glimpse: started + GLIMPSE, tick: TICK, last: (Duration::ZERO, 0) }
    }

    /// Nothing happened since the last one.
    fn rest(&mut self) {
        self.tick = (self.tick * 2).min(IDLE_TICK);
    }

    /// When the watchdog has something to do.
    pub(super) fn next(&self) -> Instant {
        self.next.min(self.next_glimpse)
    }
}

impl<T: Transport> Supervisor<T> {
    /// Takes a sample if one is due.
    pub(super) fn watch(&mut self, run: &mut Run, now: Instant) {
        let glimpse = now >= run.samples.next_glimpse;
        if glimpse {
            run.samples.next_glimpse = now + GLIMPSE;
        }
        if now >= run.samples.next || (glimpse && self.processes.stir(STIR)) {
            if self.processes.unchanged() {
                run.samples.rest();
            } else {
                self.sample(run);
            }
            run.samples.next = now + run.samples.tick;
        }
    }

    /// Stops the run if it is above a limit.
    fn sample(&mut self, run: &mut Run) {
        self.reap();
        let usage = self.processes.usage();
        run.peak_memory = run.peak_memory.max(usage.memory);
        let (cpu, memory) = std::mem::replace(&mut run.samples.last, (usage.cpu, usage.memory));
        let idle = usage.cpu.saturating_sub(cpu) < IDLE_CPU && usage.memory <= memory;
        if idle {
            run.samples.rest();
        } else {
            run.samples.tick = TICK;
        }
        if run.limits.cpu_ns != u64::MAX && nanos(usage.cpu.saturating_sub(run.cpu_before)) >= run.limits.cpu_ns {
            run.stopped = Some(Ending::CpuLimit);
        } else if usage.memory > run.limits.memory && self.processes.proportional_memory() > run.limits.memory {
            // Forked processes share pages, so the cheap figure is only a reason to take the exact one.
            run.stopped = Some(Ending::OutOfMemory(137));
        }
    }
}
