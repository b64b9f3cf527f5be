//! Programs that have the host's kernel hold memory for them which is in no process's account. Shared by the test that they
//! are stopped (`hostile.rs`) and by the measurement of what they take until then (`worst.rs`).

/// For all of them. What holds memory is kept in `kept`.
const PRELUDE: &str = r"
import ctypes, fcntl, mmap, os, select, socket, sys, time
kept, chunk = [], bytes(50000)
libc = ctypes.CDLL(None)
def fill(s, *to):
    s.setblocking(False)
    try:
        while True: s.sendto(chunk, *to) if to else s.send(chunk)
    except OSError: pass
def in_processes(count, action):
    for _ in range(count):
        if os.fork() == 0:
            action()
            time.sleep(600)
def servers(family, addresses, clients):
    for address in addresses:
        server = socket.socket(family)
        server.bind(address)
        server.listen(128)
        kept.append(server)
        for _ in range(clients):
            with socket.socket(family) as client:
                client.settimeout(1)
                try: client.connect(server.getsockname())
                except OSError: break
                fill(client)
";

/// It is not stopped if this is its output.
pub(crate) const HELD: &str = "held\n";

/// Name; memory limit, MiB; code.
pub(crate) const ALL: [(&str, u32, &str); 8] = [
    (
        "Unix connections that nobody accepts, their clients closed",
        64,
        "servers(socket.AF_UNIX, [f'\\0{n}' for n in range(240)], 129)",
    ),
    (
        "TCP connections that nobody accepts, their clients closed",
        64,
        "servers(socket.AF_INET, [('127.0.0.1', 0)] * 100, 120)",
    ),
    (
        "datagrams that nobody reads, their senders closed",
        64,
        r"
for n in range(240):
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(f'\0{n}')
    kept.append(receiver)
    for _ in range(11):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender: fill(sender, f'\0{n}')",
    ),
    (
        "pairs of sockets that nobody reads",
        256,
        r"
def pairs():
    for _ in range(110):
        kept.extend(socket.socketpair())
        for end in kept[-2:]: fill(end)
in_processes(30, pairs)",
    ),
    (
        "mappings, 65,000 in each of 12 processes",
        128,
        r"
def mappings():
    pages = 130000
    libc.mmap.restype = ctypes.c_void_p
    at = libc.mmap(None, ctypes.c_size_t(pages * 4096), 0, 0x4022, -1, ctypes.c_size_t(0))
    for page in range(0, pages, 2):
        if libc.mprotect(ctypes.c_void_p(at + page * 4096), ctypes.c_size_t(4096), 1) != 0: break
in_processes(12, mappings)",
    ),
    (
        "epoll watches, 125 descriptors in each of 125, 60 processes",
        256,
        r"
def watches():
    watched = [os.dup(0) for _ in range(120)]
    try:
        while True:
            kept.append(select.epoll())
            for fd in watched: kept[-1].register(fd, 0)
    except OSError: pass
in_processes(60, watches)",
    ),
    (
        "pipes, full",
        64,
        r"
def pipes():
    try:
        while True:
            r, w = os.pipe()
            os.set_blocking(w, False)
            os.write(w, bytes(65536))
    except OSError: pass
in_processes(10, pipes)",
    ),
    (
        "locks on ranges of files",
        64,
        r"
for n in range(200):
    file = open(f'{n}', 'w')
    kept.append(file)
    for at in range(0, 6000, 2): fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, at)",
    ),
];

/// A whole program.
pub(crate) fn program(code: &str) -> String {
    format!("{PRELUDE}{code}\ntime.sleep(30)\nprint('held')\n")
}
