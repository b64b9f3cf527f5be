//! The only host crate with `unsafe`.

pub mod kick;
pub mod kvm;
pub mod memory;
