//! Which pages an exec and a first cell touch.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// The pages that an exec and a cell touch, recorded by [`Snapshot::rehearse`](crate::Snapshot::rehearse) and
/// [`Snapshot::rehearse_cell`](crate::Snapshot::rehearse_cell): runs of
/// `(page, pages)`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    /// Written: copied ahead of time.
    pub written: Vec<(u32, u32)>,
    /// Only read: mapped ahead of time.
    pub read: Vec<(u32, u32)>,
}

impl WorkingSet {
    fn pages(runs: &[(u32, u32)]) -> u64 {
        runs.iter().map(|&(_, n)| u64::from(n)).sum()
    }

    /// Adds another fork's. A page that one of them writes is written.
    pub(crate) fn add(&mut self, other: &WorkingSet) {
        let all = |mine: &[(u32, u32)], theirs: &[(u32, u32)]| -> BTreeSet<u32> {
            mine.iter().chain(theirs).flat_map(|&(page, pages)| page..page.saturating_add(pages)).collect()
        };
        let runs = |pages: &mut dyn Iterator<Item = u32>| {
            let mut runs: Vec<(u32, u32)> = Vec::new();
            for page in pages {
                match runs.last_mut() {
                    Some((first, count)) if *first + *count == page => *count += 1,
                    _ => runs.push((page, 1)),
                }
            }
            runs
        };
        let (written, read) = (all(&self.written, &other.written), all(&self.read, &other.read));
        self.read = runs(&mut read.difference(&written).copied());
        self.written = runs(&mut written.into_iter());
    }

    /// Pages that are written.
    pub fn written_pages(&self) -> u64 {
        WorkingSet::pages(&self.written)
    }

    /// Pages that are only read.
    pub fn read_pages(&self) -> u64 {
        WorkingSet::pages(&self.read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_working_set_grows_by_anothers_and_what_one_writes_is_written() {
        let mut set = WorkingSet { written: vec![(1, 2), (9, 1)], read: vec![(5, 2), (20, 1)] };
        set.add(&WorkingSet { written: vec![(3, 1), (6, 1)], read: vec![(1, 1), (4, 1), (21, 2)] });
        assert_eq!(set, WorkingSet { written: vec![(1, 3), (6, 1), (9, 1)], read: vec![(4, 2), (20, 3)] });
        let before = set.clone();
        set.add(&WorkingSet::default());
        assert_eq!(set, before);
    }
}
