//! Distributions and the host's facts.

use std::{fmt, fs, time::Duration};

use serde::Serialize;

/// A distribution of times, milliseconds.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) n: usize,
    pub(crate) p50: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
    pub(crate) worst: f64,
}

impl Summary {
    pub(crate) fn of(mut times: Vec<Duration>) -> Summary {
        times.sort();
        let at = |quantile: f64| {
            let index = (times.len() as f64 * quantile).ceil() as usize;
            times.get(index.saturating_sub(1)).map_or(f64::NAN, |t| t.as_secs_f64() * 1e3)
        };
        Summary { n: times.len(), p50: at(0.5), p95: at(0.95), p99: at(0.99), worst: at(1.0) }
    }
}

/// What the numbers were measured on.
#[derive(Debug, Serialize)]
pub(crate) struct HostFacts {
    cpu: String,
    cpus: usize,
    memory_gib: u64,
    kernel: String,
    hypervisor: bool,
    load: String,
}

impl HostFacts {
    pub(crate) fn read() -> HostFacts {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            cpuinfo
                .lines()
                .find(|l| l.starts_with(name))
                .and_then(|l| l.split(": ").nth(1))
                .unwrap_or("unknown")
                .to_owned()
        };
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib: u64 = meminfo.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
        HostFacts {
            cpu: field("model name"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_gib: kib.div_ceil(1 << 20),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            hypervisor: field("flags").split_whitespace().any(|flag| flag == "hypervisor"),
            load: fs::read_to_string("/proc/loadavg").unwrap_or_default().split(' ').next().unwrap_or("").to_owned(),
        }
    }
}

impl fmt::Display for HostFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} · {} CPUs · {} GiB · Linux {}{} · load {}",
            self.cpu,
            self.cpus,
            self.memory_gib,
            self.kernel,
            if self.hypervisor { " · itself a virtual machine" } else { "" },
            self.load
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_sorted_times() {
        let summary = Summary::of((1..=100).rev().map(Duration::from_millis).collect());
        assert_eq!((summary.n, summary.p50, summary.p95, summary.p99, summary.worst), (100, 50.0, 95.0, 99.0, 100.0));
    }
}
