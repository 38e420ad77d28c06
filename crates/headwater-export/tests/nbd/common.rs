//! A server in a thread of its own, on a disk in memory, and a client that speaks the protocol by hand.

use std::cell::{Cell, Ref, RefCell};
use std::future::ready;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;
use std::time::Duration;

use headwater_block::disk::{Disk, DiskOptions};
use headwater_block::edge::Edge;
use headwater_block::node::{Access, Change};
use headwater_block::{
    Buffer, BufferMut, Error, ErrorKind, Extent, ExtentKind, Limits, LocalFuture, Node, Resolved, Result,
    TokioClock, WriteFlags, ZeroFlags,
};
use headwater_export::Listen;
use headwater_export::nbd::{Export, NbdServer, ServerOptions};
use headwater_nbd::{
    ChunkKind, ClientAsk, ClientHandshake, ErrorCode, NbdAddress, ReplyHeader, Request, ServerOffer, Step,
    reply,
};

/// What a test sees of, and does to, the disk of a server in another thread.
#[derive(Debug, Default)]
pub(crate) struct Probe {
    /// Changes that began, and that ended.
    pub(crate) begun: AtomicUsize,
    pub(crate) ended: AtomicUsize,
    /// Requests that may pass; the rest wait. Starts with "all".
    pub(crate) held: AtomicUsize,
    pub(crate) flushes: AtomicUsize,
    /// What has completed would go with the process.
    pub(crate) unsettled: AtomicBool,
    /// Bytes of data that were read.
    pub(crate) read_bytes: AtomicU64,
}

impl Probe {
    /// Holds changes back, or lets them go.
    pub(crate) fn hold(&self, held: bool) {
        self.held.store(held.into(), Ordering::SeqCst);
    }
}

/// Blocks of 4 KiB in memory; those that were never written or were zeroed are absent, and `resolve` knows it.
pub(crate) struct SparseNode {
    blocks: RefCell<Vec<Option<Box<[u8]>>>>,
    size: Cell<u64>,
    probe: Arc<Probe>,
}

const BLOCK: u64 = 4096;

impl SparseNode {
    /// An empty node.
    pub(crate) fn new(size: u64, probe: Arc<Probe>) -> Rc<Self> {
        let blocks = RefCell::new(vec![None; size.div_ceil(BLOCK) as usize]);
        Rc::new(Self { blocks, size: Cell::new(size), probe })
    }

    fn each_block(&self, range: Range<u64>, mut f: impl FnMut(&mut Option<Box<[u8]>>, Range<usize>)) {
        let mut blocks = self.blocks.borrow_mut();
        let mut at = range.start;
        while at < range.end {
            let next = ((at / BLOCK + 1) * BLOCK).min(range.end);
            let within = (at % BLOCK) as usize;
            f(&mut blocks[(at / BLOCK) as usize], within..within + (next - at) as usize);
            at = next;
        }
    }

    /// The end of the run of blocks in the state of the first, and whether they hold data.
    fn run(&self, range: Range<u64>) -> (u64, bool) {
        let blocks = self.blocks.borrow();
        let data = |at: u64| blocks.get((at / BLOCK) as usize).is_some_and(Option::is_some);
        let first = data(range.start);
        let mut end = (range.start / BLOCK + 1) * BLOCK;
        while end < range.end && data(end) == first {
            end += BLOCK;
        }
        (end.min(range.end), first)
    }

    async fn change(&self) {
        self.probe.begun.fetch_add(1, Ordering::SeqCst);
        while self.probe.held.load(Ordering::SeqCst) > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.probe.ended.fetch_add(1, Ordering::SeqCst);
    }
}

impl Node for SparseNode {
    fn name(&self) -> &str {
        "sparse"
    }

    fn driver(&self) -> &'static str {
        "sparse"
    }

    fn size(&self) -> u64 {
        self.size.get()
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn resolve(&self, range: Range<u64>) -> Resolved {
        match self.run(range.clone()) {
            (end, false) => Resolved::Zero { len: end - range.start, depth: 0 },
            _ => Resolved::Ask,
        }
    }

    fn read(&self, offset: u64, mut buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        let mut filled = 0;
        self.each_block(offset..offset + buf.len() as u64, |block, range| {
            let target = &mut buf[filled..filled + range.len()];
            filled += range.len();
            match block {
                Some(block) => target.copy_from_slice(&block[range]),
                None => target.fill(0),
            }
        });
        self.probe.read_bytes.fetch_add(buf.len() as u64, Ordering::SeqCst);
        Box::pin(ready(Ok(buf)))
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        let (end, data) = self.run(range.clone());
        let kind = if data { ExtentKind::Data } else { ExtentKind::Unallocated };
        Box::pin(ready(Ok(Extent::new(range.start, end - range.start, kind))))
    }

    fn access(&self, _range: Range<u64>, _change: Change) -> Access {
        Access::Shared
    }

    fn write(&self, offset: u64, data: Buffer, _flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.change().await;
            let mut used = 0;
            self.each_block(offset..offset + data.len() as u64, |block, range| {
                let source = &data[used..used + range.len()];
                used += range.len();
                block.get_or_insert_with(|| vec![0; BLOCK as usize].into())[range].copy_from_slice(source);
            });
            Ok(())
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            if flags.fast_only && !(offset | len).is_multiple_of(BLOCK) {
                return Err(Error::new(ErrorKind::Unsupported, "only whole blocks are fast"));
            }
            self.change().await;
            self.each_block(offset..offset + len, |block, range| match block {
                Some(_) if range.len() as u64 == BLOCK && flags.unmap => *block = None,
                Some(block) => block[range].fill(0),
                None => {}
            });
            Ok(())
        })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.write_zeroes(offset, len, ZeroFlags { unmap: true, ..ZeroFlags::default() })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.probe.flushes.fetch_add(1, Ordering::SeqCst);
        Box::pin(ready(Ok(())))
    }

    fn is_settled(&self, _range: Range<u64>) -> bool {
        !self.probe.unsettled.load(Ordering::SeqCst)
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        self.size.set(size);
        self.blocks.borrow_mut().resize(size.div_ceil(BLOCK) as usize, None);
        Box::pin(ready(Ok(())))
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Ok(())))
    }
}

/// Runs something on a thread of its own kind: as a disk's.
pub(crate) fn in_runtime(work: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, work);
}

/// An export that is writable, with all that there is.
pub(crate) fn export(name: &str, edge: &Rc<Edge>) -> Export {
    Export {
        name: name.to_owned(),
        description: format!("the export {name}"),
        edge: edge.clone(),
        writable: true,
        writethrough: false,
        allocation_depth: true,
    }
}

/// An empty disk.
pub(crate) fn disk(size: u64, probe: Arc<Probe>) -> Rc<Disk> {
    Disk::new(SparseNode::new(size, probe), Rc::new(TokioClock::new()), DiskOptions::default())
}

/// What the thread of a server has.
pub(crate) struct Owner {
    server: RefCell<Option<NbdServer>>,
    /// Of "disk".
    pub(crate) edge: Rc<Edge>,
}

impl Owner {
    pub(crate) fn server(&self) -> Ref<'_, NbdServer> {
        Ref::map(self.server.borrow(), |server| server.as_ref().expect("it is not stopped yet"))
    }
}

type Order = Box<dyn FnOnce(Rc<Owner>) -> LocalFuture<'static, ()> + Send>;

/// A server on a Unix socket with two exports, "disk" and "read-only", of two disks; stops when dropped.
pub(crate) struct Server {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) address: NbdAddress,
    /// Of "disk".
    pub(crate) probe: Arc<Probe>,
    orders: Option<tokio::sync::mpsc::UnboundedSender<Order>>,
    thread: Option<JoinHandle<()>>,
}

/// Size of both exports; no multiple of a block.
pub(crate) const SIZE: u64 = (32 << 20) + 512;

impl Server {
    pub(crate) fn start() -> Self {
        Self::start_with(ServerOptions::default())
    }

    pub(crate) fn start_with(options: ServerOptions) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nbd.sock");
        Self::start_at(directory, Listen::Unix { path }, options)
    }

    pub(crate) fn start_at(directory: tempfile::TempDir, listen: Listen, options: ServerOptions) -> Self {
        let probe = Arc::new(Probe::default());
        let (orders, mut received) = tokio::sync::mpsc::unbounded_channel::<Order>();
        let (bound, when_bound) = std::sync::mpsc::channel();
        let theirs = probe.clone();
        let thread = std::thread::spawn(move || {
            in_runtime(async {
                let server = NbdServer::start(listen, options).unwrap();
                let edge = Edge::new(disk(SIZE, theirs));
                server.add(export("disk", &edge)).unwrap();
                let other = Edge::new(disk(SIZE, Arc::default()));
                server.add(Export { writable: false, ..export("read-only", &other) }).unwrap();
                let none = NbdAddress::Unix { path: PathBuf::new() };
                bound.send(server.address().cloned().unwrap_or(none)).unwrap();
                let owner = Rc::new(Owner { server: RefCell::new(Some(server)), edge });
                while let Some(order) = received.recv().await {
                    tokio::task::spawn_local(order(owner.clone()));
                }
                let server = owner.server.borrow_mut().take().unwrap();
                server.stop().await;
            });
        });
        let address = when_bound.recv().unwrap();
        Self { directory, address, probe, orders: Some(orders), thread: Some(thread) }
    }

    /// Has the server's owner do something, which goes on while this returns. What comes of it is received.
    pub(crate) fn begin<R, F>(&self, order: impl FnOnce(Rc<Owner>) -> F + Send + 'static) -> Receiver<R>
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
        result
    }

    /// Has the server's owner do something, and waits for it.
    pub(crate) fn order<R, F>(&self, order: impl FnOnce(Rc<Owner>) -> F + Send + 'static) -> R
    where
        R: Send + 'static,
        F: Future<Output = R> + 'static,
    {
        self.begin(order).recv_timeout(Duration::from_secs(20)).expect("it is done")
    }

    /// The URI of an export.
    pub(crate) fn uri(&self, export: &str) -> String {
        headwater_nbd::NbdUri::new(self.address.clone(), export).to_string()
    }

    /// A path in the server's directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A connection that has said nothing yet.
    pub(crate) fn connect(&self) -> UnixStream {
        let NbdAddress::Unix { path } = &self.address else { panic!("a Unix socket is wanted") };
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// A client of the export "disk" with all that is offered.
    pub(crate) fn client(&self) -> Client {
        let contexts = ["base:allocation", "qemu:allocation-depth"].map(str::to_owned).to_vec();
        Client::negotiate(self.connect(), ClientAsk { contexts, ..ClientAsk::new("disk") })
    }

    /// Orders the end without waiting for it.
    pub(crate) fn order_stop(&mut self) {
        self.orders = None;
    }

    /// Ends the server; panics if it did.
    pub(crate) fn stop(&mut self) {
        self.order_stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.orders = None;
        self.probe.hold(false);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.unwrap();
            }
        }
    }
}

/// A client that speaks the protocol by hand, so that it can also speak it wrongly.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    pub(crate) offer: ServerOffer,
}

/// A whole answer to one request.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) cookie: u64,
    pub(crate) error: Option<ErrorCode>,
    pub(crate) words: String,
    pub(crate) data: Vec<u8>,
    /// Offsets and lengths of holes.
    pub(crate) holes: Vec<(u64, u32)>,
    /// Context ids, with lengths and flags of extents.
    pub(crate) status: Vec<(u32, Vec<(u64, u32)>)>,
}

impl Client {
    pub(crate) fn negotiate(stream: UnixStream, ask: ClientAsk) -> Self {
        Self::try_negotiate(stream, ask).unwrap()
    }

    /// Negotiates; gives the words of a refusal.
    pub(crate) fn try_negotiate(mut stream: UnixStream, ask: ClientAsk) -> std::result::Result<Self, String> {
        let mut handshake = ClientHandshake::new(ask);
        let (mut input, mut output) = (Vec::new(), Vec::new());
        loop {
            match handshake.step(&input, &mut output).map_err(|error| error.to_string())? {
                Step::Done { outcome: offer, .. } => return Ok(Self { stream, offer }),
                Step::Next { state, consumed } => {
                    input.drain(..consumed);
                    stream.write_all(&output).map_err(|error| error.to_string())?;
                    output.clear();
                    handshake = state;
                }
                Step::More { state, needed } => {
                    let known = input.len();
                    input.resize(needed, 0);
                    stream.read_exact(&mut input[known..]).map_err(|error| error.to_string())?;
                    handshake = state;
                }
            }
        }
    }

    pub(crate) fn send(&mut self, request: Request, data: &[u8]) {
        self.stream.write_all(&[&request.encode(self.offer.headers)[..], data].concat()).unwrap();
    }

    fn take(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// The next whole answer. `read` is how long the data of a simple reply are.
    pub(crate) fn answer(&mut self, read: usize) -> Answer {
        let mut answer = Answer::default();
        loop {
            let mut head = self.take(16);
            let headers = self.offer.headers;
            if !headers.are_structured() || head.starts_with(&0x6744_6698_u32.to_be_bytes()) {
                let (header, _) = ReplyHeader::decode(&head, headers, 32 << 20).unwrap().unwrap();
                let ReplyHeader::Simple { cookie, error } = header else { panic!("{header:?}") };
                let data = if error.is_none() { self.take(read) } else { Vec::new() };
                return Answer { cookie, error, data, ..answer };
            }
            head.extend(self.take(if headers.are_extended() { 16 } else { 4 }));
            let (header, _) = ReplyHeader::decode(&head, headers, 32 << 20).unwrap().unwrap();
            let ReplyHeader::Chunk(chunk) = header else { panic!("{header:?}") };
            let payload = self.take(chunk.length as usize);
            answer.cookie = chunk.to.cookie;
            match chunk.kind {
                ChunkKind::None => {}
                ChunkKind::OffsetData => answer.data.extend_from_slice(&payload[8..]),
                ChunkKind::OffsetHole => answer.holes.push(reply::decode_hole(&payload).unwrap()),
                ChunkKind::BlockStatus => {
                    let (context, extents) = reply::decode_block_status(&payload, headers).unwrap();
                    let extents = extents.iter().map(|extent| (extent.length, extent.flags)).collect();
                    answer.status.push((context, extents));
                }
                kind => {
                    let error = reply::decode_error(kind, &payload).unwrap();
                    (answer.error, answer.words) = (Some(error.code), error.message);
                }
            }
            if chunk.done {
                return answer;
            }
        }
    }

    /// Sends a request and waits for its answer.
    pub(crate) fn ask(&mut self, request: Request, data: &[u8]) -> Answer {
        self.send(request, data);
        let answer = self.answer(0);
        assert_eq!(answer.cookie, request.cookie);
        answer
    }

    /// True if the server closed the connection, and said nothing before.
    pub(crate) fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0) | Err(_))
    }
}
