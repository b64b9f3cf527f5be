//! `zeroboot sandbox` against a real `zeroboot serve` with the process engine: each command, and what each says when it
//! cannot.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{fd::OwnedFd, unix::fs::PermissionsExt},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    process::Signal,
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize},
};
use serde_json::Value;

use self::harness::{Cli, Done, Who, address_of, python};

#[path = "harness/lib.rs"]
#[expect(dead_code, reason = "shared with other test files")]
mod harness;

const PATIENCE: Duration = Duration::from_secs(60);
const NOBODY: &str = "01990000-0000-7000-8000-000000000000";

/// A server, ended when this is dropped.
struct Served {
    child: Child,
    url: String,
    key: Option<String>,
    /// The certificate that clients trust.
    trust: Option<String>,
    _dir: tempfile::TempDir,
}

impl Served {
    fn start() -> Served {
        Served::with(false, &[])
    }

    fn with(keys: bool, options: &[&str]) -> Served {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_zeroboot"));
        command.args(["serve", "--listen", "127.0.0.1:0", "--pool", "2", "--engine", "process", "--warm", "json"]);
        command.args(options);
        command.args(["--python", python(Who::Me)]);
        for name in ["ZEROBOOT_CONFIG", "ZEROBOOT_ENGINE", "ZEROBOOT_API_KEYS_FILE", "ZEROBOOT_LOG"] {
            command.env_remove(name);
        }
        let mut key = None;
        if keys {
            let file = dir.path().join("keys.json");
            let mut make = Command::new(env!("CARGO_BIN_EXE_zeroboot"));
            let made = make.args(["keys", "create", "--keys-file"]).arg(&file).arg("tests").output().unwrap();
            key = Some(String::from_utf8(made.stdout).unwrap().trim().to_owned());
            command.arg("--keys-file").arg(&file);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let address = address_of(&mut child);
        let url = if options.contains(&"--tls-cert") {
            format!("https://localhost:{}", address.rsplit(':').next().unwrap())
        } else {
            format!("http://{address}")
        };
        let trust = options.iter().skip_while(|option| **option != "--tls-cert").nth(1).map(|file| (*file).to_owned());
        let served = Served { child, url, key, trust, _dir: dir };
        let started = Instant::now();
        // Until the first canary passed there is no sandbox.
        while !served.ready() {
            assert!(started.elapsed() < PATIENCE, "the server is not ready");
            std::thread::sleep(Duration::from_millis(50));
        }
        served
    }

    fn ready(&self) -> bool {
        let made = self.sandbox(["create", "--timeout", "20s"]).go();
        made.code() == 0 && self.sandbox(["rm", made.out().trim()]).go().code() == 0
    }

    /// `zeroboot sandbox …` for this server.
    fn sandbox<const N: usize>(&self, args: [&str; N]) -> Cli {
        let cli = Cli::bare(Who::Me).args(["sandbox"]).args(args).env("ZEROBOOT_BASE_URL", &self.url);
        let cli = cli.env("ZEROBOOT_API_KEY", self.key.as_deref().unwrap_or_default());
        match &self.trust {
            Some(file) => cli.env("SSL_CERT_FILE", file),
            None => cli,
        }
    }

    /// A new sandbox's id.
    fn create(&self) -> String {
        let id = self.sandbox(["create", "--template", "python"]).go().good().trim().to_owned();
        assert!(id.parse::<uuid::Uuid>().is_ok(), "{id}");
        id
    }

    /// The JSON that a command prints.
    fn json<const N: usize>(&self, args: [&str; N]) -> Value {
        serde_json::from_str(self.sandbox(args).go().good()).unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        // Ended already, where the test did that.
        rustix::process::kill_process(pid, Signal::TERM).unwrap_or_default();
        self.child.wait().map(drop).unwrap_or_default();
    }
}

/// Ended with this status, with exactly this on its outputs.
#[track_caller]
fn ends(done: &Done, status: i32, out: &str, err: &str) {
    assert_eq!((done.code(), done.out(), done.err()), (status, out, err));
}

#[test]
fn without_a_server_the_error_says_how_to_start_one() {
    let cli = |args: &[&str]| Cli::bare(Who::Me).args(["sandbox"]).args(args.iter().copied());
    let done = cli(&["list", "--base-url", "http://127.0.0.1:1"]).go();
    done.refused("no server at http://127.0.0.1:1").says("start one with `zeroboot serve`").says("ZEROBOOT_BASE_URL");
    cli(&["create"]).env("ZEROBOOT_BASE_URL", "unix:/nonexistent").go().refused("no server at unix:/nonexistent");
    for address in ["127.0.0.1:8080", "ftp://host", "http://", "http://a b"] {
        cli(&["list", "--base-url", address]).go().refused("is not an address of a server");
    }
    cli(&["list"]).env("ZEROBOOT_API_KEY", "a\u{7f}b").go().refused("has characters that a key cannot have");
    for wrong in
        [&["cp", "a"][..], &["run", "ID"], &["exec", "ID"], &["exec", "ID", "ls"], &["rm"], &["extend", "ID", "0"]]
    {
        cli(wrong).go().ended(125);
    }
}

#[test]
fn what_is_no_zeroboot_is_said_to_be_none() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for answer in [
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
            "HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n",
            "SSH-2.0\r\n",
        ] {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            let _length = stream.read(&mut request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    let list = || Cli::bare(Who::Me).args(["sandbox", "list", "--base-url", &url]).go();
    list().ended(125).says("is not JSON");
    list().refused("HTTP 404").says("is the server a Zeroboot?");
    list().refused("the connection to");
}

#[test]
fn run_keeps_state_and_prints_the_value_of_the_last_expression() {
    let served = Served::start();
    let id = &served.create();
    let run = |code: &str| served.sandbox(["run", id, "-c", code]).go();
    ends(&run("x = 41"), 0, "", "");
    ends(&run("x + 1"), 0, "42\n", "");
    ends(&run("'text'"), 0, "'text'\n", "");
    ends(&run("print('out'); None"), 0, "out\n", "");
    let failed = run("import sys; print('out'); print('err', file=sys.stderr); 1/0");
    assert_eq!((failed.code(), failed.out()), (1, "out\n"));
    failed.says("err\n").says("Traceback").says("ZeroDivisionError: division by zero");
    ends(&run("x"), 0, "41\n", "");

    ends(&served.sandbox(["run", id, "code.py"]).file("code.py", "y = 2\ny + 1").go(), 0, "3\n", "");
    ends(&served.sandbox(["run", id, "-"]).stdin("y * 5").go(), 0, "10\n", "");
    served.sandbox(["run", id, "missing.py"]).go().refused("cannot read missing.py");

    let result = served.json(["run", "--json", id, "-c", "print('a'); x + 1"]);
    assert_eq!((&result["value"], &result["stdout"], &result["outcome"]), (&"42".into(), &"a\n".into(), &"ok".into()));
    assert_eq!(served.sandbox(["run", "--json", id, "-c", "1/0"]).go().code(), 1);
    assert_eq!(served.sandbox(["run", "--context", "none", id, "-c", "1"]).go().refused("none").code(), 125);
}

#[test]
fn run_ends_as_its_code_does() {
    let served = Served::start();
    let id = &served.create();
    ends(&served.sandbox(["run", id, "-c", "kept = 1"]).go(), 0, "", "");
    let late = served.sandbox(["run", "--timeout", "400ms", id, "-c", "while True: pass"]).go();
    late.ended(124).says("the timeout of 400ms passed (--timeout)");

    // Ctrl-C is for the code.
    let code =
        "import time\nopen('began', 'w').close()\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('caught')";
    let live = served.sandbox(["run", id, "-c", code]).start();
    await_file(&served, id, "began");
    live.signal(Signal::INT);
    ends(&live.wait(), 0, "caught\n", "");
    let live = served.sandbox(["run", id, "-c", "open('again', 'w').close()\ntime.sleep(60)"]).start();
    await_file(&served, id, "again");
    live.signal(Signal::INT);
    live.wait().ended(130).says("KeyboardInterrupt");
    ends(&served.sandbox(["run", id, "-c", "kept"]).go(), 0, "1\n", "");

    let gone = served.sandbox(["run", id, "-c", "import os; os._exit(0)"]).go();
    gone.ended(137).says("its state is lost");
    served.sandbox(["run", id, "-c", "kept"]).go().ended(1).says("NameError");

    let live = served.sandbox(["run", id, "-c", "import time; open('third', 'w').close(); time.sleep(60)"]).start();
    await_file(&served, id, "third");
    served.sandbox(["rm", id]).go().good();
    live.wait().refused("The sandbox was deleted");
}

fn await_file(served: &Served, id: &str, name: &str) {
    let started = Instant::now();
    while served.sandbox(["exec", id, "--", "test", "-e", name]).go().code() != 0 {
        assert!(started.elapsed() < PATIENCE, "no file {name}");
    }
}

#[test]
fn contexts_are_made_listed_interrupted_restarted_and_ended() {
    let served = Served::start();
    let id = &served.create();
    ends(&served.sandbox(["contexts", "create", id, "other", "--cwd", "/tmp"]).go(), 0, "other\n", "");
    let unnamed = served.sandbox(["contexts", "create", id]).go().good().trim().to_owned();
    let in_other = |code: &str| served.sandbox(["run", "--context", "other", id, "-c", code]).go();
    ends(&in_other("z = 1; import os; os.getcwd()"), 0, "'/tmp'\n", "");
    let list = served.sandbox(["contexts", "list", id]).go();
    assert!(["NAME", "default", "other", "/tmp", &unnamed].iter().all(|word| list.good().contains(word)), "{list:?}");
    let names = served.json(["contexts", "list", "--json", id]);
    assert_eq!(names.as_array().unwrap().len(), 3);
    ends(&served.sandbox(["contexts", "interrupt", id, "other"]).go(), 0, "", "");
    ends(&in_other("z"), 0, "1\n", "");
    ends(&served.sandbox(["contexts", "restart", id, "other"]).go(), 0, "", "");
    in_other("z").ended(1).says("NameError");
    ends(&served.sandbox(["contexts", "rm", id, "other"]).go(), 0, "", "");
    served.sandbox(["contexts", "rm", id, "other"]).go().ended(125).says("contexts list ID");
    served.sandbox(["contexts", "create", id, &unnamed]).go().refused("");
}

#[test]
fn exec_passes_streams_and_status_through() {
    let served = Served::start();
    let id = &served.create();
    let exec = |args: &[&str]| served.sandbox(["exec", id, "--"]).args(args.iter().copied());
    ends(&exec(&["sh", "-c", "echo out; echo err >&2; exit 3"]).go(), 3, "out\n", "err\n");
    let bytes: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let done = exec(&["cat"]).stdin(&bytes).go();
    assert!(done.code() == 0 && done.out == bytes, "{} of {} bytes", done.out.len(), bytes.len());
    ends(&exec(&["sh", "-c", "read line; echo \"$line\""]).stdin("only this\nnot that\n").go(), 0, "only this\n", "");
    ends(&exec(&["cat"]).stdin_closed().go(), 0, "", "");
    ends(&exec(&["true"]).stdin_held().go(), 0, "", "");
    ends(&exec(&["sh", "-c", "kill -9 $$"]).go(), 137, "", "");
    ends(&exec(&["sh", "-c", "kill -TERM $$"]).go(), 143, "", "");
    exec(&["no-such-program"]).go().refused("no-such-program").says("name a program of the sandbox");

    let with = |options: &[&str], line: &str| {
        served.sandbox(["exec", id]).args(options.iter().copied()).args(["--", "sh", "-c", line])
    };
    ends(
        &with(&["--cwd", "/tmp", "-e", "A=b c", "-e", "OURS"], "pwd; echo $A $OURS").env("OURS", "o").go(),
        0,
        "/tmp\nb c o\n",
        "",
    );
    with(&["-e", "NOT_THERE"], "true").go().refused("our environment has no NOT_THERE");
    let late = with(&["--timeout", "300ms"], "echo before; sleep 60").go();
    ends(&late, 124, "before\n", "zeroboot: stopped: the timeout of 300ms passed (--timeout)\n");
    let result: Value = serde_json::from_str(with(&["--json"], "echo a; exit 4").go().ended(4).out()).unwrap();
    assert_eq!((&result["stdout"], &result["exit_code"]), (&"a\n".into(), &4.into()));

    // The program hears Ctrl-C, and decides.
    let live =
        with(&[], "trap 'echo caught; exit 9' INT; touch began; while :; do sleep 0.05; done").stdin_held().start();
    await_file(&served, id, "began");
    live.signal(Signal::INT);
    ends(&live.wait(), 9, "caught\n", "");

    // It ends with us.
    let mut live = Command::new(env!("CARGO_BIN_EXE_zeroboot"))
        .args(["sandbox", "exec", "--base-url", &served.url, "--tag", "left", id, "--", "sleep", "60"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let state = || {
        let commands = served.json(["ps", "--json", id]);
        let left = commands.as_array().unwrap().iter().find(|command| command["tag"] == "left");
        left.map(|command| command["state"].as_str().unwrap().to_owned())
    };
    wait_for(|| state().as_deref() == Some("running"));
    live.kill().unwrap();
    live.wait().unwrap();
    wait_for(|| state().as_deref() == Some("ended"));
}

fn wait_for(mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn commands_in_the_background_are_listed_followed_and_killed() {
    let served = Served::start();
    let id = &served.create();
    let detached = |line: &str| {
        let done = served.sandbox(["exec", "--detach", "--tag", "mark", id, "--", "sh", "-c", line]).go();
        done.good().trim().to_owned()
    };
    let command = &detached("echo one; sleep 0.4; echo two >&2; exit 6");
    let list = served.sandbox(["ps", id]).go();
    assert!(["PID", command, "mark", "echo one"].iter().all(|word| list.good().contains(word)), "{list:?}");
    ends(&served.sandbox(["logs", id, command]).go(), 6, "one\n", "two\n");
    ends(&served.sandbox(["logs", "--offset", "2", id, command]).go(), 6, "e\n", "two\n");
    served.sandbox(["kill", id, command]).go().refused("").says("run_ended");

    let trap = &detached("trap 'exit 5' USR1; while :; do sleep 0.05; done");
    std::thread::sleep(Duration::from_millis(300));
    ends(&served.sandbox(["kill", "-s", "usr1", id, trap]).go(), 0, "", "");
    served.sandbox(["logs", id, trap]).go().ended(5);
    let sleep = &detached("sleep 60");
    served.sandbox(["kill", "-s", "NONE", id, sleep]).go().refused("signal");
    ends(&served.sandbox(["kill", id, sleep]).go(), 0, "", "");
    served.sandbox(["logs", id, sleep]).go().ended(137);
    served.sandbox(["logs", id, NOBODY]).go().refused("").says("zeroboot sandbox ps ID");
}

#[test]
fn files_and_directories_are_copied_both_ways() {
    let served = Served::start();
    let id = &served.create();
    let cp = |from: &str, to: &str| served.sandbox(["cp", from, to]);
    let inside = |name: &str| format!("{id}:{name}");
    let sh = |line: &str| served.sandbox(["exec", id, "--", "sh", "-c", line]).go().good().to_owned();

    // Into a directory that is there, one that is not, under a new name, and from standard input.
    ends(&cp("report.csv", &inside("data/")).file("report.csv", "a,b\n").go(), 0, "", "");
    ends(&cp("report.csv", &inside("data")).file("report.csv", "c,d\n").go(), 0, "", "");
    ends(&cp("x", &inside("")).file("x", "home").go(), 0, "", "");
    ends(&cp("x", &inside("new/name")).file("x", "named").go(), 0, "", "");
    ends(&cp("-", &inside("typed")).stdin("in\0put").go(), 0, "", "");
    assert_eq!(sh("cat data/report.csv x new/name; wc -c < typed"), "c,d\nhomenamed6\n");
    served.sandbox(["cp", "a", "b", &inside("many")]).file("a", "1").file("b", "2").go().good();
    assert_eq!(sh("cat many/a many/b"), "12");

    // Out again: to a directory, to a name, to standard output; permissions come along.
    sh(
        "chmod 755 new/name; head -c 3000000 /dev/urandom > big 2>/dev/null || yes | head -c 3000000 > big; cksum < big > sum",
    );
    let done = cp(&inside("new/name"), ".").makes("name").go();
    assert_eq!((done.good(), done.made("name").unwrap().as_slice()), ("", &b"named"[..]));
    let done = cp(&inside("big"), "copy").makes("copy").go();
    let copy = done.made("copy").unwrap();
    assert_eq!(copy.len(), 3_000_000);
    assert_eq!(cp(&inside("big"), "-").go().out, copy);
    assert_eq!(cp(&inside("new/name"), "/dev/null").go().good(), "");

    // Trees.
    let tree = cp("tree", &inside("trees/"));
    let root = tree.work().join("tree");
    fs::create_dir_all(root.join("sub/empty")).unwrap();
    fs::write(root.join("sub/run.sh"), "#!/bin/sh\necho ran").unwrap();
    fs::set_permissions(root.join("sub/run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("..", root.join("back")).unwrap();
    let refused = tree.makes("tree").go();
    refused.refused("tree is a directory").says("-r copies it");
    let tree = served.sandbox(["cp", "-r", "tree", &inside("trees/")]).makes("tree");
    copy_tree(&refused, &tree.work());
    let done = tree.go();
    assert_eq!(done.code(), 1, "{done:?}");
    done.says("back is not copied");
    assert_eq!(sh("trees/tree/sub/run.sh; ls trees/tree/sub; ls trees/tree"), "ran\nempty\nrun.sh\nsub\n");
    sh("ln -s /etc/passwd trees/tree/link");
    served.sandbox(["cp", &inside("trees/tree"), "out"]).go().refused("is a directory");
    let done = served.sandbox(["cp", "-r", &inside("trees/tree"), "out"]).makes("out").go();
    assert_eq!(done.code(), 1);
    done.says("link is not copied");
    assert_eq!(done.made("out/sub/run.sh").unwrap(), b"#!/bin/sh\necho ran");
    assert!(done.made("out/link").is_none() && done.made("out/sub/empty/x").is_none());

    // What cannot be.
    cp("a", "b").go().refused("neither side is in a sandbox");
    cp(&inside("x"), &inside("y")).go().refused("both sides are in sandboxes");
    cp("missing", &inside("x")).go().refused("cannot read missing");
    cp(&inside("missing"), "x").go().refused("missing");
    cp("a", &inside("/usr/a")).file("a", "1").go().refused("/usr/a");
    cp("-", &inside("")).go().refused("standard input has no name");
    cp(&inside("x"), "no/such/dir").go().refused("cannot write no/such/dir");
    cp("a", &format!("{NOBODY}:x")).file("a", "1").go().refused("").says("zeroboot sandbox list");
}

/// The tree of an earlier run's working directory.
fn copy_tree(done: &Done, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(done.work().join("tree")).arg(to).status().unwrap();
    assert!(copied.success());
}

#[test]
fn sandboxes_are_listed_shown_extended_and_ended() {
    let served = Served::start();
    let made = served.json([
        "create",
        "--runtime",
        "python",
        "--timeout",
        "10m",
        "--idle-timeout",
        "5m",
        "-e",
        "A=b",
        "--label",
        "who=me",
        "--memory",
        "256M",
        "--processes",
        "20",
        "--json",
    ]);
    let id = made["id"].as_str().unwrap();
    assert_eq!((&made["limits"]["memory_mb"], &made["limits"]["processes"]), (&256.into(), &20.into()));
    ends(&served.sandbox(["exec", id, "--", "sh", "-c", "echo $A"]).go(), 0, "b\n", "");
    let other = &served.create();

    let list = served.sandbox(["list"]).go();
    assert!(["ID", id, other, "who=me", "process"].iter().all(|word| list.good().contains(word)), "{list:?}");
    let labelled = served.json(["list", "--label", "who=me", "--json"]);
    assert_eq!(labelled.as_array().unwrap().iter().map(|one| &one["id"]).collect::<Vec<_>>(), [id]);
    assert_eq!(served.json(["list", "--label", "who=you", "--json"]), serde_json::json!([]));

    let shown = served.sandbox(["show", id]).go();
    assert!(["template", "memory_mb=256", "who=me"].iter().all(|word| shown.good().contains(word)), "{shown:?}");
    let time = |sandbox: &Value| sandbox["expires_at"].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    let extended = served.json(["extend", "--json", id, "1h"]);
    assert!(time(&extended).duration_since(time(&served.json(["show", "--json", other]))).as_mins() >= 50);
    let end = served.sandbox(["extend", id, "30m"]).go();
    assert!(end.good().trim().parse::<jiff::Timestamp>().is_ok(), "{end:?}");
    served.sandbox(["extend", id, "300h"]).go().refused("timeout_seconds");

    // These are sandboxes of processes.
    served.sandbox(["branch", id, "--count", "2"]).go().refused("VM engine");
    for verb in ["checkpoint", "rollback", "promote"] {
        served.sandbox([verb, id]).go().refused("VM engine");
    }
    assert_eq!(served.sandbox(["checkpoints", "list", "--json"]).go().good(), "[]\n");
    assert!(served.sandbox(["checkpoints", "list", id]).go().good().starts_with("ID "));
    for verb in ["show", "rm"] {
        served.sandbox(["checkpoints", verb, NOBODY]).go().refused("No checkpoint has this id");
    }
    served.sandbox(["restore", NOBODY]).go().refused("No checkpoint has this id");

    let done = served.sandbox(["rm", NOBODY, id, other]).go();
    done.refused(NOBODY);
    for ended in [id, other] {
        served.sandbox(["show", ended]).go().refused("The sandbox was deleted").says("zeroboot sandbox create");
    }
    served.sandbox(["rm", id, other]).go().ended(125).says(id).says(other);
    served.sandbox(["show", "no-id"]).go().refused("No sandbox has this id");
    served.sandbox(["create", "--template", "none"]).go().refused("none");
    assert_eq!(served.sandbox(["list", "--json"]).go().good(), "[]\n");

    let short = served.sandbox(["create", "--timeout", "500ms"]).go().good().trim().to_owned();
    std::thread::sleep(Duration::from_secs(1));
    served.sandbox(["run", &short, "-c", "1"]).go().refused("The sandbox's lease has ended").says("create --timeout");
}

#[test]
fn a_key_is_taken_from_the_environment_and_shown_to_nobody() {
    let served = Served::with(true, &[]);
    let id = &served.create();
    for key in ["", "zb_live_wrong"] {
        let done = served.sandbox(["show", id]).env("ZEROBOOT_API_KEY", key).go();
        done.refused("").says("ZEROBOOT_API_KEY must hold a key of this server");
        assert!(!done.err().contains("zb_live_wrong"));
    }
    served.sandbox(["rm", id]).go().good();
}

#[test]
fn a_server_is_reached_over_tls_and_over_a_socket_of_the_file_system() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).display().to_string();
    let certificate = |name: &str| {
        let (cert, key) = (file(&format!("{name}.pem")), file(&format!("{name}.key")));
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"])
            .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout", &key, "-out", &cert])
            .output()
            .expect("openssl makes the test's certificate");
        assert!(made.status.success(), "{made:?}");
        (cert, key)
    };
    let ((cert, key), (other, _), socket) = (certificate("own"), certificate("other"), file("socket"));
    let served = Served::with(false, &["--tls-cert", &cert, "--tls-key", &key]);
    let id = &served.create();
    ends(&served.sandbox(["run", id, "-c", "6 * 7"]).go(), 0, "42\n", "");
    ends(&served.sandbox(["exec", id, "--", "cat"]).stdin("over TLS").go(), 0, "over TLS", "");
    let distrusting = served.sandbox(["list"]).env("SSL_CERT_FILE", &other).go();
    distrusting.refused("cannot make a TLS connection to https://localhost").says("SSL_CERT_FILE");

    let served = Served::with(false, &["--listen", &format!("unix:{socket}")]);
    let id = &served.create();
    let over = |args: [&str; 4]| served.sandbox(args).args(["--base-url", &format!("unix:{socket}")]);
    ends(&over(["run", id, "-c", "6 * 7"]).go(), 0, "42\n", "");
}

#[test]
fn a_server_that_goes_is_told_as_what_it_is() {
    let mut served = Served::start();
    let id = &served.create();
    let live = served.sandbox(["exec", id, "--", "sh", "-c", "echo up; sleep 60"]).stdin_held().start();
    wait_for(|| served.json(["ps", "--json", id]).as_array().is_some_and(|commands| !commands.is_empty()));
    served.child.kill().unwrap();
    served.child.wait().unwrap();
    let done = live.wait();
    done.ended(125).says("error: ").says("hint: ");
    assert_eq!(done.out(), "up\n");
}

/// A `zeroboot sandbox shell` on a terminal of ours.
struct Shell {
    child: Child,
    keyboard: File,
    screen: std::sync::mpsc::Receiver<Vec<u8>>,
    seen: String,
    /// The program's side, to look at its settings.
    side: OwnedFd,
}

impl Shell {
    fn start(served: &Served, id: &str, columns: u16, rows: u16, args: &[&str]) -> Shell {
        Shell::of(&[&["sandbox", "shell", id], args].concat(), Some(&served.url), columns, rows)
    }

    /// Any command of ours that wants a terminal.
    fn of(args: &[&str], url: Option<&str>, columns: u16, rows: u16) -> Shell {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let side = || File::options().read(true).write(true).open(&name).unwrap();
        set_size(&master, columns, rows);
        let kept = side();
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait", env!("CARGO_BIN_EXE_zeroboot")]).args(args);
        command.envs(url.map(|url| ("ZEROBOOT_BASE_URL", url))).env("ZEROBOOT_API_KEY", "");
        let child = command.stdin(side()).stdout(side()).stderr(side()).spawn().unwrap();
        let (sender, screen) = std::sync::mpsc::channel();
        let keyboard = File::from(master);
        let mut reader = keyboard.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Shell { child, keyboard, screen, seen: String::new(), side: kept.into() }
    }

    fn types(&mut self, text: &str) {
        self.keyboard.write_all(text.as_bytes()).unwrap();
    }

    /// Waits for a text; forgets what came up to it.
    #[track_caller]
    fn shows(&mut self, text: &str) {
        let started = Instant::now();
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let left = PATIENCE.saturating_sub(started.elapsed());
            let bytes = self.screen.recv_timeout(left).unwrap_or_else(|_| panic!("no {text:?} in {:?}", self.seen));
            self.seen.push_str(&String::from_utf8_lossy(&bytes));
        }
    }

    /// Types a line, again after a while: a shell throws away what is typed while it comes back from an interrupt.
    #[track_caller]
    fn types_until(&mut self, line: &str, text: &str) {
        for _ in 0..PATIENCE.as_secs() {
            self.types(line);
            let until = Instant::now() + Duration::from_secs(1);
            while let Ok(bytes) = self.screen.recv_timeout(until.saturating_duration_since(Instant::now())) {
                self.seen.push_str(&String::from_utf8_lossy(&bytes));
                if self.seen.contains(text) {
                    return self.shows(text);
                }
            }
        }
        panic!("no {text:?} in {:?}", self.seen);
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.side).unwrap().local_modes.contains(LocalModes::ICANON)
    }

    /// Its exit status; the terminal must be what it was.
    #[track_caller]
    fn ends(mut self, status: i32) {
        let ended = self.child.wait().unwrap();
        assert_eq!(ended.code(), Some(status), "{:?}", self.seen);
        assert!(!self.is_raw(), "the terminal is left raw");
    }

    /// The command itself: `setsid` waits for it.
    fn pid(&self) -> rustix::process::Pid {
        let children = format!("/proc/{0}/task/{0}/children", self.child.id());
        let text = fs::read_to_string(children).unwrap();
        let own = text.split_whitespace().next().map_or(self.child.id(), |pid| pid.parse().unwrap());
        rustix::process::Pid::from_raw(own as i32).unwrap()
    }
}

fn set_size(terminal: &OwnedFd, columns: u16, rows: u16) {
    tcsetwinsize(terminal, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
}

#[test]
fn a_shell_is_a_terminal_and_leaves_ours_as_it_was() {
    let served = Served::start();
    let id = &served.create();
    let mut shell = Shell::start(&served, id, 100, 30, &[]);
    shell.types("stty size\r");
    shell.shows("30 100");
    assert!(shell.is_raw());
    let resized = shell.keyboard.try_clone().unwrap().into();
    set_size(&resized, 90, 20);
    wait_for(|| {
        shell.types("stty size\r");
        std::thread::sleep(Duration::from_millis(200));
        let more: Vec<u8> = shell.screen.try_iter().flatten().collect();
        shell.seen.push_str(&String::from_utf8_lossy(&more));
        shell.seen.contains("20 90")
    });
    // Ctrl-C goes through: it ends what runs there, not us.
    shell.types("echo be''fore; sleep 60; echo not''this\r");
    shell.shows("before");
    shell.types("\x03");
    shell.types_until("echo af''ter; tty >/dev/null && echo a ter''minal\r", "after");
    shell.shows("a terminal");
    assert!(!shell.seen.contains("notthis"));
    shell.types("exit 7\r");
    shell.ends(7);

    let mut line = Shell::start(&served, id, 80, 24, &["--cwd", "/tmp", "pwd; exit 4"]);
    line.shows("/tmp");
    line.ends(4);

    // Also when we are told to end, and when the sandbox goes.
    let mut shell = Shell::start(&served, id, 80, 24, &["echo be''gun; exec sleep 61"]);
    shell.shows("begun");
    assert!(shell.is_raw());
    rustix::process::kill_process(shell.pid(), Signal::TERM).unwrap();
    shell.ends(143);
    let sleeps = || served.json(["ps", "--json", id]).to_string().contains("\"running\"");
    wait_for(|| !sleeps());
    let mut shell = Shell::start(&served, id, 80, 24, &["echo be''gun; sleep 62"]);
    shell.shows("begun");
    served.sandbox(["rm", id]).go().good();
    shell.shows("The sandbox was deleted");
    shell.ends(125);
}

#[test]
fn run_has_a_prompt_in_a_sandbox_of_its_own() {
    let args = ["run", "--engine", "process", "--python", python(Who::Me)];
    let mut prompt = Shell::of(&[&args[..], &["-i", "-e", "WORD=a word", "-c", "x = 41"]].concat(), None, 90, 20);
    prompt.shows(">>> ");
    assert!(prompt.is_raw());
    prompt.types("x + 1\r");
    prompt.shows("42");
    prompt
        .types("import os, sys; print(os.environ['WO' + 'RD'], os.get_terminal_size().columns, sys.stdin.isatty())\r");
    prompt.shows("a word 90 True");
    // Ctrl-C is the code's.
    prompt.types("while True: pass\r\r");
    prompt.types("\x03");
    prompt.shows("KeyboardInterrupt");
    prompt.types_until("print('sti' + 'll here')\r", "still here");
    prompt.types("sys.exit(7)\r");
    prompt.ends(7);

    // Node, with a file before the prompt; Ctrl-D ends it.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("first.js");
    fs::write(&file, "globalThis.y = 20").unwrap();
    let mut prompt = Shell::of(&["run", "--engine", "process", "-i", file.to_str().unwrap()], None, 80, 24);
    prompt.shows("> ");
    prompt.types("y * 2 + 2\r");
    prompt.shows("42");
    prompt.types("\x04");
    prompt.ends(0);
    // When we are told to end, our terminal is what it was.
    let mut prompt = Shell::of(&[&args[..], &["-i"]].concat(), None, 80, 24);
    prompt.shows(">>> ");
    rustix::process::kill_process(prompt.pid(), Signal::TERM).unwrap();
    prompt.ends(143);
}

#[test]
fn a_prompt_wants_a_terminal_and_has_no_time_limit() {
    let run = |args: &[&str]| Cli::bare(Who::Me).args(["run", "--engine", "process"]).args(args.to_vec()).go();
    run(&["-i"]).refused("-i: standard input is not a terminal").says("runs the code that is piped into it");
    run(&["-i", "--timeout", "5s"]).ended(125).says("cannot be used with");
}

#[test]
fn a_shell_wants_a_terminal() {
    let served = Served::start();
    let id = &served.create();
    served.sandbox(["shell", id]).go().refused("standard input is not a terminal").says("zeroboot sandbox exec");
    let mut shell = Shell::start(&served, NOBODY, 80, 24, &[]);
    shell.shows("No sandbox has this id");
    shell.ends(125);
}
