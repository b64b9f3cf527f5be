//! `zeroboot serve` as it is started: what it refuses, and what it does with the process that it is.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    process::{Child, ChildStderr, Command, Stdio},
    time::Duration,
};

#[path = "harness/lib.rs"]
#[allow(dead_code)]
mod harness;
use harness::{Who, python};

/// A server that was started by a shell, after `before`.
struct Served {
    child: Child,
    address: SocketAddr,
    /// What it wrote until it was ready.
    words: String,
    rest: BufReader<ChildStderr>,
}

fn command(before: &str, args: &[&str]) -> Command {
    let mut command = Command::new("sh");
    let script = format!("{before}\nexec \"$0\" serve --listen 127.0.0.1:0 --pool 1 \"$@\"");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_zeroboot")]).args(args);
    for name in ["ZEROBOOT_CONFIG", "ZEROBOOT_ENGINE", "ZEROBOOT_API_KEYS_FILE", "ZEROBOOT_LOG", "NO_COLOR"] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

impl Served {
    fn start(before: &str, args: &[&str]) -> Served {
        let mut child = command(before, &[&["--engine", "process"], args].concat()).spawn().unwrap();
        let rest = BufReader::new(child.stderr.take().unwrap());
        let mut served = Served { child, address: ([127, 0, 0, 1], 0).into(), words: String::new(), rest };
        while !served.words.contains("zeroboot is ready after ") {
            let from = served.words.len();
            assert!(served.rest.read_line(&mut served.words).unwrap() > 0, "it ended: {}", served.words);
            if let Some(at) = served.words[from..].split("zeroboot listens on ").nth(1) {
                served.address = at.split_whitespace().next().unwrap().parse().unwrap();
            }
        }
        served
    }

    fn exec(&self, stream: &mut TcpStream) -> String {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let body = r#"{"code": "print(6 * 7)"}"#;
        let head = "POST /v1/exec HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
        write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        let mut text = vec![0; 64 * 1024];
        let count = stream.read(&mut text).unwrap();
        String::from_utf8_lossy(&text[..count]).into_owned()
    }

    /// What it answers to code.
    fn run(&self, code: &str) -> serde_json::Value {
        self.post("/v1/exec", &serde_json::json!({ "code": code }))
    }

    /// What it answers, on a connection of its own.
    fn post(&self, path: &str, body: &serde_json::Value) -> serde_json::Value {
        let body = body.to_string();
        let mut stream = TcpStream::connect(self.address).unwrap();
        let head = "Host: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n";
        write!(stream, "POST {path} HTTP/1.1\r\n{head}Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
    }

    /// Ends it; gives all that it wrote.
    fn stop(mut self) -> String {
        assert!(Command::new("kill").arg(self.child.id().to_string()).status().unwrap().success());
        self.rest.read_to_string(&mut self.words).unwrap();
        assert!(self.child.wait().unwrap().success(), "{}", self.words);
        std::mem::take(&mut self.words)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Ended already, unless the test failed.
        self.child.kill().unwrap_or_default();
        self.child.wait().map(drop).unwrap_or_default();
    }
}

/// What is said to a configuration that is refused.
fn refused(config: &str, args: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("zeroboot.toml");
    std::fs::write(&file, config).unwrap();
    let done = command("", &[&["--config", file.to_str().unwrap()], args].concat()).output().unwrap();
    let words = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(125), "{words}");
    words
}

#[test]
fn settings_that_do_not_go_together_are_refused_with_what_to_do() {
    for (config, text, hint) in [
        (
            "[engine]\nkind = \"process\"\nmax_memory_mb = 256",
            "a sandbox has 512 MiB by default, but all sandboxes together may have only 256 MiB",
            "lower default_memory_mb in [limits]",
        ),
        ("[engine]\nkind = \"process\"\nmax_live = 0", "max_live is zero", "give at least 1"),
        ("[engine]\nkind = \"magic\"", "unknown engine \"magic\"", "use auto, vm or process"),
        ("[limits]\nkey_concurrency = 0", "key_concurrency", "above zero"),
        (
            "[engine]\nkind = \"process\"\n[[template]]\nname = \"python\"\npath = \"/t\"",
            "path is for the VM engine",
            "remove it",
        ),
        (
            "[engine]\nkind = \"process\"\n[[template]]\nname = \"science\"",
            "unknown language \"science\"",
            "without it the name is the language",
        ),
    ] {
        let words = refused(config, &[]);
        assert!(words.contains(text) && words.contains(hint), "{config}: {words}");
    }
}

#[test]
fn an_engine_that_is_given_as_a_flag_wins_over_the_file() {
    // The file's word is not even looked at: this one would be refused.
    let words = refused("[engine]\nkind = \"magic\"\nmax_live = 0", &["--engine", "process"]);
    assert!(words.contains("max_live is zero"), "{words}");
}

#[test]
fn the_first_request_that_a_server_prints_works_when_it_is_pasted() {
    let mut served = Served::start("", &[]);
    let line = loop {
        let from = served.words.len();
        assert!(served.rest.read_line(&mut served.words).unwrap() > 0, "it ended: {}", served.words);
        if served.words[from..].starts_with("  curl ") {
            break served.words[from..].to_owned();
        }
    };
    for text in ["; engine process: asked for\n", "zeroboot: python · Python 3.", "zeroboot is ready after "] {
        assert!(served.words.contains(text), "no {text:?} in {}", served.words);
    }
    let done = Command::new("sh").args(["-c", &line]).output().unwrap();
    let answer: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(answer["stdout"], "2\n", "{answer}");
    served.stop();
}

#[test]
fn a_template_that_cannot_be_made_ends_the_server_with_its_reason() {
    let words =
        refused("[engine]\nkind = \"process\"\n[[template]]\nname = \"python\"\nwarm = [\"no_such_module\"]", &[]);
    assert!(words.contains("no_such_module") && words.contains("hint: "), "{words}");
}

#[test]
fn keys_are_those_of_the_servers_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let (config, keys) = (folder.path().join("zeroboot.toml"), folder.path().join("keys.toml"));
    std::fs::write(&config, format!("keys_file = {keys:?}\n")).unwrap();
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_zeroboot"));
        command.arg("keys").args(args).env_remove("ZEROBOOT_CONFIG").env_remove("ZEROBOOT_API_KEYS_FILE");
        let done = command.output().unwrap();
        (done.status.code(), String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap())
    };
    let config = config.to_str().unwrap();
    let (status, token, words) = run(&["create", "--config", config, "me"]);
    assert_eq!(status, Some(0), "{words}");
    assert!(token.starts_with("zb_live_") && words.contains(keys.to_str().unwrap()), "{words}");
    let (_, list, _) = run(&["list", "--keys-file", keys.to_str().unwrap()]);
    assert!(list.contains("me"), "{list}");
    // Of no file that is not named.
    std::fs::write(folder.path().join("empty.toml"), "").unwrap();
    let (status, _, words) = run(&["list", "--config", folder.path().join("empty.toml").to_str().unwrap()]);
    assert!(
        status == Some(125) && words.contains("names no key file") && words.contains("hint: add keys_file"),
        "{words}"
    );
}

#[test]
fn the_log_of_no_terminal_has_no_colours() {
    let served = Served::start("", &[]);
    let words = served.stop();
    assert!(words.contains("INFO") && !words.contains('\u{1b}'), "{words:?}");
}

#[test]
fn a_flood_of_connections_takes_no_descriptor_that_a_sandbox_needs() {
    let served = Served::start("ulimit -n 160", &[]);
    let mut first = TcpStream::connect(served.address).unwrap();
    assert!(served.exec(&mut first).contains("\"stdout\":\"42\\n\""), "before the flood");
    let _flood: Vec<TcpStream> = (0..150).filter_map(|_| TcpStream::connect(served.address).ok()).collect();
    std::thread::sleep(Duration::from_millis(500));
    for round in 0..5 {
        let answer = served.exec(&mut first);
        assert!(answer.contains("\"stdout\":\"42\\n\""), "{round}: {answer}");
    }
    drop(first);
    let words = served.stop();
    assert!(words.contains("max_connections=40"), "{words}");
    assert!(!words.contains("cannot accept a connection"), "{words}");
}

#[test]
fn what_a_crowd_of_half_sent_heads_took_is_given_back() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.toml");
    zeroboot_server::KeyStore::new(&keys)
        .create(zeroboot_server::NewKey { name: "a".into(), ..Default::default() })
        .unwrap();
    // This process opens as many.
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let nofile = rustix::process::Rlimit { current: most, maximum: most };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, nofile).unwrap();
    let served = Served::start("ulimit -n $(ulimit -Hn)", &["--keys-file", keys.to_str().unwrap()]);
    if served.words.contains("sandboxes have no cgroups") {
        assert!(
            served.words.contains("WARN") && served.words.contains("one key's code can take memory and time from all"),
            "{}",
            served.words
        );
    }
    let memory = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", served.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().split(' ').next().unwrap().parse::<u64>().unwrap() / 1024
    };
    let before = memory();
    let head = format!("POST /v1/exec HTTP/1.1\r\nHost: localhost\r\nX-Long: {}", "x".repeat(60_000));
    let mut crowd = Vec::new();
    for at in 0..3000 {
        let mut stream = TcpStream::connect(served.address).unwrap();
        // Longer ones are cut before all is sent.
        stream.write_all(&head.as_bytes()[..if at % 2 == 0 { 15_000 } else { head.len() }]).unwrap_or_default();
        crowd.push(stream);
    }
    let begun = std::time::Instant::now();
    while memory() <= before + 10 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{before} MiB before, {} MiB with a crowd", memory());
        std::thread::sleep(Duration::from_millis(20));
    }
    let most = memory();
    assert!(most < before + 150, "{before} MiB before, {most} MiB with a crowd");
    drop(crowd);
    let begun = std::time::Instant::now();
    while memory() > before + (most - before) / 4 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{before}, {most}, and {} MiB now", memory());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Lowers a limit of the whole host while it lives, so that a test can reach it in a moment.
struct Lowered(&'static str, Option<String>);

impl Lowered {
    fn new(path: &'static str, value: &str) -> Lowered {
        let before = std::fs::read_to_string(path).unwrap();
        let lowered = std::fs::write(path, value).is_ok();
        Lowered(path, lowered.then_some(before))
    }
}

impl Drop for Lowered {
    fn drop(&mut self) {
        if let Some(before) = &self.1 {
            std::fs::write(self.0, before).unwrap();
        }
    }
}

/// Takes all that it can get of what the kernel counts for each user, says so in a file, and holds it.
const HOARD: &str = r"
import array, ctypes, errno, os, select, signal, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def timers():
    for count in range(1 << 20):
        if libc.timer_create(1, None, ctypes.byref(ctypes.c_void_p())) != 0:
            return count, errno.errorcode[ctypes.get_errno()]
def in_flight():
    # Those of a pair that is closed itself stay in flight until the kernel collects them.
    kept = []
    try:
        while True:
            a, b = socket.socketpair()
            kept.append((a, b))
            a.setblocking(False)
            for _ in range(4):
                a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0] * 250))])
    except OSError as e:
        globals()['kept'] = kept
        return errno.errorcode[e.errno]
def watches():
    # Of one process as many as its descriptors allow.
    pipes = [os.pipe() for _ in range(60)]
    for _ in range(100):
        epoll = select.epoll()
        for pipe in pipes:
            for end in pipe:
                epoll.register(end)
        globals().setdefault('epolls', []).append(epoll)
def all_watches():
    while True:
        r, w = os.pipe()
        if os.fork() == 0:
            try:
                watches(); os.write(w, b'more')
            except OSError as e:
                os.write(w, errno.errorcode[e.errno].encode())
            signal.pause()
        os.close(w)
        said = os.read(r, 10)
        os.close(r)
        if said != b'more':
            return said.decode()
print(timers()[1], in_flight(), all_watches(), flush=True)
time.sleep(600)
";
/// What a program that does nothing bad needs of the same.
const MODEST: &str = r"
import array, ctypes, os, select, socket
assert ctypes.CDLL(None, use_errno=True).timer_create(1, None, ctypes.byref(ctypes.c_void_p())) == 0
a, b = socket.socketpair()
a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0]))])
b.recvmsg(1, 100)
epoll = select.epoll()
for _ in range(40):
    for end in os.pipe(): epoll.register(end)
print('fine')
";

#[test]
fn a_sandbox_that_takes_all_of_a_users_counts_takes_them_from_nobody_else() {
    if !rustix::process::geteuid().is_root() {
        return; // Only root can give an ordinary user the two capabilities.
    }
    let _watches = Lowered::new("/proc/sys/fs/epoll/max_user_watches", "200000");
    let folder = tempfile::Builder::new().prefix("zeroboot-counts-").tempdir().unwrap();
    let program = folder.path().join("zeroboot");
    std::fs::copy(env!("CARGO_BIN_EXE_zeroboot"), &program).unwrap();
    std::os::unix::fs::chown(folder.path(), Some(65534), Some(65534)).unwrap();
    // As the systemd unit does it.
    let before = format!(
        "export HOME={0}; set -- setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs --inh-caps=-all,+setuid,+setgid \
         --ambient-caps=-all,+setuid,+setgid --bounding-set=-all,+setuid,+setgid {0}/zeroboot serve --listen 127.0.0.1:0 \
         --pool 1 --python /usr/bin/python3 --node /usr/bin/node \"$@\"; exec \"$@\"",
        folder.path().display()
    );
    let served = Served::start(&before, &[]);
    assert!(!served.words.contains("all sandboxes have this server's user"), "{}", served.words);
    let post = |code: &str| {
        let body = serde_json::json!({"code": code, "timeout_seconds": 60, "limits": {"processes": 64}}).to_string();
        let head = "POST /v1/exec HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAccept: text/event-stream\r\n";
        let mut stream = TcpStream::connect(served.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        BufReader::new(stream)
    };
    let mut hoard = post(HOARD);
    let mut said = String::new();
    while !said.contains("EAGAIN") {
        assert!(hoard.read_line(&mut said).unwrap() > 0, "{said}");
    }
    assert!(said.contains("EAGAIN ETOOMANYREFS ENOSPC"), "{said}");
    for _ in 0..10 {
        // A connection of its own, which the server watches with epoll; and a sandbox.
        let mut modest = post(MODEST);
        let mut said = String::new();
        while !said.contains("event: end") && !said.contains("error") {
            assert!(modest.read_line(&mut said).unwrap() > 0, "{said}");
        }
        assert!(said.contains("fine"), "{said}");
    }
    // The server itself has given the rights up: but for the thread that starts zygotes.
    let mut with = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{}/task", served.child.id())).unwrap() {
        let path = task.unwrap().path();
        let status = std::fs::read_to_string(path.join("status")).unwrap();
        if !status.contains("CapPrm:\t0000000000000000") {
            with.push(std::fs::read_to_string(path.join("comm")).unwrap());
        }
    }
    assert_eq!(with, ["zygotes\n"]);
    drop(hoard);
    served.stop();
}

/// What a package can do while a zygote imports it.
const PACKAGE: &str = r"
import errno, os
def attempt(action, *args):
    try:
        return str(action(*args))
    except OSError as e:
        return errno.errorcode[e.errno]
handles = {n: attempt(os.readlink, f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if int(n) > 2}
found = {
    'host_ids': [line.split()[1] for line in open('/proc/self/uid_map')],
    'strangers': [t for t in handles.values() if t.startswith('/') and t != '/proc' and not t.startswith('/proc/')],
    'proc': attempt(open, '/proc/sys/kernel/core_pattern', 'w'),
    'own': attempt(open, '/proc/self/oom_score_adj', 'w'),
    'other': [attempt(open, f'/proc/self/fd/{n}/sys/kernel/core_pattern', 'w') for n, t in handles.items() if t == '/proc'],
    'server': attempt(os.kill, os.getppid(), 0),
}
";

/// Without it a first cell would import it: a tenth of a second.
#[test]
fn a_python_template_of_the_configuration_has_what_cells_need_in_memory() {
    // The test command's Python has it.
    let installed =
        Command::new(python(Who::Me)).args(["-c", "import IPython"]).stderr(Stdio::null()).status().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("zeroboot.toml");
    for (warm, there) in [("", installed.success()), ("warm = [\"json\"]\n", false)] {
        std::fs::write(&config, format!("[[template]]\nname = \"python\"\n{warm}")).unwrap();
        let args = ["--config", config.to_str().unwrap(), "--python", python(Who::Me)];
        let served = Served::start("true", &args);
        let answer = served.run("import sys; print('IPython' in sys.modules)");
        assert_eq!(answer["stdout"], if there { "True\n" } else { "False\n" }, "{answer}");
        served.stop();
    }
}

/// A directory with a Python that has one module of its own.
fn with_module(name: &str, text: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    // A sandbox has a /tmp of its own.
    let folder = tempfile::Builder::new().prefix("package-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let venv = folder.path().join("venv");
    let made = Command::new("python3").args(["-m", "venv", "--without-pip"]).arg(&venv).status().unwrap();
    assert!(made.success());
    let lib = std::fs::read_dir(venv.join("lib")).unwrap().next().unwrap().unwrap().path();
    std::fs::write(lib.join(format!("site-packages/{name}.py")), text).unwrap();
    let interpreter = venv.join("bin/python3");
    (folder, interpreter)
}

/// One that is too old, or half installed: cells have the shell of an interpreter without it.
#[test]
fn an_ipython_that_is_of_no_use_stops_no_server() {
    let (_folder, interpreter) = with_module("IPython", "");
    let served = Served::start("true", &["--python", interpreter.to_str().unwrap()]);
    let sandbox = served.post("/v1/sandboxes", &serde_json::json!({}));
    let cell = serde_json::json!({ "code": "6 * 7" });
    let done = served.post(&format!("/v1/sandboxes/{}/run", sandbox["id"].as_str().unwrap()), &cell);
    assert_eq!(done["value"], "42", "{done}");
    served.stop();
}

#[test]
fn a_package_that_is_imported_ahead_is_not_the_hosts_root() {
    // Of root and of an ordinary user alike; what differs is whose the zygote is.
    let is_root = rustix::process::geteuid().is_root();
    let (folder, interpreter) = with_module("hostile", PACKAGE);
    let config = folder.path().join("zeroboot.toml");
    let template = format!("[[template]]\nname = \"python\"\ninterpreter = {interpreter:?}\nwarm = [\"hostile\"]\n");
    std::fs::write(&config, template).unwrap();
    let served = Served::start("exec 8</etc/hostname 9</etc/passwd", &["--config", config.to_str().unwrap()]);
    let answer = served.run("import hostile, json; print(json.dumps(hostile.found))");
    let found: serde_json::Value = serde_json::from_str(answer["stdout"].as_str().unwrap()).expect("what it found");
    assert_eq!(found["strangers"], serde_json::json!([]), "descriptors of the server: {found}");
    assert_eq!((&found["proc"], &found["own"]), (&"EROFS".into(), &"EROFS".into()), "{found}");
    assert_eq!(found["other"], serde_json::json!(["EACCES"]), "{found}");
    if is_root {
        assert_eq!(found["server"], "EPERM", "{found}");
        let ids = found["host_ids"].as_array().unwrap();
        assert!(
            !ids.is_empty() && ids.iter().all(|id| id.as_str().unwrap().parse::<u32>().unwrap() > 1 << 30),
            "{found}"
        );
    }
    served.stop();
}
