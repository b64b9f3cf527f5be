//! What a Python program sees: driven end to end through the agent.

#[path = "harness/lib.rs"]
#[allow(dead_code)]
mod harness;

use harness::{Answer, Request, Sandbox};
use zeroboot_proto::{Ending, Kind};

fn python(code: impl AsRef<[u8]>) -> Answer {
    Sandbox::python("").run(Request::new(code))
}

#[test]
fn a_program_prints_and_ends_with_zero() {
    let answer = python("print(6 * 7)");
    assert_eq!(answer.good(), "42\n");
    assert_eq!(answer.order, [Kind::Ready, Kind::Started, Kind::Stdout, Kind::Exit]);
    assert!(answer.ready.contains("\"version\": \"Python 3."), "{}", answer.ready);
}

#[test]
fn an_exception_gives_a_traceback_without_our_frames_and_status_1() {
    let answer = python("def f():\n    return 1 / 0\n\nf()\n");
    assert_eq!(answer.ending(), Ending::Exited(1));
    let lines: Vec<&str> = answer.err().lines().filter(|l| !l.trim_start().starts_with(['^', '~'])).collect();
    assert_eq!(
        lines,
        [
            "Traceback (most recent call last):",
            "  File \"<string>\", line 4, in <module>",
            "    f()",
            "  File \"<string>\", line 2, in f",
            "    return 1 / 0",
            "ZeroDivisionError: division by zero",
        ]
    );
}

/// Runs `python3 -c` itself, for what has to look the same.
fn stock(code: &str) -> (Option<i32>, String, String) {
    let output = std::process::Command::new(harness::python()).args(["-X", "utf8", "-c", code]).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_syntax_error_looks_as_in_cpython() {
    for code in ["x ==", "def f(:\n  pass", "print('a)", "if True:\nprint(1)"] {
        let answer = python(code);
        let (_, _, expected) = stock(code);
        // How far carets reach under a line differs between CPython's own two printers.
        let text = |t: &str| {
            t.lines().filter(|l| !l.trim_matches([' ', '^', '~']).is_empty()).map(str::to_string).collect::<Vec<_>>()
        };
        assert_eq!((answer.ending(), text(answer.err())), (Ending::Exited(1), text(&expected)), "{code}");
    }
}

#[test]
fn sys_exit_gives_its_status() {
    for (argument, status, err) in [
        ("3", 3, ""),
        ("None", 0, ""),
        ("", 0, ""),
        ("'bye'", 1, "bye\n"),
        ("256", 0, ""),
        ("-1", 255, ""),
        ("True", 1, ""),
    ] {
        let answer = python(format!("import sys\nsys.exit({argument})"));
        assert_eq!((answer.ending(), answer.err()), (Ending::Exited(status), err), "sys.exit({argument})");
    }
}

#[test]
fn os_exit_skips_everything_but_its_status() {
    let answer = python("import os, atexit\natexit.register(print, 'no')\nprint('yes', flush=True)\nos._exit(7)");
    assert_eq!((answer.ending(), answer.out()), (Ending::Exited(7), "yes\n"));
}

#[test]
fn a_forged_word_of_the_end_does_what_os_exit_does() {
    let code = r#"
import os, stat, struct, subprocess, time
subprocess.Popen(["sleep", "1000"], stdout=1)
print("before")
for fd in range(3, 64):
    try:
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.write(fd, struct.pack("<IB3x", 2, 0x88) + b"\x02\x07")
    except OSError:
        pass
time.sleep(1000)
"#;
    let answer = python(code);
    assert_eq!((answer.ending(), answer.out()), (Ending::Exited(7), "before\n"));
}

#[test]
fn a_program_that_takes_the_runners_descriptor_for_itself_gets_no_word_in_its_file() {
    let code = "import os\nf = os.open('mine', os.O_CREAT | os.O_RDWR)\nos.dup2(f, 20)\nprint(1)\nimport atexit\natexit.register(print, 2)";
    let answer = Sandbox::python("").run(Request::new(code));
    assert_eq!((answer.ending(), answer.out()), (Ending::Exited(0), "1\n2\n"));
}

#[test]
fn a_program_is_main_and_sees_none_of_our_names() {
    let answer = python(
        "import sys, inspect\nclass C: pass\n\nif __name__ == '__main__':\n    print(sys.modules['__main__'].__dict__ is globals(), sys.argv, C.__module__)\n    print(sorted(n for n in globals() if n != '__annotations__'), sys.path[0] == '')\n    import pickle\n    print(type(pickle.loads(pickle.dumps(C()))) is C)\n",
    );
    assert_eq!(
        answer.good(),
        "True ['-c'] __main__\n['C', '__builtins__', '__doc__', '__loader__', '__name__', '__package__', '__spec__', 'inspect', 'sys'] True\nTrue\n"
    );
}

#[test]
fn the_control_descriptor_is_out_of_the_programs_way() {
    let answer = python(
        "import os\ntry:\n    os.fstat(3)\n    print('open')\nexcept OSError as e:\n    print(e.errno)\nprint(open('/dev/null').fileno())",
    );
    assert_eq!(answer.good(), "9\n3\n");
}

#[test]
fn input_reads_lines_and_then_the_end() {
    let answer = Sandbox::python("").run(
        Request::new("print(input('? ') + '!')\nprint(input())\ntry:\n    input()\nexcept EOFError:\n    print('end')")
            .stdin("a b\nä\n"),
    );
    assert_eq!(answer.good(), "? a b!\nä\nend\n");
}

#[test]
fn standard_input_streams_while_the_program_runs() {
    let mut sandbox = Sandbox::python("");
    sandbox.wait_for(Kind::Ready);
    sandbox.send(
        &Request::new("import sys\nfor line in sys.stdin:\n    print(line.strip()[::-1])\nprint('end')")
            .keep_stdin_open(),
    );
    for (line, answer) in [("abc\n", "cba\n"), ("xy\n", "yx\n")] {
        sandbox.send_frame(Kind::Stdin, line.as_bytes());
        sandbox.wait_for_output(answer);
    }
    sandbox.send_frame(Kind::StdinEnd, b"");
    assert_eq!(sandbox.finish().good(), "cba\nyx\nend\n");
}

#[test]
fn ten_megabytes_of_standard_input_pass_through() {
    let answer = Sandbox::python("")
        .run(Request::new("import sys\nprint(len(sys.stdin.buffer.read()))").stdin(vec![b'x'; 10 << 20]));
    assert_eq!(answer.good(), "10485760\n");
}

#[test]
fn standard_input_that_nobody_reads_does_no_harm() {
    let answer = Sandbox::python("").run(Request::new("print(1)").stdin(vec![b'x'; 1 << 20]));
    assert_eq!(answer.good(), "1\n");
    let answer = Sandbox::python("")
        .run(Request::new("import sys, os\nos.close(0)\nimport time\nprint(2)").stdin(vec![b'x'; 1 << 20]));
    assert_eq!(answer.good(), "2\n");
}

#[test]
fn output_is_live_line_by_line() {
    let mut sandbox = Sandbox::python("");
    sandbox.wait_for(Kind::Ready);
    // The program waits for an answer to what it printed, without a flush.
    sandbox.send(
        &Request::new("import sys\nprint('ready')\nsys.stdin.readline()\nprint('done', end='')").keep_stdin_open(),
    );
    sandbox.wait_for_output("ready\n");
    sandbox.send_frame(Kind::Stdin, b"\n");
    assert_eq!(sandbox.finish().good(), "ready\ndone");
}

#[test]
fn output_is_exact_binary_unicode_and_without_a_final_newline() {
    let answer = python("import sys\nsys.stdout.buffer.write(bytes(range(256)))");
    assert_eq!(answer.stdout, (0..=255).collect::<Vec<u8>>());
    assert_eq!(python("print('žluťoučký 🐎', end='')").good(), "žluťoučký 🐎");
    let answer = python(
        "import sys\nprint(sys.stdout.encoding, sys.stdin.encoding, sys.getfilesystemencoding(), open('f', 'w').encoding)",
    );
    assert_eq!(answer.good().to_lowercase(), "utf-8 utf-8 utf-8 utf-8\n");
    let answer = python("for i in range(100000): print(i)");
    assert_eq!(answer.good(), (0..100_000).map(|i| format!("{i}\n")).collect::<String>());
}

#[test]
fn standard_output_and_error_stay_apart() {
    let answer = python("import sys\nprint('a')\nprint('b', file=sys.stderr)\nsys.exit(3)");
    assert_eq!((answer.ending(), answer.out(), answer.err()), (Ending::Exited(3), "a\n", "b\n"));
}

#[test]
fn subprocesses_threads_and_asyncio_work() {
    let answer = python(
        "import subprocess, threading, asyncio, sys
print(subprocess.run(['cat'], input='x', capture_output=True, text=True).stdout)
print(subprocess.run([sys.executable, '-c', 'print(1+1)'], capture_output=True, text=True).stdout.strip())
t = [threading.Thread(target=lambda i=i: r.append(i)) for i in range(4)]; r = []
[x.start() for x in t]; [x.join() for x in t]; print(sorted(r))
async def f(x):
    await asyncio.sleep(0.01)
    return x
async def g():
    p = await asyncio.create_subprocess_exec('echo', 'sub', stdout=asyncio.subprocess.PIPE)
    return await asyncio.gather(f(1), f(2)), (await p.communicate())[0]
print(asyncio.run(g()))",
    );
    assert_eq!(answer.good(), "x\n2\n[0, 1, 2, 3]\n([1, 2], b'sub\\n')\n");
}

#[test]
fn multiprocessing_works_with_every_start_method() {
    let code = "import multiprocessing as mp
def square(x): return x * x
if __name__ == '__main__':
    with mp.Pool(2) as p: print(p.map(square, range(4)))
    for method in ('fork', 'spawn', 'forkserver'):
        with mp.get_context(method).Pool(1) as p: print(method, p.map(square, [3]))
";
    let expected = "[0, 1, 4, 9]\nfork [9]\nspawn [9]\nforkserver [9]\n";
    assert_eq!(python(code).good(), expected);
    assert_eq!(Sandbox::python("").run(Request::new(code).named("job.py")).good(), expected);
}

#[test]
fn concurrent_futures_work_without_a_guard() {
    let answer = python(
        "from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor\nfor E in (ProcessPoolExecutor, ThreadPoolExecutor):\n    with E(2) as e: print(list(e.map(abs, [-1, -2])))",
    );
    assert_eq!(answer.good(), "[1, 2]\n[1, 2]\n");
}

#[test]
fn the_end_of_a_program_is_as_orderly_as_cpythons() {
    let code = "import atexit, threading, time, sys, tempfile, weakref
class D:
    def __del__(self): print('del')
d = D()
atexit.register(print, 'atexit')
def work():
    time.sleep(0.05); print('thread')
threading.Thread(target=work).start()
f = open('out.txt', 'w'); f.write('kept')
class Cycle: pass
c = Cycle(); c.me = c; c.f = open('cycle.txt', 'w'); c.f.write('kept too')
print('main')";
    let answer = Sandbox::python("").run(Request::new(code).get("out.txt").get("cycle.txt"));
    assert_eq!(answer.good(), "main\nthread\natexit\ndel\n");
    assert_eq!(answer.files["out.txt"].as_deref(), Ok(&b"kept"[..]));
    assert_eq!(answer.files["cycle.txt"].as_deref(), Ok(&b"kept too"[..]));
}

#[test]
fn what_c_code_printed_is_not_lost() {
    assert_eq!(python("import ctypes\nctypes.CDLL(None).puts(b'from C')").good(), "from C\n");
}

#[test]
fn uncaught_exceptions_of_every_kind_are_reported_as_cpython_does() {
    let strip = |text: &str| -> Vec<String> {
        // Up to 3.12 stock Python has no source lines for -c.
        text.replace("__main__.", "")
            .lines()
            .filter(|l| !l.starts_with("    ") && !l.contains("Previous line repeated"))
            .map(str::to_string)
            .collect()
    };
    for code in [
        "try:\n    1/0\nexcept ZeroDivisionError as e:\n    raise ValueError('x') from e",
        "try:\n    {}['k']\nexcept KeyError:\n    int('y')",
        "def f(): f()\nf()",
        "raise Exception('multi\\nline')",
        "class E(Exception): pass\nraise E",
        "import sys\nsys.excepthook = lambda t, v, b: print('hook', t.__name__)\nraise ValueError",
        "import sys\nsys.excepthook = 3\nraise ValueError('q')",
        "import threading\nthreading.Thread(target=lambda: 1/0, name='T').start()",
        "import atexit\nclass B:\n    def __call__(self): 1/0\n    def __repr__(self): return 'B'\natexit.register(B())",
        "import sys\nsys.stdout.close()",
        "import sys\nsys.stdout = None\nprint(1)",
        "raise BaseException",
        "undefined_and_unlike_any_other",
    ] {
        let answer = python(code);
        let (status, out, err) = stock(code);
        assert_eq!(answer.ending(), Ending::Exited(status.unwrap()), "{code}: {}", answer.err());
        assert_eq!(answer.out(), out, "{code}");
        assert_eq!(strip(answer.err()), strip(&err), "{code}");
        assert!(!answer.err().contains("zeroboot_runner"), "{}", answer.err());
    }
}

#[test]
fn source_lines_are_those_of_the_code_that_failed() {
    let answer = python("x = 1\neval('1/0')");
    assert!(answer.err().contains("    eval('1/0')\n"), "{}", answer.err());
    assert!(!answer.err().contains("x = 1"), "{}", answer.err());
}

#[test]
fn an_interrupt_ends_it_as_a_signal() {
    let answer = python("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(60)");
    assert_eq!(answer.ending(), Ending::Signaled(2));
    assert!(answer.err().ends_with("KeyboardInterrupt\n"), "{}", answer.err());
}

#[test]
fn a_signal_is_reported_as_one() {
    assert_eq!(python("import os\nos.kill(os.getpid(), 9)").ending(), Ending::Signaled(9));
    assert_eq!(python("import os\nos.abort()").ending(), Ending::Signaled(6));
    assert_eq!(python("import ctypes\nctypes.string_at(0)").ending(), Ending::Signaled(11));
}

#[test]
fn arguments_environment_and_script_name_arrive() {
    let request = Request::new("import sys, os\nprint(sys.argv, os.environ['A'], os.environb[b'B'], os.path.basename(__file__), os.path.isfile(__file__))\nprint(sys.path[0] == os.getcwd(), os.environ['HOME'] == os.getcwd())\n1/0")
        .named("/somewhere/else/job.py")
        .arg("x y")
        .arg("")
        .arg("ž")
        .env("A", "1=2")
        .env("B", "");
    let answer = Sandbox::python("").run(request);
    assert_eq!(answer.out(), "['/somewhere/else/job.py', 'x y', '', 'ž'] 1=2 b'' job.py True\nTrue True\n");
    assert!(answer.err().contains("/job.py\", line 4, in <module>\n    1/0\n"), "{}", answer.err());
}

#[test]
fn a_time_zone_in_the_environment_counts() {
    let request = Request::new("import time\nprint(time.strftime('%H', time.localtime(0)))").env("TZ", "XXX-5");
    assert_eq!(Sandbox::python("").run(request).good(), "05\n");
}

#[test]
fn modules_beside_the_program_can_be_imported() {
    let request = |name| {
        Request::new("import helper, pkg.inner\nprint(helper.x, pkg.inner.y)")
            .named(name)
            .put("helper.py", b"x = 1")
            .put("pkg/inner.py", b"y = 2")
    };
    for name in ["-c", "main.py"] {
        assert_eq!(Sandbox::python("").run(request(name)).good(), "1 2\n");
    }
}

#[test]
fn ten_megabytes_of_code_run() {
    let mut code = String::with_capacity(10 << 20);
    code.push_str("x = 0\n");
    while code.len() < 10 << 20 {
        code.push_str("# ");
        code.push_str(&"filler ".repeat(1000));
        code.push('\n');
    }
    code.push_str("print('ran')");
    assert_eq!(python(code).good(), "ran\n");
}

#[test]
fn code_that_is_not_text_is_a_syntax_error() {
    let answer = python(b"print(1)\n\xff\xfe");
    assert_eq!(answer.ending(), Ending::Exited(1));
    assert!(answer.err().contains("SyntaxError"), "{}", answer.err());
    let answer = python(b"print(1)\0");
    assert_eq!(answer.ending(), Ending::Exited(1));
    assert!(answer.err().contains("null bytes"), "{}", answer.err());
}

#[test]
fn a_forked_child_of_the_program_ends_where_the_program_does() {
    let answer = python(
        "import os\npid = os.fork()\nif pid:\n    os.waitpid(pid, 0)\n    print('parent')\nelse:\n    print('child')",
    );
    assert_eq!(answer.good(), "child\nparent\n");
}

#[test]
fn a_module_that_cannot_be_warmed_is_a_failure_that_names_it() {
    let mut sandbox = Sandbox::start(
        &[],
        &[&harness::python(), "-E", "-s", "-X", "utf8", zeroboot_runtimes::PYTHON_PATH, "--warm", "json,no_such_thing"],
    );
    sandbox.wait_for(Kind::Failure);
    let answer = sandbox.finish();
    assert!(answer.failure.as_ref().is_some_and(|f| f.contains("no_such_thing") && !f.contains('\n')), "{answer:?}");
    assert_eq!(Sandbox::python("no_such_thing?").run(Request::new("print(1)")).good(), "1\n");
}

#[test]
fn a_runner_that_cannot_start_is_a_failure_with_its_last_words() {
    let mut sandbox = Sandbox::start(&[], &["sh", "-c", "echo broken runtime >&2; exit 9"]);
    sandbox.wait_for(Kind::Failure);
    let answer = sandbox.finish();
    let failure = answer.failure.unwrap();
    assert!(failure.contains("status 9") && failure.contains("broken runtime"), "{failure}");
}

#[test]
fn a_run_without_an_identity_never_starts() {
    let mut sandbox = Sandbox::python("");
    sandbox.wait_for(Kind::Ready);
    sandbox.send_frame(Kind::Limits, &harness::LIMITS.encode());
    sandbox.send_frame(Kind::Code, b"print(1)");
    sandbox.send_frame(Kind::Run, b"");
    let answer = sandbox.finish();
    assert!(answer.failure.is_some_and(|f| f.contains("Identity")) && answer.stdout.is_empty());
}
