//! Traces reach a collector. Only in builds with the feature `otlp`.
#![cfg(feature = "otlp")]

use std::{
    io::{Read, Write},
    net::TcpListener,
    time::Duration,
};

use zeroboot_server::{LogFormat, init_logging};

#[test]
fn spans_reach_the_collector_without_anything_else() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let collector = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let mut seen = Vec::new();
        let mut buffer = [0; 65536];
        while let Ok(count) = stream.read(&mut buffer) {
            seen.extend_from_slice(&buffer[..count]);
            if count == 0 || seen.windows(9).any(|window| window == b"http.exec") {
                break;
            }
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").unwrap();
        String::from_utf8_lossy(&seen).into_owned()
    });
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let guard = init_logging(LogFormat::Text, "info", Some(&endpoint)).unwrap();
        tracing::info_span!(target: "zeroboot_server", "http.exec", request_id = "r").in_scope(|| {});
        drop(guard);
    });
    let seen = collector.join().unwrap();
    assert!(seen.starts_with("POST /v1/traces "), "{seen}");
    assert!(seen.contains("http.exec") && seen.contains("request_id"), "{seen}");
}
