//! An exec under way: frames in, events out.
//!
//! | file | duty |
//! |---|---|
//! | `outgoing.rs` | the request as frames |
//! | `incoming.rs` | the sandbox's frames, and what they mean |
//! | `files.rs` | output files, put together from chunks |

mod files;
mod incoming;
mod outgoing;

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    time::{Duration, Instant},
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{io::Interest, sync::mpsc, time::Sleep};
use uuid::Uuid;
use zeroboot_proto::{ExitReport, Kind, encode};

use self::files::OutputFiles;
pub(crate) use self::outgoing::identity;
pub use self::outgoing::request_frames;
use crate::{
    Collected, Event, ExecError, ExecRequest, Isolation, Limits, Outcome, Report, Stdin, reaper::Watched,
    worker::Worker,
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
    files: OutputFiles,
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
        let files = OutputFiles::new(std::mem::take(&mut request.output_files), request.limits.output_files);
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
            files,
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
        // From here on the sandbox ends on its own time: killed, waited for and cleared away elsewhere.
        match self.worker.take() {
            // Its last frame is here.
            Some(worker) if report.is_some() => worker.ended(),
            other => drop(other),
        }
        self.stdin = None;
        self.files.end(&mut self.queue);
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

async fn next_stdin(stdin: &mut Option<mpsc::Receiver<Bytes>>) -> Option<Bytes> {
    match stdin {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    }
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

    use zeroboot_proto::Ending;

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
