//! Health, metrics, admission.

use std::time::Duration;

use serde_json::json;

use crate::fixture::{Fixture, Setup, isolation};

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
