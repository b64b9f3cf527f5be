//! `filesystem.Filesystem`: what is in a sandbox's directories, and what changes there.

use std::panic::AssertUnwindSafe;

use axum::{body::Body, http::HeaderMap, response::Response};
use futures_util::FutureExt as _;
use tokio::time::Instant;
use tracing::Instrument as _;
use zeroboot_engine::{Change, ChangeKind, Entry, EntryKind, FileOp, RunError, Sandbox, Watch};

use super::{
    HOME, Target, check_basic_user,
    connect::{Incoming, Outgoing, failed, unary},
    messages::{
        CREATE, DIRECTORY, Empty, EntryAnswer, EntryInfo, FILE, FilesystemEvent, ListDirRequest, ListDirResponse,
        MoveRequest, PathRequest, REMOVE, Timestamp, WRITE, WatchAnswer, WatchEvent, WatchRequest, WatcherEvents,
        WatcherId,
    },
    process::{Stop, keep_alive},
};
use crate::{
    call::Call,
    error::{About, ApiError},
};

/// Where the home directory is, and what the paths of an answer have instead: [`HOME`].
const REAL_HOME: &str = "/home/sandbox";
/// Links of one list whose targets are looked at. Others are told as files.
const MOST_LINKS: usize = 256;

pub(crate) fn of_file(error: RunError) -> ApiError {
    ApiError::of_run(error, About::File)
}

/// A path as the SDKs write it: relative ones and `~` are the home directory's.
pub(crate) fn path(asked: &str) -> String {
    match asked {
        "" | "~" => HOME.into(),
        other => match other.strip_prefix("~/") {
            Some(rest) => format!("{HOME}/{rest}"),
            None if other.starts_with('/') => other.into(),
            None => format!("{HOME}/{other}"),
        },
    }
}

/// A path of the sandbox, under the home directory's name that the caller knows.
pub(crate) fn shown(path: &str) -> String {
    match path.strip_prefix(REAL_HOME) {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => format!("{HOME}{rest}"),
        _ => path.into(),
    }
}

pub(crate) fn name(path: &str) -> String {
    path.rsplit('/').next().unwrap_or_default().into()
}

/// The mode as Go writes it.
fn permissions(entry: &Entry) -> String {
    let kind = match entry.kind {
        EntryKind::File => '-',
        EntryKind::Directory => 'd',
        EntryKind::Link => 'L',
        EntryKind::Other => '?',
    };
    let bits = (0..9).rev().map(|bit| if entry.mode >> bit & 1 == 1 { b"xwr"[bit % 3] as char } else { '-' });
    std::iter::once(kind).chain(bits).collect()
}

fn owner(id: u32) -> String {
    match id {
        0 => "root".into(),
        1000 => "user".into(),
        other => other.to_string(),
    }
}

fn info(entry: &Entry, is_directory: bool) -> EntryInfo {
    let path = shown(&entry.path);
    EntryInfo {
        name: name(&path),
        r#type: if is_directory { DIRECTORY } else { FILE },
        size: i64::try_from(entry.size).unwrap_or(i64::MAX),
        mode: entry.mode.into(),
        permissions: permissions(entry),
        owner: owner(entry.uid),
        group: owner(entry.gid),
        modified_time: Some(Timestamp {
            seconds: entry.modified_ms.div_euclid(1000),
            nanos: i32::try_from(entry.modified_ms.rem_euclid(1000)).unwrap_or_default() * 1_000_000,
        }),
        symlink_target: entry.target.clone(),
        is_symlink: entry.kind == EntryKind::Link,
        path,
    }
}

pub(crate) async fn ask(sandbox: &Sandbox, op: FileOp) -> Result<Vec<Entry>, ApiError> {
    sandbox.file(op).await.map_err(of_file)
}

/// What an entry is, links followed.
async fn followed(sandbox: &Sandbox, entry: &Entry) -> EntryInfo {
    let is_directory = match entry.kind {
        EntryKind::Directory => true,
        // Only a directory has something behind the slash.
        EntryKind::Link => sandbox.file(FileOp::Stat { path: format!("{}/.", entry.path) }).await.is_ok(),
        EntryKind::File | EntryKind::Other => false,
    };
    info(entry, is_directory)
}

async fn one(sandbox: &Sandbox, op: FileOp) -> Result<EntryAnswer, ApiError> {
    let told = ask(sandbox, op).await?;
    let entry = told.first().ok_or_else(ApiError::internal)?;
    Ok(EntryAnswer { entry: Some(followed(sandbox, entry).await) })
}

pub(crate) async fn stat(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    unary(&call, &headers, body, async |request: PathRequest| {
        check_basic_user(&headers)?;
        one(&sandbox, FileOp::Stat { path: path(&request.path) }).await
    })
    .await
}

pub(crate) async fn make_dir(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    unary(&call, &headers, body, async |request: PathRequest| {
        check_basic_user(&headers)?;
        let path = path(&request.path);
        if let Ok(found) = sandbox.file(FileOp::Stat { path: path.clone() }).await
            && let Some(entry) = found.first()
            && followed(&sandbox, entry).await.r#type == DIRECTORY
        {
            return Err(ApiError::new("file_exists", format!("The directory {} is there already", shown(&path))));
        }
        one(&sandbox, FileOp::MakeDir { path }).await
    })
    .await
}

pub(crate) async fn rename(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    unary(&call, &headers, body, async |request: MoveRequest| {
        check_basic_user(&headers)?;
        let (from, to) = (path(&request.source), path(&request.destination));
        ask(&sandbox, FileOp::Stat { path: from.clone() }).await?;
        if let Some((parent, _)) = to.rsplit_once('/').filter(|(parent, _)| !parent.is_empty()) {
            ask(&sandbox, FileOp::MakeDir { path: parent.into() }).await?;
        }
        one(&sandbox, FileOp::Move { from, to }).await
    })
    .await
}

pub(crate) async fn list_dir(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    unary(&call, &headers, body, async |request: ListDirRequest| {
        check_basic_user(&headers)?;
        let depth = u16::try_from(request.depth.max(1)).unwrap_or(u16::MAX);
        let all = ask(&sandbox, FileOp::List { path: path(&request.path), depth }).await?;
        let mut entries = Vec::with_capacity(all.len());
        let mut links = 0;
        for entry in &all {
            links += usize::from(entry.kind == EntryKind::Link);
            entries.push(if entry.kind == EntryKind::Link && links <= MOST_LINKS {
                followed(&sandbox, entry).await
            } else {
                info(entry, entry.kind == EntryKind::Directory)
            });
        }
        Ok(ListDirResponse { entries })
    })
    .await
}

pub(crate) async fn remove(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    unary(&call, &headers, body, async |request: PathRequest| {
        check_basic_user(&headers)?;
        match ask(&sandbox, FileOp::Remove { path: path(&request.path), recursive: true }).await {
            // As Go's RemoveAll: what is not there is removed.
            Err(error) if error.code == "file_not_found" => Ok(Empty {}),
            done => done.map(|_| Empty {}),
        }
    })
    .await
}

/// A directory that is watched.
pub(crate) struct Watched {
    watch: Watch,
    /// What the names of its changes begin with.
    root: String,
}

/// Changes of a directory.
pub(crate) enum Changes {
    Some(Vec<FilesystemEvent>),
    /// So many came at once that some were lost.
    Lost,
    /// The directory is gone.
    End,
}

/// What is said when changes were lost.
pub(crate) const LOST: &str = "Changes were lost because too many came at once: list the directory";

impl Watched {
    pub(crate) async fn begin(sandbox: &Sandbox, request: &WatchRequest) -> Result<Watched, ApiError> {
        if request.include_entry || request.allow_network_mounts {
            return Err(ApiError::new("not_supported", "includeEntry and allowNetworkMounts are not supported"));
        }
        let path = path(&request.path);
        // Its changes are told by its real path.
        let found = ask(sandbox, FileOp::Stat { path: format!("{path}/.") }).await?;
        let root = found.first().ok_or_else(ApiError::internal)?.path.trim_end_matches("/.").to_owned();
        let watch = sandbox.watch(path, request.recursive).await.map_err(of_file)?;
        Ok(Watched { watch, root })
    }

    /// Cancel safe.
    pub(crate) async fn next(&mut self) -> Result<Changes, ApiError> {
        let Some(changes) = self.watch.next().await.map_err(of_file)? else { return Ok(Changes::End) };
        if changes.iter().any(|change| change.kind == ChangeKind::Overflow) {
            return Ok(Changes::Lost);
        }
        Ok(Changes::Some(changes.iter().map(|change| event(change, &self.root)).collect()))
    }
}

fn event(change: &Change, root: &str) -> FilesystemEvent {
    let inside = change.path.strip_prefix(root).map(|rest| rest.trim_start_matches('/'));
    FilesystemEvent {
        name: inside.map_or_else(|| shown(&change.path), str::to_owned),
        r#type: match change.kind {
            ChangeKind::Created => CREATE,
            ChangeKind::Modified => WRITE,
            ChangeKind::Removed => REMOVE,
            ChangeKind::Overflow => 0,
        },
    }
}

pub(crate) async fn watch_dir(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let mut incoming = Incoming::new(&headers, body)?;
    let codec = incoming.codec();
    let begun = async {
        check_basic_user(&headers)?;
        let time = super::connect::timeout(&headers)?;
        Ok::<_, ApiError>((Watched::begin(&sandbox, &incoming.only(&call).await?).await?, time))
    };
    match begun.await {
        Err(error) => Ok(failed(codec, &error)),
        Ok((watched, time)) => {
            let (outgoing, response) = Outgoing::open(&call, codec);
            let (request_id, every) = (call.request_id(), keep_alive(&headers));
            let until = time.map(|time| Instant::now() + time);
            let pump = async move {
                match AssertUnwindSafe(pass_on(watched, &outgoing, every, until)).catch_unwind().await {
                    Ok(Ok(())) => outgoing.end(Ok(()), request_id).await,
                    Ok(Err(Stop::Left)) => {}
                    Ok(Err(Stop::Failed(code, text))) => outgoing.end(Err((code, &text)), request_id).await,
                    Err(_panic) => outgoing.end(Err(("internal", "Internal error")), request_id).await,
                }
                drop(call);
            };
            tokio::spawn(pump.in_current_span());
            Ok(response)
        }
    }
}

async fn pass_on(
    mut watched: Watched,
    outgoing: &Outgoing,
    every: std::time::Duration,
    until: Option<Instant>,
) -> Result<(), Stop> {
    let mut alive = tokio::time::interval_at(Instant::now() + every, every);
    outgoing.send(&WatchAnswer { event: Some(WatchEvent::Start(Empty {})) }).await?;
    loop {
        let changes = tokio::select! {
            changes = watched.next() => changes?,
            () = outgoing.closed() => return Err(Stop::Left),
            _ = alive.tick() => {
                outgoing.send(&WatchAnswer { event: Some(WatchEvent::Keepalive(Empty {})) }).await?;
                continue;
            }
            () = async { tokio::time::sleep_until(until.unwrap_or_else(Instant::now)).await }, if until.is_some() => {
                return Err(Stop::Failed("deadline_exceeded", "The time of the request is over".into()));
            }
        };
        match changes {
            Changes::Some(events) => {
                for event in events {
                    outgoing.send(&WatchAnswer { event: Some(WatchEvent::Filesystem(event)) }).await?;
                }
            }
            Changes::Lost => return Err(Stop::Failed("data_loss", LOST.into())),
            Changes::End => return Ok(()),
        }
    }
}

pub(crate) async fn create_watcher(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    unary(&call, &headers, body, async |request: WatchRequest| {
        check_basic_user(&headers)?;
        let watched = Watched::begin(&sandbox, &request).await?;
        let watcher_id = call.app.e2b.watchers.add(&call, &sandbox, watched)?;
        Ok(WatcherId { watcher_id })
    })
    .await
}

pub(crate) async fn watcher_events(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    unary(&call, &headers, body, async |request: WatcherId| {
        let events = call.app.e2b.watchers.take(sandbox.id(), &request.watcher_id)?;
        Ok(WatcherEvents { events })
    })
    .await
}

pub(crate) async fn remove_watcher(
    call: Call,
    Target(sandbox): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    unary(&call, &headers, body, async |request: WatcherId| {
        call.app.e2b.watchers.remove(sandbox.id(), &request.watcher_id)?;
        Ok(Empty {})
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_the_home_directorys_unless_they_say_otherwise() {
        assert_eq!(path("a/b"), "/home/user/a/b");
        assert_eq!(
            (path(""), path("~"), path("~/a")),
            ("/home/user".into(), "/home/user".into(), "/home/user/a".into())
        );
        assert_eq!(path("/tmp/a"), "/tmp/a");
        assert_eq!(shown("/home/sandbox/a"), "/home/user/a");
        assert_eq!((shown("/home/sandbox"), shown("/home/sandboxes")), ("/home/user".into(), "/home/sandboxes".into()));
    }

    #[test]
    fn permissions_are_written_as_go_writes_them() {
        let entry = |kind, mode| Entry {
            path: "/a".into(),
            kind,
            size: 0,
            mode,
            modified_ms: -1,
            uid: 1000,
            gid: 0,
            target: None,
        };
        assert_eq!(permissions(&entry(EntryKind::File, 0o644)), "-rw-r--r--");
        assert_eq!(permissions(&entry(EntryKind::Directory, 0o751)), "drwxr-x--x");
        let told = info(&entry(EntryKind::Link, 0o777), true);
        assert_eq!((told.permissions.as_str(), told.is_symlink, told.r#type), ("Lrwxrwxrwx", true, DIRECTORY));
        assert_eq!((told.owner.as_str(), told.group.as_str()), ("user", "root"));
        assert_eq!(told.modified_time, Some(Timestamp { seconds: -1, nanos: 999_000_000 }));
    }
}
