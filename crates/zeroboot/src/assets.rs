//! What the binary carries inside.

use zeroboot_process::Assets;

/// The agent, the Python fork library and the runners.
pub(crate) const ASSETS: Assets = Assets {
    agent: include_bytes!(concat!(env!("OUT_DIR"), "/agent")),
    pyfork: include_bytes!(concat!(env!("OUT_DIR"), "/pyfork.so")),
    runner_python: include_bytes!("../../../runtimes/python/runner.py"),
    runner_node: include_bytes!("../../../runtimes/node/runner.cjs"),
};
