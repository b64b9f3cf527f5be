//! Health, metrics, and what happens when parts are killed.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::fixture::{Fixture, Setup, wait_for};

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
        (&json!(true), &json!("process"), &json!("process"))
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
    for line in [
        "zeroboot_total_executions{status=\"success\"} 1",
        "zeroboot_total_executions{status=\"error\"} 1",
        "zeroboot_total_executions{status=\"timeout\"} 1",
        "zeroboot_execs_total{isolation=\"process\",template=\"python\",outcome=\"deadline_passed\"} 1",
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

/// The children of this process: the zygotes.
fn zygotes() -> Vec<i32> {
    let own = std::process::id().to_string();
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
#[ignore = "kills zygotes of the whole test program: run it alone, with --ignored"]
fn a_killed_zygote_costs_only_its_requests_and_comes_back() {
    let fixture = Fixture::new();
    let zygotes = zygotes();
    assert!(!zygotes.is_empty());
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| fixture.post("/v1/exec", &json!({"code": "import time; time.sleep(20)"}), &[]));
        fixture.wait_for_live(1, Duration::from_secs(10));
        for pid in zygotes {
            let done = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
            assert!(done.success());
        }
        let begun = Instant::now();
        let answer = slow.join().unwrap();
        // Either the worker died with its zygote (ours, 5xx) or the outcome says that the sandbox crashed.
        assert!(answer.status >= 500 || answer.json()["outcome"] == "crashed", "{} {}", answer.status, answer.text());
        assert!(begun.elapsed() < Duration::from_secs(10));
        wait_for("service again", Duration::from_secs(20), || {
            fixture.post("/v1/exec", &json!({"code": "print(1)"}), &[]).status == 200
        });
        wait_for("health again", Duration::from_secs(20), || fixture.get("/v1/health").json()["status"] == "ok");
    });
}
