//! What `kill -9` of parts costs. A test program of its own, because it kills this process's children.
#![allow(dead_code, reason = "the shared modules hold more than these tests need")]

#[path = "../http/client.rs"]
mod client;
#[path = "../http/fixture.rs"]
mod fixture;

use std::{
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::fixture::{Fixture, wait_for};

/// One at a time: each looks at the children of this process.
static ALONE: Mutex<()> = Mutex::new(());

fn kill_9(pid: i32) {
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
}

/// The children of a process.
fn children(of: u32) -> Vec<i32> {
    let own = of.to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1));
        if parent == Some(own.as_str()) {
            found.push(pid);
        }
    }
    found
}

#[test]
fn a_killed_zygote_costs_only_its_requests_and_comes_back() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let fixture = Fixture::new();
    let zygotes = children(std::process::id());
    assert!(!zygotes.is_empty());
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| fixture.post("/v1/exec", &json!({"code": "import time; time.sleep(20)"}), &[]));
        fixture.wait_for_live(1, Duration::from_secs(10));
        zygotes.iter().for_each(|pid| kill_9(*pid));
        let begun = Instant::now();
        let answer = slow.join().unwrap();
        // The worker died with its zygote: ours to answer for, not the code's.
        assert!(answer.status >= 500, "{} {}", answer.status, answer.text());
        assert!(begun.elapsed() < Duration::from_secs(10));
        wait_for("service again", Duration::from_secs(20), || {
            fixture.post("/v1/exec", &json!({"code": "print(1)"}), &[]).status == 200
        });
        wait_for("health again", Duration::from_secs(20), || fixture.get("/v1/health").json()["status"] == "ok");
    });
}

fn descendants(of: u32) -> Vec<i32> {
    let mut all = children(of);
    let mut at = 0;
    while at < all.len() {
        all.extend(children(all[at] as u32));
        at += 1;
    }
    all
}

#[test]
fn no_sandbox_survives_a_killed_server() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut server = Command::new(env!("CARGO_BIN_EXE_zeroboot"))
        .args(["serve", "--listen", "127.0.0.1:0", "--engine", "process"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(server.stderr.take().unwrap()).lines();
    let line = log.by_ref().map(|line| line.unwrap()).find(|line| line.contains("listens on")).unwrap();
    let address = line.split("listens on ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    let drained = std::thread::spawn(move || log.count());
    let body = json!({"code": "import time; time.sleep(100)", "timeout_seconds": 120}).to_string();
    let mut stream = client::connect(address);
    stream.write_all(&client::request("POST", "/v1/exec", &[fixture::JSON], body.as_bytes())).unwrap();
    wait_for("live sandbox", Duration::from_secs(20), || {
        let health = client::exchange(address, &client::request("GET", "/v1/health", &[], b""));
        health.json()["live"] == 1
    });
    let family = descendants(server.id());
    assert!(family.len() > 3, "{family:?}");
    kill_9(server.id() as i32);
    server.wait().unwrap();
    wait_for("end of every process", Duration::from_secs(10), || {
        family.iter().all(|pid| {
            // A process that ended and waits for its new parent is gone for our purpose.
            std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
        })
    });
    drained.join().unwrap();
}

#[test]
fn the_program_ends_in_order_on_sigterm() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let notify = folder.path().join("notify");
    let manager = std::os::unix::net::UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut server = Command::new(env!("CARGO_BIN_EXE_zeroboot"))
        .args(["serve", "--listen", "127.0.0.1:0", "--engine", "process"])
        .env("NOTIFY_SOCKET", &notify)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut buffer = [0; 200];
    let count = manager.recv(&mut buffer).unwrap();
    assert!(buffer[..count].starts_with(b"READY=1"));
    assert!(Command::new("kill").args(["-TERM", &server.id().to_string()]).status().unwrap().success());
    let count = manager.recv(&mut buffer).unwrap();
    assert!(buffer[..count].starts_with(b"STOPPING=1"));
    assert!(server.wait().unwrap().success());
}

#[test]
fn a_server_that_cannot_be_safe_does_not_start() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("keys.json");
    std::fs::write(&broken, r#"{"keys": ["zb_live_secret"]}"#).unwrap();
    let broken = broken.to_str().unwrap();
    for args in [
        &["--listen", "0.0.0.0:0"][..],
        &["--listen", "127.0.0.1:0", "--keys-file", "/nonexistent"],
        &["--listen", "127.0.0.1:0", "--keys-file", broken],
    ] {
        let done = Command::new(env!("CARGO_BIN_EXE_zeroboot")).arg("serve").args(args).output().unwrap();
        let text = String::from_utf8_lossy(&done.stderr);
        assert!(!done.status.success(), "{args:?}");
        assert!(text.contains("key"), "{args:?}: {}, {text}", done.status);
        assert!(!text.contains("secret"), "{text}");
    }
}

#[test]
#[ignore = "a measurement; `zeroboot bench serve` is the real one"]
fn what_http_adds() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let fixture = Fixture::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let overhead = runtime.block_on(zeroboot_server::measure_overhead(&fixture.engine, "python", 200)).unwrap();
    let quantile = |times: &[Duration], at| zeroboot_server::Overhead::quantile(times, at);
    for at in [0.5, 0.9, 0.99] {
        eprintln!("{at}: direct {:?}, HTTP {:?}", quantile(&overhead.direct, at), quantile(&overhead.http, at));
    }
    eprintln!("added at the median: {:?}", overhead.added_at_median());
}
