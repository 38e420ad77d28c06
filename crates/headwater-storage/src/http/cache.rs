//! A small cache of blocks for reads that are smaller than a round trip is worth: an image's header and tables behind HTTP.

use headwater_block::Buffer;
use std::collections::VecDeque;

/// The size of a block in bytes.
pub(crate) const BLOCK: u64 = 64 << 10;

/// How many blocks are kept: 4 MiB.
const BLOCKS: usize = 64;

/// The blocks that were read last.
#[derive(Default)]
pub(super) struct BlockCache {
    /// Number of a block and its bytes (fewer than [`BLOCK`] at the end of the object); the one used last at the end.
    blocks: VecDeque<(u64, Buffer)>,
}

impl BlockCache {
    /// The block of that number.
    pub(super) fn get(&mut self, number: u64) -> Option<Buffer> {
        let at = self.blocks.iter().position(|(other, _)| *other == number)?;
        let found = self.blocks.remove(at)?;
        let bytes = found.1.clone();
        self.blocks.push_back(found);
        Some(bytes)
    }

    /// Keeps a block, in place of the one that was not used for longest.
    pub(super) fn insert(&mut self, number: u64, bytes: Buffer) {
        self.blocks.retain(|(other, _)| *other != number);
        if self.blocks.len() >= BLOCKS {
            self.blocks.pop_front();
        }
        self.blocks.push_back((number, bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_that_was_not_used_for_longest_goes() {
        let mut cache = BlockCache::default();
        for number in 0..BLOCKS as u64 {
            cache.insert(number, Buffer::copy_of(&[number as u8]));
        }
        assert_eq!(cache.get(0).as_deref(), Some(&[0][..]));
        cache.insert(1000, Buffer::copy_of(b"x"));
        assert!(cache.get(1).is_none());
        assert!(cache.get(0).is_some() && cache.get(2).is_some() && cache.get(1000).is_some());
        cache.insert(2, Buffer::copy_of(b"y"));
        assert_eq!(cache.get(2).as_deref(), Some(&b"y"[..]));
        assert_eq!(cache.blocks.len(), BLOCKS);
    }
}
