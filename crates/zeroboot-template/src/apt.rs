//! Debian packages by the machine's own apt: its sources, keys and proxies, but private lists, caches and an empty list
//! of installed packages. So nothing on the machine changes, no root is needed, and a closure is a whole one.
//! apt checks signatures and hashes; no maintainer script is ever run.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{ChildStdout, Command, Output, Stdio},
    time::{Duration, SystemTime},
};

use rustix::fs::FlockOperation;

use crate::unpack::{self, Root};

/// Bytes of a file that is read out of a package: a kernel has some ten million.
const MOST_BYTES: u64 = 1 << 30;

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
        /// Why.
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

/// Unpacks all files of a package into a directory, as the caller's own.
pub fn unpack_into(package: &Path, dir: &Path) -> Result<(), AptError> {
    let mut root = Root::of(dir).map_err(|error| AptError::Directory(dir.to_owned(), error))?;
    unpack(package, &mut root, &[])
}

/// Unpacks a package's files into a tree, but for those that match a pattern of [`unpack::matches`].
pub(crate) fn unpack(package: &Path, into: &mut Root, exclude: &[&str]) -> Result<(), AptError> {
    archive(package, |archive| into.unpack(archive, exclude))
}

/// The bytes of the package's file whose path matches the pattern; of the last, if several do.
pub fn read_file(package: &Path, pattern: &str) -> Result<Vec<u8>, AptError> {
    let mut bytes = None;
    archive(package, |archive| {
        for entry in tar::Archive::new(archive).entries()? {
            let mut entry = entry?;
            let path = PathBuf::from(OsStr::from_bytes(&entry.path_bytes()));
            if entry.header().entry_type().is_file() && unpack::matches(pattern, &path) {
                let mut read = Vec::new();
                (&mut entry).take(MOST_BYTES).read_to_end(&mut read)?;
                bytes = Some(read);
            }
        }
        Ok(())
    })?;
    bytes.ok_or_else(|| AptError::Unpack { package: file_name(package), reason: format!("it has no {pattern}") })
}

/// Gives the archive of a package's files to a reader. `dpkg-deb` decompresses it and writes no file.
fn archive(package: &Path, read: impl FnOnce(&mut ChildStdout) -> io::Result<()>) -> Result<(), AptError> {
    let refused = |reason: String| AptError::Unpack { package: file_name(package), reason };
    let mut deb = Command::new("dpkg-deb");
    deb.arg("--fsys-tarfile").arg(package).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut deb = deb.spawn().map_err(failed_to_run("dpkg-deb"))?;
    let result = match deb.stdout.take() {
        Some(mut archive) => {
            let result = read(&mut archive);
            // The padding behind the archive's end: dpkg-deb is not to fail over it.
            result.and_then(|()| io::copy(&mut archive, &mut io::sink()).map(drop))
        }
        None => Ok(()),
    };
    // First the end of dpkg-deb, whatever became of its archive.
    let deb = deb.wait_with_output().map_err(failed_to_run("dpkg-deb"))?;
    match result {
        // When nobody reads on, dpkg-deb only learns of that; a broken package it can name.
        Err(_) if !deb.status.success() && !complaint(&deb).contains("Broken pipe") => Err(refused(complaint(&deb))),
        Err(error) => Err(refused(error.to_string())),
        Ok(()) if !deb.status.success() => Err(refused(complaint(&deb))),
        Ok(()) => Ok(()),
    }
}

fn file_name(package: &Path) -> String {
    package.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
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

    /// A package with what `fill` puts into its directory.
    fn package(dir: &Path, name: &str, fill: impl FnOnce(&Path)) -> PathBuf {
        let root = dir.join(name);
        fs::create_dir_all(root.join("DEBIAN")).unwrap();
        let control = format!("Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n");
        fs::write(root.join("DEBIAN/control"), control).unwrap();
        fill(&root);
        let file = dir.join(format!("{name}.deb"));
        let output = Command::new("dpkg-deb").arg("--build").args([&root, &file]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        file
    }

    #[test]
    fn two_packages_together_write_nothing_outside_of_the_tree() {
        let dir = tempfile::tempdir().unwrap();
        let (host, top) = (dir.path().join("host"), dir.path().join("top"));
        fs::create_dir(&host).unwrap();
        fs::create_dir(&top).unwrap();
        let first = package(dir.path(), "first", |root| {
            fs::create_dir_all(root.join("usr/share")).unwrap();
            std::os::unix::fs::symlink(&host, root.join("usr/share/data")).unwrap();
        });
        let second = package(dir.path(), "second", |root| {
            fs::create_dir_all(root.join("usr/share/data")).unwrap();
            fs::write(root.join("usr/share/data/evil"), "evil").unwrap();
        });
        let mut tree = Root::new(&top).unwrap();
        unpack(&first, &mut tree, &[]).unwrap();
        // The link leads to nothing in the tree, or to a directory of the tree: never to the host's.
        let refused = unpack(&second, &mut tree, &[]).unwrap_err();
        assert!(matches!(&refused, AptError::Unpack { package, .. } if package == "second.deb"), "{refused}");
        tree.directory(&host, 0o755).unwrap();
        unpack(&second, &mut tree, &[]).unwrap();
        assert_eq!(fs::read_dir(&host).unwrap().count(), 0);
        assert_eq!(read_file(&second, "usr/share/*/evil").unwrap(), b"evil");
    }

    #[test]
    fn a_broken_package_is_named_with_what_dpkg_says() {
        let dir = tempfile::tempdir().unwrap();
        let broken = dir.path().join("broken.deb");
        fs::write(&broken, "!<arch>\nnonsense").unwrap();
        let refused = read_file(&broken, "boot/vmlinuz-*").unwrap_err().to_string();
        assert!(refused.starts_with("cannot unpack broken.deb: dpkg-deb: error"), "{refused}");
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
