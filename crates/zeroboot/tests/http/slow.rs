//! Clients that are slow, leave, or break off.

use std::{
    io::{BufReader, Read, Write},
    net::Shutdown,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    client::{self, connect, read_answer},
    fixture::{Fixture, JSON, Setup},
};

#[test]
fn a_client_that_leaves_ends_its_sandbox_at_once() {
    let fixture = Fixture::new();
    for accept in ["Accept: */*", "Accept: text/event-stream"] {
        let body =
            json!({"code": "import time\nprint('x', flush=True)\ntime.sleep(100)", "timeout_seconds": 120}).to_string();
        let mut stream = connect(fixture.address);
        stream.write_all(&client::request("POST", "/v1/exec", &[JSON, accept], body.as_bytes())).unwrap();
        fixture.wait_for_live(1, Duration::from_secs(10));
        drop(stream);
        let begun = Instant::now();
        fixture.wait_for_live(0, Duration::from_secs(5));
        assert!(begun.elapsed() < Duration::from_secs(1), "{accept}: {:?}", begun.elapsed());
    }
    assert!(fixture.get("/v1/metrics").text().contains("\nzeroboot_concurrent_forks 0\n"));
}

#[test]
fn a_slow_body_holds_no_sandbox_and_is_cut() {
    let mut setup = Setup::default();
    setup.config.limits.body_timeout = Duration::from_millis(500);
    let fixture = setup.start();
    let mut stream = connect(fixture.address);
    let whole = client::request("POST", "/v1/exec", &[JSON], json!({"code": "print(1)"}).to_string().as_bytes());
    stream.write_all(&whole[..whole.len() - 3]).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(fixture.live(), 0);
    let answer = read_answer(&mut BufReader::new(stream)).unwrap();
    assert_eq!((answer.status, &answer.json()["code"]), (408, &json!("body_timeout")));
}

#[test]
fn a_slow_head_and_an_idle_connection_are_cut() {
    let mut setup = Setup::default();
    setup.config.limits.header_timeout = Duration::from_millis(500);
    let fixture = setup.start();
    for sent in ["", "POST /v1/exec HTTP/1.1\r\nHost: x\r\n"] {
        let mut stream = connect(fixture.address);
        stream.write_all(sent.as_bytes()).unwrap();
        let begun = Instant::now();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(5), "{sent:?}: {:?}", begun.elapsed());
    }
}

#[test]
fn a_stream_that_is_not_read_loses_its_sandbox() {
    let mut setup = Setup::default();
    setup.config.limits.stall_timeout = Duration::from_secs(1);
    let fixture = setup.start();
    let body = json!({
        "code": "import sys\nwhile True: sys.stdout.write('x' * 65536)", "timeout_seconds": 120,
        "limits": {"output_bytes": 64 << 20},
    });
    let mut stream = connect(fixture.address);
    let headers = [JSON, "Accept: text/event-stream"];
    stream.write_all(&client::request("POST", "/v1/exec", &headers, body.to_string().as_bytes())).unwrap();
    fixture.wait_for_live(1, Duration::from_secs(10));
    fixture.wait_for_live(0, Duration::from_secs(10));
    // Its connection is cut as well: what the kernel still has can be read, the end of the stream never comes.
    let mut rest = Vec::new();
    let result = stream.read_to_end(&mut rest);
    assert!(result.is_err() || !rest.windows(10).any(|window| window == b"event: end"));
}

#[test]
fn a_client_that_only_stops_sending_gets_no_answer_to_a_request_it_left() {
    // A half-closed connection counts as a client that left: nobody can tell them apart, and a sandbox costs more.
    let fixture = Fixture::new();
    let mut stream = connect(fixture.address);
    let body = json!({"code": "import time; time.sleep(100)", "timeout_seconds": 120}).to_string();
    stream.write_all(&client::request("POST", "/v1/exec", &[JSON], body.as_bytes())).unwrap();
    fixture.wait_for_live(1, Duration::from_secs(10));
    stream.shutdown(Shutdown::Write).unwrap();
    fixture.wait_for_live(0, Duration::from_secs(5));
}
