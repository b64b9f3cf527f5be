//! The guest's root file system from Debian packages, and what maintainer scripts would have done to it.
//!
//! The scripts are never run: they would need root and a system around them. What matters of them is done here: the
//! alternatives (BLAS), the users, the linker's cache, the compiled Python modules.

use std::{
    ffi::{CStr, CString, NulError},
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use serde_json::Value;
use zeroboot_sys::{
    confined::Confined,
    jail::{Filter, JailError},
};

use crate::{
    apt::{self, Apt, AptError, Package},
    recipe::{Recipe, Runtime},
    tree::{SANDBOX, Tree},
    unpack::Root,
};

/// The filter of a package's program: it may do what a sandbox's code may.
const POLICY: &str = include_str!("../../../policy/process-sandbox.json");
/// How long a package's program may take: to compile numpy and pandas takes half a minute on a slow machine.
const PROGRAM_TIME: Duration = Duration::from_secs(15 * 60);

/// Packages of every sandbox, whatever the recipe: a shell and the commands that a program may call.
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

/// Packages that only a dependency wants and that no sandbox uses. A recipe that names one gets it.
const DROPPED: [&str; 7] = [
    "debconf",         // asks questions at installation
    "debianutils",     // for maintainer scripts
    "dpkg",            // nothing is installed in a sandbox
    "gcc-12-base",     // documentation only
    "gcc-14-base",     //
    "readline-common", // documentation and an inputrc
    "tar",             // for dpkg
];

/// Files that no program needs, as patterns of [`crate::unpack::matches`].
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

/// Links that `update-alternatives` would make, to the first target that exists.
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

/// Why a root file system could not be made.
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

/// Fetches and unpacks the packages into an empty tree and finishes it.
pub(crate) fn build(
    apt: &Apt,
    packages: &[Package],
    recipe: &Recipe,
    root: &mut Root,
    note: &mut dyn FnMut(&str),
) -> Result<Contents, RootfsError> {
    note(&format!("fetching {} packages", packages.len()));
    let files = apt.fetch(packages)?;
    note("unpacking");
    // A merged /usr, whatever the packages' age: the first paths of half of them begin with /lib or /bin.
    for dir in ["bin", "sbin", "lib", "lib64"] {
        let usr = Path::new("usr").join(dir);
        root.directory(&usr, 0o755).map_err(io_error("make", &usr))?;
        root.symlink(dir, &usr).map_err(io_error("make", Path::new(dir)))?;
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

/// Adds to a tree what every guest needs, and removes what must not be in one. Existing files stay.
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
    // The name that programs written for E2B use.
    tree.remove("home/user");
    tree.symlink("home/user", "/home/sandbox");
    // Names that other sandboxes have for the home directory: models write to them from habit. An image may use them itself.
    for other in ["workspace", "mnt/data"] {
        if !tree.contains(other) {
            tree.symlink(other, "/home/sandbox");
        }
    }
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

fn link_alternative(root: &mut Root, link: &str, targets: &[&str]) -> Result<(), RootfsError> {
    let link = Path::new(link);
    let dir = link.parent().unwrap_or(Path::new(""));
    let there = root.contains(link) || root.read_link(link).is_ok();
    match targets.iter().find(|target| root.contains(dir.join(target))) {
        Some(target) if !there => root.symlink(link, Path::new(target)).map_err(io_error("make", link)),
        _ => Ok(()),
    }
}

/// `3.11`, by the target of `/usr/bin/python3`.
fn python_version(root: &Root) -> Option<String> {
    let target = root.read_link("usr/bin/python3").ok()?;
    let version = target.file_name()?.to_str()?.strip_prefix("python")?.to_owned();
    let digits = version.strip_prefix("3.")?;
    digits.bytes().all(|byte| byte.is_ascii_digit()).then_some(version)
}

/// With the wheels of the guest's Python and C library. Installed where Debian's Python looks for what is not Debian's.
/// pip runs none of their code; it writes to an empty directory, because in the tree a package's link may lie in its way.
fn pip(root: &mut Root, list: &[String]) -> Result<Vec<String>, RootfsError> {
    let version = python_version(root).ok_or(RootfsError::NoRuntime("usr/bin/python3"))?;
    let target = beside(root)?;
    let target = target.path();
    let mut pip = Command::new("pip");
    pip.args(["install", "--quiet", "--no-input", "--disable-pip-version-check", "--no-compile"]);
    pip.args(["--only-binary=:all:", "--implementation=cp", "--python-version", &version]);
    let tag = version.replace('.', "");
    pip.arg(format!("--abi=cp{tag}")).args(["--abi=abi3", "--abi=none"]);
    // The C library of the oldest Debian that this is for is 2.36.
    let newest_first = (5..=36).rev().map(|minor| format!("--platform=manylinux_2_{minor}_x86_64"));
    pip.args(newest_first)
        .args(["manylinux2014", "manylinux2010", "manylinux1"].map(|p| format!("--platform={p}_x86_64")));
    pip.arg("--target").arg(target).arg("--").args(list);
    run("pip", &mut pip)?;
    // What was installed, by the names of the `.dist-info` directories.
    let mut installed = Vec::new();
    for entry in fs::read_dir(target).map_err(io_error("read", target))? {
        let name = entry.map_err(io_error("read", target))?.file_name();
        if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".dist-info")) {
            installed.push(name.replacen('-', " ", 1));
        }
    }
    installed.sort();
    let into = format!("usr/local/lib/python{version}/dist-packages");
    root.copy(target, &into).map_err(io_error("write", Path::new(&into)))?;
    Ok(installed)
}

/// Into `/node_modules`: `import` does not look at NODE_PATH, but it climbs to the root. As with pip, no code of a package
/// is run and npm does not write into the tree itself.
fn npm(root: &mut Root, list: &[String]) -> Result<Vec<String>, RootfsError> {
    let target = beside(root)?;
    let target = target.path();
    let mut npm = Command::new("npm");
    npm.args(["install", "--no-save", "--ignore-scripts", "--omit=dev", "--no-audit", "--no-fund", "--loglevel=error"]);
    npm.arg("--prefix").arg(target).arg("--").args(list).current_dir(target);
    run("npm", &mut npm)?;
    let modules = target.join("node_modules");
    let lock = modules.join(".package-lock.json");
    let text = fs::read_to_string(&lock).map_err(io_error("read", &lock))?;
    root.copy(&modules, "node_modules").map_err(io_error("write", Path::new("node_modules")))?;
    let packages = serde_json::from_str::<Value>(&text).ok();
    let packages = packages.as_ref().and_then(|lock| lock.get("packages")?.as_object()).into_iter().flatten();
    let name = |path: &str| path.rsplit("node_modules/").next().unwrap_or(path).to_owned();
    Ok(packages
        .filter_map(|(path, facts)| Some(format!("{} {}", name(path), facts.get("version")?.as_str()?)))
        .collect())
}

/// An empty directory on the disk of the tree.
fn beside(root: &Root) -> Result<tempfile::TempDir, RootfsError> {
    let parent = root.path().parent().unwrap_or(Path::new("/"));
    tempfile::Builder::new().prefix(".installed-").tempdir_in(parent).map_err(io_error("make a directory in", parent))
}

/// Why a program of the tree did not do its work.
#[derive(Debug, thiserror::Error)]
enum ConfinedError {
    #[error("no version of it")]
    NoVersion,
    #[error("{0}")]
    Filter(#[source] JailError),
    #[error("{0}")]
    Word(#[from] NulError),
    #[error("{0}")]
    Run(#[source] io::Error),
    /// The last lines that it wrote.
    #[error("{0}")]
    Failed(String),
}

/// The linker's cache, by the guest's own ldconfig.
fn ldconfig(root: &Root) -> Result<(), ConfinedError> {
    confined(root, "/usr/sbin/ldconfig", &[], &[])
}

/// Compiles the modules with the guest's own interpreter. Only parses them, imports none.
fn compile(root: &Root) -> Result<(), ConfinedError> {
    let version = python_version(root).ok_or(ConfinedError::NoVersion)?;
    // Files carry the hash of their source, which nobody checks: times do not survive the image.
    // -B: else what compileall itself imports is written with the time of its source, which is that of unpacking.
    let mut args: Vec<String> =
        ["-B", "-I", "-S", "-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"]
            .map(str::to_owned)
            .into();
    let dirs =
        ["/usr/lib/python3".to_owned(), format!("/usr/lib/python{version}"), format!("/usr/local/lib/python{version}")];
    args.extend(dirs.into_iter().filter(|dir| root.contains(dir)));
    let env = ["LC_ALL=C.UTF-8", "PYTHONHASHSEED=0"].map(str::to_owned);
    confined(root, &format!("/usr/bin/python{version}"), &args, &env)
}

/// Runs a program of the tree, which may be anybody's, with the tree as its only files.
fn confined(root: &Root, program: &str, args: &[String], env: &[String]) -> Result<(), ConfinedError> {
    let filter = Filter::parse(POLICY).map_err(ConfinedError::Filter)?;
    let list = |list: &[String]| list.iter().map(|item| CString::new(&**item)).collect::<Result<Vec<_>, _>>();
    let (program, args, env) = (CString::new(program)?, list(args)?, list(env)?);
    let args: Vec<&CStr> = args.iter().map(CString::as_c_str).collect();
    let env: Vec<&CStr> = env.iter().map(CString::as_c_str).collect();
    let jail = Confined { root: root.dir(), user: root.owner(), filter: &filter, time: PROGRAM_TIME };
    let output = jail.run(&program, &args, &env).map_err(ConfinedError::Run)?;
    if output.status.success() { Ok(()) } else { Err(ConfinedError::Failed(last_lines(&output))) }
}

fn run(program: &'static str, command: &mut Command) -> Result<Output, RootfsError> {
    match command.stdin(Stdio::null()).output() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(RootfsError::NoProgram(program)),
        Err(source) => Err(RootfsError::Io { what: "run", path: program.into(), source }),
        Ok(output) if output.status.success() => Ok(output),
        Ok(output) => Err(RootfsError::Program { program, reason: last_lines(&output) }),
    }
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

    /// A tree with a shell, and a script of somebody else's in the place of ldconfig.
    fn with_ldconfig(top: &Path, script: &str) -> Root {
        let mut root = Root::new(top).unwrap();
        let mut bring = |path: &Path| root.file(path, 0o755, fs::File::open(path).unwrap()).unwrap();
        let libraries = Command::new("ldd").arg("/bin/sh").output().unwrap().stdout;
        let libraries = String::from_utf8(libraries).unwrap();
        for path in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
            bring(Path::new(path));
        }
        bring(Path::new("/bin/sh"));
        root.file("usr/sbin/ldconfig", 0o755, script.as_bytes()).unwrap();
        root.directory("etc", 0o755).unwrap();
        root
    }

    #[test]
    fn a_packages_program_reaches_nothing_but_its_tree() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        fs::create_dir(&top).unwrap();
        let outside = dir.path().join("outside");
        fs::write(&outside, "of the host").unwrap();
        fs::set_permissions(&outside, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        let (host, ours) = (outside.display(), std::process::id());
        let script = format!(
            "#!/bin/sh
            say() {{ echo \"$1\" >> /etc/said; }}
            say $$
            (echo evil > {host}) 2> /etc/error && say 'wrote a file of the host'
            (: < {host}) 2> /etc/error && say 'read a file of the host'
            kill -0 {ours} 2> /etc/error && say 'reached a process of the host'
            [ -e /proc/self ] && say 'saw processes'
            [ -e /sys/kernel ] && say 'saw the kernel'
            ulimit -c unlimited 2> /etc/error && say 'raised a limit'
            for fd in 3 4 5 6 7 8 9; do (: <&$fd) 2> /etc/error && say \"had descriptor $fd\"; done
            echo complaint; exit 3"
        );
        let root = with_ldconfig(&top, &script);
        assert_eq!(ldconfig(&root).unwrap_err().to_string(), "complaint");
        assert_eq!(fs::read_to_string(top.join("etc/said")).unwrap(), "1\n");
        assert_eq!(fs::read_to_string(&outside).unwrap(), "of the host");
        // Nothing in the tree has become a file of the caller's, who may be root.
        let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(top.join("etc/said")).unwrap());
        assert_eq!(owner, root.owner().0);
        assert!(!rustix::process::geteuid().is_root() || owner != 0, "a package's program is the host's root");
    }

    #[test]
    fn a_packages_program_that_does_not_end_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        // Its child holds the output open, too.
        let root = with_ldconfig(dir.path(), "#!/bin/sh\nwhile :; do :; done &\nwhile :; do :; done");
        let filter = Filter::parse(POLICY).unwrap();
        let time = Duration::from_millis(300);
        let jail = Confined { root: root.dir(), user: root.owner(), filter: &filter, time };
        let begun = std::time::Instant::now();
        let error = jail.run(c"/usr/sbin/ldconfig", &[], &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn alternatives_are_linked_in_the_tree_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (host, top) = (dir.path().join("host"), dir.path().join("top"));
        fs::create_dir_all(host.join("blas")).unwrap();
        fs::write(host.join("blas/libblas.so.3"), "").unwrap();
        fs::create_dir(&top).unwrap();
        let mut root = Root::new(&top).unwrap();
        root.symlink("usr/lib/x86_64-linux-gnu", &host).unwrap();
        for (link, targets) in ALTERNATIVES {
            link_alternative(&mut root, link, targets).unwrap();
        }
        assert_eq!(fs::read_dir(&host).unwrap().count(), 1);
        root.file("usr/bin/mawk", 0o755, &b""[..]).unwrap();
        link_alternative(&mut root, "usr/bin/awk", &["gawk", "mawk"]).unwrap();
        assert_eq!(root.read_link("usr/bin/awk").unwrap(), Path::new("mawk"));
    }
}
