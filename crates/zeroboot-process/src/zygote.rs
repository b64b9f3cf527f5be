//! The zygote of a process template: builds the root, then becomes the warm runtime or serves forks itself.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};
use zeroboot_proto::Kind;
use zeroboot_sys::{
    control::{CONTROL_FD, PROC_FD},
    jail, mount, process,
};

use crate::{
    ids, image,
    layout::{self, AGENT, CONTEXT, ENVIRON, HOME, PYFORK, RUNNER_NODE, RUNNER_PYTHON},
    serve::{ServeError, Served, serve},
};

/// Most bytes that warming may write to each of its directories.
const WARMING_SIZE: u64 = 64 << 20;

/// Files of ours that a sandbox needs.
#[derive(Clone, Copy, Debug)]
pub struct Assets {
    /// The static agent.
    pub agent: &'static [u8],
    /// The `zeroboot-pyfork` library.
    pub pyfork: &'static [u8],
    /// The Python runner.
    pub runner_python: &'static [u8],
    /// The Node runner.
    pub runner_node: &'static [u8],
}

/// A process template.
#[derive(Clone, Debug)]
pub struct ZygoteConfig {
    /// `python` or `node`.
    pub runtime: String,
    /// The interpreter (absolute).
    pub interpreter: PathBuf,
    /// Host directories that the runtime needs: its prefix, its packages.
    pub paths: Vec<PathBuf>,
    /// Modules to import before the first fork; a trailing `?` makes one optional.
    pub warm: Vec<String>,
    /// Environment of the runtime.
    pub env: Vec<(String, String)>,
    /// Node packages: the directory that appears at `/node_modules`.
    pub node_modules: Option<PathBuf>,
}

/// Runs a zygote on the descriptors that `zeroboot_sys::process::as_zygote` placed. Returns why it could not.
pub fn run_zygote(config: &ZygoteConfig, assets: Assets) -> ServeError {
    let step = |what: &'static str| move |e: io::Error| ServeError::Io(format!("{what}: {e}"), e);
    // Whatever the service's is: a sandbox's user is another than ours, and has to see the root that we make.
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let prepared = (|| {
        let proc = rustix::fs::open("/proc", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let proc = proc.map_err(|error| step("open /proc")(error.into()))?;
        process::place_fds(&[(proc.as_raw_fd(), PROC_FD)]).map_err(step("place /proc"))?;
        // Its number is gone with the others.
        std::mem::forget(proc);
        process::close_from(PROC_FD as u32 + 1).map_err(step("close descriptors"))?;
        let mut files = vec![
            (PathBuf::from(AGENT), assets.agent.to_vec()),
            (PathBuf::from(PYFORK), assets.pyfork.to_vec()),
            (PathBuf::from(RUNNER_PYTHON), assets.runner_python.to_vec()),
            (PathBuf::from(RUNNER_NODE), assets.runner_node.to_vec()),
            (PathBuf::from(CONTEXT), words(context_command(config))),
            (
                PathBuf::from(ENVIRON),
                words(environment(config).into_iter().map(|(key, value)| format!("{key}={value}"))),
            ),
        ];
        if std::env::var_os("ZEROBOOT_TEST_IMAGE").is_some() {
            files.push((PathBuf::from(layout::IMAGE_AT_ONCE), Vec::new()));
        }
        let plan = layout::plan(&config.paths, config.node_modules.as_deref(), files);
        let mut reads = config.paths.clone();
        reads.push(config.interpreter.clone());
        if config.node_modules.is_some() {
            reads.push(PathBuf::from(layout::NODE_MODULES));
        }
        let build = || {
            mount::enter_root(&plan)?;
            if config.warm.is_empty() { Ok(()) } else { warming_places() }
        };
        ids::enter(&reads, build).map_err(step("build the sandbox root"))
    })();
    if let Err(error) = prepared {
        return error;
    }
    match run_runtime(config) {
        Ok(error) => step("start the runtime")(error),
        Err(error) => error,
    }
}

/// How the agent starts one more interpreter.
fn context_command(config: &ZygoteConfig) -> Vec<String> {
    let interpreter = config.interpreter.to_string_lossy();
    let words: &[&str] = match config.runtime.as_str() {
        "python" => &[&interpreter, "-E", "-s", "-X", "utf8", RUNNER_PYTHON, "--context"],
        _ => &[&interpreter, "--no-deprecation", "--experimental-vm-modules", RUNNER_NODE, "--context"],
    };
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// As the agent reads them: each word ended by a NUL.
fn words(words: impl IntoIterator<Item = String>) -> Vec<u8> {
    words.into_iter().flat_map(|word| word.into_bytes().into_iter().chain([0])).collect()
}

/// Python: becomes the warm interpreter. Node: serves forks, and each runner becomes Node.
fn run_runtime(config: &ZygoteConfig) -> Result<io::Error, ServeError> {
    let string = |s: &str| CString::new(s).map_err(|e| ServeError::Io(format!("{s:?} has a NUL byte"), e.into()));
    let interpreter = string(&config.interpreter.to_string_lossy())?;
    let env = environment(config)
        .iter()
        .map(|(key, value)| string(&format!("{key}={value}")))
        .collect::<Result<Vec<_>, _>>()?;
    let warm = config.warm.join(",");
    let args: Vec<&str> = match config.runtime.as_str() {
        "python" => {
            let control = const {
                assert!(CONTROL_FD == 4);
                "4"
            };
            let mut args =
                vec!["python3", "-E", "-s", "-X", "utf8", RUNNER_PYTHON, "--fork-server", PYFORK, "--fork-fd", control];
            if !warm.is_empty() {
                args.extend(["--warm", &warm]);
            }
            args
        }
        _ => {
            // The runner reads the code of ES modules itself; Node 18 wants to be told.
            let mut args = vec!["node", "--no-deprecation", "--experimental-vm-modules", RUNNER_NODE];
            if !warm.is_empty() {
                args.extend(["--warm", &warm]);
            }
            args
        }
    };
    let args = args.into_iter().map(string).collect::<Result<Vec<_>, _>>()?;
    if config.runtime != "python" {
        serve_here()?;
    }
    Ok(process::exec(&interpreter, &args, &env))
}

/// Serves forks in this process. Returns in each runner; ends with the front.
fn serve_here() -> Result<(), ServeError> {
    let control = process::inherited_fd(CONTROL_FD)
        .ok_or_else(|| ServeError::Io("no control channel".into(), io::Error::from_raw_os_error(9)))?;
    ready()?;
    // There is nothing warm to share: each runner becomes Node by exec.
    if serve(&control, None)? == Served::FrontGone {
        process::exit_now(0);
    }
    std::mem::forget(control);
    // Exec keeps ignored signals ignored.
    process::reset_signals().map_err(|e| ServeError::Io(format!("reset signals: {e}"), e))
}

/// Tells the front that the template is warm.
fn ready() -> Result<(), ServeError> {
    let mut frame = Vec::new();
    zeroboot_proto::encode(&mut frame, Kind::Ready, b"");
    rustix::io::write(process::borrow_fd(zeroboot_sys::control::REPORT_FD), &frame)
        .map_err(|e| ServeError::Io(format!("report: {e}"), e.into()))?;
    Ok(())
}

/// What the runtime is told; nothing of the host's environment goes in.
fn environment(config: &ZygoteConfig) -> Vec<(String, String)> {
    let own_bin = config.interpreter.parent().map(|dir| dir.to_string_lossy().into_owned()).unwrap_or_default();
    let mut env: Vec<(String, String)> = [
        ("PATH", format!("{own_bin}:/usr/local/bin:/usr/bin:/bin").as_str()),
        ("HOME", HOME),
        ("USER", "sandbox"),
        ("LOGNAME", "sandbox"),
        ("TMPDIR", "/tmp"),
        ("LANG", "C.UTF-8"),
        // One thread: a process with more cannot be forked, and a sandbox has one CPU's worth of time.
        ("OPENBLAS_NUM_THREADS", "1"),
        ("OMP_NUM_THREADS", "1"),
        ("MKL_NUM_THREADS", "1"),
        ("NUMEXPR_NUM_THREADS", "1"),
        ("BLIS_NUM_THREADS", "1"),
        ("POLARS_MAX_THREADS", "1"),
        ("NUMBA_NUM_THREADS", "1"),
        ("RAYON_NUM_THREADS", "1"),
        ("GOMAXPROCS", "1"),
        // The allocator inside pyarrow.
        ("JE_ARROW_MALLOC_CONF", "background_thread:false"),
        // Without a network an installer fails at once, and what it prints says why.
        ("PIP_INDEX_URL", "http://this-sandbox-has-no-network.see-pip-list-for-what-is-installed.invalid/"),
        ("PIP_RETRIES", "0"),
        ("PIP_TIMEOUT", "1"),
        ("PIP_DISABLE_PIP_VERSION_CHECK", "1"),
        ("PIP_BREAK_SYSTEM_PACKAGES", "1"),
        ("npm_config_registry", "http://this-sandbox-has-no-network.see-npm-ls-for-what-is-installed.invalid/"),
        ("npm_config_fetch_retries", "0"),
        ("npm_config_audit", "false"),
        ("npm_config_fund", "false"),
        ("npm_config_update_notifier", "false"),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .collect();
    env.extend(own_packages(config));
    env.extend(config.env.iter().cloned());
    env
}

/// Where `pip install` of a file puts it: the user's own directory of packages, which is in the home directory.
fn own_packages(config: &ZygoteConfig) -> Vec<(String, String)> {
    if config.runtime != "python" {
        return Vec::new();
    }
    let venv = config.interpreter.ancestors().nth(2).map(|prefix| prefix.join("pyvenv.cfg"));
    let Some(text) = venv.and_then(|file| std::fs::read_to_string(file).ok()) else {
        return vec![("PIP_USER".into(), "1".into())];
    };
    // A virtualenv has no such directory of its own, so it is named to pip and to interpreters that code starts.
    let version =
        text.lines().filter_map(|line| line.split_once('=')).find(|(key, _)| key.trim().starts_with("version"));
    let mut numbers = version.map_or("", |(_, value)| value.trim()).split('.');
    let minor = numbers.next().zip(numbers.next()).map(|(major, minor)| format!("{major}.{minor}")).unwrap_or_default();
    vec![
        ("PIP_PREFIX".into(), format!("{HOME}/.local")),
        ("PYTHONPATH".into(), format!("{HOME}/.local/lib/python{minor}/site-packages")),
    ]
}

/// Directories that modules may write to while they are warmed, such as a cache of fonts. Each sandbox mounts its own
/// over them: what is in them is seen by the zygote alone.
fn warming_places() -> io::Result<()> {
    // Whose it is depends on where the zygote's user comes from (`ids`), so anybody may write.
    let own = |path: &str| mount::private_tmpfs(Path::new(path), jail::SANDBOX_UID, "1777", WARMING_SIZE);
    [HOME, "/tmp"].into_iter().try_for_each(own)
}

/// The fork before which an image is made, counted from 0. It costs as much as fifty forks, and `zeroboot run` makes only
/// one fork.
const IMAGE_BEFORE: u64 = 1;

/// Serves a warm Python: called by `zeroboot-pyfork`. Returns in each runner only.
pub fn serve_python(control: i32) {
    let Some(control) = process::inherited_fd(control) else { process::exit_now(125) };
    let first = if Path::new(layout::IMAGE_AT_ONCE).exists() { 0 } else { IMAGE_BEFORE };
    match ready().and_then(|()| serve(&control, Some((image::freeze, first)))) {
        Ok(Served::Runner) => std::mem::forget(control),
        Ok(Served::FrontGone) => process::exit_now(0),
        Err(error) => {
            let mut frame = Vec::new();
            zeroboot_proto::encode(&mut frame, Kind::Failure, error.to_string().as_bytes());
            // If the front is gone nobody needs the reason.
            let _gone = rustix::io::write(process::borrow_fd(zeroboot_sys::control::REPORT_FD).as_fd(), &frame);
            process::exit_now(125)
        }
    }
}
