//! Packages for the process engine: virtualenvs and `node_modules` that are made once, in the cache.
//!
//! ```text
//! CACHE/environments/LANGUAGE-KEY/          KEY: a hash of the interpreter and the list of packages
//!   venv/ or node_modules/                  made in its final place: scripts hold their absolute path
//!   complete                                written last; without it the directory is made anew
//! CACHE/environments/LANGUAGE-KEY.lock      exclusive while it is made or removed, shared while it is used
//! ```

use std::{
    fs::{self, File, Permissions},
    io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use rustix::fs::{FlockOperation, flock};

use crate::discover::{self, DiscoverError, HostRuntime};

/// Changes when an environment is made in another way.
const FORMAT: &[u8] = b"zeroboot environment 1";
/// How long an environment stays that nobody uses.
const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);
const COMPLETE: &str = "complete";

/// Why an environment was not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnvironmentError {
    /// What would be an option of pip's or npm's.
    #[error("{0:?} is not the name of a package")]
    Name(String),
    /// pip or npm is not there.
    #[error("{0} was not found, and packages were asked for")]
    NoProgram(&'static str),
    /// pip or npm failed.
    #[error("{program} could not install {packages}: {reason}")]
    Program {
        /// Which.
        program: &'static str,
        /// What it was asked for.
        packages: String,
        /// Its own words.
        reason: String,
    },
    /// What was made cannot be used.
    #[error("the environment that was made cannot be used")]
    Unusable(#[source] DiscoverError),
    /// The cache.
    #[error("cannot {what} {}", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl EnvironmentError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            EnvironmentError::Name(_) => "give names as pip or npm takes them, such as pandas or lodash@4".into(),
            EnvironmentError::NoProgram("pip") => {
                "`apt-get install python3-pip python3-venv`, or name a Python that has pip with --python".into()
            }
            EnvironmentError::NoProgram(_) => "install npm (Debian: `apt-get install npm`)".into(),
            EnvironmentError::Program { program: "pip", .. } => {
                "the packages come from where this machine's pip takes them; only wheels are installed".into()
            }
            EnvironmentError::Program { .. } => {
                "the packages come from where this machine's npm takes them; install scripts are not run".into()
            }
            EnvironmentError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                "the disk is full; XDG_CACHE_HOME moves the cache directory".into()
            }
            EnvironmentError::Unusable(error) => error.hint(),
            EnvironmentError::Io { .. } => return None,
        })
    }
}

/// A virtualenv of `base` with these packages (as `pip install` takes them), made now unless it is there. What `base`
/// itself has is visible behind them. `progress` is told what takes a while.
pub fn python_environment(
    base: &HostRuntime,
    packages: &[String],
    cache: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<HostRuntime, EnvironmentError> {
    let dir = ensure(base, packages, cache, progress, |dir, list| make_venv(base, dir, list))?;
    discover::python(Some(&dir.join("venv"))).map_err(EnvironmentError::Unusable)
}

/// A `node_modules` with these packages (as `npm install` takes them), made now unless it is there.
pub fn node_environment(
    node: &HostRuntime,
    packages: &[String],
    cache: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<PathBuf, EnvironmentError> {
    let dir = ensure(node, packages, cache, progress, |dir, list| npm_install(node, dir, list))?;
    Ok(dir.join("node_modules"))
}

/// The directory of an environment, complete, and locked against removal until this process ends.
fn ensure(
    runtime: &HostRuntime,
    packages: &[String],
    cache: &Path,
    progress: &mut dyn FnMut(&str),
    make: impl FnOnce(&Path, &[String]) -> Result<(), EnvironmentError>,
) -> Result<PathBuf, EnvironmentError> {
    // Never an option, and never a path: what is in it may change.
    let named = |name: &&String| !name.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '@');
    if let Some(name) = packages.iter().find(named) {
        return Err(EnvironmentError::Name(name.clone()));
    }
    let mut list = packages.to_vec();
    list.sort();
    list.dedup();
    let all = cache.join("environments");
    fs::create_dir_all(&all).map_err(failed("make", &all))?;
    let dir = all.join(format!("{}-{}", runtime.language, key(runtime, &list)));
    let lock_path = dir.with_extension("lock");
    let is_there = || dir.join(COMPLETE).exists();

    let mut waits = false;
    let lock = loop {
        // Waits for a maker. Whoever uses an environment keeps a lock of this kind.
        let shared = lock_on(&lock_path, FlockOperation::LockShared)?;
        if is_there() {
            break shared;
        }
        drop(shared);
        let lock = match lock_on(&lock_path, FlockOperation::NonBlockingLockExclusive) {
            Err(EnvironmentError::Io { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {
                if !std::mem::replace(&mut waits, true) {
                    progress("another process is making this environment; waiting for it");
                }
                // Or it is another that only looked: two that look at once must not go on refusing each other.
                std::thread::sleep(Duration::from_millis(5));
                continue;
            }
            other => other?,
        };
        if !is_there() {
            progress(&format!("installing {} for {}, once", list.join(", "), runtime.version));
            // What a maker left that was killed.
            remove(&dir)?;
            fs::create_dir(&dir).map_err(failed("make", &dir))?;
            make(&dir, &list)?;
            readable_by_all(&dir).map_err(failed("make readable", &dir))?;
            let complete = dir.join(COMPLETE);
            fs::write(dir.join("packages"), list.join("\n")).map_err(failed("write", &dir))?;
            File::create(&complete).and_then(|file| file.sync_all()).map_err(failed("write", &complete))?;
            prune(&all, &dir);
        }
        flock(&lock, FlockOperation::LockShared).map_err(|e| failed("lock", &lock_path)(e.into()))?;
        break lock;
    };
    // When it was used last, for `prune`.
    let now = SystemTime::now();
    let touched = File::open(dir.join(COMPLETE)).and_then(|file| file.set_modified(now));
    touched.map_err(failed("write", &dir))?;
    IN_USE.lock().unwrap_or_else(PoisonError::into_inner).push(lock);
    Ok(dir)
}

/// Locks of the environments that this process uses.
static IN_USE: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// Names what was asked for.
fn key(runtime: &HostRuntime, list: &[String]) -> String {
    let mut hasher = blake3::Hasher::new();
    let interpreter = runtime.interpreter.as_os_str().as_encoded_bytes();
    let parts = [FORMAT, runtime.version.as_bytes(), interpreter];
    for part in parts.into_iter().chain(list.iter().map(String::as_bytes)) {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

/// Opens and locks the file. Whoever removes an environment removes its lock, too: then the lock is on no file any more.
fn lock_on(path: &Path, operation: FlockOperation) -> Result<File, EnvironmentError> {
    loop {
        let file = File::options().create(true).append(true).open(path).map_err(failed("open", path))?;
        rustix::io::retry_on_intr(|| flock(&file, operation)).map_err(|e| failed("lock", path)(e.into()))?;
        let held = file.metadata().map_err(failed("look at", path))?;
        if fs::metadata(path).is_ok_and(|there| there.ino() == held.ino() && there.dev() == held.dev()) {
            return Ok(file);
        }
    }
}

/// Removes environments that nobody used for long and nobody uses now. What fails is tried again the next time.
fn prune(all: &Path, made: &Path) {
    let Ok(entries) = fs::read_dir(all) else { return };
    for dir in entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir() && path != made) {
        let used = fs::metadata(dir.join(COMPLETE)).or_else(|_| fs::metadata(&dir)).and_then(|file| file.modified());
        let old = used.is_ok_and(|used| used.elapsed().is_ok_and(|age| age > KEPT));
        let path = dir.with_extension("lock");
        if old && let Ok(_lock) = lock_on(&path, FlockOperation::NonBlockingLockExclusive) {
            // First, so that a removal that is interrupted leaves nothing that looks whole.
            let removed = fs::remove_file(dir.join(COMPLETE)).and_then(|()| fs::remove_dir_all(&dir));
            if removed.is_ok() {
                fs::remove_file(&path).ok();
            }
        }
    }
}

fn remove(dir: &Path) -> Result<(), EnvironmentError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", dir)(error)),
        _ => Ok(()),
    }
}

/// A virtualenv without pip of its own, filled by the pip of its base or of this machine.
fn make_venv(base: &HostRuntime, dir: &Path, list: &[String]) -> Result<(), EnvironmentError> {
    let venv = dir.join("venv");
    let mut command = Command::new(&base.interpreter);
    command.args(["-E", "-s", "-m", "venv", "--without-pip"]).arg(&venv);
    run("python3 -m venv", list, &mut command)?;
    let python = venv.join("bin/python");
    let own = Command::new(&base.interpreter)
        .args(["-m", "pip", "--version"])
        .stdin(Stdio::null())
        .output()
        .is_ok_and(|output| output.status.success());
    let mut pip = if own { Command::new(&base.interpreter) } else { Command::new("pip3") };
    if own {
        pip.args(["-m", "pip"]);
    }
    pip.arg("--python").arg(&python);
    pip.args(["install", "--quiet", "--no-input", "--disable-pip-version-check", "--only-binary=:all:"]);
    pip.arg("--").args(list);
    run("pip", list, &mut pip)?;
    // Only now: pip must not take what the base has for installed, because the base may change.
    if base.site.is_empty() {
        let config = venv.join("pyvenv.cfg");
        let text = fs::read_to_string(&config).map_err(failed("read", &config))?;
        let text = text.replace("include-system-site-packages = false", "include-system-site-packages = true");
        return fs::write(&config, text).map_err(failed("write", &config));
    }
    // The base is a virtualenv, whose packages a virtualenv of its interpreter does not see.
    let minor = base.version.rsplit(' ').next().unwrap_or_default().rsplit_once('.').map_or("", |(minor, _)| minor);
    let link = venv.join(format!("lib/python{minor}/site-packages/zeroboot_base.pth"));
    let lines: String = base.site.iter().map(|path| format!("{}\n", path.display())).collect();
    fs::write(&link, lines).map_err(failed("write", &link))
}

fn npm_install(node: &HostRuntime, dir: &Path, list: &[String]) -> Result<(), EnvironmentError> {
    let beside = node.interpreter.with_file_name("npm");
    let mut npm = Command::new(if beside.exists() { &beside } else { Path::new("npm") });
    npm.args(["install", "--no-save", "--ignore-scripts", "--omit=dev", "--no-audit", "--no-fund", "--loglevel=error"]);
    npm.arg("--prefix").arg(dir).arg("--").args(list).current_dir(dir);
    run("npm", list, &mut npm)
}

fn run(program: &'static str, list: &[String], command: &mut Command) -> Result<(), EnvironmentError> {
    match command.stdin(Stdio::null()).output() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(EnvironmentError::NoProgram(if program == "npm" { "npm" } else { "pip" }))
        }
        Err(source) => Err(EnvironmentError::Io { what: "run", path: program.into(), source }),
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let (packages, reason) = (list.join(", "), last_lines(&output));
            Err(EnvironmentError::Program { program, packages, reason })
        }
    }
}

fn last_lines(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let text = lines.get(lines.len().saturating_sub(3)..).unwrap_or_default().join("; ");
    if text.is_empty() { output.status.to_string() } else { text }
}

/// A sandbox reads it as another user, whatever umask we have.
fn readable_by_all(top: &Path) -> io::Result<()> {
    let mut waiting = vec![top.to_owned()];
    while let Some(path) = waiting.pop() {
        let seen = path.symlink_metadata()?;
        if seen.is_symlink() {
            continue;
        }
        let mode = seen.permissions().mode();
        let more = if seen.is_dir() || mode & 0o100 != 0 { 0o555 } else { 0o444 };
        if mode & more != more {
            fs::set_permissions(&path, Permissions::from_mode(mode & 0o7777 | more))?;
        }
        if seen.is_dir() {
            for entry in fs::read_dir(&path)? {
                waiting.push(entry?.path());
            }
        }
    }
    Ok(())
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> EnvironmentError {
    let path = path.to_owned();
    move |source| EnvironmentError::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> HostRuntime {
        HostRuntime {
            language: "python",
            interpreter: "/usr/bin/python3".into(),
            version: "Python 3.11.2".into(),
            paths: Vec::new(),
            site: Vec::new(),
        }
    }

    fn list(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn fake(cache: &Path, names: &[&str], file: &str) -> Result<PathBuf, EnvironmentError> {
        ensure(&runtime(), &list(names), cache, &mut |_| {}, |dir, _| {
            fs::write(dir.join(file), "").map_err(failed("write", dir))
        })
    }

    #[test]
    fn an_environment_is_made_once_whatever_the_order_of_its_packages() {
        let cache = tempfile::tempdir().unwrap();
        let first = fake(cache.path(), &["a", "b"], "first").unwrap();
        assert_eq!(fake(cache.path(), &["b", "a", "b"], "second").unwrap(), first);
        assert!(first.join("first").exists() && !first.join("second").exists());
        assert_ne!(fake(cache.path(), &["a"], "x").unwrap(), first);
    }

    #[test]
    fn what_a_killed_maker_left_is_made_anew() {
        let cache = tempfile::tempdir().unwrap();
        let dir = fake(cache.path(), &["a"], "half").unwrap();
        fs::remove_file(dir.join(COMPLETE)).unwrap();
        IN_USE.lock().unwrap().clear();
        assert_eq!(fake(cache.path(), &["a"], "whole").unwrap(), dir);
        assert!(dir.join("whole").exists() && !dir.join("half").exists());
    }

    #[test]
    fn a_failed_maker_leaves_nothing_that_looks_whole() {
        let cache = tempfile::tempdir().unwrap();
        let fails = ensure(&runtime(), &list(&["a"]), cache.path(), &mut |_| {}, |_, _| {
            Err(EnvironmentError::NoProgram("pip"))
        });
        assert!(matches!(fails, Err(EnvironmentError::NoProgram("pip"))));
        assert!(fake(cache.path(), &["a"], "later").unwrap().join("later").exists());
    }

    #[test]
    fn two_makers_make_one_environment() {
        let cache = tempfile::tempdir().unwrap();
        let made = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    ensure(&runtime(), &list(&["a"]), cache.path(), &mut |_| {}, |_, _| {
                        made.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        std::thread::sleep(Duration::from_millis(50));
                        Ok(())
                    })
                    .unwrap();
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }

    #[test]
    fn an_option_is_not_a_package() {
        let cache = tempfile::tempdir().unwrap();
        for name in ["--index-url=x", "-r", "", "./here", "/there"] {
            assert!(matches!(fake(cache.path(), &[name], "x"), Err(EnvironmentError::Name(_))), "{name}");
        }
    }

    #[test]
    fn only_what_is_old_and_not_in_use_is_pruned() {
        let cache = tempfile::tempdir().unwrap();
        let all = cache.path().join("environments");
        let age = |dir: &Path| {
            let long_ago = SystemTime::now() - KEPT - Duration::from_secs(60);
            File::open(dir.join(COMPLETE)).unwrap().set_modified(long_ago).unwrap();
        };
        // Not through `ensure`: a test beside this one empties the list of what is in use.
        let place = |name: &str| {
            let dir = all.join(name);
            fs::create_dir_all(&dir).unwrap();
            File::create(dir.join(COMPLETE)).unwrap();
            dir
        };
        let (old, young, used) = (place("python-old"), place("python-young"), place("python-used"));
        age(&old);
        age(&used);
        let held = lock_on(&used.with_extension("lock"), FlockOperation::LockShared).unwrap();
        prune(&all, Path::new("/none"));
        assert_eq!((old.exists(), young.exists(), used.exists()), (false, true, true));
        drop(held);
        prune(&all, Path::new("/none"));
        assert!(!used.exists());
    }

    #[test]
    fn a_sandbox_can_read_what_a_careful_user_made() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        for (path, mode) in [("d/file", 0o600), ("d/program", 0o700)] {
            fs::write(dir.path().join(path), "").unwrap();
            fs::set_permissions(dir.path().join(path), Permissions::from_mode(mode)).unwrap();
        }
        fs::set_permissions(dir.path().join("d"), Permissions::from_mode(0o700)).unwrap();
        readable_by_all(dir.path()).unwrap();
        let mode = |path: &str| fs::metadata(dir.path().join(path)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("d"), mode("d/file"), mode("d/program")), (0o755, 0o644, 0o755));
    }
}
