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
mod manifest;
mod recipe;
mod rootfs;
mod store;
mod tree;
mod unpack;

pub use assemble::{AssembleError, Assembled, KernelSource, Progress, Provenance, RootfsSource, Sources, assemble};
pub use manifest::{FileFacts, Manifest, ManifestError, WarmUp};
pub use recipe::{Recipe, RecipeError, Runtime};
pub use rootfs::RootfsError;
pub use store::{Built, Draft, Listed, MEMORY_FILE, STATE_FILE, Store, StoreError, Template, memory_hash};
