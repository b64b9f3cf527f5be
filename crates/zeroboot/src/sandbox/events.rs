//! Event streams.

use std::time::Duration;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http_body_util::BodyExt;
use hyper::{Response, body::Incoming};
use serde_json::Value;
use tokio::time::timeout;

use super::client::{Client, Refused};
use crate::hint::hinted;

/// Timeout of a silent connection. The server sends something every 15 s.
const SILENCE: Duration = Duration::from_secs(60);
/// Most bytes of one event: a result of a cell is the largest.
const MAX_EVENT: usize = 256 << 20;

/// Something that happened in a run.
pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) fields: Value,
}

impl Event {
    /// The bytes of a `stdout` or `stderr` event.
    pub(crate) fn bytes(&self) -> anyhow::Result<Vec<u8>> {
        bytes_of(&self.fields)
    }

    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.fields.get(name).and_then(Value::as_str)
    }
}

/// The bytes of `{"text": ...}` or `{"base64": ...}`.
pub(crate) fn bytes_of(fields: &Value) -> anyhow::Result<Vec<u8>> {
    let text = |name: &str| fields.get(name).and_then(Value::as_str);
    match (text("text"), text("base64")) {
        (Some(text), _) => Ok(text.as_bytes().to_vec()),
        (None, Some(base64)) => BASE64_STANDARD.decode(base64).map_err(|_| broken("an event has bad base64")),
        (None, None) => Err(broken("an event has neither text nor base64")),
    }
}

/// An answer that is a stream of events.
pub(crate) struct Events<'a> {
    client: &'a Client,
    body: Incoming,
    parser: Parser,
    over: bool,
}

impl<'a> Events<'a> {
    pub(crate) fn new(client: &'a Client, answer: Response<Incoming>) -> Events<'a> {
        Events { client, body: answer.into_body(), parser: Parser::default(), over: false }
    }

    /// The next event; `None` when the stream has ended. Safe to cancel.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Option<Event>> {
        loop {
            if let Some(event) = self.parser.next()? {
                // The sandbox is gone, say. A cell's own error is an event like the others.
                if event.name == "failure" {
                    return Err(Refused::of(0, &event.fields).into());
                }
                return Ok(Some(event));
            }
            if self.over {
                return Ok(None);
            }
            match timeout(SILENCE, self.body.frame()).await {
                Err(_) => return Err(self.client.silent()),
                Ok(None) => self.over = true,
                Ok(Some(Err(error))) => return Err(self.client.broke(&error)),
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        self.parser.feed(&data)?;
                    }
                }
            }
        }
    }
}

/// An error for a stream that ended before what it tells of.
pub(crate) fn cut_off() -> anyhow::Error {
    hinted("the server's answer ended before the run did", "the server may have done what the request asked for")
}

fn broken(text: &str) -> anyhow::Error {
    hinted(
        format!("the server's answer is broken: {text}"),
        "check that the server is a Zeroboot of the same version as this command",
    )
}

/// Bytes in, events out.
#[derive(Default)]
struct Parser {
    /// From the beginning of an event on.
    held: Vec<u8>,
    /// Where a line may begin that was not looked at.
    line: usize,
    /// Up to where there is no end of a line behind `line`.
    seen: usize,
    name: String,
    data: String,
}

impl Parser {
    fn feed(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.held.drain(..self.line);
        self.seen -= self.line;
        self.line = 0;
        self.held.extend_from_slice(bytes);
        if self.held.len() + self.data.len() > MAX_EVENT { Err(broken("an event is too large")) } else { Ok(()) }
    }

    fn next(&mut self) -> anyhow::Result<Option<Event>> {
        loop {
            let rest = self.held.get(self.seen..).unwrap_or_default();
            let Some(at) = rest.iter().position(|byte| *byte == b'\n') else {
                self.seen = self.held.len();
                return Ok(None);
            };
            let end = self.seen + at;
            let line = self.held.get(self.line..end).unwrap_or_default();
            let line = String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(line)).into_owned();
            self.line = end + 1;
            self.seen = self.line;
            if line.is_empty() {
                let (name, data) = (std::mem::take(&mut self.name), std::mem::take(&mut self.data));
                if data.is_empty() {
                    continue;
                }
                let fields = serde_json::from_str(&data).map_err(|_| broken("an event is not JSON"))?;
                return Ok(Some(Event { name, fields }));
            }
            let (field, value) = line.split_once(':').unwrap_or((&line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "event" => self.name = value.to_owned(),
                "data" => {
                    if !self.data.is_empty() {
                        self.data.push('\n');
                    }
                    self.data.push_str(value);
                }
                // A comment that keeps the connection alive, an id, a time to retry.
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_whole_wherever_the_bytes_are_cut() {
        let raw = ": hello\n\nid: 3\nevent: stdout\ndata: {\"text\":\ndata: \"é\"}\n\r\nevent: end\r\ndata: {\"a\": 1}\r\n\r\n";
        for size in [1, 2, 7, 1000] {
            let mut parser = Parser::default();
            let mut found = Vec::new();
            for piece in raw.as_bytes().chunks(size) {
                parser.feed(piece).unwrap();
                while let Some(event) = parser.next().unwrap() {
                    found.push(event);
                }
            }
            let names: Vec<&str> = found.iter().map(|event| event.name.as_str()).collect();
            assert_eq!(names, ["stdout", "end"], "in pieces of {size}");
            assert_eq!(found[0].bytes().unwrap(), "é".as_bytes());
        }
    }

    #[test]
    fn an_event_that_is_no_json_is_an_error() {
        let mut parser = Parser::default();
        parser.feed(b"event: end\ndata: no\n\n").unwrap();
        assert!(parser.next().is_err());
        assert!(bytes_of(&serde_json::json!({"base64": "*"})).is_err());
        assert!(bytes_of(&serde_json::json!({})).is_err());
    }
}
