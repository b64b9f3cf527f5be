//! The Model Context Protocol over Zeroboot's HTTP API: tools with which an agent runs code.
//!
//! [`Mcp`] serves one session. It asks an [`Api`], which is a server in this process or elsewhere; what it may do is
//! what the key of its asker may do.

mod api;
mod session;
mod show;
mod tools;

pub use api::{Api, Asker, NoAnswer, NoSession, Sent, checkpoint, path, query};
pub use session::Session;
pub use tools::Mcp;
