//! An exec under way: frames in, events out.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    pin::Pin,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{io::Interest, sync::mpsc, time::Sleep};
use uuid::Uuid;
use zeroboot_proto::{
    Ending, ExitReport, FileChunk, Identity, Kind, MAX_PAYLOAD, Message, encode,
    pattern::{MAX_FOUND, is_meant},
};

use crate::{
    Collected, Event, ExecError, ExecRequest, Isolation, Limits, Outcome, OutputFile, Report, Stdin, reaper::Watched,
    request::check_path, worker::Worker,
};

/// Time after its deadline within which a sandbox must report its end, before the server kills it.
const GRACE: Duration = Duration::from_secs(5);
/// Time after that within which the sandbox is killed even if no caller asks for its events.
const UNWATCHED: Duration = Duration::from_secs(1);
/// Bytes by which a sandbox may exceed its output limit before it counts as broken.
const OUTPUT_SLACK: u64 = 4096;

/// An exec under way. Dropping it kills the sandbox.
#[derive(Debug)]
pub struct Execution {
    id: Uuid,
    isolation: Isolation,
    pooled: bool,
    fork_time: Duration,
    requested: Instant,
    sent: Instant,
    kill_at: Instant,
    limits: Limits,
    /// `None` once the sandbox has ended.
    worker: Option<Worker>,
    outgoing: BytesMut,
    stdin: Option<mpsc::Receiver<Bytes>>,
    stdin_writer: Option<StdinWriter>,
    queue: VecDeque<Event>,
    started: bool,
    lost: bool,
    output: u64,
    wanted: Vec<Wanted>,
    /// Files that patterns and directories have brought.
    found: HashSet<String>,
    files: HashMap<String, Vec<u8>>,
    file_bytes: u64,
    last_file: Option<String>,
    span: tracing::Span,
    /// At `kill_at`.
    timer: Pin<Box<Sleep>>,
    hint: Option<Box<str>>,
    /// Why the guest crashed is heard once.
    crash_heard: bool,
    /// Ends the sandbox of a caller that has stopped asking.
    _watched: Watched,
}

impl Execution {
    pub(crate) fn new(
        worker: Worker,
        mut request: ExecRequest,
        isolation: Isolation,
        pooled: bool,
        requested: Instant,
        fork_time: Duration,
    ) -> Result<Execution, ExecError> {
        let id = Uuid::now_v7();
        let frames = request_frames(&request, id).map_err(|e| ExecError::Sandbox(format!("make its identity: {e}")))?;
        let (stdin_writer, stdin) = match request.stdin {
            Stdin::Stream => {
                let (sender, receiver) = mpsc::channel(4);
                (Some(StdinWriter { sender }), Some(receiver))
            }
            Stdin::Empty | Stdin::Bytes(_) => (None, None),
        };
        let sent = Instant::now();
        let kill_at = sent + request.limits.timeout + GRACE;
        let watched = worker.kill_after(kill_at + UNWATCHED);
        Ok(Execution {
            id,
            isolation,
            pooled,
            fork_time,
            requested,
            sent,
            kill_at,
            limits: request.limits,
            worker: Some(worker),
            outgoing: BytesMut::from(Bytes::from(frames)),
            stdin,
            stdin_writer,
            queue: VecDeque::new(),
            started: false,
            lost: false,
            output: 0,
            wanted: std::mem::take(&mut request.output_files)
                .into_iter()
                .map(|path| Wanted { path, met: false })
                .collect(),
            found: HashSet::new(),
            files: HashMap::new(),
            file_bytes: 0,
            last_file: None,
            span: tracing::info_span!("exec.run", %id),
            timer: Box::pin(tokio::time::sleep_until(kill_at.into())),
            hint: None,
            crash_heard: false,
            _watched: watched,
        })
    }

    /// The exec's id (UUIDv7).
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// The isolation of its sandbox.
    pub fn isolation(&self) -> Isolation {
        self.isolation
    }

    /// Whether its sandbox was waiting in the pool.
    pub fn pooled(&self) -> bool {
        self.pooled
    }

    /// How long it took to get its sandbox.
    pub fn fork_time(&self) -> Duration {
        self.fork_time
    }

    /// The writing end of a streamed standard input ([`Stdin::Stream`]), once.
    pub fn stdin(&mut self) -> Option<StdinWriter> {
        self.stdin_writer.take()
    }

    /// The next event; `None` after `End`. Cancel safe. An error means that the sandbox failed
    /// (infrastructure), never that the code did.
    pub async fn next(&mut self) -> Result<Option<Event>, ExecError> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Ok(Some(event));
            }
            if self.worker.is_none() {
                return Ok(None);
            }
            self.take_frames()?;
            if self.queue.is_empty() && self.worker.is_some() {
                self.exchange().await?;
            }
        }
    }

    /// Moves bytes in both directions, as far as they go without waiting, once something can move.
    async fn exchange(&mut self) -> Result<(), ExecError> {
        let Some(worker) = &mut self.worker else { return Ok(()) };
        let interest =
            if self.outgoing.is_empty() { Interest::READABLE } else { Interest::READABLE | Interest::WRITABLE };
        tokio::select! {
            biased;
            ready = worker.socket.ready(interest) => {
                let ready = ready.map_err(|e| ExecError::Sandbox(e.to_string()))?;
                if ready.is_writable() && !self.outgoing.is_empty() {
                    match worker.socket.try_write(&self.outgoing) {
                        Ok(n) => self.outgoing.advance(n),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        // It reads no more; what it has to say is still read.
                        Err(_) => { self.outgoing.clear(); self.stdin = None; }
                    }
                }
                if ready.is_readable() || ready.is_read_closed() {
                    let mut chunk = Vec::with_capacity(64 * 1024);
                    match worker.socket.try_read_buf(&mut chunk) {
                        Ok(0) => return self.gone(),
                        Ok(_) => worker.decoder.feed(&chunk),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(_) => return self.gone(),
                    }
                }
            }
            chunk = next_stdin(&mut self.stdin), if self.outgoing.is_empty() => {
                let mut frames = Vec::new();
                match chunk {
                    Some(bytes) if bytes.is_empty() => {}
                    Some(bytes) => encode(&mut frames, Kind::Stdin, &bytes),
                    None => { self.stdin = None; encode(&mut frames, Kind::StdinEnd, &[]); }
                }
                self.outgoing.extend_from_slice(&frames);
            }
            () = &mut self.timer => {
                tracing::warn!(parent: &self.span, "the sandbox did not end at its deadline and is killed");
                self.end(Outcome::DeadlinePassed, None);
            }
        }
        Ok(())
    }

    /// The worker's socket is closed without an `Exit` frame.
    fn gone(&mut self) -> Result<(), ExecError> {
        if Instant::now() >= self.kill_at {
            // Killed for it, while its output waited for a slow caller.
            self.end(Outcome::DeadlinePassed, None);
            return Ok(());
        }
        self.broken("it ended without a word")
    }

    /// The sandbox broke: an outcome if code ran in it, else an error.
    fn broken(&mut self, reason: &str) -> Result<(), ExecError> {
        // The kernel's doing, perhaps while the agent still wrote the request's files.
        if self.worker.as_ref().is_some_and(Worker::ran_out_of_memory) {
            self.end(Outcome::OutOfMemory { code: 137 }, None);
            return Ok(());
        }
        tracing::warn!(parent: &self.span, reason, "the sandbox broke");
        if self.started {
            self.lost = true;
            self.end(Outcome::Crashed, None);
            Ok(())
        } else {
            self.worker = None;
            Err(ExecError::Sandbox(reason.to_owned()))
        }
    }

    fn end(&mut self, outcome: Outcome, report: Option<ExitReport>) {
        let exec_time = self.sent.elapsed();
        self.finish_file();
        // From here on the sandbox ends on its own time: killed, waited for and cleared away elsewhere.
        match self.worker.take() {
            // Its last frame is here.
            Some(worker) if report.is_some() => worker.ended(),
            other => drop(other),
        }
        self.stdin = None;
        for Wanted { path, .. } in std::mem::take(&mut self.wanted).into_iter().filter(|wanted| !wanted.met) {
            let data = Err("the sandbox ended before it was read".to_owned());
            self.queue.push_back(Event::File(OutputFile { path, data }));
        }
        self.queue.push_back(Event::End(Report {
            outcome,
            lost: self.lost,
            pooled: self.pooled,
            fork_time: self.fork_time,
            exec_time,
            total_time: self.requested.elapsed(),
            cpu_time: Duration::from_nanos(report.map_or(0, |r| r.cpu_ns)),
            peak_memory: report.map_or(0, |r| r.peak_memory),
            hint: self.hint.take(),
        }));
    }

    /// Turns the frames that are there into events.
    fn take_frames(&mut self) -> Result<(), ExecError> {
        // At most a few at a time, so that a flood is passed on as it comes.
        while self.queue.len() < 16 {
            let Some(worker) = &mut self.worker else { return Ok(()) };
            let step = match worker.decoder.next_frame() {
                Ok(None) => return Ok(()),
                Err(error) => Step::Broken(error.to_string()),
                Ok(Some((kind, payload))) => match Message::decode(kind, payload) {
                    Err(error) => Step::Broken(error.to_string()),
                    Ok(Message::Started) if !self.started => Step::Started,
                    Ok(Message::Stdout(bytes)) if self.started => {
                        Step::Output(Event::Stdout(Bytes::copy_from_slice(bytes)))
                    }
                    Ok(Message::Stderr(bytes)) if self.started => {
                        Step::Output(Event::Stderr(Bytes::copy_from_slice(bytes)))
                    }
                    Ok(Message::File(chunk)) if self.started => Step::File {
                        path: String::from_utf8_lossy(chunk.path).into_owned(),
                        data: chunk.data.to_vec(),
                        append: chunk.append,
                        failed: chunk.failed,
                    },
                    // A limit can pass while the identity is still being applied.
                    Ok(Message::Exit(report)) if self.started || !matches!(report.ending, Ending::Exited(_)) => {
                        Step::Exit(report)
                    }
                    Ok(Message::Hint(text)) if self.started && self.hint.is_none() => Step::Hint(text.into()),
                    // A VM's worker says it once; nobody else has a guest.
                    Ok(Message::Crash(why)) if self.isolation == Isolation::Vm && !self.crash_heard => {
                        Step::Crash(String::from_utf8_lossy(why).chars().take(600).collect())
                    }
                    Ok(Message::Failure(text)) => Step::Broken(text.to_owned()),
                    // The kind alone: a payload is the code's own words.
                    Ok(_) => Step::Broken(format!("it sent {kind:?} out of turn")),
                },
            };
            match step {
                Step::Started => {
                    self.started = true;
                    self.queue.push_back(Event::Started);
                }
                Step::Output(event) => {
                    if let Event::Stdout(bytes) | Event::Stderr(bytes) = &event {
                        self.output += bytes.len() as u64;
                    }
                    if self.output > self.limits.output.saturating_add(OUTPUT_SLACK) {
                        self.end(Outcome::OutputLimit, None);
                        return Ok(());
                    }
                    self.queue.push_back(event);
                }
                Step::File { path, data, append, failed } => {
                    if let Some(reason) = self.take_file(path, data, append, failed) {
                        return self.broken(reason);
                    }
                }
                Step::Hint(hint) => self.hint = Some(hint),
                Step::Crash(reason) => {
                    self.crash_heard = true;
                    tracing::warn!(exec_id = %self.id, ?reason, "the guest crashed");
                }
                Step::Exit(report) => self.end(outcome(report.ending), Some(report)),
                Step::Broken(reason) => return self.broken(&reason),
            }
        }
        Ok(())
    }

    /// Takes a chunk of an output file. A reason if it is not one that was asked for, or too much.
    fn take_file(&mut self, path: String, data: Vec<u8>, append: bool, failed: bool) -> Option<&'static str> {
        if append {
            if self.last_file.as_ref() != Some(&path) {
                return Some("it continued a file that it had not begun");
            }
        } else {
            self.finish_file();
            if let Some(at) = self.wanted.iter().position(|wanted| wanted.path == path) {
                self.wanted.swap_remove(at);
            } else if !self.is_found(&path) {
                return Some("it sent a file that was not asked for");
            }
            let means = |wanted: &&mut Wanted| is_meant(wanted.path.as_bytes(), path.as_bytes());
            self.wanted.iter_mut().filter(means).for_each(|wanted| wanted.met = true);
        }
        if failed {
            let reason = String::from_utf8_lossy(&data).chars().take(200).collect();
            self.last_file = None;
            self.files.remove(&path);
            self.queue.push_back(Event::File(OutputFile { path, data: Err(reason) }));
            return None;
        }
        self.file_bytes += data.len() as u64;
        if self.file_bytes > self.limits.output_files.saturating_add(OUTPUT_SLACK) {
            return Some("its files are above their limit");
        }
        self.files.entry(path.clone()).or_default().extend_from_slice(&data);
        self.last_file = Some(path);
        None
    }

    /// Whether a pattern or a directory means it, for the first time. The path becomes a file's name with the caller.
    fn is_found(&mut self, path: &str) -> bool {
        let meant = self.wanted.iter().any(|wanted| is_meant(wanted.path.as_bytes(), path.as_bytes()));
        meant && check_path(path).is_ok() && self.found.len() < MAX_FOUND && self.found.insert(path.to_owned())
    }

    fn finish_file(&mut self) {
        if let Some(path) = self.last_file.take() {
            let data = Bytes::from(self.files.remove(&path).unwrap_or_default());
            self.queue.push_back(Event::File(OutputFile { path, data: Ok(data) }));
        }
    }

    /// Reads everything.
    pub async fn collect(mut self) -> Result<Collected, ExecError> {
        // Nobody will write to a streamed input any more.
        self.stdin_writer = None;
        let (mut stdout, mut stderr, mut files) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            match self.next().await? {
                Some(Event::Stdout(bytes)) => stdout.extend_from_slice(&bytes),
                Some(Event::Stderr(bytes)) => stderr.extend_from_slice(&bytes),
                Some(Event::File(file)) => files.push(file),
                Some(Event::End(report)) => return Ok(Collected { stdout, stderr, files, report }),
                Some(Event::Started) => {}
                None => return Err(ExecError::Sandbox("no end was reported".into())),
            }
        }
    }
}

/// A path of `output_files`.
#[derive(Debug)]
struct Wanted {
    path: String,
    /// It was a pattern or a directory, and a file came of it.
    met: bool,
}

enum Step {
    Started,
    Output(Event),
    File { path: String, data: Vec<u8>, append: bool, failed: bool },
    Hint(Box<str>),
    Crash(String),
    Exit(ExitReport),
    Broken(String),
}

fn outcome(ending: Ending) -> Outcome {
    match ending {
        Ending::Exited(code) => Outcome::Exited { code },
        Ending::Signaled(signal) => Outcome::Signaled { signal },
        Ending::DeadlinePassed => Outcome::DeadlinePassed,
        Ending::CpuLimit => Outcome::CpuLimit,
        Ending::OutputLimit => Outcome::OutputLimit,
        Ending::OutOfMemory(code) => Outcome::OutOfMemory { code },
        Ending::Crashed => Outcome::Crashed,
    }
}

async fn next_stdin(stdin: &mut Option<mpsc::Receiver<Bytes>>) -> Option<Bytes> {
    match stdin {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    }
}

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

/// Feeds a streamed standard input. Dropping it is the end of the input.
#[derive(Debug)]
pub struct StdinWriter {
    sender: mpsc::Sender<Bytes>,
}

impl StdinWriter {
    /// Waits until the sandbox takes these bytes. `false`: it reads no more.
    pub async fn write(&mut self, bytes: Bytes) -> bool {
        self.sender.send(bytes).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        os::unix::net::UnixStream as Socket,
        process::{Child, Command},
    };

    use super::*;
    use crate::reaper::Reaper;

    /// An execution whose sandbox is a process that sleeps; the test speaks for it on the socket.
    fn faked(isolation: Isolation) -> (Execution, Socket, Child) {
        let (ours, theirs) = Socket::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        let worker = Worker::new(ours.try_into().unwrap(), pidfd, None, Reaper::start(), None);
        let request = ExecRequest::new("python", "1");
        let execution = Execution::new(worker, request, isolation, true, Instant::now(), Duration::ZERO).unwrap();
        (execution, theirs, child)
    }

    fn frames(all: &[(Kind, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        all.iter().for_each(|(kind, payload)| encode(&mut bytes, *kind, payload));
        bytes
    }

    #[tokio::test]
    async fn a_sandbox_that_has_ended_is_left_alone_until_its_answer_is_out() {
        let (execution, mut theirs, mut child) = faked(Isolation::Process);
        let report = ExitReport { ending: Ending::Exited(3), wall_ns: 1, cpu_ns: 1, peak_memory: 1 };
        theirs.write_all(&frames(&[(Kind::Started, &[]), (Kind::Exit, &report.encode())])).unwrap();
        let done = execution.collect().await.unwrap();
        assert_eq!(done.report.outcome, Outcome::Exited { code: 3 });
        // Nothing else has run on this thread since.
        assert!(child.try_wait().unwrap().is_none());
        theirs.set_nonblocking(true).unwrap();
        let mut request = vec![0; 1 << 20];
        let read = theirs.read(&mut request).unwrap();
        assert!(read > 0 && theirs.read(&mut request).unwrap_err().kind() == io::ErrorKind::WouldBlock, "still open");
        let status = tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
    }

    #[tokio::test]
    async fn only_a_vm_can_say_that_its_guest_crashed_and_only_once() {
        for (isolation, words, lost) in
            [(Isolation::Process, 1, true), (Isolation::Vm, 1, false), (Isolation::Vm, 2, true)]
        {
            let (execution, mut theirs, mut child) = faked(isolation);
            let report = ExitReport { ending: Ending::Crashed, wall_ns: 1, cpu_ns: 0, peak_memory: 0 };
            let mut all: Vec<(Kind, &[u8])> = vec![(Kind::Started, &[])];
            all.extend((0..words).map(|_| (Kind::Crash, &b"a panic"[..])));
            let report = report.encode();
            all.push((Kind::Exit, &report));
            theirs.write_all(&frames(&all)).unwrap();
            let done = execution.collect().await.unwrap().report;
            assert_eq!((done.outcome, done.lost), (Outcome::Crashed, lost), "{isolation:?} {words}");
            tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
        }
    }
}
