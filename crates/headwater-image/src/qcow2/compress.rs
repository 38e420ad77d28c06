//! Writing compressed clusters.
//!
//! A cluster is always compressed as a whole: what a request leaves of it is read first. It goes to a new place ([`super::pack`]), also if the
//! disk has it in the file already, so that what was there stays until the entry that names the new place is durable. **The L2 entry is
//! changed, in memory, only after the compressed bytes were written**, as in [`super::write`]. What doesn't get smaller is written as it is.
//!
//! Compressing is done elsewhere ([`headwater_block::Workers`]), several clusters at once. The range lock is held meanwhile, of whole clusters.

use super::cache::Slice;
use super::codec::deflate;
use super::image::Image;
use super::pack::Places;
use super::write::drive;
use futures_util::future::{join_all, try_join_all};
use futures_util::stream::FuturesUnordered;
use headwater_block::workers::Work;
use headwater_block::{Buffer, BufferMut, DebugEvent, LocalFuture, Result, WriteFlags};
use std::ops::Range;
use std::rc::Rc;

/// How much of a request is compressed and written in one go, in bytes, unless clusters are larger.
const STEP: u64 = 1 << 20;
/// And how many clusters.
const MOST_CLUSTERS: u64 = 64;

/// A cluster that got smaller.
struct Packed {
    /// Where it is on the disk.
    guest: u64,
    bytes: Vec<u8>,
}

impl Image {
    /// As [`Image::write`], of an image without external data file.
    pub(super) async fn write_compressed(self: &Rc<Self>, offset: u64, data: Buffer) -> Result<()> {
        self.check_change(offset, data.len() as u64)?;
        if data.is_empty() {
            return Ok(());
        }
        self.prepare_header().await?;
        let end = offset + data.len() as u64;
        let size = self.geometry.cluster_size();
        let step = STEP.min(MOST_CLUSTERS * size).max(size);
        let mut at = offset;
        while at < end {
            let stop = end.min(self.cluster_start(at) + step);
            let part = data.slice((at - offset) as usize..(stop - offset) as usize);
            self.compress_step(at..stop, part).await?;
            at = stop;
        }
        Ok(())
    }

    async fn compress_step(self: &Rc<Self>, range: Range<u64>, data: Buffer) -> Result<()> {
        let size = self.geometry.cluster_size();
        let whole = self.cluster_start(range.start)..range.end.next_multiple_of(size);
        let data = if whole == range { data } else { self.surround(whole.clone(), range, data).await? };
        let (packed, plain) = self.compress_clusters(whole.start, &data).await?;
        self.relieve_pressure().await?;
        let mut entries = Vec::new();
        for cluster in &packed {
            // Before there is anything to give back.
            let (slice, index) = self.writable_l2_slice(cluster.guest).await?;
            self.l2_entry(&slice, index, cluster.guest)?;
            entries.push((slice, index));
        }
        let places = self.pack(packed.iter().map(|cluster| cluster.bytes.len() as u64)).await?;
        if let Err(err) = self.write_packed(&packed, &places).await {
            // All writes have ended, and no table refers to the places.
            places.give_back(self);
            return Err(err);
        }
        self.refer_to(&packed, &entries, places)?;
        let running: FuturesUnordered<LocalFuture<'_, Result<()>>> = FuturesUnordered::new();
        for cluster in plain {
            let part = data.slice((cluster - whole.start) as usize..(cluster + size - whole.start) as usize);
            running.push(Box::pin(self.write_unchecked(cluster, part)));
        }
        drive(running).await
    }

    /// Compresses the clusters of `data`, which is at `start` of the disk. Returns those that got smaller, and where the others are.
    async fn compress_clusters(&self, start: u64, data: &Buffer) -> Result<(Vec<Packed>, Vec<u64>)> {
        let compression = self.header.borrow().header.compression;
        let size = self.geometry.cluster_size() as usize;
        let compressing = data.chunks(size).map(|cluster| {
            let cluster = cluster.to_vec();
            // Nothing stands for "not smaller": no cluster gets that small.
            let work: Work = Box::new(move || deflate(compression, &cluster).unwrap_or_default());
            self.workers.run(work)
        });
        let mut packed = Vec::new();
        let mut plain = Vec::new();
        for (guest, bytes) in (start..).step_by(size).zip(try_join_all(compressing).await?) {
            if bytes.is_empty() {
                plain.push(guest);
            } else {
                packed.push(Packed { guest, bytes });
            }
        }
        Ok((packed, plain))
    }

    /// Writes clusters to their places, those that follow each other in one go, up to the end of the last sector.
    async fn write_packed(&self, packed: &[Packed], places: &Places) -> Result<()> {
        let mut writes: Vec<(u64, Vec<u8>)> = Vec::new();
        for (cluster, place) in packed.iter().zip(places.as_slice()) {
            match writes.last_mut() {
                Some((start, bytes)) if *start + bytes.len() as u64 == place.start => {
                    bytes.extend_from_slice(&cluster.bytes);
                }
                _ => writes.push((place.start, cluster.bytes.clone())),
            }
        }
        let alignment = self.pack_alignment() as usize;
        let running = writes.into_iter().map(|(start, bytes)| {
            let mut buf = BufferMut::zeroed(bytes.len().next_multiple_of(alignment));
            buf[..bytes.len()].copy_from_slice(&bytes);
            self.events.tell(DebugEvent::WriteCompressed);
            self.file.write(start, buf.freeze(), WriteFlags::default())
        });
        join_all(running).await.into_iter().collect()
    }

    /// Points the entries of clusters to where their bytes are.
    fn refer_to(&self, packed: &[Packed], entries: &[(Rc<Slice>, usize)], places: Places) -> Result<()> {
        for ((cluster, (slice, index)), place) in packed.iter().zip(entries).zip(places.as_slice()) {
            let old = self.l2_entry(slice, *index, cluster.guest)?;
            self.set_compressed_entry(slice, *index, old, place.clone());
        }
        places.keep();
        Ok(())
    }
}
