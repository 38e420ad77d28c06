//! Accepts clients, gives each a session, and ends them in order.

use std::cell::Cell;
use std::collections::HashSet;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use headwater_block::disk::Disk;
use headwater_block::{Error, ErrorKind, Result};
use headwater_nbd::negotiate::MAX_STRING;
use headwater_nbd::{BlockSizes, ClientChoice, ExportInfo, NbdAddress, Terms, TransmissionFlags};

use super::handler::{self, Handler};
use super::handshake::{self, Failure};
use super::listener::Listener;
use super::receive::Receiver;
use super::session::{End, Session};
use super::socket::Socket;
use super::stop::{Stop, StopListener};

/// Longest read or write, in bytes: what the protocol document asks every server to take.
const MAX_PAYLOAD: u32 = 32 << 20;

/// Most clients at once. Further ones wait in the kernel's queue.
const MAX_CLIENTS: usize = 256;

/// How long a client may take to negotiate.
const NEGOTIATION_TIME: Duration = Duration::from_secs(30);

/// How long to wait when the system has no descriptor for a new connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A disk under a name.
#[derive(Clone)]
pub struct Export {
    /// What clients ask for; at most 4096 bytes. Clients that ask for the empty name get the export of that name, or the only one.
    pub name: String,
    /// A text for people, at most 4096 bytes; may be empty.
    pub description: String,
    /// The disk.
    pub disk: Rc<Disk>,
    /// Whether clients may change it. A disk that is read-only itself is never changed.
    pub writable: bool,
}

impl Export {
    fn info(&self) -> ExportInfo {
        use TransmissionFlags as F;
        // All connections use the same disk object, so that a flush on one covers the writes of all.
        let mut flags =
            F::HAS_FLAGS | F::SEND_FLUSH | F::SEND_FUA | F::SEND_DF | F::SEND_CACHE | F::CAN_MULTI_CONN;
        if self.writable && !self.disk.is_read_only() {
            flags |= F::SEND_TRIM | F::SEND_WRITE_ZEROES | F::SEND_FAST_ZERO;
        } else {
            flags |= F::READ_ONLY;
        }
        // The disk takes any alignment.
        let preferred = self.disk.limits().preferred.clamp(512, MAX_PAYLOAD);
        let preferred = if preferred.is_power_of_two() { preferred } else { 4096 };
        ExportInfo {
            name: self.name.clone(),
            description: self.description.clone(),
            size: self.disk.size(),
            flags,
            block_sizes: BlockSizes { minimum: 1, preferred, maximum: MAX_PAYLOAD },
            contexts: handler::contexts(),
        }
    }
}

/// Counters of a server since it was bound.
#[derive(Debug, Default)]
pub struct ServerStats {
    /// Clients connected right now.
    pub clients: Cell<u64>,
    /// Clients that ever connected.
    pub clients_total: Cell<u64>,
    /// Requests answered, failures included.
    pub requests: Cell<u64>,
    /// Requests answered with an error.
    pub failures: Cell<u64>,
    /// Bytes read by clients.
    pub read_bytes: Cell<u64>,
    /// Bytes written by clients; zeroes and trims not counted.
    pub written_bytes: Cell<u64>,
}

fn add(counter: &Cell<u64>, count: u64) {
    counter.set(counter.get().wrapping_add(count));
}

impl ServerStats {
    pub(crate) fn count_read(&self, bytes: u32) {
        add(&self.requests, 1);
        add(&self.read_bytes, bytes.into());
    }

    pub(crate) fn count_write(&self, bytes: u32) {
        add(&self.requests, 1);
        add(&self.written_bytes, bytes.into());
    }

    pub(crate) fn count_other(&self) {
        add(&self.requests, 1);
    }

    pub(crate) fn count_failure(&self) {
        add(&self.requests, 1);
        add(&self.failures, 1);
    }
}

/// Counts a client for as long as it lives.
struct Counted(Rc<ServerStats>);

impl Counted {
    fn new(stats: Rc<ServerStats>) -> Self {
        add(&stats.clients, 1);
        add(&stats.clients_total, 1);
        Self(stats)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.clients.set(self.0.clients.get().saturating_sub(1));
    }
}

/// An NBD server that is bound to an address.
///
/// ```no_run
/// # async fn example(disk: std::rc::Rc<headwater_block::disk::Disk>) -> headwater_block::Result<()> {
/// use headwater_export::nbd::{Export, NbdServer};
/// use headwater_nbd::NbdUri;
///
/// let uri: NbdUri = "nbd+unix:///disk?socket=/run/disk.sock".parse().expect("an NBD address");
/// let export = Export { name: uri.export, description: String::new(), disk, writable: true };
/// let server = NbdServer::bind(&uri.address, vec![export])?;
/// let interrupted = async { drop(tokio::signal::ctrl_c().await) };
/// server.run(interrupted).await
/// # }
/// ```
pub struct NbdServer {
    listener: Listener,
    exports: Rc<[Export]>,
    stats: Rc<ServerStats>,
}

impl NbdServer {
    /// Binds `address` (port 0 lets the system choose one) for `exports`. Must be called inside a tokio runtime. Clients
    /// can connect as soon as this returns; they are served once [`NbdServer::run`] runs.
    ///
    /// # Errors
    /// `InvalidInput` if there is no export, a name occurs twice, or a text is too long; `InUse` if another process has
    /// the address; otherwise what the system says.
    pub fn bind(address: &NbdAddress, exports: Vec<Export>) -> Result<Self> {
        if exports.is_empty() {
            return Err(Error::new(ErrorKind::InvalidInput, "an NBD server needs at least one export"));
        }
        let mut names = HashSet::new();
        for export in &exports {
            let name = &export.name;
            if name.len() > MAX_STRING || export.description.len() > MAX_STRING {
                let message =
                    format!("export {name:?}: name and description may have {MAX_STRING} bytes each");
                return Err(Error::new(ErrorKind::InvalidInput, message));
            }
            if !names.insert(name) {
                let message = format!("two exports are called {name:?}; give each its own name");
                return Err(Error::new(ErrorKind::InvalidInput, message));
            }
        }
        let listener = Listener::bind(address)?;
        Ok(Self { listener, exports: exports.into(), stats: Rc::default() })
    }

    /// Where clients can connect: as given, with the port that the system chose if 0 was asked for.
    ///
    /// # Errors
    /// What the system says.
    pub fn address(&self) -> Result<NbdAddress> {
        self.listener.address()
    }

    /// The server's counters, which stay valid after its end.
    pub fn stats(&self) -> Rc<ServerStats> {
        self.stats.clone()
    }

    /// Serves until `shutdown` completes; then accepts no more, finishes the requests that were received, closes the
    /// connections and removes a Unix socket. Must run inside a tokio `LocalSet`.
    ///
    /// If this future is dropped, the sessions finish in the same way, on their own.
    ///
    /// # Errors
    /// None of a client's doing.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<()> {
        let stop = Stop::new();
        let mut sessions = FuturesUnordered::new();
        let mut shutdown = pin!(shutdown);
        loop {
            tokio::select! {
                biased;
                () = &mut shutdown => break,
                Some(ended) = sessions.next(), if !sessions.is_empty() => report_panic(ended),
                accepted = self.listener.accept(), if sessions.len() < MAX_CLIENTS => match accepted {
                    Ok(socket) => {
                        let counted = Counted::new(self.stats.clone());
                        let (exports, stop) = (self.exports.clone(), stop.listener());
                        sessions.push(tokio::task::spawn_local(serve(socket, exports, counted, stop)));
                    }
                    Err(error) => {
                        tracing::warn!("cannot accept an NBD client: {error}");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        drop(self.listener);
        stop.order();
        while let Some(ended) = sessions.next().await {
            report_panic(ended);
        }
        Ok(())
    }
}

fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!("an NBD session failed: {error}");
    }
}

/// One client, from greeting to end.
async fn serve(mut socket: Socket, exports: Rc<[Export]>, counted: Counted, stop: StopListener) {
    let infos: Vec<ExportInfo> = exports.iter().map(Export::info).collect();
    let negotiation =
        tokio::time::timeout(NEGOTIATION_TIME, handshake::negotiate(&mut socket, infos.clone()));
    let negotiated = tokio::select! {
        biased;
        () = poll_fn(|cx| stop.poll(cx)) => return,
        negotiated = negotiation => negotiated,
    };
    let (choice, received) = match negotiated {
        Ok(Ok(negotiated)) => negotiated,
        Ok(Err(Failure::Left)) => return,
        Ok(Err(Failure::CutOff(error))) => return tracing::warn!("NBD client cut off: {error}"),
        Ok(Err(Failure::Broken(error))) => return tracing::debug!("NBD client lost: {error}"),
        Err(_) => return tracing::warn!("NBD client cut off: it did not negotiate in {NEGOTIATION_TIME:?}"),
    };
    let ClientChoice { export: index, flags, structured, contexts } = choice;
    let (export, info) = (&exports[index], &infos[index]);
    let terms = Terms {
        size: info.size,
        flags,
        minimum_block: info.block_sizes.minimum,
        maximum_payload: info.block_sizes.maximum,
        structured,
        contexts: !contexts.is_empty(),
    };
    let (disk, stats) = (export.disk.clone(), counted.0.clone());
    let handler = Rc::new(Handler { disk, structured, contexts, stats });
    let start = |incoming, cost| {
        let handler = handler.clone();
        async move { (handler.handle(incoming).await, cost) }
    };
    let name = &export.name;
    match Session::new(socket, Receiver::new(terms, &received), stop, start).run().await {
        End::Left | End::Stopped => tracing::debug!("NBD client of {name:?} left"),
        End::LeftMidRequest => tracing::debug!("NBD client of {name:?} left in the middle of a request"),
        End::CutOff(error) => tracing::warn!("NBD client of {name:?} cut off: {error}"),
        End::Broken(error) => tracing::debug!("NBD client of {name:?} lost: {error}"),
    }
}
