//! Accepts clients, gives each a session, and ends them in order.

use std::future::poll_fn;
use std::rc::Rc;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use headwater_block::{Abort, Client, Result};
use headwater_nbd::{ClientChoice, NbdAddress, Terms};
use headwater_tls::{Endpoint, TlsCredentials};
use tokio::task::{JoinError, JoinHandle};

use super::exports::{Export, Exports};
use super::handler::Handler;
use super::handshake::{self, Failure, Negotiated};
use super::receive::Receiver;
use super::replies::{Replies, Reply};
use super::session::{End, Session};
use super::socket::Socket;
use super::stats::{Counted, ServerStats};
use crate::listener::{Listen, Listener};
use crate::removal::{Removal, Removed};
use crate::stop::{Stop, StopListener};

/// How long to wait when the system has no descriptor for a new connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How a server behaves. The defaults are those of QEMU's servers.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Most clients at once, those that negotiate included; 0 means any number. Further ones wait in the kernel's queue. If it is 1,
    /// clients are told not to open several connections.
    pub max_connections: u32,
    /// How long a client may take to negotiate; `None` means for ever.
    pub handshake_limit: Option<Duration>,
    /// What the server proves itself with. With them, clients must start TLS and learn nothing before; without them they can't.
    pub tls: Option<TlsCredentials>,
    /// A client that asks for the empty name gets the only export, if there is just one.
    pub empty_name_is_only_export: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            max_connections: 100,
            handshake_limit: Some(Duration::from_secs(10)),
            tls: None,
            empty_name_is_only_export: false,
        }
    }
}

/// A server that listens, with exports that come and go. It lives in the `LocalSet` in which it was started.
///
/// ```no_run
/// # async fn example(disk: std::rc::Rc<headwater_block::disk::Disk>) -> headwater_block::Result<()> {
/// use headwater_block::Edge;
/// use headwater_export::Removal;
/// use headwater_export::nbd::{Export, NbdServer, ServerOptions};
/// use headwater_nbd::NbdUri;
///
/// let uri: NbdUri = "nbd+unix:///disk?socket=/run/disk.sock".parse().expect("an NBD address");
/// let server = NbdServer::start((&uri.address).into(), ServerOptions::default())?;
/// let export = Export {
///     name: uri.export.clone(),
///     description: String::new(),
///     edge: Edge::new(disk),
///     writable: true,
///     writethrough: false,
///     allocation_depth: false,
/// };
/// server.add(export)?;
/// // ...
/// server.remove(&uri.export, Removal::Hard)?.await;
/// server.stop().await;
/// # Ok(())
/// # }
/// ```
///
/// Dropping it has the effect of [`NbdServer::stop`], but nobody hears of the end.
pub struct NbdServer {
    shared: Rc<Shared>,
    stop: Stop,
    address: Option<NbdAddress>,
    /// Accepts clients; over when the last is gone.
    task: Option<JoinHandle<()>>,
}

/// What the server and its clients share.
struct Shared {
    exports: Exports,
    options: ServerOptions,
    stats: Rc<ServerStats>,
}

impl NbdServer {
    /// Binds an address and serves from now on, without any export at first. Must be called inside a tokio `LocalSet`.
    ///
    /// # Errors
    /// `InUse` if another process has the address, `InvalidInput` if it can't be one or the credentials are not those of a server;
    /// otherwise what the system says.
    pub fn start(listen: Listen, options: ServerOptions) -> Result<Self> {
        if let Some(tls) = &options.tls {
            tls.check_endpoint(Endpoint::Server)?;
        }
        let listener = Listener::bind(listen)?;
        let address = listener.address();
        let exports = Exports::new(options.max_connections != 1);
        let shared = Rc::new(Shared { exports, options, stats: Rc::default() });
        let stop = Stop::new();
        let task = tokio::task::spawn_local(accept(listener, shared.clone(), stop.listener()));
        Ok(Self { shared, stop, address, task: Some(task) })
    }

    /// Where clients can connect: as given, with the port that the system chose if 0 was asked for. The first address, if it is several;
    /// `None` if it has no such form, as an abstract socket.
    pub fn address(&self) -> Option<&NbdAddress> {
        self.address.as_ref()
    }

    /// Serves one more export.
    ///
    /// # Errors
    /// `AlreadyExists` if there is one of that name, `InvalidInput` if a text is too long.
    pub fn add(&self, export: Export) -> Result<()> {
        self.shared.exports.add(export)
    }

    /// Serves an export no longer: when this returns, no new client gets it and its name is free. What is returned completes when the
    /// last client and its requests are gone.
    ///
    /// Clients that only asked about the export don't count; they won't find it any more.
    ///
    /// # Errors
    /// `NotFound` if there is none of that name, `InUse` if it is to go safely and has clients.
    pub fn remove(&self, name: &str, how: Removal) -> Result<Removed> {
        self.shared.exports.remove(name, how)
    }

    /// How many clients have chosen the export `name`. `None` if there is none of that name.
    pub fn clients(&self, name: &str) -> Option<usize> {
        self.shared.exports.clients(name)
    }

    /// The server's counters, which stay valid after its end.
    pub fn stats(&self) -> Rc<ServerStats> {
        self.shared.stats.clone()
    }

    /// Accepts no more clients, removes all exports hard, and gives up the address; a Unix socket that was made is removed. Completes
    /// when the last client is gone.
    pub async fn stop(mut self) {
        self.order_stop();
        if let Some(task) = self.task.take() {
            report_panic(task.await);
        }
    }

    fn order_stop(&self) {
        self.stop.order();
        self.shared.exports.remove_all();
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.order_stop();
    }
}

/// Accepts clients until the order to stop; then waits for those that are there.
async fn accept(listener: Listener, shared: Rc<Shared>, stop: StopListener) {
    let most = match shared.options.max_connections {
        0 => usize::MAX,
        most => most as usize,
    };
    let mut sessions = FuturesUnordered::new();
    loop {
        tokio::select! {
            biased;
            () = poll_fn(|cx| stop.poll(cx)) => break,
            Some(ended) = sessions.next(), if !sessions.is_empty() => report_panic(ended),
            accepted = poll_fn(|cx| Socket::poll_accept(&listener, cx)), if sessions.len() < most => match accepted {
                Ok(socket) => {
                    let client = serve(socket, shared.clone(), stop.another());
                    sessions.push(tokio::task::spawn_local(client));
                }
                Err(error) => {
                    tracing::warn!("cannot accept an NBD client: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    while let Some(ended) = sessions.next().await {
        report_panic(ended);
    }
}

fn report_panic(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        tracing::error!("an NBD session failed: {error}");
    }
}

/// One client, from greeting to end. `stop` is heard until it has chosen an export; from then on, its seat there counts.
async fn serve(socket: Socket, shared: Rc<Shared>, stop: StopListener) {
    let counted = Counted::new(shared.stats.clone());
    let negotiated = tokio::select! {
        biased;
        () = poll_fn(|cx| stop.poll(cx)) => return,
        negotiated = negotiate(socket, &shared) => negotiated,
    };
    drop(stop);
    let Negotiated { socket, seat, choice, received, answer } = match negotiated {
        Ok(negotiated) => negotiated,
        Err(Failure::Left) => return,
        Err(Failure::CutOff(error)) => return tracing::warn!("NBD client cut off: {error}"),
        Err(Failure::Broken(error)) => return tracing::debug!("NBD client lost: {error}"),
        Err(Failure::NoTls(error)) => return tracing::warn!("NBD client cut off: {error}"),
        Err(Failure::TooSlow) => return tracing::warn!("NBD client cut off: it takes too long to negotiate"),
    };
    let ClientChoice { export, headers, contexts } = choice;
    let terms = Terms {
        size: export.size,
        flags: export.flags,
        minimum_block: export.block_sizes.minimum,
        maximum_payload: export.block_sizes.maximum,
        headers,
        contexts: !contexts.is_empty(),
    };
    let (edge, stats) = (seat.export().edge.clone(), counted.0.clone());
    let writethrough = seat.export().writethrough;
    let leaves = Abort::new();
    let client = Client::new(edge, leaves.clone());
    let receiver = Receiver::new(terms, contexts.clone(), &received);
    let handler = Rc::new(Handler { client, writethrough, headers, contexts, stats });
    let start = |incoming, cost| {
        let handler = handler.clone();
        async move { (handler.handle(incoming).await, cost) }
    };
    let mut replies = Replies::default();
    replies.push(Reply::chunks(answer), 0);
    let name = &export.name;
    match Session::new(socket, receiver, replies, seat.stop(), leaves, start).run().await {
        End::Left | End::Stopped => tracing::debug!("NBD client of {name:?} left"),
        End::LeftMidRequest => tracing::debug!("NBD client of {name:?} left in the middle of a request"),
        End::CutOff(error) => tracing::warn!("NBD client of {name:?} cut off: {error}"),
        End::Broken(error) => tracing::debug!("NBD client of {name:?} lost: {error}"),
    }
}

async fn negotiate(socket: Socket, shared: &Shared) -> Result<Negotiated, Failure> {
    let ServerOptions { tls, empty_name_is_only_export, handshake_limit, .. } = &shared.options;
    let negotiation = handshake::negotiate(socket, &shared.exports, tls.as_ref(), *empty_name_is_only_export);
    match *handshake_limit {
        Some(limit) => tokio::time::timeout(limit, negotiation).await.unwrap_or(Err(Failure::TooSlow)),
        None => negotiation.await,
    }
}
