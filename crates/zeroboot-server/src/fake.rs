//! A stand-in for the engine in tests of the routes: the code is a list of words that say what shall happen.

use std::{
    collections::VecDeque,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use uuid::Uuid;
use zeroboot_engine::{Event, ExecError, ExecRequest, Isolation, Outcome, OutputFile, Report, Stdin, TemplateStatus};

#[derive(Debug)]
pub(crate) struct Fake {
    /// Runs that exist.
    pub(crate) alive: Arc<AtomicUsize>,
    /// The most of them at once.
    pub(crate) peak: AtomicUsize,
    pub(crate) started: AtomicUsize,
    /// Zygotes are up.
    pub(crate) ready: AtomicBool,
    /// Every exec fails, while `ready` says otherwise.
    pub(crate) broken: AtomicBool,
    /// Every place is taken.
    pub(crate) busy: AtomicBool,
    /// Memory of the last exec, bytes.
    pub(crate) memory: AtomicU64,
    /// Set: there are no cgroups.
    pub(crate) cgroup_obstacle: OnceLock<String>,
}

#[derive(Debug)]
pub(crate) struct FakeRun {
    pub(crate) id: Uuid,
    words: VecDeque<String>,
    files: VecDeque<String>,
    state: State,
    outcome: Outcome,
    alive: Arc<AtomicUsize>,
}

#[derive(Debug, PartialEq)]
enum State {
    New,
    Running,
    Over,
}

impl Default for Fake {
    fn default() -> Fake {
        Fake {
            alive: Arc::default(),
            peak: AtomicUsize::default(),
            started: AtomicUsize::default(),
            ready: AtomicBool::new(true),
            broken: AtomicBool::default(),
            busy: AtomicBool::default(),
            memory: AtomicU64::default(),
            cgroup_obstacle: OnceLock::default(),
        }
    }
}

impl Fake {
    pub(crate) fn exec(&self, request: ExecRequest) -> Result<FakeRun, ExecError> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(ExecError::Sandbox("broken on purpose".into()));
        }
        if self.busy.load(Ordering::SeqCst) {
            return Err(ExecError::Busy { live: 1, retry_after: Duration::from_secs(1) });
        }
        self.memory.store(request.limits.memory, Ordering::SeqCst);
        let code = String::from_utf8_lossy(&request.code).into_owned();
        match code.as_str() {
            "busy" => return Err(ExecError::Busy { live: 1, retry_after: Duration::from_secs(3) }),
            "panic early" => panic!("on purpose"),
            _ => {}
        }
        let mut words: VecDeque<String> = code.split(' ').map(str::to_owned).collect();
        if code.contains("zeroboot-canary") {
            words = ["zeroboot-canary 42\n".to_owned()].into();
        }
        if let Stdin::Bytes(bytes) = &request.stdin {
            words.push_front(String::from_utf8_lossy(bytes).into_owned());
        }
        let alive = self.alive.fetch_add(1, Ordering::SeqCst) + 1;
        self.peak.fetch_max(alive, Ordering::SeqCst);
        self.started.fetch_add(1, Ordering::SeqCst);
        Ok(FakeRun {
            id: Uuid::now_v7(),
            words,
            files: request.output_files.into(),
            state: State::New,
            outcome: Outcome::Exited { code: 0 },
            alive: self.alive.clone(),
        })
    }

    pub(crate) fn templates(&self) -> Vec<TemplateStatus> {
        let ready = self.ready.load(Ordering::SeqCst);
        let one = |name: &str| TemplateStatus {
            name: name.into(),
            language: name.into(),
            isolation: Isolation::Process,
            ready,
            reason: (!ready).then(|| "the zygote ended".into()),
            version: "Fake 1".into(),
            warmed: vec!["numpy".into()],
            skipped: vec![],
            memory: 2 * 1024 * 1024,
            pool_ready: 1,
            pool_target: 2,
            forks: 0,
            restarts: 0,
        };
        vec![one("python"), one("node")]
    }
}

impl FakeRun {
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, ExecError> {
        if self.state == State::New {
            self.state = State::Running;
            return Ok(Some(Event::Started));
        }
        while let Some(word) = self.words.front().cloned() {
            match word.as_str() {
                "hang" => std::future::pending::<()>().await,
                "panic" => panic!("on purpose"),
                "crash" => return Err(ExecError::Sandbox("worker gone".into())),
                "flood" => return Ok(Some(Event::Stdout(Bytes::from(vec![b'x'; 64 * 1024])))),
                _ => {}
            }
            if word == "sleep" {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            self.words.pop_front();
            if word == "sleep" {
                continue;
            }
            if let Some(code) = word.strip_prefix("exit=").and_then(|code| code.parse().ok()) {
                self.outcome = Outcome::Exited { code };
            } else if word == "late" {
                self.outcome = Outcome::DeadlinePassed;
            } else if let Some(text) = word.strip_prefix("err=") {
                return Ok(Some(Event::Stderr(Bytes::from(text.to_owned()))));
            } else if word == "binary" {
                return Ok(Some(Event::Stdout(Bytes::from_static(b"\xff\x00"))));
            } else {
                return Ok(Some(Event::Stdout(Bytes::from(word))));
            }
        }
        if let Some(path) = self.files.pop_front() {
            let data = if path == "absent" { Err("no such file".into()) } else { Ok(Bytes::from("content")) };
            return Ok(Some(Event::File(OutputFile { path, data })));
        }
        if self.state == State::Over {
            return Ok(None);
        }
        self.state = State::Over;
        Ok(Some(Event::End(Report {
            outcome: self.outcome,
            lost: false,
            pooled: true,
            fork_time: Duration::from_micros(300),
            exec_time: Duration::from_millis(1),
            total_time: Duration::from_millis(2),
            cpu_time: Duration::from_millis(1),
            peak_memory: 1,
            hint: None,
        })))
    }
}

impl Drop for FakeRun {
    fn drop(&mut self) {
        self.alive.fetch_sub(1, Ordering::SeqCst);
    }
}
