//! The Model Context Protocol as a client speaks it: `zeroboot mcp` over its standard streams, and `/mcp` of a server.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use self::harness::{Who, address_of, python};

#[path = "harness/lib.rs"]
#[expect(dead_code, reason = "shared with other test files")]
mod harness;

const PATIENCE: Duration = Duration::from_secs(60);
const INITIALIZE: &str =
    r#"{"protocolVersion":"2025-06-18","capabilities":{},"clientInfo":{"name":"test","version":"1"}}"#;

fn zeroboot() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_zeroboot"));
    let names = [
        "ZEROBOOT_CONFIG",
        "ZEROBOOT_ENGINE",
        "ZEROBOOT_API_KEYS_FILE",
        "ZEROBOOT_BASE_URL",
        "ZEROBOOT_API_KEY",
        "ZEROBOOT_LOG",
    ];
    names.iter().for_each(|name| {
        command.env_remove(name);
    });
    command
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "no {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A client that talks to a `zeroboot mcp` of its own.
struct Client {
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
    next: u64,
    /// Notifications that came meanwhile.
    heard: Vec<Value>,
}

impl Client {
    fn start(temporary: &Path, args: &[&str]) -> Client {
        let mut command = zeroboot();
        command.arg("mcp").args(args).env("TMPDIR", temporary);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (to, from) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        let mut client = Client { child, to, from, next: 0, heard: Vec::new() };
        let told = client.ask("initialize", serde_json::from_str(INITIALIZE).unwrap());
        assert_eq!(told["result"]["serverInfo"]["name"], "zeroboot", "{told}");
        client.tell("notifications/initialized", &json!({}));
        client
    }

    /// With a server of its own.
    fn alone(temporary: &Path) -> Client {
        Client::start(temporary, &["--", "--engine", "process", "--pool", "2", "--python", python(Who::Me)])
    }

    fn write(&mut self, message: &Value) {
        writeln!(self.to.as_mut().unwrap(), "{message}").unwrap();
    }

    fn tell(&mut self, method: &str, params: &Value) {
        self.write(&json!({"jsonrpc": "2.0", "method": method, "params": params}));
    }

    fn send(&mut self, method: &str, params: Value) -> u64 {
        self.next += 1;
        self.write(&json!({"jsonrpc": "2.0", "id": self.next, "method": method, "params": params}));
        self.next
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        assert!(self.from.read_line(&mut line).unwrap() > 0, "it ended");
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("not MCP: {line}"))
    }

    fn ask(&mut self, method: &str, params: Value) -> Value {
        let id = self.send(method, params);
        loop {
            let message = self.read();
            if message["id"] == id {
                return message;
            }
            self.heard.push(message);
        }
    }

    /// The result of a tool.
    fn call(&mut self, tool: &str, arguments: Value) -> Value {
        let answer = self.ask("tools/call", json!({"name": tool, "arguments": arguments}));
        assert!(answer["result"].is_object(), "{answer}");
        answer["result"].clone()
    }

    /// The same of one that succeeds: its structured content.
    fn good(&mut self, tool: &str, arguments: Value) -> Value {
        let result = self.call(tool, arguments);
        assert_eq!(result["isError"], false, "{result}");
        result["structuredContent"].clone()
    }

    /// Leaves; everything of it ends.
    fn leave(mut self) {
        self.to = None;
        assert!(self.child.wait().unwrap().success());
    }
}

#[test]
fn an_agent_runs_code_keeps_state_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut client = Client::alone(folder.path());

    let tools = client.ask("tools/list", json!({}))["result"]["tools"].clone();
    let names: Vec<&str> = tools.as_array().unwrap().iter().map(|tool| tool["name"].as_str().unwrap()).collect();
    let expected = [
        "create_sandbox",
        "exec",
        "fork_sandbox",
        "kill_sandbox",
        "read_file",
        "run_code",
        "run_parallel",
        "write_file",
    ];
    assert_eq!(names.len(), expected.len(), "{names:?}");
    assert!(expected.iter().all(|name| names.contains(name)), "{names:?}");
    for tool in tools.as_array().unwrap() {
        assert!(
            tool["annotations"]["readOnlyHint"].is_boolean() && tool["inputSchema"]["properties"].is_object(),
            "{tool}"
        );
        // Some models take neither a list of types nor a default of another type.
        assert!(!tool["inputSchema"].to_string().contains("null"), "{tool}");
    }

    // A fresh sandbox for each call: output, the last value, an error, and nothing kept.
    let result = client.call("run_code", json!({"code": "x = 6 * 7\nprint('hello')\nx"}));
    assert_eq!(result["content"][0], json!({"type": "text", "text": "hello\n"}));
    assert_eq!(result["structuredContent"]["value"], "42", "{result}");
    let result = client.call("run_code", json!({"code": "print(x)"}));
    assert_eq!(
        (&result["isError"], &result["structuredContent"]["error"]["name"]),
        (&json!(true), &json!("NameError"))
    );
    assert_eq!(
        client.good("run_code", json!({"code": "[1, 2].map(n => n * 21)[1]", "language": "javascript"}))["value"],
        "42"
    );
    let shell = client.call("run_code", json!({"code": "echo out; echo err >&2; exit 3", "language": "bash"}));
    assert_eq!((&shell["isError"], &shell["structuredContent"]["exit_code"]), (&json!(true), &json!(3)));
    assert_eq!(shell["structuredContent"]["stderr"], "err\n");

    // One that lives.
    let made = client.good("create_sandbox", json!({"env": {"WHO": "me"}}));
    let id = made["sandbox_id"].as_str().unwrap().to_owned();
    client.good("run_code", json!({"code": "x = 41", "sandbox_id": id}));
    assert_eq!(client.good("run_code", json!({"code": "x + 1", "sandbox_id": id}))["value"], "42");
    client.good("write_file", json!({"sandbox_id": id, "path": "a/b.txt", "content": "some text"}));
    let there = client.good("exec", json!({"sandbox_id": id, "command": "cat a/b.txt; echo $WHO"}));
    assert_eq!(there["stdout"], "some textme\n");
    let read = client.good("read_file", json!({"sandbox_id": id, "path": "a/b.txt", "offset": 5, "max_bytes": 3}));
    assert_eq!((&read["text"], &read["whole"]), (&json!("tex"), &json!(false)));
    let listed = client.ask("resources/list", json!({}))["result"]["resources"].clone();
    let uri = listed
        .as_array()
        .unwrap()
        .iter()
        .find_map(|one| one["uri"].as_str().filter(|uri| uri.ends_with("/a/b.txt")).map(str::to_owned));
    let uri = uri.unwrap_or_else(|| panic!("{listed}"));
    assert_eq!(client.ask("resources/read", json!({"uri": uri}))["result"]["contents"][0]["text"], "some text");

    // What comes is capped, and says so.
    let long = client.good("run_code", json!({"code": "print('y' * 1_000_000)", "sandbox_id": id}));
    assert!(long["stdout"].as_str().unwrap().len() < 30_000 && long["cut"]["stdout_bytes"].as_u64().unwrap() > 900_000);

    // Several at once, each for itself.
    let programs = json!([{"label": "a", "code": "print(1)"}, {"code": "print(2)"}, {"code": "1/0"}]);
    let many = client.good("run_parallel", json!({"programs": programs}));
    let outcomes: Vec<(&Value, &Value)> =
        many["results"].as_array().unwrap().iter().map(|one| (&one["label"], &one["stdout"])).collect();
    assert_eq!(outcomes[..2], [(&json!("a"), &json!("1\n")), (&json!("program 2"), &json!("2\n"))], "{many}");
    assert_eq!(many["results"][2]["exit_code"], 1);

    // These are sandboxes of processes.
    let fork = client.call("fork_sandbox", json!({"sandbox_id": id, "count": 2}));
    assert_eq!(
        (&fork["isError"], &fork["structuredContent"]["code"]),
        (&json!(true), &json!("needs_vm_engine")),
        "{fork}"
    );

    // Errors say what to do.
    let gone = client.call("exec", json!({"sandbox_id": "../x", "command": "true"}));
    assert_eq!(gone["isError"], true);
    let failure = &gone["structuredContent"];
    assert!(
        failure["code"].is_string() && failure["cause"].is_string() && failure["remediation"].is_string(),
        "{gone}"
    );
    client.good("kill_sandbox", json!({"sandbox_id": id}));
    let gone = client.call("run_code", json!({"code": "1", "sandbox_id": id}));
    assert_eq!(gone["structuredContent"]["code"], "sandbox_gone", "{gone}");
    let wrong = client.ask("tools/call", json!({"name": "run_code", "arguments": {"cod": "1"}}));
    assert!(
        wrong["error"]["message"].as_str().is_some_and(|text| text.contains("cod"))
            || wrong["result"]["isError"] == true,
        "{wrong}"
    );
    let both = client.call("write_file", json!({"sandbox_id": id, "path": "x"}));
    assert_eq!(both["structuredContent"]["code"], "invalid_request");

    client.leave();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "something is left");
}

#[test]
fn a_figure_is_an_image() {
    let folder = tempfile::tempdir().unwrap();
    let there = Command::new(python(Who::Me)).args(["-c", "import matplotlib, IPython"]).stderr(Stdio::null()).status();
    if !there.unwrap().success() {
        return; // The test command's Python has both.
    }
    let mut client = Client::alone(folder.path());
    let code = "import matplotlib.pyplot as plt\nplt.plot([1, 2, 4])\nplt.show()";
    let result = client.call("run_code", json!({"code": code, "timeout_seconds": 120}));
    let image = result["content"].as_array().unwrap().iter().find(|block| block["type"] == "image");
    let image = image.unwrap_or_else(|| panic!("{result}"));
    assert!(image["mimeType"] == "image/png" && image["data"].as_str().unwrap().starts_with("iVBOR"));
    client.leave();
}

/// A server with a key, ended when this is dropped.
struct Served {
    child: Child,
    address: String,
    key: String,
    _folder: tempfile::TempDir,
}

impl Served {
    fn start() -> Served {
        let folder = tempfile::tempdir().unwrap();
        let keys = folder.path().join("keys.toml");
        let made = zeroboot().args(["keys", "create", "--keys-file"]).arg(&keys).arg("tests").output().unwrap();
        let key = String::from_utf8(made.stdout).unwrap().trim().to_owned();
        let mut command = zeroboot();
        command.args(["serve", "--listen", "127.0.0.1:0", "--pool", "2", "--engine", "process", "--warm", "json"]);
        command.args(["--python", python(Who::Me), "--keys-file"]).arg(&keys);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let address = address_of(&mut child);
        Served { child, address, key, _folder: folder }
    }

    /// One request on a connection of its own: status, head and body.
    fn request(&self, method: &str, path: &str, headers: &[String], body: &str) -> (u16, String, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Accept: application/json, text/event-stream\r\n{headers}Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), head.to_ascii_lowercase(), body.to_owned())
    }

    fn authorization(&self) -> String {
        format!("Authorization: Bearer {}", self.key)
    }

    /// Ids of the sandboxes that the key has.
    fn sandboxes(&self) -> Vec<Value> {
        let (status, _, body) = self.request("GET", "/v1/sandboxes", &[self.authorization()], "");
        assert_eq!(status, 200, "{body}");
        let at = body.find('{').unwrap();
        let body: Value = serde_json::Deserializer::from_str(&body[at..]).into_iter().next().unwrap().unwrap();
        body["sandboxes"].as_array().unwrap().clone()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        Command::new("kill").arg(self.child.id().to_string()).status().unwrap();
        self.child.wait().unwrap();
    }
}

/// The message of an answer, which is an event stream.
fn message(body: &str) -> Value {
    let data = body.lines().filter_map(|line| line.strip_prefix("data:")).map(str::trim);
    let found = data.filter_map(|line| serde_json::from_str::<Value>(line).ok()).find(|value| value["id"].is_number());
    found.unwrap_or_else(|| panic!("no answer: {body}"))
}

#[test]
fn a_cancelled_call_ends_its_sandbox_and_progress_is_told() {
    let served = Served::start();
    let folder = tempfile::tempdir().unwrap();
    let url = format!("http://{}", served.address);
    let mut command = zeroboot();
    command.args(["mcp", "--base-url", &url]).env("ZEROBOOT_API_KEY", &served.key).env("TMPDIR", folder.path());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (to, from) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
    let mut client = Client { child, to, from, next: 0, heard: Vec::new() };
    client.ask("initialize", serde_json::from_str(INITIALIZE).unwrap());
    client.tell("notifications/initialized", &json!({}));
    let call = json!({
        "name": "run_code", "arguments": {"code": "import time; time.sleep(500)", "timeout_seconds": 200},
        "_meta": {"progressToken": "p"},
    });
    let id = client.send("tools/call", call);
    let told = client.read();
    assert_eq!(
        (&told["method"], &told["params"]["progressToken"]),
        (&json!("notifications/progress"), &json!("p")),
        "{told}"
    );
    // The template may still be warming.
    wait_for("its sandbox", || served.sandboxes().len() == 1);
    client.tell("notifications/cancelled", &json!({"requestId": id}));
    wait_for("end of the sandbox", || served.sandboxes().is_empty());
    assert_eq!(client.good("run_code", json!({"code": "6 * 7"}))["value"], "42");
    // A sandbox of the session ends with it, one that is kept does not.
    client.good("create_sandbox", json!({}));
    let kept = client.good("create_sandbox", json!({"keep_after_session": true}))["sandbox_id"].clone();
    client.leave();
    wait_for("end of the session's sandbox", || served.sandboxes().len() == 1);
    assert_eq!(served.sandboxes()[0]["id"], kept);
}

#[test]
fn over_http_a_session_is_its_keys_and_its_sandboxes_end_with_it() {
    let served = Served::start();
    let ask = |headers: &[String], method: &str, params: &str| {
        let body = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"{method}","params":{params}}}"#);
        served.request("POST", "/mcp", headers, &body)
    };
    let (status, _, body) = ask(&[], "initialize", INITIALIZE);
    assert_eq!(status, 401, "{body}");
    let (status, head, body) = ask(&[served.authorization()], "initialize", INITIALIZE);
    assert_eq!((status, &message(&body)["result"]["serverInfo"]["name"]), (200, &json!("zeroboot")), "{body}");
    let session = head.lines().find_map(|line| line.strip_prefix("mcp-session-id: ")).unwrap().trim().to_owned();
    let headers =
        [served.authorization(), format!("Mcp-Session-Id: {session}"), "MCP-Protocol-Version: 2025-06-18".into()];
    let ready = r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#;
    assert_eq!(served.request("POST", "/mcp", &headers, ready).0, 202);
    let call = |name: &str, arguments: Value| {
        let (status, _, body) = ask(&headers, "tools/call", &json!({"name": name, "arguments": arguments}).to_string());
        assert_eq!(status, 200, "{body}");
        message(&body)["result"]["structuredContent"].clone()
    };
    assert_eq!(call("run_code", json!({"code": "6 * 7"}))["value"], "42");
    let id = call("create_sandbox", json!({}))["sandbox_id"].clone();
    assert_eq!(call("exec", json!({"sandbox_id": id, "command": "echo on"}))["stdout"], "on\n");
    // Another key's caller, or none, has no use of the session's id.
    assert_eq!(ask(&headers[1..], "tools/list", "{}").0, 401);
    wait_for("end of the sandbox of one call", || served.sandboxes().len() == 1);
    assert_eq!(served.request("DELETE", "/mcp", &headers, "").0, 204);
    wait_for("end of the session's sandbox", || served.sandboxes().is_empty());
    let (status, _, _) = served.request("POST", "/mcp", &[served.authorization()], "nonsense");
    assert!((400..500).contains(&status), "{status}");
}
