//! `zeroboot sandbox cp`: files into a sandbox, or out of one.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::PermissionsExt,
    path::{Component, Path, PathBuf},
};

use anyhow::Context;
use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::{Method, body::Frame};
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::timeout};
use uuid::Uuid;

use super::{
    args::CpArgs,
    client::{Body, Client, PATIENCE, Refused, empty, path, patiently, query},
    field,
};
use crate::{hint::hinted, printer};

/// Bytes of one piece of a file on its way.
const CHUNK: usize = 256 * 1024;
/// Permission bits that come with a file from a sandbox: others than its owner cannot write to it, whatever it says.
const MODE: u32 = 0o755;

enum Side {
    Local(PathBuf),
    Remote { id: String, path: String },
}

/// `ID:PATH`, or else a local path. (`./` in front makes any name local.)
fn side(text: &str) -> Side {
    match text.split_once(':') {
        Some((id, path)) if id.parse::<Uuid>().is_ok() => Side::Remote { id: id.into(), path: path.into() },
        _ => Side::Local(text.into()),
    }
}

pub(super) async fn cp(client: &Client, args: CpArgs) -> anyhow::Result<u8> {
    let mut sides: Vec<Side> = args.paths.iter().map(|path| side(path)).collect();
    let Some(target) = sides.pop() else { return Err(neither()) };
    let many = sides.len() > 1;
    let mut copy = Copy { client, recursive: args.recursive, skipped: 0 };
    for source in sides {
        match (source, &target) {
            (Side::Local(from), Side::Remote { id, path }) => copy.put(&from, id, path, many).await?,
            (Side::Remote { id, path }, Side::Local(to)) => copy.get(&id, &path, to, many).await?,
            (Side::Local(_), Side::Local(_)) => return Err(neither()),
            (Side::Remote { .. }, Side::Remote { .. }) => {
                return Err(hinted("both sides are in sandboxes", "copy out first, then in"));
            }
        }
    }
    // What was not copied was named already.
    Ok(u8::from(copy.skipped > 0))
}

fn neither() -> anyhow::Error {
    hinted("neither side is in a sandbox", "write one as ID:PATH, with the id that `zeroboot sandbox create` printed")
}

struct Copy<'a> {
    client: &'a Client,
    recursive: bool,
    skipped: usize,
}

impl Copy<'_> {
    // --- into a sandbox ---

    async fn put(&mut self, from: &Path, id: &str, to: &str, many: bool) -> anyhow::Result<()> {
        if from.as_os_str() == "-" {
            if to.is_empty() || to.ends_with('/') {
                return Err(hinted("standard input has no name", "name the file in the sandbox: ID:PATH"));
            }
            return self.write(None, id, to).await;
        }
        let kind = fs::metadata(from).map_err(|error| cannot_read(from, &error))?;
        let name = name_of(from)?;
        let into = to.is_empty() || to.ends_with('/') || many || self.is_directory(id, to).await?;
        let to = match to.trim_end_matches('/') {
            "" if to.starts_with('/') => format!("/{name}"),
            "" => name,
            directory if into => format!("{directory}/{name}"),
            file => file.to_owned(),
        };
        if !kind.is_dir() {
            return self.write(Some(from), id, &to).await;
        }
        if !self.recursive {
            return Err(needs_recursive(&from.display().to_string()));
        }
        // A directory, and where it goes.
        let mut waiting = vec![(from.to_owned(), to)];
        while let Some((from, to)) = waiting.pop() {
            let body = json!({ "path": to });
            self.client.json(Method::POST, &path(id, &["files", "mkdir"]), Some(&body)).await?;
            for entry in fs::read_dir(&from).map_err(|error| cannot_read(&from, &error))? {
                let entry = entry.map_err(|error| cannot_read(&from, &error))?;
                let (from, kind) = (entry.path(), entry.file_type()?);
                let Some(name) = entry.file_name().to_str().map(str::to_owned) else {
                    self.skip(&from.display().to_string(), "its name is not UTF-8");
                    continue;
                };
                let to = format!("{to}/{name}");
                // A link to a file is copied as the file; one to a directory could lead back here.
                if kind.is_dir() {
                    waiting.push((from, to));
                } else if fs::metadata(&from).is_ok_and(|found| found.is_file()) {
                    self.write(Some(&from), id, &to).await?;
                } else {
                    self.skip(&from.display().to_string(), "it is neither a file nor a directory");
                }
            }
        }
        Ok(())
    }

    async fn is_directory(&self, id: &str, name: &str) -> anyhow::Result<bool> {
        match self.stat(id, name).await {
            Ok(entry) => Ok(field(&entry, "kind") == "directory"),
            Err(error) if error.downcast_ref::<Refused>().is_some_and(|r| r.code == "file_not_found") => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn stat(&self, id: &str, name: &str) -> anyhow::Result<Value> {
        let name = if name.is_empty() { "." } else { name };
        self.client.json(Method::GET, &query(&path(id, &["files", "stat"]), &[("path", name)]), None).await
    }

    /// One file; our standard input if there is no name.
    async fn write(&self, from: Option<&Path>, id: &str, to: &str) -> anyhow::Result<()> {
        let headers = [("content-type", "application/octet-stream".to_owned())];
        let put = || async {
            let (body, mode) = match from {
                None => (pieces(Box::new(io::stdin())), None),
                Some(from) => {
                    let file = File::open(from).map_err(|error| cannot_read(from, &error))?;
                    let mode = file.metadata().map_err(|error| cannot_read(from, &error))?.permissions().mode() & 0o777;
                    (pieces(Box::new(file)), Some(format!("{mode:o}")))
                }
            };
            let mut pairs = vec![("path", to)];
            pairs.extend(mode.as_deref().map(|mode| ("mode", mode)));
            let to = query(&path(id, &["files"]), &pairs);
            let answer = self.client.send(Method::PUT, &to, &headers, body, None).await?;
            self.client.good(answer).await.map(drop)
        };
        // Standard input cannot be read again.
        let done = if from.is_none() { put().await } else { patiently(put).await };
        done.with_context(|| format!("write {to}"))
    }

    // --- out of a sandbox ---

    async fn get(&mut self, id: &str, from: &str, to: &Path, many: bool) -> anyhow::Result<()> {
        let source = format!("{id}:{from}");
        if to.as_os_str() == "-" {
            return self.read(id, from, &mut io::stdout()).await;
        }
        let entry = self.stat(id, from).await.with_context(|| format!("read {source}"))?;
        let name = || {
            let name = field(&entry, "path").rsplit('/').next().unwrap_or_default().to_owned();
            safe(Path::new(&name)).with_context(|| format!("{source} has no file name: name the target"))
        };
        let into = to.is_dir() || many || to.as_os_str().as_encoded_bytes().ends_with(b"/");
        if into && !to.is_dir() {
            return Err(hinted(format!("{} is not a directory", to.display()), "make it first"));
        }
        let to = if into { to.join(name()?) } else { to.to_owned() };
        if field(&entry, "kind") != "directory" {
            return self.save(id, from, &entry, &to).await;
        }
        if !self.recursive {
            return Err(needs_recursive(&source));
        }
        let root = PathBuf::from(field(&entry, "path"));
        make(&to)?;
        let mut waiting = vec![root.clone()];
        while let Some(directory) = waiting.pop() {
            let directory = directory.to_string_lossy().into_owned();
            let list = query(&path(id, &["files", "list"]), &[("path", &directory), ("depth", "1")]);
            let found =
                self.client.json(Method::GET, &list, None).await.with_context(|| format!("read {directory}"))?;
            for entry in found.get("entries").and_then(Value::as_array).into_iter().flatten() {
                let full = field(entry, "path");
                // The names are the sandbox's, which may lie: none leads out of our directory.
                let Some(below) = Path::new(&full).strip_prefix(&root).ok().and_then(safe) else {
                    self.skip(&full, "it is not below what was asked for");
                    continue;
                };
                let to = to.join(below);
                match field(entry, "kind").as_str() {
                    "directory" => {
                        make(&to)?;
                        waiting.push(full.into());
                    }
                    "file" => self.save(id, &full, entry, &to).await?,
                    _ => self.skip(&full, "it is neither a file nor a directory"),
                }
            }
        }
        Ok(())
    }

    /// One file. It has its name when it is whole.
    async fn save(&self, id: &str, from: &str, entry: &Value, to: &Path) -> anyhow::Result<()> {
        // Such as /dev/null, or a pipe.
        if fs::metadata(to).is_ok_and(|there| !there.is_file()) {
            let mut file = File::options().write(true).open(to).map_err(|error| cannot_write(to, &error))?;
            return self.read(id, from, &mut file).await;
        }
        let directory = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(directory).map_err(|error| cannot_write(to, &error))?;
        self.read(id, from, &mut file).await?;
        let mode = match entry.get("mode") {
            Some(Value::String(text)) => u32::from_str_radix(text, 8).ok(),
            Some(number) => number.as_u64().and_then(|mode| u32::try_from(mode).ok()),
            None => None,
        };
        let mode = fs::Permissions::from_mode(mode.unwrap_or(0o644) & MODE);
        file.as_file().set_permissions(mode).map_err(|error| cannot_write(to, &error))?;
        file.persist(to).map_err(|error| cannot_write(to, &error.error))?;
        Ok(())
    }

    async fn read(&self, id: &str, from: &str, to: &mut dyn Write) -> anyhow::Result<()> {
        let url = query(&path(id, &["files"]), &[("path", from)]);
        let get = || async {
            let answer = self.client.send(Method::GET, &url, &[], empty(), Some(PATIENCE)).await?;
            self.client.good(answer).await
        };
        let answer = patiently(get).await.with_context(|| format!("read {id}:{from}"))?;
        let mut body = answer.into_body();
        while let Some(frame) = timeout(PATIENCE, body.frame()).await.map_err(|_| self.client.silent())? {
            let frame = frame.map_err(|error| self.client.broke(&error))?;
            if let Ok(data) = frame.into_data() {
                to.write_all(&data)?;
            }
        }
        to.flush()?;
        Ok(())
    }

    fn skip(&mut self, name: &str, why: &str) {
        self.skipped += 1;
        printer::note(format_args!("zeroboot: {} is not copied: {why}", name.escape_debug()));
    }
}

/// The path, if it only goes down.
fn safe(path: &Path) -> Option<PathBuf> {
    let down = path.components().all(|part| matches!(part, Component::Normal(_)));
    (down && !path.as_os_str().is_empty()).then(|| path.to_owned())
}

fn make(directory: &Path) -> anyhow::Result<()> {
    match fs::create_dir(directory) {
        Err(error) if !(error.kind() == io::ErrorKind::AlreadyExists && directory.is_dir()) => {
            Err(cannot_write(directory, &error))
        }
        _ => Ok(()),
    }
}

/// What is read, piece by piece, from a thread: reading may block.
fn pieces(mut from: Box<dyn Read + Send>) -> Body {
    let (sender, receiver) = mpsc::channel::<io::Result<Frame<Bytes>>>(2);
    std::thread::spawn(move || {
        let mut chunk = vec![0; CHUNK];
        loop {
            let piece = match from.read(&mut chunk) {
                Ok(0) => return,
                Ok(count) => Ok(Frame::data(Bytes::copy_from_slice(chunk.get(..count).unwrap_or_default()))),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            let last = piece.is_err();
            if sender.blocking_send(piece).is_err() || last {
                return;
            }
        }
    });
    let pieces =
        stream::unfold(receiver, |mut receiver| async { receiver.recv().await.map(|piece| (piece, receiver)) });
    BodyExt::boxed_unsync(StreamBody::new(pieces))
}

fn name_of(path: &Path) -> anyhow::Result<String> {
    // Also of `.` and `..`.
    let whole = path.canonicalize().map_err(|error| cannot_read(path, &error))?;
    let named = path.file_name().or(whole.file_name());
    let name = named.with_context(|| format!("{} has no name: name the target", path.display()))?;
    name.to_str().map(str::to_owned).with_context(|| format!("the name of {} is not UTF-8", path.display()))
}

fn needs_recursive(what: &str) -> anyhow::Error {
    hinted(format!("{what} is a directory"), "-r copies it with all that is in it")
}

fn cannot_read(path: &Path, error: &io::Error) -> anyhow::Error {
    hinted(format!("cannot read {}: {error}", path.display()), "name an existing file; ID:PATH is one of a sandbox")
}

fn cannot_write(path: &Path, error: &io::Error) -> anyhow::Error {
    hinted(format!("cannot write {}: {error}", path.display()), "check that the directory exists and is writable")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_id_before_a_colon_is_a_sandbox() {
        let id = "0199e5a0-0000-7000-8000-000000000000";
        assert!(matches!(side(&format!("{id}:a:b")), Side::Remote { path, .. } if path == "a:b"));
        for local in ["a", "a:b", "./a:b", "http://x", "-", ":x"] {
            assert!(matches!(side(local), Side::Local(_)), "{local}");
        }
    }

    #[test]
    fn a_name_out_of_a_sandbox_leads_only_down() {
        assert_eq!(safe(Path::new("a/b")), Some("a/b".into()));
        for bad in ["", "..", "a/../../b", "/etc/passwd", "."] {
            assert_eq!(safe(Path::new(bad)), None, "{bad}");
        }
    }
}
