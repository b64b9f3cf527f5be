//! Messages of E2B's sandbox services, in protobuf's two encodings. Names and numbers are the wire's.

use std::collections::HashMap;

use base64::{
    Engine as _,
    alphabet::{STANDARD, URL_SAFE},
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use bytes::Bytes;
use prost::{Message, Oneof};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// A message without fields.
#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
pub(crate) struct Empty {}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct TerminalSize {
    #[prost(uint32, tag = "1")]
    pub(crate) cols: u32,
    #[prost(uint32, tag = "2")]
    pub(crate) rows: u32,
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Terminal {
    #[prost(message, optional, tag = "1")]
    pub(crate) size: Option<TerminalSize>,
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ProcessConfig {
    #[prost(string, tag = "1")]
    pub(crate) cmd: String,
    #[prost(string, repeated, tag = "2")]
    pub(crate) args: Vec<String>,
    #[prost(map = "string, string", tag = "3")]
    pub(crate) envs: HashMap<String, String>,
    #[prost(string, optional, tag = "4")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cwd: Option<String>,
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct StartRequest {
    #[prost(message, optional, tag = "1")]
    pub(crate) process: Option<ProcessConfig>,
    #[prost(message, optional, tag = "2")]
    pub(crate) pty: Option<Terminal>,
    #[prost(string, optional, tag = "3")]
    pub(crate) tag: Option<String>,
    /// Absent: true, as older SDKs expect.
    #[prost(bool, optional, tag = "4")]
    pub(crate) stdin: Option<bool>,
}

#[derive(Clone, PartialEq, Oneof, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Selector {
    #[prost(uint32, tag = "1")]
    Pid(u32),
    #[prost(string, tag = "2")]
    Tag(String),
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ProcessSelector {
    #[prost(oneof = "Selector", tags = "1, 2")]
    #[serde(flatten)]
    pub(crate) selector: Option<Selector>,
}

/// A request that names a process and nothing else: Connect and CloseStdin.
#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ProcessRequest {
    #[prost(message, optional, tag = "1")]
    pub(crate) process: Option<ProcessSelector>,
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct UpdateRequest {
    #[prost(message, optional, tag = "1")]
    pub(crate) process: Option<ProcessSelector>,
    #[prost(message, optional, tag = "2")]
    pub(crate) pty: Option<Terminal>,
}

#[derive(Clone, PartialEq, Oneof, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Input {
    #[prost(bytes = "bytes", tag = "1")]
    Stdin(#[serde(with = "base64_bytes")] Bytes),
    #[prost(bytes = "bytes", tag = "2")]
    Pty(#[serde(with = "base64_bytes")] Bytes),
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ProcessInput {
    #[prost(oneof = "Input", tags = "1, 2")]
    #[serde(flatten)]
    pub(crate) input: Option<Input>,
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct SendInputRequest {
    #[prost(message, optional, tag = "1")]
    pub(crate) process: Option<ProcessSelector>,
    #[prost(message, optional, tag = "2")]
    pub(crate) input: Option<ProcessInput>,
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct InputData {
    #[prost(message, optional, tag = "2")]
    pub(crate) input: Option<ProcessInput>,
}

#[derive(Clone, PartialEq, Oneof, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum StreamInputEvent {
    #[prost(message, tag = "1")]
    Start(ProcessRequest),
    #[prost(message, tag = "2")]
    Data(InputData),
    #[prost(message, tag = "3")]
    Keepalive(Empty),
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct StreamInputRequest {
    #[prost(oneof = "StreamInputEvent", tags = "1, 2, 3")]
    #[serde(flatten)]
    pub(crate) event: Option<StreamInputEvent>,
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct SendSignalRequest {
    #[prost(message, optional, tag = "1")]
    pub(crate) process: Option<ProcessSelector>,
    #[prost(int32, tag = "2")]
    #[serde(deserialize_with = "signal")]
    pub(crate) signal: i32,
}

/// An enum's name, or its number.
fn signal<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i32, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(i32),
        Name(String),
    }
    match Either::deserialize(deserializer)? {
        Either::Number(number) => Ok(number),
        Either::Name(name) => match name.as_str() {
            "SIGNAL_SIGTERM" => Ok(15),
            "SIGNAL_SIGKILL" => Ok(9),
            "SIGNAL_UNSPECIFIED" => Ok(0),
            _ => Err(D::Error::custom("unknown signal")),
        },
    }
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ProcessInfo {
    #[prost(message, optional, tag = "1")]
    pub(crate) config: Option<ProcessConfig>,
    #[prost(uint32, tag = "2")]
    pub(crate) pid: u32,
    #[prost(string, optional, tag = "3")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tag: Option<String>,
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ListResponse {
    #[prost(message, repeated, tag = "1")]
    pub(crate) processes: Vec<ProcessInfo>,
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Started {
    #[prost(uint32, tag = "1")]
    pub(crate) pid: u32,
}

#[derive(Clone, PartialEq, Oneof, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Output {
    #[prost(bytes = "bytes", tag = "1")]
    Stdout(#[serde(with = "base64_bytes")] Bytes),
    #[prost(bytes = "bytes", tag = "2")]
    Stderr(#[serde(with = "base64_bytes")] Bytes),
    #[prost(bytes = "bytes", tag = "3")]
    Pty(#[serde(with = "base64_bytes")] Bytes),
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Data {
    #[prost(oneof = "Output", tags = "1, 2, 3")]
    #[serde(flatten)]
    pub(crate) output: Option<Output>,
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct End {
    #[prost(sint32, tag = "1")]
    pub(crate) exit_code: i32,
    #[prost(bool, tag = "2")]
    pub(crate) exited: bool,
    #[prost(string, tag = "3")]
    pub(crate) status: String,
    #[prost(string, optional, tag = "4")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

#[derive(Clone, PartialEq, Oneof, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Event {
    #[prost(message, tag = "1")]
    Start(Started),
    #[prost(message, tag = "2")]
    Data(Data),
    #[prost(message, tag = "3")]
    End(End),
    #[prost(message, tag = "4")]
    Keepalive(Empty),
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ProcessEvent {
    #[prost(oneof = "Event", tags = "1, 2, 3, 4")]
    #[serde(flatten)]
    pub(crate) event: Option<Event>,
}

/// What Start and Connect tell.
#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ProcessAnswer {
    #[prost(message, optional, tag = "1")]
    pub(crate) event: Option<ProcessEvent>,
}

impl From<Event> for ProcessAnswer {
    fn from(event: Event) -> ProcessAnswer {
        ProcessAnswer { event: Some(ProcessEvent { event: Some(event) }) }
    }
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct PathRequest {
    #[prost(string, tag = "1")]
    pub(crate) path: String,
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct MoveRequest {
    #[prost(string, tag = "1")]
    pub(crate) source: String,
    #[prost(string, tag = "2")]
    pub(crate) destination: String,
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ListDirRequest {
    #[prost(string, tag = "1")]
    pub(crate) path: String,
    #[prost(uint32, tag = "2")]
    pub(crate) depth: u32,
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct WatchRequest {
    #[prost(string, tag = "1")]
    pub(crate) path: String,
    #[prost(bool, tag = "2")]
    pub(crate) recursive: bool,
    #[prost(bool, tag = "3")]
    pub(crate) include_entry: bool,
    #[prost(bool, tag = "4")]
    pub(crate) allow_network_mounts: bool,
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct WatcherId {
    #[prost(string, tag = "1")]
    pub(crate) watcher_id: String,
}

/// An instant.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Timestamp {
    #[prost(int64, tag = "1")]
    pub(crate) seconds: i64,
    #[prost(int32, tag = "2")]
    pub(crate) nanos: i32,
}

impl Timestamp {
    fn instant(&self) -> Option<jiff::Timestamp> {
        jiff::Timestamp::new(self.seconds, self.nanos).ok()
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.instant().unwrap_or_default())
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Timestamp, D::Error> {
        let at = jiff::Timestamp::deserialize(deserializer)?;
        Ok(Timestamp { seconds: at.as_second(), nanos: at.subsec_nanosecond() })
    }
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct EntryInfo {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(int32, tag = "2")]
    #[serde(serialize_with = "file_type")]
    pub(crate) r#type: i32,
    #[prost(string, tag = "3")]
    pub(crate) path: String,
    #[prost(int64, tag = "4")]
    #[serde(serialize_with = "in_text")]
    pub(crate) size: i64,
    #[prost(uint32, tag = "5")]
    pub(crate) mode: u32,
    #[prost(string, tag = "6")]
    pub(crate) permissions: String,
    #[prost(string, tag = "7")]
    pub(crate) owner: String,
    #[prost(string, tag = "8")]
    pub(crate) group: String,
    #[prost(message, optional, tag = "9")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) modified_time: Option<Timestamp>,
    #[prost(string, optional, tag = "10")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) symlink_target: Option<String>,
    #[prost(bool, tag = "12")]
    pub(crate) is_symlink: bool,
}

/// Values of `FileType`.
pub(crate) const FILE: i32 = 1;
pub(crate) const DIRECTORY: i32 = 2;

/// Values of `EventType`.
pub(crate) const CREATE: i32 = 1;
pub(crate) const WRITE: i32 = 2;
pub(crate) const REMOVE: i32 = 3;

fn file_type<S: Serializer>(value: &i32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(match *value {
        FILE => "FILE_TYPE_FILE",
        DIRECTORY => "FILE_TYPE_DIRECTORY",
        _ => "FILE_TYPE_UNSPECIFIED",
    })
}

fn event_type<S: Serializer>(value: &i32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(match *value {
        CREATE => "EVENT_TYPE_CREATE",
        WRITE => "EVENT_TYPE_WRITE",
        REMOVE => "EVENT_TYPE_REMOVE",
        _ => "EVENT_TYPE_UNSPECIFIED",
    })
}

/// 64-bit numbers are text in protobuf's JSON.
fn in_text<S: Serializer>(value: &i64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// One entry: the answer of Stat, MakeDir and Move.
#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct EntryAnswer {
    #[prost(message, optional, tag = "1")]
    pub(crate) entry: Option<EntryInfo>,
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ListDirResponse {
    #[prost(message, repeated, tag = "1")]
    pub(crate) entries: Vec<EntryInfo>,
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct FilesystemEvent {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(int32, tag = "2")]
    #[serde(serialize_with = "event_type")]
    pub(crate) r#type: i32,
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct WatcherEvents {
    #[prost(message, repeated, tag = "1")]
    pub(crate) events: Vec<FilesystemEvent>,
}

#[derive(Clone, PartialEq, Oneof, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum WatchEvent {
    #[prost(message, tag = "1")]
    Start(Empty),
    #[prost(message, tag = "2")]
    Filesystem(FilesystemEvent),
    #[prost(message, tag = "3")]
    Keepalive(Empty),
}

#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct WatchAnswer {
    #[prost(oneof = "WatchEvent", tags = "1, 2, 3")]
    #[serde(flatten)]
    pub(crate) event: Option<WatchEvent>,
}

mod base64_bytes {
    use super::*;

    const LENIENT: GeneralPurposeConfig =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    const USUAL: GeneralPurpose = GeneralPurpose::new(&STANDARD, LENIENT);
    const IN_URLS: GeneralPurpose = GeneralPurpose::new(&URL_SAFE, LENIENT);

    pub(super) fn serialize<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&USUAL.encode(bytes))
    }

    /// Either alphabet, padded or not, as protobuf's JSON wants it.
    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        let decoded = USUAL.decode(text.as_bytes()).or_else(|_| IN_URLS.decode(text.as_bytes()));
        decoded.map(Bytes::from).map_err(|_| D::Error::custom("invalid base64"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn messages_are_written_as_e2bs_sdks_read_them() {
        let data = ProcessAnswer::from(Event::Data(Data { output: Some(Output::Stdout(Bytes::from_static(b"hi\n"))) }));
        assert_eq!(serde_json::to_value(&data).unwrap(), json!({"event": {"data": {"stdout": "aGkK"}}}));
        let end = ProcessAnswer::from(Event::End(End {
            exit_code: 3,
            exited: true,
            status: "exit status 3".into(),
            error: None,
        }));
        let text = json!({"event": {"end": {"exitCode": 3, "exited": true, "status": "exit status 3"}}});
        assert_eq!(serde_json::to_value(&end).unwrap(), text);
        let entry = EntryInfo {
            name: "a".into(),
            r#type: FILE,
            size: 5,
            modified_time: Some(Timestamp { seconds: 1, nanos: 500_000_000 }),
            ..EntryInfo::default()
        };
        let told = serde_json::to_value(&entry).unwrap();
        assert_eq!(
            (&told["type"], &told["size"], &told["modifiedTime"]),
            (&json!("FILE_TYPE_FILE"), &json!("5"), &json!("1970-01-01T00:00:01.5Z"))
        );
    }

    #[test]
    fn requests_are_read_in_both_encodings() {
        let text =
            r#"{"process":{"cmd":"/bin/bash","args":["-l","-c","exit 3"],"envs":{"A":"b"}},"stdin":false,"new":1}"#;
        let start: StartRequest = serde_json::from_str(text).unwrap();
        assert_eq!(start.process.as_ref().unwrap().envs["A"], "b");
        assert_eq!(StartRequest::decode(start.encode_to_vec().as_slice()).unwrap(), start);
        for text in
            [r#"{"process":{"pid":7},"input":{"stdin":"-_8"}}"#, r#"{"process":{"pid":7},"input":{"stdin":"+/8="}}"#]
        {
            let input: SendInputRequest = serde_json::from_str(text).unwrap();
            assert_eq!(input.process.unwrap().selector, Some(Selector::Pid(7)));
            assert_eq!(input.input.unwrap().input, Some(Input::Stdin(Bytes::from_static(b"\xfb\xff"))));
        }
        for text in [r#"{"process":{"tag":"x"},"signal":"SIGNAL_SIGKILL"}"#, r#"{"process":{"tag":"x"},"signal":9}"#] {
            let request: SendSignalRequest = serde_json::from_str(text).unwrap();
            assert_eq!((request.process.unwrap().selector, request.signal), (Some(Selector::Tag("x".into())), 9));
        }
    }
}
