//! What agents write, as data in `tests/agents`, run on the process engine.

#[path = "harness/lib.rs"]
#[allow(dead_code)]
mod harness;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    time::Duration,
};

use harness::Who;
use serde::Deserialize;
use zeroboot_engine::{
    Collected, Engine, EngineConfig, ExecRequest, INLINE_BASH, InputFile, SandboxBounds, TemplateConfig, ZygoteSpec,
};

/// How long a case may take on a busy machine, unless it says otherwise.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    case: Vec<Case>,
}

/// See `tests/agents/README.md`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    #[serde(default = "python")]
    language: String,
    code: String,
    stdout: Option<String>,
    says: Option<String>,
    exit: Option<i32>,
    outcome: Option<String>,
    hint: Option<String>,
    #[serde(default)]
    files: BTreeMap<String, String>,
    #[serde(default)]
    get: Vec<String>,
    #[serde(default)]
    brings: Vec<String>,
    memory_mb: Option<u64>,
    processes: Option<u32>,
    timeout_seconds: Option<f64>,
}

fn python() -> String {
    "python".into()
}

fn cases() -> Vec<Case> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/agents");
    let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let data = files.filter(|path| path.extension().is_some_and(|extension| extension == "toml"));
    data.flat_map(|path| {
        let read: Result<File, _> = toml::from_str(&fs::read_to_string(&path).unwrap());
        read.unwrap_or_else(|error| panic!("{}: {error}", path.display())).case
    })
    .collect()
}

fn request(case: &Case) -> ExecRequest {
    let template = if case.language == "node" { "node" } else { "python" };
    let mut request = ExecRequest::new(template, case.code.clone());
    if case.language == "bash" {
        request.name = INLINE_BASH.into();
    }
    request.limits.timeout = case.timeout_seconds.map_or(PATIENCE, Duration::from_secs_f64);
    request.limits.memory = case.memory_mb.map_or(request.limits.memory, |count| count << 20);
    request.limits.processes = case.processes.unwrap_or(request.limits.processes);
    request.output_files.clone_from(&case.get);
    let file = |(path, text): (&String, &String)| InputFile {
        path: path.clone(),
        data: text.clone().into(),
        executable: false,
    };
    request.files = case.files.iter().map(file).collect();
    request
}

/// What is not as the case says.
fn wrong(case: &Case, done: &Collected) -> Vec<String> {
    let (stdout, stderr) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    let report = &done.report;
    let code = report.outcome.exit_code();
    let hint = report.hint.as_deref();
    let mut brought: Vec<&str> =
        done.files.iter().filter(|file| file.data.is_ok()).map(|file| file.path.as_str()).collect();
    brought.sort_unstable();
    let checks = [
        (case.stdout.as_ref().is_none_or(|wanted| *wanted == stdout), "standard output"),
        (case.says.as_ref().is_none_or(|wanted| stderr.contains(wanted)), "standard error"),
        // Memory may run out in the interpreter, which ends with 1 and a hint, or in the kernel, which kills.
        (case.exit.map_or(case.outcome.is_some() || code == 0, |wanted| code == wanted), "exit code"),
        (report.outcome.as_str() == case.outcome.as_deref().unwrap_or("exited"), "outcome"),
        (hint.is_some() == case.hint.is_some() || case.outcome.is_some(), "a hint or none"),
        (case.hint.as_ref().is_none_or(|wanted| hint.unwrap_or_default().contains(wanted)), "hint"),
        (brought == case.brings, "files"),
    ];
    let failed = checks.into_iter().filter(|(right, _)| !right).map(|(_, what)| what.to_owned());
    let seen = format!("{report:?}\n{stdout}\n{stderr}\n{brought:?}");
    let mut failed: Vec<String> = failed.collect();
    if !failed.is_empty() {
        failed.push(seen);
    }
    failed
}

fn template(host: zeroboot_process::HostRuntime, warm: &[&str]) -> TemplateConfig {
    TemplateConfig {
        name: host.language.into(),
        language: host.language.into(),
        spec: ZygoteSpec::Process {
            runtime: host.language.into(),
            interpreter: host.interpreter,
            paths: host.paths,
            warm: warm.iter().map(|name| (*name).to_owned()).collect(),
            env: Vec::new(),
            node_modules: None,
        },
        pool: 1,
    }
}

#[tokio::test]
async fn what_agents_write_works_or_says_clearly_why_not() {
    let cases = cases();
    let names: BTreeSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names.len(), cases.len(), "two cases have one name");
    let python = zeroboot_process::python(Some(Path::new(harness::python(Who::Me)))).unwrap();
    let node = zeroboot_process::node(None).unwrap();
    let engine = Engine::start(EngineConfig {
        program: env!("CARGO_BIN_EXE_zeroboot").into(),
        templates: vec![template(python, &["numpy", "pandas", "matplotlib.pyplot"]), template(node, &[])],
        max_live: 2,
        max_memory: 8 << 30,
        sandboxes: SandboxBounds::default(),
        admission_wait: Duration::from_secs(600),
        warm_timeout: PATIENCE,
        cgroups: true,
    })
    .await
    .unwrap();
    let runs: Vec<_> = cases
        .into_iter()
        .map(|case| {
            let engine = engine.clone();
            tokio::spawn(async move {
                let done = engine.exec(request(&case)).await.unwrap().collect().await.unwrap();
                (wrong(&case, &done), case.name)
            })
        })
        .collect();
    let mut failed = Vec::new();
    for run in runs {
        let (wrong, name) = run.await.unwrap();
        if !wrong.is_empty() {
            failed.push(format!("{name}: {}", wrong.join(", ")));
        }
    }
    engine.shutdown(Duration::from_secs(10)).await;
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}
