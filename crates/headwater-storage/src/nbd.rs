//! An export of an NBD server as a node: the source that a disk streams from, or a target that is written.
//!
//! - [`NbdNode`], here: splits and aligns requests, retries reads, keeps the promise of a flush.
//! - `pool`: which connection a request takes; reconnecting.
//! - `connection`: the requests in flight on one connection, and the task that writes them. `reader`: the task that
//!   reads replies. `remote`: which server and export, and how to get there. `socket`: TCP or Unix, TLS, and negotiation.
//! - `status`: where the holes are; `extent_map` remembers it. `write`: changes, and what a flush promises.
//!
//! Requests run concurrently, over several connections if the server says that they see the same disk. Reads survive the loss of a
//! connection; writes don't, because what the server had acknowledged and not made durable may be lost with it: a flush after
//! that fails. Whoever knows better can have both ([`NbdOptions::repeat_changes`]).

mod connection;
mod extent_map;
mod pool;
mod reader;
mod remote;
mod socket;
mod status;
mod write;

use self::connection::{Answer, Failure, Reply};
use self::pool::Pool;
use self::remote::Remote;
use self::status::Statuses;
use self::write::Durability;
use crate::retry::Retry;
use futures_util::future::try_join_all;
use headwater_block::node::{Access, Change};
use headwater_block::{
    Buffer, BufferMut, Error, ErrorKind, Extent, Limits, LocalFuture, Node, Resolved, Result, WriteFlags,
    ZeroFlags, recall,
};
use headwater_nbd::{NbdUri, TransmissionFlags, UriTls};
use headwater_tls::{Endpoint, TlsCredentials, TlsOptions};
use std::ops::Range;
use std::rc::{Rc, Weak};
use std::time::Duration;
use tokio::sync::oneshot;

pub use self::remote::Server;

/// How many connections are used with a server that allows several.
pub const DEFAULT_CONNECTIONS: u32 = 4;

/// Requests worth having in flight on one connection: what nbdkit and qemu-nbd work on at a time.
const DEPTH: u32 = 16;

/// How to talk to an NBD server.
#[derive(Debug, Clone)]
pub struct NbdOptions {
    /// The most connections to open, 1 to 64. By default [`DEFAULT_CONNECTIONS`] if the server says that it is safe, else 1. More than
    /// one are opened only if the server says so or nothing is written.
    pub connections: Option<u32>,
    /// How long connecting and negotiating may take.
    pub connect_timeout: Duration,
    /// A connection on which requests wait and nothing arrives for so long is given up.
    pub request_timeout: Duration,
    /// For how long requests wait for a new connection after all were lost, and reads are made again. When it is over they fail, until
    /// a connection is made. QEMU calls it `reconnect-delay`.
    pub retry: Duration,
    /// Changes too are made again when the connection was lost, and a flush after that counts, as with QEMU's `reconnect-delay`.
    ///
    /// What the server had acknowledged and not made durable is taken to be still there. That is so if only the network failed or the
    /// server program; if the server's machine crashed, it may be lost, and no flush tells.
    pub repeat_changes: bool,
    /// For how long connecting is tried when the node is opened. Zero: once.
    pub open_timeout: Duration,
    /// Start TLS with these, or don't connect.
    pub tls: Option<TlsCredentials>,
    /// The name that the server's certificate must be for, if it isn't that of the host. Needed with a server that is to be verified and
    /// has no host name, as one at a Unix socket.
    pub tls_hostname: Option<String>,
    /// Refuse changes even if the server would take them.
    pub read_only: bool,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self {
            connections: None,
            connect_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(30),
            retry: Duration::from_secs(10),
            repeat_changes: false,
            open_timeout: Duration::ZERO,
            tls: None,
            tls_hostname: None,
            read_only: false,
        }
    }
}

/// An export of an NBD server. See the [module](self).
pub struct NbdNode {
    this: Weak<NbdNode>,
    name: Rc<str>,
    size: u64,
    retry: Duration,
    repeat_changes: bool,
    pool: Rc<Pool>,
    statuses: Rc<Statuses>,
    durability: Durability,
}

impl Drop for NbdNode {
    fn drop(&mut self) {
        self.pool.abandon();
    }
}

impl NbdNode {
    /// Connects to the export that `uri` names: `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`, or `nbds` for either, whose
    /// credentials then count instead of those of the options. The node lives in the `LocalSet` in which this is called: its tasks run
    /// there.
    ///
    /// # Errors
    /// `InvalidInput` for a URI that isn't one; see also [`NbdNode::open`].
    pub async fn connect(uri: &str, mut options: NbdOptions) -> Result<Rc<Self>> {
        let parsed: NbdUri = uri.parse().map_err(|e| Error::new(ErrorKind::InvalidInput, format!("{e}")))?;
        if let Some(tls) = parsed.tls {
            let (tls, hostname) = credentials(tls).map_err(|e| e.context(uri))?;
            options.tls = Some(tls);
            options.tls_hostname = hostname;
        }
        Self::reach(Some(uri), parsed.address.into(), &parsed.export, options).await
    }

    /// Connects to the export called `export` of `server`. The node lives in the `LocalSet` in which this is called.
    ///
    /// # Errors
    /// `Unavailable` or `TimedOut` if there is no server, `NotFound` if it does not have the export, `Unsupported` if it wants TLS and
    /// there are no credentials, or the other way, `PermissionDenied` if one side does not take the other's certificate, `InvalidInput` if
    /// the credentials are no use, `Corrupt` if it doesn't speak NBD.
    pub async fn open(server: Server, export: &str, options: NbdOptions) -> Result<Rc<Self>> {
        Self::reach(None, server, export, options).await
    }

    async fn reach(
        name: Option<&str>,
        server: Server,
        export: &str,
        mut options: NbdOptions,
    ) -> Result<Rc<Self>> {
        let (tls, tls_hostname) = (options.tls.take(), options.tls_hostname.take());
        let remote = Remote::new(name, server, export, tls, tls_hostname)?;
        let name: Rc<str> = remote.name().into();
        let (retry, repeat_changes) = (options.retry, options.repeat_changes);
        let pool = Pool::connect(name.clone(), remote, options).await?;
        let size = pool.offer().size;
        Ok(Rc::new_cyclic(|this| Self {
            this: this.clone(),
            name,
            size,
            retry,
            repeat_changes,
            statuses: Statuses::new(pool.offer()),
            pool,
            durability: Durability::default(),
        }))
    }

    /// The smallest unit of requests, in bytes; a power of two.
    fn minimum(&self) -> u64 {
        self.pool.offer().block_sizes.minimum.into()
    }

    fn offers(&self, flag: TransmissionFlags) -> bool {
        self.pool.offer().flags.contains(flag)
    }

    /// Rounds a range out to what the server takes; never past the end.
    fn round_out(&self, range: Range<u64>) -> Range<u64> {
        let minimum = self.minimum();
        // The size is below 2^63, and the range is within the size.
        let end = range.end.next_multiple_of(minimum).min(self.size);
        range.start - range.start % minimum..end
    }

    async fn read_all(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        let here = self.size.saturating_sub(offset).min(buf.len() as u64);
        // `here` is at most the buffer's length.
        let mut past_end = buf.split_off(here as usize);
        past_end.fill(0);
        let range = offset..offset.saturating_add(here);
        if range.is_empty() || self.statuses.known_zero(range.clone()) {
            buf.fill(0);
            return Ok(buf.join(past_end));
        }
        let aligned = self.round_out(range.clone());
        let buf = if aligned == range {
            self.read_parts(offset, buf).await?
        } else {
            let length = usize::try_from(aligned.end - aligned.start).map_err(|_| self.too_long(here))?;
            let whole = self.read_parts(aligned.start, BufferMut::new(length)).await?;
            // The difference is less than the minimum block size.
            let skip = (range.start - aligned.start) as usize;
            let end = skip + buf.len();
            buf.copy_from_slice(&whole[skip..end]);
            buf
        };
        Ok(buf.join(past_end))
    }

    fn too_long(&self, len: u64) -> Error {
        Error::new(ErrorKind::InvalidInput, format!("{}: a request of {len} bytes is too long", self.name))
    }

    /// Reads an aligned range, in several requests at once if it is longer than the server allows.
    async fn read_parts(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        let most = self.pool.max_data() as usize;
        if buf.len() <= most {
            return self.read_part(offset, buf).await;
        }
        let mut parts = Vec::new();
        let mut at = offset;
        while !buf.is_empty() {
            let rest = buf.split_off(most.min(buf.len()));
            let part = std::mem::replace(&mut buf, rest);
            let len = part.len() as u64;
            parts.push(self.read_part(at, part));
            at += len;
        }
        let done = try_join_all(parts).await?;
        // `buf` is the empty rest after the last part.
        let whole = done.into_iter().reduce(BufferMut::join);
        Ok(whole.unwrap_or(buf))
    }

    /// Reads with one request, again when the connection was lost.
    async fn read_part(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        let len = buf.len();
        let mut attempts = Attempts::new(self.retry);
        loop {
            let connection = recall::wait(self.pool.acquire()).await??;
            let failure = match settle(connection.read(offset, buf)).await {
                Ok(Answer::Data(done)) => return Ok(done),
                Ok(_) => return Err(self.refused(misplaced(), "read", offset, len as u64)),
                Err(failure) => failure,
            };
            let again = self.again(&mut attempts, &failure).await?;
            match failure.buf {
                Some(same) if again => buf = same,
                _ => return Err(self.refused(failure.error, "read", offset, len as u64)),
            }
        }
    }

    /// Whether to make a request again after this failure.
    async fn again(&self, attempts: &mut Attempts, failure: &Failure) -> Result<bool> {
        Ok(!self.pool.is_impatient() && recall::wait(attempts.again(failure)).await?)
    }

    /// Says which request it was that failed.
    fn refused(&self, error: Error, what: &str, offset: u64, len: u64) -> Error {
        error.context(format_args!("{what} of {len} bytes at {offset} of {}", self.name))
    }
}

/// A reply that does not fit its request; the reader has seen to it that there is none.
/// What a client proves itself with as a URI says, and the name that the server's certificate must be for, if that isn't the host's.
fn credentials(tls: UriTls) -> Result<(TlsCredentials, Option<String>)> {
    let (options, hostname) = match tls {
        UriTls::Certificates { directory, hostname, verify_peer } => {
            (TlsOptions::X509 { endpoint: Endpoint::Client, directory, verify_peer }, hostname)
        }
        UriTls::Psk { keys, user: Some(user) } => (TlsOptions::PskClient { keys, user }, None),
        UriTls::Psk { user: None, .. } => {
            let message =
                "whose key is to be used isn't said; write nbds://USER@HOST/EXPORT?tls-psk-file=FILE";
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
    };
    Ok((TlsCredentials::load(&options)?, hostname))
}

fn misplaced() -> Error {
    Error::new(ErrorKind::Corrupt, "the reply is one to another request")
}

/// Waits for a reply; a connection that is given up sends none.
async fn settle(reply: oneshot::Receiver<Reply>) -> Reply {
    reply.await.unwrap_or_else(|_| {
        let error = Error::new(ErrorKind::Closed, "the node was closed");
        Err(Failure { error, lost: false, buf: None })
    })
}

/// How often a request is made again.
struct Attempts {
    retry: Retry,
    lost: bool,
    saw_garbage: bool,
}

impl Attempts {
    fn new(retry: Duration) -> Self {
        Self { retry: Retry::new(retry), lost: false, saw_garbage: false }
    }

    /// Whether to make the request again after this failure.
    async fn again(&mut self, failure: &Failure) -> bool {
        if !failure.lost {
            return false;
        }
        if failure.error.kind() == ErrorKind::Corrupt {
            // The garbage may have been the answer to somebody else; a server that sends it again is broken.
            return !std::mem::replace(&mut self.saw_garbage, true);
        }
        // At once when a connection is lost for the first time; but a server may take connections and close them.
        let pause = if std::mem::replace(&mut self.lost, true) { None } else { Some(Duration::ZERO) };
        self.retry.pause(failure.error.clone(), pause).await.is_ok()
    }
}

impl Node for NbdNode {
    fn name(&self) -> &str {
        &self.name
    }

    fn driver(&self) -> &'static str {
        "nbd"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        let sizes = self.pool.offer().block_sizes;
        Limits {
            write_alignment: sizes.minimum,
            preferred: sizes.preferred.min(2 << 20),
            allocation_unit: sizes.minimum.max(4096),
            max_transfer: 32 << 20,
            depth: DEPTH * self.pool.capacity(),
            remote: true,
        }
    }

    fn is_read_only(&self) -> bool {
        self.pool.is_read_only()
    }

    fn resolve(&self, range: Range<u64>) -> Resolved {
        if let Some((end, true)) = self.statuses.known(range.start) {
            let end = if end >= self.size { range.end } else { end.min(range.end) };
            return Resolved::Zero { len: end - range.start, depth: 0 };
        }
        match self.this.upgrade() {
            Some(node) if range.start < self.size => {
                let len = range.end.min(self.size) - range.start;
                Resolved::At { node, offset: range.start, len, depth: 0 }
            }
            Some(_) => Resolved::Zero { len: range.end - range.start, depth: 0 },
            None => Resolved::Ask,
        }
    }

    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(self.read_all(offset, buf))
    }

    fn expect(&self, _range: Range<u64>) {
        self.pool.connect_ahead();
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        Box::pin(self.find_status(range))
    }

    fn access(&self, _range: Range<u64>, _change: Change) -> Access {
        Access::Shared
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.write_parts(offset, data, flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.zero_parts(offset, len, flags))
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.trim_parts(offset, len))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.make_durable())
    }

    fn stop_waiting(&self) {
        self.pool.stop_waiting();
    }

    fn can_recall(&self) -> bool {
        true
    }

    /// What has completed is the server's.
    fn is_settled(&self, _range: Range<u64>) -> bool {
        true
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        let done = if size == self.size {
            Ok(())
        } else {
            let message = format!("{}: the size of an NBD export cannot be changed by a client", self.name);
            Err(Error::new(ErrorKind::Unsupported, message))
        };
        Box::pin(std::future::ready(done))
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let flushed = self.make_durable().await;
            self.pool.close().await;
            flushed
        })
    }
}
