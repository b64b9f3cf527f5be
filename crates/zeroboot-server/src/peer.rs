//! Whose a request is, and who is at the other end of its connection.

use std::{net::IpAddr, sync::Arc};

use tokio::sync::Notify;
use uuid::Uuid;

use crate::{
    gate::Caller,
    logging::Afterwards,
    places::{Place, Visit},
};

/// The other end of a connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct Peer {
    /// `None`: a Unix socket.
    pub(crate) ip: Option<IpAddr>,
    /// Ends the connection at once.
    pub(crate) cut: Arc<Notify>,
    pub(crate) after: Afterwards,
    pub(crate) visit: Arc<Visit>,
    /// A WebSocket keeps it when its connection is one no more.
    pub(crate) _place: Option<Arc<Place>>,
}

/// What is known of a request besides what it says.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    /// Also in its answer's headers.
    pub(crate) request_id: Uuid,
    /// Whose it is: on a route that wants a key, and where there are keys, one with a key.
    pub(crate) caller: Caller,
    pub(crate) peer: Peer,
}
