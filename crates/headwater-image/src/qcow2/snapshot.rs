//! Taking and deleting internal snapshots. A snapshot is a second L1 table: what it refers to has a reference more, and is shared.
//!
//! Nothing else may be under way in the image, and nothing is dirty: whoever calls has made sure of that, and it is committed here first.
//!
//! # Order on the disk (docs/on-disk.md)
//! To take one: first the marks "this is the only reference" go from the active tables, so that what is shared is no longer written in place; then
//! the refcounts go up; then the new L1 table and the new table of snapshots are written, to which nothing refers yet; then one write of the
//! header's first sector makes it exist. A barrier lies between each two of these.
//!
//! To delete one: one write of the header's first sector makes it vanish; then what it referred to loses a reference; then the marks come back
//! where a single reference is left.
//!
//! A cut in the middle leaves refcounts that are too high, or marks that are missing: neither lets anything be written that is shared.

use super::cache::Slice;
use super::entry::{Cluster, HostOffset, L1Entry, L2Entry};
use super::image::Image;
use super::snapshots::{Entry, MAX_NAME, MAX_SNAPSHOTS, NewSnapshot, SnapshotInfo, entries};
use headwater_block::{BufferMut, Error, ErrorKind, Result, WriteFlags};
use std::ops::Range;
use std::rc::Rc;

/// The largest write of a table, in bytes.
const MAX_PIECE: usize = 1 << 20;

impl Image {
    /// [`super::Qcow2Node::take_snapshot`].
    pub(super) async fn take_snapshot(self: &Rc<Self>, new: &NewSnapshot) -> Result<SnapshotInfo> {
        let table = self.begin_snapshots().await?;
        self.check_new(new, &table)?;
        let l1_len = self.l1.borrow().len();
        for l1_index in 0..l1_len {
            if let Some(l2) = self.l2_table(l1_index)? {
                for clusters in self.references_of(l2).await? {
                    self.add_references(clusters, true).await?;
                }
            }
        }
        let l1_entries = self.l1.borrow().stored() as u32;
        let l1 = self.allocate_bytes(u64::from(l1_entries) * 8).await?;
        let l1_offset = l1.start << self.geometry.cluster_bits;
        let id = next_id(&table);
        let entry = new.encode(&id, self.size.get(), (l1_offset, l1_entries));
        let made = async {
            let bytes = self.table_bytes(&table, None, Some(entry)).await?;
            self.mark_shared().await?;
            self.commit().await?;
            for l1_index in 0..l1_len {
                let Some(l2) = self.l2_table(l1_index)? else { continue };
                for clusters in self.references_of(l2).await? {
                    self.add_references(clusters, false).await?;
                }
                self.relieve_pressure().await?;
            }
            let words: Vec<u8> = {
                let l1 = self.l1.borrow();
                let entries = l1.entries()[..l1_entries as usize].iter();
                entries.flat_map(|entry| L1Entry(*entry).with_copied(false).0.to_be_bytes()).collect()
            };
            self.write_padded(l1_offset, &words).await?;
            self.switch_snapshots(bytes, table.len() as u32 + 1).await
        };
        if let Err(err) = made.await {
            self.give_up(l1).await;
            return Err(err);
        }
        Ok(new.info(id, self.size.get()))
    }

    /// A snapshot could not be taken. Nothing refers to its L1 table; refcounts that went up leak.
    async fn give_up(self: &Rc<Self>, l1: Range<u64>) {
        self.drop_later(l1);
        let restored = async {
            self.check_failed()?;
            self.mark_sole().await?;
            self.commit().await
        };
        if let Err(err) = restored.await {
            tracing::warn!(image = self.name, error = %err, "some clusters are no longer written in place until the image is repaired");
        }
    }

    /// [`super::Qcow2Node::delete_snapshot`].
    pub(super) async fn delete_snapshot(self: &Rc<Self>, id: &str) -> Result<SnapshotInfo> {
        let mut table = self.begin_snapshots().await?;
        let Some(at) = table.iter().position(|entry| entry.info.id == id) else {
            let text = format!("{}: there is no snapshot with the identifier '{id}'", self.name);
            return Err(Error::new(ErrorKind::NotFound, text));
        };
        // All of it is looked at before anything is changed.
        let l2_tables = self.l2_tables_of(&table[at]).await?;
        for l2 in &l2_tables {
            self.references_of(*l2).await?;
        }
        let bytes = self.table_bytes(&table, Some(at), None).await?;
        self.switch_snapshots(bytes, table.len() as u32 - 1).await?;
        let gone = table.remove(at);
        let bits = self.geometry.cluster_bits;
        let l1_end = gone.l1.0 + u64::from(gone.l1.1) * 8;
        self.drop_later(gone.l1.0 >> bits..l1_end.div_ceil(self.geometry.cluster_size()));
        for l2 in l2_tables {
            for clusters in self.references_of(l2).await? {
                self.drop_later(clusters);
            }
            self.commit().await?;
        }
        // One cycle frees them, the next makes that durable; only then marks may say so.
        self.commit().await?;
        self.commit().await?;
        self.mark_sole().await?;
        self.commit().await?;
        Ok(gone.info)
    }

    /// What all changes of the table of snapshots begin with.
    async fn begin_snapshots(self: &Rc<Self>) -> Result<Vec<Entry>> {
        self.check_change(0, 0)?;
        if self.data_file.is_some() {
            let text = format!(
                "{}: an image with an external data file can't have internal snapshots, because its clusters aren't counted",
                self.name
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        self.prepare_header().await?;
        self.commit().await?;
        self.snapshot_entries().await
    }

    async fn snapshot_entries(&self) -> Result<Vec<Entry>> {
        let header = self.header.borrow().header.clone();
        entries(&*self.file, &header).await
    }

    fn check_new(&self, new: &NewSnapshot, table: &[Entry]) -> Result<()> {
        let refuse = |kind, why: String| Err(Error::new(kind, format!("{}: {why}", self.name)));
        if new.name.is_empty() || new.name.len() > MAX_NAME {
            let why = format!("a snapshot's name has 1 to {MAX_NAME} bytes, not {}", new.name.len());
            return refuse(ErrorKind::InvalidInput, why);
        }
        if table.iter().any(|entry| entry.info.name == new.name) {
            let why = format!("there is a snapshot with the name '{}'", new.name);
            return refuse(ErrorKind::AlreadyExists, why);
        }
        if table.len() as u32 >= MAX_SNAPSHOTS {
            let why = format!("no more than {MAX_SNAPSHOTS} snapshots are possible");
            return refuse(ErrorKind::Unsupported, why);
        }
        Ok(())
    }

    /// The L2 tables of a snapshot.
    async fn l2_tables_of(&self, entry: &Entry) -> Result<Vec<HostOffset>> {
        let (offset, entries) = entry.l1;
        let file_end = self.space.borrow().end() << self.geometry.cluster_bits;
        let id = &entry.info.id;
        let len = u64::from(entries) * 8;
        if !offset.is_multiple_of(self.geometry.cluster_size())
            || offset.checked_add(len).is_none_or(|end| end > file_end)
        {
            return Err(self.corrupt(format_args!(
                "the L1 table of snapshot {id} ({entries} entries at file offset {offset:#x}) isn't a place for one"
            )));
        }
        let mut tables = Vec::new();
        let mut at = 0;
        while at < len {
            let piece = (len - at).min(MAX_PIECE as u64);
            let bytes = self.file.read(offset + at, BufferMut::new(piece as usize)).await?;
            for word in bytes.as_chunks::<8>().0 {
                let word = u64::from_be_bytes(*word);
                let table = L1Entry(word).table(&self.geometry);
                let table = table.map_err(|why| {
                    self.corrupt(format_args!("L1 entry {word:#018x} of snapshot {id}: {why}"))
                })?;
                tables.extend(table);
            }
            at += piece;
        }
        Ok(tables)
    }

    /// The clusters, by number, of an L2 table and of everything that it refers to: as often as it does. What is in the file counts.
    async fn references_of(&self, table: HostOffset) -> Result<Vec<Range<u64>>> {
        let bits = self.geometry.cluster_bits;
        let end = self.space.borrow().end();
        let own = table.0 >> bits;
        let mut runs: Vec<Range<u64>> = std::iter::once(own..own + 1).collect();
        if own >= end {
            return Err(
                self.corrupt(format_args!("the L2 table at {:#x} lies beyond the end of the file", table.0))
            );
        }
        let bytes = self.file.read(table.0, BufferMut::new(self.geometry.cluster_size() as usize)).await?;
        let size = 1 << self.geometry.l2_entry_bits();
        for (index, entry) in bytes.chunks_exact(size).enumerate() {
            let word = |at: usize| entry[at..at + 8].iter().fold(0, |n, byte| n << 8 | u64::from(*byte));
            let decoded = L2Entry::decode(word(0), if size > 8 { word(8) } else { 0 }, &self.geometry);
            let clusters = match decoded {
                Ok(L2Entry::Standard(Cluster { host: None, .. })) => continue,
                Ok(L2Entry::Standard(Cluster { host: Some(host), .. })) => {
                    host.0 >> bits..(host.0 >> bits) + 1
                }
                Ok(L2Entry::Compressed { offset, len }) => {
                    offset.0 >> bits..((offset.0 + len - 1) >> bits) + 1
                }
                Err(why) => {
                    return Err(
                        self.corrupt(format_args!("entry {index} of the L2 table at {:#x}: {why}", table.0))
                    );
                }
            };
            if clusters.end > end {
                return Err(self.corrupt(format_args!(
                    "entry {index} of the L2 table at {:#x} points beyond the end of the file",
                    table.0
                )));
            }
            match runs.last_mut() {
                Some(last) if last.end == clusters.start => last.end = clusters.end,
                _ => runs.push(clusters),
            }
        }
        Ok(runs)
    }

    /// Takes the marks "this is the only reference" from all active tables.
    async fn mark_shared(self: &Rc<Self>) -> Result<()> {
        self.change_marks(async |_, _| Ok(false)).await
    }

    /// Sets those marks where refcounts say that it is so.
    async fn mark_sole(self: &Rc<Self>) -> Result<()> {
        self.change_marks(async |image, cluster| Ok(image.references(cluster).await? == 1)).await
    }

    async fn change_marks(self: &Rc<Self>, sole: impl AsyncFn(&Self, u64) -> Result<bool>) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let l1_len = self.l1.borrow().len();
        for l1_index in 0..l1_len {
            let Some(table) = self.l2_table(l1_index)? else { continue };
            let mark = sole(self, table.0 >> bits).await?;
            let entry = L1Entry(self.l1.borrow().get(l1_index));
            if entry.is_copied() != mark {
                self.l1.borrow_mut().set(l1_index, entry.with_copied(mark).0);
            }
            let first = (l1_index as u64) << self.geometry.l2_coverage_bits();
            let step = (self.l2_slice_entries() as u64) << bits;
            for guest in (0..1 << self.geometry.l2_coverage_bits()).step_by(step as usize) {
                let (slice, _) = self.l2_slice(table, first + guest).await?;
                let mut wrong = Vec::new();
                for index in 0..self.l2_slice_entries() {
                    let entry = self.l2_entry(&slice, index, first + guest + ((index as u64) << bits))?;
                    if let L2Entry::Standard(cluster @ Cluster { host: Some(host), .. }) = entry
                        && cluster.copied != sole(self, host.0 >> bits).await?
                    {
                        wrong.push((index, Cluster { copied: !cluster.copied, ..cluster }));
                    }
                }
                self.store_marks(&slice, &wrong);
            }
            self.relieve_pressure().await?;
        }
        Ok(())
    }

    fn store_marks(&self, slice: &Rc<Slice>, wrong: &[(usize, Cluster)]) {
        for (index, cluster) in wrong {
            self.set_l2_entry(slice, *index, L2Entry::Standard(*cluster), *cluster);
        }
    }

    /// Room for so many bytes of a table: clusters by number.
    async fn allocate_bytes(self: &Rc<Self>, len: u64) -> Result<Range<u64>> {
        let clusters = len.div_ceil(self.geometry.cluster_size()).max(1);
        let start = self.allocate_table(clusters).await?;
        Ok(start..start + clusters)
    }

    /// The bytes of the table without one of its entries, and with a new one at the end. The entries are copied as they are.
    async fn table_bytes(
        &self,
        table: &[Entry],
        without: Option<usize>,
        new: Option<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for (_, entry) in table.iter().enumerate().filter(|(at, _)| Some(*at) != without) {
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            let len = (entry.place.end - entry.place.start) as usize;
            bytes.extend_from_slice(&self.file.read(entry.place.start, BufferMut::new(len)).await?);
        }
        if let Some(new) = new {
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes.extend(new);
        }
        Ok(bytes)
    }

    /// Makes a table with so many entries the table of snapshots, and durable. The old one is free afterwards. On error nothing has changed, or
    /// the image takes no more changes.
    async fn switch_snapshots(self: &Rc<Self>, bytes: Vec<u8>, count: u32) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let place = if count == 0 { 0..0 } else { self.allocate_bytes(bytes.len() as u64).await? };
        // The refcounts of all that the header is about to lead to.
        let switched = async {
            self.commit().await?;
            let (image, start) = (self.clone(), place.start);
            let switch = async move {
                image.check_failed()?;
                image.write_padded(start << bits, &bytes).await?;
                image.barrier().await?;
                let written = image.write_header(|header| {
                    header.nb_snapshots = count;
                    header.snapshots_offset = start << bits;
                });
                if let Err(err) = written.await {
                    let why =
                        "the header could not be written, and it isn't known which snapshots it leads to now";
                    return Err(image.fail(err.context(why)));
                }
                image.barrier().await
            };
            let old = self.snapshot_place().await?;
            self.enqueue(switch).await?;
            Ok(old)
        };
        let old = match switched.await {
            Ok(old) => old,
            Err(err) => {
                self.drop_later(place);
                return Err(err);
            }
        };
        if !old.is_empty() {
            self.metadata.borrow_mut().remove(&old.start);
            self.drop_later(old);
        }
        if !place.is_empty() {
            self.metadata.borrow_mut().insert(place.start);
        }
        if let Err(err) = self.commit().await {
            // What was asked for is durable. The next cycle does the rest.
            tracing::warn!(image = self.name, error = %err, "the old table of snapshots can't be reused yet");
        }
        Ok(())
    }

    /// The clusters, by number, of the table of snapshots.
    async fn snapshot_place(&self) -> Result<Range<u64>> {
        let bits = self.geometry.cluster_bits;
        let entries = self.snapshot_entries().await?;
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else { return Ok(0..0) };
        Ok(first.place.start >> bits..last.place.end.div_ceil(self.geometry.cluster_size()))
    }

    /// Writes a table to clusters of its own, in whole units of writing.
    async fn write_padded(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let unit = self.header.borrow().sector;
        for (at, piece) in bytes.chunks(MAX_PIECE).enumerate() {
            let mut buf = BufferMut::zeroed(piece.len().next_multiple_of(unit));
            buf[..piece.len()].copy_from_slice(piece);
            self.file.write(offset + (at * MAX_PIECE) as u64, buf.freeze(), WriteFlags::default()).await?;
        }
        Ok(())
    }
}

/// The identifier of a new snapshot: one more than the largest number that is one.
fn next_id(table: &[Entry]) -> String {
    let largest = table.iter().filter_map(|entry| entry.info.id.parse::<u64>().ok()).max();
    largest.unwrap_or(0).saturating_add(1).to_string()
}
