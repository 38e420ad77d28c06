//! One disk under one path, from mounting to the last answer.

use super::handler::{Access, Handler};
use super::mount::Mounted;
use super::serve::{Counts, Wakers, serve};
use crate::removal::{Removal, Removed};
use crate::stop::Stop;
use headwater_block::range_lock::RangeLock;
use headwater_block::{Abort, Client, Edge, Error, LocalFuture, Result};
use headwater_fuse::{Connection, Options};
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use tokio::sync::watch;

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
    /// Whether requests may come over io_uring. They do where the kernel offers it.
    pub over_ring: bool,
    /// Called after a client has changed the disk's size, for those who must be told.
    pub resized: Box<dyn Fn()>,
}

/// A disk that is there as a file. Dropped without [`FuseExport::remove`], the file stays until it is unmounted from outside, and whoever
/// uses it gets errors.
pub struct FuseExport {
    path: PathBuf,
    unmount: Box<dyn Fn(Removal) -> LocalFuture<'static, Result<()>>>,
    stop: Stop,
    counts: Rc<Counts>,
    gone: watch::Receiver<bool>,
}

impl FuseExport {
    /// Serves the file system that was just mounted. Must be called inside a `LocalSet`.
    ///
    /// # Errors
    /// If the kernel speaks no FUSE that we know, or what is needed to hear it isn't to be had.
    pub fn start(mounted: Mounted, options: FuseOptions) -> Result<Self> {
        let Mounted { path, device, since, unmount } = mounted;
        let failed = |err| Error::from_io(err, format!("speak FUSE with the kernel at {}", path.display()));
        // The kernel has asked for the first exchange when it was mounted: this doesn't wait.
        let (connection, ready) =
            Connection::open(device, Options { over_ring: options.over_ring }).map_err(failed)?;
        let wakers = Wakers::new(&connection, ready).map_err(failed)?;
        let name = path.display().to_string();
        match connection.why_no_ring() {
            None => tracing::info!("{name}: requests come over io_uring"),
            Some(why) => tracing::info!("{name}: requests come through /dev/fuse, not over io_uring: {why}"),
        }
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
        let counts = Rc::<Counts>::default();
        let counted = counts.clone();
        tokio::task::spawn_local(async move {
            if let Err(err) = serve(&handler, connection, &wakers, &counted, &stopped, &leaves).await {
                tracing::error!("{name} has no server any more: {err}");
            }
            // Nobody may be waiting.
            let _ = ended.send(true);
        });
        Ok(Self { path, unmount, stop, counts, gone })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many requests have come so far: over io_uring, and through /dev/fuse.
    pub fn requests(&self) -> (u64, u64) {
        (self.counts.over_ring.get(), self.counts.through_file.get())
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
