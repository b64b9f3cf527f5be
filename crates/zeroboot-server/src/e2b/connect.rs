//! The Connect protocol: unary calls, and streams of envelopes `flags u8 · length u32 BE · message`.

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::{Buf as _, Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

use crate::{
    body::{next_bytes, read_whole},
    budget::Full,
    call::Call,
    e2b::errors::connect_code,
    error::ApiError,
    sse::{self, Sender, Unsent},
};

/// The last envelope of a stream has this flag; it holds JSON, whatever the codec.
const END: u8 = 2;
/// The message is compressed, which nobody has agreed on.
const COMPRESSED: u8 = 1;
const HEAD: usize = 5;

/// How messages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codec {
    Json,
    Proto,
}

/// A message in both encodings.
pub(crate) trait Wire: prost::Message + Default + Serialize {}
impl<T: prost::Message + Default + Serialize> Wire for T {}

impl Codec {
    fn of(headers: &HeaderMap, prefix: &str) -> Result<Codec, ApiError> {
        let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim();
        match kind.strip_prefix(prefix) {
            Some("json") => Ok(Codec::Json),
            Some("proto") => Ok(Codec::Proto),
            _ => {
                let text = format!("The body must have Content-Type: {prefix}json or {prefix}proto");
                Err(ApiError::new("unsupported_media_type", text))
            }
        }
    }

    fn decode<Q: Wire + DeserializeOwned>(self, bytes: &[u8]) -> Result<Q, ApiError> {
        let malformed = |text: String| ApiError::new("invalid_request", text);
        match self {
            Codec::Json => {
                serde_json::from_slice(bytes).map_err(|error| malformed(format!("The message is malformed: {error}")))
            }
            Codec::Proto => Q::decode(bytes).map_err(|error| malformed(format!("The message is malformed: {error}"))),
        }
    }

    fn encode(self, message: &impl Wire, into: &mut Vec<u8>) -> Result<(), ApiError> {
        match self {
            Codec::Json => serde_json::to_writer(into, message).map_err(|_| ApiError::internal()),
            Codec::Proto => {
                into.reserve(message.encoded_len());
                message.encode(into).map_err(|_| ApiError::internal())
            }
        }
    }
}

const UNARY: &str = "application/";
const STREAM: &str = "application/connect+";

fn content_type(prefix: &str, codec: Codec) -> HeaderValue {
    HeaderValue::from_static(match (prefix, codec) {
        (UNARY, Codec::Json) => "application/json",
        (UNARY, Codec::Proto) => "application/proto",
        (_, Codec::Json) => "application/connect+json",
        (_, Codec::Proto) => "application/connect+proto",
    })
}

/// One message in, one out.
pub(crate) async fn unary<Q: Wire + DeserializeOwned, A: Wire>(
    call: &Call,
    headers: &HeaderMap,
    body: Body,
    work: impl AsyncFnOnce(Q) -> Result<A, ApiError>,
) -> Result<Response, ApiError> {
    let codec = Codec::of(headers, UNARY)?;
    if headers.get(header::CONTENT_ENCODING).is_some_and(|coding| coding != "identity") {
        return Err(ApiError::new("not_supported", "Compressed messages are not supported"));
    }
    let bytes = read_whole(body, call.limits(), &call.share).await?;
    let answer = work(codec.decode(&bytes)?).await?;
    let mut bytes = Vec::new();
    codec.encode(&answer, &mut bytes)?;
    let held = call.share.answer(call.peer(), bytes).map_err(Full::output_limit)?;
    Ok(([(header::CONTENT_TYPE, content_type(UNARY, codec))], held).into_response())
}

/// Takes the first envelope out of what has come; `None` if it has not come whole.
pub(crate) fn envelope(buffer: &mut BytesMut, most: usize) -> Result<Option<(u8, Bytes)>, ApiError> {
    let Some((flags, length)) = buffer.first_chunk::<HEAD>().map(|[flags, length @ ..]| (*flags, *length)) else {
        return Ok(None);
    };
    let length = u32::from_be_bytes(length) as usize;
    if flags & COMPRESSED != 0 {
        return Err(ApiError::new("not_supported", "Compressed messages are not supported"));
    }
    // Before anything is kept for it.
    if length > most {
        return Err(ApiError::new("body_too_large", format!("The message is larger than {most} bytes")));
    }
    if buffer.len() - HEAD < length {
        return Ok(None);
    }
    buffer.advance(HEAD);
    Ok(Some((flags, buffer.split_to(length).freeze())))
}

/// Messages of a client's stream, one by one.
pub(crate) struct Incoming {
    codec: Codec,
    body: Body,
    buffer: BytesMut,
}

impl Incoming {
    pub(crate) fn new(headers: &HeaderMap, body: Body) -> Result<Incoming, ApiError> {
        Ok(Incoming { codec: Codec::of(headers, STREAM)?, body, buffer: BytesMut::new() })
    }

    pub(crate) fn codec(&self) -> Codec {
        self.codec
    }

    /// The next message; `None` at the end of the stream.
    pub(crate) async fn next<Q: Wire + DeserializeOwned>(&mut self, call: &Call) -> Result<Option<Q>, ApiError> {
        loop {
            if let Some((flags, message)) = envelope(&mut self.buffer, call.limits().max_body)? {
                return if flags & END != 0 { Ok(None) } else { self.codec.decode(&message).map(Some) };
            }
            match next_bytes(&mut self.body, call.limits()).await? {
                Some(piece) => {
                    call.share.grow(piece.len() as u64).map_err(Full::busy)?;
                    self.buffer.extend_from_slice(&piece);
                }
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(ApiError::new("invalid_request", "The stream ends inside a message")),
            }
        }
    }

    /// The one message of a call that only the server streams in.
    pub(crate) async fn only<Q: Wire + DeserializeOwned>(&mut self, call: &Call) -> Result<Q, ApiError> {
        let first = self.next(call).await?;
        first.ok_or_else(|| ApiError::new("invalid_request", "The request holds no message"))
    }
}

/// The client's time for a call.
pub(crate) fn timeout(headers: &HeaderMap) -> Result<Option<std::time::Duration>, ApiError> {
    let Some(value) = headers.get("connect-timeout-ms") else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    let digits = (1..=10).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|_| digits).map(std::time::Duration::from_millis);
    number.map(Some).ok_or_else(|| ApiError::new("invalid_request", "Connect-Timeout-Ms must have 1 to 10 digits"))
}

/// The server's half of a stream.
pub(crate) struct Outgoing {
    sender: Sender,
    codec: Codec,
}

impl Outgoing {
    pub(crate) fn open(call: &Call, codec: Codec) -> (Outgoing, Response) {
        let kind = content_type(STREAM, codec);
        let stall = call.limits().stall_timeout;
        let (sender, response) = sse::stream_of(kind, call.peer().clone(), call.share.clone(), stall, None);
        (Outgoing { sender, codec }, response)
    }

    pub(crate) async fn send(&self, message: &impl Wire) -> Result<(), Unsent> {
        self.sender.held(framed(self.codec, message).map_err(|_| Unsent::Gone)?).await
    }

    /// Returns when the client is gone.
    pub(crate) async fn closed(&self) {
        self.sender.closed().await;
    }

    /// The stream's end, and why if that is an error.
    pub(crate) async fn end(&self, why: Result<(), (&str, &str)>, request_id: Uuid) {
        self.sender.last_bytes(end(why), request_id).await;
    }
}

fn framed(codec: Codec, message: &impl Wire) -> Result<Vec<u8>, ApiError> {
    let mut bytes = vec![0; HEAD];
    codec.encode(message, &mut bytes)?;
    set_length(&mut bytes);
    Ok(bytes)
}

fn set_length(envelope: &mut [u8]) {
    let length = u32::try_from(envelope.len() - HEAD).unwrap_or(u32::MAX);
    if let Some(place) = envelope.get_mut(1..HEAD) {
        place.copy_from_slice(&length.to_be_bytes());
    }
}

/// `Err`: Connect's code, and text for people.
fn end(why: Result<(), (&str, &str)>) -> Vec<u8> {
    let text = match why {
        Ok(()) => serde_json::json!({}),
        Err((code, message)) => serde_json::json!({"error": {"code": code, "message": message}}),
    };
    let mut bytes = vec![END, 0, 0, 0, 0];
    bytes.extend_from_slice(text.to_string().as_bytes());
    set_length(&mut bytes);
    bytes
}

/// A stream of one message and its end.
pub(crate) fn single(codec: Codec, message: &impl Wire) -> Result<Response, ApiError> {
    let mut bytes = framed(codec, message)?;
    bytes.extend_from_slice(&end(Ok(())));
    Ok(([(header::CONTENT_TYPE, content_type(STREAM, codec))], bytes).into_response())
}

/// Marks an answer of status 200 whose request's body may not have been read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unread;

/// A stream that is an error and nothing else: there is no other place for one in a streaming call.
pub(crate) fn failed(codec: Codec, error: &ApiError) -> Response {
    let bytes = end(Err((connect_code(error), &error.message)));
    let mut response = ([(header::CONTENT_TYPE, content_type(STREAM, codec))], bytes).into_response();
    response.extensions_mut().insert(Unread);
    response
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::e2b::messages::StartRequest;

    #[test]
    fn an_envelope_that_comes_in_pieces_is_taken_when_it_is_whole() {
        let whole = framed(Codec::Json, &StartRequest::default()).unwrap();
        let mut buffer = BytesMut::new();
        for byte in &whole[..whole.len() - 1] {
            buffer.extend_from_slice(&[*byte]);
            assert_eq!(envelope(&mut buffer, 1000).unwrap(), None);
        }
        buffer.extend_from_slice(&whole[whole.len() - 1..]);
        buffer.extend_from_slice(b"\0\0");
        let (flags, message) = envelope(&mut buffer, 1000).unwrap().unwrap();
        assert_eq!((flags, message.as_ref(), buffer.as_ref()), (0, &whole[HEAD..], b"\0\0".as_slice()));
    }

    #[test]
    fn a_length_that_lies_and_a_compressed_message_are_refused_before_anything_is_kept() {
        let mut buffer = BytesMut::from([0, 0xff, 0xff, 0xff, 0xff].as_slice());
        assert_eq!(envelope(&mut buffer, 1000).unwrap_err().code, "body_too_large");
        let mut buffer = BytesMut::from([1, 0, 0, 0, 0].as_slice());
        assert_eq!(envelope(&mut buffer, 1000).unwrap_err().code, "not_supported");
    }

    #[test]
    fn the_end_says_its_error_in_json() {
        let bytes = end(Err(("not_found", "no a")));
        assert_eq!(bytes[0], END);
        assert_eq!(bytes[HEAD..], *br#"{"error":{"code":"not_found","message":"no a"}}"#);
        assert_eq!(end(Ok(())), [2, 0, 0, 0, 2, b'{', b'}']);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic_or_give_more_than_it_got(bytes: Vec<u8>, most in 0_usize..1000) {
            let mut buffer = BytesMut::from(bytes.as_slice());
            let mut taken = 0;
            while let Ok(Some((_, message))) = envelope(&mut buffer, most) {
                prop_assert!(message.len() <= most);
                taken += HEAD + message.len();
                for codec in [Codec::Json, Codec::Proto] {
                    let _: Result<StartRequest, ApiError> = codec.decode(&message);
                }
            }
            prop_assert!(taken + buffer.len() == bytes.len());
        }
    }
}
