use std::{
    io::{BufReader, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    process::Command,
    time::Duration,
};

use serde_json::json;
use zeroboot_server::{Listen, TlsFiles};

use crate::{
    client::{self, read_answer},
    fixture::{JSON, Setup, wait_for},
};

#[test]
fn a_unix_socket_answers_and_goes_with_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("zeroboot.sock");
    let mut setup = Setup::default();
    setup.config.listen.push(Listen::Unix(path.clone()));
    let fixture = setup.start();
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o660);
    let mut stream = UnixStream::connect(&path).unwrap();
    stream
        .write_all(&client::request("POST", "/v1/exec", &[JSON], json!({"code": "print(1)"}).to_string().as_bytes()))
        .unwrap();
    let answer = read_answer(&mut BufReader::new(stream)).unwrap();
    assert_eq!(answer.json()["stdout"], "1\n");
    fixture.stop();
    fixture.join();
    assert!(!path.exists());
}

fn certificate(folder: &std::path::Path, name: &str) -> TlsFiles {
    let files = TlsFiles { cert: folder.join("cert.pem"), key: folder.join("key.pem") };
    let done = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args(["-subj", &format!("/CN={name}"), "-addext", "subjectAltName=IP:127.0.0.1"])
        .arg("-keyout")
        .arg(&files.key)
        .arg("-out")
        .arg(&files.cert)
        .output()
        .expect("openssl makes the test's certificate");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    files
}

#[test]
fn tls_answers_over_http_1_and_2_and_takes_new_certificates() {
    let folder = tempfile::tempdir().unwrap();
    let files = certificate(folder.path(), "first");
    let mut setup = Setup::default();
    setup.config.tls = Some(files.clone());
    setup.config.reload_interval = Duration::from_millis(50);
    let fixture = setup.start();
    let curl = |version: &str| {
        let done = Command::new("curl")
            .args(["--silent", "--show-error", "--max-time", "20", version, "--cacert"])
            .arg(&files.cert)
            .args(["--write-out", " %{http_version}", "--header", JSON, "--data", r#"{"code": "print(6*7)"}"#])
            .arg(format!("https://{}/v1/exec", fixture.address))
            .output()
            .expect("curl");
        (String::from_utf8_lossy(&done.stdout).into_owned(), String::from_utf8_lossy(&done.stderr).into_owned())
    };
    for (version, shown) in [("--http1.1", " 1.1"), ("--http2", " 2")] {
        let (answer, error) = curl(version);
        assert!(answer.contains(r#""stdout":"42\n""#) && answer.ends_with(shown), "{answer} {error}");
    }
    certificate(folder.path(), "second");
    wait_for("new certificate", Duration::from_secs(10), || curl("--http1.1").0.contains("42"));
    // Plain HTTP on the TLS port is no way around it.
    let mut stream = client::connect(fixture.address);
    stream.write_all(&client::request("GET", "/v1/health", &[], b"")).unwrap();
    assert!(read_answer(&mut BufReader::new(stream)).is_err());
}

#[test]
fn a_silent_connection_over_http_2_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    let files = certificate(folder.path(), "idle");
    let mut setup = Setup::default();
    setup.config.tls = Some(files);
    setup.config.limits.header_timeout = Duration::from_millis(500);
    let fixture = setup.start();
    let begun = std::time::Instant::now();
    let mut child = Command::new("openssl")
        .args(["s_client", "-quiet", "-alpn", "h2", "-connect", &fixture.address.to_string()])
        .stdin(std::process::Stdio::piped()) // open, and nothing comes
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("openssl");
    let _open = child.stdin.take();
    wait_for("the connection's end", Duration::from_secs(20), || child.try_wait().unwrap().is_some());
    assert!(begun.elapsed() >= Duration::from_millis(500), "{:?}", begun.elapsed());
}

#[test]
fn a_server_without_keys_answers_under_no_foreign_name() {
    let fixture = Setup::default().start();
    for (host, status) in [("rebound.example", 403), ("localhost:1", 200), ("127.0.0.1", 200)] {
        let request = format!("GET /v1/health HTTP/1.1\r\nHost: {host}\r\n\r\n");
        let answer = client::exchange(fixture.address, request.as_bytes());
        assert_eq!(answer.status, status, "{host}: {}", answer.text());
    }
}

#[test]
fn the_servers_end_waits_for_requests_and_refuses_new_ones() {
    let fixture = Setup::default().start();
    let slow = std::thread::spawn({
        let request = client::request(
            "POST",
            "/v1/exec",
            &[JSON],
            json!({"code": "import time; time.sleep(15); print('done')"}).to_string().as_bytes(),
        );
        let address = fixture.address;
        move || client::exchange(address, &request)
    });
    fixture.wait_for_live(1, Duration::from_secs(10));
    // A connection from before, and new ones.
    let mut kept = BufReader::new(client::connect(fixture.address));
    fixture.stop();
    wait_for("503", Duration::from_secs(10), || fixture.get("/v1/health").status == 503);
    let exec = client::request("POST", "/v1/exec", &[JSON], json!({"code": "print(1)"}).to_string().as_bytes());
    kept.get_mut().write_all(&exec).unwrap();
    for answer in [read_answer(&mut kept).unwrap(), client::exchange(fixture.address, &exec)] {
        assert_eq!((answer.status, &answer.json()["code"]), (503, &json!("shutting_down")));
        assert_eq!((answer.header("connection"), answer.header("retry-after")), (Some("close"), Some("1")));
    }
    assert_eq!(fixture.get("/v1/health").json()["status"], "shutting_down");
    let answer = slow.join().unwrap();
    assert_eq!((answer.status, &answer.json()["stdout"]), (200, &json!("done\n")));
    fixture.join();
}

#[test]
fn a_server_with_nothing_under_way_ends_at_once() {
    let mut setup = Setup::default();
    setup.config.drain = Duration::from_secs(3600);
    let fixture = setup.start();
    let _idle = client::connect(fixture.address);
    fixture.run("print(1)");
    fixture.stop();
    fixture.join();
}

#[test]
fn the_wait_at_the_servers_end_is_bounded() {
    let mut setup = Setup::default();
    setup.config.drain = Duration::from_millis(500);
    let fixture = setup.start();
    let mut stream = client::connect(fixture.address);
    let body = json!({"code": "import time; time.sleep(100)", "timeout_seconds": 120}).to_string();
    stream.write_all(&client::request("POST", "/v1/exec", &[JSON], body.as_bytes())).unwrap();
    fixture.wait_for_live(1, Duration::from_secs(10));
    let begun = std::time::Instant::now();
    fixture.stop();
    fixture.join();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}
