//! What the shipped templates cannot show, on a template of the tests' own that exists in this program's memory alone.
//!
//! - The ends that a sandbox can come to when its code does its worst, with a real Linux guest: each is told apart,
//!   soon, and the host goes on. Code in a shipped template is an ordinary user, for whom most of this is out of
//!   reach. So here one more program is started before the agent, and does as root what it is told on a socket.
//! - Generators that modules make while the template is warmed.

#[path = "harness/lib.rs"]
mod harness;

use std::{
    fs,
    process::Command,
    sync::OnceLock,
    time::{Duration, Instant},
};

use zeroboot_proto::{Ending, mailbox::DOORBELL_PORT};
use zeroboot_sys::memory::MiB;
use zeroboot_template::cpio::{self, Entry};
use zeroboot_vm::{BuildOptions, Host};

use crate::harness::{Answer, Template, all_differ, exec, request, run};

/// The kernel's first program in this template: it leaves a helper behind, and becomes the agent.
const FIRST: &str = "#!/usr/bin/python3
import os, socket, traceback
server = socket.socket(socket.AF_UNIX)
server.bind('\\0root')
server.listen()
if os.fork():
    server.close()
    os.execv('/init', ['/init'])
while True:
    caller = server.accept()[0]
    code = b''
    while chunk := caller.recv(65536):
        code += chunk
    try:
        exec(code, {})
        caller.sendall(b'done')
    except BaseException:
        caller.sendall(traceback.format_exc().encode())
    caller.close()
";

/// A module that is imported before the snapshot.
const MADE_BEFORE: &str = "
import random, numpy
plain = random.Random()
default = numpy.random.default_rng()
generator = numpy.random.Generator(numpy.random.Philox())
legacy = numpy.random.RandomState()
";

/// Has code done by root, and says what came of it.
const AS_ROOT: &str = "
import socket
def as_root(code):
    s = socket.socket(socket.AF_UNIX)
    s.connect('\\0root')
    s.sendall(code.encode())
    s.shutdown(socket.SHUT_WR)
    print('root:', s.recv(65536).decode(), flush=True)
";

/// Replaces the guest's kernel by machine code, which begins in ring 0 with interrupts off (kexec).
const IN_RING_0: &str = "
import ctypes
class Segment(ctypes.Structure):
    _fields_ = [('buf', ctypes.c_void_p), ('bufsz', ctypes.c_size_t), ('mem', ctypes.c_void_p), ('memsz', ctypes.c_size_t)]
def in_ring_0(code):
    at = 0x4000000
    code = ctypes.create_string_buffer(code.ljust(4096, b'\\0'))
    segment = Segment(ctypes.addressof(code), 4096, at, 4096)
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.argtypes = [ctypes.c_long] * 5
    # kexec_load for x86-64, then reboot(LINUX_REBOOT_CMD_KEXEC).
    if syscall(246, at, 1, ctypes.addressof(segment), 62 << 16) < 0:
        raise OSError(ctypes.get_errno(), 'kexec_load')
    syscall(169, 0xfee1dead, 672274793, 0x45584543, 0)
    raise OSError(ctypes.get_errno(), 'reboot')
";

/// The template in which code can reach root.
fn rooted() -> Option<&'static Template> {
    static TEMPLATE: OnceLock<Option<Template>> = OnceLock::new();
    TEMPLATE
        .get_or_init(|| {
            let runner = "/usr/bin/python3 -E -s -X utf8 /usr/lib/zeroboot/python.pyz --frozen --warm made_before ";
            let files = [
                Entry::file("first", 0o755, FIRST.as_bytes()),
                Entry::file("usr/lib/python3/dist-packages/made_before.py", 0o644, MADE_BEFORE.as_bytes()),
            ];
            own_template("python", &files, runner, "rdinit=/first", "print(1)")
        })
        .as_ref()
}

/// The shipped template's root file system with `files` more, frozen with `runner` warm and rehearsed with `code`.
fn own_template(name: &str, files: &[Entry], runner: &str, parameters: &str, code: &str) -> Option<Template> {
    if !harness::wanted() {
        return None;
    }
    let program = std::env::var_os("ZEROBOOT_BIN").expect("the lane names the binary");
    let assembled = Command::new(program).args(["template", "assemble", name, "--offline"]).output().unwrap();
    assert!(assembled.status.success(), "{assembled:?}");
    let paths = String::from_utf8(assembled.stdout).unwrap();
    let (kernel, initramfs) = paths.trim_end().split_once('\n').unwrap();
    // A second archive behind the first adds to it and replaces.
    let mut more = cpio::Writer::new(Vec::new());
    for file in files {
        more.append(file).unwrap();
    }
    more.append(&Entry::file("etc/zeroboot/argv", 0o644, runner.replace(' ', "\0").as_bytes())).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("initramfs");
    fs::write(&path, [fs::read(initramfs).unwrap(), more.finish().unwrap()].concat()).unwrap();
    let options = BuildOptions {
        kernel: kernel.into(),
        initramfs: path,
        memory: MiB(512),
        parameters: parameters.into(),
        timeout: Duration::from_secs(300),
    };
    let host = Host::open().expect("a usable /dev/kvm");
    let mut snapshot = zeroboot_vm::build(&host, &options, |_| ()).unwrap();
    snapshot.rehearse(&host, &request(code).frames()).unwrap();
    Some(Template { host, snapshot })
}

/// How soon an end must be told. The lane is slow, and its host may be busy.
const SOON: Duration = Duration::from_secs(30);

fn as_root(template: &Template, code: &str) -> Answer {
    let answer = run(template, &format!("{AS_ROOT}\nprint('begun', flush=True)\nas_root({code:?})"));
    assert!(answer.text().starts_with("begun"), "{answer:?}");
    answer
}

/// Descriptors of this process.
fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn a_guest_that_ends_itself_is_a_crash_at_once() {
    let Some(template) = rooted() else { return };
    assert_eq!(as_root(template, "x = 1").ok().text(), "begun\nroot: done");
    let before = open_files();
    for (claim, code) in [
        ("a kernel panic", "open('/proc/sysrq-trigger', 'w').write('c')"),
        ("a power-off", "import ctypes; ctypes.CDLL(None).reboot(0x4321fedc)"),
        // With the parameter reboot=t, by a triple fault.
        ("a restart", "import ctypes; ctypes.CDLL(None).reboot(0x1234567)"),
        (
            "an agent that was overwritten",
            "import re\n\
             start, end = re.search(r'^(\\w+)-(\\w+) r-xp', open('/proc/1/maps').read(), re.M).groups()\n\
             memory = open('/proc/1/mem', 'r+b', 0)\n\
             memory.seek(int(start, 16))\n\
             memory.write(bytes(int(end, 16) - int(start, 16)))",
        ),
    ] {
        let start = Instant::now();
        let answer = as_root(template, code);
        assert_eq!((answer.ending, answer.text()), (Some(Ending::Crashed), "begun"), "{claim}: {answer:?}");
        assert!(answer.took < SOON, "{claim}: {:?}", answer.took);
        if claim == "a kernel panic" {
            // What the operator finds in the log.
            assert!(answer.crash.as_ref().is_some_and(|why| why.contains("Kernel panic")), "{answer:?}");
        }
        eprintln!("{claim}: {:?}", start.elapsed());
    }
    assert_eq!(open_files(), before);
    // The host is as it was, and so is the template.
    assert_eq!(run(template, "print(6 * 7)").ok().text(), "42");
}

#[test]
fn a_guest_kernel_gone_wrong_is_ended() {
    let Some(template) = rooted() else { return };
    let ring = |value: u32| {
        // mov dx, port; mov eax, value; out dx, eax; jmp .
        let mut code = vec![0x66, 0xba];
        code.extend(DOORBELL_PORT.to_le_bytes());
        code.push(0xb8);
        code.extend(value.to_le_bytes());
        code.extend([0xef, 0xeb, 0xfe]);
        code
    };
    for (claim, code, ending) in [
        ("a loop with interrupts off", vec![0xfa, 0xeb, 0xfe], Ending::DeadlinePassed),
        // lidt [a table of no entry]; ud2
        ("a triple fault", vec![0x0f, 0x01, 0x1d, 2, 0, 0, 0, 0x0f, 0x0b], Ending::Crashed),
        // cli; hlt
        ("a sleep without end", vec![0xfa, 0xf4, 0xeb, 0xfd], Ending::DeadlinePassed),
        ("a ring that means nothing", ring(0xffff_ffff), Ending::Crashed),
    ] {
        let bytes = code.iter().map(|byte| format!("\\x{byte:02x}")).collect::<String>();
        let root = format!("{IN_RING_0}\nin_ring_0(b'{bytes}')");
        let mut request = request(format!("{AS_ROOT}\nprint('begun', flush=True)\nas_root({root:?})"));
        request.limits.wall_ns = 6_000_000_000;
        let answer = exec(template, &request);
        assert_eq!((answer.ending, answer.text()), (Some(ending), "begun"), "{claim}: {answer:?}");
        assert!(answer.took < SOON, "{claim}: {:?}", answer.took);
        eprintln!("{claim}: {:?}", answer.took);
    }
}

#[test]
fn generators_made_before_the_snapshot_give_each_fork_other_numbers() {
    let Some(template) = rooted() else { return };
    let code = "import made_before as m\nprint(m.plain.random(), m.default.random(), m.generator.random(), m.legacy.rand(), sep='\\n')";
    all_differ(template, code, 4, 20);
}

#[test]
fn what_a_module_that_node_warmed_keeps_gives_each_fork_other_numbers() {
    let module = include_str!("../../zeroboot-guest/tests/clones/made_before.cjs");
    let runner = "/usr/bin/node --no-deprecation --experimental-vm-modules /usr/lib/zeroboot/node.cjs --frozen --warm /made_before.cjs ";
    let files = [Entry::file("made_before.cjs", 0o644, module.as_bytes())];
    let Some(template) = own_template("node", &files, runner, "", "console.log(1)") else { return };
    let code = "const all = require('/made_before.cjs')();
for (const line of all) if (!line.startsWith('before')) console.log(line);
console.log(performance.timeOrigin);
console.log(Math.abs(performance.timeOrigin + performance.now() - Date.now()) < 60e3, all.length);";
    for (_, answer, _) in all_differ(&template, code, 7, 6) {
        assert_eq!(answer.text().lines().nth(7), Some("true 10"), "{answer:?}");
    }
}

#[test]
fn memory_that_runs_out_ends_the_program_or_the_guest() {
    let Some(template) = rooted() else { return };
    // Files are memory too: three file systems that may take half of it each.
    let fill = "
print('begun', flush=True)
for folder in ['/tmp', '/dev/shm', '/home/sandbox']:
    try:
        for n in range(1000):
            with open(f'{folder}/{n}', 'wb') as file:
                for _ in range(16): file.write(bytes(1 << 20))
    except OSError as error:
        print(folder, n, error.errno, flush=True)
";
    let answer = run(template, fill);
    assert!(answer.took < SOON * 2, "{:?}", answer.took);
    assert!(matches!(answer.ending, Some(Ending::OutOfMemory(_) | Ending::Crashed)), "{answer:?}");
    eprintln!("files: {:?} after {:?}: {}", answer.ending, answer.took, answer.text());
    // Kernel memory, with nothing left that the kernel could take but the agent.
    let answer = as_root(
        template,
        "files = []\nwhile True: files.append(open('/dev/shm/x%d' % len(files), 'wb')); files[-1].write(bytes(8 << 20))",
    );
    eprintln!("by root: {:?} after {:?}: {}", answer.ending, answer.took, answer.text());
    assert!(answer.took < SOON * 2, "{:?}", answer.took);
}

#[test]
fn a_program_that_kills_its_own_runner_is_a_program_that_was_killed() {
    let Some(template) = rooted() else { return };
    let answer = run(template, "import os, time\nif os.fork() == 0: os.kill(os.getppid(), 9)\ntime.sleep(100)");
    assert_eq!(answer.ending, Some(Ending::Signaled(9)), "{answer:?}");
    assert!(answer.took < SOON, "{:?}", answer.took);
}
