//! Who takes part: how each is started, and why some are not.

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use zeroboot_engine::{Engine, ExecRequest, Outcome, TemplateConfig, ZygoteSpec};

use crate::{
    bench::{exec::wait_for_pool, start},
    cli::BenchArgs,
};

const SAYS: &[u8] = b"1\n";

pub(super) struct Rival {
    pub(super) name: String,
    how: How,
}

pub(super) struct Found {
    pub(super) rivals: Vec<Rival>,
    /// Name and reason.
    pub(super) absent: Vec<(&'static str, String)>,
    /// Of runc and crun, for as long as they are measured.
    _bundle: tempfile::TempDir,
}

enum How {
    /// An engine and what it is to run.
    Engine(Engine, &'static str, &'static str),
    /// A program that is started for each sample.
    Program(Vec<OsString>),
    /// A program that does one for each line that it gets, and then says `done`.
    Helper(Child, BufReader<ChildStdout>),
}

impl Rival {
    /// One sandbox, or what comes nearest to one, from its start to its answer.
    pub(super) async fn once(&mut self) -> anyhow::Result<()> {
        let said = match &mut self.how {
            How::Engine(engine, language, code) => {
                let done = engine.exec(ExecRequest::new(*language, *code)).await?.collect().await?;
                ensure!(done.report.outcome == Outcome::Exited { code: 0 }, "{}: {:?}", self.name, done.report.outcome);
                done.stdout
            }
            How::Program(words) => {
                let words = words.clone();
                tokio::task::spawn_blocking(move || run(&words)).await??
            }
            How::Helper(child, output) => {
                child.stdin.as_mut().context("a helper's input")?.write_all(b"\n")?;
                let mut line = String::new();
                output.read_line(&mut line)?;
                ensure!(line == "done\n", "{}: it said {line:?}", self.name);
                SAYS.to_vec()
            }
        };
        ensure!(said == SAYS, "{} gave a wrong answer: {:?}", self.name, String::from_utf8_lossy(&said));
        Ok(())
    }

    /// Waits until nothing of it runs.
    pub(super) async fn settle(&self) {
        if let How::Engine(engine, ..) = &self.how {
            wait_for_pool(engine).await;
            let waiting: usize = engine.templates().iter().map(|template| template.pool_target).sum();
            while engine.stats().live > 0 && waiting == 0 {
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
        }
    }

    pub(super) async fn end(self) {
        match self.how {
            How::Engine(engine, ..) => engine.shutdown(Duration::from_secs(5)).await,
            How::Program(_) => {}
            How::Helper(mut child, _) => {
                drop(child.stdin.take());
                // It has ended, or the kernel ends it with us: nothing depends on how.
                let _status = child.wait();
            }
        }
    }
}

fn run(words: &[OsString]) -> anyhow::Result<Vec<u8>> {
    let (program, args) = words.split_first().context("a program")?;
    let output = Command::new(program).args(args).stdin(Stdio::null()).output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{}: {}", output.status, said.lines().last().unwrap_or_default());
    }
    Ok(output.stdout)
}

/// Forks a warm interpreter once for each line. Each child prints, and its output is checked.
const BARE: &str = "
import gc, importlib, os, sys
for name in filter(None, sys.argv[1].split(',')):
    try:
        importlib.import_module(name.rstrip('?'))
    except ImportError:
        if not name.endswith('?'): raise
gc.collect(); gc.freeze()
for line in sys.stdin:
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(w, 1)
        exec(compile('print(1)', '<string>', 'exec'), {'__name__': '__main__'})
        sys.stdout.flush()
        os._exit(0)
    os.close(w)
    assert os.read(r, 100) == b'1\\n'
    os.close(r)
    os.waitpid(pid, 0)
    print('done', flush=True)
";

/// Clones a warm interpreter N times; each prints its number, and all numbers are checked.
const SANDLOCK: &str = "
import sys, time, sandlock
count = int(sys.argv[1])
policy = dict(fs_readable=['/'])
maker = sandlock.Sandbox(init_fn=lambda: None, work_fn=lambda number: print(number), **policy)
begin = time.perf_counter()
clones = maker.fork(count)
said = sandlock.Sandbox(**policy).reduce(['cat'], clones).stdout
took = time.perf_counter() - begin
text = said.decode() if isinstance(said, bytes) else said
assert sorted(map(int, text.split())) == list(range(count)), text[:200]
print(int(took * 1e9))
";

/// Wall time of sandlock's clones, where a Python of this host has it.
pub(super) fn sandlock_clones(args: &BenchArgs, count: usize) -> anyhow::Result<Option<Duration>> {
    let Some(python) = python_with_sandlock(args) else { return Ok(None) };
    let output = run(&words([python.as_os_str(), "-c".as_ref(), SANDLOCK.as_ref(), count.to_string().as_ref()]))
        .context("sandlock's clones")?;
    let nanos: u64 = String::from_utf8_lossy(&output).trim().parse().context("sandlock's time")?;
    Ok(Some(Duration::from_nanos(nanos)))
}

fn python_with_sandlock(args: &BenchArgs) -> Option<PathBuf> {
    let named = args.sandlock.clone().or_else(|| args.from.python.clone());
    named.into_iter().chain([PathBuf::from("python3")]).find(|python| {
        let tried = Command::new(python).args(["-c", "import sandlock"]).stderr(Stdio::null()).status();
        tried.is_ok_and(|status| status.success())
    })
}

fn words<const N: usize>(words: [&OsStr; N]) -> Vec<OsString> {
    words.map(OsString::from).to_vec()
}

/// All that can be measured here, ours first, and the names and reasons of the others.
pub(super) async fn find(args: &BenchArgs, template: &TemplateConfig) -> anyhow::Result<Found> {
    let host = zeroboot_process::python(args.from.python.as_deref())?;
    let python = host.interpreter.as_os_str();
    let mut rivals = vec![
        engine("Zeroboot, forked on the spot", template, 0).await?,
        engine("Zeroboot, from a pool and its refill", template, 4).await?,
    ];
    let mut absent = Vec::new();
    let mut modules = String::new();
    if let ZygoteSpec::Process { warm, .. } = &template.spec {
        modules = warm.join(",");
        let mut child = Command::new(python)
            .args(["-E", "-s", "-c", BARE, &modules])
            .envs(["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"].map(|name| (name, "1")))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a python3 that forks")?;
        let output = BufReader::new(child.stdout.take().context("its output")?);
        rivals.push(Rival { name: "a bare os.fork(), warm, no isolation".into(), how: How::Helper(child, output) });
    }
    let print = ["-c".as_ref(), "print(1)".as_ref()];
    let mut programs: Vec<(&'static str, Vec<OsString>)> =
        vec![("a fresh python3, no isolation", words([python, print[0], print[1]]))];
    if !modules.is_empty() {
        let wanted: Vec<&str> = modules.split(',').map(|name| name.trim_end_matches('?')).collect();
        let code = format!("import {}; print(1)", wanted.join(", "));
        programs
            .push(("a fresh python3 that imports the same, no isolation", words([python, print[0], code.as_ref()])));
    }
    let unshare = "unshare --user --map-root-user --net --ipc --uts --mount --pid --fork --mount-proc";
    let bubblewrap = "bwrap --ro-bind / / --unshare-all --die-with-parent --proc /proc --dev /dev --tmpfs /tmp";
    for (name, line) in [("unshare, python3", unshare), ("bubblewrap, python3", bubblewrap)] {
        let inside = [python, print[0], print[1]];
        programs.push((name, line.split(' ').map(OsString::from).chain(inside.map(OsString::from)).collect()));
    }
    let bundle = tempfile::tempdir().context("make a directory for a bundle")?;
    make_bundle(bundle.path(), python, &host.paths)?;
    for (name, runtime) in
        [("runc, python3 in an unpacked root", "runc"), ("crun, python3 in an unpacked root", "crun")]
    {
        let id = format!("zeroboot-bench-{}", std::process::id());
        let line = [runtime, "run", "--bundle"].map(OsString::from);
        programs.push((name, line.into_iter().chain([bundle.path().into(), id.into()]).collect()));
    }
    for (name, program) in programs {
        match run(&program) {
            Ok(said) if said == SAYS => rivals.push(Rival { name: name.into(), how: How::Program(program) }),
            Ok(said) => absent.push((name, format!("it said {:?}", String::from_utf8_lossy(&said)))),
            Err(error) => absent.push((name, error.to_string())),
        }
    }
    if python_with_sandlock(args).is_none() {
        absent.push(("sandlock", "no python3 here has the package (name one with --sandlock)".into()));
    }
    match super::node_template(args) {
        None => absent.push(("node", "not found".into())),
        Some(node) => {
            if let ZygoteSpec::Process { interpreter, .. } = &node.spec {
                let fresh = words([interpreter.as_os_str(), "-e".as_ref(), "console.log(1)".as_ref()]);
                rivals.push(Rival { name: "a fresh node, no isolation".into(), how: How::Program(fresh) });
            }
            let engine = start(&node, 0, 4).await?;
            let how = How::Engine(engine, "node", "console.log(1)");
            rivals.push(Rival { name: "Zeroboot, Node, started on the spot (process)".into(), how });
        }
    }
    // The memory of a template is an image from its second fork on.
    for rival in &mut rivals {
        for _ in 0..2 {
            rival.once().await?;
        }
    }
    Ok(Found { rivals, absent, _bundle: bundle })
}

async fn engine(name: &str, template: &TemplateConfig, pool: usize) -> anyhow::Result<Rival> {
    let engine = start(template, pool, 4).await?;
    Ok(Rival { name: name.into(), how: How::Engine(engine, "python", "print(1)") })
}

/// An OCI bundle: an empty root, into which the interpreter and the system's libraries are mounted.
fn make_bundle(bundle: &Path, python: &OsStr, paths: &[PathBuf]) -> anyhow::Result<()> {
    let system = ["/usr", "/lib", "/lib64", "/bin"].map(PathBuf::from);
    let binds: Vec<&PathBuf> = system.iter().chain(paths).filter(|path| path.is_dir()).collect();
    let mut mounts = vec![
        serde_json::json!({"destination": "/proc", "type": "proc", "source": "proc"}),
        serde_json::json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}),
        serde_json::json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}),
    ];
    for path in binds {
        mounts.push(serde_json::json!({
            "destination": path, "type": "bind", "source": path, "options": ["rbind", "ro"]
        }));
    }
    for mount in &mounts {
        let inside = mount["destination"].as_str().context("a path that is text")?.trim_start_matches('/');
        fs::create_dir_all(bundle.join("rootfs").join(inside))?;
    }
    let namespaces = ["pid", "mount", "ipc", "uts", "network"].map(|kind| serde_json::json!({"type": kind}));
    let config = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [python.to_str().context("an interpreter whose path is text")?, "-c", "print(1)"],
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "noNewPrivileges": true,
            "capabilities": {},
        },
        "root": {"path": "rootfs", "readonly": true},
        "mounts": mounts,
        "linux": {"namespaces": namespaces},
    });
    fs::write(bundle.join("config.json"), config.to_string()).context("write a bundle")
}
