//! A server in a thread of its own, on a disk in memory that a test can watch and hold.

use std::cell::RefCell;
use std::ops::Range;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use headwater_block::memory::MemoryNode;
use headwater_block::node::{Access, Change};
use headwater_block::{
    Buffer, BufferMut, Disk, DiskOptions, Edge, Extent, Limits, LocalFuture, Node, Resolved, Result,
    TokioClock, WriteFlags, ZeroFlags,
};
use headwater_export::Listen;
use headwater_export::vhost::{BlkExport, BlkOptions, VhostUserBlk};

/// The size of the disk in bytes.
pub(crate) const SIZE: usize = 8 << 20;

/// What happened to the disk, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Did {
    Write { offset: u64, len: u64, fua: bool },
    Zero { offset: u64, len: u64, fua: bool, unmap: bool },
    Discard { offset: u64, len: u64 },
    Flush,
}

/// What a test sees of, and does to, the disk of a server in another thread.
#[derive(Debug, Default)]
pub(crate) struct Probe {
    /// Changes wait while this is set.
    pub(crate) hold: AtomicBool,
    /// Changes that have come, held ones included.
    pub(crate) begun: AtomicUsize,
    /// What has completed would go with the process.
    pub(crate) unsettled: AtomicBool,
    log: Mutex<Vec<Did>>,
}

impl Probe {
    /// What happened since the last time.
    pub(crate) fn take_log(&self) -> Vec<Did> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    async fn did(&self, what: Did) {
        self.begun.fetch_add(1, Ordering::SeqCst);
        while self.hold.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.log.lock().unwrap().push(what);
    }

    /// Waits until so many changes have come.
    pub(crate) fn wait_for(&self, begun: usize) {
        wait_until("changes come", || self.begun.load(Ordering::SeqCst) >= begun);
    }
}

/// Waits for a condition, at most 20 seconds.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..4000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("waited in vain: {what}");
}

/// A disk in memory that tells and waits.
struct Watched {
    below: Rc<MemoryNode>,
    probe: Arc<Probe>,
}

impl Node for Watched {
    fn name(&self) -> &str {
        "watched"
    }

    fn driver(&self) -> &'static str {
        "watched"
    }

    fn size(&self) -> u64 {
        self.below.size()
    }

    fn limits(&self) -> Limits {
        Limits { preferred: 64 << 10, ..self.below.limits() }
    }

    fn is_read_only(&self) -> bool {
        self.below.is_read_only()
    }

    fn resolve(&self, _range: Range<u64>) -> Resolved {
        Resolved::Ask
    }

    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        self.below.read(offset, buf)
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        self.below.status(range)
    }

    fn access(&self, range: Range<u64>, change: Change) -> Access {
        self.below.access(range, change)
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.probe.did(Did::Write { offset, len: data.len() as u64, fua: flags.fua }).await;
            self.below.write(offset, data, flags).await
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.probe.did(Did::Zero { offset, len, fua: flags.fua, unmap: flags.unmap }).await;
            self.below.write_zeroes(offset, len, flags).await
        })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.probe.did(Did::Discard { offset, len }).await;
            self.below.discard(offset, len).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.probe.did(Did::Flush).await;
            self.below.flush().await
        })
    }

    fn is_settled(&self, _range: Range<u64>) -> bool {
        !self.probe.unsettled.load(Ordering::SeqCst)
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        self.below.resize(size)
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        self.below.close()
    }
}

/// What the thread of a server has.
pub(crate) struct Owner {
    pub(crate) export: RefCell<Option<VhostUserBlk>>,
    /// A second one, of another disk at another socket: whatever happens to the first, it works.
    pub(crate) _other: VhostUserBlk,
    pub(crate) edge: Rc<Edge>,
    pub(crate) node: Rc<MemoryNode>,
}

type Order = Box<dyn FnOnce(Rc<Owner>) -> LocalFuture<'static, ()> + Send>;

/// A server with two exports; stops when dropped.
pub(crate) struct Server {
    directory: Arc<tempfile::TempDir>,
    pub(crate) probe: Arc<Probe>,
    orders: Option<tokio::sync::mpsc::UnboundedSender<Order>>,
    thread: Option<JoinHandle<()>>,
}

/// Everything that a guest can be given.
pub(crate) fn writable() -> BlkOptions {
    BlkOptions { writable: true, queues: 2, ..BlkOptions::default() }
}

impl Server {
    pub(crate) fn start(options: BlkOptions) -> Self {
        Self::start_in(Arc::new(tempfile::tempdir().unwrap()), options, vec![0; SIZE])
    }

    fn start_in(directory: Arc<tempfile::TempDir>, options: BlkOptions, contents: Vec<u8>) -> Self {
        let probe = Arc::new(Probe::default());
        let (orders, mut received) = tokio::sync::mpsc::unbounded_channel::<Order>();
        let (bound, when_bound) = std::sync::mpsc::channel();
        let (theirs, places) = (probe.clone(), directory.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            tokio::task::LocalSet::new().block_on(&runtime, async {
                let node = MemoryNode::new("memory", contents);
                let watched = Rc::new(Watched { below: node.clone(), probe: theirs });
                let disk =
                    |node: Rc<dyn Node>| Disk::new(node, Rc::new(TokioClock::new()), DiskOptions::default());
                let edge = Edge::new(disk(watched));
                let serve = |name: &str, edge: Rc<Edge>| {
                    let listen = Listen::Unix { path: places.path().join(name) };
                    VhostUserBlk::start(listen, BlkExport { id: name.to_owned(), edge, options }).unwrap()
                };
                let other = serve("other", Edge::new(disk(MemoryNode::new("other", vec![9; SIZE]))));
                let export = RefCell::new(Some(serve("disk", edge.clone())));
                bound.send(()).unwrap();
                let owner = Rc::new(Owner { export, _other: other, edge, node });
                while let Some(order) = received.recv().await {
                    tokio::task::spawn_local(order(owner.clone()));
                }
                // Whoever wants a kill has the export dropped with the runtime; everybody else has a drain.
                let export = owner.export.borrow_mut().take();
                if let Some(export) = export {
                    export.stop().await;
                }
            });
        });
        when_bound.recv().unwrap();
        Self { directory, probe, orders: Some(orders), thread: Some(thread) }
    }

    /// Ends it as a kill would, whatever it is doing, and starts another at the same place, which finds the disk as it was left.
    pub(crate) fn kill_and_restart(mut self, options: BlkOptions) -> Self {
        let contents = self.order(|owner| async move {
            // Not dropped, which would tell it to finish its work; without its runtime, it does nothing any more.
            std::mem::forget(owner.export.borrow_mut().take());
            owner.node.contents()
        });
        self.orders = None;
        self.thread.take().unwrap().join().unwrap();
        Self::start_in(self.directory.clone(), options, contents)
    }

    /// Has the server's owner do something, and waits for it.
    pub(crate) fn order<R, F>(&self, order: impl FnOnce(Rc<Owner>) -> F + Send + 'static) -> R
    where
        R: Send + 'static,
        F: Future<Output = R> + 'static,
    {
        let (done, result) = std::sync::mpsc::channel();
        let order: Order = Box::new(move |owner| {
            let work = order(owner);
            Box::pin(async move { done.send(work.await).unwrap_or_default() })
        });
        self.orders.as_ref().unwrap().send(order).ok().unwrap();
        result.recv_timeout(Duration::from_secs(20)).expect("it is done")
    }

    /// The disk's bytes.
    pub(crate) fn contents(&self) -> Vec<u8> {
        self.order(|owner| async move { owner.node.contents() })
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("disk")
    }

    pub(crate) fn other_path(&self) -> PathBuf {
        self.directory.path().join("other")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.probe.hold.store(false, Ordering::SeqCst);
        self.orders = None;
        if let Some(thread) = self.thread.take()
            && let Err(panic) = thread.join()
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}
