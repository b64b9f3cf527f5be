//! One template: its zygote, kept alive, and its pool of waiting sandboxes.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::{Notify, mpsc, watch};

use crate::{
    ExecError, StartError, TemplateConfig, TemplateStatus, ZygoteSpec,
    cgroup::Cgroups,
    forker::{ForkError, Forker, Request, serve},
    reaper::Reaper,
    spawn::{Spawner, Zygote},
    worker::Worker,
};

/// Wait before the first restart of a zygote; doubles up to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// A zygote that lived this long starts again without a wait.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
/// Forks under way at once to fill the pool.
const REFILL_AT_ONCE: usize = 4;
/// How long a pool that is at least half full waits before it is filled up: a fork costs more CPU time than most runs, so
/// the exec that has just taken a sandbox goes first.
const REST: Duration = Duration::from_millis(10);
#[derive(Debug)]
enum Health {
    Starting,
    Up { pid: u32 },
    Down { reason: String },
}

#[derive(Debug)]
struct State {
    health: Health,
    pool: VecDeque<Worker>,
    version: String,
    warmed: Vec<String>,
    skipped: Vec<String>,
    restarts: u64,
    /// Why it never became warm. It is not tried again.
    failed: Option<String>,
}

/// What the engine's templates share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) spawner: Spawner,
    pub(crate) cgroups: Option<Cgroups>,
    pub(crate) reaper: Arc<Reaper>,
    pub(crate) warm_timeout: Duration,
}

/// One template.
#[derive(Debug)]
pub(crate) struct Template {
    pub(crate) config: TemplateConfig,
    shared: Arc<Shared>,
    state: Mutex<State>,
    forks: AtomicU64,
    pub(crate) forker: Arc<Forker>,
    /// A place in the pool came free, or the zygote came up.
    refill: Notify,
    /// Whether the first start is over.
    warm: watch::Sender<bool>,
}

impl Template {
    /// Begins to start the zygote and, once it is warm, the tasks that keep it and fill its pool. Requests wait so long.
    pub(crate) fn begin(config: TemplateConfig, shared: Arc<Shared>) -> Arc<Template> {
        let (forker, queue) = Forker::new(Arc::clone(&shared));
        let template = Arc::new(Template {
            state: Mutex::new(State {
                health: Health::Starting,
                pool: VecDeque::new(),
                version: String::new(),
                warmed: Vec::new(),
                skipped: Vec::new(),
                restarts: 0,
                failed: None,
            }),
            config,
            shared,
            forks: AtomicU64::new(0),
            forker: Arc::new(forker),
            refill: Notify::new(),
            warm: watch::Sender::new(false),
        });
        tokio::spawn(first_start(Arc::downgrade(&template), queue));
        template
    }

    /// Waits until its first start is over; no longer than a template may take to become warm. Gives why it failed.
    async fn first_start(&self) -> Result<(), String> {
        // The sender is in `self`.
        let mut warm = self.warm.subscribe();
        let _open = warm.wait_for(|tried| *tried).await.is_ok();
        self.state().failed.clone().map_or(Ok(()), Err)
    }

    /// Waits until it is warm for the first time, or failed to become so.
    pub(crate) async fn warm(&self) -> Result<(), StartError> {
        let failed = |reason| StartError::Template { template: self.config.name.clone(), reason };
        self.first_start().await.map_err(failed)
    }

    /// The same for a request.
    pub(crate) async fn warmed(&self) -> Result<(), ExecError> {
        self.first_start().await.map_err(|reason| self.not_ready(reason))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A waiting sandbox from the pool (`true`), else a fresh fork.
    pub(crate) async fn checkout(&self) -> Result<(Worker, bool), ExecError> {
        loop {
            let Some(worker) = self.state().pool.pop_front() else { break };
            self.refill.notify_one();
            if worker.is_waiting() {
                return Ok((worker, true));
            }
            // It died in the pool; its drop clears it away.
        }
        if let Health::Down { reason } = &self.state().health {
            return Err(self.not_ready(reason.clone()));
        }
        let worker = self.fork().await;
        worker.map(|worker| (worker, false)).map_err(|error| self.not_ready(error.to_string()))
    }

    fn not_ready(&self, reason: String) -> ExecError {
        ExecError::NotReady { template: self.config.name.clone(), reason }
    }

    /// A fresh sandbox, ready for its request.
    #[tracing::instrument(name = "exec.fork", level = "debug", skip_all)]
    async fn fork(&self) -> Result<Worker, ForkError> {
        let (worker, info) = self.forker.fork().await?;
        self.forks.fetch_add(1, Ordering::Relaxed);
        self.note_info(&info);
        Ok(worker)
    }

    /// Keeps what the runner says of itself: version and warmed modules. (It is the runner's word, cut short.)
    fn note_info(&self, info: &[u8]) {
        #[derive(serde::Deserialize)]
        struct Info {
            #[serde(default)]
            version: String,
            #[serde(default)]
            warmed: Vec<String>,
            #[serde(default)]
            skipped: Vec<String>,
        }
        let mut state = self.state();
        if state.version.is_empty()
            && info.len() <= 4096
            && let Ok(info) = serde_json::from_slice::<Info>(info)
        {
            state.version = info.version;
            state.warmed = info.warmed;
            for skipped in &info.skipped {
                tracing::warn!(template = self.config.name, skipped, "a module was not warmed");
            }
            state.skipped = info.skipped;
        }
    }

    /// What it is doing now.
    pub(crate) fn status(&self) -> TemplateStatus {
        let state = self.state();
        let (ready, reason, memory) = match &state.health {
            Health::Up { pid } => (true, None, resident_memory(*pid)),
            Health::Starting => (false, Some("starting".to_owned()), 0),
            Health::Down { reason } => (false, Some(reason.clone()), 0),
        };
        TemplateStatus {
            name: self.config.name.clone(),
            language: self.config.language.clone(),
            isolation: self.config.spec.isolation(),
            ready,
            reason,
            version: state.version.clone(),
            warmed: state.warmed.clone(),
            skipped: state.skipped.clone(),
            memory,
            pool_ready: state.pool.len(),
            pool_target: self.config.pool,
            forks: self.forks.load(Ordering::Relaxed),
            restarts: state.restarts,
        }
    }

    /// Drops the waiting sandboxes.
    pub(crate) fn empty_pool(&self) {
        self.state().pool.clear();
    }
}

/// Resident memory of a process, bytes; 0 if it is gone.
fn resident_memory(pid: u32) -> u64 {
    let pages = std::fs::read_to_string(format!("/proc/{pid}/statm"))
        .ok()
        .and_then(|text| text.split_whitespace().nth(1)?.parse::<u64>().ok())
        .unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// Starts the zygote for the first time. Where that fails, nothing is tried again: it would fail alike.
async fn first_start(template: std::sync::Weak<Template>, queue: mpsc::Receiver<Request>) {
    let Some((spec, shared)) = template.upgrade().map(|t| (t.config.spec.clone(), Arc::clone(&t.shared))) else {
        return;
    };
    let started = shared.spawner.start(&spec, shared.warm_timeout).await;
    drop(shared);
    let Some(strong) = template.upgrade() else { return };
    match started {
        Ok(zygote) => {
            strong.state().health = Health::Up { pid: zygote.pid() };
            tokio::spawn(keep_zygote(Arc::downgrade(&strong), zygote, queue));
            if strong.config.pool > 0 {
                tokio::spawn(keep_pool(Arc::downgrade(&strong)));
            }
        }
        Err(error) => {
            let mut state = strong.state();
            state.health = Health::Down { reason: error.to_string() };
            state.failed = Some(error.to_string());
        }
    }
    strong.warm.send_replace(true);
}

/// Serves fork requests from the zygote, and starts a new one when it dies.
async fn keep_zygote(template: std::sync::Weak<Template>, mut zygote: Zygote, mut queue: mpsc::Receiver<Request>) {
    let mut backoff = MIN_BACKOFF;
    loop {
        let born = Instant::now();
        let Some(shared) = template.upgrade().map(|t| Arc::clone(&t.shared)) else { return };
        let reason = match serve(&shared, &zygote.control, &mut queue).await {
            Ok(()) => return,
            Err(lost) => lost.to_string(),
        };
        drop(zygote);
        let Some(spec) = down(&template, &reason) else { return };
        if born.elapsed() >= HEALTHY_AFTER {
            backoff = MIN_BACKOFF;
        }
        zygote = loop {
            let wait = tokio::time::sleep(backoff);
            tokio::pin!(wait);
            loop {
                tokio::select! {
                    () = &mut wait => break,
                    request = queue.recv() => match request {
                        // Nobody waits for a zygote that is down: a caller gets its reason at once.
                        Some(request) => request.refuse(ForkError::Down(reason.clone())),
                        None => return,
                    },
                }
            }
            backoff = (backoff * 2).min(MAX_BACKOFF);
            if let Some(template) = template.upgrade() {
                template.state().health = Health::Starting;
            }
            match shared.spawner.start(&spec, shared.warm_timeout).await {
                Ok(zygote) => break zygote,
                Err(error) => {
                    if down(&template, &error.to_string()).is_none() {
                        return;
                    }
                }
            }
        };
        let Some(template) = template.upgrade() else { return };
        let mut state = template.state();
        state.health = Health::Up { pid: zygote.pid() };
        state.restarts += 1;
        drop(state);
        template.refill.notify_one();
    }
}

/// Marks the template as down; its waiting sandboxes died with the zygote.
fn down(template: &std::sync::Weak<Template>, reason: &str) -> Option<ZygoteSpec> {
    let template = template.upgrade()?;
    tracing::error!(template = template.config.name, reason, "the zygote is down");
    let mut state = template.state();
    state.health = Health::Down { reason: reason.to_owned() };
    state.pool.clear();
    Some(template.config.spec.clone())
}

/// Keeps the pool full.
async fn keep_pool(template: std::sync::Weak<Template>) {
    // When the pool, still half full, is filled up.
    let mut rest: Option<Instant> = None;
    loop {
        let Some(strong) = template.upgrade() else { return };
        let missing = {
            let state = strong.state();
            match state.health {
                Health::Up { .. } => strong.config.pool.saturating_sub(state.pool.len()),
                Health::Starting | Health::Down { .. } => 0,
            }
        };
        if missing == 0 {
            rest = None;
            // The template must be able to end while we wait.
            let waiting = wait_for_refill(&strong);
            drop(strong);
            waiting.await;
            continue;
        }
        let until = *rest.get_or_insert_with(|| Instant::now() + REST);
        if missing <= strong.config.pool / 2 && Instant::now() < until {
            // A checkout wakes it up: now it may be less than half full.
            let _over = tokio::time::timeout_at(until.into(), strong.refill.notified()).await;
            continue;
        }
        rest = None;
        let forks = (0..missing.min(REFILL_AT_ONCE)).map(|_| {
            let strong = Arc::clone(&strong);
            tokio::spawn(async move { strong.fork().await })
        });
        let mut failed = None;
        for fork in forks.collect::<Vec<_>>() {
            match fork.await {
                Ok(Ok(worker)) => strong.state().pool.push_back(worker),
                Ok(Err(error)) => failed = Some(error.to_string()),
                Err(error) => failed = Some(error.to_string()),
            }
        }
        if let Some(error) = failed {
            tracing::warn!(template = strong.config.name, error, "cannot fill the pool");
            drop(strong);
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }
}

fn wait_for_refill(template: &Arc<Template>) -> impl Future<Output = ()> + use<> {
    let weak = Arc::downgrade(template);
    async move {
        // Woken by a checkout or a restart; looks by itself now and then, so that a dropped template ends us.
        let Some(template) = weak.upgrade() else { return };
        let _timeout = tokio::time::timeout(Duration::from_millis(500), template.refill.notified()).await;
    }
}
