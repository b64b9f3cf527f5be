//! What the agent enforces, and what it carries in and out.

#[path = "harness/lib.rs"]
#[allow(dead_code)]
mod harness;

use std::path::Path;
use std::time::Duration;

use harness::{Answer, Request, Sandbox};
use zeroboot_proto::{Ending, Kind, Limits};

const SECOND: u64 = 1_000_000_000;

fn python(code: &str, change: impl FnOnce(&mut Limits)) -> Answer {
    Sandbox::python("").run(Request::new(code).limits(change))
}

/// Waits until a process is no more (a zombie of somebody else's counts as gone).
fn gone(pid: &str) {
    for _ in 0..1000 {
        match std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())) {
            Err(_) => return,
            Ok(stat) if stat.contains(") Z ") => return,
            Ok(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
    panic!("process {pid} is still there");
}

#[test]
fn an_endless_loop_is_stopped_at_its_deadline_and_its_output_is_kept() {
    let answer = python("print('before')\nwhile True: pass", |l| l.wall_ns = SECOND / 2);
    assert_eq!((answer.ending(), answer.out()), (Ending::DeadlinePassed, "before\n"));
    assert!(answer.report.unwrap().wall_ns >= SECOND / 2);
}

/// What was only stopped would be woken by the timer's SIGCONT, and nobody would look at what it does.
#[test]
fn what_the_code_left_behind_ends_with_it_whatever_the_front_does() {
    let code = "import ctypes, os, signal, struct, sys
if os.fork() == 0:
    libc = ctypes.CDLL(None)
    event, timer = ctypes.create_string_buffer(struct.pack('Qii', 0, signal.SIGCONT, 0), 64), ctypes.c_void_p()
    times = ctypes.create_string_buffer(struct.pack('QQQQ', 0, 10**6, 0, 10**6))
    assert libc.timer_create(1, event, ctypes.byref(timer)) == 0 and libc.timer_settime(timer, 0, times, None) == 0
    with open('new', 'w') as f: f.write(str(os.getpid()))
    os.rename('new', 'pid')
    while True: pass
while not os.path.exists('pid'): pass
sys.stdout.write('x' * (1 << 18))";
    let mut sandbox = Sandbox::python("");
    sandbox.wait_for(Kind::Ready);
    sandbox.send(&Request::new(code));
    let file = sandbox.dir.path().join("pid");
    while !file.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    // The end of the output does not fit into the socket, which nobody reads.
    gone(&std::fs::read_to_string(&file).unwrap());
    let answer = sandbox.finish();
    assert_eq!((answer.ending(), answer.stdout.len()), (Ending::Exited(0), 1 << 18));
}

#[test]
fn a_sleeper_that_ignores_every_signal_is_stopped_at_its_deadline() {
    let answer = python(
        "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\ntime.sleep(1000)",
        |l| l.wall_ns = SECOND / 2,
    );
    assert_eq!(answer.ending(), Ending::DeadlinePassed);
}

#[test]
fn cpu_time_is_limited_for_the_program_and_its_children_together() {
    let answer = python("while True: pass", |l| l.cpu_ns = SECOND / 2);
    assert_eq!(answer.ending(), Ending::CpuLimit);
    // Each child stays below; the sum does not.
    let code = "import os, time
while True:
    pid = os.fork()
    if pid == 0:
        end = time.process_time() + 0.05
        while time.process_time() < end: pass
        os._exit(0)
    os.waitpid(pid, 0)";
    let answer = python(code, |l| l.cpu_ns = SECOND / 2);
    assert_eq!(answer.ending(), Ending::CpuLimit);
    assert!(answer.report.unwrap().cpu_ns >= SECOND / 4, "{answer:?}");
}

#[test]
fn sleeping_costs_no_cpu_time() {
    let answer = python("import time\ntime.sleep(0.6)\nprint('slept')", |l| l.cpu_ns = SECOND / 2);
    assert_eq!(answer.good(), "slept\n");
}

#[test]
fn output_is_cut_exactly_at_its_limit() {
    let answer = python("while True: print('x' * 99)", |l| l.output = 100_000);
    assert_eq!((answer.ending(), answer.stdout.len() + answer.stderr.len()), (Ending::OutputLimit, 100_000));
    // A program that has ended by itself when the limit is seen.
    let answer = python("print('x' * 30000)", |l| l.output = 20_000);
    assert_eq!((answer.ending(), answer.stdout.len()), (Ending::OutputLimit, 20_000));
    let answer = python("import sys\nsys.stdout.write('x' * 20000)\n", |l| l.output = 20_000);
    assert_eq!((answer.ending(), answer.stdout.len()), (Ending::Exited(0), 20_000));
    let answer =
        python("import sys\nsys.stdout.write('x' * 600)\nsys.stdout.flush()\nsys.stderr.write('y' * 600)", |l| {
            l.output = 1000
        });
    assert_eq!((answer.ending(), answer.stdout.len(), answer.stderr.len()), (Ending::OutputLimit, 600, 400));
}

#[test]
fn a_large_output_within_its_limit_arrives_whole() {
    let answer = python("import sys\nfor i in range(200): sys.stdout.buffer.write(bytes([i]) * 65536)", |_| {});
    assert_eq!(answer.ending(), Ending::Exited(0));
    assert_eq!(answer.stdout, (0..200u8).flat_map(|i| vec![i; 65536]).collect::<Vec<u8>>());
}

#[test]
fn an_uncaught_memory_error_is_an_out_of_memory_with_its_traceback() {
    let answer = python("x = []\nwhile True: x.append(bytearray(1 << 20))", |l| l.memory = 200 << 20);
    match answer.ending() {
        Ending::OutOfMemory(1) => assert!(answer.err().ends_with("MemoryError\n"), "{answer:?}"),
        // The watchdog came first.
        ending => assert_eq!(ending, Ending::OutOfMemory(137)),
    }
    let answer =
        python("try:\n    bytearray(1 << 40)\nexcept MemoryError:\n    print('caught')", |l| l.memory = 200 << 20);
    assert_eq!(answer.good(), "caught\n");
}

#[test]
fn memory_is_limited_for_all_processes_together() {
    let code = "import os, time
for i in range(6):
    if os.fork() == 0:
        x = bytearray(b'x') * (60 << 20)
        time.sleep(1000)
time.sleep(1000)";
    let answer = python(code, |l| l.memory = 200 << 20);
    assert_eq!(answer.ending(), Ending::OutOfMemory(137));
    assert!(answer.report.unwrap().peak_memory > 200 << 20);
}

#[test]
fn pages_that_forked_processes_share_count_once() {
    let code = "import os, time
x = bytearray(b'x') * (80 << 20)
pids = []
for i in range(5):
    pid = os.fork()
    if pid == 0:
        time.sleep(0.5)
        os._exit(0)
    pids.append(pid)
for pid in pids: os.waitpid(pid, 0)
print('fine')";
    assert_eq!(python(code, |l| l.memory = 250 << 20).good(), "fine\n");
}

#[test]
fn files_and_descriptors_are_limited() {
    let code = "import resource
try:
    with open('big', 'wb') as f: f.write(b'x' * 200000)
except OSError as e: print(e.strerror)
l = []
try:
    while True: l.append(open('/dev/null'))
except OSError as e: print(e.strerror, len(l) < 50)
l.clear()
print(resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_NPROC)[0] in (20, 21))";
    let answer = python(code, |l| {
        l.file_size = 100_000;
        l.open_files = 50;
        l.processes = 20;
    });
    assert_eq!(answer.good(), "File too large\nToo many open files True\n(1, 1) True\n");
}

#[test]
fn a_daemon_left_behind_does_not_hold_the_run_and_is_gone_after() {
    let code = "import os, time
r, w = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(w, str(os.getpid()).encode())
        time.sleep(1000)
    os._exit(0)
os.wait()
print(os.read(r, 20).decode())";
    // The daemon holds stdout and stderr.
    let answer = python(code, |_| {});
    gone(answer.good());
}

#[test]
fn a_fork_bomb_ends_with_the_run() {
    // Bounded by itself: an unprivileged user's would be bounded by the limit for processes.
    let code = "import os, time
for i in range(4):
    os.fork()
    os.setsid() if os.getpid() != os.getsid(0) and os.getppid() != 1 and i else None
print('up', flush=True)
time.sleep(1000)";
    let answer = python(code, |l| l.wall_ns = 2 * SECOND);
    assert_eq!(answer.ending(), Ending::DeadlinePassed);
}

#[test]
fn everything_ends_when_the_front_goes() {
    let mut sandbox = Sandbox::python("");
    sandbox.wait_for(Kind::Ready);
    sandbox.send(&Request::new("import os, time\nos.fork()\nopen(f'pid{os.getpid()}', 'w').close()\nprint('.', end='', flush=True)\ntime.sleep(1000)").keep_stdin_open());
    sandbox.wait_for_output("..");
    sandbox.hang_up();
    sandbox.agent.wait().unwrap();
    let mut pids = 0;
    for entry in std::fs::read_dir(sandbox.dir.path()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        gone(name.strip_prefix("pid").unwrap());
        pids += 1;
    }
    assert_eq!(pids, 2);
}

#[test]
fn a_front_that_does_not_read_stops_the_program_not_the_agents_memory() {
    let mut sandbox = Sandbox::python("");
    sandbox.wait_for(Kind::Ready);
    let code = "import os
for i in range(160):
    os.write(1, b'x' * 65536)
    with open('progress', 'w') as f: f.write(str(i))";
    sandbox.send(&Request::new(code));
    let progress = |dir: &Path| std::fs::read_to_string(dir.join("progress")).ok().and_then(|t| t.parse::<u32>().ok());
    // Nobody reads: the program comes to a halt, far from its end.
    let mut last = (None, 0);
    while last.1 < 25 {
        std::thread::sleep(Duration::from_millis(20));
        let now = progress(sandbox.dir.path());
        last = if now.is_some() && now == last.0 { (now, last.1 + 1) } else { (now, 0) };
    }
    assert!(last.0.unwrap() < 40, "{last:?}");
    let answer = sandbox.finish();
    assert_eq!((answer.ending(), answer.stdout.len()), (Ending::Exited(0), 160 * 65536));
}

#[test]
fn files_go_in_and_come_back() {
    let big: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    let code = "import os, shutil
os.makedirs('out')
shutil.copy('in/big', 'out/copy')
open('empty', 'w').close()
os.symlink('out/copy', 'inside')
os.symlink('/etc/passwd', 'outside')
os.symlink('../../../../etc', 'dirlink')
os.mkfifo('fifo')
open('sparse', 'w').truncate(1 << 29)
print(os.stat('in/big').st_mode & 0o777 == 0o644, open('nothing').read() == '')";
    let mut request = Request::new(code).put("in/big", &big).put("nothing", b"");
    for path in [
        "out/copy",
        "empty",
        "inside",
        "outside",
        "dirlink/passwd",
        "fifo",
        "out",
        "missing",
        "../x",
        "/etc/passwd",
        "sparse",
    ] {
        request = request.get(path);
    }
    let answer = Sandbox::python("").run(request);
    assert_eq!(answer.good(), "True True\n");
    let failed = |path: &str| answer.files[path].as_ref().unwrap_err().as_str();
    assert_eq!(answer.files["out/copy"].as_ref().unwrap(), &big);
    assert_eq!(answer.files["inside"].as_ref().unwrap(), &big);
    assert_eq!(answer.files["empty"].as_ref().unwrap(), b"");
    assert!(failed("outside").contains("leads out"), "{}", failed("outside"));
    assert!(failed("dirlink/passwd").contains("leads out"));
    assert!(failed("fifo").contains("not a regular file"));
    // Its one file has come back already.
    assert!(!answer.files.contains_key("out"));
    assert_eq!(failed("missing"), "no such file");
    assert!(failed("../x").contains("leaves the working directory"));
    assert!(failed("/etc/passwd").contains("leaves the working directory"));
    assert!(failed("sparse").contains("536870912 bytes"));
}

#[test]
fn output_files_have_a_common_limit() {
    let request = Request::new("for n in 'abc': open(n, 'w').write('x' * 600)")
        .get("a")
        .get("b")
        .get("c")
        .limits(|l| l.output_files = 1300);
    let answer = Sandbox::python("").run(request);
    assert_eq!(answer.ending(), Ending::Exited(0));
    assert_eq!([answer.files["a"].is_ok(), answer.files["b"].is_ok(), answer.files["c"].is_ok()], [true, true, false]);
}

#[test]
fn an_input_file_that_leaves_the_working_directory_is_refused() {
    for path in ["../evil", "a/../../evil", "/tmp/zeroboot-evil", ".."] {
        let answer = Sandbox::python("").run(Request::new("print(1)").put(path, b"x"));
        assert!(
            answer.failure.as_ref().is_some_and(|f| f.contains("leaves the working directory")),
            "{path}: {answer:?}"
        );
        assert!(answer.stdout.is_empty());
    }
    assert!(!Path::new("/tmp/zeroboot-evil").exists());
}

#[test]
fn output_files_come_back_from_a_run_that_was_stopped() {
    let request =
        Request::new("open('a', 'w').write('kept')\nwhile True: pass").get("a").limits(|l| l.wall_ns = SECOND);
    let answer = Sandbox::python("").run(request);
    assert_eq!(answer.ending(), Ending::DeadlinePassed);
    assert_eq!(answer.files["a"].as_deref(), Ok(&b"kept"[..]));
}

#[test]
fn a_program_that_forges_control_frames_harms_only_itself() {
    // Whatever it writes to every descriptor that it can find.
    let code = "import os, struct
for fd in range(3, 64):
    for kind in (0x82, 0x87, 0x86, 0x01):
        try: os.write(fd, struct.pack('<IB3x', 4, kind) + b'evil')
        except OSError: break
print('ran')";
    assert_eq!(python(code, |_| {}).good(), "ran\n");
    let garbage = "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'\\xff' * 100)\n    except OSError: pass\nprint('ran')";
    let answer = python(garbage, |_| {});
    assert_eq!((answer.ending(), answer.out()), (Ending::Exited(0), "ran\n"));
}

#[test]
fn closing_every_descriptor_is_just_an_end_of_output() {
    let answer = python("import os\nprint('a')\nos.closerange(0, 1000)\nos._exit(5)", |_| {});
    assert_eq!((answer.ending(), answer.out()), (Ending::Exited(5), "a\n"));
}

/// As in a real sandbox: PID 1 of a pid namespace, where `kill(-1)` is the tool.
fn as_pid_1(code: &str, change: impl FnOnce(&mut Limits)) -> Answer {
    let unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let python = harness::python();
    let runner = [python.as_str(), "-E", "-s", "-X", "utf8", zeroboot_runtimes::PYTHON_PATH];
    Sandbox::start(&unshare, &runner).run(Request::new(code).limits(change))
}

#[test]
fn as_pid_1_it_reaps_orphans_and_kills_what_is_left() {
    let code = "import os, time
for i in range(20):
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            time.sleep(1000 if i % 2 else 0.01)
        os._exit(0)
    os.wait()
time.sleep(0.3)
zombies = sum(') Z ' in open(f'/proc/{p}/stat').read() for p in os.listdir('/proc') if p.isdigit())
print(os.getppid(), zombies)";
    assert_eq!(as_pid_1(code, |_| {}).good(), "1 0\n");
    let answer = as_pid_1("import os\nfor i in range(5): os.fork()\nwhile True: pass", |l| l.wall_ns = SECOND);
    assert_eq!(answer.ending(), Ending::DeadlinePassed);
    let answer = as_pid_1("import os\nos.kill(1, 9)\nos.kill(1, 15)\nprint('still here')", |_| {});
    assert_eq!(answer.good(), "still here\n");
}
