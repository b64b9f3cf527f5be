//! Finding the host's own runtimes.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::remembered;

/// An interpreter of this host and what it needs.
#[derive(Clone, Debug)]
pub struct HostRuntime {
    /// `python` or `node`.
    pub language: &'static str,
    /// Absolute path of the program itself, behind links and shims.
    pub interpreter: PathBuf,
    /// Such as `Python 3.11.7`.
    pub version: String,
    /// Directories that it and its packages live in.
    pub paths: Vec<PathBuf>,
    /// A virtualenv's own directories of packages; none for another Python.
    pub site: Vec<PathBuf>,
}

/// Where each sandbox has its own file systems: what the host has there is not visible in it.
const COVERED: [&str; 5] = ["/tmp", "/home/sandbox", "/dev", "/proc", "/sys"];

/// Why no runtime was found.
#[derive(Debug, thiserror::Error)]
pub enum DiscoverError {
    /// Not on the search path.
    #[error("this machine has no {0}")]
    NotFound(&'static str),
    /// The program could not be started.
    #[error("cannot run {}", .0.display())]
    Run(PathBuf, #[source] std::io::Error),
    /// A directory that is not a virtualenv.
    #[error("{} holds no bin/python", .0.display())]
    NoPython(PathBuf),
    /// It lies where a sandbox has something else.
    #[error("{} cannot be used: a sandbox has its own {}", .path.display(), .place)]
    Covered {
        /// What it needs.
        path: PathBuf,
        /// The place.
        place: &'static str,
    },
    /// It ran, but is not what it should be.
    #[error("{} is not a usable {}: {}", .path.display(), .language, .reason)]
    Unusable {
        /// The program.
        path: PathBuf,
        /// What it was taken for.
        language: &'static str,
        /// Its own words.
        reason: String,
    },
}

impl DiscoverError {
    /// What the user can do.
    pub fn hint(&self) -> String {
        match self {
            DiscoverError::NotFound("python") => {
                "install one (Debian: apt-get install python3), or name one with --python PATH".into()
            }
            DiscoverError::NotFound(_) => {
                "install Node.js 18 or newer (Debian: apt-get install nodejs), or name one with --node PATH".into()
            }
            DiscoverError::NoPython(_) => {
                "--python takes an interpreter or a virtualenv's directory (`python3 -m venv DIR` makes one)".into()
            }
            DiscoverError::Covered { .. } => {
                "make the virtualenv elsewhere, such as in your home directory; it cannot be moved".into()
            }
            DiscoverError::Run(..) | DiscoverError::Unusable { .. } => {
                "name an interpreter (or a virtualenv's bin/python) with --python PATH or --node PATH".into()
            }
        }
    }
}

/// Prints the version, the program itself, and a path a line: `=` what it cannot do without, `+` what else it has, `@` a
/// virtualenv's packages.
const ASK_PYTHON: &str = "import sys, os
assert sys.version_info >= (3, 9), 'Python 3.9 or newer is needed, this is ' + sys.version.split()[0]
print('Python ' + sys.version.split()[0])
print(sys.executable)
for p in [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix]:
    print('=' + os.path.abspath(p)); print('=' + os.path.realpath(p))
print('=' + os.path.realpath(sys.executable))
for p in sys.path:
    if p and os.path.isdir(p):
        print('+' + os.path.abspath(p)); print('+' + os.path.realpath(p))
if sys.prefix != sys.base_prefix:
    for p in sys.path:
        if p.startswith(sys.prefix + os.sep) and os.path.isdir(p):
            print('@' + p)
";
const ASK_NODE: &str = "const v = process.versions.node.split('.')[0];
if (v < 18) { console.error('Node.js 18 or newer is needed, this is ' + process.version); process.exit(1); }
console.log('Node ' + process.version); console.log(process.execPath); console.log('=' + require('path').dirname(process.execPath));";

/// The Python at `path`, which may be a virtualenv's directory, else the first on the search path.
pub fn python(path: Option<&Path>) -> Result<HostRuntime, DiscoverError> {
    let program = find("python", path, &["python3", "python"])?;
    // A virtualenv is told apart by the path it is started with, so links are not resolved.
    ask("python", program, &["-E", "-s", "-c", ASK_PYTHON])
}

/// The Node at `path`, else the first on the search path.
pub fn node(path: Option<&Path>) -> Result<HostRuntime, DiscoverError> {
    ask("node", find("node", path, &["node", "nodejs"])?, &["-e", ASK_NODE])
}

fn find(language: &'static str, given: Option<&Path>, names: &[&str]) -> Result<PathBuf, DiscoverError> {
    if let Some(path) = given {
        if language == "python" && path.is_dir() {
            let inside = ["bin/python3", "bin/python"].map(|name| path.join(name)).into_iter().find(|p| p.is_file());
            return inside.ok_or_else(|| DiscoverError::NoPython(path.to_owned()));
        }
        return Ok(path.to_owned());
    }
    let search = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&search)
        .flat_map(|dir| names.iter().map(move |name| dir.join(name)))
        .find(|candidate| candidate.is_file())
        .map(|candidate| remembered::behind_shim(&candidate).unwrap_or(candidate))
        .ok_or(DiscoverError::NotFound(language))
}

fn ask(language: &'static str, program: PathBuf, args: &[&str]) -> Result<HostRuntime, DiscoverError> {
    let unusable = |reason: String| DiscoverError::Unusable { path: program.clone(), language, reason };
    let text = remembered::said(&program, args, || {
        let output = Command::new(&program).args(args).stdin(Stdio::null()).output();
        let output = output.map_err(|error| DiscoverError::Run(program.clone(), error))?;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            return Err(unusable(words.trim().lines().last().unwrap_or("it failed").to_owned()));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    })?;
    let mut lines = text.lines();
    match (lines.next(), lines.next()) {
        (Some(version), Some(interpreter)) if Path::new(interpreter).is_absolute() => {
            let (mut paths, mut site) = (Vec::new(), Vec::new());
            // The interpreter may stand outside its prefix (a link in another directory).
            let mut needed = vec![PathBuf::from(interpreter)];
            for line in lines {
                match line.split_at_checked(1) {
                    Some(("=", path)) => needed.push(path.into()),
                    Some(("+", path)) => paths.push(path.into()),
                    Some(("@", path)) => site.push(path.into()),
                    _ => return Err(unusable("it did not say what it needs".into())),
                }
            }
            for path in &needed {
                if let Some(place) = COVERED.into_iter().find(|place| path.starts_with(place)) {
                    return Err(DiscoverError::Covered { path: path.clone(), place });
                }
            }
            paths.splice(0..0, needed);
            paths.dedup();
            Ok(HostRuntime { language, interpreter: interpreter.into(), version: version.into(), paths, site })
        }
        _ => Err(unusable("it did not say where it is".into())),
    }
}
