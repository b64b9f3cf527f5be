//! `zeroboot keys`: the API's keys.

use anyhow::Context;
use zeroboot_server::{KeyStore, NewKey};

use crate::{cli::KeysCommand, printer};

pub(crate) fn run(command: KeysCommand) -> anyhow::Result<u8> {
    match command {
        KeysCommand::Create { file, name, expires_in, rate, concurrency, demo, e2b } => {
            let expires = expires_in
                .map(|time| jiff::Timestamp::now().checked_add(time).context("that expiry is too far away"))
                .transpose()?;
            let (token, key) =
                KeyStore::new(file.keys_file).create(NewKey { name, expires, rate, concurrency, demo, e2b })?;
            printer::note(format_args!("key {} for {:?}; it is shown once:", key.id, key.name));
            printer::line(token)?;
        }
        KeysCommand::List { file } => {
            printer::line(format_args!("{:<14} {:<20} {:<22} {:<22} state", "ID", "NAME", "CREATED", "EXPIRES"))?;
            for key in KeyStore::new(file.keys_file).list()? {
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
            let key = KeyStore::new(file.keys_file).revoke(&id)?;
            printer::note(format_args!("key {} of {:?} is revoked", key.id, key.name));
        }
    }
    Ok(0)
}
