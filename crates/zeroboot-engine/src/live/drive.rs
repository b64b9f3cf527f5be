//! The task of a sandbox that lives: it alone moves bytes between the sandbox's socket and its [`State`], and ends it.
//!
//! ```text
//! running ── lease or idle time over ──┐
//!    ├────── end asked for ────────────┤
//!    ├────── socket closed, nonsense ──┴─> ended: all who wait are told, the worker is killed and cleared away
//! ```

use std::{io, sync::Arc, time::Instant};

use bytes::{Buf as _, BytesMut};
use tokio::{
    io::Interest,
    time::{Instant as Timer, sleep_until},
};
use zeroboot_proto::{Frame, HEADER_LEN, Header, Kind};

use super::{
    EndReason,
    handle::Handle,
    state::{Broken, State},
};
use crate::{Isolation, worker::Worker};

/// Bytes of one read: few while little comes, many while much comes.
const SMALL_READ: usize = 4 * 1024;
const LARGE_READ: usize = 256 * 1024;

/// Moves bytes until the sandbox ends; tells why it did. Dropping the worker kills it.
pub(crate) async fn drive(handle: &Arc<Handle>, worker: &Worker) -> EndReason {
    let mut inbox = Inbox::default();
    let mut crash_heard = false;
    let mut roomy = false;
    let mut timer = Box::pin(sleep_until(Timer::from_std(handle.state().deadline().0)));
    loop {
        let mut interest = Interest::READABLE;
        let deadline = {
            let mut state = handle.state();
            if let Some(reason) = state.end_wanted {
                return reason;
            }
            if state.saves != roomy {
                roomy = state.saves;
                make_room(handle, worker, roomy);
            }
            if !write(worker, &mut state) {
                interest |= Interest::WRITABLE;
            }
            let (deadline, reason) = state.deadline();
            if deadline <= Instant::now() {
                return reason;
            }
            Timer::from_std(deadline)
        };
        handle.drained.notify_waiters();
        if timer.deadline() != deadline {
            timer.as_mut().reset(deadline);
        }
        tokio::select! {
            biased;
            () = handle.wake.notified() => {}
            ready = worker.socket.ready(interest) => {
                let Ok(ready) = ready else { return gone(handle, worker, "its socket failed") };
                if !ready.is_readable() && !ready.is_read_closed() {
                    continue;
                }
                match inbox.read(worker) {
                    Ok(true) => {}
                    Ok(false) => return gone(handle, worker, "it ended without a word"),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                    Err(_) => return gone(handle, worker, "its socket failed"),
                }
                let mut state = handle.state();
                if let Err(Broken(reason)) = take_frames(handle, &mut inbox, &mut state, &mut crash_heard) {
                    drop(state);
                    return gone(handle, worker, &reason);
                }
            }
            () = &mut timer => {}
        }
    }
}

/// Writes what waits, as far as it goes. `false`: more waits.
fn write(worker: &Worker, state: &mut State) -> bool {
    let sending = state.sending();
    while !sending.is_empty() {
        match worker.socket.try_write(sending) {
            Ok(count) => sending.advance(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            // It reads no more; what it has to say is still read.
            Err(_) => sending.clear(),
        }
    }
    // The memory of a large request goes with it.
    *sending = BytesMut::new();
    true
}

/// Memory for a checkpoint, before its worker is told to save, and no longer than it lies there.
fn make_room(handle: &Handle, worker: &Worker, room: bool) {
    let memory = handle.facts.limits.memory;
    if let Err(error) = worker.limit_memory(if room { memory.saturating_mul(2) } else { memory }) {
        tracing::warn!(sandbox_id = %handle.facts.id, %error, room, "cannot set its memory limit for a checkpoint");
    }
}

fn take_frames(handle: &Handle, inbox: &mut Inbox, state: &mut State, crash_heard: &mut bool) -> Result<(), Broken> {
    while let Some(frame) = inbox.next()? {
        // A VM's worker says it once; nobody else has a guest.
        if (frame.channel, frame.kind) == (0, Kind::Crash) && handle.facts.isolation == Isolation::Vm && !*crash_heard {
            *crash_heard = true;
            let reason: String = String::from_utf8_lossy(frame.payload).chars().take(600).collect();
            tracing::warn!(sandbox_id = %handle.facts.id, ?reason, "the guest crashed");
            continue;
        }
        state.take(frame)?;
    }
    inbox.tidy();
    Ok(())
}

/// The sandbox vanished or spoke nonsense.
fn gone(handle: &Handle, worker: &Worker, reason: &str) -> EndReason {
    if worker.ran_out_of_memory() {
        return EndReason::OutOfMemory;
    }
    tracing::warn!(sandbox_id = %handle.facts.id, reason, "the sandbox broke");
    EndReason::Lost
}

/// Bytes as they came, up to the last whole frame.
#[derive(Debug, Default)]
struct Inbox {
    bytes: BytesMut,
    next_read: usize,
    taken: usize,
}

impl Inbox {
    /// Reads once; `false` at the end of the stream.
    fn read(&mut self, worker: &Worker) -> io::Result<bool> {
        let want = self.next_read.clamp(SMALL_READ, LARGE_READ);
        self.bytes.reserve(want);
        let room = self.bytes.capacity() - self.bytes.len();
        let count = worker.socket.try_read_buf(&mut self.bytes)?;
        self.next_read = if count >= room.min(want) { want * 4 } else { want / 2 };
        Ok(count > 0)
    }

    fn next(&mut self) -> Result<Option<Frame<'_>>, Broken> {
        let rest = self.bytes.get(self.taken..).unwrap_or_default();
        let Some((header, after)) = rest.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let header = Header::parse(*header).map_err(|error| Broken(error.to_string()))?;
        let Some(payload) = after.get(..header.len) else { return Ok(None) };
        self.taken += HEADER_LEN + header.len;
        Ok(Some(Frame { channel: header.channel, kind: header.kind, payload }))
    }

    /// Lets go of what was taken. A sandbox that says nothing holds no buffer.
    fn tidy(&mut self) {
        self.bytes.advance(std::mem::take(&mut self.taken));
        if self.bytes.is_empty() {
            self.bytes = BytesMut::new();
        }
    }
}
