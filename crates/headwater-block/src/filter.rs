//! Filters: nodes that have the contents of another one, pass requests through to it, and add one behaviour.
//!
//! - [`throttle`]: limits of rates, shared by the members of a group.
//! - [`copy_on_read`]: what is read from a backing is kept.
//! - [`compress`]: what is written is kept compressed.
//! - [`copy_before_write`]: what was there at one moment is saved before it is changed. [`snapshot_access`] shows that.
//! - [`blkdebug`]: faults, injected by rules.
//! - [`blkverify`]: two images of one content, compared at every read.
//! - [`replicas`]: several sources of one image, of which the one is read that will be done first.
//! - [`verify`]: nothing passes but what a manifest promises.
//!
//! # Rules
//! - A filter reaches its child through an [`Edge`](crate::Edge) to the child's disk, never around it: so its requests meet the same locks as those of
//!   jobs and of other users of the child, and the graph can put another child in its place.
//! - Its [`resolve`](crate::Node::resolve) says `Ask`, because it must see the requests, and because what memory says of the child is true only under the
//!   child's lock. Its [`access`](crate::Node::access) is `Shared`: the child's disk locks for itself.
//! - **Jobs run on the disk below the filters**, whose locks all users share. A copy-up on the filter's own disk would make its second look
//!   under a lock that users of the child don't take.
//! - Closing a filter flushes, and no more: the child belongs to whoever made its disk.

pub mod blkdebug;
pub mod blkverify;
mod child;
pub mod compress;
pub mod copy_before_write;
pub mod copy_on_read;
pub mod replicas;
pub mod snapshot_access;
pub mod throttle;
pub mod verify;

use std::future::poll_fn;
use std::task::Poll;

pub use blkdebug::BlkdebugNode;
pub use blkverify::BlkverifyNode;
pub use compress::CompressNode;
pub use copy_before_write::CopyBeforeWriteNode;
pub use copy_on_read::CopyOnReadNode;
pub use replicas::ReplicasNode;
pub use snapshot_access::SnapshotAccessNode;
pub use throttle::{ThrottleGroup, ThrottleNode};
pub use verify::VerifyNode;

/// Gives way once to whatever else this thread has to do: completes when it is polled for the second time.
async fn let_others_go_first() {
    let mut first = true;
    poll_fn(|cx| {
        if !std::mem::take(&mut first) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
