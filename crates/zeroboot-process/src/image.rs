//! Which memory of a warm runtime moves into an image that its forks share, and why the rest stays.
//!
//! After warming, what the runtime has written (12,000 pages with numpy and pandas) is moved into a sealed file that is
//! mapped privately at the same addresses. A fork then copies no page tables of it and its end frees none.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
};

use zeroboot_sys::{
    arena,
    image::{self, Access, Move},
    memory::PAGE,
};

use crate::{layout::PYFORK, serve::Frozen};

/// Unused pages in a row from which on they stay out of the image: the file would have to store them.
const HOLE: usize = 64;

/// Flags of a mapping (`VmFlags` in proc_pid_smaps(5)) that keep it where it is, and why.
const KEPT: &[(&str, &str)] = &[
    ("wf", "is wiped at a fork (MADV_WIPEONFORK): a random generator relies on it"),
    ("dc", "is not passed on at a fork (MADV_DONTFORK)"),
    ("dp", "can be dropped by the kernel (MAP_DROPPABLE)"),
    ("sh", "is shared"),
    ("gd", "is a stack"),
    ("ht", "has huge pages from the host's pool"),
    ("lo", "is locked"),
    ("io", "is a device's"),
    ("pf", "is not made of ordinary pages"),
    ("mm", "is not made of ordinary pages"),
    ("um", "is watched by userfaultfd"),
    ("uw", "is watched by userfaultfd"),
    ("ss", "is a shadow stack"),
];

/// Words in the read-only data of allocators that expect zeros of memory that they gave back with `MADV_DONTNEED`, where
/// an image has its bytes again. (glibc's allocator and CPython's expect nothing.)
const ALLOCATORS: &[(&str, &str)] =
    &[("<jemalloc>", "jemalloc"), ("mimalloc: ", "mimalloc"), ("tcmalloc", "tcmalloc"), ("snmalloc", "snmalloc")];

/// Moves the memory of this process, which has one thread and allocates from the arena. Returns what became of it, in
/// words.
pub(crate) fn freeze() -> io::Result<Frozen> {
    let (moves, stayed) = arena::aside(plan)?;
    // Never freed: that would write to what is going to be the image.
    let (moves, mut stayed) = (Vec::leak(moves), std::mem::ManuallyDrop::new(stayed));
    let moved = image::move_into_file(moves)?;
    if moved.len() < moves.len() {
        stayed.push_str(&format!("; {} ranges could not be moved", moves.len() - moved.len()));
    }
    let pages = moved.iter().map(|range| range.len() / PAGE).sum::<usize>();
    let text = format!("image of {} KiB in {} ranges{}", pages * PAGE / 1024, moved.len(), *stayed);
    Ok(Frozen { text, moved })
}

/// What moves, and in words what stays.
fn plan() -> io::Result<(Vec<Move>, String)> {
    let mappings: Vec<Mapping> = parse(&std::fs::read_to_string("/proc/self/smaps")?);
    let allocator = mappings.iter().find_map(Mapping::allocator);
    // Of these the read-only parts move, too: neighbours in the image, they are one mapping instead of four, in large pages.
    let programs: BTreeSet<&str> =
        mappings.iter().filter(|m| m.file && m.access.execute && !m.shared).map(|m| m.name.as_str()).collect();
    let pages = Pages(File::open("/proc/self/pagemap")?);
    // What the kernel and the fork server write to.
    let ours = [image::thread_pages(), arena::range()];
    let mut moves = Vec::new();
    // By reason: what stays for it, and how much.
    let mut staying: BTreeMap<String, (BTreeSet<&str>, usize)> = BTreeMap::new();
    for mapping in &mappings {
        match mapping.fate(allocator.as_deref(), &programs) {
            Fate::Plain => {}
            Fate::Text => moves.push(Move { at: mapping.at.clone(), access: Access { write: false, execute: true } }),
            Fate::Stays(reason) => {
                let (names, kib) = staying.entry(reason).or_default();
                names.insert(if mapping.name.is_empty() { "unnamed memory" } else { &mapping.name });
                *kib += mapping.anonymous;
            }
            Fate::Moves => {
                for at in without(used(&pages, &mapping.at)?, &ours) {
                    moves.push(Move { at, access: mapping.access });
                }
            }
        }
    }
    let mut stayed = String::with_capacity(4096);
    for (reason, (names, kib)) in staying {
        let names: Vec<&str> = names.into_iter().take(NAMED).collect();
        stayed.push_str(&format!("; {kib} KiB stay: {} {reason}", names.join(", ")));
    }
    Ok((moves, stayed))
}

/// Most mappings that are named for each reason.
const NAMED: usize = 4;

/// One line of `maps` and what `smaps` says below it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    at: Range<usize>,
    readable: bool,
    access: Access,
    shared: bool,
    file: bool,
    name: String,
    /// Private pages, KiB.
    anonymous: usize,
    swapped: usize,
    flags: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    Moves,
    /// Code, constants, and what the loader alone wrote to, of a program: moves whole.
    Text,
    /// It has nothing that a fork would copy.
    Plain,
    Stays(String),
}

impl Mapping {
    /// The rules, the first that holds.
    fn fate(&self, allocator: Option<&str>, programs: &BTreeSet<&str>) -> Fate {
        let stays = |reason: &str| if self.anonymous == 0 { Fate::Plain } else { Fate::Stays(reason.to_owned()) };
        if self.shared {
            return stays("is shared");
        }
        if let Some((_, reason)) = KEPT.iter().find(|(flag, _)| self.flags.iter().any(|f| f == flag)) {
            return stays(reason);
        }
        if self.flags.is_empty() {
            return stays("is of unknown kind: this kernel does not tell");
        }
        if self.name == PYFORK {
            // The fork server writes to it.
            return Fate::Plain;
        }
        if self.name.starts_with('[') && self.name != "[heap]" {
            // [stack], [vdso], [vvar]; names that an allocator gave its memory.
            return stays("is special");
        }
        if self.file && self.readable && !self.access.write && programs.contains(self.name.as_str()) {
            return Fate::Text;
        }
        // A guard page, or a file that nobody wrote to: nothing is copied at a fork.
        if !self.readable || self.anonymous == 0 && self.swapped == 0 {
            return Fate::Plain;
        }
        if let Some(allocator) = allocator
            && !self.file
            && self.name.is_empty()
        {
            return Fate::Stays(format!("may be of {allocator}, which expects zeros of what it gave back"));
        }
        Fate::Moves
    }

    /// The allocator that this file brings along.
    fn allocator(&self) -> Option<String> {
        // Ours has the words themselves.
        let read_only = self.readable && !self.access.write && !self.access.execute && !self.shared;
        if !self.file || !read_only || self.name == PYFORK {
            return None;
        }
        // CPython has mimalloc in it from 3.13 on, and uses it only in the build without the lock, whose name ends in t.
        let name = Path::new(&self.name).file_name()?.to_str()?;
        let python = name.starts_with("python") || name.starts_with("libpython");
        let own = python && !name.contains("t.so") && !name.ends_with('t');
        let words = ALLOCATORS.iter().filter(|(_, what)| !(own && *what == "mimalloc"));
        let (_, what) = words.into_iter().find(|(word, _)| image::contains(self.at.clone(), word.as_bytes()))?;
        Some(format!("{what} of {name}"))
    }
}

fn parse(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let kib = |line: &str| line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
        match (line.split_once(':'), mappings.last_mut()) {
            (Some(("Anonymous", _)), Some(last)) => last.anonymous = kib(line),
            (Some(("Swap", _)), Some(last)) => last.swapped = kib(line),
            (Some(("VmFlags", flags)), Some(last)) => {
                last.flags = flags.split_whitespace().map(str::to_owned).collect();
            }
            _ => mappings.extend(head(line)),
        }
    }
    mappings
}

/// `7f0000000000-7f0000001000 rw-p 00000000 00:00 0    name`; `None` for another line.
fn head(line: &str) -> Option<Mapping> {
    let mut rest = line;
    let mut word = || {
        let (word, after) = rest.trim_start().split_once(' ').unwrap_or((rest.trim_start(), ""));
        rest = after;
        word
    };
    let (start, end) = word().split_once('-')?;
    let at = usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?;
    let access = word().as_bytes();
    let (_offset, _device, inode) = (word(), word(), word());
    let has = |i: usize, c: u8| access.get(i) == Some(&c);
    Some(Mapping {
        at,
        readable: has(0, b'r'),
        access: Access { write: has(1, b'w'), execute: has(2, b'x') },
        shared: has(3, b's'),
        file: inode != "0",
        name: rest.trim().to_owned(),
        anonymous: 0,
        swapped: 0,
        flags: Vec::new(),
    })
}

/// `pagemap` of a process (Documentation/admin-guide/mm/pagemap.rst).
pub(crate) struct Pages(pub(crate) File);

impl Pages {
    /// The page is there.
    pub(crate) const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    /// It is its file's own page; else a copy.
    pub(crate) const OF_FILE: u64 = 1 << 61;

    /// What it says of each page of a range.
    pub(crate) fn entries(&self, at: &Range<usize>) -> io::Result<Vec<u64>> {
        let mut bytes = vec![0u8; at.len() / PAGE * 8];
        self.0.read_exact_at(&mut bytes, (at.start / PAGE * 8) as u64)?;
        Ok(bytes.as_chunks().0.iter().map(|entry| u64::from_ne_bytes(*entry)).collect())
    }
}

/// The parts of a mapping that are in use, with holes shorter than [`HOLE`] in them.
fn used(pages: &Pages, at: &Range<usize>) -> io::Result<Vec<Range<usize>>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (i, entry) in pages.entries(at)?.into_iter().enumerate() {
        if entry & (Pages::PRESENT | Pages::SWAPPED) == 0 {
            continue;
        }
        let page = at.start + i * PAGE;
        match runs.last_mut() {
            Some(last) if page - last.end < HOLE * PAGE => last.end = page + PAGE,
            _ => runs.push(page..page + PAGE),
        }
    }
    Ok(runs)
}

/// `runs` less what lies in `holes`.
fn without(runs: Vec<Range<usize>>, holes: &[Range<usize>]) -> Vec<Range<usize>> {
    holes.iter().fold(runs, |runs, hole| {
        let cut = |run: Range<usize>| {
            let before = run.start..run.end.min(hole.start);
            let after = run.start.max(hole.end)..run.end;
            [before, after].into_iter().filter(|part| !part.is_empty())
        };
        runs.into_iter().flat_map(cut).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0c0000000-55d0c0100000 rw-p 00000000 00:00 0                          [heap]
Size:               1024 kB
Anonymous:          1020 kB
Swap:                  0 kB
VmFlags: rd wr mr mw me ac
7f0000000000-7f0000100000 rw-p 00000000 00:00 0
Anonymous:          1020 kB
VmFlags: rd wr mr mw me ac
7f0000200000-7f0000201000 rw-p 00000000 00:00 0
Anonymous:             4 kB
VmFlags: rd wr mr mw me wf ac
7f0000300000-7f0000301000 r--p 00001000 08:01 77                         /usr/lib/a library.so (deleted)
Anonymous:             4 kB
VmFlags: rd mr mw me ac
7f0000400000-7f0000401000 r-xp 00001000 08:01 77                         /usr/lib/libc.so.6
Anonymous:             0 kB
VmFlags: rd ex mr mw me
7f0000500000-7f0000501000 rw-s 00000000 00:01 9                          /dev/zero (deleted)
Anonymous:             4 kB
VmFlags: rd wr sh mr mw me ms
7ffd00000000-7ffd00100000 rw-p 00000000 00:00 0                          [stack]
Anonymous:            80 kB
VmFlags: rd wr mr mw me gd ac
";

    #[test]
    fn what_is_the_runtimes_own_moves_and_what_a_flag_protects_stays() {
        let mappings = parse(SMAPS);
        let programs = BTreeSet::from(["/usr/lib/libc.so.6"]);
        let fates: Vec<Fate> = mappings.iter().map(|m| m.fate(None, &programs)).collect();
        let stays = |text: &str| Fate::Stays(text.to_owned());
        assert_eq!(mappings[3].name, "/usr/lib/a library.so (deleted)");
        assert_eq!(
            fates,
            [
                Fate::Moves,
                Fate::Moves,
                stays("is wiped at a fork (MADV_WIPEONFORK): a random generator relies on it"),
                Fate::Moves,
                Fate::Text,
                stays("is shared"),
                stays("is a stack"),
            ]
        );
        let fates: Vec<Fate> = mappings.iter().map(|m| m.fate(Some("jemalloc of x"), &programs)).collect();
        assert_eq!(fates[0], Fate::Moves);
        assert_eq!(fates[1], stays("may be of jemalloc of x, which expects zeros of what it gave back"));
        assert_eq!(fates[3], Fate::Moves);
    }

    #[test]
    fn holes_are_cut_out() {
        let p = PAGE;
        assert_eq!(without(vec![0..10 * p, 20 * p..21 * p], &[2 * p..3 * p, 9 * p..30 * p]), [0..2 * p, 3 * p..9 * p]);
        assert_eq!(without(vec![p..2 * p, 3 * p..4 * p], &[0..0, 0..p]), [p..2 * p, 3 * p..4 * p]);
    }
}
