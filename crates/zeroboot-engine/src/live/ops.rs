//! Operations on a sandbox's files and contexts.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;
use zeroboot_proto::live::{
    Change, ContextInfo, ContextOp, End, Entry, FileOp, How, MAX_CONTEXTS, MAX_ENTRIES, Open, Refusal, Reply,
};

use super::{
    EndReason, Sandbox,
    handle::{ChannelKey, Handle},
    run::{RunError, check_context_name, is_path},
    state::{OpEvent, too_many_replies},
};

/// An operation under way. Dropping it gives it up.
#[derive(Debug)]
struct Operation {
    handle: Arc<Handle>,
    key: ChannelKey,
    events: mpsc::UnboundedReceiver<OpEvent>,
    over: bool,
}

impl Operation {
    async fn begin(handle: &Arc<Handle>, open: Open, input: bool, long: bool) -> Result<Operation, RunError> {
        let (key, events) = handle.when_drained(|state| state.operate(&open, input, long)).await?;
        handle.poke();
        Ok(Operation { handle: handle.clone(), key, events, over: false })
    }

    /// The next part of the answer; `None` at its end. Cancel safe.
    async fn next(&mut self) -> Result<Option<Part>, RunError> {
        if self.over {
            return Ok(None);
        }
        match self.events.recv().await {
            Some(OpEvent::Reply(reply, size)) => {
                self.took(size);
                Ok(Some(Part::Reply(reply, size)))
            }
            Some(OpEvent::Data(bytes)) => {
                self.took(bytes.len());
                Ok(Some(Part::Data(bytes)))
            }
            Some(OpEvent::End(end)) => {
                self.over = true;
                ended(end).map(|()| None)
            }
            None => {
                self.over = true;
                Err(RunError::Gone(self.handle.state().ended.unwrap_or(EndReason::Lost)))
            }
        }
    }

    fn took(&self, count: usize) {
        let poke = self.handle.state().took(self.key, count);
        if poke {
            self.handle.poke();
        }
    }

    /// Everything of a short answer.
    async fn replies(mut self) -> Result<Vec<Reply>, RunError> {
        let (mut all, mut bytes) = (Vec::new(), 0);
        while let Some(part) = self.next().await? {
            let Part::Reply(reply, size) = part else { return Err(self.misbehaved()) };
            bytes += size;
            if too_many_replies(bytes) {
                return Err(RunError::Refused(Refusal::NoRoom, "the list is too large; ask for less depth".into()));
            }
            all.push(reply);
        }
        Ok(all)
    }

    /// It answered something else: whatever speaks there is not our agent.
    fn misbehaved(&self) -> RunError {
        self.handle.state().end_wanted.get_or_insert(EndReason::Lost);
        self.handle.poke();
        RunError::Gone(EndReason::Lost)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        if !self.over {
            self.handle.state().close(self.key);
            self.handle.poke();
        }
    }
}

enum Part {
    Reply(Reply, usize),
    Data(Bytes),
}

fn ended(end: End) -> Result<(), RunError> {
    match end.how {
        How::Done => Ok(()),
        How::Refused(refusal, text) => Err(RunError::Refused(refusal, text)),
        How::OutOfMemory => Err(RunError::Refused(Refusal::NoRoom, "out of memory".into())),
        _ => Err(RunError::Refused(Refusal::Failed, "it was given up".into())),
    }
}

/// What a file operation tells: the entry it is about, or those of a directory.
pub type Entries = Vec<Entry>;

impl Sandbox {
    /// Does something about contexts. Only [`ContextOp::List`] tells something; the others tell it as well, if they can.
    pub async fn context(&self, op: ContextOp) -> Result<Vec<ContextInfo>, RunError> {
        match &op {
            ContextOp::Create { name, cwd } => {
                check_context_name(name)?;
                if cwd.as_ref().is_some_and(|cwd| !is_path(cwd)) {
                    return Err(crate::InvalidRequest::BadDirectory.into());
                }
            }
            ContextOp::Interrupt { name } | ContextOp::Restart { name } | ContextOp::Delete { name } => {
                check_context_name(name)?;
            }
            ContextOp::List => {}
        }
        let operation = Operation::begin(&self.handle, Open::Context(op), false, false).await?;
        let mut all = Vec::new();
        for reply in operation.replies().await? {
            match reply {
                Reply::Contexts(some) if all.len() + some.len() <= MAX_CONTEXTS => all.extend(some),
                _ => return Err(self.misbehaved()),
            }
        }
        Ok(all)
    }

    /// Does something about files that is answered by entries: all but read, write and watch.
    pub async fn file(&self, op: FileOp) -> Result<Entries, RunError> {
        let paths: &[&String] = match &op {
            FileOp::Read { .. } | FileOp::Write { .. } | FileOp::Watch { .. } => {
                return Err(RunError::Refused(Refusal::Failed, "this operation is a stream".into()));
            }
            FileOp::Move { from, to } => &[from, to],
            FileOp::Stat { path }
            | FileOp::List { path, .. }
            | FileOp::MakeDir { path }
            | FileOp::Remove { path, .. }
            | FileOp::Chmod { path, .. } => &[path],
        };
        paths.iter().try_for_each(|path| check_path(path))?;
        let operation = Operation::begin(&self.handle, Open::File(op), false, false).await?;
        let mut all = Vec::new();
        for reply in operation.replies().await? {
            match reply {
                Reply::Entry(entry) => all.push(entry),
                Reply::Entries(some) if all.len() + some.len() <= MAX_ENTRIES => all.extend(some),
                _ => return Err(self.misbehaved()),
            }
        }
        Ok(all)
    }

    /// Reads a regular file: what it is, then its bytes.
    pub async fn read(&self, path: String, offset: u64, length: u64) -> Result<(Entry, FileReader), RunError> {
        check_path(&path)?;
        let open = Open::File(FileOp::Read { path, offset, length });
        let mut operation = Operation::begin(&self.handle, open, false, true).await?;
        match operation.next().await? {
            Some(Part::Reply(Reply::Entry(entry), _)) => Ok((entry, FileReader { operation, left: length })),
            _ => Err(operation.misbehaved()),
        }
    }

    /// Writes a regular file, which appears when it is whole: by [`FileWriter::finish`].
    pub async fn write(&self, path: String, mode: Option<u16>) -> Result<FileWriter, RunError> {
        check_path(&path)?;
        let open = Open::File(FileOp::Write { path, mode });
        Ok(FileWriter { operation: Operation::begin(&self.handle, open, true, true).await? })
    }

    /// Tells what changes below a directory, from the moment on at which this returns.
    pub async fn watch(&self, path: String, recursive: bool) -> Result<Watch, RunError> {
        check_path(&path)?;
        let open = Open::File(FileOp::Watch { path, recursive });
        let mut operation = Operation::begin(&self.handle, open, false, true).await?;
        match operation.next().await? {
            Some(Part::Reply(Reply::Changes(changes), _)) => Ok(Watch { operation, first: Some(changes) }),
            _ => Err(operation.misbehaved()),
        }
    }

    fn misbehaved(&self) -> RunError {
        self.handle.state().end_wanted.get_or_insert(EndReason::Lost);
        self.handle.poke();
        RunError::Gone(EndReason::Lost)
    }
}

fn check_path(path: &str) -> Result<(), RunError> {
    if is_path(path) {
        return Ok(());
    }
    Err(RunError::Refused(Refusal::BadName, "a path is empty, longer than 4096 bytes, or has a NUL byte".into()))
}

/// A file's bytes. Dropping it stops the reading.
#[derive(Debug)]
pub struct FileReader {
    operation: Operation,
    left: u64,
}

impl FileReader {
    /// The next bytes; `None` after the last. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RunError> {
        match self.operation.next().await? {
            Some(Part::Data(bytes)) if bytes.len() as u64 <= self.left => {
                self.left -= bytes.len() as u64;
                Ok(Some(bytes))
            }
            Some(_) => Err(self.operation.misbehaved()),
            None => Ok(None),
        }
    }
}

/// Takes a file's bytes. Dropping it before [`FileWriter::finish`] leaves the file as it was.
#[derive(Debug)]
pub struct FileWriter {
    operation: Operation,
}

impl FileWriter {
    /// Waits until the sandbox takes these bytes.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), RunError> {
        match self.operation.handle.send(self.operation.key, bytes).await {
            // It ended early: it says why.
            Err(RunError::Ended) => Err(self.verdict().await.err().unwrap_or(RunError::Ended)),
            other => other,
        }
    }

    /// All bytes were written: the file appears.
    pub async fn finish(mut self) -> Result<Entry, RunError> {
        self.operation.handle.state().end_input(self.operation.key);
        self.operation.handle.poke();
        self.verdict().await
    }

    async fn verdict(&mut self) -> Result<Entry, RunError> {
        let mut entry = None;
        while let Some(part) = self.operation.next().await? {
            match part {
                Part::Reply(Reply::Entry(one), _) => entry = Some(one),
                _ => return Err(self.operation.misbehaved()),
            }
        }
        entry.ok_or_else(|| self.operation.misbehaved())
    }
}

/// What changes below a directory. Dropping it ends it.
#[derive(Debug)]
pub struct Watch {
    operation: Operation,
    first: Option<Vec<Change>>,
}

impl Watch {
    /// The next changes; `None` if the directory itself is gone. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<Vec<Change>>, RunError> {
        if let Some(first) = self.first.take().filter(|first| !first.is_empty()) {
            return Ok(Some(first));
        }
        match self.operation.next().await? {
            Some(Part::Reply(Reply::Changes(changes), _)) => Ok(Some(changes)),
            Some(_) => Err(self.operation.misbehaved()),
            None => Ok(None),
        }
    }
}
