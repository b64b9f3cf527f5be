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
