//! Policies and the threat model say why and what shows it.

use std::{fs, path::Path};

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

#[test]
fn every_rule_of_every_policy_has_a_reason() {
    let mut rules = 0;
    for entry in fs::read_dir(repository().join("policy")).unwrap() {
        let path = entry.unwrap().path();
        let policy: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        for (name, filter) in policy.as_object().unwrap() {
            for rule in filter["filter"].as_array().unwrap() {
                let reason = rule["comment"].as_str().unwrap_or_default();
                assert!(reason.len() > 5, "{}: {name}: {rule}", path.display());
                rules += 1;
            }
        }
    }
    assert!(rules > 100, "{rules}");
}

#[test]
fn a_worker_that_restores_may_do_what_a_worker_may_and_restore() {
    let rules = |name: &str| -> Vec<serde_json::Value> {
        let policy: serde_json::Value =
            serde_json::from_slice(&fs::read(repository().join("policy").join(name)).unwrap()).unwrap();
        let filter = policy.as_object().unwrap().values().next().unwrap();
        assert_eq!(filter["mismatch_action"], "kill_process");
        filter["filter"].as_array().unwrap().clone()
    };
    let (worker, restoring) = (rules("vm-worker.json"), rules("vm-restore.json"));
    assert!(worker.iter().all(|rule| restoring.contains(rule)), "its own filter is applied on top");
    for rule in restoring.iter().filter(|rule| !worker.contains(rule)) {
        let comment = rule["comment"].as_str().unwrap();
        let known = comment.starts_with("KVM_SET_") || comment.contains("the worker's own filter");
        assert!(known, "{rule}");
    }
}

#[test]
fn every_test_that_the_threat_model_names_exists() {
    let model = fs::read_to_string(repository().join("docs/threat-model.md")).unwrap();
    let mut sources = String::new();
    let mut waiting = vec![repository().join("crates")];
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            waiting.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push_str(&fs::read_to_string(path).unwrap());
        }
    }
    // A name of a test is a sentence: more words than that of anything else in backquotes.
    let named =
        model.split('`').skip(1).step_by(2).filter(|name| name.matches('_').count() >= 3 && !name.contains(' '));
    let named: Vec<&str> = named.collect();
    assert!(named.len() > 30, "{named:?}");
    for name in named {
        assert!(sources.contains(&format!("fn {}", name.trim_end_matches('*'))), "no test {name}");
    }
}
