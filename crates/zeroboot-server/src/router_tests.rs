//! Tests of the routes against the stand-in for the engine: everything but the network.

use std::{sync::atomic::Ordering, time::Duration};

use axum::{
    body::Body,
    http::{Request, StatusCode, header},
};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::*;
use crate::{
    backend::Backend,
    config::ServerConfig,
    fake::Fake,
    gate::Gate,
    keys::{KeyRing, KeyStore, NewKey},
};

pub(crate) struct Fixture {
    pub(crate) fake: Arc<Fake>,
    pub(crate) app: Arc<App>,
    router: Router,
}

pub(crate) struct Answer {
    status: u16,
    headers: axum::http::HeaderMap,
    text: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("no JSON: {}", self.text))
    }
    fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or_default().to_owned()
    }
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

impl Fixture {
    pub(crate) fn new(config: ServerConfig, ring: Option<KeyRing>) -> Fixture {
        let fake = Arc::new(Fake::default());
        let backend = Backend::Fake(fake.clone());
        let gate = Gate::new(ring, &config.limits, backend.stats());
        let app = Arc::new(App::new(backend, config, gate));
        Fixture { router: router(app.clone()), fake, app }
    }

    fn open() -> Fixture {
        Fixture::new(ServerConfig::default(), None)
    }

    async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        Answer { status: parts.status.as_u16(), headers: parts.headers, text: String::from_utf8(bytes.into()).unwrap() }
    }

    async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(post(path, body)).await
    }

    async fn run(&self, code: &str) -> Answer {
        self.post("/v1/exec", &json!({"code": code})).await
    }
}

fn post(path: &str, body: &Value) -> Request<Body> {
    Request::post(path).header("content-type", "application/json").body(Body::from(body.to_string())).unwrap()
}

fn keyed(mut request: Request<Body>, token: &str) -> Request<Body> {
    request.headers_mut().insert(header::AUTHORIZATION, format!("Bearer {token}").parse().unwrap());
    request
}

fn from_ip(mut request: Request<Body>, ip: &str) -> Request<Body> {
    request.extensions_mut().insert(Peer { ip: ip.parse().ok(), ..Peer::default() });
    request
}

/// A server with one key that has these properties.
fn with_key(config: ServerConfig, new: NewKey) -> (Fixture, String, KeyStore, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys.toml");
    let store = KeyStore::new(&path);
    let (token, _) = store.create(NewKey { name: "test".into(), ..new }).unwrap();
    let ring = KeyRing::load(&path).unwrap();
    (Fixture::new(config, Some(ring)), token, store, folder)
}

#[tokio::test]
async fn both_paths_run_code() {
    let fixture = Fixture::open();
    for path in ["/v1/exec", "/exec"] {
        let answer = fixture.post(path, &json!({"code": "hello err=oops exit=3"})).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let body = answer.json();
        assert_eq!(
            (&body["stdout"], &body["stderr"], &body["exit_code"]),
            (&json!("hello"), &json!("oops"), &json!(3))
        );
        assert_eq!(body["outcome"], "exited");
        assert_eq!(answer.header("content-type"), "application/json");
        assert_eq!(answer.header("x-request-id").len(), 36);
    }
}

#[tokio::test]
async fn a_passed_deadline_is_an_answer() {
    let body = Fixture::open().run("part late").await.json();
    assert_eq!(
        (&body["outcome"], &body["exit_code"], &body["stdout"]),
        (&json!("deadline_passed"), &json!(124), &json!("part"))
    );
}

#[tokio::test]
async fn every_error_has_the_same_shape() {
    let fixture = Fixture::open();
    let bad_json = Request::post("/v1/exec").header("content-type", "application/json").body("{".into()).unwrap();
    let form = Request::post("/v1/exec").header("content-type", "text/plain").body(r#"{"code":"1"}"#.into()).unwrap();
    let cases = [
        (fixture.send(bad_json).await, 400, "invalid_json"),
        (fixture.send(form).await, 415, "unsupported_media_type"),
        (fixture.post("/v1/exec", &json!({"code": "1", "language": "ruby"})).await, 400, "unknown_language"),
        (fixture.post("/v1/exec", &json!({"code": "1", "colour": "red"})).await, 400, "invalid_request"),
        (fixture.post("/v1/exec/batch", &json!({"executions": []})).await, 400, "invalid_request"),
        (fixture.get("/nowhere").await, 404, "not_found"),
        (fixture.get("/v1/exec").await, 405, "method_not_allowed"),
        (fixture.run("busy").await, 503, "busy"),
        (fixture.run("crash").await, 500, "sandbox_failed"),
        (fixture.run("panic").await, 500, "internal"),
        (fixture.run("panic early").await, 500, "internal"),
    ];
    for (answer, status, code) in &cases {
        assert_eq!((answer.status, answer.code().as_str()), (*status, *code), "{}", answer.text);
        let body = answer.json();
        assert!(body["error"].as_str().is_some_and(|text| !text.is_empty()));
        assert_eq!(body["request_id"], answer.header("x-request-id"));
        assert_eq!(body.as_object().unwrap().len(), 3);
        assert_eq!(answer.header("content-type"), "application/json");
    }
    assert_eq!(cases[6].0.header("allow"), "POST");
    assert_eq!(cases[7].0.header("retry-after"), "3");
    let text = fixture.get("/metrics").await.text;
    assert!(text.contains("\nzeroboot_concurrent_forks 0\n"), "{text}");
    assert!(text.contains("zeroboot_total_executions{status=\"error\"} 2\n"), "{text}");
    assert_eq!(fixture.fake.alive.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_body_above_the_limit_is_refused_without_a_sandbox() {
    let mut config = ServerConfig::default();
    config.limits.max_body = 2000;
    let fixture = Fixture::new(config, None);
    let answer = fixture.run(&"x".repeat(3000)).await;
    assert_eq!((answer.status, answer.code().as_str()), (413, "body_too_large"));
    assert_eq!(fixture.fake.started.load(Ordering::SeqCst), 0);
}

#[tokio::test(start_paused = true)]
async fn a_slow_body_takes_no_sandbox() {
    let fixture = Fixture::open();
    let never = futures_util::stream::pending::<Result<axum::body::Bytes, std::io::Error>>();
    let request = Request::post("/v1/exec").header("content-type", "application/json").body(Body::from_stream(never));
    let answer = fixture.send(request.unwrap()).await;
    assert_eq!((answer.status, answer.code().as_str()), (408, "body_timeout"));
    assert_eq!(fixture.fake.started.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn keys_are_asked_for_in_the_originals_words() {
    let (fixture, token, store, folder) = with_key(ServerConfig::default(), NewKey::default());
    let body = json!({"code": "hi"});
    for path in ["/v1/exec", "/exec", "/v1/exec/batch"] {
        let answer = fixture.post(path, &body).await;
        assert_eq!((answer.status, &answer.json()["error"]), (401, &json!("Missing Authorization header")));
        assert_eq!(answer.header("www-authenticate"), "Bearer");
        for wrong in ["zb_live_wrong", "", &token[..token.len() - 1]] {
            let answer = fixture.send(keyed(post(path, &body), wrong)).await;
            assert_eq!((answer.status, &answer.json()["error"]), (401, &json!("Invalid API key")), "{wrong}");
        }
    }
    let mut basic = post("/v1/exec", &body);
    basic.headers_mut().insert(header::AUTHORIZATION, format!("Basic {token}").parse().unwrap());
    assert_eq!(fixture.send(basic).await.status, 401);
    assert_eq!(fixture.send(keyed(post("/v1/exec", &body), &token)).await.status, 200);
    assert_eq!(fixture.get("/v1/metrics").await.status, 401);
    assert_eq!(fixture.get("/v1/health").await.status, 200);

    // A reload takes effect at once; a broken file changes nothing.
    let path = folder.path().join("keys.toml");
    let key = store.list().unwrap().remove(0);
    let (second, _) = store.create(NewKey { name: "second".into(), ..NewKey::default() }).unwrap();
    store.revoke(&key.id).unwrap();
    fixture.app.gate.reload(&path).unwrap();
    assert_eq!(fixture.send(keyed(post("/v1/exec", &body), &token)).await.status, 401);
    assert_eq!(fixture.send(keyed(post("/v1/exec", &body), &second)).await.status, 200);
    std::fs::write(&path, "{").unwrap();
    assert!(fixture.app.gate.reload(&path).is_err());
    assert_eq!(fixture.send(keyed(post("/v1/exec", &body), &second)).await.status, 200);
}

#[tokio::test]
async fn a_key_has_its_rate() {
    let (fixture, token, ..) = with_key(ServerConfig::default(), NewKey { rate: Some(2.0), ..NewKey::default() });
    let run = || fixture.send(keyed(post("/v1/exec", &json!({"code": "hi"})), &token));
    assert_eq!(run().await.status, 200);
    assert_eq!(run().await.status, 200);
    let answer = run().await;
    assert_eq!((answer.status, &answer.json()["error"]), (429, &json!("Rate limit exceeded (2 req/s)")));
    assert_eq!(answer.header("retry-after"), "1");
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(run().await.status, 200);
}

#[tokio::test]
async fn every_item_of_a_batch_is_charged() {
    let (fixture, token, ..) = with_key(ServerConfig::default(), NewKey::default());
    let batch = json!({"executions": vec![json!({"code": "hi"}); 60]});
    let answer = fixture.send(keyed(post("/v1/exec/batch", &batch), &token)).await;
    assert_eq!(answer.status, 200);
    let answer = fixture.send(keyed(post("/v1/exec/batch", &batch), &token)).await;
    assert_eq!((answer.status, &answer.json()["error"]), (429, &json!("Rate limit exceeded (100 req/s)")));
    assert_eq!(fixture.fake.started.load(Ordering::SeqCst), 60);
}

#[tokio::test]
async fn demo_keys_have_few_requests_a_minute_from_each_address() {
    let config = ServerConfig { trusted_proxies: vec!["10.0.0.0/8".parse().unwrap()], ..ServerConfig::default() };
    let (fixture, token, ..) = with_key(config, NewKey { demo: true, ..NewKey::default() });
    let request = |ip: &str, forwarded: &str| {
        let mut request = from_ip(keyed(post("/v1/exec", &json!({"code": "hi"})), &token), ip);
        request.headers_mut().insert("x-forwarded-for", forwarded.parse().unwrap());
        request
    };
    for at in 0..10 {
        // Nobody gets further by making addresses up.
        assert_eq!(fixture.send(request("8.8.8.8", &format!("1.1.1.{at}"))).await.status, 200);
    }
    let answer = fixture.send(request("8.8.8.8", "1.1.1.99")).await;
    assert_eq!((answer.status, &answer.json()["error"]), (429, &json!("Rate limit exceeded (10 req/min)")));
    // Behind the proxy that is believed, two clients are two.
    assert_eq!(fixture.send(request("10.0.0.1", "1.1.1.1")).await.status, 200);
    assert_eq!(fixture.send(request("10.0.0.1", "8.8.8.8")).await.status, 429);
}

#[tokio::test]
async fn a_key_has_its_concurrency() {
    let (fixture, token, ..) = with_key(ServerConfig::default(), NewKey { concurrency: Some(2), ..NewKey::default() });
    let hang =
        || tokio::spawn(fixture.router.clone().oneshot(keyed(post("/v1/exec", &json!({"code": "hang"})), &token)));
    let (first, second) = (hang(), hang());
    while fixture.fake.alive.load(Ordering::SeqCst) < 2 {
        tokio::task::yield_now().await;
    }
    let run = || fixture.send(keyed(post("/v1/exec", &json!({"code": "hi"})), &token));
    let answer = run().await;
    assert_eq!((answer.status, answer.code().as_str()), (429, "concurrency_limited"));
    assert_eq!(answer.header("retry-after"), "1");
    // A client that leaves gives its sandbox and its place back at once.
    first.abort();
    assert!(first.await.is_err());
    assert_eq!(fixture.fake.alive.load(Ordering::SeqCst), 1);
    assert_eq!(run().await.status, 200);
    let batch = json!({"executions": vec![json!({"code": "sleep"}); 5]});
    assert_eq!(fixture.send(keyed(post("/v1/exec/batch", &batch), &token)).await.status, 200);
    assert_eq!(fixture.fake.peak.load(Ordering::SeqCst), 2);
    second.abort();
}

#[tokio::test]
async fn of_several_keys_one_has_half_of_the_sandboxes_and_of_the_memory() {
    let mut config = ServerConfig::default();
    config.limits.max_memory = 1 << 30;
    let (fixture, first, store, folder) = with_key(config, NewKey::default());
    let run = |token: &str, body: Value| {
        let request = keyed(post("/v1/exec", &body), token);
        tokio::spawn(fixture.router.clone().oneshot(request))
    };
    let fake = fixture.fake.clone();
    let alive = async |count| wait_until("they hang", || fake.alive.load(Ordering::SeqCst) == count).await;
    let most = fixture.app.backend.stats();
    let refused = async |token: &str, body: Value| {
        let answer = fixture.send(keyed(post("/v1/exec", &body), token)).await;
        assert_eq!((answer.status, answer.code().as_str()), (429, "concurrency_limited"), "{}", answer.text);
        assert_eq!(answer.header("retry-after"), "1");
    };
    let hang = json!({"code": "hang", "limits": {"memory_mb": 16}});
    let all = |count| (0..count).map(|_| run(&first, hang.clone())).collect::<Vec<_>>();
    // Alone it may have them all.
    let hanging = all(most.max_live);
    alive(most.max_live).await;
    hanging.iter().for_each(tokio::task::JoinHandle::abort);
    alive(0).await;

    let (second, _) = store.create(NewKey { name: "second".into(), ..NewKey::default() }).unwrap();
    let (third, _) = store.create(NewKey { name: "third".into(), concurrency: Some(20), ..NewKey::default() }).unwrap();
    fixture.app.gate.reload(&folder.path().join("keys.toml")).unwrap();
    let half = most.max_live / 2;
    let hanging = all(half);
    alive(half).await;
    refused(&first, hang.clone()).await;
    let other = fixture.send(keyed(post("/v1/exec", &json!({"code": "hi"})), &second)).await;
    assert_eq!(other.status, 200, "{}", other.text);
    hanging.iter().for_each(tokio::task::JoinHandle::abort);
    alive(0).await;

    // Half of the memory, in few sandboxes.
    let large = json!({"code": "hang", "limits": {"memory_mb": 1024}});
    let fit = ((most.max_memory / 2) >> 30) as usize;
    let hanging: Vec<_> = (0..fit).map(|_| run(&first, large.clone())).collect();
    alive(fit).await;
    refused(&first, hang.clone()).await;
    let batch = json!({"executions": [{"code": "hi"}]});
    let answer = fixture.send(keyed(post("/v1/exec/batch", &batch), &second)).await;
    assert_eq!(answer.json()["results"][0]["stdout"], "hi");
    // What is configured is what a key has.
    let more: Vec<_> = (0..fit + 1).map(|_| run(&third, large.clone())).collect();
    alive(fit + fit + 1).await;
    hanging.iter().chain(&more).for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn health_tells_whoever_has_a_key_that_there_are_no_cgroups() {
    let (fixture, token, ..) = with_key(ServerConfig::default(), NewKey::default());
    let warnings = async |token: Option<&str>| {
        let request = Request::get("/v1/health").body(Body::empty()).unwrap();
        let request =
            token.map_or_else(|| Request::get("/v1/health").body(Body::empty()).unwrap(), |t| keyed(request, t));
        let body = fixture.send(request).await.json();
        assert_eq!(body["status"], "ok");
        body["warnings"].clone()
    };
    assert_eq!(warnings(Some(&token)).await, Value::Null);
    fixture.fake.cgroup_obstacle.set("not mounted".into()).unwrap();
    let told = warnings(Some(&token)).await;
    let text = told[0].as_str().unwrap();
    assert!(text.starts_with("sandboxes have no cgroup") && text.ends_with("(not mounted)"), "{text}");
    assert_eq!(warnings(None).await, Value::Null, "a stranger need not know");
}

#[tokio::test]
async fn a_request_with_two_hosts_is_refused() {
    let fixture = Fixture::open();
    for path in ["/v1/health", "/v1/exec", "/none"] {
        let request = Request::get(path).header("host", "localhost").header("host", "localhost");
        let answer = fixture.send(request.body(Body::empty()).unwrap()).await;
        assert_eq!((answer.status, answer.code().as_str()), (400, "invalid_request"), "{path}");
    }
}

#[tokio::test]
async fn a_batch_keeps_its_order_runs_in_parallel_and_fails_item_by_item() {
    let fixture = Fixture::open();
    let executions = json!([
        {"code": "sleep sleep one"}, {"code": "crash"}, {"code": "panic"}, {"code": "1", "language": "ruby"},
        {"code": "two", "language": "node"}, {"code": "sleep three exit=1"},
    ]);
    let answer = fixture.post("/v1/exec/batch", &json!({ "executions": executions })).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let body = answer.json();
    let results = body["results"].as_array().unwrap();
    let words: Vec<&str> =
        results.iter().map(|item| item["stdout"].as_str().or(item["code"].as_str()).unwrap_or("?")).collect();
    assert_eq!(words, ["one", "sandbox_failed", "internal", "unknown_language", "two", "three"]);
    assert_eq!(results[4]["language"], "node");
    assert!(fixture.fake.peak.load(Ordering::SeqCst) >= 2);
    assert_eq!(fixture.fake.alive.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_batch_is_bounded_in_items_parallelism_and_output() {
    let mut config = ServerConfig::default();
    config.limits.max_batch = 20;
    config.limits.batch_parallel = 3;
    config.limits.max_batch_output = 1000;
    let fixture = Fixture::new(config, None);
    let batch = |code: &str, count| json!({"executions": vec![json!({"code": code}); count]});
    let answer = fixture.post("/v1/exec/batch", &batch("hi", 21)).await;
    assert_eq!((answer.status, answer.code().as_str()), (400, "batch_too_large"));
    assert_eq!(fixture.post("/v1/exec/batch", &batch("sleep", 20)).await.status, 200);
    assert_eq!(fixture.fake.peak.load(Ordering::SeqCst), 3);
    let flooded = fixture.post("/v1/exec/batch", &batch("flood", 2)).await.json();
    assert_eq!(flooded["results"][1]["code"], "batch_output_limit");
    assert_eq!(fixture.fake.alive.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn what_is_held_for_callers_is_bounded() {
    let mut config = ServerConfig::default();
    config.limits.max_held = 1024 * 1024;
    let fixture = Fixture::new(config, None);
    // A body without room is refused before any code runs.
    let body = json!({"code": "hi", "stdin": "x".repeat(1024 * 1024)});
    for path in ["/v1/exec", "/v1/exec/batch"] {
        let answer = fixture.post(path, &body).await;
        assert_eq!((answer.status, answer.code().as_str(), answer.header("retry-after")), (503, "busy", "1"));
    }
    assert_eq!(fixture.fake.started.load(Ordering::SeqCst), 0);
    // Output without room ends its exec.
    let answer = fixture.run("flood").await;
    assert_eq!((answer.status, answer.code().as_str()), (500, "server_output_limit"));
    let batch = json!({"executions": [{"code": "hi"}, {"code": "flood"}, {"code": "hi"}]});
    let results = fixture.post("/v1/exec/batch", &batch).await.json()["results"].take();
    assert_eq!((&results[0]["stdout"], &results[1]["code"]), (&json!("hi"), &json!("server_output_limit")));
    assert_eq!(results[2]["stdout"], "hi");
    assert_eq!(fixture.fake.alive.load(Ordering::SeqCst), 0);
    // Nothing of it is left.
    assert_eq!(fixture.run("hi").await.status, 200);
    assert!(fixture.app.budget.is_empty());
}

#[tokio::test]
async fn one_key_cannot_take_the_room_of_the_others() {
    let mut config = ServerConfig::default();
    config.limits.max_held = 1024 * 1024;
    let (fixture, token, store, folder) = with_key(config, NewKey::default());
    let (other, _) = store.create(NewKey { name: "other".into(), ..NewKey::default() }).unwrap();
    fixture.app.gate.reload(&folder.path().join("keys.toml")).unwrap();
    let echo = |kib: usize| json!({"code": "hi", "stdin": "x".repeat(kib * 1024)});
    let put = json!({"code": "hi", "files": {"a": "x".repeat(250 * 1024)}});
    let run = |body: &Value, token: &str| fixture.send(keyed(post("/v1/exec", body), token));
    // In its answer the output is there twice: above half.
    assert_eq!(run(&echo(200), &token).await.code(), "server_output_limit");
    // An answer that is not taken.
    let untaken = fixture.router.clone().oneshot(keyed(post("/v1/exec", &echo(160)), &token)).await.unwrap();
    assert_eq!(untaken.status(), StatusCode::OK);
    assert_eq!(run(&put, &token).await.code(), "busy");
    assert_eq!(run(&put, &other).await.status, 200);
    drop(untaken);
    assert_eq!(run(&put, &token).await.status, 200);
}

#[tokio::test(start_paused = true)]
async fn a_batch_of_many_small_items_needs_room_only_for_those_that_run() {
    let mut config = ServerConfig::default();
    config.limits.max_held = 256 * 1024;
    config.limits.batch_parallel = 2;
    let fixture = Fixture::new(config, None);
    let batch = json!({"executions": vec![json!({"code": "hi"}); 20]});
    let results = fixture.post("/v1/exec/batch", &batch).await.json()["results"].take();
    assert!((0..20).all(|at| results[at]["stdout"] == "hi"), "{results}");
    assert!(fixture.app.budget.is_empty());
}

async fn wait_until(what: &str, done: impl Fn() -> bool) {
    for _ in 0..1000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not: {what}");
}

#[tokio::test]
async fn a_long_item_holds_up_no_other_of_its_batch() {
    let mut config = ServerConfig::default();
    config.limits.batch_parallel = 2;
    let fixture = Fixture::new(config, None);
    let batch = json!({"executions": [{"code": "hang"}, {"code": "1"}, {"code": "2"}, {"code": "3"}, {"code": "4"}]});
    let running = tokio::spawn(fixture.router.clone().oneshot(post("/v1/exec/batch", &batch)));
    wait_until("all have begun", || fixture.fake.started.load(Ordering::SeqCst) == 5).await;
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn a_batch_begins_no_item_after_its_time() {
    let mut config = ServerConfig::default();
    config.limits.batch_parallel = 1;
    config.limits.max_batch_time = Duration::from_millis(950);
    let fixture = Fixture::new(config, None);
    let batch = json!({"executions": vec![json!({"code": "sleep sleep hi"}); 8]});
    let results = fixture.post("/v1/exec/batch", &batch).await.json()["results"].take();
    let words: Vec<&str> =
        (0..8).map(|at| results[at]["stdout"].as_str().or(results[at]["code"].as_str()).unwrap()).collect();
    assert_eq!(words, ["hi", "hi", "hi", "hi", "hi", "busy", "busy", "busy"]);
}

#[tokio::test(start_paused = true)]
async fn a_batch_item_waits_no_longer_for_a_place_of_its_key_than_for_a_sandbox() {
    let (fixture, token, ..) = with_key(ServerConfig::default(), NewKey { concurrency: Some(1), ..NewKey::default() });
    let hang = tokio::spawn(fixture.router.clone().oneshot(keyed(post("/v1/exec", &json!({"code": "hang"})), &token)));
    wait_until("it hangs", || fixture.fake.alive.load(Ordering::SeqCst) == 1).await;
    let batch = json!({"executions": [{"code": "hi"}]});
    let answer = fixture.send(keyed(post("/v1/exec/batch", &batch), &token)).await;
    assert_eq!(answer.json()["results"][0]["code"], "concurrency_limited");
    hang.abort();
}

#[tokio::test]
async fn a_batch_above_the_burst_passes_from_a_full_bucket_and_is_paid_for_afterwards() {
    let (fixture, token, ..) = with_key(ServerConfig::default(), NewKey { rate: Some(5.0), ..NewKey::default() });
    let batch = json!({"executions": vec![json!({"code": "hi"}); 8]});
    assert_eq!(fixture.send(keyed(post("/v1/exec/batch", &batch), &token)).await.status, 200);
    let answer = fixture.send(keyed(post("/v1/exec", &json!({"code": "hi"})), &token)).await;
    assert_eq!((answer.status, answer.code().as_str()), (429, "rate_limited"));
}

#[tokio::test(start_paused = true)]
async fn a_batch_item_waits_for_a_place_and_then_says_busy() {
    let fixture = Fixture::open();
    let answer = fixture.post("/v1/exec/batch", &json!({"executions": [{"code": "busy"}]})).await;
    assert_eq!(answer.json()["results"][0]["code"], "busy");
}

#[tokio::test]
async fn health_is_ready_only_when_a_canary_passes() {
    let fixture =
        Fixture::new(ServerConfig { canary_interval: Duration::from_nanos(1), ..ServerConfig::default() }, None);
    for path in ["/v1/health", "/health"] {
        let answer = fixture.get(path).await;
        let body = answer.json();
        assert_eq!((answer.status, &body["status"]), (200, &json!("ok")), "{}", answer.text);
        let python = &body["templates"]["python"];
        assert_eq!(
            (&python["ready"], &python["numpy"], &python["isolation"]),
            (&json!(true), &json!(true), &json!("process"))
        );
        assert_eq!(python["memory_mb"], 2.0);
    }
    // The engine believes that all is well, but nothing runs.
    fixture.fake.broken.store(true, Ordering::SeqCst);
    let answer = fixture.get("/v1/health").await;
    assert_eq!((answer.status, &answer.json()["status"]), (503, &json!("unavailable")));
    assert_eq!(answer.json()["templates"]["python"]["ready"], false);
    let metrics = fixture.get("/v1/metrics").await.text;
    assert!(metrics.contains("zeroboot_template_canary_ok{template=\"python\"} 0\n"), "{metrics}");
    fixture.fake.broken.store(false, Ordering::SeqCst);
    assert_eq!(fixture.get("/v1/health").await.status, 200);
    // The zygotes are down: known without any canary.
    fixture.fake.ready.store(false, Ordering::SeqCst);
    let body = fixture.get("/v1/health").await.json();
    assert_eq!(body["reasons"][0], "template python: the zygote ended");
}

#[tokio::test]
async fn a_server_that_shuts_down_refuses_execs() {
    let fixture = Fixture::open();
    fixture.app.draining.store(true, Ordering::SeqCst);
    let answer = fixture.run("hi").await;
    assert_eq!((answer.status, answer.code().as_str(), answer.header("retry-after")), (503, "shutting_down", "1"));
    assert_eq!(fixture.get("/v1/health").await.json()["status"], "shutting_down");
}

#[tokio::test]
async fn a_web_page_cannot_use_a_server_without_keys() {
    let fixture = Fixture::open();
    let mut request = post("/v1/exec", &json!({"code": "hi"}));
    request.headers_mut().insert(header::ORIGIN, "http://evil.example".parse().unwrap());
    let answer = fixture.send(request).await;
    assert_eq!((answer.status, answer.code().as_str()), (403, "forbidden_origin"));
}

#[tokio::test]
async fn the_document_and_the_page_are_served() {
    let fixture = Fixture::open();
    assert_eq!(fixture.get("/openapi.json").await.json()["openapi"], "3.1.0");
    let page = fixture.get("/docs").await;
    assert_eq!((page.status, page.header("content-type")), (200, "text/html; charset=utf-8"));
    for elsewhere in ["http://", "https://", "src=", "@import", "<script"] {
        let outside = page.text.replace("http://127.0.0.1:8080", "");
        assert!(!outside.contains(elsewhere), "{elsewhere} in /docs");
    }
    for (code, ..) in crate::ERROR_CODES {
        assert!(page.text.contains(code), "/docs does not explain {code}");
    }
}

#[tokio::test]
async fn the_first_page_loads_nothing_from_elsewhere_and_can_be_switched_off() {
    let fixture = Fixture::open();
    let page = fixture.get("/").await;
    assert_eq!((page.status, page.header("content-type")), (200, "text/html; charset=utf-8"));
    let policy = page.header("content-security-policy").to_owned();
    for part in
        ["default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'", "form-action 'none'"]
    {
        assert!(policy.split("; ").any(|found| found.trim() == part), "no {part} in {policy}");
    }
    assert!(!policy.contains("unsafe") && !policy.contains("http"), "{policy}");
    let files: Vec<&str> = page.text.split('"').filter(|word| word.starts_with("/page/")).collect();
    assert!(files.len() >= 3, "{files:?}");
    let mut texts = vec![page.text.clone()];
    for file in
        ["/page/api.js", "/page/dom.js", "/page/live.js", "/page/output.js", "/page/snippets.js"].iter().chain(&files)
    {
        let answer = fixture.get(file).await;
        assert_eq!((answer.status, answer.header("x-content-type-options")), (200, "nosniff"), "{file}");
        assert_eq!(answer.header("content-security-policy"), policy, "{file}");
        texts.push(answer.text);
    }
    for text in texts {
        // The one name of a namespace is not an address that is asked.
        let text = text.replace("http://www.w3.org/2000/svg", "");
        for elsewhere in ["http://", "https://", "//cdn", "@import", " style=", "onclick", "innerHTML", "eval("] {
            assert!(!text.contains(elsewhere), "{elsewhere} in the page");
        }
    }
    assert_eq!(fixture.get("/page/nothing.js").await.status, 404);
    assert_eq!(fixture.get("/page/..%2Fapp.rs").await.status, 404);
    let config = ServerConfig { page: false, ..ServerConfig::default() };
    let fixture = Fixture::new(config, None);
    for path in ["/", "/page/main.js"] {
        let answer = fixture.get(path).await;
        assert_eq!((answer.status, answer.code().as_str()), (404, "not_found"), "{path}");
    }
}

fn events(text: &str) -> Vec<(String, Value)> {
    let blocks = text.split("\n\n").filter(|block| !block.is_empty() && !block.starts_with(':'));
    let read = |block: &str| {
        let (name, data) = block.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
        (name.to_owned(), serde_json::from_str(data).unwrap())
    };
    blocks.map(read).collect()
}

fn streamed(body: &Value) -> Request<Body> {
    let mut request = post("/v1/exec", body);
    request.headers_mut().insert(header::ACCEPT, "text/event-stream".parse().unwrap());
    request
}

#[tokio::test]
async fn a_stream_has_all_events_in_order() {
    let fixture = Fixture::open();
    let body = json!({"code": "a err=b binary exit=4", "output_files": ["f", "absent"]});
    let answer = fixture.send(streamed(&body)).await;
    assert_eq!((answer.status, answer.header("content-type")), (200, "text/event-stream"));
    let events = events(&answer.text);
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["start", "stdout", "stderr", "stdout", "file", "file", "end"]);
    assert_eq!(events[1].1, json!({"text": "a"}));
    assert_eq!(events[3].1, json!({"base64": "/wA="}));
    assert_eq!(events[4].1, json!({"path": "f", "text": "content"}));
    assert_eq!(events[5].1, json!({"path": "absent", "error": "no such file"}));
    assert_eq!((&events[6].1["exit_code"], &events[6].1["id"]), (&json!(4), &events[0].1["id"]));
    assert_eq!((&events[0].1["pooled"], &events[0].1["fork_time_ms"]), (&json!(true), &json!(0.3)));
    assert!(events[6].1.get("stdout").is_none());
}

#[tokio::test]
async fn a_stream_that_breaks_says_so() {
    let fixture = Fixture::open();
    for (code, word) in [("a crash", "sandbox_failed"), ("a panic", "internal")] {
        let answer = fixture.send(streamed(&json!({"code": code}))).await;
        let events = events(&answer.text);
        let (name, data) = events.last().unwrap();
        assert_eq!((name.as_str(), &data["code"]), ("error", &json!(word)));
        assert_eq!(data["request_id"], answer.header("x-request-id"));
    }
    // Before the first event it is an ordinary error.
    assert_eq!(fixture.send(streamed(&json!({"code": "busy"}))).await.status, 503);
    assert_eq!(fixture.fake.alive.load(Ordering::SeqCst), 0);
    assert!(fixture.get("/metrics").await.text.contains("\nzeroboot_concurrent_forks 0\n"));
}

async fn until_none_is_alive(fixture: &Fixture) {
    for _ in 0..1000 {
        if fixture.fake.alive.load(Ordering::SeqCst) == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("a sandbox is still alive");
}

#[tokio::test]
async fn a_stream_that_nobody_reads_any_more_ends_its_sandbox() {
    let fixture = Fixture::open();
    let response = fixture.router.clone().oneshot(streamed(&json!({"code": "a hang"}))).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(fixture.fake.alive.load(Ordering::SeqCst), 1);
    drop(response);
    until_none_is_alive(&fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_not_read_is_cut_and_its_sandbox_ended() {
    let fixture = Fixture::open();
    let mut request = streamed(&json!({"code": "flood"}));
    let peer = Peer::default();
    request.extensions_mut().insert(peer.clone());
    let response = fixture.router.clone().oneshot(request).await.unwrap();
    peer.cut.notified().await;
    until_none_is_alive(&fixture).await;
    drop(response);
}

#[tokio::test]
async fn a_stream_without_room_for_its_events_says_so() {
    let mut config = ServerConfig::default();
    config.limits.max_held = 300 * 1024;
    let fixture = Fixture::new(config, None);
    let response = fixture.router.clone().oneshot(streamed(&json!({"code": "flood"}))).await.unwrap();
    until_none_is_alive(&fixture).await;
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    let events = events(std::str::from_utf8(&bytes).unwrap());
    let (name, data) = events.last().unwrap();
    assert_eq!((name.as_str(), &data["code"]), ("error", &json!("server_output_limit")));
    drop(bytes);
    wait_until("given back", || fixture.app.budget.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_stream_whose_last_events_are_not_read_is_cut_too() {
    let fixture = Fixture::open();
    let app = fixture.app.clone();
    let watch = tokio::spawn(async move { app.budget.watch().await });
    let mut request = streamed(&json!({"code": "hi"}));
    let peer = Peer::default();
    request.extensions_mut().insert(peer.clone());
    let response = fixture.router.clone().oneshot(request).await.unwrap();
    until_none_is_alive(&fixture).await;
    assert!(!fixture.app.budget.is_empty());
    tokio::time::timeout(Duration::from_secs(60), peer.cut.notified()).await.unwrap();
    drop(response);
    wait_until("given back", || fixture.app.budget.is_empty()).await;
    watch.abort();
}

#[tokio::test(start_paused = true)]
async fn a_quiet_stream_is_kept_alive() {
    let fixture = Fixture::open();
    let response = fixture.router.clone().oneshot(streamed(&json!({"code": "hang"}))).await.unwrap();
    let mut body = response.into_body();
    let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert!(first.starts_with(b"event: start\n"));
    let begun = tokio::time::Instant::now();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), ": keep-alive\n\n");
    assert_eq!(begun.elapsed().as_secs(), 15);
}
