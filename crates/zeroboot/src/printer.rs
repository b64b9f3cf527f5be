//! The only place that prints.

use std::{
    fmt::Display,
    io::{self, Write},
};

/// Writes to standard output and at once; the caller decides what a closed output means.
pub(crate) fn stdout(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

/// Writes to standard error and at once.
pub(crate) fn stderr(bytes: &[u8]) -> io::Result<()> {
    io::stderr().lock().write_all(bytes)
}

/// A line on standard output.
pub(crate) fn line(text: impl Display) -> io::Result<()> {
    stdout(format!("{text}\n").as_bytes())
}

/// A line on standard error. If that is closed, the line is dropped.
pub(crate) fn note(text: impl Display) {
    let _closed = stderr(format!("{text}\n").as_bytes());
}

/// An error with its whole chain, and what to do about it.
pub(crate) fn error(error: &anyhow::Error, hint: Option<&str>) {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        // thiserror's transparent variants repeat their source.
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    note(format_args!("error: {text}"));
    if let Some(hint) = hint {
        note(format_args!("hint: {hint}"));
    }
}
