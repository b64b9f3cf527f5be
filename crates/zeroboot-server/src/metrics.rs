//! Prometheus metrics. The first group has the original's names and buckets; the rest is in seconds and bytes.
//!
//! Labels come from fixed lists: templates of the configuration, outcomes, error codes, routes. No caller can add one.

use std::{
    collections::HashSet,
    fmt::Write as _,
    sync::atomic::{AtomicI64, AtomicU64, Ordering},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, text::encode},
    metrics::{MetricType, TypedMetric, counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use zeroboot_engine::{EndReason, EngineStats, Isolation, Outcome, Report, Sandbox, TemplateStatus};

/// Names of the metrics, as they stand in the exposition.
pub mod names {
    /// Execs by `status`: `success` (exit code 0), `timeout`, `error` (everything else, our failures too). The original's.
    pub const TOTAL_EXECUTIONS: &str = "zeroboot_total_executions";
    /// Execs under way. The original's.
    pub const CONCURRENT_FORKS: &str = "zeroboot_concurrent_forks";
    /// Time spent forking, microseconds. The original's.
    pub const FORK_MICROSECONDS: &str = "zeroboot_fork_time_microseconds_total";
    /// Time spent running code, microseconds. The original's.
    pub const EXEC_MICROSECONDS: &str = "zeroboot_exec_time_microseconds_total";
    /// Resident memory of the server process and the zygotes, bytes. The original's.
    pub const MEMORY_USAGE: &str = "zeroboot_memory_usage_bytes";
    /// Histogram of fork times. The original's.
    pub const FORK_MILLISECONDS: &str = "zeroboot_fork_time_milliseconds";
    /// Histogram of run times. The original's.
    pub const EXEC_MILLISECONDS: &str = "zeroboot_exec_time_milliseconds";
    /// Histogram of total times. The original's.
    pub const TOTAL_MILLISECONDS: &str = "zeroboot_total_time_milliseconds";

    /// Execs that came to an outcome, by `isolation`, `template`, `outcome`.
    pub const EXECS: &str = "zeroboot_execs_total";
    /// Execs that came to none, by error `code`.
    pub const EXEC_ERRORS: &str = "zeroboot_exec_errors_total";
    /// Histogram: until a sandbox was ready, by `isolation`, `template`, `pooled`.
    pub const FORK_SECONDS: &str = "zeroboot_fork_seconds";
    /// Histogram: the run, by `isolation`, `template`, `outcome`.
    pub const EXEC_SECONDS: &str = "zeroboot_exec_seconds";
    /// Histogram: everything inside the engine, by `isolation`, `template`, `outcome`.
    pub const TOTAL_SECONDS: &str = "zeroboot_total_seconds";
    /// HTTP answers, by `route`, `status`.
    pub const HTTP_REQUESTS: &str = "zeroboot_http_requests_total";
    /// Histogram: from a request's head until its answer's head, by `route`.
    pub const HTTP_SECONDS: &str = "zeroboot_http_request_seconds";
    /// Open connections.
    pub const CONNECTIONS: &str = "zeroboot_http_connections";
    /// Sandboxes that serve a request.
    pub const LIVE_SANDBOXES: &str = "zeroboot_live_sandboxes";
    /// Memory promised to them.
    pub const PROMISED_MEMORY: &str = "zeroboot_promised_memory_bytes";
    /// Requests refused because every sandbox was in use.
    pub const ADMISSIONS_REFUSED: &str = "zeroboot_admissions_refused_total";
    /// Long-lived sandboxes, by `isolation`, `template`.
    pub const SANDBOXES: &str = "zeroboot_sandboxes";
    /// Runs in them that have not ended, by `isolation`, `template`.
    pub const SANDBOX_RUNS: &str = "zeroboot_sandbox_runs";
    /// Runs and operations on files and contexts that are under way in them, by `isolation`, `template`.
    pub const SANDBOX_CHANNELS: &str = "zeroboot_sandbox_channels";
    /// Memory promised to them.
    pub const SANDBOX_MEMORY: &str = "zeroboot_sandbox_promised_memory_bytes";
    /// Checkpoints of them that are kept.
    pub const CHECKPOINTS: &str = "zeroboot_checkpoints";
    /// Memory that those add to what their sandboxes were forked from.
    pub const CHECKPOINT_MEMORY: &str = "zeroboot_checkpoint_memory_bytes";
    /// Long-lived sandboxes made, by `isolation`, `template`.
    pub const SANDBOXES_MADE: &str = "zeroboot_sandboxes_made_total";
    /// Long-lived sandboxes that ended, by `isolation`, `template`, `reason`.
    pub const SANDBOXES_ENDED: &str = "zeroboot_sandboxes_ended_total";
    /// Histogram: lifetime of long-lived sandboxes, by `isolation`, `template`, `reason`.
    pub const SANDBOX_LIFETIME: &str = "zeroboot_sandbox_lifetime_seconds";
    /// 1 if the template's zygote is up, by `template`.
    pub const TEMPLATE_READY: &str = "zeroboot_template_ready";
    /// 1 if the template's last canary passed, by `template`.
    pub const TEMPLATE_CANARY: &str = "zeroboot_template_canary_ok";
    /// Resident memory of the zygote, by `template`.
    pub const TEMPLATE_MEMORY: &str = "zeroboot_template_memory_bytes";
    /// Sandboxes waiting, by `template`.
    pub const POOL_READY: &str = "zeroboot_pool_ready";
    /// Sandboxes that should wait, by `template`.
    pub const POOL_TARGET: &str = "zeroboot_pool_target";
    /// Sandboxes forked, to refill the pool or on the spot, by `template`.
    pub const POOL_REFILLS: &str = "zeroboot_pool_refills_total";
    /// Times the zygote was restarted, by `template`.
    pub const ZYGOTE_RESTARTS: &str = "zeroboot_zygote_restarts_total";
    /// Key files or certificates that could not be read again; the last good ones stay in use.
    pub const RELOAD_FAILURES: &str = "zeroboot_reload_failures_total";
}

/// The original's buckets, milliseconds.
const MILLISECONDS: [f64; 13] = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0];
/// From 50 microseconds (a pool checkout) to five minutes (the longest timeout).
const SECONDS: [f64; 20] = [
    50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    100.0, 300.0,
];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Status {
    status: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Code {
    code: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Ended {
    isolation: &'static str,
    template: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Forked {
    isolation: &'static str,
    template: String,
    pooled: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Template {
    template: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Lives {
    isolation: &'static str,
    template: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Lived {
    isolation: &'static str,
    template: String,
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Answered {
    route: &'static str,
    status: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Route {
    route: &'static str,
}

/// A counter whose name does not end in `_total`, as the original has one. OpenMetrics has no such thing, so its type
/// is "unknown".
#[derive(Clone, Debug, Default)]
struct BareCounter(std::sync::Arc<AtomicU64>);

impl TypedMetric for BareCounter {
    const TYPE: MetricType = MetricType::Unknown;
}

impl EncodeMetric for BareCounter {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.encode_gauge(&i64::try_from(self.0.load(Ordering::Relaxed)).unwrap_or(i64::MAX))
    }
    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

/// From a tenth of a second to a day.
const LIFETIMES: [f64; 12] = [0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 14_400.0, 43_200.0, 86_400.0];

fn lifetimes() -> Histogram {
    Histogram::new(LIFETIMES)
}

fn seconds() -> Histogram {
    Histogram::new(SECONDS)
}

type Seconds<L> = Family<L, Histogram, fn() -> Histogram>;
type PerTemplate<M> = Family<Template, M>;

#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    executions: Family<Status, BareCounter>,
    concurrent: Gauge,
    fork_microseconds: Counter,
    exec_microseconds: Counter,
    memory: Gauge,
    fork_milliseconds: Histogram,
    exec_milliseconds: Histogram,
    total_milliseconds: Histogram,
    execs: Family<Ended, Counter>,
    errors: Family<Code, Counter>,
    fork_seconds: Seconds<Forked>,
    exec_seconds: Seconds<Ended>,
    total_seconds: Seconds<Ended>,
    http: Family<Answered, Counter>,
    http_seconds: Seconds<Route>,
    connections: Gauge,
    live: Gauge,
    promised: Gauge,
    refused: Counter,
    ready: PerTemplate<Gauge>,
    canary: PerTemplate<Gauge>,
    template_memory: PerTemplate<Gauge>,
    pool_ready: PerTemplate<Gauge>,
    pool_target: PerTemplate<Gauge>,
    refills: PerTemplate<Counter>,
    restarts: PerTemplate<Counter>,
    sandboxes: Family<Lives, Gauge>,
    sandbox_runs: Family<Lives, Gauge>,
    sandbox_channels: Family<Lives, Gauge>,
    sandbox_memory: Gauge,
    checkpoints: Gauge,
    checkpoint_memory: Gauge,
    sandboxes_made: Family<Lives, Counter>,
    sandboxes_ended: Family<Lived, Counter>,
    sandbox_lifetime: Seconds<Lived>,
    pub(crate) reload_failures: Counter,
}

impl Metrics {
    pub(crate) fn new() -> Metrics {
        fn add<M: prometheus_client::registry::Metric + Clone>(
            registry: &mut Registry,
            name: &str,
            help: &str,
            metric: &M,
        ) {
            // The encoder itself puts `_total` after a counter's name and a dot after the text.
            registry.register(name.strip_suffix("_total").unwrap_or(name), help, metric.clone());
        }
        let metrics = Metrics {
            registry: Registry::default(),
            executions: Family::default(),
            concurrent: Gauge::default(),
            fork_microseconds: Counter::default(),
            exec_microseconds: Counter::default(),
            memory: Gauge::default(),
            fork_milliseconds: Histogram::new(MILLISECONDS),
            exec_milliseconds: Histogram::new(MILLISECONDS),
            total_milliseconds: Histogram::new(MILLISECONDS),
            execs: Family::default(),
            errors: Family::default(),
            fork_seconds: Seconds::new_with_constructor(seconds),
            exec_seconds: Seconds::new_with_constructor(seconds),
            total_seconds: Seconds::new_with_constructor(seconds),
            http: Family::default(),
            http_seconds: Seconds::new_with_constructor(seconds),
            connections: Gauge::default(),
            live: Gauge::default(),
            promised: Gauge::default(),
            refused: Counter::default(),
            ready: Family::default(),
            canary: Family::default(),
            template_memory: Family::default(),
            pool_ready: Family::default(),
            pool_target: Family::default(),
            refills: Family::default(),
            restarts: Family::default(),
            sandboxes: Family::default(),
            sandbox_runs: Family::default(),
            sandbox_channels: Family::default(),
            sandbox_memory: Gauge::default(),
            checkpoints: Gauge::default(),
            checkpoint_memory: Gauge::default(),
            sandboxes_made: Family::default(),
            sandboxes_ended: Family::default(),
            sandbox_lifetime: Seconds::new_with_constructor(lifetimes),
            reload_failures: Counter::default(),
        };
        let mut registry = Registry::default();
        let r = &mut registry;
        add(r, names::TOTAL_EXECUTIONS, "Execs by status", &metrics.executions);
        add(r, names::CONCURRENT_FORKS, "Execs under way", &metrics.concurrent);
        add(r, names::FORK_MICROSECONDS, "Time spent forking in microseconds", &metrics.fork_microseconds);
        add(r, names::EXEC_MICROSECONDS, "Time spent running code in microseconds", &metrics.exec_microseconds);
        add(r, names::MEMORY_USAGE, "Resident memory of the server and its zygotes in bytes", &metrics.memory);
        add(r, names::FORK_MILLISECONDS, "Fork time in milliseconds", &metrics.fork_milliseconds);
        add(r, names::EXEC_MILLISECONDS, "Run time in milliseconds", &metrics.exec_milliseconds);
        add(r, names::TOTAL_MILLISECONDS, "Total time in milliseconds", &metrics.total_milliseconds);
        add(r, names::EXECS, "Execs that came to an outcome", &metrics.execs);
        add(r, names::EXEC_ERRORS, "Execs that came to no outcome, by error code", &metrics.errors);
        add(r, names::FORK_SECONDS, "Time until a sandbox was ready", &metrics.fork_seconds);
        add(r, names::EXEC_SECONDS, "Time of the run", &metrics.exec_seconds);
        add(r, names::TOTAL_SECONDS, "Time inside the engine", &metrics.total_seconds);
        add(r, names::HTTP_REQUESTS, "HTTP answers", &metrics.http);
        add(r, names::HTTP_SECONDS, "Time until an answer's head", &metrics.http_seconds);
        add(r, names::CONNECTIONS, "Open connections", &metrics.connections);
        add(r, names::LIVE_SANDBOXES, "Sandboxes that serve a request", &metrics.live);
        add(r, names::PROMISED_MEMORY, "Memory promised to live sandboxes", &metrics.promised);
        add(r, names::ADMISSIONS_REFUSED, "Requests refused as busy", &metrics.refused);
        add(r, names::TEMPLATE_READY, "1 if the zygote is up", &metrics.ready);
        add(r, names::TEMPLATE_CANARY, "1 if the last canary passed", &metrics.canary);
        add(r, names::TEMPLATE_MEMORY, "Resident memory of the zygote", &metrics.template_memory);
        add(r, names::POOL_READY, "Sandboxes waiting", &metrics.pool_ready);
        add(r, names::POOL_TARGET, "Sandboxes that should wait", &metrics.pool_target);
        add(r, names::POOL_REFILLS, "Sandboxes forked", &metrics.refills);
        add(r, names::ZYGOTE_RESTARTS, "Restarts of the zygote", &metrics.restarts);
        add(r, names::SANDBOXES, "Long-lived sandboxes", &metrics.sandboxes);
        add(r, names::SANDBOX_RUNS, "Runs in them that have not ended", &metrics.sandbox_runs);
        add(r, names::SANDBOX_CHANNELS, "Runs and operations under way in them", &metrics.sandbox_channels);
        add(r, names::SANDBOX_MEMORY, "Memory promised to long-lived sandboxes", &metrics.sandbox_memory);
        add(r, names::CHECKPOINTS, "Checkpoints that are kept", &metrics.checkpoints);
        add(r, names::CHECKPOINT_MEMORY, "Memory of those", &metrics.checkpoint_memory);
        add(r, names::SANDBOXES_MADE, "Sandboxes made to live", &metrics.sandboxes_made);
        add(r, names::SANDBOXES_ENDED, "Long-lived sandboxes that ended", &metrics.sandboxes_ended);
        add(r, names::SANDBOX_LIFETIME, "How long they lived", &metrics.sandbox_lifetime);
        add(r, names::RELOAD_FAILURES, "Failed reloads of keys or certificates", &metrics.reload_failures);
        // A series that is there from the start makes a rate right from its first event on.
        for status in ["success", "error", "timeout"] {
            drop(metrics.executions.get_or_create(&Status { status }));
        }
        Metrics { registry, ..metrics }
    }

    /// Counts an exec as under way until the guard is dropped, by a panic too.
    pub(crate) fn enter(&self) -> Entered {
        Entered::new(&self.concurrent)
    }

    /// Execs that are under way.
    pub(crate) fn under_way(&self) -> i64 {
        self.concurrent.get()
    }

    pub(crate) fn connection(&self) -> Entered {
        Entered::new(&self.connections)
    }

    pub(crate) fn finished(&self, template: &str, isolation: Isolation, report: &Report) {
        let status = match report.outcome {
            Outcome::Exited { code: 0 } => "success",
            Outcome::DeadlinePassed => "timeout",
            _ => "error",
        };
        self.executions.get_or_create(&Status { status }).0.fetch_add(1, Ordering::Relaxed);
        let micros = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.fork_microseconds.inc_by(micros(report.fork_time));
        self.exec_microseconds.inc_by(micros(report.exec_time));
        self.fork_milliseconds.observe(report.fork_time.as_secs_f64() * 1e3);
        self.exec_milliseconds.observe(report.exec_time.as_secs_f64() * 1e3);
        self.total_milliseconds.observe(report.total_time.as_secs_f64() * 1e3);

        let isolation = isolation.as_str();
        let pooled = if report.pooled { "true" } else { "false" };
        let forked = Forked { isolation, template: template.into(), pooled };
        self.fork_seconds.get_or_create(&forked).observe(report.fork_time.as_secs_f64());
        let ended = Ended { isolation, template: template.into(), outcome: report.outcome.as_str() };
        self.execs.get_or_create(&ended).inc();
        self.exec_seconds.get_or_create(&ended).observe(report.exec_time.as_secs_f64());
        self.total_seconds.get_or_create(&ended).observe(report.total_time.as_secs_f64());
    }

    /// A sandbox begins to live.
    pub(crate) fn sandbox_made(&self, template: &str, isolation: Isolation) {
        let lives = Lives { isolation: isolation.as_str(), template: template.into() };
        self.sandboxes_made.get_or_create(&lives).inc();
    }

    /// A sandbox that lived has ended.
    pub(crate) fn sandbox_ended(
        &self,
        template: &str,
        isolation: Isolation,
        reason: EndReason,
        lived: std::time::Duration,
    ) {
        let labels = Lived { isolation: isolation.as_str(), template: template.into(), reason: reason.as_str() };
        self.sandboxes_ended.get_or_create(&labels).inc();
        self.sandbox_lifetime.get_or_create(&labels).observe(lived.as_secs_f64());
    }

    /// What lives now, of every template.
    fn look_at_sandboxes(&self, templates: &[(TemplateStatus, bool)], sandboxes: &[Sandbox]) {
        for (status, _) in templates {
            let own = || sandboxes.iter().filter(|sandbox| sandbox.template() == status.name);
            let labels = Lives { isolation: status.isolation.as_str(), template: status.name.clone() };
            let count = |family: &Family<Lives, Gauge>, value: usize| {
                family.get_or_create(&labels).set(i64::try_from(value).unwrap_or(i64::MAX));
            };
            count(&self.sandboxes, own().count());
            count(&self.sandbox_runs, own().map(|sandbox| sandbox.activity().runs).sum());
            count(&self.sandbox_channels, own().map(|sandbox| sandbox.activity().channels).sum());
        }
    }

    /// An exec that reached the engine and came to no outcome.
    pub(crate) fn failed(&self, code: &'static str) {
        self.executions.get_or_create(&Status { status: "error" }).0.fetch_add(1, Ordering::Relaxed);
        self.errors.get_or_create(&Code { code }).inc();
    }

    pub(crate) fn answered(&self, route: &'static str, status: u16, time: std::time::Duration) {
        self.http.get_or_create(&Answered { route, status }).inc();
        self.http_seconds.get_or_create(&Route { route }).observe(time.as_secs_f64());
    }

    /// The exposition, after what the engine counts has been taken over.
    pub(crate) fn encode(
        &self,
        templates: &[(TemplateStatus, bool)],
        sandboxes: &[Sandbox],
        stats: EngineStats,
        format: Format,
    ) -> String {
        self.look_at_sandboxes(templates, sandboxes);
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let set = |family: &PerTemplate<Gauge<i64, AtomicI64>>, template: &str, value: u64| {
            family.get_or_create(&Template { template: template.into() }).set(number(value));
        };
        let store = |family: &PerTemplate<Counter>, template: &str, value: u64| {
            let counter = family.get_or_create(&Template { template: template.into() });
            counter.inner().store(value, Ordering::Relaxed);
        };
        for (status, canary) in templates {
            set(&self.ready, &status.name, u64::from(status.ready));
            set(&self.canary, &status.name, u64::from(*canary));
            set(&self.template_memory, &status.name, status.memory);
            set(&self.pool_ready, &status.name, status.pool_ready as u64);
            set(&self.pool_target, &status.name, status.pool_target as u64);
            store(&self.refills, &status.name, status.forks);
            store(&self.restarts, &status.name, status.restarts);
        }
        let zygotes: u64 = templates.iter().map(|(status, _)| status.memory).sum();
        self.memory.set(number(zygotes + own_memory()));
        self.live.set(number(stats.live as u64));
        self.promised.set(number(stats.promised_memory));
        self.sandbox_memory.set(number(stats.sandbox_memory));
        self.checkpoints.set(number(stats.checkpoints as u64));
        self.checkpoint_memory.set(number(stats.checkpoint_memory));
        self.refused.inner().store(stats.refused, Ordering::Relaxed);
        let mut text = String::with_capacity(16 * 1024);
        // Writing to a String cannot fail; an encoder that does leaves a text that no scraper takes for whole.
        if encode(&mut text, &self.registry).is_err() {
            text.clear();
        }
        match format {
            Format::OpenMetrics => text,
            Format::Text => classic(&text),
        }
    }
}

/// How the exposition is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    OpenMetrics,
    /// The older text format 0.0.4, for clients that do not ask for OpenMetrics.
    Text,
}

impl Format {
    pub(crate) fn content_type(self) -> &'static str {
        match self {
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Format::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// OpenMetrics as the older format: there `unknown` is `untyped`, a counter's family has its full name, and nothing
/// marks the end.
fn classic(text: &str) -> String {
    let family = |line: &'_ str| line.split(' ').nth(2).map(str::to_owned);
    let types = text.lines().filter(|line| line.starts_with("# TYPE") && line.ends_with(" counter"));
    let counters: HashSet<String> = types.filter_map(family).collect();
    let mut out = String::with_capacity(text.len());
    for line in text.lines().filter(|line| *line != "# EOF" && !line.starts_with("# UNIT")) {
        let mut words = line.splitn(4, ' ');
        let written = match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(kind), Some(name), Some(rest)) => {
                let total = if counters.contains(name) { "_total" } else { "" };
                let rest = if kind == "TYPE" && rest == "unknown" { "untyped" } else { rest };
                writeln!(out, "# {kind} {name}{total} {rest}")
            }
            _ => writeln!(out, "{line}"),
        };
        if written.is_err() {
            break; // Not for a String.
        }
    }
    out
}

/// Resident memory of this process, bytes; 0 if the kernel does not say.
fn own_memory() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// One more in a gauge, until it is dropped.
#[derive(Debug)]
pub(crate) struct Entered(Gauge);

impl Entered {
    fn new(gauge: &Gauge) -> Entered {
        gauge.inc();
        Entered(gauge.clone())
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
