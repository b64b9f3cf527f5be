//! The sandbox service's plain HTTP: files up and down, health, environment.

use std::io::Write as _;

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use flate2::write::GzDecoder;
use futures_util::stream::try_unfold;
use serde::Serialize;
use zeroboot_engine::{FileWriter, Item, RunEvent, RunSpec, Sandbox};

use super::{
    Target, check_basic_user, check_user,
    filesystem::{name, of_file, path, shown},
};
use crate::{
    body::next_bytes,
    call::Call,
    error::{About, ApiError},
    params::InQuery,
    routes::files::bytes_of,
};

/// Compressed bytes that are unpacked at once: they can become a thousand times as many.
const AT_ONCE: usize = 4096;
/// Most files of one request.
const MOST_FILES: usize = 1000;

pub(crate) async fn health(_call: Call) -> StatusCode {
    StatusCode::NO_CONTENT
}

pub(crate) async fn metrics(_call: Call) -> ApiError {
    ApiError::new("not_supported", "What a sandbox uses is not measured")
}

/// The environment of a program in the sandbox.
pub(crate) async fn envs(call: Call, Target(sandbox): Target) -> Result<Response, ApiError> {
    let spec = RunSpec::Command {
        argv: vec!["env".into(), "-0".into()],
        env: Vec::new(),
        cwd: None,
        terminal: None,
        stdin: false,
        timeout: Some(std::time::Duration::from_secs(10)),
        tag: None,
    };
    let failed = |error| ApiError::of_run(error, About::Command);
    let (run, mut attached) = sandbox.start_attached(spec).await.map_err(failed)?;
    let mut text = Vec::new();
    while let Some((_, event)) = attached.next().await {
        match event {
            RunEvent::Item(Item::Stdout(bytes)) => {
                call.share.grow(bytes.len() as u64).map_err(crate::budget::Full::busy)?;
                text.extend_from_slice(&bytes);
            }
            RunEvent::End(end) => crate::routes::follow::refusal(&end, About::Command)?,
            _ => {}
        }
    }
    drop(attached);
    run.forget();
    let text = String::from_utf8_lossy(&text);
    let all: std::collections::BTreeMap<&str, &str> =
        text.split('\0').filter_map(|pair| pair.split_once('=')).collect();
    call.json(StatusCode::OK, &all)
}

/// What stands in the query of a request about a file. The signature was checked before.
fn file_query(mut query: InQuery) -> Result<Option<String>, ApiError> {
    let path = query.text("path")?;
    check_user(&query.text("username")?.unwrap_or_default())?;
    query.text("signature")?;
    query.text("signature_expiration")?;
    query.end()?;
    Ok(path)
}

pub(crate) async fn read(
    call: Call,
    Target(sandbox): Target,
    query: InQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    check_basic_user(&headers)?;
    let asked = file_query(query)?.unwrap_or_default();
    let (entry, reader) = sandbox.read(path(&asked), 0, u64::MAX).await.map_err(of_file)?;
    // A file that has no size can still have bytes: those of /proc.
    let sized = entry.size > 0;
    let mut response = Body::from_stream(bytes_of(call, reader, sized.then_some(entry.size))).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    if sized {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(entry.size));
    }
    Ok(response)
}

/// A file that was written.
#[derive(Serialize)]
struct Written {
    path: String,
    name: String,
    r#type: &'static str,
}

/// A file on its way.
struct Upload {
    writer: FileWriter,
}

impl Upload {
    async fn begin(sandbox: &Sandbox, asked: &str) -> Result<Upload, ApiError> {
        Ok(Upload { writer: sandbox.write(path(asked), None).await.map_err(of_file)? })
    }

    async fn write(&mut self, bytes: Bytes) -> Result<(), ApiError> {
        self.writer.write(bytes).await.map_err(of_file)
    }

    async fn finish(self) -> Result<Written, ApiError> {
        let entry = self.writer.finish().await.map_err(of_file)?;
        let path = shown(&entry.path);
        Ok(Written { name: name(&path), path, r#type: "file" })
    }
}

/// A request's body, unpacked if it is packed.
struct Pieces {
    body: Body,
    unpack: Option<GzDecoder<Vec<u8>>>,
    /// Packed bytes that have not been unpacked.
    packed: Bytes,
}

impl Pieces {
    fn new(headers: &HeaderMap, body: Body) -> Result<Pieces, ApiError> {
        let coding = headers.get(header::CONTENT_ENCODING).map(|value| value.to_str().unwrap_or_default());
        let unpack = match coding {
            None | Some("identity") => None,
            Some("gzip") => Some(GzDecoder::new(Vec::new())),
            Some(_) => {
                return Err(ApiError::new("unsupported_media_type", "Content-Encoding must be gzip or identity"));
            }
        };
        Ok(Pieces { body, unpack, packed: Bytes::new() })
    }

    async fn next(&mut self, call: &Call) -> Result<Option<Bytes>, ApiError> {
        let broken = |_: std::io::Error| ApiError::new("invalid_request", "The body is not gzip, or not whole");
        loop {
            let Some(unpack) = &mut self.unpack else { return next_bytes(&mut self.body, call.limits()).await };
            if self.packed.is_empty() {
                match next_bytes(&mut self.body, call.limits()).await? {
                    Some(piece) => self.packed = piece,
                    None => {
                        let Some(unpack) = self.unpack.take() else { return Ok(None) };
                        let rest = unpack.finish().map_err(broken)?;
                        return Ok((!rest.is_empty()).then(|| rest.into()));
                    }
                }
            }
            let some = self.packed.split_to(AT_ONCE.min(self.packed.len()));
            unpack.write_all(&some).map_err(broken)?;
            let unpacked = std::mem::take(unpack.get_mut());
            if !unpacked.is_empty() {
                return Ok(Some(unpacked.into()));
            }
        }
    }
}

pub(crate) async fn write(
    call: Call,
    Target(sandbox): Target,
    query: InQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    check_basic_user(&headers)?;
    if headers.keys().any(|name| name.as_str().starts_with("x-metadata-")) {
        return Err(ApiError::new("not_supported", "Files have no metadata"));
    }
    let asked = file_query(query)?;
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let pieces = Pieces::new(&headers, body)?;
    let written = match multer::parse_boundary(kind) {
        Ok(boundary) => parts(&call, &sandbox, asked, pieces, boundary).await?,
        Err(_) if kind.split(';').next().is_some_and(|kind| kind.trim() == "application/octet-stream") => {
            let asked = asked.ok_or_else(|| ApiError::new("invalid_request", "path is missing in the query"))?;
            vec![whole(&call, &sandbox, &asked, pieces).await?]
        }
        Err(_) => {
            let text = "The body must be multipart/form-data or application/octet-stream";
            return Err(ApiError::new("unsupported_media_type", text));
        }
    };
    call.json(StatusCode::OK, &written)
}

async fn whole(call: &Call, sandbox: &Sandbox, asked: &str, mut pieces: Pieces) -> Result<Written, ApiError> {
    let mut upload = Upload::begin(sandbox, asked).await?;
    while let Some(piece) = pieces.next(call).await? {
        upload.write(piece).await?;
    }
    upload.finish().await
}

/// Files of a form. Each field is one; its file name is its path unless the query names one.
async fn parts(
    call: &Call,
    sandbox: &Sandbox,
    asked: Option<String>,
    pieces: Pieces,
    boundary: String,
) -> Result<Vec<Written>, ApiError> {
    let stream = try_unfold(pieces, move |mut pieces: Pieces| async move {
        let piece = pieces.next(call).await.map_err(Refused)?;
        Ok::<_, Refused>(piece.map(|piece| (piece, pieces)))
    });
    let mut form = multer::Multipart::new(Box::pin(stream), boundary);
    let mut written = Vec::new();
    while let Some(mut field) = form.next_field().await.map_err(broken)? {
        if field.name() != Some("file") {
            continue;
        }
        let path = asked.as_deref().or(field.file_name()).map(str::to_owned);
        let path = path.ok_or_else(|| ApiError::new("invalid_request", "a file of the form has no name"))?;
        if written.len() >= MOST_FILES || (asked.is_some() && !written.is_empty()) {
            return Err(ApiError::new("invalid_request", "the form has more files than one request may have"));
        }
        let mut upload = Upload::begin(sandbox, &path).await?;
        while let Some(piece) = field.chunk().await.map_err(broken)? {
            upload.write(piece).await?;
        }
        written.push(upload.finish().await?);
    }
    Ok(written)
}

/// An error of ours on its way through the form's reader.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.message)]
struct Refused(ApiError);

fn broken(error: multer::Error) -> ApiError {
    if let multer::Error::StreamReadFailed(source) = error {
        return match source.downcast::<Refused>() {
            Ok(refused) => refused.0,
            Err(_) => ApiError::internal(),
        };
    }
    ApiError::new("invalid_request", format!("The form is malformed: {error}"))
}
