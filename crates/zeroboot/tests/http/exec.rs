use std::time::{Duration, Instant};

use serde_json::json;

use crate::fixture::{Fixture, Setup, isolation, patience};

#[test]
fn the_originals_request_gets_the_originals_answer() {
    let fixture = Fixture::new();
    let body = fixture.exec(&json!({"code": "print(1 + 1)", "language": "python", "timeout_seconds": 30}));
    assert_eq!((&body["stdout"], &body["stderr"], &body["exit_code"]), (&json!("2\n"), &json!(""), &json!(0)));
    assert_eq!(
        (&body["output"], &body["isolation"], &body["outcome"]),
        (&json!("2\n"), &json!(isolation().as_str()), &json!("exited"))
    );
    for field in ["fork_time_ms", "exec_time_ms", "total_time_ms"] {
        assert!(body[field].as_f64().is_some_and(|ms| ms > 0.0), "{field} in {body}");
    }
    assert_eq!(body["id"].as_str().map(|id| (id.len(), id.as_bytes()[14])), Some((36, b'7')), "a UUIDv7");
}

#[test]
fn output_and_status_are_exact() {
    let fixture = Fixture::new();
    let body = fixture.run("import sys\nprint('a\\r\\n b ', end='')\nprint('err', file=sys.stderr)\nsys.exit(3)");
    assert_eq!(
        (&body["stdout"], &body["stderr"], &body["exit_code"]),
        (&json!("a\r\n b "), &json!("err\n"), &json!(3))
    );

    let body = fixture.run("1/0");
    assert_eq!(body["exit_code"], 1);
    assert!(body["stderr"].as_str().unwrap().contains("ZeroDivisionError"), "{body}");

    let body = fixture.run("import os; os.write(1, bytes([0, 255]))");
    assert_eq!((&body["stdout"], &body["encoding"]), (&json!("AP8="), &json!({"stdout": "base64", "stderr": "utf-8"})));

    let body = fixture.run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)");
    assert_eq!((&body["outcome"], &body["signal"], &body["exit_code"]), (&json!("signaled"), &json!(9), &json!(137)));
}

#[test]
fn a_passed_deadline_is_200_and_keeps_the_output_before_it() {
    let fixture = Fixture::new();
    let begun = Instant::now();
    let timeout = patience(Duration::from_secs(1)).as_secs();
    let body =
        fixture.exec(&json!({"code": "print('before', flush=True)\nwhile True: pass", "timeout_seconds": timeout}));
    assert_eq!(
        (&body["outcome"], &body["exit_code"], &body["stdout"]),
        (&json!("deadline_passed"), &json!(124), &json!("before\n"))
    );
    assert!(begun.elapsed() < patience(Duration::from_secs(15)), "{:?}", begun.elapsed());
}

#[test]
fn stdin_environment_arguments_and_files_go_in_and_files_come_back() {
    let fixture = Fixture::new();
    let code = "import sys, os\nprint(sys.stdin.read(), os.environ['COLOUR'], sys.argv[1:])\n\
                print(open('in/a.txt').read())\nopen('out.bin', 'wb').write(bytes([255, 0]))\nopen('out.txt', 'w').write('text')";
    let body = fixture.exec(&json!({
        "code": code, "stdin": {"base64": "aW5wdXQ="}, "env": {"COLOUR": "blue"}, "args": ["x", "y z"],
        "files": {"in/a.txt": "content"}, "output_files": ["out.txt", "out.bin", "none"],
    }));
    assert_eq!(body["stdout"], "input blue ['x', 'y z']\ncontent\n", "{body}");
    assert_eq!(body["files"]["out.txt"], json!({"text": "text"}));
    assert_eq!(body["files"]["out.bin"], json!({"base64": "/wA="}));
    assert!(body["files"]["none"]["error"].is_string(), "{body}");
}

#[test]
fn limits_are_kept() {
    let fixture = Fixture::new();
    let body = fixture.exec(&json!({"code": "while True: print('x' * 1000)", "limits": {"output_bytes": 10000}}));
    assert_eq!((&body["outcome"], &body["truncated"]), (&json!("output_limit"), &json!(true)));
    assert!(body["stdout"].as_str().unwrap().len() <= 10_000);

    let body = fixture.exec(&json!({"code": "x = bytearray(300_000_000)", "limits": {"memory_mb": 100}}));
    assert_eq!(body["outcome"], "out_of_memory", "{body}");

    let body =
        fixture.exec(&json!({"code": "while True: pass", "limits": {"cpu_seconds": 0.3}, "timeout_seconds": 60}));
    assert_eq!(body["outcome"], "cpu_limit", "{body}");
}

#[test]
fn files_that_cannot_be_written_are_the_callers_mistake() {
    let fixture = Fixture::new();
    for files in [json!({"a": "x", "a/b": "y"}), json!({("x".repeat(256)): "x"}), json!({"a/../b": "x"})] {
        let answer = fixture.post("/v1/exec", &json!({"code": "print(1)", "files": files}), &[]);
        assert_eq!((answer.status, &answer.json()["code"]), (400, &json!("invalid_files")), "{files}");
    }
    let files = json!({("x".repeat(255)): "x", "a/b": "y", "a/c": "z"});
    let body = fixture.exec(&json!({"code": "import os; print(len(os.listdir()))", "files": files}));
    assert_eq!(body["stdout"], "2\n");
}

#[test]
fn node_is_a_language_with_two_names_and_ruby_is_none() {
    let fixture = Setup { node: true, ..Setup::default() }.start();
    for language in ["node", "javascript"] {
        let body = fixture.exec(&json!({"code": "console.log(6 * 7)", "language": language}));
        assert_eq!(
            (&body["stdout"], &body["language"], &body["template"]),
            (&json!("42\n"), &json!("node"), &json!("node"))
        );
    }
    let answer = fixture.post("/v1/exec", &json!({"code": "puts 1", "language": "ruby"}), &[]);
    assert_eq!((answer.status, &answer.json()["code"]), (400, &json!("unknown_language")));
    let batch = json!({"executions": [{"code": "print(1)"}, {"code": "console.log(2)", "language": "node"}]});
    let body = fixture.post("/v1/exec/batch", &batch, &[]).json();
    assert_eq!((&body["results"][0]["stdout"], &body["results"][1]["stdout"]), (&json!("1\n"), &json!("2\n")));
}

#[test]
fn a_batch_runs_in_parallel_and_keeps_its_order() {
    let fixture = Setup { pool: 8, ..Setup::default() }.start();
    let item = |at: usize| json!({"code": format!("import time\ntime.sleep(1)\nprint({at})")});
    let begun = Instant::now();
    let batch = json!({"executions": (0..8).map(item).collect::<Vec<_>>()});
    let body = std::thread::scope(|scope| {
        let answer = scope.spawn(|| fixture.post("/v1/exec/batch", &batch, &[]).json());
        fixture.wait_for_live(8, patience(Duration::from_secs(1)));
        answer.join().unwrap()
    });
    let took = begun.elapsed();
    for at in 0..8 {
        assert_eq!(body["results"][at]["stdout"], format!("{at}\n"));
    }
    assert!(took < patience(Duration::from_secs(5)), "eight seconds of sleep took {took:?}");
}

#[test]
fn a_stream_brings_output_as_it_happens() {
    use std::io::{BufRead as _, BufReader, Write as _};

    let fixture = Fixture::new();
    let code = "import time\nprint('first', flush=True)\ntime.sleep(2)\nprint('second')";
    let body = json!({ "code": code }).to_string();
    let headers = [crate::fixture::JSON, "Accept: text/event-stream"];
    let mut stream = crate::client::connect(fixture.address);
    let begun = Instant::now();
    stream.write_all(&crate::client::request("POST", "/v1/exec", &headers, body.as_bytes())).unwrap();
    let mut reader = BufReader::new(stream);
    let head = crate::client::read_head(&mut reader).unwrap();
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("text/event-stream"), "{head}");
    let mut arrived = |word: &str| {
        for line in reader.by_ref().lines() {
            if line.unwrap().contains(word) {
                return begun.elapsed();
            }
        }
        panic!("{word} did not come");
    };
    use std::io::Read as _;
    let first = arrived("first");
    let second = arrived("second");
    assert!(second - first > Duration::from_millis(1500), "{first:?} {second:?}");
    arrived("event: end");
}

#[test]
fn a_streams_events_are_complete() {
    let fixture = Fixture::new();
    let code = "import sys, os\nos.write(1, '€'.encode()[:2]); import time; time.sleep(.2); os.write(1, '€'.encode()[2:])\n\
                sys.stderr.write('e')\nopen('f', 'w').write('x')\nsys.exit(5)";
    let body = json!({"code": code, "output_files": ["f"]});
    let answer = fixture.post("/v1/exec", &body, &["Accept: text/event-stream"]);
    let events = answer.events();
    let find = |name: &str| &events.iter().find(|event| event.0 == name).unwrap_or_else(|| panic!("no {name}")).1;
    assert_eq!(find("stdout"), &json!({"text": "€"}));
    assert_eq!(find("stderr"), &json!({"text": "e"}));
    assert_eq!(find("file"), &json!({"path": "f", "text": "x"}));
    assert_eq!((&find("end")["exit_code"], &find("end")["outcome"]), (&json!(5), &json!("exited")));
    assert_eq!(find("start")["id"], find("end")["id"]);
    assert_eq!(events.last().unwrap().0, "end");
}
