//! `zeroboot run` as its user sees it, on the process engine with Python. Each run must leave nothing behind.

#[path = "harness/lib.rs"]
#[allow(dead_code)]
mod harness;

use std::{fs, os::unix::fs::PermissionsExt};

use harness::{Cli, Who};

fn python(code: &str) -> Cli {
    Cli::run(Who::Me).code(code)
}

#[test]
fn code_on_the_command_line_prints_its_result() {
    assert_eq!(python("print(6 * 7)").go().good(), "42\n");
}

#[test]
fn an_ordinary_user_gets_the_same() {
    let Some(who) = Who::ordinary() else { return };
    assert_eq!(Cli::run(who).code("print(6 * 7)").go().good(), "42\n");
}

#[test]
fn a_file_runs_with_our_standard_input_and_its_arguments() {
    let code = "import sys\nname = input()\nprint(name, sys.stdin.read(), sys.argv, __file__, __name__)\n";
    let cli = Cli::run(Who::Me).file("script.py", code).args(["script.py", "a", "--b"]).stdin("one\ntwo");
    assert_eq!(cli.go().good(), "one two ['script.py', 'a', '--b'] /home/sandbox/script.py __main__\n");
}

#[test]
fn code_can_come_from_standard_input() {
    assert_eq!(Cli::run(Who::Me).args(["-"]).stdin("print('from stdin')").go().good(), "from stdin\n");
    assert_eq!(Cli::run(Who::Me).stdin("print('piped')").go().good(), "piped\n");
}

#[test]
fn one_of_our_options_behind_the_file_goes_to_the_code_and_is_said() {
    let cli = Cli::run(Who::Me).file("a.py", "import sys; print(sys.argv[1:])").args(["a.py", "--timeout", "2s"]);
    let done = cli.go();
    assert_eq!(done.ended(0).out, b"['--timeout', '2s']\n");
    done.says("--timeout after a.py goes to the code");
}

#[test]
fn completions_know_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let done = Cli::bare(Who::Me).args(["completions", shell]).go();
        assert!(done.good().contains("zeroboot") && done.good().contains("timeout"), "{shell}");
    }
}

#[test]
fn verbose_names_the_interpreter_and_what_is_warm() {
    let done = python("import numpy").args(["-v", "--warm", "json"]).go();
    done.says("Python 3.").says("json");
}

#[test]
fn the_streams_come_out_byte_for_byte_each_on_its_own() {
    let code =
        "import sys\nsys.stdout.buffer.write(bytes(range(256)))\nsys.stderr.buffer.write(b'\\xff\\x00no newline')";
    let done = python(code).go();
    assert_eq!(done.ended(0).out, (0..=255).collect::<Vec<u8>>());
    assert_eq!(done.err, b"\xff\x00no newline");
}

#[test]
fn the_exit_status_is_the_codes() {
    python("import sys; sys.exit(3)").go().ended(3);
    python("import os; os._exit(200)").go().ended(200);
    let done = python("import sys; sys.exit('bye')").go();
    assert_eq!(done.ended(1).err(), "bye\n");
}

#[test]
fn an_exception_gives_a_clean_traceback_and_status_1() {
    let done = python("def f():\n    return {}['k']\nf()\n").go();
    let lines: Vec<&str> = done.ended(1).err().lines().filter(|l| !l.trim().starts_with(['^', '~'])).collect();
    assert_eq!(
        lines,
        [
            "Traceback (most recent call last):",
            "  File \"<string>\", line 3, in <module>",
            "    f()",
            "  File \"<string>\", line 2, in f",
            "    return {}['k']",
            "KeyError: 'k'",
        ]
    );
}

#[test]
fn a_signal_that_kills_the_code_is_128_and_its_number() {
    python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").go().ended(139).says("killed by signal 11");
}

#[test]
fn a_passed_time_limit_is_status_124_with_the_reason() {
    let done = python("print('before', flush=True)\nwhile True: pass").args(["--timeout", "1s"]).go();
    assert_eq!(done.ended(124).says("the time limit of 1s passed (--timeout)").out(), "before\n");
    python("while True: pass").args(["--cpu-time", "300ms"]).go().ended(124).says("(--cpu-time)");
}

#[test]
fn what_python_programs_use_works() {
    let code = r#"
import asyncio, multiprocessing, os, subprocess, sys, tempfile, threading
def square(x):
    return x * x
async def later():
    await asyncio.sleep(0.01)
    return 'async'
if __name__ == '__main__':
    print(subprocess.run(['sh', '-c', 'echo sub; exit 4'], capture_output=True, text=True))
    done = []
    thread = threading.Thread(target=lambda: done.append('thread')); thread.start(); thread.join()
    print(done, asyncio.run(later()))
    with multiprocessing.Pool(2) as pool:
        print(pool.map(square, [1, 2, 3]))
    open('file.txt', 'w').write('héllo')
    print(open('file.txt').read(), os.getcwd(), os.path.expanduser('~'))
    with tempfile.TemporaryDirectory() as d:
        open(d + '/x', 'w').write('x')
    print('no newline', end='')
"#;
    assert_eq!(
        python(code).go().good(),
        "CompletedProcess(args=['sh', '-c', 'echo sub; exit 4'], returncode=4, stdout='sub\\n', stderr='')\n\
         ['thread'] async\n[1, 4, 9]\nhéllo /home/sandbox /home/sandbox\nno newline"
    );
}

#[test]
fn an_environment_variable_is_given_or_passed_on_by_name_only() {
    let cli = python("import os; print(os.environ['A'], os.environ['PASSED'], 'SECRET' in os.environ)");
    let cli = cli.args(["--env", "A=1=2", "-e", "PASSED"]).env("PASSED", "yes").env("SECRET", "no");
    assert_eq!(cli.go().good(), "1=2 yes False\n");
}

#[test]
fn standard_input_can_be_a_file() {
    let cli = python("print(input())").file("in.txt", "from a file\n").args(["--stdin", "in.txt"]).stdin("not this");
    assert_eq!(cli.go().good(), "from a file\n");
}

#[test]
fn files_go_in_and_come_back() {
    let code = "open('out.bin', 'wb').write(open('in.bin', 'rb').read()[::-1]); open('second', 'w').write('2')";
    let cli = python(code).file("data", b"\x00\xff12").makes("out.bin").makes("renamed");
    let done = cli.args(["--put", "data:in.bin", "--get", "out.bin", "--get", "second:renamed"]).go();
    done.good();
    assert_eq!(done.made("out.bin").unwrap(), b"21\xff\x00");
    assert_eq!(done.made("renamed").unwrap(), b"2");
}

#[test]
fn directories_and_patterns_go_in_and_come_back() {
    let cli = Cli::run(Who::Me).file("unused", "");
    fs::create_dir_all(cli.work().join("project/lib")).unwrap();
    fs::write(cli.work().join("project/lib/tool.sh"), "#!/bin/sh\necho from the tool").unwrap();
    fs::set_permissions(cli.work().join("project/lib/tool.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(cli.work().join("project/data.csv"), "1,2").unwrap();
    let code = "import os, subprocess
print(sorted(os.listdir('project')), subprocess.check_output(['project/lib/tool.sh'], text=True), end='')
os.makedirs('out/deep')
for name in ['out/a.txt', 'out/b.bin', 'out/deep/c.txt', 'other.txt']: open(name, 'w').write(name)
open('project/data.csv', 'a').write(',3')";
    let cli = cli.makes("project").makes("out").makes("some").makes("all");
    let args = ["--put", "project", "--get", "out/*.txt", "--get", "out/deep/:some", "--get-all", "all"];
    let done = cli.args(args).code(code).go();
    assert_eq!(done.good(), "['data.csv', 'lib'] from the tool\n");
    let text = |name: &str| done.made(name).map(|bytes| String::from_utf8(bytes.to_vec()).unwrap());
    assert_eq!(text("out/a.txt").as_deref(), Some("out/a.txt"));
    assert_eq!(text("some/out/deep/c.txt").as_deref(), Some("out/deep/c.txt"));
    // A file comes back once. One that was put in comes back where it was changed.
    assert_eq!(text("all/out/b.bin").as_deref(), Some("out/b.bin"));
    assert_eq!(text("all/project/data.csv").as_deref(), Some("1,2,3"));
    assert_eq!((text("all/project/lib/tool.sh"), text("all/out/a.txt")), (None, None));
    let done = Cli::run(Who::Me).file("in.txt", "x").makes("new").args(["--put", ".", "--get", "*", "--get", "new"]);
    let done = done.code("import os; print(os.listdir()); open('new', 'w').write('y')").go();
    assert_eq!((done.good(), done.made("new").unwrap()), ("['in.txt']\n", b"y".to_vec()));
}

#[test]
fn a_file_that_does_not_come_back_makes_the_command_fail() {
    for name in ["missing.txt", "*.csv", "nothing/"] {
        let done = python("print('done')").args(["--get", name]).go();
        done.ended(1).says(&format!("zeroboot: {name}: "));
        python("exit(3)").args(["--get", name]).go().ended(3);
    }
    python("1").args(["--json", "--get", "missing.txt"]).go().ended(1);
}

#[test]
fn files_and_descriptors_have_a_limit_of_the_callers() {
    let code = "import os
def attempt(do):
    try: return do()
    except OSError as error: return os.strerror(error.errno)
print(attempt(lambda: open('f', 'wb').write(bytes(3 << 20))))
print(attempt(lambda: len([os.open('/dev/null', 0) for _ in range(100)])))";
    assert_eq!(python(code).args(["--max-file", "4M", "--open-files", "200"]).go().good(), "3145728\n100\n");
    let done = python(code).args(["--max-file", "2M", "--open-files", "50"]).go();
    assert_eq!(done.good(), "File too large\nToo many open files\n");
}

#[test]
fn names_that_other_sandboxes_have_for_the_home_directory_lead_there() {
    let code = "import os
for place in ['/workspace', '/mnt/data', '/home/user']:
    with open(place + '/f', 'a') as file: file.write('x')
print(open('f').read(), os.path.realpath('/mnt/data'))";
    assert_eq!(python(code).go().good(), "xxx /home/sandbox\n");
}

#[test]
fn verbose_says_what_it_cost() {
    let done = python("print(1)").args(["-v"]).go();
    assert_eq!(done.ended(0).out(), "1\n");
    for word in ["engine process", "not pooled", "fork ", "exec ", "total "] {
        done.says(word);
    }
}

#[test]
fn output_comes_out_while_the_code_runs() {
    // The code waits for an answer to what it wrote: with buffered output both would wait for ever.
    let code = "print('question', flush=True)\nprint('got', input())";
    let script = "mkfifo answer && exec 3<>answer && \"$@\" <answer | { read q; echo \"$q-answer\" >&3; cat; }";
    let done = python(code).through(&["sh", "-c", script, "sh"]).makes("answer").go();
    assert_eq!(done.good(), "got question-answer\n");
}

#[test]
fn many_at_once_do_not_disturb_each_other() {
    let lives: Vec<_> = (0..6).map(|i| (i, python(&format!("print('{i}' * 3)")).start())).collect();
    for (i, live) in lives {
        assert_eq!(live.wait().good(), format!("{i}{i}{i}\n"));
    }
}

#[test]
fn json_is_the_apis_result() {
    let code = r#"import sys; print("a"); print("b", file=sys.stderr); open("f", "w").write("text"); sys.exit(3)"#;
    let done = python(code).args(["--json", "--get", "f"]).makes("f").go();
    let result: serde_json::Value = serde_json::from_str(done.ended(3).out()).unwrap();
    assert!(done.err.is_empty(), "{done:?}");
    let fields = ["exit_code", "outcome", "stdout", "stderr", "output", "isolation", "pooled", "truncated", "language"];
    assert_eq!(
        serde_json::Value::from(fields.map(|field| result[field].clone()).to_vec()),
        serde_json::json!([3, "exited", "a\n", "b\n", "a\n", "process", false, false, "python"])
    );
    assert_eq!(result["files"]["f"], serde_json::json!({"text": "text"}));
    for time in ["fork_time_ms", "exec_time_ms", "total_time_ms", "cpu_time_ms", "peak_memory_bytes"] {
        assert!(result[time].as_f64().is_some_and(|n| n > 0.0), "{time}: {result}");
    }
    let late = python("while True: pass").args(["--json", "--timeout", "500ms"]).go();
    let result: serde_json::Value = serde_json::from_str(late.ended(124).out()).unwrap();
    assert_eq!(result["outcome"], "deadline_passed");
    let binary = python("import os; os.write(1, b'\\xff\\x00')").args(["--json"]).go();
    let result: serde_json::Value = serde_json::from_str(binary.good()).unwrap();
    assert_eq!((&result["stdout"], &result["encoding"]["stdout"]), (&"/wA=".into(), &"base64".into()));
}

fn node(code: &str) -> Cli {
    Cli::bare(Who::Me).args(["run", "--engine", "process", "--runtime", "node"]).code(code)
}

#[test]
fn node_runs_scripts_modules_and_top_level_await() {
    assert_eq!(node("console.log([1,2,3].map(x => x*x))").go().good(), "[ 1, 4, 9 ]\n");
    let module = "import os from 'node:os'\nconsole.log(typeof os.cpus, await Promise.resolve(7))";
    assert_eq!(node(module).go().good(), "function 7\n");
    let script =
        "const fs = require('fs')\nconsole.log(fs.readFileSync(0, 'utf8').toUpperCase(), process.argv.slice(1))";
    assert_eq!(node(script).args(["a"]).stdin("in").go().good(), "IN [ 'a' ]\n");
    let file = Cli::bare(Who::Me).args(["run", "--engine", "process"]).file("s.mjs", "console.log(import.meta.url)");
    assert_eq!(file.args(["s.mjs"]).go().good(), "file:///home/sandbox/s.mjs\n");
}

#[test]
fn node_ends_as_its_code_says() {
    node("process.exit(3)").go().ended(3);
    node("throw new Error('x')").go().ended(1).says("Error: x");
    node("for (;;);").args(["--timeout", "1s"]).go().ended(124).says("--timeout");
    let hog = "const k = []; for (;;) k.push(Buffer.alloc(1 << 24, 1))";
    // V8 may be the first to see it, and aborts.
    let ended = node(hog).args(["--memory", "256M"]).go();
    assert!([134, 137].contains(&ended.says("out of memory").code()), "{ended:?}");
    node("const a = []; for (;;) a.push(new Array(1e5).fill(a.length + 0.5))")
        .args(["--memory", "256M"])
        .go()
        .says("out of memory: the limit is 256 MiB");
}

#[test]
fn a_shell_script_is_run_by_the_shell() {
    let script =
        "echo \"$0 $1\"; read line; echo \"read $line\"; yes | head -n 1; echo $((6 * 7)) > answer; ls; exit 3";
    let done = Cli::run(Who::Me).file("job.sh", script).args(["job.sh", "one"]).stdin("typed\n").go();
    assert_eq!(done.ended(3).out(), "job.sh one\nread typed\ny\nanswer\njob.sh\n");
    let inline = Cli::run(Who::Me).args(["--runtime", "bash", "-c", "echo \"$0 $1\"; ls -A; type -t [[", "one"]).go();
    assert_eq!(inline.good(), "bash one\nkeyword\n");
    // Neither code nor a file's name is an option.
    Cli::run(Who::Me).args(["--runtime", "bash", "-c", "-x; exit 4"]).go().ended(4).says("command not found");
    assert_eq!(Cli::run(Who::Me).file("-x.sh", "echo $0").args(["./-x.sh"]).go().good(), "-x.sh\n");
    // Longer than an argument may be.
    let long = format!("echo begin\n{}echo end\n", "# a comment\n".repeat(12_000));
    assert_eq!(
        Cli::run(Who::Me).file("long.txt", &long).args(["--runtime", "bash", "long.txt"]).go().good(),
        "begin\nend\n"
    );
    Cli::run(Who::Me).args(["--runtime", "bash", "--timeout", "300ms", "-c", "while :; do :; done"]).go().ended(124);
}

#[test]
fn typescript_runs_where_node_strips_types_and_is_refused_with_the_reason_elsewhere() {
    let source =
        "interface Point { x: number }\nconst p: Point = { x: 42 };\nconsole.log(p.x as number, process.argv.at(-1));";
    let node = std::process::Command::new("node").args(["-p", "!!process.features.typescript"]).output().unwrap();
    for cli in [
        Cli::run(Who::Me).file("main.ts", source).args(["main.ts", "a"]),
        Cli::run(Who::Me).args(["--runtime", "typescript", "-c", source, "a"]),
    ] {
        let done = cli.go();
        if node.stdout.starts_with(b"true") {
            assert_eq!(done.good(), "42 a\n");
        } else {
            done.ended(1).says("TypeScript needs Node.js 22.18 or newer, and this is v").says("esbuild");
        }
    }
}
