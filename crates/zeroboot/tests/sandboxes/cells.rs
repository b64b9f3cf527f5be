//! Cells and contexts.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::{
    fixture::{patience, wait_for},
    guest::{Guest, shared},
};

#[test]
fn state_stays_across_a_hundred_cells() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    guest.run("total = 0");
    for n in 1..=100 {
        let answer = guest.run(&format!("total += {n}\ntotal"));
        assert_eq!(
            (&answer["value"], &answer["execution_count"]),
            (&json!((n * (n + 1) / 2).to_string()), &json!(n + 1))
        );
    }
}

#[test]
fn output_results_and_errors_are_apart_and_an_error_leaves_the_context_usable() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let answer = guest.run("import sys\nprint('out')\nprint('err', file=sys.stderr)\n6 * 7");
    assert_eq!((&answer["stdout"], &answer["stderr"]), (&json!("out\n"), &json!("err\n")), "{answer}");
    assert_eq!((&answer["value"], &answer["outcome"], &answer["error"]), (&json!("42"), &json!("ok"), &json!(null)));
    assert_eq!(answer["results"], json!([{"is_main": true, "text/plain": "42"}]));
    let answer = guest.run("x = 1\ndef f():\n    raise ValueError('no')\nf()");
    assert_eq!((&answer["outcome"], &answer["error"]["name"]), (&json!("error"), &json!("ValueError")), "{answer}");
    assert_eq!(answer["error"]["value"], "no");
    let traceback = answer["error"]["traceback"].as_str().unwrap();
    assert!(
        traceback.contains("in f") && !traceback.contains("zeroboot") && !traceback.contains("runner"),
        "{traceback}"
    );
    assert_eq!(answer["context_lost"], false);
    assert_eq!(guest.value("x"), "1");
}

#[test]
fn a_cell_that_takes_too_long_is_interrupted_and_its_state_stays() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    guest.run("kept = 5");
    let begun = Instant::now();
    let answer = guest.ok("/run", &json!({"code": "while True: pass", "timeout_seconds": 0.3}));
    assert!(begun.elapsed() < patience(Duration::from_secs(5)));
    assert_eq!((&answer["outcome"], &answer["context_lost"]), (&json!("deadline_passed"), &json!(false)), "{answer}");
    assert_eq!(guest.value("kept"), "5");
}

#[test]
fn a_time_that_passes_before_the_cell_begins_has_passed() {
    let fixture = shared();
    for nanoseconds in [1.0, 1e4, 1e5, 1e6] {
        let guest = Guest::new(&fixture);
        let answer = guest.ok("/run", &json!({"code": "while True: pass", "timeout_seconds": nanoseconds / 1e9}));
        assert_eq!(answer["outcome"], "deadline_passed", "{nanoseconds}: {answer}");
        guest.is_usable();
    }
}

#[test]
fn an_interrupt_stops_the_cell_that_runs() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let mut events = guest.stream("POST", "/run", &json!({"code": "import time\nprint('on')\ntime.sleep(60)"}));
    events.next_of("stdout");
    assert_eq!(guest.post("/contexts/default/interrupt", &json!({})).status, 204);
    assert_eq!(events.next_of("error").data["name"], "KeyboardInterrupt");
    let end = events.next_of("end").data;
    assert_eq!((&end["outcome"], &end["exit_code"]), (&json!("interrupted"), &json!(130)), "{end}");
    guest.is_usable();
}

#[test]
fn contexts_are_apart_and_can_be_made_restarted_and_deleted() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let made = guest.post("/contexts", &json!({"name": "other", "cwd": "/tmp"}));
    assert_eq!((made.status, &made.json()["name"], &made.json()["cwd"]), (201, &json!("other"), &json!("/tmp")));
    guest.run("x = 'mine'");
    let other = |code: &str| guest.ok("/run", &json!({"code": code, "context": "other"}));
    assert_eq!(other("x")["error"]["name"], "NameError");
    assert_eq!(other("import os\nos.getcwd()")["value"], "'/tmp'");
    other("y = 2");
    assert_eq!(guest.post("/contexts/other/restart", &json!({})).status, 200);
    assert_eq!(other("y")["error"]["name"], "NameError");
    assert_eq!(guest.value("x"), "'mine'");
    let names = || -> Vec<String> {
        let all = guest.get("/contexts").json();
        all["contexts"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().into()).collect()
    };
    assert_eq!(names(), ["default", "other"]);
    assert_eq!(guest.refused(&guest.post("/contexts", &json!({"name": "other"}))), (409, "context_exists".into()));
    assert_eq!(guest.delete("/contexts/other").status, 204);
    wait_for("context gone", patience(Duration::from_secs(5)), || names() == ["default"]);
    let gone = guest.post("/run", &json!({"code": "1", "context": "other"}));
    assert_eq!(guest.refused(&gone), (404, "context_not_found".into()));
    assert_eq!(guest.refused(&guest.delete("/contexts/other")), (404, "context_not_found".into()));
    for bad in ["", "a b", "../x", &"x".repeat(65)] {
        assert_eq!(guest.post("/contexts", &json!({"name": bad})).status, 400, "{bad:?}");
    }
    let unnamed = guest.post("/contexts", &json!({})).json();
    assert!(unnamed["name"].as_str().unwrap().starts_with("context-"), "{unnamed}");
}

#[test]
fn a_context_whose_interpreter_ends_is_said_to_be_lost_and_begins_again() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    guest.run("x = 1");
    let answer = guest.run("import os\nos._exit(7)");
    assert_eq!((&answer["context_lost"], &answer["outcome"]), (&json!(true), &json!("exited")), "{answer}");
    assert_eq!(answer["exit_code"], 7);
    assert_eq!(guest.run("x")["error"]["name"], "NameError");
    guest.is_usable();
}

/// 50, unless `ZEROBOOT_TEST_CONTEXTS` says otherwise.
#[test]
fn fifty_contexts_live_side_by_side() {
    let named = std::env::var("ZEROBOOT_TEST_CONTEXTS").ok();
    let others = named.map_or(50, |number| number.parse::<u32>().unwrap()) - 1;
    let fixture = shared();
    let guest = Guest::with(&fixture, &json!({"memory_mb": 2048, "processes": 256}));
    for n in 0..others {
        let made = guest.post("/contexts", &json!({"name": format!("c{n}")}));
        assert_eq!(made.status, 201, "{n}: {}", made.text());
        guest.ok("/run", &json!({"code": format!("n = {n}"), "context": format!("c{n}")}));
    }
    for n in 0..others {
        assert_eq!(guest.ok("/run", &json!({"code": "n", "context": format!("c{n}")}))["value"], n.to_string());
    }
    guest.is_usable();
}

#[test]
fn cells_of_one_context_wait_for_each_other() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    std::thread::scope(|scope| {
        guest.run("seen = []");
        let cells: Vec<_> = (0..8)
            .map(|n| {
                let guest = &guest;
                scope.spawn(move || {
                    guest.run(&format!("import time\nseen.append({n})\ntime.sleep(0.02)\nassert seen[-1] == {n}"))
                })
            })
            .collect();
        for cell in cells {
            let answer = cell.join().unwrap();
            assert_eq!(answer["outcome"], "ok", "{answer}");
        }
    });
    assert_eq!(guest.value("len(seen), len(set(seen))"), "(8, 8)");
}

#[test]
fn a_stream_of_a_cell_tells_everything_in_order_and_can_be_taken_up_again() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let mut events = guest.stream("POST", "/run", &json!({"code": "print('é', flush=True)\n1/0"}));
    let started = events.next().unwrap();
    assert_eq!((started.name.as_str(), started.id), ("started", Some(0)));
    let run = started.data["id"].as_str().unwrap().to_owned();
    let mut text = String::new();
    let error = loop {
        let event = events.next().unwrap();
        if event.name == "error" {
            break event;
        }
        assert_eq!(event.name, "stdout");
        text += event.data["text"].as_str().unwrap();
    };
    assert_eq!((text.as_str(), error.id), ("é\n", Some(4)), "{error:?}");
    assert_eq!(error.data["name"], "ZeroDivisionError");
    let end = events.next().unwrap();
    assert_eq!((end.name.as_str(), &end.data["outcome"]), ("end", &json!("error")));
    assert_eq!(events.next(), None);
    let mut again = guest.stream("GET", &format!("/commands/{run}/output?offset=3"), &json!(null));
    again.next_of("started");
    assert_eq!(again.next().unwrap().name, "error");
    assert_eq!(again.next().unwrap().name, "end");
}

#[test]
fn javascript_keeps_its_state_too() {
    let fixture = shared();
    let guest = Guest::with(&fixture, &json!({"language": "node"}));
    guest.run("let x = 41; const f = async () => x + 1");
    let answer = guest.run("console.log('out'); await f()");
    assert_eq!((&answer["value"], &answer["stdout"]), (&json!("42"), &json!("out\n")), "{answer}");
    let answer = guest.run("null.x");
    assert_eq!((&answer["outcome"], &answer["error"]["name"]), (&json!("error"), &json!("TypeError")), "{answer}");
    assert_eq!(guest.value("x"), "41");
}

#[test]
fn what_is_no_cell_is_refused_and_the_sandbox_goes_on() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    for (body, code) in [
        (json!({"code": "a\u{0}b"}), "invalid_code"),
        (json!({"code": "1", "timeout_seconds": 0}), "invalid_timeout"),
        (json!({"code": "1", "timeout_seconds": -1}), "invalid_timeout"),
        (json!({"code": "1", "timeout_seconds": 1e9}), "invalid_timeout"),
        (json!({"code": "1", "cntext": "x"}), "invalid_request"),
        (json!({"code": 1}), "invalid_request"),
        (json!(["1"]), "invalid_request"),
        (json!({"code": "1", "context": "none"}), "context_not_found"),
    ] {
        let answer = guest.post("/run", &body);
        assert_eq!(guest.refused(&answer).1, code, "{body}");
    }
    guest.is_usable();
}
