//! One range of the object, asked for until it is there or the time is over.

use super::ahead::{Coming, parts};
use super::answer::{Failure, Identity, judge};
use super::transport::{Transport, hyper_failure};
use super::url::{Target, label};
use super::{HttpOptions, RangeSource};
use crate::pace::Pace;
use crate::retry::{Rest, Retry};
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::Shared;
use headwater_block::{Buffer, BufferMut, Error, ErrorKind, LocalFuture, Result};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{ACCEPT_ENCODING, HOST, IF_MATCH, IF_UNMODIFIED_SINCE, RANGE, USER_AGENT};
use hyper::{Request, Response};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// How many redirects are followed.
const REDIRECTS: usize = 5;

/// The object that was opened, and how to get at it.
pub(super) struct Source {
    /// For messages.
    label: String,
    /// What the user named; a redirect may lead elsewhere.
    origin: Target,
    target: RefCell<Target>,
    identity: Identity,
    transport: Rc<Transport>,
    retry: Duration,
    /// What the server wants of it, as far as it said so.
    rest: Rest,
    /// Why nothing may be read any more.
    ended: RefCell<Option<Error>>,
}

impl Source {
    /// Finds the object, following redirects, and reads its first `first` bytes. What the options have it ask for ahead is asked for at the same time.
    pub(super) async fn open(
        url: &str,
        options: HttpOptions,
        first: u64,
    ) -> Result<(Self, Buffer, Vec<Coming>)> {
        let origin = Target::parse(url)?;
        let label = label(url);
        let (retry, open_retry) = (options.retry, options.open_retry);
        let ahead = parts(0..options.read_ahead, options.connections - 1);
        let transport = Transport::new(options);
        let (tell, told) = oneshot::channel();
        let told = told.shared();
        let mut coming: Vec<_> =
            ahead.map(|range| foresee(transport.clone(), origin.clone(), range, told.clone())).collect();
        let (target, identity, bytes) = locate(&transport, &origin, None, 0..first, open_retry)
            .await
            .map_err(|e| e.context(format_args!("cannot open {label}")))?;
        // Nobody hears it if nothing was asked for.
        let _ = tell.send(identity.clone());
        coming.retain(|coming| coming.range.start < identity.size);
        if let Some(last) = coming.last_mut() {
            last.range.end = last.range.end.min(identity.size);
        }
        if identity.etag.is_none() && identity.last_modified.is_none() {
            tracing::warn!(
                url = label,
                "the server sends neither ETag nor Last-Modified: changes may go unnoticed"
            );
        }
        let source = Self {
            label,
            origin,
            target: RefCell::new(target),
            identity,
            transport,
            retry,
            rest: Rest::default(),
            ended: RefCell::default(),
        };
        Ok((source, bytes.freeze(), coming))
    }

    async fn fetch_all(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        let len = buf.len();
        let done = self.fill(offset, &mut buf).await;
        if let Err(error) = done {
            if error.kind() == ErrorKind::SourceChanged {
                self.ended.borrow_mut().get_or_insert(error.clone());
            }
            return Err(error.context(format_args!("read of {len} bytes at {offset} of {}", self.label)));
        }
        Ok(buf)
    }

    async fn fill(&self, offset: u64, buf: &mut BufferMut) -> Result<()> {
        let mut retry = Retry::new(self.retry);
        let mut relocated = false;
        let end = offset + buf.len() as u64;
        let filled = Cell::new(0);
        while filled.get() < buf.len() {
            self.check()?;
            if let Some(left) = self.rest.left() {
                // Not asking is what it asked for.
                retry.pause(Error::new(ErrorKind::Unavailable, "the server is busy"), Some(left)).await?;
                continue;
            }
            let before = filled.get();
            let target = self.target.borrow().clone();
            let range = offset + before as u64..end;
            let failure = match ask(&self.transport, &target, Some(&self.identity), range, buf, &filled).await
            {
                Ok(_) => return Ok(()),
                Err(failure) => failure,
            };
            if filled.get() > before {
                // It goes on, if slowly.
                retry.restart();
                relocated = false;
            }
            match failure {
                Failure::Again(error, wanted) => {
                    if let Some(wanted) = wanted {
                        self.rest.wanted(wanted);
                    }
                    retry.pause(error, wanted).await?;
                }
                Failure::Fatal(error) => return Err(error),
                // Addresses that a redirect led to may expire: find the present one, once.
                Failure::Refused(error) if relocated || target == self.origin => return Err(error),
                Failure::Moved(_) if relocated => {
                    return Err(Error::new(ErrorKind::Unsupported, "the server redirects without end"));
                }
                Failure::Refused(_) | Failure::Moved(_) => {
                    relocated = true;
                    let at = 0..self.identity.size.min(1);
                    let found = locate(&self.transport, &self.origin, Some(&self.identity), at, self.retry);
                    *self.target.borrow_mut() = found.await?.0;
                }
            }
        }
        Ok(())
    }
}

impl RangeSource for Source {
    fn size(&self) -> u64 {
        self.identity.size
    }

    fn marks(&self) -> Vec<(&'static str, String)> {
        let marks = [("ETag", &self.identity.etag), ("Last-Modified", &self.identity.last_modified)];
        marks.into_iter().filter_map(|(name, value)| Some((name, value.clone()?))).collect()
    }

    fn check(&self) -> Result<()> {
        self.ended.borrow().clone().map_or(Ok(()), Err)
    }

    fn fetch(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(self.fetch_all(offset, buf))
    }

    fn connect_ahead(&self) {
        self.transport.connect_ahead(&self.target.borrow());
    }

    fn close(&self) {
        let message = format!("{} was closed", self.label);
        self.ended.borrow_mut().get_or_insert(Error::new(ErrorKind::Closed, message));
    }
}

/// Asks for `range` of what `target` names before it is known what that is. The bytes count if they are of the object that `told` gives, which is another one if the server
/// redirects.
fn foresee(
    transport: Rc<Transport>,
    target: Target,
    range: Range<u64>,
    told: Shared<oneshot::Receiver<Identity>>,
) -> Coming {
    /// Ends with whoever waits for it.
    struct Task(JoinHandle<Option<Buffer>>);
    impl Drop for Task {
        fn drop(&mut self) {
            self.0.abort();
        }
    }
    let asked = range.clone();
    let mut task = Task(tokio::task::spawn_local(async move {
        let mut exchange = transport.exchange(&target, || request(&target, None, &asked)).await.ok()?;
        let pinned = told.await.ok()?;
        judge(&exchange.response, &asked, Some(&pinned)).ok()?;
        // At most a piece.
        let expected = pinned.size.min(asked.end).checked_sub(asked.start)? as usize;
        let (mut buf, filled) = (BufferMut::new(expected), Cell::new(0));
        receive(&transport, &mut exchange.response, expected, &mut buf, &filled).await.ok()?;
        exchange.finish();
        Some(buf.freeze())
    }));
    Coming { range, data: Box::pin(async move { (&mut task.0).await.ok().flatten() }) }
}

/// Follows redirects from `origin` to the object, and reads `range` of it.
async fn locate(
    transport: &Rc<Transport>,
    origin: &Target,
    pinned: Option<&Identity>,
    range: Range<u64>,
    retry: Duration,
) -> Result<(Target, Identity, BufferMut)> {
    let mut target = origin.clone();
    let mut redirects = 0;
    let mut retry = Retry::new(retry);
    // Both callers ask for at most a block.
    let mut buf = BufferMut::new((range.end - range.start) as usize);
    loop {
        let filled = Cell::new(0);
        match ask(transport, &target, pinned, range.clone(), &mut buf, &filled).await {
            Ok(identity) => {
                buf.truncate(filled.get());
                return Ok((target, identity, buf));
            }
            Err(Failure::Moved(location)) => {
                redirects += 1;
                if redirects > REDIRECTS {
                    let message =
                        format!("more than {REDIRECTS} redirects, the last to {}", label(&location));
                    return Err(Error::new(ErrorKind::Unsupported, message));
                }
                target = target.follow(&location)?;
            }
            // At first, a server that isn't there is more likely a wrong address than one that restarts.
            Err(Failure::Again(error, None)) if pinned.is_none() && !transport.has_connected() => {
                return Err(error);
            }
            Err(Failure::Again(error, wanted)) => retry.pause(error, wanted).await?,
            Err(Failure::Refused(error) | Failure::Fatal(error)) => return Err(error),
        }
    }
}

/// Asks once for `range` and puts what comes into `buf` from `filled` on, counting it there. Success means that all came of `range`
/// that lies within the object.
async fn ask(
    transport: &Rc<Transport>,
    target: &Target,
    pinned: Option<&Identity>,
    range: Range<u64>,
    buf: &mut BufferMut,
    filled: &Cell<usize>,
) -> Result<Identity, Failure> {
    let mut exchange = transport.exchange(target, || request(target, pinned, &range)).await?;
    let identity = judge(&exchange.response, &range, pinned)?;
    // No more than was asked for, hence no more than there is room for.
    let expected = identity.size.min(range.end).saturating_sub(range.start) as usize;
    receive(transport, &mut exchange.response, expected, buf, filled).await?;
    exchange.finish();
    Ok(identity)
}

async fn receive(
    transport: &Transport,
    response: &mut Response<Incoming>,
    expected: usize,
    buf: &mut BufferMut,
    filled: &Cell<usize>,
) -> Result<(), Failure> {
    let end = filled.get() + expected;
    let most = transport.request_timeout();
    let mut pace = Pace::new(most);
    loop {
        let frame = tokio::time::timeout(most, response.body_mut().frame()).await;
        let data = match frame {
            Err(_) => return Err(transport.too_slow("no data")),
            Ok(None) => break,
            Ok(Some(Err(e))) => return Err(hyper_failure(&e, "the response broke off")),
            Ok(Some(Ok(frame))) => frame.into_data().unwrap_or_default(),
        };
        let at = filled.get();
        if data.len() > end - at {
            let message = "the server sends more than its response's headers say";
            return Err(Failure::fatal(ErrorKind::Corrupt, message));
        }
        // Only here does the buffer take memory.
        buf[at..at + data.len()].copy_from_slice(&data);
        filled.set(at + data.len());
        if pace.is_too_slow(data.len()) && filled.get() < end {
            return Err(transport.too_slow("hardly any data"));
        }
    }
    if filled.get() < end {
        let missing = end - filled.get();
        return Err(Failure::again(
            ErrorKind::Unavailable,
            format!("the response ends {missing} bytes early"),
        ));
    }
    Ok(())
}

fn request(target: &Target, pinned: Option<&Identity>, range: &Range<u64>) -> Result<Request<Full<Bytes>>> {
    let mut builder = Request::get(&target.path)
        .header(HOST, &target.authority)
        .header(USER_AGENT, concat!("headwater/", env!("CARGO_PKG_VERSION")))
        .header(ACCEPT_ENCODING, "identity");
    if !range.is_empty() {
        builder = builder.header(RANGE, format!("bytes={}-{}", range.start, range.end - 1));
    }
    if let Some(pinned) = pinned {
        if let Some(etag) = pinned.strong_etag() {
            builder = builder.header(IF_MATCH, etag);
        } else if let Some(date) = &pinned.last_modified {
            builder = builder.header(IF_UNMODIFIED_SINCE, date);
        }
    }
    builder.body(Full::default()).map_err(|e| target.bad(&e))
}
