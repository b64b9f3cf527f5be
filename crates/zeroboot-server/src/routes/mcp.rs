//! `/mcp`: the Model Context Protocol over HTTP, for whoever has a key. Its tools ask the API's own routes, in the name of
//! the key that asks for them.

use std::{any::Any, sync::Arc};

use axum::{Router, body::Body, extract::Request, response::Response, routing::any};
use bytes::Bytes;
use http::{Method, StatusCode, header, request::Parts};
use http_body_util::{BodyExt as _, Full, Limited};
use rmcp::transport::streamable_http_server::{
    StreamableHttpServerConfig, StreamableHttpService, session::local::LocalSessionManager,
};
use tower::ServiceExt as _;
use zeroboot_mcp::{Api, Asker, Mcp, NoAnswer, NoSession, Sent};

use crate::{
    app::App,
    body::read_whole,
    call::Call,
    error::ApiError,
    peer::{Asked, Peer},
};

/// Most bytes of an answer that a tool takes. Output is bounded below that by the server; a file is asked for in parts.
const MAX_ANSWER: usize = 64 << 20;

/// The route, whose tools ask the routes of `api`.
pub(crate) fn route(api: Router, app: &Arc<App>) -> Router<Arc<App>> {
    let api: Arc<dyn Api> = Arc::new(Local { api, app: app.clone() });
    // The server has looked at Host and Origin itself.
    let config = StreamableHttpServerConfig::default()
        .disable_allowed_hosts()
        .disable_allowed_origins()
        .with_cancellation_token(app.mcp_ends.clone());
    let sessions = Arc::new(LocalSessionManager::default());
    let service = StreamableHttpService::new(move || Ok(Mcp::new(api.clone())), sessions, config);
    Router::new().route("/mcp", any(move |call: Call, request: Request| answer(service.clone(), call, request)))
}

type Service = StreamableHttpService<Mcp, LocalSessionManager>;

/// Answers a request under the limits of its key. What is held for it is held until its answer has ended.
async fn answer(service: Service, call: Call, request: Request) -> Result<Response, ApiError> {
    let (mut head, body) = request.into_parts();
    let body = read_whole(body, call.limits(), &call.share).await?;
    // A session goes on when the connection of a request of it has ended, and must not keep that one's place.
    if let Some(asked) = head.extensions.get_mut::<Asked>() {
        asked.peer = Peer { ip: asked.peer.ip, ..Peer::default() };
    }
    let request = Request::from_parts(head, Full::new(Bytes::from(body)));
    let is_end = request.method() == Method::DELETE;
    let Ok(mut answer) = service.oneshot(request).await;
    if is_end && answer.status() == StatusCode::ACCEPTED {
        // The session has ended. The official Python client takes any other success for a failure.
        *answer.status_mut() = StatusCode::NO_CONTENT;
    }
    let held = move |frame| {
        let _until_its_end = &call;
        frame
    };
    Ok(answer.map(|body| Body::new(body.map_frame(held))))
}

/// The routes of this server.
struct Local {
    api: Router,
    app: Arc<App>,
}

impl Api for Local {
    fn send<'a>(&'a self, asker: &'a Asker, request: http::Request<Bytes>) -> Sent<'a> {
        Box::pin(async move {
            let (mut head, body) = request.into_parts();
            if let Some(asker) = asker {
                in_the_name_of(asker, &mut head);
            }
            let request = Request::from_parts(head, Body::new(Full::new(body)));
            let Ok(answer) = self.api.clone().oneshot(request).await;
            let (head, body) = answer.into_parts();
            let body = Limited::new(body, MAX_ANSWER).collect().await.map_err(|error| NoAnswer(error.to_string()))?;
            Ok(http::Response::from_parts(head, body.to_bytes()))
        })
    }

    fn begin(&self, asker: &Asker) -> Result<Box<dyn Any + Send>, NoSession> {
        let caller = asker.as_ref().and_then(|asker| asker.extensions.get::<Asked>()).map(|asked| &asked.caller);
        let Some(caller) = caller else { return Ok(Box::new(())) };
        // A session is held as long as a stream is.
        let open = self.app.streams.enter(caller).map_err(|error| NoSession(error.message))?;
        Ok(Box::new(open))
    }
}

/// Who asks, and from where: what the limits of a key and of an address go by.
fn in_the_name_of(asker: &Parts, head: &mut Parts) {
    for name in [header::AUTHORIZATION, header::HOST] {
        if let Some(value) = asker.headers.get(&name) {
            head.headers.insert(name, value.clone());
        }
    }
    for name in ["x-api-key", "x-forwarded-for"] {
        for value in asker.headers.get_all(name) {
            head.headers.append(name, value.clone());
        }
    }
    if let Some(asked) = asker.extensions.get::<Asked>() {
        head.extensions.insert(Peer { ip: asked.peer.ip, ..Peer::default() });
    }
}
