//! The engine: admission, templates and execs.

use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::Instrument;
use uuid::Uuid;

use crate::{
    BranchError, BranchSpec, Checkpoint, CheckpointSpec, EndReason, EngineConfig, ExecRequest, Execution,
    InvalidRequest, Isolation, Sandbox, SandboxSpec,
    cgroup::Cgroups,
    live::{Hold, Origin, Registry, end_all},
    reaper::Reaper,
    spawn::Spawner,
    template::{Shared, Template},
};

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The program could not be started.
    #[error("cannot start a zygote")]
    Spawn(#[source] std::io::Error),
    /// A template could not be made: the zygote's own words.
    #[error("template {template}: {reason}")]
    Template {
        /// Its name.
        template: String,
        /// The zygote's words.
        reason: String,
    },
}

/// Why an exec gave no outcome.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecError {
    /// The caller's mistake.
    #[error(transparent)]
    Invalid(#[from] InvalidRequest),
    /// No such template.
    #[error("there is no template {0:?}")]
    UnknownTemplate(String),
    /// Every place is taken and none came free in time.
    #[error("all {live} sandboxes are in use")]
    Busy {
        /// Sandboxes that serve requests.
        live: usize,
        /// When to try again.
        retry_after: Duration,
    },
    /// Its owner already has the maximum of long-lived sandboxes.
    #[error("this key already has its maximum of {0} sandboxes")]
    TooManySandboxes(usize),
    /// The template gave no sandbox: its zygote is down and being restarted, or the fork failed. No code ran.
    #[error("template {template} is not ready: {reason}")]
    NotReady {
        /// Its name.
        template: String,
        /// Why.
        reason: String,
    },
    /// The sandbox broke.
    #[error("the sandbox failed: {0}")]
    Sandbox(String),
    /// The engine is shutting down.
    #[error("shutting down")]
    ShuttingDown,
}

/// What a template is doing now.
#[derive(Clone, Debug)]
pub struct TemplateStatus {
    /// Its name.
    pub name: String,
    /// `python` or `node`.
    pub language: String,
    /// What stands around its sandboxes.
    pub isolation: Isolation,
    /// Its zygote is up and forks.
    pub ready: bool,
    /// Why it is not.
    pub reason: Option<String>,
    /// Runtime version as the runner reports it, such as `Python 3.11.7`.
    pub version: String,
    /// Modules that were warmed.
    pub warmed: Vec<String>,
    /// Optional modules that were not, each with the reason. (It is the runner's word.)
    pub skipped: Vec<String>,
    /// Resident memory of the zygote, bytes.
    pub memory: u64,
    /// Sandboxes waiting.
    pub pool_ready: usize,
    /// Sandboxes that should wait.
    pub pool_target: usize,
    /// Sandboxes forked since the start.
    pub forks: u64,
    /// Times the zygote was restarted.
    pub restarts: u64,
}

/// Counters of the whole engine.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineStats {
    /// Sandboxes that serve a request now.
    pub live: usize,
    /// Memory promised to them, bytes.
    pub promised_memory: u64,
    /// Requests refused as busy since the start.
    pub refused: u64,
    /// Most sandboxes that may serve requests at once.
    pub max_live: usize,
    /// Most memory that may be promised, bytes.
    pub max_memory: u64,
    /// Long-lived sandboxes, apart from the above.
    pub sandboxes: usize,
    /// Memory promised to those, bytes.
    pub sandbox_memory: u64,
    /// Checkpoints of those that are kept.
    pub checkpoints: usize,
    /// Memory that they add to what their sandboxes were forked from, bytes.
    pub checkpoint_memory: u64,
}

/// A running engine. Clones are handles to the same one; when the last is dropped, everything it started ends.
#[derive(Clone, Debug)]
pub struct Engine {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// In the order of the configuration. They are few, and can become more while the engine runs.
    templates: RwLock<Vec<Arc<Template>>>,
    live: Arc<Registry>,
    /// One permit a live sandbox.
    places: Arc<Semaphore>,
    max_live: usize,
    /// One permit a MiB promised.
    memory: Arc<Semaphore>,
    max_memory: u64,
    admission_wait: Duration,
    refused: AtomicU64,
    closing: AtomicBool,
    cgroup_obstacle: Option<String>,
    reaper: Arc<Reaper>,
}

const MIB: u64 = 1024 * 1024;
/// Longest wait of an ending engine for the processes that it killed.
const CLEARING: Duration = Duration::from_secs(2);

impl Drop for Inner {
    fn drop(&mut self) {
        self.live.end_all(EndReason::ShuttingDown);
    }
}

impl Engine {
    /// Starts the zygotes, waits until every template is warm, and begins to fill the pools.
    pub async fn start(config: EngineConfig) -> Result<Engine, StartError> {
        let engine = Engine::begin(config)?;
        engine.warm().await?;
        Ok(engine)
    }

    /// Begins to start the zygotes. Requests wait until their template is warm. To be called inside a Tokio runtime.
    pub fn begin(config: EngineConfig) -> Result<Engine, StartError> {
        let (cgroups, cgroup_obstacle) = match config.cgroups.then(Cgroups::claim) {
            Some(Ok(cgroups)) => (Some(cgroups), None),
            Some(Err(error)) => (None, Some(error.to_string())),
            None => (None, Some("switched off".into())),
        };
        let reaper = Reaper::start();
        let shared = Arc::new(Shared {
            spawner: Spawner::new(&config.program).map_err(StartError::Spawn)?,
            cgroups,
            reaper: Arc::clone(&reaper),
            warm_timeout: config.warm_timeout,
        });
        let templates =
            config.templates.into_iter().map(|template| Template::begin(template, Arc::clone(&shared))).collect();
        Ok(Engine {
            inner: Arc::new(Inner {
                templates: RwLock::new(templates),
                live: Registry::new(config.sandboxes),
                places: Arc::new(Semaphore::new(config.max_live)),
                max_live: config.max_live,
                memory: Arc::new(Semaphore::new((config.max_memory / MIB) as usize)),
                max_memory: config.max_memory,
                admission_wait: config.admission_wait,
                refused: AtomicU64::new(0),
                closing: AtomicBool::new(false),
                cgroup_obstacle,
                reaper,
            }),
        })
    }

    /// Waits until every template is warm. A template that failed to become so stays down.
    pub async fn warm(&self) -> Result<(), StartError> {
        let templates = self.inner.templates.read().unwrap_or_else(PoisonError::into_inner).clone();
        for template in templates {
            template.warm().await?;
        }
        Ok(())
    }

    /// Takes a sandbox and starts the code in it. Dropping the [`Execution`] kills the sandbox.
    pub async fn exec(&self, request: ExecRequest) -> Result<Execution, ExecError> {
        let requested = Instant::now();
        request.check()?;
        let template = self.template(&request.template)?;
        // Before it takes a place: those that wait for one template keep nobody from another.
        template.warmed().await?;
        let permits = self.admit(&request).instrument(tracing::debug_span!("exec.admission")).await?;
        let asked = Instant::now();
        let (mut worker, pooled) = template.checkout().instrument(tracing::debug_span!("exec.checkout")).await?;
        worker.charge(permits);
        worker.limit(&request.limits).map_err(|e| ExecError::Sandbox(format!("set its cgroup limits: {e}")))?;
        let isolation = template.config.spec.isolation();
        Execution::new(worker, request, isolation, pooled, requested, asked.elapsed())
    }

    /// By name, at this moment.
    fn template(&self, name: &str) -> Result<Arc<Template>, ExecError> {
        let templates = self.inner.templates.read().unwrap_or_else(PoisonError::into_inner);
        let found = templates.iter().find(|template| template.config.name == name);
        found.cloned().ok_or_else(|| ExecError::UnknownTemplate(name.to_owned()))
    }

    /// The right to one live sandbox and to its memory.
    async fn admit(&self, request: &ExecRequest) -> Result<Vec<OwnedSemaphorePermit>, ExecError> {
        let inner = &self.inner;
        if inner.closing.load(Ordering::Relaxed) {
            return Err(ExecError::ShuttingDown);
        }
        let mib = u32::try_from(request.limits.memory.div_ceil(MIB)).unwrap_or(u32::MAX);
        if u64::from(mib) * MIB > inner.max_memory {
            return Err(InvalidRequest::TooMuchMemory { asked: request.limits.memory, limit: inner.max_memory }.into());
        }
        let both = async {
            let place = Arc::clone(&inner.places).acquire_owned().await?;
            let memory = Arc::clone(&inner.memory).acquire_many_owned(mib).await?;
            Ok::<_, tokio::sync::AcquireError>(vec![place, memory])
        };
        match tokio::time::timeout(inner.admission_wait, both).await {
            Ok(Ok(permits)) => Ok(permits),
            Ok(Err(_closed)) => Err(ExecError::ShuttingDown),
            Err(_elapsed) => {
                inner.refused.fetch_add(1, Ordering::Relaxed);
                Err(ExecError::Busy { live: self.stats().live, retry_after: Duration::from_secs(1) })
            }
        }
    }

    /// The templates, in the order of the configuration.
    pub fn templates(&self) -> Vec<TemplateStatus> {
        let templates = self.inner.templates.read().unwrap_or_else(PoisonError::into_inner);
        templates.iter().map(|template| template.status()).collect()
    }

    /// Counters.
    pub fn stats(&self) -> EngineStats {
        let inner = &self.inner;
        let (checkpoints, checkpoint_memory) = inner.live.kept();
        EngineStats {
            live: inner.max_live.saturating_sub(inner.places.available_permits()),
            promised_memory: inner.max_memory.saturating_sub(inner.memory.available_permits() as u64 * MIB),
            refused: inner.refused.load(Ordering::Relaxed),
            max_live: inner.max_live,
            max_memory: inner.max_memory,
            sandboxes: inner.live.live(),
            sandbox_memory: inner.live.promised(),
            checkpoints,
            checkpoint_memory,
        }
    }

    /// Takes a long-lived sandbox. Its places and memory are separate from those of execs.
    pub async fn create(&self, spec: SandboxSpec) -> Result<Sandbox, ExecError> {
        let inner = &self.inner;
        if inner.closing.load(Ordering::Relaxed) {
            return Err(ExecError::ShuttingDown);
        }
        spec.check(&inner.live.bounds)?;
        let template = self.template(&spec.template)?;
        template.warmed().await?;
        let (place, permits) = inner.live.admit(&spec)?;
        let asked = Instant::now();
        let (mut worker, pooled) = template.checkout().instrument(tracing::debug_span!("sandbox.checkout")).await?;
        worker.charge(permits);
        let failed = |what: &str, error: std::io::Error| ExecError::Sandbox(format!("{what}: {error}"));
        worker.limit(&spec.limits.of_exec()).map_err(|error| failed("set its cgroup limits", error))?;
        let origin = Origin {
            language: template.config.language.clone(),
            isolation: template.config.spec.isolation(),
            pooled,
            fork_time: asked.elapsed(),
            forker: Some(Arc::clone(&template.forker)),
        };
        inner.live.launch(worker, spec, origin, place).map_err(|error| failed("make its identity", error))
    }

    /// Makes sandboxes that begin where this one is now; all, or none. It goes on. Whoever asks may give up: then they end.
    pub async fn branch(&self, origin: &Sandbox, spec: BranchSpec) -> Result<Vec<Sandbox>, BranchError> {
        let (origin, registry) = (origin.clone(), Arc::clone(&self.inner.live));
        self.to_its_end(async move { origin.branch(&registry, spec).await }, end_all).await
    }

    /// Keeps this moment of a sandbox, which goes on. Whoever asks may give up: then nothing is kept.
    pub async fn checkpoint(&self, sandbox: &Sandbox, spec: CheckpointSpec) -> Result<Checkpoint, BranchError> {
        let (sandbox, registry) = (sandbox.clone(), Arc::clone(&self.inner.live));
        let engine = self.clone();
        let unwanted = async move |checkpoint: Checkpoint| {
            engine.forget(&checkpoint);
        };
        self.to_its_end(async move { sandbox.checkpoint(&registry, spec).await }, unwanted).await
    }

    /// Makes sandboxes that begin at a checkpoint; all, or none. Whoever asks may give up: then they end.
    pub async fn restore(&self, checkpoint: &Checkpoint, spec: BranchSpec) -> Result<Vec<Sandbox>, BranchError> {
        let (checkpoint, registry) = (checkpoint.clone(), Arc::clone(&self.inner.live));
        self.to_its_end(async move { checkpoint.restore(&registry, spec).await }, end_all).await
    }

    /// Takes a sandbox back to a checkpoint of it; without one, to the last on its way here. It ends, and another has its id.
    pub async fn roll_back(
        &self,
        sandbox: &Sandbox,
        to: Option<Checkpoint>,
        hold: Option<Arc<dyn Hold>>,
    ) -> Result<Sandbox, BranchError> {
        let (sandbox, registry) = (sandbox.clone(), Arc::clone(&self.inner.live));
        self.to_its_end(async move { sandbox.roll_back(&registry, to, hold).await }, async |_| ()).await
    }

    /// Lets a branch take over the id of its origin, which ends.
    pub async fn promote(&self, branch: &Sandbox, hold: Option<Arc<dyn Hold>>) -> Result<Sandbox, BranchError> {
        let (branch, registry) = (branch.clone(), Arc::clone(&self.inner.live));
        self.to_its_end(async move { branch.promote(&registry, hold).await }, async |_| ()).await
    }

    /// Does it on a task: once a worker was told to save, that goes to its end, whoever still waits.
    async fn to_its_end<T: Send + 'static, U: Future<Output = ()> + Send>(
        &self,
        what: impl Future<Output = Result<T, BranchError>> + Send + 'static,
        unwanted: impl FnOnce(T) -> U + Send + 'static,
    ) -> Result<T, BranchError> {
        if self.inner.closing.load(Ordering::Relaxed) {
            return Err(ExecError::ShuttingDown.into());
        }
        let (answer, made) = tokio::sync::oneshot::channel();
        tokio::spawn(async move {
            if let Err(Ok(made)) = answer.send(what.await) {
                unwanted(made).await;
            }
        });
        made.await.unwrap_or_else(|_| Err(BranchError::Failed("its task broke".into())))
    }

    /// The checkpoints that are kept, the oldest first.
    pub fn checkpoints(&self) -> Vec<Checkpoint> {
        self.inner.live.checkpoints()
    }

    /// One that is kept.
    pub fn find_checkpoint(&self, id: Uuid) -> Option<Checkpoint> {
        self.inner.live.find_checkpoint(id)
    }

    /// Lets a checkpoint go. `false`: that has happened. Sandboxes that began there stay.
    pub fn forget(&self, checkpoint: &Checkpoint) -> bool {
        self.inner.live.forget(checkpoint.id())
    }

    /// The sandboxes that live, the oldest first.
    pub fn sandboxes(&self) -> Vec<Sandbox> {
        self.inner.live.sandboxes()
    }

    /// A sandbox that lives, or has ended not long ago.
    pub fn find(&self, id: Uuid) -> Option<Sandbox> {
        self.inner.live.find(id)
    }

    /// Ends every sandbox that lives.
    pub fn end_sandboxes(&self) {
        self.inner.live.end_all(EndReason::ShuttingDown);
    }

    /// Why sandboxes have no cgroup; `None` if they have.
    pub fn cgroup_obstacle(&self) -> Option<&str> {
        self.inner.cgroup_obstacle.as_deref()
    }

    /// Refuses new execs, waits up to `drain` for the live ones, then kills all that is left and clears it away.
    pub async fn shutdown(&self, drain: Duration) {
        self.inner.closing.store(true, Ordering::Relaxed);
        let deadline = Instant::now() + drain;
        while self.stats().live > 0 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.inner.places.close();
        self.end_sandboxes();
        for template in self.inner.templates.read().unwrap_or_else(PoisonError::into_inner).iter() {
            template.empty_pool();
        }
        let deadline = Instant::now() + CLEARING;
        let ended = || self.inner.live.live() == 0 && self.inner.reaper.is_done();
        while !ended() && Instant::now() < deadline {
            // One may have been on its way.
            self.end_sandboxes();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
