//! The agent as PID 1 of a VM: it starts the runner that the initramfs names, and its transport is the
//! mailbox.

use std::{
    fs, io,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

use zeroboot_proto::{
    Decoder, HEADER_LEN, Header, Kind,
    mailbox::{AREA, Ring},
};

use crate::{
    files::Files,
    place::{ENVIRON, HOME, Place, USER, words},
    processes::Processes,
    runner::{Runner, Spawn},
    supervise::{Stop, Supervisor},
    transport::{Received, Transport},
    vm::{self, Vm},
};

/// The runner's command line, each word ended by a NUL. Written by the template's recipe.
const ARGV: &str = "/etc/zeroboot/argv";
/// Asks the runner to say its program's status and to stop itself, instead of ending: see
/// [`zeroboot_proto::ENDED`].
const LINGER: &str = "ZEROBOOT_LINGER";

/// Why the machine cannot serve a request.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {source}")]
struct StartError {
    what: String,
    source: io::Error,
}

/// Runs the machine. Returns only to end it: the end of PID 1 is a panic of the kernel, which the host sees
/// at once.
pub(crate) fn main() -> u8 {
    let reason = match run() {
        Err(error) => error.to_string(),
        Ok(Err(Stop::Failed(reason))) => reason,
        // In a VM the front cannot go, and the last ring never returns: the host ends the VM.
        Ok(Err(Stop::FrontGone) | Ok(())) => String::new(),
    };
    vm::console(&format!("zeroboot: {reason}"));
    1
}

fn run() -> Result<Result<(), Stop>, StartError> {
    let step = |what: &str| {
        let what = what.to_owned();
        move |source: io::Error| StartError { what, source }
    };
    let vm = Vm::start().map_err(step("start the machine"))?;
    let mut env = Place::Vm.environ().map_err(step(&format!("read {ENVIRON}")))?;
    // The runner takes it out of the environment; a runner that does not know it ends as any process.
    env.push((LINGER.into(), "1".into()));
    let spawn = Spawn {
        command: words(ARGV).map_err(step(&format!("read {ARGV}")))?,
        cwd: Some(PathBuf::from(HOME)),
        user: Some(USER),
        env: Some(env),
        prepare: &|command| Place::Vm.prepare(command),
    };
    let processes = Processes::new().map_err(step("adopt orphans"))?;
    let runner = Runner::spawn(&spawn).map_err(step("start the runner"))?;
    // After the runner was made, which would inherit it: when memory runs out, the program goes, not the agent.
    fs::write("/proc/self/oom_score_adj", "-1000").map_err(step("be spared when memory runs out"))?;
    let files = Files::new(Path::new(HOME), Some(USER)).map_err(step("open the working directory"))?;
    let mailbox = Mailbox { vm, ready: false, input: Vec::new(), cut: 0 };
    Ok(Supervisor::new(mailbox, Place::Vm, runner, processes, files).serve())
}

/// Frames through the mailbox.
struct Mailbox {
    vm: Vm,
    /// The template is frozen behind `Ready`; from there on this is a fork.
    ready: bool,
    /// Bytes that came along with the last ring.
    input: Vec<u8>,
    /// Bytes of a frame that did not fit into the last ring.
    cut: usize,
}

impl Mailbox {
    /// How many bytes of `frames` go with the next ring, and whether the last frame of all is among them.
    fn portion(&mut self, frames: &[u8]) -> (usize, bool) {
        let n = frames.len().min(AREA);
        let (mut at, mut last) = (self.cut, false);
        while at < n {
            let header = frames.get(at..).and_then(|rest| rest.first_chunk::<HEADER_LEN>());
            let Some(header) = header.and_then(|bytes| Header::parse(*bytes).ok()) else { break };
            let end = at + HEADER_LEN + header.len;
            if at + HEADER_LEN > n {
                // A header goes as a whole: that is how its frame is followed.
                break;
            }
            // A sandbox that lives ends in no other way than by `Failure`.
            last |= end <= n && header.channel == 0 && matches!(header.kind, Kind::Exit | Kind::Failure);
            at = end;
        }
        let n = if at > n { n } else { at };
        self.cut = at - n;
        (n, last)
    }
}

impl Transport for Mailbox {
    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.vm.wake_fd())
    }

    fn has_input(&self) -> bool {
        !self.input.is_empty()
    }

    fn receive(&mut self, decoder: &mut Decoder) -> io::Result<Received> {
        if self.input.is_empty() {
            // Before the ring: the host raises the line for what it has after it, and that is not to be forgotten.
            self.vm.forget_wake()?;
            // The host answers at once when the program runs, and waits for the request before.
            self.vm.exchange(Ring::Want, &[], &mut self.input);
        }
        if self.input.is_empty() {
            return Ok(Received::Nothing);
        }
        decoder.feed(&self.input);
        self.input.clear();
        Ok(Received::Bytes)
    }

    fn send(&mut self, frames: &[u8]) -> io::Result<usize> {
        if !self.ready {
            let mut decoder = Decoder::new();
            decoder.feed(frames);
            return match decoder.next_frame().map_err(io::Error::other)? {
                Some((Kind::Ready, about)) => {
                    self.vm.ready(about)?;
                    // Only forks come here.
                    self.ready = true;
                    self.vm.take_input(&mut self.input);
                    Ok(frames.len())
                }
                // The reason goes to the console, and the end of this process ends the machine.
                _ => Ok(frames.len()),
            };
        }
        let (n, last) = self.portion(frames);
        let why = if last { Ring::Done } else { Ring::Output };
        self.vm.exchange(why, frames.get(..n).unwrap_or_default(), &mut self.input);
        Ok(n)
    }
}
