//! The calls that no safe crate offers. With `vm.rs` the only file of the agent with `unsafe`.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

/// Makes the command's program find the first of `fds` as descriptor `first`, the second as the next, and die with the agent.
pub(crate) fn give_descriptors(command: &mut Command, fds: [OwnedFd; 2], first: i32) {
    let hook = move || {
        // SAFETY: plain system calls on descriptors that this closure owns or that the program is to get; all are
        // async-signal-safe, so the window between fork and exec allows them.
        unsafe {
            let mut moved = [0; 2];
            // First out of the way: a source could stand at another's target.
            for (slot, fd) in moved.iter_mut().zip(&fds) {
                *slot = libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, first + 2);
                if *slot < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            for (target, source) in (first..).zip(moved) {
                if libc::dup2(source, target) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the hook allocates nothing, takes no lock and makes only async-signal-safe calls.
    unsafe { command.pre_exec(hook) };
}

/// What a program that is started in a live sandbox sets for itself, between fork and exec.
pub(crate) struct Setup {
    /// Limits that it and its children have.
    pub(crate) limits: Vec<(rustix::process::Resource, rustix::process::Rlimit)>,
    /// Its standard input is a terminal that its session takes.
    pub(crate) terminal: bool,
}

/// Makes the command's program the leader of a session of its own, with the limits of a sandbox, that dies with the agent.
pub(crate) fn lead_session(command: &mut Command, setup: Setup) {
    let hook = move || {
        rustix::process::setsid()?;
        if setup.terminal {
            // SAFETY: the request takes a number. Standard input is in place by now.
            if unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        for (resource, limit) in &setup.limits {
            rustix::process::setrlimit(*resource, *limit)?;
        }
        // SAFETY: prctl with numbers only.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: the hook allocates nothing, takes no lock and makes only system calls; what it reads was made before the fork.
    unsafe { command.pre_exec(hook) };
}

/// For its life, the calling thread's access to files is that of another user, without a capability for it.
pub(crate) struct AsUser(bool);

impl AsUser {
    /// As this user and group; as the process itself if there is none.
    pub(crate) fn new(user: Option<(u32, u32)>) -> AsUser {
        if let Some((uid, gid)) = user {
            // SAFETY: they take numbers. Group first: it needs what the user gives up.
            unsafe {
                libc::setfsgid(gid);
                libc::setfsuid(uid);
            }
        }
        AsUser(user.is_some())
    }

    /// Whether it is in force: the calls themselves say nothing of it.
    pub(crate) fn holds(&self, user: Option<(u32, u32)>) -> bool {
        // SAFETY: an id that is none changes nothing, and the present one is returned.
        user.is_none_or(|(uid, gid)| unsafe {
            libc::setfsuid(u32::MAX) as u32 == uid && libc::setfsgid(u32::MAX) as u32 == gid
        })
    }
}

impl Drop for AsUser {
    fn drop(&mut self) {
        if self.0 {
            // SAFETY: as above, back to the agent's own, which is root.
            unsafe {
                libc::setfsuid(0);
                libc::setfsgid(0);
            }
        }
    }
}

/// Lets this process run before every ordinary one that could run, for good. It needs the right to, which root of a VM has.
pub(crate) fn before_all_others() -> io::Result<()> {
    let lowest = libc::sched_param { sched_priority: 1 };
    // SAFETY: the pointer is to a live `sched_param`; the C library of the agent may have no sched_setscheduler().
    let done = unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, libc::SCHED_FIFO, &raw const lowest) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Bytes that wait in a pipe.
pub(crate) fn waiting(fd: impl std::os::fd::AsFd) -> usize {
    let mut n: libc::c_int = 0;
    // SAFETY: the request writes one int, which outlives the call.
    let done = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut n) };
    if done < 0 { 0 } else { usize::try_from(n).unwrap_or(0) }
}

/// CPU time of the reaped children of this process, and of the children that those had reaped.
pub(crate) fn reaped_cpu() -> Duration {
    // SAFETY: an all-zero `rusage` is a valid value of that plain C struct.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live, writable `rusage`.
    if unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage) } != 0 {
        return Duration::ZERO;
    }
    let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// CPU time of a live process, all its threads together.
pub(crate) fn cpu_clock(pid: libc::pid_t) -> Option<Duration> {
    // The kernel's name for it (CPUCLOCK_SCHED of a process). clock_getcpuclockid() is this and one more system call.
    let clock = (!pid << 3) | 2;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live, writable `timespec`.
    let got = unsafe { libc::clock_gettime(clock, &mut time) == 0 };
    got.then(|| Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

/// Takes a descriptor that the parent left open for this program by agreement.
pub(crate) fn inherited(fd: i32) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: F_SETFD takes no pointer. It also proves that the descriptor is open.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: open (just checked), and `main` takes each number of the agreement once, before anything else opens files.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
