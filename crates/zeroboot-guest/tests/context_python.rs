//! Python contexts, with IPython's shell and with our own.

#[path = "context/lib.rs"]
#[allow(dead_code)]
mod context;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use context::{Context, FAILED, INTERRUPTED, OK, python};

const BESIDE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/context");

#[derive(Clone, Copy, Debug, PartialEq)]
enum Shell {
    Own,
    IPython,
}

const SHELLS: [Shell; 2] = [Shell::Own, Shell::IPython];

fn command(python: &str, options: &[&str]) -> Vec<String> {
    let all = [python, "-s", "-X", "utf8", zeroboot_runtimes::PYTHON_PATH].into_iter().chain(options.iter().copied());
    all.map(str::to_owned).collect()
}

fn start(shell: Shell) -> Context {
    let warm = if shell == Shell::Own { "without_ipython" } else { "" };
    let command = command(&python(), &["--warm", warm]);
    // Not -E as in the product: the path leads to what this test warms.
    Context::start(&command.iter().map(String::as_str).collect::<Vec<_>>(), &[("PYTHONPATH", BESIDE)])
}

#[test]
fn the_shells_are_the_ones_that_the_tests_mean() {
    for shell in SHELLS {
        let mut context = start(shell);
        let has = context.run("'get_ipython' in dir(__builtins__) or 'get_ipython' in globals()");
        assert_eq!(has.value(), if shell == Shell::IPython { "True" } else { "False" });
    }
}

#[test]
fn a_hundred_cells_share_their_state() {
    for shell in SHELLS {
        let mut context = start(shell);
        assert_eq!(context.run("x = 0; seen = []").value(), "");
        for i in 1..=100 {
            assert_eq!(context.run(format!("x += {i}\nseen.append(x)\nx")).value(), (i * (i + 1) / 2).to_string());
        }
        assert_eq!(context.run("len(seen)").value(), "100");
        assert_eq!(context.run("_ + 1").value(), "101");
        assert_eq!((context.out(), context.err()), (String::new(), String::new()), "{shell:?}");
        assert_eq!(context.close(), Some(0));
    }
}

#[test]
fn the_value_is_the_last_expression_and_silence_is_possible() {
    for shell in SHELLS {
        let mut context = start(shell);
        for (code, value) in [
            ("1 + 1", "2"),
            ("x = 1", ""),
            ("None", ""),
            ("3;", ""),
            ("3  # not the last thing;", "3"),
            ("if True:\n    4", ""),
            ("", ""),
            ("   \n", ""),
            ("'žluťoučký 🐎'", "'žluťoučký 🐎'"),
            ("'\\ud800'", "'\\ud800'"),
            ("from __future__ import annotations", ""),
            ("def f(a: undefined): return 7\nf(0)", "7"),
            ("__name__", "'__main__'"),
            ("import sys; sys.modules['__main__'].x", "1"),
            ("import pickle; pickle.loads(pickle.dumps(f))(0)", "7"),
            ("import inspect; inspect.getsource(f).strip()[:5]", "'def f'"),
        ] {
            assert_eq!(context.run(code).value(), value, "{shell:?}: {code}");
        }
    }
}

#[test]
fn errors_say_what_happened_and_leave_the_context_usable() {
    for shell in SHELLS {
        let mut context = start(shell);
        context.run("kept = 41");
        for (code, name, shows) in [
            ("def f():\n    return 1/0\nf()", "ZeroDivisionError", "1/0"),
            ("raise ValueError('žluťoučký') from KeyError('k')", "ValueError", "KeyError"),
            ("x ==", "SyntaxError", "x =="),
            ("def f(:\n  pass", "SyntaxError", "def f"),
            ("import sys; sys.exit(3)", "SystemExit", "SystemExit"),
            ("exit()", "SystemExit", "SystemExit"),
            ("input('name?')", "EOFError", "no standard input"),
            ("class E(Exception):\n    def __str__(self): 1/0\nraise E", "E", ""),
            ("def r(): r()\nr()", "RecursionError", "r()"),
            ("await undefined_and_unlike_any_other", "NameError", "undefined_and"),
            ("raise BaseException('b')", "BaseException", "b"),
            ("class R:\n    def __repr__(self): raise RuntimeError('in repr')\nR()", "RuntimeError", "in repr"),
            (
                "import asyncio\nasync def deep():\n    await asyncio.sleep(0)\n    1/0\nawait deep()",
                "ZeroDivisionError",
                "deep",
            ),
        ] {
            // IPython prints what a repr raises, and shows no value; a failing text is an error of its own there.
            if shell == Shell::IPython && ["RuntimeError", "E"].contains(&name) {
                continue;
            }
            let cell = context.run(code);
            assert!(cell.failed_with(name) && cell.error().contains(shows), "{shell:?}: {code}: {cell:?}");
            for ours in ["zeroboot", "python.pyz", "\\u001b"] {
                assert!(!cell.error().contains(ours), "{shell:?}: {code}: {ours}: {cell:?}");
            }
        }
        assert_eq!(context.run("kept + 1").value(), "42");
        if shell == Shell::Own {
            let cell = context.run("!ls");
            assert!(cell.failed_with("SyntaxError") && cell.error().contains("need IPython"), "{cell:?}");
        }
    }
}

#[test]
fn an_error_of_any_size_fits_into_its_frame() {
    for shell in SHELLS {
        let mut context = start(shell);
        let cell = context.run("raise Exception('\\x01é🐎' * 1_000_000)");
        assert!(cell.failed_with("Exception"), "{shell:?}");
        assert!(cell.error().contains("characters left out"));
        assert_eq!(context.run("1").value(), "1");
    }
}

#[test]
fn output_of_a_cell_is_in_the_pipes_before_its_end() {
    for shell in SHELLS {
        let mut context = start(shell);
        let mut all = String::new();
        for i in 0..20 {
            let code = format!(
                "import sys, ctypes\nprint('a{i}', end=' ')\nctypes.CDLL(None).printf(b'c{i} ')\nsys.stderr.write('e{i}')"
            );
            assert_eq!(context.run(code).status, OK);
            all.push_str(&format!("e{i}"));
            // The test's own thread has to take it out of the pipe.
            context.wait_for(&format!("a{i} "));
            context.wait_for(&format!("c{i} "));
            context.wait_for(&all);
        }
        for i in 0..20 {
            assert!(context.out().contains(&format!("a{i} ")));
        }
        // A cell that takes its streams away has them again in the next.
        context.run("sys.stdout.close()");
        context.run("print('again')");
        context.wait_for("again\n");
    }
}

#[test]
fn rich_values_and_displays_are_mime_bundles() {
    for shell in SHELLS {
        let mut context = start(shell);
        let cell = context.run(
            "class Rich:
    def __repr__(self): return 'plain'
    def _repr_html_(self): return '<b>é</b>'
    def _repr_markdown_(self): return '*m*'
    def _repr_latex_(self): return '$l$'
    def _repr_svg_(self): return '<svg/>'
    def _repr_png_(self): return b'\\x89PNG\\x00'
    def _repr_jpeg_(self): return b'\\xff\\xd8'
    def _repr_json_(self): return {'k': [1]}
    def _repr_pdf_(self): return b'%PDF'
    def _repr_javascript_(self): return 'js()'
class Bundle:
    def _repr_mimebundle_(self, include=None, exclude=None):
        import base64
        return {'text/plain': 'p', 'image/png': base64.b64encode(b'raw').decode(), 'text/html': '<i>'}, {'m': 1}
class Broken:
    def __repr__(self): return 'broken'
    def _repr_html_(self): 1/0
display(Rich(), Bundle())
display({'text/html': '<u>'}, raw=True)
display(Rich)
display(Broken())
Rich()",
        );
        assert_eq!((cell.status, cell.bundles.len()), (OK, 6), "{shell:?}: {cell:?}");
        for rich in [&cell.bundles[0], &cell.bundles[5]] {
            assert_eq!(rich.text("text/plain"), "plain");
            assert_eq!(rich.text("text/html"), "<b>é</b>");
            assert_eq!(rich.text("text/markdown"), "*m*");
            assert_eq!(rich.text("text/latex"), "$l$");
            assert_eq!(rich.text("image/svg+xml"), "<svg/>");
            assert_eq!(rich.parts["image/png"], b"\x89PNG\0");
            assert_eq!(rich.parts["image/jpeg"], b"\xff\xd8");
            assert_eq!(rich.text("application/json").replace(' ', ""), "{\"k\":[1]}");
            assert_eq!(rich.parts["application/pdf"], b"%PDF");
            assert_eq!(rich.text("application/javascript"), "js()");
        }
        assert_eq!(cell.bundles[1].parts["image/png"], b"raw");
        assert_eq!(cell.bundles[2].text("text/html"), "<u>");
        assert_eq!(cell.bundles[3].parts.len(), 1, "a class has no more than a repr");
        assert_eq!(cell.bundles[4].text("text/plain"), "broken");
        let values: Vec<bool> = cell.bundles.iter().map(|bundle| bundle.is_value).collect();
        assert_eq!(values, [false, false, false, false, false, true]);
    }
}

#[test]
fn large_results_come_whole() {
    for shell in SHELLS {
        let mut context = start(shell);
        let code = "import os\ndata = os.urandom(5 << 20)\nimport hashlib\nprint(hashlib.sha256(data).hexdigest())
class Image:
    def _repr_png_(self): return data
Image()";
        let cell = context.run(code);
        assert_eq!(cell.bundles[0].parts["image/png"].len(), 5 << 20);
        context.run("open('back', 'wb').write(b'')");
        std::fs::write(context.dir.path().join("back"), &cell.bundles[0].parts["image/png"]).unwrap();
        assert_eq!(context.run("open('back', 'rb').read() == data").value(), "True");
        assert_eq!(context.run("'x' * 1_000_000").value().len(), 1_000_002);
        // Exactly at the edge of a frame and beside it.
        for length in 65_510..65_520 {
            let text = format!("class E:\n    def __repr__(self): return 'y' * {length}\nE()");
            assert_eq!(context.run(text).value().len(), length);
        }
    }
}

#[test]
fn ten_megabytes_of_code_are_one_cell() {
    let mut context = start(Shell::Own);
    let mut code = "# filler filler filler filler filler\n".repeat((10 << 20) / 37);
    code.push_str("'ran'");
    assert_eq!(context.run(code).value(), "'ran'");
}

#[test]
fn figures_and_frames_look_as_people_know_them() {
    for shell in SHELLS {
        let mut context = start(shell);
        let cell = context.run("import matplotlib.pyplot as plt\nplt.plot([1, 2])\n'value'");
        assert_eq!(cell.bundles.len(), 2, "{shell:?}: {cell:?}\n{}", context.err());
        assert!(cell.bundles[0].is_value && !cell.bundles[1].is_value);
        assert!(cell.bundles[1].parts["image/png"].starts_with(b"\x89PNG\r\n"));
        // Shown when it says so, and not a second time.
        let cell = context.run("plt.plot([2, 1]); plt.show()\ndisplay('after')");
        assert_eq!(cell.bundles.len(), 2, "{shell:?}: {cell:?}");
        assert!(cell.bundles[0].parts.contains_key("image/png"));
        assert_eq!(context.run("plt.get_fignums()").value(), "[]");
        assert_eq!(context.err(), "", "{shell:?}");
        let cell = context.run("import pandas as pd\npd.DataFrame({'a': [1.5]})");
        assert!(cell.bundles[0].text("text/html").contains("<table"), "{cell:?}");
        assert!(cell.bundles[0].text("text/plain").contains("1.5"));
    }
}

#[test]
fn awaits_stand_at_the_top_level_and_tasks_go_on_between_cells() {
    for shell in SHELLS {
        let mut context = start(shell);
        assert_eq!(context.run("import asyncio\nawait asyncio.sleep(0.01, 5)").value(), "5");
        assert_eq!(context.run("x = await asyncio.sleep(0, 6)\nx").value(), "6");
        let code = "async def later():\n    await asyncio.sleep(0.3)\n    print('in the', 'background')\ntask = asyncio.create_task(later()); await asyncio.sleep(0)";
        assert_eq!(context.run(code).value(), "", "{shell:?}");
        // No cell runs meanwhile.
        context.wait_for("in the background\n");
        assert_eq!(context.run("task.done()").value(), "True");
        assert_eq!(context.run("asyncio.run(asyncio.sleep(0, 7))").value(), "7");
        assert_eq!(context.run("await asyncio.sleep(0, 8)").value(), "8");
        assert_eq!(
            context.run("async for y in (i async for i in __import__('contextlib').aclosing(None)): pass").status,
            FAILED
        );
    }
}

#[test]
fn an_interrupt_stops_a_cell_whatever_it_does() {
    for shell in SHELLS {
        let mut context = start(shell);
        context.run("import asyncio, subprocess, time, threading");
        let say = "print('begun', flush=True)\n";
        for (i, code) in [
            "while True:\n    x = 1",
            "time.sleep(1000)",
            "await asyncio.sleep(1000)",
            "async def f():\n    await asyncio.Event().wait()\nawait f()",
            "async def busy():\n    while True: x = 1\nawait busy()",
            "subprocess.run(['sleep', '1000'])",
            "threading.Event().wait()",
            "asyncio.run(asyncio.sleep(1000))",
            "input = open('/dev/zero', 'rb')\nwhile True: input.read(1)",
        ]
        .into_iter()
        .enumerate()
        {
            let word = format!("begun {i}\n");
            let since = Instant::now();
            let cell = context.interrupted(&format!("{}{code}", say.replace("begun", &format!("begun {i}"))), &word);
            assert_eq!(cell.status, INTERRUPTED, "{shell:?}: {code}: {cell:?}");
            assert!(cell.error().contains("KeyboardInterrupt"), "{code}: {cell:?}");
            assert!(!cell.error().contains("zeroboot"), "{code}: {cell:?}");
            assert!(since.elapsed() < Duration::from_secs(60), "{code}");
            assert_eq!(context.run("1 + 1").value(), "2", "{shell:?} after {code}");
        }
        // A cell may handle it and go on.
        let cell = context.interrupted(
            "try:\n    print('trying', flush=True)\n    while True:\n        x = 1\nexcept KeyboardInterrupt:\n    y = 'caught'\ny",
            "trying",
        );
        assert_eq!(cell.value(), "'caught'");
        // Between cells it does nothing.
        for _ in 0..20 {
            context.interrupt();
        }
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(context.run("1 + 1").value(), "2");
        assert_eq!(context.err(), "", "{shell:?}");
    }
}

#[test]
fn an_interrupt_at_any_moment_loses_no_frame() {
    for shell in SHELLS {
        let mut context = start(shell);
        context.run("class Big:\n    def _repr_png_(self): return bytes(300_000)");
        let mut stopped = 0;
        for i in 0..60 {
            context.begin("for _ in range(20): display(Big())\nfor _ in range(30_000): pass");
            std::thread::sleep(Duration::from_micros(i * 400));
            context.interrupt();
            // Every bundle is whole, and there is one end: this panics otherwise.
            let cell = context.end();
            stopped += u32::from(cell.status == INTERRUPTED);
            for bundle in &cell.bundles {
                assert_eq!(bundle.parts["image/png"].len(), 300_000);
            }
        }
        assert!(stopped > 0, "no interrupt met a cell");
        assert_eq!(context.run("1 + 1").value(), "2");
    }
}

#[test]
fn threads_print_after_the_end_of_their_cell_and_display_whole_bundles() {
    for shell in SHELLS {
        let mut context = start(shell);
        let code = "import threading, time
def late():
    time.sleep(0.2)
    print('printed late', flush=True)
    display('displayed late')
threading.Thread(target=late).start()";
        assert_eq!(context.run(code).value(), "");
        context.wait_for("printed late");
        // No cell is there to have it: its plain text is output.
        context.wait_for("displayed late");
        let code = "class Big:\n    def _repr_png_(self): return bytes(200_000)
ts = [threading.Thread(target=lambda: [display(Big()) for _ in range(5)]) for _ in range(4)]
[t.start() for t in ts]; [t.join() for t in ts]; None";
        let cell = context.run(code);
        assert_eq!(cell.bundles.iter().filter(|b| b.parts["image/png"].len() == 200_000).count(), 20, "{shell:?}");
    }
}

#[test]
fn processes_that_a_cell_forks_say_nothing_for_it() {
    for shell in SHELLS {
        let mut context = start(shell);
        // The child runs to the end of the cell.
        let code = "import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\ndisplay('child' if pid == 0 else 'parent')\npid == 0";
        let cell = context.run(code);
        assert_eq!((cell.status, cell.bundles.len()), (OK, 2), "{shell:?}: {cell:?}");
        assert_eq!(cell.bundles[1].text("text/plain"), "False");
        context.wait_for("child");
        let code = "import multiprocessing as mp\ndef square(x): return x * x\nwith mp.get_context('fork').Pool(2) as p: print(p.map(square, range(4)))";
        assert_eq!(context.run(code).status, OK);
        context.wait_for("[0, 1, 4, 9]");
        assert_eq!(context.run("1 + 1").value(), "2");
    }
}

#[test]
fn descriptors_are_the_cells_own() {
    for shell in SHELLS {
        let mut context = start(shell);
        assert_eq!(context.run("import os; os.readlink('/proc/self/fd/0')").value(), "'/dev/null'");
        assert_eq!(context.run("import sys; sys.stdin.read()").value(), "''");
        let code = "import subprocess\nsubprocess.run(['sh', '-c', 'ls -l /proc/self/fd'], capture_output=True, text=True, close_fds=False).stdout.count('socket:')";
        assert_eq!(context.run(code).value(), "0", "{shell:?}");
        assert_eq!(
            context.run("os.path.exists('/proc/self/fd/3') and 'socket:' in os.readlink('/proc/self/fd/3')").value(),
            "False"
        );
        let code = "import threading; threading.active_count(), len(os.listdir('/proc/self/task'))";
        assert_eq!(context.run(code).value(), "(1, 1)", "{shell:?}");
    }
}

#[test]
fn an_end_of_the_process_is_seen_and_so_is_hanging_up() {
    for shell in SHELLS {
        let mut context = start(shell);
        context.begin("import os\nos._exit(7)");
        assert_eq!(context.child.wait().unwrap().code(), Some(7));
        let mut context = start(shell);
        // What a cell left in a buffer is written.
        context.run("f = open('left', 'w'); f.write('kept')");
        context.run("import threading, time; threading.Thread(target=time.sleep, args=(1000,)).start()");
        let path = context.dir.path().join("left");
        let since = Instant::now();
        let directory = context.dir.path().to_owned();
        // Closing removes the directory: a copy of the link stays.
        let kept = directory.with_extension("kept");
        std::fs::hard_link(&path, &kept).unwrap();
        assert_eq!(context.close(), Some(0));
        assert!(since.elapsed() < Duration::from_secs(30));
        let text = std::fs::read_to_string(&kept).unwrap();
        std::fs::remove_file(&kept).unwrap();
        assert_eq!(text, "kept");
    }
}

#[test]
fn a_second_identity_renews_every_generator() {
    for shell in SHELLS {
        let mut context = start(shell);
        let code = "import random, numpy as np, uuid, tempfile\nown = random.Random(1); rng = np.random.default_rng(1); legacy = np.random.RandomState(1)
def draw(): return [own.random(), rng.random(), legacy.rand(), random.random(), np.random.rand()]
def seed(): random.seed(1), np.random.seed(1)
seed()";
        assert_eq!(context.run(code).status, OK, "{}", context.err());
        let mut drawn = HashSet::new();
        for _ in 0..5 {
            context.run("own.seed(1); legacy.seed(1); rng.bit_generator.state = np.random.default_rng(1).bit_generator.state; seed()");
            context.identity();
            let cell = context.run("print(*draw(), sep='\\n'); draw()");
            let values = cell.value().to_owned();
            for number in values.trim_matches(['[', ']']).split(", ") {
                assert!(drawn.insert(number.to_owned()), "{shell:?}: {number} twice");
            }
        }
        // Without one they repeat, or the test would see nothing.
        context.run("own.seed(1)");
        let first = context.run("own.random()").value().to_owned();
        context.run("own.seed(1)");
        assert_eq!(context.run("own.random()").value(), first);
        context.env("LATER", "here");
        assert_eq!(context.run("import os; os.environ['LATER']").value(), "'here'");
    }
}

#[test]
fn a_cold_context_is_told_where_to_work() {
    let command = command(&python(), &["--context"]);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let mut context = Context::ready(&command, &[("PYTHONPATH", BESIDE)]);
    assert!(context.ready.contains("Python 3."), "{}", context.ready);
    let place = context.dir.path().join("place é");
    std::fs::create_dir(&place).unwrap();
    std::fs::write(place.join("beside.py"), "y = 3").unwrap();
    context.identity();
    context.env("A", "1=2");
    assert_eq!(context.serve_in(place.to_str().unwrap()), Ok(()));
    assert_eq!(
        context.run("import os, beside; os.path.basename(os.getcwd()), os.environ['A'], beside.y").value(),
        "('place é', '1=2', 3)"
    );
    assert_eq!(context.run("import random; random.random() < 1").value(), "True");

    let mut context = Context::ready(&command, &[]);
    context.identity();
    let refusal = context.serve_in("/no/such/place").unwrap_err();
    assert!(refusal.contains("/no/such/place") && refusal.contains("No such file"), "{refusal}");
    let mut context = Context::ready(&command, &[]);
    assert!(context.serve_in("/").unwrap_err().contains("identity"));
}

#[test]
fn ipythons_magics_work_and_leave_nothing_in_the_home() {
    let mut context = start(Shell::IPython);
    assert_eq!(context.run("!echo shell; echo error >&2; exit 3").status, OK);
    context.wait_for("shell\n");
    context.wait_for("error\n");
    assert_eq!(context.run("_exit_code").value(), "3");
    assert_eq!(context.run("files = !echo a; echo b\nfiles").value(), "['a', 'b']");
    assert_eq!(context.run("name = 'x'\n!echo {name} $name").status, OK);
    context.wait_for("x x\n");
    assert_eq!(context.run("%time 1 + 1").value(), "2");
    assert_eq!(context.run("%%bash\necho from bash").status, OK);
    context.wait_for("from bash\n");
    assert_eq!(context.run("%env ADDED=1").status, OK);
    assert!(context.run("%no_such_magic").failed_with("UsageError"));
    assert_eq!(context.run("%pip --version").status, OK);
    context.wait_for("pip ");
    assert_eq!(context.run("Out[2]").value(), "3", "{}", context.out());
    // IPython 8 counts after a cell, 9 before it.
    assert!(["11", "12"].contains(&context.run("get_ipython().execution_count").value()));
    assert!(context.run("print?").bundles[0].text("text/plain").contains("Signature"));
    let cell = context.interrupted("!echo sleeping; sleep 1000 & sleep 1000", "sleeping");
    assert_eq!(cell.status, INTERRUPTED);
    assert_eq!(context.run("1 + 1").value(), "2");
    assert!(!context.dir.path().join(".ipython").exists());
    assert!(!context.dir.path().join("db").exists());
}

#[test]
fn a_warm_ipython_is_seen_in_contexts_only() {
    let runner = command(&python(), &["--warm", "IPython,matplotlib.pyplot"]);
    let runner: Vec<&str> = runner.iter().map(String::as_str).collect();
    let mut context = Context::start(&runner, &[]);
    assert!(context.ready.contains("IPython"), "{}", context.ready);
    assert_eq!(context.run("1 + 1").value(), "2");
    assert!(context.run("x").failed_with("NameError"), "the practice left a name");
    assert_eq!(context.run("!echo warm").status, OK);
    context.wait_for("warm\n");
    let cell = context.run("import matplotlib.pyplot as plt\nplt.plot([1, 2]);");
    assert!(cell.bundles[0].parts["image/png"].starts_with(b"\x89PNG"), "{cell:?}");
    assert!(context.run("1/0").error().contains("Cell In[5], line 1"));

    // The same runner as a program: nothing says that it could have been one.
    let mut program = Context::ready(&runner, &[]);
    program.identity();
    program.send(0x02, b"-c");
    program.send(
        0x01,
        b"import IPython, sys, builtins, atexit
print(IPython.get_ipython(), hasattr(sys, 'ps1'), hasattr(builtins, 'display'), hasattr(builtins, '__IPYTHON__'), [n for n in dir() if n[0] != '_'], hasattr(sys, 'last_exc'), hasattr(sys, 'last_value'))",
    );
    program.send(0x0a, b"");
    program.wait_for("\n");
    assert_eq!(program.out(), "None False False False ['IPython', 'atexit', 'builtins', 'sys'] False False\n");
}
