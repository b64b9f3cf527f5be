//! Several execs in one body.

use std::marker::PhantomData;

use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeSeed},
};
use utoipa::ToSchema;

use super::{
    ExecBody,
    few::FewSeed,
    read::{Object, parse_as},
};
use crate::error::ApiError;

/// Several execs at once.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BatchRequest)]
#[expect(dead_code, reason = "only its schema is used; `parse_batch` reads the same, and no more items than allowed")]
pub(crate) struct BatchBody {
    /// They run in parallel; the results keep this order.
    #[schema(min_items = 1)]
    executions: Vec<ExecBody>,
}

/// The object around a batch.
pub(super) struct BatchSeed {
    pub(super) most: usize,
}

impl<'de> DeserializeSeed<'de> for BatchSeed {
    type Value = (Vec<Object<ExecBody>>, usize);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> de::Visitor<'de> for BatchSeed {
    type Value = (Vec<Object<ExecBody>>, usize);

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        #[derive(Deserialize)]
        #[serde(field_identifier, rename_all = "snake_case")]
        enum Field {
            Executions,
        }

        let mut found = None;
        while let Some(Field::Executions) = map.next_key()? {
            if found.is_some() {
                return Err(de::Error::duplicate_field("executions"));
            }
            found = Some(map.next_value_seed(FewSeed { most: self.most, of: PhantomData })?);
        }
        found.ok_or_else(|| de::Error::missing_field("executions"))
    }
}

/// Reads a batch of at most so many items.
pub(crate) fn parse_batch(body: &[u8], most: usize) -> Result<Vec<ExecBody>, ApiError> {
    let (executions, count) = parse_as(body, BatchSeed { most })?;
    if count == 0 {
        return Err(ApiError::new("invalid_request", "executions: give at least one item"));
    }
    if count > most {
        let text = format!("executions: {count} items; a batch may have {most}");
        return Err(ApiError::new("batch_too_large", text));
    }
    Ok(executions.into_iter().map(|Object(body)| body).collect())
}
