//! What a VM template is made from, and where templates are kept.
//!
//! ```text
//! Recipe ── assemble (network, no KVM) ──> kernel + initramfs ── zeroboot-vm boots it (KVM, no network) ──> Store
//! ```

pub mod apt;
pub mod cpio;
pub mod kernel;
pub mod paths;

mod assemble;
mod recipe;
mod rootfs;
mod tree;

pub use assemble::{AssembleError, Assembled, KernelSource, Progress, Provenance, RootfsSource, Sources, assemble};
pub use recipe::{Recipe, RecipeError, Runtime};
pub use rootfs::RootfsError;
