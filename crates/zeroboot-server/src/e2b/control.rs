//! E2B's control plane: sandboxes are made, listed, extended and ended.

use std::{collections::BTreeMap, time::Duration};

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderValue, StatusCode},
    response::Response,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroboot_engine::{EndReason, MAX_ENV, Sandbox};

use super::{ENVD_VERSION, HOME};
use crate::{
    call::Call,
    error::{About, ApiError},
    params::{InPath, InQuery},
    routes::sandboxes::make,
    sandbox_wire::{CreateBody, MAX_METADATA, owner},
    wire::FewNamed,
};

/// Names that E2B's SDKs ask for when nothing else is said, and the language that serves them.
const ALIASES: [(&str, &str); 2] = [("base", "python"), ("code-interpreter-v1", "python")];
/// Sandboxes of one page, at most and unless asked otherwise.
const PAGE: u64 = 100;
/// The one member of `clientID`: a node of theirs, which we have not.
const CLIENT: &str = "zeroboot";
/// Size of the home directory in the process engine, MiB. It is part of the sandbox's memory.
const DISK_MB: u64 = 256;

/// What `POST /sandboxes` and `POST /v2/sandboxes` say.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NewSandbox {
    #[serde(rename = "templateID")]
    template_id: String,
    timeout: Option<f64>,
    metadata: Option<FewNamed<String, MAX_METADATA>>,
    env_vars: Option<FewNamed<String, MAX_ENV>>,
    /// Every sandbox is secure.
    #[serde(rename = "secure")]
    _secure: Option<bool>,
    auto_pause: Option<bool>,
    auto_pause_memory: Option<bool>,
    auto_resume: Option<AutoResume>,
    /// A sandbox has no network, whatever this says: true is the SDKs' own default, so it cannot be refused.
    #[serde(rename = "allow_internet_access")]
    _allow_internet_access: Option<bool>,
    network: Option<Network>,
    mcp: Option<serde_json::Value>,
    iam: Option<serde_json::Value>,
    volume_mounts: Option<Vec<serde_json::Value>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum AutoResume {
    Flag(bool),
    Config { enabled: bool },
}

/// Rules for a network. Those that forbid something hold anyway.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Network {
    allow_out: Option<Vec<serde_json::Value>>,
    egress_proxy: Option<serde_json::Value>,
    mask_request_host: Option<serde_json::Value>,
    rules: Option<serde_json::Map<String, serde_json::Value>>,
}

impl Network {
    fn check(&self) -> Result<(), ApiError> {
        let opens = self.allow_out.as_ref().is_some_and(|rules| !rules.is_empty())
            || self.egress_proxy.as_ref().is_some_and(|value| !value.is_null())
            || self.mask_request_host.as_ref().is_some_and(|value| !value.is_null())
            || self.rules.as_ref().is_some_and(|rules| !rules.is_empty());
        if opens {
            return Err(not_supported("A sandbox has no network: no rule can open it"));
        }
        Ok(())
    }
}

fn not_supported(text: &str) -> ApiError {
    ApiError::new("not_supported", text)
}

impl NewSandbox {
    /// What is asked for and cannot be had is refused: nothing is passed over in silence.
    fn check(&self) -> Result<(), ApiError> {
        let resumes = match self.auto_resume {
            None => false,
            Some(AutoResume::Flag(on) | AutoResume::Config { enabled: on }) => on,
        };
        if self.auto_pause == Some(true) || self.auto_pause_memory == Some(true) || resumes {
            return Err(not_supported("Sandboxes cannot be paused: autoPause and autoResume must be false"));
        }
        if self.mcp.as_ref().is_some_and(|value| !value.is_null()) {
            return Err(not_supported("MCP servers of E2B's catalogue cannot be started in a sandbox"));
        }
        if self.iam.as_ref().is_some_and(|value| !value.is_null()) {
            return Err(not_supported("Sandboxes have no workload identity"));
        }
        if self.volume_mounts.as_ref().is_some_and(|mounts| !mounts.is_empty()) {
            return Err(not_supported("There are no volumes"));
        }
        self.network.as_ref().map_or(Ok(()), Network::check)
    }
}

/// How clients reach a new sandbox.
#[derive(Serialize)]
struct Access<'a> {
    #[serde(rename = "templateID")]
    template_id: &'a str,
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    #[serde(rename = "clientID")]
    client_id: &'static str,
    #[serde(rename = "envdVersion")]
    envd_version: &'static str,
    #[serde(rename = "envdAccessToken")]
    envd_access_token: String,
    /// The same: some calls to the code interpreter show only this one.
    #[serde(rename = "trafficAccessToken")]
    traffic_access_token: String,
    domain: Option<&'a str>,
}

/// Their ids have no hyphens, and some programs cut at one.
fn id_text(id: Uuid) -> String {
    id.simple().to_string()
}

fn access<'a>(call: &Call, sandbox: &'a Sandbox) -> Access<'a> {
    let token = call.app.e2b.token(sandbox.id());
    Access {
        template_id: sandbox.template(),
        sandbox_id: id_text(sandbox.id()),
        client_id: CLIENT,
        envd_version: ENVD_VERSION,
        envd_access_token: token.clone(),
        traffic_access_token: token,
        domain: None,
    }
}

pub(crate) async fn create(call: Call, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let asked: NewSandbox = call.body(&headers, body).await?;
    asked.check()?;
    let alias = ALIASES.iter().find(|(alias, _)| *alias == asked.template_id).map(|(_, language)| *language);
    let catalog = &call.app.catalog;
    // A template of ours with such a name goes first.
    let own = catalog.templates.iter().any(|known| *known.name == asked.template_id);
    let alias = alias.filter(|_| !own);
    let mut env = asked.env_vars.unwrap_or(FewNamed(BTreeMap::new()));
    env.0.entry("HOME".into()).or_insert_with(|| HOME.into());
    let body = CreateBody {
        template: alias.is_none().then_some(asked.template_id),
        language: alias.map(str::to_owned),
        timeout_seconds: asked.timeout,
        idle_timeout_seconds: None,
        env: Some(env),
        metadata: asked.metadata,
        memory_mb: None,
        processes: None,
        file_size_mb: None,
        open_files: None,
    };
    let spec = body.into_spec(catalog, call.limits(), &call.asked.caller)?;
    let sandbox = make(&call, spec).await?;
    call.json(StatusCode::CREATED, &access(&call, &sandbox))
}

/// A sandbox in a list.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Listed<'a> {
    #[serde(rename = "templateID")]
    template_id: &'a str,
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    #[serde(rename = "clientID")]
    client_id: &'static str,
    started_at: String,
    end_at: String,
    cpu_count: u32,
    #[serde(rename = "memoryMB")]
    memory_mb: u64,
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: u64,
    metadata: &'a BTreeMap<String, String>,
    state: &'static str,
    envd_version: &'static str,
    /// Not in lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    envd_access_token: Option<String>,
}

impl Listed<'_> {
    fn of(sandbox: &Sandbox) -> Listed<'_> {
        let time = |time| Timestamp::try_from(time).unwrap_or_default().to_string();
        Listed {
            template_id: sandbox.template(),
            sandbox_id: id_text(sandbox.id()),
            client_id: CLIENT,
            started_at: time(sandbox.created_at()),
            end_at: time(sandbox.expires_at()),
            // Nothing but a configured quota limits it to fewer.
            cpu_count: std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1)),
            memory_mb: sandbox.limits().memory / (1024 * 1024),
            disk_size_mb: DISK_MB,
            metadata: sandbox.metadata(),
            state: "running",
            envd_version: ENVD_VERSION,
            envd_access_token: None,
        }
    }
}

/// Sandboxes of the caller, the oldest first.
fn own(call: &Call) -> Result<Vec<Sandbox>, ApiError> {
    let mut own = call.engine()?.sandboxes();
    own.retain(|sandbox| sandbox.owner() == owner(&call.asked.caller));
    Ok(own)
}

/// Words that the SDKs escape once more before they put them into a form.
fn words(form: &str) -> Vec<(String, String)> {
    let again = |text: &str| percent_decode(text);
    form_urlencoded::parse(form.as_bytes()).map(|(name, value)| (again(&name), again(&value))).collect()
}

fn percent_decode(text: &str) -> String {
    // A plus sign is one here: quoted words have none that means a space.
    let escaped = text.replace('+', "%2B");
    let pair = format!("x={escaped}");
    form_urlencoded::parse(pair.as_bytes()).next().map_or_else(String::new, |(_, value)| value.into_owned())
}

fn with_words(all: &mut Vec<Sandbox>, query: &mut InQuery) -> Result<(), ApiError> {
    if let Some(form) = query.text("metadata")? {
        let wanted = words(&form);
        all.retain(|sandbox| wanted.iter().all(|(name, value)| sandbox.metadata().get(name) == Some(value)));
    }
    Ok(())
}

/// `GET /sandboxes`: all that run.
pub(crate) async fn list_running(call: Call, mut query: InQuery) -> Result<Response, ApiError> {
    let mut all = own(&call)?;
    with_words(&mut all, &mut query)?;
    query.end()?;
    call.json(StatusCode::OK, &all.iter().map(Listed::of).collect::<Vec<_>>())
}

/// `GET /v2/sandboxes`: a page.
pub(crate) async fn list(call: Call, mut query: InQuery) -> Result<Response, ApiError> {
    let invalid = |text: &str| ApiError::new("invalid_request", text);
    let mut all = own(&call)?;
    with_words(&mut all, &mut query)?;
    let states = query.all("state");
    let states: Vec<&str> = states.iter().flat_map(|text| text.split(',')).collect();
    if let Some(other) = states.iter().find(|state| !["running", "paused"].contains(*state)) {
        return Err(invalid(&format!("unknown state {:?}", other.chars().take(60).collect::<String>())));
    }
    if !states.is_empty() && !states.contains(&"running") {
        all.clear();
    }
    if let Some(name) = query.text("template")? {
        let alias = ALIASES.iter().find(|(alias, _)| *alias == name);
        all.retain(|sandbox| sandbox.template() == name || alias.is_some_and(|(_, word)| sandbox.language() == *word));
    }
    if let Some(after) = query.text("startedAfter")? {
        let after: Timestamp = after.parse().map_err(|_| invalid("startedAfter is not a time of RFC 3339"))?;
        all.retain(|sandbox| Timestamp::try_from(sandbox.created_at()).is_ok_and(|at| at > after));
    }
    let newest_first = match query.text("order")?.as_deref() {
        None | Some("desc") => true,
        Some("asc") => false,
        Some(_) => return Err(invalid("order must be asc or desc")),
    };
    let limit = query.number("limit", 1..=PAGE)?.unwrap_or(PAGE);
    let from = query.text("nextToken")?.map(|text| text.parse::<Uuid>()).transpose();
    let from = from.map_err(|_| invalid("nextToken is none that this list gave"))?;
    query.end()?;
    if newest_first {
        all.reverse();
    }
    if let Some(from) = from {
        all.retain(|sandbox| if newest_first { sandbox.id() < from } else { sandbox.id() > from });
    }
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = all.len() > limit;
    all.truncate(limit);
    let mut response = call.json(StatusCode::OK, &all.iter().map(Listed::of).collect::<Vec<_>>())?;
    if let Some(last) = all.last().filter(|_| more)
        && let Ok(value) = HeaderValue::from_str(&id_text(last.id()))
    {
        response.headers_mut().insert("x-next-token", value);
    }
    Ok(response)
}

pub(crate) async fn show(call: Call, path: InPath) -> Result<Response, ApiError> {
    let sandbox = call.sandbox(&path)?;
    let detail = Listed { envd_access_token: Some(call.app.e2b.token(sandbox.id())), ..Listed::of(&sandbox) };
    call.json(StatusCode::OK, &detail)
}

pub(crate) async fn kill(call: Call, path: InPath) -> Result<StatusCode, ApiError> {
    call.sandbox(&path)?.end(EndReason::Requested).await;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct TimeoutBody {
    timeout: Option<f64>,
    /// Of `/refreshes`.
    duration: Option<f64>,
    /// Of `/connect`: what a paused sandbox is resumed from.
    #[serde(rename = "memory")]
    _memory: Option<bool>,
    /// Of `/resume`.
    #[serde(rename = "autoPause")]
    auto_pause: Option<bool>,
}

fn lease(seconds: f64, call: &Call) -> Result<Duration, ApiError> {
    let most = call.limits().max_lease;
    let time = Duration::try_from_secs_f64(seconds).ok().filter(|time| !time.is_zero() && *time <= most);
    time.ok_or_else(|| {
        let text = format!("The timeout must be above 0 and at most {} seconds", most.as_secs());
        ApiError::new("invalid_timeout", text)
    })
}

fn set_lease(sandbox: &Sandbox, lease: Duration) -> Result<(), ApiError> {
    sandbox.extend(lease).map_err(|error| ApiError::of_run(error, About::Command))
}

/// Never makes it shorter.
fn at_least(sandbox: &Sandbox, lease: Duration) -> Result<(), ApiError> {
    let left = sandbox.expires_at().duration_since(std::time::SystemTime::now()).unwrap_or_default();
    if lease > left { set_lease(sandbox, lease) } else { Ok(()) }
}

pub(crate) async fn set_timeout(
    call: Call,
    path: InPath,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let sandbox = call.sandbox(&path)?;
    let body: TimeoutBody = call.body(&headers, body).await?;
    let seconds = body.timeout.ok_or_else(|| ApiError::new("invalid_request", "timeout is missing"))?;
    set_lease(&sandbox, lease(seconds, &call)?)?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn refresh(call: Call, path: InPath, headers: HeaderMap, body: Body) -> Result<StatusCode, ApiError> {
    let sandbox = call.sandbox(&path)?;
    let body = optional(&call, &headers, body).await?;
    let usual = call.limits().default_lease;
    let wanted = body.duration.map_or(Ok(usual), |seconds| lease(seconds, &call))?;
    at_least(&sandbox, wanted)?;
    Ok(StatusCode::NO_CONTENT)
}

/// A body that may be missing.
async fn optional(call: &Call, headers: &HeaderMap, body: Body) -> Result<TimeoutBody, ApiError> {
    if hyper::body::Body::is_end_stream(&body) {
        return Ok(TimeoutBody::default());
    }
    call.body(headers, body).await
}

pub(crate) async fn connect(call: Call, path: InPath, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let sandbox = call.sandbox(&path)?;
    let body = optional(&call, &headers, body).await?;
    if body.auto_pause == Some(true) {
        return Err(not_supported("Sandboxes cannot be paused: autoPause must be false"));
    }
    if let Some(seconds) = body.timeout {
        at_least(&sandbox, lease(seconds, &call)?)?;
    }
    call.json(StatusCode::OK, &access(&call, &sandbox))
}

pub(crate) async fn pause(call: Call, path: InPath) -> Result<Response, ApiError> {
    call.sandbox(&path)?;
    Err(not_supported("Sandboxes cannot be paused"))
}

pub(crate) async fn fork(call: Call, path: InPath) -> Result<Response, ApiError> {
    call.sandbox(&path)?;
    Err(not_supported("A live sandbox cannot be forked"))
}

pub(crate) async fn snapshot(call: Call, path: InPath) -> Result<Response, ApiError> {
    call.sandbox(&path)?;
    Err(not_supported("No snapshot of a live sandbox can be made"))
}

/// There are none, since none can be made.
pub(crate) async fn snapshots(call: Call) -> Result<Response, ApiError> {
    call.json(StatusCode::OK, &[(); 0])
}

pub(crate) async fn network(call: Call, path: InPath, headers: HeaderMap, body: Body) -> Result<StatusCode, ApiError> {
    call.sandbox(&path)?;
    let asked: Network = call.body(&headers, body).await?;
    asked.check()?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn metrics(_call: Call) -> Result<Response, ApiError> {
    Err(not_supported("What a sandbox uses is not measured; /v1/metrics has the server's sums"))
}

pub(crate) async fn logs(_call: Call) -> Result<Response, ApiError> {
    Err(not_supported("The server keeps no logs of what runs in a sandbox"))
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Template<'a> {
    #[serde(rename = "templateID")]
    template_id: &'a str,
    #[serde(rename = "buildID")]
    build_id: &'a str,
    aliases: Vec<&'a str>,
    names: Vec<&'a str>,
    public: bool,
}

pub(crate) async fn templates(call: Call) -> Result<Response, ApiError> {
    let catalog = &call.app.catalog;
    let all = catalog.templates.iter().map(|known| {
        let name = &*known.name;
        let aliases: Vec<&str> = ALIASES
            .iter()
            .filter(|(_, word)| catalog.choose(Some(word), None).is_ok_and(|chosen| chosen == known))
            .map(|(alias, _)| *alias)
            .collect();
        let names = std::iter::once(name).chain(aliases.iter().copied()).collect();
        Template { template_id: name, build_id: name, aliases, names, public: true }
    });
    call.json(StatusCode::OK, &all.collect::<Vec<_>>())
}

pub(crate) async fn build(_call: Call, _request: Request) -> Result<Response, ApiError> {
    Err(not_supported("Templates are not built over this API: the server's host makes them with `zeroboot template`"))
}

pub(crate) async fn volumes(_call: Call) -> Result<Response, ApiError> {
    Err(not_supported("There are no volumes"))
}

pub(crate) async fn secrets(_call: Call) -> Result<Response, ApiError> {
    Err(not_supported("The server keeps no secrets"))
}

pub(crate) async fn teams(_call: Call) -> Result<Response, ApiError> {
    Err(not_supported("There are no teams: keys are made with `zeroboot keys`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(text: &str) -> Result<(), ApiError> {
        serde_json::from_str::<NewSandbox>(text).unwrap().check()
    }

    #[test]
    fn what_cannot_be_had_is_refused_and_what_holds_anyway_is_not() {
        for good in [
            r#"{"templateID":"base"}"#,
            r#"{"templateID":"base","secure":true,"allow_internet_access":true,"autoPause":false,"timeout":300}"#,
            r#"{"templateID":"base","autoResume":{"enabled":false},"mcp":null,"volumeMounts":[],"network":{"denyOut":["0.0.0.0/0"]}}"#,
        ] {
            asked(good).unwrap();
        }
        for bad in [
            r#"{"templateID":"base","autoPause":true}"#,
            r#"{"templateID":"base","autoResume":{"enabled":true}}"#,
            r#"{"templateID":"base","mcp":{"a":{}}}"#,
            r#"{"templateID":"base","iam":{"tokens":{}}}"#,
            r#"{"templateID":"base","volumeMounts":[{"name":"a","path":"/a"}]}"#,
            r#"{"templateID":"base","network":{"allowOut":["1.1.1.1"]}}"#,
            r#"{"templateID":"base","network":{"rules":{"a":[]}}}"#,
        ] {
            assert_eq!(asked(bad).unwrap_err().code, "not_supported", "{bad}");
        }
        assert!(serde_json::from_str::<NewSandbox>(r#"{"templateID":"base","new":1}"#).is_err());
    }

    #[test]
    fn words_are_unescaped_as_often_as_the_sdks_escape_them() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(words("user=a%2520b&x=1"), [pair("user", "a b"), pair("x", "1")]);
        assert_eq!(words("user=a%252Bb%2526"), [pair("user", "a+b&")]);
    }
}
