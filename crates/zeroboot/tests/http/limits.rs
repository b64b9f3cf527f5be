//! What a key, a client address and all callers together may have.

use std::{
    io::{BufReader, Read as _, Write as _},
    net::TcpStream,
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use zeroboot_server::{KeyStore, NewKey, ServerConfig};

use crate::{
    client::{self, Answer},
    fixture::{Fixture, JSON, Setup, wait_for},
};

/// Sends an exec and reads no answer. Dropping the connection ends it.
fn begin(fixture: &Fixture, body: &Value, headers: &[&str]) -> TcpStream {
    let mut stream = client::connect(fixture.address);
    let headers = [&[JSON], headers].concat();
    stream.write_all(&client::request("POST", "/v1/exec", &headers, body.to_string().as_bytes())).unwrap();
    stream
}

/// A server with one key.
struct Keyed {
    fixture: Fixture,
    token: String,
    _folder: tempfile::TempDir,
}

impl Keyed {
    fn new(new: NewKey, change: impl FnOnce(&mut ServerConfig)) -> Keyed {
        let folder = tempfile::tempdir().unwrap();
        let path: PathBuf = folder.path().join("keys.toml");
        let (token, _) = KeyStore::new(&path).create(NewKey { name: "test".into(), ..new }).unwrap();
        let mut setup = Setup::default();
        setup.config.keys_file = Some(path);
        change(&mut setup.config);
        Keyed { fixture: setup.start(), token, _folder: folder }
    }

    fn post(&self, path: &str, body: &Value, more: &[&str]) -> Answer {
        let header = format!("Authorization: Bearer {}", self.token);
        self.fixture.post(path, body, &[&[header.as_str()], more].concat())
    }

    fn begin(&self, code: &str) -> TcpStream {
        begin(&self.fixture, &json!({"code": code}), &[&format!("Authorization: Bearer {}", self.token)])
    }

    fn run(&self, more: &[&str]) -> Answer {
        self.post("/v1/exec", &json!({"code": "print(1)"}), more)
    }
}

#[test]
fn a_key_has_its_rate() {
    let keyed = Keyed::new(NewKey { rate: Some(0.01), ..NewKey::default() }, |_| {});
    assert_eq!(keyed.run(&[]).status, 200);
    let answer = keyed.run(&[]);
    assert_eq!((answer.status, &answer.json()["error"]), (429, &json!("Rate limit exceeded (0.01 req/s)")));
    let wait: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!((50..=100).contains(&wait), "{wait}");
}

#[test]
fn a_batch_above_the_rate_passes_from_a_full_bucket_and_is_paid_for_afterwards() {
    let keyed = Keyed::new(NewKey { rate: Some(0.01), ..NewKey::default() }, |_| {});
    let batch = json!({"executions": vec![json!({"code": "print(1)"}); 3]});
    let answer = keyed.post("/v1/exec/batch", &batch, &[]);
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.json()["results"][2]["stdout"], "1\n");
    let answer = keyed.run(&[]);
    assert_eq!((answer.status, &answer.json()["code"]), (429, &json!("rate_limited")));
    let wait: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!((250..=300).contains(&wait), "three of them are paid for: {wait}");
}

#[test]
fn a_demo_key_has_few_execs_from_each_address_and_only_a_proxy_of_ours_says_which() {
    let demo = || NewKey { demo: true, ..NewKey::default() };
    let keyed = Keyed::new(demo(), |config| {
        config.limits.demo_per_minute = 1.0;
        config.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
    });
    assert_eq!(keyed.run(&["X-Forwarded-For: 1.1.1.1"]).status, 200);
    let answer = keyed.run(&["X-Forwarded-For: 1.1.1.1"]);
    assert_eq!((answer.status, &answer.json()["error"]), (429, &json!("Rate limit exceeded (1 req/min)")));
    assert!(answer.header("retry-after").is_some());
    assert_eq!(keyed.run(&["X-Forwarded-For: 2.2.2.2"]).status, 200);

    let keyed = Keyed::new(demo(), |config| config.limits.demo_per_minute = 1.0);
    assert_eq!(keyed.run(&["X-Forwarded-For: 1.1.1.1"]).status, 200);
    assert_eq!(keyed.run(&["X-Forwarded-For: 2.2.2.2"]).status, 429);
}

#[test]
fn a_key_has_its_concurrency() {
    let keyed = Keyed::new(NewKey { concurrency: Some(1), ..NewKey::default() }, |_| {});
    let slow = keyed.begin("import time; time.sleep(60)");
    keyed.fixture.wait_for_live(1, Duration::from_secs(20));
    let answer = keyed.run(&[]);
    assert_eq!((answer.status, &answer.json()["code"]), (429, &json!("concurrency_limited")));
    assert_eq!(answer.header("retry-after"), Some("1"));
    // Its client leaves.
    drop(slow);
    keyed.fixture.wait_for_live(0, Duration::from_secs(20));
    wait_for("its place", Duration::from_secs(20), || keyed.run(&[]).status == 200);
    // A batch runs within it, and needs it all.
    let batch = json!({"executions": vec![json!({"code": "print(1)"}); 3]});
    let answer = keyed.post("/v1/exec/batch", &batch, &[]).json();
    assert!((0..3).all(|at| answer["results"][at]["stdout"] == "1\n"), "{answer}");
}

#[test]
fn connections_without_a_key_keep_nobody_out() {
    let most = 64;
    let keyed = Keyed::new(NewKey::default(), |config| config.limits.max_connections = most);
    let mut strangers = Vec::new();
    for at in 0..3 * most {
        let mut stream = client::connect(keyed.fixture.address);
        let head = format!("POST /v1/exec HTTP/1.1\r\nHost: x\r\nX-{at}: {}", "x".repeat(8 * 1024));
        stream.write_all(head.as_bytes()).unwrap();
        strangers.push(stream);
        // They come from the same address as these.
        if at % 16 == 0 {
            let begun = Instant::now();
            assert_eq!(keyed.fixture.get("/v1/health").status, 200);
            assert_eq!(keyed.run(&[]).status, 200);
            assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        }
    }
    // Each of those that are left is one of the address's share.
    wait_for("end of the rest", Duration::from_secs(5), || {
        let open = strangers.iter().filter(|stream| {
            stream.set_nonblocking(true).unwrap();
            stream.peek(&mut [0]).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
        });
        open.count() <= most / 2
    });
}

#[test]
fn a_connection_without_a_key_may_send_a_short_head_and_one_with_a_key_a_long_one() {
    let keyed = Keyed::new(NewKey::default(), |_| {});
    let long = format!("X-Long: {}", "x".repeat(50 * 1024));
    let mut stream = client::connect(keyed.fixture.address);
    // It may be ended before all is sent.
    let head = client::request("GET", "/v1/health", &[&long], b"");
    stream.write_all(&head[..head.len() - 4]).unwrap_or_default();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap_or_default();
    assert!(rest.is_empty(), "{}", String::from_utf8_lossy(&rest));

    let mut stream = BufReader::new(client::connect(keyed.fixture.address));
    let key = format!("Authorization: Bearer {}", keyed.token);
    for headers in [&[JSON, &key][..], &[JSON, &key, &long]] {
        let request = client::request("POST", "/v1/exec", headers, br#"{"code": "print(1)"}"#);
        stream.get_mut().write_all(&request).unwrap();
        assert_eq!(client::read_answer(&mut stream).unwrap().status, 200);
    }
}

#[test]
fn a_large_body_without_a_key_is_told_so() {
    let keyed = Keyed::new(NewKey::default(), |_| {});
    let body = json!({"code": "x".repeat(1 << 20)});
    let answer = keyed.fixture.post("/v1/exec", &body, &["Authorization: Bearer zb_live_wrong"]);
    assert_eq!((answer.status, &answer.json()["code"]), (401, &json!("unauthorized")));
}

#[test]
fn a_key_ends_when_it_expires() {
    let soon = jiff::Timestamp::now().checked_add(Duration::from_secs(4)).unwrap();
    let keyed = Keyed::new(NewKey { expires: Some(soon), ..NewKey::default() }, |_| {});
    wait_for("its end", Duration::from_secs(20), || keyed.run(&[]).status == 401);
    let answer = keyed.run(&[]);
    assert_eq!((answer.status, &answer.json()["error"]), (401, &json!("API key expired")));
}

#[test]
fn what_the_server_holds_is_bounded_and_given_back() {
    let mut setup = Setup::default();
    setup.config.limits.max_held = 1024 * 1024;
    setup.config.limits.max_body = 460 * 1024;
    setup.config.limits.default_output = 16 * 1024;
    let fixture = setup.start();
    let large = |code: &str| json!({"code": code, "stdin": "x".repeat(450 * 1024)});
    let slow = || begin(&fixture, &large("import time; time.sleep(60)"), &[]);
    let both = [slow(), slow()];
    fixture.wait_for_live(2, Duration::from_secs(20));
    for path in ["/v1/exec", "/v1/exec/batch"] {
        let answer = fixture.post(path, &large("print(1)"), &[]);
        assert_eq!((answer.status, &answer.json()["code"]), (503, &json!("busy")));
        assert_eq!(answer.header("retry-after"), Some("1"));
    }
    assert_eq!(fixture.run("print(1)")["stdout"], "1\n", "there is room for a small one");
    drop(both);
    fixture.wait_for_live(0, Duration::from_secs(20));
    assert_eq!(fixture.exec(&large("print(1)"))["stdout"], "1\n");
    let code = "import sys\nfor _ in range(32): sys.stdout.write('x' * 65536)";
    let loud = json!({"code": code, "limits": {"output_bytes": 4 << 20}});
    let answer = fixture.post("/v1/exec", &loud, &[]);
    assert_eq!((answer.status, &answer.json()["code"]), (500, &json!("server_output_limit")));
    let batch = json!({"executions": [loud, {"code": "print(1)"}]});
    let results = fixture.post("/v1/exec/batch", &batch, &[]).json()["results"].take();
    assert_eq!((&results[0]["code"], &results[1]["stdout"]), (&json!("server_output_limit"), &json!("1\n")));
    fixture.wait_for_live(0, Duration::from_secs(20));
    // A client that reads its stream gets all of it: only what is not taken counts.
    let answer = fixture.post("/v1/exec", &loud, &["Accept: text/event-stream"]);
    let events = answer.events();
    let last = events.last().unwrap();
    assert_eq!((last.0.as_str(), &last.1["outcome"]), ("end", &json!("exited")));
    assert_eq!(fixture.run("print(1)")["stdout"], "1\n");
}
