//! Memory that the host's kernel holds for a sandbox and that is in no process's account: behind sockets, pipes, epoll
//! descriptors, file locks and mappings. A cgroup counts it. Where there is none, this does, for the agent's watchdog.
//!
//! Each figure is the most that a thing can hold, or what the kernel says that it holds. Small numbers of things cost
//! nothing: their sum is bounded, and most programs have no more.
//!
//! | what | how it is counted |
//! |---|---|
//! | Unix sockets | `sock_diag(7)`: what each has sent that nobody has taken |
//! | sockets that were closed with bytes on their way | all sockets of the namespace less those that are shown: twice a send buffer each |
//! | TCP, UDP | `sock_diag(7)`, if there are many |
//! | mappings | lines of `/proc/PID/maps` |
//! | pipes, watches, locks | `/proc/PID/fd` and `fdinfo` |

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, SendFlags};

/// Interval between looks at mappings and descriptors, which are dear; a look that took long is followed by a pause that is
/// so many times longer.
const LOOK: Duration = Duration::from_millis(100);
const LOOK_SHARE: u32 = 10;

/// A `vm_area_struct` and its share of the tree. 807 MiB were measured for 40 times 65,530.
const MAPPING: u64 = 320;
/// So many of each process cost nothing.
const FREE_MAPPINGS: u64 = 512;
/// An `epitem` with its entry in a queue, or a `file_lock`.
const WATCH: u64 = 256;
/// A pipe's buffers, until its user has as much as pipes(7) grants one; then two pages.
const PIPE: u64 = 64 * 1024;
const PIPES_IN_FULL: u64 = 64 << 20;
const SMALL_PIPE: u64 = 8 * 1024;
const FREE_PIPES: usize = 32;
/// A socket without its bytes.
const SOCKET: u64 = 1536;
const FREE_SOCKETS: u64 = 16;
/// Send buffer of a Unix socket, if no socket says more (`net.core.wmem_default`).
const SEND_BUFFER: u64 = 212_992;
/// What a TCP or UDP socket can hold: the zygote limits `tcp_rmem` and `tcp_wmem` to half of it each.
const INTERNET_SOCKET: u64 = 512 * 1024;
/// So much of it is not looked into.
const FREE_INTERNET: u64 = 16 << 20;
/// A `tcp_timewait_sock`.
const TIME_WAIT: u64 = 256;

/// What the kernel holds, looked at now and then.
pub(crate) struct KernelMemory {
    sockstat: [File; 2],
    diag: OwnedFd,
    next: Option<Instant>,
    /// At the last look.
    looked: u64,
    /// All of it, as last counted.
    pub(crate) held: u64,
}

/// A process to look at.
pub(crate) struct Target {
    /// Its directory in `/proc`, or that of a thread if the first one has ended.
    pub(crate) dir: String,
    /// Pages of its address space.
    pub(crate) pages: u64,
}

impl KernelMemory {
    /// From what the zygote opened before the jail: `/proc/net/sockstat`, `sockstat6`, and a `sock_diag` socket.
    pub(crate) fn new(sockstat: OwnedFd, sockstat6: OwnedFd, diag: OwnedFd) -> KernelMemory {
        KernelMemory { sockstat: [sockstat.into(), sockstat6.into()], diag, next: None, looked: 0, held: 0 }
    }

    /// What is held now, and whether all of it was looked at for this. Stops counting where it is above `most`.
    pub(crate) fn count(&mut self, now: Instant, most: u64, targets: impl Iterator<Item = Target>) -> (u64, bool) {
        let used = self.sockets_used();
        let mut whole = false;
        match self.next {
            // A short run is not looked at.
            None => self.next = Some(now + LOOK),
            Some(next) if now >= next => {
                let mut look = Look { sum: self.internet(&used), most, pipes: HashSet::new() };
                for target in targets {
                    if look.full() {
                        break;
                    }
                    look.at(&target);
                }
                self.looked = look.sum;
                whole = true;
                let end = Instant::now();
                self.next = Some(end + LOOK.max(end.saturating_duration_since(now) * LOOK_SHARE));
            }
            Some(_) => {}
        }
        self.held = self.looked + self.unix(&used);
        (self.held, whole)
    }

    fn sockets_used(&self) -> Used {
        let mut used = Used::default();
        for file in &self.sockstat {
            let mut text = [0; 1024];
            let n = file.read_at(&mut text, 0).unwrap_or(0);
            used.add(&String::from_utf8_lossy(text.get(..n).unwrap_or_default()));
        }
        used
    }

    fn unix(&self, used: &Used) -> u64 {
        if used.all <= FREE_SOCKETS {
            return 0;
        }
        // What is not known can be anything.
        let seen = self.dump(&unix_request()).unwrap_or_default();
        let lost = used.all.saturating_sub(seen.sockets + used.internet);
        let most = 2 * seen.send_buffer.max(SEND_BUFFER);
        used.all * SOCKET + seen.bytes + lost.saturating_sub(FREE_SOCKETS) * most
    }

    fn internet(&self, used: &Used) -> u64 {
        let time_wait = used.time_wait * TIME_WAIT;
        let most = used.internet * INTERNET_SOCKET;
        if most <= FREE_INTERNET {
            return time_wait;
        }
        let mut sum = time_wait;
        for (family, protocol) in [(2, 6), (10, 6), (2, 17), (10, 17)] {
            match self.dump(&internet_request(family, protocol)) {
                Ok(seen) => sum += seen.bytes,
                Err(_) => return time_wait + most,
            }
        }
        sum
    }

    /// Asks for all sockets of a kind.
    fn dump(&self, request: &[u8]) -> io::Result<Seen> {
        // What an answer that was given up left behind.
        let mut buffer = [0; 32 * 1024];
        while rustix::net::recv(&self.diag, &mut buffer[..], RecvFlags::DONTWAIT).is_ok() {}
        rustix::net::send(&self.diag, request, SendFlags::empty())?;
        let mut seen = Seen::default();
        loop {
            let (n, _) =
                rustix::io::retry_on_intr(|| rustix::net::recv(&self.diag, &mut buffer[..], RecvFlags::empty()))?;
            let bytes = buffer.get(..n).filter(|bytes| !bytes.is_empty()).ok_or(io::ErrorKind::UnexpectedEof)?;
            if seen.take(bytes)? {
                return Ok(seen);
            }
        }
    }
}

/// Sockets of the namespace, by `/proc/net/sockstat`.
#[derive(Debug, Default, PartialEq)]
struct Used {
    /// Also those that are closed and have bytes on their way.
    all: u64,
    /// TCP and UDP.
    internet: u64,
    time_wait: u64,
}

impl Used {
    fn add(&mut self, text: &str) {
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let kind = words.next().unwrap_or_default();
            while let (Some(name), Some(value)) = (words.next(), words.next()) {
                let value = value.parse::<u64>().unwrap_or(0);
                match (kind, name) {
                    ("sockets:", "used") => self.all += value,
                    ("TCP:" | "UDP:" | "TCP6:" | "UDP6:", "inuse") => self.internet += value,
                    ("TCP:", "tw") => self.time_wait += value,
                    _ => {}
                }
            }
        }
    }
}

const HEADER: usize = 16;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const AF_UNIX: u8 = 1;
const LISTENING: u8 = 10;

fn request(body: &[u8]) -> Vec<u8> {
    const REQUEST_DUMP: u16 = 0x301;
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend_from_slice(&u32::try_from(HEADER + body.len()).unwrap_or(0).to_ne_bytes());
    bytes.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend_from_slice(&REQUEST_DUMP.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(body);
    bytes
}

/// `struct unix_diag_req`: family, protocol, padding, states, inode, what to show, cookie.
fn unix_request() -> Vec<u8> {
    const RQLEN_AND_MEMINFO: u32 = 0x10 | 0x20;
    let words = [u32::from(AF_UNIX).to_le(), u32::MAX, 0, RQLEN_AND_MEMINFO, u32::MAX, u32::MAX];
    request(&words.map(u32::to_ne_bytes).concat())
}

/// `struct inet_diag_req_v2`: family, protocol, extensions, padding, states, and an id that names no socket.
fn internet_request(family: u8, protocol: u8) -> Vec<u8> {
    const SKMEMINFO: u8 = 1 << 6;
    let mut body = vec![family, protocol, SKMEMINFO, 0, 0xff, 0xff, 0xff, 0xff];
    body.extend_from_slice(&[0; 48]);
    request(&body)
}

/// What an answer said.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    /// Those that are shown, and connections that nobody has accepted.
    sockets: u64,
    bytes: u64,
    send_buffer: u64,
}

impl Seen {
    /// One datagram of the answer; `true` at its end.
    fn take(&mut self, mut bytes: &[u8]) -> io::Result<bool> {
        const ERROR: u16 = 2;
        const DONE: u16 = 3;
        while let Some(length) = word(bytes, 0) {
            let length = (length as usize).max(HEADER);
            let message = bytes.get(..length).ok_or(io::ErrorKind::InvalidData)?;
            match message.get(4..6) {
                Some(kind) if kind == DONE.to_ne_bytes() => return Ok(true),
                Some(kind) if kind == ERROR.to_ne_bytes() => {
                    let error = word(message, HEADER).unwrap_or(0);
                    return Err(io::Error::from_raw_os_error((error as i32).saturating_neg()));
                }
                _ => self.socket(message.get(HEADER..).unwrap_or_default()),
            }
            bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(false)
    }

    fn socket(&mut self, message: &[u8]) {
        // struct unix_diag_msg, struct inet_diag_msg.
        let (size, queue, memory) = if message.first() == Some(&AF_UNIX) { (16, 4, 5) } else { (72, u16::MAX, 7) };
        let listens = message.get(2) == Some(&LISTENING);
        self.sockets += 1;
        let mut rest = message.get(size..).unwrap_or_default();
        while let Some((length, kind)) = half(rest, 0).zip(half(rest, 2)) {
            let length = usize::from(length).max(4);
            let value = rest.get(4..length).unwrap_or_default();
            let number = |at: usize| u64::from(word(value, at * 4).unwrap_or(0));
            if kind == queue && listens {
                self.sockets += number(0);
            } else if kind == memory {
                // linux/sock_diag.h: rmem_alloc, rcvbuf, wmem_alloc, sndbuf, fwd_alloc, wmem_queued, optmem, backlog.
                self.bytes += number(0) + number(2).max(number(5)) + number(4) + number(6) + number(7);
                self.send_buffer = self.send_buffer.max(number(3));
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// One look at mappings and descriptors.
struct Look {
    sum: u64,
    most: u64,
    pipes: HashSet<Vec<u8>>,
}

impl Look {
    fn full(&self) -> bool {
        self.sum > self.most
    }

    fn at(&mut self, target: &Target) {
        let mappings = self.lines(&format!("{}/maps", target.dir), |_| true);
        // A process that hides: as many as its address space has room for, within vm.max_map_count.
        let mappings = mappings.unwrap_or_else(|_| target.pages.min(65_530));
        self.sum += mappings.saturating_sub(FREE_MAPPINGS) * MAPPING;
        if self.descriptors(&target.dir).is_err() {
            let size = std::fs::metadata(format!("{}/fd", target.dir)).map_or(0, |dir| dir.len());
            // Since Linux 6.2 the size is the number of descriptors.
            self.sum += if size > 0 { size } else { 256 } * PIPE;
        }
    }

    fn descriptors(&mut self, dir: &str) -> io::Result<()> {
        for entry in std::fs::read_dir(format!("{dir}/fd"))? {
            let entry = entry?;
            // Closed meanwhile is as good.
            let Ok(target) = std::fs::read_link(entry.path()) else { continue };
            let target = target.as_os_str().as_bytes();
            if target.starts_with(b"socket:") {
                continue;
            }
            if target.starts_with(b"pipe:") {
                if self.pipes.insert(target.to_vec()) && self.pipes.len() > FREE_PIPES {
                    let full = (self.pipes.len() as u64).saturating_mul(PIPE) <= PIPES_IN_FULL;
                    self.sum += if full { PIPE } else { SMALL_PIPE };
                }
            } else {
                let info = format!("{dir}/fdinfo/{}", entry.file_name().to_string_lossy());
                let held = self.lines(&info, |line| line.starts_with(b"tfd:") || line.starts_with(b"lock:"));
                self.sum += held.unwrap_or(0) * WATCH;
            }
            if self.full() {
                break;
            }
        }
        Ok(())
    }

    /// Lines of a file; stops where the answer cannot matter any more.
    fn lines(&self, path: &str, counts: impl Fn(&[u8]) -> bool) -> io::Result<u64> {
        let mut file = File::open(path)?;
        let (mut buffer, mut line, mut found) = ([0; 16 * 1024], Vec::new(), 0);
        loop {
            let n = file.read(&mut buffer)?;
            for piece in buffer.get(..n).unwrap_or_default().split_inclusive(|byte| *byte == b'\n') {
                if line.len() < 8 {
                    line.extend_from_slice(piece.get(..piece.len().min(8)).unwrap_or_default());
                }
                if piece.ends_with(b"\n") {
                    found += u64::from(counts(&line));
                    line.clear();
                }
            }
            if n == 0 || found.saturating_mul(WATCH) > self.most {
                return Ok(found);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_count_of_sockets_is_read() {
        let mut used = Used::default();
        used.add(
            "sockets: used 209\nTCP: inuse 3 orphan 0 tw 7 alloc 9 mem 43\nUDP: inuse 2 mem 0\nUDPLITE: inuse 5\n",
        );
        used.add("TCP6: inuse 4\nUDP6: inuse 1\nRAW6: inuse 8\n");
        assert_eq!(used, Used { all: 209, internet: 10, time_wait: 7 });
    }

    /// As a kernel sent it, but for the numbers: a listener with five connections waiting, and one that has sent bytes.
    fn answer() -> Vec<u8> {
        let socket = |state: u8, queue: u32, memory: [u32; 9]| {
            let mut body = vec![AF_UNIX, 1, state, 0];
            body.extend_from_slice(&[0; 12]);
            body.extend_from_slice(&[12u16, 4].map(u16::to_ne_bytes).concat());
            body.extend_from_slice(&[queue, 0].map(u32::to_ne_bytes).concat());
            body.extend_from_slice(&[40u16, 5].map(u16::to_ne_bytes).concat());
            body.extend_from_slice(&memory.map(u32::to_ne_bytes).concat());
            request(&body)
        };
        let mut bytes = socket(LISTENING, 5, [0, 9, 0, 9, 0, 0, 0, 0, 0]);
        bytes.extend(socket(1, 77, [0, 9, 4096, 500_000, 0, 0, 0, 0, 0]));
        bytes
    }

    #[test]
    fn an_answer_of_the_kernel_is_read() {
        let mut seen = Seen::default();
        assert!(!seen.take(&answer()).unwrap());
        assert_eq!(seen, Seen { sockets: 7, bytes: 4096, send_buffer: 500_000 });
        let mut done = request(&[0; 4]);
        done[4..6].copy_from_slice(&3u16.to_ne_bytes());
        assert!(seen.take(&done).unwrap());
        done[4..6].copy_from_slice(&2u16.to_ne_bytes());
        done[HEADER..].copy_from_slice(&(-2i32).to_ne_bytes());
        assert_eq!(seen.take(&done).unwrap_err().raw_os_error(), Some(2));
    }

    #[test]
    fn a_mutilated_answer_is_read_without_harm() {
        let whole = answer();
        for length in 0..whole.len() {
            let _ends_somehow = Seen::default().take(&whole[..length]);
            let mut odd = whole.clone();
            odd[length] ^= 0xff;
            let _ends_somehow = Seen::default().take(&odd);
        }
    }

    #[test]
    fn mappings_pipes_and_watches_of_a_process_are_counted() {
        let target = Target { dir: "/proc/self".into(), pages: 1 };
        let count = || {
            let mut look = Look { sum: 0, most: u64::MAX, pipes: HashSet::new() };
            look.at(&target);
            look.sum
        };
        let before = count();
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
        let pipes: Vec<_> = (0..100).map(|_| rustix::pipe::pipe().unwrap()).collect();
        for (number, (read, _)) in pipes.iter().enumerate() {
            let data = rustix::event::epoll::EventData::new_u64(number as u64);
            rustix::event::epoll::add(&epoll, read, data, rustix::event::epoll::EventFlags::IN).unwrap();
        }
        let after = count();
        assert!(after >= before + 68 * PIPE + 100 * WATCH, "{before} {after}");
        let mut look = Look { sum: 0, most: 0, pipes: HashSet::new() };
        look.at(&target);
        assert!(look.sum < after, "stops early");
    }
}
