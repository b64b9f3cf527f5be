//! Packages, warming and installers on the process engine. No test asks a registry: wheels are made here, and npm talks to
//! a server of this file's.

#[path = "harness/lib.rs"]
#[allow(dead_code)]
mod harness;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use harness::{Cli, Who, python};

/// Directories that a sandbox may see: it has its own `/tmp`.
fn place() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Writes a wheel of one module: its name, version, source, and what it requires.
fn wheel(dir: &Path, name: &str, source: &str, requires: &str) -> PathBuf {
    let script = r#"
import sys, zipfile
path, name, source, requires = sys.argv[1:]
info = name + "-1.0.dist-info/"
meta = "Metadata-Version: 2.1\nName: %s\nVersion: 1.0\n" % name
meta += "".join("Requires-Dist: %s\n" % word for word in requires.split())
with zipfile.ZipFile(path, "w") as wheel:
    wheel.writestr(name + ".py", source)
    wheel.writestr(info + "METADATA", meta)
    wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr(info + "RECORD", "%s.py,,\n%sMETADATA,,\n%sWHEEL,,\n%sRECORD,,\n" % (name, info, info, info))
"#;
    let path = dir.join(format!("{name}-1.0-py3-none-any.whl"));
    let made = Command::new(python(Who::Me)).args(["-c", script]).arg(&path).args([name, source, requires]).status();
    assert!(made.unwrap().success());
    path
}

/// The command with a cache and wheels of its own.
fn with_wheels(cache: &Path, wheels: &Path) -> Cli {
    Cli::run(Who::Me)
        .env("XDG_CACHE_HOME", cache.to_str().unwrap())
        .env("PIP_NO_INDEX", "1")
        .env("PIP_FIND_LINKS", wheels.to_str().unwrap())
}

#[test]
fn packages_are_installed_once_and_what_the_python_has_stays() {
    let place = place();
    wheel(place.path(), "zb_alpha", "import zb_beta\nvalue = zb_beta.value + 1", "zb_beta");
    wheel(place.path(), "zb_beta", "value = 41", "");
    let run =
        |code: &str| with_wheels(&place.path().join("cache"), place.path()).args(["--with", "zb_alpha"]).code(code);
    let first = run("import zb_alpha, pip; print(zb_alpha.value)").go();
    assert_eq!(first.ended(0).says("installing zb_alpha for Python").out(), "42\n");
    assert_eq!(first.err().lines().count(), 1, "{first:?}");
    // In silence, and without pip: the wheels are not needed any more.
    fs::remove_file(place.path().join("zb_alpha-1.0-py3-none-any.whl")).unwrap();
    assert_eq!(run("import zb_alpha; print(zb_alpha.value)").go().good(), "42\n");
    // Code cannot write there, so that it cannot leave anything for the next.
    run("import zb_alpha; open(zb_alpha.__file__, 'a')").go().ended(1).says("Error: [Errno ");
    // What holds for every sandbox: its memory is an image's, and, where root starts it, its user is its own.
    let facts = "import zb_alpha\nprint('zeroboot-image' in open('/proc/self/maps').read())\nprint(int(open('/proc/self/uid_map').read().split()[1]) > 1_500_000_000)";
    let seen = run(facts).args(["--warm", "zb_alpha"]).env("ZEROBOOT_TEST_IMAGE", "1").go();
    let own_user = if rustix::process::geteuid().is_root() { "True" } else { "False" };
    assert_eq!(seen.good(), format!("True\n{own_user}\n"));
}

#[test]
fn a_package_that_pip_does_not_find_is_said_and_leaves_nothing() {
    let place = place();
    let cache = place.path().join("cache");
    let done = with_wheels(&cache, place.path()).args(["--with", "zb_nowhere"]).code("1").go();
    done.ended(125).says("pip could not install zb_nowhere: ").says("\nhint: ");
    let whole = fs::read_dir(cache.join("zeroboot/environments")).unwrap().flatten();
    assert!(!whole.map(|entry| entry.path()).any(|path| path.join("complete").exists()));
    with_wheels(&cache, place.path()).args(["--with", "--pre"]).code("1").go().refused("is not a requirement");
}

#[test]
fn a_maker_that_is_killed_leaves_nothing_that_is_used() {
    let place = place();
    let cache = place.path().join("cache");
    // A pip that never ends, where the interpreter has none of its own.
    let slow = Cli::run(Who::Me)
        .env("XDG_CACHE_HOME", cache.to_str().unwrap())
        .env("PIP_INDEX_URL", "http://192.0.2.1/")
        .env("PIP_TIMEOUT", "600")
        .args(["--with", "zb_gamma"])
        .code("1")
        .start();
    let half = || {
        let made = fs::read_dir(cache.join("zeroboot/environments")).into_iter().flatten().flatten();
        made.map(|entry| entry.path()).find(|path| path.join("venv/bin/python").exists())
    };
    let begun = Instant::now();
    while half().is_none() {
        assert!(begun.elapsed() < Duration::from_secs(60), "no environment was begun");
        std::thread::sleep(Duration::from_millis(10));
    }
    for process in slow.processes() {
        let pid: i32 = process.split(' ').next().unwrap().parse().unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        // One that has ended by now needs no signal.
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
    }
    slow.wait().ended(137);
    let half = half().unwrap();
    assert!(!half.join("complete").exists());
    fs::write(half.join("left-over"), "").unwrap();
    wheel(place.path(), "zb_gamma", "value = 7", "");
    let again =
        with_wheels(&cache, place.path()).args(["--with", "zb_gamma"]).code("import zb_gamma; print(zb_gamma.value)");
    assert_eq!(again.go().ended(0).out(), "7\n");
    assert!(!half.join("left-over").exists() && half.join("complete").exists());
}

/// A registry of one package, until it is dropped.
struct Registry(Child, u16);

impl Registry {
    fn of(dir: &Path) -> Registry {
        let script = r#"
import base64, functools, hashlib, http.server, io, json, os, sys, tarfile
os.chdir(sys.argv[1])
def packed(files):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo("package/" + name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return data.getvalue()
about = {"name": "zb-left", "version": "1.0.0", "main": "index.js"}
tarball = packed({"package.json": json.dumps(about), "index.js": "module.exports = (n) => n + 1;"})
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.endswith(".tgz"):
            body, kind = tarball, "application/octet-stream"
        elif self.path == "/zb-left":
            integrity = "sha512-" + base64.b64encode(hashlib.sha512(tarball).digest()).decode()
            dist = {"tarball": "http://127.0.0.1:%d/zb-left.tgz" % port, "integrity": integrity}
            body = json.dumps({"name": "zb-left", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": dict(about, dist=dist)}}).encode()
            kind = "application/json"
        else:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
port = server.server_address[1]
with open("port.new", "w") as file:
    file.write(str(port))
os.rename("port.new", "port")
server.serve_forever()
"#;
        let child = Command::new(python(Who::Me)).args(["-c", script]).arg(dir).stdin(Stdio::null()).spawn().unwrap();
        let begun = Instant::now();
        let port = loop {
            if let Ok(text) = fs::read_to_string(dir.join("port")) {
                break text.parse().unwrap();
            }
            assert!(begun.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(10));
        };
        Registry(child, port)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_node_package_works_with_require_and_import() {
    let place = place();
    let registry = Registry::of(place.path());
    let run = |code: &str| {
        Cli::bare(Who::Me)
            .args(["run", "--engine", "process", "--runtime", "node", "--with", "zb-left"])
            .env("XDG_CACHE_HOME", place.path().join("cache").to_str().unwrap())
            .env("npm_config_cache", place.path().join("npm").to_str().unwrap())
            .env("npm_config_registry", &format!("http://127.0.0.1:{}/", registry.1))
            .code(code)
    };
    let done = run("console.log(require('zb-left')(1))").go();
    assert_eq!(done.ended(0).says("installing zb-left for Node").out(), "2\n");
    assert_eq!(run("import left from 'zb-left'\nconsole.log(left(2))").go().good(), "3\n");
    assert_eq!(run("import('zb-left').then((left) => console.log(left.default(3)))").go().good(), "4\n");
    assert_eq!(run("console.log(require.resolve('zb-left'))").go().good(), "/node_modules/zb-left/index.js\n");
}

#[test]
fn an_optional_module_that_starts_threads_is_dropped_and_named_and_a_needed_one_is_refused() {
    let place = place();
    wheel(
        place.path(),
        "zb_threads",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
        "",
    );
    let run = |warm: &str, code: &str| {
        with_wheels(&place.path().join("cache"), place.path()).args(["--with", "zb_threads", "--warm", warm]).code(code)
    };
    let code =
        "import sys, threading; print('zb_threads' in sys.modules, 'json' in sys.modules, threading.active_count())";
    let done = run("zb_threads?,json", code).go();
    assert_eq!(done.ended(0).says("not warmed: zb_threads: it starts threads").out(), "False True 1\n");
    // Later, when there is nothing to fork any more, it may.
    assert_eq!(
        run("zb_threads?", "import zb_threads, threading; print(threading.active_count())").go().ended(0).out(),
        "2\n"
    );
    run("zb_threads", "1").go().refused("cannot warm module 'zb_threads': it starts threads");
}

#[test]
fn a_module_that_would_share_memory_between_sandboxes_is_refused() {
    let place = place();
    wheel(place.path(), "zb_shared", "import mmap\nboard = mmap.mmap(-1, 4096)", "");
    let cli =
        with_wheels(&place.path().join("cache"), place.path()).args(["--with", "zb_shared", "--warm", "zb_shared"]);
    cli.code("1").go().ended(125).says("shares memory with all forks");
}

#[test]
fn a_module_may_write_while_it_is_warmed_and_no_sandbox_sees_it() {
    let place = place();
    let source = "import os\nfor place in (os.path.expanduser('~'), '/tmp'):\n    open(place + '/cache', 'w').write('x')\nwarmed = os.environ['ZB_SAYS']";
    wheel(place.path(), "zb_writes", source, "");
    let cli = with_wheels(&place.path().join("cache"), place.path());
    let cli = cli.args(["--with", "zb_writes", "--warm", "zb_writes", "--warm-env", "ZB_SAYS=hello"]);
    let code = "import os, sys; print(sys.modules['zb_writes'].warmed, os.listdir(), os.listdir('/tmp'))";
    assert_eq!(cli.code(code).go().ended(0).out(), "hello [] []\n");
}

#[test]
fn pip_without_a_network_fails_at_once_and_says_why() {
    // By default it tries five times more, with pauses, and says so.
    let code = "import subprocess, sys
done = subprocess.run([sys.executable, '-m', 'pip', 'install', 'zb-nowhere'], capture_output=True, text=True)
print(done.returncode, 'this-sandbox-has-no-network' in done.stdout + done.stderr, 'Retrying' in done.stdout + done.stderr)
print(done.stderr, file=sys.stderr)";
    assert_eq!(Cli::run(Who::Me).code(code).go().ended(0).out(), "1 True False\n");
}

#[test]
fn pip_installs_a_wheel_into_home() {
    let place = place();
    let file = wheel(place.path(), "zb_local", "value = 5", "");
    let code = "import subprocess, sys
subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', './zb_local-1.0-py3-none-any.whl'], check=True)
import zb_local
print(zb_local.value, zb_local.__file__.startswith('/home/sandbox/'))
print(subprocess.run([sys.executable, '-c', 'import zb_local; print(zb_local.value)'], capture_output=True, text=True).stdout)";
    let cli = Cli::run(Who::Me).args(["--put", file.to_str().unwrap()]).code(code);
    assert_eq!(cli.go().ended(0).out(), "5 True\n5\n\n");
}

#[test]
fn npm_without_a_network_fails_at_once_and_says_why() {
    // By default it waits 10 s and then 60 s before it tries again: longer than this run may take.
    let code =
        "const done = require('child_process').spawnSync('npm', ['install', 'zb-nowhere'], { encoding: 'utf8' });
console.log(done.status !== 0, /this-sandbox-has-no-network/.test(done.stderr));
console.error(done.stderr)";
    let cli = Cli::bare(Who::Me).args(["run", "--engine", "process", "--runtime", "node"]).code(code);
    assert_eq!(cli.go().ended(0).out(), "true true\n");
}

#[test]
fn a_python_where_a_sandbox_has_its_own_files_is_refused_with_the_reason() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let venv = dir.path().join("venv");
    let made = Command::new(python(Who::Me)).args(["-m", "venv", "--without-pip"]).arg(&venv).status().unwrap();
    assert!(made.success());
    let run =
        |path: &Path| Cli::bare(Who::Me).args(["run", "--engine", "process", "--python"]).args([path]).code("1").go();
    run(&venv.join("bin/python")).refused("a sandbox has its own /tmp");
    run(&venv).refused("a sandbox has its own /tmp");
    run(dir.path()).refused("holds no bin/python");
}

#[test]
fn a_virtualenvs_directory_is_a_python() {
    let place = place();
    let venv = place.path().join("venv");
    let made = Command::new(python(Who::Me)).args(["-m", "venv", "--without-pip"]).arg(&venv).status().unwrap();
    assert!(made.success());
    let cli = Cli::bare(Who::Me).args(["run", "--engine", "process", "--python"]).args([&venv]);
    assert_eq!(cli.code("import sys; print(sys.prefix)").go().good(), format!("{}\n", venv.display()));
}

#[test]
fn env_shows_what_is_inside() {
    let done = Cli::bare(Who::Me).args(["env", "--engine", "process", "--python", python(Who::Me), "--json"]).go();
    let facts: serde_json::Value = serde_json::from_str(done.good()).unwrap();
    assert!(facts["interpreter"].as_str().unwrap().starts_with("CPython 3."), "{facts}");
    assert!(
        facts["packages"].as_array().unwrap().iter().any(|one| one.as_str().unwrap().starts_with("pip ")),
        "{facts}"
    );
    let places: Vec<&str> =
        facts["writable"].as_array().unwrap().iter().map(|one| one["path"].as_str().unwrap()).collect();
    assert_eq!(places, ["/home/sandbox", "/tmp", "/dev/shm"]);
    assert_eq!((&facts["default_memory_mib"], &facts["working_directory"]), (&512.into(), &"/home/sandbox".into()));
    let text = Cli::bare(Who::Me).args(["env", "--engine", "process", "--runtime", "node"]).go();
    assert!(text.good().contains("interpreter        Node.js v"), "{text:?}");
}

#[test]
fn a_template_that_is_neither_a_recipe_nor_built_is_refused_with_the_names() {
    let cli = Cli::run(Who::Me).args(["--template", "cobol"]).code("1");
    cli.go().refused("no recipe is called \"cobol\"").says("data-science");
}

/// The one hint of a run that ended with an uncaught error, as the API gives it.
#[track_caller]
fn hint(cli: Cli) -> String {
    let done = cli.args(["--json"]).go();
    let result: serde_json::Value = serde_json::from_str(done.ended(1).out()).unwrap();
    let hints = result["hints"].as_array().unwrap();
    assert_eq!(hints.len(), 1, "{result}");
    hints[0].as_str().unwrap().to_owned()
}

#[test]
fn an_uncaught_error_gets_a_hint_where_the_sandbox_knows_more() {
    for (code, says) in [
        ("import urllib.request; urllib.request.urlopen('http://example.com')", "there is no network in this sandbox"),
        ("import socket; socket.create_connection(('192.0.2.1', 80), 2)", "there is no network in this sandbox"),
        ("import sklearn.svm", "package scikit-learn is not installed in this sandbox"),
        ("import no_such_package", "(`--with no_such_package`); installed: "),
        ("open('/usr/lib/x', 'w')", "/usr/lib/x is in a read-only place; write to /home/sandbox"),
        ("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20)); f.flush()", "a file may have at most 64 MiB"),
        ("fs = []\nwhile True: fs.append(open('/dev/null'))", "at most 256 open files"),
        (
            "n = 0\nwhile True:\n    n += 1\n    open(f'f{n}', 'wb').write(bytes(60 << 20))",
            "the disk of this sandbox is full: it holds 256 MiB here",
        ),
        ("x = bytearray(1 << 44)", "needed more memory than this sandbox may use"),
        ("import subprocess\np = []\nwhile True: p.append(subprocess.Popen(['sleep', '60']))", "limit of processes"),
        (
            "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
            "limit of processes",
        ),
    ] {
        let memory = if code.contains("<< 20))") { "1G" } else { "512M" };
        let got = hint(Cli::run(Who::Me).args(["--memory", memory, "--processes", "16"]).code(code));
        assert!(got.contains(says), "{code}: {got}");
    }
}

#[test]
fn an_error_of_the_codes_own_gets_no_hint() {
    for code in ["1/0", "open('missing')", "import sys; sys.exit(3)", "raise OSError(5, 'x')", "import os.nothing"] {
        let done = Cli::run(Who::Me).args(["--json"]).code(code).go();
        let result: serde_json::Value = serde_json::from_str(done.out()).unwrap();
        assert_eq!(result["hints"], serde_json::json!([]), "{code}");
    }
}

#[test]
fn the_command_line_shows_the_hint_below_the_traceback() {
    let done = Cli::run(Who::Me).code("import no_such_package").go();
    done.ended(1).says("ModuleNotFoundError: No module named 'no_such_package'\nhint: package no_such_package is not");
}

#[test]
fn node_gives_the_same_hints() {
    for (code, says) in [
        ("require('no-such-package')", "package no-such-package is not installed in this sandbox"),
        ("import x from '@some/package/file.js'", "package @some/package is not installed in this sandbox"),
        ("fetch('http://example.com')", "there is no network in this sandbox"),
        ("require('fs').writeFileSync('/usr/x', '1')", "/usr/x is in a read-only place"),
        ("const fs = require('fs'); for (;;) fs.openSync('/dev/null')", "open files"),
    ] {
        let got = hint(Cli::bare(Who::Me).args(["run", "--engine", "process", "--runtime", "node"]).code(code));
        assert!(got.contains(says), "{code}: {got}");
    }
    let done =
        Cli::bare(Who::Me).args(["run", "--engine", "process", "--runtime", "node", "--json"]).code("null.x").go();
    assert!(done.out().contains("\"hints\":[]"), "{done:?}");
}

#[test]
fn a_hint_that_the_code_forges_is_one_line_of_text() {
    // What looks like one but has a control character is not passed on; a second one changes nothing.
    let code = "import os, struct\nfor fd in range(20, 40):\n    try:\n        for text in (b'a\\x1b[2J', b'first', b'second'):\n            os.write(fd, struct.pack('<IB3x', len(text) + 1, 0x88) + b'\\x03' + text)\n    except OSError:\n        pass\nraise SystemExit(1)";
    assert_eq!(hint(Cli::run(Who::Me).code(code)), "first");
}

#[test]
fn a_template_of_the_servers_configuration_has_its_packages() {
    use std::io::{BufRead as _, BufReader, Read as _, Write as _};
    let place = place();
    wheel(place.path(), "zb_served", "import os\nvalue = os.environ['ZB_SAYS']", "");
    let config = place.path().join("zeroboot.toml");
    let text = "[[template]]\nname = \"mine\"\nlanguage = \"python\"\npip = [\"zb_served\"]\nwarm = [\"zb_served\"]\npool = 1\nenv = { ZB_SAYS = \"hello\" }\n";
    fs::write(&config, text).unwrap();
    let mut server = Command::new(env!("CARGO_BIN_EXE_zeroboot"))
        .args(["serve", "--engine", "process", "--listen", "127.0.0.1:0", "--python", python(Who::Me), "--config"])
        .arg(&config)
        .env("XDG_CACHE_HOME", place.path().join("cache"))
        .env("PIP_NO_INDEX", "1")
        .env("PIP_FIND_LINKS", place.path())
        .env_remove("ZEROBOOT_API_KEYS_FILE")
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(server.stderr.take().unwrap());
    let mut words = String::new();
    let address = loop {
        assert!(said.read_line(&mut words).unwrap() > 0, "it ended: {words}");
        if let Some(rest) = words.split("zeroboot listens on ").nth(1) {
            break rest.split_whitespace().next().unwrap().to_owned();
        }
    };
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    let body = r#"{"code": "import sys; print(sys.modules['zb_served'].value)", "template": "mine"}"#;
    let head = "POST /v1/exec HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n";
    write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_child(&server), rustix::process::Signal::TERM).unwrap();
    said.read_to_string(&mut words).unwrap();
    server.wait().unwrap();
    assert!(answer.contains(r#""stdout":"hello\n""#), "{answer}\n{words}");
    assert!(words.contains("installing zb_served for Python"), "{words}");
}
