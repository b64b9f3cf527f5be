//! `zeroboot serve` with a collector named: what arrives there of one exec, and in which order its steps are.
#![allow(dead_code, reason = "the shared module holds more than these tests need")]

#[path = "http/client.rs"]
mod client;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    process::{Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use opentelemetry_proto::tonic::{collector::trace::v1::ExportTraceServiceRequest, trace::v1::Span};
use prost::Message as _;
use serde_json::json;

/// Takes deliveries until it is dropped; gives the body of each.
fn collector() -> (String, mpsc::Receiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut reader = BufReader::new(stream.unwrap());
            let (mut line, mut length) = (String::new(), 0);
            reader.read_line(&mut line).unwrap();
            assert_eq!(line, "POST /v1/traces HTTP/1.1\r\n");
            while line != "\r\n" {
                line.clear();
                reader.read_line(&mut line).unwrap();
                let lower = line.to_ascii_lowercase();
                if let Some(value) = lower.strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
                assert!(!lower.starts_with("content-type:") || lower.contains("application/x-protobuf"), "{line}");
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            // Kept open: the sender must not wait for the end.
            reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").unwrap();
            if tell.send(body).is_err() {
                return;
            }
        }
    });
    (endpoint, told)
}

/// The spans of the one exec that a server with these flags was asked for, by their begin; and all of them.
fn spans_of_an_exec(flags: &[&str], headers: &[&str]) -> (Vec<Span>, Vec<Span>) {
    let (endpoint, deliveries) = collector();
    let mut server = Command::new(env!("CARGO_BIN_EXE_zeroboot"))
        .args(["serve", "--listen", "127.0.0.1:0", "--engine", "process"])
        .args(flags)
        .env("ZEROBOOT_OTLP_ENDPOINT", &endpoint)
        // Its own: what is logged is one thing, what is traced another.
        .env("ZEROBOOT_LOG", "error")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(server.stderr.take().unwrap()).lines();
    // A first request is the last thing that it says of itself.
    let mut said = Vec::new();
    while said.last().is_none_or(|line: &String| !line.starts_with("  curl ")) {
        said.push(log.next().unwrap_or_else(|| panic!("it ended: {said:?}")).unwrap());
    }
    let line = said.iter().find(|line| line.contains("listens on")).unwrap();
    let address = line.split("listens on ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    let drained = std::thread::spawn(move || log.map(|line| line.unwrap()).collect::<Vec<_>>());
    let waiting = || {
        let health = client::exchange(address, &client::request("GET", "/v1/health", &[], b"")).json();
        let template = &health["templates"]["python"];
        template["pool_ready"] == template["pool_target"]
    };
    // What the first canary took from the pool is being made again.
    for _ in 0..3000 {
        if waiting() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let body = json!({"code": "print(6 * 7)"}).to_string();
    let headers: Vec<&str> = ["Content-Type: application/json"].iter().chain(headers).copied().collect();
    let answer = client::exchange(address, &client::request("POST", "/v1/exec", &headers, body.as_bytes()));
    assert_eq!(answer.status, 200, "{}", answer.text());
    // The reaping is off the response path: it has a moment to end.
    std::thread::sleep(Duration::from_millis(500));
    // The rest is sent before it ends.
    assert!(Command::new("kill").args(["-TERM", &server.id().to_string()]).status().unwrap().success());
    assert!(server.wait().unwrap().success());
    assert_eq!(drained.join().unwrap(), Vec::<String>::new());

    let mut all = Vec::new();
    for body in deliveries.try_iter() {
        let request = ExportTraceServiceRequest::decode(&*body).unwrap();
        for resource in request.resource_spans {
            let attributes = format!("{:?}", resource.resource);
            assert!(attributes.contains("service.name") && attributes.contains("\"zeroboot\""), "{attributes}");
            all.extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
        }
    }
    let root = all.iter().find(|span| span.name == "http.exec").expect("a span of the request");
    assert!(root.attributes.iter().any(|attribute| attribute.key == "request_id"), "{root:?}");
    let mut steps: Vec<Span> = all.iter().filter(|span| span.trace_id == root.trace_id).cloned().collect();
    steps.sort_by_key(|span| span.start_time_unix_nano);
    (steps, all)
}

fn names(spans: &[Span]) -> Vec<&str> {
    spans.iter().map(|span| span.name.as_str()).collect()
}

#[test]
fn the_steps_of_an_exec_are_spans_in_their_order() {
    let (steps, all) = spans_of_an_exec(&["--pool", "2"], &[]);
    let expected =
        ["http.exec", "exec.request", "exec.admission", "exec.checkout", "exec.run", "exec.reap", "exec.answer"];
    assert_eq!(names(&steps), expected);
    let end = |name: &str| steps.iter().find(|span| span.name == name).unwrap().end_time_unix_nano;
    // Off the response path: the worker's end is not waited for.
    for (earlier, later) in [("exec.request", "exec.admission"), ("exec.checkout", "exec.run")] {
        assert!(end(earlier) <= end(later), "{earlier} ends before {later}");
    }
    // Sandboxes for the pool and canaries are forked too, in traces of their own.
    assert!(names(&all).contains(&"exec.fork") && names(&all).contains(&"canary"), "{:?}", names(&all));
    let text = format!("{all:?}");
    assert!(!text.contains("6 * 7"), "code in a trace");
}

#[test]
fn a_fork_on_the_spot_is_a_step_of_its_exec() {
    let (steps, _) = spans_of_an_exec(&["--pool", "0"], &["Accept: text/event-stream"]);
    let expected = ["http.exec", "exec.request", "exec.admission", "exec.checkout", "exec.fork"];
    assert_eq!(names(&steps)[..expected.len()], expected);
}
