//! The routes.

pub(crate) mod batch;
pub(crate) mod checkpoints;
pub(crate) mod contexts;
pub(crate) mod docs;
pub(crate) mod exec;
pub(crate) mod files;
pub(crate) mod follow;
pub(crate) mod mcp;
pub(crate) mod page;
pub(crate) mod runs;
pub(crate) mod sandboxes;
pub(crate) mod status;
mod stream;
pub(crate) mod terminal;

pub(crate) use stream::StartBody;
