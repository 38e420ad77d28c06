//! Reading and patching the image's file while nobody else uses it.

use headwater_block::{BufferMut, Node, Result, WriteFlags};
use std::rc::Rc;

/// The file of the image that is checked.
pub(super) struct Medium {
    file: Rc<dyn Node>,
}

impl Medium {
    pub(super) fn new(file: Rc<dyn Node>) -> Self {
        Self { file }
    }

    pub(super) fn file(&self) -> &dyn Node {
        &*self.file
    }

    /// Its size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.file.size()
    }

    /// Reads `len` bytes; those past the end are zero.
    pub(super) async fn read(&self, offset: u64, len: u64) -> Result<BufferMut> {
        // Callers read at most one cluster or one piece at a time, so that this fits everywhere.
        self.file.read(offset, BufferMut::new(len as usize)).await
    }

    /// Overwrites `bytes`, whatever the alignment that the file needs.
    pub(super) async fn patch(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let unit = u64::from(self.file.limits().write_alignment);
        let start = offset - offset % unit;
        let end = (offset + bytes.len() as u64).next_multiple_of(unit);
        let mut block = self.read(start, end - start).await?;
        block[(offset - start) as usize..][..bytes.len()].copy_from_slice(bytes);
        self.file.write(start, block.freeze(), WriteFlags::default()).await
    }

    /// Makes all patches durable.
    pub(super) async fn flush(&self) -> Result<()> {
        self.file.flush().await
    }
}
