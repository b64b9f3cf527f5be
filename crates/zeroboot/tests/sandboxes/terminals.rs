//! Terminals over WebSockets.

use std::{
    io::Write as _,
    net::TcpStream,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::{Message, WebSocket, protocol::Role};

use crate::{
    client::{self, Answer},
    fixture::{patience, wait_for},
    guest::{Guest, shared},
};

const ASK: [&str; 4] = [
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
];

struct Terminal {
    socket: WebSocket<TcpStream>,
    shown: String,
    told: Vec<Value>,
}

impl Terminal {
    fn open(guest: &Guest<'_>, rest: &str) -> Terminal {
        let mut stream = client::connect(guest.fixture.address);
        stream.write_all(&client::request("GET", &guest.path(rest), &ASK, b"")).unwrap();
        // Byte by byte: what comes behind the head is the socket's.
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            let mut byte = [0];
            std::io::Read::read_exact(&mut stream, &mut byte).unwrap();
            head.push(char::from(byte[0]));
        }
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
        Terminal {
            socket: WebSocket::from_raw_socket(stream, Role::Client, None),
            shown: String::new(),
            told: Vec::new(),
        }
    }

    fn typed(&mut self, text: &str) {
        self.socket.send(Message::binary(text.as_bytes().to_vec())).unwrap();
    }

    fn say(&mut self, value: &Value) {
        self.socket.send(Message::text(value.to_string())).unwrap();
    }

    /// Takes one message; `false` after the last.
    fn take(&mut self) -> bool {
        match self.socket.read() {
            Ok(Message::Binary(bytes)) => self.shown += &String::from_utf8_lossy(&bytes),
            Ok(Message::Text(text)) => self.told.push(serde_json::from_str(&text).unwrap()),
            Ok(Message::Close(_)) | Err(_) => return false,
            Ok(_) => {}
        }
        true
    }

    /// Reads until this was shown since the last time.
    fn until(&mut self, text: &str) {
        while !self.shown.contains(text) {
            assert!(self.take(), "no {text:?} in {:?}", self.shown);
        }
        let at = self.shown.find(text).unwrap() + text.len();
        self.shown.drain(..at);
    }

    fn told(&mut self, name: &str) -> Value {
        loop {
            if let Some(at) = self.told.iter().position(|value| value.get(name).is_some()) {
                return self.told.remove(at)[name].take();
            }
            assert!(self.take(), "{name} was not told");
        }
    }
}

#[test]
fn a_terminal_echoes_has_a_size_takes_control_c_and_ends_with_its_program() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let mut terminal = Terminal::open(&guest, "/terminal?columns=100&rows=30&command=exec%20sh&tag=shell");
    let started = terminal.told("started");
    assert!(started["pid"].as_u64().unwrap() > 1);
    terminal.typed("stty size; test -t 0 && echo is-a-tty\n");
    terminal.until("30 100");
    terminal.until("is-a-tty");
    terminal.say(&json!({"resize": {"columns": 61, "rows": 17}}));
    terminal.typed("stty size\n");
    terminal.until("17 61");
    terminal.typed("sleep 600; echo go''ne-on\n");
    std::thread::sleep(patience(Duration::from_millis(200)));
    terminal.typed("\u{3}");
    terminal.typed("echo af''ter\n");
    terminal.until("after");
    terminal.typed("exit 3\n");
    let end = terminal.told("exit");
    assert_eq!((&end["exit_code"], &end["outcome"]), (&json!(3), &json!("exited")), "{end}");
    while terminal.take() {}
    assert_eq!(guest.command(started["id"].as_str().unwrap())["state"], "ended");
}

#[test]
fn a_terminal_is_left_and_taken_up_again() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let mut terminal = Terminal::open(&guest, "/terminal?command=exec%20sh");
    let id = terminal.told("started")["id"].as_str().unwrap().to_owned();
    terminal.typed("marker=kept\n");
    terminal.until("marker=kept");
    drop(terminal);
    let mut again = Terminal::open(&guest, &format!("/commands/{id}/terminal"));
    again.until("marker=kept");
    again.typed("echo $marker-$marker\n");
    again.until("kept-kept");
    again.say(&json!({"signal": "SIGKILL"}));
    assert_eq!(again.told("exit")["signal"], 9);
}

#[test]
fn a_terminal_can_end_with_its_client() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let mut terminal = Terminal::open(&guest, "/terminal?command=exec%20sleep%20600&end_with_client=true");
    let id = terminal.told("started")["id"].as_str().unwrap().to_owned();
    drop(terminal);
    wait_for("its end", patience(Duration::from_secs(5)), || guest.command(&id)["state"] == "ended");
}

#[test]
fn garbage_is_answered_by_an_error_and_the_sandbox_goes_on() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let mut terminal = Terminal::open(&guest, "/terminal?command=exec%20cat");
    terminal.told("started");
    for (text, code) in [
        ("no json", "invalid_json"),
        ("{}", "invalid_request"),
        ("[]", "invalid_request"),
        ("{\"resize\": {\"columns\": 0, \"rows\": 0}}", "invalid_request"),
        ("{\"resize\": {\"columns\": 99999999, \"rows\": 1}}", "invalid_request"),
        ("{\"signal\": 99}", "invalid_request"),
        ("{\"signal\": \"KILL\", \"resize\": {}}", "invalid_request"),
    ] {
        terminal.socket.send(Message::text(text)).unwrap();
        assert_eq!(terminal.told("error")["code"], code, "{text}");
    }
    terminal.typed("still here\n");
    terminal.until("still here");
    // Bytes that are no frame at all end the connection, and only that.
    terminal.socket.get_mut().write_all(&[0xff; 64]).unwrap();
    let begun = Instant::now();
    while terminal.take() {
        assert!(begun.elapsed() < patience(Duration::from_secs(10)));
    }
    guest.is_usable();
}

#[test]
fn a_request_that_is_none_for_a_websocket_starts_nothing() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let refused = |answer: &Answer| guest.refused(answer);
    assert_eq!(refused(&guest.get("/terminal")), (400, "not_a_websocket".into()));
    let old =
        guest.ask("GET", "/terminal", &["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 8"], b"");
    assert_eq!(refused(&old), (400, "not_a_websocket".into()));
    let zero = guest.ask("GET", "/terminal?columns=0&rows=0", &ASK, b"");
    assert_eq!(refused(&zero), (400, "invalid_request".into()));
    let piped = guest.background(json!({"argv": ["sleep", "600"]}));
    let without = guest.ask("GET", &format!("/commands/{piped}/terminal"), &ASK, b"");
    assert_eq!(refused(&without), (409, "no_terminal".into()));
    assert_eq!(guest.get("/commands").json()["commands"].as_array().unwrap().len(), 1);
}

#[test]
fn a_terminal_hears_that_its_sandbox_has_ended() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let mut terminal = Terminal::open(&guest, "/terminal?command=exec%20cat");
    terminal.told("started");
    assert_eq!(guest.delete("").status, 204);
    let error = terminal.told("error");
    assert_eq!((&error["code"], &error["reason"]), (&json!("sandbox_gone"), &json!("requested")), "{error}");
}
