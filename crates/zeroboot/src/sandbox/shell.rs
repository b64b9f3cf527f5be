//! `zeroboot sandbox shell`: a terminal.

use anyhow::Context;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures_util::{SinkExt, StreamExt, stream::SplitSink, stream::SplitStream};
use hyper::{Method, Response, StatusCode, body::Incoming, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use rustix::{stdio::stdin, termios::isatty};
use serde_json::{Value, json};
use sha1::{Digest, Sha1};
use tokio::signal::unix::{SignalKind, signal as listen};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Error, Message, protocol::Role},
};

use super::{
    args::ShellArgs,
    client::{Client, PATIENCE, Refused, empty, path, query},
    exec::status,
};
use crate::{
    hint::hinted,
    printer,
    run::read_stdin,
    terminal::{Raw, Signals, size},
};

pub(crate) type Socket = WebSocketStream<TokioIo<Upgraded>>;

pub(super) async fn shell(client: &Client, args: &ShellArgs) -> anyhow::Result<u8> {
    if !isatty(stdin()) {
        return Err(hinted(
            "standard input is not a terminal",
            "use `zeroboot sandbox exec ID -- sh`, which reads from a pipe or a file",
        ));
    }
    let (columns, rows) = size();
    let (columns, rows) = (columns.to_string(), rows.to_string());
    let mut pairs = vec![("columns", columns.as_str()), ("rows", rows.as_str()), ("end_with_client", "true")];
    pairs.extend(args.command.as_deref().map(|command| ("command", command)));
    pairs.extend(args.cwd.as_deref().map(|cwd| ("cwd", cwd)));
    let socket = open(client, &query(&path(&args.id, &["terminal"]), &pairs)).await?;
    let (sink, stream) = socket.split();
    let mut signals = Signals::new()?;
    // From here on no message is ours to print before it is dropped.
    let raw = Raw::new()?;
    let mut follow = std::pin::pin!(follow(stream));
    let mut feed = std::pin::pin!(feed(sink));
    let mut feeding = true;
    loop {
        tokio::select! {
            biased;
            status = &mut follow => return status,
            // What cannot be sent is no failure yet: the end may be on its way to us.
            () = &mut feed, if feeding => feeding = false,
            _ = signals.resume.recv() => raw.set()?,
            _ = signals.interrupt.recv() => return Ok(130),
            _ = signals.terminate.recv() => return Ok(143),
            _ = signals.hangup.recv() => return Ok(129),
        }
    }
}

/// Asks for the WebSocket (RFC 6455, section 4).
pub(crate) async fn open(client: &Client, to: &str) -> anyhow::Result<Socket> {
    let mut nonce = [0; 16];
    getrandom::fill(&mut nonce).context("draw a random number")?;
    let key = BASE64_STANDARD.encode(nonce);
    let accept = BASE64_STANDARD.encode(Sha1::digest(format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11")));
    let headers = [
        ("connection", "Upgrade".to_owned()),
        ("upgrade", "websocket".to_owned()),
        ("sec-websocket-version", "13".to_owned()),
        ("sec-websocket-key", key),
    ];
    let answer = client.send(Method::GET, to, &headers, empty(), Some(PATIENCE)).await?;
    let answer = client.good(answer).await?;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS || accepted(&answer) != Some(&accept) {
        return Err(hinted(
            "the server gave no terminal",
            "check that the server is a Zeroboot, and that a proxy before it passes WebSockets on",
        ));
    }
    let upgraded = hyper::upgrade::on(answer).await.context("take the connection over")?;
    Ok(WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, None).await)
}

fn accepted(answer: &Response<Incoming>) -> Option<&str> {
    answer.headers().get("sec-websocket-accept")?.to_str().ok()
}

/// Prints what the terminal shows; gives the exit status of its program.
async fn follow(mut stream: SplitStream<Socket>) -> anyhow::Result<u8> {
    let (mut exit, mut failed) = (None, None);
    loop {
        match stream.next().await {
            Some(Ok(Message::Binary(bytes))) => printer::stdout(&bytes)?,
            Some(Ok(Message::Text(text))) => {
                let word: Value = serde_json::from_str(&text).unwrap_or_default();
                if let Some(end) = word.get("exit") {
                    exit = Some(status(end));
                } else if let Some(error) = word.get("error") {
                    // What matters of it is seen at the end: the program may go on.
                    failed = Some(anyhow::Error::from(Refused::of(0, error)));
                }
            }
            Some(Ok(_)) => {}
            Some(Err(Error::ConnectionClosed | Error::AlreadyClosed)) | None => {
                return exit.ok_or_else(|| failed.unwrap_or_else(|| broke("the server closed it")));
            }
            Some(Err(error)) => return exit.ok_or_else(|| failed.unwrap_or_else(|| broke(&error.to_string()))),
        }
    }
}

/// Sends what is typed, and each new size, until the other side takes no more.
async fn feed(mut sink: SplitSink<Socket, Message>) {
    let mut typed = read_stdin();
    let Ok(mut resized) = listen(SignalKind::window_change()) else { return };
    loop {
        let message = tokio::select! {
            chunk = typed.recv() => match chunk {
                Some(chunk) => Message::Binary(chunk),
                // Our own terminal was hung up.
                None => Message::Close(None),
            },
            _ = resized.recv() => {
                let (columns, rows) = size();
                Message::text(json!({ "resize": { "columns": columns, "rows": rows } }).to_string())
            }
        };
        let last = message.is_close();
        if sink.send(message).await.is_err() || last {
            return;
        }
    }
}

fn broke(why: &str) -> anyhow::Error {
    hinted(format!("the terminal broke: {why}"), "`zeroboot sandbox show ID` says whether the sandbox still runs")
}
