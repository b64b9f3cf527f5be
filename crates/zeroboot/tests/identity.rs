//! Forks of one warm interpreter differ in everything that must not be the same twice.

#[path = "harness/lib.rs"]
#[allow(dead_code)]
mod harness;

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::fs::PermissionsExt,
    path::Path,
    time::Duration,
};

use harness::Who;
use zeroboot_engine::{Engine, EngineConfig, ExecRequest, SandboxBounds, TemplateConfig, ZygoteSpec};

/// Prints one line `name value` for each source of identity.
const SOURCES: &str = r#"
import os, random, secrets, socket, ssl, tempfile, uuid
print('random', random.getrandbits(128))
print('random.Random', random.Random().getrandbits(128))
print('shuffle', random.sample(range(1000), 20))
print('uuid1', uuid.uuid1())
print('uuid4', uuid.uuid4())
print('node', uuid.getnode())
print('mkdtemp', tempfile.mkdtemp())
print('NamedTemporaryFile', tempfile.NamedTemporaryFile().name)
print('secrets', secrets.token_hex(16))
print('urandom', os.urandom(16).hex())
print('getrandom', os.getrandom(16).hex())
print('openssl', ssl.RAND_bytes(16).hex())
print('hostname', socket.gethostname())
import multiprocessing
print('authkey', bytes(multiprocessing.current_process().authkey).hex())
try:
    import numpy
except ImportError:
    numpy = None
if numpy:
    print('numpy.random.rand', numpy.random.rand(4).tobytes().hex())
    print('numpy.random.randn', numpy.random.randn(1).tobytes().hex())
    print('numpy.default_rng', numpy.random.default_rng().random(4).tobytes().hex())
    print('numpy.SeedSequence', numpy.random.SeedSequence().entropy)
"#;

/// Runs `code` in many sandboxes of one template, and gathers its lines `name value` by name.
async fn drawn(spec: ZygoteSpec, language: &str, code: &str) -> (Engine, BTreeMap<String, BTreeSet<String>>) {
    let template = TemplateConfig { name: "one".into(), language: language.into(), spec, pool: 2 };
    let engine = Engine::start(EngineConfig {
        program: env!("CARGO_BIN_EXE_zeroboot").into(),
        templates: vec![template],
        max_live: 4,
        max_memory: 8 << 30,
        sandboxes: SandboxBounds::default(),
        admission_wait: Duration::from_secs(120),
        warm_timeout: Duration::from_secs(120),
        cgroups: true,
    })
    .await
    .unwrap();
    let mut seen: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let runs: Vec<_> = (0..FORKS)
        .map(|_| {
            let (engine, code) = (engine.clone(), code.to_owned());
            tokio::spawn(async move {
                let mut request = ExecRequest::new("one", code);
                request.limits.timeout = Duration::from_secs(120);
                engine.exec(request).await.unwrap().collect().await.unwrap()
            })
        })
        .collect();
    for run in runs {
        let end = run.await.unwrap();
        assert_eq!(String::from_utf8_lossy(&end.stderr), "");
        for line in std::str::from_utf8(&end.stdout).unwrap().lines() {
            let (name, value) = line.split_once(' ').unwrap();
            seen.entry(name.into()).or_default().insert(value.into());
        }
    }
    (engine, seen)
}

const FORKS: usize = 16;

#[tokio::test]
async fn forks_differ_pairwise_in_every_source_of_identity() {
    let host = zeroboot_process::python(Some(Path::new(harness::python(Who::Me)))).unwrap();
    let spec = ZygoteSpec::Process {
        runtime: "python".into(),
        interpreter: host.interpreter,
        paths: host.paths,
        warm: vec!["numpy?".into()],
        env: Vec::new(),
        node_modules: None,
    };
    let (engine, seen) = drawn(spec, "python", SOURCES).await;
    assert!(seen.len() >= 14, "{seen:?}");
    for (name, values) in &seen {
        assert_eq!(values.len(), FORKS, "{name}: {values:?}");
    }
    // With numpy in the interpreter under test, it was part of it.
    let has_numpy = engine.templates()[0].warmed.iter().any(|module| module.starts_with("numpy"));
    assert_eq!(has_numpy, seen.contains_key("numpy.default_rng"));
}

/// Node is not forked: each sandbox has warmed a process of its own. So it is with what the modules keep.
#[tokio::test]
async fn what_a_module_that_node_warmed_keeps_differs_pairwise() {
    let host = zeroboot_process::node(None).unwrap();
    // Not below /tmp, which a sandbox has for itself.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let module = folder.path().join("made_before.cjs");
    std::fs::write(&module, include_str!("../../zeroboot-guest/tests/clones/made_before.cjs")).unwrap();
    let module = module.to_str().unwrap();
    let spec = ZygoteSpec::Process {
        runtime: "node".into(),
        interpreter: host.interpreter,
        paths: host.paths.into_iter().chain([folder.path().to_owned()]).collect(),
        warm: vec![module.to_owned()],
        env: Vec::new(),
        node_modules: None,
    };
    let (_engine, seen) = drawn(spec, "node", &format!("console.log(require({module:?})().join('\\n'))")).await;
    let drawn_while_warm = 4;
    assert_eq!(seen.len(), 7, "{seen:?}");
    for (name, values) in &seen {
        let each = if name == "before" { drawn_while_warm } else { 1 };
        assert_eq!(values.len(), FORKS * each, "{name}: {values:?}");
    }
}

/// A module that keeps bytes in memory that the kernel wipes at a fork, as random generators do, and in ordinary memory, and
/// that has hooks for forks.
const KEEPER: &str = "
import mmap
def page(byte):
    m = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    m[:] = byte * len(m)
    return m
wiped, kept = page(b'w'), page(b'k')
wiped.madvise(18)  # MADV_WIPEONFORK
calls = []
import os
os.register_at_fork(before=lambda: calls.append('before'), after_in_child=lambda: calls.append('in child'))
";

/// Says where it runs and what it finds, and changes what the next fork must not see.
const KEPT: &str = "
import os, random
import keeper
print('wiped', bytes(keeper.wiped) == bytes(1 << 20))
print('hooks', keeper.calls == ['before', 'in child'])
print('kept', bytes(keeper.kept) == b'k' * (1 << 20))
keeper.kept[:] = b'x' * (1 << 20)
print('changed', bytes(keeper.kept) == b'x' * (1 << 20))
print('image', 'zeroboot-image' in open('/proc/self/maps').read())
import threading
thread = threading.Thread(target=lambda: print('thread', True))
thread.start(); thread.join()
print('native', threading.main_thread().native_id == os.getpid())
# The program's own forks run the standard library's hooks.
r, w = os.pipe()
if os.fork() == 0:
    os.write(w, str(random.random()).encode())
    os._exit(0)
os.wait()
print('forked', os.read(r, 100) != str(random.random()).encode())
";

#[tokio::test]
async fn forks_of_an_image_are_private_and_what_is_wiped_at_a_fork_stays_wiped() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let made = std::process::Command::new(harness::python(Who::Me))
        .args(["-m", "venv", "--without-pip"])
        .arg(folder.path().join("venv"))
        .status()
        .unwrap();
    assert!(made.success());
    let python = folder.path().join("venv/bin/python");
    let host = zeroboot_process::python(Some(&python)).unwrap();
    let packages = host.paths.iter().find(|p| p.starts_with(folder.path()) && p.ends_with("site-packages")).unwrap();
    std::fs::write(packages.join("keeper.py"), KEEPER).unwrap();
    let spec = ZygoteSpec::Process {
        runtime: "python".into(),
        interpreter: host.interpreter,
        paths: host.paths,
        warm: vec!["keeper".into()],
        env: Vec::new(),
        node_modules: None,
    };
    let (_engine, seen) = drawn(spec, "python", KEPT).await;
    let only = |name: &str| seen[name].iter().map(String::as_str).collect::<Vec<_>>();
    for name in ["wiped", "hooks", "kept", "changed", "thread", "native", "forked"] {
        assert_eq!(only(name), ["True"], "{name}");
    }
    // The first fork comes before the image.
    assert_eq!(only("image"), ["False", "True"]);
    // What it wrote to has its page tables copied at each fork.
    assert_eq!(written_to_the_image(), [""; 0]);
}

/// Mappings of the image in which this process's zygote has pages of its own.
fn written_to_the_image() -> Vec<String> {
    let mut zygotes = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let read = |file: &str| std::fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        let parent = format!("PPid:\t{}\n", std::process::id());
        if read("status").contains(&parent)
            && read("cmdline").contains("--fork-server")
            && read("cmdline").contains("keeper")
        {
            zygotes.push(read("smaps"));
        }
    }
    assert_eq!(zygotes.len(), 1);
    let (mut image, mut found, mut written) = (None, 0, Vec::new());
    for line in zygotes[0].lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words[0].contains('-') && !words[0].ends_with(':') {
            image = line.contains("zeroboot-image").then_some(line);
            found += u32::from(image.is_some());
        } else if let Some(mapping) = image
            && words[0] == "Anonymous:"
            && words[1] != "0"
        {
            written.push(format!("{mapping}: {} KiB", words[1]));
        }
    }
    assert!(found > 10, "{found} mappings of an image");
    written
}
