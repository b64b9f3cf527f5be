//! What holds a worker in, should a guest break out of its VM: first the zygote gives up everything that
//! none of its workers needs, then each worker is made in namespaces of its own and closes the rest behind itself.

use std::{io, os::fd::BorrowedFd};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    process::{Resource, Rlimit, WaitOptions, setrlimit, waitpid},
    thread::{CapabilitySet, CapabilitySets, UnshareFlags},
};
use zeroboot_sys::{
    jail::{self, Filter, JailError},
    process::{self, Forked, WORKER_NAMESPACES},
};

/// The filter of a worker, data with a reason at each rule.
pub const POLICY: &str = include_str!("../../../policy/vm-worker.json");

/// The filter of a worker of a checkpoint while it restores a state that another worker wrote: its own, and what that
/// takes. Its own follows.
pub const RESTORE_POLICY: &str = include_str!("../../../policy/vm-restore.json");

/// Nobody: owns no file.
const NOBODY: u32 = 65_534;

/// Why the jail could not be closed.
#[derive(Debug, thiserror::Error)]
pub enum VmJailError {
    /// A system call of the jail failed.
    #[error("cannot {0}")]
    Step(&'static str, #[source] io::Error),
    /// The policy or the filter.
    #[error(transparent)]
    Filter(#[from] JailError),
}

fn step(what: &'static str) -> impl FnOnce(io::Error) -> VmJailError {
    move |error| VmJailError::Step(what, error)
}

/// Once in the zygote, after `/dev/kvm` and the template are open: an empty root, no network, no other
/// processes' IPC, no capabilities, no user that owns anything. Its workers begin with all of it.
///
/// With the right to namespaces (CAP_SYS_ADMIN) it must get them; others may be refused them by the distribution
/// (AppArmor on Ubuntu) or a container, and then seccomp alone stands behind the VM. Who it is is another right
/// (CAP_SETUID, CAP_SETGID), which a container's root has without the first.
pub(crate) fn strip_zygote() -> Result<(), VmJailError> {
    let held = rustix::thread::capabilities(None).map_err(|e| step("read the capabilities")(e.into()))?.effective;
    let may_mount = held.contains(CapabilitySet::SYS_ADMIN);
    if may_mount {
        enter_nothing().map_err(step("leave the host's namespaces"))?;
    }
    if held.contains(CapabilitySet::SETUID | CapabilitySet::SETGID) {
        become_nobody(held)?;
    }
    if !may_mount {
        // After the change of user: in a user namespace of its own the process would keep its id on the host.
        // What was refused is not there; `zeroboot doctor` says so.
        // (That change made the files in /proc of this process root's, and it is to write its own id map.)
        let _refused = jail::allow_looking().and_then(|()| jail::own_user_namespace()).and_then(|()| enter_nothing());
    }
    jail::drop_capabilities().map_err(step("drop capabilities"))?;
    jail::deny_tracing().map_err(step("forbid tracing"))?;
    // A change of user ids clears it.
    process::die_with_parent().map_err(step("tie the zygote to the front"))
}

fn become_nobody(held: CapabilitySet) -> Result<(), VmJailError> {
    // Groups first: without the user id there is no right to do it. A process in no user namespace of
    // its own keeps host ids, so they become nobody's.
    process::clear_groups().map_err(step("leave the supplementary groups"))?;
    // A change from root's id would take the capability that dropping the bounding set needs.
    rustix::thread::set_keep_capabilities(true).map_err(|e| step("keep capabilities")(e.into()))?;
    process::become_user(NOBODY).map_err(step("become nobody"))?;
    let last = held & CapabilitySet::SETPCAP;
    let sets = CapabilitySets { effective: last, permitted: last, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).map_err(|e| step("keep one capability")(e.into()))
}

/// In a stripped zygote that ignores its children: whether it can give a worker its own namespaces, found out by
/// trying. A host may refuse them to users that are not root (`user.max_user_namespaces`, AppArmor, a container's filter).
pub(crate) fn own_namespaces() -> io::Result<()> {
    match process::clone_into(WORKER_NAMESPACES)? {
        Forked::Child => process::exit_now(0),
        Forked::Parent(_) => Ok(()),
    }
}

/// Whether workers get their own namespaces on this host; without, they share their zygote's. Tries it in a child
/// process, which is stripped as a zygote is.
pub fn workers_have_namespaces() -> io::Result<()> {
    const STRIP_FAILED: i32 = 255;
    match process::fork()? {
        Forked::Child => process::exit_now(match strip_zygote() {
            Err(_) => STRIP_FAILED,
            Ok(()) => own_namespaces().err().map_or(0, |error| error.raw_os_error().unwrap_or(STRIP_FAILED)),
        }),
        Forked::Parent(child) => {
            let status = rustix::io::retry_on_intr(|| waitpid(Some(child), WaitOptions::empty()))?;
            match status.and_then(|(_, status)| status.exit_status()) {
                Some(0) => Ok(()),
                Some(errno) if errno != STRIP_FAILED => Err(io::Error::from_raw_os_error(errno)),
                _ => Err(io::Error::other("a zygote cannot leave the host's namespaces")),
            }
        }
    }
}

/// Namespaces in which there is nothing: an empty read-only root, no network interface that is up.
fn enter_nothing() -> io::Result<()> {
    let spaces = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    process::unshare(spaces)?;
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    // Any directory that always exists: the tmpfs hides it and then becomes the root.
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", "/sys", "tmpfs", flags, Some(c"mode=555,size=4k"))?;
    rustix::process::chdir("/sys")?;
    rustix::process::pivot_root(".", ".")?;
    // The old root lies over the new one now; take it away.
    unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    rustix::mount::mount_remount("/", flags | MountFlags::RDONLY | MountFlags::BIND, c"")?;
    Ok(())
}

/// In a new worker: what it must not keep of its making. No id is mapped in its user namespace, so there is nobody to
/// become and none to make a further namespace; only the capabilities over its own few namespaces are left to drop.
pub(crate) fn enter(zygote: BorrowedFd<'_>) -> io::Result<()> {
    process::die_with_parent()?;
    if process::has_ended(zygote)? {
        return Err(io::Error::other("the zygote is gone"));
    }
    jail::drop_capabilities()
}

/// In the worker, with its VM made and its socket at hand: from here on it can run the guest, speak on its
/// socket and end.
pub(crate) fn close(filter: &Filter) -> Result<(), VmJailError> {
    limit()?;
    Ok(filter.apply()?)
}

/// In the worker of a checkpoint, before [`restored`]: from here on it can do what [`close`] leaves it, and restore.
pub(crate) fn close_but_for_restoring(restoring: &Filter) -> Result<(), VmJailError> {
    limit()?;
    Ok(restoring.apply()?)
}

/// The state is restored.
pub(crate) fn restored(filter: &Filter) -> Result<(), VmJailError> {
    Ok(filter.apply()?)
}

fn limit() -> Result<(), VmJailError> {
    // No limit on processes: since Linux 6.14 the first KVM_RUN makes a kernel thread of this process (huge
    // page recovery) and fails for ever if it may not. The filter has no system call that makes one.
    for (resource, limit, what) in [
        (Resource::Core, 0, "forbid core files"),
        (Resource::Fsize, 0, "forbid writing files"),
        (Resource::Nofile, 16, "limit descriptors"),
    ] {
        setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) }).map_err(|e| step(what)(e.into()))?;
    }
    Ok(())
}
