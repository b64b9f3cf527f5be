//! Files of a sandbox: `…/files`. Bytes go through in pieces, in both directions: no file is ever held whole.

use std::{ops::RangeInclusive, panic::AssertUnwindSafe};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio::time::Instant;
use zeroboot_engine::{Entry, FileOp, FileReader, Sandbox, Watch};

use crate::{
    body::next_bytes,
    call::Call,
    error::{About, ApiError},
    params::{InPath, InQuery},
    sandbox_answer::{ChangeBody, EntryBody, EntryList},
    sandbox_wire::{ChmodBody, MoveBody, PathBody, mode},
    sse::{self, KEEP_ALIVE, Sender, Unsent},
};

/// Deepest list of a directory.
const MOST_DEPTH: u64 = 64;

fn failed(error: zeroboot_engine::RunError) -> ApiError {
    ApiError::of_run(error, About::File)
}

async fn ask(sandbox: &Sandbox, op: FileOp) -> Result<Vec<Entry>, ApiError> {
    sandbox.file(op).await.map_err(failed)
}

/// Answers with the one entry that an operation told.
async fn one(call: &Call, sandbox: &Sandbox, op: FileOp, status: StatusCode) -> Result<Response, ApiError> {
    let told = ask(sandbox, op).await?;
    let entry = told.first().ok_or_else(ApiError::internal)?;
    call.json(status, &EntryBody::of(entry))
}

pub(crate) async fn stat(call: Call, path: InPath, mut query: InQuery) -> Result<Response, ApiError> {
    let file = query.needed("path")?;
    query.end()?;
    one(&call, &call.sandbox(&path)?, FileOp::Stat { path: file }, StatusCode::OK).await
}

pub(crate) async fn list(call: Call, path: InPath, mut query: InQuery) -> Result<Response, ApiError> {
    let file = query.text("path")?.unwrap_or_else(|| ".".into());
    let depth = query.number("depth", 1..=MOST_DEPTH)?.unwrap_or(1);
    query.end()?;
    let op = FileOp::List { path: file, depth: u16::try_from(depth).unwrap_or(u16::MAX) };
    let told = ask(&call.sandbox(&path)?, op).await?;
    call.json(StatusCode::OK, &EntryList { entries: told.iter().map(EntryBody::of).collect() })
}

pub(crate) async fn mkdir(call: Call, path: InPath, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let sandbox = call.sandbox(&path)?;
    let PathBody { path } = call.body(&headers, body).await?;
    one(&call, &sandbox, FileOp::MakeDir { path }, StatusCode::OK).await
}

pub(crate) async fn rename(call: Call, path: InPath, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let sandbox = call.sandbox(&path)?;
    let MoveBody { from, to } = call.body(&headers, body).await?;
    one(&call, &sandbox, FileOp::Move { from, to }, StatusCode::OK).await
}

pub(crate) async fn chmod(call: Call, path: InPath, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let sandbox = call.sandbox(&path)?;
    let ChmodBody { path, mode: text } = call.body(&headers, body).await?;
    one(&call, &sandbox, FileOp::Chmod { path, mode: mode(&text)? }, StatusCode::OK).await
}

pub(crate) async fn remove(call: Call, path: InPath, mut query: InQuery) -> Result<StatusCode, ApiError> {
    let file = query.needed("path")?;
    let recursive = query.flag("recursive")?;
    query.end()?;
    ask(&call.sandbox(&path)?, FileOp::Remove { path: file, recursive }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A part of a file, as a client asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Range {
    From(u64),
    Between(RangeInclusive<u64>),
    Last(u64),
}

/// A range that we can serve. Others, such as several at once, are left aside, as RFC 9110 has it: all is sent.
fn wanted_range(headers: &HeaderMap) -> Option<Range> {
    let text = headers.get(header::RANGE)?.to_str().ok()?.strip_prefix("bytes=")?;
    let (first, last) = text.split_once('-')?;
    let number = |text: &str| text.parse::<u64>().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
    match (first, last) {
        ("", last) => number(last).map(Range::Last),
        (first, "") => number(first).map(Range::From),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some(Range::Between(first..=last))
        }
    }
}

/// Sends a file.
pub(crate) async fn read(
    call: Call,
    path: InPath,
    mut query: InQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let name = query.needed("path")?;
    query.end()?;
    let sandbox = call.sandbox(&path)?;
    let range = wanted_range(&headers);
    let (offset, length) = match &range {
        None => (0, u64::MAX),
        Some(Range::From(first)) => (*first, u64::MAX),
        Some(Range::Between(range)) => (*range.start(), range.end().saturating_sub(*range.start()).saturating_add(1)),
        Some(Range::Last(count)) => {
            let told = ask(&sandbox, FileOp::Stat { path: name.clone() }).await?;
            let size = told.first().map_or(0, |entry| entry.size);
            (size.saturating_sub(*count), *count)
        }
    };
    let (entry, reader) = sandbox.read(name, offset, length).await.map_err(failed)?;
    // A file that has no size can still have bytes: those of /proc.
    let sized = entry.size > 0;
    let left = entry.size.saturating_sub(offset).min(length);
    if range.is_some() && left == 0 {
        let error = ApiError::new("range_not_satisfiable", format!("The file has {} bytes", entry.size));
        let mut response = error.into_response();
        if let Ok(value) = HeaderValue::from_str(&format!("bytes */{}", entry.size)) {
            response.headers_mut().insert(header::CONTENT_RANGE, value);
        }
        return Ok(response);
    }
    let mut response = Body::from_stream(bytes_of(call, reader, sized.then_some(left))).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    if sized {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(left));
    }
    if range.is_some() {
        let text = format!("bytes {offset}-{}/{}", offset + left - 1, entry.size);
        headers.insert(header::CONTENT_RANGE, HeaderValue::from_str(&text).map_err(|_| ApiError::internal())?);
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    Ok(response)
}

/// A file's bytes, each piece held until the connection has taken it. The file may change meanwhile: not more than
/// `promised` are sent, and fewer are an error, by which the client sees that the answer is not whole.
pub(crate) fn bytes_of(
    call: Call,
    reader: FileReader,
    promised: Option<u64>,
) -> impl futures_util::Stream<Item = Result<Bytes, std::io::Error>> {
    let broken = |text: &str| std::io::Error::other(text.to_owned());
    futures_util::stream::try_unfold((call, reader, promised), move |(call, mut reader, mut left)| async move {
        if left == Some(0) {
            return Ok(None);
        }
        let next = reader.next().await.map_err(|error| broken(&error.to_string()))?;
        let Some(mut bytes) = next else {
            return if left.is_some() { Err(broken("the file became shorter")) } else { Ok(None) };
        };
        if let Some(left) = &mut left {
            bytes.truncate(usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len()));
            *left -= bytes.len() as u64;
        }
        let held = call.share.part(call.peer(), bytes).map_err(|_| broken("the server holds too much"))?;
        Ok(Some((held, (call, reader, left))))
    })
}

/// Takes a file.
pub(crate) async fn write(call: Call, path: InPath, mut query: InQuery, mut body: Body) -> Result<Response, ApiError> {
    let name = query.needed("path")?;
    let bits = query.text("mode")?.map(|text| mode(&text)).transpose()?;
    query.end()?;
    let sandbox = call.sandbox(&path)?;
    let mut writer = sandbox.write(name, bits).await.map_err(failed)?;
    while let Some(data) = next_bytes(&mut body, call.limits()).await? {
        writer.write(data).await.map_err(failed)?;
    }
    let entry = writer.finish().await.map_err(failed)?;
    call.json(StatusCode::OK, &EntryBody::of(&entry))
}

/// Tells what changes below a directory.
pub(crate) async fn watch(call: Call, path: InPath, mut query: InQuery) -> Result<Response, ApiError> {
    let name = query.text("path")?.unwrap_or_else(|| ".".into());
    let recursive = query.flag("recursive")?;
    query.end()?;
    let watch = call.sandbox(&path)?.watch(name, recursive).await.map_err(failed)?;
    let stall = call.limits().stall_timeout;
    let (sender, response) = sse::stream(call.peer().clone(), call.share.clone(), stall, None);
    tokio::spawn(async move {
        let request_id = call.request_id();
        match AssertUnwindSafe(pass_on(watch, &sender)).catch_unwind().await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => sender.last("failure", &error, request_id).await,
            Err(_panic) => sender.last("failure", &ApiError::internal(), request_id).await,
        }
        drop(call);
    });
    Ok(response)
}

/// The first event says that the directory is watched from now on.
async fn pass_on(mut watch: Watch, sender: &Sender) -> Result<(), ApiError> {
    let mut alive = tokio::time::interval_at(Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
    let unsent = |unsent: Unsent| match unsent {
        Unsent::Gone => None,
        Unsent::Full(full) => Some(full.output_limit()),
    };
    let sent = |result: Result<(), Unsent>| match result.map_err(unsent) {
        Ok(()) => Ok(true),
        Err(None) => Ok(false),
        Err(Some(error)) => Err(error),
    };
    if !sent(sender.send("watching", &serde_json::json!({})).await)? {
        return Ok(());
    }
    loop {
        let changes = tokio::select! {
            changes = watch.next() => changes.map_err(failed)?,
            () = sender.closed() => return Ok(()),
            _ = alive.tick() => {
                if !sent(sender.keep_alive().await)? {
                    return Ok(());
                }
                continue;
            }
        };
        let Some(changes) = changes else { return Ok(()) };
        for change in &changes {
            let (name, body) = ChangeBody::of(change);
            if !sent(sender.send(name, &body).await)? {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_one_pair_of_numbers_and_anything_else_is_left_aside() {
        let range = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RANGE, text.parse().unwrap());
            wanted_range(&headers)
        };
        assert_eq!(range("bytes=0-4"), Some(Range::Between(0..=4)));
        assert_eq!(range("bytes=7-"), Some(Range::From(7)));
        assert_eq!(range("bytes=-3"), Some(Range::Last(3)));
        for other in ["bytes=", "bytes=-", "bytes=4-0", "bytes=0-1,3-4", "lines=0-4", "bytes=+1-2", "bytes=0x1-2"] {
            assert_eq!(range(other), None, "{other}");
        }
    }
}
