//! `zeroboot serve`: flags, environment and file into an engine and a server.

use std::time::Duration;

use anyhow::{Context, bail};
use tokio::signal::unix::{SignalKind, signal};
use zeroboot_engine::{Engine, EngineConfig, TemplateConfig, ZygoteSpec};
use zeroboot_server::{FileConfig, Overrides, Server, ServerConfig, TemplateSection, read_config};

use crate::{
    cli::{EngineChoice, Runtime, ServeArgs, TemplateArgs},
    hint::hinted,
    printer, resolve,
};

/// Sandboxes kept ready for each template, unless said otherwise.
const POOL: usize = 4;
/// Sandboxes alive at once, unless said otherwise.
const MAX_LIVE: usize = 1000;

pub(crate) fn run(args: &ServeArgs) -> anyhow::Result<u8> {
    let file = args.config.as_deref().map(read_config).transpose()?.unwrap_or_default();
    let flags = Overrides {
        listen: args.listen.clone(),
        keys_file: args.keys_file.clone(),
        tls_cert: args.tls_cert.clone(),
        tls_key: args.tls_key.clone(),
        trusted_proxies: args.trusted_proxy.clone(),
    };
    let config = ServerConfig::resolve(&file, Overrides::from_env(|name| std::env::var_os(name)), flags)?;
    config.check()?;
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
        let (engine_config, why) = engine_config(args, &file)?;
        tracing::info!(why, "engine");
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let engine = tokio::select! {
            engine = Engine::start(engine_config) => engine?,
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        };
        let server = Server::bind(config, engine.clone()).await?;
        for address in server.addresses() {
            let keys = if server.has_keys() { "" } else { " (no keys: local callers only)" };
            printer::note(format_args!("zeroboot listens on {address}{keys}"));
        }
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        // It drains: nothing is under way afterwards.
        server.run(stop).await?;
        engine.shutdown(Duration::from_secs(1)).await;
        anyhow::Ok(())
    })?;
    tokio.shutdown_timeout(Duration::from_secs(1));
    Ok(0)
}

fn engine_config(args: &ServeArgs, file: &FileConfig) -> anyhow::Result<(EngineConfig, String)> {
    let section = &file.engine;
    let choice = match (args.from.engine, section.kind.as_deref()) {
        (EngineChoice::Auto, Some("vm")) => EngineChoice::Vm,
        (EngineChoice::Auto, Some("process")) => EngineChoice::Process,
        (EngineChoice::Auto, Some(other)) if other != "auto" => {
            return Err(hinted(format!("unknown engine {other:?} in the configuration"), "use auto, vm or process"));
        }
        (choice, _) => choice,
    };
    let (engine, why) = resolve::choose_engine(choice)?;
    let pool = args.pool.or(section.pool).unwrap_or(POOL);
    let templates = if file.template.is_empty() {
        default_templates(engine, args, pool)?
    } else {
        file.template.iter().map(|t| template(engine, t, &args.from, pool)).collect::<anyhow::Result<_>>()?
    };
    let seconds = |value: Option<f64>, default: f64| {
        Duration::try_from_secs_f64(value.unwrap_or(default)).context("a time in the configuration is out of range")
    };
    let mut config = resolve::engine_config(
        templates,
        section.max_live.unwrap_or(MAX_LIVE),
        section.max_memory_mb.map_or_else(|| resolve::total_memory() / 4 * 3, |mb| mb << 20),
    )?;
    config.admission_wait = seconds(section.admission_wait_seconds, 5.0)?;
    config.warm_timeout = seconds(section.warm_timeout_seconds, 60.0)?;
    Ok((config, why))
}

/// Python and Node: those that are there. One is enough.
fn default_templates(engine: EngineChoice, args: &ServeArgs, pool: usize) -> anyhow::Result<Vec<TemplateConfig>> {
    let mut templates = Vec::new();
    let mut missing = None;
    for runtime in [Runtime::Python, Runtime::Node] {
        let template = match engine {
            EngineChoice::Vm => resolve::vm_template(runtime.name(), pool),
            _ => resolve::process_template(runtime, &args.from, None, pool),
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
    pool: usize,
) -> anyhow::Result<TemplateConfig> {
    let pool = section.pool.unwrap_or(pool);
    let mut template = if engine == EngineChoice::Vm {
        match &section.path {
            Some(path) => TemplateConfig {
                name: section.name.clone(),
                language: section.language.clone().unwrap_or_else(|| "python".into()),
                spec: ZygoteSpec::Vm { template: path.clone() },
                pool,
            },
            None => resolve::vm_template(&section.name, pool)?,
        }
    } else {
        let language = section.language.as_deref().unwrap_or(&section.name);
        let runtime = match language {
            "python" => Runtime::Python,
            "node" | "javascript" => Runtime::Node,
            other => bail!("template {}: unknown language {other:?}; use python or node", section.name),
        };
        let from = TemplateArgs {
            engine: from.engine,
            python: section.interpreter.clone().or_else(|| from.python.clone()),
            node: section.interpreter.clone().or_else(|| from.node.clone()),
            warm: section.warm.clone().or_else(|| from.warm.clone()),
        };
        resolve::process_template(runtime, &from, None, pool)?
    };
    template.name.clone_from(&section.name);
    if let ZygoteSpec::Process { env, .. } = &mut template.spec {
        env.extend(section.env.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
    Ok(template)
}
