//! `zeroboot keys`: the API's keys.

use std::path::PathBuf;

use anyhow::Context;
use zeroboot_server::{KeyStore, NewKey, read_config};

use crate::{
    cli::{KeyFileArgs, KeysCommand},
    hint::hinted,
    printer,
};

/// The configuration file of the service that `deploy/systemd` installs.
const SERVICE: &str = "/etc/zeroboot/zeroboot.toml";

pub(crate) fn run(command: KeysCommand) -> anyhow::Result<u8> {
    match command {
        KeysCommand::Create { file, name, expires_in, rate, concurrency, demo, e2b } => {
            let expires = expires_in
                .map(|time| jiff::Timestamp::now().checked_add(time).context("that expiry is too far away"))
                .transpose()?;
            let (token, key) = store(file)?.create(NewKey { name, expires, rate, concurrency, demo, e2b })?;
            printer::note(format_args!("key {} for {:?}; it is shown once:", key.id, key.name));
            printer::line(token)?;
        }
        KeysCommand::List { file } => {
            printer::line(format_args!("{:<14} {:<20} {:<22} {:<22} state", "ID", "NAME", "CREATED", "EXPIRES"))?;
            for key in store(file)?.list()? {
                let time = |t: Option<jiff::Timestamp>| t.map_or("never".into(), |t| format!("{t:.0}"));
                let state = match (key.revoked, key.expires) {
                    (Some(_), _) => "revoked",
                    (None, Some(at)) if at <= jiff::Timestamp::now() => "expired",
                    _ => "live",
                };
                let (created, expires) = (time(Some(key.created)), time(key.expires));
                printer::line(format_args!("{:<14} {:<20} {created:<22} {expires:<22} {state}", key.id, key.name))?;
            }
        }
        KeysCommand::Revoke { file, id } => {
            let key = store(file)?.revoke(&id)?;
            printer::note(format_args!("key {} of {:?} is revoked", key.id, key.name));
        }
    }
    Ok(0)
}

/// The key file that is named, else the one of the configuration that is named, else of the installed service.
fn store(args: KeyFileArgs) -> anyhow::Result<KeyStore> {
    if let Some(file) = args.keys_file {
        return Ok(KeyStore::new(file));
    }
    let config = args.config.or_else(|| Some(PathBuf::from(SERVICE)).filter(|path| path.exists()));
    let Some(config) = config else {
        return Err(hinted(
            "no key file was named, and no configuration that names one",
            "give --keys-file FILE, or --config with the server's configuration; `zeroboot serve` takes the same two",
        ));
    };
    match read_config(&config)?.keys_file {
        Some(file) => {
            printer::note(format_args!("key file {} (from {})", file.display(), config.display()));
            Ok(KeyStore::new(file))
        }
        None => Err(hinted(
            format!("{} names no key file", config.display()),
            "add keys_file = \"/path/to/keys.toml\" to it, or give --keys-file FILE",
        )),
    }
}
