//! What the binary carries inside.

use zeroboot_process::Assets;

/// The agent, the Python fork library and the runners.
pub(crate) const ASSETS: Assets = Assets {
    agent: include_bytes!(concat!(env!("OUT_DIR"), "/agent")),
    pyfork: include_bytes!(concat!(env!("OUT_DIR"), "/pyfork.so")),
    runner_python: zeroboot_runtimes::PYTHON,
    runner_node: zeroboot_runtimes::NODE,
};
