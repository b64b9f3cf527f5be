//! Nothing that a caller sends is ever logged, at any level.

use std::{
    io,
    sync::{Arc, Mutex},
};

use serde_json::json;
use tracing_subscriber::{EnvFilter, fmt::MakeWriter};
use zeroboot_server::{KeyStore, NewKey};

use crate::fixture::{Setup, wait_for};

#[derive(Clone, Default)]
struct Captured(Arc<Mutex<Vec<u8>>>);

impl io::Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Captured {
    type Writer = Captured;
    fn make_writer(&'a self) -> Captured {
        self.clone()
    }
}

#[test]
fn code_output_environment_and_keys_are_never_logged() {
    // The whole test program logs into this: the other tests' requests hold no secret.
    let captured = Captured::default();
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(captured.clone())
        .with_env_filter(EnvFilter::new("trace"))
        .init();

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys.toml");
    let (token, key) = KeyStore::new(&path).create(NewKey { name: "n".into(), ..NewKey::default() }).unwrap();
    let mut setup = Setup::default();
    setup.config.keys_file = Some(path);
    let fixture = setup.start();
    let secret = "canary5ecret";
    let body = json!({
        "code": format!("import os, sys; print(os.environ['A'], '{secret}'); print('{secret}', file=sys.stderr)"),
        "env": {"A": secret}, "args": [secret], "stdin": secret, "files": {(secret): secret}, "output_files": [secret],
    });
    let header = format!("Authorization: Bearer {token}");
    let stream = ["Accept: text/event-stream", &header];
    for headers in [&[header.as_str()][..], &stream] {
        let answer = fixture.post("/v1/exec", &body, headers);
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(answer.text().contains(secret));
    }
    // What is refused is not logged either.
    let wrong = format!("Authorization: Bearer zb_live_{secret}");
    fixture.post("/v1/exec", &body, &[&wrong]);
    fixture.post("/v1/exec", &json!({"code": "1", "language": secret}), &[&header]);
    fixture.post("/v1/exec", &json!({"code": "1", "env": {(format!("{secret}=")): "x"}}), &[&header]);
    fixture.post("/v1/exec", &json!({ secret: secret }), &[&header]);
    fixture.post(&format!("/{secret}?code={secret}"), &body, &[&header, &format!("X-Header: {secret}")]);
    let seen = || String::from_utf8_lossy(&captured.0.lock().unwrap()).into_owned();
    wait_for("log", std::time::Duration::from_secs(10), || seen().contains("not_found"));
    let text = seen();
    let around =
        |word: &str| text.find(word).map(|at| text[at.saturating_sub(300)..].chars().take(600).collect::<String>());
    assert_eq!(around(secret), None);
    assert_eq!(around(&token["zb_live_".len()..]), None);
    // But who and what is: the request can be found.
    for word in [key.id.as_str(), "request_id", "http.exec", "exit_code=0", "status=401"] {
        assert!(text.contains(word), "{word} is not logged");
    }
}
