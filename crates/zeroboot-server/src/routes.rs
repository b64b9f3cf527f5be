//! The routes.

pub(crate) mod batch;
pub(crate) mod docs;
pub(crate) mod exec;
pub(crate) mod status;
mod stream;

pub(crate) use stream::StartBody;
