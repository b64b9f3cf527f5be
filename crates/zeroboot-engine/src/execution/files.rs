//! Output files as they come back in chunks: only those that were asked for, and no more bytes than allowed.

use std::collections::{HashSet, VecDeque};

use zeroboot_proto::pattern::{MAX_FOUND, is_meant};

use super::OUTPUT_SLACK;
use crate::{Event, OutputFile, request::check_path};

/// The output files of one exec.
#[derive(Debug)]
pub(super) struct OutputFiles {
    /// Most bytes of all of them.
    limit: u64,
    bytes: u64,
    wanted: Vec<Wanted>,
    /// Files that patterns and directories have brought.
    found: HashSet<String>,
    /// The file that the next chunk may continue, as far as it has come.
    current: Option<(String, Vec<u8>)>,
}

/// A path of `output_files`.
#[derive(Debug)]
struct Wanted {
    path: String,
    /// It was a pattern or a directory, and a file came of it.
    met: bool,
}

/// A part of a file.
pub(super) struct Chunk {
    pub(super) path: String,
    /// Bytes; the reason if it failed.
    pub(super) data: Vec<u8>,
    /// It continues the chunk before it.
    pub(super) append: bool,
    pub(super) failed: bool,
}

/// What a sandbox that is in order does not send.
#[derive(Debug, thiserror::Error)]
pub(super) enum BadChunk {
    #[error("it continued a file that it had not begun")]
    NotBegun,
    #[error("it sent a file that was not asked for")]
    NotWanted,
    #[error("its files are above their limit")]
    TooMuch,
}

impl OutputFiles {
    /// Those of these paths, with at most so many bytes.
    pub(super) fn new(paths: Vec<String>, limit: u64) -> OutputFiles {
        let wanted = paths.into_iter().map(|path| Wanted { path, met: false }).collect();
        OutputFiles { limit, bytes: 0, wanted, found: HashSet::new(), current: None }
    }

    /// Takes a chunk. Files that are whole go to `done`.
    pub(super) fn take(&mut self, chunk: Chunk, done: &mut VecDeque<Event>) -> Result<(), BadChunk> {
        let Chunk { path, data, append, failed } = chunk;
        if append {
            if self.current.as_ref().is_none_or(|(current, _)| *current != path) {
                return Err(BadChunk::NotBegun);
            }
        } else {
            self.finish(done);
            if let Some(at) = self.wanted.iter().position(|wanted| wanted.path == path) {
                self.wanted.swap_remove(at);
            } else if !self.is_found(&path) {
                return Err(BadChunk::NotWanted);
            }
            let means = |wanted: &&mut Wanted| is_meant(wanted.path.as_bytes(), path.as_bytes());
            self.wanted.iter_mut().filter(means).for_each(|wanted| wanted.met = true);
        }
        if failed {
            let reason = String::from_utf8_lossy(&data).chars().take(200).collect();
            self.current = None;
            done.push_back(Event::File(OutputFile { path, data: Err(reason) }));
            return Ok(());
        }
        self.bytes += data.len() as u64;
        if self.bytes > self.limit.saturating_add(OUTPUT_SLACK) {
            return Err(BadChunk::TooMuch);
        }
        match &mut self.current {
            Some((_, bytes)) => bytes.extend_from_slice(&data),
            None => self.current = Some((path, data)),
        }
        Ok(())
    }

    /// Whether a pattern or a directory means it, for the first time. The path becomes a file's name with the caller.
    fn is_found(&mut self, path: &str) -> bool {
        let meant = self.wanted.iter().any(|wanted| is_meant(wanted.path.as_bytes(), path.as_bytes()));
        meant && check_path(path).is_ok() && self.found.len() < MAX_FOUND && self.found.insert(path.to_owned())
    }

    fn finish(&mut self, done: &mut VecDeque<Event>) {
        if let Some((path, bytes)) = self.current.take() {
            done.push_back(Event::File(OutputFile { path, data: Ok(bytes.into()) }));
        }
    }

    /// The sandbox has ended: no more chunks come.
    pub(super) fn end(&mut self, done: &mut VecDeque<Event>) {
        self.finish(done);
        for Wanted { path, .. } in std::mem::take(&mut self.wanted).into_iter().filter(|wanted| !wanted.met) {
            let data = Err("the sandbox ended before it was read".to_owned());
            done.push_back(Event::File(OutputFile { path, data }));
        }
    }
}
