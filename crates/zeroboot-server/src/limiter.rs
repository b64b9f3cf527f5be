//! Token buckets: how often a key or a client address may run code.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// A rate: a number of executions in a time. After a pause of that time all of them may come at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rate {
    /// Tokens that a full bucket holds.
    pub(crate) burst: f64,
    /// Tokens a second.
    pub(crate) per_second: f64,
}

impl Rate {
    pub(crate) fn per_second(rate: f64) -> Rate {
        Rate { burst: rate.max(1.0), per_second: rate }
    }

    pub(crate) fn per_minute(rate: f64) -> Rate {
        Rate { burst: rate.max(1.0), per_second: rate / 60.0 }
    }
}

/// What is charged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// Executions.
    pub(crate) count: usize,
    /// Executions of the same request that were charged just before.
    pub(crate) paid: usize,
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
    full_at: Instant,
}

impl Bucket {
    fn full(rate: Rate, now: Instant) -> Bucket {
        Bucket { tokens: rate.burst, at: now, full_at: now }
    }

    /// Charges the cost if the bucket holds that much (or is full, for a cost above what it can hold: it then goes into
    /// debt, so that a large batch is paid for by the time after it). The wait until that will be so, if not. What the
    /// same request has paid counts as still there: without that, no bucket would be full for the rest of a batch.
    fn take(&mut self, rate: Rate, cost: Cost, now: Instant) -> Result<(), Duration> {
        let (cost, paid) = (cost.count as f64, cost.paid as f64);
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * rate.per_second;
        self.tokens = (self.tokens + gained).min(rate.burst);
        self.at = now;
        let needed = (cost + paid).min(rate.burst);
        // The tolerance keeps rounding from refusing the last of exactly `burst` requests.
        if needed - (self.tokens + paid) > 1e-9 {
            // The next try pays its first again.
            return Err(seconds((needed - self.tokens) / rate.per_second));
        }
        self.tokens -= cost;
        self.full_at = now + seconds((rate.burst - self.tokens) / rate.per_second);
        Ok(())
    }
}

/// At most a day: no bucket needs longer, and an `Instant` cannot hold every `f64`.
fn seconds(value: f64) -> Duration {
    Duration::from_secs_f64(value.clamp(0.0, 86_400.0))
}

/// Buckets by name, at most so many of them.
#[derive(Debug)]
pub(crate) struct Limiter<K> {
    inner: Mutex<Inner<K>>,
    most: usize,
}

#[derive(Debug)]
struct Inner<K> {
    buckets: HashMap<K, Bucket>,
    /// Shared by all names that found no place: a flood of made-up names gains nothing by it.
    overflow: Option<Bucket>,
    swept: Option<Instant>,
}

impl<K: Hash + Eq> Limiter<K> {
    pub(crate) fn new(most: usize) -> Limiter<K> {
        Limiter { inner: Mutex::new(Inner { buckets: HashMap::new(), overflow: None, swept: None }), most }
    }

    /// Charges executions to `name`; the time to wait if that is too much now.
    pub(crate) fn take(&self, name: K, rate: Rate, cost: Cost, now: Instant) -> Result<(), Duration> {
        // Every change is complete before the lock is released, so a panic elsewhere leaves nothing half done.
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = inner.buckets.get_mut(&name) {
            return bucket.take(rate, cost, now);
        }
        if inner.buckets.len() >= self.most {
            inner.sweep(now);
        }
        if inner.buckets.len() >= self.most {
            return inner.overflow.get_or_insert_with(|| Bucket::full(rate, now)).take(rate, cost, now);
        }
        inner.buckets.entry(name).or_insert_with(|| Bucket::full(rate, now)).take(rate, cost, now)
    }

    /// Takes a charge back.
    pub(crate) fn give_back(&self, name: &K, cost: Cost) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = inner.buckets.get_mut(name) {
            bucket.tokens += cost.count as f64; // The next charge looks that it is no more than full.
        }
    }

    /// Forgets all other names.
    pub(crate) fn retain(&self, keep: impl Fn(&K) -> bool) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.buckets.retain(|name, _| keep(name));
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.inner.lock().unwrap().buckets.len()
    }
}

impl<K: Hash + Eq> Inner<K> {
    /// Forgets full buckets: a new one would be the same. At most once a second, so that a flood cannot make each
    /// request pay for a walk over the whole map.
    fn sweep(&mut self, now: Instant) {
        if self.swept.is_some_and(|at| now.saturating_duration_since(at) < Duration::from_secs(1)) {
            return;
        }
        self.swept = Some(now);
        self.buckets.retain(|_, bucket| bucket.full_at > now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(count: usize) -> Cost {
        Cost { count, paid: 0 }
    }

    #[test]
    fn a_burst_passes_then_the_rate_holds() {
        let limiter = Limiter::new(10);
        let rate = Rate::per_second(100.0);
        let start = Instant::now();
        for _ in 0..100 {
            assert_eq!(limiter.take("k", rate, cost(1), start), Ok(()));
        }
        let wait = limiter.take("k", rate, cost(1), start).unwrap_err();
        assert!(wait > Duration::ZERO && wait <= Duration::from_millis(11), "{wait:?}");
        assert_eq!(limiter.take("k", rate, cost(1), start + Duration::from_millis(11)), Ok(()));
        assert!(limiter.take("k", rate, cost(1), start + Duration::from_millis(11)).is_err());
        assert_eq!(limiter.take("other", rate, cost(1), start), Ok(()));
    }

    #[test]
    fn each_item_of_a_batch_is_charged() {
        let limiter = Limiter::new(10);
        let rate = Rate::per_second(10.0);
        let start = Instant::now();
        assert_eq!(limiter.take("k", rate, cost(6), start), Ok(()));
        assert!(limiter.take("k", rate, cost(6), start).is_err());
        // A batch above the burst passes from a full bucket, and is paid for afterwards.
        let later = start + Duration::from_secs(5);
        assert_eq!(limiter.take("k", rate, cost(30), later), Ok(()));
        assert!(limiter.take("k", rate, cost(1), later + Duration::from_secs(2)).is_err());
        assert_eq!(limiter.take("k", rate, cost(1), later + Duration::from_millis(2_200)), Ok(()));
    }

    #[test]
    fn a_batch_above_the_burst_passes_from_a_full_bucket_also_when_its_first_is_paid_before_the_rest() {
        let limiter = Limiter::new(10);
        let rate = Rate::per_second(10.0);
        let batch = |now| {
            limiter.take("k", rate, cost(1), now)?;
            limiter.take("k", rate, Cost { count: 29, paid: 1 }, now)
        };
        let start = Instant::now();
        assert_eq!(batch(start), Ok(()));
        assert!(batch(start + Duration::from_secs(2)).is_err());
        // A refused one costs its first; after the time that it names the next one passes.
        let later = start + Duration::from_secs(2) + Duration::from_millis(500);
        let wait = batch(later).unwrap_err();
        assert_eq!(batch(later + wait), Ok(()));
    }

    #[test]
    fn ten_a_minute_are_ten_a_minute() {
        let limiter = Limiter::new(10);
        let rate = Rate::per_minute(10.0);
        let start = Instant::now();
        for _ in 0..10 {
            assert_eq!(limiter.take(1, rate, cost(1), start), Ok(()));
        }
        let wait = limiter.take(1, rate, cost(1), start).unwrap_err();
        assert!(wait > Duration::from_secs(5) && wait < Duration::from_secs(7), "{wait:?}");
    }

    #[test]
    fn a_flood_of_names_neither_grows_the_map_nor_frees_anyone() {
        let limiter = Limiter::new(100);
        let rate = Rate::per_minute(10.0);
        let start = Instant::now();
        let passed = (0..100_000).filter(|name| limiter.take(*name, rate, cost(1), start).is_ok()).count();
        assert_eq!(limiter.len(), 100);
        assert_eq!(passed, 100 + 10);
        // When they have been quiet, their places are free again.
        let later = start + Duration::from_secs(120);
        assert_eq!(limiter.take(200_000, rate, cost(1), later), Ok(()));
        assert_eq!(limiter.len(), 1);
    }

    #[test]
    fn a_panic_while_the_lock_is_held_stops_nobody() {
        let limiter = std::sync::Arc::new(Limiter::new(10));
        let other = limiter.clone();
        let panicked = std::thread::spawn(move || {
            let _guard = other.inner.lock().unwrap();
            panic!("on purpose");
        });
        assert!(panicked.join().is_err());
        assert_eq!(limiter.take("k", Rate::per_second(1.0), cost(1), Instant::now()), Ok(()));
    }
}
