//! The request as the frames that go into the sandbox.

use std::{
    io,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use uuid::Uuid;
use zeroboot_proto::{FileChunk, Identity, Kind, MAX_PAYLOAD, encode};

use crate::{ExecRequest, Stdin};

/// A fresh identity.
pub(crate) fn identity(id: Uuid) -> io::Result<Identity> {
    let mut entropy = [0; 64];
    rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(io::Error::other)?;
    Ok(Identity { entropy, realtime_ns: now.as_nanos() as u64, sandbox_id: *id.as_bytes() })
}

/// The whole request as the frames that a sandbox takes, with a fresh identity.
pub fn request_frames(request: &ExecRequest, id: Uuid) -> io::Result<Vec<u8>> {
    let identity = identity(id)?;
    let limits = &request.limits;
    let nanos = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
    let limits = zeroboot_proto::Limits {
        wall_ns: nanos(limits.timeout),
        cpu_ns: nanos(limits.cpu.unwrap_or(limits.timeout)),
        memory: limits.memory,
        output: limits.output,
        file_size: limits.file_size,
        output_files: limits.output_files,
        processes: limits.processes,
        open_files: limits.open_files,
    };
    let mut out = Vec::with_capacity(request.code.len() + 1024);
    encode(&mut out, Kind::Limits, &limits.encode());
    encode(&mut out, Kind::Identity, &identity.encode());
    for (key, value) in &request.env {
        encode(&mut out, Kind::Env, format!("{key}\0{value}").as_bytes());
    }
    for arg in std::iter::once(&request.name).chain(&request.args) {
        encode(&mut out, Kind::Arg, arg.as_bytes());
    }
    for file in &request.files {
        let mode = if file.executable { 0o755 } else { 0o644 };
        let path = file.path.as_bytes();
        let mut append = false;
        let mut rest: &[u8] = &file.data;
        loop {
            let (data, after) = rest.split_at(rest.len().min(MAX_PAYLOAD - FileChunk::OVERHEAD - path.len()));
            encode(&mut out, Kind::Put, &FileChunk { path, data, mode, append, failed: false }.encode());
            (rest, append) = (after, true);
            if rest.is_empty() {
                break;
            }
        }
    }
    for path in &request.output_files {
        encode(&mut out, Kind::Get, path.as_bytes());
    }
    encode(&mut out, Kind::Code, &request.code);
    encode(&mut out, Kind::Run, &[]);
    match &request.stdin {
        Stdin::Empty => encode(&mut out, Kind::StdinEnd, &[]),
        Stdin::Bytes(bytes) => {
            if !bytes.is_empty() {
                encode(&mut out, Kind::Stdin, bytes);
            }
            encode(&mut out, Kind::StdinEnd, &[]);
        }
        Stdin::Stream => {}
    }
    Ok(out)
}
