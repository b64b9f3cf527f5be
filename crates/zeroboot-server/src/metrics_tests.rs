use std::time::Duration;

use super::*;

fn report(outcome: Outcome) -> Report {
    Report {
        lost: false,
        outcome,
        pooled: true,
        fork_time: Duration::from_micros(300),
        exec_time: Duration::from_millis(2),
        total_time: Duration::from_millis(3),
        cpu_time: Duration::ZERO,
        peak_memory: 0,
        hint: None,
    }
}

fn status() -> TemplateStatus {
    TemplateStatus {
        name: "python".into(),
        language: "python".into(),
        isolation: Isolation::Process,
        ready: true,
        reason: None,
        version: "Python 3".into(),
        warmed: vec![],
        skipped: vec![],
        memory: 1000,
        pool_ready: 3,
        pool_target: 4,
        forks: 17,
        restarts: 1,
    }
}

#[test]
fn the_originals_names_and_buckets_are_kept() {
    let metrics = Metrics::new();
    metrics.finished("python", Isolation::Process, &report(Outcome::Exited { code: 0 }));
    metrics.finished("python", Isolation::Process, &report(Outcome::Exited { code: 1 }));
    metrics.finished("python", Isolation::Process, &report(Outcome::DeadlinePassed));
    metrics.failed("busy");
    let _entered = metrics.enter();
    for format in [Format::OpenMetrics, Format::Text] {
        let text = metrics.encode(&[(status(), true)], &[], EngineStats::default(), format);
        for line in [
            "zeroboot_total_executions{status=\"success\"} 1",
            "zeroboot_total_executions{status=\"error\"} 2",
            "zeroboot_total_executions{status=\"timeout\"} 1",
            "zeroboot_concurrent_forks 1",
            "zeroboot_fork_time_microseconds_total 900",
            "zeroboot_exec_time_microseconds_total 6000",
            "zeroboot_fork_time_milliseconds_bucket{le=\"0.25\"} 0",
            "zeroboot_fork_time_milliseconds_bucket{le=\"0.5\"} 3",
            "zeroboot_exec_time_milliseconds_bucket{le=\"1000.0\"} 3",
            "zeroboot_total_time_milliseconds_count 3",
            "zeroboot_pool_ready{template=\"python\"} 3",
            "zeroboot_pool_refills_total{template=\"python\"} 17",
            "zeroboot_template_canary_ok{template=\"python\"} 1",
            "zeroboot_exec_errors_total{code=\"busy\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
        }
        assert_eq!(text.ends_with("# EOF\n"), format == Format::OpenMetrics);
    }
}

#[test]
fn the_older_format_names_each_family_as_its_samples() {
    let metrics = Metrics::new();
    metrics.failed("busy");
    let text = metrics.encode(&[], &[], EngineStats::default(), Format::Text);
    assert!(text.contains("# TYPE zeroboot_exec_errors_total counter\n"), "{text}");
    assert!(text.contains("# TYPE zeroboot_total_executions untyped\n"), "{text}");
}

#[test]
fn a_panic_lowers_the_gauge_again() {
    let metrics = Metrics::new();
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _entered = metrics.enter();
        panic!("on purpose");
    }));
    assert!(caught.is_err());
    let text = metrics.encode(&[], &[], EngineStats::default(), Format::Text);
    assert!(text.contains("\nzeroboot_concurrent_forks 0\n"));
}

#[test]
fn the_dashboard_asks_only_for_metrics_that_exist() {
    let metrics = Metrics::new();
    // Families without a series are not shown: make one of each.
    metrics.finished("python", Isolation::Process, &report(Outcome::Exited { code: 0 }));
    metrics.failed("busy");
    metrics.answered("/v1/exec", 200, Duration::ZERO);
    metrics.sandbox_made("python", Isolation::Process);
    metrics.sandbox_ended("python", Isolation::Process, EndReason::Idle, Duration::from_secs(1));
    let text = metrics.encode(&[(status(), true)], &[], EngineStats::default(), Format::Text);
    let words = |text: &str| -> HashSet<String> {
        let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
        text.split(word).filter(|word| word.starts_with("zeroboot_")).map(str::to_owned).collect()
    };
    let known = words(&text);
    let dashboard: serde_json::Value =
        serde_json::from_str(include_str!("../../../deploy/grafana/zeroboot.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let queries: Vec<_> = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap()).collect();
    let asked: HashSet<String> = queries.iter().flat_map(|target| words(target["expr"].as_str().unwrap())).collect();
    let unknown: Vec<_> = asked.difference(&known).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
    assert!(asked.len() > 15, "{asked:?}");
    // The same for the alerts that docs/deployment.md tells to make.
    let alerts = words(include_str!("../../../docs/deployment.md"));
    let unknown: Vec<_> = alerts.difference(&known).collect();
    assert!(unknown.is_empty(), "{unknown:?}");

    // Labels: what is summed by, and what stands in a legend. Prometheus adds `instance` itself.
    let mut labels = HashSet::new();
    for target in queries {
        let (expr, legend) = (target["expr"].as_str().unwrap(), target["legendFormat"].as_str().unwrap());
        for list in expr.split(" by (").skip(1) {
            labels.extend(list.split(')').next().unwrap().split(", "));
        }
        labels.extend(legend.split("{{").skip(1).map(|rest| rest.split("}}").next().unwrap()));
    }
    assert!(labels.remove("instance") && labels.len() > 4, "{labels:?}");
    for label in labels {
        assert!(text.contains(&format!("{label}=\"")), "no metric has the label {label}");
    }
}

#[test]
fn every_name_is_documented_and_every_documented_name_exists() {
    let metrics = Metrics::new();
    metrics.finished("python", Isolation::Process, &report(Outcome::Exited { code: 0 }));
    metrics.failed("busy");
    metrics.answered("/v1/exec", 200, Duration::ZERO);
    metrics.sandbox_made("python", Isolation::Process);
    metrics.sandbox_ended("python", Isolation::Process, EndReason::Idle, Duration::from_secs(1));
    let text = metrics.encode(&[(status(), true)], &[], EngineStats::default(), Format::Text);
    let reference = include_str!("../../../docs/api.md");
    let families = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    for family in families.clone() {
        assert!(reference.contains(&format!("`{family}`")), "docs/api.md does not name {family}");
    }
    let families: Vec<&str> = families.collect();
    let named = reference
        .split('`')
        .filter(|word| word.starts_with("zeroboot_") && word.chars().all(|c| c.is_ascii_lowercase() || c == '_'));
    for name in named {
        assert!(families.contains(&name), "docs/api.md names {name}, which does not exist");
    }
}
