//! One run: from `Run` to the `Exit` frame.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::Signal;
use zeroboot_proto::{Decoder, Ending, ExitReport, Kind, Limits, Message, Note, encode};

use super::frames::flush;
use super::request::Request;
use super::streams::{OUT_FULL, STDIN_FULL};
use super::wait::Interest;
use super::watchdog::Samples;
use super::{Stop, Supervisor, nanos};
use crate::processes::oom_kills;
use crate::sys;
use crate::transport::Transport;

/// Longest time from the last frame until the front closes its end.
const LINGER: Duration = Duration::from_secs(1);
/// What V8 writes when its heap is full, before it aborts.
const NODE_OUT_OF_MEMORY: &[u8] = b"JavaScript heap out of memory";

/// Figures of the present run.
pub(super) struct Run {
    pub(super) limits: Limits,
    started: Instant,
    deadline: Option<Instant>,
    pub(super) samples: Samples,
    /// CPU time at the start: warming is not the program's.
    pub(super) cpu_before: Duration,
    oom_before: Option<u64>,
    pub(super) peak_memory: u64,
    pub(super) output_left: u64,
    /// A limit that was hit. The first one counts.
    pub(super) stopped: Option<Ending>,
    noted_out_of_memory: bool,
    /// For the front, ahead of the end. One is enough.
    hint: Option<Vec<u8>>,
    /// The program has ended with this status, says its runner, and its process lingers.
    ended: Option<u8>,
    /// The runner has said that user code begins: from now on it is not believed.
    pub(super) begun: bool,
}

impl<T: Transport> Supervisor<T> {
    /// Lets the runner run its program, and reports it to the front.
    pub(super) fn run(&mut self, request: Request) -> Result<(), Stop> {
        if request.identity.is_none() {
            return Err(Stop::Failed("Run came without an Identity".into()));
        }
        let limits = request.limits.ok_or_else(|| Stop::Failed("Run came without Limits".into()))?;
        let prepared = self.prepared.take().ok_or_else(|| Stop::Failed("Run came before Ready".into()))?;
        let cpu_before = self.processes.cpu_of(self.runner.pid);
        prepared.ceilings.apply(&self.runner, &limits, cpu_before).map_err(Stop::failed)?;
        self.processes.limit(limits.memory);
        encode(&mut self.control_out, Kind::Run, &[]);
        let started = Instant::now();
        self.flush_control()?;
        let mut run = Run {
            limits,
            started,
            deadline: started.checked_add(Duration::from_nanos(limits.wall_ns)),
            samples: Samples::begin(started),
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
            Some(_) if self.in_vm() && sys::before_all_others().is_ok() => {
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

    /// Waits for one thing to do, and does it.
    fn step(&mut self, run: &mut Run) -> Result<(), Stop> {
        let now = Instant::now();
        if run.deadline.is_some_and(|at| now >= at) {
            run.stopped = Some(Ending::DeadlinePassed);
            return Ok(());
        }
        self.watch(run, now);
        if run.stopped.is_some() || self.status.is_some() {
            return Ok(());
        }
        if self.in_vm() {
            // Sending is what moves frames; there is nothing to poll for.
            self.flush_front()?;
        }
        let interest = Interest {
            front_input: self.stdin.len() < STDIN_FULL,
            control_room: false,
            output: self.out.len() < OUT_FULL,
            stdin_room: !self.stdin.is_empty(),
        };
        let next = run.samples.next();
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

    /// How the run ended: a limit, what the runner says, or its status.
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
    pub(super) fn notes(&mut self, run: &mut Run) -> Result<(), Stop> {
        loop {
            let (kind, payload) = match self.from_runner.next_frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(()),
                Err(error) if !run.begun => return Err(Stop::failed(error)),
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
}
