use super::*;

fn store(name: &str) -> (tempfile::TempDir, KeyStore) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    (folder, KeyStore::new(path))
}

fn named(name: &str) -> NewKey {
    NewKey { name: name.into(), ..NewKey::default() }
}

#[test]
fn a_made_key_is_found_and_a_revoked_one_is_not() {
    for file in ["keys.toml", "keys.json"] {
        let (_folder, store) = store(file);
        let (token, key) = store.create(named("ci")).unwrap();
        let (other, _) = store.create(named("laptop")).unwrap();
        assert!(token.starts_with(LIVE_PREFIX) && token.len() == LIVE_PREFIX.len() + 48);
        assert_ne!(token, other);

        let ring = KeyRing::load(&store.path).unwrap();
        assert!(matches!(ring.find(&token, now()), Lookup::Valid(found) if *found == key));
        assert_eq!(ring.find("zb_live_00", now()), Lookup::Unknown);
        assert_eq!(ring.find("", now()), Lookup::Unknown);

        store.revoke(&key.id).unwrap();
        let ring = KeyRing::load(&store.path).unwrap();
        assert_eq!(ring.find(&token, now()), Lookup::Unknown);
        assert!(matches!(ring.find(&other, now()), Lookup::Valid(_)));
        assert_eq!(store.list().unwrap().len(), 2);
        assert!(matches!(store.revoke("knobody"), Err(KeyFileError::UnknownKey(_))));
    }
}

#[test]
fn the_file_holds_no_token_and_is_private() {
    let (_folder, store) = store("keys.toml");
    let (token, _) = store.create(named("ci")).unwrap();
    let text = std::fs::read_to_string(&store.path).unwrap();
    assert!(!text.contains(&token[LIVE_PREFIX.len()..]));
    assert_eq!(store.path.metadata().unwrap().mode() & 0o777, 0o600);
    let ring = KeyRing::load(&store.path).unwrap();
    let shown = format!("{ring:?}");
    assert!(!shown.contains(&*blake3::hash(token.as_bytes()).to_hex()));
}

#[test]
fn an_expired_key_says_so() {
    let (_folder, store) = store("keys.toml");
    let past = Timestamp::from_second(1).unwrap();
    let (token, _) = store.create(NewKey { expires: Some(past), ..named("old") }).unwrap();
    let ring = KeyRing::load(&store.path).unwrap();
    assert_eq!(ring.find(&token, now()), Lookup::Expired);
    assert!(matches!(ring.find(&token, Timestamp::UNIX_EPOCH), Lookup::Valid(_)));
}

#[test]
fn the_originals_plain_array_is_understood_and_not_edited() {
    let (_folder, store) = store("keys.json");
    std::fs::write(&store.path, r#" ["zb_live_abc", "zb_demo_x"] "#).unwrap();
    let ring = KeyRing::load(&store.path).unwrap();
    assert!(ring.is_plain());
    assert!(matches!(ring.find("zb_live_abc", now()), Lookup::Valid(key) if !key.demo));
    assert!(matches!(ring.find("zb_demo_x", now()), Lookup::Valid(key) if key.demo));
    assert!(matches!(store.create(named("a")), Err(KeyFileError::Plain(_))));
}

#[test]
fn a_missing_or_malformed_file_is_an_error_that_does_not_quote_it() {
    let (_folder, store) = store("keys");
    assert!(matches!(KeyRing::load(&store.path), Err(KeyFileError::Read(..))));
    let good = blake3::hash(b"x").to_hex();
    let twice = format!(
        "version = 1\n{0}{0}",
        format_args!("[[key]]\nid='a'\nname='n'\ncreated='2026-01-01T00:00:00Z'\nhash='blake3:{good}'\n")
    );
    let bad = [
        r#"{"keys": ["zb_live_sekrit"]}"#,
        r#"["zb_live_sekrit""#,
        r#"["zb_live_sekrit", 3]"#,
        r#"[" zb_live_sekrit"]"#,
        "zb_live_sekrit",
        "key = 'zb_live_sekrit'",
        "",
        "version = 2",
        "version = 1\n[[key]]\nid='a'\nname='sekrit'\nhash='blake3:00'\ncreated='2026-01-01T00:00:00Z'",
        "version = 1\ncolour = 'sekrit'",
        &twice,
    ];
    for text in bad {
        std::fs::write(&store.path, text).unwrap();
        let error = KeyRing::load(&store.path).unwrap_err();
        assert!(matches!(error, KeyFileError::Malformed { .. }), "{text}: {error:?}");
        assert!(!format!("{error} {error:?}").contains("sekrit"), "{error}");
    }
    std::fs::write(&store.path, [0xff, 0xfe]).unwrap();
    assert!(KeyRing::load(&store.path).is_err());
}

#[test]
fn a_key_that_could_never_run_anything_is_not_made() {
    let (_folder, store) = store("keys.toml");
    assert!(store.create(named("")).is_err());
    assert!(store.create(named("a\nb")).is_err());
    assert!(store.create(NewKey { rate: Some(0.0), ..named("a") }).is_err());
    assert!(store.create(NewKey { rate: Some(f64::NAN), ..named("a") }).is_err());
    assert!(store.create(NewKey { concurrency: Some(0), ..named("a") }).is_err());
}

#[test]
fn editors_at_the_same_time_lose_no_key() {
    let (_folder, store) = store("keys.toml");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| store.create(named("a")).unwrap());
        }
    });
    assert_eq!(store.list().unwrap().len(), 8);
}
