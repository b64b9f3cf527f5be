//! A cgroup v2 for each sandbox, where the host lets us have one: memory, processes, CPU.
//!
//! The front makes the group and hands its `cgroup.procs`, open for writing, to the zygote; the worker writes
//! itself into it before anything else. Where no group can be had, the agent's own limits stand alone.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::Limits;

/// Memory that the agent and the kernel need beside the code, bytes.
const OVERHEAD: u64 = 16 * 1024 * 1024;
/// Processes beside the code's: the agent.
const OWN_PROCESSES: u32 = 1;
/// Tries to remove a group that is busy, and the pause between two.
const REMOVALS: u32 = 100;
const BETWEEN_REMOVALS: Duration = Duration::from_millis(20);
const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];

/// Why no groups can be made on this host.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoCgroups {
    #[error("this host has no cgroup v2")]
    Absent,
    #[error("cgroup v2 is not mounted at /sys/fs/cgroup")]
    NotMounted,
    /// With each group that was tried.
    #[error("{}", reasons(.0))]
    Refused(Vec<(PathBuf, io::Error)>),
}

fn reasons(tried: &[(PathBuf, io::Error)]) -> String {
    let each: Vec<String> = tried.iter().map(|(base, error)| format!("{}: {error}", base.display())).collect();
    each.join("; ")
}

/// The right to make groups.
#[derive(Debug)]
pub(crate) struct Cgroups {
    parent: PathBuf,
}

impl Cgroups {
    /// Zeroboot's own parent group with all three controllers.
    pub(crate) fn claim() -> Result<Cgroups, NoCgroups> {
        let root = Path::new("/sys/fs/cgroup");
        let own = fs::read_to_string("/proc/self/cgroup")
            .ok()
            .and_then(|text| text.lines().find_map(|line| line.strip_prefix("0::").map(str::to_owned)))
            .ok_or(NoCgroups::Absent)?;
        if !root.join("cgroup.controllers").exists() {
            return Err(NoCgroups::NotMounted);
        }
        let own = root.join(own.trim_start_matches('/'));
        // A delegated group (systemd's Delegate=yes) first, the root (as root, in no service) second.
        let mut refused = Vec::new();
        for base in [own.as_path(), root] {
            sweep(base);
            match claim_below(base) {
                Ok(parent) => return Ok(Cgroups { parent }),
                Err(error) => refused.push((base.to_owned(), error)),
            }
        }
        Err(NoCgroups::Refused(refused))
    }

    /// A group for one sandbox and the descriptor through which a worker enters it.
    pub(crate) fn make(&self, id: u64) -> io::Result<(Cgroup, OwnedFd)> {
        let path = self.parent.join(format!("sandbox-{id}"));
        fs::create_dir(&path)?;
        let group = Cgroup { path };
        group.limit(&Limits::default())?;
        let procs = fs::OpenOptions::new().write(true).open(group.path.join("cgroup.procs"))?;
        Ok((group, procs.into()))
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        // Sandboxes that still end keep it; nothing of ours runs in it then, and an empty group costs nothing.
        let _busy = fs::remove_dir(&self.parent);
    }
}

/// Removes the groups of fronts that were killed: nobody was left to do it. Nothing runs in them, so a group that
/// cannot be removed is not such a one.
fn sweep(base: &Path) {
    let directories = |path: &Path| {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
    };
    for group in directories(base) {
        let name = group.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Some(pid) = name.strip_prefix("zeroboot-").and_then(|pid| pid.parse::<u32>().ok()) else { continue };
        if Path::new("/proc").join(pid.to_string()).exists() {
            continue;
        }
        for sandbox in directories(&group) {
            let _busy = fs::remove_dir(sandbox);
        }
        let _busy = fs::remove_dir(group);
    }
}

fn claim_below(base: &Path) -> io::Result<PathBuf> {
    let has = fs::read_to_string(base.join("cgroup.controllers"))?;
    if let Some(missing) = CONTROLLERS.iter().find(|c| !has.split_whitespace().any(|h| h == **c)) {
        return Err(io::Error::other(format!("no {missing} controller")));
    }
    let parent = base.join(format!("zeroboot-{}", std::process::id()));
    let enable = |at: &Path| fs::write(at.join("cgroup.subtree_control"), "+memory +pids +cpu");
    if let Err(error) = enable(base) {
        // EBUSY: the group holds processes itself. If they are only we, we step aside.
        let leaf = base.join("zeroboot-front");
        fs::create_dir(&leaf).or_else(|e| if leaf.is_dir() { Ok(()) } else { Err(e) })?;
        let moved = fs::write(leaf.join("cgroup.procs"), std::process::id().to_string()).and_then(|()| enable(base));
        if moved.is_err() {
            let _busy = fs::write(base.join("cgroup.procs"), std::process::id().to_string());
            let _left = fs::remove_dir(&leaf);
            return Err(error);
        }
    }
    fs::create_dir(&parent)?;
    if let Err(error) = enable(&parent) {
        let _left = fs::remove_dir(&parent);
        return Err(error);
    }
    Ok(parent)
}

/// One sandbox's group. Removed when dropped; its processes must be gone.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Sets what the sandbox may use.
    pub(crate) fn limit(&self, limits: &Limits) -> io::Result<()> {
        let set = |file: &str, value: String| fs::write(self.path.join(file), value);
        self.limit_memory(limits.memory)?;
        set("pids.max", limits.processes.saturating_add(OWN_PROCESSES).to_string())?;
        // One CPU's worth of time.
        set("cpu.max", "100000 100000".into())?;
        // Not every host has swap accounting.
        let _no_swap = set("memory.swap.max", "0".into());
        Ok(())
    }

    /// Sets the memory that it may use beside the overhead of a sandbox.
    pub(crate) fn limit_memory(&self, bytes: u64) -> io::Result<()> {
        fs::write(self.path.join("memory.max"), bytes.saturating_add(OVERHEAD).to_string())
    }

    /// Whether the kernel killed something in it for want of memory.
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        fs::read_to_string(self.path.join("memory.events"))
            .is_ok_and(|text| text.lines().any(|l| l.strip_prefix("oom_kill ").is_some_and(|n| n.trim() != "0")))
    }

    /// Removes it once nothing is in it: what the kernel takes apart after a process's end, such as a VM, can have threads
    /// of its own there.
    pub(crate) async fn remove(self) {
        for _ in 0..REMOVALS {
            match fs::remove_dir(&self.path) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => tokio::time::sleep(BETWEEN_REMOVALS).await,
                _ => return,
            }
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a sandbox's cgroup");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_dead_fronts_are_swept_and_others_stay() {
        let base = tempfile::tempdir().unwrap();
        let dead = format!("zeroboot-{}", u32::MAX);
        let alive = format!("zeroboot-{}", std::process::id());
        for path in [&format!("{dead}/sandbox-1"), &alive, "zeroboot-front", "other"] {
            fs::create_dir_all(base.path().join(path)).unwrap();
        }
        sweep(base.path());
        let mut left: Vec<_> = fs::read_dir(base.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["other".into(), std::ffi::OsString::from(alive), "zeroboot-front".into()]);
    }
}
