//! What a guest's driver is offered: features, and the configuration space with the disk's shape.

use headwater_block::{Disk, Error, ErrorKind, Result};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Most queues of an export: the protocol numbers those with descriptors in eight bits.
pub const MAX_QUEUES: u16 = 256;

/// The unit of everything that requests and the configuration say, in bytes.
pub(crate) const SECTOR: u64 = 512;

/// Most segments of data in a request: what fits into the shortest queue that QEMU makes (128), less header and outcome.
const MAX_SEGMENTS: u32 = 126;

/// Most ranges in one request to discard or zero.
pub(crate) const MAX_RANGES: u32 = 32;

/// Longest such range, in sectors: 2 GiB.
pub(crate) const MAX_RANGE_SECTORS: u32 = 4 << 20;

/// Where in the configuration the driver chooses the cache mode.
const WCE: usize = 32;

/// The length in bytes of the part of the configuration that we fill; what lies behind is zero.
const LENGTH: usize = 60;

/// A size in bytes of the blocks that guests are told of: a power of two from 512 to 2097152.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogicalBlock(u32);

impl Default for LogicalBlock {
    fn default() -> Self {
        Self(512)
    }
}

impl LogicalBlock {
    /// Blocks of that many bytes.
    ///
    /// # Errors
    /// `InvalidInput` if it isn't a power of two from 512 to 2097152.
    pub fn new(bytes: u64) -> Result<Self> {
        if bytes.is_power_of_two() && (512..=2 << 20).contains(&bytes) {
            return Ok(Self(bytes as u32));
        }
        let message =
            format!("a logical block of {bytes} bytes: it must be a power of two from 512 to 2097152");
        Err(Error::new(ErrorKind::InvalidInput, message))
    }

    pub(crate) fn bytes(self) -> u32 {
        self.0
    }
}

/// How a guest sees the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlkOptions {
    /// Whether guests may change it. A disk that is read-only itself is never changed.
    pub writable: bool,
    /// Every change is durable before the guest hears of it, whatever its driver could do.
    pub writethrough: bool,
    /// How many queues there are, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// The unit of requests.
    pub logical_block: LogicalBlock,
}

impl Default for BlkOptions {
    fn default() -> Self {
        Self { writable: false, writethrough: false, queues: 1, logical_block: LogicalBlock::default() }
    }
}

impl BlkOptions {
    /// The features that the guest's driver may choose from.
    pub(crate) fn features(&self, disk: &Disk) -> u64 {
        let mut bits = vec![
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ];
        if self.takes_changes(disk) {
            bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        } else {
            bits.push(VIRTIO_BLK_F_RO);
        }
        if !self.writethrough {
            bits.push(VIRTIO_BLK_F_CONFIG_WCE);
        }
        let own = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        bits.into_iter().fold(own, |all, bit| all | 1 << bit)
    }

    /// What the two sides of the socket may agree on. The `vhost` crate adds the one that is its own business.
    pub(crate) fn protocol_features() -> VhostUserProtocolFeatures {
        use VhostUserProtocolFeatures as F;
        F::MQ | F::CONFIG | F::BACKEND_REQ | F::INFLIGHT_SHMFD | F::CONFIGURE_MEM_SLOTS | F::RESET_DEVICE
    }

    /// Whether guests may change the disk as it is now.
    pub(crate) fn takes_changes(&self, disk: &Disk) -> bool {
        self.writable && !disk.is_read_only()
    }

    /// The configuration space as it is now, from its start.
    pub(crate) fn space(&self, disk: &Disk, wce: bool) -> [u8; LENGTH] {
        let limits = disk.limits();
        let block = self.logical_block.bytes();
        let physical = limits.write_alignment.max(block);
        let preferred = limits.preferred.max(physical);
        let mut space = Writer([0; LENGTH]);
        space.put(0, (disk.size() / SECTOR).to_le_bytes());
        space.put(12, MAX_SEGMENTS.to_le_bytes());
        space.put(20, block.to_le_bytes());
        space.put(24, [(physical / block).trailing_zeros() as u8]);
        space.put(26, u16::try_from(physical / block).unwrap_or(1).to_le_bytes());
        space.put(28, (preferred / block).to_le_bytes());
        space.put(WCE, [wce.into()]);
        space.put(34, self.queues.to_le_bytes());
        space.put(36, MAX_RANGE_SECTORS.to_le_bytes());
        space.put(40, MAX_RANGES.to_le_bytes());
        space.put(44, (preferred / SECTOR as u32).to_le_bytes());
        space.put(48, MAX_RANGE_SECTORS.to_le_bytes());
        space.put(52, MAX_RANGES.to_le_bytes());
        space.put(56, [1]);
        space.0
    }

    /// Whether every change must be durable before the driver, which chose `features`, hears of it.
    ///
    /// A driver that can choose has chosen with `wce`. One that can't but flushes knows what it does. One that knows neither takes what is
    /// answered for durable.
    pub(crate) fn writes_through(&self, features: u64, wce: bool) -> bool {
        if self.writethrough {
            true
        } else if features & 1 << VIRTIO_BLK_F_CONFIG_WCE != 0 {
            !wce
        } else {
            features & 1 << VIRTIO_BLK_F_FLUSH == 0
        }
    }
}

/// What a driver writes into the configuration: the only thing that it may write is the cache mode. `None` if it is something else.
pub(crate) fn chosen_wce(offset: u32, bytes: &[u8]) -> Option<bool> {
    match (offset as usize, bytes) {
        (WCE, [wce @ (0 | 1)]) => Some(*wce == 1),
        _ => None,
    }
}

struct Writer([u8; LENGTH]);

impl Writer {
    fn put<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
        self.0[at..at + N].copy_from_slice(&bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
    const CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;

    #[test]
    fn a_driver_that_cannot_flush_gets_its_writes_through() {
        let options = BlkOptions::default();
        assert!(options.writes_through(0, true));
        assert!(!options.writes_through(FLUSH, true));
        assert!(!options.writes_through(FLUSH, false), "it can't say so without the feature");
        assert!(!options.writes_through(FLUSH | CONFIG_WCE, true));
        assert!(options.writes_through(FLUSH | CONFIG_WCE, false));
        let options = BlkOptions { writethrough: true, ..options };
        assert!(options.writes_through(FLUSH | CONFIG_WCE, true));
    }

    #[test]
    fn only_the_cache_mode_can_be_written() {
        assert_eq!(chosen_wce(32, &[0]), Some(false));
        assert_eq!(chosen_wce(32, &[1]), Some(true));
        for (offset, bytes) in [(32, &[2][..]), (32, &[1, 0]), (31, &[1]), (0, &[0; 8]), (32, &[])] {
            assert_eq!(chosen_wce(offset, bytes), None);
        }
    }

    #[test]
    fn logical_blocks_are_powers_of_two() {
        assert!([512, 4096, 2 << 20].into_iter().all(|bytes| LogicalBlock::new(bytes).is_ok()));
        assert!([0, 1, 256, 513, 4 << 20].into_iter().all(|bytes| LogicalBlock::new(bytes).is_err()));
    }
}
