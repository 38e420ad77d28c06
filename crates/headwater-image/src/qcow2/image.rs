//! The state of one open image, shared by the modules that read and change it.

use super::alloc::Space;
use super::cache::{Kind, OffsetHasher, OffsetMap, Slice, SliceCache};
use super::compressed::Inflated;
use super::entry::{EntryResult, Geometry, HostOffset, L1Entry, L2Entry, RefcountTableEntry};
use super::events::Events;
use super::header::{AUTOCLEAR_RAW_DATA, Header};
use super::meta_writer::Writer;
use super::node::{Children, Qcow2Options};
use super::pack::Packer;
use super::shared::WeakShared;
use super::tables::Table;
use headwater_block::{DebugEvent, Error, ErrorKind, Node, Result, Workers};
use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::hash::BuildHasherDefault;
use std::ops::Range;
use std::rc::Rc;

/// The largest slice of a table, in bytes, unless the file needs larger writes.
const SLICE_LEN: u64 = 4096;

/// Numbers of clusters.
type ClusterSet = HashSet<u64, BuildHasherDefault<OffsetHasher>>;

/// One open image.
pub(super) struct Image {
    pub(super) name: String,
    pub(super) file: Rc<dyn Node>,
    /// Where guest data are, if not in `file`.
    pub(super) data_file: Option<Rc<dyn Node>>,
    /// That other file must stay a valid raw image.
    pub(super) data_file_is_raw: bool,
    pub(super) backing: RefCell<Option<Rc<dyn Node>>>,
    pub(super) geometry: Geometry,
    pub(super) size: Cell<u64>,
    pub(super) read_only: bool,
    /// Why the image takes no changes any more.
    pub(super) failed: RefCell<Option<Error>>,
    /// The header as it is on the disk.
    pub(super) header: RefCell<DiskHeader>,
    /// It is known that, durably, the header promises nothing that the first change would break ([`Image::prepare_header`]).
    pub(super) prepared: Cell<bool>,
    pub(super) l1: RefCell<Table>,
    pub(super) refcount_table: RefCell<Table>,
    pub(super) cache: Rc<SliceCache>,
    pub(super) space: RefCell<Space>,
    pub(super) writer: RefCell<Writer>,
    /// The numbers of the clusters in the file that hold the active metadata: no guest data can be there.
    pub(super) metadata: RefCell<ClusterSet>,
    /// Those of them that hold two things at once, which nobody may use.
    overlaps: ClusterSet,
    /// L2 tables that are being made, by L1 index.
    pub(super) new_tables: RefCell<OffsetMap<WeakShared<()>>>,
    pub(super) inflated: RefCell<Inflated>,
    pub(super) packer: RefCell<Packer>,
    pub(super) workers: &'static (dyn Workers + Sync),
    pub(super) events: Events,
}

/// The header as it is on the disk, decoded and in bytes.
pub(super) struct DiskHeader {
    pub(super) header: Header,
    /// The first cluster.
    pub(super) cluster: Vec<u8>,
    /// How many bytes are written at once: a sector, or more if the file needs it.
    pub(super) sector: usize,
}

impl Image {
    /// Reads the tables that stay in memory. `header` was read from `file`.
    pub(super) async fn open(
        file: Rc<dyn Node>,
        header: Header,
        cluster: Vec<u8>,
        children: Children,
        options: &Qcow2Options,
    ) -> Result<Rc<Self>> {
        let name = file.name().to_owned();
        let geometry = Geometry::of(&header);
        let cluster_size = geometry.cluster_size();
        let files = || [Some(&file), children.data_file.as_ref()].into_iter().flatten();
        let alignment = || u64::from(files().map(|node| node.limits().write_alignment).max().unwrap_or(1));
        if !options.read_only && alignment() > cluster_size {
            // Clusters smaller than a block of the disk can't be written one by one past the page cache.
            files().try_for_each(|file| file.use_buffered())?;
        }
        let alignment = alignment();
        if !options.read_only {
            check_writable(&header, &name, alignment)?;
        }
        if header.has_data_file() != children.data_file.is_some() {
            let text = format!(
                "{name}: the image {} an external data file, but one was {}given",
                if header.has_data_file() { "needs" } else { "has no" },
                if children.data_file.is_some() { "" } else { "not " }
            );
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        let sector = alignment.clamp(512, cluster_size) as usize;
        let slice_len = alignment.max(SLICE_LEN).min(cluster_size) as usize;

        // No table lies beyond the end of the file, so that a lie about a table's size costs no memory.
        let file_size = file.size();
        let refcount_entries = (u64::from(header.refcount_table_clusters) * cluster_size / 8) as usize;
        for (what, offset, len) in [
            ("L1 table", header.l1_table_offset, u64::from(header.l1_size) * 8),
            ("refcount table", header.refcount_table_offset, 8),
        ] {
            if len > 0 && offset.saturating_add(len) > file_size.next_multiple_of(cluster_size) {
                let text = format!(
                    "{name}: the {what} ({len} bytes at offset {offset:#x}) lies beyond the end of the file ({file_size} bytes); the file \
                     was truncated, restore it from a copy"
                );
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
        }
        let l1 = Table::read(&*file, header.l1_table_offset, header.l1_size as usize, sector).await?;
        let events = Events::of(&file);
        events.tell(DebugEvent::ReftableLoad);
        let refcount_table =
            Table::read(&*file, header.refcount_table_offset, refcount_entries, sector).await?;
        let end = file_size.div_ceil(cluster_size);
        let (metadata, overlaps) = metadata_clusters(&header, &geometry, &l1, &refcount_table, end);
        let prepared = Cell::new(header.autoclear & !kept_autoclear(children.data_file.is_some()) == 0);
        Ok(Rc::new(Self {
            name,
            cache: SliceCache::new(file.clone(), events.clone(), slice_len, options.cache_size),
            data_file_is_raw: header.data_file_is_raw(),
            data_file: children.data_file,
            backing: RefCell::new(children.backing),
            geometry,
            size: Cell::new(header.size),
            read_only: options.read_only,
            failed: RefCell::new(None),
            header: RefCell::new(DiskHeader { header, cluster, sector }),
            prepared,
            l1: RefCell::new(l1),
            refcount_table: RefCell::new(refcount_table),
            space: RefCell::new(Space::new(end)),
            writer: RefCell::default(),
            metadata: RefCell::new(metadata),
            overlaps,
            new_tables: RefCell::default(),
            inflated: RefCell::default(),
            packer: RefCell::default(),
            workers: options.workers,
            events,
            file,
        }))
    }

    /// The node that holds guest data.
    pub(super) fn data_node(&self) -> &Rc<dyn Node> {
        self.data_file.as_ref().unwrap_or(&self.file)
    }

    /// What offsets and lengths of writes must be multiples of, in bytes.
    pub(super) fn write_alignment(&self) -> u32 {
        let of = |node: &Rc<dyn Node>| node.limits().write_alignment;
        of(&self.file).max(self.data_file.as_ref().map_or(1, of))
    }

    /// An error about damage of this image.
    #[cold]
    pub(super) fn corrupt(&self, what: std::fmt::Arguments<'_>) -> Error {
        let text = format!(
            "{}: {what}; the image is damaged: check it (qemu-img check), and repair a copy of it (qemu-img check -r all)",
            self.name
        );
        Error::new(ErrorKind::Corrupt, text)
    }

    /// Takes no more changes, because of `err`, which is returned with an explanation.
    pub(super) fn fail(&self, err: Error) -> Error {
        let err = err.context(format!(
            "{}: the image is read-only from now on, because it isn't known what reached the disk; close it and check it",
            self.name
        ));
        tracing::error!(error = %err, "image failed");
        self.failed.borrow_mut().get_or_insert(err).clone()
    }

    /// The error that ended all changes, if there was one.
    pub(super) fn check_failed(&self) -> Result<()> {
        self.failed.borrow().as_ref().map_or(Ok(()), |err| Err(err.clone()))
    }

    /// The L2 table at an index of the L1 table; `None` if there is none.
    #[inline]
    pub(super) fn l2_table(&self, l1_index: usize) -> Result<Option<HostOffset>> {
        let entry = self.l1.borrow().get(l1_index);
        if entry == 0 {
            return Ok(None);
        }
        let table =
            L1Entry(entry).table(&self.geometry).and_then(|table| self.check_table(table).map(|()| table));
        table.map_err(|why| self.corrupt(format_args!("L1 entry {l1_index} ({entry:#018x}): {why}")))
    }

    /// The refcount block at an index of the refcount table.
    pub(super) fn refcount_block(&self, index: usize) -> Result<Option<HostOffset>> {
        let entry = self.refcount_table.borrow().get(index);
        let block = RefcountTableEntry(entry)
            .block(&self.geometry)
            .and_then(|block| self.check_table(block).map(|()| block));
        block.map_err(|why| self.corrupt(format_args!("refcount table entry {index} ({entry:#018x}): {why}")))
    }

    /// A table that lies where something else lies changes with it, and one that several entries share can make a small file a disk
    /// without end.
    #[inline]
    fn check_table(&self, offset: Option<HostOffset>) -> EntryResult<()> {
        match offset {
            Some(offset) if self.overlaps.contains(&(offset.0 >> self.geometry.cluster_bits)) => {
                Err("it points to metadata that something else refers to, too")
            }
            _ => self.check_in_file(offset),
        }
    }

    #[inline]
    fn check_in_file(&self, offset: Option<HostOffset>) -> EntryResult<()> {
        match offset {
            Some(offset) if offset.0 >> self.geometry.cluster_bits >= self.space.borrow().end() => {
                Err("it points beyond the end of the file")
            }
            _ => Ok(()),
        }
    }

    /// The entry at `index` of a slice of an L2 table, checked. `guest` is the disk's offset of the cluster.
    #[inline]
    pub(super) fn l2_entry(&self, slice: &Slice, index: usize, guest: u64) -> Result<L2Entry> {
        let (word, bitmap) = if self.geometry.extended_l2 {
            (slice.word(index * 2), slice.word(index * 2 + 1))
        } else {
            (slice.word(index), 0)
        };
        if word | bitmap == 0 {
            return Ok(L2Entry::Standard(super::entry::Cluster::UNALLOCATED));
        }
        L2Entry::decode(word, bitmap, &self.geometry)
            .and_then(|entry| self.check_entry(entry, guest).map(|()| entry))
            .map_err(|why| {
                self.corrupt(format_args!(
                    "L2 entry {word:#018x} for disk offset {guest:#x}, at file offset {:#x}: {why}",
                    slice.offset + (index << self.geometry.l2_entry_bits()) as u64
                ))
            })
    }

    #[inline]
    fn check_entry(&self, entry: L2Entry, guest: u64) -> EntryResult<()> {
        let host = match entry {
            L2Entry::Standard(cluster) => match cluster.host {
                None => return Ok(()),
                Some(host) if self.data_file.is_some() => {
                    let same = host.0 == guest & !(self.geometry.cluster_size() - 1);
                    return if same {
                        Ok(())
                    } else {
                        Err("data in the external data file must be at their disk offset")
                    };
                }
                Some(host) => host,
            },
            L2Entry::Compressed { offset, .. } => offset,
        };
        self.check_in_file(Some(host))?;
        if self.metadata.borrow().contains(&(host.0 >> self.geometry.cluster_bits)) {
            return Err("it points into the image's metadata");
        }
        Ok(())
    }

    /// The slice of an L2 table that maps `guest`, if it is in memory; and the index of the entry.
    #[inline]
    pub(super) fn cached_l2_slice(&self, table: HostOffset, guest: u64) -> Option<(Rc<Slice>, usize)> {
        let (offset, index) = self.l2_place(table, guest);
        Some((self.cache.get(offset)?, index))
    }

    /// As [`Image::cached_l2_slice`], but reads it if need be. The table may have moved meanwhile, which concerns those that change it.
    pub(super) async fn l2_slice(&self, table: HostOffset, guest: u64) -> Result<(Rc<Slice>, usize)> {
        let (offset, index) = self.l2_place(table, guest);
        Ok((self.cache.load(offset, Kind::L2).await?, index))
    }

    #[inline]
    fn l2_place(&self, table: HostOffset, guest: u64) -> (u64, usize) {
        let g = &self.geometry;
        let in_table = (guest >> g.cluster_bits & ((1 << g.l2_bits()) - 1)) << g.l2_entry_bits();
        let slice_len = self.cache.slice_len() as u64;
        (
            table.0 + (in_table & !(slice_len - 1)),
            ((in_table & (slice_len - 1)) >> g.l2_entry_bits()) as usize,
        )
    }

    /// True if the file holds the L2 entries of `range` as they are in memory. The L1 entries that lead there are then in the file, too: they change
    /// together with the first entry of a table, or for a copy that says the same as the table it is of.
    pub(super) fn is_settled(&self, range: Range<u64>) -> bool {
        self.all_l2_slices(range, |offset| self.cache.is_written(offset))
    }

    /// True if a commit cycle has taken the L2 entries of `range` as they are in memory, and whatever leads there.
    pub(super) fn is_taken(&self, range: Range<u64>) -> bool {
        self.all_l2_slices(range, |offset| !self.cache.is_dirty(offset))
    }

    /// True if `holds` is of the slices of L2 tables that have the entries of `range`.
    fn all_l2_slices(&self, range: Range<u64>, holds: impl Fn(u64) -> bool) -> bool {
        let per_slice = (self.l2_slice_entries() as u64) << self.geometry.cluster_bits;
        let mut guest = range.start;
        while guest < range.end {
            match self.l2_table((guest >> self.geometry.l2_coverage_bits()) as usize) {
                Ok(Some(table)) if !holds(self.l2_place(table, guest).0) => return false,
                Ok(_) => {}
                // Those who use the table hear of the error.
                Err(_) => return false,
            }
            guest = (guest / per_slice + 1) * per_slice;
        }
        true
    }

    /// How many entries a slice of an L2 table has.
    #[inline]
    pub(super) fn l2_slice_entries(&self) -> usize {
        self.cache.slice_len() >> self.geometry.l2_entry_bits()
    }

    /// The start of the cluster that `offset` is in.
    pub(super) fn cluster_start(&self, offset: u64) -> u64 {
        offset & !(self.geometry.cluster_size() - 1)
    }

    /// True if unallocated clusters may read as something else than zeroes.
    pub(super) fn has_backing(&self) -> bool {
        self.backing.borrow().is_some()
    }
}

/// The autoclear features that are kept up to date here.
pub(super) fn kept_autoclear(has_data_file: bool) -> u64 {
    if has_data_file { AUTOCLEAR_RAW_DATA } else { 0 }
}

fn check_writable(header: &Header, name: &str, alignment: u64) -> Result<()> {
    use super::header::{INCOMPAT_CORRUPT, INCOMPAT_DIRTY};
    if header.incompatible & INCOMPAT_CORRUPT != 0 {
        let text = format!(
            "{name}: the image is marked as corrupt, so it can't be written; repair a copy of it (qemu-img check -r all), or open it for \
             reading only"
        );
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    if header.incompatible & INCOMPAT_DIRTY != 0 {
        let text = format!(
            "{name}: the image was not closed by the program that last wrote it and its refcounts are out of date, so it can't be \
             written; repair it (qemu-img check -r all), or open it for reading only"
        );
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    if alignment > header.cluster_size() {
        let text = format!(
            "{name}: the file takes only writes of multiples of {alignment} bytes, but the image's clusters have {}; open it with \
             buffered I/O",
            header.cluster_size()
        );
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    Ok(())
}

/// The clusters of the header, the active tables, and what they point to; and those among them that hold two things. Invalid entries are
/// left to those that use them.
fn metadata_clusters(
    header: &Header,
    geometry: &Geometry,
    l1: &Table,
    refcount_table: &Table,
    end: u64,
) -> (ClusterSet, ClusterSet) {
    let bits = geometry.cluster_bits;
    let (mut set, mut overlaps) = (ClusterSet::default(), ClusterSet::default());
    let mut add = |cluster| {
        if !set.insert(cluster) {
            overlaps.insert(cluster);
        }
    };
    add(0);
    let l1_len = l1.len() as u64 * 8;
    let refcount_len = refcount_table.len() as u64 * 8;
    for (offset, len) in [(header.l1_table_offset, l1_len), (header.refcount_table_offset, refcount_len)] {
        (offset >> bits..(offset + len).div_ceil(geometry.cluster_size())).for_each(&mut add);
    }
    if header.nb_snapshots > 0 {
        add(header.snapshots_offset >> bits);
    }
    let tables = l1.entries().iter().filter_map(|entry| L1Entry(*entry).table(geometry).ok().flatten());
    let blocks = refcount_table
        .entries()
        .iter()
        .filter_map(|entry| RefcountTableEntry(*entry).block(geometry).ok().flatten());
    tables.chain(blocks).map(|offset| offset.0 >> bits).filter(|cluster| *cluster < end).for_each(add);
    (set, overlaps)
}
