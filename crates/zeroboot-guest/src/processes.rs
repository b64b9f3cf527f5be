//! All processes of the sandbox: what they use, and their end.
//!
//! As PID 1 (of a VM or of a pid namespace) the sandbox is every process but this one. Otherwise, in tests, the
//! agent is a subreaper and the sandbox is its descendants.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

use crate::sys;

/// `PF_KTHREAD`: in a VM's `/proc` there are kernel threads too.
const KERNEL_THREAD: u64 = 0x0020_0000;
/// How long to wait for killed processes (one can hang in the kernel).
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// The sandbox's processes as a whole.
pub(crate) struct Processes {
    everything: bool,
    me: u32,
    page: u64,
    tick_ns: u64,
}

/// One look at them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// CPU time of live processes and of those that they have reaped.
    pub(crate) cpu: Duration,
    /// Resident memory that no file backs, bytes. Pages that processes share count for each.
    pub(crate) memory: u64,
}

struct Stat {
    ppid: u32,
    flags: u64,
    ticks: u64,
}

impl Processes {
    /// Makes this process the one that orphans of the sandbox are handed to.
    pub(crate) fn new() -> std::io::Result<Processes> {
        let me = std::process::id();
        let everything = me == 1;
        if !everything {
            // Without it a double-forked daemon escapes; only tests run so.
            rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        }
        let ticks = rustix::param::clock_ticks_per_second().max(1);
        Ok(Processes { everything, me, page: rustix::param::page_size() as u64, tick_ns: 1_000_000_000 / ticks })
    }

    /// What is in use now.
    pub(crate) fn usage(&self) -> Usage {
        let mut usage = Usage { cpu: sys::reaped_cpu(), memory: 0 };
        for (pid, stat) in self.list() {
            usage.cpu += Duration::from_nanos(stat.ticks.saturating_mul(self.tick_ns));
            usage.memory += self.anonymous(pid);
        }
        usage
    }

    /// Memory with shared pages divided among their users. Exact and slow: it walks page tables.
    pub(crate) fn proportional_memory(&self) -> u64 {
        self.list().iter().map(|(pid, _)| proportional(*pid).unwrap_or_else(|| self.anonymous(*pid))).sum()
    }

    /// Kills them all and waits until they are gone. Hands each status that it reaped to `reaped`.
    pub(crate) fn kill_all(&self, mut reaped: impl FnMut(Pid, WaitStatus)) {
        let started = Instant::now();
        loop {
            if self.everything {
                // To "process group 1" means kill(-1): every process but the caller, atomically. ESRCH: nobody left.
                rustix::process::kill_process_group(Pid::INIT, Signal::KILL).ok();
            } else {
                for (pid, _) in self.list() {
                    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                        // Gone meanwhile is what we want.
                        rustix::process::kill_process(pid, Signal::KILL).ok();
                    }
                }
            }
            loop {
                match rustix::process::wait(WaitOptions::NOHANG) {
                    Ok(Some((pid, status))) => reaped(pid, status),
                    Ok(None) => break,
                    // ECHILD: every descendant would be our child by now.
                    Err(_) => return,
                }
            }
            if started.elapsed() > KILL_PATIENCE {
                return;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn anonymous(&self, pid: u32) -> u64 {
        let Ok(text) = std::fs::read_to_string(format!("/proc/{pid}/statm")) else { return 0 };
        let mut fields = text.split_ascii_whitespace().skip(1).map(|f| f.parse::<u64>().unwrap_or(0));
        let (resident, shared) = (fields.next().unwrap_or(0), fields.next().unwrap_or(0));
        resident.saturating_sub(shared) * self.page
    }

    fn list(&self) -> Vec<(u32, Stat)> {
        let mut found = Vec::new();
        let Ok(entries) = std::fs::read_dir("/proc") else { return found };
        for entry in entries.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
            if pid == self.me {
                continue;
            }
            if let Some(stat) = stat(pid)
                && stat.flags & KERNEL_THREAD == 0
            {
                found.push((pid, stat));
            }
        }
        if !self.everything {
            let mut ours = HashSet::from([self.me]);
            // A child may be listed before its parent: repeat until nothing is added.
            loop {
                let before = ours.len();
                ours.extend(found.iter().filter(|(_, s)| ours.contains(&s.ppid)).map(|(p, _)| *p).collect::<Vec<_>>());
                if ours.len() == before {
                    break;
                }
            }
            found.retain(|(pid, _)| ours.contains(pid));
        }
        found
    }
}

fn stat(pid: u32) -> Option<Stat> {
    let bytes = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and can hold anything, parentheses included: fields start after the last one.
    let end = bytes.iter().rposition(|&b| b == b')')?;
    let text = std::str::from_utf8(bytes.get(end + 1..)?).ok()?;
    let fields: Vec<&str> = text.split_ascii_whitespace().collect();
    let number = |i: usize| fields.get(i).and_then(|f| f.parse::<u64>().ok());
    // proc(5): state is field 3, here 0; ppid 4, flags 9, utime to cstime 14 to 17.
    let ticks = (11..=14).filter_map(number).sum();
    Some(Stat { ppid: u32::try_from(number(1)?).ok()?, flags: number(6)?, ticks })
}

fn proportional(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let field = |name: &str| {
        let line = text.lines().find(|l| l.starts_with(name))?;
        line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()
    };
    Some(field("Pss_Anon:").or_else(|| field("Pss:"))? * 1024)
}

/// How many processes the kernel has killed for want of memory.
pub(crate) fn oom_kills() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/vmstat").ok()?;
    text.lines().find_map(|l| l.strip_prefix("oom_kill "))?.trim().parse().ok()
}

/// `VmData` of a process, bytes: what RLIMIT_DATA counts.
pub(crate) fn data_size(pid: Pid) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmData:"))?;
    Some(line.split_ascii_whitespace().next()?.parse::<u64>().ok()? * 1024)
}
