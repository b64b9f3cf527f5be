//! `zeroboot run`: one piece of code, its streams and its exit status.

mod interactive;

use std::{
    ffi::{OsStr, OsString},
    io::{self, IsTerminal as _, Read},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use clap::CommandFactory as _;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
};
use zeroboot_engine::{
    Engine, Event, ExecRequest, Execution, INLINE_BASH, INLINE_TYPESCRIPT, InputFile, InvalidRequest, Limits, MAX_CODE,
    MAX_FILES, MAX_FILES_BYTES, Outcome, Report, Stdin,
};
use zeroboot_proto::pattern::is_meant;

use crate::{
    cli::{Language, RunArgs, Runtime},
    hint::hinted,
    printer, resolve,
};

/// Runs it; gives the exit status.
pub(crate) fn run(args: RunArgs) -> anyhow::Result<u8> {
    let mut source = read_source(&args)?;
    let language = match args.runtime {
        Some(language) => language,
        None => by_name(&source.name)?.unwrap_or(Language::Python),
    };
    source.name = told_by_name(source.name, language);
    let runtime = language.runtime();
    let recipe = resolve::chosen_recipe(args.recipe.as_deref(), args.template.as_deref(), runtime, &args.with)?;
    let runtime = recipe.as_ref().map_or(runtime, |recipe| recipe.runtime.into());
    let mut request = request(&args, source, runtime)?;
    // What can be refused without a sandbox is refused without waiting for one.
    let nothing = args.interactive && request.code.is_empty();
    if args.interactive {
        interactive::check()?;
    }
    if !nothing {
        request.check().map_err(|error| bad_request(error, args.code.is_some()))?;
    }
    let (engine, _why) = resolve::choose_engine(args.from.engine.unwrap_or_default())?;
    let asked = resolve::Asked { runtime, recipe: recipe.as_ref(), template: args.template.as_deref() };
    // The shell imports nothing.
    let mentioned = if language == Language::Bash { &[][..] } else { &request.code[..] };
    let template = resolve::template(engine, asked, &args.from, Some(mentioned))?;
    if matches!(language, Language::Bash | Language::Typescript) && template.language != language.runtime().name() {
        let (name, needed) = (&request.name, language.runtime().name());
        return Err(hinted(
            format!("{name} needs a {needed} template, and {} is a {} template", template.name, template.language),
            format!("take another --template, or leave it out for {needed}"),
        ));
    }
    request.template.clone_from(&template.name);
    let (language, what) = (template.language.clone(), resolve::runtime_of(&template.spec));
    let config =
        resolve::engine_config(vec![template], 1, request.limits.memory.max(1 << 20).next_multiple_of(1 << 20))?;
    if args.interactive {
        return interactive::run(config, request, &language);
    }
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let status = tokio.block_on(async {
        let mut interrupts = Interrupts::new()?;
        let work = async {
            let engine = Engine::start(config).await?;
            let status = drive(&engine, request, &args, &language, &what).await;
            engine.shutdown(SHUTDOWN).await;
            status
        };
        tokio::select! {
            status = work => status,
            // Dropping the work kills the sandbox and its zygote.
            signal = interrupts.next() => Ok(signal),
        }
    });
    // A thread may still wait for our standard input; nobody waits for it.
    tokio.shutdown_background();
    status
}

struct Source {
    code: Bytes,
    name: String,
    args: Vec<String>,
}

fn read_source(args: &RunArgs) -> anyhow::Result<Source> {
    let text =
        |arg: &OsStr| arg.to_str().map(str::to_owned).with_context(|| format!("argument {arg:?} is not valid UTF-8"));
    if let Some(code) = &args.code {
        let rest = args.args.iter().map(|arg| text(arg)).collect::<Result<_, _>>()?;
        return Ok(Source { code: Bytes::copy_from_slice(code.as_bytes()), name: "-c".into(), args: rest });
    }
    if args.interactive && args.args.is_empty() {
        return Ok(Source { code: Bytes::new(), name: String::new(), args: Vec::new() });
    }
    let piped = [std::ffi::OsString::from("-")];
    let words = if args.args.is_empty() && !io::stdin().is_terminal() { &piped[..] } else { &args.args };
    let Some((file, rest)) = words.split_first() else {
        return Err(hinted("no code was given", "give code with -c 'print(1)', a file, or standard input"));
    };
    refuse_options(file, rest)?;
    let rest = rest.iter().map(|arg| text(arg)).collect::<Result<_, _>>()?;
    let mut code = Vec::new();
    let mut read = |from: &mut dyn Read| from.take(MAX_CODE as u64 + 1).read_to_end(&mut code);
    if file == "-" {
        read(&mut io::stdin().lock()).context("read the code from standard input")?;
        return Ok(Source { code: code.into(), name: "-".into(), args: rest });
    }
    let path = Path::new(file);
    let opened = std::fs::File::open(path).and_then(|mut file| read(&mut file));
    if let Err(error) = opened {
        let hint = match error.kind() {
            io::ErrorKind::NotFound => "name an existing file, or give code with -c",
            io::ErrorKind::IsADirectory => "name a file in it",
            _ => "the file must be readable",
        };
        return Err(hinted(format!("cannot read {}: {error}", path.display()), hint));
    }
    let name = path.file_name().unwrap_or(file);
    Ok(Source { code: code.into(), name: text(name)?, args: rest })
}

/// An option where a file should be is a mistake; one of ours behind the file is perhaps one.
fn refuse_options(file: &OsStr, rest: &[OsString]) -> anyhow::Result<()> {
    let command = crate::cli::Cli::command();
    let ours: Vec<String> = command
        .find_subcommand("run")
        .into_iter()
        .flat_map(|run| run.get_arguments().filter_map(|arg| arg.get_long()))
        .map(|long| format!("--{long}"))
        .collect();
    let name = |word: &OsStr| word.to_string_lossy().split('=').next().unwrap_or_default().to_owned();
    let option = name(file);
    if option.starts_with('-') && option != "-" {
        let near = zeroboot_server::nearest(&option, ours.iter().map(String::as_str));
        let hint = near.map_or("see `zeroboot run --help`".to_owned(), |known| format!("did you mean {known}?"));
        return Err(hinted(format!("there is no option {option}"), hint));
    }
    for word in rest {
        let word = name(word);
        if ours.contains(&word) {
            let file = file.to_string_lossy();
            printer::note(format_args!(
                "zeroboot: {word} after {file} goes to the code; put it before {file} if it is for us"
            ));
        }
    }
    Ok(())
}

/// The language of a file by its name; `None` if it says nothing.
fn by_name(name: &str) -> anyhow::Result<Option<Language>> {
    let extension = Path::new(name).extension().and_then(OsStr::to_str).unwrap_or_default();
    match extension.to_ascii_lowercase().as_str() {
        "py" => Ok(Some(Language::Python)),
        "js" | "mjs" | "cjs" => Ok(Some(Language::Node)),
        "ts" | "mts" | "cts" => Ok(Some(Language::Typescript)),
        "sh" | "bash" => Ok(Some(Language::Bash)),
        "tsx" | "jsx" => Err(hinted(
            format!("{name} has JSX, which is not run"),
            "compile it to JavaScript first, such as with `npx esbuild FILE`, or name a language with --runtime",
        )),
        _ => Ok(None),
    }
}

/// The name under which the runner takes the code for what it is: its extension decides there.
fn told_by_name(name: String, language: Language) -> String {
    let says = by_name(&name).ok().flatten();
    match (name.as_str(), language) {
        ("-c" | "-", Language::Bash) => INLINE_BASH.into(),
        ("-c" | "-", Language::Typescript) => INLINE_TYPESCRIPT.into(),
        (_, Language::Bash) if says != Some(Language::Bash) => name + ".sh",
        (_, Language::Typescript) if says != Some(Language::Typescript) => name + ".ts",
        (_, Language::Python) if says == Some(Language::Bash) => name + ".py",
        (_, Language::Node) if says == Some(Language::Typescript) => name + ".js",
        _ => name,
    }
}

fn bad_request(error: InvalidRequest, inline: bool) -> anyhow::Error {
    let hint = match &error {
        InvalidRequest::EmptyCode if inline => "give code with -c 'print(1)', or a file",
        InvalidRequest::EmptyCode => "the file holds nothing but white space",
        InvalidRequest::CodeTooLong(_) => "put data into a file with --put and read it there",
        InvalidRequest::CodeHasNul(_) | InvalidRequest::CodeNotUtf8(_) => {
            "code is UTF-8 text; put binary data into a file with --put"
        }
        InvalidRequest::BadPath(_) => "paths of --put and --get are names below the working directory",
        _ => "see `zeroboot run --help`",
    };
    hinted(error.to_string(), hint)
}

fn request(args: &RunArgs, source: Source, runtime: Runtime) -> anyhow::Result<ExecRequest> {
    let template = args.template.clone().unwrap_or_else(|| runtime.name().into());
    let mut request = ExecRequest::new(template, source.code);
    request.name = source.name;
    request.args = source.args;
    for pair in &args.env {
        request.env.push(match pair.split_once('=') {
            Some((key, value)) => (key.into(), value.into()),
            None => match std::env::var(pair) {
                Ok(value) => (pair.clone(), value),
                Err(_) => return Err(hinted(format!("our environment has no {pair}"), "write KEY=VALUE")),
            },
        });
    }
    for put in &args.put {
        let (file, name) = put.split_once(':').unwrap_or((put, file_name(put.trim_end_matches('/'))));
        take(Path::new(file), name.trim_end_matches('/').to_owned(), &mut request.files)
            .map_err(|e| hinted(format!("cannot read {file}: {e}"), "--put takes FILE, DIRECTORY or FILE:NAME"))?;
    }
    request.output_files =
        args.get.iter().map(|get| get.split_once(':').map_or(get.as_str(), |g| g.0).into()).collect();
    request.output_files.extend(args.get_all.iter().map(|_| ALL.to_owned()));
    request.stdin = match &args.stdin {
        None if args.code.is_none() && args.args.first().is_none_or(|a| a == "-") => Stdin::Empty,
        None => Stdin::Stream,
        Some(path) if path.as_os_str() == "-" => Stdin::Stream,
        Some(path) => {
            let data = std::fs::read(path)
                .map_err(|e| hinted(format!("cannot read {}: {e}", path.display()), "--stdin takes a file"))?;
            Stdin::Bytes(data.into())
        }
    };
    request.limits = Limits {
        timeout: args.timeout,
        cpu: args.cpu_time,
        memory: args.memory,
        processes: args.processes,
        output: args.max_output,
        file_size: args.max_file,
        open_files: args.open_files,
        ..Limits::default()
    };
    Ok(request)
}

/// The pattern of all files.
const ALL: &str = "**";

/// Reads a file, or all files below a directory; other things in it are left out. It stops above the request's limits,
/// which the request's own check then names.
fn take(from: &Path, name: String, files: &mut Vec<InputFile>) -> io::Result<()> {
    let seen = std::fs::metadata(from)?;
    if !seen.is_dir() {
        let executable = std::os::unix::fs::PermissionsExt::mode(&seen.permissions()) & 0o111 != 0;
        let held: usize = files.iter().map(|file| file.data.len()).sum();
        let data = if held > MAX_FILES_BYTES { Bytes::new() } else { std::fs::read(from)?.into() };
        files.push(InputFile { path: name, data, executable });
        return Ok(());
    }
    let mut entries = std::fs::read_dir(from)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let kind = entry.file_type()?;
        if (kind.is_dir() || kind.is_file()) && files.len() <= MAX_FILES {
            let own = entry.file_name();
            let own = own.to_str().ok_or_else(|| io::Error::other(format!("{own:?} is not valid UTF-8")))?;
            // The contents of `.` have no directory around them.
            let path = if matches!(name.as_str(), "" | ".") { own.to_owned() } else { format!("{name}/{own}") };
            take(&entry.path(), path, files)?;
        }
    }
    Ok(())
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Passes the streams through until the end.
async fn drive(
    engine: &Engine,
    request: ExecRequest,
    args: &RunArgs,
    language: &str,
    what: &str,
) -> anyhow::Result<u8> {
    let timeout = request.limits.timeout;
    let template = request.template.clone();
    let mut execution = engine.exec(request).await?;
    if let Some(mut writer) = execution.stdin() {
        let mut chunks = read_stdin();
        tokio::spawn(async move {
            while let Some(chunk) = chunks.recv().await {
                if !writer.write(chunk).await {
                    break;
                }
            }
        });
    }
    if args.json {
        return json(execution, &template, language).await;
    }
    let mut output = Output::start();
    let mut missing = false;
    loop {
        let event = tokio::select! {
            biased;
            // The sandbox goes with the execution.
            written = &mut output.written => return status_without_a_reader(written),
            event = execution.next() => event?,
        };
        match event.context("the sandbox gave no end")? {
            Event::Started => {}
            Event::Stdout(bytes) => output.write(Piece::Stdout(bytes)).await,
            Event::Stderr(bytes) => output.write(Piece::Stderr(bytes)).await,
            Event::File(file) => missing |= !save(&file, args)?,
            Event::End(report) => {
                // The reader may pause for hours yet.
                engine.shutdown(SHUTDOWN).await;
                drop(output.pieces);
                match output.written.await {
                    Ok(Ok(())) => {}
                    written => return status_without_a_reader(written),
                }
                explain(&report, timeout, args.memory);
                not_warmed(engine, args);
                if args.verbose {
                    verbose(engine, &execution, &report, what);
                }
                return Ok(status(&report, missing));
            }
        }
    }
}

/// How long an engine may take to end its sandboxes.
const SHUTDOWN: Duration = Duration::from_secs(1);
/// Pieces of output that wait for our reader; above it the sandbox's are not read. A piece is 64 KiB at the most.
const WAITING: usize = 256;

/// A piece of the output.
enum Piece {
    Stdout(Bytes),
    Stderr(Bytes),
}

/// Writes the output from a thread of its own: a reader that pauses keeps us from nothing else.
struct Output {
    pieces: mpsc::Sender<Piece>,
    /// Ready once all is written, or nothing more can be.
    written: oneshot::Receiver<io::Result<()>>,
}

impl Output {
    fn start() -> Output {
        let (pieces, mut waiting) = mpsc::channel(WAITING);
        let (end, written) = oneshot::channel();
        std::thread::spawn(move || {
            let mut result = Ok(());
            while let Some(piece) = waiting.blocking_recv() {
                result = match piece {
                    Piece::Stdout(bytes) => printer::stdout(&bytes),
                    Piece::Stderr(bytes) => printer::stderr(&bytes),
                };
                if result.is_err() {
                    break;
                }
            }
            // Nobody waits for it after an interrupt.
            end.send(result).ok();
        });
        Output { pieces, written }
    }

    async fn write(&self, piece: Piece) {
        // When its thread has ended, `written` says why.
        self.pieces.send(piece).await.ok();
    }
}

/// The end of a run whose output cannot be written any more.
fn status_without_a_reader(written: Result<io::Result<()>, oneshot::error::RecvError>) -> anyhow::Result<u8> {
    match written {
        Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(BROKEN_PIPE),
        Ok(Err(error)) => Err(cannot_write(&error)),
        Ok(Ok(())) | Err(_) => anyhow::bail!("the thread that writes the output ended"),
    }
}

/// The exit status. Where a file is missing the code may have ended well, but the caller does not have what it asked for.
fn status(report: &Report, missing: bool) -> u8 {
    let status = report.outcome.exit_code() as u8;
    if missing && status == 0 { 1 } else { status }
}

/// Saves a file that came back. Whether it did: `false` where there is a reason instead.
fn save(file: &zeroboot_engine::OutputFile, args: &RunArgs) -> anyhow::Result<bool> {
    let data = match &file.data {
        Ok(data) => data,
        Err(reason) => {
            printer::note(format_args!("zeroboot: {}: {reason}", file.path));
            return Ok(false);
        }
    };
    let wanted =
        args.get.iter().map(|get| get.split_once(':').map_or((get.as_str(), None), |(name, to)| (name, Some(to))));
    let wanted: Vec<(&str, Option<&str>)> = wanted.chain(args.get_all.as_deref().map(|dir| (ALL, Some(dir)))).collect();
    let exact = wanted.iter().find(|(name, _)| *name == file.path);
    let target = match exact {
        Some((_, to)) => PathBuf::from(to.unwrap_or(file_name(&file.path))),
        None => {
            let meant = wanted.iter().find(|(name, _)| is_meant(name.as_bytes(), file.path.as_bytes()));
            let (_, below) = meant.context("a file came back that was not asked for")?;
            Path::new(below.unwrap_or(".")).join(&file.path)
        }
    };
    let parent = target.parent().filter(|parent| exact.is_none() && !parent.as_os_str().is_empty());
    parent
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| std::fs::write(&target, data))
        .map_err(|e| hinted(format!("cannot write {}: {e}", target.display()), "--get takes NAME or NAME:FILE"))?;
    Ok(true)
}

/// Says why the sandbox ended, where the code's own output cannot.
fn explain(report: &Report, timeout: Duration, memory: u64) {
    if let Some(hint) = &report.hint {
        printer::note(format_args!("hint: {hint}"));
    }
    let text = match report.outcome {
        Outcome::Exited { .. } => return,
        Outcome::Signaled { signal } => format!("the code was killed by signal {signal}"),
        Outcome::DeadlinePassed => format!("stopped: the time limit of {timeout:?} passed (--timeout)"),
        Outcome::CpuLimit => "stopped: the CPU time limit passed (--cpu-time)".to_owned(),
        Outcome::OutputLimit => "stopped: the output limit was reached (--max-output)".to_owned(),
        Outcome::OutOfMemory { .. } => format!("out of memory: the limit is {} MiB (--memory)", memory >> 20),
        Outcome::Crashed => "the sandbox crashed".to_owned(),
    };
    printer::note(format_args!("zeroboot: {text}"));
}

/// Names the modules that were not warmed, where a user named some.
fn not_warmed(engine: &Engine, args: &RunArgs) {
    if args.from.warm.is_some() || args.verbose {
        for skipped in engine.templates().into_iter().flat_map(|template| template.skipped) {
            printer::note(format_args!("zeroboot: not warmed: {skipped}"));
        }
    }
}

fn verbose(engine: &Engine, execution: &Execution, report: &Report, what: &str) {
    for template in engine.templates() {
        let warmed = if template.warmed.is_empty() { "nothing warmed".into() } else { template.warmed.join(", ") };
        printer::note(format_args!("zeroboot: {} ({what}) · {warmed}", template.version));
    }
    printer::note(format_args!(
        "zeroboot: engine {} · {} · fork {:.3} ms · exec {:.3} ms · total {:.3} ms · cpu {:.1} ms · peak {:.1} MiB",
        execution.isolation().as_str(),
        if report.pooled { "pooled" } else { "not pooled" },
        report.fork_time.as_secs_f64() * 1e3,
        report.exec_time.as_secs_f64() * 1e3,
        report.total_time.as_secs_f64() * 1e3,
        report.cpu_time.as_secs_f64() * 1e3,
        report.peak_memory as f64 / f64::from(1 << 20),
    ));
}

/// The whole result as the API's JSON object.
async fn json(execution: Execution, template: &str, language: &str) -> anyhow::Result<u8> {
    let (id, isolation) = (execution.id(), execution.isolation());
    let done = execution.collect().await?;
    let missing = done.files.iter().any(|file| file.data.is_err());
    let status = status(&done.report, missing);
    let text = serde_json::to_string(&zeroboot_server::answer(id, isolation, template, language, done))?;
    match printer::line(text) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(BROKEN_PIPE),
        Err(error) => Err(cannot_write(&error)),
        Ok(()) => Ok(status),
    }
}

/// Exit status when the reader of the output has closed it: that of a program that SIGPIPE ends.
const BROKEN_PIPE: u8 = 128 + 13;

fn cannot_write(error: &io::Error) -> anyhow::Error {
    hinted(format!("cannot write the output: {error}"), "check whether the disk is full")
}

/// Our standard input, chunk by chunk, from a thread that may block for ever.
pub(crate) fn read_stdin() -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut chunk = vec![0; 64 * 1024];
        loop {
            match rustix::io::read(rustix::stdio::stdin(), &mut chunk) {
                Ok(n @ 1..) => {
                    let bytes = Bytes::copy_from_slice(chunk.get(..n).unwrap_or_default());
                    if sender.blocking_send(bytes).is_err() {
                        return;
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                // The end, or closed from the start: the code sees an empty input.
                Ok(0) | Err(_) => return,
            }
        }
    });
    receiver
}

/// SIGINT and SIGTERM: the exit status that a shell expects.
struct Interrupts {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

impl Interrupts {
    fn new() -> anyhow::Result<Interrupts> {
        let listen = |kind| signal(kind).context("listen for signals");
        Ok(Interrupts {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 130,
            _ = self.terminate.recv() => 143,
            _ = self.hangup.recv() => 129,
        }
    }
}
