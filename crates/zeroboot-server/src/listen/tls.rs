//! Certificates, which are read again while the server runs.

use std::{
    fs,
    io::BufReader,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
};

use tokio_rustls::{
    TlsAcceptor,
    rustls::{self, pki_types::pem::PemObject as _},
};

use crate::config::TlsFiles;

/// The certificates now in use. New connections take the newest.
#[derive(Debug)]
pub(crate) struct Tls {
    files: TlsFiles,
    current: RwLock<Arc<rustls::ServerConfig>>,
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] rustls::pki_types::pem::Error),
    /// They do not fit together.
    #[error("the certificate and the key cannot be used")]
    Unfit(#[source] rustls::Error),
}

impl Tls {
    pub(crate) fn load(files: &TlsFiles) -> Result<Tls, TlsError> {
        Ok(Tls { files: files.clone(), current: RwLock::new(read_tls(files)?) })
    }

    pub(crate) fn reload(&self) -> Result<(), TlsError> {
        let new = read_tls(&self.files)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    pub(super) fn acceptor(&self) -> TlsAcceptor {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone().into()
    }
}

fn read_tls(files: &TlsFiles) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let open = |path: &PathBuf| {
        let file = fs::File::open(path)
            .map_err(|error| TlsError::Read(path.clone(), rustls::pki_types::pem::Error::Io(error)))?;
        Ok::<_, TlsError>(BufReader::new(file))
    };
    let chain = CertificateDer::pem_reader_iter(open(&files.cert)?).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|error| TlsError::Read(files.cert.clone(), error))?;
    let key =
        PrivateKeyDer::from_pem_reader(open(&files.key)?).map_err(|error| TlsError::Read(files.key.clone(), error))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(TlsError::Unfit)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
