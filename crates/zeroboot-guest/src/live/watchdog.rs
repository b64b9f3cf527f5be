//! Memory of a sandbox that lives, where no cgroup counts it. Looks often while something happens, seldom while nothing does,
//! and not at all while no more than waiting interpreters are there: each of them has a limit of its own from the kernel.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::processes::Processes;

/// Interval between samples while something runs.
const TICK: Duration = Duration::from_millis(20);
/// Longest interval between samples of an idle sandbox.
const LONGEST: Duration = Duration::from_millis(1280);
/// CPU time between two samples below which the sandbox is idle.
const IDLE_CPU: Duration = Duration::from_millis(1);

pub(super) struct Watchdog {
    limit: u64,
    tick: Duration,
    next: Option<Instant>,
    last: (Duration, u64),
    /// Processes that were killed for want of memory and whose end was not seen yet.
    victims: HashSet<Pid>,
    /// Those of them that the kernel still takes memory back from: a large one takes it a while.
    dying: Vec<Pid>,
}

impl Watchdog {
    pub(super) fn new(limit: u64) -> Watchdog {
        Watchdog {
            limit,
            tick: TICK,
            next: None,
            last: (Duration::ZERO, 0),
            victims: HashSet::new(),
            dying: Vec::new(),
        }
    }

    /// Something happens.
    pub(super) fn stir(&mut self) {
        self.tick = TICK;
        let soon = Instant::now() + TICK;
        self.next = Some(self.next.map_or(soon, |next| next.min(soon)));
    }

    pub(super) fn due(&self) -> Option<Instant> {
        self.next
    }

    /// Looks, if it is time. `waiting`: how many processes are interpreters that wait, when nothing runs.
    pub(super) fn look(&mut self, now: Instant, processes: &mut Processes, waiting: Option<usize>) {
        if self.next.is_none_or(|next| now < next) {
            return;
        }
        if self.dying.is_empty() && processes.unchanged() {
            self.tick = (self.tick * 2).min(LONGEST);
        } else {
            self.sample(processes);
        }
        let quiet = self.tick == LONGEST && waiting.is_some_and(|waiting| processes.count() <= waiting);
        self.next = (!quiet).then(|| now + self.tick);
    }

    fn sample(&mut self, processes: &mut Processes) {
        // Before the whole is counted, of which it becomes less and less.
        let freed = self.freed(processes);
        let usage = processes.usage();
        let (cpu, memory) = std::mem::replace(&mut self.last, (usage.cpu, usage.memory));
        let limit = self.limit.saturating_add(freed);
        if usage.memory > limit && processes.proportional_memory() > limit {
            // The largest goes, and what else there is goes on.
            if let Some(pid) = processes.largest(&self.dying) {
                self.victims.insert(pid);
                self.dying.push(pid);
                rustix::process::kill_process(pid, Signal::KILL).ok();
            }
            self.tick = TICK;
        } else if usage.cpu.saturating_sub(cpu) < IDLE_CPU && usage.memory <= memory {
            self.tick = (self.tick * 2).min(LONGEST);
        } else {
            self.tick = TICK;
        }
    }

    /// Memory that the kernel is taking back. Kills again, lest another process has got the number of one that is gone.
    fn freed(&mut self, processes: &Processes) -> u64 {
        let mut freed = 0;
        self.dying.retain(|pid| {
            let memory = processes.memory_of(*pid);
            freed += memory;
            memory > 0 && rustix::process::kill_process(*pid, Signal::KILL).is_ok()
        });
        freed
    }

    /// Whether this process was killed for want of memory. Asked once, when it was reaped.
    pub(super) fn killed(&mut self, pid: Pid) -> bool {
        self.victims.remove(&pid)
    }
}
