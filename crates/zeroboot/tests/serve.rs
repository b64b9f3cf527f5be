//! `zeroboot serve` as it is started: what it refuses, and what it does with the process that it is.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    process::{Child, ChildStderr, Command, Stdio},
    time::Duration,
};

/// A server that was started by a shell, after `before`.
struct Served {
    child: Child,
    address: SocketAddr,
    /// What it wrote until it listened.
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
        while served.address.port() == 0 {
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
            "a sandbox has 512 MiB by default, and all of them together may have 256 MiB",
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
    let most = memory();
    assert!(most > before + 10 && most < before + 150, "{before} MiB before, {most} MiB with a crowd");
    drop(crowd);
    let begun = std::time::Instant::now();
    while memory() > before + (most - before) / 4 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{before}, {most}, and {} MiB now", memory());
        std::thread::sleep(Duration::from_millis(100));
    }
}
