//! What a user can do about an error.

use zeroboot_engine::{ExecError, InvalidRequest, StartError};
use zeroboot_process::{DiscoverError, EnvironmentError};

use crate::sandbox::client::Refused;

/// An error that brings its own hint.
#[derive(Debug)]
pub(crate) struct Hinted {
    pub(crate) text: String,
    pub(crate) hint: String,
}

impl std::fmt::Display for Hinted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Hinted {}

/// Makes an error with a hint.
pub(crate) fn hinted(text: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    Hinted { text: text.into(), hint: hint.into() }.into()
}

/// The hint for an error, if there is one.
pub(crate) fn of(error: &anyhow::Error) -> Option<String> {
    error.chain().find_map(|cause| {
        if let Some(hinted) = cause.downcast_ref::<Hinted>() {
            return Some(hinted.hint.clone());
        }
        if let Some(refused) = cause.downcast_ref::<Refused>() {
            return Some(refused.hint());
        }
        if let Some(discover) = cause.downcast_ref::<DiscoverError>() {
            return Some(discover.hint());
        }
        if let Some(environment) = cause.downcast_ref::<EnvironmentError>() {
            return environment.hint();
        }
        if let Some(StartError::Template { reason, .. }) = cause.downcast_ref::<StartError>() {
            return of_start(reason);
        }
        match cause.downcast_ref::<ExecError>() {
            Some(ExecError::Invalid(InvalidRequest::EmptyCode)) => {
                return Some("give code with -c 'print(1)', or a file".into());
            }
            Some(ExecError::Sandbox(_) | ExecError::NotReady { .. }) => {
                return Some("`zeroboot doctor` shows what this host can do".into());
            }
            _ => {}
        }
        None
    })
}

fn of_start(reason: &str) -> Option<String> {
    let says = |words: &[&str]| words.iter().any(|word| reason.contains(word));
    if says(&["user namespace", "clone3", "sandbox root"]) {
        return Some(
            "`zeroboot doctor` shows what this host lacks; root, or unprivileged user namespaces, are needed".into(),
        );
    }
    if says(&["import", "warm"]) {
        return Some("--warm names the modules to import beforehand; install them or leave them out".into());
    }
    Some("`zeroboot doctor` shows what this host can do".into())
}
