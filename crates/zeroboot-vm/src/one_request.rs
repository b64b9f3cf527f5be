//! A front that asks once and keeps what it hears: for a template's first exec and for measurements.

use std::{io, time::Instant};

use zeroboot_proto::{Decoder, Kind};

use crate::{Front, Received};

/// Most bytes that are kept of each stream.
const KEPT: usize = 1 << 20;

pub(crate) struct OneRequest {
    request: Vec<u8>,
    decoder: Decoder,
    pub(crate) stdout: Vec<u8>,
    /// Everything else that has words in it.
    pub(crate) complaints: Vec<u8>,
    /// When the first byte of standard output came.
    pub(crate) first: Option<Instant>,
}

impl OneRequest {
    /// `request`: all frames of it.
    pub(crate) fn new(request: &[u8]) -> OneRequest {
        let request = request.to_vec();
        OneRequest { request, decoder: Decoder::new(), stdout: Vec::new(), complaints: Vec::new(), first: None }
    }
}

impl Front for OneRequest {
    fn receive(&mut self, into: &mut Vec<u8>, wait: bool) -> io::Result<Received> {
        if self.request.is_empty() {
            // Waiting for more than the whole request would be for ever.
            return Ok(if wait { Received::Gone } else { Received::Nothing });
        }
        into.append(&mut self.request);
        Ok(Received::Bytes)
    }

    fn gone(&mut self) -> io::Result<bool> {
        Ok(false)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.decoder.feed(bytes);
        while let Some((kind, payload)) = self.decoder.next_frame().map_err(io::Error::other)? {
            let kept = match kind {
                Kind::Stdout => {
                    self.first.get_or_insert_with(Instant::now);
                    &mut self.stdout
                }
                Kind::Stderr | Kind::Failure | Kind::Crash => &mut self.complaints,
                _ => continue,
            };
            if kept.len() < KEPT {
                kept.extend_from_slice(payload);
            }
        }
        Ok(())
    }
}
