//! The paths of sandboxes that live, as data.

use utoipa::openapi::{
    Required,
    content::ContentBuilder,
    path::{HttpMethod, Operation, OperationBuilder, ParameterBuilder, ParameterIn, PathItem, PathsBuilder},
    request_body::RequestBodyBuilder,
    schema::{ObjectBuilder, Schema, SchemaFormat, Type},
    security::SecurityRequirement,
};

use crate::{
    openapi::{content, failure, response},
    params::MOST_OFFSET,
};

/// What every request about sandboxes can be answered with.
const ALWAYS: [&str; 4] = ["401", "403", "429", "503"];
/// The same, where the path names a sandbox.
const OF_ONE: [&str; 2] = ["404", "410"];
/// Of what the sandbox itself may refuse.
const REFUSALS: [&str; 4] = ["400", "409", "500", "507"];
const OF_BODIES: [&str; 4] = ["400", "408", "413", "415"];

const EVENTS: &str = "Events: `started` (schema RunStarted), `stdout` and `stderr` (Chunk), `result` (Result), `error` \
                      (CellError), `lost` (OutputLost), then `end` (RunEnd) or `failure` (Error). The `id` of each is the \
                      offset to go on from.";

/// One operation, built up.
struct Op(OperationBuilder);

impl Op {
    fn new(id: &str, summary: &str) -> Op {
        let start = OperationBuilder::new()
            .operation_id(Some(id))
            .summary(Some(summary))
            .tag("sandboxes")
            .security(SecurityRequirement::new("key", Vec::<String>::new()))
            .security(SecurityRequirement::default());
        Op(start).failures(&ALWAYS)
    }

    /// About the sandbox that the path names.
    fn of_one(id: &str, summary: &str) -> Op {
        Op::new(id, summary).in_path("id", true).failures(&OF_ONE)
    }

    fn failures(self, statuses: &[&str]) -> Op {
        Op(statuses.iter().fold(self.0, |operation, status| operation.response(*status, failure(status))))
    }

    fn about(self, text: &str) -> Op {
        Op(self.0.description(Some(text)))
    }

    fn in_path(self, name: &str, id: bool) -> Op {
        let schema = if id { uuid() } else { string() };
        self.param(name, ParameterIn::Path, true, schema)
    }

    fn query(self, name: &str, needed: bool, schema: Schema) -> Op {
        self.param(name, ParameterIn::Query, needed, schema).failures(&["400"])
    }

    fn param(self, name: &str, place: ParameterIn, needed: bool, schema: Schema) -> Op {
        let needed = if needed { Required::True } else { Required::False };
        Op(self.0.parameter(
            ParameterBuilder::new().name(name).parameter_in(place).required(needed).schema(Some(schema)).build(),
        ))
    }

    fn body(self, schema: &str) -> Op {
        let body =
            RequestBodyBuilder::new().required(Some(Required::True)).content("application/json", content(schema));
        Op(self.0.request_body(Some(body.build()))).failures(&OF_BODIES)
    }

    fn bytes(self) -> Op {
        let bytes = ContentBuilder::new().schema(Some(binary())).build();
        let body = RequestBodyBuilder::new().required(Some(Required::True)).content("application/octet-stream", bytes);
        Op(self.0.request_body(Some(body.build()))).failures(&["400", "408"])
    }

    fn answer(self, status: &str, words: &str, schema: &str) -> Op {
        Op(self.0.response(status, response(words).content("application/json", content(schema))))
    }

    fn events(self, words: &str, schema: Option<&str>) -> Op {
        let mut built =
            response(words).content("text/event-stream", ContentBuilder::new().schema(Some(event())).build());
        if let Some(schema) = schema {
            built = built.content("application/json", content(schema));
        }
        Op(self.0.response("200", built))
    }

    fn nothing(self, words: &str) -> Op {
        Op(self.0.response("204", response(words)))
    }

    fn done(self) -> Operation {
        self.0.build()
    }
}

fn string() -> Schema {
    Schema::Object(ObjectBuilder::new().schema_type(Type::String).build())
}

fn uuid() -> Schema {
    let format = SchemaFormat::KnownFormat(utoipa::openapi::KnownFormat::Uuid);
    Schema::Object(ObjectBuilder::new().schema_type(Type::String).format(Some(format)).build())
}

/// One event of a stream.
fn event() -> Schema {
    let event =
        ["event", "data", "id"].iter().fold(ObjectBuilder::new(), |built, name| built.property(*name, string()));
    Schema::Object(event.schema_type(Type::Object).build())
}

fn flag() -> Schema {
    Schema::Object(ObjectBuilder::new().schema_type(Type::Boolean).build())
}

fn number(least: u64, most: u64) -> Schema {
    let whole = ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(least)).maximum(Some(most));
    Schema::Object(whole.build())
}

fn binary() -> Schema {
    let format = SchemaFormat::KnownFormat(utoipa::openapi::KnownFormat::Binary);
    Schema::Object(ObjectBuilder::new().schema_type(Type::String).format(Some(format)).build())
}

/// Adds all paths of sandboxes.
pub(crate) fn add(paths: PathsBuilder) -> PathsBuilder {
    let item = |operations: Vec<(HttpMethod, Op)>| {
        let mut item = PathItem::default();
        for (method, op) in operations {
            let operation = Some(op.done());
            match method {
                HttpMethod::Get => item.get = operation,
                HttpMethod::Put => item.put = operation,
                HttpMethod::Delete => item.delete = operation,
                _ => item.post = operation,
            }
        }
        item
    };
    use HttpMethod::{Delete, Get, Post, Put};
    let command = |id, summary| Op::of_one(id, summary).in_path("run", true);
    let context = |id, summary| Op::of_one(id, summary).in_path("name", false).failures(&REFUSALS);
    let file = |id, summary| Op::of_one(id, summary).failures(&REFUSALS);
    let terminal = |op: Op| {
        let op = Op(op.0.response("101", response("A WebSocket; see docs/api.md for its messages")));
        op.failures(&["400", "409", "500"])
    };
    paths
        .path(
            "/v1/sandboxes",
            item(vec![
                (
                    Post,
                    Op::new("createSandbox", "Makes a sandbox that lives until its lease ends")
                        .body("CreateSandbox")
                        .answer("201", "It lives", "Sandbox")
                        .failures(&["500"]),
                ),
                (
                    Get,
                    Op::new("listSandboxes", "The key's sandboxes that live")
                        .query("metadata", false, string())
                        .query("limit", false, number(1, 1000))
                        .query("cursor", false, uuid())
                        .answer("200", "The oldest first", "SandboxList"),
                ),
            ]),
        )
        .path(
            "/v1/sandboxes/{id}",
            item(vec![
                (Get, Op::of_one("showSandbox", "A sandbox as it is now").answer("200", "It lives", "Sandbox")),
                (Delete, Op::of_one("deleteSandbox", "Ends a sandbox").nothing("It has ended")),
            ]),
        )
        .path(
            "/v1/sandboxes/{id}/extend",
            item(vec![(
                Post,
                Op::of_one("extendSandbox", "Lets a sandbox's lease end so long from now")
                    .body("ExtendSandbox")
                    .answer("200", "Its new lease", "Sandbox"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/run",
            item(vec![(
                Post,
                Op::of_one("runCell", "Runs a cell in a context, whose state stays")
                    .about(&format!("With `Accept: text/event-stream` the answer is a stream of events. {EVENTS}"))
                    .body("RunCell")
                    .failures(&REFUSALS)
                    .events("The cell came to an outcome", Some("CellAnswer")),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/contexts",
            item(vec![
                (
                    Get,
                    Op::of_one("listContexts", "The contexts of a sandbox").failures(&["500"]).answer(
                        "200",
                        "All of them",
                        "ContextList",
                    ),
                ),
                (
                    Post,
                    Op::of_one("createContext", "A new interpreter with a state of its own")
                        .body("CreateContext")
                        .failures(&REFUSALS)
                        .answer("201", "It is there", "Context"),
                ),
            ]),
        )
        .path(
            "/v1/sandboxes/{id}/contexts/{name}",
            item(vec![(Delete, context("deleteContext", "Ends a context's interpreter").nothing("It is gone"))]),
        )
        .path(
            "/v1/sandboxes/{id}/contexts/{name}/interrupt",
            item(vec![(Post, context("interruptContext", "Interrupts the cell that runs").nothing("It was told"))]),
        )
        .path(
            "/v1/sandboxes/{id}/contexts/{name}/restart",
            item(vec![(
                Post,
                context("restartContext", "A new interpreter in the place of a context's own").answer(
                    "200",
                    "Its state is gone",
                    "Context",
                ),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/commands",
            item(vec![
                (
                    Get,
                    Op::of_one("listCommands", "Commands that run, and the last that have ended").answer(
                        "200",
                        "The oldest first",
                        "CommandList",
                    ),
                ),
                (
                    Post,
                    Op::of_one("startCommand", "Runs a program")
                        .about(&format!(
                            "With `background` it is answered as soon as the program has started. With \
                             `Accept: text/event-stream` the answer is a stream of events. {EVENTS}"
                        ))
                        .body("StartCommand")
                        .failures(&REFUSALS)
                        .events("The program came to an end", Some("CommandAnswer"))
                        .answer("201", "It runs in the background", "Command"),
                ),
            ]),
        )
        .path(
            "/v1/sandboxes/{id}/commands/{run}",
            item(vec![
                (Get, command("showCommand", "A command as it is now").answer("200", "It is known", "Command")),
                (
                    Delete,
                    command("killCommand", "Kills a command; one that has ended is forgotten").nothing("It was told"),
                ),
            ]),
        )
        .path(
            "/v1/sandboxes/{id}/commands/{run}/output",
            item(vec![(
                Get,
                command("followCommand", "A command's output from an offset on, as it comes")
                    .about(EVENTS)
                    .query("offset", false, number(0, MOST_OFFSET))
                    .events("Its events", None),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/commands/{run}/stdin",
            item(vec![(
                Post,
                command("writeStdin", "Writes to a command's standard input")
                    .query("end", false, flag())
                    .bytes()
                    .failures(&["409"])
                    .nothing("The sandbox has it"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/commands/{run}/signal",
            item(vec![(
                Post,
                command("signalCommand", "Sends a signal to a command")
                    .body("SendSignal")
                    .failures(&["409"])
                    .nothing("It was sent"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/commands/{run}/resize",
            item(vec![(
                Post,
                command("resizeCommand", "Sets the size of a command's terminal")
                    .body("TerminalSize")
                    .failures(&["409"])
                    .nothing("It was told"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/commands/{run}/terminal",
            item(vec![(
                Get,
                terminal(command("attachTerminal", "Follows a command's terminal over a WebSocket")).query(
                    "offset",
                    false,
                    number(0, MOST_OFFSET),
                ),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/terminal",
            item(vec![(
                Get,
                terminal(Op::of_one("startTerminal", "Starts a program on a terminal, over a WebSocket"))
                    .query("columns", false, number(1, u16::MAX.into()))
                    .query("rows", false, number(1, u16::MAX.into()))
                    .query("command", false, string())
                    .query("cwd", false, string())
                    .query("tag", false, string())
                    .query("end_with_client", false, flag()),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/files",
            item(vec![
                (Get, {
                    let bytes = || ContentBuilder::new().schema(Some(binary())).build();
                    let op = file("readFile", "A file's bytes").query("path", true, string()).failures(&["416"]);
                    let whole = response("All of them").content("application/octet-stream", bytes());
                    let part = response("The range that was asked for").content("application/octet-stream", bytes());
                    Op(op.0.response("200", whole).response("206", part))
                }),
                (
                    Put,
                    file("writeFile", "Writes a file, which appears when it is whole; makes its directories")
                        .query("path", true, string())
                        .query("mode", false, string())
                        .bytes()
                        .answer("200", "It is there", "Entry"),
                ),
                (
                    Delete,
                    file("removeFile", "Removes a file or directory")
                        .query("path", true, string())
                        .query("recursive", false, flag())
                        .nothing("It is gone"),
                ),
            ]),
        )
        .path(
            "/v1/sandboxes/{id}/files/stat",
            item(vec![(
                Get,
                file("statFile", "What a name stands for").query("path", true, string()).answer("200", "It", "Entry"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/files/list",
            item(vec![(
                Get,
                file("listFiles", "What is in a directory")
                    .query("path", false, string())
                    .query("depth", false, number(1, 64))
                    .answer("200", "All of it", "EntryList"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/files/mkdir",
            item(vec![(
                Post,
                file("makeDirectory", "Makes a directory and its parents").body("MakeDirectory").answer(
                    "200",
                    "It is there",
                    "Entry",
                ),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/files/move",
            item(vec![(
                Post,
                file("moveFile", "Gives a file another name").body("MoveFile").answer("200", "Its new name", "Entry"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/files/chmod",
            item(vec![(
                Post,
                file("chmodFile", "Sets a file's permissions").body("ChangeMode").answer(
                    "200",
                    "Its permissions",
                    "Entry",
                ),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/files/watch",
            item(vec![(
                Get,
                file("watchFiles", "What changes below a directory, as it happens")
                    .about(
                        "Events: `watching`, then `created`, `modified`, `removed` and `overflow` (schema Change), and \
                         `failure` (Error) if it cannot go on.",
                    )
                    .query("path", false, string())
                    .query("recursive", false, flag())
                    .events("Its events", None),
            )]),
        )
}
