//! Where things are kept.

use std::{env, ffi::OsString, path::PathBuf};

/// Names another directory for templates.
pub const HOME_VARIABLE: &str = "ZEROBOOT_HOME";

/// What can be fetched again: `$XDG_CACHE_HOME/zeroboot` or `~/.cache/zeroboot`.
pub fn cache_dir() -> Option<PathBuf> {
    let base = set("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| Some(PathBuf::from(set("HOME")?).join(".cache")));
    base.map(|base| base.join("zeroboot"))
}

/// Built templates: `$ZEROBOOT_HOME/templates`, else `/var/lib/zeroboot/templates` for root, else
/// `$XDG_DATA_HOME/zeroboot/templates` or `~/.local/share/zeroboot/templates`.
pub fn templates_dir() -> Option<PathBuf> {
    let home = set(HOME_VARIABLE).map(PathBuf::from).or_else(|| {
        if rustix::process::geteuid().is_root() {
            return Some(PathBuf::from("/var/lib/zeroboot"));
        }
        let data = set("XDG_DATA_HOME").map(PathBuf::from);
        Some(data.or_else(|| Some(PathBuf::from(set("HOME")?).join(".local/share")))?.join("zeroboot"))
    });
    home.map(|home| home.join("templates"))
}

fn set(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}
