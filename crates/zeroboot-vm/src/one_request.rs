//! A front that asks once and keeps what it hears: for a template's first exec and for measurements.

use std::{
    io,
    time::{Duration, Instant},
};

use zeroboot_proto::{
    Decoder, Kind,
    live::{CellDone, CellStatus, End, How, decode},
};
use zeroboot_sys::kick::Kick;

use crate::{Front, Received};

/// Most bytes that are kept of each stream.
const KEPT: usize = 1 << 20;

pub(crate) struct OneRequest<'a> {
    request: Vec<u8>,
    lives: Option<Lives<'a>>,
    decoder: Decoder,
    pub(crate) stdout: Vec<u8>,
    /// Everything else that has words in it.
    pub(crate) complaints: Vec<u8>,
    /// When the first byte of standard output came.
    pub(crate) first: Option<Instant>,
}

/// What a sandbox that lives does not do by itself: end after its one cell.
struct Lives<'a> {
    kick: &'a Kick,
    until: Instant,
    /// How its cell ended.
    end: Option<How>,
}

impl<'a> OneRequest<'a> {
    /// `request`: all frames of it.
    pub(crate) fn new(request: &[u8]) -> OneRequest<'a> {
        OneRequest {
            request: request.to_vec(),
            lives: None,
            decoder: Decoder::new(),
            stdout: Vec::new(),
            complaints: Vec::new(),
            first: None,
        }
    }

    /// One that leaves after the end of the one cell of a sandbox that lives, or when this time is over. `kick`: of the
    /// session's thread.
    pub(crate) fn leaving(request: &[u8], kick: &'a Kick, timeout: Duration) -> OneRequest<'a> {
        let lives = Lives { kick, until: Instant::now() + timeout, end: None };
        OneRequest { lives: Some(lives), ..OneRequest::new(request) }
    }

    /// Its cell came to its own end without an error.
    pub(crate) fn cell_was_good(&self) -> bool {
        let end = self.lives.as_ref().and_then(|lives| lives.end.as_ref());
        matches!(end, Some(How::Cell(CellDone { status: CellStatus::Ok, .. })))
    }
}

impl Front for OneRequest<'_> {
    fn receive(&mut self, into: &mut Vec<u8>, wait: bool) -> io::Result<Received> {
        if self.request.is_empty() {
            let leaves = |lives: &Lives<'_>| lives.end.is_some() || lives.until <= Instant::now();
            // Waiting for more than the whole request would be for ever.
            let gone = wait || self.lives.as_ref().is_some_and(leaves);
            return Ok(if gone { Received::Gone } else { Received::Nothing });
        }
        into.append(&mut self.request);
        Ok(Received::Bytes)
    }

    fn gone(&mut self) -> io::Result<bool> {
        Ok(false)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.decoder.feed(bytes);
        while let Some(frame) = self.decoder.next_on_any().map_err(io::Error::other)? {
            let (kind, payload) = (frame.kind, frame.payload);
            // A guest that waits for the next thing to do is kicked out of its sleep.
            match (kind, &mut self.lives) {
                (Kind::Started, Some(lives)) => {
                    lives.kick.after(lives.until.saturating_duration_since(Instant::now()))?
                }
                (Kind::End, Some(lives)) => {
                    lives.end = Some(decode::<End>(payload).map_err(io::Error::other)?.how);
                    lives.kick.after(Duration::ZERO)?;
                }
                _ => {}
            }
            let kept = match kind {
                Kind::Stdout => {
                    self.first.get_or_insert_with(Instant::now);
                    &mut self.stdout
                }
                Kind::Stderr | Kind::Error | Kind::Failure | Kind::Crash => &mut self.complaints,
                _ => continue,
            };
            if kept.len() < KEPT {
                kept.extend_from_slice(payload);
            }
        }
        Ok(())
    }
}
