//! Forks of the real templates, in the nested lane or on any host whose KVM runs Linux.
//!
//! They need templates built on this very host: `ZEROBOOT_HOME` names where. `cargo xtask nested-suite` makes
//! them and runs this. Without `ZEROBOOT_NESTED=1` (or `ZEROBOOT_REQUIRE_TEMPLATES=1`) the tests say that they
//! were skipped.
#![allow(clippy::print_stderr, reason = "tests speak to people")]

#[path = "harness/lib.rs"]
mod harness;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use zeroboot_proto::{
    Ending, Kind, encode,
    mailbox::{CONSOLE_PORT, DOORBELL_PORT},
};
use zeroboot_vm::Prefault;

use crate::harness::{all_differ, converse, exec, node, python, request, run};

#[test]
fn the_runtime_works_in_a_fork_as_in_a_machine() {
    let Some(python) = python() else { return };
    for (claim, code, expected) in [
        ("numpy is warm and right", "import numpy as np; print(np.arange(6).reshape(2,3) @ np.ones(3))", "[ 3. 12.]"),
        (
            "modules that were not warmed are imported",
            "import sqlite3, decimal, xml.dom.minidom, email, http.client, csv; print('ok')",
            "ok",
        ),
        (
            "files are written and read",
            "open('a.txt','w').write('x'*100000); print(len(open('a.txt').read()))",
            "100000",
        ),
        (
            "/tmp is a place to write",
            "import tempfile; f=tempfile.NamedTemporaryFile(); f.write(b'1'); print('ok')",
            "ok",
        ),
        (
            "a subprocess",
            "import subprocess; print(subprocess.run(['/bin/sh','-c','echo $((6*7)); exit 3'],capture_output=True))",
            "CompletedProcess(args=['/bin/sh', '-c', 'echo $((6*7)); exit 3'], returncode=3, stdout=b'42\\n', stderr=b'')",
        ),
        (
            "threads",
            "import threading; r=[]; t=[threading.Thread(target=r.append,args=(i,)) for i in range(8)]; [x.start() for x in t]; [x.join() for x in t]; print(sorted(r))",
            "[0, 1, 2, 3, 4, 5, 6, 7]",
        ),
        (
            "time.sleep sleeps",
            "import time; a=time.monotonic(); time.sleep(0.2); d=time.monotonic()-a; print(0.2 <= d < 2)",
            "True",
        ),
        (
            "asyncio.sleep sleeps",
            "import asyncio,time; a=time.monotonic(); asyncio.run(asyncio.sleep(0.2)); print(0.2 <= time.monotonic()-a < 3)",
            "True",
        ),
        (
            "signals",
            "import signal,time; signal.signal(signal.SIGALRM, lambda *a: print('alarm')); signal.setitimer(signal.ITIMER_REAL, 0.05); time.sleep(1)",
            "alarm",
        ),
        ("/dev/urandom", "print(len(open('/dev/urandom','rb').read(32)))", "32"),
        (
            "the locale",
            "import locale,sys; print(sys.stdout.encoding, locale.getpreferredencoding(), 'ä€'.encode())",
            "utf-8 utf-8 b'\\xc3\\xa4\\xe2\\x82\\xac'",
        ),
        (
            "multiprocessing",
            "import multiprocessing as m\ndef f(x): return x*x\nif __name__=='__main__':\n  with m.get_context('fork').Pool(2) as p: print(p.map(f, range(5)))",
            "[0, 1, 4, 9, 16]",
        ),
        (
            "who one is",
            "import os,pwd; print(os.getuid(), os.getcwd(), os.environ['HOME'], pwd.getpwuid(os.getuid()).pw_name)",
            "1000 /home/sandbox /home/sandbox sandbox",
        ),
        (
            "localhost",
            "import socket,threading\ns=socket.create_server(('127.0.0.1',0))\nt=threading.Thread(target=lambda: s.accept()[0].sendall(b'hi'))\nt.start()\nprint(socket.create_connection(s.getsockname()).recv(9))",
            "b'hi'",
        ),
        (
            "no other network",
            "import socket\ntry: socket.create_connection(('192.0.2.1', 80), 2)\nexcept OSError as e: print(e.errno)",
            "101",
        ),
        ("root is out of reach", "import os\ntry: os.kill(1, 9)\nexcept PermissionError: print('no')", "no"),
        ("the doorbell is out of reach", "import os\ntry: open('/dev/port','r+b')\nexcept OSError: print('no')", "no"),
        ("the wake line is out of reach", "try: open('/dev/hpet','rb')\nexcept PermissionError: print('no')", "no"),
        ("pandas is warm", "import pandas as pd; print(pd.DataFrame({'a':[1,2]}).sum()['a'])", "3"),
    ] {
        let answer = run(python, code).ok();
        assert_eq!(answer.text(), expected, "{claim}");
        assert!(answer.stderr.is_empty(), "{claim}: {}", String::from_utf8_lossy(&answer.stderr));
    }
}

#[test]
fn numpy_has_the_features_of_the_processor() {
    let Some(python) = python() else { return };
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let has = |name: &str| flags.split_whitespace().any(|flag| flag == name);
    let answer = run(python, "print(open('/proc/cpuinfo').read())").ok();
    for feature in ["avx", "avx2", "fma", "avx512f", "bmi2"] {
        let inside = answer.text().split_whitespace().any(|flag| flag == feature);
        assert_eq!(inside, has(feature), "{feature}");
    }
}

#[test]
fn what_goes_in_and_out_is_exact() {
    let Some(python) = python() else { return };
    // Exit statuses.
    assert_eq!(run(python, "import sys; sys.exit(3)").ending, Some(Ending::Exited(3)));
    let answer = run(python, "def f():\n    1/0\nprint('before')\nf()");
    assert_eq!((answer.ending, answer.text()), (Some(Ending::Exited(1)), "before"));
    let said = String::from_utf8_lossy(&answer.stderr).into_owned();
    assert!(said.contains("ZeroDivisionError") && said.contains("line 2"), "{said}");
    assert_eq!(run(python, "import os; os.kill(os.getpid(), 9)").ending, Some(Ending::Signaled(9)));
    assert_eq!(run(python, "import os; os.abort()").ending, Some(Ending::Signaled(6)));
    // All bytes, stdout and stderr apart, and a megabyte.
    let answer =
        run(python, "import sys; sys.stdout.buffer.write(bytes(range(256))*4096); sys.stderr.write('err')").ok();
    assert!(answer.stdout.chunks(256).all(|c| c.iter().enumerate().all(|(i, b)| usize::from(*b) == i)));
    assert_eq!((answer.stdout.len(), answer.stderr.as_slice()), (1 << 20, b"err".as_slice()));
    // Arguments, environment, standard input.
    let mut r = request("import sys,os; print(sys.argv, os.environ['X'], repr(sys.stdin.read()))");
    r.args = vec![b"-c".to_vec(), b"a b".to_vec(), "ä".into()];
    r.env = vec![("X", "y=z")];
    r.stdin = Some(b"line\nmore\0".to_vec());
    assert_eq!(exec(python, &r).ok().text(), "['-c', 'a b', 'ä'] y=z 'line\\nmore\\x00'");
    // Code of a megabyte.
    let mut code = b"x = '".to_vec();
    code.resize(1 << 20, b'a');
    code.extend(b"'\nprint(len(x))");
    assert_eq!(exec(python, &request(code)).ok().text(), ((1 << 20) - 5).to_string());
    // Files both ways, three megabytes of every byte; a file that is not there.
    let data: Vec<u8> = (0..3_000_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
    let mut r = request(
        "import os; os.makedirs('out', exist_ok=True); d=open('in/data','rb').read(); open('out/data','wb').write(d[::-1]); print(len(d))",
    );
    r.put = vec![("in/data", data.clone())];
    r.get = vec!["out/data", "missing"];
    let answer = exec(python, &r).ok();
    assert_eq!(answer.text(), "3000000");
    assert!(answer.files["out/data"].iter().eq(data.iter().rev()));
    assert!(answer.files.contains_key("failed:missing"));
}

#[test]
fn input_can_follow_while_the_code_runs() {
    let Some(python) = python() else { return };
    let mut r = request("for i in range(3): print(int(input()) * 2, flush=True)");
    r.stdin = None;
    let frame = |bytes: &[u8]| {
        let mut out = Vec::new();
        encode(&mut out, Kind::Stdin, bytes);
        out
    };
    let mut end = Vec::new();
    encode(&mut end, Kind::StdinEnd, b"");
    let talk = vec![(0, frame(b"1\n")), (2, frame(b"20\n")), (5, frame(b"300\n")), (9, end)];
    assert_eq!(converse(python, &r, talk).ok().text(), "2\n40\n600");
}

#[test]
fn limits_end_a_run_with_the_right_word() {
    let Some(python) = python() else { return };
    let mut r = request("print('begun', flush=True)\nwhile True: pass");
    r.limits.wall_ns = 10_000_000_000;
    let answer = exec(python, &r);
    assert_eq!((answer.ending, answer.text()), (Some(Ending::DeadlinePassed), "begun"));
    assert!(answer.took < Duration::from_secs(20), "{:?}", answer.took);

    let mut r = request("while True: pass");
    r.limits.cpu_ns = 500_000_000;
    assert_eq!(exec(python, &r).ending, Some(Ending::CpuLimit));

    let mut r = request("while True: print('x' * 999)");
    r.limits.output = 100_000;
    let answer = exec(python, &r);
    assert_eq!((answer.ending, answer.stdout.len()), (Some(Ending::OutputLimit), 100_000));

    let answer = run(python, "x = bytearray(1 << 31)");
    assert_eq!(answer.ending, Some(Ending::OutOfMemory(1)));
    assert!(String::from_utf8_lossy(&answer.stderr).contains("MemoryError"));
    assert!(answer.hints.len() == 1 && answer.hints[0].contains("memory"), "{:?}", answer.hints);

    // More than the machine has, in small steps: the kernel takes the program, never the agent.
    let mut r = request("x = []\nwhile True: x.append(bytes(1 << 20))");
    r.limits.memory = 2 << 30;
    let answer = exec(python, &r);
    assert!(matches!(answer.ending, Some(Ending::OutOfMemory(_))), "{:?} {:?}", answer.ending, answer.failure);

    let mut r = request(
        "import os\nn = 0\ntry:\n  while True:\n    if os.fork() == 0: os.read(0, 1) or os.pause() if hasattr(os,'pause') else __import__('signal').pause()\n    n += 1\nexcept OSError: print(n)",
    );
    r.limits.processes = 20;
    let answer = exec(python, &r).ok();
    assert!(answer.text().parse::<u32>().unwrap() <= 20, "{answer:?}");
}

#[test]
fn forks_of_one_template_share_no_random_number_and_no_name() {
    let Some(python) = python() else { return };
    let code = "\
import os, random, uuid, secrets, tempfile, ssl, socket, time
import numpy as np
print(os.urandom(16).hex())
print(random.random())
print(np.random.rand())
print(np.random.default_rng().random())
print(uuid.uuid4())
print(uuid.uuid1())
print(secrets.token_hex(8))
print(tempfile.mktemp())
print(ssl.RAND_bytes(8).hex())
print(open('/proc/sys/kernel/random/boot_id').read().strip())
print(socket.gethostname())
print(time.time())
";
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    for (before, answer, after) in all_differ(python, code, 11, 25) {
        let (before, after) = (seconds(before), seconds(after));
        let inside: f64 = answer.text().lines().nth(11).unwrap().parse().unwrap();
        assert!(inside > before - 0.05 && inside < after + 0.05, "{before} {inside} {after}");
    }
}

#[test]
fn forks_run_at_once_without_hearing_of_each_other() {
    let Some(python) = python() else { return };
    let names = ["a", "b", "c"];
    let answers: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = names
            .iter()
            .map(|name| {
                let code = format!(
                    "import time\nopen('/tmp/f','w').write('{name}')\nt=time.monotonic()\ntime.sleep(0.5)\nprint(open('/tmp/f').read(), time.monotonic()-t >= 0.5)"
                );
                scope.spawn(move || run(python, &code).ok().text().to_owned())
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(answers, ["a True", "b True", "c True"]);
}

#[test]
fn node_works_in_a_fork_as_in_a_machine() {
    let Some(node) = node() else { return };
    for (claim, code, expected) in [
        ("it computes", "console.log([1,2,3].map(x => x * 2))", "[ 2, 4, 6 ]"),
        ("timers", "const t=Date.now(); setTimeout(() => console.log(Date.now()-t >= 100), 100)", "true"),
        ("promises", "(async () => { await new Promise(r => setTimeout(r, 10)); console.log('done') })()", "done"),
        ("files", "const fs=require('fs'); fs.writeFileSync('a','x'); console.log(fs.readFileSync('a','utf8'))", "x"),
        ("a subprocess", "console.log(require('child_process').execSync('echo hi').toString().trim())", "hi"),
    ] {
        assert_eq!(run(node, code).ok().text(), expected, "{claim}");
    }
    assert_eq!(run(node, "process.exit(4)").ending, Some(Ending::Exited(4)));
    let answer = run(node, "throw new Error('oops')");
    assert_eq!(answer.ending, Some(Ending::Exited(1)));
    assert!(String::from_utf8_lossy(&answer.stderr).contains("oops"));
}

#[test]
fn forks_of_node_share_no_random_number_and_no_name() {
    let Some(node) = node() else { return };
    let code = "\
const crypto = require('crypto'), fs = require('fs');
console.log(Math.random());
console.log(crypto.randomUUID());
console.log(crypto.randomBytes(8).toString('hex'));
console.log(crypto.getRandomValues(new Uint32Array(4)).join());
console.log(fs.mkdtempSync('/tmp/x'));
console.log(fs.readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim());
console.log(require('os').hostname());
console.log(Date.now() / 1000);
";
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    for (before, answer, after) in all_differ(node, code, 7, 8) {
        let inside: f64 = answer.text().lines().nth(7).unwrap().parse().unwrap();
        assert!(inside > seconds(before) - 0.05 && inside < seconds(after) + 0.05, "{before:?} {inside} {after:?}");
    }
}

#[test]
fn what_an_exec_costs_is_told() {
    let Some(python) = python() else { return };
    for (name, code, expected) in [
        ("print(1)", "print(1)", "1\n"),
        ("numpy", "import numpy as np; print(int(np.ones((100, 100)).sum()))", "10000\n"),
    ] {
        for prefault in [Prefault::Nothing, Prefault::Written, Prefault::All] {
            let frames = request(code).frames();
            let cost = zeroboot_vm::bench::exec(&python.host, &python.snapshot, &frames, expected.as_bytes(), prefault)
                .unwrap();
            let counter = |name: &str| cost.kvm.iter().find(|(n, _)| n == name).map_or(0, |(_, v)| *v);
            eprintln!(
                "{name} {prefault:?}: fork {:?}, prefault {:?}, first byte {:?}, last byte {:?}, teardown {:?}, {} exits to user space, {} of all kinds, {} nested faults, {} pages copied, {} mapped",
                cost.fork,
                cost.prefault,
                cost.first_byte,
                cost.last_byte,
                cost.teardown,
                cost.exits.total(),
                counter("exits"),
                counter("pf_fixed"),
                cost.private_pages,
                cost.shared_pages,
            );
            assert!(cost.exits.rings <= 4, "{:?}", cost.exits);
        }
    }
}

#[test]
fn code_cannot_ring_in_the_agents_name() {
    let Some(python) = python() else { return };
    // mov dx, port; mov eax, 1; out dx, eax; ret
    let code = r"
import ctypes, mmap, sys
port = int(sys.argv[1])
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(b'\x66\xba' + port.to_bytes(2, 'little') + b'\xb8\x01\x00\x00\x00\xef\xc3')
print('before', flush=True)
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
print('after')
";
    for port in [DOORBELL_PORT, CONSOLE_PORT] {
        let mut r = request(code);
        r.args.push(port.to_string().into());
        let answer = exec(python, &r);
        assert_eq!((answer.ending, answer.text()), (Some(Ending::Signaled(11)), "before"), "port {port:#x}");
    }
}

#[test]
fn memory_that_no_process_maps_is_the_sandboxs() {
    let Some(python) = python() else { return };
    for (what, code) in [
        ("a file in memory", "import os\nf = os.memfd_create('x')\nfor _ in range(192): os.write(f, bytes(1 << 20))"),
        ("shared pages", "import mmap\nm = mmap.mmap(-1, 192 << 20)\nfor i in range(0, len(m), 4096): m[i] = 1"),
    ] {
        let mut r = request(format!("{code}\nimport time; time.sleep(5)\nprint('kept')"));
        (r.limits.memory, r.limits.file_size) = (128 << 20, 1 << 30);
        let answer = exec(python, &r);
        assert_eq!(answer.ending, Some(Ending::OutOfMemory(137)), "{what}: {answer:?}");
    }
}
