//! What holds a worker in, should a guest break out of its VM: first the zygote gives up everything that
//! none of its workers needs, then each worker closes the rest behind itself.

use std::io;

use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    process::{Resource, Rlimit, setrlimit},
    thread::{CapabilitySet, CapabilitySets, UnshareFlags},
};
use zeroboot_sys::{
    jail::{self, Filter, JailError},
    process,
};

/// The filter of a worker, data with a reason at each rule.
pub const POLICY: &str = include_str!("../../../policy/vm-worker.json");

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
/// processes' IPC, no capabilities, no user that owns anything. Its workers inherit all of it.
///
/// Returns whether it got namespaces of its own. As root it must; an ordinary user may be refused them by
/// the distribution (AppArmor on Ubuntu), and then seccomp alone stands behind the VM.
pub(crate) fn strip_zygote() -> Result<bool, VmJailError> {
    let root = rustix::thread::capabilities(None)
        .map_err(|e| step("read the capabilities")(e.into()))?
        .effective
        .contains(CapabilitySet::SYS_ADMIN);
    let spaces = enter_nothing(root);
    let separated = match spaces {
        Ok(()) => true,
        Err(error) if root => return Err(step("leave the host's namespaces")(error)),
        Err(_refused) => false,
    };
    if root {
        // Groups first: without the user id there is no right to do it. A process in no user namespace of
        // its own keeps host ids, so they become nobody's.
        process::clear_groups().map_err(step("leave the supplementary groups"))?;
        // A change from root's id would take the capability that dropping the bounding set needs.
        rustix::thread::set_keep_capabilities(true).map_err(|e| step("keep capabilities")(e.into()))?;
        process::become_user(NOBODY).map_err(step("become nobody"))?;
        let last = CapabilitySet::SETPCAP;
        let sets = CapabilitySets { effective: last, permitted: last, inheritable: CapabilitySet::empty() };
        rustix::thread::set_capabilities(None, sets).map_err(|e| step("keep one capability")(e.into()))?;
    }
    jail::drop_capabilities().map_err(step("drop capabilities"))?;
    jail::deny_tracing().map_err(step("forbid tracing"))?;
    // A change of user ids clears it.
    process::die_with_parent().map_err(step("tie the zygote to the front"))?;
    Ok(separated)
}

/// Namespaces in which there is nothing: an empty read-only root, no network interface that is up.
fn enter_nothing(root: bool) -> io::Result<()> {
    let spaces = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    process::unshare(if root { spaces } else { spaces | UnshareFlags::NEWUSER })?;
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

/// In the worker, with its VM made and its socket at hand: from here on it can run the guest, speak on its
/// socket and end.
pub(crate) fn close(filter: &Filter) -> Result<(), VmJailError> {
    // No limit on processes: since Linux 6.14 the first KVM_RUN makes a kernel thread of this process (huge
    // page recovery) and fails for ever if it may not. The filter has no system call that makes one.
    for (resource, limit, what) in [
        (Resource::Core, 0, "forbid core files"),
        (Resource::Fsize, 0, "forbid writing files"),
        (Resource::Nofile, 16, "limit descriptors"),
    ] {
        setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) }).map_err(|e| step(what)(e.into()))?;
    }
    Ok(filter.apply()?)
}
