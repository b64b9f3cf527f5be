//! The HTTP API over real sockets, with a real engine behind it ([`fixture`] says which).

mod client;
mod exec;
mod fixture;
mod keys;
mod limits;
mod listen;
mod load;
mod logs;
mod service;
mod slow;
