//! PID 1 of a VM: start-up, the agent's half of the mailbox, and the kernel's part of the identity.
//!
//! One of the two files of the agent with `unsafe` (the other is `sys.rs`): the port, the pinned pages, and
//! system calls that have no safe wrapper.
#![allow(unsafe_code)]

use std::{
    ffi::CStr,
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::{
            fs::{FileExt, OpenOptionsExt},
            process::CommandExt,
        },
    },
    process::Command,
    sync::atomic::{Ordering, compiler_fence},
};

use zeroboot_proto::{
    Identity,
    mailbox::{
        ABOUT_AT, AREA, AREA_PAGES, CONSOLE_PORT, DOORBELL_PORT, LENGTH_AT, MAGIC, MAX_ABOUT, MORE_AT, PAGE, PAGES,
        Ring, TABLE_AT, VERSION,
    },
};

/// A file system that the sandbox expects, in the order of mounting.
struct Mount {
    source: &'static CStr,
    target: &'static CStr,
    kind: &'static CStr,
    flags: libc::c_ulong,
    options: &'static CStr,
    /// Whether the sandbox fails without it. The others are a convenience that a small kernel may lack.
    needed: bool,
}

const NO_EXEC: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
const FILES: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV;

const MOUNTS: &[Mount] = &[
    Mount { source: c"proc", target: c"/proc", kind: c"proc", flags: NO_EXEC, options: c"", needed: true },
    Mount {
        source: c"sysfs",
        target: c"/sys",
        kind: c"sysfs",
        flags: NO_EXEC | libc::MS_RDONLY,
        options: c"",
        needed: false,
    },
    Mount {
        source: c"cgroup2",
        target: c"/sys/fs/cgroup",
        kind: c"cgroup2",
        flags: NO_EXEC,
        options: c"",
        needed: false,
    },
    Mount {
        source: c"devtmpfs",
        target: c"/dev",
        kind: c"devtmpfs",
        flags: libc::MS_NOSUID,
        options: c"mode=755",
        needed: true,
    },
    Mount {
        source: c"devpts",
        target: c"/dev/pts",
        kind: c"devpts",
        flags: libc::MS_NOSUID | libc::MS_NOEXEC,
        options: c"ptmxmode=666,mode=620",
        needed: false,
    },
    // Half of the memory each, at most: what is written here is memory of the sandbox.
    Mount {
        source: c"shm",
        target: c"/dev/shm",
        kind: c"tmpfs",
        flags: FILES,
        options: c"mode=1777,size=50%",
        needed: true,
    },
    Mount {
        source: c"run",
        target: c"/run",
        kind: c"tmpfs",
        flags: FILES,
        options: c"mode=755,size=10%",
        needed: true,
    },
    Mount {
        source: c"tmp",
        target: c"/tmp",
        kind: c"tmpfs",
        flags: FILES,
        options: c"mode=1777,size=50%",
        needed: true,
    },
    Mount {
        source: c"home",
        target: c"/home/sandbox",
        kind: c"tmpfs",
        flags: FILES,
        options: c"mode=700,uid=1000,gid=1000,size=50%",
        needed: true,
    },
];

/// A value below `/proc/sys`.
struct Setting {
    path: &'static str,
    value: &'static str,
    /// Whether the sandbox fails without it.
    needed: bool,
}

const SETTINGS: &[Setting] = &[
    // Pinned pages must not be moved by compaction: the host knows them by address.
    Setting { path: "/proc/sys/vm/compact_unevictable_allowed", value: "0", needed: true },
    // Compaction ahead of need wakes a kernel thread twice a second. Nothing here needs huge pages.
    Setting { path: "/proc/sys/vm/compaction_proactiveness", value: "0", needed: false },
    // Folding each CPU's counters into the whole wakes the guest once a second. Seconds: what reads them exactly folds first.
    Setting { path: "/proc/sys/vm/stat_interval", value: "600", needed: false },
];

/// Bound over `/proc/sys/kernel/random/boot_id`, which the kernel makes once and a fork would share.
const BOOT_ID: &str = "/run/boot_id";

/// The machine as its first process sees it.
#[derive(Debug)]
pub(crate) struct Vm {
    mailbox: Mailbox,
    /// `/dev/hpet`: readable once the host has raised the wake line.
    wake: File,
}

impl Vm {
    /// Mounts, raises the loopback interface, takes the doorbell and pins the mailbox.
    pub(crate) fn start() -> io::Result<Vm> {
        // The console first: every later failure is told there.
        ports()?;
        slow_clock()?;
        for mount in MOUNTS {
            let target = mount.target.to_string_lossy();
            fs::create_dir_all(&*target).or_else(|e| if mount.needed { Err(e) } else { Ok(()) })?;
            // SAFETY: five C strings that live forever, and flags.
            let done = unsafe {
                libc::mount(
                    mount.source.as_ptr(),
                    mount.target.as_ptr(),
                    mount.kind.as_ptr(),
                    mount.flags,
                    mount.options.as_ptr().cast(),
                )
            };
            if done < 0 && mount.needed {
                let error = io::Error::last_os_error();
                return Err(io::Error::new(error.kind(), format!("cannot mount {target}: {error}")));
            }
        }
        for (link, target) in [
            ("/dev/fd", "/proc/self/fd"),
            ("/dev/stdin", "/proc/self/fd/0"),
            ("/dev/stdout", "/proc/self/fd/1"),
            ("/dev/stderr", "/proc/self/fd/2"),
        ] {
            match std::os::unix::fs::symlink(target, link) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        loopback_up()?;
        for setting in SETTINGS {
            match fs::write(setting.path, setting.value) {
                Err(error) if setting.needed => {
                    return Err(io::Error::new(error.kind(), format!("cannot set {}: {error}", setting.path)));
                }
                _ => {}
            }
        }
        fs::write(BOOT_ID, uuid([0; 16]))?;
        bind(c"/run/boot_id", c"/proc/sys/kernel/random/boot_id")?;
        Ok(Vm { mailbox: Mailbox::new()?, wake: wake_line()? })
    }

    /// What is readable once the host has raised the wake line.
    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Forgets that the host has raised the wake line. Call it before [`Vm::exchange`]: what comes after that is raised
    /// again.
    pub(crate) fn forget_wake(&mut self) -> io::Result<()> {
        // The count of interrupts, an `unsigned long`: how many there were says nothing.
        match self.wake.read(&mut [0; 8]) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    /// Rings `Ready`. The snapshot is taken inside this call, which then returns once in each fork. `about` is
    /// the payload of the runner's `Ready` frame, at most [`MAX_ABOUT`] bytes of which are told to the host.
    pub(crate) fn ready(&mut self, about: &[u8]) -> io::Result<()> {
        zero_free_memory()?;
        let about = about.get(..about.len().min(MAX_ABOUT)).unwrap_or_default();
        self.mailbox.put(about);
        self.mailbox.write(ABOUT_AT, &(about.len() as u32).to_le_bytes());
        let frame = u32::try_from(self.mailbox.header / PAGE as u64).map_err(io::Error::other)?;
        ring(Ring::Ready.encode(frame));
        Ok(())
    }

    /// Appends what the host had put into the mailbox before it let this guest run on. `true`: it has more;
    /// ring [`Ring::Want`].
    pub(crate) fn take_input(&mut self, input: &mut Vec<u8>) -> bool {
        self.mailbox.take(input)
    }

    /// One doorbell: hands over at most [`AREA`] bytes of frames and appends the host's bytes to `input`.
    /// `true`: the host has more; ring [`Ring::Want`].
    pub(crate) fn exchange(&mut self, why: Ring, bytes: &[u8], input: &mut Vec<u8>) -> bool {
        let bytes = bytes.get(..bytes.len().min(AREA)).unwrap_or_default();
        self.mailbox.put(bytes);
        ring(why.encode(bytes.len() as u32));
        self.mailbox.take(input)
    }
}

/// Opens the wake line: an HPET in periodic mode on an edge, of which the kernel's driver then only counts interrupts and
/// wakes who polls. While the template boots the host imitates the device; later it sends the interrupt itself.
fn wake_line() -> io::Result<File> {
    const DEVICE: &str = "/dev/hpet";
    // In the order that the driver asks for; numbers of <linux/hpet.h>.
    const REQUESTS: [(&str, libc::Ioctl, libc::c_ulong); 3] = [
        // Any rate: the device has no clock.
        ("HPET_IRQFREQ", 0x4008_6806, 64),
        // Else the driver would read the device's counter in each interrupt.
        ("HPET_EPI", 0x6804, 0),
        ("HPET_IE_ON", 0x6801, 0),
    ];
    let failed = |what: &str| {
        let what = what.to_owned();
        move |error: io::Error| io::Error::new(error.kind(), format!("cannot {what} the wake line {DEVICE}: {error}"))
    };
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(DEVICE).map_err(failed("open"))?;
    for (name, request, value) in REQUESTS {
        // SAFETY: requests that take a number, on a descriptor that we hold.
        check(unsafe { libc::ioctl(file.as_raw_fd(), request, value) }).map_err(failed(&format!("set {name} of")))?;
    }
    Ok(file)
}

/// The agent's half of the mailbox: pages that are never moved, swapped or copied.
#[derive(Debug)]
struct Mailbox {
    base: *mut u8,
    header: u64,
}

impl Mailbox {
    fn new() -> io::Result<Mailbox> {
        let len = PAGES * PAGE;
        // Shared, not private: a fork of this process would otherwise make the pages copy-on-write, and
        // the agent would go on in a copy that the host does not know. DONTFORK keeps children out.
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the range is the mapping that was just made.
        check(unsafe { libc::mlock(base, len) })?;
        // SAFETY: as above; DONTFORK changes nothing in this process.
        check(unsafe { libc::madvise(base, len, libc::MADV_DONTFORK) })?;
        let base = base.cast::<u8>();
        // SAFETY: the whole mapping is ours and writable.
        unsafe { std::ptr::write_bytes(base, 0, len) };

        let pagemap = File::open("/proc/self/pagemap")?;
        let address = |page: usize| -> io::Result<u64> {
            const PRESENT: u64 = 1 << 63;
            const FRAME: u64 = (1 << 55) - 1;
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, (base as u64 / PAGE as u64 + page as u64) * 8)?;
            match u64::from_le_bytes(entry) {
                entry if entry & PRESENT != 0 && entry & FRAME != 0 => Ok((entry & FRAME) * PAGE as u64),
                _ => Err(io::Error::other("a mailbox page has no physical address")),
            }
        };
        let mut mailbox = Mailbox { base, header: address(0)? };
        mailbox.write(0, &MAGIC.to_le_bytes());
        mailbox.write(4, &VERSION.to_le_bytes());
        for page in 1..PAGES {
            let at = TABLE_AT + 8 * (page - 1);
            mailbox.write(at, &address(page)?.to_le_bytes());
        }
        Ok(mailbox)
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= PAGES * PAGE);
        // SAFETY: checked above; the source cannot overlap pages that no reference points into.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(at), bytes.len()) };
    }

    fn word(&self, at: usize) -> u32 {
        assert!(at.is_multiple_of(4) && at + 4 <= PAGES * PAGE);
        // SAFETY: checked above; aligned, since the mapping begins at a page. Volatile: the host writes it.
        unsafe { self.base.add(at).cast::<u32>().read_volatile() }
    }

    /// Into the area towards the host, which is the second.
    fn put(&mut self, bytes: &[u8]) {
        self.write(PAGE * (1 + AREA_PAGES), bytes);
    }

    /// From the area towards the guest, which is the first. Takes its bytes once: the length is zeroed.
    fn take(&mut self, input: &mut Vec<u8>) -> bool {
        let len = (self.word(LENGTH_AT) as usize).min(AREA);
        let more = self.word(MORE_AT) != 0;
        let start = input.len();
        input.resize(start + len, 0);
        if let Some(to) = input.get_mut(start..) {
            // SAFETY: `to` has `len` bytes, at most an area, and cannot overlap the mapping.
            unsafe { std::ptr::copy_nonoverlapping(self.base.add(PAGE), to.as_mut_ptr(), len) };
        }
        self.write(LENGTH_AT, &0u32.to_le_bytes());
        more
    }
}

/// One exit: the host reads the mailbox, changes it, and lets the guest go on.
fn ring(value: u32) {
    compiler_fence(Ordering::SeqCst);
    // SAFETY: `ports` gave this thread the port. The host changes only mailbox pages, which are read
    // through raw pointers after this; the assembly is a barrier for memory (no `nomem`).
    unsafe {
        std::arch::asm!("out dx, eax", in("dx") DOORBELL_PORT, in("eax") value, options(nostack, preserves_flags));
    }
    compiler_fence(Ordering::SeqCst);
}

/// Writes to the boot console, which a failed template build shows. Two exits for each byte: only for what
/// ends the machine.
pub(crate) fn console(text: &str) {
    for byte in text.bytes().chain([b'\n']) {
        // SAFETY: `ports` gave this thread the port; if it did not, there is no machine to go on with.
        unsafe {
            std::arch::asm!("out dx, al", in("dx") CONSOLE_PORT, in("al") byte, options(nomem, nostack, preserves_flags));
        }
    }
}

/// The host's doorbell and console.
const PORTS: [(u16, libc::c_ulong); 2] = [(DOORBELL_PORT, 4), (CONSOLE_PORT, 1)];

fn ports() -> io::Result<()> {
    for (port, count) in PORTS {
        // SAFETY: no memory is touched; the ports are those of the host's doorbell and console.
        check(unsafe { libc::ioperm(port.into(), count, 1) })?;
    }
    Ok(())
}

/// Makes the command's program start without the ports: it would inherit them, and could ring in our name.
pub(crate) fn without_ports(command: &mut Command) {
    let hook = || {
        for (port, count) in PORTS {
            // SAFETY: no memory is touched, and a right is only given up.
            check(unsafe { libc::ioperm(port.into(), count, 0) })?;
        }
        Ok(())
    };
    // SAFETY: the hook only makes system calls: no lock, no allocation.
    unsafe { command.pre_exec(hook) };
}

/// Lets this process run before all others as long as it has something to do; what it starts is ordinary again. A fork of a
/// checkpoint is told who it is before anything else in it runs.
pub(crate) fn go_first() -> io::Result<()> {
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // The kernel's `struct sched_param`. C libraries have more fields in theirs, and some refuse the call.
    let priority: libc::c_int = 1;
    // SAFETY: the number outlives the call.
    let done = unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &raw const priority) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Leaves only zeros in free memory: pages of zeros are not stored in the template. What was freed (above all
/// the initramfs, which the kernel fills with 0xcc) would be as large as the root file system.
fn zero_free_memory() -> io::Result<()> {
    /// Bytes that are left free, so that nothing else is evicted while the rest is held.
    const SPARE: usize = 24 << 20;
    let text = fs::read_to_string("/proc/meminfo")?;
    let free = text.lines().find_map(|l| l.strip_prefix("MemFree:")?.trim().strip_suffix(" kB")?.parse::<usize>().ok());
    let len = free.ok_or_else(|| io::Error::other("no MemFree in /proc/meminfo"))? * 1024;
    let len = len.saturating_sub(SPARE) & !(PAGE - 1);
    if len == 0 {
        return Ok(());
    }
    // SAFETY: a new private mapping at an address of the kernel's choice; it is populated and given back
    // before anything else knows its address.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let base = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // As much as there is: it is worth some memory, not a failed template.
        let _partly = libc::madvise(base, len, libc::MADV_POPULATE_WRITE);
        check(libc::munmap(base, len))
    }
}

/// Sets the wall clock two hours back while the template is made; the identity sets it right. OpenSSL's
/// generators then find their last seed more than an hour old (3600 s is the limit of the primary one, 420 s of
/// the others) and seed themselves again: the only way for Node, which has no call for it, and for every copy
/// of OpenSSL that a package brings along. It detects forks by the process id, which is the same in all of ours.
fn slow_clock() -> io::Result<()> {
    const BACK: i64 = 2 * 3600;
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure outlives both calls.
    unsafe {
        check(libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut now))?;
        now.tv_sec = (now.tv_sec - BACK).max(0);
        check(libc::clock_settime(libc::CLOCK_REALTIME, &raw const now))
    }
}

fn loopback_up() -> io::Result<()> {
    // sockios.h. (musl and glibc differ in the type of a request.)
    const SIOCSIFFLAGS: libc::Ioctl = 0x8914;
    // SAFETY: plain system calls; the request is an all-zero ifreq with a name and flags, as
    // SIOCSIFFLAGS takes it.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        check(socket)?;
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
            *to = *from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        let done = check(libc::ioctl(socket, SIOCSIFFLAGS, &raw const request));
        libc::close(socket);
        done
    }
}

fn bind(source: &CStr, target: &CStr) -> io::Result<()> {
    // SAFETY: two C strings; a bind mount takes no type and no data.
    check(unsafe { libc::mount(source.as_ptr(), target.as_ptr(), std::ptr::null(), libc::MS_BIND, std::ptr::null()) })
}

/// Makes this fork's kernel its own, before anything of the user's runs: entropy, wall clock, host name,
/// boot id. Any failure is an error: a sandbox without an identity must not run.
pub(crate) fn apply_identity(identity: &Identity) -> io::Result<()> {
    // struct rand_pool_info: bits of entropy, bytes, the bytes.
    #[repr(C)]
    struct Pool {
        bits: libc::c_int,
        bytes: libc::c_int,
        entropy: [u8; 64],
    }
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    let random = OpenOptions::new().write(true).open("/dev/random")?;
    let pool = Pool { bits: 512, bytes: 64, entropy: identity.entropy };
    // SAFETY: the structure has the layout that the request takes and outlives the call.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const pool) })?;
    // Adding alone changes the pool; the generator that everyone reads from takes it over here.
    // SAFETY: no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) })?;

    const SECOND: u64 = 1_000_000_000;
    let time = libc::timespec {
        tv_sec: (identity.realtime_ns / SECOND) as i64,
        tv_nsec: (identity.realtime_ns % SECOND) as libc::c_long,
    };
    // SAFETY: the structure outlives the call.
    check(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) })?;

    let name = identity.host_name();
    // SAFETY: pointer and length of one live string.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) })?;

    let mut id = [0u8; 16];
    // SAFETY: pointer and length of one live array; the generator has just been seeded.
    let got = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
    if got != id.len() as isize {
        return Err(io::Error::last_os_error());
    }
    fs::write(BOOT_ID, uuid(id))
}

/// The text of a random (version 4) UUID, with a line end as the kernel's file has it.
fn uuid(mut bytes: [u8; 16]) -> String {
    use std::fmt::Write;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = String::with_capacity(37);
    for (i, byte) in bytes.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text.push('\n');
    text
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_boot_id_is_a_version_4_uuid() {
        assert_eq!(super::uuid([0xff; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff\n");
    }
}
