//! What a run has written and shown: the newest of it, for readers that are slow or come later.

use std::{collections::VecDeque, sync::Arc};

use bytes::{Bytes, BytesMut};

/// A result: one value in several MIME types.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MimeBundle {
    /// The value of the cell's last expression; else something that it displayed.
    pub main: bool,
    /// MIME type and data, each type once.
    pub parts: Vec<(String, Bytes)>,
}

/// The uncaught error of a cell.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct CellError {
    /// Its type, such as `ValueError`.
    pub name: String,
    /// Its message.
    pub value: String,
    /// Text for people, without our frames.
    pub traceback: String,
}

/// What a run wrote or showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// Bytes of standard output, or of the terminal.
    Stdout(Bytes),
    /// Bytes of standard error.
    Stderr(Bytes),
    /// A result.
    Result(Arc<MimeBundle>),
    /// An uncaught error.
    Error(Arc<CellError>),
    /// So many bytes are not here any more, or never were: a result that was too large.
    Lost(u64),
}

/// Memory that an item takes beside its bytes (about).
const EACH: usize = 96;
/// Size up to which pieces of one stream are joined.
const PIECE: usize = 4096;

impl Item {
    /// How far it moves the offset: a byte of output by one, anything else by one.
    fn span(&self) -> u64 {
        match self {
            Item::Stdout(bytes) | Item::Stderr(bytes) => bytes.len() as u64,
            Item::Result(_) | Item::Error(_) | Item::Lost(_) => 1,
        }
    }

    /// Bytes of the two streams.
    fn stream(&self) -> u64 {
        match self {
            Item::Stdout(bytes) | Item::Stderr(bytes) => bytes.len() as u64,
            Item::Result(_) | Item::Error(_) | Item::Lost(_) => 0,
        }
    }

    fn weight(&self) -> usize {
        EACH + match self {
            Item::Stdout(bytes) | Item::Stderr(bytes) => bytes.len(),
            Item::Result(bundle) => bundle.parts.iter().map(|(mime, data)| EACH + mime.len() + data.len()).sum(),
            Item::Error(error) => error.name.len() + error.value.len() + error.traceback.len(),
            Item::Lost(_) => 0,
        }
    }
}

#[derive(Clone, Debug)]
struct Piece {
    at: Place,
    item: Item,
}

impl Piece {
    /// The offset behind it.
    fn end(&self) -> u64 {
        self.at.offset + self.item.span()
    }
}

/// A place in a log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) offset: u64,
    /// Bytes of the two streams before it.
    pub(crate) stream: u64,
    /// Bytes of the results before it, as they came over the wire.
    pub(crate) shown: u64,
}

/// The newest items, one behind the other without a gap.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log {
    pieces: VecDeque<Piece>,
    end: Place,
    weight: usize,
}

impl Log {
    pub(crate) fn end(&self) -> Place {
        self.end
    }

    /// Memory that it takes.
    pub(crate) fn weight(&self) -> usize {
        self.weight
    }

    /// Offset of the oldest item that is still here.
    pub(crate) fn start(&self) -> u64 {
        self.pieces.front().map_or(self.end.offset, |piece| piece.at.offset)
    }

    /// Offset of the item behind the oldest one; `None` if there is one at most.
    pub(crate) fn start_of_second(&self) -> Option<u64> {
        self.pieces.get(1).map(|piece| piece.at.offset)
    }

    /// As [`Log::push`], after so many bytes of results in all.
    pub(crate) fn push_shown(&mut self, item: Item, shown: u64) {
        self.push(item);
        self.end.shown = shown;
    }

    pub(crate) fn push(&mut self, item: Item) {
        let (span, stream) = (item.span(), item.stream());
        let before = self.pieces.back().map_or(0, |piece| piece.item.weight());
        let joined = match (self.pieces.back_mut().map(|piece| &mut piece.item), &item) {
            (Some(Item::Stdout(old)), Item::Stdout(new)) | (Some(Item::Stderr(old)), Item::Stderr(new))
                if old.len() + new.len() <= PIECE =>
            {
                let mut both = BytesMut::with_capacity(old.len() + new.len());
                both.extend_from_slice(old);
                both.extend_from_slice(new);
                *old = both.freeze();
                true
            }
            _ => false,
        };
        if joined {
            self.weight += self.pieces.back().map_or(0, |piece| piece.item.weight()) - before;
        } else {
            self.weight += item.weight();
            self.pieces.push_back(Piece { at: self.end, item });
        }
        self.end.offset += span;
        self.end.stream += stream;
    }

    /// Lets go of the oldest item.
    pub(crate) fn pop(&mut self) -> bool {
        let Some(piece) = self.pieces.pop_front() else { return false };
        self.weight -= piece.item.weight();
        true
    }

    /// Lets go of everything.
    pub(crate) fn clear(&mut self) {
        self.pieces.clear();
        self.weight = 0;
    }

    /// The place that an offset stands for: the nearest that is here, or the end.
    pub(crate) fn place(&self, offset: u64) -> Place {
        match self.index_at(offset).and_then(|index| self.pieces.get(index)) {
            Some(piece) => piece.at.forward(offset.saturating_sub(piece.at.offset), &piece.item),
            None => self.end,
        }
    }

    /// The piece that holds this offset, or the first one behind it.
    fn index_at(&self, offset: u64) -> Option<usize> {
        let index = self.pieces.partition_point(|piece| piece.end() <= offset);
        (index < self.pieces.len()).then_some(index)
    }

    /// What is at this place, and the place behind it; `None` at the end.
    pub(crate) fn read(&self, from: Place) -> Option<(Item, Place)> {
        let Some(index) = self.index_at(from.offset) else {
            // All of it fell out, up to the end.
            let lost = self.end.offset.checked_sub(from.offset).filter(|lost| *lost > 0)?;
            return Some((Item::Lost(lost), self.end));
        };
        let piece = self.pieces.get(index)?;
        if let Some(lost) = piece.at.offset.checked_sub(from.offset).filter(|lost| *lost > 0) {
            return Some((Item::Lost(lost), piece.at));
        }
        let behind = self.pieces.get(index + 1).map_or(self.end, |next| next.at);
        let skip = usize::try_from(from.offset - piece.at.offset).unwrap_or(usize::MAX);
        let item = match &piece.item {
            Item::Stdout(bytes) => Item::Stdout(bytes.slice(skip.min(bytes.len())..)),
            Item::Stderr(bytes) => Item::Stderr(bytes.slice(skip.min(bytes.len())..)),
            other => other.clone(),
        };
        Some((item, behind))
    }
}

impl Place {
    /// So far into an item that begins here.
    fn forward(self, by: u64, item: &Item) -> Place {
        let by = by.min(item.stream());
        Place { offset: self.offset + by, stream: self.stream + by, ..self }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(log: &Log, from: u64) -> Vec<Item> {
        let mut place = log.place(from);
        place.offset = from;
        let mut items = Vec::new();
        while let Some((item, next)) = log.read(place) {
            assert!(next.offset > place.offset);
            items.push(item);
            place = next;
        }
        items
    }

    fn out(text: &str) -> Item {
        Item::Stdout(Bytes::copy_from_slice(text.as_bytes()))
    }

    #[test]
    fn what_fell_out_is_said_and_what_is_left_is_exact() {
        let mut log = Log::default();
        let big = "x".repeat(PIECE);
        log.push(out("abc"));
        log.push(Item::Stderr(Bytes::from_static(b"de")));
        log.push(out(&big));
        assert_eq!(all(&log, 1), [out("bc"), Item::Stderr(Bytes::from_static(b"de")), out(&big)]);
        assert!(log.pop());
        assert_eq!(all(&log, 1), [Item::Lost(2), Item::Stderr(Bytes::from_static(b"de")), out(&big)]);
        log.clear();
        assert_eq!(all(&log, 1), [Item::Lost(4 + PIECE as u64)]);
        assert_eq!((log.weight(), log.start()), (0, log.end().offset));
    }

    #[test]
    fn a_result_is_one_step_and_no_byte_of_a_stream() {
        let mut log = Log::default();
        log.push(out("ab"));
        let bundle = Arc::new(MimeBundle { main: true, parts: vec![("text/plain".into(), Bytes::from_static(b"1"))] });
        log.push_shown(Item::Result(bundle.clone()), 9);
        log.push(out("c"));
        assert_eq!(log.end(), Place { offset: 4, stream: 3, shown: 9 });
        assert_eq!(all(&log, 2), [Item::Result(bundle), out("c")]);
        assert_eq!(log.place(3), Place { offset: 3, stream: 2, shown: 9 });
    }

    #[test]
    fn single_bytes_of_one_stream_are_put_together() {
        let mut log = Log::default();
        (0..PIECE * 2).for_each(|_| log.push(out("x")));
        assert_eq!(log.pieces.len(), 2);
        assert_eq!(log.weight(), 2 * (PIECE + EACH));
    }

    proptest! {
        #[test]
        fn every_offset_reads_the_rest(
            pieces in proptest::collection::vec((any::<bool>(), 1usize..6000), 1..20), popped in 0usize..20,
        ) {
            let mut log = Log::default();
            let mut whole = Vec::new();
            for (at, (error, len)) in pieces.iter().enumerate() {
                let bytes = Bytes::from(vec![at as u8; *len]);
                whole.extend_from_slice(&bytes);
                log.push(if *error { Item::Stderr(bytes) } else { Item::Stdout(bytes) });
            }
            (0..popped).for_each(|_| { log.pop(); });
            prop_assert_eq!(log.weight(), log.pieces.iter().map(|piece| piece.item.weight()).sum::<usize>());
            for from in (0..=whole.len()).step_by(1 + whole.len() / 50) {
                let (mut lost, mut bytes) = (0, Vec::new());
                for item in all(&log, from as u64) {
                    match item {
                        Item::Stdout(piece) | Item::Stderr(piece) => bytes.extend_from_slice(&piece),
                        Item::Lost(count) => lost += count as usize,
                        other => panic!("{other:?}"),
                    }
                }
                prop_assert_eq!(&whole[from + lost..], &bytes[..]);
                prop_assert_eq!(from + lost, from.max(log.start() as usize));
            }
        }
    }
}
