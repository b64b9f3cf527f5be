//! Requests as they come over the wire, and their way into the engine's words (step 1 of an exec).

use std::{collections::BTreeMap, marker::PhantomData, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeSeed, IgnoredAny},
};
use utoipa::ToSchema;
use zeroboot_engine::{ExecRequest, InputFile, MAX_ENV, MAX_FILES, MIN_OPEN_FILES, Stdin};

use crate::{config::RequestLimits, error::ApiError};

/// One piece of code to run in one fresh sandbox.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ExecRequest)]
pub(crate) struct ExecBody {
    /// The code.
    #[schema(min_length = 1, example = "print(1 + 1)")]
    pub(crate) code: String,
    /// The language: `python`, `node`, `bash` or `typescript`; `python` if neither this nor `template` is given.
    /// `javascript` is another word for `node`. `bash` runs in a Python template and `typescript` in a Node template, so
    /// these two may be given together with `template`.
    #[schema(example = "python")]
    pub(crate) language: Option<String>,
    /// The template's name, instead of a language.
    pub(crate) template: Option<String>,
    /// Timeout of the run in seconds. The server's default is 30 and its maximum 300 unless configured otherwise.
    #[schema(exclusive_minimum = 0)]
    pub(crate) timeout_seconds: Option<f64>,
    /// Standard input: text, or bytes as base64. Without it, standard input is empty.
    #[schema(value_type = Option<DataSchema>)]
    pub(crate) stdin: Option<Data>,
    /// Environment variables, added to the template's.
    #[schema(value_type = Option<BTreeMap<String, String>>)]
    pub(crate) env: Option<FewNamed<String, MAX_ENV>>,
    /// Arguments (`sys.argv[1:]`, `process.argv.slice(2)`).
    #[schema(value_type = Option<Vec<String>>)]
    pub(crate) args: Option<Few<String, MAX_ENV>>,
    /// Files to put into the working directory: path to content.
    #[schema(value_type = Option<BTreeMap<String, DataSchema>>)]
    pub(crate) files: Option<FewNamed<Data, MAX_FILES>>,
    /// Paths to bring back: files, directories, and patterns such as `out/*.csv` or `**/*.png`.
    #[schema(value_type = Option<Vec<String>>)]
    pub(crate) output_files: Option<Few<String, MAX_FILES>>,
    /// What the sandbox may use.
    #[schema(value_type = Option<LimitsBody>)]
    pub(crate) limits: Option<Object<LimitsBody>>,
}

/// What the sandbox may use. Each limit has a default and a maximum, and none can be switched off.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Limits)]
pub(crate) struct LimitsBody {
    /// Memory of all its processes, MiB.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    pub(crate) memory_mb: Option<u64>,
    /// Processes and threads at once.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    pub(crate) processes: Option<u64>,
    /// Bytes of standard output and standard error together.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    pub(crate) output_bytes: Option<u64>,
    /// CPU time of all its processes, seconds.
    #[schema(exclusive_minimum = 0)]
    pub(crate) cpu_seconds: Option<f64>,
    /// The largest file that it may write, MiB.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    pub(crate) file_size_mb: Option<u64>,
    /// Open descriptors of one process.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 32)]
    pub(crate) open_files: Option<u64>,
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

/// A list that keeps `MOST` items and one more, which [`ExecRequest::check`] refuses. The rest is read and dropped: three
/// bytes of a body must not become many bytes of memory.
#[derive(Debug)]
pub(crate) struct Few<T, const MOST: usize>(pub(crate) Vec<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for Few<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Few<T, MOST>, D::Error> {
        FewSeed { most: MOST, of: PhantomData }.deserialize(deserializer).map(|(kept, _)| Few(kept))
    }
}

/// The same for a maximum that is known only at run time. Gives the items that were kept, and how many there were.
struct FewSeed<T> {
    most: usize,
    of: PhantomData<T>,
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

/// The object around a batch.
struct BatchSeed {
    most: usize,
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

/// Reads a JSON body. The error names the field.
pub(crate) fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, ApiError> {
    parse_as(body, PhantomData::<Object<T>>).map(|Object(value)| value)
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

fn parse_as<'a, S: DeserializeSeed<'a>>(body: &'a [u8], seed: S) -> Result<S::Value, ApiError> {
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

/// A template as requests name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) name: Arc<str>,
    pub(crate) language: Arc<str>,
}

/// The templates that a request can name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Catalog {
    pub(crate) templates: Vec<Named>,
}

impl Catalog {
    /// The one that the request means.
    pub(crate) fn choose(&self, language: Option<&str>, template: Option<&str>) -> Result<&Named, ApiError> {
        let names = |of: fn(&Named) -> &str| {
            let mut names: Vec<&str> = self.templates.iter().map(of).collect();
            names.dedup();
            names.join(", ")
        };
        match (language, template) {
            (Some(_), Some(_)) => Err(ApiError::new("invalid_request", "give either language or template, not both")),
            (None, Some(name)) => self.templates.iter().find(|known| *known.name == *name).ok_or_else(|| {
                ApiError::new(
                    "unknown_template",
                    format!("Unknown template {}; there are: {}", quoted(name), names(|entry| &entry.name)),
                )
            }),
            (language, None) => {
                let asked = language.unwrap_or("python");
                let wanted = if asked == "javascript" { "node" } else { asked };
                // A template that is called as the language is its default one.
                let mut speak = self.templates.iter().filter(|known| *known.language == *wanted);
                let named = speak.clone().find(|known| *known.name == *wanted);
                named.or_else(|| speak.next()).ok_or_else(|| {
                    ApiError::new(
                        "unknown_language",
                        format!("Unknown language {}; there are: {}", quoted(asked), names(|entry| &entry.language)),
                    )
                })
            }
        }
    }
}

/// A language that runs in another one's template: its name, that language, and what its code is called there.
fn guest_language(word: &str) -> Option<(&'static str, &'static str, &'static str)> {
    match word {
        "bash" | "sh" | "shell" => Some(("bash", "python", zeroboot_engine::INLINE_BASH)),
        "typescript" | "ts" => Some(("typescript", "node", zeroboot_engine::INLINE_TYPESCRIPT)),
        _ => None,
    }
}

fn quoted(word: &str) -> String {
    format!("{:?}", word.chars().take(60).collect::<String>())
}

impl ExecBody {
    /// Step 1 of an exec: what the engine is asked, and its template.
    pub(crate) fn into_request(
        self,
        catalog: &Catalog,
        bounds: &RequestLimits,
    ) -> Result<(ExecRequest, Named), ApiError> {
        let guest = self.language.as_deref().and_then(guest_language);
        let template = match (guest, &self.template) {
            (Some((asked, host, _)), Some(name)) => {
                let template = catalog.choose(None, Some(name))?;
                if *template.language != *host {
                    let text = format!("{asked} runs in a {host} template, and {} is not one", quoted(name));
                    return Err(ApiError::new("invalid_request", text));
                }
                template
            }
            (Some((asked, host, _)), None) => catalog.choose(Some(host), None).map_err(|_| {
                let text = format!("{asked} runs in a {host} template, and this server has none");
                ApiError::new("unknown_language", text)
            })?,
            (None, template) => catalog.choose(self.language.as_deref(), template.as_deref())?,
        };
        let mut request = ExecRequest::new(&*template.name, self.code);
        if let Some((_, _, name)) = guest {
            request.name = name.into();
        }
        request.limits.timeout = match self.timeout_seconds {
            None => bounds.default_timeout,
            Some(given) => {
                let time = positive(given).filter(|time| *time <= bounds.max_timeout);
                time.ok_or_else(|| {
                    let most = bounds.max_timeout.as_secs_f64();
                    ApiError::new("invalid_timeout", format!("timeout_seconds must be above 0 and at most {most}"))
                })?
            }
        };
        let limits = self.limits.map(|Object(limits)| limits).unwrap_or_default();
        let mib = 1024 * 1024;
        let memory = limits.memory_mb.map(|count| count.saturating_mul(mib));
        request.limits.memory = within("limits.memory_mb", memory, bounds.default_memory, bounds.max_memory, mib)?;
        let (processes, most) = (limits.processes, bounds.max_processes.into());
        let processes = within("limits.processes", processes, bounds.default_processes.into(), most, 1)?;
        request.limits.processes = u32::try_from(processes).unwrap_or(bounds.max_processes);
        request.limits.output =
            within("limits.output_bytes", limits.output_bytes, bounds.default_output, bounds.max_output, 1)?;
        let file_size = limits.file_size_mb.map(|count| count.saturating_mul(mib));
        let (usual, most) = (bounds.default_file_size, bounds.max_file_size);
        request.limits.file_size = within("limits.file_size_mb", file_size, usual, most, mib)?;
        let (usual, most) = (bounds.default_open_files, bounds.max_open_files);
        request.limits.open_files = descriptors("limits.open_files", limits.open_files, usual, most)?;
        request.limits.cpu = match limits.cpu_seconds {
            None => None,
            Some(given) => {
                let time = positive(given);
                Some(time.ok_or_else(|| ApiError::new("invalid_limits", "limits.cpu_seconds must be above 0"))?)
            }
        };
        request.args = self.args.map(|Few(args)| args).unwrap_or_default();
        request.env = self.env.map(|FewNamed(env)| env).unwrap_or_default().into_iter().collect();
        request.output_files = self.output_files.map(|Few(paths)| paths).unwrap_or_default();
        if let Some(data) = self.stdin {
            request.stdin = Stdin::Bytes(data.bytes);
        }
        let files = self.files.map(|FewNamed(files)| files).unwrap_or_default().into_iter();
        request.files =
            files.map(|(path, Data { bytes: data, executable })| InputFile { path, data, executable }).collect();
        request.check().map_err(zeroboot_engine::ExecError::from)?;
        Ok((request, template.clone()))
    }
}

/// Seconds above zero. A time that is too short for the clock becomes its shortest time, not zero.
pub(crate) fn positive(seconds: f64) -> Option<Duration> {
    let time = Duration::try_from_secs_f64(seconds).ok()?;
    (seconds > 0.0).then(|| time.max(Duration::from_nanos(1)))
}

pub(crate) fn within(name: &str, given: Option<u64>, default: u64, most: u64, unit: u64) -> Result<u64, ApiError> {
    match given {
        None => Ok(default),
        Some(value) if value > 0 && value <= most => Ok(value),
        Some(_) => Err(ApiError::new("invalid_limits", format!("{name} must be above 0 and at most {}", most / unit))),
    }
}

/// A limit of open descriptors.
pub(crate) fn descriptors(name: &str, given: Option<u64>, default: u32, most: u32) -> Result<u32, ApiError> {
    let Some(given) = given else { return Ok(default) };
    u32::try_from(given).ok().filter(|count| (MIN_OPEN_FILES..=most).contains(count)).ok_or_else(|| {
        ApiError::new("invalid_limits", format!("{name} must be at least {MIN_OPEN_FILES} and at most {most}"))
    })
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
