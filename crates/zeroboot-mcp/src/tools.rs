//! The tools.

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{Method, header, request::Parts};
use rmcp::{
    ErrorData, RoleServer, ServerHandler,
    handler::server::{router::tool::ToolRouter, wrapper::Parameters},
    model::{
        CallToolResult, ContentBlock, Implementation, InitializeRequestParams, InitializeResult, ListResourcesResult,
        PaginatedRequestParams, ProgressNotificationParam, ReadResourceRequestParams, ReadResourceResponse,
        ReadResourceResult, Resource, ResourceContents, ServerCapabilities, ServerConfig,
    },
    schemars::{self, JsonSchema},
    service::RequestContext,
    tool, tool_handler, tool_router,
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    api::{Api, Client, Failure, NoSession, file, path},
    session::{Fresh, Session, end},
    show,
};

/// Timeout of code and commands unless the caller says another one, in seconds.
const TIMEOUT: u64 = 60;
/// How much longer than its call a sandbox for one call may live, in seconds.
const SLACK: u64 = 60;
/// Lease and idle time of a sandbox, in seconds: an agent thinks between its calls.
const LEASE: u64 = 3600;
const IDLE: u64 = 900;
/// Interval of progress notifications.
const TICK: Duration = Duration::from_secs(1);
/// Bytes of a file that `read_file` gives at once.
const MAX_READ: u64 = 1 << 20;
const READ: u64 = 24 * 1024;
/// Most files of a sandbox that are listed as resources.
const MAX_RESOURCES: usize = 1000;
/// The code of a call that its client gave up.
const CANCELLED: &str = "cancelled";
/// Scheme of a file in a sandbox, as a resource.
const SCHEME: &str = "sandbox://";

const INSTRUCTIONS: &str = "Runs code and commands in sandboxes that start in about a millisecond. run_code without `sandbox_id` \
takes a fresh sandbox for each call and keeps nothing. create_sandbox makes one that keeps variables, files and processes; give its \
`sandbox_id` to run_code, exec, read_file and write_file, fork it with fork_sandbox, and end it with kill_sandbox. Sandboxes have no network: `pip install` and \
downloads fail. The last expression of Python and JavaScript is shown as a value, and matplotlib figures as images.";

/// One session of the Model Context Protocol.
pub struct Mcp {
    api: Arc<dyn Api>,
    session: Arc<Session>,
    tools: ToolRouter<Mcp>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Language {
    #[default]
    Python,
    #[serde(alias = "node", alias = "js")]
    Javascript,
    #[serde(alias = "shell", alias = "sh")]
    Bash,
}

impl Language {
    /// The language of the template that can run it.
    fn template(self) -> &'static str {
        match self {
            Language::Python | Language::Bash => "python",
            Language::Javascript => "node",
        }
    }
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct RunCode {
    /// The code. The value of its last expression is shown (Python and JavaScript).
    code: String,
    /// Of a sandbox that is there, its own language unless given.
    #[serde(default)]
    language: Option<Language>,
    /// A sandbox of create_sandbox, whose variables and files the code finds and changes. Left out: a fresh one, which ends with the call.
    #[serde(default)]
    sandbox_id: Option<String>,
    /// Seconds after which the code is interrupted (60 unless given).
    #[serde(default)]
    timeout_seconds: Option<u64>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct RunParallel {
    /// The programs. Each runs in a fresh sandbox of its own, all at once; what they print is what comes back.
    programs: Vec<Program>,
    /// `python` or `javascript`.
    #[serde(default)]
    language: Language,
    /// Seconds after which each is ended (60 unless given).
    #[serde(default)]
    timeout_seconds: Option<u64>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Program {
    /// Names the program in the answer.
    #[serde(default)]
    label: Option<String>,
    /// The code.
    code: String,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct CreateSandbox {
    /// What `run_code` runs in it unless it says otherwise. Each sandbox has Python, a shell, or Node.js with a shell.
    #[serde(default)]
    language: Language,
    /// A template of the server by name, instead of a language.
    #[serde(default)]
    template: Option<String>,
    /// Seconds until it ends (3600 unless given).
    #[serde(default)]
    timeout_seconds: Option<u64>,
    /// Seconds without a call until it ends (900 unless given).
    #[serde(default)]
    idle_timeout_seconds: Option<u64>,
    /// Memory in MiB (512 unless given).
    #[serde(default)]
    memory_mb: Option<u64>,
    /// Environment variables of everything in it.
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// It goes on when this session ends.
    #[serde(default)]
    keep_after_session: bool,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Exec {
    /// A sandbox of create_sandbox.
    sandbox_id: String,
    /// A line for /bin/sh.
    command: String,
    /// Working directory (the sandbox's home unless given).
    #[serde(default)]
    cwd: Option<String>,
    /// Environment variables.
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// Standard input.
    #[serde(default)]
    stdin: Option<String>,
    /// Seconds after which it is killed (60 unless given; none in the background).
    #[serde(default)]
    timeout_seconds: Option<u64>,
    /// Answer as soon as it runs, and let it run on: for servers.
    #[serde(default)]
    background: bool,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ReadFile {
    /// A sandbox of create_sandbox.
    sandbox_id: String,
    /// Absolute, or relative to the sandbox's home.
    path: String,
    /// Byte to begin at.
    #[serde(default)]
    offset: u64,
    /// Most bytes to read: 24 KiB of text unless given, at most 1 MiB.
    #[serde(default)]
    max_bytes: Option<u64>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct WriteFile {
    /// A sandbox of create_sandbox.
    sandbox_id: String,
    /// Absolute, or relative to the sandbox's home. Its directories are made.
    path: String,
    /// The file's text.
    #[serde(default)]
    content: Option<String>,
    /// The file's bytes as base64, instead of a text.
    #[serde(default)]
    content_base64: Option<String>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ForkSandbox {
    /// A Python sandbox of create_sandbox. It goes on.
    sandbox_id: String,
    /// How many (1 unless given).
    #[serde(default)]
    count: Option<u64>,
    /// Seconds until each ends (3600 unless given).
    #[serde(default)]
    timeout_seconds: Option<u64>,
    /// They go on when this session ends.
    #[serde(default)]
    keep_after_session: bool,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct KillSandbox {
    /// A sandbox of create_sandbox.
    sandbox_id: String,
}

type Context = RequestContext<RoleServer>;
/// What a tool gives. A failure is a result, too: one that says what to do.
type Done = Result<CallToolResult, Failure>;

/// Made once: each session has the same.
static TOOLS: LazyLock<ToolRouter<Mcp>> = LazyLock::new(tools);

/// The tools. What may be left out has one type in its schema, not `null` beside it: some models take no list of types. A
/// `null` is taken all the same.
fn tools() -> ToolRouter<Mcp> {
    let mut tools = Mcp::tool_router();
    for tool in tools.map.values_mut() {
        Arc::make_mut(&mut tool.attr.input_schema).values_mut().for_each(one_type);
    }
    tools
}

fn one_type(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if let Some(Value::Array(types)) = fields.get_mut("type") {
                types.retain(|one| one != "null");
                if let [one] = types.as_mut_slice() {
                    let one = one.take();
                    fields.insert("type".into(), one);
                }
            }
            if let Some(Value::Array(schemas)) = fields.get_mut("anyOf") {
                schemas.retain(|one| one["type"] != "null");
                if let [Value::Object(one)] = schemas.as_mut_slice() {
                    let one = std::mem::take(one);
                    fields.remove("anyOf");
                    fields.extend(one);
                }
            }
            fields.retain(|name, value| name != "default" || !value.is_null());
            fields.values_mut().for_each(one_type);
        }
        Value::Array(schemas) => schemas.iter_mut().for_each(one_type),
        _ => {}
    }
}

impl Mcp {
    /// A session that asks `api`.
    pub fn new(api: Arc<dyn Api>) -> Mcp {
        Mcp { api, session: Arc::default(), tools: TOOLS.clone() }
    }

    /// What it makes and ends.
    pub fn session(&self) -> Arc<Session> {
        self.session.clone()
    }

    fn client(&self, context: &Context) -> Client {
        Client { api: self.api.clone(), asker: context.extensions.get::<Parts>().cloned().map(Arc::new) }
    }

    async fn run(&self, client: &Client, call: &RunCode) -> Done {
        let timeout = call.timeout_seconds.unwrap_or(TIMEOUT);
        let fresh = match &call.sandbox_id {
            Some(_) => None,
            None => {
                let language = call.language.unwrap_or_default().template();
                let body = json!({"language": language, "timeout_seconds": timeout.saturating_add(SLACK)});
                Some(Fresh::make(client, body, &self.session).await?)
            }
        };
        let id = fresh.as_ref().map(|fresh| fresh.id.as_str()).or(call.sandbox_id.as_deref()).unwrap_or_default();
        let shown = call.sandbox_id.as_deref();
        if call.language == Some(Language::Bash) {
            let body = json!({
                "argv": ["bash", "-c", call.code], "timeout_seconds": timeout, "end_with_client": true,
            });
            let answer = client.json(Method::POST, &path(id, &["commands"]), &body).await?;
            return Ok(show::ran(&answer, shown));
        }
        if let (Some(language), Some(_)) = (call.language, &call.sandbox_id) {
            let there = client.json(Method::GET, &path(id, &[]), &Value::Null).await?;
            let there = there.get("language").and_then(Value::as_str).unwrap_or_default();
            if there != language.template() {
                let cause = format!("the sandbox {id} runs {there}, not {}", language.template());
                return Err(Failure::new("unknown_language", cause));
            }
        }
        let body = json!({"code": call.code, "timeout_seconds": timeout});
        let answer = client.json(Method::POST, &path(id, &["run"]), &body).await?;
        Ok(show::ran(&answer, shown))
    }
}

/// Waits for `work`, tells the client every second that it goes on, and ends when the client cancels.
async fn patiently<T>(
    context: &Context,
    seconds: u64,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let token = context.meta.get_progress_token();
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + TICK, TICK);
    let mut passed = 0u32;
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = context.ct.cancelled() => return Err(Failure::new(CANCELLED, "the client cancelled the call")),
            _ = ticks.tick() => {
                passed += 1;
                let Some(token) = &token else { continue };
                let progress = ProgressNotificationParam::new(token.clone(), f64::from(passed))
                    .with_total(f64::from(u32::try_from(seconds).unwrap_or(u32::MAX)))
                    .with_message(format!("running for {passed} s"));
                // A client that does not hear it hears the end.
                let _unheard = context.peer.notify_progress(progress).await;
            }
        }
    }
}

/// A part of a file.
async fn read(client: &Client, url: &str, range: &str) -> Result<Bytes, Failure> {
    match client.ask(Method::GET, url, &[(header::RANGE, range)], Bytes::new()).await {
        // An empty file has no byte to begin at.
        Err(failure) if failure.code == "range_not_satisfiable" => Ok(Bytes::new()),
        read => read,
    }
}

#[tool_router(router = tool_router)]
impl Mcp {
    #[tool(
        description = "Run code and get its output, the value of its last expression, and its figures as images. Python (with numpy and \
pandas where the server has them), JavaScript or bash; in a fresh sandbox, or with `sandbox_id` in one that keeps its state.",
        annotations(
            title = "Run code",
            read_only_hint = false,
            destructive_hint = false,
            idempotent_hint = false,
            open_world_hint = false
        )
    )]
    async fn run_code(&self, Parameters(call): Parameters<RunCode>, context: Context) -> Done {
        let client = self.client(&context);
        let timeout = call.timeout_seconds.unwrap_or(TIMEOUT);
        let done = patiently(&context, timeout, self.run(&client, &call)).await;
        if done.as_ref().is_err_and(|failure| failure.code == CANCELLED)
            && let Some(id) = &call.sandbox_id
        {
            // A cell goes on without its client. A command does not.
            let interrupt = path(id, &["contexts", "default", "interrupt"]);
            let _not_running = client.ask(Method::POST, &interrupt, &[], Bytes::new()).await;
        }
        done
    }

    #[tool(
        description = "Run several programs at once, each in a fresh sandbox of its own, and get what each printed, in order. For trying \
several approaches, or one on several inputs.",
        annotations(
            title = "Run programs in parallel",
            read_only_hint = false,
            destructive_hint = false,
            idempotent_hint = false,
            open_world_hint = false
        )
    )]
    async fn run_parallel(&self, Parameters(call): Parameters<RunParallel>, context: Context) -> Done {
        if call.language == Language::Bash {
            return Err(Failure::new("unknown_language", "run_parallel takes python and javascript"));
        }
        let timeout = call.timeout_seconds.unwrap_or(TIMEOUT);
        let items: Vec<Value> = call
            .programs
            .iter()
            .map(|program| {
                json!({"code": program.code, "language": call.language.template(), "timeout_seconds": timeout})
            })
            .collect();
        let client = self.client(&context);
        let work = async {
            let answer = client.json(Method::POST, "/v1/exec/batch", &json!({"executions": items})).await?;
            let results = answer.get("results").and_then(Value::as_array);
            results.cloned().ok_or_else(|| Failure::new("no_answer", "the server's answer has no results"))
        };
        let results = patiently(&context, timeout, work).await?;
        let mut all = CallToolResult::success(Vec::new());
        let mut structured = Vec::new();
        for (number, (program, result)) in call.programs.iter().zip(&results).enumerate() {
            let label = program.label.clone().unwrap_or_else(|| format!("program {}", number + 1));
            let mut one = match result.get("code").and_then(Value::as_str) {
                // This one did not run.
                Some(code) => {
                    let cause = result.get("error").and_then(Value::as_str).unwrap_or_default();
                    show::failed(&Failure::new(code, cause))
                }
                None => show::ran(result, None),
            };
            all.content.push(ContentBlock::text(format!("## {label}")));
            all.content.append(&mut one.content);
            let mut value = one.structured_content.unwrap_or_default();
            value["label"] = json!(label);
            structured.push(value);
        }
        all.structured_content = Some(json!({"results": structured}));
        Ok(all)
    }

    #[tool(
        description = "Make a sandbox that keeps variables, files and processes between calls. Gives its `sandbox_id`.",
        annotations(
            title = "Create a sandbox",
            read_only_hint = false,
            destructive_hint = false,
            idempotent_hint = false,
            open_world_hint = false
        )
    )]
    async fn create_sandbox(&self, Parameters(call): Parameters<CreateSandbox>, context: Context) -> Done {
        let client = self.client(&context);
        let mut body = json!({
            "timeout_seconds": call.timeout_seconds.unwrap_or(LEASE),
            "idle_timeout_seconds": call.idle_timeout_seconds.unwrap_or(IDLE),
            "env": call.env,
        });
        match &call.template {
            Some(template) => body["template"] = json!(template),
            None => body["language"] = json!(call.language.template()),
        }
        if let Some(memory) = call.memory_mb {
            body["memory_mb"] = json!(memory);
        }
        let made = client.json(Method::POST, "/v1/sandboxes", &body).await?;
        let field = |name: &str| made.get(name).cloned().unwrap_or_default();
        let id = field("id").as_str().unwrap_or_default().to_owned();
        self.session.add(&id, &client, call.keep_after_session);
        let about = json!({
            "sandbox_id": id, "template": field("template"), "language": field("language"),
            "isolation": field("isolation"), "expires_at": field("expires_at"), "limits": field("limits"),
        });
        let text = format!("sandbox_id: {id}\nlanguage: {}\nends at: {}", field("language"), field("expires_at"));
        Ok(show::told(text, about))
    }

    #[tool(
        description = "Run a shell command in a sandbox and get its output and exit code.",
        annotations(
            title = "Run a command",
            read_only_hint = false,
            destructive_hint = true,
            idempotent_hint = false,
            open_world_hint = false
        )
    )]
    async fn exec(&self, Parameters(call): Parameters<Exec>, context: Context) -> Done {
        let client = self.client(&context);
        let mut body = json!({
            "command": call.command, "env": call.env, "background": call.background, "end_with_client": !call.background,
        });
        let timeout = call.timeout_seconds.or((!call.background).then_some(TIMEOUT));
        for (name, value) in
            [("cwd", json!(call.cwd)), ("stdin", json!(call.stdin)), ("timeout_seconds", json!(timeout))]
        {
            if !value.is_null() {
                body[name] = value;
            }
        }
        let commands = path(&call.sandbox_id, &["commands"]);
        let work = client.json(Method::POST, &commands, &body);
        let answer = patiently(&context, timeout.unwrap_or_default(), work).await?;
        if call.background {
            let pid = answer.get("pid").cloned().unwrap_or_default();
            let about = json!({"sandbox_id": call.sandbox_id, "outcome": "running", "pid": pid, "command_id": answer.get("id")});
            let text = format!("runs in the background as process {pid}; `kill {pid}` ends it");
            return Ok(show::told(text, about));
        }
        Ok(show::ran(&answer, Some(&call.sandbox_id)))
    }

    #[tool(
        description = "Read a file of a sandbox: text, an image, or base64.",
        annotations(title = "Read a file", read_only_hint = true, open_world_hint = false)
    )]
    async fn read_file(&self, Parameters(call): Parameters<ReadFile>, context: Context) -> Done {
        let client = self.client(&context);
        let asked = call.max_bytes.map(|bytes| bytes.clamp(1, MAX_READ));
        // An image is of use only whole.
        let most = asked.unwrap_or(MAX_READ);
        let range = format!("bytes={}-{}", call.offset, call.offset.saturating_add(most));
        let url = file(&call.sandbox_id, &call.path);
        let bytes = read(&client, &url, &range).await?;
        let mut limit = usize::try_from(most).unwrap_or(usize::MAX);
        let is_image = |result: &CallToolResult| result.content.iter().any(|block| block.as_image().is_some());
        let whole = bytes.len() <= limit;
        let all = show::file(&call.path, bytes.get(..limit.min(bytes.len())).unwrap_or_default(), whole);
        if asked.is_some() || is_image(&all) {
            return Ok(all);
        }
        limit = limit.min(usize::try_from(READ).unwrap_or(usize::MAX));
        Ok(show::file(&call.path, bytes.get(..limit.min(bytes.len())).unwrap_or_default(), bytes.len() <= limit))
    }

    #[tool(
        description = "Write a file in a sandbox, with its directories. What was there is replaced.",
        annotations(
            title = "Write a file",
            read_only_hint = false,
            destructive_hint = true,
            idempotent_hint = true,
            open_world_hint = false
        )
    )]
    async fn write_file(&self, Parameters(call): Parameters<WriteFile>, context: Context) -> Done {
        let bytes = match (call.content, call.content_base64) {
            (Some(text), None) => Bytes::from(text),
            (None, Some(encoded)) => {
                let wrong = |error| Failure::new("invalid_request", format!("content_base64 is not base64: {error}"));
                STANDARD.decode(encoded.trim()).map_err(wrong)?.into()
            }
            _ => return Err(Failure::new("invalid_request", "give either content or content_base64")),
        };
        let length = bytes.len();
        let url = file(&call.sandbox_id, &call.path);
        let headers = [(header::CONTENT_TYPE, "application/octet-stream")];
        self.client(&context).ask(Method::PUT, &url, &headers, bytes).await?;
        let text = format!("wrote {length} bytes to {}", call.path);
        Ok(show::told(text, json!({"path": call.path, "bytes": length})))
    }

    #[tool(
        description = "Make sandboxes that begin where one is now, with its variables, files and processes; it goes on. For trying several \
continuations of one state. Only servers with virtual machines can do this.",
        annotations(
            title = "Fork a sandbox",
            read_only_hint = false,
            destructive_hint = false,
            idempotent_hint = false,
            open_world_hint = false
        )
    )]
    async fn fork_sandbox(&self, Parameters(call): Parameters<ForkSandbox>, context: Context) -> Done {
        let client = self.client(&context);
        let body = json!({
            "count": call.count.unwrap_or(1), "timeout_seconds": call.timeout_seconds.unwrap_or(LEASE),
        });
        let made = client.json(Method::POST, &path(&call.sandbox_id, &["branch"]), &body).await?;
        let branches = made.get("sandboxes").and_then(Value::as_array).into_iter().flatten();
        let ids: Vec<&str> = branches.filter_map(|branch| branch.get("id")?.as_str()).collect();
        for id in &ids {
            self.session.add(id, &client, call.keep_after_session);
        }
        let text = format!("sandbox_ids: {}", ids.join(", "));
        Ok(show::told(text, json!({"sandbox_ids": ids, "fork_of": call.sandbox_id})))
    }

    #[tool(
        description = "End a sandbox and all that is in it.",
        annotations(
            title = "End a sandbox",
            read_only_hint = false,
            destructive_hint = true,
            idempotent_hint = true,
            open_world_hint = false
        )
    )]
    async fn kill_sandbox(&self, Parameters(call): Parameters<KillSandbox>, context: Context) -> Done {
        end(&self.client(&context), &call.sandbox_id).await?;
        self.session.forget(&call.sandbox_id);
        Ok(show::told("ended", json!({"sandbox_id": call.sandbox_id, "ended": true})))
    }
}

#[tool_handler(router = self.tools)]
impl ServerHandler for Mcp {
    fn get_info(&self) -> ServerConfig {
        let capabilities = ServerCapabilities::builder().enable_tools().enable_resources().build();
        ServerConfig::new(capabilities)
            .with_server_info(
                Implementation::new("zeroboot", env!("CARGO_PKG_VERSION")).with_title("Zeroboot sandboxes"),
            )
            .with_instructions(INSTRUCTIONS)
    }

    async fn initialize(
        &self,
        request: InitializeRequestParams,
        context: Context,
    ) -> Result<InitializeResult, ErrorData> {
        let asker = self.client(&context).asker;
        let ticket = self.api.begin(&asker).map_err(|NoSession(text)| ErrorData::invalid_request(text, None))?;
        self.session.begin(ticket);
        context.peer.set_peer_info(request.clone());
        self.negotiate_initialize(&request)
    }

    /// The files of this session's sandboxes.
    async fn list_resources(
        &self,
        _page: Option<PaginatedRequestParams>,
        context: Context,
    ) -> Result<ListResourcesResult, ErrorData> {
        let client = self.client(&context);
        let mut resources = Vec::new();
        for id in self.session.ids() {
            let list = format!("{}?path=.&depth=3", path(&id, &["files", "list"]));
            // One that has ended has no files.
            let Ok(found) = client.ask(Method::GET, &list, &[], Bytes::new()).await else { continue };
            let found: Value = serde_json::from_slice(&found).unwrap_or_default();
            let entries = found.get("entries").and_then(Value::as_array).cloned().unwrap_or_default();
            for entry in entries.iter().filter(|entry| entry["kind"] == "file").take(MAX_RESOURCES) {
                let name = entry["path"].as_str().unwrap_or_default();
                let mut resource = Resource::new(format!("{SCHEME}{id}{name}"), name);
                resource.size = entry["size"].as_u64();
                resources.push(resource);
            }
        }
        Ok(ListResourcesResult::with_all_items(resources))
    }

    async fn read_resource(
        &self,
        request: ReadResourceRequestParams,
        context: Context,
    ) -> Result<ReadResourceResponse, ErrorData> {
        let unknown = || ErrorData::resource_not_found(format!("{SCHEME}ID/PATH names a file in a sandbox"), None);
        let rest = request.uri.strip_prefix(SCHEME).ok_or_else(unknown)?;
        let at = rest.find('/').ok_or_else(unknown)?;
        let (id, name) = rest.split_at(at);
        let range = format!("bytes=0-{}", MAX_READ - 1);
        let unreadable = |failure: Failure| ErrorData::resource_not_found(failure.cause.clone(), Some(failure.value()));
        let bytes = read(&self.client(&context), &file(id, name), &range).await.map_err(unreadable)?;
        let contents = match String::from_utf8(bytes.to_vec()) {
            Ok(text) => ResourceContents::text(text, request.uri),
            Err(_) => ResourceContents::blob(STANDARD.encode(&bytes), request.uri),
        };
        Ok(ReadResourceResult::new(vec![contents]).into())
    }
}
