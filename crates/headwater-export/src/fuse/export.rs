//! One disk under one path, from mounting to the last answer.

use super::frontend::{Frontend, Request};
use super::handler::{Access, Handler};
use super::mount::Mounted;
use crate::removal::{Removal, Removed};
use crate::stop::{Stop, StopListener};
use fuser::{Config, Session, SessionACL};
use futures_util::stream::{FuturesUnordered, StreamExt};
use headwater_block::range_lock::RangeLock;
use headwater_block::{Abort, Client, Edge, Error, LocalFuture, Result};
use std::cell::Cell;
use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use tokio::sync::{mpsc, watch};

/// Most requests that are carried out at once.
const MAX_REQUESTS: usize = 64;

/// Most requests that wait for their turn; their data, at most 1 MiB each, are in memory.
const MAX_WAITING: usize = 16;

/// What a file is of.
pub struct FuseOptions {
    /// Leads to the disk. Each request enters it and goes to the disk of that moment.
    pub edge: Rc<Edge>,
    /// Whether the disk may be changed; it must be mounted so as well. A disk that is read-only itself is never changed.
    pub writable: bool,
    /// Whether every change is durable before it is answered.
    pub writethrough: bool,
    /// Whether writing past the end, and truncating, change the disk's size.
    pub growable: bool,
    /// Whether it was mounted for other users too.
    pub allow_other: bool,
    /// Called after a client has changed the disk's size, for those who must be told.
    pub resized: Box<dyn Fn()>,
}

/// A disk that is there as a file. Dropped without [`FuseExport::remove`], the file stays until it is unmounted from outside, and whoever
/// uses it gets errors.
pub struct FuseExport {
    path: PathBuf,
    unmount: Box<dyn Fn(Removal) -> LocalFuture<'static, Result<()>>>,
    stop: Stop,
    gone: watch::Receiver<bool>,
}

impl FuseExport {
    /// Serves the file system that was just mounted. Must be called inside a `LocalSet`.
    ///
    /// # Errors
    /// If the kernel speaks no FUSE that we know, or there is no thread to be had.
    pub fn start(mounted: Mounted, options: FuseOptions) -> Result<Self> {
        let Mounted { path, device, since, unmount } = mounted;
        let (sender, requests) = mpsc::channel(MAX_WAITING);
        let frontend = Frontend { requests: sender, writable: options.writable };
        // Without this the crate itself lets nobody in but the one who mounted.
        let acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
        let failed = |err| Error::from_io(err, format!("speak FUSE with the kernel at {}", path.display()));
        // The kernel has asked for the first exchange when it was mounted: this doesn't wait.
        let session = Session::from_fd(frontend, device, acl, Config::default()).map_err(failed)?;
        let name = path.display().to_string();
        std::thread::Builder::new()
            .name("fuse".into())
            .spawn(move || {
                // Ends when it is unmounted.
                if let Err(err) = session.run() {
                    tracing::warn!("{name}: the FUSE session has ended: {err}");
                }
            })
            .map_err(failed)?;
        let mode = if options.writable { 0o600 } else { 0o400 };
        let leaves = Abort::new();
        let handler = Handler {
            client: Client::new(options.edge, leaves.clone()),
            writable: options.writable,
            writethrough: options.writethrough,
            growable: options.growable,
            access: Cell::new(Access {
                mode,
                uid: rustix::process::getuid().as_raw(),
                gid: rustix::process::getgid().as_raw(),
            }),
            since,
            resized: options.resized,
            resizing: RangeLock::new(),
        };
        let (ended, gone) = watch::channel(false);
        let stop = Stop::new();
        let stopped = stop.listener();
        tokio::task::spawn_local(async move {
            serve(&handler, requests, &stopped, &leaves).await;
            // Nobody may be waiting.
            let _ = ended.send(true);
        });
        Ok(Self { path, unmount, stop, gone })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the file away. Removed hard, those who have it open get errors from now on; where the right to mount is lacking the mount itself
    /// goes when they close it.
    ///
    /// # Errors
    /// `InUse` if it is to go safely and somebody has it open: then it stays. And those of the system.
    pub async fn remove(&self, how: Removal) -> Result<Removed> {
        (self.unmount)(how).await?;
        if how == Removal::Hard {
            self.stop.order();
        }
        Ok(Removed::when(self.gone()))
    }

    /// Completes when the file is unmounted, by us or by somebody else, and the last request is done. The future is independent of the
    /// export.
    pub fn gone(&self) -> impl Future<Output = ()> + use<> {
        let mut gone = self.gone.clone();
        async move {
            // The sender goes with the thread of the disk, and then it is gone too.
            let _ = gone.wait_for(|gone| *gone).await;
        }
    }
}

/// Carries requests out until no more can come or are wanted, and all that were begun are done. `leaves` ends those that are held then.
async fn serve(
    handler: &Handler,
    mut requests: mpsc::Receiver<Request>,
    stop: &StopListener,
    leaves: &Abort,
) {
    let mut running = FuturesUnordered::new();
    loop {
        tokio::select! {
            () = poll_fn(|cx| stop.poll(cx)) => break,
            request = requests.recv(), if running.len() < MAX_REQUESTS => match request {
                Some(request) => running.push(handler.handle(request)),
                None => break,
            },
            Some(()) = running.next(), if !running.is_empty() => {}
        }
    }
    // Whoever still asks gets an error.
    drop(requests);
    leaves.abort();
    while running.next().await.is_some() {}
}
