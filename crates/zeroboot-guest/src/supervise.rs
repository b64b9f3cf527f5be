//! One sandbox's life, from the runner's `Ready` to the last frame.
//!
//! ```text
//! WarmingUp --Ready--> Loading --Run--> Running --runner ended--> Finishing --front gone--> done
//!     |                   |                |  limit: kill all        |
//!     +---- Failure ------+----------------+        (front gone: kill all, done)
//! ```
//!
//! Nothing is buffered without bound: while the front does not take frames, the program's output is not read;
//! while the program does not take input, the front's frames are not read.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitStatus};
use zeroboot_proto::{
    Command, Decoder, Ending, ExitReport, Identity, Kind, Limits, MAX_PAYLOAD, Message, Note, encode,
};

use crate::files::Files;
use crate::limits::Ceilings;
use crate::live::{Birth, Born, Live};
use crate::place::Place;
use crate::processes::{Processes, oom_kills};
use crate::runner::{Runner, readable};
use crate::sys;
use crate::transport::{Received, Transport};

/// Interval between samples of memory and CPU time during a run.
const TICK: Duration = Duration::from_millis(20);
/// Longest interval between samples of an idle run: a thousand idle sandboxes must not keep the host busy.
const IDLE_TICK: Duration = Duration::from_millis(320);
/// CPU time between two samples below which the run is idle.
const IDLE_CPU: Duration = Duration::from_millis(1);
/// Interval between cheap checks of an idle run. A run that used more CPU time than [`STIR`] is sampled at once, so
/// that a burst of memory after a pause is seen about as soon as any.
const GLIMPSE: Duration = Duration::from_millis(40);
const STIR: Duration = Duration::from_micros(500);
/// Bytes of output that may wait for the front. Above it the agent does not read the program's pipes.
const OUT_FULL: usize = MAX_PAYLOAD;
/// Bytes of input that may wait for the program. Above it the agent does not read from the front.
const STDIN_FULL: usize = MAX_PAYLOAD;
/// Bytes of input that may come before `Run`.
const STDIN_EARLY: usize = 1024 * 1024;
/// Longest time from the last frame until the front closes its end.
const LINGER: Duration = Duration::from_secs(1);
/// Bytes of a failed runner's stderr that go into the report.
const STDERR_KEPT: usize = 4096;
/// What V8 writes when its heap is full, before it aborts.
const NODE_OUT_OF_MEMORY: &[u8] = b"JavaScript heap out of memory";

/// Why the supervision ended without an `Exit` frame.
#[derive(Debug)]
pub(crate) enum Stop {
    /// Said to the front in a `Failure` frame.
    Failed(String),
    /// The front is gone.
    FrontGone,
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Stop {
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Stop::FrontGone,
            _ => Stop::Failed(error.to_string()),
        }
    }
}

/// What the front asked for, up to `Run`.
#[derive(Default)]
struct Request {
    limits: Option<Limits>,
    identity: Option<Identity>,
    wanted: Vec<Vec<u8>>,
    /// The code has its name.
    named: bool,
    /// As it came.
    env: Vec<Vec<u8>>,
    /// The request is for a long-lived sandbox, not for one program.
    live: bool,
}

/// What a run needs to know of the warm runner. It is found out before the request, when no client waits.
struct Prepared {
    ceilings: Ceilings,
    memory: u64,
    oom_kills: Option<u64>,
}

/// Figures of the present run.
struct Run {
    limits: Limits,
    started: Instant,
    deadline: Option<Instant>,
    next_tick: Instant,
    next_glimpse: Instant,
    tick: Duration,
    /// CPU time and memory at the last sample.
    last_seen: (Duration, u64),
    /// CPU time at the start: warming is not the program's.
    cpu_before: Duration,
    oom_before: Option<u64>,
    peak_memory: u64,
    output_left: u64,
    /// A limit that was hit. The first one counts.
    stopped: Option<Ending>,
    noted_out_of_memory: bool,
    /// For the front, ahead of the end. One is enough.
    hint: Option<Vec<u8>>,
    /// The program has ended with this status, says its runner, and its process lingers.
    ended: Option<u8>,
    /// The runner has said that user code begins: from now on it is not believed.
    begun: bool,
}

/// The agent's whole state.
pub(crate) struct Supervisor<T> {
    transport: T,
    place: Place,
    runner: Runner,
    processes: Processes,
    files: Files,
    from_front: Decoder,
    from_runner: Decoder,
    /// Frames for the front that it has not taken.
    out: Vec<u8>,
    /// Frames for the runner.
    control_out: Vec<u8>,
    stdin: VecDeque<u8>,
    stdin_ended: bool,
    control_ended: bool,
    prepared: Option<Prepared>,
    status: Option<WaitStatus>,
    stderr_tail: Vec<u8>,
    buffer: Box<[u8]>,
}

/// What [`Supervisor::wait`] saw. A closed descriptor counts as readable.
#[derive(Default)]
struct Seen {
    front: bool,
    control: bool,
    stdout: bool,
    stderr: bool,
    stdin: bool,
    ended: bool,
}

/// What [`Supervisor::wait`] waits for, beside the runner's end and the front's.
#[derive(Clone, Copy, Default)]
struct Interest {
    front_input: bool,
    control_room: bool,
    output: bool,
    stdin_room: bool,
}

impl<T: Transport> Supervisor<T> {
    /// Over a live runner.
    pub(crate) fn new(transport: T, place: Place, runner: Runner, processes: Processes, files: Files) -> Supervisor<T> {
        Supervisor {
            transport,
            place,
            runner,
            processes,
            files,
            from_front: Decoder::new(),
            from_runner: Decoder::new(),
            out: Vec::new(),
            control_out: Vec::new(),
            stdin: VecDeque::new(),
            stdin_ended: false,
            control_ended: false,
            prepared: None,
            status: None,
            stderr_tail: Vec::new(),
            buffer: vec![0; MAX_PAYLOAD].into_boxed_slice(),
        }
    }

    /// Serves one request. Whatever happens, no process of the sandbox is left when this returns, and the front,
    /// if it is still there, has got its last frame.
    pub(crate) fn serve(mut self) -> Result<(), Stop> {
        let result = match self.life() {
            Ok(Some(born)) => {
                let live = Live::new(Birth {
                    transport: self.transport,
                    place: self.place,
                    processes: self.processes,
                    runner: self.runner,
                    from_runner: self.from_runner,
                    from_front: self.from_front,
                    born,
                });
                return live.serve();
            }
            Ok(None) => Ok(()),
            Err(stop) => Err(stop),
        };
        self.kill_all();
        if let Err(Stop::Failed(reason)) = &result {
            let text: String = reason.chars().take(MAX_PAYLOAD / 4).collect();
            encode(&mut self.out, Kind::Failure, text.as_bytes());
            self.flush_front()?;
        }
        result
    }

    /// One program's life; or what a sandbox is born with that is to live on.
    fn life(&mut self) -> Result<Option<Born>, Stop> {
        self.warm_up()?;
        let request = self.load()?;
        if !request.live {
            return self.run(request).map(|()| None);
        }
        let missing = || Stop::Failed("Live came without an Identity or Limits".into());
        let identity = request.identity.ok_or_else(missing)?;
        let limits = request.limits.ok_or_else(missing)?;
        let prepared = self.prepared.take().ok_or_else(missing)?;
        self.processes.limit(limits.memory);
        let used = self.processes.cpu_of(self.runner.pid);
        prepared.ceilings.apply(&self.runner, &limits, used).map_err(Stop::Failed)?;
        Ok(Some(Born { identity, limits, ceilings: prepared.ceilings, env: request.env }))
    }

    // ---- warming up

    fn warm_up(&mut self) -> Result<(), Stop> {
        loop {
            let seen = self.wait(Interest { output: true, ..Interest::default() }, None)?;
            if seen.stdout {
                // Whatever an import prints is nobody's output.
                self.read_output(true)?;
            }
            if seen.stderr {
                self.read_output(false)?;
            }
            if seen.control {
                self.read_control()?;
            }
            if let Some((kind, payload)) = next(&mut self.from_runner)? {
                return match Message::decode(kind, payload) {
                    Ok(Message::Ready) => {
                        self.prepared = Some(Prepared {
                            ceilings: Ceilings::take(&self.runner),
                            memory: self.processes.usage_at_end().memory,
                            // A VM stands still from here to the request. Elsewhere it would be the count of a past time.
                            oom_kills: if self.transport.poll_fd().is_none() { oom_kills() } else { None },
                        });
                        encode(&mut self.out, Kind::Ready, payload);
                        self.stderr_tail.clear();
                        self.flush_front()?;
                        // In a VM each fork begins here.
                        self.processes.rest(self.prepared.as_ref().map_or(0, |prepared| prepared.memory));
                        Ok(())
                    }
                    Ok(Message::Failure(text)) => Err(Stop::Failed(text.to_string())),
                    _ => Err(Stop::Failed(format!("the runner sent {kind:?} instead of Ready"))),
                };
            }
            if seen.ended || self.control_ended {
                return Err(self.runner_gone("before it was ready"));
            }
        }
    }

    // ---- the request

    fn load(&mut self) -> Result<Request, Stop> {
        let mut request = Request::default();
        loop {
            while let Some((kind, payload)) = next(&mut self.from_front)? {
                let malformed = |error: zeroboot_proto::PayloadError| Stop::Failed(error.to_string());
                match Command::decode(kind, payload).map_err(malformed)? {
                    Command::Limits(limits) => request.limits = Some(limits),
                    Command::Identity(identity) => {
                        self.place.apply_identity(&identity).map_err(Stop::Failed)?;
                        request.identity = Some(identity);
                        encode(&mut self.control_out, kind, payload);
                    }
                    Command::Env(..) => {
                        encode(&mut self.control_out, kind, payload);
                        request.env.push(payload.to_vec());
                    }
                    Command::Arg(word) => {
                        if !std::mem::replace(&mut request.named, true) {
                            self.files.code_is(word);
                        }
                        encode(&mut self.control_out, kind, payload);
                    }
                    Command::Code(_) => encode(&mut self.control_out, kind, payload),
                    Command::Put(chunk) => self.files.put(&chunk).map_err(Stop::Failed)?,
                    Command::Get(path) => request.wanted.push(path.to_vec()),
                    Command::Stdin(bytes) => {
                        if self.stdin.len() + bytes.len() > STDIN_EARLY {
                            return Err(Stop::Failed("more standard input came before Run than is held".into()));
                        }
                        self.stdin.extend(bytes);
                    }
                    Command::StdinEnd => self.stdin_ended = true,
                    Command::Run => {
                        self.files.close();
                        return Ok(request);
                    }
                    Command::Live => {
                        request.live = true;
                        break;
                    }
                }
                if self.control_out.len() > MAX_PAYLOAD {
                    self.flush_control()?;
                }
            }
            // What came together is passed on together: fewer switches between agent and runner.
            self.flush_control()?;
            if request.live {
                return Ok(request);
            }
            if self.transport.poll_fd().is_none() {
                self.receive()?;
                continue;
            }
            let seen = self.wait(Interest { front_input: true, output: true, ..Interest::default() }, None)?;
            self.before_user_code(&seen)?;
            if seen.front {
                self.receive()?;
            }
        }
    }

    /// Handles what a runner may do between `Ready` and `Started`: talk on stderr, fail, die.
    fn before_user_code(&mut self, seen: &Seen) -> Result<(), Stop> {
        if seen.stdout {
            self.read_output(true)?;
        }
        if seen.stderr {
            self.read_output(false)?;
        }
        if seen.control {
            self.read_control()?;
        }
        if let Some((kind, payload)) = next(&mut self.from_runner)? {
            return Err(Stop::Failed(match Message::decode(kind, payload) {
                Ok(Message::Failure(text)) => text.to_string(),
                _ => format!("the runner sent {kind:?} while it was given a request"),
            }));
        }
        if seen.ended || self.control_ended {
            return Err(self.runner_gone("while it was given a request"));
        }
        Ok(())
    }

    // ---- the run

    fn run(&mut self, request: Request) -> Result<(), Stop> {
        if request.identity.is_none() {
            return Err(Stop::Failed("Run came without an Identity".into()));
        }
        let limits = request.limits.ok_or_else(|| Stop::Failed("Run came without Limits".into()))?;
        let prepared = self.prepared.take().ok_or_else(|| Stop::Failed("Run came before Ready".into()))?;
        let cpu_before = self.processes.cpu_of(self.runner.pid);
        prepared.ceilings.apply(&self.runner, &limits, cpu_before).map_err(Stop::Failed)?;
        self.processes.limit(limits.memory);
        encode(&mut self.control_out, Kind::Run, &[]);
        let started = Instant::now();
        self.flush_control()?;
        let mut run = Run {
            limits,
            started,
            deadline: started.checked_add(Duration::from_nanos(limits.wall_ns)),
            next_tick: started + TICK,
            next_glimpse: started + GLIMPSE,
            tick: TICK,
            last_seen: (Duration::ZERO, 0),
            cpu_before,
            // A long text: read while the runner is at work already.
            oom_before: prepared.oom_kills.or_else(oom_kills),
            peak_memory: prepared.memory,
            output_left: limits.output,
            stopped: None,
            noted_out_of_memory: false,
            hint: None,
            ended: None,
            begun: false,
        };
        // Input that came together with `Run` is in the decoder already.
        self.take_stdin()?;
        self.feed_stdin();
        while self.status.is_none() && run.stopped.is_none() && run.ended.is_none() {
            self.step(&mut run)?;
        }
        let wall = run.started.elapsed();
        let last = self.processes.usage_at_end();
        run.peak_memory = run.peak_memory.max(last.memory);
        // The run is over with its first process: nobody waits for a daemon that it left behind.
        match run.ended {
            // None of them comes back from the kernel to its program, whatever the front does with the rest of the output.
            // Nobody has to wait for their memory to be freed. In a VM it never is: a page that is touched is a page copied.
            Some(_) if self.transport.poll_fd().is_none() && sys::before_all_others().is_ok() => {
                self.processes.signal_all(Signal::KILL);
            }
            Some(_) if request.wanted.is_empty() => self.processes.signal_all(Signal::KILL),
            _ => self.kill_all(),
        }
        // What was written before the end is in the pipes, and no writer is left or can begin another write.
        self.drain(&mut run)?;
        self.read_control()?;
        self.notes(&mut run)?;
        if !run.begun && run.stopped.is_none() {
            return Err(self.runner_gone("before it began the program"));
        }
        let ending = self.ending(&run);
        let mut budget = run.limits.output_files;
        for path in &request.wanted {
            let (out, transport) = (&mut self.out, &mut self.transport);
            self.files.get(path, &mut budget, |frames| {
                out.extend_from_slice(frames);
                flush(out, transport)
            })?;
        }
        let report = ExitReport {
            ending,
            wall_ns: nanos(wall),
            // What was not reaped is in the last look at the live ones.
            cpu_ns: nanos(sys::reaped_cpu().max(last.cpu).saturating_sub(run.cpu_before)),
            peak_memory: run.peak_memory,
        };
        if let Some(hint) = &run.hint {
            encode(&mut self.out, Kind::Note, hint);
        }
        encode(&mut self.out, Kind::Exit, &report.encode());
        self.flush_front()?;
        self.linger();
        Ok(())
    }

    /// Waits until the front has gone. It does so, or kills this process, when its own caller has the answer: tearing the
    /// sandbox down costs more than most runs, and would be in the way.
    fn linger(&self) {
        let Some(front) = self.transport.poll_fd() else { return };
        let until = Instant::now() + LINGER;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            // No events: the end alone. Nothing that fails here is worth more than going on to the end.
            if rustix::event::poll(&mut [PollFd::new(&front, PollFlags::empty())], Some(&left)) != Err(Errno::INTR) {
                return;
            }
        }
    }

    fn step(&mut self, run: &mut Run) -> Result<(), Stop> {
        let now = Instant::now();
        if run.deadline.is_some_and(|at| now >= at) {
            run.stopped = Some(Ending::DeadlinePassed);
            return Ok(());
        }
        let glimpse = now >= run.next_glimpse;
        if glimpse {
            run.next_glimpse = now + GLIMPSE;
        }
        if now >= run.next_tick || (glimpse && self.processes.stir(STIR)) {
            self.tick(run)?;
            run.next_tick = now + run.tick;
            if run.stopped.is_some() || run.ended.is_some() || self.status.is_some() {
                return Ok(());
            }
        }
        if self.transport.poll_fd().is_none() {
            // Sending is what moves frames; there is nothing to poll for.
            self.flush_front()?;
        }
        let interest = Interest {
            front_input: self.stdin.len() < STDIN_FULL,
            control_room: false,
            output: self.out.len() < OUT_FULL,
            stdin_room: !self.stdin.is_empty(),
        };
        let next = run.next_tick.min(run.next_glimpse);
        let until = run.deadline.map_or(next, |at| at.min(next));
        let seen = self.wait(interest, Some(until.saturating_duration_since(now)))?;
        if seen.control {
            self.read_control()?;
            self.notes(run)?;
            if run.ended.is_some() {
                // The rest of the output goes with the end.
                return Ok(());
            }
        }
        if seen.stdout {
            self.pump(run, true)?;
        }
        if seen.stderr && run.stopped.is_none() {
            self.pump(run, false)?;
        }
        if seen.front {
            self.receive()?;
            self.take_stdin()?;
        }
        if seen.stdin || seen.front {
            self.feed_stdin();
        }
        if !self.out.is_empty() {
            let taken = self.transport.send(&self.out)?;
            self.out.drain(..taken);
        }
        if seen.ended {
            self.reap();
        }
        Ok(())
    }

    /// The watchdog.
    fn tick(&mut self, run: &mut Run) -> Result<(), Stop> {
        self.reap();
        let usage = self.processes.usage();
        run.peak_memory = run.peak_memory.max(usage.memory);
        let (cpu, memory) = std::mem::replace(&mut run.last_seen, (usage.cpu, usage.memory));
        let idle = usage.cpu.saturating_sub(cpu) < IDLE_CPU && usage.memory <= memory;
        run.tick = if idle { (run.tick * 2).min(IDLE_TICK) } else { TICK };
        if run.limits.cpu_ns != u64::MAX && nanos(usage.cpu.saturating_sub(run.cpu_before)) >= run.limits.cpu_ns {
            run.stopped = Some(Ending::CpuLimit);
        } else if usage.memory > run.limits.memory && self.processes.proportional_memory() > run.limits.memory {
            // Forked processes share pages, so the cheap figure is only a reason to take the exact one.
            run.stopped = Some(Ending::OutOfMemory(137));
        }
        Ok(())
    }

    fn ending(&self, run: &Run) -> Ending {
        if let Some(ending) = run.stopped {
            return ending;
        }
        let code = match (run.ended, self.status) {
            (Some(code), _) => Some(i32::from(code)),
            (None, Some(status)) => status.exit_status(),
            (None, None) => return Ending::Crashed,
        };
        if let Some(code) = code {
            return if run.noted_out_of_memory && code == 1 { Ending::OutOfMemory(1) } else { Ending::Exited(code) };
        }
        let signal = self.status.and_then(|s| s.terminating_signal()).unwrap_or(Signal::KILL.as_raw());
        if signal == Signal::XCPU.as_raw() && run.limits.cpu_ns != u64::MAX {
            return Ending::CpuLimit;
        }
        if signal == Signal::KILL.as_raw() && oom_kills() > run.oom_before {
            return Ending::OutOfMemory(137);
        }
        let aborted = signal == Signal::ABORT.as_raw() || signal == Signal::TRAP.as_raw();
        if aborted && self.stderr_tail.windows(NODE_OUT_OF_MEMORY.len()).any(|w| w == NODE_OUT_OF_MEMORY) {
            return Ending::OutOfMemory(128 + signal);
        }
        Ending::Signaled(signal)
    }

    /// What the runner says during the run: `Started` once, or `Failure` instead; then at most a note.
    fn notes(&mut self, run: &mut Run) -> Result<(), Stop> {
        loop {
            let (kind, payload) = match self.from_runner.next_frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(()),
                Err(error) if !run.begun => return Err(Stop::Failed(error.to_string())),
                Err(_) => {
                    // The program got hold of the pipe and wrote garbage: it is not listened to any more.
                    self.control_ended = true;
                    self.from_runner = Decoder::new();
                    return Ok(());
                }
            };
            match Message::decode(kind, payload) {
                Ok(Message::Started) if !run.begun => {
                    run.begun = true;
                    self.stderr_tail.clear();
                    encode(&mut self.out, Kind::Started, &[]);
                }
                Ok(Message::Failure(text)) if !run.begun => return Err(Stop::Failed(text.to_string())),
                Ok(Message::Note(Note::OutOfMemory)) => run.noted_out_of_memory = true,
                Ok(Message::Hint(_)) if run.begun => {
                    run.hint.get_or_insert_with(|| payload.to_vec());
                }
                // Whoever says so without being the runner ends its own run with a status of its own choice, which
                // it can do anyway. It changes no ending that is decided.
                Ok(Message::Ended(status)) if run.begun && run.stopped.is_none() && self.status.is_none() => {
                    run.ended.get_or_insert(status);
                }
                // The program got hold of the pipe. It harms itself only.
                _ => {}
            }
        }
    }

    // ---- output

    /// One read of a stream into a frame for the front. The output limit is exact.
    /// Says how many bytes were read.
    fn pump(&mut self, run: &mut Run, stdout: bool) -> Result<usize, Stop> {
        // `Started` was sent before the first byte of output: it must not come after it.
        if !run.begun {
            self.read_control()?;
            self.notes(run)?;
        }
        let n = self.read_output(stdout)?;
        let data = self.buffer.get(..n).unwrap_or_default();
        let allowed = usize::try_from(run.output_left).unwrap_or(usize::MAX).min(n);
        if allowed > 0 {
            let kind = if stdout { Kind::Stdout } else { Kind::Stderr };
            encode(&mut self.out, kind, data.get(..allowed).unwrap_or_default());
            run.output_left -= allowed as u64;
        }
        if allowed < n && run.stopped.is_none() {
            run.stopped = Some(Ending::OutputLimit);
        }
        Ok(n)
    }

    /// Reads once into `buffer`; closes our end at the stream's. Keeps the tail of stderr.
    fn read_output(&mut self, stdout: bool) -> Result<usize, Stop> {
        let end = if stdout { &mut self.runner.stdout } else { &mut self.runner.stderr };
        let Some(fd) = end else { return Ok(0) };
        match rustix::io::read(&*fd, &mut self.buffer[..]) {
            Ok(0) => {
                *end = None;
                Ok(0)
            }
            Ok(n) => {
                if !stdout {
                    self.stderr_tail.extend_from_slice(self.buffer.get(..n).unwrap_or_default());
                    let extra = self.stderr_tail.len().saturating_sub(STDERR_KEPT);
                    self.stderr_tail.drain(..extra);
                }
                Ok(n)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    /// The rest of both streams, once no writer is alive or is going to write again.
    fn drain(&mut self, run: &mut Run) -> Result<(), Stop> {
        for stdout in [true, false] {
            loop {
                if run.output_left == 0 && run.stopped.is_some() {
                    break;
                }
                // 0: at its end, or nothing more. Our ends do not block.
                if self.pump(run, stdout)? == 0 {
                    break;
                }
                if self.out.len() >= OUT_FULL {
                    self.flush_front()?;
                }
            }
        }
        Ok(())
    }

    // ---- input

    fn take_stdin(&mut self) -> Result<(), Stop> {
        while let Some((kind, payload)) = next(&mut self.from_front)? {
            match Command::decode(kind, payload) {
                Ok(Command::Stdin(bytes)) => {
                    // After its end, or once the program has closed it, input goes nowhere.
                    if !self.stdin_ended && self.runner.stdin.is_some() {
                        self.stdin.extend(bytes);
                    }
                }
                Ok(Command::StdinEnd) => self.stdin_ended = true,
                _ => return Err(Stop::Failed(format!("{kind:?} came during the run"))),
            }
        }
        Ok(())
    }

    fn feed_stdin(&mut self) {
        while let Some(fd) = &self.runner.stdin {
            if self.stdin.is_empty() {
                if self.stdin_ended {
                    self.runner.stdin = None;
                }
                return;
            }
            match rustix::io::write(fd, self.stdin.as_slices().0) {
                Ok(n) => drop(self.stdin.drain(..n)),
                Err(Errno::AGAIN | Errno::INTR) => return,
                // EPIPE: the program does not read. That is its right.
                Err(_) => {
                    self.runner.stdin = None;
                    self.stdin.clear();
                }
            }
        }
    }

    // ---- the front and the runner's control pipes

    fn receive(&mut self) -> Result<(), Stop> {
        match self.transport.receive(&mut self.from_front)? {
            Received::Bytes | Received::Nothing => Ok(()),
            Received::Closed => Err(Stop::FrontGone),
        }
    }

    fn flush_front(&mut self) -> Result<(), Stop> {
        Ok(flush(&mut self.out, &mut self.transport)?)
    }

    fn read_control(&mut self) -> Result<(), Stop> {
        while !self.control_ended {
            match rustix::io::read(&self.runner.control_out, &mut self.buffer[..]) {
                Ok(0) => self.control_ended = true,
                Ok(n) => {
                    self.from_runner.feed(self.buffer.get(..n).unwrap_or_default());
                    // A program that floods the pipe is heard a piece at a time.
                    break;
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        Ok(())
    }

    fn flush_control(&mut self) -> Result<(), Stop> {
        let mut at = 0;
        while let Some(rest) = self.control_out.get(at..).filter(|r| !r.is_empty()) {
            match rustix::io::write(&self.runner.control_in, rest) {
                Ok(n) => at += n,
                Err(Errno::AGAIN | Errno::INTR) => {
                    let interest = Interest { control_room: true, output: true, ..Interest::default() };
                    let seen = self.wait(interest, None)?;
                    self.before_user_code(&seen)?;
                }
                Err(_) => {
                    // It is going: its last words, if any, are the reason.
                    self.read_control()?;
                    self.before_user_code(&Seen { ended: true, ..Seen::default() })?;
                }
            }
        }
        self.control_out.clear();
        Ok(())
    }

    fn runner_gone(&mut self, when: &str) -> Stop {
        self.kill_all();
        while self.runner.stderr.as_ref().is_some_and(readable) && matches!(self.read_output(false), Ok(n) if n > 0) {}
        let how = match self.status {
            Some(s) if s.exited() => format!("with status {}", s.exit_status().unwrap_or(0)),
            Some(s) => format!("by signal {}", s.terminating_signal().unwrap_or(0)),
            None => "without a status".to_string(),
        };
        let said = String::from_utf8_lossy(&self.stderr_tail);
        let said = said.trim();
        let colon = if said.is_empty() { "" } else { ": " };
        Stop::Failed(format!("the runner ended {when} ({how}){colon}{said}"))
    }

    // ---- processes

    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(rustix::process::WaitOptions::NOHANG) {
            note_end(&mut self.status, self.runner.pid, pid, status);
        }
    }

    fn kill_all(&mut self) {
        let (status, runner) = (&mut self.status, self.runner.pid);
        self.processes.kill_all(|pid, s| note_end(status, runner, pid, s));
    }

    // ---- waiting

    /// Waits for something to do. The front's end is always watched, and is [`Stop::FrontGone`].
    fn wait(&mut self, interest: Interest, timeout: Option<Duration>) -> Result<Seen, Stop> {
        #[derive(Clone, Copy, PartialEq)]
        enum Who {
            Front,
            Control,
            ControlRoom,
            Stdout,
            Stderr,
            Stdin,
            Ended,
        }
        let mut who = Vec::with_capacity(6);
        let mut fds = Vec::with_capacity(6);
        let front = self.transport.poll_fd();
        if let Some(fd) = &front {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, interest.front_input);
            flags.set(PollFlags::OUT, !self.out.is_empty());
            who.push(Who::Front);
            fds.push(PollFd::new(fd, flags));
        }
        // Behind the end of standard input nothing is fetched that would reset it.
        let wake = self.transport.wake_fd().filter(|_| interest.front_input && !self.stdin_ended);
        if let Some(fd) = &wake {
            who.push(Who::Front);
            fds.push(PollFd::new(fd, PollFlags::IN));
        }
        if !self.control_ended {
            who.push(Who::Control);
            fds.push(PollFd::new(&self.runner.control_out, PollFlags::IN));
        }
        if interest.control_room {
            who.push(Who::ControlRoom);
            fds.push(PollFd::new(&self.runner.control_in, PollFlags::OUT));
        }
        for (name, end) in [(Who::Stdout, &self.runner.stdout), (Who::Stderr, &self.runner.stderr)] {
            if let Some(fd) = end.as_ref().filter(|_| interest.output) {
                who.push(name);
                fds.push(PollFd::new(fd, PollFlags::IN));
            }
        }
        if let Some(fd) = self.runner.stdin.as_ref().filter(|_| interest.stdin_room) {
            who.push(Who::Stdin);
            fds.push(PollFd::new(fd, PollFlags::OUT));
        }
        if let Some(fd) = &self.runner.ended {
            who.push(Who::Ended);
            fds.push(PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN));
        }
        // Without a pidfd the end is found by looking.
        let blind = self.runner.ended.is_none();
        let timeout = if blind { Some(timeout.unwrap_or(TICK).min(TICK)) } else { timeout };
        let timespec = timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
        match rustix::event::poll(&mut fds, timespec.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let mut seen = Seen { ended: blind, ..Seen::default() };
        for (name, fd) in who.iter().zip(&fds) {
            let events = fd.revents();
            let input = events.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
            match name {
                Who::Front => {
                    if events.intersects(PollFlags::HUP | PollFlags::ERR) {
                        return Err(Stop::FrontGone);
                    }
                    seen.front = events.contains(PollFlags::IN);
                }
                Who::Control => seen.control = input,
                Who::ControlRoom => {}
                Who::Stdout => seen.stdout = input,
                Who::Stderr => seen.stderr = input,
                Who::Stdin => seen.stdin = events.intersects(PollFlags::OUT | PollFlags::ERR),
                Who::Ended => seen.ended = input,
            }
        }
        drop(fds);
        if blind {
            self.reap();
            seen.ended = self.status.is_some();
        }
        Ok(seen)
    }
}

/// Blocks until the front has taken everything.
pub(crate) fn flush(out: &mut Vec<u8>, transport: &mut impl Transport) -> io::Result<()> {
    while !out.is_empty() {
        let taken = transport.send(out)?;
        out.drain(..taken);
        if taken == 0
            && let Some(fd) = transport.poll_fd()
        {
            match rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::OUT)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

fn next(decoder: &mut Decoder) -> Result<Option<(Kind, &[u8])>, Stop> {
    decoder.next_frame().map_err(|error| Stop::Failed(error.to_string()))
}

fn note_end(status: &mut Option<WaitStatus>, runner: Pid, pid: Pid, ended: WaitStatus) {
    if pid == runner {
        *status = Some(ended);
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
