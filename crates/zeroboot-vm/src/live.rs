//! What the host owes a sandbox that lives: nothing but well-formed frames of channels that the front has opened and
//! that have not ended goes out of it, and of each no more than the front has said it will take.
//!
//! The front does not rely on it, since a guest that breaks out of its VM speaks for its worker. It has the reason from
//! here, and a worker that is still ours sends it nothing without bound.

use std::{collections::BTreeMap, time::Instant};

use serde::{Deserialize, Serialize};
use zeroboot_proto::{
    Frame, Kind, MAX_PAYLOAD, PayloadError, encode_on,
    live::{End, MAX_CHANNEL, Reply, ResultChunk, WINDOW, decode, decode_credit},
};

use crate::{SessionEnd, SessionError, phase::Verdict};

/// A sandbox from its `Live` on.
#[derive(Clone, Debug)]
pub(crate) struct Live {
    /// When it must have said `Started`; then there is none: the front ends it with its lease.
    pub(crate) setup_ends: Option<Instant>,
    /// It goes on from a checkpoint, and has not been told who it is.
    pub(crate) nameless: bool,
    /// The front waits for it to be saved.
    freezing: bool,
    channels: Channels,
}

/// What a checkpoint holds of it.
pub(crate) type Channels = BTreeMap<u16, Channel>;

/// Bytes on a channel, all since it was opened.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Channel {
    /// `Started` has come.
    started: bool,
    /// Sent by the guest under the front's credit.
    sent: u64,
    /// The front's credit, [`WINDOW`] included.
    credit: u64,
    /// Standard input that went to the guest, and how much of it the guest says it has passed on.
    fed: u64,
    granted: u64,
}

/// Bytes by which a guest may exceed its credit: the agent's last frame can be larger than the remaining credit.
const SLACK: u64 = MAX_PAYLOAD as u64;

impl Channel {
    fn new() -> Channel {
        Channel { started: false, sent: 0, credit: WINDOW.into(), fed: 0, granted: 0 }
    }

    /// Counts bytes that need credit. Frames without a byte count, too, or nothing would bound their number.
    fn spend(&mut self, payload: &[u8]) -> Result<(), &'static str> {
        self.sent = self.sent.saturating_add(payload.len().max(1) as u64);
        if self.sent > self.credit.saturating_add(SLACK) { Err("beyond its credit") } else { Ok(()) }
    }

    /// Counts what the guest says it has passed on.
    fn grant(&mut self, bytes: u32) -> Result<(), &'static str> {
        self.granted = self.granted.saturating_add(bytes.max(1).into());
        if self.granted > self.fed.saturating_add(SLACK) { Err("for bytes that it was not sent") } else { Ok(()) }
    }
}

impl Live {
    /// `Live` goes to the guest.
    pub(crate) fn begin(setup_ends: Instant) -> Live {
        Live { setup_ends: Some(setup_ends), nameless: false, freezing: false, channels: BTreeMap::new() }
    }

    /// It goes on from a checkpoint.
    pub(crate) fn go_on(channels: Channels) -> Live {
        Live { setup_ends: None, nameless: true, freezing: false, channels }
    }

    /// What a checkpoint keeps. It was saved, or could not be.
    pub(crate) fn frozen(&mut self) -> &Channels {
        self.freezing = false;
        &self.channels
    }

    /// Whether the guest is to have a frame of the front's: not if it was on its way when its channel ended.
    pub(crate) fn front_says(&mut self, frame: &Frame<'_>) -> Result<bool, SessionError> {
        let Frame { channel, kind, payload } = *frame;
        let order = || SessionError::FrontOrder(kind);
        match (channel, kind) {
            // First of all, and once.
            (0, Kind::Identity) if self.nameless => {
                self.nameless = false;
                return Ok(true);
            }
            _ if self.nameless => return Err(order()),
            (0, Kind::Freeze) if self.setup_ends.is_none() && !self.freezing => {
                self.freezing = true;
                return Ok(true);
            }
            _ => {}
        }
        if channel == 0 || channel > MAX_CHANNEL {
            return Err(order());
        }
        match (kind, self.channels.get_mut(&channel)) {
            (Kind::Arg | Kind::Env | Kind::Code, None) => {}
            (Kind::Open, None) => drop(self.channels.insert(channel, Channel::new())),
            (Kind::Stdin, Some(open)) => open.fed = open.fed.saturating_add(payload.len() as u64),
            (Kind::Credit, Some(open)) => {
                let more = decode_credit(payload).map_err(|_| order())?;
                open.credit = open.credit.saturating_add(more.into());
            }
            (Kind::StdinEnd | Kind::Signal | Kind::Resize | Kind::Close, Some(_)) => {}
            (Kind::Stdin | Kind::StdinEnd | Kind::Signal | Kind::Resize | Kind::Close | Kind::Credit, None) => {
                return Ok(false);
            }
            _ => return Err(order()),
        }
        Ok(true)
    }

    /// Puts a frame of the guest's into `out`, if it may have sent it.
    pub(crate) fn guest_says(&mut self, frame: &Frame<'_>, out: &mut Vec<u8>) -> Verdict {
        let Frame { channel, kind, payload } = *frame;
        let verdict = match (channel, kind) {
            (0, Kind::Started) if self.setup_ends.is_some() && payload.is_empty() => {
                self.setup_ends = None;
                Verdict::Lives
            }
            (0, Kind::Failure) if std::str::from_utf8(payload).is_ok() => Verdict::Over(SessionEnd::Failed),
            (0, Kind::Frozen) if self.setup_ends.is_none() && payload.is_empty() => {
                // One that comes late, or again in a fork of its checkpoint, says nothing.
                return if self.freezing { Verdict::AtRest } else { Verdict::Go };
            }
            (0, _) => Verdict::out_of_order(kind),
            _ if self.setup_ends.is_some() => Verdict::out_of_order(kind),
            _ => match self.channel_says(channel, kind, payload) {
                Ok(()) => Verdict::Go,
                Err(why) => Verdict::Crashed(format!("a {kind:?} frame of channel {channel} {why}")),
            },
        };
        // `AtRest` is told by who saves it.
        if !matches!(verdict, Verdict::Crashed(_) | Verdict::AtRest) {
            encode_on(out, channel, kind, payload);
        }
        verdict
    }

    fn channel_says(&mut self, channel: u16, kind: Kind, payload: &[u8]) -> Result<(), &'static str> {
        let open = self.channels.get_mut(&channel).ok_or("that is not open")?;
        let malformed = |_: PayloadError| "that is malformed";
        match kind {
            // A program's process id, or nothing.
            Kind::Started if !open.started && matches!(payload.len(), 0 | 4) => open.started = true,
            Kind::Stdout | Kind::Stderr | Kind::Error => open.spend(payload)?,
            Kind::Result => {
                ResultChunk::decode(payload).map_err(malformed)?;
                open.spend(payload)?;
            }
            Kind::Reply => {
                decode::<Reply>(payload).map_err(malformed)?;
                open.spend(payload)?;
            }
            Kind::Grant => open.grant(decode_credit(payload).map_err(malformed)?)?,
            Kind::End => {
                decode::<End>(payload).map_err(malformed)?;
                self.channels.remove(&channel);
            }
            _ => return Err("out of order"),
        }
        Ok(())
    }
}

/// For the fuzzer and the tests: a front and a guest that say anything, each frame 4 bytes and its payload. What goes on
/// to the front is held against what was opened, ended and granted.
#[doc(hidden)]
pub fn fuzz_live(mut bytes: &[u8]) {
    let mut live = Live::begin(Instant::now());
    let (mut lives, mut freezing, mut open) = (false, false, BTreeMap::<u16, (u64, u64)>::new());
    while let Some(([who, kind, channel, length], rest)) = bytes.split_first_chunk::<4>() {
        // Few channels and mostly few bytes, so that they meet; a frame of many bytes by repeating.
        let (payload, rest) = rest.split_at(usize::from(length & 31).min(rest.len()));
        bytes = rest;
        let many = payload.repeat(if length & 0x20 == 0 { 1 } else { 2000 });
        let payload = many.get(..many.len().min(MAX_PAYLOAD)).unwrap_or_default();
        let kind = Kind::ALL.get(usize::from(*kind) % Kind::ALL.len()).copied().unwrap_or(Kind::Stdout);
        let channel = u16::from(channel & 3) << (channel >> 6 << 2);
        let frame = Frame { channel, kind, payload };
        if who & 1 == 0 {
            let taken = live.front_says(&frame).unwrap_or(false);
            if taken && kind == Kind::Freeze {
                assert!(lives && channel == 0 && !std::mem::replace(&mut freezing, true), "frozen twice");
                continue;
            }
            assert!(!taken || (1..=MAX_CHANNEL).contains(&channel));
            if taken && kind == Kind::Open {
                assert!(open.insert(channel, (0, 0)).is_none(), "opened twice");
            }
            if let (true, Kind::Credit, Some((_, credit))) = (taken, kind, open.get_mut(&channel)) {
                *credit += u64::from(decode_credit(payload).unwrap_or_default());
            }
            continue;
        }
        let mut out = Vec::new();
        match live.guest_says(&frame, &mut out) {
            Verdict::Lives => assert!(!std::mem::replace(&mut lives, true), "it began twice"),
            Verdict::Over(end) => assert!(end == SessionEnd::Failed && kind == Kind::Failure),
            Verdict::AtRest => {
                assert!(std::mem::take(&mut freezing) && kind == Kind::Frozen && out.is_empty());
                live.frozen();
                continue;
            }
            Verdict::Go if kind == Kind::Frozen => {
                assert!(lives && out.is_empty());
                continue;
            }
            Verdict::Go => {
                let (sent, credit) = open.get_mut(&channel).filter(|_| lives).unwrap_or_else(|| panic!("{frame:?}"));
                if matches!(kind, Kind::Stdout | Kind::Stderr | Kind::Result | Kind::Error | Kind::Reply) {
                    *sent += payload.len() as u64;
                }
                assert!(*sent <= *credit + u64::from(WINDOW) + SLACK);
                if kind == Kind::End {
                    open.remove(&channel);
                }
            }
            Verdict::Crashed(_) => {
                assert!(out.is_empty());
                return;
            }
            Verdict::Ended(_) => unreachable!("only an exec is ended"),
        }
        assert_eq!(out.len(), zeroboot_proto::HEADER_LEN + payload.len());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zeroboot_proto::live::{CellDone, CellStatus, How, encode};

    use super::*;

    /// One that has said that it lives, and whose front has opened channel 7.
    fn opened() -> Live {
        let mut live = Live::begin(Instant::now());
        assert_eq!(guest_says(&mut live, 0, Kind::Started, b""), Verdict::Lives);
        assert_eq!(front_says(&mut live, 7, Kind::Arg, b"x"), Some(true));
        assert_eq!(front_says(&mut live, 7, Kind::Open, b""), Some(true));
        live
    }

    fn front_says(live: &mut Live, channel: u16, kind: Kind, payload: &[u8]) -> Option<bool> {
        live.front_says(&Frame { channel, kind, payload }).ok()
    }

    fn guest_says(live: &mut Live, channel: u16, kind: Kind, payload: &[u8]) -> Verdict {
        live.guest_says(&Frame { channel, kind, payload }, &mut Vec::new())
    }

    fn goes_on(live: &mut Live, channel: u16, kind: Kind, payload: &[u8]) {
        assert_eq!(guest_says(live, channel, kind, payload), Verdict::Go, "{kind:?} on {channel}");
    }

    #[track_caller]
    fn crashes(live: &mut Live, channel: u16, kind: Kind, payload: &[u8], why: &str) {
        let Verdict::Crashed(reason) = guest_says(live, channel, kind, payload) else { panic!("{kind:?} went on") };
        assert!(reason.contains(why), "{reason}");
    }

    fn end() -> Vec<u8> {
        let done = CellDone { status: CellStatus::Ok, execution_count: 1 };
        encode(&End { how: How::Cell(done), wall_ns: 1, context_lost: false })
    }

    #[test]
    fn a_channel_goes_from_its_open_to_its_end_and_again() {
        let mut live = opened();
        let result = ResultChunk { main: true, append: false, last: true, mime: "text/plain", data: b"42" }.encode();
        for _ in 0..2 {
            goes_on(&mut live, 7, Kind::Started, &[1, 0, 0, 0]);
            goes_on(&mut live, 7, Kind::Stdout, b"out");
            goes_on(&mut live, 7, Kind::Stderr, b"err");
            goes_on(&mut live, 7, Kind::Result, &result);
            goes_on(&mut live, 7, Kind::Error, b"{}");
            goes_on(&mut live, 7, Kind::Reply, &encode(&Reply::Contexts(Vec::new())));
            goes_on(&mut live, 7, Kind::End, &end());
            // What the front had sent before it saw the end.
            for (kind, payload) in [(Kind::Stdin, &b"x"[..]), (Kind::Close, b""), (Kind::Credit, &[1, 0, 0, 0])] {
                assert_eq!(front_says(&mut live, 7, kind, payload), Some(false), "{kind:?}");
            }
            crashes(&mut live.clone(), 7, Kind::Stdout, b"late", "not open");
            assert_eq!(front_says(&mut live, 7, Kind::Open, b""), Some(true));
        }
    }

    #[test]
    fn a_guest_is_at_rest_once_when_that_was_asked() {
        let mut live = opened();
        assert_eq!(guest_says(&mut live, 0, Kind::Frozen, b""), Verdict::Go);
        assert_eq!(front_says(&mut live, 0, Kind::Freeze, b""), Some(true));
        assert_eq!(front_says(&mut live, 0, Kind::Freeze, b""), None, "before the answer");
        crashes(&mut live.clone(), 0, Kind::Frozen, b"x", "out of order");
        assert_eq!(guest_says(&mut live, 0, Kind::Frozen, b""), Verdict::AtRest);
        let channels = live.frozen().clone();
        assert_eq!(guest_says(&mut live, 0, Kind::Frozen, b""), Verdict::Go);
        assert_eq!(front_says(&mut live, 0, Kind::Freeze, b""), Some(true), "again");
        assert_eq!(front_says(&mut Live::begin(Instant::now()), 0, Kind::Freeze, b""), None, "before it lives");
        crashes(&mut Live::begin(Instant::now()), 0, Kind::Frozen, b"", "out of order");

        // A fork of the checkpoint: a name first, and then what is under way.
        let mut child = Live::go_on(channels);
        assert_eq!(front_says(&mut child, 7, Kind::Stdin, b"x"), None);
        assert_eq!(front_says(&mut child, 0, Kind::Freeze, b""), None);
        assert_eq!(front_says(&mut child, 0, Kind::Identity, b""), Some(true));
        assert_eq!(front_says(&mut child, 0, Kind::Identity, b""), None);
        goes_on(&mut child, 7, Kind::Stdout, b"more");
        crashes(&mut child, 8, Kind::Stdout, b"x", "not open");
    }

    #[test]
    fn a_guest_says_only_what_a_guest_may_say() {
        // Before it lives: nothing but that, or why not.
        let fresh = || Live::begin(Instant::now());
        crashes(&mut fresh(), 7, Kind::Stdout, b"x", "out of order");
        crashes(&mut fresh(), 0, Kind::Started, b"x", "out of order");
        assert_eq!(guest_says(&mut fresh(), 0, Kind::Failure, b"no"), Verdict::Over(SessionEnd::Failed));
        crashes(&mut fresh(), 0, Kind::Failure, &[0xff], "out of order");
        // On channel 0, an exec's frames and its worker's own are none of its.
        for kind in Kind::ALL.iter().copied().filter(|kind| !matches!(kind, Kind::Failure | Kind::Frozen)) {
            crashes(&mut opened(), 0, kind, b"", "out of order");
        }
        // On a channel: nothing of the other direction, nor of an exec.
        let allowed = [Kind::Started, Kind::Stdout, Kind::Stderr, Kind::Result, Kind::Error, Kind::Reply, Kind::End];
        for kind in Kind::ALL.iter().copied().filter(|kind| !allowed.contains(kind) && *kind != Kind::Grant) {
            crashes(&mut opened(), 7, kind, &end(), "out of order");
        }
        // Nor on one that was not opened, the highest number included.
        for (channel, kind) in [8, 0x8007, u16::MAX].into_iter().flat_map(|n| allowed.map(|kind| (n, kind))) {
            crashes(&mut opened(), channel, kind, &end(), "not open");
        }
    }

    #[test]
    fn a_malformed_payload_is_not_sent_on() {
        crashes(&mut opened(), 7, Kind::Started, b"123", "out of order");
        for kind in [Kind::Result, Kind::Reply, Kind::End, Kind::Grant] {
            crashes(&mut opened(), 7, kind, &[0xff; 3], "malformed");
        }
    }

    #[test]
    fn frames_that_need_no_credit_do_not_come_without_end() {
        let mut live = opened();
        goes_on(&mut live, 7, Kind::Started, b"");
        crashes(&mut live, 7, Kind::Started, b"", "out of order");
        let grant = 0u32.to_le_bytes();
        for (kind, payload, slack) in [
            (Kind::Stdout, &b""[..], u64::from(WINDOW) + SLACK),
            (Kind::Error, b"", u64::from(WINDOW) + SLACK),
            (Kind::Grant, &grant, SLACK),
        ] {
            let mut live = opened();
            (0..slack).for_each(|_| goes_on(&mut live, 7, kind, payload));
            assert!(matches!(guest_says(&mut live, 7, kind, payload), Verdict::Crashed(_)), "{kind:?}");
        }
    }

    #[test]
    fn output_is_at_most_a_frame_ahead_of_its_credit() {
        let mut live = opened();
        let frame = vec![b'x'; MAX_PAYLOAD];
        // The window is four frames and their headers.
        for kind in [Kind::Stdout, Kind::Stderr, Kind::Error, Kind::Stderr, Kind::Stdout] {
            goes_on(&mut live, 7, kind, &frame);
        }
        assert_eq!(front_says(&mut live, 7, Kind::Credit, &(MAX_PAYLOAD as u32).to_le_bytes()), Some(true));
        goes_on(&mut live, 7, Kind::Stdout, &frame);
        crashes(&mut live, 7, Kind::Stdout, &frame, "beyond its credit");
        // Another channel's credit is another's, and so is that of the next with the number.
        let mut live = opened();
        assert_eq!(front_says(&mut live, 8, Kind::Open, b""), Some(true));
        assert_eq!(front_says(&mut live, 8, Kind::Credit, &u32::MAX.to_le_bytes()), Some(true));
        (0..5).for_each(|_| goes_on(&mut live, 7, Kind::Stdout, &frame));
        (0..50).for_each(|_| goes_on(&mut live, 8, Kind::Stdout, &frame));
        crashes(&mut live, 7, Kind::Stdout, &frame, "beyond its credit");
    }

    #[test]
    fn a_guest_grants_no_more_than_a_frame_beyond_what_it_was_sent() {
        let mut live = opened();
        assert_eq!(front_says(&mut live, 7, Kind::Stdin, b"12345"), Some(true));
        goes_on(&mut live, 7, Kind::Grant, &5u32.to_le_bytes());
        goes_on(&mut live, 7, Kind::Grant, &(SLACK as u32).to_le_bytes());
        crashes(&mut live, 7, Kind::Grant, &1u32.to_le_bytes(), "not sent");
        crashes(&mut opened(), 7, Kind::Grant, &u32::MAX.to_le_bytes(), "not sent");
    }

    #[test]
    fn a_front_that_mistakes_its_own_channels_is_told() {
        let mut live = opened();
        for (channel, kind) in
            [(0, Kind::Open), (0, Kind::Stdin), (0x8000, Kind::Open), (7, Kind::Open), (7, Kind::Arg), (8, Kind::Run)]
        {
            assert_eq!(front_says(&mut live, channel, kind, b""), None, "{kind:?} on {channel}");
        }
        assert_eq!(front_says(&mut live, 7, Kind::Credit, b"123"), None);
        assert_eq!(front_says(&mut live, 8, Kind::Signal, b"\x02"), Some(false));
        assert_eq!(front_says(&mut live, MAX_CHANNEL, Kind::Open, b""), Some(true));
    }

    proptest! {
        #[test]
        fn nothing_goes_on_that_was_not_opened_or_has_no_credit(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            fuzz_live(&bytes);
        }

        #[test]
        fn a_guest_that_begins_well_is_held_to_it_too(
            steps in proptest::collection::vec((any::<bool>(), 0..4usize, 1u8..3, 0u8..64), 0..200),
        ) {
            // It lives, and channel 1 is open.
            let kind = |kind: Kind| Kind::ALL.iter().position(|k| *k == kind).unwrap() as u8;
            let mut bytes = vec![1, kind(Kind::Started), 0, 0, 0, kind(Kind::Open), 1, 0];
            for (guest, which, channel, length) in steps {
                let kinds = if guest {
                    [Kind::Stdout, Kind::Stderr, Kind::Stdout, Kind::Error]
                } else {
                    [Kind::Open, Kind::Credit, Kind::Stdin, Kind::Close]
                };
                let length = if kinds[which] == Kind::Credit { 4 } else { length };
                bytes.extend([u8::from(guest), kind(kinds[which]), channel, length]);
                bytes.extend(vec![1; usize::from(length & 31)]);
            }
            fuzz_live(&bytes);
        }
    }
}
