//! Terminals over WebSockets: `…/commands/{run}/terminal`, and `…/terminal`, which starts a program first.
//!
//! ```text
//! server  {"started": {"id", "pid"}}                          text
//! both    what is typed, and what the terminal shows          binary
//! client  {"resize": {"columns", "rows"}} {"signal": "SIGINT"} text
//! server  {"lost": {"bytes"}} {"error": {"error", "code"}}    text
//! server  {"exit": {"outcome", "exit_code", …}}               text, the last
//! ```

use std::time::Duration;

use axum::{
    extract::Request,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use sha1::{Digest as _, Sha1};
use tokio::time::Instant;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error as SocketError, Message,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};
use zeroboot_engine::{Attached, Item, Run, RunError, RunEvent, RunKind, RunSpec, Size};

use super::{
    follow::{KillOnLeave, refusal},
    runs::command,
};
use crate::{
    call::Call,
    error::{About, ApiError},
    params::{InPath, InQuery, MOST_OFFSET},
    sandbox_answer::{LostBody, RunEndBody, StartedBody},
    sandbox_wire::{SignalName, SizeBody, shell},
    wire::{self, Object},
};

/// Interval between pings, and the longest silence of a client.
const PING: Duration = Duration::from_secs(30);
const SILENCE: Duration = Duration::from_secs(90);
/// Most bytes of one message.
const MOST_MESSAGE: usize = 256 * 1024;
/// The default program of a terminal.
const SHELL: &str = "command -v bash >/dev/null && exec bash; exec sh";

/// Follows a command that has a terminal.
pub(crate) async fn attach(
    call: Call,
    path: InPath,
    mut query: InQuery,
    request: Request,
) -> Result<Response, ApiError> {
    let offset = query.number("offset", 0..=MOST_OFFSET)?.unwrap_or(0);
    query.end()?;
    let run = command(&call.sandbox(&path)?, &path)?;
    if !run.status().is_some_and(|status| matches!(status.kind, RunKind::Command { terminal: true, .. })) {
        return Err(ApiError::of_run(RunError::NoTerminal, About::Command));
    }
    let (handshake, upgrade) = Handshake::of(request)?;
    let attached = run.attach(offset);
    let kill = KillOnLeave::new(&run, false);
    tokio::spawn(serve(call, Terminal { run, attached, kill }, upgrade));
    Ok(handshake.answer())
}

/// Starts a program on a terminal, and follows it.
pub(crate) async fn start(
    call: Call,
    path: InPath,
    mut query: InQuery,
    request: Request,
) -> Result<Response, ApiError> {
    let side = |name: &str, query: &mut InQuery, usual: u16| {
        let given = query.number(name, 1..=u16::MAX.into())?;
        Ok::<_, ApiError>(given.map_or(usual, |given| u16::try_from(given).unwrap_or(u16::MAX)))
    };
    let size = Size { columns: side("columns", &mut query, 80)?, rows: side("rows", &mut query, 24)? };
    let line = query.text("command")?.unwrap_or_else(|| SHELL.into());
    let (cwd, tag) = (query.text("cwd")?, query.text("tag")?);
    let end_with_client = query.flag("end_with_client")?;
    query.end()?;
    let sandbox = call.sandbox(&path)?;
    // Nothing is started for a request that is not one for a WebSocket.
    let (handshake, upgrade) = Handshake::of(request)?;
    let spec = RunSpec::Command {
        argv: shell(&line),
        env: Vec::new(),
        cwd,
        terminal: Some(size),
        stdin: true,
        timeout: None,
        tag,
    };
    let started = sandbox.start_attached(spec).await;
    let (run, attached) = started.map_err(|error| ApiError::of_run(error, About::Command))?;
    let kill = KillOnLeave::new(&run, end_with_client);
    tokio::spawn(serve(call, Terminal { run, attached, kill }, upgrade));
    Ok(handshake.answer())
}

/// The opening handshake of RFC 6455, section 4.2.
struct Handshake {
    accept: HeaderValue,
}

impl Handshake {
    fn of(mut request: Request) -> Result<(Handshake, OnUpgrade), ApiError> {
        let headers = request.headers();
        let has = |name: header::HeaderName, word: &str| {
            let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
            values.flat_map(|value| value.split(',')).any(|found| found.trim().eq_ignore_ascii_case(word))
        };
        let asks = has(header::CONNECTION, "upgrade")
            && has(header::UPGRADE, "websocket")
            && has(header::SEC_WEBSOCKET_VERSION, "13");
        let accept = accept_key(headers).filter(|_| asks);
        let upgrade = request.extensions_mut().remove::<OnUpgrade>();
        match (accept, upgrade) {
            (Some(accept), Some(upgrade)) => Ok((Handshake { accept }, upgrade)),
            _ => Err(ApiError::new(
                "not_a_websocket",
                "This path takes WebSocket requests only (version 13, over HTTP/1.1)",
            )),
        }
    }

    fn answer(self) -> Response {
        let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, self.accept);
        response
    }
}

fn accept_key(headers: &HeaderMap) -> Option<HeaderValue> {
    const MAGIC: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
    let key = headers.get(header::SEC_WEBSOCKET_KEY)?.as_bytes();
    STANDARD.decode(key).ok().filter(|nonce| nonce.len() == 16)?;
    let digest = Sha1::new().chain_update(key).chain_update(MAGIC).finalize();
    HeaderValue::from_str(&STANDARD.encode(digest)).ok()
}

struct Terminal {
    run: Run,
    attached: Attached,
    kill: KillOnLeave,
}

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// What a client says in a text: one of them.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    resize: Option<Object<SizeBody>>,
    signal: Option<SignalName>,
}

async fn serve(call: Call, terminal: Terminal, upgrade: OnUpgrade) {
    let Ok(upgraded) = upgrade.await else { return };
    let config = WebSocketConfig::default()
        .max_message_size(Some(MOST_MESSAGE))
        .max_frame_size(Some(MOST_MESSAGE))
        .max_write_buffer_size(4 * MOST_MESSAGE);
    let mut socket = Socket::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await;
    let Terminal { run, mut attached, kill } = terminal;
    match talk(&call, &mut socket, &run, &mut attached).await {
        Ok(code) => {
            if code == CloseCode::Normal {
                kill.ended();
            }
            let frame = CloseFrame { code, reason: "".into() };
            // The client may be gone already.
            socket.close(Some(frame)).await.unwrap_or_default();
        }
        Err(error) => tracing::debug!(request_id = %call.request_id(), %error, "a terminal's client is gone"),
    }
}

/// One message to the client.
async fn tell(socket: &mut Socket, name: &str, value: &impl Serialize) -> Result<(), SocketError> {
    let text = serde_json::json!({ name: value }).to_string();
    socket.send(Message::text(text)).await
}

/// Passes bytes on until the program ends or the client goes.
async fn talk(call: &Call, socket: &mut Socket, run: &Run, attached: &mut Attached) -> Result<CloseCode, SocketError> {
    let mut ping = tokio::time::interval_at(Instant::now() + PING, PING);
    let mut heard = Instant::now();
    // Input that the program has not taken: nothing more is read from the client, and output still comes.
    let mut input = std::pin::pin!(None::<futures_util::future::BoxFuture<'_, Result<(), RunError>>>);
    loop {
        let writing = input.is_some();
        tokio::select! {
            event = attached.next() => {
                let Some((_, event)) = event else { return Ok(CloseCode::Normal) };
                match event {
                    RunEvent::Started(pid) => tell(socket, "started", &StartedBody { id: run.id(), pid }).await?,
                    RunEvent::Item(Item::Stdout(bytes) | Item::Stderr(bytes)) => {
                        socket.send(Message::Binary(bytes)).await?;
                    }
                    RunEvent::Item(Item::Lost(bytes)) => tell(socket, "lost", &LostBody { bytes }).await?,
                    RunEvent::Item(Item::Result(_) | Item::Error(_)) => {}
                    RunEvent::End(end) => {
                        match refusal(&end, About::Command) {
                            Ok(()) => tell(socket, "exit", &RunEndBody::of(&end)).await?,
                            Err(error) => tell(socket, "error", &error.body(Some(call.request_id()))).await?,
                        }
                        return Ok(CloseCode::Normal);
                    }
                }
            }
            written = async { match input.as_mut().as_pin_mut() { Some(write) => write.await, None => Ok(()) } },
                if writing =>
            {
                input.set(None);
                if let Err(error) = written {
                    let error = ApiError::of_run(error, About::Command);
                    tell(socket, "error", &error.body(Some(call.request_id()))).await?;
                }
            }
            message = socket.next(), if !writing => {
                heard = Instant::now();
                match message {
                    None => return Ok(CloseCode::Away),
                    // It is read no further: the bytes are not a WebSocket's.
                    Some(Err(SocketError::Capacity(_))) => return Ok(CloseCode::Size),
                    Some(Err(SocketError::Protocol(_) | SocketError::Utf8(_))) => return Ok(CloseCode::Protocol),
                    Some(Err(error)) => return Err(error),
                    Some(Ok(Message::Close(_))) => return Ok(CloseCode::Away),
                    Some(Ok(Message::Binary(bytes))) => input.set(Some(Box::pin(write(run, bytes)))),
                    Some(Ok(Message::Text(text))) => {
                        if let Err(error) = obey(run, &text) {
                            tell(socket, "error", &error.body(Some(call.request_id()))).await?;
                        }
                    }
                    Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                }
            }
            _ = ping.tick() => {
                if !writing && heard.elapsed() >= SILENCE {
                    return Ok(CloseCode::Away);
                }
                socket.send(Message::Ping(Bytes::new())).await?;
            }
        }
    }
}

async fn write(run: &Run, bytes: Bytes) -> Result<(), RunError> {
    run.write(bytes).await
}

/// Does what a text asks for.
fn obey(run: &Run, text: &str) -> Result<(), ApiError> {
    let asked: Asked = wire::parse(text.as_bytes())?;
    let done = match (asked.resize, asked.signal) {
        (Some(Object(size)), None) => run.resize(size.into()),
        (None, Some(name)) => run.signal(name.number()?),
        _ => return Err(ApiError::new("invalid_request", "give either resize or signal")),
    };
    done.map_err(|error| ApiError::of_run(error, About::Command))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_handshake_is_that_of_the_rfc() {
        let mut headers = HeaderMap::new();
        headers.insert(header::SEC_WEBSOCKET_KEY, HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ=="));
        assert_eq!(accept_key(&headers).unwrap(), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        headers.insert(header::SEC_WEBSOCKET_KEY, HeaderValue::from_static("c2hvcnQ="));
        assert_eq!(accept_key(&headers), None);
    }
}
