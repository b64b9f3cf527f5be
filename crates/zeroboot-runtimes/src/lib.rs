//! The runners of `runtimes/`, each packed into one file by the build script.

/// The Python runner: a zipapp.
pub const PYTHON: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/python.pyz"));
/// The Node runner: one script.
pub const NODE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/node.cjs"));
/// Where the build left [`PYTHON`], for tests that start it.
pub const PYTHON_PATH: &str = concat!(env!("OUT_DIR"), "/python.pyz");
/// Where the build left [`NODE`], for tests that start it.
pub const NODE_PATH: &str = concat!(env!("OUT_DIR"), "/node.cjs");
