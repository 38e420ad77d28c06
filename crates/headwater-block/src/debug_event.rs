//! What layers tell the one that injects faults ([`crate::filter::blkdebug`]): the names and meanings of QEMU's blkdebug events, so that
//! rules written for QEMU hit the same places here.
//!
//! An event means "I am about to do this": the request that follows is the one that a rule fails. Some events have no place here, because
//! the code that they stand for does not exist (VM state); rules with them are accepted and never match.

use crate::error::{Error, ErrorKind};
use std::str::FromStr;

macro_rules! events {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// A place in a layer's code; see the module.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum DebugEvent {
            $($(#[$doc])* $variant,)*
        }

        impl DebugEvent {
            /// All of them.
            pub const ALL: &[DebugEvent] = &[$(DebugEvent::$variant,)*];

            /// The name, as options give it.
            pub fn name(self) -> &'static str {
                match self {
                    $(DebugEvent::$variant => $name,)*
                }
            }
        }
    };
}

events! {
    /// Entries of the L1 table are written.
    L1Update = "l1_update",
    /// Clusters for a larger L1 table are allocated.
    L1GrowAllocTable = "l1_grow_alloc_table",
    /// The larger L1 table is written.
    L1GrowWriteTable = "l1_grow_write_table",
    /// The header is pointed to it.
    L1GrowActivateTable = "l1_grow_activate_table",
    /// A part of an L2 table is read.
    L2Load = "l2_load",
    /// A part of an L2 table is written.
    L2Update = "l2_update",
    /// An L2 entry of a compressed cluster is written.
    L2UpdateCompressed = "l2_update_compressed",
    /// An L2 table that a snapshot shares is read, to be copied.
    L2AllocCowRead = "l2_alloc_cow_read",
    /// A new L2 table is written.
    L2AllocWrite = "l2_alloc_write",
    /// A guest's data are read from the image.
    ReadAio = "read_aio",
    /// A guest's data are read from the backing.
    ReadBackingAio = "read_backing_aio",
    /// A compressed cluster is read.
    ReadCompressed = "read_compressed",
    /// A guest's data are written.
    WriteAio = "write_aio",
    /// A compressed cluster is written.
    WriteCompressed = "write_compressed",
    /// VM state is read.
    VmstateLoad = "vmstate_load",
    /// VM state is written.
    VmstateSave = "vmstate_save",
    /// What lies beside a guest's data is read, for a cluster that is written whole.
    CowRead = "cow_read",
    /// It is written.
    CowWrite = "cow_write",
    /// The refcount table is read.
    ReftableLoad = "reftable_load",
    /// A larger refcount table is made.
    ReftableGrow = "reftable_grow",
    /// Entries of the refcount table are written.
    ReftableUpdate = "reftable_update",
    /// A part of a refcount block is read.
    RefblockLoad = "refblock_load",
    /// A refcount block is written.
    RefblockUpdate = "refblock_update",
    /// A part of a refcount block is written.
    RefblockUpdatePart = "refblock_update_part",
    /// A refcount block is made.
    RefblockAlloc = "refblock_alloc",
    /// The refcount table's entry for a new block is written.
    RefblockAllocHookup = "refblock_alloc_hookup",
    /// A new refcount block is written.
    RefblockAllocWrite = "refblock_alloc_write",
    /// The blocks of a larger refcount table are written.
    RefblockAllocWriteBlocks = "refblock_alloc_write_blocks",
    /// The larger refcount table is written.
    RefblockAllocWriteTable = "refblock_alloc_write_table",
    /// The header is pointed to it.
    RefblockAllocSwitchTable = "refblock_alloc_switch_table",
    /// Clusters are allocated.
    ClusterAlloc = "cluster_alloc",
    /// A part of a cluster is allocated, for compressed data.
    ClusterAllocBytes = "cluster_alloc_bytes",
    /// Clusters are freed.
    ClusterFree = "cluster_free",
    /// What a layer holds in memory is written out for a flush.
    FlushToOs = "flush_to_os",
    /// What was written is made durable.
    FlushToDisk = "flush_to_disk",
    /// A write that isn't aligned: its first block is read.
    PwritevRmwHead = "pwritev_rmw_head",
    /// It has been read.
    PwritevRmwAfterHead = "pwritev_rmw_after_head",
    /// A write that isn't aligned: its last block is read.
    PwritevRmwTail = "pwritev_rmw_tail",
    /// It has been read.
    PwritevRmwAfterTail = "pwritev_rmw_after_tail",
    /// A write, aligned by now.
    Pwritev = "pwritev",
    /// A write of zeroes, aligned by now.
    PwritevZero = "pwritev_zero",
    /// A write, of data or zeroes, is over.
    PwritevDone = "pwritev_done",
    /// An image is emptied.
    EmptyImagePrepare = "empty_image_prepare",
    /// A smaller L1 table is written.
    L1ShrinkWriteTable = "l1_shrink_write_table",
    /// The L2 tables beyond its end are freed.
    L1ShrinkFreeL2Clusters = "l1_shrink_free_l2_clusters",
    /// What copy-on-read fetched is written.
    CorWrite = "cor_write",
    /// New clusters are zeroed, where a guest's data don't cover them.
    ClusterAllocSpace = "cluster_alloc_space",
    /// Happens once, when the node that injects faults is made.
    None = "none",
}

impl FromStr for DebugEvent {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let found = Self::ALL.iter().find(|event| event.name() == name);
        found.copied().ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidInput,
                format!("{name:?} is no event of blkdebug; see QEMU's BlkdebugEvent for the names"),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_events() {
        for event in DebugEvent::ALL {
            assert_eq!(event.name().parse::<DebugEvent>().unwrap(), *event);
        }
        assert_eq!("l2_alloc.write".parse::<DebugEvent>().unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
