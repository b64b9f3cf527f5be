//! Our own terminal, while a program elsewhere has it.

use anyhow::Context;
use rustix::{
    stdio::stdin,
    termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr},
};
use tokio::signal::unix::{Signal, SignalKind, signal as listen};

/// Columns and rows of our terminal; what terminals have had for long if it does not know.
pub(crate) fn size() -> (u16, u16) {
    match tcgetwinsize(stdin()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col, size.ws_row),
        _ => (80, 24),
    }
}

/// Our terminal passes everything on while this lives. Dropping it, also in a panic, makes it what it was.
pub(crate) struct Raw {
    before: Termios,
}

impl Raw {
    pub(crate) fn new() -> anyhow::Result<Raw> {
        let raw = Raw { before: tcgetattr(stdin()).context("read the terminal's settings")? };
        raw.set()?;
        Ok(raw)
    }

    pub(crate) fn set(&self) -> anyhow::Result<()> {
        let mut settings = self.before.clone();
        settings.make_raw();
        tcsetattr(stdin(), OptionalActions::Drain, &settings).context("change the terminal's settings")
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Where that fails the terminal is gone.
        let _hung_up = tcsetattr(stdin(), OptionalActions::Drain, &self.before);
    }
}

/// The signals that end us, and the one that wakes us.
pub(crate) struct Signals {
    pub(crate) interrupt: Signal,
    pub(crate) terminate: Signal,
    pub(crate) hangup: Signal,
    /// Who stopped us may have changed the terminal's settings.
    pub(crate) resume: Signal,
}

impl Signals {
    pub(crate) fn new() -> anyhow::Result<Signals> {
        let listen = |kind| listen(kind).context("listen for signals");
        Ok(Signals {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            resume: listen(SignalKind::from_raw(rustix::process::Signal::CONT.as_raw()))?,
        })
    }
}
