//! Making processes: a zygote from the front, a worker from a zygote, a runner from a worker.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, Signal},
    thread::{CapabilitySet, CapabilitySets},
};

/// Namespaces of a sandbox: none is shared with the host.
pub const SANDBOX_NAMESPACES: i32 = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP;

/// Namespaces of a VM worker: as a sandbox's, but for the network. Making one takes four times as long as making all
/// the others (docs/adr/0012); a worker shares its zygote's, in which nothing is up, and can make no socket.
pub const WORKER_NAMESPACES: i32 = SANDBOX_NAMESPACES & !libc::CLONE_NEWNET;

/// Lets `command` start a zygote: `report` and `control` become its descriptors 3 and 4, it leads its own
/// session (a terminal's Ctrl-C reaches the front alone), and the kernel kills it when the *thread* that
/// spawns it ends, so spawn from a thread that lives as long as the zygote should.
pub fn as_zygote(command: &mut Command, report: OwnedFd, control: OwnedFd) {
    let parent = std::process::id();
    let setup = move || {
        rustix::process::setsid()?;
        die_with_parent()?;
        if rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get() as u32) != Some(parent) {
            return Err(io::Error::other("the front process is gone"));
        }
        place_fds(&[(report.as_raw_fd(), crate::control::REPORT_FD), (control.as_raw_fd(), crate::control::CONTROL_FD)])
    };
    // SAFETY: between fork and exec the closure calls async-signal-safe system calls only; its one
    // allocation is an error value on a path that ends in failure.
    unsafe { command.pre_exec(setup) };
}

/// Asks the kernel to kill this process when the thread that made it ends. A change of user id clears it.
pub fn die_with_parent() -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    Ok(())
}

/// Puts each descriptor (first) at its number (second), open across exec, whatever the numbers are.
/// Other descriptors are left as they are.
pub fn place_fds(wanted: &[(i32, i32)]) -> io::Result<()> {
    let above = wanted.iter().map(|&(_, to)| to).max().unwrap_or(0) + 1;
    // First out of the way: a source could stand at another's target.
    let mut moved = [(0, 0); 16];
    if wanted.len() > moved.len() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    for (slot, &(from, to)) in moved.iter_mut().zip(wanted) {
        // SAFETY: fcntl on a descriptor number touches no memory; a bad number is EBADF.
        let high = unsafe { libc::fcntl(from, libc::F_DUPFD_CLOEXEC, above) };
        if high < 0 {
            return Err(io::Error::last_os_error());
        }
        *slot = (high, to);
    }
    for &(high, to) in moved.iter().take(wanted.len()) {
        // SAFETY: as above. The target is replaced on purpose; the caller owns the descriptor table.
        if unsafe { libc::dup2(high, to) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `high` was made above and is not used again.
        unsafe { libc::close(high) };
    }
    Ok(())
}

/// Closes every descriptor from `first` on.
pub fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: takes three numbers; the caller (a fresh child) has given up the descriptors it closes.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// On which side of a fork we are.
#[derive(Debug)]
pub enum Forked<T> {
    /// In the child.
    Child,
    /// In the parent, with what it knows of the child.
    Parent(T),
}

/// `clone3` into `namespaces`: in the parent the child's pid and pidfd.
///
/// This is the raw system call. The child is a copy of the calling thread alone, so the caller must be
/// single threaded; and glibc's fork handlers do not run and its cached thread id is stale, so the child must
/// neither make threads nor ask the C library who it is; [`fork`] repairs the cache in *its* child.
pub fn clone_into(namespaces: i32) -> io::Result<Forked<(Pid, OwnedFd)>> {
    let mut pidfd: i32 = -1;
    #[repr(C)]
    #[derive(Default)]
    struct CloneArgs {
        flags: u64,
        pidfd: u64,
        child_tid: u64,
        parent_tid: u64,
        exit_signal: u64,
        stack: u64,
        stack_size: u64,
        tls: u64,
    }
    let args = CloneArgs {
        flags: (namespaces | libc::CLONE_PIDFD) as u64,
        pidfd: &raw mut pidfd as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    // SAFETY: the structure has the size given (CLONE_ARGS_SIZE_VER0); `pidfd` outlives the call. No stack
    // and no CLONE_VM: the child has its own copy of this address space, as after fork().
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    match pid {
        0 => Ok(Forked::Child),
        ..0 => Err(io::Error::last_os_error()),
        pid => {
            let pid = Pid::from_raw(pid as i32).ok_or_else(|| io::Error::other("clone3 gave no pid"))?;
            // SAFETY: the kernel just made this descriptor for us.
            Ok(Forked::Parent((pid, unsafe { OwnedFd::from_raw_fd(pidfd) })))
        }
    }
}

/// glibc's `fork`, for a child that goes on to run arbitrary code.
pub fn fork() -> io::Result<Forked<Pid>> {
    // SAFETY: the caller is single threaded (a zygote or its child), so the child's copy is consistent.
    match unsafe { libc::fork() } {
        0 => Ok(Forked::Child),
        ..0 => Err(io::Error::last_os_error()),
        pid => Pid::from_raw(pid).map(Forked::Parent).ok_or_else(|| io::Error::other("fork gave no pid")),
    }
}

/// Ends this process at once, without the handlers of whatever program it is a copy of.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: never returns and touches no memory of ours.
    unsafe { libc::_exit(status) }
}

/// Replaces this process. Returns only the error.
pub fn exec(program: &CString, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end in a null pointer and their strings outlive the call.
    unsafe { libc::execve(program.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Sets every signal back to its default action and unblocks all: exec keeps ignored signals ignored.
pub fn reset_signals() -> io::Result<()> {
    for signal in 1..=64 {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        // SAFETY: SIG_DFL installs no function. glibc refuses its own two signals (32, 33), which stay default.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: an all-zero set is the empty set on Linux; the kernel copies it.
    let done = unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut())
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether the process behind a pidfd has ended. In its own pid namespace a process cannot ask for its parent.
pub fn has_ended(pidfd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&Timespec::default()))? != 0)
}

/// Undoes [`ignore_children`]: a child's end can be waited for again.
pub fn heed_children() {
    // SAFETY: SIG_DFL installs no function.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Lets the kernel reap this process's children by itself.
pub fn ignore_children() {
    // SAFETY: SIG_IGN installs no function.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Takes over a descriptor that the process was started with. `None` if it is not open.
pub fn inherited_fd(number: i32) -> Option<OwnedFd> {
    // SAFETY: fcntl touches no memory.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return None;
    }
    // SAFETY: it is open, and by the start-up contract of the hidden commands it is this process's own;
    // each number is taken over once.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Borrows a descriptor number that is known to be open.
pub fn borrow_fd(number: i32) -> BorrowedFd<'static> {
    // SAFETY: callers name the standard streams or descriptors they placed with [`place_fds`].
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// Leaves the given namespaces; with `FS`, this thread has a working directory of its own. For a user namespace the
/// caller is single threaded: a process before its runtime starts.
pub fn unshare(namespaces: rustix::thread::UnshareFlags) -> io::Result<()> {
    // SAFETY: no CLONE_FILES among the flags in use, so no descriptor changes its meaning.
    unsafe { rustix::thread::unshare_unsafe(namespaces) }?;
    Ok(())
}

/// Takes every capability out of the bounding set but those whose bits are in `keep`.
pub fn limit_bounding_set(keep: u64) -> io::Result<()> {
    for capability in 0..64 {
        if keep & (1 << capability) != 0 {
            continue;
        }
        // SAFETY: prctl with numbers only. Past the kernel's last capability it says EINVAL.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::EINVAL) { Ok(()) } else { Err(error) };
        }
    }
    Ok(())
}

/// Gives up all capabilities but these, which also stay when a program is executed, whoever this process is.
pub fn keep_capabilities(keep: CapabilitySet) -> io::Result<()> {
    if rustix::thread::capabilities(None)?.effective.contains(CapabilitySet::SETPCAP) {
        limit_bounding_set(keep.bits())?;
    }
    rustix::thread::set_capabilities(None, CapabilitySets { effective: keep, permitted: keep, inheritable: keep })?;
    rustix::thread::clear_ambient_capability_set()?;
    keep.iter().try_for_each(|one| Ok(rustix::thread::configure_capability_in_ambient_set(one, true)?))
}

/// Gives up all supplementary groups.
pub fn clear_groups() -> io::Result<()> {
    // SAFETY: a count of zero reads no memory. The raw call changes this thread, the only one.
    let done = unsafe { libc::syscall(libc::SYS_setgroups, 0usize, std::ptr::null::<libc::gid_t>()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Becomes `id` for good: real, effective and saved user and group. Needs a single thread.
pub fn become_user(id: u32) -> io::Result<()> {
    let id = libc::c_long::from(id);
    // SAFETY: they take numbers only. Raw calls: they change this thread, the only one.
    unsafe {
        if libc::syscall(libc::SYS_setresgid, id, id, id) != 0 || libc::syscall(libc::SYS_setresuid, id, id, id) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
