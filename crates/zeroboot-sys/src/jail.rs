//! What holds a sandbox in: user ids, capabilities, Landlock, seccomp.

use std::{collections::HashMap, io, os::fd::BorrowedFd, path::Path};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use rustix::{
    fs::{Mode, OFlags},
    process::Pid,
    thread::{CapabilitySet, CapabilitySets, UnshareFlags},
};
use seccompiler::{BpfProgram, TargetArch};

use crate::tree;

/// The user and group that code has inside every sandbox.
pub const SANDBOX_UID: u32 = 1000;

/// For an ordinary user: a user namespace in which we may mount, and make others.
pub fn own_user_namespace() -> io::Result<()> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    crate::process::unshare(UnshareFlags::NEWUSER)?;
    std::fs::write("/proc/self/setgroups", "deny")?;
    // Not id 0: a sandbox's map would then hold our 0, which since Linux 5.12 only CAP_SETFCAP may give on
    // (user_namespaces(7)). And a runtime that is not root keeps no capability when it is executed.
    std::fs::write("/proc/self/gid_map", format!("{SANDBOX_UID} {gid} 1\n"))?;
    std::fs::write("/proc/self/uid_map", format!("{SANDBOX_UID} {uid} 1\n"))
}

/// A range of ids of our user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// The first user.
    pub users: u32,
    /// The first group.
    pub groups: u32,
    /// How many of each.
    pub count: u32,
}

/// By what right ids are taken into a namespace.
#[derive(Clone, Debug)]
pub enum IdSource {
    /// CAP_SETUID and CAP_SETGID.
    Capabilities(Ids),
    /// The subordinate ids of this user, through the set-uid programs that give them out (subuid(5)).
    Subordinate {
        /// Which.
        ids: Ids,
        /// Their paths.
        newuidmap: std::path::PathBuf,
        /// The one for groups.
        newgidmap: std::path::PathBuf,
    },
}

/// [`own_user_namespace`] in which [`SANDBOX_UID`] is the user and group `own`, and, where they can be had, the ids of
/// `source` begin at `inside`. The caller has one thread and is that user, or becomes it then. `proc` is a directory
/// descriptor of a `/proc` that can be written.
pub fn user_namespace_with_ids(
    proc: BorrowedFd<'_>,
    own: (u32, u32),
    inside: u32,
    source: Option<&IdSource>,
) -> io::Result<()> {
    // A process in the new namespace has no rights over ids any more, so one that stays outside writes the maps.
    let (unshared, unshare) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let target = std::process::id();
    let helper = match crate::process::fork()? {
        crate::process::Forked::Parent(helper) => helper,
        crate::process::Forked::Child => {
            drop(unshare);
            let told = rustix::io::retry_on_intr(|| rustix::io::read(&unshared, &mut [0u8; 1])) == Ok(1);
            let done = told && write_maps(proc, target, own, inside, source).is_ok();
            crate::process::exit_now(i32::from(!done))
        }
    };
    let result = crate::process::unshare(UnshareFlags::NEWUSER).and_then(|()| {
        rustix::io::write(&unshare, b"x")?;
        Ok(())
    });
    drop(unshare);
    let status = rustix::process::waitpid(Some(helper), rustix::process::WaitOptions::empty())?;
    result?;
    match status.and_then(|(_, status)| status.exit_status()) {
        Some(0) => Ok(()),
        _ => Err(io::Error::other("the id maps could not be written")),
    }
}

/// From outside. Without the ids, or if they cannot be had, the map has the one user.
fn write_maps(
    proc: BorrowedFd<'_>,
    target: u32,
    own: (u32, u32),
    inside: u32,
    source: Option<&IdSource>,
) -> io::Result<()> {
    let write = |name: &str, text: &str| -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(proc, format!("{target}/{name}"), flags, Mode::empty())?;
        // The kernel takes a map in one write or not at all.
        rustix::io::write(&file, text.as_bytes())?;
        Ok(())
    };
    write("setgroups", "deny")?;
    for (map, own) in [("gid_map", own.1), ("uid_map", own.0)] {
        let one = format!("{SANDBOX_UID} {own} 1\n");
        let (ids, program) = match source {
            None => {
                write(map, &one)?;
                continue;
            }
            Some(IdSource::Capabilities(ids)) => (ids, None),
            Some(IdSource::Subordinate { ids, newuidmap, newgidmap }) => {
                (ids, Some(if map == "uid_map" { newuidmap } else { newgidmap }))
            }
        };
        let (first, count) = (if map == "uid_map" { ids.users } else { ids.groups }, ids.count);
        let written = match program {
            None => write(map, &format!("{one}{inside} {first} {count}\n")).is_ok(),
            Some(program) => {
                let numbers = [target, SANDBOX_UID, own, 1, inside, first, count].map(|number| number.to_string());
                let output = std::process::Command::new(program).args(numbers).output();
                output.is_ok_and(|output| output.status.success())
            }
        };
        if !written {
            write(map, &one)?;
        }
    }
    Ok(())
}

/// Gives a child in a fresh user namespace its one user: `outside` of the caller's namespace appears as
/// [`SANDBOX_UID`]. Makes it, and all that it will start, the first to go when the host runs out of memory: before
/// the server and the zygote. `proc` is a directory descriptor of the caller's own `/proc`.
pub fn settle_child(proc: BorrowedFd<'_>, child: Pid, pidfd: BorrowedFd<'_>, outside: u32) -> io::Result<()> {
    settle_child_as(proc, child, pidfd, (outside, outside))
}

/// [`settle_child`] with a group that has another number than the user.
pub fn settle_child_as(
    proc: BorrowedFd<'_>,
    child: Pid,
    pidfd: BorrowedFd<'_>,
    (user, group): (u32, u32),
) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(proc, child.as_raw_nonzero().to_string(), flags, Mode::empty())?;
    // Children are reaped by the kernel, so a number can be given out again: a child that lives now, after the
    // directory was opened, is the one that the directory is of.
    if crate::process::has_ended(pidfd)? {
        return Err(io::Error::other("it ended at once"));
    }
    let write = |file: &str, text: &str| -> io::Result<()> {
        let fd = rustix::fs::openat(&dir, file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        let written = rustix::io::write(&fd, text.as_bytes())?;
        if written == text.len() { Ok(()) } else { Err(io::Error::other(format!("short write of {file}"))) }
    };
    write("oom_score_adj", "1000")?;
    // Groups first denied: an unprivileged map of groups needs it (user_namespaces(7)).
    write("setgroups", "deny")?;
    write("gid_map", &format!("{SANDBOX_UID} {group} 1\n"))?;
    write("uid_map", &format!("{SANDBOX_UID} {user} 1\n"))
}

/// Becomes [`SANDBOX_UID`] in a user namespace whose map [`settle_child`] wrote. Capabilities stay: no id 0
/// exists here, so the kernel sees no change from root.
pub fn become_sandbox_user() -> io::Result<()> {
    // Raw calls: glibc's wrappers signal every thread, and in a cloned child its thread list is stale.
    let id = libc::c_long::from(SANDBOX_UID as i32);
    // SAFETY: they take numbers only.
    unsafe {
        if libc::syscall(libc::SYS_setresgid, id, id, id) != 0 || libc::syscall(libc::SYS_setresuid, id, id, id) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Leaves every capability, now and after any exec.
pub fn drop_capabilities() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    // Without the right to it the set stays, and with no_new_privs nothing can be had from it.
    if rustix::thread::capabilities(None)?.effective.contains(CapabilitySet::SETPCAP) {
        crate::process::limit_bounding_set(0)?;
    }
    // SAFETY: prctl with numbers only.
    unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    let left = rustix::thread::capabilities(None)?;
    if left.permitted.is_empty() && left.effective.is_empty() {
        Ok(())
    } else {
        Err(io::Error::other("capabilities are left after dropping them"))
    }
}

/// Undoes what a change of user does: code can read its own `/proc/self`, and the agent its exact memory.
pub fn allow_looking() -> io::Result<()> {
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable)?;
    Ok(())
}

/// Keeps other processes of the same user from tracing this one or reading its memory.
pub fn deny_tracing() -> io::Result<()> {
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// Adds a Landlock layer: everything below `/` may be read and executed, only `writable` be changed. Later
/// layers and their processes can neither trace nor (Linux 6.12) signal a process of an earlier one.
/// Returns whether the kernel enforces it at all.
pub fn landlock(writable: &[&Path]) -> Result<bool, JailError> {
    let abi = ABI::V6;
    let read = AccessFs::from_read(abi);
    let all = AccessFs::from_all(abi);
    let build = || -> Result<RulesetStatus, Box<dyn std::error::Error>> {
        let mut ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(all)?
            .scope(Scope::AbstractUnixSocket | Scope::Signal)?
            .create()?
            .add_rule(PathBeneath::new(PathFd::new("/")?, read))?;
        for path in writable {
            let fd = PathFd::new(path)?;
            let access: BitFlags<AccessFs> = if path.is_dir() { all } else { AccessFs::from_file(abi) & all };
            ruleset = ruleset.add_rule(PathBeneath::new(fd, access))?;
        }
        Ok(ruleset.restrict_self()?.ruleset)
    };
    match build() {
        Ok(status) => Ok(status != RulesetStatus::NotEnforced),
        Err(error) => Err(JailError::Landlock(error.to_string())),
    }
}

/// A seccomp filter compiled from policy data.
#[derive(Clone, Debug)]
pub struct Filter {
    /// In the order of installation. The strictest answer of all counts; an allow-list comes last, because it
    /// forbids to install another.
    programs: Vec<BpfProgram>,
}

impl Filter {
    /// Compiles a policy file: a JSON object whose keys are filters, installed in the order of their names
    /// (`1_…`, `2_…`), each in seccompiler's format with a `comment` at every rule.
    pub fn parse(json: &str) -> Result<Filter, JailError> {
        let filters: HashMap<String, BpfProgram> = seccompiler::compile_from_json(json.as_bytes(), TargetArch::x86_64)
            .map_err(|error| JailError::Policy(error.to_string()))?;
        if filters.is_empty() {
            return Err(JailError::Policy("no filter in it".into()));
        }
        let mut named: Vec<_> = filters.into_iter().collect();
        named.sort_by(|a, b| a.0.cmp(&b.0));
        // A program that cannot be made a tree of is as strict as it is, only slower to install.
        let faster = |program: BpfProgram| tree::decision_tree(&program).unwrap_or(program);
        Ok(Filter { programs: named.into_iter().map(|(_, program)| faster(program)).collect() })
    }

    /// Applies it to the calling thread and all it will make, for ever.
    pub fn apply(&self) -> Result<(), JailError> {
        self.programs.iter().try_for_each(|program| {
            seccompiler::apply_filter(program).map_err(|error| JailError::Seccomp(error.to_string()))
        })
    }
}

/// Why a jail could not be closed. The sandbox is then not started.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Landlock said no.
    #[error("apply Landlock: {0}")]
    Landlock(String),
    /// A policy file is not what it should be.
    #[error("compile the seccomp policy: {0}")]
    Policy(String),
    /// The kernel did not take the filter.
    #[error("apply the seccomp filter: {0}")]
    Seccomp(String),
}

/// The kernel's Landlock version; 0 where it has none.
pub fn landlock_version() -> u32 {
    const VERSION: u32 = 1;
    // SAFETY: with this flag the kernel takes no attributes and returns a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, VERSION) };
    u32::try_from(version).unwrap_or(0)
}
