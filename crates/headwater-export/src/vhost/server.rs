//! Listens, has one client at a time, and ends in order.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use headwater_block::{Edge, Error, ErrorKind, Result};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::config::{BlkOptions, MAX_QUEUES};
use super::connection::{Connection, End, Notices};
use super::device::Device;
use super::handler::Handler;
use crate::listener::Listener;
use crate::stop::{Stop, StopListener};
use crate::{Listen, Removal, Removed};

/// How long to wait when the system has no descriptor for a new connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A disk that a virtual machine is given.
#[derive(Clone)]
pub struct BlkExport {
    /// What messages call the export, and the guest its disk (of which it sees 20 bytes).
    pub id: String,
    /// Leads to the disk. Each request enters it and goes to the disk of that moment.
    pub edge: Rc<Edge>,
    /// How the guest sees it.
    pub options: BlkOptions,
}

/// A vhost-user-blk export at its own socket. It lives in the `LocalSet` in which it was started.
///
/// Dropping it has the effect of [`VhostUserBlk::stop`], but nobody hears of the end.
pub struct VhostUserBlk {
    shared: Rc<Shared>,
    stop: Stop,
    /// Over when the last client and its requests are gone.
    task: Option<JoinHandle<()>>,
}

struct Shared {
    export: BlkExport,
    clients: Cell<usize>,
    /// The last client and its requests are gone, and the address.
    over: watch::Sender<bool>,
    notices: Rc<Notices>,
    /// The size that the guest was last told to look for.
    told_size: Cell<u64>,
}

impl VhostUserBlk {
    /// Binds an address and serves from now on. Must be called inside a tokio `LocalSet`.
    ///
    /// # Errors
    /// `InUse` if another process has the address; `InvalidInput` if it isn't a Unix socket, the number of queues isn't 1 to [`MAX_QUEUES`],
    /// or the export is writable and the disk isn't; otherwise what the system says.
    pub fn start(listen: Listen, export: BlkExport) -> Result<Self> {
        let refuse =
            |why: &str| Err(Error::new(ErrorKind::InvalidInput, format!("export {:?}: {why}", export.id)));
        let queues = export.options.queues;
        if queues == 0 || queues > MAX_QUEUES {
            return refuse(&format!("{queues} queues; it can have 1 to {MAX_QUEUES}"));
        }
        let disk = export.edge.disk();
        if export.options.writable && disk.is_read_only() {
            return refuse(&format!("{} is for reading only", disk.name()));
        }
        let listener = Listener::bind(listen)?;
        if matches!(listener, Listener::Tcp(_)) {
            return refuse("vhost-user needs a Unix socket");
        }
        let shared = Rc::new(Shared {
            export,
            clients: Cell::new(0),
            over: watch::Sender::new(false),
            notices: Rc::default(),
            told_size: Cell::new(disk.size()),
        });
        let stop = Stop::new();
        let task = tokio::task::spawn_local(accept(listener, shared.clone(), stop.listener()));
        Ok(Self { shared, stop, task: Some(task) })
    }

    /// How many clients there are: none or one.
    pub fn clients(&self) -> usize {
        self.shared.clients.get()
    }

    /// Tells the guest to look at the disk's size again, if it has changed since it was last told.
    pub fn look_at_size(&self) {
        let size = self.shared.export.edge.disk().size();
        if self.shared.told_size.replace(size) != size {
            self.shared.notices.config_changed();
        }
    }

    /// Ends the export: when this returns, no new client gets it. What is returned completes when the client and its requests are gone, and
    /// the address is given up.
    ///
    /// # Errors
    /// `InUse` if it is to go safely and has a client.
    pub fn remove(&self, how: Removal) -> Result<Removed> {
        if how == Removal::Safe && self.clients() > 0 {
            let message =
                format!("export {:?} has a client; remove it hard to send it away", self.shared.export.id);
            return Err(Error::new(ErrorKind::InUse, message));
        }
        self.stop.order();
        let mut over = self.shared.over.subscribe();
        Ok(Removed::when(async move {
            // A sender that is gone took the client with it.
            let _ = over.wait_for(|over| *over).await;
        }))
    }

    /// Takes no more clients, sends away the one that is there once the requests that were taken from it are done, and gives up the address.
    /// Completes when all that is over.
    pub async fn stop(mut self) {
        self.stop.order();
        if let Some(task) = self.task.take()
            && let Err(error) = task.await
        {
            tracing::error!("a vhost-user-blk export failed: {error}");
        }
    }
}

/// Serves one client after the other until the order to stop.
async fn accept(listener: Listener, shared: Rc<Shared>, stop: StopListener) {
    while let Listener::Unix { listener: socket, .. } = &listener {
        let accepted = tokio::select! {
            biased;
            () = poll_fn(|cx| stop.poll(cx)) => break,
            accepted = accept_one(socket) => accepted,
        };
        let id = &shared.export.id;
        match accepted.and_then(|stream| start(stream, &shared)) {
            Ok(mut connection) => {
                shared.clients.set(1);
                let end = connection.serve(&stop).await;
                connection.close().await;
                shared.clients.set(0);
                match end {
                    End::Left | End::Stopped => tracing::debug!("vhost-user client of {id:?} left"),
                    End::CutOff(error) => tracing::warn!("vhost-user client of {id:?} cut off: {error}"),
                    End::Broken(error) => tracing::debug!("vhost-user client of {id:?} lost: {error}"),
                }
            }
            Err(error) => {
                tracing::warn!("cannot accept a vhost-user client of {id:?}: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    // Nobody may be waiting for it.
    shared.over.send_replace(true);
}

async fn accept_one(socket: &UnixListener) -> io::Result<std::os::unix::net::UnixStream> {
    let (stream, _) = socket.accept().await?;
    stream.into_std()
}

fn start(stream: std::os::unix::net::UnixStream, shared: &Shared) -> io::Result<Connection> {
    let BlkExport { id, edge, options } = shared.export.clone();
    let handler = Rc::new(Handler { edge, options, id, write_through: Cell::new(true) });
    Connection::new(stream, Device::new(handler), shared.notices.clone())
}
