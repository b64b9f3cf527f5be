//! The OpenAPI document, made from the wire types. It is committed as `openapi/zeroboot.json`.

use utoipa::{
    Modify, OpenApi,
    openapi::{
        Components, HeaderBuilder, Object, RefOr, Required, ResponseBuilder,
        content::ContentBuilder,
        path::{HttpMethod, OperationBuilder, PathItemBuilder, PathsBuilder},
        request_body::RequestBodyBuilder,
        schema::{Ref, SchemaFormat, Type},
        security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme},
        tag::TagBuilder,
    },
};

use crate::{answer, error, openapi_sandboxes, routes, sandbox_answer, sandbox_wire, wire};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Zeroboot",
        description = "Zeroboot runs untrusted code in a fresh sandbox, which starts from a pool in under a millisecond. \
                       One exec has its own sandbox; a long-lived sandbox takes many runs. Status 200 means that the code \
                       came to an outcome, whatever it is. 4xx is a mistake of the caller, 5xx a failure of the server.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(
        wire::ExecBody,
        wire::LimitsBody,
        wire::BatchBody,
        wire::DataSchema,
        wire::TextObject,
        wire::BytesObject,
        answer::AnswerBody<'static>,
        answer::EncodingBody,
        answer::EncodingName,
        answer::EndBody<'static>,
        answer::OutcomeName,
        answer::IsolationName,
        answer::FileBody<'static>,
        answer::BatchAnswerBody<'static>,
        answer::BatchItem<'static>,
        answer::Piece,
        error::ErrorBody<'static>,
        routes::status::HealthBody<'static>,
        routes::status::HealthStatus,
        routes::status::TemplateBody<'static>,
        routes::StartBody<'static>,
        sandbox_wire::BranchBody,
        sandbox_wire::CheckpointBody,
        sandbox_wire::RollBackBody,
        sandbox_wire::CreateBody,
        sandbox_wire::ExtendBody,
        sandbox_wire::RunBody,
        sandbox_wire::CommandBody,
        sandbox_wire::SizeBody,
        sandbox_wire::SignalBody,
        sandbox_wire::SignalName,
        sandbox_wire::ContextBody,
        sandbox_wire::PathBody,
        sandbox_wire::MoveBody,
        sandbox_wire::ChmodBody,
        sandbox_answer::SandboxBody<'static>,
        sandbox_answer::SandboxState,
        sandbox_answer::EndReasonName,
        sandbox_answer::SandboxLimitsBody,
        sandbox_answer::SandboxList<'static>,
        sandbox_answer::CheckpointAnswer<'static>,
        sandbox_answer::CheckpointList<'static>,
        sandbox_answer::ResultSchema,
        sandbox_answer::CellErrorBody<'static>,
        sandbox_answer::RunEndBody,
        sandbox_answer::RunOutcomeName,
        sandbox_answer::OutputBody<'static>,
        sandbox_answer::CellAnswer<'static>,
        sandbox_answer::CommandAnswer<'static>,
        sandbox_answer::CommandBodyOut<'static>,
        sandbox_answer::CommandState,
        sandbox_answer::CommandList<'static>,
        sandbox_answer::ContextBodyOut<'static>,
        sandbox_answer::ContextList<'static>,
        sandbox_answer::EntryBody<'static>,
        sandbox_answer::EntryKindName,
        sandbox_answer::EntryList<'static>,
        sandbox_answer::ChangeBody<'static>,
        sandbox_answer::StartedBody,
        sandbox_answer::LostBody,
    )),
    modifiers(&Paths)
)]
struct Document;

/// The document as pretty JSON with a newline at its end.
pub fn openapi_json() -> Result<String, serde_json::Error> {
    let value = serde_json::to_value(Document::openapi())?;
    let mut text = serde_json::to_string_pretty(&value)?;
    text.push('\n');
    Ok(text)
}

/// Adds the paths. They are data here and not attributes of the handlers: all errors have one shape.
struct Paths;

impl Modify for Paths {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let key = SecurityScheme::Http(
            HttpBuilder::new()
                .scheme(HttpAuthScheme::Bearer)
                .description(Some(
                    "A key made by `zeroboot keys create`. A server without keys (loopback only) needs none.",
                ))
                .build(),
        );
        document.components.get_or_insert_with(Components::default).add_security_scheme("key", key);
        document.tags = Some(vec![
            TagBuilder::new().name("exec").description(Some("Running code")).build(),
            TagBuilder::new().name("sandboxes").description(Some("Long-lived sandboxes: many runs in one")).build(),
            TagBuilder::new().name("service").description(Some("The service itself")).build(),
        ]);
        let stream = "Events: `start` (schema Start), `stdout` and `stderr` (schema Chunk), `file` (schema File and a \
                      `path`), then `end` (schema End) or `error` (schema Error).";
        let exec = post(
            "exec",
            "Runs one piece of code in one fresh sandbox",
            "ExecRequest",
            &["400", "413", "415", "429", "500", "503"],
        )
        .description(Some(format!(
            "With `Accept: text/event-stream` the answer is a stream of events as they happen. {stream}"
        )))
        .response(
            "200",
            response("The code came to an outcome")
                .content("application/json", content("ExecAnswer"))
                .content("text/event-stream", ContentBuilder::new().schema(Some(text())).build()),
        );
        let batch = post("batch", "Runs several pieces of code, each in its own sandbox", "BatchRequest", &["400", "413", "415", "429", "500", "503"])
            .description(Some("The items run in parallel. The results keep the order; each is an answer or an error. Each item counts against the key's rate."))
            .response("200", response("Every item came to a result").content("application/json", content("BatchAnswer")));
        let health = get("health", "Says whether code can be run")
            .response("200", response("At least one template runs code").content("application/json", content("Health")))
            .response("503", response("No template runs code").content("application/json", content("Health")));
        let metrics = get("metrics", "Prometheus metrics")
            .security(SecurityRequirement::new("key", Vec::<String>::new()))
            .security(SecurityRequirement::default())
            .response(
                "200",
                response("The exposition").content("text/plain", ContentBuilder::new().schema(Some(text())).build()),
            )
            .response("401", failure("401"));
        let openapi = get("openapi", "This document").response(
            "200",
            response("OpenAPI 3.1")
                .content("application/json", ContentBuilder::new().schema(Some(Object::new())).build()),
        );
        let docs = get("docs", "The reference for people").response(
            "200",
            response("One page of HTML").content("text/html", ContentBuilder::new().schema(Some(text())).build()),
        );
        let page = get("page", "A page to try code on, unless it is switched off")
            .response(
                "200",
                response("One page of HTML").content("text/html", ContentBuilder::new().schema(Some(text())).build()),
            )
            .response("404", failure("404"));
        let path =
            |method, operation: OperationBuilder| PathItemBuilder::new().operation(method, operation.build()).build();
        let paths = PathsBuilder::new()
            .path("/v1/exec", path(HttpMethod::Post, exec))
            .path("/v1/exec/batch", path(HttpMethod::Post, batch))
            .path("/v1/health", path(HttpMethod::Get, health))
            .path("/v1/metrics", path(HttpMethod::Get, metrics))
            .path("/openapi.json", path(HttpMethod::Get, openapi))
            .path("/docs", path(HttpMethod::Get, docs))
            .path("/", path(HttpMethod::Get, page));
        document.paths = openapi_sandboxes::add(paths).build();
    }
}

fn get(id: &str, summary: &str) -> OperationBuilder {
    OperationBuilder::new().operation_id(Some(id)).summary(Some(summary)).tag("service")
}

fn post(id: &str, summary: &str, body: &str, failures: &[&str]) -> OperationBuilder {
    let body =
        RequestBodyBuilder::new().required(Some(Required::True)).content("application/json", content(body)).build();
    let start = OperationBuilder::new()
        .operation_id(Some(id))
        .summary(Some(summary))
        .tag("exec")
        .security(SecurityRequirement::new("key", Vec::<String>::new()))
        .security(SecurityRequirement::default())
        .request_body(Some(body));
    ["401", "403", "408"]
        .iter()
        .chain(failures)
        .fold(start, |operation, status| operation.response(*status, failure(status)))
}

pub(crate) fn content(schema: &str) -> utoipa::openapi::Content {
    ContentBuilder::new().schema(Some(Ref::from_schema_name(schema))).build()
}

pub(crate) fn text() -> Object {
    utoipa::openapi::ObjectBuilder::new().schema_type(Type::String).build()
}

pub(crate) fn response(description: &str) -> ResponseBuilder {
    let id = utoipa::openapi::ObjectBuilder::new()
        .schema_type(Type::String)
        .format(Some(SchemaFormat::KnownFormat(utoipa::openapi::KnownFormat::Uuid)))
        .build();
    let header = HeaderBuilder::new().schema(Some(id)).description(Some("Also in the server's log")).build();
    ResponseBuilder::new().description(description).header("X-Request-Id", header)
}

/// An error answer with the codes that this status can carry.
pub(crate) fn failure(status: &str) -> RefOr<utoipa::openapi::Response> {
    let codes = error::ERROR_CODES.iter().filter(|(_, known, _)| known.to_string() == status);
    let words: Vec<String> = codes.map(|(code, _, meaning)| format!("`{code}`: {meaning}")).collect();
    let mut built = response(&words.join("; ")).content("application/json", content("Error"));
    if matches!(status, "429" | "503") {
        let seconds = utoipa::openapi::ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(1)).build();
        built = built
            .header("Retry-After", HeaderBuilder::new().schema(Some(seconds)).description(Some("Seconds")).build());
    }
    RefOr::T(built.build())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_document_is_the_one_that_the_types_give() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../openapi/zeroboot.json");
        let made = openapi_json().unwrap();
        if std::env::var_os("ZEROBOOT_UPDATE_OPENAPI").is_some() {
            std::fs::write(path, &made).unwrap();
        }
        let committed = std::fs::read_to_string(path).unwrap();
        assert!(
            committed == made,
            "openapi/zeroboot.json is out of date; run this test with ZEROBOOT_UPDATE_OPENAPI=1"
        );
    }

    #[test]
    fn the_words_of_the_schema_are_those_of_the_engine() {
        let value: serde_json::Value = serde_json::from_str(&openapi_json().unwrap()).unwrap();
        let outcomes = &value["components"]["schemas"]["OutcomeName"]["enum"];
        assert_eq!(*outcomes, serde_json::json!(zeroboot_engine::Outcome::NAMES));
        assert_eq!(value["components"]["schemas"]["IsolationName"]["enum"], serde_json::json!(["vm", "process"]));
        assert_eq!(value["components"]["schemas"]["ExecRequest"]["additionalProperties"], serde_json::json!(false));
    }

    #[test]
    fn every_reference_leads_to_a_schema() {
        let value: serde_json::Value = serde_json::from_str(&openapi_json().unwrap()).unwrap();
        fn walk(value: &serde_json::Value, root: &serde_json::Value) {
            match value {
                serde_json::Value::Object(map) => {
                    if let Some(serde_json::Value::String(to)) = map.get("$ref") {
                        let at = to.strip_prefix('#').unwrap();
                        assert!(root.pointer(at).is_some(), "{to}");
                    }
                    map.values().for_each(|value| walk(value, root));
                }
                serde_json::Value::Array(list) => list.iter().for_each(|value| walk(value, root)),
                _ => {}
            }
        }
        walk(&value, &value);
    }
}
