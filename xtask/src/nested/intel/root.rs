//! The machine's disk: an archive of the few files that it needs, as its first root file system is one.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use zeroboot_template::cpio::{self, Entry};

use crate::{
    nested::{Run, build_zeroboot, target_dir},
    suite,
};

/// `XDG_CACHE_HOME` in the machine.
pub(super) const CACHE: &str = "/cache";

/// Test programs, in `/tests`.
const TESTS: [&str; 3] = ["byte_guests", "workers", "nested_linux"];
/// Programs of this machine's that busybox has no good version of.
const PROGRAMS: [&str; 1] = [
    "setpriv", // a test of `workers` drops capabilities with it
];
/// Everybody whom a test asks for by name or number.
const PASSWD: &str = "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n";
const GROUP: &str = "root:x:0:\nnogroup:x:65534:\n";

/// Bytes that a disk's size is a multiple of: a track of the geometry that Bochs works out for itself.
const TRACK: usize = 16 * 63 * 512;

/// Builds what goes onto the disk, and gives the disk.
pub(super) fn disk(run: &Run) -> Result<Vec<u8>> {
    let zeroboot = build_zeroboot(run.debug)?;
    let mut tree = Tree { out: cpio::Writer::new(Vec::new()), there: BTreeSet::new() };
    tree.directory("root")?;
    tree.file("etc/passwd", 0o644, PASSWD.as_bytes())?;
    tree.file("etc/group", 0o644, GROUP.as_bytes())?;
    // On the path before busybox.
    tree.program("usr/bin/zeroboot", &zeroboot)?;
    for name in PROGRAMS {
        let path = ["/usr/bin", "/bin"].iter().map(|dir| Path::new(dir).join(name)).find(|path| path.exists());
        tree.program(&format!("usr/bin/{name}"), &path.with_context(|| format!("this machine has no {name}"))?)?;
    }
    for program in suite::test_programs(&TESTS.map(str::to_owned))? {
        tree.program(&format!("tests/{}", program.name), &program.executable)?;
    }
    if run.templates {
        let assembled = assembled(&zeroboot)?;
        let name = assembled.file_name().and_then(OsStr::to_str).context("a template's name is not UTF-8")?;
        tree.copy(&assembled, &format!("{}/zeroboot/assembled/{name}", &CACHE[1..]))?;
    }
    let mut disk = tree.out.finish()?;
    disk.resize(disk.len().next_multiple_of(TRACK), 0);
    Ok(disk)
}

/// The directory of the Python template's kernel and root file system. There is room for no more.
fn assembled(zeroboot: &Path) -> Result<PathBuf> {
    let mut assemble = Command::new(zeroboot);
    let output =
        assemble.args(["template", "assemble", "python"]).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.context("cannot run zeroboot")?;
    ensure!(output.status.success(), "zeroboot template assemble python failed");
    // It names the files.
    let text = String::from_utf8(output.stdout).ok().context("a path is not UTF-8")?;
    let first = text.lines().next().and_then(|line| Path::new(line).parent());
    first.map(Path::to_owned).context("zeroboot template assemble names no file")
}

struct Tree {
    out: cpio::Writer<Vec<u8>>,
    there: BTreeSet<String>,
}

impl Tree {
    /// Also the directories around it.
    fn directory(&mut self, path: &str) -> Result<()> {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent)?;
        }
        if self.there.insert(path.to_owned()) {
            self.out.append(&Entry::directory(path, 0o755))?;
        }
        Ok(())
    }

    fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent)?;
        }
        if self.there.insert(path.to_owned()) {
            self.out.append(&Entry::file(path, mode, bytes))?;
        }
        Ok(())
    }

    /// A program, without debug information, and the libraries that it needs at the paths where it looks for them.
    fn program(&mut self, path: &str, program: &Path) -> Result<()> {
        let bytes = stripped(program)?;
        self.file(path, 0o755, &bytes)?;
        let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
        for word in String::from_utf8_lossy(&output.stdout).split_whitespace().filter(|word| word.starts_with('/')) {
            let library = fs::read(word).with_context(|| format!("cannot read {word}"))?;
            self.file(word.trim_start_matches('/'), 0o755, &library)?;
        }
        Ok(())
    }

    /// A directory and what is below it.
    fn copy(&mut self, from: &Path, to: &str) -> Result<()> {
        self.directory(to)?;
        for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
            let entry = entry?;
            let name = entry.file_name().into_string().ok().context("a name is not UTF-8")?;
            let to = format!("{to}/{name}");
            match entry.file_type()? {
                kind if kind.is_dir() => self.copy(&entry.path(), &to)?,
                kind if kind.is_file() => self.file(&to, 0o644, &fs::read(entry.path())?)?,
                _ => {
                    let target = fs::read_link(entry.path())?;
                    self.out.append(&Entry::symlink(&to, target.to_str().context("a link is not UTF-8")?))?;
                }
            }
        }
        Ok(())
    }
}

/// Reading the disk takes the emulated machine a second for some ten MB: most of a debug build is debug information.
fn stripped(program: &Path) -> Result<Vec<u8>> {
    let dir = target_dir()?.join("intel-lane");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let small: PathBuf = dir.join(program.file_name().context("a program has a name")?);
    let status = Command::new("strip").arg("-g").arg("-o").arg(&small).arg(program).stdin(Stdio::null()).status();
    ensure!(status.context("cannot run strip")?.success(), "strip {} failed", program.display());
    fs::read(&small).with_context(|| format!("cannot read {}", small.display()))
}
