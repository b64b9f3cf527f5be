//! Lists and objects of a body that keep no more items than a request may have: three bytes of a body must not become
//! many bytes of memory.

use std::{collections::BTreeMap, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeSeed, IgnoredAny},
};

/// A list that keeps `MOST` items and one more, which [`zeroboot_engine::ExecRequest::check`] refuses. The rest is read and
/// dropped.
#[derive(Debug)]
pub(crate) struct Few<T, const MOST: usize>(pub(crate) Vec<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for Few<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Few<T, MOST>, D::Error> {
        FewSeed { most: MOST, of: PhantomData }.deserialize(deserializer).map(|(kept, _)| Few(kept))
    }
}

/// The same for a maximum that is known only at run time. Gives the items that were kept, and how many there were.
pub(super) struct FewSeed<T> {
    pub(super) most: usize,
    pub(super) of: PhantomData<T>,
}

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for FewSeed<T> {
    type Value = (Vec<T>, usize);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, T: Deserialize<'de>> de::Visitor<'de> for FewSeed<T> {
    type Value = (Vec<T>, usize);

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a sequence")
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut kept = Vec::new();
        while kept.len() <= self.most {
            match list.next_element()? {
                Some(item) => kept.push(item),
                None => {
                    let count = kept.len();
                    return Ok((kept, count));
                }
            }
        }
        let mut count = kept.len();
        while list.next_element::<IgnoredAny>()?.is_some() {
            count += 1;
        }
        Ok((kept, count))
    }
}

/// As [`Few`], for an object with names of the caller's choice. If a name occurs twice, the last value counts.
#[derive(Debug)]
pub(crate) struct FewNamed<T, const MOST: usize>(pub(crate) BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for FewNamed<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<FewNamed<T, MOST>, D::Error> {
        struct Visitor<T, const MOST: usize>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>, const MOST: usize> de::Visitor<'de> for Visitor<T, MOST> {
            type Value = FewNamed<T, MOST>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a map")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut kept = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if kept.len() <= MOST || kept.contains_key(&name) {
                        kept.insert(name, map.next_value()?);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(FewNamed(kept))
            }
        }

        deserializer.deserialize_map(Visitor(PhantomData))
    }
}
