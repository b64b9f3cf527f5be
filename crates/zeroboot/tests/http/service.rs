//! Health, metrics, admission.

use std::{os::unix::fs::PermissionsExt as _, time::Duration};

use serde_json::json;
use zeroboot_engine::Engine;
use zeroboot_server::{Listen, Server};

use crate::{
    client,
    fixture::{Fixture, JSON, Setup, isolation, patience, wait_for},
};

#[test]
fn a_server_that_warms_its_templates_says_so_and_lets_requests_wait() {
    let folder = tempfile::tempdir().unwrap();
    let (program, go) = (folder.path().join("program"), folder.path().join("go"));
    // A zygote that warms until the file is there.
    let binary = env!("CARGO_BIN_EXE_zeroboot");
    let script = format!("#!/bin/sh\nwhile [ ! -e '{}' ]; do sleep 0.02; done\nexec '{binary}' \"$@\"\n", go.display());
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let setup = Setup::default();
    let mut engine_config = setup.engine_config();
    engine_config.program = program;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let engine = runtime.block_on(async { Engine::begin(engine_config).unwrap() });
    let server = runtime.block_on(Server::bind(setup.config, engine.clone())).unwrap();
    let [Listen::Tcp(address)] = server.addresses()[..] else { panic!("one address") };
    let serving = runtime.spawn(server.run(std::future::pending()));
    let health = || client::exchange(address, &client::request("GET", "/v1/health", &[], b""));

    let answer = health();
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")), "{}", answer.text());
    let body = answer.json();
    assert_eq!((&body["status"], &body["templates"]["python"]["ready"]), (&json!("warming"), &json!(false)), "{body}");
    std::thread::scope(|scope| {
        let early = scope.spawn(|| {
            let body = br#"{"code": "print(6 * 7)"}"#;
            client::exchange(address, &client::request("POST", "/v1/exec", &[JSON], body))
        });
        let metrics = || client::exchange(address, &client::request("GET", "/v1/metrics", &[], b"")).text();
        wait_for("an exec that waits", patience(Duration::from_secs(60)), || {
            metrics().contains("\nzeroboot_concurrent_forks 1\n")
        });
        assert_eq!(health().json()["status"], "warming");
        // It keeps nobody from another template: it has no place yet.
        assert_eq!(engine.stats().live, 0);
        std::fs::write(&go, "").unwrap();
        let answer = early.join().unwrap();
        assert_eq!((answer.status, &answer.json()["stdout"]), (200, &json!("42\n")), "{}", answer.text());
    });
    wait_for("health", patience(Duration::from_secs(20)), || health().json()["status"] == "ok");
    serving.abort();
    runtime.block_on(engine.shutdown(Duration::from_secs(1)));
}

#[test]
fn health_says_what_the_templates_can_do() {
    let fixture = Fixture::new();
    let answer = fixture.get("/health");
    assert_eq!(answer.status, 200);
    let body = answer.json();
    assert_eq!(body["status"], "ok", "{body}");
    let python = &body["templates"]["python"];
    assert_eq!(
        (&python["ready"], &python["isolation"], &python["engine"]),
        (&json!(true), &json!(isolation().as_str()), &json!(isolation().as_str()))
    );
    assert!(python["memory_mb"].as_f64().unwrap() > 1.0, "{body}");
    assert_eq!(python["pool_target"], 2);
}

#[test]
fn metrics_count_what_happened() {
    let fixture = Fixture::new();
    fixture.run("print(1)");
    fixture.run("1/0");
    fixture.exec(&json!({"code": "while True: pass", "timeout_seconds": 0.2}));
    fixture.post("/v1/exec", &json!({"code": "1", "language": "ruby"}), &[]);
    let text = fixture.get("/v1/metrics").text();
    let execs = format!(
        "zeroboot_execs_total{{isolation=\"{}\",template=\"python\",outcome=\"deadline_passed\"}} 1",
        isolation().as_str()
    );
    for line in [
        "zeroboot_total_executions{status=\"success\"} 1",
        "zeroboot_total_executions{status=\"error\"} 1",
        "zeroboot_total_executions{status=\"timeout\"} 1",
        execs.as_str(),
        "zeroboot_fork_time_milliseconds_count 3",
        "zeroboot_http_requests_total{route=\"/v1/exec\",status=\"200\"} 3",
        "zeroboot_http_requests_total{route=\"/v1/exec\",status=\"400\"} 1",
        "zeroboot_template_ready{template=\"python\"} 1",
        "zeroboot_pool_target{template=\"python\"} 2",
        "zeroboot_concurrent_forks 0",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
    }
}

#[test]
fn when_every_sandbox_is_in_use_the_answer_is_503_with_a_time() {
    let fixture = Setup { max_live: 1, admission_wait: Duration::from_millis(50), ..Setup::default() }.start();
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| fixture.run("import time; time.sleep(1.5)"));
        fixture.wait_for_live(1, Duration::from_secs(10));
        let answer = fixture.post("/v1/exec", &json!({"code": "print(1)"}), &[]);
        assert_eq!((answer.status, &answer.json()["code"]), (503, &json!("busy")));
        assert_eq!(answer.header("retry-after"), Some("1"));
        // A server with much to do is not an ill one.
        assert_eq!(fixture.get("/v1/health").json()["status"], "ok");
        slow.join().unwrap();
    });
    assert!(fixture.get("/v1/metrics").text().contains("\nzeroboot_admissions_refused_total 1\n"));
}
