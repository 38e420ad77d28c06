//! Refcounts in memory: changing them, and making room for more of them.
//!
//! Whatever is done here becomes durable through the metadata writer, in its ranks. New refcount blocks lie at the end of the file,
//! mostly among the clusters that they describe themselves; a refcount table that is full is replaced by a larger one,
//! to which the header is switched.

use super::cache::{Kind, Slice};
use super::entry::{refcount, set_refcount};
use super::header::MAX_REFCOUNT_TABLE_BYTES;
use super::image::Image;
use super::shared::Shared;
use headwater_block::{DebugEvent, Error, ErrorKind, Result, ZeroFlags};
use std::future::Future;
use std::ops::Range;
use std::rc::Rc;

/// The growth of refcount structures that is under way: one at a time.
pub(super) type Growth = Option<Shared<u64>>;

impl Image {
    /// How many refcounts a slice holds.
    pub(super) fn refcounts_per_slice(&self) -> u64 {
        (self.cache.slice_len() as u64 * 8) >> self.geometry.refcount_order
    }

    /// The index in the refcount table that covers `cluster`.
    pub(super) fn block_index(&self, cluster: u64) -> usize {
        (cluster >> self.geometry.refcount_block_bits()) as usize
    }

    /// Sets the refcounts of `clusters`, which `slice` covers.
    pub(super) fn store_refcounts(&self, slice: &Rc<Slice>, clusters: Range<u64>, value: u64) {
        let per_slice = self.refcounts_per_slice();
        self.cache.change(slice, |bytes| {
            for cluster in clusters {
                set_refcount(bytes, (cluster % per_slice) as usize, self.geometry.refcount_order, value);
            }
        });
    }

    /// Takes one reference away from each of `clusters`, because nothing durable holds it any more. Returns those that are free now;
    /// they are not given to [`super::alloc::Space`] yet.
    pub(super) async fn drop_references(&self, clusters: Range<u64>) -> Result<Vec<Range<u64>>> {
        let per_slice = self.refcounts_per_slice();
        let order = self.geometry.refcount_order;
        let mut free: Vec<Range<u64>> = Vec::new();
        let mut at = clusters.start;
        while at < clusters.end {
            let stop = ((at / per_slice + 1) * per_slice).min(clusters.end);
            let slice = self.refcount_slice(at).await?;
            let mut wrong = None;
            self.cache.change(&slice, |bytes| {
                for cluster in at..stop {
                    let index = (cluster % per_slice) as usize;
                    match refcount(bytes, index, order) {
                        0 => wrong = wrong.or(Some(cluster)),
                        count => {
                            set_refcount(bytes, index, order, count - 1);
                            match free.last_mut() {
                                _ if count > 1 => {}
                                Some(run) if run.end == cluster => run.end += 1,
                                _ => free.push(cluster..cluster + 1),
                            }
                        }
                    }
                }
            });
            if let Some(cluster) = wrong {
                let offset = cluster << self.geometry.cluster_bits;
                let err = self.corrupt(format_args!(
                    "the cluster at file offset {offset:#x} was in use, but its refcount was 0"
                ));
                return Err(self.fail(err));
            }
            at = stop;
        }
        self.packer.borrow_mut().forget(&free, self.geometry.cluster_bits);
        Ok(free)
    }

    /// Adds one reference to each of `clusters`, which are in use. With `look_only` it is only made sure that their refcounts can have it.
    pub(super) async fn add_references(&self, clusters: Range<u64>, look_only: bool) -> Result<()> {
        let per_slice = self.refcounts_per_slice();
        let order = self.geometry.refcount_order;
        let most = self.geometry.max_refcount();
        let mut at = clusters.start;
        while at < clusters.end {
            let stop = ((at / per_slice + 1) * per_slice).min(clusters.end);
            let slice = self.refcount_slice(at).await?;
            for cluster in at..stop {
                let count = slice.with(|bytes| refcount(bytes, (cluster % per_slice) as usize, order));
                let offset = cluster << self.geometry.cluster_bits;
                match count {
                    0 => {
                        return Err(self.corrupt(format_args!(
                            "the cluster at file offset {offset:#x} is in use, but its refcount is 0"
                        )));
                    }
                    count if count >= most => {
                        let text = format!(
                            "{}: the cluster at file offset {offset:#x} has {count} references, as many as refcounts of {} bits can count; \
                             delete a snapshot, or convert the image to one with wider refcounts",
                            self.name,
                            1 << order
                        );
                        return Err(Error::new(ErrorKind::Unsupported, text));
                    }
                    count if !look_only => self.store_refcounts(&slice, cluster..cluster + 1, count + 1),
                    _ => {}
                }
            }
            at = stop;
        }
        Ok(())
    }

    /// The refcount of a cluster.
    pub(super) async fn references(&self, cluster: u64) -> Result<u64> {
        let slice = self.refcount_slice(cluster).await?;
        let index = (cluster % self.refcounts_per_slice()) as usize;
        Ok(slice.with(|bytes| refcount(bytes, index, self.geometry.refcount_order)))
    }

    /// Makes a refcount block for the end of the file, and room for it in the refcount table. Callers look again afterwards.
    pub(super) async fn grow_refcounts(self: &Rc<Self>) -> Result<()> {
        let waiting = self.writer.borrow().growth.clone();
        let growth = waiting.unwrap_or_else(|| {
            let image = self.clone();
            self.start_growth(async move {
                image.grow_table_for(1).await?;
                let end = image.space.borrow().end();
                let index = image.block_index(end);
                if image.refcount_block(index)?.is_none() {
                    image.add_block(index).await?;
                }
                Ok(0)
            })
        });
        growth.await.map(|_| ())
    }

    /// Allocates `count` neighbouring clusters at the end of the file, however many slices and blocks of refcounts they span.
    /// Returns the first; their refcounts are 1.
    pub(super) async fn allocate_table(self: &Rc<Self>, count: u64) -> Result<u64> {
        loop {
            let waiting = self.writer.borrow().growth.clone();
            match waiting {
                Some(growth) => {
                    let _ = growth.await;
                }
                None => break,
            }
        }
        let image = self.clone();
        let growth = self.start_growth(async move {
            image.grow_table_for(count).await?;
            image.allocate_at_end(count).await
        });
        growth.await
    }

    fn start_growth(self: &Rc<Self>, work: impl Future<Output = Result<u64>> + 'static) -> Shared<u64> {
        let image = self.clone();
        let growth = Shared::new(async move {
            let result = work.await;
            image.writer.borrow_mut().growth = None;
            result
        });
        self.writer.borrow_mut().growth = Some(growth.clone());
        growth
    }

    /// Sees to it that the refcount table has room for `count` more clusters at the end of the file, and for the blocks that they need.
    async fn grow_table_for(self: &Rc<Self>, count: u64) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let per_block = 1u64 << self.geometry.refcount_block_bits();
        let end = self.space.borrow().end();
        // With a block's worth to spare, because others may take clusters at the end meanwhile, as long as blocks last.
        let slack = |clusters: u64| clusters + clusters / per_block + 4 + per_block;
        let stored = self.refcount_table.borrow().stored() as u64;
        if (end + slack(count)) / per_block < stored {
            return Ok(());
        }
        let mut clusters = (stored * 8 / cluster_size) * 3 / 2 + 1;
        while (end + slack(count) + slack(clusters)) / per_block >= clusters * cluster_size / 8 {
            clusters += clusters / 2 + 1;
        }
        if clusters * cluster_size > MAX_REFCOUNT_TABLE_BYTES {
            return Err(self.full());
        }
        self.events.tell(DebugEvent::ReftableGrow);
        // From here on more entries exist in memory than can be written. Nothing but this growth uses them, because everybody else
        // compares with `Table::stored` before going beyond it.
        self.refcount_table.borrow_mut().extend((clusters * cluster_size / 8) as usize);
        let start = self.allocate_at_end(clusters).await?;
        self.metadata.borrow_mut().extend(start..start + clusters);
        self.refcount_table.borrow_mut().move_to(start << self.geometry.cluster_bits);
        Ok(())
    }

    async fn allocate_at_end(self: &Rc<Self>, count: u64) -> Result<u64> {
        let start = loop {
            let end = self.space.borrow().end();
            let missing = {
                let table = self.refcount_table.borrow();
                (self.block_index(end)..=self.block_index(end + count - 1))
                    .find(|index| table.get(*index) == 0)
            };
            match missing {
                Some(index) if index >= self.refcount_table.borrow().len() => return Err(self.full()),
                Some(index) => self.add_block(index).await?,
                None => {
                    let free = self.is_end_free(end..end + count).await?;
                    // Others may have taken clusters at the end while the refcounts were read.
                    if free && self.space.borrow().end() == end {
                        break self.space.borrow_mut().take_end(count);
                    }
                }
            }
        };
        let mut at = start;
        while at < start + count {
            let per_slice = self.refcounts_per_slice();
            let stop = ((at / per_slice + 1) * per_slice).min(start + count);
            let slice = self.refcount_slice(at).await?;
            self.store_refcounts(&slice, at..stop, 1);
            at = stop;
        }
        Ok(start)
    }

    /// True if all refcounts of a range at the end are 0. If not, the end moves past the last that isn't.
    async fn is_end_free(self: &Rc<Self>, clusters: Range<u64>) -> Result<bool> {
        let per_slice = self.refcounts_per_slice();
        let mut at = clusters.start;
        while at < clusters.end {
            let stop = ((at / per_slice + 1) * per_slice).min(clusters.end);
            let slice = self.refcount_slice(at).await?;
            let free: u64 = self.free_runs(&slice, at..stop).iter().map(|run| run.end - run.start).sum();
            if free != stop - at {
                let mut space = self.space.borrow_mut();
                let behind = stop.saturating_sub(space.end());
                space.take_end(behind);
                return Ok(false);
            }
            at = stop;
        }
        Ok(true)
    }

    /// Makes a refcount block with index `index` at the end of the file.
    ///
    /// The block is zeroed in the file before anything refers to it. Its own refcount is in itself, if the end of the file is
    /// what it describes, or else in the block before, which exists.
    async fn add_block(self: &Rc<Self>, index: usize) -> Result<()> {
        self.events.tell(DebugEvent::RefblockAlloc);
        let bits = self.geometry.cluster_bits;
        let cluster = self.space.borrow_mut().take_end(1);
        let offset = cluster << bits;
        let cluster_size = self.geometry.cluster_size();
        self.cache.forget(offset..offset + cluster_size);
        self.events.tell(DebugEvent::RefblockAllocWrite);
        self.file.write_zeroes(offset, cluster_size, ZeroFlags::default()).await?;
        let own = self.block_index(cluster) == index;
        let slice = if own {
            let in_block = cluster & ((1 << self.geometry.refcount_block_bits()) - 1);
            let byte = (in_block << self.geometry.refcount_order) >> 3;
            let at = offset + (byte & !(self.cache.slice_len() as u64 - 1));
            self.cache.load(at, Kind::Refcounts).await?
        } else {
            self.refcount_slice(cluster).await?
        };
        if self.free_runs(&slice, cluster..cluster + 1).is_empty() {
            // It was allocated before a power cut, and is beyond the end of the file. Callers look again and get the next.
            return Ok(());
        }
        self.store_refcounts(&slice, cluster..cluster + 1, 1);
        if !own && self.refcount_table.borrow().is_dirty() {
            // The block that counts this one may be new itself. Entries of one rank may reach the disk in any order, so that one's
            // comes first.
            self.commit().await?;
        }
        self.metadata.borrow_mut().insert(cluster);
        self.refcount_table.borrow_mut().set(index, offset);
        Ok(())
    }
}
