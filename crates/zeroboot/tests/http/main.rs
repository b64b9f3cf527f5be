//! The HTTP API over real sockets, with the process engine behind it.

mod client;
mod exec;
mod fixture;
mod keys;
mod listen;
mod load;
mod logs;
mod service;
mod slow;
