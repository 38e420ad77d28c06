//! A file behind an HTTP or HTTPS server as a read-only node.
//!
//! - [`HttpNode`], here: opening, splitting reads into ranges, the small cache. `fetch`: one range, tried until it is there.
//! - [`RangeSource`]: what the node is over; object stores are one, too (`object`).
//! - `ahead`: what is asked for before it is wanted. `transport`: connections. `answer`: what a response means. `url`: addresses and redirects. `cache`: blocks of small reads.
//!
//! The object is pinned when it is opened, by its size and its `ETag` or `Last-Modified`: each request carries a condition,
//! each response is compared, and once a difference was seen the node fails for good with `SourceChanged`, lest a disk be
//! mixed from two sources.

mod ahead;
pub(crate) mod answer;
mod cache;
pub(crate) mod fetch;
mod ranges;
pub(crate) mod transport;
mod url;

use self::ahead::{Ahead, KEPT};
pub(crate) use self::cache::BLOCK;
use self::cache::BlockCache;
use self::fetch::Source;
pub(crate) use self::ranges::RangeSource;
pub(crate) use self::url::Target;
use futures_util::FutureExt;
use futures_util::future::{Shared, try_join_all};
use headwater_block::{
    Buffer, BufferMut, Error, ErrorKind, Extent, ExtentKind, Identity, Limits, LocalFuture, Node, Resolved,
    Result, TokioClock,
};
use std::cell::RefCell;
use std::future::ready;
use std::ops::Range;
use std::rc::{Rc, Weak};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Reads longer than this, in bytes, are split into ranges of this size that run at the same time. As long as a job's copies, because each
/// connection has one range at a time: with 1 MiB, 16 connections had 16 MiB on the way, which at 20 ms makes 0.8 GB/s at
/// the very best.
const PIECE: usize = 2 << 20;

/// Reads of at most this many bytes go through the cache.
const SMALL: usize = 32 << 10;

/// A source whose first answer takes longer than this is far away: then something is gained by what is done ahead.
const FAR: Duration = Duration::from_millis(1);

/// How to talk to an HTTP server.
#[derive(Debug, Clone)]
pub struct HttpOptions {
    /// The most connections, each with one request at a time; 1 to 256.
    pub connections: u32,
    /// How long connecting may take, TLS included.
    pub connect_timeout: Duration,
    /// How long the server may send nothing while it is to send something.
    pub request_timeout: Duration,
    /// For how long a request that brings nothing is tried again.
    pub retry: Duration,
    /// The same for the first request of all, when the node is opened.
    pub open_retry: Duration,
    /// How many bytes of the beginning are asked for, over several connections, with the first request, because they will be read soon. They are kept in memory until
    /// they were read, or some seconds have passed.
    pub read_ahead: u64,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            connections: 16,
            connect_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(30),
            retry: Duration::from_secs(30),
            open_retry: Duration::from_secs(30),
            read_ahead: 0,
        }
    }
}

/// A block that is being fetched: its number and what comes of it.
type Fetch = (u64, Shared<oneshot::Receiver<Result<Buffer>>>);

/// A file behind an HTTP or HTTPS server, or in an object store. See the [module](self).
pub struct HttpNode {
    this: Weak<HttpNode>,
    name: String,
    driver: &'static str,
    size: u64,
    depth: u32,
    source: Rc<dyn RangeSource>,
    ahead: Rc<Ahead>,
    /// How long it took until it was open, in which there is one round trip at least.
    opened_within: Duration,
    cache: Rc<RefCell<BlockCache>>,
    fetching: Rc<RefCell<Vec<Fetch>>>,
}

impl HttpNode {
    /// Opens what `url` (`http://...` or `https://...`) names and pins it. The node lives in the `LocalSet` in which this is called: its
    /// tasks run there.
    ///
    /// # Errors
    /// `InvalidInput` for an address that isn't one, `Unavailable` or `TimedOut` if there is no server, `NotFound` and
    /// `PermissionDenied` as the server says, `Unsupported` if it can't send parts of the file, `Corrupt` if its answers
    /// contradict themselves.
    pub async fn open(url: &str, options: HttpOptions) -> Result<Rc<Self>> {
        let depth = options.connections.clamp(1, 256);
        let options = HttpOptions { connections: depth, ..options };
        let begun = Instant::now();
        let (source, first, coming) = Source::open(url, options, BLOCK).await?;
        let driver = if url.len() >= 6 && url[..6].eq_ignore_ascii_case("https:") { "https" } else { "http" };
        let node = Self::over(Rc::new(source), url, driver, depth, first, begun.elapsed());
        node.ahead.comes(coming);
        Ok(node)
    }

    /// A node called `name` over `source`, whose first bytes (up to [`BLOCK`] of them) are `first`. `depth` is how many ranges it fetches at
    /// the same time, `opened_within` how long it took to get there.
    pub(crate) fn over(
        source: Rc<dyn RangeSource>,
        name: &str,
        driver: &'static str,
        depth: u32,
        first: Buffer,
        opened_within: Duration,
    ) -> Rc<Self> {
        let mut cache = BlockCache::default();
        if !first.is_empty() {
            cache.insert(0, first);
        }
        Rc::new_cyclic(|this| Self {
            this: this.clone(),
            name: name.to_owned(),
            driver,
            size: source.size(),
            depth,
            ahead: Ahead::new(source.clone(), Rc::new(TokioClock::new()), KEPT),
            opened_within,
            source,
            cache: Rc::new(RefCell::new(cache)),
            fetching: Rc::default(),
        })
    }

    async fn read_all(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        self.source.check()?;
        let here = self.size.saturating_sub(offset).min(buf.len() as u64);
        // `here` is at most the buffer's length.
        let mut past_end = buf.split_off(here as usize);
        past_end.fill(0);
        let buf = if buf.len() <= SMALL {
            self.read_cached(offset, buf).await?
        } else {
            self.read_pieces(offset, buf).await?
        };
        Ok(buf.join(past_end))
    }

    async fn read_pieces(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        let mut pieces = Vec::new();
        let mut at = offset;
        while !buf.is_empty() {
            let rest = buf.split_off(PIECE.min(buf.len()));
            let piece = std::mem::replace(&mut buf, rest);
            let len = piece.len() as u64;
            pieces.push(self.ahead.fetch(at, piece));
            at += len;
        }
        let done = try_join_all(pieces).await?;
        // `buf` is the empty rest after the last piece.
        Ok(done.into_iter().reduce(BufferMut::join).unwrap_or(buf))
    }

    async fn read_cached(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let block = self.block(at / BLOCK).await?;
            // Within a block.
            let from = (at % BLOCK) as usize;
            let len = block.len().saturating_sub(from).min(buf.len() - done);
            if len == 0 {
                let message = format!("{}: nothing at {at}, before the end", self.name);
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
            buf[done..done + len].copy_from_slice(&block[from..from + len]);
            done += len;
        }
        Ok(buf)
    }

    /// A block, from the cache or fetched by a task of its own, which all who want it share and none can interrupt.
    async fn block(&self, number: u64) -> Result<Buffer> {
        if let Some(block) = self.cache.borrow_mut().get(number) {
            return Ok(block);
        }
        let known = self.fetching.borrow().iter().find(|(other, _)| *other == number).map(|(_, f)| f.clone());
        let fetch = known.unwrap_or_else(|| self.start_fetching(number));
        let gone = |_| Err(Error::new(ErrorKind::Closed, format!("{} was closed", self.name)));
        fetch.await.unwrap_or_else(gone)
    }

    fn start_fetching(&self, number: u64) -> Shared<oneshot::Receiver<Result<Buffer>>> {
        let (sender, receiver) = oneshot::channel();
        let fetch = receiver.shared();
        self.fetching.borrow_mut().push((number, fetch.clone()));
        let (ahead, cache, fetching) = (self.ahead.clone(), self.cache.clone(), self.fetching.clone());
        let offset = number * BLOCK;
        // At most `BLOCK`.
        let len = self.size.saturating_sub(offset).min(BLOCK) as usize;
        tokio::task::spawn_local(async move {
            let block = ahead.fetch(offset, BufferMut::new(len)).await.map(BufferMut::freeze);
            if let Ok(block) = &block {
                cache.borrow_mut().insert(number, block.clone());
            }
            fetching.borrow_mut().retain(|(other, _)| *other != number);
            let _ = sender.send(block);
        });
        fetch
    }

    fn refusal(&self) -> Error {
        let message = format!("{}: what is behind {} can only be read", self.name, self.driver);
        Error::new(ErrorKind::ReadOnly, message)
    }
}

impl Node for HttpNode {
    fn name(&self) -> &str {
        &self.name
    }

    fn driver(&self) -> &'static str {
        self.driver
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        Limits { preferred: 64 << 10, depth: self.depth, remote: true, ..Limits::default() }
    }

    fn resolve(&self, range: Range<u64>) -> Resolved {
        if range.start >= self.size {
            return Resolved::Zero { len: range.end - range.start, depth: 0 };
        }
        match self.this.upgrade() {
            Some(node) => {
                let len = range.end.min(self.size) - range.start;
                Resolved::At { node, offset: range.start, len, depth: 0 }
            }
            None => Resolved::Ask,
        }
    }

    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(self.read_all(offset, buf))
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        let extent = if range.start >= self.size {
            Extent::new(range.start, range.end - range.start, ExtentKind::Zero)
        } else {
            let len = range.end.min(self.size) - range.start;
            Extent { host_offset: Some(range.start), ..Extent::new(range.start, len, ExtentKind::Data) }
        };
        Box::pin(ready(Ok(extent)))
    }

    fn expect(&self, range: Range<u64>) {
        if self.opened_within < FAR {
            return;
        }
        let range = range.start.min(self.size)..range.end.min(self.size);
        if range.is_empty() {
            self.source.connect_ahead();
        } else {
            self.ahead.ask(range, self.depth);
        }
    }

    headwater_block::refuse_changes!();

    fn identity(&self) -> Result<Identity> {
        Ok(Identity { contents: self.source.marks(), ..Identity::default() })
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        self.ahead.forget();
        self.source.close();
        Box::pin(ready(Ok(())))
    }
}
