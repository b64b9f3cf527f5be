//! `zeroboot serve`: flags, environment and file into an engine and a server.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use zeroboot_engine::{Engine, EngineConfig, Isolation, TemplateConfig, ZygoteSpec};
use zeroboot_server::{
    FileConfig, Listen, Overrides, RequestLimits, Server, ServerConfig, TemplateSection, read_config,
};
use zeroboot_template::Recipe;

use crate::{
    cli::{EngineChoice, Runtime, ServeArgs, TemplateArgs},
    hint::hinted,
    printer, resolve,
};

/// Default number of sandboxes kept ready for each template.
const POOL: usize = 4;
/// Default maximum of sandboxes alive at once.
const MAX_LIVE: usize = 1000;
/// Descriptors that this process has open for each sandbox: its socket and its pidfd; while it is asked for, both ends of
/// the socket and `cgroup.procs`.
const EACH_SANDBOX: u64 = 3;
/// Descriptors for everything else: listeners, zygotes, the runtime's own, files that are read.
const OUR_OWN: u64 = 64;
const MIB: u64 = 1024 * 1024;

pub(crate) fn run(args: &ServeArgs) -> anyhow::Result<u8> {
    let file = args.config.as_deref().map(read_config).transpose()?.unwrap_or_default();
    let flags = Overrides {
        listen: args.listen.clone(),
        keys_file: args.keys_file.clone(),
        tls_cert: args.tls_cert.clone(),
        tls_key: args.tls_key.clone(),
        trusted_proxies: args.trusted_proxy.clone(),
    };
    let mut config = ServerConfig::resolve(&file, Overrides::from_env(|name| std::env::var_os(name)), flags)?;
    let shared = zeroboot_process::shared_because();
    zeroboot_engine::leave_ids_to_zygotes().context("drop capabilities")?;
    let tokio = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    tokio.block_on(async {
        let filter = std::env::var("ZEROBOOT_LOG").ok().or_else(|| file.log.filter.clone());
        let otlp = std::env::var(zeroboot_server::env::OTLP_ENDPOINT).ok().or_else(|| file.log.otlp_endpoint.clone());
        let _flushes = zeroboot_server::init_logging(
            file.log.format.unwrap_or_default(),
            filter.as_deref().unwrap_or(zeroboot_server::DEFAULT_FILTER),
            otlp.as_deref(),
            std::io::stderr,
        )?;
        let (mut engine_config, choice, why) = engine_config(args, &file)?;
        engine_config.sandboxes.max_lease = config.limits.max_lease;
        let kind = if choice == EngineChoice::Vm { "vm" } else { "process" };
        tracing::info!(engine = kind, why, "engine");
        fit_memory(&mut config.limits, &file, engine_config.max_memory)?;
        fit_connections(&mut config.limits, &engine_config);
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let begun = Instant::now();
        let engine = Engine::begin(engine_config)?;
        if let Some(reason) = engine.cgroup_obstacle() {
            tracing::info!(reason, "sandboxes have no cgroups; rlimits and the agent's own watch hold their limits");
        }
        let process = engine.templates().iter().any(|template| template.isolation == Isolation::Process);
        if let Some(reason) = shared.filter(|_| process) {
            tracing::warn!(
                reason,
                "all sandboxes have this server's user: what the kernel counts for a user (watches, timers, pipes) they share \
                 with each other and with the server; docs/deployment.md says what gives them users of their own"
            );
        }
        let tls = config.tls.is_some();
        let server = Server::bind(config, engine.clone()).await?;
        for address in server.addresses() {
            let keys = if server.has_keys() { "" } else { " (no keys: local callers only)" };
            printer::note(format_args!("zeroboot listens on {address}{keys}"));
        }
        printer::note(format_args!("zeroboot warms its templates; engine {kind}: {why}"));
        let first = server.addresses().into_iter().next();
        let (curl, proven) = (first.map(|at| curl(&at, server.has_keys(), tls)), server.ready());
        let started = async {
            engine.warm().await?;
            proven.await;
            ready(&engine, begun.elapsed(), curl.as_ref());
            std::future::pending().await
        };
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        // It drains: nothing is under way afterwards.
        tokio::select! {
            served = server.run(stop) => served?,
            // A template that cannot be made ends the server: a restart would fail alike.
            failed = started => return failed,
        }
        engine.shutdown(Duration::from_secs(1)).await;
        anyhow::Ok(())
    })?;
    tokio.shutdown_timeout(Duration::from_secs(1));
    Ok(0)
}

/// Says what serves, and how to try it.
fn ready(engine: &Engine, after: Duration, curl: Option<&Curl>) {
    let templates = engine.templates();
    for template in &templates {
        if !template.ready {
            continue;
        }
        let warmed = if template.warmed.is_empty() { "nothing warmed".into() } else { template.warmed.join(", ") };
        printer::note(format_args!("zeroboot: {} · {} · {warmed}", template.name, template.version));
    }
    printer::note(format_args!("zeroboot is ready after {:.1} s", after.as_secs_f64()));
    let Some(curl) = curl else { return };
    if let Some(template) = templates.iter().find(|template| template.ready) {
        printer::note(format_args!("try it:\n  {}", curl.line(&template.name, &template.language)));
        if curl.key {
            printer::note("with a key of `zeroboot keys create` in ZEROBOOT_API_KEY");
        }
    }
}

/// A first request.
struct Curl {
    options: String,
    /// Without the path.
    url: String,
    /// A key is needed.
    key: bool,
}

fn curl(listen: &Listen, key: bool, tls: bool) -> Curl {
    let scheme = if tls { "https" } else { "http" };
    match listen {
        Listen::Unix(path) => {
            let options = format!("--unix-socket {} ", quoted(&path.to_string_lossy()));
            Curl { options, url: format!("{scheme}://localhost"), key }
        }
        Listen::Tcp(address) => {
            let ip = match address.ip() {
                // Every address of this machine: one that is always there.
                IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
                ip => ip,
            };
            let address = SocketAddr::new(ip, address.port());
            // Brackets are a pattern to curl.
            let options = if ip.is_ipv6() { "-g " } else { "" };
            Curl { options: options.into(), url: format!("{scheme}://{address}"), key }
        }
    }
}

impl Curl {
    /// To be pasted into a shell.
    fn line(&self, template: &str, language: &str) -> String {
        let key = if self.key { "-H \"Authorization: Bearer $ZEROBOOT_API_KEY\" " } else { "" };
        let code = if language == "node" { "console.log(1 + 1)" } else { "print(1 + 1)" };
        let body = quoted(&serde_json::json!({ "template": template, "code": code }).to_string());
        let url = quoted(&format!("{}/v1/exec", self.url));
        format!("curl -s {}{url} {key}-H 'Content-Type: application/json' -d {body}", self.options)
    }
}

/// As one word of a shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn engine_config(args: &ServeArgs, file: &FileConfig) -> anyhow::Result<(EngineConfig, EngineChoice, String)> {
    let section = &file.engine;
    let choice = match (args.from.engine, section.kind.as_deref()) {
        (Some(choice), _) => choice,
        (None, None | Some("auto")) => EngineChoice::Auto,
        (None, Some("vm")) => EngineChoice::Vm,
        (None, Some("process")) => EngineChoice::Process,
        (None, Some(other)) => {
            return Err(hinted(format!("unknown engine {other:?} in the configuration"), "use auto, vm or process"));
        }
    };
    let (engine, why) = resolve::choose_engine(choice)?;
    if engine == EngineChoice::Vm {
        resolve::refuse_process_flags(&args.from)?;
    }
    if section.max_live == Some(0) {
        return Err(hinted("[engine] max_live is zero, so no code could run", "give at least 1"));
    }
    let pool = args.pool.or(section.pool).unwrap_or(POOL);
    let templates = if file.template.is_empty() {
        default_templates(engine, args, section.store.as_deref(), pool)?
    } else {
        let one = |section| template(engine, section, &args.from, file.engine.store.as_deref(), pool);
        file.template.iter().map(one).collect::<anyhow::Result<_>>()?
    };
    let seconds = |value: Option<f64>, default: f64| {
        Duration::try_from_secs_f64(value.unwrap_or(default)).context("a time in the configuration is out of range")
    };
    let mut config = resolve::engine_config(
        templates,
        section.max_live.unwrap_or(MAX_LIVE),
        section.max_memory_mb.map_or_else(|| resolve::total_memory() / 4 * 3, |mb| mb.saturating_mul(MIB)),
    )?;
    if section.max_sandboxes == Some(0) {
        return Err(hinted("[engine] max_sandboxes is zero, so no sandbox could be made", "give at least 1"));
    }
    let bounds = &mut config.sandboxes;
    bounds.most = args.max_sandboxes.map(|count| count as usize).or(section.max_sandboxes).unwrap_or(bounds.most);
    bounds.checkpoints = section.max_checkpoints.unwrap_or(bounds.checkpoints);
    bounds.memory = section.sandbox_memory_mb.map_or(bounds.memory, |mb| mb.saturating_mul(MIB));
    config.admission_wait = seconds(section.admission_wait_seconds, 5.0)?;
    config.warm_timeout = seconds(section.warm_timeout_seconds, 60.0)?;
    Ok((config, engine, why))
}

/// The server's limits and the engine's memory must go together: else every request that names no memory, and every
/// canary, would be refused. A small host without configuration gets a smaller default.
fn fit_memory(limits: &mut RequestLimits, file: &FileConfig, most: u64) -> anyhow::Result<()> {
    if limits.default_memory <= most {
        return Ok(());
    }
    if file.limits.default_memory_mb.is_none() && file.engine.max_memory_mb.is_none() {
        limits.default_memory = (most / MIB).max(1) * MIB;
        tracing::warn!(
            default_memory_mb = limits.default_memory / MIB,
            "this host is small: sandboxes have less memory"
        );
        return Ok(());
    }
    Err(hinted(
        format!(
            "a sandbox has {} MiB by default, but all sandboxes together may have only {} MiB",
            limits.default_memory / MIB,
            most / MIB
        ),
        "lower default_memory_mb in [limits], or raise max_memory_mb in [engine]",
    ))
}

/// Connections must not take the descriptors that sandboxes need: anyone can open them, a key is not asked for.
fn fit_connections(limits: &mut RequestLimits, engine: &EngineConfig) {
    use rustix::process::{Resource, getrlimit};
    let Some(descriptors) = getrlimit(Resource::Nofile).current else { return };
    let most = engine.max_live.saturating_add(engine.sandboxes.most);
    let sandboxes = engine.templates.iter().fold(most, |sum, template| sum.saturating_add(template.pool));
    let fit = connections_within(descriptors, sandboxes, limits.max_connections);
    if fit < limits.max_connections {
        tracing::warn!(
            max_connections = fit,
            descriptors,
            "this process may open few files, so fewer connections are taken; raise its limit (ulimit -n, LimitNOFILE)"
        );
        limits.max_connections = fit;
    }
}

/// Connections that leave the engine what it needs; where that is more than there is, three quarters.
fn connections_within(descriptors: u64, sandboxes: usize, asked: usize) -> usize {
    let engine = (sandboxes as u64).saturating_mul(EACH_SANDBOX).saturating_add(OUR_OWN).min(descriptors / 4 * 3);
    usize::try_from(descriptors - engine).unwrap_or(usize::MAX).clamp(1, asked.max(1))
}

/// Python and Node: those that are there. One is enough.
fn default_templates(
    engine: EngineChoice,
    args: &ServeArgs,
    store: Option<&Path>,
    pool: usize,
) -> anyhow::Result<Vec<TemplateConfig>> {
    let mut templates = Vec::new();
    let mut missing = None;
    for runtime in [Runtime::Python, Runtime::Node] {
        let template = match engine {
            EngineChoice::Vm => resolve::vm_template(store, runtime.name(), pool),
            _ => resolve::process_template(runtime, None, &args.from, None, pool),
        };
        match template {
            Ok(template) => templates.push(template),
            Err(error) => {
                tracing::warn!("no {} template: {error:#}", runtime.name());
                missing.get_or_insert(error);
            }
        }
    }
    match missing {
        Some(error) if templates.is_empty() => Err(error),
        _ => Ok(templates),
    }
}

fn template(
    engine: EngineChoice,
    section: &TemplateSection,
    from: &TemplateArgs,
    store: Option<&Path>,
    pool: usize,
) -> anyhow::Result<TemplateConfig> {
    let pool = section.pool.unwrap_or(pool);
    let name = &section.name;
    let runtime = || {
        let language = section.language.as_deref().unwrap_or(name);
        match language {
            "python" => Ok(Runtime::Python),
            "node" | "javascript" => Ok(Runtime::Node),
            other => Err(hinted(
                format!("template {name}: unknown language {other:?}"),
                "give language = \"python\" or \"node\"; without it the name is the language",
            )),
        }
    };
    // What would change nothing is refused.
    let others: &[(&str, bool)] = match engine {
        EngineChoice::Vm => &[("interpreter", section.interpreter.is_some())],
        _ => &[
            ("path", section.path.is_some()),
            ("packages", !section.packages.is_empty()),
            ("memory_mib", section.memory_mib.is_some()),
        ],
    };
    if let Some((key, _)) = others.iter().find(|(_, given)| *given) {
        let (of, hint) = match engine {
            EngineChoice::Vm => ("process", "build a template with what it shall have (see docs/templates.md)"),
            _ => ("VM", "remove it (Python packages can stand in pip), or use kind = \"vm\" in [engine]"),
        };
        return Err(hinted(format!("template {name}: {key} is for the {of} engine"), hint));
    }
    let recipe = recipe(section)?;
    let mut template = if engine == EngineChoice::Vm {
        match (&section.path, &recipe) {
            (Some(_), Some(_)) => {
                return Err(hinted(
                    format!("template {name}: path names a template that is built already"),
                    "leave path out, or pip, npm, packages, memory_mib, warm and env",
                ));
            }
            (None, Some(recipe)) => resolve::vm_recipe(store, recipe, pool)?,
            (Some(path), None) => TemplateConfig {
                name: name.clone(),
                language: runtime()?.name().into(),
                spec: ZygoteSpec::Vm { template: path.clone() },
                pool,
            },
            (None, None) => {
                let template = resolve::vm_template(store, name, pool)?;
                if section.language.is_some() && runtime()?.name() != template.language {
                    let text = format!("template {name}: its language is {}", template.language);
                    return Err(hinted(text, "leave language out; the template has one"));
                }
                template
            }
        }
    } else {
        let recipe = recipe.or_else(|| Recipe::embedded(name));
        let runtime = match &recipe {
            Some(recipe) => recipe.runtime.into(),
            None => runtime()?,
        };
        let from = TemplateArgs {
            engine: from.engine,
            python: section.interpreter.clone().or_else(|| from.python.clone()),
            node: section.interpreter.clone().or_else(|| from.node.clone()),
            warm: section.warm.clone().or_else(|| from.warm.clone()),
            warm_env: from.warm_env.clone(),
        };
        resolve::process_template(runtime, recipe.as_ref(), &from, None, pool)?
    };
    template.name.clone_from(name);
    Ok(template)
}

/// The recipe that a section describes: one that comes with us, or its runtime's, and what the section says on top of
/// it. None where it says nothing: then the template is what its name says.
fn recipe(section: &TemplateSection) -> anyhow::Result<Option<Recipe>> {
    let TemplateSection { name, pip, npm, packages, env, .. } = section;
    let says_nothing = pip.is_empty() && npm.is_empty() && packages.is_empty() && env.is_empty();
    if says_nothing && section.warm.is_none() && section.memory_mib.is_none() {
        return Ok(None);
    }
    let base = section.language.as_deref().map(|word| if word == "javascript" { "node" } else { word }).unwrap_or(name);
    let mut recipe = Recipe::embedded(base).ok_or_else(|| {
        hinted(
            format!("template {name}: unknown language {base:?}"),
            "give language = \"python\" or \"node\"; without it the name is the language",
        )
    })?;
    recipe.name.clone_from(name);
    recipe.pip.extend(pip.iter().cloned());
    recipe.npm.extend(npm.iter().cloned());
    recipe.packages.extend(packages.iter().cloned());
    recipe.env.extend(env.iter().map(|(key, value)| (key.clone(), value.clone())));
    if let Some(warm) = &section.warm {
        recipe.warm.clone_from(warm);
    }
    recipe.memory_mib = section.memory_mib.unwrap_or(recipe.memory_mib);
    let checked = recipe.checked();
    checked.map(Some).map_err(|error| hinted(format!("template {name}: {error}"), "see docs/templates.md"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(text: &str) -> TemplateSection {
        let file: FileConfig = toml::from_str(&format!("[[template]]\n{text}")).unwrap();
        file.template.into_iter().next().unwrap()
    }

    fn from() -> TemplateArgs {
        TemplateArgs { engine: None, python: None, node: None, warm: None, warm_env: Vec::new() }
    }

    #[test]
    fn a_template_with_a_path_has_its_name_as_its_language() {
        let language =
            |text: &str| template(EngineChoice::Vm, &section(text), &from(), None, 1).map(|one| one.language);
        assert_eq!(language("name = \"node\"\npath = \"/t\"").unwrap(), "node");
        assert_eq!(language("name = \"python\"\npath = \"/t\"").unwrap(), "python");
        assert_eq!(language("name = \"science\"\npath = \"/t\"\nlanguage = \"node\"").unwrap(), "node");
        assert!(language("name = \"science\"\npath = \"/t\"").is_err());
    }

    #[test]
    fn templates_are_looked_for_in_the_store_of_the_configuration() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("mine")).unwrap();
        let find =
            |store| template(EngineChoice::Vm, &section("name = \"mine\""), &from(), store, 1).unwrap_err().to_string();
        assert!(find(Some(folder.path())).contains("template mine is not complete"));
        let other = tempfile::tempdir().unwrap();
        assert!(find(Some(other.path())).contains("there is no template mine"));
    }

    #[test]
    fn what_an_engine_would_ignore_is_refused() {
        for (engine, text, word) in [
            (EngineChoice::Vm, "interpreter = \"/usr/bin/python3\"", "interpreter is for the process engine"),
            (EngineChoice::Process, "path = \"/t\"", "path is for the VM engine"),
            (EngineChoice::Process, "packages = [\"perl\"]", "packages is for the VM engine"),
            (EngineChoice::Process, "memory_mib = 600", "memory_mib is for the VM engine"),
            (EngineChoice::Vm, "path = \"/t\"\npip = [\"six\"]", "is built already"),
            (EngineChoice::Process, "npm = [\"lodash\"]", "npm packages need"),
            (EngineChoice::Process, "pip = [\"--pre\"]", "is not a requirement"),
        ] {
            let error =
                template(engine, &section(&format!("name = \"python\"\n{text}")), &from(), None, 1).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
        for from in [
            TemplateArgs { python: Some("/p".into()), ..from() },
            TemplateArgs { node: Some("/n".into()), ..from() },
            TemplateArgs { warm: Some(Vec::new()), ..from() },
        ] {
            assert!(resolve::refuse_process_flags(&from).is_err());
        }
        resolve::refuse_process_flags(&from()).unwrap();
    }

    #[test]
    fn a_small_host_gets_a_smaller_default_and_a_contradiction_is_refused() {
        let mut limits = RequestLimits::default();
        fit_memory(&mut limits, &FileConfig::default(), 2048 * MIB).unwrap();
        assert_eq!(limits, RequestLimits::default());
        fit_memory(&mut limits, &FileConfig::default(), 300 * MIB + 5).unwrap();
        assert_eq!(limits.default_memory, 300 * MIB);
        let file: FileConfig = toml::from_str("[engine]\nmax_memory_mb = 300").unwrap();
        let error = fit_memory(&mut RequestLimits::default(), &file, 300 * MIB).unwrap_err();
        assert!(error.to_string().contains("512 MiB by default"), "{error}");
    }

    #[test]
    fn the_first_request_can_be_pasted_whatever_the_address() {
        let line = |listen: &str, key, tls| curl(&listen.parse().unwrap(), key, tls).line("python", "python");
        assert_eq!(
            line("0.0.0.0:8080", false, false),
            r#"curl -s 'http://127.0.0.1:8080/v1/exec' -H 'Content-Type: application/json' -d '{"code":"print(1 + 1)","template":"python"}'"#
        );
        assert!(line("[::]:1", false, true).starts_with("curl -s -g 'https://[::1]:1/v1/exec' "));
        assert!(line("unix:/a b'c", true, false).starts_with(
            r#"curl -s --unix-socket '/a b'\''c' 'http://localhost/v1/exec' -H "Authorization: Bearer $ZEROBOOT_API_KEY" "#
        ));
    }

    #[test]
    fn connections_leave_the_engine_its_descriptors() {
        assert_eq!(connections_within(1 << 20, 1008, 4096), 4096);
        assert_eq!(connections_within(4096, 1000, 4096), 4096 - 3064);
        // Too few for both: most are the engine's.
        assert_eq!(connections_within(1024, 1000, 4096), 256);
        assert_eq!(connections_within(2, 1000, 4096), 2);
        assert_eq!(connections_within(0, 1000, 4096), 1);
    }
}
