//! Sandboxes that live, over HTTP, with a real engine behind it ([`fixture`] says which).
#![allow(dead_code, reason = "the shared modules hold more than these tests need")]

mod cells;
#[path = "../http/client.rs"]
mod client;
mod commands;
mod files;
#[path = "../http/fixture.rs"]
mod fixture;
mod guest;
mod life;
mod many;
mod terminals;
