//! Branches of live sandboxes over HTTP, in forks of the real templates: in the nested lane, or on any host whose KVM runs
//! Linux.
#![allow(dead_code, reason = "the shared modules hold more than these tests need")]
#![allow(clippy::print_stderr, reason = "tests speak to people")]

#[path = "http/client.rs"]
mod client;
#[path = "http/fixture.rs"]
mod fixture;
#[path = "sandboxes/guest.rs"]
mod guest;

use std::{
    collections::HashSet,
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};
use zeroboot_engine::Isolation;

use crate::{
    fixture::{Fixture, Setup, isolation, patience, wait_for},
    guest::Guest,
};

/// Without Node: its template takes longer to read than these tests.
fn server() -> Fixture {
    Setup { pool: 1, own_engine: true, ..Setup::default() }.start()
}

fn in_the_lane() -> bool {
    let vm = isolation() == Isolation::Vm;
    if !vm {
        eprintln!("skipped: the VM engine's, with ZEROBOOT_TEST_ENGINE=vm");
    }
    vm
}

fn branch<'a>(origin: &Guest<'a>, count: u64) -> Vec<Guest<'a>> {
    let answer = origin.post("/branch", &json!({ "count": count, "timeout_seconds": 600 }));
    assert_eq!(answer.status, 201, "{}", answer.text());
    let body = answer.json();
    let branches = body["sandboxes"].as_array().unwrap();
    assert_eq!(branches.len() as u64, count);
    branches
        .iter()
        .map(|one| {
            assert_eq!((&one["branch_of"], &one["isolation"]), (&json!(origin.id), &json!("vm")), "{one}");
            Guest::that_lives(origin.fixture, one["id"].as_str().unwrap())
        })
        .collect()
}

#[test]
fn a_branch_has_the_state_the_files_and_the_programs_of_its_origin() {
    if !in_the_lane() {
        return;
    }
    let fixture = server();
    let origin = Guest::with(&fixture, &json!({"timeout_seconds": 600}));
    origin.run("x = [1, 2]\nopen('kept.txt', 'w').write('before')");
    assert_eq!(origin.post("/contexts", &json!({"name": "other"})).status, 201);
    origin.ok("/run", &json!({"code": "y = 'other'", "context": "other"}));
    // Output is under way, and a program waits for input.
    let counts = origin.background(json!({"command": "for i in $(seq 1 120); do echo line $i; sleep 0.05; done"}));
    let reads = origin.background(json!({"command": "read a; read b; echo got $a $b", "keep_stdin_open": true}));
    let said = |guest: &Guest<'_>, id: &str| -> u64 { guest.command(id)["output_offset"].as_u64().unwrap() };
    let feed = |guest: &Guest<'_>, text: &str| {
        let answer = guest.ask("POST", &format!("/commands/{reads}/stdin"), &[], text.as_bytes());
        assert_eq!(answer.status, 204, "{}", answer.text());
    };
    feed(&origin, "first\n");
    wait_for("output", Duration::from_secs(60), || said(&origin, &counts) > 20);

    let branches = branch(&origin, 3);
    origin.run("x.append('origin')\nopen('kept.txt', 'w').write('after')");
    feed(&origin, "origin\n");
    for (at, branch) in branches.iter().enumerate() {
        assert_eq!(branch.value("x"), "[1, 2]");
        branch.run(&format!("x.append({at})"));
        assert_eq!(branch.value("x, open('kept.txt').read()"), format!("([1, 2, {at}], 'before')"));
        let other = branch.ok("/run", &json!({"code": "y", "context": "other"}));
        assert_eq!(other["value"], "'other'", "{other}");
        feed(branch, &format!("branch {at}\n"));
    }
    assert_eq!(origin.value("x"), "[1, 2, 'origin']");

    // Every byte, once, on each.
    let whole: String = (1..=120).map(|n| format!("line {n}\n")).collect();
    let names = ["origin".to_owned(), "branch 0".into(), "branch 1".into(), "branch 2".into()];
    for (guest, name) in std::iter::once(&origin).chain(&branches).zip(names) {
        for (command, output) in [(&counts, &whole), (&reads, &format!("got first {name}\n"))] {
            let ended = || guest.command(command)["state"] != "running";
            wait_for("its end", patience(Duration::from_secs(60)), ended);
            let events = guest.get(&format!("/commands/{command}/output?offset=0")).text();
            let heard: String = events
                .lines()
                .filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok())
                .filter_map(|data| Some(data["text"].as_str()?.to_owned()))
                .collect();
            assert_eq!(&heard, output, "{name}");
        }
    }

    // A branch of a branch, while its origin's origin is gone.
    branches[0].run("deeper = 7");
    assert_eq!(origin.delete("").status, 204);
    let deeper = branch(&branches[0], 1);
    assert_eq!(deeper[0].value("deeper, x"), "(7, [1, 2, 0])");
    branches[1].is_usable();
}

#[test]
fn no_two_branches_share_a_random_number_a_name_or_another_clock() {
    if !in_the_lane() {
        return;
    }
    let count: usize = std::env::var("ZEROBOOT_TEST_BRANCHES").map_or(6, |text| text.parse().unwrap());
    let fixture = server();
    let origin = Guest::with(&fixture, &json!({"timeout_seconds": 1800}));
    // What is drawn from, made before; also in a context in the middle of a cell.
    origin.run(
        "import os, random, secrets, socket, ssl, tempfile, time, uuid\nrandom.seed(1)\nown = random.Random(1)\n\
         try:\n  import numpy\n  numpy.random.seed(1)\n  bits = numpy.random.default_rng(1)\n\
         except ImportError:\n  numpy = bits = random\n\
         drawn = [random.random(), ssl.RAND_bytes(4), uuid.uuid4(), next(tempfile._get_candidate_names())]",
    );
    origin.post("/contexts", &json!({"name": "busy"}));
    let busy = "import random, time\nrandom.seed(1)\nstate = random.getstate()\nprint('waits', flush=True)\n\
                while random.getstate() == state: time.sleep(0.2)\nopen('/tmp/busy', 'w').write(repr(random.random()))";
    let mut events = origin.stream("POST", "/run", &json!({"code": busy, "context": "busy", "timeout_seconds": 1200}));
    // It has to know the state that it waits to see changed.
    for wanted in ["started", "stdout"] {
        assert_eq!(events.next().map(|event| event.name).as_deref(), Some(wanted));
    }

    let before = SystemTime::now();
    let branches = branch(&origin, count as u64);
    let draw = "[repr(one) for one in (random.random(), own.random(), numpy.random.random(), bits.random(), \
                os.urandom(8), uuid.uuid4(), uuid.uuid1(), ssl.RAND_bytes(8), secrets.token_hex(8), \
                next(tempfile._get_candidate_names()), socket.gethostname(), \
                open('/proc/sys/kernel/random/boot_id').read())]";
    let mut seen: Vec<HashSet<String>> = Vec::new();
    for guest in std::iter::once(&origin).chain(&branches) {
        // As hex: the value comes as Python writes a string.
        let text = guest.value(&format!("import json; json.dumps({draw}).encode().hex()"));
        let json = text.trim_matches('\'').as_bytes().chunks(2);
        let json: Vec<u8> = json.map(|pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap()).collect();
        let drawn: Vec<String> = serde_json::from_slice(&json).unwrap_or_else(|error| panic!("{error}: {text}"));
        seen.resize_with(drawn.len(), HashSet::new);
        for (at, (known, one)) in seen.iter_mut().zip(drawn).enumerate() {
            assert!(known.insert(one.clone()), "source {at}: {one} twice");
        }
    }
    // The clock goes right: between what this process read before and after.
    let seconds = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
    for branch in &branches {
        let now: f64 = branch.value("time.time()").parse().unwrap();
        let slack = 1.0;
        assert!((seconds(before) - slack..=seconds(SystemTime::now()) + slack).contains(&now), "{now}");
    }
    // The cell that was under way went on with other numbers in each branch, and goes on waiting in the origin.
    let mut drawn = HashSet::new();
    for branch in &branches {
        wait_for("the busy cell", patience(Duration::from_secs(60)), || {
            branch.get("/files?path=/tmp/busy").status == 200
        });
        assert!(drawn.insert(branch.get("/files?path=/tmp/busy").text()));
    }
    assert_eq!(origin.get("/files?path=/tmp/busy").status, 404);
}

#[test]
fn a_checkpoint_is_a_place_to_begin_at_and_to_go_back_to() {
    if !in_the_lane() {
        return;
    }
    let fixture = server();
    let origin = Guest::with(&fixture, &json!({"timeout_seconds": 600, "metadata": {"a": "b"}}));
    origin.run("steps = ['first']\nopen('kept.txt', 'w').write('first')");
    let keep = |guest: &Guest<'_>| {
        let answer = guest.post("/checkpoints", &json!({"metadata": {"of": guest.id}}));
        assert_eq!(answer.status, 201, "{}", answer.text());
        answer.json()
    };
    let first = keep(&origin);
    assert_eq!((&first["sandbox_id"], &first["parent_id"]), (&json!(origin.id), &json!(null)), "{first}");
    assert!(first["memory_bytes"].as_u64().unwrap() >= 4096, "{first}");
    origin.run("steps.append('second')\nopen('kept.txt', 'w').write('second')");
    let second = keep(&origin);
    assert_eq!(second["parent_id"], first["id"], "checkpoints are a tree: {second}");
    assert_eq!(origin.get("").json()["checkpoint_id"], second["id"]);

    // New ones begin there, as often as they are asked for.
    let restore = |checkpoint: &Value, count: u64| {
        let path = format!("/v1/checkpoints/{}/restore", checkpoint["id"].as_str().unwrap());
        let answer = fixture.post(&path, &json!({"count": count, "timeout_seconds": 600}), &[]);
        assert_eq!(answer.status, 201, "{}", answer.text());
        answer.json()["sandboxes"].as_array().unwrap().clone()
    };
    let mut restored = restore(&first, 2);
    restored.extend(restore(&first, 1));
    for one in &restored {
        assert_eq!((&one["branch_of"], &one["checkpoint_id"]), (&json!(origin.id), &first["id"]), "{one}");
        let guest = Guest::that_lives(&fixture, one["id"].as_str().unwrap());
        assert_eq!(guest.value("steps, open('kept.txt').read()"), "(['first'], 'first')");
        assert_eq!(guest.delete("").status, 204);
    }

    // Back to the last one, and past it, under the same id and lease.
    let before = origin.get("").json();
    let wait = origin.background(json!({"command": "sleep 1000"}));
    origin.run("steps.append('third')");
    let back = |to: Value| {
        let answer = origin.post("/rollback", &to);
        assert_eq!(answer.status, 200, "{}", answer.text());
        let body = answer.json();
        for field in ["id", "metadata", "created_at", "branch_of"] {
            assert_eq!(body[field], before[field], "{field}: {body}");
        }
    };
    back(json!({}));
    assert_eq!(origin.value("steps, open('kept.txt').read()"), "(['first', 'second'], 'second')");
    assert_eq!(origin.get(&format!("/commands/{wait}")).status, 404, "what began since has never been");
    back(json!({"checkpoint_id": first["id"]}));
    assert_eq!(origin.value("steps, open('kept.txt').read()"), "(['first'], 'first')");
    back(json!({"checkpoint_id": second["id"]}));
    assert_eq!(origin.value("steps"), "['first', 'second']");

    // A branch goes on under its origin's id.
    let branches = branch(&origin, 1);
    branches[0].run("steps.append('branch')");
    let promoted = branches[0].post("/promote", &json!({}));
    assert_eq!((promoted.status, &promoted.json()["id"]), (200, &json!(origin.id)), "{}", promoted.text());
    assert_eq!(origin.value("steps"), "['first', 'second', 'branch']");
    let gone = branches[0].get("");
    assert_eq!((gone.status, &gone.json()["reason"]), (410, &json!("replaced")), "{}", gone.text());

    // What is refused, and what is left when a checkpoint goes.
    assert_eq!(origin.refused(&origin.post("/promote", &json!({}))), (409, "cannot_branch".into()));
    let other = Guest::with(&fixture, &json!({"timeout_seconds": 600}));
    assert_eq!(other.refused(&other.post("/rollback", &json!({}))), (404, "checkpoint_not_found".into()));
    let foreign = other.post("/rollback", &json!({"checkpoint_id": first["id"]}));
    assert_eq!(other.refused(&foreign), (409, "cannot_roll_back".into()));
    other.is_usable();
    let kept = restore(&second, 1);
    let kept = Guest::that_lives(&fixture, kept[0]["id"].as_str().unwrap());
    let listed = |path: &str| fixture.get(path).json()["checkpoints"].as_array().unwrap().len();
    assert_eq!(listed("/v1/checkpoints"), 2);
    assert!(fixture.get("/v1/metrics").text().contains("\nzeroboot_checkpoints 2\n"));
    assert_eq!(listed(&format!("/v1/checkpoints?sandbox_id={}", other.id)), 0);
    for checkpoint in [&first, &second] {
        let path = format!("/v1/checkpoints/{}", checkpoint["id"].as_str().unwrap());
        assert_eq!(fixture.get(&path).json(), *checkpoint);
        assert_eq!(client::exchange(fixture.address, &client::request("DELETE", &path, &[], b"")).status, 204);
        assert_eq!(fixture.get(&path).status, 404);
    }
    assert_eq!(kept.value("steps"), "['first', 'second']");
    assert_eq!(listed("/v1/checkpoints"), 0);
    // One that is kept for a moment only.
    let short = origin.post("/checkpoints", &json!({"timeout_seconds": 0.5}));
    assert_eq!(short.status, 201, "{}", short.text());
    wait_for("its end", Duration::from_secs(60), || listed("/v1/checkpoints") == 0);
}

#[test]
fn what_cannot_be_branched_is_refused_and_goes_on() {
    if !in_the_lane() {
        return;
    }
    let fixture = server();
    let origin = Guest::new(&fixture);
    for (body, code) in [
        (json!({"count": 0}), "invalid_request"),
        (json!({"count": 101}), "invalid_request"),
        (json!({"timeout_seconds": 0}), "invalid_timeout"),
        (json!({"colour": "red"}), "invalid_request"),
    ] {
        assert_eq!(origin.refused(&origin.post("/branch", &body)), (400, code.into()), "{body}");
    }
    // More than there is room for: none is made.
    let live = || fixture.get("/v1/sandboxes").json()["sandboxes"].as_array().unwrap().len();
    let before = live();
    let busy = origin.post("/branch", &json!({"count": 100}));
    assert_eq!(origin.refused(&busy), (503, "busy".into()), "{}", busy.text());
    assert_eq!(live(), before);
    origin.is_usable();
}
