//! What is kept of one source: a sparse file.
//!
//! ```text
//! 0         header: magic, version, block size, source's size, length of the identity, the identity, zeroes
//! 4096      one byte for each block of the source: 1 if it is here
//! data      the source's bytes, each at its offset; `data` is the end of the marks rounded up to whole blocks
//! ```
//! Numbers are little-endian. The header follows from the source alone, so that it needs no check of its own and all who write it write the same.
//!
//! # Crashes
//! A mark is written after the data that it stands for were made durable (fdatasync). So whatever a power cut leaves, a block that is marked is whole. Data without
//! a mark are fetched again. Marks are whole bytes and only ever become 1: processes that write them at once, each its own, need no lock.

use super::CacheDir;
use crate::file::{Cache, FileNode, FileOptions, Locking};
use headwater_block::share::{BlockStore, SHARE_BLOCK};
use headwater_block::{Buffer, BufferMut, Error, ErrorKind, LocalFuture, Node, Result, WriteFlags};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::time::Duration;
use tokio::time::Instant;

const MAGIC: &[u8; 8] = b"HWBLOCKS";
const VERSION: u32 = 1;
const HEADER: u64 = 4096;

/// The blocks of the largest source: what a server claims is held in memory, a byte for each.
const MOST_BLOCKS: u64 = 1 << 26;

/// What waits to be written at most, in bytes; what comes on top is not kept.
const MOST_QUEUED: u64 = 64 << 20;

/// What is written between two flushes at most, in bytes, and for how much room is made at once.
const BATCH: u64 = 32 << 20;

/// How often one looks what other processes have brought.
const LOOK: Duration = Duration::from_secs(2);

/// The kept blocks of one source; see the [module](self). Lives in the `LocalSet` in which it was opened: its task runs there.
pub struct CacheFile {
    this: Weak<CacheFile>,
    directory: Rc<CacheDir>,
    node: Rc<FileNode>,
    /// Keeps others from removing it.
    _held: OwnedFd,
    size: u64,
    /// Where the data begin.
    data: u64,
    /// Which blocks can be read, by number.
    here: RefCell<Vec<bool>>,
    /// What is not written yet, by offset, and in which order it comes. It can be read all the same.
    pending: RefCell<BTreeMap<u64, Buffer>>,
    queue: RefCell<VecDeque<u64>>,
    queued: Cell<u64>,
    writing: Cell<bool>,
    looked: Cell<Instant>,
    looking: Cell<bool>,
    /// Room that was made and not used, in bytes.
    room: Cell<u64>,
}

impl CacheFile {
    pub(super) async fn open(
        directory: &Rc<CacheDir>,
        name: &str,
        size: u64,
        identity: &str,
    ) -> Result<Rc<Self>> {
        let blocks = size.div_ceil(SHARE_BLOCK);
        if blocks > MOST_BLOCKS {
            let message =
                format!("{}: sources of more than 4 TiB are not kept in a directory", directory.shown(name));
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let data = (HEADER + blocks).next_multiple_of(SHARE_BLOCK);
        let header = header(size, identity)?;
        let held = directory.hold(name)?;
        let options = FileOptions { cache: Cache::Buffered, locking: Locking::Off, ..FileOptions::default() };
        let node = FileNode::open(&directory.engine, directory.path.join(name), options)?;
        let end = data + size;
        let there = node.read(0, BufferMut::new(HEADER as usize)).await?;
        // A crash may have left it without a header, or with one and too short; then it has no marks.
        if there[..] != header[..] && there.iter().any(|byte| *byte != 0) {
            let message = format!(
                "{}: it is no cache of what its name says; remove it, nothing is lost by that",
                directory.shown(name)
            );
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        if node.size() < end {
            node.resize(end).await?;
        }
        // Also tells when it was used last.
        node.write(0, Buffer::copy_of(&header), WriteFlags::default()).await?;
        let this = Rc::new_cyclic(|this| Self {
            this: this.clone(),
            directory: directory.clone(),
            node,
            _held: held,
            size,
            data,
            here: RefCell::new(vec![false; blocks as usize]),
            pending: RefCell::default(),
            queue: RefCell::default(),
            queued: Cell::new(0),
            writing: Cell::new(false),
            looked: Cell::new(Instant::now()),
            looking: Cell::new(false),
            room: Cell::new(0),
        });
        this.look().await?;
        Ok(this)
    }

    /// Reads which blocks are here.
    pub(super) async fn look(&self) -> Result<()> {
        let blocks = self.here.borrow().len();
        let marks = self.node.read(HEADER, BufferMut::new(blocks)).await?;
        for (here, mark) in self.here.borrow_mut().iter_mut().zip(marks.iter()) {
            *here |= *mark == 1;
        }
        Ok(())
    }

    /// Looks in the background, now and then, what others have brought.
    fn look_again(&self) {
        let now = Instant::now();
        let Some(this) = self.this.upgrade() else { return };
        if self.looking.get() || now < self.looked.get() + LOOK {
            return;
        }
        self.looked.set(now);
        self.looking.set(true);
        tokio::task::spawn_local(async move {
            if let Err(err) = this.look().await {
                tracing::warn!("{err}");
            }
            this.looking.set(false);
        });
    }

    fn blocks(&self, range: &Range<u64>) -> Range<usize> {
        // Within the marks, which are in memory.
        (range.start / SHARE_BLOCK) as usize..range.end.div_ceil(SHARE_BLOCK) as usize
    }

    /// Writes what waits, until nothing does.
    async fn write_all(&self) {
        while !self.queue.borrow().is_empty() {
            if let Err(err) = self.write_batch().await {
                tracing::warn!("{err}; what is read of this source is not kept");
                while let Some(offset) = self.next() {
                    self.done(offset, false);
                }
            }
        }
        self.writing.set(false);
    }

    fn next(&self) -> Option<u64> {
        self.queue.borrow_mut().pop_front()
    }

    /// What was pending at `offset` is written, or will not be.
    fn done(&self, offset: u64, written: bool) -> Range<usize> {
        let Some(data) = self.pending.borrow_mut().remove(&offset) else { return 0..0 };
        let len = data.len() as u64;
        self.queued.set(self.queued.get() - len);
        let blocks = self.blocks(&(offset..offset + len));
        if !written {
            self.here.borrow_mut()[blocks.clone()].fill(false);
        }
        blocks
    }

    /// Writes a part of what waits. It stays in memory until it is durable: what the system fails to write back, it may forget, and read as zeroes.
    async fn write_batch(&self) -> Result<()> {
        let mut batch = Vec::new();
        let written = self.write_durably(&mut batch).await;
        let blocks: Vec<_> = batch.into_iter().map(|offset| self.done(offset, written.is_ok())).collect();
        written?;
        for blocks in blocks {
            let marks = Buffer::copy_of(&vec![1; blocks.len()]);
            self.node.write(HEADER + blocks.start as u64, marks, WriteFlags::default()).await?;
        }
        Ok(())
    }

    /// Writes so much of what waits that it is worth a flush, and flushes; `batch` is where it begins.
    async fn write_durably(&self, batch: &mut Vec<u64>) -> Result<()> {
        let mut bytes = 0;
        while bytes < BATCH {
            let Some(offset) = self.next() else { break };
            let Some(data) = self.pending.borrow().get(&offset).cloned() else { continue };
            let len = data.len() as u64;
            if self.room.get() < len {
                if !self.directory.make_room(BATCH.max(len)) {
                    self.done(offset, false);
                    continue;
                }
                self.room.set(BATCH.max(len));
            }
            self.room.set(self.room.get() - len);
            batch.push(offset);
            self.node.write(self.data + offset, data, WriteFlags::default()).await?;
            bytes += len;
        }
        if batch.is_empty() { Ok(()) } else { self.node.flush().await }
    }

    /// The bytes of `range` that are pending: where they begin, and they.
    fn pending(&self, range: &Range<u64>) -> Vec<(u64, Buffer)> {
        let pending = self.pending.borrow();
        let before = pending.range(..range.start).next_back();
        let within = pending.range(range.clone());
        let mut found = Vec::new();
        for (offset, data) in before.into_iter().chain(within) {
            let (start, end) = (range.start.max(*offset), range.end.min(offset + data.len() as u64));
            if start < end {
                found.push((start, data.slice((start - offset) as usize..(end - offset) as usize)));
            }
        }
        found
    }

    /// Waits until what was to be kept is, durably.
    pub async fn settle(&self) {
        while self.writing.get() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl BlockStore for CacheFile {
    fn holds(&self, offset: u64, until: u64) -> (bool, u64) {
        let here = self.here.borrow();
        let blocks = self.blocks(&(offset..until.min(self.size)));
        let Some(first) = here.get(blocks.start).copied() else { return (false, until) };
        if !first {
            self.look_again();
        }
        let same = here[blocks.clone()].iter().take_while(|other| **other == first).count();
        let end = (blocks.start + same) as u64 * SHARE_BLOCK;
        (first, end.min(until))
    }

    fn read(&self, range: Range<u64>) -> LocalFuture<'_, Result<Buffer>> {
        Box::pin(async move {
            let len = (range.end - range.start) as usize;
            // Before anything is awaited: what is pending now may be in the file a moment later.
            let pending = self.pending(&range);
            if let [(_, data)] = &pending[..]
                && data.len() == len
            {
                return Ok(data.clone());
            }
            let mut buf = self.node.read(self.data + range.start, BufferMut::new(len)).await?;
            for (offset, data) in pending {
                let at = (offset - range.start) as usize;
                buf[at..at + data.len()].copy_from_slice(&data);
            }
            Ok(buf.freeze())
        })
    }

    fn keep(&self, offset: u64, data: Buffer) {
        let Some(this) = self.this.upgrade() else { return };
        let len = data.len() as u64;
        if self.queued.get() + len > MOST_QUEUED || data.is_empty() {
            return;
        }
        let blocks = self.blocks(&(offset..offset + len));
        // Other processes may have brought a part of it meanwhile.
        if self.here.borrow()[blocks.clone()].iter().any(|here| *here) {
            return;
        }
        self.here.borrow_mut()[blocks].fill(true);
        self.queued.set(self.queued.get() + len);
        self.pending.borrow_mut().insert(offset, data);
        self.queue.borrow_mut().push_back(offset);
        if !self.writing.replace(true) {
            tokio::task::spawn_local(async move { this.write_all().await });
        }
    }
}

/// The first bytes of a file for this source.
fn header(size: u64, identity: &str) -> Result<Vec<u8>> {
    let mut header = Vec::with_capacity(HEADER as usize);
    header.extend_from_slice(MAGIC);
    header.extend_from_slice(&VERSION.to_le_bytes());
    // It fits.
    header.extend_from_slice(&(SHARE_BLOCK as u32).to_le_bytes());
    header.extend_from_slice(&size.to_le_bytes());
    header.extend_from_slice(&u64::try_from(identity.len()).unwrap_or(u64::MAX).to_le_bytes());
    header.extend_from_slice(identity.as_bytes());
    if header.len() as u64 > HEADER {
        let message =
            "the address and the ETag of the source are too long to keep parts of it in a directory";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    header.resize(HEADER as usize, 0);
    Ok(header)
}
