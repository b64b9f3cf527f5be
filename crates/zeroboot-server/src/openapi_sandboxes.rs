//! The paths of long-lived sandboxes, as data.

use utoipa::openapi::{
    Required,
    content::ContentBuilder,
    header::HeaderBuilder,
    path::{HttpMethod, Operation, OperationBuilder, ParameterBuilder, ParameterIn, PathItem, PathsBuilder},
    request_body::RequestBodyBuilder,
    schema::{ObjectBuilder, Schema, SchemaFormat, Type},
    security::SecurityRequirement,
};

use crate::{
    openapi::{content, failure, response},
    params::MOST_OFFSET,
    routes::follow::RUN_ID,
};

/// Statuses of the errors of every request about sandboxes.
const ALWAYS: [&str; 4] = ["401", "403", "429", "503"];
/// More of them, where the path names a sandbox.
const OF_ONE: [&str; 2] = ["404", "410"];
/// Statuses of the errors that the sandbox itself can give.
const REFUSALS: [&str; 4] = ["400", "409", "500", "507"];
/// Statuses of the errors of saving a sandbox.
const SAVING: [&str; 3] = ["409", "500", "501"];
const OF_BODIES: [&str; 4] = ["400", "408", "413", "415"];

const EVENTS: &str = "Events: `started` (schema RunStarted), `stdout` and `stderr` (Chunk), `result` (Result), `error` \
                      (CellError), `lost` (OutputLost), then `end` (RunEnd) or `failure` (Error). The `id` of each is the \
                      offset to go on from.";

const BYTES: &str = "With `Accept: application/octet-stream` the answer is standard output alone, byte for byte, as it comes; it \
                     is cut off where it cannot be whole. The run's id is in the header `zeroboot-run-id`, and its end in the \
                     command.";

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

    /// About the checkpoint that the path names.
    fn of_checkpoint(id: &str, summary: &str) -> Op {
        Op::new(id, summary).in_path("id", true).failures(&["404"])
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

    /// `bytes`: also one stream's own, with the run's id in a header.
    fn events(self, words: &str, schema: Option<&str>, bytes: bool) -> Op {
        let mut built =
            response(words).content("text/event-stream", ContentBuilder::new().schema(Some(event())).build());
        if bytes {
            let content = ContentBuilder::new().schema(Some(binary())).build();
            let header =
                HeaderBuilder::new().schema(Some(uuid())).description(Some("With bytes: the run's id")).build();
            built = built.content("application/octet-stream", content).header(RUN_ID, header);
        }
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
                    Op::new("createSandbox", "Makes a long-lived sandbox, which ends with its lease")
                        .body("CreateSandbox")
                        .answer("201", "The sandbox", "Sandbox")
                        .failures(&["500"]),
                ),
                (
                    Get,
                    Op::new("listSandboxes", "Lists the key's sandboxes")
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
                (Get, Op::of_one("showSandbox", "Shows a sandbox").answer("200", "The sandbox", "Sandbox")),
                (Delete, Op::of_one("deleteSandbox", "Ends a sandbox").nothing("The sandbox has ended")),
            ]),
        )
        .path(
            "/v1/sandboxes/{id}/extend",
            item(vec![(
                Post,
                Op::of_one("extendSandbox", "Sets the lease of a sandbox, counted from now")
                    .body("ExtendSandbox")
                    .answer("200", "The sandbox with its new lease", "Sandbox"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/branch",
            item(vec![(
                Post,
                Op::of_one("branchSandbox", "Makes sandboxes that begin where this one is now; it goes on")
                    .about(
                        "VM engine. Memory, files, processes and contexts are the origin's at that moment, and so are the \
                         secrets in its memory. What differs is told before anything of it runs: random generators, wall \
                         clock, host name. Commands and cells under way go on in each, under the same ids.",
                    )
                    .body("BranchSandbox")
                    .failures(&SAVING)
                    .answer("201", "The branches", "SandboxList"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/checkpoints",
            item(vec![(
                Post,
                Op::of_one("createCheckpoint", "Keeps this moment of a sandbox, which goes on")
                    .about(
                        "VM engine. The checkpoint is kept in memory until its time is over, it is removed, or the server or                          its template's zygote ends. It has what a branch would have, secrets in memory included.",
                    )
                    .body("CreateCheckpoint")
                    .failures(&SAVING)
                    .answer("201", "The checkpoint", "Checkpoint"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/rollback",
            item(vec![(
                Post,
                Op::of_one("rollBackSandbox", "Takes a sandbox back to a checkpoint of it, under the same id")
                    .about(
                        "What runs in it now ends as `sandbox_gone` with the reason `replaced`. Id, lease and metadata stay.                          While it goes on there must be room for one sandbox more.",
                    )
                    .body("RollBackSandbox")
                    .failures(&SAVING)
                    .answer("200", "The sandbox as it was", "Sandbox"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/promote",
            item(vec![(
                Post,
                Op::of_one("promoteSandbox", "Lets a branch take over the id of its origin, which ends")
                    .failures(&SAVING)
                    .answer("200", "The branch under its new id", "Sandbox"),
            )]),
        )
        .path(
            "/v1/checkpoints",
            item(vec![(
                Get,
                Op::new("listCheckpoints", "Lists the key's checkpoints")
                    .query("sandbox_id", false, uuid())
                    .answer("200", "The oldest first", "CheckpointList"),
            )]),
        )
        .path(
            "/v1/checkpoints/{id}",
            item(vec![
                (
                    Get,
                    Op::of_checkpoint("showCheckpoint", "Shows a checkpoint").answer("200", "The checkpoint", "Checkpoint"),
                ),
                (
                    Delete,
                    Op::of_checkpoint("deleteCheckpoint", "Removes a checkpoint; sandboxes that began there stay")
                        .nothing("The checkpoint is gone"),
                ),
            ]),
        )
        .path(
            "/v1/checkpoints/{id}/restore",
            item(vec![(
                Post,
                Op::of_checkpoint("restoreCheckpoint", "Makes sandboxes that begin at a checkpoint")
                    .body("BranchSandbox")
                    .failures(&["410", "500"])
                    .answer("201", "The sandboxes", "SandboxList"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/run",
            item(vec![(
                Post,
                Op::of_one("runCell", "Runs a cell in a context, which keeps its state")
                    .about(&format!("With `Accept: text/event-stream` the answer is a stream of events. {EVENTS}"))
                    .body("RunCell")
                    .failures(&REFUSALS)
                    .events("The cell came to an outcome", Some("CellAnswer"), false),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/contexts",
            item(vec![
                (
                    Get,
                    Op::of_one("listContexts", "Lists the contexts of a sandbox").failures(&["500"]).answer(
                        "200",
                        "All contexts",
                        "ContextList",
                    ),
                ),
                (
                    Post,
                    Op::of_one("createContext", "Starts an interpreter with its own state")
                        .body("CreateContext")
                        .failures(&REFUSALS)
                        .answer("201", "The new context", "Context"),
                ),
            ]),
        )
        .path(
            "/v1/sandboxes/{id}/contexts/{name}",
            item(vec![(
                Delete,
                context("deleteContext", "Ends a context's interpreter").nothing("The context has ended"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/contexts/{name}/interrupt",
            item(vec![(
                Post,
                context("interruptContext", "Interrupts the cell that runs")
                    .nothing("The interpreter has the interrupt"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/contexts/{name}/restart",
            item(vec![(
                Post,
                context("restartContext", "Replaces the interpreter of a context by a new one").answer(
                    "200",
                    "The context without its former state",
                    "Context",
                ),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/commands",
            item(vec![
                (
                    Get,
                    Op::of_one("listCommands", "Lists the commands that run and the last that ended").answer(
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
                             `Accept: text/event-stream` the answer is a stream of events. {EVENTS} {BYTES}"
                        ))
                        .body("StartCommand")
                        .failures(&REFUSALS)
                        .events("The program came to an end", Some("CommandAnswer"), true)
                        .answer("201", "It runs in the background", "Command"),
                ),
            ]),
        )
        .path(
            "/v1/sandboxes/{id}/commands/{run}",
            item(vec![
                (Get, command("showCommand", "Shows a command").answer("200", "The command", "Command")),
                (
                    Delete,
                    command("killCommand", "Kills a command; the server forgets one that has ended")
                        .nothing("The command was killed or forgotten"),
                ),
            ]),
        )
        .path(
            "/v1/sandboxes/{id}/commands/{run}/output",
            item(vec![(
                Get,
                command("followCommand", "A command's output from an offset on, as it comes")
                    .about(&format!("{EVENTS} {BYTES}"))
                    .query("offset", false, number(0, MOST_OFFSET))
                    .events("Its events", None, true),
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
                    .nothing("The sandbox has the input"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/commands/{run}/signal",
            item(vec![(
                Post,
                command("signalCommand", "Sends a signal to a command")
                    .body("SendSignal")
                    .failures(&["409"])
                    .nothing("The signal was sent"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/commands/{run}/resize",
            item(vec![(
                Post,
                command("resizeCommand", "Sets the size of a command's terminal")
                    .body("TerminalSize")
                    .failures(&["409"])
                    .nothing("The terminal has the new size"),
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
                    let op = file("readFile", "Reads a file's bytes").query("path", true, string()).failures(&["416"]);
                    let whole = response("The whole file").content("application/octet-stream", bytes());
                    let part = response("The requested range").content("application/octet-stream", bytes());
                    Op(op.0.response("200", whole).response("206", part))
                }),
                (
                    Put,
                    file("writeFile", "Writes a file, which appears when it is complete; makes its directories")
                        .query("path", true, string())
                        .query("mode", false, string())
                        .bytes()
                        .answer("200", "The file", "Entry"),
                ),
                (
                    Delete,
                    file("removeFile", "Removes a file or directory")
                        .query("path", true, string())
                        .query("recursive", false, flag())
                        .nothing("The file was removed"),
                ),
            ]),
        )
        .path(
            "/v1/sandboxes/{id}/files/stat",
            item(vec![(
                Get,
                file("statFile", "Describes a file").query("path", true, string()).answer("200", "The file", "Entry"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/files/list",
            item(vec![(
                Get,
                file("listFiles", "Lists a directory")
                    .query("path", false, string())
                    .query("depth", false, number(1, 64))
                    .answer("200", "The entries of the directory", "EntryList"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/files/mkdir",
            item(vec![(
                Post,
                file("makeDirectory", "Makes a directory and its parents").body("MakeDirectory").answer(
                    "200",
                    "The directory",
                    "Entry",
                ),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/files/move",
            item(vec![(
                Post,
                file("moveFile", "Moves a file").body("MoveFile").answer("200", "The file under its new path", "Entry"),
            )]),
        )
        .path(
            "/v1/sandboxes/{id}/files/chmod",
            item(vec![(
                Post,
                file("chmodFile", "Sets a file's permissions").body("ChangeMode").answer(
                    "200",
                    "The file with its permissions",
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
                    .events("Its events", None, false),
            )]),
        )
}
