//! What HTTP adds to an exec: the same code through the server and straight through the engine, by turns, so that
//! whatever else the machine does touches both alike.

use std::{
    io::{self, Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use zeroboot_engine::{Engine, ExecError, ExecRequest, Outcome};

use crate::{Listen, ServeError, Server, ServerConfig};

/// Both paths' times, sorted.
#[derive(Clone, Debug, Default)]
pub struct Overhead {
    /// Straight through the engine.
    pub direct: Vec<Duration>,
    /// From the first byte of the request to the last of the answer.
    pub http: Vec<Duration>,
    /// Of each exec over HTTP, what it took besides the engine's own time for it (`total_time_ms`): what the sandbox and
    /// its neighbours do to the times of two different execs is not in it.
    pub added: Vec<Duration>,
    /// The same of the direct path: what a caller without HTTP waits besides.
    pub added_direct: Vec<Duration>,
}

impl Overhead {
    /// A quantile of sorted times.
    pub fn quantile(times: &[Duration], at: f64) -> Duration {
        let last = times.len().saturating_sub(1);
        times.get((last as f64 * at.clamp(0.0, 1.0)).round() as usize).copied().unwrap_or_default()
    }

    /// What HTTP adds at the median.
    pub fn added_at_median(&self) -> Duration {
        Overhead::quantile(&self.added, 0.5).saturating_sub(Overhead::quantile(&self.added_direct, 0.5))
    }
}

/// Why it could not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OverheadError {
    /// The server.
    #[error("the server did not start")]
    Serve(#[from] ServeError),
    /// The direct path.
    #[error("an exec failed")]
    Exec(#[from] ExecError),
    /// The connection.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The work was not done.
    #[error("wrong answer: {0}")]
    Wrong(String),
}

/// Runs `print(6*7)` in `template` (a Python one) `rounds` times on each path, after a tenth of that to warm up. Every
/// answer is checked. Between execs it waits until the pool is full again, so that both paths take pooled sandboxes.
pub async fn measure_overhead(engine: &Engine, template: &str, rounds: usize) -> Result<Overhead, OverheadError> {
    let listen = vec![Listen::Tcp(([127, 0, 0, 1], 0).into())];
    let server = Server::bind(ServerConfig { listen, ..ServerConfig::default() }, engine.clone()).await?;
    let Some(Listen::Tcp(address)) = server.addresses().pop() else {
        return Err(OverheadError::Wrong("no address".into()));
    };
    // The engine goes on after this server: only its task is ended.
    let task = tokio::spawn(server.run(std::future::pending()));
    let result = rounds_of(engine, template, rounds, address).await;
    task.abort();
    result
}

async fn rounds_of(
    engine: &Engine,
    template: &str,
    rounds: usize,
    address: std::net::SocketAddr,
) -> Result<Overhead, OverheadError> {
    // Blocking, on a thread of its own, as another program is: a client on the server's runtime would wait for the
    // server's threads to wake it.
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let body = serde_json::json!({"code": "print(6*7)", "template": template}).to_string();
    let request = format!(
        "POST /v1/exec HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let warm = (rounds / 10).max(3);
    let mut overhead = Overhead::default();
    for round in 0..warm + rounds {
        full_pool(engine, template).await;
        let begun = Instant::now();
        let collected = engine.exec(ExecRequest::new(template, "print(6*7)")).await?.collect().await?;
        let direct = begun.elapsed();
        if collected.stdout != b"42\n" || collected.report.outcome != (Outcome::Exited { code: 0 }) {
            return Err(OverheadError::Wrong(format!("{:?}", collected.report.outcome)));
        }

        full_pool(engine, template).await;
        let (mut client, request) = (stream.try_clone()?, request.clone());
        let exchange = tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            client.write_all(request.as_bytes())?;
            read_answer(&mut client).map(|answer| (answer, begun.elapsed()))
        });
        let (answer, http) = exchange.await.map_err(io::Error::other)??;
        let json: serde_json::Value = serde_json::from_slice(&answer).map_err(io::Error::from)?;
        let (stdout, inside) = (&json["stdout"], json["total_time_ms"].as_f64());
        let (true, Some(inside)) = (stdout == "42\n", inside) else {
            return Err(OverheadError::Wrong(json["error"].to_string()));
        };
        if round >= warm {
            overhead.direct.push(direct);
            overhead.added_direct.push(direct.saturating_sub(collected.report.total_time));
            overhead.http.push(http);
            overhead.added.push(http.saturating_sub(Duration::from_secs_f64(inside / 1e3)));
        }
    }
    for times in [&mut overhead.direct, &mut overhead.added_direct, &mut overhead.http, &mut overhead.added] {
        times.sort_unstable();
    }
    Ok(overhead)
}

/// Waits until the pool is full and the machine is idle, at most a second.
async fn full_pool(engine: &Engine, template: &str) {
    for _ in 0..200 {
        let full =
            engine.templates().iter().any(|status| status.name == template && status.pool_ready >= status.pool_target);
        if full && engine.stats().live == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Reads one answer with a `Content-Length`; gives its body.
fn read_answer(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let (mut bytes, mut chunk) = (Vec::with_capacity(4096), [0; 4096]);
    loop {
        match stream.read(&mut chunk)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => bytes.extend_from_slice(chunk.get(..count).unwrap_or_default()),
        }
        let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
        let length = length.ok_or(io::ErrorKind::InvalidData)?;
        if bytes.len() >= end + 4 + length {
            return Ok(bytes.split_off(end + 4));
        }
    }
}
