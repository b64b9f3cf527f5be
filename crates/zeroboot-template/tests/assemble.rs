//! The real recipes, assembled: needs the network once, then `~/.cache/zeroboot`. `cargo xtask nested-suite` runs these;
//! by hand: `cargo test -p zeroboot-template -- --ignored`.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use zeroboot_template::{Assembled, Progress, Recipe, RootfsSource, Runtime, Sources, assemble, paths};

const AGENT: &[u8] = b"not an agent";
const RUNNERS: [&[u8]; 2] = [zeroboot_runtimes::PYTHON, zeroboot_runtimes::NODE];

fn runner(runtime: Runtime) -> &'static [u8] {
    match runtime {
        Runtime::Python => RUNNERS[0],
        Runtime::Node => RUNNERS[1],
    }
}

fn assembled(recipe: &Recipe, sources: &Sources) -> Assembled {
    let cache = paths::cache_dir().expect("a cache directory");
    let mut said = String::new();
    let mut progress = |step: Progress<'_>| said.push_str(&format!("{step:?}\n"));
    match assemble(recipe, sources, AGENT, runner(recipe.runtime), &cache, &mut progress) {
        Ok(assembled) => assembled,
        Err(error) => panic!("{error:?}\nhint: {:?}\n{said}", error.hint()),
    }
}

/// Unpacks an initramfs without its devices, which only root can make.
fn unpacked(initramfs: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut cpio = Command::new("cpio");
    cpio.args(["-i", "-d", "--quiet", "--no-absolute-filenames", "-f", "dev/*"]).current_dir(dir.path());
    let output = cpio.stdin(fs::File::open(initramfs).unwrap()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    dir
}

/// Runs a command with `root` as its root directory, as root of namespaces of its own.
fn inside(root: &Path, command: &[&str]) -> Output {
    let null = root.join("dev/null");
    fs::create_dir_all(root.join("dev")).unwrap();
    fs::write(&null, "").unwrap();
    let mut unshare = Command::new("unshare");
    unshare.args(["-r", "-m", "sh", "-c", "mount --bind /dev/null \"$0/dev/null\" && exec chroot \"$0\" \"$@\""]);
    unshare.arg(root).args(command).env_clear().stdin(Stdio::null());
    unshare.env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin").env("LANG", "C.UTF-8");
    unshare.output().unwrap()
}

fn says(root: &Path, command: &[&str]) -> String {
    let output = inside(root, command);
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Starts the runner as the agent does and gives what it says when it is warm. Then it ends, because nobody tells it anything.
fn runner_says(root: &Path) -> String {
    let argv = fs::read_to_string(root.join("etc/zeroboot/argv")).unwrap();
    let mut command = vec!["sh", "-c", "exec \"$0\" \"$@\" 3</dev/null 4>&1"];
    command.extend(argv.split_terminator('\0'));
    String::from_utf8_lossy(&inside(root, &command).stdout).into_owned()
}

fn listing(initramfs: &Path) -> Vec<String> {
    let cpio = Command::new("cpio").args(["-t", "--quiet"]).stdin(fs::File::open(initramfs).unwrap()).output().unwrap();
    String::from_utf8(cpio.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
#[ignore = "fetches Debian packages"]
fn the_python_recipe_becomes_a_working_root_file_system() {
    let recipe = Recipe::embedded("python").unwrap();
    let assembled = assembled(&recipe, &Sources::default());

    let kernel = fs::read(&assembled.kernel).unwrap();
    assert!(kernel.starts_with(b"\x7fELF"));
    assert!(assembled.provenance.kernel_release.ends_with("-amd64"), "{:?}", assembled.provenance.kernel_release);
    assert!(assembled.provenance.packages.iter().any(|package| package.starts_with("python3-numpy ")));

    let names = listing(&assembled.initramfs);
    for name in ["init", "usr/lib/zeroboot/python.pyz", "etc/passwd", "dev/console", "usr/bin/python3", "home/sandbox"]
    {
        assert!(names.iter().any(|known| known == name), "no {name}");
    }
    assert!(!names.iter().any(|name| name.starts_with("usr/share/doc/") || name.starts_with("usr/share/man/")));
    let size = fs::metadata(&assembled.initramfs).unwrap().len();
    assert!(size < 200 << 20, "{size} bytes: what has come along?");

    let root = unpacked(&assembled.initramfs);
    let root = root.path();
    assert_eq!(fs::read(root.join("init")).unwrap(), AGENT);
    assert_eq!(fs::read(root.join("usr/lib/zeroboot/python.pyz")).unwrap(), runner(Runtime::Python));
    let argv = fs::read_to_string(root.join("etc/zeroboot/argv")).unwrap();
    assert!(
        argv.starts_with("/usr/bin/python3\0-E\0") && argv.ends_with("--frozen\0--warm\0numpy,pandas\0"),
        "{argv:?}"
    );
    assert!(root.join("usr/lib/x86_64-linux-gnu/libblas.so.3").exists());

    // One interpreter's start for all questions.
    let code = "
import ctypes.util, importlib, os, pwd, sqlite3, ssl, subprocess, time
import numpy as np, pandas as pd
assert (np.arange(6).reshape(2, 3) @ np.ones(3)).tolist() == [3.0, 12.0]
assert abs(np.linalg.det(np.array([[2.0, 1.0], [1.0, 3.0]])) - 5) < 1e-9
assert pd.DataFrame({'a': [1, 2, 3]}).a.sum() == 6
assert pwd.getpwuid(1000).pw_name == 'sandbox' and pwd.getpwnam('root').pw_uid == 0
assert subprocess.run('echo $((6 * 7)) | sed s/4/x/', shell=True, capture_output=True).stdout == b'x2\\n'
assert time.localtime(0).tm_hour == 0 and pd.Timestamp('2026-07-01', tz='Europe/Berlin').utcoffset().seconds == 7200
for name in 'asyncio json decimal lzma bz2 zlib uuid multiprocessing curses readline xml.etree.ElementTree'.split():
    importlib.import_module(name)
assert os.path.exists(importlib.util.cache_from_source(pd.__file__)), 'not compiled'
assert ctypes.util.find_library('c') == 'libc.so.6', ctypes.util.find_library('c')
print('fine')
";
    assert_eq!(says(root, &["python3", "-c", code]), "fine");
    assert_eq!(says(root, &["locale", "charmap"]), "UTF-8");
    let said = runner_says(root);
    assert!(said.contains("\"version\"") && said.contains("numpy 1.") && said.contains("pandas 1."), "{said}");
    assert_eq!(says(root, &["bash", "-c", "find /etc/passwd | grep -c passwd; awk 'BEGIN { print 1 + 1 }'"]), "1\n2");
}

#[test]
#[ignore = "fetches Debian packages"]
fn the_node_recipe_becomes_a_working_root_file_system() {
    let recipe = Recipe::embedded("node").unwrap();
    let assembled = assembled(&recipe, &Sources::default());
    let root = unpacked(&assembled.initramfs);
    let code =
        "console.log([1, 2, 3].map(x => x * 2).join(), typeof fetch, new Intl.NumberFormat('de').format(1234.5))";
    assert_eq!(says(root.path(), &["node", "-e", code]), "2,4,6 function 1.234,5");
    let code = "import { createHash } from 'node:crypto'; console.log(createHash('sha256').update('').digest('hex').slice(0, 8))";
    assert_eq!(says(root.path(), &["node", "--input-type=module", "-e", code]), "e3b0c442");
    let said = runner_says(root.path());
    assert!(said.contains("\"version\""), "{said}");
}

#[test]
#[ignore = "fetches packages of Debian, PyPI and npm"]
fn packages_of_pip_and_npm_come_along() {
    let text =
        "name = 'pip-test'\nruntime = 'python'\npackages = ['python3']\npip = ['numpy==1.26.4', 'six==1.16.0']\n";
    let with_pip = assembled(&Recipe::from_toml(text).unwrap(), &Sources::default());
    assert_eq!(with_pip.provenance.pip, ["numpy 1.26.4", "six 1.16.0"]);
    let root = unpacked(&with_pip.initramfs);
    assert_eq!(says(root.path(), &["python3", "-c", "import numpy, six; print(numpy.arange(4).sum())"]), "6");

    let text = "name = 'npm-test'\nruntime = 'node'\npackages = ['nodejs']\nnpm = ['is-odd@3.0.1']\n";
    let with_npm = assembled(&Recipe::from_toml(text).unwrap(), &Sources::default());
    assert!(with_npm.provenance.npm.contains(&"is-odd 3.0.1".to_owned()), "{:?}", with_npm.provenance.npm);
    let root = unpacked(&with_npm.initramfs);
    let code = "import isOdd from 'is-odd'; console.log(isOdd(3))";
    assert_eq!(says(root.path(), &["node", "--input-type=module", "-e", code]), "true");
}

#[test]
#[ignore = "fetches Debian packages"]
fn the_second_time_is_from_the_cache_and_the_same() {
    let recipe = Recipe::embedded("node").unwrap();
    let first = assembled(&recipe, &Sources::default());
    let second = assembled(&recipe, &Sources { offline: true, ..Sources::default() });
    assert!(second.cached);
    assert_eq!(second.provenance, first.provenance);
    assert_eq!(fs::metadata(&first.initramfs).unwrap().ino(), fs::metadata(&second.initramfs).unwrap().ino());
}

#[test]
#[ignore = "fetches a kernel"]
fn too_little_memory_is_said_before_the_boot() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("usr/bin")).unwrap();
    fs::write(dir.path().join("usr/bin/python3"), vec![1; 9 << 20]).unwrap();
    let recipe = Recipe::from_toml("name = 'large-test'\nruntime = 'python'\nmemory_mib = 128\n").unwrap();
    let sources = Sources { rootfs: RootfsSource::Directory(dir.path().to_owned()), ..Sources::default() };
    let refused =
        assemble(&recipe, &sources, AGENT, RUNNERS[0], &paths::cache_dir().unwrap(), &mut |_| ()).unwrap_err();
    assert_eq!(refused.to_string(), "memory_mib = 128 is too little for a root file system of 10 MiB");
}

#[test]
#[ignore = "fetches a kernel"]
fn a_directory_is_a_root_file_system() {
    let dir = tempfile::tempdir().unwrap();
    let bin = dir.path().join("usr/bin");
    fs::create_dir_all(&bin).unwrap();
    fs::write(bin.join("python3"), "an interpreter").unwrap();
    fs::write(dir.path().join("data"), "mine").unwrap();
    let text = "name = 'directory-test'\nruntime = 'python'\n";
    let sources = Sources { rootfs: RootfsSource::Directory(dir.path().to_owned()), ..Sources::default() };
    let assembled = assembled(&Recipe::from_toml(text).unwrap(), &sources);
    assert_eq!(PathBuf::from(&assembled.provenance.rootfs), dir.path());
    let root = unpacked(&assembled.initramfs);
    assert_eq!(fs::read_to_string(root.path().join("data")).unwrap(), "mine");
    assert!(fs::read_to_string(root.path().join("etc/passwd")).unwrap().contains("sandbox:x:1000:1000:"));
    // The directory itself is as it was.
    assert!(!dir.path().join("etc").exists());
}
