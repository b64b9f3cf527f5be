//! What a VM template is made from.

pub mod apt;
pub mod cpio;
pub mod kernel;
pub mod paths;
