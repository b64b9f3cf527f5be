//! Programs that try to break out. Each says what happened, and each run must leave nothing behind: no process,
//! mount, cgroup or file (see the harness). Every one runs twice: as whoever runs the tests and, when that is root,
//! as an ordinary user, whose sandboxes stand on an unprivileged user namespace.

#[path = "harness/greedy.rs"]
mod greedy;
#[path = "harness/lib.rs"]
#[allow(dead_code)]
mod harness;

use std::os::linux::net::SocketAddrExt;

use harness::{Cli, Done, Who};

/// Names that all attacks use. `call(number, ...)` makes a raw system call and gives its result or the error's name.
const PRELUDE: &str = r#"
import ctypes, errno, mmap, os, signal, socket, stat, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    return errno.errorcode[ctypes.get_errno()] if result == -1 else result
def attempt(action, *args):
    try:
        return action(*args)
    except BaseException as error:
        return errno.errorcode.get(getattr(error, 'errno', None), type(error).__name__)
"#;

/// A run of an attack, from a template whose memory is an image.
fn attack(who: Who, code: &str) -> Cli {
    Cli::run(who).env("ZEROBOOT_TEST_IMAGE", "1").code(format!("{PRELUDE}{code}"))
}

macro_rules! attacks {
    ($($(#[$attribute:meta])* fn $name:ident($who:ident) $body:block)*) => {$(
        $(#[$attribute])*
        mod $name {
            use super::*;

            fn attack_as($who: Who) $body

            #[test]
            fn as_whoever_runs_the_tests() {
                attack_as(Who::Me);
            }

            #[test]
            fn as_an_ordinary_user() {
                if let Some(who) = Who::ordinary() {
                    attack_as(who);
                }
            }
        }
    )*};
}

/// Out of memory, by the agent's or the kernel's count.
#[track_caller]
fn out_of_memory(done: &Done) {
    done.ended(137).says("out of memory");
}

attacks! {
    // ---- limits

    fn a_fork_bomb_stays_below_the_process_limit(who) {
        let code = r#"
children = 0
while True:
    try:
        if os.fork() == 0:
            signal.pause()
    except OSError as e:
        print(errno.errorcode[e.errno], 10 <= children < 20)
        break
    children += 1
"#;
        assert_eq!(attack(who, code).args(["--processes", "20"]).go().good(), "EAGAIN True\n");
    }

    fn a_fork_bomb_that_never_ends_is_stopped_at_its_deadline(who) {
        let code = r#"
while True:
    try:
        os.fork()
    except OSError:
        pass
"#;
        attack(who, code).args(["--timeout", "2s", "--cpu-time", "1h"]).go().ended(124).says("--timeout");
    }

    fn a_thread_bomb_stays_below_the_process_limit(who) {
        let code = r#"
count = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        count += 1
except RuntimeError:
    print(10 <= count < 20, flush=True)
os._exit(0)
"#;
        assert_eq!(attack(who, code).args(["--processes", "20"]).go().good(), "True\n");
    }

    fn a_memory_hog_gets_a_memory_error(who) {
        let done = attack(who, "x = bytearray(1 << 30)").args(["--memory", "128M"]).go();
        done.ended(1).says("MemoryError").says("out of memory: the limit is 128 MiB");
        let done = attack(who, "x = []\nwhile True: x.append(bytes(1 << 16))").args(["--memory", "128M"]).go();
        done.says("out of memory: the limit is 128 MiB");
    }

    fn a_memory_hog_of_many_processes_is_killed(who) {
        let code = r#"
for _ in range(10):
    if os.fork() == 0:
        x = bytearray(os.urandom(1 << 20)) * 64
        signal.pause()
time.sleep(600)
"#;
        out_of_memory(&attack(who, code).args(["--memory", "256M"]).go());
    }

    /// A process whose first thread has ended shows no memory of its own in /proc.
    fn a_memory_hog_without_a_first_thread_is_killed(who) {
        let code = r#"
def hog():
    global x
    x = bytearray(os.urandom(1 << 20)) * 64
    signal.pause()
for _ in range(10):
    if os.fork() == 0:
        threading.Thread(target=hog).start()
        call(60, 0)  # exit of this thread alone
time.sleep(600)
"#;
        out_of_memory(&attack(who, code).args(["--memory", "256M"]).go());
    }

    fn files_in_memory_count_as_memory(who) {
        let code = r#"
for place in ['/tmp', '/home/sandbox', '/dev/shm']:
    for i in range(3):
        f = open(f'{place}/f{i}', 'wb')
        for _ in range(32):
            f.write(bytes(1 << 20))
        os.unlink(f.name)
        globals()[place + str(i)] = f  # deleted, still open
time.sleep(600)
"#;
        out_of_memory(&attack(who, code).args(["--memory", "200M"]).go());
    }

    fn page_tables_count_as_memory(who) {
        // Reading empty pages costs nothing but page tables: 4 KiB for every 2 MiB.
        let code = r#"
m = mmap.mmap(-1, 1 << 40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, prot=mmap.PROT_READ)
for at in range(0, 1 << 40, 1 << 21):
    m[at]
print('all read')
"#;
        out_of_memory(&attack(who, code).args(["--memory", "128M", "--timeout", "60s"]).go());
    }

    /// Memory that is in no process's account: a cgroup counts it; where there is none it cannot be made.
    fn memory_that_no_process_owns_is_counted_or_refused(who) {
        let memfd = r#"
fd = call(319, b'x', 0)
if isinstance(fd, int):
    for _ in range(1024):
        os.write(fd, bytes(1 << 20))
print(fd)
"#;
        let shared = r#"
try:
    kept = []
    for _ in range(64):
        m = mmap.mmap(-1, 1 << 24)
        for at in range(0, 1 << 24, 4096):
            m[at] = 1
        m.madvise(mmap.MADV_DONTNEED)
        kept.append(m)
except OSError as e:
    print(errno.errorcode[e.errno])
"#;
        for code in [memfd, shared] {
            let done = attack(who, code).args(["--memory", "256M"]).go();
            if done.code() == 0 {
                assert_eq!(done.good(), "EPERM\n");
            } else {
                out_of_memory(&done);
            }
        }
        let zero = attack(who, "print(attempt(os.open, '/dev/zero', os.O_RDONLY))").go();
        assert_eq!(zero.good(), "ENOENT\n");
    }

    /// Memory that is in no process's account, but that of the kernel: a cgroup counts it, else the agent does.
    fn memory_that_the_kernel_holds_is_counted(who) {
        for (name, limit, code) in greedy::ALL {
            let cli = Cli::run(who).args(["--memory", &format!("{limit}M"), "--timeout", "4m", "--cpu-time", "4m"]);
            let done = cli.code(greedy::program(code)).go();
            assert!(done.out != greedy::HELD.as_bytes(), "{name}: {done:?}");
            // By a cgroup's kill a process of the program can end instead, and the program by its error.
            assert!(done.code() == 137 || done.err().contains("Error"), "{name}: {done:?}");
        }
    }

    fn an_output_flood_is_cut_at_the_limit(who) {
        let done = attack(who, "while True: os.write(1, b'x' * 65536)").args(["--max-output", "1M"]).go();
        done.ended(137).says("the output limit was reached");
        assert_eq!(done.out.len(), 1 << 20);
        let done = attack(who, "while True: os.write(2, b'x' * 999)").args(["--max-output", "100K"]).go();
        done.ended(137).says("the output limit was reached");
    }

    fn an_endless_loop_that_ignores_every_signal_is_stopped(who) {
        let code = r#"
for number in range(1, 65):
    attempt(signal.signal, number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True: pass
"#;
        attack(who, code).args(["--timeout", "1s", "--cpu-time", "1h"]).go().ended(124).says("--timeout");
        attack(who, code).args(["--cpu-time", "500ms"]).go().ended(124).says("--cpu-time");
    }

    fn a_daemon_ends_with_the_run(who) {
        let code = r#"
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 256)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True: time.sleep(1)
    os._exit(0)
os.wait()
print('parent done')
"#;
        assert_eq!(attack(who, code).go().good(), "parent done\n");
    }

    fn limits_hold_while_the_reader_pauses(who) {
        let live = attack(who, "while True: os.write(1, b'x' * 65536)").args(["--timeout", "2s", "--max-output", "1G"]);
        let live = live.reader_pauses().start();
        live.wait_for_process("agent");
        // More than is held for a reader waits for it now. The sandbox goes all the same.
        live.wait_for_its_sandboxs_end();
        let done = live.wait();
        assert!(done.ended(124).says("--timeout").out.iter().all(|byte| *byte == b'x'));
    }

    fn closing_every_descriptor_changes_nothing_for_the_outside(who) {
        attack(who, "os.closerange(0, 4096)\nos._exit(7)").go().ended(7);
        let code = "os.closerange(0, 4096)\nwhile True: time.sleep(1)";
        attack(who, code).args(["--timeout", "1s"]).go().ended(124);
    }

    fn open_files_and_core_dumps_are_limited(who) {
        let code = r#"
import resource
n = 0
try:
    while True: os.open('/dev/null', os.O_RDONLY); n += 1
except OSError as e:
    print(errno.errorcode[e.errno], n < 256)
os.closerange(3, 256)
print(resource.getrlimit(resource.RLIMIT_CORE), [attempt(resource.setrlimit, resource.RLIMIT_CORE, (n, n)) for n in (0, 2)],
      call(160, 4, struct.pack('QQ', 0, 0)))
print(attempt(resource.setrlimit, resource.RLIMIT_NPROC, (10**6, 10**6)))
"#;
        assert_eq!(attack(who, code).go().good(), "EMFILE True\n(1, 1) ['ValueError', 'ValueError'] EPERM\nValueError\n");
    }

    // ---- the agent and the outside of the process

    fn the_agent_cannot_be_killed_traced_or_read(who) {
        let code = r#"
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for number in (9, 15, 19, 11):
    attempt(os.kill, 1, number)
    pidfd = attempt(os.pidfd_open, 1)
    if isinstance(pidfd, int):
        attempt(signal.pidfd_send_signal, pidfd, number)
print('ptrace', call(101, 16, 1, 0, 0), call(101, 0x4206, 1, 0, 0), call(101, 0, 0, 0, 0))
print('vm', call(310, 1, 0, 0, 0, 0, 0), call(311, 1, 0, 0, 0, 0, 0), 'kcmp', call(312, 1, 2, 0, 0, 0))
print('getfd', call(438, 3, 0, 0))
for name in ['mem', 'environ', 'maps', 'auxv', 'fd', 'root', 'cwd', 'exe', 'ns/user', 'map_files', 'stack', 'syscall']:
    path = '/proc/1/' + name
    print(name, attempt(os.listdir if name in ('fd', 'root', 'cwd', 'map_files') else os.open, path, *([] if name in ('fd', 'root', 'cwd', 'map_files') else [os.O_RDONLY])))
print('alive')
"#;
        let done = attack(who, code).go();
        let lines: Vec<&str> = done.good().lines().collect();
        assert_eq!(lines[..3], ["ptrace EPERM EPERM EPERM", "vm EPERM EPERM kcmp EPERM", "getfd EPERM"], "{done:?}");
        for line in &lines[3..lines.len() - 1] {
            assert!(line.ends_with(" EACCES") || line.ends_with(" EPERM"), "{line}: {done:?}");
        }
        assert_eq!(lines.last(), Some(&"alive"));
    }

    /// Without descriptors or with the lowest priority the agent could not watch.
    fn the_agents_limits_and_priority_cannot_be_changed(who) {
        let code = r#"
import resource
print(attempt(resource.prlimit, 1, resource.RLIMIT_NOFILE, (0, 0)), attempt(resource.prlimit, 1, resource.RLIMIT_CPU, (0, 0)))
print(attempt(os.setpriority, os.PRIO_PROCESS, 1, 19), attempt(os.setpriority, os.PRIO_USER, os.getuid(), 19),
      attempt(os.setpriority, os.PRIO_PGRP, 0, 19), attempt(os.sched_setaffinity, 1, {0}))
before = os.nice(0)
print(attempt(os.nice, 3) - before, attempt(os.nice, -10), attempt(open, '/proc/1/oom_score_adj', 'w'))
with open('/proc/self/oom_score_adj') as f: print(f.read().strip())
try:
    with open('/proc/self/oom_score_adj', 'w') as f: f.write('-1000')
    print('lowered')
except OSError: print('kept')
"#;
        let done = attack(who, code).go();
        let expected = "EPERM EPERM\nEPERM EPERM EPERM EPERM\n3 EPERM EROFS\n1000\nkept\n";
        assert_eq!(done.good().replace("3 EACCES", "3 EPERM"), expected, "{done:?}");
    }

    fn signals_to_groups_and_to_all_stay_inside(who) {
        // A second run beside it, whose processes have the same user, must not notice.
        let other = Cli::run(who).code("input(); print('unharmed')").stdin("go\n").args(["--timeout", "5m"]);
        let held = Cli::run(who).code("import time\ntime.sleep(4)\nprint('unharmed')").start();
        let code = r#"
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpgrp() == os.getpid() == os.getsid(0))
os.kill(0, signal.SIGTERM)
for number in range(0, 400):
    attempt(os.kill, -number if number != 1 else 0, signal.SIGTERM)
    attempt(os.kill, number, signal.SIGTERM) if number else None
attempt(os.kill, -1, signal.SIGKILL)
print('alive')
if os.fork() == 0:
    os.kill(0, signal.SIGKILL)
"#;
        let done = attack(who, code).go();
        assert_eq!(done.out(), "True\nalive\n", "{done:?}");
        // The last line killed the program's own group, itself included, and nothing else.
        assert!([0, 137].contains(&done.code()), "{done:?}");
        assert_eq!(held.wait().good(), "unharmed\n");
        assert_eq!(other.go().good(), "unharmed\n");
    }

    /// The private copy of the control pipe can be found in /proc/self/fd; its frames are not believed. It carries no
    /// descriptors, and neither does anything else that leads to the agent.
    fn forged_frames_do_not_change_the_outcome(who) {
        let code = r#"
found, sockets = [], []
for fd in range(256):
    try: mode = os.fstat(fd).st_mode
    except OSError: continue
    if stat.S_ISSOCK(mode): sockets.append(fd)
    if stat.S_ISFIFO(mode) and fd > 2: found.append(fd)
print(len(found), sockets, flush=True)
def frame(kind, payload=b''): return struct.pack('<IB3x', len(payload), kind) + payload
exit0 = struct.pack('<BiQQQ', 0, 0, 0, 0, 0)
frames = [frame(k, p) for k in range(0x80, 0x90) for p in (b'', b'forged', exit0)]
frames += [frame(k, b'x') for k in range(0, 0x10)]
for fd in found:
    os.set_blocking(fd, False)
    attempt(os.write, fd, b''.join(frames))
    attempt(os.write, fd, b'\xff' * 100)
    for _ in range(200): attempt(os.write, fd, b'\xff' * 65536)
print('mine', flush=True)
sys.exit(3)
"#;
        let done = attack(who, code).go();
        assert_eq!(done.ended(3).out(), "1 []\nmine\n", "{done:?}");
        assert_eq!(done.err(), "");
    }

    fn no_descriptor_but_the_streams_is_passed_on(who) {
        let code = r#"
print(sorted(int(fd) for fd in os.listdir('/proc/self/fd'))[:3], flush=True)
subprocess.run(['ls', '/proc/self/fd'])
for fd in range(256):
    try: target = os.readlink(f'/proc/self/fd/{fd}')
    except OSError: continue
    print(fd, target.split(':')[0])
"#;
        let done = attack(who, code).go();
        // `ls` sees its own three and the directory that it reads.
        assert_eq!(done.good(), "[0, 1, 2]\n0\n1\n2\n3\n0 pipe\n1 pipe\n2 pipe\n20 pipe\n");
    }

    fn nothing_of_the_hosts_environment_is_in_reach(who) {
        let secret = "mRkX7-secret-of-the-host";
        let (head, tail) = secret.split_at(6);
        let code = format!(r#"
needle = ('{head}' + '{tail}').encode()
print([k for k in os.environ if 'SECRET' in k])
mine = id(needle)
hits = 0
with open('/proc/self/maps') as maps, open('/proc/self/mem', 'rb', 0) as mem:
    for line in maps.read().splitlines():
        span, mode = line.split()[:2]
        if 'r' not in mode or line.endswith(('[vvar]', '[vsyscall]', '[vvar_vclock]')): continue
        start, end = (int(x, 16) for x in span.split('-'))
        try:
            mem.seek(start); data = mem.read(end - start)
        except (OSError, ValueError, OverflowError): continue
        at = data.find(b'-secret-of' + b'-the-host')
        while at >= 0:
            hits += data[max(0, at - 5):at] == b'mRk' + b'X7'
            at = data.find(b'-secret-of' + b'-the-host', at + 1)
        del data
print('hits beyond ours', hits > 3)
for pid in [p for p in os.listdir('/proc') if p.isdigit()]:
    env = attempt(lambda: open(f'/proc/{{pid}}/environ', 'rb').read())
    if isinstance(env, bytes) and needle in env: print('found in', pid)
print(sorted(os.environ))
"#);
        let done = attack(who, &code).env("ZEROBOOT_TEST_SECRET", secret).go();
        let lines: Vec<&str> = done.good().lines().collect();
        assert_eq!(lines[..2], ["[]", "hits beyond ours False"], "{done:?}");
        assert_eq!(lines.len(), 3, "{done:?}");
        for name in ["SUDO", "TOKEN", "ZEROBOOT", "CARGO", "OLDPWD"] {
            assert!(!lines[2].contains(name), "{done:?}");
        }
    }

    // ---- files

    fn only_three_directories_can_be_written(who) {
        let code = r#"
writable = []
for top, dirs, files in os.walk('/'):
    if top.startswith('/proc'): dirs[:] = []; continue
    if top.count('/') > 3: dirs[:] = []
    name = os.path.join(top, '.zeroboot-test')
    for action in (lambda: os.close(os.open(name, os.O_CREAT | os.O_WRONLY)), lambda: os.mkdir(name),
                   lambda: os.symlink('x', name), lambda: os.mkfifo(name)):
        if attempt(action) is None:
            writable.append(top)
            break
print(sorted(set(writable)))
print([attempt(os.chmod, p, 0o777) for p in ('/', '/usr', '/dev/null', '/etc/passwd', '/.zeroboot/agent')])
print([attempt(os.open, p, os.O_WRONLY) for p in ('/usr/bin/env', '/etc/passwd', '/.zeroboot/agent', '/dev/random')])
print([attempt(os.utime, p) for p in ('/dev/null', '/dev/full', '/usr/bin/env')])
print([attempt(os.rename, '/tmp', '/x'), attempt(os.unlink, '/etc/passwd'), attempt(os.link, '/etc/passwd', '/tmp/p')])
"#;
        let done = attack(who, code).go();
        let lines: Vec<&str> = done.good().lines().collect();
        assert_eq!(lines[0], "['/dev/shm', '/home/sandbox', '/tmp']", "{done:?}");
        for line in &lines[1..] {
            for word in line.trim_matches(['[', ']']).split(", ") {
                assert!(["'ETXTBSY'", "'EROFS'", "'EACCES'", "'EPERM'", "'EXDEV'", "'EBUSY'"].contains(&word), "{word}: {done:?}");
            }
        }
    }

    fn terminals_are_the_sandboxs_own_and_take_no_input_in_anothers_name(who) {
        let code = r#"
import fcntl, pty, termios, tty
master, slave = pty.openpty()
print(os.ttyname(slave), termios.tcgetattr(slave)[3] & termios.ICANON != 0, sorted(os.listdir('/dev/pts')))
fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 7, 9, 0, 0))
os.write(master, b'hello\n')
print(os.read(slave, 9), os.get_terminal_size(slave))
print(attempt(fcntl.ioctl, slave, termios.TIOCSTI, b'x'), attempt(fcntl.ioctl, slave, 0x541C, b'x'))
many = []
print([attempt(lambda: many.extend(pty.openpty())) for _ in range(100)].count('OSError') > 30)
for fd in many: os.close(fd)
pid, fd = pty.fork()
if pid == 0: os.execvp('sh', ['sh', '-c', 'tty; test -t 0 && echo yes'])
print(os.waitpid(pid, 0)[1])
"#;
        let done = attack(who, code).go();
        assert_eq!(
            done.good(),
            "/dev/pts/0 True ['0', 'ptmx']\nb'hello\\n' os.terminal_size(columns=9, lines=7)\nEPERM EPERM\nTrue\n0\n",
            "{done:?}"
        );
    }

    fn the_hosts_files_are_not_there(who) {
        let canary = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(canary.path(), "canary").unwrap();
        let code = format!(r#"
for path in ['/etc/shadow', '/etc/machine-id', '/etc/hostname', '/etc/ssh', '/root/.ssh', '/root/.bashrc', '/root/.cargo', '/home/sandbox/..', '/var/log', '/var/lib',
             '/run', '/boot', '/sys', '/mnt', '/mnt/data', '/workspace', '/home/user', '/srv', '/proc/1/root', '/proc/self/root/root/.ssh', '/tmp', '{canary}', '/dev/vda',
             '/dev/kmsg', '/dev/mem', '/dev/kvm', '/dev/tty', '/dev/pts', '/dev/console', '/dev/fuse', '/dev/net']:
    entries = attempt(os.listdir, path)
    entries = entries if isinstance(entries, str) else sorted(entries)
    print(path, entries if isinstance(entries, str) or entries else 'empty')
print(open('/etc/passwd').read().count('\n'), sorted(os.listdir('/dev')))
"#, canary = canary.path().display());
        let done = attack(who, &code).go();
        for line in done.good().lines() {
            let Some((path, seen)) = line.split_once(' ') else { panic!("{done:?}") };
            let fine = match path {
                "/home/sandbox/.." => seen == "['sandbox', 'user']",
                "/mnt" => seen == "['data']",
                // They lead to the home directory.
                "/workspace" | "/mnt/data" | "/home/user" => seen == "empty",
                "/tmp" | "/run" => seen == "empty",
                "/dev/pts" => seen == "['ptmx']",
                "3" => seen == "['fd', 'full', 'null', 'ptmx', 'pts', 'random', 'shm', 'stderr', 'stdin', 'stdout', 'urandom']",
                _ => ["ENOENT", "EACCES", "EPERM"].contains(&seen),
            };
            assert!(fine, "{line}: {done:?}");
        }
    }

    fn proc_shows_nothing_but_the_sandbox(who) {
        let code = r#"
print(sorted(p for p in os.listdir('/proc') if not p.isdigit()), sorted(int(p) for p in os.listdir('/proc') if p.isdigit()))
for path in ['/proc/meminfo', '/proc/cmdline', '/proc/kallsyms', '/proc/sys/kernel/hostname', '/proc/net/tcp', '/proc/cpuinfo',
             '/proc/mounts', '/proc/keys', '/proc/kcore', '/proc/sysrq-trigger', '/proc/version', '/proc/stat', '/proc/self/map_files']:
    print(path, attempt(os.stat, path) if path != '/proc/mounts' else attempt(os.readlink, path))
host = os.uname().nodename
print(host.startswith('sandbox-'), open('/proc/self/cgroup').read().count('zeroboot'))
with open('/proc/self/status') as f:
    fields = dict(line.split(':', 1) for line in f.read().splitlines())
print([fields[k].strip() for k in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb', 'NoNewPrivs', 'Seccomp')])
print(fields['Uid'].split(), fields['Gid'].split())
"#;
        let done = attack(who, code).go();
        let lines: Vec<&str> = done.good().lines().collect();
        assert_eq!(lines[0], "['mounts', 'net', 'self', 'thread-self'] [1, 2]".replace("'mounts', 'net', ", "") , "{done:?}");
        for line in &lines[1..14] {
            assert!(line.ends_with(" ENOENT") || line.starts_with("/proc/self/map_files "), "{line}: {done:?}");
        }
        assert_eq!(lines[14], "True 0", "{done:?}");
        let none = "0000000000000000";
        assert_eq!(lines[15], format!("['{none}', '{none}', '{none}', '{none}', '{none}', '1', '2']"), "{done:?}");
        assert_eq!(lines[16], "['1000', '1000', '1000', '1000'] ['1000', '1000', '1000', '1000']", "{done:?}");
    }

    fn links_and_special_files_do_not_come_back(who) {
        let code = r#"
os.symlink('/etc/passwd', 'absolute')
os.symlink('../../etc/passwd', 'relative')
os.symlink('/proc/self/mem', 'magic')
os.symlink('/', 'dir')
os.mkfifo('fifo')
os.mkdir('directory')
socket.socket(socket.AF_UNIX).bind('socket')
os.symlink('loop', 'loop')
open('unreadable', 'w').write('x'); os.chmod('unreadable', 0)
open('fine', 'w').write('mine')
"#;
        let names = ["absolute", "relative", "magic", "dir/etc/passwd", "fifo", "directory", "socket", "loop", "unreadable", "missing", "dir/", "dir/*", "[/passwd"];
        let mut cli = attack(who, code).makes("fine");
        for name in names {
            cli = cli.args([format!("--get={name}:came-back")]);
        }
        let done = cli.args(["--get", "fine"]).go();
        assert_eq!(done.ended(1).err().lines().count(), names.len(), "{done:?}");
        for name in names {
            done.says(&format!("zeroboot: {name}: "));
        }
        assert_eq!(done.made("fine").unwrap(), b"mine");
        // That nothing came back under the other name is the harness's check.
    }

    fn a_file_that_grows_while_it_is_read_stays_below_the_limit(who) {
        let code = r#"
with open('big', 'wb') as f:
    for _ in range(20): f.write(bytes(1 << 20))
"#;
        let done = attack(who, code).args(["--get", "big"]).go();
        done.ended(1).says("the output files may have");
    }

    /// Neither out of the working directory nor without bounds, whatever the code has made.
    fn a_pattern_brings_nothing_but_a_bounded_number_of_files_of_the_working_directory(who) {
        let code = r#"
os.symlink('/etc', 'etc'); os.symlink('/etc/passwd', 'passwd'); os.symlink('..', 'up')
os.mkfifo('fifo'); os.mkdir('closed'); os.chmod('closed', 0)
open(b'not-utf8-\xff', 'w').close()
deep = 'd'
for _ in range(200): os.mkdir(deep); os.chdir(deep)
os.chdir('/home/sandbox')
open('fine', 'w').write('mine')
"#;
        let done = attack(who, code).makes("all").args(["--get-all", "all"]).go();
        done.ended(0);
        assert_eq!(done.made("all/fine").unwrap(), b"mine");
        for name in ["all/etc", "all/passwd", "all/up", "all/fifo"] {
            assert!(done.made(name).is_none(), "{name}");
        }
        let many = "for i in range(300): open(f'f{i}', 'w').close()";
        let done = attack(who, many).args(["--get", "f*"]).go();
        done.ended(1).says("f*: with its 300 files there are more than 256");
    }

    /// Files of the read-only root are the host's: their use by others is neither shown nor held up.
    fn the_use_of_shared_files_cannot_be_watched(who) {
        let code = r#"
print(call(253), call(294, 0), call(254, 0, b'/usr/bin/env', 0xfff), call(255, 0, 1))
import fcntl
d = os.open('/usr/bin', os.O_RDONLY)
print(attempt(fcntl.fcntl, d, fcntl.F_NOTIFY, fcntl.DN_ACCESS), attempt(fcntl.fcntl, os.open('/usr/bin/env', os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK))
"#;
        assert_eq!(attack(who, code).go().good(), "EPERM EPERM EPERM EPERM\nEPERM EPERM\n");
    }

    /// The kernel is not even asked: a descriptor that is not open is no error.
    fn flushing_and_advice_succeed_and_reach_no_disk(who) {
        let code = r#"
with open('file', 'w') as f:
    f.write('x'); f.flush(); os.fsync(f.fileno()); os.fdatasync(f.fileno())
print([call(number, 999, 0, 0, 4) for number in (74, 75, 277, 221, 187)], open('file').read())
"#;
        assert_eq!(attack(who, code).go().good(), "[0, 0, 0, 0, 0] x\n");
    }

    fn socket_buffers_stay_as_they_are(who) {
        let code = r#"
pair = socket.socketpair()
sizes = lambda: [s.getsockopt(socket.SOL_SOCKET, o) for s in pair for o in (socket.SO_SNDBUF, socket.SO_RCVBUF)]
before = sizes()
for s in pair:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        s.setsockopt(socket.SOL_SOCKET, option, 1 << 24)
    for option in (32, 33):
        print(attempt(s.setsockopt, socket.SOL_SOCKET, option, 1 << 24))
print(sizes() == before)
"#;
        assert_eq!(attack(who, code).go().good(), "EPERM\nEPERM\nEPERM\nEPERM\nTrue\n");
    }

    fn little_waits_in_a_socket_that_nobody_reads(who) {
        let code = r#"
server = socket.socket(socket.AF_UNIX)
server.bind('server')
server.listen(1 << 30)
kept = 0
while True:
    client = socket.socket(socket.AF_UNIX)
    client.setblocking(False)
    if attempt(client.connect, 'server') == 'EAGAIN': break
    client.close()
    kept += 1
receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
receiver.bind('receiver')
waiting = 0
while True:
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender.setblocking(False)
    if attempt(sender.sendto, b'x', 'receiver') == 'EAGAIN': break
    waiting += 1
print(kept, waiting)
"#;
        assert_eq!(attack(who, code).go().good(), "129 11\n");
    }

    // ---- the network and other sandboxes

    fn there_are_unix_sockets_and_a_loopback_of_its_own_and_no_other_network(who) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let code = format!(r#"
got = {{}}
for family in range(0, 64):
    for kind in (1, 2, 3, 4, 5, 1 | 0o2000000, 2 | 0o4000):
        for protocol in (0, 1, 6, 17, 33, 58, 132, 136, 255, 262):
            r = call(41, family, kind, protocol)
            if isinstance(r, int): got.setdefault(family, set()).add((kind & 15, protocol)); os.close(r)
            elif r != 'EPERM' and family != 1: got[family, kind, protocol] = r
    r = call(53, family, 1, 0, (ctypes.c_int * 2)())
    if family != 1 and r != 'EPERM': got[family, 'pair'] = r
del got[1]
print({{k: sorted(v) for k, v in got.items()}})
for address in [('127.0.0.1', {port}), ('10.0.0.1', 80), ('192.0.2.1', 80), ('169.254.169.254', 80)]:
    print(attempt(socket.create_connection, address, 2), end=' ')
six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
print(attempt(six.sendto, b'x', ('2001:db8::1', 53)), attempt(socket.getaddrinfo, 'example.com', 80))
"#, port = listener.local_addr().unwrap().port());
        let done = attack(who, &code).go();
        assert_eq!(
            done.good(),
            "{2: [(1, 0), (1, 6), (2, 0), (2, 17)], 10: [(1, 0), (1, 6), (2, 0), (2, 17)]}\n\
             ECONNREFUSED ENETUNREACH ENETUNREACH ENETUNREACH ENETUNREACH gaierror\n",
            "{done:?}"
        );
        assert!(listener.accept().is_err());
    }

    fn servers_and_clients_meet_on_loopback(who) {
        let code = r#"
import asyncio, http.server, threading, urllib.request
http.server.SimpleHTTPRequestHandler.log_message = lambda *_: None
server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()
open('page', 'w').write('hello')
print(urllib.request.urlopen(f'http://localhost:{server.server_port}/page').read())
six = socket.create_server(('::1', 0), family=socket.AF_INET6)
client = socket.create_connection(six.getsockname()[:2])
client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
peer, _ = six.accept(); peer.sendall(b'six'); print(client.recv(3))
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('127.0.0.1', 0)); u.sendto(b'udp', u.getsockname()); print(u.recv(3))
async def echo(r, w): w.write(await r.readline()); w.close()
async def main():
    s = await asyncio.start_server(echo, 'localhost', 8000)
    r, w = await asyncio.open_connection('localhost', 8000)
    w.write(b'line\n'); print(await r.readline())
asyncio.run(main())
for level, option in [(6, 31), (6, 19), (6, 14), (6, 13), (0, 4), (1, 60), (1, 32), (1, 33), (41, 54), (0, 41)]:
    print(attempt(client.setsockopt, level, option, 1), end=' ')
print(attempt(fcntl.ioctl, client, 0x8914, b'lo' + bytes(38)), attempt(fcntl.ioctl, client, 0x8912, bytes(16)))
"#;
        let code = format!("import fcntl{code}");
        let done = attack(who, &code).go();
        let refused = "EPERM ".repeat(10);
        assert_eq!(done.good(), format!("b'hello'\nb'six'\nb'udp'\nb'line\\n'\n{refused}EPERM EPERM\n"), "{done:?}");
    }

    fn abstract_sockets_of_the_host_are_out_of_reach(who) {
        let name = format!("zeroboot-test-{}-{who:?}", std::process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
        let listener = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let code = format!(r#"
s = socket.socket(socket.AF_UNIX)
print(attempt(s.connect, '\0{name}'))
d = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
print(attempt(d.sendto, b'x', '\0{name}'))
"#);
        assert_eq!(attack(who, &code).go().good(), "ECONNREFUSED\nECONNREFUSED\n");
        assert!(listener.accept().is_err());
    }

    fn sockets_and_pipes_below_shared_directories_are_out_of_reach(who) {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let everyone = |path: &std::path::Path| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
        };
        everyone(folder.path());
        let venv = folder.path().join("venv");
        // Through a shell: the user's own search path decides which Python that is.
        let mut make = harness::as_user(who, "sh");
        make.args(["-c", "exec \"$0\" -m venv --without-pip \"$1\"", harness::python(who)]).arg(&venv);
        let done = make.status();
        assert!(done.unwrap().success());
        let (socket, pipe) = (venv.join("lib/s.sock"), venv.join("p.fifo"));
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        everyone(&socket);
        everyone(&pipe);
        let code = format!(r#"{PRELUDE}
s = socket.socket(socket.AF_UNIX)
print(attempt(s.connect, '{}'))
d = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
print(attempt(d.sendto, b'x', '{}'))
print(attempt(lambda: open('{}', 'rb').read()))
"#, socket.display(), socket.display(), pipe.display());
        let cli = Cli::bare(who).args(["run", "--engine", "process", "--python"]).args([venv.join("bin/python").to_str().unwrap()]);
        // An empty file, which no sandbox may write to or which nobody listens at.
        let done = cli.code(code).go();
        let refused = done.good().replace("ECONNREFUSED", "EACCES");
        assert_eq!(refused, "EACCES\nEACCES\nb''\n");
        assert!(listener.accept().is_err());
    }

    // ---- Node

    fn node_is_held_by_the_same_jail(who) {
        let code = r#"
const fs = require('fs'), cp = require('child_process'), os = require('os')
const attempt = (f) => { try { return f() } catch (e) { return e.code } }
console.log(process.getuid(), fs.readdirSync('/proc').filter((x) => /^\d/.test(x)).length, os.hostname().startsWith('sandbox-'))
console.log(attempt(() => fs.writeFileSync('/usr/x', '')), attempt(() => fs.readFileSync('/etc/shadow')),
  attempt(() => fs.writeFileSync('/etc/passwd', '')), attempt(() => fs.watch('/usr/bin').close()))
console.log(attempt(() => process.kill(1, 'SIGKILL')) !== null, attempt(() => fs.readFileSync('/proc/1/environ')))
console.log(Object.keys(process.env).filter((k) => /SECRET|CARGO|ZEROBOOT|SUDO/.test(k)), attempt(() => os.networkInterfaces()))
console.log(fs.readFileSync('/proc/self/status', 'utf8').match(/CapEff.*|NoNewPrivs.*|Seccomp:.*/g).map((l) => l.split('\t')[1]))
console.log(cp.spawnSync('ls', ['/proc/self/fd'], { encoding: 'utf8', stdio: ['pipe', 'pipe', 'pipe'] }).stdout.split('\n').length)
require('net').connect(22, '127.0.0.1').on('error', (e) => console.log(e.code))
"#;
        let cli = Cli::bare(who).args(["run", "--engine", "process", "--runtime", "node"]);
        let done = cli.code(code).env("ZEROBOOT_TEST_SECRET", "x").go();
        assert_eq!(
            done.good(),
            "1000 2 true\nEROFS ENOENT EROFS EPERM\ntrue EACCES\n[] ERR_SYSTEM_ERROR\n[ '0000000000000000', '1', '2' ]\n5\nECONNREFUSED\n"
        );
    }

    fn a_process_bomb_in_node_stays_below_the_process_limit(who) {
        let code = r#"
const cp = require('child_process')
let failed = 0
for (let i = 0; i < 200; i++) cp.spawn('sleep', ['600']).on('error', () => failed++)
setTimeout(() => { console.log(failed > 150); process.exit(0) }, 500)
"#;
        let cli = Cli::bare(who).args(["run", "--engine", "process", "--runtime", "node", "--processes", "40"]);
        assert_eq!(cli.code(code).go().good(), "true\n");
    }

    // ---- the kernel

    fn every_call_that_could_lead_out_is_refused(who) {
        let code = r#"
NEW = {'NEWNS': 0x20000, 'NEWCGROUP': 0x2000000, 'NEWUTS': 0x4000000, 'NEWIPC': 0x8000000, 'NEWUSER': 0x10000000,
       'NEWPID': 0x20000000, 'NEWNET': 0x40000000}
buf = ctypes.create_string_buffer(256)
calls = {
    'ptrace': (101, 0), 'process_vm_readv': (310, 1), 'process_vm_writev': (311, 1), 'kcmp': (312, 1, 2), 'pidfd_getfd': (438, 0, 0, 0),
    'process_madvise': (440, 0), 'mount': (165, b'x', b'/tmp', b'tmpfs', 0, 0), 'umount2': (166, b'/tmp', 2), 'pivot_root': (155, b'/', b'/'),
    'chroot': (161, b'/tmp'), 'open_tree': (428, -100, b'/', 1), 'move_mount': (429, 0, b'', 0, b'', 0), 'fsopen': (430, b'tmpfs', 0),
    'fsconfig': (431, 0), 'fsmount': (432, 0), 'fspick': (433, -100, b'/', 0), 'mount_setattr': (442, -100, b'/', 0, buf, 32),
    'statmount': (457, buf, buf, 256, 0), 'listmount': (458, buf, buf, 1, 0), 'setns': (308, 0, 0), 'unshare': (272, NEW['NEWUSER']),
    'swapon': (167, b'/tmp/x', 0), 'reboot': (169, 0, 0, 0, 0), 'sethostname': (170, b'x', 1), 'setdomainname': (171, b'x', 1),
    'iopl': (172, 3), 'ioperm': (173, 0, 1, 1), 'init_module': (175, buf, 1, b''), 'finit_module': (313, 0, b'', 0), 'delete_module': (176, b'x', 0),
    'quotactl': (179, 0), 'kexec_load': (246, 0), 'kexec_file_load': (320, 0), 'add_key': (248, b'user', b'a', b'b', 1, -3),
    'request_key': (249, b'user', b'a', 0, 0), 'keyctl': (250, 0, -3, 0), 'syslog': (103, 3, buf, 256), 'acct': (163, b'/tmp/a'),
    'settimeofday': (164, buf, 0), 'clock_settime': (227, 0, buf), 'adjtimex': (159, buf), 'clock_adjtime': (305, 0, buf),
    'io_uring_setup': (425, 8, buf), 'io_uring_enter': (426, 0), 'io_uring_register': (427, 0), 'io_setup': (206, 1, buf), 'bpf': (321, 0, buf, 72),
    'userfaultfd': (323, 1), 'perf_event_open': (298, buf, 0, -1, -1, 0), 'open_by_handle_at': (304, -100, buf, 0), 'name_to_handle_at': (303, -100, b'/', buf, buf, 0),
    'fanotify_init': (300, 0, 0), 'fanotify_mark': (301, 0), 'personality': (135, 0x0040000), 'personality_32': (135, 8), 'modify_ldt': (154, 1, buf, 16),
    'seccomp': (317, 1, 0, buf), 'landlock_create_ruleset': (444, buf, 8, 0), 'memfd_secret': (447, 0), 'vhangup': (153,), 'setuid': (105, 0), 'setgid': (106, 0),
    'setreuid': (113, 0, 0), 'setresuid': (117, 0, 0, 0), 'setgroups': (116, 0, 0), 'setfsuid': (122, 0), 'capset': (126, buf, buf),
    'sched_setscheduler': (144, 0, 1, buf), 'sched_setattr': (314, 0, buf, 0), 'ioprio_set': (251, 1, 0, 0x2000), 'migrate_pages': (256, 1, 1, buf, buf),
    'move_pages': (279, 1, 0, 0, 0, 0, 0), 'mbind': (237, 0), 'shmget': (29, 0, 4096, 0o1600), 'semget': (64, 0, 1, 0o1600), 'msgget': (68, 0, 0o1600),
    'mq_open': (240, b'x', 0o102, 0o600, 0), 'vmsplice': (278, 1, 0, 0, 0), 'splice': (275, 0, 0, 1, 0, 1, 0), 'tee': (276, 0, 1, 1, 0),
    'prctl_dumpable': (157, 4, 1), 'prctl_seccomp': (157, 22, 2, buf), 'prctl_keepcaps': (157, 8, 1), 'prctl_securebits': (157, 28, 0),
    'prctl_ambient': (157, 47, 2, 21, 0, 0), 'prctl_mm': (157, 35, 1, 0, 0, 0), 'prctl_subreaper': (157, 36, 1), 'prctl_ptracer': (157, 0x59616d61, -1),
    'tiocsti': (16, 0, 0x5412, b'x'), 'tioclinux': (16, 0, 0x541C, b'x'), 'fs_ioc_setflags': (16, 1, 0x40086602, buf),
    'ioctl_ns_get_parent': (16, 0, 0xb702), 'ptrace_x32': (0x40000000 + 521, 0), 'getpid_x32': (0x40000000 + 39,), 'no_such_call': (1000,),
    'mmap_hugetlb': (9, 0, 1 << 21, 3, 0x40022, -1, 0), 'memfd_hugetlb': (319, b'x', 4),
}
pair = socket.socketpair()
a, b = pair[0].fileno(), pair[1].fileno()
pair[1].send(b'x')
# With MSG_OOB.
calls |= {
    'sendto_oob': (44, a, b'x', 1, 1, 0, 0), 'recvfrom_oob': (45, a, buf, 1, 1, 0, 0), 'sendmsg_oob': (46, a, buf, 1), 'recvmsg_oob': (47, a, buf, 0x41),
    'sendmmsg_oob': (307, a, buf, 1, 1), 'recvmmsg_oob': (299, a, buf, 1, 0x41, 0),
}
# One instruction: give the whole packet.
program = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0xffff))
filter = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', 1, ctypes.addressof(program)))
for option in ['attach_filter', 26], ['attach_bpf', 50], ['attach_reuseport_cbpf', 51], ['attach_reuseport_ebpf', 52]:
    calls[option[0]] = (54, a, 1, option[1], filter, 16)
for name, flag in NEW.items():
    calls['clone_' + name] = (56, flag | 17, 0, 0, 0, 0)
    calls['unshare_' + name] = (272, flag)
calls['unshare_NEWTIME'] = (272, 0x80)
for name, args in calls.items():
    r = call(*args)
    if r == 0 and name.startswith('clone_') : os._exit(0)
    if r != 'EPERM': print(name, r)
print('clone3', call(435, buf, 88))
print(pair[0].recv(9, socket.MSG_PEEK), pair[0].getsockopt(1, socket.SO_TYPE), pair[1].setsockopt(1, socket.SO_SNDBUF, 9999))
print(open('/proc/self/status').read().count('CapEff:\t0000000000000000'), os.getuid())
"#;
        let done = attack(who, code).go();
        assert_eq!(done.good(), "clone3 ENOSYS\nb'x' 1 None\n1 1000\n", "{done:?}");
    }

    fn a_call_of_another_architecture_kills_the_process(who) {
        let code = r#"
# mov eax, 20 (getpid of i386); int 0x80; ret
text = b'\xb8\x14\x00\x00\x00\xcd\x80\xc3'
m = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
m.write(text)
entry = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
pid = os.fork()
if pid == 0:
    entry()
    os._exit(0)
status = os.waitpid(pid, 0)[1]
# SIGSYS by the filter; SIGSEGV where the kernel has no 32-bit calls at all.
print(os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSYS, signal.SIGSEGV))
"#;
        assert_eq!(attack(who, code).go().good(), "True\n");
    }

    fn setuid_programs_give_nothing(who) {
        let code = r#"
import shutil
for tool in ['su', 'sudo', 'mount', 'passwd', 'newgrp', 'unshare', 'chsh']:
    path = shutil.which(tool)
    if path is None: continue
    r = subprocess.run([path] + (['-c', 'id -u'] if tool == 'su' else ['id', '-u'] if tool == 'sudo' else ['-t', 'tmpfs', 'x', '/tmp'] if tool == 'mount' else
                       ['-r', 'id', '-u'] if tool == 'unshare' else ['--help']), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if r.stdout.strip() == '0' or (tool in ('mount', 'su', 'sudo', 'unshare') and r.returncode == 0): print(tool, r)
shutil.copy(sys.executable, '/tmp/mine') if os.path.getsize(sys.executable) < 2**25 else None
shutil.copy('/bin/cat', '/tmp/suid'); os.chmod('/tmp/suid', 0o6755)
print(subprocess.run(['/tmp/suid', '/proc/self/status'], capture_output=True, text=True).stdout.count('Uid:\t1000\t1000\t1000\t1000'))
print(open('/proc/mounts', 'r').read() if os.path.exists('/proc/mounts') else '', end='')
print(all('nosuid' in line.split()[5] for line in open('/proc/self/mountinfo') if line.split()[4] != '/proc'))
"#;
        assert_eq!(attack(who, code).go().good(), "1\nTrue\n");
    }

    fn device_nodes_cannot_be_made_or_opened(who) {
        let code = r#"
for name, mode, major, minor in [('mem', stat.S_IFCHR, 1, 1), ('disk', stat.S_IFBLK, 254, 0), ('kvm', stat.S_IFCHR, 10, 232), ('zero', stat.S_IFCHR, 1, 5)]:
    print(name, attempt(os.mknod, '/tmp/' + name, mode | 0o666, os.makedev(major, minor)))
"#;
        assert_eq!(attack(who, code).go().good().matches("EPERM").count(), 4);
    }

    fn the_address_space_can_be_used_up_without_harm(who) {
        let code = r#"
kept = []
try:
    while True: kept.append(mmap.mmap(-1, 1 << 40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, prot=mmap.PROT_READ))
except OSError as e: print(errno.errorcode[e.errno])
def deeper(n): return deeper(n + 1)
sys.setrecursionlimit(10**6)
try: deeper(0)
except (RecursionError, MemoryError): print('deep')
"#;
        let done = attack(who, code).go();
        assert!(done.out().starts_with("ENOMEM\n"), "{done:?}");
    }
}
