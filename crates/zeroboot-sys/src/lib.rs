//! The only host crate with `unsafe`: process creation, namespaces, mounts, filters, and the control
//! channel between front and zygote.

pub mod control;
pub mod jail;
pub mod mount;
pub mod process;
