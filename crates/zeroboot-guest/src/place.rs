//! Where the agent is: alone in a VM, or beside others' processes under one kernel.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use zeroboot_proto::Identity;

use crate::vm;

/// Home and working directory of user code.
pub(crate) const HOME: &str = "/home/sandbox";
pub(crate) const USER: (u32, u32) = (1000, 1000);
/// The command line of one more interpreter, each word ended by a NUL.
const CONTEXT: &str = "/etc/zeroboot/context";
/// The environment of what runs in the sandbox, each `NAME=VALUE` ended by a NUL.
pub(crate) const ENVIRON: &str = "/etc/zeroboot/environ";

/// Where the agent is.
pub(crate) enum Place {
    /// PID 1 of a VM, and its root.
    Vm,
    /// A process sandbox, of whose one user it is.
    Process,
    /// A test: an ordinary program, whose runner was started with this command.
    Test(Vec<OsString>),
}

/// Why a machine got no identity of its own.
#[derive(Debug, thiserror::Error)]
#[error("cannot give the machine its identity: {0}")]
pub(crate) struct NoIdentity(#[from] std::io::Error);

impl Place {
    /// What has to be done at an identity, before the runner hears of it. An error means that no user code runs. In a
    /// process sandbox kernel generator and clock are the host's own, and the host name is set by who made the namespace.
    pub(crate) fn apply_identity(&self, identity: &Identity) -> Result<(), NoIdentity> {
        match self {
            Place::Vm => Ok(vm::apply_identity(identity)?),
            Place::Process | Place::Test(_) => Ok(()),
        }
    }

    /// What a sandbox that lives needs of its agent's process.
    pub(crate) fn go_first(&self) -> std::io::Result<()> {
        match self {
            Place::Vm => vm::go_first(),
            // It is never frozen.
            Place::Process | Place::Test(_) => Ok(()),
        }
    }

    /// Whom programs run as, and whose access to files counts; this process's own if `None`.
    pub(crate) fn user(&self) -> Option<(u32, u32)> {
        match self {
            Place::Vm => Some(USER),
            Place::Process | Place::Test(_) => None,
        }
    }

    /// What starting a program needs here beside what it needs everywhere.
    pub(crate) fn prepare(&self, command: &mut Command) {
        if let Place::Vm = self {
            vm::without_ports(command);
        }
    }

    /// Where relative paths begin.
    pub(crate) fn home(&self) -> PathBuf {
        match self {
            Place::Vm | Place::Process => HOME.into(),
            Place::Test(_) => std::env::current_dir().unwrap_or_default(),
        }
    }

    /// The environment of programs.
    pub(crate) fn environ(&self) -> std::io::Result<Vec<(OsString, OsString)>> {
        match self {
            Place::Vm | Place::Process => Ok(words(ENVIRON)?.into_iter().filter_map(split).collect()),
            Place::Test(_) => Ok(std::env::vars_os().collect()),
        }
    }

    /// The command of one more interpreter.
    pub(crate) fn context(&self) -> std::io::Result<Vec<OsString>> {
        match self {
            Place::Vm | Place::Process => words(CONTEXT),
            Place::Test(command) => Ok(command.clone()),
        }
    }
}

/// The words of a file of ours.
pub(crate) fn words(path: impl AsRef<Path>) -> std::io::Result<Vec<OsString>> {
    let bytes = std::fs::read(path)?;
    let words = bytes.split(|&b| b == 0).filter(|word| !word.is_empty());
    Ok(words.map(|word| OsString::from_vec(word.to_vec())).collect())
}

/// Name and value.
pub(crate) fn split(variable: OsString) -> Option<(OsString, OsString)> {
    let mut name = variable.into_vec();
    let at = name.iter().position(|&b| b == b'=')?;
    let value = name.split_off(at + 1);
    name.truncate(at);
    Some((OsString::from_vec(name), OsString::from_vec(value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_is_split_at_its_first_equals_sign() {
        assert_eq!(split("A=b=c".into()), Some(("A".into(), "b=c".into())));
        assert_eq!(split("A".into()), None);
    }
}
