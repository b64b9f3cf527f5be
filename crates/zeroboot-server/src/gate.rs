//! Who may run code, how often, and how much at once.

use std::{
    collections::HashMap,
    net::IpAddr,
    path::Path,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use axum::http::{HeaderMap, header};
use jiff::Timestamp;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use zeroboot_engine::EngineStats;

use crate::{
    client_addr::limit_name,
    config::RequestLimits,
    error::ApiError,
    keys::{Key, KeyFileError, KeyRing, Lookup},
    limiter::{Cost, Limiter, Rate},
};

/// The header with a key, where there is no `Authorization`.
const API_KEY: &str = "x-api-key";
/// Client addresses that demo keys are counted for at once.
const MOST_ADDRESSES: usize = 10_000;

/// Whose request it is.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// `None`: the server has no keys.
    pub(crate) key: Option<Arc<Key>>,
    /// `None`: a Unix socket.
    pub(crate) address: Option<IpAddr>,
}

impl Caller {
    /// For logs.
    pub(crate) fn key_id(&self) -> &str {
        self.key.as_ref().map_or("-", |key| &key.id)
    }
}

#[derive(Debug)]
pub(crate) struct Gate {
    ring: RwLock<Option<Arc<KeyRing>>>,
    keys: Limiter<String>,
    addresses: Limiter<(String, u128)>,
    shares: Mutex<HashMap<String, Share>>,
    rates: Rates,
    /// What there is for all keys together.
    all: Most,
    /// Memory of the largest sandbox that may be asked for: any key can have one.
    largest: u64,
}

/// What may be had at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Most {
    execs: u32,
    mib: u32,
}

/// What a key may have at once.
#[derive(Clone, Debug)]
struct Share {
    most: Most,
    execs: Arc<Semaphore>,
    mib: Arc<Semaphore>,
}

impl Share {
    fn new(most: Most) -> Share {
        let semaphore = |count: u32| Arc::new(Semaphore::new((count as usize).min(Semaphore::MAX_PERMITS)));
        Share { most, execs: semaphore(most.execs), mib: semaphore(most.mib) }
    }
}

/// An exec's part of its key's share, until it is dropped.
#[derive(Debug, Default)]
pub(crate) struct Place(Vec<OwnedSemaphorePermit>);

#[derive(Debug)]
struct Rates {
    key: f64,
    concurrency: Option<u32>,
    anonymous: Option<f64>,
    demo_per_minute: f64,
}

impl Gate {
    /// `all`: what the engine has.
    pub(crate) fn new(ring: Option<KeyRing>, limits: &RequestLimits, all: EngineStats) -> Gate {
        Gate {
            ring: RwLock::new(ring.map(Arc::new)),
            // One name for each key, and the keys come from our own file; those that leave it are forgotten.
            keys: Limiter::new(usize::MAX),
            addresses: Limiter::new(MOST_ADDRESSES),
            shares: Mutex::default(),
            all: Most { execs: u32::try_from(all.max_live).unwrap_or(u32::MAX), mib: mib(all.max_memory) },
            largest: limits.max_memory,
            rates: Rates {
                key: limits.key_rate,
                concurrency: limits.key_concurrency,
                anonymous: limits.anonymous_rate,
                demo_per_minute: limits.demo_per_minute,
            },
        }
    }

    /// Reads the keys again. What was there stays if the file cannot be used.
    pub(crate) fn reload(&self, path: &Path) -> Result<usize, KeyFileError> {
        let ring = KeyRing::load(path)?;
        let count = ring.keys().count();
        {
            let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
            shares.retain(|id, _| ring.keys().any(|key| key.id == *id));
        }
        self.keys.retain(|id| ring.keys().any(|key| key.id == *id));
        *self.ring.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(ring));
        Ok(count)
    }

    /// Whether callers need a key.
    pub(crate) fn has_keys(&self) -> bool {
        self.ring.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Finds the caller's key.
    pub(crate) fn authenticate(&self, headers: &HeaderMap, address: Option<IpAddr>) -> Result<Caller, ApiError> {
        let ring = self.ring.read().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(ring) = ring else {
            return match headers.get(header::ORIGIN) {
                Some(origin) if !is_local_origin(origin.as_bytes()) => Err(ApiError::new(
                    "forbidden_origin",
                    "This server has no keys, so it refuses requests of web pages: any page that you visit could use it",
                )),
                _ => Ok(Caller { key: None, address }),
            };
        };
        let token = match (headers.get(header::AUTHORIZATION), headers.get(API_KEY)) {
            (Some(given), _) => given.to_str().ok().and_then(|text| {
                let (scheme, token) = text.split_once(' ')?;
                scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
            }),
            // E2B's SDKs know no other.
            (None, Some(given)) => given.to_str().ok().map(str::trim),
            (None, None) => return Err(ApiError::new("unauthorized", "Missing Authorization header")),
        };
        match ring.find(token.unwrap_or_default(), Timestamp::now()) {
            Lookup::Valid(key) => Ok(Caller { key: Some(key), address }),
            Lookup::Expired => Err(ApiError::new("unauthorized", "API key expired")),
            Lookup::Unknown => Err(ApiError::new("unauthorized", "Invalid API key")),
        }
    }

    /// The key of this id, if it may be used now.
    pub(crate) fn usable(&self, id: &str) -> Option<Arc<Key>> {
        let ring = self.ring.read().unwrap_or_else(PoisonError::into_inner).clone()?;
        ring.usable(id, Timestamp::now())
    }

    /// Charges so many executions to the caller.
    pub(crate) fn charge(&self, caller: &Caller, count: usize) -> Result<(), ApiError> {
        self.take(caller, Cost { count, paid: 0 })
    }

    /// Charges the others of a batch whose first execution is paid.
    pub(crate) fn charge_rest(&self, caller: &Caller, count: usize) -> Result<(), ApiError> {
        if count == 0 { Ok(()) } else { self.take(caller, Cost { count, paid: 1 }) }
    }

    fn take(&self, caller: &Caller, cost: Cost) -> Result<(), ApiError> {
        let now = Instant::now();
        let limited = |rate: f64, unit: &str, wait: Duration| {
            ApiError::new("rate_limited", format!("Rate limit exceeded ({rate} req/{unit})")).retry_after(wait)
        };
        let Some(key) = &caller.key else {
            let Some(rate) = self.rates.anonymous else { return Ok(()) };
            let taken = self.keys.take(String::new(), Rate::per_second(rate), cost, now);
            return taken.map_err(|wait| limited(rate, "s", wait));
        };
        let rate = key.rate.unwrap_or(self.rates.key);
        let taken = self.keys.take(key.id.clone(), Rate::per_second(rate), cost, now);
        taken.map_err(|wait| limited(rate, "s", wait))?;
        if key.demo {
            let rate = self.rates.demo_per_minute;
            let name = (key.id.clone(), limit_name(caller.address));
            let taken = self.addresses.take(name, Rate::per_minute(rate), cost, now);
            taken.map_err(|wait| {
                // Nothing ran: one address must not use up the rate of all.
                self.keys.give_back(&key.id, cost);
                limited(rate, "min", wait)
            })?;
        }
        Ok(())
    }

    /// A place among the execs that the key may have at once; an error if all are taken.
    pub(crate) fn place(&self, caller: &Caller) -> Result<Place, ApiError> {
        let Some(share) = self.share(caller) else { return Ok(Place::default()) };
        share.execs.try_acquire_owned().map(|permit| Place(vec![permit])).map_err(|_| no_place(share.most))
    }

    /// Counts the memory of the place's exec; an error if there is not as much left of the key's.
    pub(crate) fn hold_memory(&self, place: &mut Place, caller: &Caller, memory: u64) -> Result<(), ApiError> {
        let Some(share) = self.share(caller) else { return Ok(()) };
        let permit = share.mib.try_acquire_many_owned(mib(memory)).map_err(|_| no_memory(share.most))?;
        place.0.push(permit);
        Ok(())
    }

    /// A place and memory, and waits for both: for the items of a batch.
    pub(crate) async fn wait_for_place(
        &self,
        caller: &Caller,
        memory: u64,
        until: tokio::time::Instant,
    ) -> Result<Place, ApiError> {
        let Some(Share { most, execs, mib: left }) = self.share(caller) else { return Ok(Place::default()) };
        let closed = |_| ApiError::internal();
        let execs = tokio::time::timeout_at(until, execs.acquire_owned()).await.map_err(|_| no_place(most))?;
        let memory = left.acquire_many_owned(mib(memory));
        let memory = tokio::time::timeout_at(until, memory).await.map_err(|_| no_memory(most))?;
        Ok(Place(vec![execs.map_err(closed)?, memory.map_err(closed)?]))
    }

    /// The execs that the caller may have at once; `None`: only the engine's admission limits them.
    pub(crate) fn most_at_once(&self, caller: &Caller) -> Option<u32> {
        self.most(caller).map(|most| most.execs)
    }

    /// What is configured, else half of all where there are several keys: one of them is not to keep the others out.
    fn most(&self, caller: &Caller) -> Option<Most> {
        let key = caller.key.as_ref()?;
        if let Some(execs) = key.concurrency.or(self.rates.concurrency) {
            return Some(Most { execs, mib: u32::MAX });
        }
        let ring = self.ring.read().unwrap_or_else(PoisonError::into_inner);
        let several = ring.as_ref().is_some_and(|ring| ring.keys().nth(1).is_some());
        let half = Most { execs: self.all.execs.div_ceil(2), mib: self.all.mib.div_ceil(2).max(mib(self.largest)) };
        several.then_some(half)
    }

    fn share(&self, caller: &Caller) -> Option<Share> {
        let key = caller.key.as_ref()?;
        let most = self.most(caller)?;
        let mut all = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = all.entry(key.id.clone()).or_insert_with(|| Share::new(most));
        if entry.most != most {
            *entry = Share::new(most); // The key file changed it; execs under way keep their old places.
        }
        Some(entry.clone())
    }
}

/// Whole MiB.
fn mib(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX)
}

fn no_place(most: Most) -> ApiError {
    ApiError::new("concurrency_limited", format!("Concurrency limit exceeded ({} at once)", most.execs))
        .retry_after(Duration::from_secs(1))
}

fn no_memory(most: Most) -> ApiError {
    ApiError::new("concurrency_limited", format!("Concurrency limit exceeded ({} MiB of memory at once)", most.mib))
        .retry_after(Duration::from_secs(1))
}

/// A page that this machine itself serves.
fn is_local_origin(origin: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(origin) else { return false };
    text.split_once("://").is_some_and(|(_, host)| is_local_name(host, |ip| ip.is_loopback()))
}

/// A `Host` that no foreign name can be: an address, or this machine.
pub(crate) fn is_local_host(host: &[u8]) -> bool {
    std::str::from_utf8(host).is_ok_and(|host| is_local_name(host, |_| true))
}

/// A host with or without a port: `localhost`, or an address that will do.
fn is_local_name(host: &str, will_do: impl Fn(IpAddr) -> bool) -> bool {
    let host = if host.starts_with('[') {
        host.split_inclusive(']').next().unwrap_or(host)
    } else {
        host.split(':').next().unwrap_or(host)
    };
    let address = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok_and(will_do)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_of_this_machine_are_local() {
        for good in ["http://localhost:3000", "http://127.0.0.1", "https://[::1]:8080"] {
            assert!(is_local_origin(good.as_bytes()), "{good}");
        }
        for bad in ["null", "http://evil.example", "http://127.0.0.1.evil.example", "http://localhost.evil.example", ""]
        {
            assert!(!is_local_origin(bad.as_bytes()), "{bad}");
        }
    }

    #[test]
    fn a_host_is_an_address_or_localhost() {
        for good in ["localhost:8080", "LOCALHOST", "127.0.0.1:80", "10.0.0.5", "[::1]:8080", "[2001:db8::1]"] {
            assert!(is_local_host(good.as_bytes()), "{good}");
        }
        for bad in ["", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example", "[::1", "\u{e9}"] {
            assert!(!is_local_host(bad.as_bytes()), "{bad}");
        }
    }
}
