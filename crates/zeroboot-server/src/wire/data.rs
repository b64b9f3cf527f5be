//! Content of a file or of standard input: text or bytes.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use serde::{Deserialize, Deserializer, de};
use utoipa::ToSchema;

/// Text or bytes.
#[derive(Debug)]
pub(crate) struct Data {
    pub(crate) bytes: Bytes,
    pub(crate) executable: bool,
}

/// Text, or an object with text or base64.
#[derive(ToSchema)]
#[schema(as = Data)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its schema is used; `Data` reads the same by hand, for better error texts")]
pub(crate) enum DataSchema {
    /// Text.
    Text(String),
    /// Text, with more to say about it.
    TextObject(TextObject),
    /// Bytes.
    BytesObject(BytesObject),
}

/// Text of a file or of standard input.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TextData)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) struct TextObject {
    text: String,
    /// Files only: executable by its owner.
    executable: Option<bool>,
}

/// Bytes of a file or of standard input.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BytesData)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) struct BytesObject {
    /// Base64 (RFC 4648, with padding).
    #[schema(pattern = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$")]
    base64: String,
    /// Files only: executable by its owner.
    executable: Option<bool>,
}

/// Exactly one of `text` and `base64`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DataObject {
    text: Option<String>,
    base64: Option<String>,
    executable: Option<bool>,
}

impl<'de> Deserialize<'de> for Data {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Data, D::Error> {
        struct Visitor;

        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Data;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string or {\"base64\": \"...\"}")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Data, E> {
                self.visit_string(text.to_owned())
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<Data, E> {
                Ok(Data { bytes: text.into(), executable: false })
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Data, A::Error> {
                let object = DataObject::deserialize(de::value::MapAccessDeserializer::new(map))?;
                let bytes = match (object.text, object.base64) {
                    (Some(text), None) => text.into(),
                    (None, Some(text)) => STANDARD.decode(text).map_err(|_| de::Error::custom("invalid base64"))?,
                    _ => return Err(de::Error::custom("exactly one of text and base64 is needed")),
                };
                Ok(Data { bytes: bytes.into(), executable: object.executable.unwrap_or(false) })
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}
