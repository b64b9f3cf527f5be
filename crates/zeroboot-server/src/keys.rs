//! API keys: the file they are kept in, and the search for a presented one.
//!
//! A token is `zb_live_` (or `zb_demo_`, or `e2b_`) and 48 hexadecimal digits: 192 bits from the kernel. The file holds only its
//! BLAKE3 hash. A token of that size cannot be guessed from its hash, so no slow hash is needed.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq as _;

/// How tokens of ordinary keys begin.
pub const LIVE_PREFIX: &str = "zb_live_";
/// How tokens of demo keys begin: few requests a minute from each client address.
pub const DEMO_PREFIX: &str = "zb_demo_";
/// How tokens begin that E2B's SDKs take: some of them check it.
pub const E2B_PREFIX: &str = "e2b_";

/// Most bytes of a key file. The file is read into memory as a whole.
const MAX_FILE: u64 = 16 * 1024 * 1024;
/// Longest header value that can hold a token.
const MAX_TOKEN: usize = 512;

/// What is known about a key. The token itself is not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// Names the key in logs, metrics and commands; says nothing about the token.
    pub id: String,
    /// For people.
    pub name: String,
    /// `blake3:` and 64 hexadecimal digits.
    hash: TokenHash,
    /// When it was made.
    pub created: Timestamp,
    /// From when on it is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Timestamp>,
    /// Since when it is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<Timestamp>,
    /// Execs a second, if not the server's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// Execs at once, if not the server's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<u32>,
    /// A demo key.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub demo: bool,
}

/// What a new key shall be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NewKey {
    /// For people.
    pub name: String,
    /// From when on it is refused.
    pub expires: Option<Timestamp>,
    /// Execs a second.
    pub rate: Option<f64>,
    /// Execs at once.
    pub concurrency: Option<u32>,
    /// A demo key.
    pub demo: bool,
    /// Its token has the form of E2B's. It is a key like any other.
    pub e2b: bool,
}

#[derive(Clone, Copy, PartialEq)]
struct TokenHash([u8; 32]);

impl std::fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("blake3:…")
    }
}

impl TokenHash {
    fn of(token: &str) -> TokenHash {
        TokenHash(*blake3::hash(token.as_bytes()).as_bytes())
    }
}

impl Serialize for TokenHash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("blake3:{}", blake3::Hash::from_bytes(self.0).to_hex()))
    }
}

impl<'de> Deserialize<'de> for TokenHash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<TokenHash, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        let hex = text.strip_prefix("blake3:").and_then(|hex| blake3::Hash::from_hex(hex).ok());
        hex.map(|hash| TokenHash(*hash.as_bytes()))
            .ok_or_else(|| serde::de::Error::custom("a hash is \"blake3:\" and 64 hexadecimal digits"))
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    version: u32,
    #[serde(default, rename = "key")]
    keys: Vec<Key>,
}

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyFileError {
    /// It is not there or cannot be read.
    #[error("cannot read the key file {0}")]
    Read(PathBuf, #[source] io::Error),
    /// It cannot be written.
    #[error("cannot write the key file {0}")]
    Write(PathBuf, #[source] io::Error),
    /// It is not a key file. (The parser's words are left out: they quote the file, which may hold tokens.)
    #[error("the key file {path} is malformed: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: KeyFileFault,
    },
    /// A file in the original's format is not edited.
    #[error("the key file {0} holds plain keys in the original's format; make a new file with `zeroboot keys create`")]
    Plain(PathBuf),
    /// No such key.
    #[error("no key has the id {0:?}")]
    UnknownKey(String),
    /// A rate or concurrency of zero, or an empty name.
    #[error("{0}")]
    BadKey(&'static str),
}

/// What is wrong with a key file. Never its contents.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyFileFault {
    /// It has too many bytes.
    #[error("it is too large")]
    TooLarge,
    /// An array of something else than tokens.
    #[error("it is neither TOML with [[key]] tables nor a JSON array of strings (JSON, line {line} column {column})")]
    NotAnArray {
        /// Where.
        line: usize,
        /// Where.
        column: usize,
    },
    /// An object of another form.
    #[error("a JSON object with \"version\" and \"key\" is expected (JSON, line {line} column {column})")]
    NotOurJson {
        /// Where.
        line: usize,
        /// Where.
        column: usize,
    },
    /// TOML of another form.
    #[error("TOML with \"version = 1\" and [[key]] tables is expected (line {line})")]
    NotOurToml {
        /// Where.
        line: usize,
    },
    /// A file of a newer program.
    #[error("this program does not know version {0}")]
    Version(u32),
    /// The token at this place of the array.
    #[error("key {0} of the array is empty, too long or has spaces around it")]
    BadToken(usize),
    /// A rate or concurrency of zero.
    #[error("{0}")]
    BadNumber(&'static str),
    /// Two keys with this id or with its token.
    #[error("the key {0} occurs twice")]
    Twice(String),
}

/// The keys of a file as they were when it was read.
#[derive(Debug, Default)]
pub struct KeyRing {
    keys: Vec<Arc<Key>>,
    plain: bool,
}

/// What the search for a token gives.
#[derive(Clone, Debug, PartialEq)]
pub enum Lookup {
    /// A key that may be used.
    Valid(Arc<Key>),
    /// Its time is over.
    Expired,
    /// No such key, or a revoked one.
    Unknown,
}

impl KeyRing {
    /// Reads a key file: TOML or JSON in our form, or the original's array of plain tokens.
    pub fn load(path: &Path) -> Result<KeyRing, KeyFileError> {
        let read = |path: &Path| {
            let mut text = String::new();
            File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)?;
            Ok(text)
        };
        let text = read(path).map_err(|error| KeyFileError::Read(path.into(), error))?;
        let malformed = |reason| KeyFileError::Malformed { path: path.into(), reason };
        if text.len() as u64 > MAX_FILE {
            return Err(malformed(KeyFileFault::TooLarge));
        }
        let ring = parse(&text).map_err(malformed)?;
        for (at, key) in ring.keys.iter().enumerate() {
            check_numbers(key.rate, key.concurrency).map_err(|reason| malformed(KeyFileFault::BadNumber(reason)))?;
            if ring.keys[..at].iter().any(|other| other.id == key.id || other.hash == key.hash) {
                return Err(malformed(KeyFileFault::Twice(key.id.clone())));
            }
        }
        Ok(ring)
    }

    /// Searches for the key of a presented token. Takes as long for a wrong token as for a right one.
    pub fn find(&self, token: &str, now: Timestamp) -> Lookup {
        if token.len() > MAX_TOKEN {
            return Lookup::Unknown;
        }
        let hash = TokenHash::of(token);
        let mut found = None;
        for key in &self.keys {
            // No early end: the time must not tell how far the search came.
            if bool::from(key.hash.0.ct_eq(&hash.0)) {
                found = Some(key);
            }
        }
        match found {
            None => Lookup::Unknown,
            Some(key) if key.revoked.is_some() => Lookup::Unknown,
            Some(key) if key.expires.is_some_and(|at| at <= now) => Lookup::Expired,
            Some(key) => Lookup::Valid(key.clone()),
        }
    }

    /// The key of this id, unless it is revoked or its time is over.
    pub(crate) fn usable(&self, id: &str, now: Timestamp) -> Option<Arc<Key>> {
        let found = self.keys.iter().find(|key| key.id == id)?;
        let usable = found.revoked.is_none() && found.expires.is_none_or(|at| at > now);
        usable.then(|| found.clone())
    }

    /// The keys, in the order of the file.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.keys.iter().map(|key| &**key)
    }

    /// Whether the file has the original's format, with tokens in clear.
    pub fn is_plain(&self) -> bool {
        self.plain
    }
}

fn parse(text: &str) -> Result<KeyRing, KeyFileFault> {
    let start = text.trim_start();
    if start.starts_with('[') && !start.starts_with("[[") {
        let tokens: Vec<String> = serde_json::from_str(text)
            .map_err(|error| KeyFileFault::NotAnArray { line: error.line(), column: error.column() })?;
        let keys = tokens.iter().enumerate().map(|(at, token)| plain_key(at, token)).collect::<Result<_, _>>()?;
        return Ok(KeyRing { keys, plain: true });
    }
    let file: KeyFile = if start.starts_with('{') {
        serde_json::from_str(text)
            .map_err(|error| KeyFileFault::NotOurJson { line: error.line(), column: error.column() })?
    } else {
        // The parser's own words quote values; the line's number does not.
        toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(1, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
            KeyFileFault::NotOurToml { line }
        })?
    };
    if file.version != 1 {
        return Err(KeyFileFault::Version(file.version));
    }
    Ok(KeyRing { keys: file.keys.into_iter().map(Arc::new).collect(), plain: false })
}

fn plain_key(at: usize, token: &str) -> Result<Arc<Key>, KeyFileFault> {
    if token.trim() != token || token.is_empty() || token.len() > MAX_TOKEN {
        return Err(KeyFileFault::BadToken(at));
    }
    Ok(Arc::new(Key {
        id: format!("plain{at}"),
        name: format!("key {at} of the plain file"),
        hash: TokenHash::of(token),
        created: Timestamp::UNIX_EPOCH,
        expires: None,
        revoked: None,
        rate: None,
        concurrency: None,
        demo: token.starts_with(DEMO_PREFIX),
    }))
}

fn check_numbers(rate: Option<f64>, concurrency: Option<u32>) -> Result<(), &'static str> {
    if rate.is_some_and(|rate| !(rate > 0.0 && rate.is_finite())) {
        return Err("a key's rate must be above zero");
    }
    if concurrency == Some(0) {
        return Err("a key's concurrency must be above zero");
    }
    Ok(())
}

/// A key file that is edited: what `zeroboot keys` works on. Each change is one atomic replacement of the file.
#[derive(Debug)]
pub struct KeyStore {
    path: PathBuf,
}

impl KeyStore {
    /// The store in this file, which need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> KeyStore {
        KeyStore { path: path.into() }
    }

    /// Makes a key. Gives back its token, which is written nowhere else, and what the file now says about it.
    pub fn create(&self, new: NewKey) -> Result<(String, Key), KeyFileError> {
        check_numbers(new.rate, new.concurrency).map_err(KeyFileError::BadKey)?;
        if new.name.is_empty() || new.name.len() > 200 || new.name.chars().any(char::is_control) {
            return Err(KeyFileError::BadKey("a key needs a name of 1 to 200 characters without control characters"));
        }
        let mut random = [0_u8; 28];
        getrandom::fill(&mut random).map_err(|error| KeyFileError::Write(self.path.clone(), error.into()))?;
        let hex: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let (id, secret) = hex.split_at(8);
        let prefix = match (new.demo, new.e2b) {
            (true, true) => return Err(KeyFileError::BadKey("a demo key's token cannot have the form of E2B's")),
            (true, false) => DEMO_PREFIX,
            (false, true) => E2B_PREFIX,
            (false, false) => LIVE_PREFIX,
        };
        let token = format!("{prefix}{secret}");
        let key = Key {
            id: format!("k{id}"),
            name: new.name,
            hash: TokenHash::of(&token),
            created: now(),
            expires: new.expires,
            revoked: None,
            rate: new.rate,
            concurrency: new.concurrency,
            demo: new.demo,
        };
        let made = key.clone();
        self.edit(true, |keys| {
            keys.push(key);
            Ok(())
        })?;
        Ok((token, made))
    }

    /// All keys, the revoked ones too.
    pub fn list(&self) -> Result<Vec<Key>, KeyFileError> {
        Ok(KeyRing::load(&self.path)?.keys().cloned().collect())
    }

    /// Refuses a key from now on. A running server notices by itself.
    pub fn revoke(&self, id: &str) -> Result<Key, KeyFileError> {
        self.edit(false, |keys| {
            let key = keys.iter_mut().find(|key| key.id == id).ok_or_else(|| KeyFileError::UnknownKey(id.into()))?;
            key.revoked.get_or_insert_with(now);
            Ok(key.clone())
        })
    }

    fn edit<T>(
        &self,
        may_create: bool,
        change: impl FnOnce(&mut Vec<Key>) -> Result<T, KeyFileError>,
    ) -> Result<T, KeyFileError> {
        let failed = |error: io::Error| KeyFileError::Write(self.path.clone(), error);
        let folder = match self.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        // Two commands at once must not lose each other's change. The lock is on the folder: the file is replaced.
        let lock = File::open(folder).map_err(failed)?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
        let before = match self.path.metadata() {
            Ok(metadata) => Some(metadata),
            Err(error) if may_create && error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(KeyFileError::Read(self.path.clone(), error)),
        };
        let mut keys = match &before {
            None => Vec::new(),
            Some(_) => {
                let ring = KeyRing::load(&self.path)?;
                if ring.is_plain() {
                    return Err(KeyFileError::Plain(self.path.clone()));
                }
                ring.keys().cloned().collect()
            }
        };
        let result = change(&mut keys)?;
        let file = KeyFile { version: 1, keys };
        let text = if self.path.extension().is_some_and(|extension| extension == "json") {
            serde_json::to_string_pretty(&file).map_err(|error| failed(error.into()))?
        } else {
            toml::to_string(&file).map_err(|error| failed(io::Error::other(error)))?
        };
        // NamedTempFile makes it with mode 0600.
        let mut new = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        new.write_all(text.as_bytes()).map_err(failed)?;
        if let Some(before) = &before {
            // An administrator who gave the file to the service's group keeps that; it is never made public.
            let mode = std::fs::Permissions::from_mode((before.mode() & 0o640) | 0o600);
            new.as_file().set_permissions(mode).map_err(failed)?;
            let same = new.as_file().metadata().map_err(failed)?;
            if (same.uid(), same.gid()) != (before.uid(), before.gid()) {
                std::os::unix::fs::fchown(new.as_file(), Some(before.uid()), Some(before.gid())).map_err(failed)?;
            }
        }
        new.as_file().sync_all().map_err(failed)?;
        new.persist(&self.path).map_err(|error| failed(error.error))?;
        lock.sync_all().map_err(failed)?;
        Ok(result)
    }
}

/// Whole seconds: the file needs no finer date.
fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

#[cfg(test)]
#[path = "keys_tests.rs"]
mod tests;
