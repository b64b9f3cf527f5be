//! The engine as the routes see it. In tests of the routes a stand-in takes its place.

use uuid::Uuid;
use zeroboot_engine::{Engine, EngineStats, Event, ExecError, ExecRequest, Execution, Isolation, TemplateStatus};

#[derive(Clone, Debug)]
pub(crate) enum Backend {
    Engine(Engine),
    #[cfg(test)]
    Fake(std::sync::Arc<crate::fake::Fake>),
}

#[derive(Debug)]
#[cfg_attr(test, expect(clippy::large_enum_variant, reason = "the small one is for tests only"))]
pub(crate) enum Run {
    Engine(Execution),
    #[cfg(test)]
    Fake(crate::fake::FakeRun),
}

impl Backend {
    pub(crate) async fn exec(&self, request: ExecRequest) -> Result<Run, ExecError> {
        match self {
            Backend::Engine(engine) => engine.exec(request).await.map(Run::Engine),
            #[cfg(test)]
            Backend::Fake(fake) => fake.exec(request).map(Run::Fake),
        }
    }

    /// Long-lived sandboxes are the real engine's: their fake is a worker, in the engine's own tests.
    pub(crate) fn engine(&self) -> Option<&Engine> {
        match self {
            Backend::Engine(engine) => Some(engine),
            #[cfg(test)]
            Backend::Fake(_) => None,
        }
    }

    pub(crate) fn templates(&self) -> Vec<TemplateStatus> {
        match self {
            Backend::Engine(engine) => engine.templates(),
            #[cfg(test)]
            Backend::Fake(fake) => fake.templates(),
        }
    }

    /// Why sandboxes have no cgroup; `None` if they have.
    pub(crate) fn cgroup_obstacle(&self) -> Option<&str> {
        match self {
            Backend::Engine(engine) => engine.cgroup_obstacle(),
            #[cfg(test)]
            Backend::Fake(fake) => fake.cgroup_obstacle.get().map(String::as_str),
        }
    }

    pub(crate) fn stats(&self) -> EngineStats {
        match self {
            Backend::Engine(engine) => engine.stats(),
            #[cfg(test)]
            Backend::Fake(_) => EngineStats { max_live: 16, max_memory: 8 << 30, ..EngineStats::default() },
        }
    }
}

impl Run {
    pub(crate) fn id(&self) -> Uuid {
        match self {
            Run::Engine(execution) => execution.id(),
            #[cfg(test)]
            Run::Fake(run) => run.id,
        }
    }

    pub(crate) fn isolation(&self) -> Isolation {
        match self {
            Run::Engine(execution) => execution.isolation(),
            #[cfg(test)]
            Run::Fake(_) => Isolation::Process,
        }
    }

    /// The sandbox was waiting in the pool.
    pub(crate) fn pooled(&self) -> bool {
        match self {
            Run::Engine(execution) => execution.pooled(),
            #[cfg(test)]
            Run::Fake(_) => true,
        }
    }

    /// Until the sandbox was ready.
    pub(crate) fn fork_time(&self) -> std::time::Duration {
        match self {
            Run::Engine(execution) => execution.fork_time(),
            #[cfg(test)]
            Run::Fake(_) => std::time::Duration::from_micros(300),
        }
    }

    /// The next event; `None` after the last. Cancel safe.
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, ExecError> {
        match self {
            Run::Engine(execution) => execution.next().await,
            #[cfg(test)]
            Run::Fake(run) => run.next().await,
        }
    }
}
