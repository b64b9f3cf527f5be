//! In a worker, pid 1 of its sandbox: it enters the sandbox, forks the runner, and becomes the agent.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, OwnedFd},
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
    jail, mount, net,
    process::{self, Forked},
};

use super::{ServeError, Zygote, report, step};
use crate::layout::{AGENT, HOME};

/// Most bytes of `/tmp`, of the home directory, and of `/dev/shm`, each. (Memory limits count them too.)
const TMPFS_SIZE: u64 = 256 * 1024 * 1024;

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

/// A pipe: read end, write end.
type Pipe = (OwnedFd, OwnedFd);

/// The pipes between the agent and the runner.
struct Pipes {
    /// What the runner is told.
    told: Pipe,
    /// What is heard of it.
    heard: Pipe,
    stdin: Pipe,
    stdout: Pipe,
    stderr: Pipe,
}

impl Pipes {
    fn new() -> io::Result<Pipes> {
        Ok(Pipes { told: pipe()?, heard: pipe()?, stdin: pipe()?, stdout: pipe()?, stderr: pipe()? })
    }
}

impl Zygote {
    /// Makes a sandbox around this worker. `Ok` in the runner. The worker itself becomes the agent; an error comes back in the
    /// worker, with the socket on which to say it.
    pub(super) fn worker(
        &self,
        mapped: &OwnedFd,
        socket: OwnedFd,
        cgroup: Option<OwnedFd>,
    ) -> Result<(), (OwnedFd, ServeError)> {
        let made = self.enter(mapped, cgroup).and_then(|sockets| Ok((sockets, Pipes::new()?)));
        let (sockets, pipes) = match made {
            Ok(made) => made,
            Err(error) => return Err((socket, step("enter the sandbox")(error))),
        };
        match process::fork() {
            Err(error) => Err((socket, step("fork the runner")(error))),
            // The runner.
            Ok(Forked::Child) => match become_runner(pipes, sockets) {
                Ok(()) => {
                    std::mem::forget(socket);
                    self.ahead.touch();
                    Ok(())
                }
                Err(error) => {
                    // The agent takes what a runner says before it is ready as the reason.
                    report(&process::borrow_fd(4), &error.to_string());
                    process::exit_now(125)
                }
            },
            Ok(Forked::Parent(runner)) => {
                let Pipes { told, heard, stdin, stdout, stderr } = &pipes;
                let mut ends = vec![&socket, &told.1, &heard.0, &stdin.1, &stdout.0, &stderr.0];
                ends.extend(sockets.iter().flatten());
                let error = become_agent(runner, &ends, sockets.is_some());
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
}

/// In the runner: puts its ends of the pipes where it looks for them, and closes all else.
fn become_runner(pipes: Pipes, sockets: Option<[OwnedFd; 3]>) -> Result<(), ServeError> {
    let Pipes { told, heard, stdin, stdout, stderr } = pipes;
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
    placed.map_err(step("place descriptors"))?;
    process::close_from(5).map_err(step("close descriptors"))?;
    // A process group of its own: kill(0, …) of a program must not reach the agent.
    rustix::process::setsid().map(drop).map_err(|e| step("make a session")(e.into()))
}

/// Turns the worker into the agent: a small separate program, without a copy of the warmed runtime.
///
/// `ends`: what it finds from descriptor 3 on.
fn become_agent(runner: Pid, ends: &[&OwnedFd], uncounted: bool) -> ServeError {
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

fn number(pid: Pid) -> CString {
    // A number has no NUL byte.
    CString::new(pid.as_raw_nonzero().to_string()).unwrap_or_default()
}

fn pipe() -> io::Result<Pipe> {
    Ok(rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?)
}
