//! What a process sandbox sees of a file system.

use std::path::{Path, PathBuf};

use zeroboot_sys::mount::RootPlan;

use crate::{cache, meeting};

/// The agent's binary inside every sandbox.
pub const AGENT: &str = "/.zeroboot/agent";
/// The library through which a warm Python is forked.
pub const PYFORK: &str = "/.zeroboot/pyfork.so";
/// The Python runner.
pub const RUNNER_PYTHON: &str = "/.zeroboot/python.pyz";
/// The Node runner.
pub const RUNNER_NODE: &str = "/.zeroboot/node.cjs";
/// The command line of one more interpreter, for the agent.
pub(crate) const CONTEXT: &str = "/etc/zeroboot/context";
/// The environment of what runs in a sandbox, for the agent.
pub(crate) const ENVIRON: &str = "/etc/zeroboot/environ";
/// A file; if it exists, the image is made before the first fork.
pub(crate) const IMAGE_AT_ONCE: &str = "/.zeroboot/image-at-once";
/// Working directory and home of the code.
pub const HOME: &str = "/home/sandbox";
/// Names that other sandboxes have for the home directory: models write to them from habit, and programs written for E2B
/// use the last.
const OTHER_HOMES: [&str; 3] = ["/workspace", "/mnt/data", "/home/user"];

/// Where Node packages appear: `require` and `import` climb from any directory to the root.
pub(crate) const NODE_MODULES: &str = "/node_modules";

/// Host paths that a sandbox may read, where they exist, and why.
const SHARED: &[(&str, &str)] = &[
    ("/usr", "programs and libraries that code starts as subprocesses or loads"),
    ("/bin", "on a merged /usr a link; the shell's path"),
    ("/sbin", "on a merged /usr a link"),
    ("/lib", "the dynamic loader and libraries"),
    ("/lib32", "libraries of 32-bit programs"),
    ("/lib64", "the dynamic loader's fixed path"),
    ("/etc/ld.so.cache", "where libraries are"),
    ("/etc/alternatives", "Debian's links to the chosen BLAS and others"),
    ("/etc/ssl/certs", "public certificates, for code that makes a TLS context"),
    ("/etc/ssl/openssl.cnf", "OpenSSL reads it at start"),
    ("/etc/localtime", "the host's time zone"),
    ("/etc/mime.types", "Python's mimetypes"),
    ("/etc/services", "names of ports: getservbyname"),
    ("/etc/protocols", "names of protocols: getprotobyname"),
    ("/etc/os-release", "which distribution this is"),
    ("/etc/fonts", "fontconfig: plots and PDF libraries"),
    ("/etc/java-11-openjdk", "/usr/lib/jvm has links to it"),
    ("/etc/java-17-openjdk", "/usr/lib/jvm has links to it"),
    ("/etc/java-21-openjdk", "/usr/lib/jvm has links to it"),
    ("/etc/java-25-openjdk", "/usr/lib/jvm has links to it"),
    ("/etc/R", "/usr/lib/R has links to it"),
    ("/etc/perl", "Perl looks for modules there"),
    ("/etc/matplotlibrc", "Debian's matplotlib has a link to it"),
    ("/etc/magic", "/usr/share/misc/magic and libmagic"),
];

/// The root of a sandbox: [`SHARED`], the runtime's own directories, a few files of ours, mount points.
pub(crate) fn plan(runtime_paths: &[PathBuf], node_modules: Option<&Path>, own: Vec<(PathBuf, Vec<u8>)>) -> RootPlan {
    let mut binds: Vec<PathBuf> = SHARED.iter().map(|(path, _)| PathBuf::from(path)).filter(|p| present(p)).collect();
    // /usr is the distribution's; a runtime's own directories are anybody's.
    let of_the_system = binds.len();
    let mut sorted = runtime_paths.to_vec();
    sorted.sort();
    for path in sorted {
        let covered = binds.iter().any(|b| path.starts_with(b));
        if !covered && present(&path) && may_be_shared(&path) {
            binds.push(path);
        }
    }
    let mut covered = Vec::new();
    for bind in binds.get(of_the_system..).unwrap_or_default() {
        covered.extend(meeting::points(bind, cache::place()));
    }
    let mut files = own;
    let text = |path: &str, text: &str| (PathBuf::from(path), text.as_bytes().to_vec());
    files.push(text(
        "/etc/passwd",
        "root:x:0:0:root:/:/usr/sbin/nologin\nsandbox:x:1000:1000:sandbox:/home/sandbox:/bin/sh\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
    ));
    files.push(text("/etc/group", "root:x:0:\nsandbox:x:1000:\nnogroup:x:65534:\n"));
    files.push(text("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"));
    files.push(text("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n"));
    let directories = [HOME, "/tmp", "/run", "/var/tmp"].map(PathBuf::from).to_vec();
    let moved = node_modules.map(|from| (from.to_owned(), PathBuf::from(NODE_MODULES))).into_iter().collect();
    let links = OTHER_HOMES.map(|path| (PathBuf::from(path), PathBuf::from(HOME))).to_vec();
    RootPlan { binds, moved, covered, files, directories, links }
}

fn present(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// A whole home directory, or the root, is never shared, whatever a `.pth` file says.
fn may_be_shared(path: &Path) -> bool {
    let depth = path.components().count();
    let is_home = std::env::var_os("HOME").is_some_and(|home| Path::new(&home).starts_with(path));
    // Somebody else's home, where sudo or a service made HOME another.
    let a_home = path.parent() == Some(Path::new("/home"));
    let kernel = ["/proc", "/sys", "/dev", "/run", "/boot", "/etc", "/tmp", "/home", "/root", "/var"]
        .iter()
        .any(|p| path == Path::new(p));
    path.is_absolute() && depth > 1 && !is_home && !a_home && !kernel
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_the_home_and_the_kernels_trees_are_never_shared() {
        for path in ["/", "/proc", "/etc", "/home", "/home/somebody", "/tmp", "relative"] {
            assert!(!may_be_shared(Path::new(path)), "{path}");
        }
        if let Some(home) = std::env::var_os("HOME") {
            assert!(!may_be_shared(Path::new(&home)));
            assert!(may_be_shared(&Path::new(&home).join("venv")));
        }
    }

    #[test]
    fn what_lies_below_a_shared_directory_is_not_shared_twice() {
        let plan = plan(&["/usr/lib/python3".into(), "/usr".into()], None, Vec::new());
        assert_eq!(plan.binds.iter().filter(|p| p.starts_with("/usr")).count(), 1);
    }
}
