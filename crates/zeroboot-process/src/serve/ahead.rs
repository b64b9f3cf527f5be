//! The pages that a runner needs at once, put into its page tables before it is asked for anything.
//!
//! A fork of an image begins without page tables, so its first run takes hundreds of faults. Which pages those are, a rehearsal
//! finds out: once, a copy of the zygote runs a program of ours and looks at its own page tables. What code in a sandbox
//! touches plays no part: it could make others pay.
//!
//! ```text
//! zygote         waits for what the director found
//!   └─ director    asks the runner for a run, reads which pages it has, and ends it
//!        └─ rehearsing runner    returns from [`serve`](super::serve), as any runner, but jailed by nothing: it runs our program alone
//! ```

use std::{
    io::{self, Read, Write},
    ops::Range,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::fs::{Mode, OFlags};
use zeroboot_proto::{Identity, Kind, encode};
use zeroboot_sys::{
    image::{self, Touch},
    jail,
    memory::PAGE,
    process::{self, Forked},
};

use super::Zygote;
use crate::image::Pages;

/// How long a rehearsal may take. Forks wait for it, once.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pages that are mapped although nobody asked, so that two runs become one: the kernel itself maps so many around a fault.
const BRIDGED: usize = 16;
/// Most ranges. A call for each, in every fork.
const MOST: usize = 256;
/// What a run does, to its very end: there it says so on its input, and waits until it is looked at.
const PROGRAM: &[u8] = b"import atexit, os\natexit.register(lambda: (os.write(0, b'x'), os.read(0, 1)))\nprint(1)\n";

/// Where a rehearsal leaves us.
pub(super) enum Rehearsed {
    /// In the zygote.
    Known(Ahead),
    /// In the runner that rehearses.
    Runner,
}

/// What to touch in a fork.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    ranges: Vec<(Touch, Range<usize>)>,
}

impl Ahead {
    /// Touches the pages, in a runner. It is as right without.
    pub(super) fn touch(&self) {
        for (how, at) in &self.ranges {
            if image::touch(at.clone(), *how).is_err() {
                return;
            }
        }
    }

    /// For the log.
    pub(super) fn words(&self) -> String {
        let pages = |wanted| {
            let of = self.ranges.iter().filter(|(how, _)| *how == wanted);
            of.map(|(_, at)| at.len() / PAGE).sum::<usize>()
        };
        format!("; {} pages are mapped and {} copied ahead", pages(Touch::Read), pages(Touch::Write))
    }
}

impl Zygote {
    /// Finds out which pages of `image` a run needs.
    pub(super) fn rehearse(&self, image: &[Range<usize>]) -> io::Result<Rehearsed> {
        let (mut found, tell) = UnixStream::pair()?;
        match process::clone_into(0)? {
            Forked::Parent((_, pidfd)) => {
                drop(tell);
                found.set_read_timeout(Some(PATIENCE * 2))?;
                let mut bytes = Vec::new();
                let read = found.read_to_end(&mut bytes);
                super::kill(&pidfd);
                read?;
                Ok(Rehearsed::Known(Ahead { ranges: decode(&bytes) }))
            }
            Forked::Child => {
                drop(found);
                if let Ok(true) = self.direct(image, tell) {
                    return Ok(Rehearsed::Runner);
                }
                process::exit_now(0)
            }
        }
    }

    /// In the director. `true` in the runner.
    fn direct(&self, image: &[Range<usize>], mut tell: UnixStream) -> io::Result<bool> {
        process::die_with_parent()?;
        process::heed_children();
        // The runner inherits it: else its page tables could not be looked at.
        jail::allow_looking()?;
        let (stage, its_stage) = UnixStream::pair()?;
        let (told, tells) = rustix::pipe::pipe()?;
        let (hears, heard) = rustix::pipe::pipe()?;
        let nowhere = rustix::fs::open("/dev/null", OFlags::WRONLY, Mode::empty())?;
        match process::fork()? {
            Forked::Child => {
                let wanted = [(its_stage.as_raw_fd(), 0), (nowhere.as_raw_fd(), 1), (nowhere.as_raw_fd(), 2)];
                let control = [(told.as_raw_fd(), 3), (heard.as_raw_fd(), 4)];
                process::place_fds(&[wanted.as_slice(), &control].concat())?;
                // Closed with everything else, all at once.
                for fd in [told, tells, hears, heard, nowhere, stage.into(), its_stage.into(), tell.into()] {
                    let fd: OwnedFd = fd;
                    std::mem::forget(fd);
                }
                process::close_from(5)?;
                process::die_with_parent()?;
                rustix::process::setsid()?;
                Ok(true)
            }
            Forked::Parent(runner) => {
                drop((its_stage, told, heard));
                let looked = self.look(runner, image, stage, &tells);
                // It may have ended.
                let _gone = rustix::process::kill_process(runner, rustix::process::Signal::KILL);
                tell.write_all(&encode_ranges(&looked?))?;
                drop(hears);
                Ok(false)
            }
        }
    }

    /// Has the runner do a run, and looks at it at its end.
    fn look(
        &self,
        runner: rustix::process::Pid,
        image: &[Range<usize>],
        mut stage: UnixStream,
        tells: &OwnedFd,
    ) -> io::Result<Vec<(Touch, Range<usize>)>> {
        let mut entropy = [0; 64];
        rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let realtime_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let mut request = Vec::new();
        encode(&mut request, Kind::Identity, &Identity { entropy, realtime_ns, sandbox_id: [0; 16] }.encode());
        encode(&mut request, Kind::Code, PROGRAM);
        encode(&mut request, Kind::Run, b"");
        // Less than a pipe holds.
        rustix::io::write(tells, &request)?;
        stage.set_read_timeout(Some(PATIENCE))?;
        stage.read_exact(&mut [0])?;
        let pagemap = format!("{}/pagemap", runner.as_raw_nonzero());
        let pagemap = rustix::fs::openat(&self.proc, pagemap, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let pages = Pages(pagemap.into());
        let mut ranges = Vec::new();
        for at in image {
            ranges.extend(runs(at.start, pages.entries(at)?.into_iter()));
        }
        Ok(ranges)
    }
}

/// What is there of a mapping, from its entries of the page map.
fn runs(start: usize, entries: impl Iterator<Item = u64>) -> Vec<(Touch, Range<usize>)> {
    let mut read: Vec<(Touch, Range<usize>)> = Vec::new();
    let mut written: Vec<(Touch, Range<usize>)> = Vec::new();
    for (i, entry) in entries.enumerate().filter(|(_, entry)| entry & Pages::PRESENT != 0) {
        let at = start + i * PAGE;
        let (runs, how, gap) = if entry & Pages::OF_FILE != 0 {
            (&mut read, Touch::Read, BRIDGED)
        } else {
            (&mut written, Touch::Write, 0)
        };
        match runs.last_mut() {
            Some((_, last)) if at - last.end <= gap * PAGE => last.end = at + PAGE,
            _ => runs.push((how, at..at + PAGE)),
        }
    }
    // Copied first, they need not be mapped before.
    written.append(&mut read);
    written
}

fn encode_ranges(ranges: &[(Touch, Range<usize>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (how, at) in ranges {
        for number in [usize::from(*how == Touch::Write), at.start, at.end] {
            out.extend_from_slice(&number.to_le_bytes());
        }
    }
    out
}

/// The longest of them, in the order of their addresses.
fn decode(bytes: &[u8]) -> Vec<(Touch, Range<usize>)> {
    let numbers: Vec<usize> = bytes.as_chunks().0.iter().map(|bytes| usize::from_le_bytes(*bytes)).collect();
    let mut ranges: Vec<_> = numbers
        .as_chunks()
        .0
        .iter()
        .map(|[how, start, end]| (if *how == 1 { Touch::Write } else { Touch::Read }, *start..*end))
        .collect();
    ranges.sort_by_key(|(_, at)| std::cmp::Reverse(at.len()));
    ranges.truncate(MOST);
    ranges.sort_by_key(|(how, at)| (*how == Touch::Read, at.start));
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_are_there_become_runs() {
        let (absent, file, copy) = (0, 1 << 63 | 1 << 61, 1 << 63);
        let mut entries = vec![file, file, copy, copy, file, absent, copy];
        entries.extend([absent; 20]);
        entries.push(file);
        let found = runs(PAGE, entries.into_iter());
        let p = PAGE;
        assert_eq!(
            found,
            [
                (Touch::Write, 3 * p..5 * p),
                (Touch::Write, 7 * p..8 * p),
                (Touch::Read, p..6 * p),
                (Touch::Read, 28 * p..29 * p),
            ]
        );
        assert_eq!(decode(&encode_ranges(&found)), found);
        let many: Vec<_> = (0..2 * MOST).map(|i| (Touch::Read, i * 4 * p..(i * 4 + 1 + i % 2) * p)).collect();
        let kept = decode(&encode_ranges(&many));
        assert!(kept.len() == MOST && kept.iter().all(|(_, at)| at.len() == 2 * p));
    }
}
