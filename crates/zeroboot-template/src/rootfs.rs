//! The guest's root file system from Debian packages, and what maintainer scripts would have done to it.
//!
//! The scripts are never run: they would need root and a system around them. What matters of them is done here: the
//! alternatives (BLAS), the users, the linker's cache, the compiled Python modules.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;

use crate::{
    apt::{self, Apt, AptError, Package},
    recipe::{Recipe, Runtime},
    tree::{SANDBOX, Tree},
};

/// In every sandbox, whatever the recipe: a shell and the commands that a program may call.
const BASE: [&str; 10] = [
    "base-files", // os-release
    "bash",       //
    "coreutils",  //
    "dash",       // /bin/sh
    "findutils",  //
    "grep",       //
    "libc-bin",   // C.UTF-8, ldconfig (ctypes.util.find_library)
    "mawk",       //
    "sed",        //
    "tzdata",     // zoneinfo
];

/// Dragged in by a dependency, of no use in a sandbox. A recipe that names one gets it.
const DROPPED: [&str; 7] = [
    "debconf",         // asks questions at installation
    "debianutils",     // for maintainer scripts
    "dpkg",            // nothing is installed in a sandbox
    "gcc-12-base",     // documentation only
    "gcc-14-base",     //
    "readline-common", // documentation and an inputrc
    "tar",             // for dpkg
];

/// What no program needs, as patterns of `tar --exclude`.
const STRIPPED: [&str; 19] = [
    "usr/share/doc",                               // 7 MB
    "usr/share/man",                               //
    "usr/share/info",                              //
    "usr/share/locale",                            // 25 MB of translations; the sandbox speaks C.UTF-8
    "usr/share/lintian",                           //
    "usr/share/bug",                               //
    "usr/share/bash-completion",                   //
    "usr/share/doc-base",                          //
    "usr/share/gdb",                               //
    "usr/share/perl5",                             // debconf's; there is no perl
    "usr/lib/x86_64-linux-gnu/gconv",              // 8 MB: iconv of the C library; Python and Node have their own
    "usr/lib/x86_64-linux-gnu/*.a",                // static libraries
    "lib/x86_64-linux-gnu/*.a",                    //
    "usr/lib/python3/dist-packages/pandas/tests",  // 14 MB
    "usr/lib/python3/dist-packages/numpy/*/tests", // 7 MB
    "usr/lib/python3*/test",                       //
    "usr/lib/python3*/pydoc_data",                 //
    "usr/lib/node_modules/npm",                    // nothing is installed in a sandbox
    "boot",                                        // the kernel comes another way
];

/// What `update-alternatives` would link: the first target that is there.
const ALTERNATIVES: [(&str, &[&str]); 5] = [
    (
        "usr/lib/x86_64-linux-gnu/libblas.so.3",
        &["openblas-pthread/libblas.so.3", "openblas-serial/libblas.so.3", "blas/libblas.so.3"],
    ),
    (
        "usr/lib/x86_64-linux-gnu/liblapack.so.3",
        &["openblas-pthread/liblapack.so.3", "openblas-serial/liblapack.so.3", "lapack/liblapack.so.3"],
    ),
    (
        "usr/lib/x86_64-linux-gnu/libopenblas.so.0",
        &["openblas-pthread/libopenblas.so.0", "openblas-serial/libopenblas.so.0"],
    ),
    ("usr/bin/awk", &["gawk", "mawk"]),
    ("usr/bin/python", &["python3"]),
];

const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
";
const GROUP: &str = "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n";

/// Why there is no root file system.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RootfsError {
    /// The packages.
    #[error(transparent)]
    Apt(#[from] AptError),
    /// A file could not be written or read.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// pip or npm is not there.
    #[error("the recipe lists {0} packages, and this machine has no {0}")]
    NoProgram(&'static str),
    /// pip or npm failed.
    #[error("{program} failed: {reason}")]
    Program {
        /// Which.
        program: &'static str,
        /// The end of what it said.
        reason: String,
    },
    /// The root file system lacks the recipe's runtime.
    #[error("the root file system has no /{0}")]
    NoRuntime(&'static str),
}

impl RootfsError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            RootfsError::Apt(error) => error.hint(),
            RootfsError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("the disk is full; XDG_CACHE_HOME moves the cache directory")
            }
            RootfsError::NoProgram("pip") => Some("`apt-get install python3-pip`, or list Debian packages instead"),
            RootfsError::NoProgram(_) => Some("`apt-get install npm`, or list Debian packages instead"),
            RootfsError::Program { program: "pip", .. } => {
                Some("only wheels can be used: a package without one for the guest's Python cannot be listed")
            }
            RootfsError::NoRuntime(_) => Some("the interpreter must be there, at this path, with its libraries"),
            _ => None,
        }
    }
}

pub(crate) fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RootfsError {
    let path = path.to_owned();
    move |source| RootfsError::Io { what, path, source }
}

/// What is in a root file system.
#[derive(Clone, Debug, Default)]
pub(crate) struct Contents {
    /// `name version architecture`
    pub(crate) packages: Vec<String>,
    pub(crate) pip: Vec<String>,
    pub(crate) npm: Vec<String>,
}

/// The packages of a recipe, without those that are dropped.
pub(crate) fn packages(apt: &Apt, recipe: &Recipe) -> Result<Vec<Package>, AptError> {
    let mut names: Vec<&str> = BASE.to_vec();
    names.extend(recipe.packages.iter().map(String::as_str));
    let asked = |name: &str| recipe.packages.iter().any(|asked| asked.split(['=', '/', ':']).next() == Some(name));
    let mut closure = apt.closure(&names)?;
    closure.retain(|package| !DROPPED.contains(&package.name.as_str()) || asked(&package.name));
    Ok(closure)
}

/// Fetches and unpacks the packages into an empty directory and finishes it.
pub(crate) fn build(
    apt: &Apt,
    packages: &[Package],
    recipe: &Recipe,
    root: &Path,
    note: &mut dyn FnMut(&str),
) -> Result<Contents, RootfsError> {
    note(&format!("fetching {} packages", packages.len()));
    let files = apt.fetch(packages)?;
    note("unpacking");
    // A merged /usr, whatever the packages' age: the first paths of half of them begin with /lib or /bin.
    for dir in ["bin", "sbin", "lib", "lib64"] {
        let usr = root.join("usr").join(dir);
        fs::create_dir_all(&usr).map_err(io_error("make", &usr))?;
        let link = root.join(dir);
        symlink(Path::new("usr").join(dir), &link).map_err(io_error("make", &link))?;
    }
    for file in &files {
        apt::unpack(file, root, &STRIPPED)?;
    }
    for (link, targets) in ALTERNATIVES {
        link_alternative(root, link, targets)?;
    }
    let mut contents = Contents {
        packages: packages.iter().map(|p| format!("{} {} {}", p.name, p.version, p.architecture)).collect(),
        ..Contents::default()
    };
    if !recipe.pip.is_empty() {
        note("pip");
        contents.pip = pip(root, &recipe.pip)?;
    }
    if !recipe.npm.is_empty() {
        note("npm");
        contents.npm = npm(root, &recipe.npm)?;
    }
    note("linking and compiling");
    if let Err(reason) = ldconfig(root) {
        note(&format!("no linker cache, ctypes.util.find_library will find nothing: {reason}"));
    }
    if recipe.runtime == Runtime::Python
        && let Err(reason) = compile(root)
    {
        note(&format!("Python modules stay uncompiled, imports will be slower: {reason}"));
    }
    Ok(contents)
}

/// Puts over a tree what every guest needs, and takes out what must not be in one. What is there already stays.
pub(crate) fn finish(tree: &mut Tree, recipe: &Recipe) -> Result<(), RootfsError> {
    if !tree.contains(recipe.runtime.interpreter()) {
        return Err(RootfsError::NoRuntime(recipe.runtime.interpreter()));
    }
    for (dir, mode) in [("proc", 0o555), ("sys", 0o555), ("dev", 0o755), ("run", 0o755), ("root", 0o700)] {
        tree.remove(dir);
        tree.directory(dir, mode, 0);
    }
    tree.remove("tmp");
    tree.directory("tmp", 0o1777, 0);
    tree.directory("var/tmp", 0o1777, 0);
    tree.directory("home", 0o755, 0);
    tree.directory("home/sandbox", 0o700, SANDBOX);
    // It holds times and inode numbers of this machine.
    tree.remove("var/cache");
    tree.directory("var/cache", 0o755, 0);
    // Before devtmpfs is mounted the kernel opens /dev/console for PID 1.
    for (name, mode, major, minor) in [
        ("console", 0o600, 5, 1),
        ("full", 0o666, 1, 7),
        ("null", 0o666, 1, 3),
        ("random", 0o666, 1, 8),
        ("tty", 0o666, 5, 0),
        ("urandom", 0o666, 1, 9),
        ("zero", 0o666, 1, 5),
    ] {
        tree.char_device(&format!("dev/{name}"), mode, major, minor);
    }
    let mut passwd = tree.text("etc/passwd").unwrap_or_else(|| PASSWD.to_owned());
    // A user of that number under another name would be what `whoami` says.
    passwd = without_user(&passwd, SANDBOX, "sandbox");
    passwd.push_str("sandbox:x:1000:1000:sandbox:/home/sandbox:/bin/sh\n");
    tree.file("etc/passwd", 0o644, passwd);
    let mut group = without_user(&tree.text("etc/group").unwrap_or_else(|| GROUP.to_owned()), SANDBOX, "sandbox");
    group.push_str("sandbox:x:1000:\n");
    tree.file("etc/group", 0o644, group);
    // There is no network: nothing is looked up anywhere else.
    tree.file("etc/hosts", 0o644, "127.0.0.1 localhost sandbox\n::1 localhost\n");
    tree.file("etc/hostname", 0o644, "sandbox\n");
    tree.file(
        "etc/nsswitch.conf",
        0o644,
        "passwd: files\ngroup: files\nhosts: files\nservices: files\nprotocols: files\n",
    );
    tree.file("etc/resolv.conf", 0o644, "");
    if tree.contains("usr/share/zoneinfo/Etc/UTC") {
        tree.symlink("etc/localtime", "/usr/share/zoneinfo/Etc/UTC");
    }
    tree.file("etc/timezone", 0o644, "Etc/UTC\n");
    Ok(())
}

fn without_user(table: &str, id: u32, name: &str) -> String {
    let number = id.to_string();
    let other = |line: &&str| {
        let mut fields = line.split(':');
        let same_name = fields.next() == Some(name);
        !same_name && fields.nth(1) != Some(&number)
    };
    table.lines().filter(other).flat_map(|line| [line, "\n"]).collect()
}

fn link_alternative(root: &Path, link: &str, targets: &[&str]) -> Result<(), RootfsError> {
    let link = root.join(link);
    let dir = link.parent().unwrap_or(root);
    match targets.iter().find(|target| dir.join(target).exists()) {
        Some(target) if fs::symlink_metadata(&link).is_err() => symlink(target, &link).map_err(io_error("make", &link)),
        _ => Ok(()),
    }
}

/// `3.11`, by the target of `/usr/bin/python3`.
fn python_version(root: &Path) -> Option<String> {
    let target = fs::read_link(root.join("usr/bin/python3")).ok()?;
    let version = target.file_name()?.to_str()?.strip_prefix("python")?.to_owned();
    version.starts_with("3.").then_some(version)
}

/// With the wheels of the guest's Python and C library. Installed where Debian's Python looks for what is not Debian's.
fn pip(root: &Path, list: &[String]) -> Result<Vec<String>, RootfsError> {
    let version = python_version(root).ok_or(RootfsError::NoRuntime("usr/bin/python3"))?;
    let target = root.join(format!("usr/local/lib/python{version}/dist-packages"));
    fs::create_dir_all(&target).map_err(io_error("make", &target))?;
    let mut pip = Command::new("pip");
    pip.args(["install", "--quiet", "--no-input", "--disable-pip-version-check", "--no-compile"]);
    pip.args(["--only-binary=:all:", "--implementation=cp", "--python-version", &version]);
    let tag = version.replace('.', "");
    pip.arg(format!("--abi=cp{tag}")).args(["--abi=abi3", "--abi=none"]);
    // The C library of the oldest Debian that this is for is 2.36.
    let newest_first = (5..=36).rev().map(|minor| format!("--platform=manylinux_2_{minor}_x86_64"));
    pip.args(newest_first)
        .args(["manylinux2014", "manylinux2010", "manylinux1"].map(|p| format!("--platform={p}_x86_64")));
    pip.arg("--target").arg(&target).arg("--").args(list);
    run("pip", &mut pip)?;
    // What was installed, by the names of the `.dist-info` directories.
    let mut installed = Vec::new();
    for entry in fs::read_dir(&target).map_err(io_error("read", &target))? {
        let name = entry.map_err(io_error("read", &target))?.file_name();
        if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".dist-info")) {
            installed.push(name.replacen('-', " ", 1));
        }
    }
    installed.sort();
    Ok(installed)
}

/// Into `/node_modules`: `import` does not look at NODE_PATH, but it climbs to the root.
fn npm(root: &Path, list: &[String]) -> Result<Vec<String>, RootfsError> {
    let mut npm = Command::new("npm");
    npm.args(["install", "--no-save", "--ignore-scripts", "--omit=dev", "--no-audit", "--no-fund", "--loglevel=error"]);
    npm.arg("--prefix").arg(root).arg("--").args(list).current_dir(root);
    run("npm", &mut npm)?;
    let lock = root.join("node_modules/.package-lock.json");
    let text = fs::read_to_string(&lock).map_err(io_error("read", &lock))?;
    let packages = serde_json::from_str::<Value>(&text).ok();
    let packages = packages.as_ref().and_then(|lock| lock.get("packages")?.as_object()).into_iter().flatten();
    let name = |path: &str| path.rsplit("node_modules/").next().unwrap_or(path).to_owned();
    Ok(packages
        .filter_map(|(path, facts)| Some(format!("{} {}", name(path), facts.get("version")?.as_str()?)))
        .collect())
}

/// The linker's cache, by the guest's own ldconfig (it is linked statically). It changes its root, which takes root, or a
/// user namespace in which we are.
fn ldconfig(root: &Path) -> Result<(), String> {
    let program = root.join("usr/sbin/ldconfig");
    let mut command = if rustix::process::geteuid().is_root() {
        Command::new(&program)
    } else {
        let mut command = Command::new("unshare");
        command.arg("-r").arg(&program);
        command
    };
    quiet(command.arg("-r").arg(root)).map(|_| ())
}

/// Compiles the modules with the guest's own interpreter, run by its own dynamic linker. Only parses them, imports none.
fn compile(root: &Path) -> Result<(), String> {
    let version = python_version(root).ok_or("no version of it")?;
    let libraries = ["usr/lib/x86_64-linux-gnu", "usr/lib"].map(|dir| root.join(dir).display().to_string()).join(":");
    let mut python = Command::new(root.join("usr/lib64/ld-linux-x86-64.so.2"));
    // With -m Python imports from the working directory first, which may be anybody's.
    python.current_dir("/");
    python.arg("--library-path").arg(libraries).arg(root.join(format!("usr/bin/python{version}")));
    python.env_clear().env("PYTHONHOME", root.join("usr")).env("LC_ALL", "C.UTF-8").env("PYTHONHASHSEED", "0");
    // Files carry the hash of their source, which nobody checks: times do not survive the image.
    // -B: else what compileall itself imports is written with the time of its source, which is that of unpacking.
    python.args(["-B", "-s", "-S", "-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"]);
    python.arg("-s").arg(root).args(["-p", "/"]);
    let dirs =
        ["usr/lib/python3".to_owned(), format!("usr/lib/python{version}"), format!("usr/local/lib/python{version}")];
    python.args(dirs.map(|dir| root.join(dir)).iter().filter(|dir| dir.exists()));
    quiet(&mut python).map(|_| ())
}

fn run(program: &'static str, command: &mut Command) -> Result<Output, RootfsError> {
    match command.stdin(Stdio::null()).output() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(RootfsError::NoProgram(program)),
        Err(source) => Err(RootfsError::Io { what: "run", path: program.into(), source }),
        Ok(output) if output.status.success() => Ok(output),
        Ok(output) => Err(RootfsError::Program { program, reason: last_lines(&output) }),
    }
}

fn quiet(command: &mut Command) -> Result<Output, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(output) } else { Err(last_lines(&output)) }
}

fn last_lines(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let text = lines[lines.len().saturating_sub(5)..].join("; ");
    if text.is_empty() { output.status.to_string() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn python_tree() -> Tree {
        let mut tree = Tree::default();
        tree.file("usr/bin/python3", 0o755, "");
        tree
    }

    #[test]
    fn a_user_of_our_number_is_replaced() {
        let mut tree = python_tree();
        tree.file(
            "etc/passwd",
            0o644,
            "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\nsandbox:x:5:5:::\n",
        );
        finish(&mut tree, &Recipe::embedded("python").unwrap()).unwrap();
        let passwd = tree.text("etc/passwd").unwrap();
        assert_eq!(passwd, "root:x:0:0::/root:/bin/sh\nsandbox:x:1000:1000:sandbox:/home/sandbox:/bin/sh\n");
        assert_eq!(tree.text("etc/group").unwrap(), format!("{GROUP}sandbox:x:1000:\n"));
    }

    #[test]
    fn a_root_without_the_runtime_is_refused() {
        let refused = finish(&mut python_tree(), &Recipe::embedded("node").unwrap());
        assert!(matches!(refused, Err(RootfsError::NoRuntime("usr/bin/node"))));
    }

    #[test]
    fn what_the_directory_had_in_run_and_tmp_stays_out() {
        let mut tree = python_tree();
        tree.file("run/secret", 0o600, "x");
        tree.file("tmp/secret", 0o600, "x");
        finish(&mut tree, &Recipe::embedded("python").unwrap()).unwrap();
        assert!(!tree.contains("run/secret") && !tree.contains("tmp/secret"));
        assert!(tree.contains("dev/console") && tree.contains("tmp"));
    }
}
