//! A sandbox of a test, and streams of events.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    client::{self, Answer},
    fixture::{Fixture, JSON, Setup},
};

/// One server for all tests that want the usual one: a zygote takes seconds to warm.
pub(crate) struct Shared(MutexGuard<'static, Option<Fixture>>);

static SERVER: Mutex<Option<Fixture>> = Mutex::new(None);

/// The usual server; one test at a time.
pub(crate) fn shared() -> Shared {
    let mut server = SERVER.lock().unwrap_or_else(PoisonError::into_inner);
    server.get_or_insert_with(|| Setup { node: true, pool: 4, own_engine: true, ..Setup::default() }.start());
    Shared(server)
}

impl std::ops::Deref for Shared {
    type Target = Fixture;
    fn deref(&self) -> &Fixture {
        self.0.as_ref().unwrap()
    }
}

/// A sandbox that lives, until this is dropped.
pub(crate) struct Guest<'a> {
    pub(crate) fixture: &'a Fixture,
    pub(crate) id: String,
    key: Option<String>,
}

impl<'a> Guest<'a> {
    pub(crate) fn new(fixture: &'a Fixture) -> Guest<'a> {
        Guest::with(fixture, &json!({}))
    }

    pub(crate) fn with(fixture: &'a Fixture, body: &Value) -> Guest<'a> {
        Guest::of(fixture, body, None)
    }

    pub(crate) fn of(fixture: &'a Fixture, body: &Value, key: Option<&str>) -> Guest<'a> {
        let key = key.map(|token| format!("Authorization: Bearer {token}"));
        let headers: Vec<&str> = key.iter().map(String::as_str).collect();
        let answer = fixture.post("/v1/sandboxes", body, &headers);
        assert_eq!(answer.status, 201, "{}", answer.text());
        Guest { fixture, id: answer.json()["id"].as_str().unwrap().into(), key }
    }

    /// One that was made in another way.
    pub(crate) fn that_lives(fixture: &'a Fixture, id: &str) -> Guest<'a> {
        Guest { fixture, id: id.into(), key: None }
    }

    pub(crate) fn path(&self, rest: &str) -> String {
        format!("/v1/sandboxes/{}{rest}", self.id)
    }

    pub(crate) fn ask(&self, method: &str, rest: &str, headers: &[&str], body: &[u8]) -> Answer {
        let all: Vec<&str> = headers.iter().copied().chain(self.key.as_deref()).collect();
        client::exchange(self.fixture.address, &client::request(method, &self.path(rest), &all, body))
    }

    pub(crate) fn post(&self, rest: &str, body: &Value) -> Answer {
        self.ask("POST", rest, &[JSON], body.to_string().as_bytes())
    }

    pub(crate) fn get(&self, rest: &str) -> Answer {
        self.ask("GET", rest, &[], b"")
    }

    pub(crate) fn delete(&self, rest: &str) -> Answer {
        self.ask("DELETE", rest, &[], b"")
    }

    /// Something that must be answered with 200.
    pub(crate) fn ok(&self, rest: &str, body: &Value) -> Value {
        let answer = self.post(rest, body);
        assert_eq!(answer.status, 200, "{rest} {body}: {}", answer.text());
        answer.json()
    }

    pub(crate) fn run(&self, code: &str) -> Value {
        self.ok("/run", &json!({ "code": code }))
    }

    /// The value of a cell that must succeed.
    pub(crate) fn value(&self, code: &str) -> String {
        let answer = self.run(code);
        assert_eq!(answer["outcome"], "ok", "{code}: {answer}");
        answer["value"].as_str().unwrap_or_default().into()
    }

    pub(crate) fn shell(&self, line: &str) -> Value {
        self.ok("/commands", &json!({ "command": line }))
    }

    /// A command in the background.
    pub(crate) fn background(&self, body: Value) -> String {
        let mut body = body;
        body["background"] = json!(true);
        let answer = self.post("/commands", &body);
        assert_eq!(answer.status, 201, "{}", answer.text());
        answer.json()["id"].as_str().unwrap().into()
    }

    pub(crate) fn command(&self, id: &str) -> Value {
        self.get(&format!("/commands/{id}")).json()
    }

    /// A stream of events.
    pub(crate) fn stream(&self, method: &str, rest: &str, body: &Value) -> Events {
        let mut stream = client::connect(self.fixture.address);
        let headers: Vec<&str> = [JSON, "Accept: text/event-stream"].into_iter().chain(self.key.as_deref()).collect();
        let body = if method == "GET" { Vec::new() } else { body.to_string().into_bytes() };
        stream.write_all(&client::request(method, &self.path(rest), &headers, &body)).unwrap();
        Events::new(stream)
    }

    /// The status and code of something that is refused.
    pub(crate) fn refused(&self, answer: &Answer) -> (u16, String) {
        (answer.status, answer.json()["code"].as_str().unwrap_or_default().into())
    }

    pub(crate) fn is_usable(&self) {
        assert_eq!(self.value("20 + 22"), "42");
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        // Also of a test that failed: the next one looks at what lives.
        let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.delete("").status));
        let gone = status.is_ok_and(|status| [204, 404, 410].contains(&status));
        assert!(gone || std::thread::panicking(), "it did not end");
    }
}

#[derive(Debug, PartialEq)]
pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) id: Option<u64>,
    pub(crate) data: Value,
}

/// Events as they come.
pub(crate) struct Events {
    reader: BufReader<TcpStream>,
    text: String,
    over: bool,
}

impl Events {
    fn new(stream: TcpStream) -> Events {
        let mut reader = BufReader::new(stream);
        let head = client::read_head(&mut reader).unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        Events { reader, text: String::new(), over: false }
    }

    /// So that the test can wait in another way.
    pub(crate) fn patience(&self, most: Duration) {
        self.reader.get_ref().set_read_timeout(Some(most)).unwrap();
    }

    pub(crate) fn next(&mut self) -> Option<Event> {
        loop {
            while let Some((block, rest)) = self.text.split_once("\n\n").map(|(a, b)| (a.to_owned(), b.to_owned())) {
                self.text = rest;
                if block.starts_with(':') {
                    continue;
                }
                let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
                return Some(Event {
                    name: field("event: ").unwrap(),
                    id: field("id: ").map(|id| id.parse().unwrap()),
                    data: serde_json::from_str(&field("data: ").unwrap()).unwrap(),
                });
            }
            if self.over {
                return None;
            }
            let mut line = String::new();
            self.reader.read_line(&mut line).unwrap();
            let size = usize::from_str_radix(line.trim(), 16).unwrap();
            let mut chunk = vec![0; size + 2];
            self.reader.read_exact(&mut chunk).unwrap();
            self.over = size == 0;
            self.text += std::str::from_utf8(&chunk[..size]).unwrap();
        }
    }

    /// The next event of this name.
    pub(crate) fn next_of(&mut self, name: &str) -> Event {
        loop {
            let event = self.next().unwrap_or_else(|| panic!("the stream ended without {name}"));
            if event.name == name {
                return event;
            }
            assert_ne!(event.name, "failure", "{event:?}");
        }
    }

    /// What is written from here to the end, and the last event.
    pub(crate) fn rest(mut self) -> (String, Event) {
        let (mut text, mut last) = (String::new(), None);
        while let Some(event) = self.next() {
            if event.name == "stdout" {
                text += event.data["text"].as_str().unwrap();
            }
            last = Some(event);
        }
        (text, last.unwrap())
    }
}
