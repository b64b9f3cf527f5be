//! Answers as they go over the wire (step 7 of an exec).

use std::{borrow::Cow, collections::BTreeMap, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Serialize, Serializer};
use utoipa::ToSchema;
use uuid::Uuid;
use zeroboot_engine::{Collected, Isolation, Outcome, OutputFile, Report};

use crate::error::ErrorBody;

/// The result of an exec. The status is 200 even if the code failed or its timeout passed; `outcome` says so.
#[derive(Serialize, ToSchema)]
#[schema(as = ExecAnswer)]
pub(crate) struct AnswerBody<'a> {
    #[serde(flatten)]
    pub(crate) end: EndBody<'a>,
    /// Standard output, exactly; base64 if `encoding.stdout` says so.
    pub(crate) stdout: &'a str,
    /// Standard error, exactly; base64 if `encoding.stderr` says so.
    pub(crate) stderr: &'a str,
    /// The same as `stdout`.
    pub(crate) output: &'a str,
    /// How the two streams are encoded.
    pub(crate) encoding: EncodingBody,
    /// Files that were asked for, by path.
    pub(crate) files: BTreeMap<&'a str, FileBody<'a>>,
}

/// `utf-8` or `base64`.
#[derive(Serialize, ToSchema)]
#[schema(as = Encoding)]
pub(crate) struct EncodingBody {
    #[schema(value_type = EncodingName)]
    pub(crate) stdout: &'static str,
    #[schema(value_type = EncodingName)]
    pub(crate) stderr: &'static str,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) enum EncodingName {
    #[serde(rename = "utf-8")]
    Utf8,
    #[serde(rename = "base64")]
    Base64,
}

/// All fields of an answer except the output. They are also the event `end` of a stream.
#[derive(Serialize, ToSchema)]
#[schema(as = End)]
pub(crate) struct EndBody<'a> {
    /// The exec's id (UUIDv7).
    pub(crate) id: Uuid,
    /// The code's own exit status; 128 + signal; 124 on timeout or at the CPU limit; 137 if the sandbox was killed.
    pub(crate) exit_code: i32,
    /// How the exec ended.
    #[schema(value_type = OutcomeName)]
    pub(crate) outcome: &'static str,
    /// The signal that ended it, if one did.
    pub(crate) signal: Option<i32>,
    /// From admission until a sandbox was ready, milliseconds.
    pub(crate) fork_time_ms: f64,
    /// The run itself, milliseconds.
    pub(crate) exec_time_ms: f64,
    /// The whole exec inside the engine, milliseconds.
    pub(crate) total_time_ms: f64,
    /// The same as `total_time_ms`.
    pub(crate) duration_ms: f64,
    /// CPU time of the sandbox's processes, milliseconds; 0 if unknown.
    pub(crate) cpu_time_ms: f64,
    /// Peak memory in bytes; 0 if unknown.
    pub(crate) peak_memory_bytes: u64,
    /// What the sandbox knows about an uncaught error, one line each, such as that there is no network. The code can
    /// forge it.
    pub(crate) hints: Vec<String>,
    /// What stood between the code and the host.
    #[schema(value_type = IsolationName)]
    pub(crate) isolation: &'static str,
    /// Whether the sandbox was waiting in a pool.
    pub(crate) pooled: bool,
    /// Whether the output was cut at the output limit.
    pub(crate) truncated: bool,
    /// The template that the code ran in.
    pub(crate) template: &'a str,
    /// The template's language.
    pub(crate) language: &'a str,
}

#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
#[expect(dead_code, reason = "only its schema is used; a test compares it with Outcome::NAMES")]
pub(crate) enum OutcomeName {
    Exited,
    Signaled,
    DeadlinePassed,
    CpuLimit,
    OutputLimit,
    OutOfMemory,
    Crashed,
}

#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) enum IsolationName {
    Vm,
    Process,
}

/// An output file: its text, its bytes, or the reason why it is missing.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = File)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FileBody<'a> {
    Text(&'a str),
    Base64(String),
    Error(&'a str),
}

impl<'a> FileBody<'a> {
    pub(crate) fn of(file: &'a OutputFile) -> FileBody<'a> {
        match &file.data {
            Err(reason) => FileBody::Error(reason),
            Ok(data) => match std::str::from_utf8(data) {
                Ok(text) if !swells(data) => FileBody::Text(text),
                _ => FileBody::Base64(STANDARD.encode(data)),
            },
        }
    }
}

/// A stream's bytes as they can stand in JSON.
#[derive(Debug, PartialEq)]
pub(crate) struct Text {
    pub(crate) text: String,
    pub(crate) encoding: &'static str,
}

impl Text {
    /// `cut`: the end was cut off. Half a character at the end then comes from the cut, and is left out.
    pub(crate) fn of(bytes: Vec<u8>, cut: bool) -> Text {
        let bytes = match std::str::from_utf8(&bytes) {
            Err(error) if cut && error.error_len().is_none() => {
                let whole = error.valid_up_to();
                let mut bytes = bytes;
                bytes.truncate(whole);
                bytes
            }
            _ => bytes,
        };
        match String::from_utf8(bytes) {
            Ok(text) if !swells(text.as_bytes()) => Text { text, encoding: "utf-8" },
            Ok(text) => Text { text: STANDARD.encode(text), encoding: "base64" },
            Err(error) => Text { text: STANDARD.encode(error.as_bytes()), encoding: "base64" },
        }
    }
}

/// Most bytes of a stream that is sent as text even if JSON makes it much longer.
const SMALL: usize = 64 * 1024;

/// Whether JSON would make more than twice as much of it: a control character is six bytes there, and an answer must not
/// be many times the output limit.
fn swells(text: &[u8]) -> bool {
    let extra = |byte: &u8| match byte {
        b'"' | b'\\' | 8..=10 | 12 | 13 => 1,
        0..=31 => 5,
        _ => 0,
    };
    text.len() > SMALL && text.iter().map(extra).sum::<usize>() > text.len()
}

/// An exec that came to an outcome.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) id: Uuid,
    pub(crate) template: String,
    pub(crate) language: String,
    pub(crate) isolation: Isolation,
    pub(crate) stdout: Text,
    pub(crate) stderr: Text,
    pub(crate) files: Vec<OutputFile>,
    pub(crate) report: Report,
}

/// The answer of `POST /v1/exec` to a whole exec, for `zeroboot run --json`.
pub fn answer(id: Uuid, isolation: Isolation, template: &str, language: &str, done: Collected) -> impl Serialize {
    let cut = is_truncated(done.report.outcome);
    Finished {
        id,
        template: template.into(),
        language: language.into(),
        isolation,
        stdout: Text::of(done.stdout, cut),
        stderr: Text::of(done.stderr, cut),
        files: done.files,
        report: done.report,
    }
}

/// The fields of an `end` event or an answer.
pub(crate) fn end_body<'a>(
    id: Uuid,
    report: &Report,
    isolation: Isolation,
    (template, language): (&'a str, &'a str),
) -> EndBody<'a> {
    let total = milliseconds(report.total_time);
    EndBody {
        id,
        exit_code: report.outcome.exit_code(),
        outcome: report.outcome.as_str(),
        signal: if let Outcome::Signaled { signal } = report.outcome { Some(signal) } else { None },
        fork_time_ms: milliseconds(report.fork_time),
        exec_time_ms: milliseconds(report.exec_time),
        total_time_ms: total,
        duration_ms: total,
        cpu_time_ms: milliseconds(report.cpu_time),
        peak_memory_bytes: report.peak_memory,
        hints: report.hint.iter().map(|hint| hint.to_string()).collect(),
        isolation: isolation.as_str(),
        pooled: report.pooled,
        truncated: is_truncated(report.outcome),
        template,
        language,
    }
}

pub(crate) fn is_truncated(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::OutputLimit)
}

/// Milliseconds, to a tenth of a microsecond.
pub(crate) fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e7).round() / 1e4
}

impl Serialize for Finished {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        AnswerBody {
            end: end_body(self.id, &self.report, self.isolation, (&self.template, &self.language)),
            stdout: &self.stdout.text,
            stderr: &self.stderr.text,
            output: &self.stdout.text,
            encoding: EncodingBody { stdout: self.stdout.encoding, stderr: self.stderr.encoding },
            files: self.files.iter().map(|file| (file.path.as_str(), FileBody::of(file))).collect(),
        }
        .serialize(serializer)
    }
}

/// The answer to a batch.
#[derive(ToSchema)]
#[schema(as = BatchAnswer)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) struct BatchAnswerBody<'a> {
    /// One for each execution, in the same order.
    results: Vec<BatchItem<'a>>,
}

/// An answer or an error.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) enum BatchItem<'a> {
    Answer(AnswerBody<'a>),
    Error(ErrorBody<'a>),
}

/// Cuts a stream of bytes into pieces that can stand in JSON: a character that is split between two chunks is held
/// back until it is whole.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    held: Vec<u8>,
}

/// The data of an event `stdout` or `stderr`.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = Chunk)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Piece<'a> {
    Text(Cow<'a, str>),
    Base64(String),
}

impl Piece<'_> {
    /// As text; what is not UTF-8 is replaced.
    pub(crate) fn into_text(self) -> String {
        match self {
            Piece::Text(text) => text.into_owned(),
            Piece::Base64(text) => String::from_utf8_lossy(&STANDARD.decode(text).unwrap_or_default()).into_owned(),
        }
    }
}

impl Pieces {
    /// What of the stream can be told now. Nothing is copied where a chunk is text by itself.
    pub(crate) fn push<'a>(&mut self, chunk: &'a [u8]) -> Option<Piece<'a>> {
        let mut bytes = if self.held.is_empty() {
            Cow::Borrowed(chunk)
        } else {
            self.held.extend_from_slice(chunk);
            Cow::Owned(std::mem::take(&mut self.held))
        };
        if let Err(error) = std::str::from_utf8(&bytes)
            && error.error_len().is_none()
        {
            let whole = error.valid_up_to();
            self.held = bytes.get(whole..).unwrap_or_default().to_vec();
            match &mut bytes {
                Cow::Borrowed(bytes) => *bytes = bytes.get(..whole).unwrap_or_default(),
                Cow::Owned(bytes) => bytes.truncate(whole),
            }
        }
        if bytes.is_empty() { None } else { Some(piece(bytes)) }
    }

    /// Bytes that are held back.
    pub(crate) fn held(&self) -> usize {
        self.held.len()
    }

    /// What was held back and never became whole.
    pub(crate) fn finish(&mut self) -> Option<Piece<'static>> {
        let rest = std::mem::take(&mut self.held);
        if rest.is_empty() { None } else { Some(piece(Cow::Owned(rest))) }
    }
}

fn piece(bytes: Cow<'_, [u8]>) -> Piece<'_> {
    match bytes {
        Cow::Borrowed(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => Piece::Text(Cow::Borrowed(text)),
            Err(_) => Piece::Base64(STANDARD.encode(bytes)),
        },
        Cow::Owned(bytes) => match String::from_utf8(bytes) {
            Ok(text) => Piece::Text(Cow::Owned(text)),
            Err(error) => Piece::Base64(STANDARD.encode(error.as_bytes())),
        },
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn output_that_is_not_utf8_is_marked_and_exact() {
        assert_eq!(Text::of("ä\r\n".into(), false), Text { text: "ä\r\n".into(), encoding: "utf-8" });
        assert_eq!(Text::of(vec![0, 255], false), Text { text: "AP8=".into(), encoding: "base64" });
        assert_eq!(Text::of(vec![b'a', 0xc3], false).encoding, "base64");
        assert_eq!(Text::of(vec![b'a', 0xc3], true), Text { text: "a".into(), encoding: "utf-8" });
        assert_eq!(Text::of(vec![b'a', 0xff, 0xc3], true).encoding, "base64");
    }

    #[test]
    fn an_answer_is_at_most_about_twice_what_the_code_wrote() {
        for (unit, encoding) in [("\n", "utf-8"), ("\"\\", "utf-8"), ("\u{1}", "base64"), ("\u{1b}[0m", "base64")] {
            let (small, large) = (unit.repeat(100), unit.repeat(200_000));
            assert_eq!(Text::of(small.clone().into(), false), Text { text: small, encoding: "utf-8" });
            let text = Text::of(large.clone().into(), false);
            assert_eq!(text.encoding, encoding, "{unit:?}");
            assert!(serde_json::to_vec(&text.text).unwrap().len() <= large.len() * 2 + 2);
            let file = OutputFile { path: "f".into(), data: Ok(large.into()) };
            assert_eq!(matches!(FileBody::of(&file), FileBody::Base64(_)), encoding == "base64");
        }
    }

    #[test]
    fn a_split_character_is_held_back_until_it_is_whole() {
        let mut pieces = Pieces::default();
        let euro = "€".as_bytes();
        assert_eq!(pieces.push(&euro[..1]), None);
        assert_eq!(pieces.push(&euro[1..2]), None);
        let rest = [&euro[2..], b"a\xc3"].concat();
        assert_eq!(pieces.push(&rest), Some(Piece::Text("€a".into())));
        assert_eq!(pieces.finish(), Some(Piece::Base64("ww==".into())));
        assert_eq!(pieces.finish(), None);
        assert_eq!(pieces.push(b"\xffab"), Some(Piece::Base64("/2Fi".into())));
    }

    #[test]
    fn pieces_put_together_are_the_stream() {
        let stream: Vec<u8> = "aé€😀\u{0}".bytes().chain([0xff, 0xc3]).chain("ü".bytes()).collect();
        for size in 1..stream.len() {
            let mut pieces = Pieces::default();
            let mut all = Vec::new();
            for chunk in stream.chunks(size) {
                all.extend(pieces.push(chunk));
            }
            all.extend(pieces.finish());
            let whole: Vec<u8> = all
                .into_iter()
                .flat_map(|piece| match piece {
                    Piece::Text(text) => text.into_owned().into_bytes(),
                    Piece::Base64(text) => STANDARD.decode(text).unwrap(),
                })
                .collect();
            assert_eq!(whole, stream, "{size}");
        }
    }

    #[test]
    fn the_answer_has_every_field_of_the_original_and_the_short_names() {
        let report = Report {
            lost: false,
            outcome: Outcome::Signaled { signal: 9 },
            pooled: true,
            fork_time: Duration::from_micros(500),
            exec_time: Duration::from_millis(2),
            total_time: Duration::from_millis(3),
            cpu_time: Duration::ZERO,
            peak_memory: 7,
            hint: None,
        };
        let finished = Finished {
            id: Uuid::nil(),
            template: "python".into(),
            language: "python".into(),
            isolation: Isolation::Process,
            stdout: Text::of("out\n".into(), false),
            stderr: Text::of(vec![255], false),
            files: vec![
                OutputFile { path: "a".into(), data: Ok(Bytes::from_static(b"x")) },
                OutputFile { path: "b".into(), data: Err("no such file".into()) },
            ],
            report,
        };
        let json = serde_json::to_value(&finished).unwrap();
        let expected = serde_json::json!({
            "id": "00000000-0000-0000-0000-000000000000", "stdout": "out\n", "stderr": "/w==", "output": "out\n",
            "encoding": {"stdout": "utf-8", "stderr": "base64"}, "exit_code": 137, "outcome": "signaled", "signal": 9,
            "fork_time_ms": 0.5, "exec_time_ms": 2.0, "total_time_ms": 3.0, "duration_ms": 3.0, "cpu_time_ms": 0.0,
            "peak_memory_bytes": 7, "hints": [], "isolation": "process", "pooled": true, "truncated": false, "template": "python",
            "language": "python", "files": {"a": {"text": "x"}, "b": {"error": "no such file"}},
        });
        assert_eq!(json, expected);
    }
}
