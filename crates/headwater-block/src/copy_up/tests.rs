//! Tests of copy-up against drains, polled by hand. Its other races are tested by the simulations.

use super::*;
use crate::clock::{Clock, TokioClock};
use crate::disk::DiskOptions;
use crate::extent::{Extent, Resolved};
use crate::memory::MemoryNode;
use crate::node::{Access, Change, Limits, LocalFuture};
use futures_util::FutureExt;
use std::cell::{Cell, RefCell};
use tokio::sync::oneshot;

const SIZE: usize = 4096;

/// One unit that the top lacks until it is written, over a backing whose reads wait to be let go.
struct Overlay {
    file: Rc<MemoryNode>,
    allocated: Cell<bool>,
    backing: Rc<dyn Node>,
}

/// What is under it: each read waits for its turn.
struct Slow {
    file: Rc<MemoryNode>,
    turns: RefCell<Vec<oneshot::Receiver<()>>>,
}

/// Implements [`Node`] by passing on to `file`, but for what the caller gives.
macro_rules! node {
    ($type:ty { $($own:item)* }) => {
        impl Node for $type {
            $($own)*
            fn name(&self) -> &str { self.file.name() }
            fn driver(&self) -> &'static str { "test" }
            fn size(&self) -> u64 { self.file.size() }
            fn limits(&self) -> Limits { self.file.limits() }
            fn is_read_only(&self) -> bool { false }
            fn resolve(&self, _range: Range<u64>) -> Resolved { Resolved::Ask }
            fn access(&self, range: Range<u64>, _change: Change) -> Access { Access::Exclusive(range) }
            fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
                self.file.write_zeroes(offset, len, flags)
            }
            fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> { self.file.discard(offset, len) }
            fn flush(&self) -> LocalFuture<'_, Result<()>> { self.file.flush() }
            fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> { self.file.resize(size) }
            fn close(&self) -> LocalFuture<'_, Result<()>> { self.file.close() }
        }
    };
}

node!(Overlay {
    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        if self.allocated.get() { self.file.read(offset, buf) } else { self.backing.read(offset, buf) }
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        let kind = if self.allocated.get() { ExtentKind::Data } else { ExtentKind::Unallocated };
        Box::pin(std::future::ready(Ok(Extent::new(range.start, range.end - range.start, kind))))
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        self.allocated.set(true);
        self.file.write(offset, data, flags)
    }

    fn backing(&self) -> Option<Rc<dyn Node>> {
        Some(self.backing.clone())
    }
});

node!(Slow {
    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        let turn = self.turns.borrow_mut().pop();
        Box::pin(async move {
            if let Some(turn) = turn {
                let _ = turn.await;
            }
            self.file.read(offset, buf).await
        })
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        self.file.status(range)
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        self.file.write(offset, data, flags)
    }
});

#[test]
fn a_copy_up_that_meets_a_drain_lets_the_reads_past_that_the_drain_waits_for() {
    // race-test: copy-up-meets-drain
    let (go, turn) = oneshot::channel();
    let backing =
        Rc::new(Slow { file: MemoryNode::new("backing", vec![7; SIZE]), turns: RefCell::new(vec![turn]) });
    let file = MemoryNode::new("overlay", vec![0; SIZE]);
    let overlay = Rc::new(Overlay { file, allocated: Cell::new(false), backing });
    let clock: Rc<dyn Clock> = Rc::new(TokioClock::new());
    let disk =
        Disk::new(overlay.clone(), clock, DiskOptions { copy_on_read: true, ..DiskOptions::default() });

    let options = CopyUpOptions::default();
    let mut copy_up = Box::pin(disk.copy_up(0..SIZE as u64, &options));
    assert!(copy_up.as_mut().now_or_never().is_none(), "the source is slow");
    let mut read = Box::pin(disk.read(0, SIZE as u64));
    assert!(read.as_mut().now_or_never().is_none(), "it waits for the fetch that is under way");
    let mut drain = Box::pin(disk.drain());
    assert!(drain.as_mut().now_or_never().is_none(), "it waits for the read");

    go.send(()).expect("the source still waits");
    assert!(copy_up.as_mut().now_or_never().is_none(), "the gate is closed");
    let data = read.now_or_never().expect("the read gets past the copy-up").expect("reads");
    assert!(data.iter().all(|byte| *byte == 7));
    let drained = drain.now_or_never().expect("nobody is inside");
    drop(drained);
    let copied = copy_up.now_or_never().expect("the gate is open").expect("copies up");
    assert_eq!(copied.skipped, SIZE as u64, "the read stored it first");
    assert!(overlay.file.contents().iter().all(|byte| *byte == 7));
}
