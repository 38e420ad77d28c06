//! A qcow2 image as a node of the block layer.

use super::header::Header;
use super::image::Image;
use super::snapshots::{self, NewSnapshot, SnapshotInfo};
use headwater_block::drain::Hurry;
use headwater_block::node::{Access, BackingLink, Change};
use headwater_block::workers::ON_THE_SPOT;
use headwater_block::{
    Buffer, BufferMut, DebugEvent, Error, ErrorKind, Extent, Limits, LocalFuture, Node, Resolved, Result,
    Workers, WriteFlags, ZeroFlags,
};
use std::ops::Range;
use std::rc::Rc;

/// How an image is to be opened.
#[derive(Debug, Clone, Copy)]
pub struct Qcow2Options {
    /// Refuse all changes. Images that are marked as dirty or corrupt can only be opened so.
    pub read_only: bool,
    /// About how many bytes of memory L2 tables and refcount blocks may take. The L1 and refcount tables come on top.
    pub cache_size: u64,
    /// Who compresses clusters.
    pub workers: &'static (dyn Workers + Sync),
}

impl Qcow2Options {
    /// The default of `cache_size`: the tables of 256 GiB with clusters of 64 KiB.
    pub const DEFAULT_CACHE_SIZE: u64 = 32 << 20;
}

impl Default for Qcow2Options {
    fn default() -> Self {
        Self { read_only: false, cache_size: Self::DEFAULT_CACHE_SIZE, workers: ON_THE_SPOT }
    }
}

/// The nodes that an image needs besides its own file. What it needs is in its header.
#[derive(Default)]
pub struct Children {
    /// The external data file, if [`Header::has_data_file`].
    pub data_file: Option<Rc<dyn Node>>,
    /// The backing, if the header names one. Without it, what this image lacks reads as zeroes: that is for the operator to decide.
    pub backing: Option<Rc<dyn Node>>,
}

/// A qcow2 image.
///
/// Opened in two steps, so that the opener can find and check the files that the header names: [`Header::read`], then
/// [`Qcow2Node::open`]. [`Node::close`] closes the image's file and external data file; the backing belongs to whoever opened it.
pub struct Qcow2Node {
    image: Rc<Image>,
}

impl Qcow2Node {
    /// Opens the image in `file`. Reads its header and the tables that stay in memory.
    pub async fn open(file: Rc<dyn Node>, children: Children, options: Qcow2Options) -> Result<Rc<Self>> {
        let (header, cluster) = Header::read_with_cluster(&*file).await?;
        let options = Qcow2Options { read_only: options.read_only || file.is_read_only(), ..options };
        let image = Image::open(file, header, cluster, children, &options).await?;
        Ok(Rc::new(Self { image }))
    }

    /// The header as it is on the disk.
    pub fn header(&self) -> Header {
        self.image.header.borrow().header.clone()
    }

    /// The cluster size in bytes.
    pub fn cluster_size(&self) -> u64 {
        self.image.geometry.cluster_size()
    }

    /// The external data file.
    pub fn data_file(&self) -> Option<Rc<dyn Node>> {
        self.image.data_file.clone()
    }

    /// The internal snapshots.
    ///
    /// # Errors
    /// `Corrupt`, and those of the file.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        snapshots::list(&*self.image.file, &self.header()).await
    }

    /// Takes an internal snapshot of what the disk holds now. Nothing else may be under way, and it must be driven to its end: see
    /// [`headwater_block::Disk::alone`].
    ///
    /// # Errors
    /// `AlreadyExists` if there is one of that name; `InvalidInput` and `Unsupported` if the image can't have it; and those of the file: then
    /// clusters may leak, and the snapshot is there only if [`Qcow2Node::snapshots`] says so.
    pub async fn take_snapshot(&self, new: &NewSnapshot) -> Result<SnapshotInfo> {
        self.image.take_snapshot(new).await
    }

    /// Deletes the internal snapshot with this identifier. Nothing else may be under way, and it must be driven to its end.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt` if its tables can't be followed; and those of the file: then clusters may leak.
    pub async fn delete_snapshot(&self, id: &str) -> Result<SnapshotInfo> {
        self.image.delete_snapshot(id).await
    }

    async fn fua(&self, fua: bool) -> Result<()> {
        if fua { self.image.commit().await } else { Ok(()) }
    }

    /// Writes everything that is only in memory, refcounts included: what [`Node::close`] does before it closes the files, for those whose
    /// files are somebody else's.
    ///
    /// # Errors
    /// Those of the storage.
    pub async fn finish(&self) -> Result<()> {
        if self.image.read_only {
            return Ok(());
        }
        // What one cycle frees, the next one writes.
        self.image.commit().await?;
        for _ in 0..4 {
            if !self.image.is_dirty() {
                return Ok(());
            }
            self.image.commit().await?;
        }
        if !self.image.is_dirty() {
            return Ok(());
        }
        let text = format!(
            "{}: some refcounts could not be written; clusters leak until the image is repaired (qemu-img check -r leaks)",
            self.image.name
        );
        Err(Error::new(ErrorKind::Io, text))
    }
}

impl Node for Qcow2Node {
    fn name(&self) -> &str {
        &self.image.name
    }

    fn driver(&self) -> &'static str {
        "qcow2"
    }

    fn size(&self) -> u64 {
        self.image.size.get()
    }

    fn limits(&self) -> Limits {
        let file = self.image.data_node().limits();
        let unit = 1u32 << self.image.geometry.unit_bits();
        let write_alignment = self.image.write_alignment();
        Limits {
            write_alignment,
            preferred: unit.max(file.preferred),
            allocation_unit: unit.max(write_alignment),
            max_transfer: file.max_transfer.min(Limits::default().max_transfer),
            depth: file.depth,
            remote: file.remote,
        }
    }

    fn is_read_only(&self) -> bool {
        self.image.read_only || self.image.failed.borrow().is_some()
    }

    fn resolve(&self, range: Range<u64>) -> Resolved {
        self.image.resolve(range)
    }

    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(self.image.read(offset, buf))
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        Box::pin(self.image.status(range))
    }

    fn access(&self, range: Range<u64>, change: Change) -> Access {
        self.image.access(range, change)
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            if flags.compressed && self.compressed_unit().is_some() {
                self.image.write_compressed(offset, data).await?;
            } else {
                self.image.write(offset, data).await?;
            }
            self.fua(flags.fua).await
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.image.write_zeroes(offset, len, flags).await?;
            self.fua(flags.fua).await
        })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.image.discard(offset, len))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.image.events.tell(DebugEvent::FlushToOs);
            if self.image.read_only { Ok(()) } else { self.image.commit().await }
        })
    }

    fn is_settled(&self, range: Range<u64>) -> bool {
        self.image.is_settled(range)
    }

    fn settle(&self, range: Range<u64>) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.image.settle_entries(range))
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.image.resize(size))
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let mut result = self.finish().await;
            for node in [Some(&self.image.file), self.image.data_file.as_ref()].into_iter().flatten() {
                result = result.and(node.close().await);
            }
            result
        })
    }

    fn backing(&self) -> Option<Rc<dyn Node>> {
        self.image.backing.borrow().clone()
    }

    fn compressed_unit(&self) -> Option<u32> {
        // Clusters in an external data file are where the disk has them.
        self.image.data_file.is_none().then_some(1 << self.image.geometry.cluster_bits)
    }

    fn expect(&self, range: Range<u64>) {
        // Most images have their tables and data in the disk's order, from the file's beginning on. Further up nobody knows where without their tables.
        self.image.file.expect(if range.start == 0 { range } else { 0..0 });
    }

    fn file(&self) -> Option<Rc<dyn Node>> {
        Some(self.image.file.clone())
    }

    fn set_backing(&self, node: Option<Rc<dyn Node>>) -> Result<()> {
        *self.image.backing.borrow_mut() = node;
        Ok(())
    }

    fn hurry(&self, held: &mut Vec<Hurry>) {
        let backing = self.backing();
        for child in
            [Some(&self.image.file), self.image.data_file.as_ref(), backing.as_ref()].into_iter().flatten()
        {
            child.hurry(held);
        }
    }

    fn change_backing<'a>(
        &'a self,
        new: Option<BackingLink<'a>>,
        node: Option<Rc<dyn Node>>,
    ) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.image.change_backing(new, node))
    }
}
