//! Prints the fork path's figures for a stand-in guest: what `zeroboot bench fork --engine vm` shows.
#![allow(clippy::print_stdout)]
use std::time::Duration;
use zeroboot_sys::memory::MiB;
use zeroboot_vm::{Host, bench};

fn show(name: &str, mut times: Vec<Duration>) -> f64 {
    times.sort();
    let at = |q: f64| times[((times.len() - 1) as f64 * q) as usize].as_secs_f64() * 1e6;
    println!("{name:28} p50 {:9.1} p95 {:9.1} p99 {:9.1} worst {:9.1} us", at(0.5), at(0.95), at(0.99), at(1.0));
    at(0.5)
}
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let rounds = std::env::args().nth(1).map_or(Ok(200), |n| n.parse())?;
    let host = Host::open()?;
    let snapshot = bench::stand_in(&host, MiB(512), MiB(std::env::args().nth(2).map_or(Ok(128), |n| n.parse())?))?;
    let f = bench::forks(&host, &snapshot, &[0; 300], rounds)?;
    let ours = show("unpooled fork", f.unpooled);
    let bare = show("bare calls", f.bare);
    let pooled = show("pooled checkout to entry", f.pooled);
    show("first exit", f.first_exit);
    let theirs = show("prototype's order", f.prototype);
    show("teardown", f.teardown);
    show("prototype's teardown", f.prototype_teardown);
    println!("prototype/ours {:.1}, ours/bare {:.2}, pooled/ours {:.2}", theirs / ours, ours / bare, pooled / ours);
    for s in f.steps {
        show(&format!("  {}", s.name), s.times);
    }
    Ok(())
}
