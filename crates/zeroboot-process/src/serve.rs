//! The fork path of the process engine: one worker for each `Fork` message.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType},
    pipe::PipeFlags,
    process::{Pid, Resource, Rlimit, getrlimit, setrlimit},
};
use zeroboot_sys::{
    arena,
    control::{self, Control, PROC_FD},
    jail::{self, Filter, JailError},
    mount, net,
    process::{self, Forked},
};

use crate::{
    ids,
    layout::{AGENT, HOME},
};

/// Most bytes of `/tmp`, of the home directory, and of `/dev/shm`, each. (Memory limits count them too.)
const TMPFS_SIZE: u64 = 256 * 1024 * 1024;

const SANDBOX_POLICY: &str = include_str!("../../../policy/process-sandbox.json");
/// The filter that is added on hosts without a cgroup.
const UNCOUNTED_POLICY: &str = include_str!("../../../policy/process-uncounted.json");

/// Moves the memory of this process into an image.
pub type Freeze = fn() -> io::Result<String>;

/// Why serving ended or never began.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A policy or a jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The control channel or a system call.
    #[error("{0}")]
    Io(String, #[source] io::Error),
    /// The zygote has more than one thread.
    #[error("the warmed runtime has {0} threads; only a single-threaded process can be forked")]
    Threads(usize),
}

fn step(what: &str) -> impl FnOnce(io::Error) -> ServeError + '_ {
    move |error| ServeError::Io(format!("{what}: {error}"), error)
}

/// Serves the control channel until the front is gone (`Ok(false)`), and returns `Ok(true)` in each forked
/// runner: jailed, with its standard streams and its control pipes in place.
///
/// `freeze` moves the warm memory into an image, and says what became of it. It is called before the fork of this number.
pub fn serve(control: &OwnedFd, mut freeze: Option<(Freeze, u64)>) -> Result<bool, ServeError> {
    let threads = std::fs::read_dir("/proc/self/task").map_err(step("list threads"))?.count();
    if threads != 1 {
        return Err(ServeError::Threads(threads));
    }
    let zygote = Zygote {
        filter: Filter::parse(SANDBOX_POLICY)?,
        uncounted_filter: Filter::parse(UNCOUNTED_POLICY)?,
        proc: process::inherited_fd(PROC_FD)
            .ok_or_else(|| step("find /proc")(io::Error::from_raw_os_error(rustix::io::Errno::BADF.raw_os_error())))?,
        ids: ids::mapped(),
    };
    process::ignore_children();
    let mut random = [0u8; 4];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| step("get random bytes")(e.into()))?;
    let mut count = u32::from_le_bytes(random);
    // From here on, so that nothing older is freed once the memory is an image.
    arena::begin().map_err(step("reserve memory"))?;
    let mut forks = 0u64;
    loop {
        let Some((message, mut fds)) = control::receive(control).map_err(step("read the control channel"))? else {
            return Ok(false);
        };
        let Control::Fork { id } = message else { continue };
        if fds.is_empty() {
            let text = "the Fork message came without its socket".into();
            control::send(control, &Control::ForkFailed { id, text }, &[])
                .map_err(step("answer on the control channel"))?;
            continue;
        }
        if let Some((freeze, _)) = freeze.take_if(|(_, before)| forks >= *before) {
            // Forks are as right without, and slower.
            let text = freeze().unwrap_or_else(|error| format!("no image: {error}"));
            control::send(control, &Control::Image { text }, &[]).map_err(step("answer on the control channel"))?;
        }
        forks += 1;
        let socket = fds.remove(0);
        let cgroup = fds.pop();
        let outside = zygote.ids.map_or_else(|| rustix::process::geteuid().as_raw(), |ids| ids::BASE + count % ids);
        count = count.wrapping_add(1);
        match zygote.fork(socket, cgroup, outside) {
            Ok(Forked::Child) => {
                // Its descriptors are closed already, all at once.
                std::mem::forget(zygote);
                return Ok(true);
            }
            Ok(Forked::Parent(pidfd)) => control::send(control, &Control::Forked { id }, &[pidfd.as_fd()]),
            Err(error) => control::send(control, &Control::ForkFailed { id, text: error.to_string() }, &[]),
        }
        .map_err(step("answer on the control channel"))?;
    }
}

struct Zygote {
    /// One for the agent, the runner and all that they start: the agent starts commands, whose filter can only be as wide
    /// as its own.
    filter: Filter,
    uncounted_filter: Filter,
    /// Our own `/proc`, for the children's id maps.
    proc: OwnedFd,
    /// How many users sandboxes can have.
    ids: Option<u32>,
}

impl Zygote {
    /// One worker. Returns in the zygote (with the worker's pidfd) and in the runner.
    fn fork(&self, socket: OwnedFd, cgroup: Option<OwnedFd>, outside: u32) -> Result<Forked<OwnedFd>, ServeError> {
        let (mapped, mapping) =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|e| step("make a pipe")(e.into()))?;
        match process::clone_into(process::SANDBOX_NAMESPACES).map_err(step("clone3"))? {
            Forked::Parent((pid, pidfd)) => {
                drop((mapped, socket, cgroup));
                if let Err(error) = jail::settle_child(self.proc.as_fd(), pid, pidfd.as_fd(), outside) {
                    kill(&pidfd);
                    return Err(step("write the id maps")(error));
                }
                // One byte lets the worker go on; a worker that is gone already shows on its socket.
                if rustix::io::write(&mapping, b"x").is_err() {
                    kill(&pidfd);
                }
                Ok(Forked::Parent(pidfd))
            }
            Forked::Child => {
                drop(mapping);
                match self.worker(&mapped, socket, cgroup) {
                    Ok(()) => {
                        std::mem::forget(mapped);
                        Ok(Forked::Child)
                    }
                    Err((socket, error)) => {
                        report(&socket, &error.to_string());
                        process::exit_now(125)
                    }
                }
            }
        }
    }

    /// In the worker, pid 1 of its namespace. Returns in the runner only.
    fn worker(&self, mapped: &OwnedFd, socket: OwnedFd, cgroup: Option<OwnedFd>) -> Result<(), (OwnedFd, ServeError)> {
        let made =
            self.enter(mapped, cgroup).and_then(|sockets| Ok((sockets, pipe()?, pipe()?, pipe()?, pipe()?, pipe()?)));
        let (sockets, told, heard, stdin, stdout, stderr) = match made {
            Ok(fds) => fds,
            Err(error) => return Err((socket, step("enter the sandbox")(error))),
        };
        match process::fork() {
            Err(error) => Err((socket, step("fork the runner")(error))),
            Ok(Forked::Child) => {
                let placed = process::place_fds(&[
                    (stdin.0.as_raw_fd(), 0),
                    (stdout.1.as_raw_fd(), 1),
                    (stderr.1.as_raw_fd(), 2),
                    (told.0.as_raw_fd(), 3),
                    (heard.1.as_raw_fd(), 4),
                ]);
                // Their numbers are gone with close_from: nobody may close them once more.
                for fd in [told, heard, stdin, stdout, stderr].into_iter().flat_map(|(read, write)| [read, write]) {
                    std::mem::forget(fd);
                }
                sockets.into_iter().flatten().for_each(std::mem::forget);
                let jailed = placed.map_err(step("place descriptors")).and_then(|()| {
                    process::close_from(5).map_err(step("close descriptors"))?;
                    // A process group of its own: kill(0, …) of a program must not reach the agent.
                    rustix::process::setsid().map(drop).map_err(|e| step("make a session")(e.into()))
                });
                match jailed {
                    Ok(()) => {
                        std::mem::forget(socket);
                        Ok(())
                    }
                    Err(error) => {
                        // The agent takes what a runner says before it is ready as the reason.
                        report(&process::borrow_fd(4), &error.to_string());
                        process::exit_now(125)
                    }
                }
            }
            Ok(Forked::Parent(runner)) => {
                let mut ends = vec![&socket, &told.1, &heard.0, &stdin.1, &stdout.0, &stderr.0];
                ends.extend(sockets.iter().flatten());
                let error = self.become_agent(runner, &ends, sockets.is_some());
                Err((socket, error))
            }
        }
    }

    /// Everything that needs the capabilities of the new user namespace, then none are left.
    /// Where no cgroup counts its memory, gives what shows that of its sockets, for the agent.
    fn enter(&self, mapped: &OwnedFd, cgroup: Option<OwnedFd>) -> io::Result<Option<[OwnedFd; 3]>> {
        let counted = cgroup.is_some();
        if rustix::io::retry_on_intr(|| rustix::io::read(mapped, &mut [0u8; 1]))? != 1 {
            return Err(io::Error::other("the zygote ended"));
        }
        // Only what the zygote changed for itself: the handlers of a warm interpreter are its own.
        process::heed_children();
        // A process group holds across pid namespaces: in the zygote's, kill(0, …) would reach the zygote and all
        // other sandboxes wherever the user ids allow it.
        rustix::process::setsid()?;
        if let Some(procs) = cgroup {
            // Before the change of user: up to Linux 5.15 it is the writer who must have the right.
            rustix::io::write(&procs, b"0")?;
        }
        jail::become_sandbox_user()?;
        // After the change of user, which clears it.
        process::die_with_parent()?;
        let mut unique = [0u8; 6];
        rustix::rand::getrandom(&mut unique, rustix::rand::GetRandomFlags::empty())?;
        let name: String = unique.iter().map(|byte| format!("{byte:02x}")).collect();
        rustix::system::sethostname(format!("sandbox-{name}").as_bytes())?;
        mount::private_proc()?;
        let own = |path: &str, mode| mount::private_tmpfs(Path::new(path), jail::SANDBOX_UID, mode, TMPFS_SIZE);
        own("/tmp", "1777")?;
        own(HOME, "755")?;
        own("/dev/shm", "1777")?;
        mount::private_terminals()?;
        net::loopback_up()?;
        rustix::process::chdir(HOME)?;
        limit_counts()?;
        self.limit_network()?;
        let sockets = if counted { None } else { Some(self.sockets()?) };
        jail::drop_capabilities()?;
        jail::landlock(&WRITABLE.map(Path::new)).map_err(io::Error::other)?;
        // For the runner, which is a copy of this process.
        jail::allow_looking()?;
        // No core file (limits.rs says why not 0), before the filter forbids to change that.
        setrlimit(Resource::Core, Rlimit { current: Some(1), maximum: Some(1) })?;
        if !counted {
            self.uncounted_filter.apply().map_err(io::Error::other)?;
        }
        self.filter.apply().map_err(io::Error::other)?;
        Ok(sockets)
    }

    /// What shows the sockets of our own network namespace.
    fn sockets(&self) -> io::Result<[OwnedFd; 3]> {
        let stat = |file| rustix::fs::openat(&self.proc, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let diag = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(rustix::net::netlink::SOCK_DIAG),
        )?;
        // A host without IPv6 has no sockets of it.
        let six = stat("net/sockstat6")
            .or_else(|_| rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()))?;
        Ok([stat("net/sockstat")?, six, diag])
    }

    /// Bounds what can wait in the sandbox's sockets: memory that is in no process's account.
    fn limit_network(&self) -> io::Result<()> {
        for (file, most) in NETWORK {
            // Of our own network namespace, whatever process this /proc is of.
            let written = rustix::fs::openat(&self.proc, file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
                .and_then(|file| rustix::io::write(&file, most.as_bytes()));
            match written {
                // A container in which /proc/sys is read-only keeps the kernel's own values.
                Ok(_) | Err(Errno::ROFS | Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Turns the worker into the agent: a small separate program, without a copy of the warmed runtime.
    ///
    /// `ends`: what it finds from descriptor 3 on.
    fn become_agent(&self, runner: Pid, ends: &[&OwnedFd], uncounted: bool) -> ServeError {
        let wanted: Vec<_> = ends.iter().map(|fd| fd.as_raw_fd()).zip(3..).collect();
        let setup = || -> Result<io::Error, ServeError> {
            process::place_fds(&wanted).map_err(step("place descriptors"))?;
            process::close_from(3 + wanted.len() as u32).map_err(step("close descriptors"))?;
            process::reset_signals().map_err(step("reset signals"))?;
            let mut args = vec![c"agent".into(), c"sandbox".into(), number(runner)];
            args.extend(uncounted.then(|| c"uncounted".into()));
            Ok(process::exec(&CString::from(AGENT_PATH), &args, &[]))
        };
        match setup() {
            Ok(error) => step("start the agent")(error),
            Err(error) => error,
        }
    }
}

/// Limits that a request cannot set: of what the kernel keeps for a user, and also charges to the zygote's user.
const COUNTS: [(Resource, u64); 3] = [
    // POSIX timers and queued signals.
    (Resource::Sigpending, 1024),
    // No message queue can be opened; nothing is charged for one that was inherited.
    (Resource::Msgqueue, 0),
    // As the kernel's own default.
    (Resource::Memlock, 8 * 1024 * 1024),
];

/// Settings of the sandbox's network namespace.
const NETWORK: [(&str, &str); 4] = [
    // Connections that nobody has accepted; each holds up to 208 KiB that its client has left behind. As many as Python's
    // `listen` asks for; the kernel's own is 4096.
    ("sys/net/core/somaxconn", "128"),
    // Datagrams in a socket. The kernel's own, which a distribution may raise.
    ("sys/net/unix/max_dgram_qlen", "10"),
    // Bytes of a TCP connection: least, first, most. The kernel's own is up to 6 MiB, of which the host's connections have to
    // leave what `tcp_mem` does not grant. `kernel_memory.rs` of the agent counts on these.
    ("sys/net/ipv4/tcp_rmem", "4096 131072 262144"),
    ("sys/net/ipv4/tcp_wmem", "4096 16384 262144"),
];

fn limit_counts() -> io::Result<()> {
    for (resource, most) in COUNTS {
        let most = getrlimit(resource).maximum.map_or(most, |maximum| maximum.min(most));
        setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?;
    }
    Ok(())
}

const AGENT_PATH: &std::ffi::CStr = c"/.zeroboot/agent";
const _: () = assert!(AGENT_PATH.to_bytes().len() == AGENT.len());

/// Directories that a sandbox may write to.
const WRITABLE: [&str; 5] = [HOME, "/tmp", "/dev/shm", "/dev/null", "/dev/pts"];

fn number(pid: Pid) -> CString {
    // A number has no NUL byte.
    CString::new(pid.as_raw_nonzero().to_string()).unwrap_or_default()
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?)
}

fn kill(pidfd: &OwnedFd) {
    // The only failure is that it is gone already, which is what we want.
    let _gone = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
}

/// Says why there will be no sandbox. A reader that is gone needs no answer.
fn report(socket: &(impl AsFd + ?Sized), text: &str) {
    let mut bytes = Vec::new();
    zeroboot_proto::encode(&mut bytes, zeroboot_proto::Kind::Failure, text.as_bytes());
    let fd: BorrowedFd<'_> = socket.as_fd();
    let _gone = rustix::io::write(fd, &bytes);
}
