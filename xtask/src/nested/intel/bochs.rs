//! Bochs, built from Debian's source package with corrections of ours.
//!
//! Debian 12's own package is Bochs 2.7: half as fast, and its VMX stops a guest that has interrupts off too late.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

use crate::nested::parts::{cached, explain, source_apt};

const SUITE: &str = "trixie";
/// The upstream archive of Debian's source package `bochs`, and its SHA-256.
const ARCHIVE: &str = "bochs_3.0+dfsg.orig.tar.xz";
const SHA256: &str = "78f6c73d4a6472d5130a87ab9dc306d02c7c71ed8e25b3a8ef642e2a7acd282b";

/// What is built of it, and what is left out.
const CONFIGURE: [(&str, &str); 12] = [
    ("--enable-x86-64", "a CPU of 64 bits"),
    ("--enable-cpu-level=6", "a CPU of this century"),
    ("--enable-vmx=2", "VMX with all that is in it: what the lane is for"),
    ("--enable-avx", "the CPU models' vectors"),
    ("--enable-evex", "AVX-512 of skylake_x"),
    ("--enable-memtype", "memory types, which KVM sets in EPT"),
    ("--enable-protection-keys", "a feature of skylake_x with state of its own in XSAVE"),
    ("--enable-all-optimizations", "speed"),
    ("--enable-pci", "a chipset that Linux knows"),
    ("--enable-configurable-msrs", "MSRs from a file: the virtual PMU"),
    ("--with-nogui", "no screen"),
    ("--disable-docbook", "no manual"),
];

/// One change to the source.
struct Correction {
    file: &'static str,
    /// Is there exactly once.
    old: &'static str,
    new: &'static str,
    /// Why; goes into no file.
    reason: &'static str,
}

/// The manual is Intel's Software Developer's Manual, volume 3.
const CORRECTIONS: [Correction; 5] = [
    Correction {
        file: "cpu/vmx.cc",
        old: "  BX_CPU_THIS_PTR in_vmx_guest = true;\n",
        new: "  BX_CPU_THIS_PTR in_vmx_guest = true;\n  handleInterruptMaskChange();\n  \
              BX_CPU_THIS_PTR async_event = 1;\n",
        reason: "With external-interrupt exiting an interrupt ends the guest whatever its IF is (25.2). The mask is computed \
                 when IF changes, and an entry from IF=0 to IF=0 does not change it: a guest with interrupts off ran for ever.",
    },
    Correction {
        file: "cpu/vmx.cc",
        old: "  BX_CPU_THIS_PTR eflags = 0x2; // Bit1 is always set\n",
        new: "  BX_CPU_THIS_PTR eflags = 0x2; // Bit1 is always set\n  handleInterruptMaskChange();\n",
        reason: "The other direction: after an exit IF is 0 (27.5.3) and masks again what it did not mask in the guest.",
    },
    Correction {
        file: "cpu/vmx.cc",
        old: "! IsValidPageAlignedPhyAddr(vm->pid_addr)",
        new: "! IsValidPhyAddr(vm->pid_addr) || (vm->pid_addr & 0x3f) != 0",
        reason: "A posted-interrupt descriptor is aligned to 64 bytes (26.2.1.1), not to a page. KVM's lies inside of a structure: \
                 each entry failed.",
    },
    Correction {
        file: "cpu/vapic.cc",
        old: "    interrupt(vector, BX_EXTERNAL_INTERRUPT, 0, 0);\n",
        new: "    vm->idt_vector_info = vector | (BX_EXTERNAL_INTERRUPT << 8);\n    vm->idt_vector_error_code = 0;\n    \
              interrupt(vector, BX_EXTERNAL_INTERRUPT, 0, 0);\n",
        reason: "An exit during the delivery of an event says which event it was (27.2.4). For a virtual interrupt it named the \
                 last event before, which KVM then injected.",
    },
    Correction {
        file: "cpu/event.cc",
        old: "if (is_pending(BX_EVENT_PENDING_VMX_VIRTUAL_INTR)) {",
        new: "if (is_unmasked_event_pending(BX_EVENT_PENDING_VMX_VIRTUAL_INTR)) {",
        reason: "A virtual interrupt waits for IF=1 (29.2.2). When one of the host's came, which ends the guest whatever its IF \
                 is, the virtual one was delivered in its place, also to a guest with interrupts off: between its look at the \
                 mailbox and its `sti; hlt`, which then slept; and if the delivery met an EPT violation, KVM repeated it, and \
                 the entry failed for IF=0.",
    },
];

/// The built program. A change of anything above builds it anew.
pub(super) fn build(cache: &Path) -> Result<PathBuf> {
    let dir = cached(cache, &format!("bochs-{}", key()), |dir| {
        let apt = source_apt(cache, SUITE)?;
        eprintln!("nested lane: fetching and building Bochs (once, some minutes)");
        let archive = explain(apt.fetch_source("bochs", ARCHIVE))?;
        ensure!(sha256(&archive)? == SHA256, "{} is not the file that this lane was made with", archive.display());
        let work = dir.join("build");
        fs::create_dir(&work)?;
        let mut tar = Command::new("tar");
        run(tar.args(["-x", "--strip-components=1", "--no-same-owner", "-f"]).arg(&archive).arg("-C").arg(&work))?;
        for correction in &CORRECTIONS {
            apply(&work, correction)?;
        }
        // Without debug information: Bochs has 40 MB of it.
        let mut configure = Command::new("./configure");
        configure.args(CONFIGURE.iter().map(|(option, _)| option)).env("CFLAGS", "-O2").env("CXXFLAGS", "-O2");
        run(configure.current_dir(&work))?;
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        run(Command::new("make").arg(format!("-j{jobs}")).arg("bochs").current_dir(&work))?;
        fs::copy(work.join("bochs"), dir.join("bochs"))?;
        fs::remove_dir_all(&work)?;
        fs::remove_file(&archive)?;
        Ok(())
    })?;
    Ok(dir.join("bochs"))
}

/// Names the source, its corrections and how it is built.
fn key() -> String {
    let mut hash = blake3::Hasher::new();
    let mut add = |text: &str| {
        hash.update(text.as_bytes()).update(&[0]);
    };
    add(SHA256);
    CONFIGURE.iter().for_each(|(option, _)| add(option));
    CORRECTIONS.iter().for_each(|Correction { file, old, new, .. }| [file, old, new].into_iter().for_each(|t| add(t)));
    hash.finalize().to_hex()[..12].to_owned()
}

fn apply(work: &Path, Correction { file, old, new, reason }: &Correction) -> Result<()> {
    let path = work.join(file);
    let text = fs::read_to_string(&path).with_context(|| format!("Bochs has no {file}"))?;
    let found = text.matches(old).count();
    ensure!(found == 1, "{file} has the place to correct {found} times, not once: {reason}");
    fs::write(&path, text.replacen(old, new, 1)).with_context(|| format!("cannot write {}", path.display()))
}

fn sha256(file: &Path) -> Result<String> {
    let output = Command::new("sha256sum").arg(file).output().context("cannot run sha256sum")?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.split_whitespace().next().map(str::to_owned).context("sha256sum says nothing")
}

/// Runs a step of the build; its words are shown when it fails.
fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_owned();
    let output = command.stdin(Stdio::null()).output();
    let output =
        output.with_context(|| format!("cannot run {} (the build needs g++, make and xz-utils)", program.display()))?;
    if !output.status.success() {
        for text in [&output.stdout, &output.stderr] {
            let text = String::from_utf8_lossy(text);
            let lines: Vec<&str> = text.lines().collect();
            lines.iter().skip(lines.len().saturating_sub(20)).for_each(|line| eprintln!("{line}"));
        }
        bail!("{} failed: {} (the build needs g++, make and xz-utils)", program.display(), output.status);
    }
    Ok(())
}
