//! Bound sockets: TCP and Unix.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::{config::Listen, peer::Peer};

/// A bound socket.
#[derive(Debug)]
pub(crate) enum Bound {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// Removes a socket's file when the server ends, if the file is still ours.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode) {
            // Someone else may be quicker; a file that is gone is what we want.
            fs::remove_file(&self.path).unwrap_or_default();
        }
    }
}

impl Bound {
    pub(crate) async fn bind(listen: &Listen, mode: u32) -> io::Result<Bound> {
        match listen {
            Listen::Tcp(address) => Ok(Bound::Tcp(TcpListener::bind(address).await?)),
            Listen::Unix(path) => bind_unix(path, mode),
        }
    }

    /// Where it really listens: port 0 has become a number.
    pub(crate) fn address(&self) -> io::Result<Listen> {
        match self {
            Bound::Tcp(listener) => listener.local_addr().map(Listen::Tcp),
            Bound::Unix(_, file) => Ok(Listen::Unix(file.path.clone())),
        }
    }

    pub(super) async fn accept(&self) -> io::Result<(Stream, Peer)> {
        match self {
            Bound::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                // Answers are written whole; waiting for more would only cost time.
                stream.set_nodelay(true)?;
                Ok((Stream::Tcp(stream), Peer { ip: Some(address.ip()), ..Peer::default() }))
            }
            Bound::Unix(listener, _) => Ok((Stream::Unix(listener.accept().await?.0), Peer::default())),
        }
    }
}

/// Binds under another name, sets the mode and renames: no process can connect before the mode is right, and a socket that
/// a killed server left behind is replaced. One that still answers is not.
fn bind_unix(path: &Path, mode: u32) -> io::Result<Bound> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"));
        }
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another server listens there"));
        }
        Ok(_) => {}
    }
    let mut hidden = path.as_os_str().to_owned();
    hidden.push(format!(".{}", std::process::id()));
    let hidden = PathBuf::from(hidden);
    match fs::remove_file(&hidden) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&hidden)?;
    let ready = fs::set_permissions(&hidden, fs::Permissions::from_mode(mode))
        .and_then(|()| fs::symlink_metadata(&hidden))
        .and_then(|metadata| fs::rename(&hidden, path).map(|()| metadata.ino()));
    match ready {
        Ok(inode) => Ok(Bound::Unix(listener, SocketFile { path: path.into(), inode })),
        Err(error) => {
            fs::remove_file(&hidden).unwrap_or_default();
            Err(error)
        }
    }
}

/// An accepted connection.
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_unix_socket_has_its_mode_replaces_a_stale_one_and_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.sock");
        let first = bind_unix(&path, 0o660).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o660);
        assert_eq!(bind_unix(&path, 0o660).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let Bound::Unix(listener, file) = first else { panic!("not a Unix socket") };
        // As after kill -9: the file stays, nobody listens.
        std::mem::forget(file);
        drop(listener);
        assert!(path.exists());
        let second = bind_unix(&path, 0o600).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        drop(second);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_file_that_is_no_socket_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "mine").unwrap();
        assert!(bind_unix(&path, 0o660).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }
}
