//! What a sandbox sends and what it is sent: any bytes, cut anywhere. Nothing may panic, and what decodes must
//! encode to the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use zeroboot_proto::{
    Command, Decoder, ExitReport, FileChunk, Identity, Limits, Message, encode,
    live::{self, CellDone, ResultChunk},
};

fuzz_target!(|data: &[u8]| {
    let Some((&cut, stream)) = data.split_first() else { return };
    let mut decoder = Decoder::new();
    for chunk in stream.chunks(usize::from(cut).max(1)) {
        decoder.feed(chunk);
        loop {
            match decoder.next_frame() {
                Err(_) => return,
                Ok(None) => break,
                Ok(Some((kind, payload))) => {
                    let mut again = Vec::new();
                    encode(&mut again, kind, payload);
                    assert_eq!(again.len(), zeroboot_proto::HEADER_LEN + payload.len());
                    let (_command, _message) = (Command::decode(kind, payload), Message::decode(kind, payload));
                    if let Ok(limits) = Limits::decode(payload) {
                        assert_eq!(limits.encode(), payload);
                    }
                    if let Ok(identity) = Identity::decode(payload) {
                        assert_eq!(identity.encode(), payload);
                    }
                    if let Ok(chunk) = FileChunk::decode(payload) {
                        assert_eq!(chunk.encode(), payload);
                    }
                    if let Ok(chunk) = ResultChunk::decode(payload) {
                        assert_eq!(chunk.encode(), payload);
                    }
                    if let Ok(end) = live::decode::<live::End>(payload) {
                        assert_eq!(live::decode(&live::encode(&end)), Ok(end));
                    }
                    if let Ok(reply) = live::decode::<live::Reply>(payload) {
                        assert_eq!(live::decode(&live::encode(&reply)), Ok(reply));
                    }
                    if let Ok(open) = live::decode::<live::Open>(payload) {
                        assert_eq!(live::decode(&live::encode(&open)), Ok(open));
                    }
                    let (_done, _credit) = (CellDone::decode(payload), live::decode_credit(payload));
                    if let Ok(report) = ExitReport::decode(payload) {
                        assert_eq!(ExitReport::decode(&report.encode()), Ok(report));
                    }
                }
            }
        }
    }
});
