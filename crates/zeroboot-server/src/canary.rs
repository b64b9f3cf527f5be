//! Whether a template can really run code: a small exec, and its cached result.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Mutex, watch},
    time::Instant,
};
use tracing::Instrument as _;
use zeroboot_engine::{Event, ExecError, ExecRequest, Outcome};

use crate::{
    backend::Backend,
    wire::{Catalog, Named},
};

/// Timeout of a canary.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Age up to which a success counts while every place is taken and no canary can run.
const BUSY_GRACE: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
pub(crate) struct Health {
    pub(crate) at: Instant,
    pub(crate) result: Result<(), CanaryError>,
}

/// Why a canary did not pass.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum CanaryError {
    #[error("every sandbox is in use, and nothing came to an outcome lately")]
    Busy,
    #[error("the canary took too long")]
    TooLong,
    /// Shared, since a result is told to all who ask for it.
    #[error("{0}")]
    Exec(Arc<ExecError>),
    #[error("the canary ended as {0}")]
    Ended(&'static str),
    #[error("the canary's output is wrong")]
    WrongOutput,
}

impl From<ExecError> for CanaryError {
    fn from(error: ExecError) -> CanaryError {
        match error {
            ExecError::Busy { .. } => CanaryError::Busy,
            other => CanaryError::Exec(Arc::new(other)),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Canaries {
    each: Vec<Canary>,
    /// They have run.
    tried: AtomicBool,
    /// One has passed, now or earlier.
    passed: watch::Sender<bool>,
}

#[derive(Debug)]
struct Canary {
    template: String,
    memory: u64,
    code: &'static str,
    /// Locked while it runs: callers who ask meanwhile wait for the same result.
    last: Mutex<Last>,
    /// When an exec last came to an outcome; also what the caller's code did says that the template works.
    worked: std::sync::Mutex<Option<Instant>>,
}

#[derive(Debug, Default)]
struct Last {
    health: Option<Health>,
    /// When it last really passed. An assumption while every place is taken does not count.
    passed: Option<Instant>,
}

impl Canaries {
    /// `memory`: what a sandbox that names none has, bytes.
    pub(crate) fn new(catalog: &Catalog, memory: u64) -> Canaries {
        let one = |Named { name, language }: &Named| Canary {
            template: name.to_string(),
            memory,
            code: match &**language {
                "node" => "console.log('zeroboot-canary', 6 * 7)",
                _ => "print('zeroboot-canary', 6 * 7)",
            },
            last: Mutex::default(),
            worked: std::sync::Mutex::default(),
        };
        Canaries {
            each: catalog.templates.iter().map(one).collect(),
            tried: false.into(),
            passed: watch::Sender::new(false),
        }
    }

    /// Whether a template ever ran code. Before the first results nothing speaks against it.
    pub(crate) fn proven(&self) -> bool {
        *self.passed.borrow() || !self.tried()
    }

    /// Whether there are results: not while the templates warm.
    pub(crate) fn tried(&self) -> bool {
        self.tried.load(Ordering::Relaxed)
    }

    /// Waits until a template has run code.
    pub(crate) fn passed(&self) -> impl Future<Output = ()> + use<> {
        let mut passed = self.passed.subscribe();
        async move {
            // At the server's end, nobody asks any more.
            let _ended = passed.wait_for(|passed| *passed).await;
        }
    }

    /// An exec of this template just came to an outcome.
    pub(crate) fn worked(&self, template: &str) {
        if let Some(canary) = self.each.iter().find(|canary| canary.template == template) {
            *canary.worked.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(Instant::now());
        }
    }

    /// The result of each, in the order of the catalog; one that is older than `age` is run again.
    pub(crate) async fn results(&self, backend: &Backend, age: Duration) -> Vec<Health> {
        let results = futures_util::future::join_all(self.each.iter().map(|canary| canary.result(backend, age))).await;
        if results.iter().any(|health: &Health| health.result.is_ok()) {
            self.passed.send_replace(true);
        }
        self.tried.store(true, Ordering::Relaxed);
        results
    }

    /// The last results, without running anything.
    pub(crate) async fn last(&self) -> Vec<bool> {
        let mut all = Vec::with_capacity(self.each.len());
        for canary in &self.each {
            all.push(canary.last.lock().await.health.as_ref().is_some_and(|health| health.result.is_ok()));
        }
        all
    }
}

impl Canary {
    async fn result(&self, backend: &Backend, age: Duration) -> Health {
        let mut last = self.last.lock().await;
        // A failure is never served from the cache for long: recovery must show at once.
        if let Some(health) = &last.health
            && health.at.elapsed() < if health.result.is_ok() { age } else { age.min(Duration::from_secs(1)) }
        {
            return health.clone();
        }
        // In traces, its steps are under a name of their own.
        let run = self.run(backend).instrument(tracing::debug_span!("canary", template = self.template));
        let outcome = tokio::time::timeout(TIMEOUT, run).await;
        let mut result = outcome.unwrap_or(Err(CanaryError::TooLong));
        if let Err(CanaryError::Busy) = result {
            let worked = *self.worked.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if worked.max(last.passed).is_some_and(|at| at.elapsed() < BUSY_GRACE) {
                result = Ok(());
            }
        } else if result.is_ok() {
            last.passed = Some(Instant::now());
        }
        if let Err(error) = &result {
            tracing::warn!(template = self.template, reason = error.to_string(), "the canary failed");
        }
        last.health.insert(Health { at: Instant::now(), result }).clone()
    }

    async fn run(&self, backend: &Backend) -> Result<(), CanaryError> {
        let mut request = ExecRequest::new(self.template.clone(), self.code);
        request.limits.timeout = TIMEOUT;
        request.limits.memory = self.memory;
        let mut run = backend.exec(request).await?;
        let mut output = Vec::new();
        while let Some(event) = run.next().await? {
            match event {
                Event::Stdout(bytes) if output.len() < 100 => output.extend_from_slice(&bytes),
                Event::End(report) if report.outcome == (Outcome::Exited { code: 0 }) => {}
                Event::End(report) => return Err(CanaryError::Ended(report.outcome.as_str())),
                _ => {}
            }
        }
        if output == b"zeroboot-canary 42\n" { Ok(()) } else { Err(CanaryError::WrongOutput) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, atomic::Ordering};

    use super::*;
    use crate::fake::Fake;

    #[tokio::test(start_paused = true)]
    async fn a_template_whose_places_are_all_taken_for_long_is_not_believed_for_ever() {
        let fake = Arc::new(Fake::default());
        let backend = Backend::Fake(fake.clone());
        let canaries = Canaries::new(
            &Catalog { templates: vec![Named { name: "python".into(), language: "python".into() }] },
            1 << 20,
        );
        let passes = async || canaries.results(&backend, Duration::ZERO).await[0].result.is_ok();
        assert!(passes().await);
        assert_eq!(fake.memory.load(Ordering::SeqCst), 1 << 20);
        fake.busy.store(true, Ordering::SeqCst);
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_secs(10)).await;
            assert!(passes().await);
        }
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert!(!passes().await);
        // An exec that came to an outcome is as good as a canary.
        canaries.worked("python");
        assert!(passes().await);
        fake.busy.store(false, Ordering::SeqCst);
        assert!(passes().await);
    }
}
