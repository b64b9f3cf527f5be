//! The file tree of a sandbox: a small read-only root built once by the zygote, private file systems on
//! top of it for each sandbox.

use std::{
    ffi::{CStr, OsStr},
    fs, io,
    os::unix::{ffi::OsStrExt, fs::symlink},
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    mount::{
        MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, mount_change, unmount,
    },
    thread::UnshareFlags,
};

/// Where the root is put together, in a mount namespace of our own. It exists on every Linux, and no runtime
/// lives below it.
pub(crate) const STAGE: &CStr = c"/sys";

/// The empty file that covers what must not be used.
const EMPTY: &str = "/.zeroboot/empty";

/// `struct mount_attr` of mount_setattr(2), Linux 5.12.
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

const MOUNT_ATTR_RDONLY: u64 = 0x1;
const MOUNT_ATTR_NOSUID: u64 = 0x2;
const MOUNT_ATTR_NODEV: u64 = 0x4;

fn set_attributes(path: &Path, attributes: u64) -> io::Result<()> {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
    let attr = MountAttr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the path ends in NUL, the structure has the size given, both outlive the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What the read-only root of a template holds.
#[derive(Clone, Debug, Default)]
pub struct RootPlan {
    /// Host directories and files that appear at their own path, read-only.
    pub binds: Vec<PathBuf>,
    /// Host directories that appear at another path, read-only: where they are, where they appear.
    pub moved: Vec<(PathBuf, PathBuf)>,
    /// Sockets and FIFOs below `binds`, which a read-only mount lets anyone use: an empty file lies over each.
    pub covered: Vec<PathBuf>,
    /// Files that we write: path and bytes.
    pub files: Vec<(PathBuf, Vec<u8>)>,
    /// Empty directories: the mount points of each sandbox's own file systems.
    pub directories: Vec<PathBuf>,
    /// Symbolic links: path and where it leads. One is left out where something else of the plan is.
    pub links: Vec<(PathBuf, PathBuf)>,
}

/// Device nodes that a sandbox has. No `zero`: mapping it shared makes memory that only a cgroup counts.
const DEVICES: [&str; 4] = ["null", "full", "random", "urandom"];

/// Moves this process into a mount namespace whose root is what `plan` says and nothing else. It must have
/// CAP_SYS_ADMIN over its user namespace. `/proc` stays the caller's own, read-only, until a sandbox mounts its own.
pub fn enter_root(plan: &RootPlan) -> io::Result<()> {
    let at = |what: &str, path: &Path| {
        let what = format!("{what} {}", path.display());
        move |error: io::Error| io::Error::new(error.kind(), format!("{what}: {error}"))
    };
    crate::process::unshare(UnshareFlags::NEWNS)?;
    // Nothing that we mount may show up on the host.
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    let stage = Path::new(OsStr::from_bytes(STAGE.to_bytes()));
    mount("tmpfs", stage, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(c"mode=755,size=64m"))?;
    let inside = |path: &Path| stage.join(path.strip_prefix("/").unwrap_or(path));

    let binds = plan.binds.iter().map(|bind| (bind, bind)).chain(plan.moved.iter().map(|(from, to)| (from, to)));
    for (bind, place) in binds {
        let target = inside(place);
        let seen = fs::symlink_metadata(bind).map_err(at("look at", bind))?;
        if target.symlink_metadata().is_ok() && !seen.is_dir() {
            continue;
        }
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(at("make the directory of", bind))?;
        }
        if seen.is_symlink() {
            // Merged /usr: /lib and /bin are links.
            symlink(fs::read_link(bind)?, &target).map_err(at("link", bind))?;
            continue;
        }
        if seen.is_dir() {
            fs::create_dir_all(&target).map_err(at("make", bind))?;
        } else {
            fs::write(&target, b"").map_err(at("make", bind))?;
        }
        // Recursive, because a mount namespace of a lesser user may not uncover what a mount hides.
        mount_bind_recursive(bind, &target).map_err(io::Error::from).map_err(at("bind", bind))?;
        set_attributes(&target, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)
            .map_err(at("make read-only", bind))?;
    }
    for (path, bytes) in &plan.files {
        let target = inside(path);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(at("make the directory of", path))?;
        }
        fs::write(&target, bytes).map_err(at("write", path))?;
        if bytes.starts_with(b"\x7fELF") {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(&target, fs::Permissions::from_mode(0o755))?;
        }
    }
    for path in &plan.directories {
        fs::create_dir_all(inside(path)).map_err(at("make", path))?;
    }
    for (path, target) in &plan.links {
        let link = inside(path);
        // What is bound is read-only.
        if plan.binds.iter().any(|bind| path.starts_with(bind)) || link.symlink_metadata().is_ok() {
            continue;
        }
        if let Some(parent) = link.parent() {
            fs::create_dir_all(parent).map_err(at("make the directory of", path))?;
        }
        symlink(target, &link).map_err(at("link", path))?;
    }
    if !plan.covered.is_empty() {
        let empty = inside(Path::new(EMPTY));
        fs::write(&empty, b"").map_err(at("make", &empty))?;
        for path in &plan.covered {
            // One that is gone by now needs no cover.
            if path.symlink_metadata().is_ok() {
                mount_bind(&empty, inside(path)).map_err(io::Error::from).map_err(at("cover", path))?;
            }
        }
    }
    let dev = inside(Path::new("/dev"));
    fs::create_dir_all(dev.join("shm"))?;
    fs::create_dir_all(dev.join("pts"))?;
    for name in DEVICES {
        fs::write(dev.join(name), b"")?;
        let source = Path::new("/dev").join(name);
        mount_bind_recursive(&source, dev.join(name)).map_err(io::Error::from).map_err(at("bind", &source))?;
        // Devices take writes on a read-only mount; the host's node cannot be touched or changed.
        set_attributes(&dev.join(name), MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID)?;
    }
    for (link, to) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
    ] {
        symlink(to, dev.join(link))?;
    }
    let proc = inside(Path::new("/proc"));
    fs::create_dir_all(&proc)?;
    mount_bind_recursive("/proc", &proc)?;
    // What is imported into the zygote runs before any filter, and may be root there: /proc/sys is the host's.
    set_attributes(&proc, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)?;

    rustix::process::chdir(stage)?;
    rustix::process::pivot_root(".", ".")?;
    // The old root lies over the new one now; take it away.
    unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    // The root directory itself (not what is mounted in it) cannot be written any more.
    rustix::mount::mount_remount(
        "/",
        MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::BIND,
        c"",
    )?;
    Ok(())
}

/// Mounts a private tmpfs on `path`, owned by `uid`, of at most `size` bytes.
pub fn private_tmpfs(path: &Path, uid: u32, mode: &str, size: u64) -> io::Result<()> {
    let options = std::ffi::CString::new(format!("mode={mode},uid={uid},gid={uid},size={size},nr_inodes=16384"))?;
    Ok(mount("tmpfs", path, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(options.as_c_str()))?)
}

/// Mounts terminals of this sandbox's own on `/dev/pts`, at most 64: each holds memory of the kernel.
pub fn private_terminals() -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    Ok(mount("devpts", "/dev/pts", "devpts", flags, Some(c"newinstance,ptmxmode=666,mode=600,max=64"))?)
}

/// Mounts the calling process's own pid namespace on `/proc`: its processes and nothing of the host.
pub fn private_proc() -> io::Result<()> {
    // Read-only: without Landlock code could spare itself when the host's memory runs out (oom_score_adj).
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    match mount("proc", "/proc", "proc", flags, Some(c"subset=pid")) {
        // Before Linux 5.8 there is no subset; then nothing is better than all of the host's facts.
        Err(Errno::INVAL) => Ok(mount("tmpfs", "/proc", "tmpfs", flags, Some(c"size=0"))?),
        other => Ok(other?),
    }
}
