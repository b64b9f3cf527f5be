//! Commands.

use std::{
    io::{BufReader, Write as _},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    client,
    fixture::{JSON, patience, wait_for},
    guest::{Guest, shared},
};

#[test]
fn a_command_has_its_streams_its_status_its_environment_and_its_directory() {
    let fixture = shared();
    let guest = Guest::with(&fixture, &json!({"env": {"A": "sandbox", "B": "sandbox"}}));
    let answer = guest.shell("echo out; echo err >&2; exit 3");
    assert_eq!((&answer["stdout"], &answer["stderr"]), (&json!("out\n"), &json!("err\n")), "{answer}");
    assert_eq!((&answer["exit_code"], &answer["outcome"]), (&json!(3), &json!("exited")));
    assert!(answer["pid"].as_u64().unwrap() > 1);
    let body = json!({"argv": ["sh", "-c", "echo $A $B $0; pwd"], "env": {"B": "own"}, "cwd": "/tmp"});
    assert_eq!(guest.ok("/commands", &body)["stdout"], "sandbox own sh\n/tmp\n");
    let answer = guest.shell("kill -9 $$");
    let expected = (&json!("signaled"), &json!(9), &json!(137));
    assert_eq!((&answer["outcome"], &answer["signal"], &answer["exit_code"]), expected, "{answer}");
    assert_eq!(guest.ok("/commands", &json!({"argv": ["printf", "\\377"]}))["encoding"]["stdout"], "base64");
}

#[test]
fn a_command_reads_its_input() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let long = "line of input\n".repeat(100_000);
    let answer = guest.ok("/commands", &json!({"argv": ["wc", "-c"], "stdin": long}));
    assert_eq!(answer["stdout"].as_str().unwrap().trim(), long.len().to_string());
    assert_eq!(guest.ok("/commands", &json!({"argv": ["cat"], "stdin_base64": "aGkK"}))["stdout"], "hi\n");
    assert_eq!(guest.ok("/commands", &json!({"argv": ["cat"]}))["stdout"], "");
    // Both directions at once, more than any buffer holds.
    assert_eq!(guest.ok("/commands", &json!({"argv": ["cat"], "stdin": long}))["stdout"], long);
}

#[test]
fn output_comes_byte_for_byte_where_that_is_asked_for_and_is_cut_off_where_it_is_not_whole() {
    const BYTES: &[&str] = &[JSON, "Accept: application/octet-stream"];
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let ask = |body: Value| guest.ask("POST", "/commands", BYTES, body.to_string().as_bytes());
    // Bytes that are no text, far more than any buffer holds, and another stream between.
    let code = "import sys\nfor n in range(40):\n sys.stdout.buffer.write(bytes(range(256)) * 512)\n sys.stderr.write('no')\nsys.exit(3)";
    let answer = ask(json!({"argv": ["python3", "-c", code]}));
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/octet-stream")));
    let expected: Vec<u8> = (0..=255).cycle().take(40 * 512 * 256).collect();
    assert!(answer.body == expected, "{} bytes", answer.body.len());
    let id = answer.header("zeroboot-run-id").unwrap();
    assert_eq!(guest.command(id)["exit_code"], 3);
    // Of one that was left alone, from an offset on.
    let id = guest.background(json!({"command": "printf 123456"}));
    wait_for("its end", patience(Duration::from_secs(10)), || guest.command(&id)["state"] == "ended");
    let answer = guest.ask("GET", &format!("/commands/{id}/output?offset=4"), BYTES, b"");
    assert_eq!((answer.status, &answer.body[..]), (200, &b"56"[..]));
    // What nobody read in time is not there: 2 MiB of it were written, 1 MiB is held.
    let id = guest.background(json!({"command": "yes | head -c 2097152"}));
    wait_for("its end", patience(Duration::from_secs(30)), || guest.command(&id)["state"] == "ended");
    let mut stream = client::connect(fixture.address);
    stream.write_all(&client::request("GET", &guest.path(&format!("/commands/{id}/output")), BYTES, b"")).unwrap();
    assert!(client::read_answer(&mut BufReader::new(stream)).is_err());
    let answer = ask(json!({"argv": ["/no/such/program"]}));
    assert_eq!(guest.refused(&answer), (400, "cannot_start".into()));
    // A client that leaves takes its command along, if it wants to.
    let mut stream = client::connect(fixture.address);
    let body = json!({"command": "echo on; exec sleep 600", "end_with_client": true, "tag": "left"}).to_string();
    stream.write_all(&client::request("POST", &guest.path("/commands"), BYTES, body.as_bytes())).unwrap();
    client::read_head(&mut BufReader::new(&stream)).unwrap();
    drop(stream);
    wait_for("its end", patience(Duration::from_secs(10)), || {
        let all = guest.get("/commands").json();
        let left = all["commands"].as_array().unwrap().iter().find(|one| one["tag"] == "left").unwrap().clone();
        left["state"] == "ended"
    });
    guest.is_usable();
}

#[test]
fn a_command_that_cannot_be_started_is_refused_and_the_sandbox_goes_on() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    for background in [false, true] {
        let answer = guest.post("/commands", &json!({"argv": ["/no/such/program"], "background": background}));
        assert_eq!(guest.refused(&answer), (400, "cannot_start".into()), "{}", answer.text());
    }
    for (body, code) in [
        (json!({}), "invalid_request"),
        (json!({"argv": []}), "invalid_request"),
        (json!({"argv": [""]}), "invalid_request"),
        (json!({"argv": ["a"], "command": "b"}), "invalid_request"),
        (json!({"argv": ["a\u{0}"]}), "invalid_env"),
        (json!({"argv": ["a"], "env": {"A=B": "c"}}), "invalid_env"),
        (json!({"argv": ["a"], "stdin": "a", "stdin_base64": ""}), "invalid_request"),
        (json!({"argv": ["a"], "stdin_base64": "%"}), "invalid_request"),
        (json!({"argv": ["a"], "terminal": {"columns": 0, "rows": 0}}), "invalid_request"),
        (json!({"argv": ["a"], "terminal": {"columns": 80}}), "invalid_request"),
        (json!({"argv": ["a"], "tag": "x".repeat(300)}), "invalid_request"),
        (json!({"argv": ["a"], "cwd": ""}), "bad_path"),
        (json!({"argv": ["a"], "background": true, "stream": true}), "invalid_request"),
    ] {
        let answer = guest.post("/commands", &body);
        assert_eq!(guest.refused(&answer), (400, code.into()), "{body}");
    }
    guest.is_usable();
}

#[test]
fn a_command_whose_time_passes_is_killed_with_its_children() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let answer = guest.ok("/commands", &json!({"command": "sleep 600 & sleep 600", "timeout_seconds": 0.3}));
    assert_eq!((&answer["outcome"], &answer["exit_code"]), (&json!("deadline_passed"), &json!(124)), "{answer}");
    let left = "for d in /proc/[0-9]*; do tr '\\0' ' ' <$d/cmdline; echo; done | grep -c '^sleep 600'";
    wait_for("no sleep", patience(Duration::from_secs(5)), || guest.shell(left)["stdout"] == "0\n");
}

#[test]
fn commands_in_the_background_are_listed_signalled_and_killed() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let id = guest.background(
        json!({"command": "trap 'echo got; exit 5' INT; echo on; while :; do sleep 0.05; done", "tag": "mine"}),
    );
    let status = guest.command(&id);
    assert_eq!((&status["state"], &status["tag"]), (&json!("running"), &json!("mine")), "{status}");
    assert!(status["pid"].as_u64().unwrap() > 1 && status["argv"][0] == "/bin/sh", "{status}");
    let mut events = guest.stream("GET", &format!("/commands/{id}/output"), &json!(null));
    events.next_of("stdout");
    assert_eq!(guest.post(&format!("/commands/{id}/signal"), &json!({"signal": "SIGINT"})).status, 204);
    let (text, end) = events.rest();
    assert_eq!((text.as_str(), &end.data["exit_code"]), ("got\n", &json!(5)));
    let status = guest.command(&id);
    assert_eq!(
        (&status["state"], &status["outcome"], &status["output_offset"]),
        (&json!("ended"), &json!("exited"), &json!(7))
    );
    let ended = guest.post(&format!("/commands/{id}/signal"), &json!({"signal": 2}));
    assert_eq!(guest.refused(&ended), (409, "run_ended".into()));
    let other = guest.background(json!({"argv": ["sleep", "600"]}));
    let listed = guest.get("/commands").json();
    let ids: Vec<&Value> = listed["commands"].as_array().unwrap().iter().map(|one| &one["id"]).collect();
    assert_eq!(ids, [&json!(id), &json!(other)]);
    for bad in
        [json!({"signal": 0}), json!({"signal": 65}), json!({"signal": "SIGNONE"}), json!({"signal": null}), json!({})]
    {
        assert_eq!(guest.post(&format!("/commands/{other}/signal"), &bad).status, 400, "{bad}");
    }
    assert_eq!(guest.delete(&format!("/commands/{other}")).status, 204);
    wait_for("killed", patience(Duration::from_secs(5)), || guest.command(&other)["state"] == "ended");
    assert_eq!(guest.command(&other)["outcome"], "closed");
    assert_eq!(guest.delete(&format!("/commands/{other}")).status, 204);
    assert_eq!(guest.refused(&guest.get(&format!("/commands/{other}"))), (404, "run_not_found".into()));
    for unknown in ["nonsense", "00000000-0000-0000-0000-000000000000"] {
        assert_eq!(guest.refused(&guest.get(&format!("/commands/{unknown}"))), (404, "run_not_found".into()));
    }
}

#[test]
fn input_is_written_while_a_command_runs_and_its_end_is_said() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let id = guest.background(json!({"argv": ["cat"], "keep_stdin_open": true, "stdin": "first\n"}));
    let stdin = |rest: &str, body: &[u8]| guest.ask("POST", &format!("/commands/{id}/stdin{rest}"), &[], body);
    assert_eq!(stdin("", b"second\n").status, 204);
    assert_eq!(stdin("?end=true", b"third\n").status, 204);
    let (text, end) = guest.stream("GET", &format!("/commands/{id}/output"), &json!(null)).rest();
    assert_eq!((text.as_str(), &end.data["exit_code"]), ("first\nsecond\nthird\n", &json!(0)));
    assert_eq!(guest.refused(&stdin("", b"late")), (409, "run_ended".into()));
    assert_eq!(guest.refused(&stdin("?end=perhaps", b"")), (400, "invalid_request".into()));
    let deaf = guest.background(json!({"argv": ["sleep", "600"]}));
    let refused = guest.ask("POST", &format!("/commands/{deaf}/stdin"), &[], b"x");
    assert_eq!(guest.refused(&refused), (409, "no_stdin".into()));
}

#[test]
fn a_client_that_comes_back_in_the_middle_gets_exactly_the_rest() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let line =
        "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); [ $((i % 40)) = 0 ] && sleep 0.05; done; exit 0";
    let id = guest.background(json!({"command": line}));
    let whole: String = (0..400).map(|n| format!("line {n}\n")).collect();
    let mut events = guest.stream("GET", &format!("/commands/{id}/output"), &json!(null));
    let (mut text, mut at) = (String::new(), 0);
    while text.len() < 500 {
        let event = events.next_of("stdout");
        text += event.data["text"].as_str().unwrap();
        at = event.id.unwrap();
    }
    drop(events);
    assert_eq!(at as usize, text.len());
    let (rest, end) = guest.stream("GET", &format!("/commands/{id}/output?offset={at}"), &json!(null)).rest();
    assert_eq!((text + &rest, &end.data["exit_code"]), (whole.clone(), &json!(0)));
    // After its end as well, from anywhere.
    for from in [0, 7, 1000, whole.len()] {
        let (rest, _) = guest.stream("GET", &format!("/commands/{id}/output?offset={from}"), &json!(null)).rest();
        assert_eq!(rest, whole[from..]);
    }
    assert_eq!(guest.get(&format!("/commands/{id}/output?offset=-1")).status, 400);
}

#[test]
fn output_that_fell_out_is_said_to_be_lost() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let total = 4 << 20;
    let id = guest.background(json!({"command": format!("yes | head -c {total}; echo; echo end")}));
    wait_for("end", patience(Duration::from_secs(30)), || guest.command(&id)["state"] == "ended");
    let mut events = guest.stream("GET", &format!("/commands/{id}/output"), &json!(null));
    let lost = events.next_of("lost").data["bytes"].as_u64().unwrap();
    let (rest, end) = events.rest();
    assert_eq!(lost + rest.len() as u64, total + 5);
    assert!(rest.len() > 900 << 10 && rest.len() <= 1 << 20, "{}", rest.len());
    assert!(rest.ends_with("\nend\n") && end.data["exit_code"] == 0);
}

#[test]
fn a_command_goes_on_when_its_client_goes_unless_asked_otherwise() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    for (stream, end_with_client) in [(false, false), (false, true), (true, false), (true, true)] {
        let tag = format!("{stream} {end_with_client}");
        let body = json!({"argv": ["sleep", "600"], "tag": tag, "stream": stream, "end_with_client": end_with_client});
        let mut socket = client::connect(fixture.address);
        let request = client::request("POST", &guest.path("/commands"), &[JSON], body.to_string().as_bytes());
        socket.write_all(&request).unwrap();
        let find = || {
            let listed = guest.get("/commands").json();
            listed["commands"].as_array().unwrap().iter().find(|one| one["tag"] == tag.as_str()).cloned()
        };
        wait_for("command", patience(Duration::from_secs(5)), || find().is_some_and(|one| one["pid"].is_u64()));
        drop(socket);
        if end_with_client {
            wait_for("its end", patience(Duration::from_secs(5)), || find().is_none_or(|one| one["state"] == "ended"));
        } else {
            std::thread::sleep(Duration::from_millis(200));
            assert_eq!(find().unwrap()["state"], "running", "{tag}");
        }
    }
}

#[test]
fn a_server_in_the_background_is_reached_from_another_command() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    guest.run("open('hello.txt', 'w').write('served')");
    let id = guest.background(json!({"argv": ["python3", "-u", "-m", "http.server", "8000", "--bind", "127.0.0.1"]}));
    let fetch = "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:8000/hello.txt').read().decode()";
    wait_for("server", patience(Duration::from_secs(20)), || guest.run(fetch)["value"] == "'served'");
    let line = "python3 -c \"import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/hello.txt').read().decode())\"";
    assert_eq!(guest.shell(line)["stdout"], "served\n");
    assert_eq!(guest.command(&id)["state"], "running");
}

#[test]
fn a_reader_that_stalls_holds_up_its_command_and_no_other() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let mut stalled = client::connect(fixture.address);
    let body = json!({"command": "yes stalled", "stream": true, "tag": "stalled"});
    stalled
        .write_all(&client::request("POST", &guest.path("/commands"), &[JSON], body.to_string().as_bytes()))
        .unwrap();
    let offset = || {
        let listed = guest.get("/commands").json();
        let found = listed["commands"].as_array().unwrap().iter().find(|one| one["tag"] == "stalled").cloned();
        found.map_or(0, |one| one["output_offset"].as_u64().unwrap())
    };
    // It stops when every buffer on the way is full.
    let mut last = 0;
    wait_for("standstill", patience(Duration::from_secs(20)), || {
        std::thread::sleep(Duration::from_millis(300));
        let now = offset();
        now > 0 && std::mem::replace(&mut last, now) == now
    });
    let begun = Instant::now();
    for n in 0..20 {
        assert_eq!(guest.value(&format!("{n} + 1")), (n + 1).to_string());
    }
    assert_eq!(guest.shell("echo hi")["stdout"], "hi\n");
    assert!(begun.elapsed() < patience(Duration::from_secs(10)));
    assert_eq!(offset(), last, "it went on");
    let mut reader = BufReader::new(stalled);
    assert!(client::read_head(&mut reader).unwrap().starts_with("HTTP/1.1 200"));
}
