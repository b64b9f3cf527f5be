//! Debian packages by the machine's own apt: its sources, keys and proxies, but private lists, caches and an empty list
//! of installed packages. So nothing on the machine changes, no root is needed, and a closure is a whole one.
//! apt checks signatures and hashes; no maintainer script is ever run.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, SystemTime},
};

use rustix::fs::FlockOperation;

/// Why packages could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AptError {
    /// The program is not there.
    #[error("this machine has no {0}")]
    NoProgram(&'static str),
    /// A program could not be run.
    #[error("cannot run {0}")]
    Run(&'static str, #[source] io::Error),
    /// The package lists could not be fetched.
    #[error("cannot fetch the package lists: {0}")]
    Lists(String),
    /// No such package.
    #[error("the package sources of this machine have no package {0}")]
    NoPackage(String),
    /// Packages could not be chosen or fetched.
    #[error("apt failed: {0}")]
    Failed(String),
    /// A package could not be unpacked.
    #[error("cannot unpack {package}: {reason}")]
    Unpack {
        /// Its file.
        package: String,
        /// The words of `dpkg-deb`.
        reason: String,
    },
    /// The machine's sources name no Debian mirror.
    #[error("the package sources of this machine name no Debian mirror")]
    NoMirror,
    /// apt's private directory.
    #[error("cannot use {0}")]
    Directory(PathBuf, #[source] io::Error),
}

impl AptError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            AptError::NoProgram(_) => Some(
                "packages need a Debian or a derivative; elsewhere use --rootfs DIR with --kernel FILE, or assemble on such a machine and copy the cache directory",
            ),
            AptError::Lists(_) => {
                Some("is there a network? `apt-get update` shows whether this machine's package sources answer")
            }
            AptError::NoPackage(_) => Some("`apt-cache policy NAME` shows what this machine's package sources have"),
            AptError::Directory(_, error) if error.kind() == io::ErrorKind::StorageFull => {
                Some("the disk is full; the cache directory can be moved with XDG_CACHE_HOME")
            }
            _ => None,
        }
    }
}

/// A package as apt chose it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Package {
    /// `libc6`
    pub name: String,
    /// `2.36-9+deb12u14`
    pub version: String,
    /// `amd64` or `all`
    pub architecture: String,
}

impl Package {
    /// Its file in apt's cache.
    fn file_name(&self) -> String {
        format!("{}_{}_{}.deb", self.name, self.version.replace(':', "%3a"), self.architecture)
    }
}

/// apt with a private directory, which is locked while apt runs in it.
#[derive(Debug)]
pub struct Apt {
    dir: PathBuf,
    sources: Option<PathBuf>,
}

impl Apt {
    /// With the machine's own sources.
    pub fn machine(dir: &Path) -> Result<Apt, AptError> {
        Apt::new(dir, None)
    }

    /// With these suites, such as `bookworm-backports`, of the Debian mirror that the machine's sources name.
    pub fn suites(dir: &Path, suites: &[&str]) -> Result<Apt, AptError> {
        Apt::of_mirror(dir, "deb", suites)
    }

    /// With the source packages of this suite of that mirror.
    pub fn source_suite(dir: &Path, suite: &str) -> Result<Apt, AptError> {
        Apt::of_mirror(dir, "deb-src", &[suite])
    }

    fn of_mirror(dir: &Path, kind: &str, suites: &[&str]) -> Result<Apt, AptError> {
        let mirror = mirror().ok_or(AptError::NoMirror)?;
        let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let line = |suite: &&str| format!("{kind} [signed-by={keyring}] {mirror} {suite} main\n");
        Apt::new(dir, Some(suites.iter().map(line).collect()))
    }

    fn new(dir: &Path, sources: Option<String>) -> Result<Apt, AptError> {
        let at = |error| AptError::Directory(dir.to_owned(), error);
        for part in ["lists/partial", "archives/partial", "state"] {
            fs::create_dir_all(dir.join(part)).map_err(at)?;
        }
        // "Installed packages: none".
        fs::write(dir.join("state/status"), "").map_err(at)?;
        let sources = match sources {
            Some(text) => {
                let path = dir.join("sources.list");
                fs::write(&path, text).map_err(at)?;
                Some(path)
            }
            None => None,
        };
        Ok(Apt { dir: dir.to_owned(), sources })
    }

    /// Fetches the package lists when they are older than `age`. Old lists are good enough when the network is down.
    pub fn refresh(&self, age: Duration) -> Result<(), AptError> {
        let stamp = self.dir.join("lists-fetched");
        let known = fs::metadata(&stamp).and_then(|meta| meta.modified()).ok();
        let fresh = |then: SystemTime| SystemTime::now().duration_since(then).is_ok_and(|passed| passed < age);
        if known.is_some_and(fresh) {
            return Ok(());
        }
        let output = self.run("apt-get", &["-q", "-o", "APT::Update::Error-Mode=any", "update"])?;
        if output.status.success() {
            return fs::write(&stamp, "").map_err(|error| AptError::Directory(stamp, error));
        }
        if known.is_some() { Ok(()) } else { Err(AptError::Lists(complaint(&output))) }
    }

    /// The packages and all that they depend on (not what they recommend), sorted by name.
    pub fn closure(&self, packages: &[&str]) -> Result<Vec<Package>, AptError> {
        let mut args = vec!["-s", "-y", "--no-install-recommends", "install"];
        args.extend(packages);
        let output = self.run("apt-get", &args)?;
        if !output.status.success() {
            let text = complaint(&output);
            let missing =
                text.split("Unable to locate package ").nth(1).and_then(|rest| rest.split_whitespace().next());
            let missing = missing.or_else(|| text.split("Package '").nth(1).and_then(|rest| rest.split('\'').next()));
            return Err(missing.map_or(AptError::Failed(text.clone()), |name| AptError::NoPackage(name.to_owned())));
        }
        let mut closure: Vec<Package> =
            String::from_utf8_lossy(&output.stdout).lines().filter_map(parse_simulated).collect();
        closure.sort();
        Ok(closure)
    }

    /// Fetches these very packages into the cache and gives their files, in the same order.
    pub fn fetch(&self, packages: &[Package]) -> Result<Vec<PathBuf>, AptError> {
        let archives = self.dir.join("archives");
        let files: Vec<PathBuf> = packages.iter().map(|package| archives.join(package.file_name())).collect();
        let missing: Vec<String> = packages
            .iter()
            .zip(&files)
            .filter(|(_, file)| !file.exists())
            .map(|(package, _)| format!("{}={}", package.name, package.version))
            .collect();
        if !missing.is_empty() {
            // `download` writes to the working directory; a name appears only when the file is whole and its hash right.
            let mut args = vec!["-q", "download"];
            args.extend(missing.iter().map(String::as_str));
            let output = self.run("apt-get", &args)?;
            if !output.status.success() {
                return Err(AptError::Failed(complaint(&output)));
            }
        }
        match files.iter().find(|file| !file.exists()) {
            Some(file) => Err(AptError::Failed(format!("{} was not fetched", file.display()))),
            None => Ok(files),
        }
    }

    /// Fetches the upstream archive `file` of a source package into the cache.
    pub fn fetch_source(&self, package: &str, file: &str) -> Result<PathBuf, AptError> {
        let path = self.dir.join("archives").join(file);
        if !path.exists() {
            let output = self.run("apt-get", &["-q", "--download-only", "--tar-only", "source", package])?;
            if !output.status.success() {
                return Err(AptError::Failed(complaint(&output)));
            }
        }
        if path.exists() { Ok(path) } else { Err(AptError::Failed(format!("the source of {package} has no {file}"))) }
    }

    /// The package of this name alone, without what it depends on.
    pub fn candidate(&self, name: &str) -> Result<Package, AptError> {
        let fields = self.fields(name)?;
        let field = |key: &str| fields.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
        match (field("Version"), field("Architecture")) {
            (Some(version), Some(architecture)) => Ok(Package { name: name.to_owned(), version, architecture }),
            _ => Err(AptError::NoPackage(name.to_owned())),
        }
    }

    /// The first package that the package `name` depends on: what a meta package stands for.
    pub fn stands_for(&self, name: &str) -> Result<String, AptError> {
        let fields = self.fields(name)?;
        let depends = fields.iter().find(|(key, _)| key == "Depends").map(|(_, value)| value.as_str());
        let first = depends.and_then(|list| list.split([',', ' ', '|']).next());
        first.map(str::to_owned).ok_or_else(|| AptError::NoPackage(name.to_owned()))
    }

    fn fields(&self, name: &str) -> Result<Vec<(String, String)>, AptError> {
        let output = self.run("apt-cache", &["--no-all-versions", "show", name])?;
        if !output.status.success() {
            return Err(AptError::NoPackage(name.to_owned()));
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.lines().filter_map(|line| line.split_once(": ")).map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
    }

    fn run(&self, program: &'static str, args: &[&str]) -> Result<Output, AptError> {
        let mut command = Command::new(program);
        let mut set = |key: &str, value: &Path| {
            let mut option = std::ffi::OsString::from(key);
            option.push("=");
            option.push(value);
            command.arg("-o").arg(option);
        };
        set("Dir::State", &self.dir.join("state"));
        set("Dir::State::status", &self.dir.join("state/status"));
        set("Dir::State::Lists", &self.dir.join("lists"));
        set("Dir::Cache", &self.dir);
        set("Dir::Cache::archives", &self.dir.join("archives"));
        if let Some(sources) = &self.sources {
            set("Dir::Etc::SourceList", sources);
            set("Dir::Etc::SourceParts", Path::new("/dev/null"));
        }
        // Our own lock guards the directory; dpkg's is root's. apt's own unprivileged user cannot write to a directory
        // below /root, and would only complain.
        for option in ["Debug::NoLocking=1", "APT::Sandbox::User=root", "Dpkg::Use-Pty=0"] {
            command.args(["-o", option]);
        }
        command.args(args).current_dir(self.dir.join("archives")).stdin(Stdio::null());
        command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        let at = |error| AptError::Directory(self.dir.clone(), error);
        // Unlocked when it is closed.
        let lock = File::create(self.dir.join("lock")).map_err(at)?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).map_err(|error| at(error.into()))?;
        command.output().map_err(failed_to_run(program))
    }
}

/// Unpacks a package's files into a directory, but for those that match a pattern of `tar --exclude`. Symbolic links to
/// directories that are there already stay (a merged `/usr`).
pub fn unpack(package: &Path, into: &Path, exclude: &[&str]) -> Result<(), AptError> {
    let mut tar = Command::new("tar");
    tar.args(["-x", "-p", "--no-same-owner", "--keep-directory-symlink", "--anchored", "--wildcards"]);
    tar.args(exclude.iter().map(|pattern| format!("--exclude=./{pattern}"))).arg("-C").arg(into);
    through_tar(package, tar).map(|_| ())
}

/// The bytes of a package's files whose path matches the pattern.
pub fn read_file(package: &Path, pattern: &str) -> Result<Vec<u8>, AptError> {
    let mut tar = Command::new("tar");
    tar.args(["-x", "-O", "--wildcards"]).arg(format!("./{pattern}"));
    through_tar(package, tar)
}

/// `dpkg-deb -x` would replace symbolic links by directories, and writes files only.
fn through_tar(package: &Path, mut tar: Command) -> Result<Vec<u8>, AptError> {
    let name = || package.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut deb = Command::new("dpkg-deb");
    deb.arg("--fsys-tarfile").arg(package).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut deb = deb.spawn().map_err(failed_to_run("dpkg-deb"))?;
    let archive = deb.stdout.take().map_or(Stdio::null(), Stdio::from);
    let tar = tar.stdin(archive).output().map_err(failed_to_run("tar"));
    // First the end of dpkg-deb, whatever became of tar.
    let deb = deb.wait_with_output().map_err(failed_to_run("dpkg-deb"))?;
    let tar = tar?;
    // When tar cannot write, dpkg-deb only learns that nobody reads.
    let order = if complaint(&deb).contains("Broken pipe") { [&tar, &deb] } else { [&deb, &tar] };
    for output in order {
        if !output.status.success() {
            return Err(AptError::Unpack { package: name(), reason: complaint(output) });
        }
    }
    Ok(tar.stdout)
}

fn failed_to_run(program: &'static str) -> impl Fn(io::Error) -> AptError {
    move |error| match error.kind() {
        io::ErrorKind::NotFound => AptError::NoProgram(program),
        _ => AptError::Run(program, error),
    }
}

/// `Inst libc6 (2.36-9+deb12u14 Debian:12.12/oldstable [amd64]) []`
fn parse_simulated(line: &str) -> Option<Package> {
    let rest = line.strip_prefix("Inst ")?;
    let (name, rest) = rest.split_once(' ')?;
    let version = rest.strip_prefix('(')?.split(' ').next()?;
    let architecture = rest.split('[').nth(1)?.split(']').next()?;
    Some(Package { name: name.to_owned(), version: version.to_owned(), architecture: architecture.to_owned() })
}

/// The error lines of a program, on one line.
fn complaint(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("E:") || line.starts_with("Err:")).collect();
    let lines = if errors.is_empty() { text.lines().collect() } else { errors };
    let text = lines.iter().take(6).map(|line| line.trim_start_matches("E: ").trim()).collect::<Vec<_>>().join("; ");
    if text.is_empty() { output.status.to_string() } else { text }
}

/// The first Debian mirror in the machine's sources, not the one for security updates.
fn mirror() -> Option<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(parts) = fs::read_dir("/etc/apt/sources.list.d") {
        let mut parts: Vec<PathBuf> = parts.filter_map(|part| part.ok().map(|part| part.path())).collect();
        parts.sort();
        files.extend(parts.into_iter().filter(|path| path.extension().is_some_and(|e| e == "list" || e == "sources")));
    }
    files.iter().filter_map(|path| fs::read_to_string(path).ok()).find_map(|text| mirror_in(&text))
}

fn mirror_in(sources: &str) -> Option<String> {
    let lines = sources.lines().map(str::trim).filter(|line| line.starts_with("deb ") || line.starts_with("URIs:"));
    let mut words = lines.flat_map(str::split_whitespace);
    let debian = |word: &str| word.trim_end_matches('/').ends_with("/debian");
    words.find(|word| word.contains("://") && debian(word)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_simulated_installation_names_versions() {
        let package = parse_simulated("Inst libattr1 (1:2.5.1-4 Debian:12.12/oldstable [amd64])").unwrap();
        assert_eq!(package.file_name(), "libattr1_1%3a2.5.1-4_amd64.deb");
        let package = parse_simulated("Inst tzdata (2026f-0 Debian:12/stable, Debian-Security:12/x [all]) []").unwrap();
        assert_eq!((package.version.as_str(), package.architecture.as_str()), ("2026f-0", "all"));
        assert_eq!(parse_simulated("Conf libc6 (2.36 Debian [amd64])"), None);
        assert_eq!(parse_simulated("Inst "), None);
    }

    #[test]
    fn the_mirror_is_the_one_of_the_archive() {
        let list = "# deb http://old/debian x\ndeb [arch=amd64] http://sec.example/debian-security b main\ndeb http://m.example/debian bookworm main\n";
        assert_eq!(mirror_in(list).unwrap(), "http://m.example/debian");
        let deb822 = "Types: deb\nURIs: http://m.example/pub/debian/\nSuites: bookworm\n";
        assert_eq!(mirror_in(deb822).unwrap(), "http://m.example/pub/debian/");
        assert_eq!(mirror_in("deb http://other.example/ubuntu noble main"), None);
    }
}
