//! From JSON to a body, with errors that name the field and the word that was probably meant.

use std::marker::PhantomData;

use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeSeed},
};

use crate::error::ApiError;

/// Reads a JSON body. The error names the field.
pub(crate) fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, ApiError> {
    parse_as(body, PhantomData::<Object<T>>).map(|Object(value)| value)
}

pub(super) fn parse_as<'a, S: DeserializeSeed<'a>>(body: &'a [u8], seed: S) -> Result<S::Value, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let mut track = serde_path_to_error::Track::new();
    let read = seed.deserialize(serde_path_to_error::Deserializer::new(&mut json, &mut track));
    let value = read.map_err(|inner| {
        let path = track.path().to_string();
        match inner.classify() {
            serde_json::error::Category::Data if path == "." => ApiError::new("invalid_request", blunt(&inner)),
            serde_json::error::Category::Data => ApiError::new("invalid_request", format!("{path}: {}", blunt(&inner))),
            _ => ApiError::new("invalid_json", format!("Invalid JSON: {}", blunt(&inner))),
        }
    })?;
    json.end().map_err(|error| ApiError::new("invalid_json", format!("Invalid JSON: {}", blunt(&error))))?;
    Ok(value)
}

/// A JSON object. (A derived `Deserialize` would take an array of the fields' values as well.)
#[derive(Debug)]
pub(crate) struct Object<T>(pub(crate) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Object<T>, D::Error> {
        struct Visitor<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> de::Visitor<'de> for Visitor<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(de::value::MapAccessDeserializer::new(map)).map(Object)
            }
        }

        deserializer.deserialize_map(Visitor(PhantomData))
    }
}

/// A whole number. In JSON 64.0 is one as well, and some languages write it so.
pub(crate) fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    struct Visitor;

    impl<'de> de::Visitor<'de> for Visitor {
        type Value = Option<u64>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a whole number that is not negative")
        }

        fn visit_u64<E: de::Error>(self, value: u64) -> Result<Option<u64>, E> {
            Ok(Some(value))
        }

        fn visit_f64<E: de::Error>(self, value: f64) -> Result<Option<u64>, E> {
            // Up to here every whole f64 is exact; a larger one is above every maximum anyway.
            if value.fract() != 0.0 || value < 0.0 {
                return Err(E::invalid_value(de::Unexpected::Float(value), &self));
            }
            Ok(Some(if value < 2_f64.powi(53) { value as u64 } else { u64::MAX }))
        }

        fn visit_unit<E: de::Error>(self) -> Result<Option<u64>, E> {
            Ok(None)
        }
    }

    deserializer.deserialize_any(Visitor)
}

/// Longest unknown name, in bytes, that is compared with the known ones.
const LONGEST_WORD: usize = 64;

/// The name that was probably meant.
pub fn nearest<'a>(word: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let near = names.into_iter().map(|known| (strsim::jaro_winkler(known, word), known));
    near.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(likeness, _)| *likeness > 0.8).map(|(_, known)| known)
}

/// Which field was probably meant, where the parser met an unknown one: its words are "unknown field `a`, expected one of
/// `b`, `c`".
fn meant(text: &str) -> Option<String> {
    let rest = text.strip_prefix("unknown field `")?;
    // The caller's word can be anything; the known ones are ours, and stand last.
    let (word, known) = rest.rsplit_once("`, expected ")?;
    if word.len() > LONGEST_WORD {
        return None;
    }
    let near = nearest(word, known.split('`').skip(1).step_by(2))?;
    Some(format!("; did you mean `{near}`?"))
}

/// The parser's words, at most 300 characters of them: they can quote the caller's own values, which can be long.
fn blunt(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let meant = meant(&text).unwrap_or_default();
    match text.char_indices().nth(300) {
        Some((at, _)) => format!("{}… (line {}, column {}){meant}", &text[..at], error.line(), error.column()),
        None => text + &meant,
    }
}
