//! Where compressed clusters go: one behind the other, in host clusters that they share.
//!
//! Each reference counts: the refcount of a host cluster is the number of compressed clusters that have bytes in it. It goes up in memory when a
//! place is given away, before anything is written there, as for [`super::alloc::Allocation`]; and it goes down as for any other cluster, after
//! the last entry that names it is durably gone.
//!
//! The **open** cluster is the one that still has room. A place is given away for good: what a write that failed was to have isn't used again
//! before the cluster is free. **Writes never share a sector**: the places of one write follow each other byte by byte, but those of another
//! begin at the next sector (or at what the file's writes are aligned to). So no write has to read what another one has put there, or wait for
//! it, or can do harm to it.

use super::entry::refcount;
use super::image::Image;
use headwater_block::{DebugEvent, Result};
use std::ops::Range;
use std::rc::Rc;

/// The open cluster.
#[derive(Default)]
pub(super) struct Packer(Option<Open>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Open {
    /// The first byte that nobody was given, in bytes of the file.
    at: u64,
    /// Where the cluster ends. It is the one that `at` is in.
    end: u64,
}

impl Packer {
    /// Clusters (by number) have become free.
    pub(super) fn forget(&mut self, clusters: &[Range<u64>], cluster_bits: u32) {
        let gone = |open: &Open| clusters.iter().any(|run| run.contains(&(open.at >> cluster_bits)));
        self.0 = self.0.filter(|open| !gone(open));
    }

    /// A cluster of which `at` is the first free byte, if there is room and the one that is open hasn't more.
    fn offer(&mut self, at: u64, end: u64) {
        if at < end && self.0.is_none_or(|open| open.end - open.at < end - at) {
            self.0 = Some(Open { at, end });
        }
    }
}

/// Places that nothing refers to yet, one for each compressed cluster, in bytes of the file.
///
/// Dropped without [`Places::keep`] or [`Places::give_back`] they leak, which is what must happen when a write may still be going on.
#[must_use]
#[derive(Default)]
pub(super) struct Places {
    places: Vec<Range<u64>>,
    settled: bool,
}

impl Places {
    /// In the order of what was asked for.
    pub(super) fn as_slice(&self) -> &[Range<u64>] {
        &self.places
    }

    /// Something refers to all of them now.
    pub(super) fn keep(mut self) {
        self.settled = true;
    }

    /// Nothing will. Nothing may be writing to them any more.
    pub(super) fn give_back(mut self, image: &Image) {
        self.settled = true;
        for place in &self.places {
            image.release_later(image.clusters_of(place));
        }
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        if !self.settled && !self.places.is_empty() {
            tracing::warn!(
                places = self.places.len(),
                "clusters of an abandoned compressed write leak until the image is repaired"
            );
        }
    }
}

impl Image {
    /// Finds places for compressed clusters of these lengths, each less than a cluster.
    pub(super) async fn pack(self: &Rc<Self>, lens: impl Iterator<Item = u64>) -> Result<Places> {
        let mut places = Places::default();
        for len in lens {
            self.events.tell(DebugEvent::ClusterAllocBytes);
            let before = places.places.last().map(|place| place.end);
            match self.pack_one(len, before).await {
                Ok(at) => {
                    self.inflated.borrow_mut().forget(at);
                    places.places.push(at..at + len);
                }
                Err(err) => {
                    places.give_back(self);
                    return Err(err);
                }
            }
        }
        Ok(places)
    }

    /// What writes of compressed clusters begin and end at, in bytes.
    pub(super) fn pack_alignment(&self) -> u64 {
        u64::from(self.write_alignment()).max(512)
    }

    /// The numbers of the host clusters that bytes of the file are in.
    fn clusters_of(&self, place: &Range<u64>) -> Range<u64> {
        let bits = self.geometry.cluster_bits;
        place.start >> bits..((place.end - 1) >> bits) + 1
    }

    /// The open cluster, as far as a write may have it whose last place ends at `before`.
    fn open_for(&self, before: Option<u64>) -> Option<Open> {
        let open = self.packer.borrow().0?;
        let at =
            if Some(open.at) == before { open.at } else { open.at.next_multiple_of(self.pack_alignment()) };
        (at < open.end).then_some(Open { at, end: open.end })
    }

    async fn pack_one(self: &Rc<Self>, len: u64, before: Option<u64>) -> Result<u64> {
        let size = self.geometry.cluster_size();
        debug_assert!(0 < len && len < size);
        while let Some(open) = self.open_for(before).filter(|open| open.end - open.at >= len) {
            if self.share(open, before, open.at + len..open.end).await? {
                return Ok(open.at);
            }
        }
        let allocation = self.allocate(1).await?;
        let new = allocation.start.0;
        if (new + size) >> self.geometry.compressed_offset_bits() != 0 {
            allocation.free(self);
            return Err(self.full());
        }
        // What is left of the open cluster can be used, too, if the new one is right behind it. (If it has room enough by now, another
        // write has opened it meanwhile.)
        let is_continued = |open: &Open| open.end == new && open.end - open.at < len;
        if let Some(open) = self.open_for(before).filter(is_continued) {
            match self.share(open, before, open.at + len..new + size).await {
                Ok(true) => {
                    allocation.keep();
                    return Ok(open.at);
                }
                Ok(false) => {}
                Err(err) => {
                    allocation.free(self);
                    return Err(err);
                }
            }
        }
        allocation.keep();
        self.packer.borrow_mut().offer(new + len, new + size);
        Ok(new)
    }

    /// Counts one more reference to the open cluster, which is as `open` says for a write whose last place ends at `before`; `rest` becomes the
    /// open one's rest. False if it isn't as it was, or can't be counted.
    async fn share(&self, open: Open, before: Option<u64>, rest: Range<u64>) -> Result<bool> {
        let cluster = open.at >> self.geometry.cluster_bits;
        let slice = self.refcount_slice(cluster).await?;
        // race-mark: pack-open-changed
        if self.open_for(before) != Some(open) {
            return Ok(false);
        }
        let index = (cluster % self.refcounts_per_slice()) as usize;
        let count = slice.with(|bytes| refcount(bytes, index, self.geometry.refcount_order));
        // A damaged image may count what it likes.
        if count == 0 || count >= self.geometry.max_refcount() {
            self.packer.borrow_mut().0 = None;
            return Ok(false);
        }
        self.store_refcounts(&slice, cluster..cluster + 1, count + 1);
        self.packer.borrow_mut().0 =
            (rest.start < rest.end).then_some(Open { at: rest.start, end: rest.end });
        Ok(true)
    }
}
