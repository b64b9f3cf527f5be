//! What happens when a part of the engine dies, and how sandboxes of one engine stand to each other.

#[path = "harness/lib.rs"]
#[allow(dead_code)]
mod harness;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use harness::{Cli, Who};
use rustix::process::{Pid, Signal};
use zeroboot_engine::{
    Collected, Engine, EngineConfig, Event, ExecError, ExecRequest, Execution, Outcome, SandboxBounds, Stdin,
    TemplateConfig, ZygoteSpec,
};

const PATIENCE: Duration = Duration::from_secs(60);
/// A process with this name is easily found from outside.
const NAMED: &str = "import ctypes; ctypes.CDLL(None).prctl(15, b'%NAME%')\n";

fn config(pool: usize) -> EngineConfig {
    let host = zeroboot_process::python(Some(Path::new(harness::python(Who::Me)))).unwrap();
    let spec = ZygoteSpec::Process {
        runtime: "python".into(),
        interpreter: host.interpreter,
        paths: host.paths,
        warm: Vec::new(),
        env: Vec::new(),
        node_modules: None,
    };
    EngineConfig {
        program: env!("CARGO_BIN_EXE_zeroboot").into(),
        templates: vec![TemplateConfig { name: "python".into(), language: "python".into(), spec, pool }],
        max_live: 8,
        max_memory: 8 << 30,
        sandboxes: SandboxBounds::default(),
        admission_wait: PATIENCE,
        warm_timeout: PATIENCE,
        cgroups: true,
    }
}

async fn engine(pool: usize) -> Engine {
    Engine::start(config(pool)).await.unwrap()
}

fn request(code: &str) -> ExecRequest {
    let mut request = ExecRequest::new("python", code.to_owned());
    request.limits.timeout = PATIENCE * 2;
    request
}

async fn run(engine: &Engine, code: &str) -> Collected {
    engine.exec(request(code)).await.unwrap().collect().await.unwrap()
}

fn text(collected: &Collected) -> &str {
    assert!(collected.stderr.is_empty(), "{}", String::from_utf8_lossy(&collected.stderr));
    std::str::from_utf8(&collected.stdout).unwrap()
}

/// Starts code and waits for the first line that it prints.
async fn started(engine: &Engine, code: &str) -> Execution {
    let mut request = request(code);
    request.stdin = Stdin::Stream;
    let mut execution = engine.exec(request).await.unwrap();
    let mut seen = Vec::new();
    while !seen.contains(&b'\n') {
        match execution.next().await.unwrap().unwrap() {
            Event::Stdout(bytes) => seen.extend_from_slice(&bytes),
            Event::Started => {}
            other => panic!("{other:?}"),
        }
    }
    execution
}

/// Processes that have this name and the agent above them: (the process, its parent).
fn named(name: &str) -> Vec<(Pid, Pid)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if stat.contains(&format!("({name})"))
            && let Some(parent) = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)?.parse::<i32>().ok())
        {
            found.push((Pid::from_raw(pid).unwrap(), Pid::from_raw(parent).unwrap()));
        }
    }
    found
}

fn only(name: &str) -> (Pid, Pid) {
    let all = named(name);
    assert_eq!(all.len(), 1, "{all:?}");
    all[0]
}

fn parent(pid: Pid) -> Pid {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap();
    let parent = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)?.parse::<i32>().ok()).unwrap();
    Pid::from_raw(parent).unwrap()
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < PATIENCE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn sleeper(name: &str) -> String {
    NAMED.replace("%NAME%", name) + "import time; print('on', flush=True); time.sleep(600)"
}

#[tokio::test]
async fn a_killed_worker_is_a_crash_and_not_a_hang() {
    let engine = engine(0).await;
    let execution = started(&engine, &sleeper("crash-me")).await;
    let (_, agent) = only("crash-me");
    rustix::process::kill_process(agent, Signal::KILL).unwrap();
    let end = execution.collect().await.unwrap();
    assert_eq!(end.report.outcome, Outcome::Crashed);
    until("the program ended with its agent", || named("crash-me").is_empty()).await;
    assert_eq!(text(&run(&engine, "print('next')").await), "next\n");
}

#[tokio::test]
async fn a_dropped_execution_takes_its_sandbox_along() {
    let engine = engine(0).await;
    let execution = started(&engine, &sleeper("drop-me")).await;
    only("drop-me");
    drop(execution);
    until("the dropped sandbox ended", || named("drop-me").is_empty()).await;
    until("its place came free", || engine.stats().live == 0).await;
}

#[tokio::test]
async fn a_dead_zygote_is_restarted_and_its_sandboxes_end_as_crashed() {
    let engine = engine(2).await;
    until("the pool is full", || engine.templates()[0].pool_ready == 2).await;
    let execution = started(&engine, &sleeper("orphan-me")).await;
    let (_, agent) = only("orphan-me");
    rustix::process::kill_process(parent(agent), Signal::KILL).unwrap();
    assert_eq!(execution.collect().await.unwrap().report.outcome, Outcome::Crashed);
    until("its sandbox ended", || named("orphan-me").is_empty()).await;
    // While it is down a caller is told so at once; then it works again.
    let started = Instant::now();
    let answer = loop {
        // The first ones may get a sandbox from the pool that is dying too.
        let answer = match engine.exec(request("print('again')")).await {
            Ok(execution) => execution.collect().await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(answer) if answer.report.outcome != Outcome::Crashed => break answer,
            Ok(_) | Err(ExecError::NotReady { .. } | ExecError::Sandbox(_)) => {
                assert!(started.elapsed() < PATIENCE, "the zygote was not restarted");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(text(&answer), "again\n");
    assert_eq!(engine.templates()[0].restarts, 1);
    until("the pool is full again", || engine.templates()[0].pool_ready == 2).await;
}

#[tokio::test]
async fn a_zygote_that_hangs_is_replaced_and_what_it_was_asked_for_is_refused() {
    let mut config = config(0);
    config.warm_timeout = Duration::from_secs(10);
    let engine = Engine::start(config).await.unwrap();
    let execution = started(&engine, &sleeper("hang-above")).await;
    let (_, agent) = only("hang-above");
    rustix::process::kill_process(parent(agent), Signal::STOP).unwrap();
    let error = engine.exec(request("print('never')")).await.unwrap_err();
    assert!(
        matches!(&error, ExecError::NotReady { reason, .. } if reason.contains("not answer") || reason.contains("zygote ended")),
        "{error}"
    );
    assert_eq!(execution.collect().await.unwrap().report.outcome, Outcome::Crashed);
    until("the zygote is back", || engine.templates()[0].ready).await;
    assert_eq!(engine.templates()[0].restarts, 1);
    assert_eq!(text(&run(&engine, "print('again')").await), "again\n");
}

#[tokio::test]
async fn a_caller_that_is_slower_than_the_deadline_gets_it_as_the_outcome() {
    let engine = engine(0).await;
    let mut request = request("while True: print('x' * 1000)");
    request.limits.timeout = Duration::from_secs(1);
    let mut execution = engine.exec(request).await.unwrap();
    while !matches!(execution.next().await.unwrap(), Some(Event::Stdout(_))) {}
    // Longer than the sandbox is let alone after its deadline.
    tokio::time::sleep(Duration::from_secs(10)).await;
    let end = execution.collect().await.unwrap();
    assert_eq!((end.report.outcome, end.report.lost), (Outcome::DeadlinePassed, false));
    assert!(!end.stdout.is_empty());
}

#[tokio::test]
async fn a_template_that_cannot_warm_is_an_error_with_its_words() {
    let mut config = config(0);
    let ZygoteSpec::Process { warm, .. } = &mut config.templates[0].spec else { unreachable!() };
    warm.push("no_such_module_anywhere".into());
    let error = Engine::start(config).await.unwrap_err().to_string();
    assert!(error.contains("no_such_module_anywhere"), "{error}");
}

#[tokio::test]
async fn a_shut_down_engine_refuses_and_leaves_no_sandbox() {
    let engine = engine(2).await;
    let execution = started(&engine, &sleeper("shut-me")).await;
    engine.shutdown(Duration::from_millis(1)).await;
    assert!(matches!(engine.exec(request("1")).await, Err(ExecError::ShuttingDown)));
    drop((execution, engine));
    until("the sandbox ended", || named("shut-me").is_empty()).await;
}

#[test]
fn a_killed_front_leaves_nothing_behind() {
    for who in [Some(Who::Me), Who::ordinary()].into_iter().flatten() {
        let code = NAMED.replace("%NAME%", "front-killed")
            + "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\nprint('on', flush=True)\ntime.sleep(600)";
        let live = Cli::run(who).code(code).stdin_held().args(["--timeout", "10m"]).start();
        live.wait_for_process("front-killed");
        live.signal(Signal::KILL);
        // The harness looks for processes, mounts, cgroups and files until all are gone.
        live.wait().ended(137);
    }
}

#[test]
fn a_front_that_is_killed_while_it_warms_up_leaves_nothing_behind() {
    let live = Cli::run(Who::Me).code("print(1)").stdin_held().start();
    while live.processes().len() < 2 {
        std::thread::sleep(Duration::from_millis(1));
    }
    live.signal(Signal::KILL);
    live.wait();
}

#[tokio::test]
async fn two_sandboxes_of_one_template_neither_see_nor_reach_each_other() {
    let engine = engine(0).await;
    let first = r#"
import os, socket, sys
held = []
for directory in ('/tmp', '/dev/shm', os.getcwd()):
    open(directory + '/secret-of-the-first', 'w').write('first')
    s = socket.socket(socket.AF_UNIX); s.bind(directory + '/socket'); s.listen(); held.append(s)
s = socket.socket(socket.AF_UNIX); s.bind('\0zeroboot-first'); s.listen(); held.append(s)
os.environ['SECRET'] = 'first'
print('on', flush=True)
print(sys.stdin.readline().strip(), sorted(os.listdir('/tmp')), [p for p in os.listdir('/proc') if p.isdigit()])
"#;
    let mut one = started(&engine, first).await;
    let mut writer = one.stdin().unwrap();
    let second = r#"
import os, signal, socket
print([os.listdir(d) for d in ('/tmp', '/dev/shm', os.getcwd())])
print([p for p in os.listdir('/proc') if p.isdigit()], 'SECRET' in os.environ)
for address in ('\0zeroboot-first', '/tmp/socket', '/dev/shm/socket', os.getcwd() + '/socket'):
    try: socket.socket(socket.AF_UNIX).connect(address); print('connected', address)
    except OSError: pass
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for pid in range(-200, 400):
    if pid in (1, os.getpid()): continue
    try: os.kill(pid, signal.SIGKILL if pid > 0 else signal.SIGTERM)
    except OSError: pass
print('done')
"#;
    assert_eq!(text(&run(&engine, second).await), "[[], [], []]\n['1', '2'] False\ndone\n");
    writer.write("unharmed\n".into()).await;
    drop(writer);
    let end = one.collect().await.unwrap();
    assert_eq!(text(&end), "unharmed ['secret-of-the-first', 'socket'] ['1', '2']\n");
    assert_eq!(end.report.outcome, Outcome::Exited { code: 0 });
}

#[tokio::test]
async fn what_one_run_changes_the_next_does_not_see() {
    let engine = engine(0).await;
    let spoil = "import builtins, json, os, sys\nbuiltins.print = None\njson.dumps = None\nsys.path.clear()\nos.environ.clear()\nopen('/tmp/x', 'w').write('x')";
    assert_eq!(text(&run(&engine, spoil).await), "");
    let look = "import json, os, sys\nprint(json.dumps(1), bool(sys.path), 'HOME' in os.environ, os.listdir('/tmp'))";
    assert_eq!(text(&run(&engine, look).await), "1 True True []\n");
}
