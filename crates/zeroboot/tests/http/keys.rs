use std::time::Duration;

use serde_json::json;
use zeroboot_server::{KeyStore, NewKey, ServerConfig};

use crate::fixture::{Setup, wait_for};

#[test]
fn keys_are_reloaded_without_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys.toml");
    let store = KeyStore::new(&path);
    let new = |name: &str| NewKey { name: name.into(), ..NewKey::default() };
    let (first, key) = store.create(new("first")).unwrap();
    let setup = Setup::default();
    let config = ServerConfig { keys_file: Some(path), reload_interval: Duration::from_millis(50), ..setup.config };
    let fixture = Setup { config, ..Setup::default() }.start();
    let status = |token: &str| {
        let header = format!("Authorization: Bearer {token}");
        fixture.post("/v1/exec", &json!({"code": "print(1)"}), &[&header]).status
    };
    assert_eq!(fixture.post("/v1/exec", &json!({"code": "print(1)"}), &[]).status, 401);
    assert_eq!(status(&first), 200);
    let (second, _) = store.create(new("second")).unwrap();
    wait_for("new key", Duration::from_secs(10), || status(&second) == 200);
    store.revoke(&key.id).unwrap();
    wait_for("revoked key", Duration::from_secs(10), || status(&first) == 401);
    assert_eq!(status(&second), 200);
}
