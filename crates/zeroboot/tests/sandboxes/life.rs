//! How sandboxes begin, what they may have, and how they end.

use std::time::{Duration, Instant};

use serde_json::json;
use zeroboot_engine::{Isolation, SandboxBounds};
use zeroboot_server::{KeyStore, NewKey};

use crate::{
    fixture::{Fixture, Setup, isolation, patience, wait_for},
    guest::{Guest, shared},
};

#[test]
fn a_sandbox_is_made_shown_listed_extended_and_deleted() {
    let fixture = shared();
    let body = json!({"timeout_seconds": 100, "idle_timeout_seconds": 50, "metadata": {"job": "7"}, "memory_mb": 300, "processes": 40});
    let guest = Guest::with(&fixture, &body);
    let shown = guest.get("").json();
    assert_eq!((&shown["state"], &shown["template"]), (&json!("running"), &json!("python")), "{shown}");
    assert_eq!((&shown["isolation"], &shown["metadata"]), (&json!(isolation().as_str()), &json!({"job": "7"})));
    assert_eq!((&shown["limits"]["memory_mb"], &shown["limits"]["processes"]), (&json!(300), &json!(40)));
    assert_eq!(shown["idle_timeout_seconds"], 50.0);
    let extended = guest.ok("/extend", &json!({"timeout_seconds": 1000}));
    assert!(extended["expires_at"].as_str().unwrap() > shown["expires_at"].as_str().unwrap(), "{extended}");
    for bad in
        [json!({}), json!({"timeout_seconds": 0}), json!({"timeout_seconds": -5}), json!({"timeout_seconds": 1e12})]
    {
        assert_eq!(guest.post("/extend", &bad).status, 400, "{bad}");
    }
    let second = Guest::with(&fixture, &json!({"metadata": {"job": "8"}}));
    let list = |query: &str| -> Vec<String> {
        let all = fixture.get(&format!("/v1/sandboxes{query}")).json();
        all["sandboxes"].as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap().into()).collect()
    };
    assert_eq!(list(""), [guest.id.clone(), second.id.clone()]);
    assert_eq!(list("?metadata=job=8"), [second.id.as_str()]);
    assert_eq!(list("?metadata=job=8&metadata=job=7").len(), 0);
    let page = fixture.get("/v1/sandboxes?limit=1").json();
    let next = page["next_cursor"].as_str().unwrap();
    assert_eq!(list(&format!("?limit=1&cursor={next}")), [second.id.as_str()]);
    assert_eq!(fixture.get("/v1/sandboxes?cursor=x").status, 400);
    assert_eq!(guest.delete("").status, 204);
    let gone = guest.get("");
    assert_eq!((guest.refused(&gone), &gone.json()["reason"]), ((410, "sandbox_gone".into()), &json!("requested")));
    assert_eq!(guest.refused(&guest.delete("")), (410, "sandbox_gone".into()));
    assert_eq!(guest.refused(&guest.post("/run", &json!({"code": "1"}))), (410, "sandbox_gone".into()));
    assert_eq!(list(""), [second.id.as_str()]);
    for unknown in ["nonsense", "00000000-0000-0000-0000-000000000000"] {
        let answer = fixture.get(&format!("/v1/sandboxes/{unknown}"));
        assert_eq!(second.refused(&answer), (404, "sandbox_not_found".into()));
    }
}

#[test]
fn a_sandbox_of_processes_cannot_be_saved_and_says_why() {
    if isolation() != Isolation::Process {
        return;
    }
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let answer = guest.post("/branch", &json!({"count": 2}));
    assert_eq!(guest.refused(&answer), (501, "needs_vm_engine".into()), "{}", answer.text());
    assert!(answer.text().contains("cannot be saved"), "{}", answer.text());
    assert_eq!(guest.refused(&guest.post("/branch", &json!({"count": 101}))), (400, "invalid_request".into()));
    assert_eq!(guest.get("").json()["branch_of"], json!(null));
    for (verb, body) in [("/checkpoints", json!({})), ("/rollback", json!({})), ("/promote", json!({}))] {
        let answer = guest.post(verb, &body);
        assert_eq!(guest.refused(&answer), (501, "needs_vm_engine".into()), "{verb}: {}", answer.text());
    }
    for (verb, body) in [
        ("/checkpoints", json!({"timeout_seconds": -1})),
        ("/checkpoints", json!({"metadata": {"": "x"}})),
        ("/rollback", json!({"checkpoint_id": "x"})),
        ("/rollback", json!({"checkpoint": "x"})),
    ] {
        assert_eq!(guest.post(verb, &body).status, 400, "{verb} {body}");
    }
    let nobody = "0198c5f2-0000-7000-8000-000000000000";
    let unknown = guest.post("/rollback", &json!({"checkpoint_id": nobody}));
    assert_eq!(guest.refused(&unknown), (404, "checkpoint_not_found".into()));
    assert_eq!(fixture.get("/v1/checkpoints").json(), json!({"checkpoints": []}));
    assert_eq!(fixture.get("/v1/checkpoints?sandbox_id=x").status, 400);
    for path in [nobody, "x"] {
        assert_eq!(fixture.get(&format!("/v1/checkpoints/{path}")).status, 404);
        assert_eq!(fixture.post(&format!("/v1/checkpoints/{path}/restore"), &json!({}), &[]).status, 404);
    }
    guest.is_usable();
}

#[test]
fn what_is_no_sandbox_is_refused() {
    let fixture = shared();
    for (body, status, code) in [
        (json!({"template": "none"}), 400, "unknown_template"),
        (json!({"language": "cobol"}), 400, "unknown_language"),
        (json!({"timeout_seconds": 0}), 400, "invalid_timeout"),
        (json!({"timeout_seconds": 86_401}), 400, "invalid_timeout"),
        (json!({"idle_timeout_seconds": -1}), 400, "invalid_timeout"),
        (json!({"memory_mb": 0}), 400, "invalid_limits"),
        (json!({"memory_mb": 1_000_000}), 400, "invalid_limits"),
        (json!({"processes": 100_000}), 400, "invalid_limits"),
        (json!({"env": {"": "x"}}), 400, "invalid_env"),
        (json!({"metadata": {"a": "x".repeat(600)}}), 400, "invalid_request"),
        (json!({"unknown": 1}), 400, "invalid_request"),
    ] {
        let answer = fixture.post("/v1/sandboxes", &body, &[]);
        assert_eq!((answer.status, answer.json()["code"].as_str().unwrap()), (status, code), "{body}");
    }
    assert_eq!(fixture.get("/v1/sandboxes").json()["sandboxes"], json!([]));
}

#[test]
fn a_lease_ends_exactly_and_says_so_to_a_run_under_way() {
    let fixture = shared();
    let guest = Guest::with(&fixture, &json!({"timeout_seconds": 1.5}));
    let begun = Instant::now();
    let mut events = guest.stream("POST", "/run", &json!({"code": "import time\nprint('on')\ntime.sleep(60)"}));
    events.next_of("stdout");
    let failure = events.next().unwrap();
    let time = begun.elapsed();
    assert_eq!((failure.name.as_str(), &failure.data["code"]), ("failure", &json!("sandbox_gone")), "{failure:?}");
    assert_eq!(failure.data["reason"], "lease_ended");
    assert!(time > Duration::from_millis(1200) && time < patience(Duration::from_secs(4)), "{time:?}");
    let gone = guest.get("");
    assert_eq!((gone.status, &gone.json()["reason"]), (410, &json!("lease_ended")));
}

#[test]
fn an_idle_sandbox_ends_and_one_that_is_used_does_not() {
    let fixture = shared();
    let guest = Guest::with(&fixture, &json!({"idle_timeout_seconds": 0.8}));
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(300));
        guest.is_usable();
    }
    wait_for("its end", patience(Duration::from_secs(10)), || {
        std::thread::sleep(Duration::from_millis(200));
        let all = fixture.get("/v1/sandboxes").json();
        all["sandboxes"].as_array().unwrap().is_empty()
    });
    assert_eq!(guest.get("").json()["reason"], "idle");
}

struct Keyed {
    fixture: Fixture,
    tokens: [String; 2],
    _folder: tempfile::TempDir,
}

fn keyed(change: impl FnOnce(&mut Setup)) -> Keyed {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys.toml");
    let store = KeyStore::new(&path);
    let tokens =
        ["first", "second"].map(|name| store.create(NewKey { name: name.into(), ..NewKey::default() }).unwrap().0);
    let mut setup = Setup { own_engine: true, ..Setup::default() };
    setup.config.keys_file = Some(path);
    change(&mut setup);
    Keyed { fixture: setup.start(), tokens, _folder: folder }
}

fn header(token: &str) -> String {
    format!("Authorization: Bearer {token}")
}

#[test]
fn a_sandbox_of_another_key_is_not_there() {
    let keyed = keyed(|_| {});
    let [first, second] = &keyed.tokens;
    let mine = Guest::of(&keyed.fixture, &json!({}), Some(first));
    let get = |path: &str, token: &str| {
        let bytes = crate::client::request("GET", path, &[&header(token)], b"");
        crate::client::exchange(keyed.fixture.address, &bytes)
    };
    assert_eq!(mine.get("").status, 200);
    for path in ["", "/commands", "/contexts", "/files?path=.", "/files/list", "/terminal"] {
        let answer = get(&mine.path(path), second);
        assert_eq!((answer.status, &answer.json()["code"]), (404, &json!("sandbox_not_found")), "{path}");
    }
    let body = json!({"code": "1"});
    assert_eq!(keyed.fixture.post(&mine.path("/run"), &body, &[&header(second)]).status, 404);
    assert_eq!(keyed.fixture.post(&mine.path("/run"), &body, &[]).status, 401);
    assert_eq!(get("/v1/sandboxes", second).json()["sandboxes"], json!([]));
    assert_eq!(get("/v1/sandboxes", first).json()["sandboxes"].as_array().unwrap().len(), 1);
    mine.is_usable();
}

#[test]
fn sandboxes_are_limited_by_key_and_in_all_and_neither_they_nor_execs_starve_the_other() {
    let keyed = keyed(|setup| {
        setup.max_live = 2;
        setup.admission_wait = Duration::from_millis(200);
        setup.config.limits.max_sandboxes_per_key = 2;
        setup.sandboxes = SandboxBounds { most: 3, ..SandboxBounds::default() };
    });
    let [first, second] = &keyed.tokens;
    let make = |token: &str| keyed.fixture.post("/v1/sandboxes", &json!({}), &[&header(token)]);
    let kept = [Guest::of(&keyed.fixture, &json!({}), Some(first)), Guest::of(&keyed.fixture, &json!({}), Some(first))];
    let refused = make(first);
    assert_eq!((refused.status, &refused.json()["code"]), (429, &json!("too_many_sandboxes")));
    let third = Guest::of(&keyed.fixture, &json!({}), Some(second));
    let refused = make(second);
    assert_eq!((refused.status, &refused.json()["code"]), (503, &json!("busy")));
    assert!(refused.header("retry-after").is_some());
    // Execs have places of their own.
    let exec = keyed.fixture.post("/v1/exec", &json!({"code": "print(1)"}), &[&header(first)]);
    assert_eq!((exec.status, &exec.json()["stdout"]), (200, &json!("1\n")), "{}", exec.text());
    drop(third);
    wait_for("a free place", patience(Duration::from_secs(5)), || {
        let made = make(second);
        if made.status != 201 {
            return false;
        }
        let id = made.json()["id"].as_str().unwrap().to_owned();
        let bytes = crate::client::request("DELETE", &format!("/v1/sandboxes/{id}"), &[&header(second)], b"");
        crate::client::exchange(keyed.fixture.address, &bytes).status == 204
    });
    kept.iter().for_each(Guest::is_usable);
}

#[test]
fn what_uses_too_much_is_stopped_and_the_sandbox_lives_on() {
    let fixture = shared();
    let guest = Guest::with(&fixture, &json!({"memory_mb": 256, "processes": 30}));
    let answer = guest.run("b = bytearray(2_000_000_000)");
    assert!(answer["error"]["name"] == "MemoryError" || answer["context_lost"] == true, "{answer}");
    guest.is_usable();
    let forks = "import os, time, sys\nn = 0\nwhile True:\n    try:\n        if os.fork() == 0:\n            time.sleep(30)\n            os._exit(0)\n    except OSError:\n        break\n    n += 1\nprint(n)";
    let answer = guest.ok("/commands", &json!({"argv": ["python3", "-c", forks], "timeout_seconds": 20}));
    let count: u32 = answer["stdout"].as_str().unwrap_or_default().trim().parse().unwrap_or(u32::MAX);
    assert!(count < 30, "{answer}");
    wait_for("room for a program", patience(Duration::from_secs(10)), || {
        let answer = guest.post("/commands", &json!({"argv": ["true"]}));
        answer.status == 200 && answer.json()["exit_code"] == 0
    });
    guest.is_usable();
}

#[test]
fn health_metrics_and_logs_know_of_sandboxes() {
    let fixture = Setup { own_engine: true, ..Setup::default() }.start();
    let guest = Guest::new(&fixture);
    guest.is_usable();
    assert_eq!(fixture.get("/v1/health").json()["templates"]["python"]["sandboxes"], 1);
    let id = guest.background(json!({"argv": ["sleep", "600"]}));
    let labels = format!("isolation=\"{}\",template=\"python\"", isolation().as_str());
    let has = |line: &str| fixture.get("/v1/metrics").text().lines().any(|found| found == line);
    assert!(has(&format!("zeroboot_sandboxes{{{labels}}} 1")), "{}", fixture.get("/v1/metrics").text());
    assert!(has(&format!("zeroboot_sandbox_runs{{{labels}}} 1")));
    assert!(has(&format!("zeroboot_sandboxes_made_total{{{labels}}} 1")));
    assert!(has("zeroboot_http_requests_total{route=\"/v1/sandboxes/{id}/run\",status=\"200\"} 1"));
    guest.delete(&format!("/commands/{id}"));
    drop(guest);
    wait_for("end counted", patience(Duration::from_secs(5)), || {
        has(&format!("zeroboot_sandboxes_ended_total{{{labels},reason=\"requested\"}} 1"))
            && has(&format!("zeroboot_sandboxes{{{labels}}} 0"))
    });
}

#[test]
fn a_server_that_ends_tells_its_sandboxes_clients_and_leaves_nothing() {
    let fixture = Setup { own_engine: true, ..Setup::default() }.start();
    let guest = std::mem::ManuallyDrop::new(Guest::new(&fixture));
    let mut follower = {
        let id = guest.background(json!({"command": "echo on; sleep 600"}));
        guest.stream("GET", &format!("/commands/{id}/output"), &json!(null))
    };
    follower.next_of("stdout");
    std::thread::scope(|scope| {
        // A run that somebody waits for comes to its end first.
        let waited = scope.spawn(|| guest.run("import time\ntime.sleep(1)\n'done'"));
        let busy = || guest.get("").json()["runs"] == 2;
        wait_for("run", patience(Duration::from_secs(5)), busy);
        fixture.stop();
        assert_eq!(waited.join().unwrap()["value"], "'done'");
    });
    let failure = follower.next().unwrap();
    assert_eq!((failure.name.as_str(), &failure.data["reason"]), ("failure", &json!("shutting_down")), "{failure:?}");
    drop(follower);
}
