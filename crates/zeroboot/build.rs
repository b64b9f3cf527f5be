//! Builds the two programs that `zeroboot` carries inside: the static agent and the library that forks a
//! warm Python. Cargo has no stable way to depend on another package's binary, so it is asked a second time,
//! in a target directory of its own (the outer build holds the lock of the first).

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("we lie in crates/").to_owned();
    for source in ["zeroboot-guest", "zeroboot-proto", "zeroboot-process", "zeroboot-pyfork", "zeroboot-sys"] {
        println!("cargo::rerun-if-changed={}", crates.join(source).display());
    }
    println!("cargo::rerun-if-changed={}", crates.join("../policy").display());
    println!("cargo::rerun-if-changed={}", crates.join("../Cargo.lock").display());

    // target/PROFILE/build/zeroboot-HASH/out -> target
    let target = out.ancestors().nth(4).expect("OUT_DIR lies in the target directory").join("embedded");
    let own = env::var("TARGET").expect("cargo sets TARGET");
    let agent = static_triple(&own);
    let flags = ["-C", "target-feature=+crt-static"];
    embed(&crates, &target, "zeroboot-guest", &agent, &flags, "zeroboot-guest", &out.join("agent"));
    embed(&crates, &target, "zeroboot-pyfork", &own, &[], "libzeroboot_pyfork.so", &out.join("pyfork.so"));
}

/// The target of the agent. glibc asks the processor what it is with 25 CPUID instructions at each start, and each of them
/// leaves a virtual machine: 0.1 to 0.8 ms of CPU time for each sandbox. musl asks nothing.
fn static_triple(own: &str) -> String {
    let musl = own.replace("-gnu", "-musl");
    let rustc = env::var_os("RUSTC").expect("cargo sets RUSTC");
    let found = Command::new(rustc).args(["--print", "target-libdir", "--target", &musl]).output();
    let path = found.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
    if !path.is_empty() && Path::new(&path).is_dir() {
        return musl;
    }
    println!("cargo::warning=the target {musl} is not installed: sandboxes will start more slowly");
    own.to_owned()
}

fn embed(crates: &Path, target: &Path, package: &str, triple: &str, flags: &[&str], artifact: &str, to: &Path) {
    let target = target.join(package);
    let status = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"))
        .args(["build", "--quiet", "--locked", "--profile", "embedded", "--package", package, "--target", triple])
        .arg("--manifest-path")
        .arg(crates.join("../Cargo.toml"))
        .env("CARGO_TARGET_DIR", &target)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status()
        .expect("cargo can be started");
    assert!(status.success(), "building {package} failed");
    let built = target.join(triple).join("embedded").join(artifact);
    std::fs::copy(&built, to).unwrap_or_else(|e| panic!("copy {}: {e}", built.display()));
}
