//! What [`HttpNode`](super::HttpNode) is over: an object that was pinned when it was opened, and gives ranges of its bytes.

use headwater_block::{BufferMut, LocalFuture, Result};

/// An object that can be read in parts and is pinned.
pub(crate) trait RangeSource {
    /// Its size in bytes.
    fn size(&self) -> u64;

    /// What changes when its contents do, beside the size: names for people, and values.
    fn marks(&self) -> Vec<(&'static str, String)>;

    /// Fails once the object was seen to have changed, or was closed.
    fn check(&self) -> Result<()>;

    /// Fills `buf` from `offset`; all of it must lie within the object. Tries again as long as it was told to.
    fn fetch(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>>;

    /// Makes connections ready for requests to come, in the background; if none can be made, the requests will tell.
    fn connect_ahead(&self) {}

    /// Refuses everything from now on.
    fn close(&self);
}
