//! Nothing passes but what a manifest promises: each chunk that is read is hashed and compared, before anybody sees a byte of it.
//!
//! - **Where it stands**: over the node that reaches a source's file, below its format. So what is checked is the file as it lies at the source, tables of a
//!   qcow2 image included, and each of several replicas is checked for itself.
//! - **A wrong chunk is an error** ([`ErrorKind::WrongContent`]) that names it, and nothing of the read is given away. It isn't asked for again here: a
//!   [`super::ReplicasNode`] above goes elsewhere, and never returns.
//! - **Chunks that are promised to be zeroes** are not read. What the node below says of holes isn't asked for: it could lie.
//! - **Small reads** read their chunks whole. Those who want one chunk at once share one read, and the latest chunks are kept ([`CACHE`]), so that neighbours don't cost
//!   it again.
//!
//! Hashing is done here, on the disk's thread: a chunk of 256 KiB is a small part of a millisecond, and others go first between two chunks.

use super::child::Child;
use super::let_others_go_first;
use crate::buffer::{Buffer, BufferMut};
use crate::drain::Hurry;
use crate::edge::Edge;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind, Resolved};
use crate::identity::Identity;
use crate::manifest::{Manifest, Promise, hex, promise_of};
use crate::node::{Limits, LocalFuture, Node};
use futures_util::FutureExt;
use futures_util::future::{Shared, WeakShared, try_join3};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::ready;
use std::ops::Range;
use std::rc::{Rc, Weak};

/// How many bytes of checked chunks are kept for reads of parts of them.
pub const CACHE: usize = 16 << 20;

/// A manifest, and what was checked against it, whichever replica it came from.
pub struct Verification {
    manifest: Manifest,
    checks: Cell<u64>,
    bytes: Cell<u64>,
    /// A bit for each chunk that was checked at least once.
    seen: RefCell<Vec<u64>>,
    blamed: RefCell<Vec<String>>,
}

impl Verification {
    /// Nothing has been checked yet.
    pub fn new(manifest: Manifest) -> Rc<Self> {
        // One bit a chunk, of which there is a bounded number.
        let words = manifest.chunks().div_ceil(64) as usize;
        Rc::new(Self {
            manifest,
            checks: Cell::new(0),
            bytes: Cell::new(0),
            seen: RefCell::new(vec![0; words]),
            blamed: RefCell::default(),
        })
    }

    /// What is promised.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// How many bytes were hashed and found right.
    pub fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// How many different chunks were hashed and found right.
    pub fn chunks(&self) -> u64 {
        self.seen.borrow().iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Who gave wrong bytes.
    pub fn blamed(&self) -> Vec<String> {
        self.blamed.borrow().clone()
    }

    /// Compares a whole chunk, which `from` gave.
    fn check(&self, chunk: u64, bytes: &[u8], from: &str) -> Result<()> {
        self.checks.set(self.checks.get() + 1);
        let found = promise_of(bytes);
        let expected = self.manifest.promise(chunk);
        if expected == Some(found) {
            self.bytes.set(self.bytes.get() + bytes.len() as u64);
            if let Some(word) = self.seen.borrow_mut().get_mut((chunk / 64) as usize) {
                *word |= 1 << (chunk % 64);
            }
            return Ok(());
        }
        if !self.blamed.borrow().iter().any(|name| name == from) {
            self.blamed.borrow_mut().push(from.to_owned());
        }
        let show = |promise: Option<Promise>| match promise {
            Some(Promise::Hash(hash)) => hex(&hash),
            Some(Promise::Zeroes) => "zeroes".to_owned(),
            None => "nothing".to_owned(),
        };
        let message = format!(
            "{from}: chunk {chunk} ({} bytes at {}) is wrong: the manifest promises {}, found {}; none of it was used",
            bytes.len(),
            chunk * u64::from(self.manifest.chunk_size()),
            show(expected),
            show(Some(found))
        );
        Err(Error::new(ErrorKind::WrongContent, message))
    }
}

type Chunk = LocalFuture<'static, Result<Buffer>>;

/// A source whose bytes are checked; see the module.
pub struct VerifyNode {
    this: Weak<Self>,
    child: Child,
    verification: Rc<Verification>,
    /// The latest first.
    cache: RefCell<VecDeque<(u64, Buffer)>>,
    fetching: RefCell<Vec<(u64, WeakShared<Chunk>)>>,
}

impl VerifyNode {
    /// Lets pass what `verification` finds right.
    ///
    /// # Errors
    /// `WrongContent` if the child isn't of the manifest's size.
    pub fn new(child: Rc<Edge>, verification: Rc<Verification>) -> Result<Rc<Self>> {
        let child = Child::new(child);
        let (size, promised) = (child.disk().size(), verification.manifest.size());
        if size != promised {
            let message = format!(
                "{} has {size} bytes and its manifest is for {promised}: it is another image, or another version of it",
                child.name()
            );
            return Err(Error::new(ErrorKind::WrongContent, message));
        }
        Ok(Rc::new_cyclic(|this| Self {
            this: this.clone(),
            child,
            verification,
            cache: RefCell::default(),
            fetching: RefCell::default(),
        }))
    }

    fn manifest(&self) -> &Manifest {
        &self.verification.manifest
    }

    fn chunk_size(&self) -> u64 {
        self.manifest().chunk_size().into()
    }

    async fn read_checked(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        let there = self.manifest().size().saturating_sub(offset).min(buf.len() as u64);
        // At most the buffer's length.
        let mut past_end = buf.split_off(there as usize);
        past_end.fill(0);
        if there == 0 {
            return Ok(buf.join(past_end));
        }
        let end = offset + there;
        let unit = self.chunk_size();
        // Whole chunks are read where they are wanted, parts of chunks at both ends through the cache.
        let whole_start = offset.next_multiple_of(unit).min(end);
        let whole_end = if end == self.manifest().size() { end } else { end - end % unit };
        let whole_end = whole_end.max(whole_start);
        let mut middle = buf.split_off((whole_start - offset) as usize);
        let tail = middle.split_off((whole_end - whole_start) as usize);
        let (head, middle, tail) = try_join3(
            self.read_part(offset, buf),
            self.read_whole(whole_start, middle),
            self.read_part(whole_end, tail),
        )
        .await?;
        Ok(head.join(middle).join(tail).join(past_end))
    }

    /// Reads a part of one chunk.
    async fn read_part(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        if buf.is_empty() {
            return Ok(buf);
        }
        let number = offset / self.chunk_size();
        if self.manifest().run(number).0 {
            buf.fill(0);
            return Ok(buf);
        }
        let chunk = self.chunk(number).await?;
        // Within a chunk.
        let from = (offset % self.chunk_size()) as usize;
        let end = from + buf.len();
        buf.copy_from_slice(&chunk[from..end]);
        Ok(buf)
    }

    /// Reads whole chunks.
    async fn read_whole(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        if buf.is_empty() {
            return Ok(buf);
        }
        let unit = self.chunk_size();
        let first = offset / unit;
        let chunks = (buf.len() as u64).div_ceil(unit);
        if self.manifest().run(first) == (true, first + chunks) {
            buf.fill(0);
            return Ok(buf);
        }
        let mut buf = self.child.read(offset, buf).await?;
        for (number, bytes) in (first..).zip(buf.chunks_mut(unit as usize)) {
            if self.manifest().run(number).0 {
                bytes.fill(0);
                continue;
            }
            self.verification.check(number, bytes, self.child.name())?;
            let_others_go_first().await;
        }
        Ok(buf)
    }

    /// A chunk that was checked: from the cache, or read by whoever wants it first.
    async fn chunk(&self, number: u64) -> Result<Buffer> {
        let kept = |cache: &mut VecDeque<(u64, Buffer)>| {
            let at = cache.iter().position(|(other, _)| *other == number)?;
            let found = cache.remove(at)?;
            let chunk = found.1.clone();
            cache.push_front(found);
            Some(chunk)
        };
        if let Some(chunk) = kept(&mut self.cache.borrow_mut()) {
            return Ok(chunk);
        }
        let fetch = self.fetching(number)?;
        fetch.await
    }

    fn fetching(&self, number: u64) -> Result<Shared<Chunk>> {
        let mut fetching = self.fetching.borrow_mut();
        // Those that nobody waits for any more are gone.
        fetching.retain(|(_, fetch)| fetch.upgrade().is_some());
        let known = fetching.iter().find(|(other, _)| *other == number);
        if let Some(fetch) = known.and_then(|(_, fetch)| fetch.upgrade()) {
            return Ok(fetch);
        }
        let closed = || Error::new(ErrorKind::Closed, format!("{} was closed", self.child.name()));
        let this = self.this.upgrade().ok_or_else(closed)?;
        let fetch: Chunk = Box::pin(async move { this.fetch(number).await });
        let fetch = fetch.shared();
        fetching.extend(fetch.downgrade().map(|weak| (number, weak)));
        Ok(fetch)
    }

    async fn fetch(&self, number: u64) -> Result<Buffer> {
        let unit = self.chunk_size();
        let offset = number * unit;
        let len = unit.min(self.manifest().size() - offset) as usize;
        let buf = self.child.read(offset, BufferMut::new(len)).await?;
        self.verification.check(number, &buf, self.child.name())?;
        let chunk = buf.freeze();
        let mut cache = self.cache.borrow_mut();
        cache.push_front((number, chunk.clone()));
        cache.truncate((CACHE / unit as usize).max(1));
        Ok(chunk)
    }

    fn refusal(&self) -> Error {
        let message = format!("{}: what a manifest promises isn't changed", self.child.name());
        Error::new(ErrorKind::ReadOnly, message)
    }
}

impl Node for VerifyNode {
    fn name(&self) -> &str {
        self.child.name()
    }

    fn driver(&self) -> &'static str {
        "verify"
    }

    fn size(&self) -> u64 {
        self.manifest().size()
    }

    fn limits(&self) -> Limits {
        let below = self.child.disk().limits();
        let preferred = below.preferred.max(self.manifest().chunk_size().min(2 << 20));
        Limits { write_alignment: 1, preferred, ..below }
    }

    fn resolve(&self, range: Range<u64>) -> Resolved {
        let len = range.end - range.start;
        if range.start >= self.size() {
            return Resolved::Zero { len, depth: 0 };
        }
        match self.manifest().run(range.start / self.chunk_size()) {
            (true, end) => {
                let len = (end * self.chunk_size()).min(range.end) - range.start;
                Resolved::Zero { len, depth: 0 }
            }
            (false, _) => Resolved::Ask,
        }
    }

    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(self.read_checked(offset, buf))
    }

    fn expect(&self, range: Range<u64>) {
        self.child.top().expect(range);
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        let (kind, end) = if range.start >= self.size() {
            (ExtentKind::Zero, range.end)
        } else {
            let (zero, end) = self.manifest().run(range.start / self.chunk_size());
            let kind = if zero { ExtentKind::Zero } else { ExtentKind::Data };
            (kind, (end * self.chunk_size()).min(self.size()).min(range.end))
        };
        Box::pin(ready(Ok(Extent::new(range.start, end - range.start, kind))))
    }

    crate::refuse_changes!();

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Ok(())))
    }

    fn identity(&self) -> Result<Identity> {
        self.child.top().identity()
    }

    fn keeps_what_is_read(&self) -> bool {
        self.child.disk().keeps_what_is_read()
    }

    fn hurry(&self, held: &mut Vec<Hurry>) {
        self.child.top().hurry(held);
    }
}
