//! An emulator as a child process: what it inherits, what it says, and its end, which is never later than ours.

use std::{
    ffi::OsString,
    fs,
    io::{self, Read, Seek, SeekFrom, Write},
    os::{fd::AsRawFd, unix::process::CommandExt},
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::{
    fs::MemfdFlags,
    io::FdFlags,
    process::{Signal, set_parent_process_death_signal},
};

use super::{CHILD, LANE_FAILED, TIMED_OUT};

/// An emulator that has not started yet. Its machine writes to three pipes and a console.
pub(crate) struct Emulator {
    command: Command,
    console: fs::File,
    out: (io::PipeReader, io::PipeWriter),
    err: (io::PipeReader, io::PipeWriter),
    status: (io::PipeReader, io::PipeWriter),
    /// Closed when the emulator has started.
    inherited: Vec<fs::File>,
    /// What to show when the machine ended too early, beside its console.
    log: Option<fs::File>,
}

/// Where an emulator finds a descriptor that it inherits.
fn path(file: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

impl Emulator {
    pub(crate) fn new(program: impl IntoIterator<Item = OsString>) -> Result<Emulator> {
        let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
        command.arg(CHILD).arg(std::process::id().to_string()).args(program);
        Ok(Emulator {
            command,
            console: memory_file("console")?,
            out: inherited_pipe()?,
            err: inherited_pipe()?,
            status: inherited_pipe()?,
            inherited: Vec::new(),
            log: None,
        })
    }

    pub(crate) fn console(&self) -> String {
        path(&self.console)
    }

    pub(crate) fn out(&self) -> String {
        path(&self.out.1)
    }

    pub(crate) fn err(&self) -> String {
        path(&self.err.1)
    }

    /// The machine writes the command's exit status there.
    pub(crate) fn status(&self) -> String {
        path(&self.status.1)
    }

    /// A file without a name with these bytes, for the emulator alone.
    pub(crate) fn file(&mut self, name: &str, parts: &[&[u8]]) -> Result<String> {
        let mut file = memory_file(name)?;
        for part in parts {
            file.write_all(part).with_context(|| format!("cannot write {name}"))?;
        }
        let at = path(&file);
        self.inherited.push(file);
        Ok(at)
    }

    /// A file for the emulator's own words, which are shown when the machine ends too early.
    pub(crate) fn log(&mut self) -> Result<String> {
        let log = memory_file("log")?;
        let at = path(&log);
        self.log = Some(log);
        Ok(at)
    }

    pub(crate) fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Starts it, passes on what the machine says, and gives the status that it ends with.
    pub(crate) fn run(mut self, timeout: Duration, show_console: bool) -> Result<u8> {
        let deadline = Instant::now() + timeout;
        let command = self.command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().context("cannot start the emulator")?;
        // Now the emulator holds the only writing ends, and its end is the end of each stream.
        let ((mut out, _), (mut err, _), (mut status, _)) = (self.out, self.err, self.status);
        drop(self.inherited);

        let streams = [
            thread::spawn(move || pass_on(&mut out, io::stdout())),
            thread::spawn(move || pass_on(&mut err, io::stderr())),
        ];
        let in_time = wait(&mut child, deadline)?;
        for stream in streams {
            // A thread that panicked has said so.
            stream.join().ok();
        }
        let mut said = String::new();
        status.read_to_string(&mut said).context("cannot read the exit status")?;
        let status = said.trim().parse::<u8>();
        if show_console || (status.is_err() && in_time) {
            show("console", &mut self.console)?;
            self.log.as_mut().map_or(Ok(()), |log| show("emulator", log))?;
        }
        match status {
            Ok(status) => Ok(status),
            Err(_) if !in_time => {
                eprintln!("nested lane: not done after {} s", timeout.as_secs());
                Ok(TIMED_OUT)
            }
            Err(_) => bail!("the machine ended before the command did"),
        }
    }
}

/// Becomes the program in `args`, which is killed when our parent ends, however it ends.
pub(crate) fn child(mut args: impl Iterator<Item = OsString>) -> ExitCode {
    let parent = args.next().unwrap_or_default();
    let program = args.next().unwrap_or_default();
    let bound = set_parent_process_death_signal(Some(Signal::KILL));
    // The parent may have ended before the line above.
    let alive = rustix::process::getppid().is_some_and(|pid| parent == *pid.as_raw_nonzero().to_string());
    if bound.is_err() || !alive {
        return ExitCode::from(LANE_FAILED);
    }
    let error = Command::new(&program).args(args).exec();
    eprintln!("nested lane: cannot run {}: {error}", program.display());
    ExitCode::from(LANE_FAILED)
}

/// The last lines of a file, each marked.
fn show(mark: &str, file: &mut fs::File) -> Result<()> {
    let mut text = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    for line in lines.iter().skip(lines.len().saturating_sub(2000)) {
        eprintln!("[{mark}] {}", line.trim_end());
    }
    Ok(())
}

/// A file without a name, which the emulator inherits.
fn memory_file(name: &str) -> Result<fs::File> {
    Ok(rustix::fs::memfd_create(name, MemfdFlags::empty()).context("cannot make a file in memory")?.into())
}

/// A pipe whose writing end the emulator inherits.
fn inherited_pipe() -> Result<(io::PipeReader, io::PipeWriter)> {
    let (reader, writer) = io::pipe().context("cannot make a pipe")?;
    rustix::io::fcntl_setfd(&writer, FdFlags::empty()).context("cannot keep a pipe open")?;
    Ok((reader, writer))
}

fn pass_on(from: &mut io::PipeReader, mut to: impl Write) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                if to.write_all(&buffer[..count]).and_then(|()| to.flush()).is_err() {
                    // Nobody listens any more. The emulator goes with us.
                    std::process::exit(i32::from(LANE_FAILED));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Waits for the end of the machine; `false` when the time ran out and it was ended.
fn wait(emulator: &mut Child, deadline: Instant) -> Result<bool> {
    while Instant::now() < deadline {
        if emulator.try_wait().context("cannot wait for the emulator")?.is_some() {
            return Ok(true);
        }
        thread::sleep(Duration::from_millis(20));
    }
    emulator.kill().context("cannot end the emulator")?;
    emulator.wait().context("cannot wait for the emulator")?;
    Ok(false)
}
