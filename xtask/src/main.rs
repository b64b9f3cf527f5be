//! Development tasks: `cargo xtask TASK`.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people")]

use std::process::ExitCode;

mod nested;
mod suite;
mod test;

const USAGE: &str = "\
cargo xtask test [STEP...]
    Checks everything that this kind of host can check; installs what it needs. `--list` shows the steps.

cargo xtask nested [OPTION...] -- COMMAND [ARG...]
    Runs COMMAND in a Linux machine that QEMU emulates, AMD SVM and nested paging included: /dev/kvm in it is
    the real kvm_amd. With `--cpu intel` the machine is Bochs', with VMX: kvm_intel. `cargo xtask nested --help` says more.

cargo xtask nested-suite [OPTION...] [FILTER]
    Builds zeroboot and its templates and runs all tests that need a real /dev/kvm, in that machine.
";

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let task = args.next().unwrap_or_default();
    match task.to_str() {
        Some("test") => test::main(args),
        Some("nested") => nested::main(args),
        Some("nested-suite") => suite::main(args),
        Some(nested::CHILD) => nested::child(args),
        Some("help" | "--help" | "-h") => {
            print!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => {
            eprint!("{USAGE}");
            ExitCode::from(2)
        }
    }
}
