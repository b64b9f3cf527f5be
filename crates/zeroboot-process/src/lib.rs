//! Engine 2: sandboxes that are forks of a warmed process, where a host has no usable KVM.
//!
//! ```text
//! zygote            in its own mount namespace: a read-only root with what the runtime needs
//!   └─ clone3 into fresh user, mount, pid, net, ipc, uts and cgroup namespaces
//!      worker       pid 1 of the sandbox: private /tmp, home and /proc; execs the agent
//!        └─ fork    the runner: Landlock, seccomp, no capabilities; waits for its request
//! ```
//!
//! The Python zygote *is* the warmed interpreter: it calls [`serve`] through the `zeroboot-pyfork` library,
//! which returns in each runner. Node cannot be forked while warm, so its runner is started by exec.

mod cache;
mod discover;
mod environment;
mod ids;
mod image;
mod layout;
mod meeting;
mod remembered;
mod serve;
mod zygote;

pub use cache::keep_in;
pub use discover::{DiscoverError, HostRuntime, node, python};
pub use environment::{EnvironmentError, node_environment, python_environment};
pub use ids::shared_because;
pub use layout::{AGENT, HOME, PYFORK, RUNNER_NODE, RUNNER_PYTHON};
pub use serve::{Freeze, ServeError, Served, serve};
pub use zygote::{Assets, ZygoteConfig, run_zygote, serve_python};
