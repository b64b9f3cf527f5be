//! Telling systemd what the service is doing (`sd_notify(3)`): one datagram to the socket in `NOTIFY_SOCKET`.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{ffi::OsStrExt as _, net},
    },
};

/// The service manager's socket, if there is one.
#[derive(Debug)]
pub(crate) struct Manager(pub(crate) Option<OsString>);

impl Manager {
    pub(crate) fn of_env() -> Manager {
        Manager(std::env::var_os("NOTIFY_SOCKET"))
    }

    /// Sends `READY=1`, `STOPPING=1` and the like. Without systemd it does nothing.
    pub(crate) fn tell(&self, state: &str) {
        if let Some(socket) = &self.0
            && let Err(error) = send(socket, state)
        {
            tracing::warn!(%error, "cannot notify the service manager");
        }
    }
}

fn send(socket: &OsStr, state: &str) -> io::Result<()> {
    // A leading `@` stands for the NUL byte of an abstract socket.
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => net::SocketAddr::from_abstract_name(name)?,
        _ => net::SocketAddr::from_pathname(socket)?,
    };
    net::UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_manager_gets_the_words() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let receiver = net::UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str(), "READY=1").unwrap();
        let mut buffer = [0; 32];
        let count = receiver.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"READY=1");
    }
}
