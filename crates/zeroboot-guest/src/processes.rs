//! All processes of the sandbox: what they use, and their end.
//!
//! As PID 1 (of a VM or of a pid namespace) the sandbox is every process but this one. Otherwise, in tests, the
//! agent is a subreaper and the sandbox is its descendants.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

use crate::kernel_memory::{KernelMemory, Target};
use crate::sys;

/// `PF_KTHREAD`: in a VM's `/proc` there are kernel threads too.
const KERNEL_THREAD: u64 = 0x0020_0000;
/// How long to wait for killed processes (one can hang in the kernel).
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// File systems in memory that the program writes to: they are its memory.
const IN_MEMORY: [&str; 3] = ["/home/sandbox", "/tmp", "/dev/shm"];
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// Bytes of address space that no limit counts (shared, read-only, reserved) above which page tables are counted:
/// reading empty pages costs nothing else.
const WIDE: u64 = 1 << 30;

/// The sandbox's processes as a whole.
pub(crate) struct Processes {
    /// [`IN_MEMORY`], each with what it held at the start.
    files: Vec<(OwnedFd, u64)>,
    everything: bool,
    /// `/proc` shows kernel threads beside the sandbox's processes: a VM.
    kernel_threads: bool,
    /// The kernel tells the children of a process.
    has_children: bool,
    me: u32,
    page: u64,
    tick_ns: u64,
    /// In a fork of a VM: free memory of the machine when it was made, and what the sandbox held by then.
    at_rest: Option<(u64, u64)>,
    seen: Seen,
    /// Where no cgroup counts it.
    kernel: Option<KernelMemory>,
    /// More memory than this is not counted to the byte.
    limit: u64,
}

/// The processes of the last sample.
#[derive(Default)]
struct Seen {
    pids: Vec<u32>,
    /// CPU time of them, and of those that were reaped.
    cpu: Duration,
    reaped: Duration,
    /// What the kernel holds for them was counted, too, and not only taken from an earlier sample.
    whole: bool,
}

/// Most processes for which the cheap check is cheaper than a sample.
const FEW: usize = 8;

/// One sample of them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// CPU time of live processes and of those that they have reaped.
    pub(crate) cpu: Duration,
    /// Resident memory that no file backs, large page tables, and files in memory; bytes. Pages that processes share
    /// count for each.
    pub(crate) memory: u64,
}

struct Stat {
    ppid: u32,
    flags: u64,
    own_ticks: u64,
    /// Of the children that it has waited for.
    reaped_ticks: u64,
    /// The first thread has ended, others run on: `/proc/PID` itself then shows no memory.
    headless: bool,
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
        // In tests these are the host's.
        let files = if everything { in_memory()? } else { Vec::new() };
        let has_children = std::path::Path::new(&format!("/proc/self/task/{me}/children")).exists();
        let kernel_threads = everything && has_children && stat(2).is_some_and(|s| s.flags & KERNEL_THREAD != 0);
        Ok(Processes {
            files,
            everything,
            kernel_threads,
            has_children,
            me,
            page: rustix::param::page_size() as u64,
            tick_ns: 1_000_000_000 / ticks,
            at_rest: None,
            seen: Seen::default(),
            kernel: None,
            limit: u64::MAX,
        })
    }

    /// Counts what the kernel holds for the sandbox, too.
    pub(crate) fn count_kernel_memory(&mut self, kernel: KernelMemory) {
        self.kernel = Some(kernel);
    }

    /// What the sandbox may have.
    pub(crate) fn limit(&mut self, memory: u64) {
        self.limit = memory;
    }

    /// The sandbox has used `memory` so far. What the machine loses from now on is its as well, whatever holds it: memory
    /// files, shared memory, buffers of sockets. In a process sandbox the machine is the host's.
    pub(crate) fn rest(&mut self, memory: u64) {
        self.at_rest = self.kernel_threads.then(|| (free_memory(), memory));
    }

    /// What is in use now.
    pub(crate) fn usage(&mut self) -> Usage {
        let list = self.list();
        let pids = list.iter().map(|(pid, _)| *pid).collect();
        self.seen = Seen { pids, cpu: Duration::ZERO, reaped: sys::reaped_cpu(), whole: self.kernel.is_none() };
        self.seen.cpu = self.seen_cpu().unwrap_or_default();
        let mut usage = self.usage_of(&list);
        if let Some(mut kernel) = self.kernel.take() {
            let targets = list.iter().filter_map(|(pid, stat)| self.target(*pid, stat));
            let (held, whole) = kernel.count(Instant::now(), self.limit, targets);
            usage.memory += held;
            self.seen.whole = whole;
            self.kernel = Some(kernel);
        }
        usage
    }

    /// Whether there is what there was at the last sample: the same processes, and none has run for a nanosecond since. A
    /// sample costs a millisecond, and a thousand sandboxes that wait would keep the host busy.
    pub(crate) fn unchanged(&self) -> bool {
        // In a VM other things take memory, too. In tests the processes are among the host's.
        let alone = self.everything && !self.kernel_threads && self.seen.whole;
        // A process that the last sample missed is in the list, or its parent has been reaped since.
        alone
            && self.seen_cpu() == Some(self.seen.cpu)
            && sys::reaped_cpu() == self.seen.reaped
            && self.pids().is_some_and(|pids| pids.eq(self.seen.pids.iter().copied()))
    }

    /// The numbers in `/proc`, but for our own.
    fn pids(&self) -> Option<impl Iterator<Item = u32>> {
        let number = |entry: std::fs::DirEntry| entry.file_name().to_str()?.parse::<u32>().ok();
        Some(std::fs::read_dir("/proc").ok()?.flatten().filter_map(number).filter(|pid| *pid != self.me))
    }

    fn target(&self, pid: u32, stat: &Stat) -> Option<Target> {
        let pages = |dir: &str| {
            let text = std::fs::read_to_string(format!("{dir}/statm")).ok()?;
            text.split_ascii_whitespace().next()?.parse::<u64>().ok().filter(|pages| *pages > 0)
        };
        let mut dirs = vec![format!("/proc/{pid}")];
        if stat.headless {
            let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
            dirs = threads.flatten().filter_map(|thread| thread.path().to_str().map(str::to_owned)).collect();
        }
        dirs.into_iter().find_map(|dir| pages(&dir).map(|pages| Target { dir, pages }))
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.list().len()
    }

    /// The process with the most memory that only it has, but for some.
    pub(crate) fn largest(&self, but: &[Pid]) -> Option<Pid> {
        let sized = |(pid, stat): (u32, Stat)| {
            let number = i32::try_from(pid).ok().and_then(Pid::from_raw).filter(|number| !but.contains(number))?;
            Some((self.anonymous(pid, &stat), number))
        };
        let (_, pid) = self.list().into_iter().filter_map(sized).max_by_key(|(memory, _)| *memory)?;
        Some(pid)
    }

    /// Memory that only this process has; none once it has ended.
    pub(crate) fn memory_of(&self, pid: Pid) -> u64 {
        let pid = pid.as_raw_nonzero().get().unsigned_abs();
        stat(pid).map_or(0, |stat| self.anonymous(pid, &stat))
    }

    /// Whether any process has run since the last sample, or may have. This check is far cheaper than a sample.
    pub(crate) fn stir(&self, more_than: Duration) -> bool {
        self.seen_cpu().is_none_or(|now| now.saturating_sub(self.seen.cpu) > more_than)
    }

    /// CPU time of the processes of the last sample; `None` if there are too many, or one has ended.
    fn seen_cpu(&self) -> Option<Duration> {
        let Seen { pids, .. } = &self.seen;
        let clock = |pid: &u32| i32::try_from(*pid).ok().and_then(sys::cpu_clock);
        if pids.is_empty() || pids.len() > FEW { None } else { pids.iter().map(clock).sum() }
    }

    /// CPU time of one process and of all that were reaped: what [`Processes::usage`] says while there is only one.
    pub(crate) fn cpu_of(&self, pid: Pid) -> Duration {
        let pid = pid.as_raw_nonzero().get();
        sys::reaped_cpu() + sys::cpu_clock(pid).unwrap_or_default()
    }

    /// As [`Processes::usage`], without reading all of `/proc`, which costs more than a short run. It can miss a process
    /// that changes its parent meanwhile, so this is for the report and not for limits.
    pub(crate) fn usage_at_end(&self) -> Usage {
        self.usage_of(&if self.has_children { self.tree() } else { self.list() })
    }

    fn usage_of(&self, processes: &[(u32, Stat)]) -> Usage {
        let mut usage = Usage { cpu: sys::reaped_cpu(), memory: self.files() };
        for (pid, stat) in processes {
            usage.cpu += self.cpu(*pid, stat);
            usage.memory += self.anonymous(*pid, stat);
        }
        usage.memory = usage.memory.max(self.of_the_machine());
        usage
    }

    /// What the machine's loss of memory makes of the sandbox; 0 where it is not the sandbox's own.
    fn of_the_machine(&self) -> u64 {
        self.at_rest.map_or(0, |(free, memory)| memory + free.saturating_sub(free_memory()))
    }

    /// To the nanosecond for what it ran itself; in ticks for the children that it has waited for.
    fn cpu(&self, pid: u32, stat: &Stat) -> Duration {
        let ticks = |n: u64| Duration::from_nanos(n.saturating_mul(self.tick_ns));
        let own = i32::try_from(pid).ok().and_then(sys::cpu_clock).unwrap_or_else(|| ticks(stat.own_ticks));
        own + ticks(stat.reaped_ticks)
    }

    /// Memory with shared pages divided among their users. Exact and slow: it walks page tables.
    pub(crate) fn proportional_memory(&self) -> u64 {
        let of = |(pid, stat): &(u32, Stat)| {
            let exact = if stat.headless { None } else { self.proportional(*pid) };
            exact.unwrap_or_else(|| self.anonymous(*pid, stat))
        };
        let kernel = self.kernel.as_ref().map_or(0, |kernel| kernel.held);
        (self.list().iter().map(of).sum::<u64>() + self.files() + kernel).max(self.of_the_machine())
    }

    fn files(&self) -> u64 {
        self.files.iter().map(|(fd, before)| used(fd).unwrap_or(0).saturating_sub(*before)).sum()
    }

    /// Sends a signal to each of them.
    pub(crate) fn signal_all(&self, signal: Signal) {
        if self.everything {
            // To "process group 1" means kill(-1): every process but the caller, atomically. ESRCH: nobody left.
            rustix::process::kill_process_group(Pid::INIT, signal).ok();
            return;
        }
        for (pid, _) in self.list() {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                // Gone meanwhile is what we want.
                rustix::process::kill_process(pid, signal).ok();
            }
        }
    }

    /// Kills them all and waits until they are gone. Hands each status that it reaped to `reaped`.
    pub(crate) fn kill_all(&self, mut reaped: impl FnMut(Pid, WaitStatus)) {
        let started = Instant::now();
        loop {
            self.signal_all(Signal::KILL);
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

    fn anonymous(&self, pid: u32, stat: &Stat) -> u64 {
        if !stat.headless {
            return self.anonymous_of(&format!("/proc/{pid}")).unwrap_or(0);
        }
        let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return 0 };
        // All live threads show the same memory.
        threads.flatten().filter_map(|thread| self.anonymous_of(thread.path().to_str()?)).max().unwrap_or(0)
    }

    fn anonymous_of(&self, dir: &str) -> Option<u64> {
        let text = std::fs::read_to_string(format!("{dir}/statm")).ok()?;
        // proc(5): size, resident, shared, text, lib, data.
        let mut fields = text.split_ascii_whitespace().map(|f| f.parse::<u64>().unwrap_or(0) * self.page);
        let (size, resident, shared) = (fields.next()?, fields.next()?, fields.next()?);
        let data = fields.nth(2)?;
        let tables = if size.saturating_sub(data) > WIDE { status_field(dir, "VmPTE:").unwrap_or(0) } else { 0 };
        Some(resident.saturating_sub(shared) + tables)
    }

    fn proportional(&self, pid: u32) -> Option<u64> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        let field = |name: &str| {
            let line = text.lines().find(|l| l.starts_with(name))?;
            line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()
        };
        let tables = status_field(&format!("/proc/{pid}"), "VmPTE:").unwrap_or(0);
        Some(field("Pss_Anon:").or_else(|| field("Pss:"))? * 1024 + if tables > WIDE / 512 { tables } else { 0 })
    }

    /// The same by walking down from this process, whose descendants all others are. A VM has dozens of kernel
    /// threads, and looking at one costs pages: a fork copies each page that the kernel counts a reference in.
    fn tree(&self) -> Vec<(u32, Stat)> {
        let (mut found, mut waiting) = (Vec::new(), Vec::new());
        children(self.me, &mut waiting);
        while let Some(pid) = waiting.pop() {
            let Some(stat) = stat(pid) else { continue };
            found.push((pid, stat));
            children(pid, &mut waiting);
        }
        found
    }

    fn list(&self) -> Vec<(u32, Stat)> {
        if self.kernel_threads {
            return self.tree();
        }
        let mut found = Vec::new();
        for pid in self.pids().into_iter().flatten() {
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

/// The children of all threads of a process.
fn children(pid: u32, into: &mut Vec<u32>) {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return };
    for thread in threads.flatten() {
        let text = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        into.extend(text.split_ascii_whitespace().filter_map(|word| word.parse::<u32>().ok()));
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
    let (own_ticks, reaped_ticks) = (number(11)? + number(12)?, number(13)? + number(14)?);
    // num_threads is field 20.
    let headless = fields.first() == Some(&"Z") && number(17)? > 1;
    Some(Stat { ppid: u32::try_from(number(1)?).ok()?, flags: number(6)?, own_ticks, reaped_ticks, headless })
}

/// The file systems of [`IN_MEMORY`] that are there, each once.
fn in_memory() -> std::io::Result<Vec<(OwnedFd, u64)>> {
    let (mut found, mut seen) = (Vec::new(), HashSet::new());
    for path in IN_MEMORY {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(fd) = rustix::fs::open(path, flags, Mode::empty()) else { continue };
        if rustix::fs::fstatfs(&fd)?.f_type as u64 == TMPFS_MAGIC && seen.insert(rustix::fs::fstat(&fd)?.st_dev) {
            let before = used(&fd).unwrap_or(0);
            found.push((fd, before));
        }
    }
    Ok(found)
}

/// What the kernel keeps of a file beside its bytes: inode and name.
const INODE: u64 = 1024;

/// Bytes that a file system holds, those of deleted files that are still open included.
fn used(fd: &OwnedFd) -> Option<u64> {
    let stat = rustix::fs::fstatfs(fd).ok()?;
    let bytes = stat.f_blocks.saturating_sub(stat.f_bfree).saturating_mul(u64::try_from(stat.f_bsize).ok()?);
    Some(bytes.saturating_add(stat.f_files.saturating_sub(stat.f_ffree).saturating_mul(INODE)))
}

fn free_memory() -> u64 {
    let facts = rustix::system::sysinfo();
    facts.freeram.saturating_mul(facts.mem_unit.into())
}

/// How many processes the kernel has killed for want of memory.
pub(crate) fn oom_kills() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/vmstat").ok()?;
    text.lines().find_map(|l| l.strip_prefix("oom_kill "))?.trim().parse().ok()
}

/// `VmData` of a process, bytes: what RLIMIT_DATA counts.
pub(crate) fn data_size(pid: Pid) -> Option<u64> {
    status_field(&format!("/proc/{pid}"), "VmData:")
}

/// A field of a `status` file that is in kB, as bytes.
fn status_field(dir: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(format!("{dir}/status")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    Some(line.split_ascii_whitespace().next()?.parse::<u64>().ok()? * 1024)
}
