//! What is wrong with a request is said in one line with a hint, and nothing is left behind.

#[path = "harness/lib.rs"]
#[allow(dead_code)]
mod harness;

use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::Path};

use harness::{Cli, Who};
use rustix::process::Signal;

fn run() -> Cli {
    Cli::run(Who::Me)
}

#[test]
fn empty_code_is_refused() {
    run().code("").go().refused("the code is empty");
    run().code(" \n\t").go().refused("the code is empty");
    run().file("empty.py", "").args(["empty.py"]).go().refused("the code is empty");
    run().args(["-"]).go().refused("the code is empty");
    run().go().refused("the code is empty");
}

#[test]
fn code_of_10_mb_runs() {
    let mut code = "x = 1  # a comment\n".repeat(10 * 1024 * 1024 / 19);
    code.push_str("print('the end')\n");
    assert_eq!(run().args(["--memory", "2G", "--timeout", "4m", "-"]).stdin(code).go().good(), "the end\n");
}

#[test]
fn code_above_the_limit_is_refused() {
    let code = "#".repeat(17 * 1024 * 1024);
    run().args(["-"]).stdin(code).go().refused("the limit is 16777216");
}

#[test]
fn nul_bytes_and_invalid_utf8_are_refused_with_their_place() {
    run().args(["-"]).stdin(b"print(1)\0").go().refused("NUL byte at offset 8");
    run().args(["-"]).stdin(b"print('\xff')").go().refused("not valid UTF-8 from byte 7 on");
    run().code(OsString::from_vec(b"\xffprint(1)".to_vec())).go().refused("not valid UTF-8 from byte 0 on");
    run().code("print(1)").args([OsString::from_vec(b"\xff".to_vec())]).go().ended(125).says("is not valid UTF-8");
}

#[test]
fn unknown_runtimes_engines_and_flags_are_refused() {
    for args in [
        &["--runtime", "cobol", "-c", "1"][..],
        &["--engine", "magic", "-c", "1"],
        &["--no-such-flag", "-c", "1"],
        &["-c"],
    ] {
        let done = run().args(args.to_vec()).go();
        done.ended(125).says("error: ");
        assert!(done.out.is_empty());
    }
    Cli::bare(Who::Me).args(["frobnicate"]).go().ended(125).says("error: ");
    let help = Cli::bare(Who::Me).args(["--help"]).go();
    assert!(help.good().contains("run"));
}

#[test]
fn a_timeout_of_zero_or_below_or_without_sense_is_refused() {
    for bad in ["0", "0s", "-1", "-1s", "nan", "inf", "1 fortnight", ""] {
        run().args([format!("--timeout={bad}")]).code("print(1)").go().ended(125).says("--timeout");
    }
    for bad in ["0", "-1", "1.5X", "99999999999999999999G", "512", "1M"] {
        run().args([format!("--memory={bad}")]).code("print(1)").go().ended(125).says("--memory");
    }
    run().args(["--processes", "0"]).code("print(1)").go().ended(125).says("--processes");
}

#[test]
fn an_option_that_is_none_is_no_file_and_the_nearest_is_named() {
    run()
        .args(["--tiemout", "2s", "x.py"])
        .go()
        .refused("there is no option --tiemout")
        .says("did you mean --timeout?");
    run().args(["--memroy=1G", "x.py"]).go().refused("did you mean --memory?");
    run().args(["-q"]).go().refused("there is no option -q");
}

#[test]
fn languages_that_do_not_run_are_refused_by_the_files_name() {
    run().file("a.tsx", "1").args(["a.tsx"]).go().refused("JSX").says("esbuild");
    run().file("a.sh", "ls").args(["--template", "node", "a.sh"]).go().refused("needs a python template");
    assert_eq!(run().file("a.sh", "print(1)").args(["--runtime", "python", "a.sh"]).go().good(), "1\n");
}

#[test]
fn missing_files_are_named() {
    run().args(["no-such.py"]).go().refused("cannot read no-such.py");
    run().args(["/"]).go().refused("cannot read /");
    run().code("1").args(["--stdin", "no-such"]).go().refused("cannot read no-such");
    run().code("1").args(["--put", "no-such"]).go().refused("cannot read no-such");
}

#[test]
fn an_interpreter_that_is_none_is_refused() {
    let cli = |python: &str| Cli::bare(Who::Me).args(["run", "--engine", "process", "--python", python, "-c", "1"]);
    cli("/no/such/python").go().refused("cannot run /no/such/python");
    cli("/bin/true").go().refused("not a usable python");
    cli("/etc/passwd").go().refused("cannot run /etc/passwd");
}

#[test]
fn a_module_that_cannot_be_warmed_is_named() {
    run().args(["--warm", "no_such_module"]).code("1").go().refused("no_such_module");
}

#[test]
fn paths_that_leave_the_working_directory_are_refused() {
    for name in ["../x", "/etc/x", "a/../../x", "./x", "a//b", ""] {
        let put = run().file("f", "x").args([format!("--put=f:{name}")]).code("1").go();
        put.refused("must be relative");
        run().args([format!("--get={name}:out")]).code("1").go().refused("must be relative");
    }
}

#[test]
fn variables_that_no_environment_can_hold_are_refused() {
    run().args(["--env", "=x"]).code("1").go().refused("environment variable");
    run().args(["--env", "ZEROBOOT_NOT_SET_ANYWHERE"]).code("1").go().refused("ZEROBOOT_NOT_SET_ANYWHERE");
}

#[test]
fn a_closed_standard_input_is_an_empty_one() {
    assert_eq!(run().code("import sys; print(repr(sys.stdin.read()))").stdin_closed().go().good(), "''\n");
}

#[test]
fn a_full_disk_under_the_working_directory_is_the_codes_own_error() {
    let code = r#"
import errno, os
try:
    for i in range(100):
        with open(f'f{i}', 'wb') as f:
            for _ in range(16):
                f.write(bytes(1 << 20))
except OSError as e:
    print(errno.errorcode[e.errno], 1 <= i < 99)
"#;
    assert_eq!(run().args(["--memory", "1G"]).code(code).go().good(), "ENOSPC True\n");
}

#[test]
fn a_file_above_the_size_limit_is_the_codes_own_error() {
    let code = r#"
import errno, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with open('f', 'wb') as f:
        f.truncate(1 << 40)
except OSError as e:
    print(errno.errorcode[e.errno])
"#;
    assert_eq!(run().code(code).go().good(), "EFBIG\n");
}

#[test]
fn a_file_that_cannot_be_saved_is_our_failure() {
    let code = "open('big', 'wb').write(bytes(1 << 20)); print('ran')";
    let done = run().code(code).args(["--get", "big:/dev/full"]).go();
    done.ended(125).says("cannot write /dev/full").says("hint: ");
    assert_eq!(done.out(), "ran\n");
    let done = run().code(code).args(["--get", "big:no/such/dir/big"]).go();
    done.ended(125).says("cannot write no/such/dir/big").says("hint: ");
}

#[test]
fn an_output_that_cannot_be_written_is_our_failure() {
    run().through(&["sh", "-c", "exec \"$0\" \"$@\" >/dev/full"]).code("print('x')").go().ended(125).says("hint: ");
}

#[test]
fn a_reader_that_has_seen_enough_ends_the_run() {
    let code = "while True: print('line')";
    let script = "{ \"$@\"; echo $? >&2; } | head -1";
    let done = run().through(&["sh", "-c", script, "sh"]).code(code).go();
    assert_eq!(done.out(), "line\n");
    assert_eq!(done.err(), "141\n");
}

#[test]
fn sigint_and_sigterm_end_the_run_and_the_sandbox() {
    let code = "import ctypes, time\nctypes.CDLL(None).prctl(15, b'in-the-sandbox')\ntime.sleep(600)";
    for (signal, status) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let live = run().code(code).stdin_held().args(["--timeout", "10m"]).start();
        live.wait_for_process("in-the-sandbox");
        live.signal(signal);
        live.wait().ended(status);
    }
}

#[test]
fn a_signal_while_the_runtime_warms_up_ends_everything() {
    let live = run().code("print(1)").stdin_held().start();
    while live.processes().len() < 2 {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    live.signal(Signal::TERM);
    let code = live.wait().code();
    assert!(code == 143 || code == 0, "{code}");
}

#[test]
fn the_tests_see_what_a_run_leaves() {
    // The check that all other tests rely on: it finds a process that outlives its run.
    let live =
        run().through(&["sh", "-c", "sleep 600 & \"$@\"; kill $!", "sh"]).code("import time; time.sleep(1)").start();
    live.wait_for_process("sleep");
    live.wait().ended(0);
    assert!(Path::new("/proc/self/limits").exists());
}
