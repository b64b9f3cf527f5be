//! Running a program of a directory that others filled, with that directory as all that it can see.

use std::{
    ffi::CStr,
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    process::{ExitStatus, Output},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
    io::Errno,
    mount::{MountFlags, MountPropagationFlags, UnmountFlags},
    pipe::PipeFlags,
    process::{Resource, Rlimit, Signal, WaitId, WaitIdOptions},
    thread::UnshareFlags,
};

use crate::{
    jail::{self, Filter},
    mount, process,
};

/// Bytes of a program's output that are kept.
const MOST_OUTPUT: usize = 64 * 1024;
/// Bytes of the file system for shared memory.
const SHARED_MEMORY: &CStr = c"mode=1777,size=64m";

/// Where and as whom.
#[derive(Clone, Copy, Debug)]
pub struct Confined<'a> {
    /// What becomes its root directory, writable.
    pub root: BorrowedFd<'a>,
    /// User and group on the host: those of the caller, or ids that the caller may give out.
    pub user: (u32, u32),
    /// System calls that it may make.
    pub filter: &'a Filter,
    /// After that time it is killed with all that it started.
    pub time: Duration,
}

impl Confined<'_> {
    /// Runs it to its end: in namespaces of its own, without network, without capabilities, behind the filter. Both
    /// streams of its output come as `stderr`, cut at 64 KiB.
    pub fn run(&self, program: &CStr, args: &[&CStr], env: &[&CStr]) -> io::Result<Output> {
        // The new mount namespace takes a working directory over, but no open directory; the way there by path may be
        // closed to the program's user. So a thread with a working directory of its own is the parent.
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                process::unshare(UnshareFlags::FS)?;
                rustix::process::fchdir(self.root)?;
                self.run_here(program, args, env)
            });
            thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that waits for it panicked")))
        })
    }

    fn run_here(&self, program: &CStr, args: &[&CStr], env: &[&CStr]) -> io::Result<Output> {
        let proc = rustix::fs::open("/proc", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let null = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let (output, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let (mapped, mapping) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        // All that takes memory comes before the fork: the child is a copy of this thread alone, and another thread may
        // hold the allocator's lock.
        let pointers = |list: &mut dyn Iterator<Item = &CStr>| -> Vec<*const libc::c_char> {
            list.map(CStr::as_ptr).chain([std::ptr::null()]).collect()
        };
        let args = pointers(&mut [program].into_iter().chain(args.iter().copied()));
        let env = pointers(&mut env.iter().copied());
        let (pid, pidfd) = match process::clone_into(process::SANDBOX_NAMESPACES)? {
            process::Forked::Parent(child) => child,
            process::Forked::Child => {
                drop(mapping);
                let error = match self.enter(&mapped, [&null, &theirs, &theirs]) {
                    Ok(()) => {
                        // SAFETY: both arrays end in null and their strings outlive the call.
                        unsafe { libc::execve(program.as_ptr(), args.as_ptr(), env.as_ptr()) };
                        Failed("start the program", last_error())
                    }
                    Err(error) => error,
                };
                error.say()
            }
        };
        drop((null, theirs, mapped));
        let child = Child(&pidfd);
        jail::settle_child_as(proc.as_fd(), pid, pidfd.as_fd(), self.user)?;
        rustix::io::write(&mapping, b"x")?;
        let text = read(&output, Instant::now() + self.time)?;
        drop(child);
        let waited = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)?;
        let status = waited.map_or(0, |status| match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => code << 8,
            (None, signal) => signal.unwrap_or(Signal::KILL.as_raw()),
        });
        Ok(Output { status: ExitStatus::from_raw(status), stdout: Vec::new(), stderr: text })
    }

    /// In the child, pid 1 of its namespace.
    fn enter(&self, mapped: &OwnedFd, [input, output, errors]: [&OwnedFd; 3]) -> Result<(), Failed> {
        fn done<T>(result: Result<T, impl Into<io::Error>>, step: &'static str) -> Result<T, Failed> {
            // An error of the system is a number, also in an `io::Error`.
            result.map_err(|error| Failed(step, error.into().raw_os_error().unwrap_or(0)))
        }
        let fds = [(input, 0), (output, 1), (errors, 2)];
        done(process::place_fds(&fds.map(|(fd, to)| (fd.as_raw_fd(), to))), "have its streams")?;
        if rustix::io::retry_on_intr(|| rustix::io::read(mapped, &mut [0u8; 1])) != Ok(1) {
            return Err(Failed("have a user", 0));
        }
        done(jail::become_sandbox_user(), "change its user")?;
        done(process::die_with_parent(), "end with its parent")?;
        done(rustix::process::setsid(), "have a session")?;
        let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
        done(rustix::mount::mount_change(c"/", private), "have mounts of its own")?;
        done(rustix::mount::mount_bind_recursive(c".", mount::STAGE), "mount its directory")?;
        done(rustix::process::chdir(mount::STAGE), "enter its root")?;
        done(rustix::process::pivot_root(c".", c"."), "change its root")?;
        done(rustix::mount::unmount(c".", UnmountFlags::DETACH), "leave the host's files")?;
        done(rustix::process::chdir(c"/"), "enter its root")?;
        // Python's processes share their locks there.
        for dir in [c"/dev", c"/dev/shm"] {
            match rustix::fs::mkdir(dir, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(Failed("make /dev/shm", error.raw_os_error())),
            }
        }
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        done(rustix::mount::mount(c"tmpfs", c"/dev/shm", c"tmpfs", flags, Some(SHARED_MEMORY)), "mount /dev/shm")?;
        done(process::close_from(3), "close descriptors")?;
        let none = Rlimit { current: Some(0), maximum: Some(0) };
        done(rustix::process::setrlimit(Resource::Core, none), "set its limits")?;
        done(process::reset_signals(), "reset signals")?;
        done(jail::drop_capabilities(), "drop its capabilities")?;
        self.filter.apply().map_err(|_| Failed("apply its filter", 0))
    }
}

/// What a child could not do, and the system's number of the reason. No text: see [`Confined::run`] on memory.
struct Failed(&'static str, i32);

impl Failed {
    /// In the child: its last words.
    fn say(self) -> ! {
        let mut words = [0; 128];
        let room = words.len();
        let mut rest = words.as_mut_slice();
        // It fits: each step is a few words.
        let _short = write!(rest, "cannot {} (os error {})", self.0, self.1);
        let used = room - rest.len();
        let _lost = rustix::io::write(process::borrow_fd(2), words.get(..used).unwrap_or_default());
        process::exit_now(125)
    }
}

fn last_error() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Ends a child, and with the first process of its namespace all others.
struct Child<'a>(&'a OwnedFd);

impl Drop for Child<'_> {
    fn drop(&mut self) {
        // The only failure is that it is gone already.
        let _gone = rustix::process::pidfd_send_signal(self.0, Signal::KILL);
    }
}

fn read(output: &OwnedFd, until: Instant) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(output, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let count = rustix::io::retry_on_intr(|| rustix::io::read(output, &mut buffer))?;
        if count == 0 {
            return Ok(text);
        }
        let room = MOST_OUTPUT.saturating_sub(text.len());
        text.extend_from_slice(buffer.get(..count.min(room)).unwrap_or_default());
    }
}
