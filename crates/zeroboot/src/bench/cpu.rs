//! CPU time of an exec: of all processes together, by the kernel's accounts, and of a bare fork beside it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use zeroboot_engine::{Engine, TemplateConfig, ZygoteSpec};

use super::{Results, checked, exec::wait_for_pool, start};
use crate::cli::BenchArgs;

const PRINT: &str = "print(1)";
/// Execs between two samples of the CPU account. A teardown that one sample misses is in the next one.
const BATCH: u32 = 5;

/// CPU time of this process and of all below it.
struct Account {
    file: PathBuf,
    kind: Kind,
}

enum Kind {
    /// cgroup v1: a group of our own, the one that we came from, nanoseconds.
    Group { own: PathBuf, before: PathBuf },
    /// `/proc/stat`: all that runs on the machine, ticks.
    Machine,
}

impl Account {
    fn open() -> Account {
        Account::group().unwrap_or(Account { file: "/proc/stat".into(), kind: Kind::Machine })
    }

    fn group() -> Option<Account> {
        let root = ["/sys/fs/cgroup/cpuacct", "/sys/fs/cgroup/cpu,cpuacct"].map(Path::new);
        let root = root.into_iter().find(|path| path.join("cpuacct.usage").exists())?;
        let text = fs::read_to_string("/proc/self/cgroup").ok()?;
        let path = text.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            controllers.split(',').any(|name| name == "cpuacct").then_some(path)
        })?;
        let before = root.join(path.trim_start_matches('/'));
        let own = before.join(format!("zeroboot-bench-{}", std::process::id()));
        fs::create_dir(&own).ok()?;
        let account = Account { file: own.join("cpuacct.usage"), kind: Kind::Group { own: own.clone(), before } };
        // Processes that are started from now on are in it, too.
        fs::write(own.join("cgroup.procs"), "0").ok()?;
        Some(account)
    }

    fn whose(&self) -> &'static str {
        match self.kind {
            Kind::Group { .. } => "all processes",
            Kind::Machine => "the whole machine",
        }
    }

    fn now(&self) -> anyhow::Result<Duration> {
        let text = fs::read_to_string(&self.file).with_context(|| format!("read {}", self.file.display()))?;
        match self.kind {
            Kind::Group { .. } => Ok(Duration::from_nanos(text.trim().parse()?)),
            Kind::Machine => Ok(busy(&text)),
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if let Kind::Group { own, before } = &self.kind {
            // A group that cannot be left is still measured right; one that stays is empty and harms nobody.
            let _moved = fs::write(before.join("cgroup.procs"), "0");
            // Zygotes that were told to end may still be in it.
            for _ in 0..100 {
                if fs::remove_dir(own).is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// CPU time of all that runs on the machine, out of `/proc/stat`.
fn busy(stat: &str) -> Duration {
    // user, nice, system, idle, iowait, irq, softirq (proc_stat(5)).
    let line = stat.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
    let busy: u64 = [0, 1, 2, 5, 6].iter().filter_map(|&i| ticks.get(i)).sum();
    of_ticks(busy)
}

fn of_ticks(ticks: u64) -> Duration {
    Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// The name of a process and its CPU time, out of its `stat`.
pub(super) fn of_a_process(stat: &str) -> Option<(&str, Duration)> {
    // pid (name) state … utime stime: fields 14 and 15 (proc_pid_stat(5)). A name may hold brackets.
    let (head, rest) = stat.rsplit_once(')')?;
    let (_, name) = head.split_once('(')?;
    let mut ticks = rest.split_whitespace().skip(11).map_while(|word| word.parse::<u64>().ok());
    Some((name, of_ticks(ticks.next()? + ticks.next()?)))
}

/// CPU time of the whole machine since its start.
pub(super) fn of_the_machine() -> anyhow::Result<Duration> {
    Ok(busy(&fs::read_to_string("/proc/stat").context("read /proc/stat")?))
}

/// CPU time of one exec, pooled and not, and of a fork of the same warm interpreter without any isolation: the floor.
pub(crate) async fn of_an_exec(
    args: &BenchArgs,
    template: &TemplateConfig,
    results: &mut Results,
) -> anyhow::Result<()> {
    let account = Account::open();
    let unpooled = start(template, 0, 4).await?;
    let pooled = start(template, 4, 4).await?;
    // The memory of a template is an image from its second fork on.
    for engine in [&unpooled, &pooled, &unpooled, &pooled] {
        checked(engine, PRINT, b"1\n").await?;
    }
    let (mut alone, mut from_pool) = (Vec::new(), Vec::new());
    for _ in 0..args.repeat.div_ceil(BATCH) {
        alone.push(batch(&account, &unpooled).await?);
        from_pool.push(batch(&account, &pooled).await?);
    }
    unpooled.shutdown(Duration::from_secs(5)).await;
    pooled.shutdown(Duration::from_secs(5)).await;
    let whose = account.whose();
    let cost = results.row(format!("print(1): CPU of {whose}, forked on the spot"), alone);
    results.row(format!("print(1): CPU of {whose}, from a pool and its refill"), from_pool);
    if let ZygoteSpec::Process { interpreter, warm, .. } = &template.spec {
        let floor = bare_fork(interpreter, &warm.join(","), args.repeat)?;
        results.figure("print(1): CPU of a bare os.fork() of the same interpreter", floor.as_secs_f64() * 1e3, "ms");
        results.figure("an exec / a bare fork, CPU", cost / (floor.as_secs_f64() * 1e3), "times");
    }
    Ok(())
}

/// CPU time of each of [`BATCH`] execs, ends included.
async fn batch(account: &Account, engine: &Engine) -> anyhow::Result<Duration> {
    wait_for_pool(engine).await;
    let before = account.now()?;
    for _ in 0..BATCH {
        checked(engine, PRINT, b"1\n").await?;
    }
    while engine.stats().live > 0 {
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    wait_for_pool(engine).await;
    Ok((account.now()?.saturating_sub(before)) / BATCH)
}

/// Forks a warm interpreter; each child prints, and its output is checked.
const BARE: &str = "
import gc, importlib, os, resource, sys
for name in filter(None, sys.argv[1].split(',')):
    try:
        importlib.import_module(name.rstrip('?'))
    except ImportError:
        if not name.endswith('?'): raise
def spent():
    own, theirs = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + theirs.ru_utime + theirs.ru_stime
gc.collect(); gc.freeze()
count = int(sys.argv[2])
before = spent()
for _ in range(count):
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(w, 1)
        exec(compile('print(1)', '<string>', 'exec'), {'__name__': '__main__'})
        sys.stdout.flush()
        os._exit(0)
    os.close(w)
    assert os.read(r, 100) == b'1\\n'
    os.close(r)
    os.waitpid(pid, 0)
print(int((spent() - before) / count * 1e9))
";

fn bare_fork(interpreter: &Path, warm: &str, count: u32) -> anyhow::Result<Duration> {
    let output = Command::new(interpreter)
        .args(["-E", "-s", "-c", BARE, warm, &count.to_string()])
        .envs(["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"].map(|name| (name, "1")))
        .stdin(Stdio::null())
        .output()
        .context("start a python3 that forks")?;
    ensure!(output.status.success(), "the bare fork failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(Duration::from_nanos(String::from_utf8_lossy(&output.stdout).trim().parse().context("its CPU time")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_account_counts_what_a_child_spends() {
        let account = Account::open();
        let before = account.now().unwrap();
        let code = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done";
        assert!(Command::new("sh").args(["-c", code]).status().unwrap().success());
        assert!(account.now().unwrap() - before >= Duration::from_millis(20));
    }

    #[test]
    fn a_process_may_have_any_name() {
        let of = |name: &str| format!("12 ({name}) S 1 12 12 0 -1 4194560 1 2 3 4 150 50 7 8 20 0 1 0 5");
        let tick = of_ticks(1);
        for name in ["init", "a b) (c", ")", "kworker/1:2H-kblockd"] {
            assert_eq!(of_a_process(&of(name)), Some((name, tick * 200)));
        }
        assert_eq!(of_a_process("12 (cut off) S 1"), None);
    }
}
