//! `copy_up`: the only way in which data move from backing nodes into the overlay on top of them.
//!
//! Guest reads that miss, the stream job and every other copy of this kind use it.
//!
//! # How it excludes the races
//! 1. It takes the range in the **fetch lock**, which only copy-ups use. Whoever needs the same bytes waits here, and then finds them
//!    local: the source is asked once. Guest writes, discards and reads of local data don't pass here, so that a slow source
//!    never holds them up.
//! 2. It looks up what the overlay lacks and reads that from the **backing** (not through the overlay). Nodes below the top
//!    don't change, so these bytes stay true for as long as the overlay lacks them. Until now nothing has changed: an error, an
//!    abort or a dropped future leaves the overlay as it was.
//! 3. It takes the range **exclusively** in the disk's range lock and **looks the allocation up again**. What a guest wrote, zeroed or
//!    discarded in the meantime is no longer lacking and is left alone: the guest's bytes win, whatever the order.
//! 4. It writes what is still lacking, in whole allocation units, as data or as zeroes, and unlocks. From the first write on it
//!    can't be given up.
//!
//! The order of the two locks is always fetch lock, then range lock, and holders of the range lock never ask for the fetch lock; and
//! nobody waits at a closed gate with the fetch lock in hand: no deadlock.

use crate::abort::Abort;
use crate::buffer::{Buffer, BufferMut};
use crate::chain::{self, Missing};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ExtentKind;
use crate::node::{Node, WriteFlags, ZeroFlags};
use crate::range_lock::{Guard, Mode, Token};
use crate::zero::is_zero;
use futures_util::future::{join_all, try_join_all};
use std::ops::Range;
use std::rc::Rc;

#[cfg(test)]
mod tests;

/// What the layers below the top, and above the base, supply for the whole of a range; see [`chain::next_missing`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Supply {
    /// Data.
    Data,
    /// Zeroes: nothing need be read.
    Zeroes,
}

/// What to copy up, and how.
#[derive(Clone, Default)]
pub struct CopyUpOptions {
    /// Only what lies above this node is copied; it remains the backing.
    pub base: Option<Rc<dyn Node>>,
    /// Units of zero bytes become zero clusters, which take no space.
    pub detect_zeroes: bool,
    /// Gives up, with `Cancelled`, while nothing has been changed.
    pub abort: Option<Rc<Abort>>,
    /// What an earlier look found, as the layers below the top don't change: they are not asked again, which may save a round trip.
    pub known: Option<Supply>,
}

/// What a part of a copy does: to tell which half of it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// It reads from the source, or asks what is there.
    Read,
    /// It writes to the target.
    Write,
}

/// A copy that failed.
#[derive(Debug, Clone)]
pub struct Failed {
    /// Which half of it did.
    pub operation: Operation,
    /// Why.
    pub error: Error,
}

impl Operation {
    /// A failure of this half.
    pub fn failed(self, error: Error) -> Failed {
        Failed { operation: self, error }
    }
}

/// What a copy-up did, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Read from the backing.
    pub fetched: u64,
    /// Written as data.
    pub data: u64,
    /// Written as zeroes, because a layer below said so or because zeroes were found.
    pub zero: u64,
    /// Found to be there already when the range had been locked.
    pub skipped: u64,
}

/// A run with what the backing holds there; `None` is zeroes.
struct Fetched {
    range: Range<u64>,
    data: Option<Buffer>,
}

/// What the source half of a copy-up brought. While it holds the fetch lock, nobody else fetches these bytes.
pub(crate) struct Fetch {
    pieces: Vec<Fetched>,
    range: Range<u64>,
    fetching: Option<Guard>,
}

impl Fetch {
    /// The bytes of `wanted` if the source supplied all of them in one piece.
    pub(crate) fn get(&self, wanted: &Range<u64>) -> Option<Buffer> {
        let piece =
            self.pieces.iter().find(|p| p.range.start <= wanted.start && wanted.end <= p.range.end)?;
        Some(match &piece.data {
            Some(data) => {
                let start = (wanted.start - piece.range.start) as usize;
                data.slice(start..start + (wanted.end - wanted.start) as usize)
            }
            None => Buffer::zeroed((wanted.end - wanted.start) as usize),
        })
    }

    /// True if the overlay lacked nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }
}

/// Copies into the top of `disk` what it lacks of `range` (widened to whole allocation units).
///
/// # Errors
/// Those of the source and of the overlay; `Cancelled` by `options.abort`. A failed copy-up leaves each unit either copied
/// or as it was.
pub async fn copy_up(disk: &Rc<Disk>, range: Range<u64>, options: &CopyUpOptions) -> Result<Copied, Failed> {
    let mut fetch = fetch(disk, range, options).await.map_err(|error| Operation::Read.failed(error))?;
    if fetch.is_empty() {
        return Ok(Copied::default());
    }
    if disk.gate().is_closed() {
        // race-mark: copy-up-meets-drain
        // A guest's read that the drain waits for may itself wait for these bytes: it must get past, even if the source is then asked
        // twice. What was fetched stays true, and the second look finds what others stored.
        fetch.fetching = None;
    }
    // Only the overlay's half counts as a request in flight: a drain need not wait for a slow source.
    let stored = async {
        let _pass = match &options.abort {
            Some(abort) => abort.guard(disk.gate().enter()).await?,
            None => disk.gate().enter().await,
        };
        store(disk, &fetch, options).await
    };
    stored.await.map_err(|error| Operation::Write.failed(error))
}

/// The source half: steps 1 and 2. Safe to drop.
pub(crate) async fn fetch(disk: &Rc<Disk>, range: Range<u64>, options: &CopyUpOptions) -> Result<Fetch> {
    let work = fetch_unguarded(disk, disk.whole_units(range), options);
    // A read that another disk keeps is a change there, which must not be dropped.
    let may_drop = !disk.top().backing().is_some_and(|backing| backing.keeps_what_is_read());
    let fetch = match &options.abort {
        Some(abort) if may_drop => abort.guard(work).await?,
        _ => work.await,
    };
    fetch.inspect_err(|error| disk.outage().note(error, disk.clock().now()))
}

async fn fetch_unguarded(disk: &Rc<Disk>, range: Range<u64>, options: &CopyUpOptions) -> Result<Fetch> {
    let fetching = disk.fetch_lock().acquire(Token::for_request(), range.clone(), Mode::Exclusive).await;
    let top = disk.top();
    let mut runs = Vec::new();
    let mut pos = range.start;
    let Some(backing) = top.backing() else {
        return Ok(Fetch { pieces: Vec::new(), range, fetching: Some(fetching) });
    };
    // race-mark: copy-up-fetch
    while let Some(missing) = match options.known {
        Some(supply) => next_lacking(&top, pos..range.end, supply).await?,
        None => chain::next_missing(&top, pos..range.end, options.base.as_ref()).await?,
    } {
        pos = missing.range.end;
        push_merged(&mut runs, missing);
    }
    let reads = runs.into_iter().map(|missing| {
        let backing = &backing;
        async move {
            let data = if missing.zero {
                None
            } else {
                let buf = BufferMut::new((missing.range.end - missing.range.start) as usize);
                Some(backing.read(missing.range.start, buf).await?.freeze())
            };
            Ok::<_, Error>(Fetched { range: missing.range, data })
        }
    });
    let pieces = try_join_all(reads).await?;
    if pieces.iter().any(|piece| piece.data.is_some()) {
        disk.outage().ends();
    }
    Ok(Fetch { pieces, range, fetching: Some(fetching) })
}

/// The first run of a range of whole units that `top` lacks, where it is known what the layers below supply.
async fn next_lacking(top: &Rc<dyn Node>, range: Range<u64>, supply: Supply) -> Result<Option<Missing>> {
    let mut pos = range.start;
    while pos < range.end {
        let extent = top.status(pos..range.end).await?;
        // As when it is stored: the last unit may reach past the disk's end.
        let end = if extent.end() >= top.size() { range.end } else { extent.end().min(range.end) };
        if extent.kind == ExtentKind::Unallocated {
            return Ok(Some(Missing { range: pos..end, zero: supply == Supply::Zeroes }));
        }
        pos = end;
    }
    Ok(None)
}

fn push_merged(runs: &mut Vec<Missing>, next: Missing) {
    match runs.last_mut() {
        Some(last) if last.range.end == next.range.start && last.zero == next.zero => {
            last.range.end = next.range.end
        }
        _ => runs.push(next),
    }
}

/// The overlay's half: steps 3 and 4. The caller has passed the disk's gate. Must be driven to its end.
pub(crate) async fn store(disk: &Rc<Disk>, fetch: &Fetch, options: &CopyUpOptions) -> Result<Copied> {
    let mut copied = Copied::default();
    for piece in &fetch.pieces {
        copied.fetched += piece.data.as_ref().map_or(0, |d| d.len() as u64);
    }
    // race-mark: copy-up-store
    let waiting = disk.lock_for_copy_up(&fetch.range);
    let _guard = match &options.abort {
        Some(abort) => abort.guard(waiting).await?,
        None => waiting.await,
    };
    let unfinished = disk.must_finish()?;
    let result = store_locked(disk, fetch, options, &mut copied).await;
    unfinished.finished();
    result.map(|()| copied)
}

async fn store_locked(
    disk: &Rc<Disk>,
    fetch: &Fetch,
    options: &CopyUpOptions,
    copied: &mut Copied,
) -> Result<()> {
    let top = disk.top();
    if top.is_read_only() {
        return Err(Error::new(
            ErrorKind::ReadOnly,
            format!("{} is open for reading only, so nothing can be copied into it", top.name()),
        ));
    }
    let unit = u64::from(top.limits().allocation_unit);
    // The disk may have been made smaller since.
    let limit = disk.whole_units(0..top.size()).end;
    let mut writes = Vec::new();
    for piece in &fetch.pieces {
        let piece_end = piece.range.end.min(limit);
        let mut pos = piece.range.start;
        while pos < piece_end {
            // The second look: only this decides what is written.
            let now = top.status(pos..piece_end).await?;
            // The last unit may reach past the disk's end, because writes are aligned and its size need not be.
            let end = if now.end() >= top.size() { piece_end } else { now.end().min(piece_end) };
            let run = pos..end;
            pos = end;
            if now.kind != ExtentKind::Unallocated {
                copied.skipped += run.end - run.start;
                continue;
            }
            for (part, data) in split_zeroes(piece, run, unit, options.detect_zeroes) {
                match data {
                    Some(_) => copied.data += part.end - part.start,
                    None => copied.zero += part.end - part.start,
                }
                writes.push((part, data));
            }
        }
    }
    // All are polled to their ends even when one fails: nothing may be in flight when the range is unlocked.
    let done = join_all(writes.into_iter().map(|(part, data)| {
        let top = &top;
        async move {
            match data {
                Some(data) => top.write(part.start, data, WriteFlags::default()).await,
                None => {
                    let flags = ZeroFlags { unmap: true, ..ZeroFlags::default() };
                    top.write_zeroes(part.start, part.end - part.start, flags).await
                }
            }
        }
    }))
    .await;
    done.into_iter().collect()
}

/// Cuts a run of a fetched piece into parts that are written as data and parts that are written as zeroes (`None`).
fn split_zeroes(
    piece: &Fetched,
    run: Range<u64>,
    unit: u64,
    detect: bool,
) -> Vec<(Range<u64>, Option<Buffer>)> {
    let Some(data) = &piece.data else {
        return vec![(run, None)];
    };
    let slice = |part: &Range<u64>| {
        data.slice((part.start - piece.range.start) as usize..(part.end - piece.range.start) as usize)
    };
    if !detect {
        let data = slice(&run);
        return vec![(run, Some(data))];
    }
    let mut parts: Vec<(Range<u64>, bool)> = Vec::new();
    let mut pos = run.start;
    while pos < run.end {
        let part = pos..((pos / unit + 1) * unit).min(run.end);
        let zero = is_zero(&slice(&part));
        pos = part.end;
        match parts.last_mut() {
            Some((last, last_zero)) if *last_zero == zero => last.end = part.end,
            _ => parts.push((part, zero)),
        }
    }
    parts
        .into_iter()
        .map(|(part, zero)| {
            let data = (!zero).then(|| slice(&part));
            (part, data)
        })
        .collect()
}
