//! The only host crate with `unsafe`: process creation, namespaces, mounts, filters, the control channel
//! between front and zygote; KVM handles, memory images and the vCPU kick.

pub mod arena;
pub mod confined;
pub mod control;
pub mod delta;
pub mod image;
pub mod jail;
pub mod kick;
pub mod kvm;
pub mod memory;
pub mod mount;
pub mod net;
pub mod process;
mod tree;
