//! Ids of the host for a zygote and its sandboxes.
//!
//! The kernel counts much for each user of the host (watches, timers, pipes, descriptors in flight), and no rlimit or
//! cgroup divides those counts. So each sandbox has a user of the host of its own wherever somebody gives us the ids:
//!
//! | who starts Zeroboot | where the ids come from | the zygote's own |
//! |---|---|---|
//! | root | far above any account | one of its own too |
//! | an ordinary user with ambient `CAP_SETUID` and `CAP_SETGID` (the systemd unit) | the same | that user's |
//! | an ordinary user with subordinate ids (`subuid(5)`) and `newuidmap` | those | that user's |
//! | any other | nowhere: all sandboxes are that user | that user's |

use std::{fs, io, path::PathBuf};

use rustix::{
    fs::{Access, AtFlags, CWD},
    io::Errno,
    rand::GetRandomFlags,
    thread::CapabilitySet,
};
use zeroboot_sys::{
    control::PROC_FD,
    jail::{self, IdSource, Ids},
    process::{self, Forked},
};

/// What sandboxes' ids are called in the namespace of their zygote: [`COUNT`] from here, or as many as there are.
pub(crate) const BASE: u32 = 1_514_000_000;
/// Ids of one zygote.
pub(crate) const COUNT: u32 = 65_536;
/// Blocks of ids above [`BASE`]. A zygote takes one at random, so that two templates seldom have the same.
const BLOCKS: u32 = 4096;
/// The zygotes' own ids, one for each block.
const ZYGOTES: u32 = 1_800_000_000;
/// Fewest subordinate ids for which a map is made. With fewer, sandboxes would share them.
const FEWEST: u32 = 1024;

/// Why there are no ids for sandboxes.
#[derive(Debug, thiserror::Error)]
enum NoIds {
    #[error("{0}")]
    Random(#[source] Errno),
    #[error("this container has no ids for them")]
    Container,
    #[error(
        "CAP_SETUID and CAP_SETGID are not ambient, and user {0} has no subordinate ids in /etc/subuid and /etc/subgid"
    )]
    NoRange(u32),
    #[error("CAP_SETUID and CAP_SETGID are not ambient, and newuidmap is not installed")]
    NoHelper,
    #[error("CAP_SETUID and CAP_SETGID are not ambient, and newuidmap cannot work with no_new_privs")]
    NoNewPrivs,
}

/// Why sandboxes of a server that is started like this process would share a user of the host; `None`: each has its own.
pub fn shared_because() -> Option<String> {
    find().err().map(|error| error.to_string())
}

/// Block and source of the ids that can be had here.
fn find() -> Result<(u32, IdSource), NoIds> {
    let mut random = [0; 4];
    rustix::rand::getrandom(&mut random, GetRandomFlags::empty()).map_err(NoIds::Random)?;
    let block = u32::from_le_bytes(random) % BLOCKS;
    let start = BASE + block * COUNT;
    let may = rustix::thread::capabilities(None).is_ok_and(|own| own.effective.contains(ids_capabilities()));
    if may {
        let all = |map: &str| holds(map, start, COUNT) && holds(map, ZYGOTES + block, 1);
        return if all("/proc/self/uid_map") && all("/proc/self/gid_map") {
            Ok((block, IdSource::Capabilities(Ids { users: start, groups: start, count: COUNT })))
        } else {
            Err(NoIds::Container)
        };
    }
    let user = rustix::process::getuid().as_raw();
    let range = |file: &str| subordinate(&fs::read_to_string(file).unwrap_or_default(), user);
    let (Some(users), Some(groups)) = (range("/etc/subuid"), range("/etc/subgid")) else {
        return Err(NoIds::NoRange(user));
    };
    let on_path = |name: &str| {
        let search = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
        std::env::split_paths(&search).map(|dir| dir.join(name)).find(|path| path.is_file())
    };
    let (Some(newuidmap), Some(newgidmap)) = (on_path("newuidmap"), on_path("newgidmap")) else {
        return Err(NoIds::NoHelper);
    };
    if rustix::thread::no_new_privs().unwrap_or(true) {
        return Err(NoIds::NoNewPrivs);
    }
    let ids = Ids { users: users.0, groups: groups.0, count: users.1.min(groups.1).min(COUNT) };
    Ok((block, IdSource::Subordinate { ids, newuidmap, newgidmap }))
}

/// The capabilities to give ids out.
pub(crate) fn ids_capabilities() -> CapabilitySet {
    CapabilitySet::SETUID | CapabilitySet::SETGID
}

/// Ids from [`BASE`] on that this process may give out in its user namespace.
pub(crate) fn mapped() -> Option<u32> {
    let may = rustix::thread::capabilities(None).is_ok_and(|own| own.effective.contains(ids_capabilities()));
    let count = |map: &str| {
        ranges(map).find_map(|(first, count)| {
            (first + count).checked_sub(u64::from(BASE)).filter(|_| first <= u64::from(BASE))
        })
    };
    let count = count("/proc/self/uid_map")?.min(count("/proc/self/gid_map")?).min(COUNT.into());
    u32::try_from(count).ok().filter(|count| may && *count > 0)
}

/// The ids that a map begins with, as (first, count), seen from inside.
fn ranges(map: &str) -> impl Iterator<Item = (u64, u64)> + use<> {
    let text = fs::read_to_string(map).unwrap_or_default();
    let lines: Vec<_> = text
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace().map(|field| field.parse::<u64>().ok());
            Some((fields.next()??, fields.nth(1)??))
        })
        .collect();
    lines.into_iter()
}

fn holds(map: &str, first: u32, count: u32) -> bool {
    let (first, count) = (u64::from(first), u64::from(count));
    ranges(map).any(|(from, many)| from <= first && first + count <= from + many)
}

/// First id and count of the user's line in `/etc/subuid`, by its number or by its name.
fn subordinate(text: &str, user: u32) -> Option<(u32, u32)> {
    let number = user.to_string();
    let accounts = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = accounts.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == number).then_some(name)
    });
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let whose = fields.next()?;
        let (first, count) = (fields.next()?.parse().ok()?, fields.next()?.trim().parse().ok()?);
        ((whose == number || Some(whose) == name) && count >= FEWEST).then_some((first, count))
    })
}

/// Takes this process, which has one thread, into a user namespace with ids for sandboxes, around `build`, which makes
/// the sandboxes' root. Gives up what is root's. Without ids all sandboxes will be this user.
///
/// [`PROC_FD`] is there already. `reads`: what the runtime needs. Where the ids could not read it, they are not used.
pub(crate) fn enter(reads: &[PathBuf], build: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let found = find().ok();
    let is_root = rustix::process::geteuid().is_root();
    let proc = process::borrow_fd(PROC_FD);
    let ordinary = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let mut build = Some(build);
    if rustix::thread::capabilities(None)?.effective.contains(CapabilitySet::SYS_ADMIN) {
        // Root's rights are needed to reach what is shared, so first the root.
        build.take().map_or(Ok(()), |build| build())?;
        forget_groups()?;
        let Some((block, source)) = found else { return keep(false) };
        let own = ZYGOTES + block;
        if !can_read(own, reads)? {
            // As before there were ids: the packages run as root.
            return keep(true);
        }
        jail::user_namespace_with_ids(proc, (own, own), BASE, Some(&source))?;
    } else {
        let own = match &found {
            Some((block, _)) if is_root => (ZYGOTES + block, ZYGOTES + block),
            _ => ordinary,
        };
        jail::user_namespace_with_ids(proc, own, BASE, found.as_ref().map(|(_, source)| source))?;
        build.take().map_or(Ok(()), |build| build())?;
    }
    if is_root {
        jail::become_sandbox_user()?;
        // Both are lost with the change of user. The second lets us write our children's maps.
        process::die_with_parent()?;
        jail::allow_looking()?;
    }
    let readable = mapped().is_some() && (is_root || can_read(BASE, reads)?);
    keep(readable)
}

/// The zygote needs to give its children user ids and nothing else; without ids not even that.
fn keep(ids: bool) -> io::Result<()> {
    let keep = if ids { ids_capabilities() } else { CapabilitySet::empty() };
    process::keep_capabilities(keep)
}

/// Supplementary groups of the user who started Zeroboot would reach every sandbox.
fn forget_groups() -> io::Result<()> {
    let allowed = fs::read_to_string("/proc/self/setgroups").is_ok_and(|text| text.trim() == "allow");
    if allowed && rustix::process::geteuid().is_root() { process::clear_groups() } else { Ok(()) }
}

/// Whether a user that owns nothing can read all this.
fn can_read(id: u32, paths: &[PathBuf]) -> io::Result<bool> {
    match process::fork()? {
        Forked::Parent(child) => {
            let status = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty())?;
            Ok(status.is_some_and(|(_, status)| status.exit_status() == Some(0)))
        }
        Forked::Child => {
            let all = process::become_user(id).is_ok()
                && paths.iter().filter(|path| path.symlink_metadata().is_ok()).all(|path| {
                    let mode = if path.is_dir() { Access::READ_OK | Access::EXEC_OK } else { Access::READ_OK };
                    rustix::fs::accessat(CWD, path, mode, AtFlags::empty()).is_ok()
                });
            process::exit_now(i32::from(!all))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subordinate_ids_are_those_of_the_number_or_the_name() {
        let text = "other:100000:65536\n0:200000:65536\nroot:300000:65536\nsmall:1:10\n";
        assert_eq!(subordinate(text, 0), Some((200_000, 65_536)));
        assert_eq!(subordinate("root:300000:65536\n", 0), Some((300_000, 65_536)));
        assert_eq!(subordinate("0:1:10\n", 0), None);
        assert_eq!(subordinate(text, 4_000_000_000), None);
        assert_eq!(subordinate("nonsense\n0:x:y\n", 0), None);
    }

    #[test]
    fn blocks_do_not_meet_the_zygotes_own_ids() {
        assert!(u64::from(BASE) + u64::from(BLOCKS) * u64::from(COUNT) < 1_790_000_000);
        assert!(ZYGOTES + BLOCKS < i32::MAX as u32);
    }
}
