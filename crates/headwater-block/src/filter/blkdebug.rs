//! blkdebug: faults, injected by rules, as QEMU's blkdebug does it, so that tests written for it work here.
//!
//! Layers above say what they are about to do ([`DebugEvent`]); `rules` says what becomes of the requests that follow. An error that was injected
//! names itself as such, and gives the number asked for ([`Error::os_code`]). A request that a rule makes fail doesn't reach the child.
//!
//! A node can also pretend to be stricter than its child: an alignment is raised in [`Node::limits`], and requests that are longer than
//! the limits come in pieces, each judged by itself.
//!
//! There are no breakpoints (QEMU's suspend and resume).

use super::child::{Child, as_the_child};
use super::let_others_go_first;
use crate::buffer::{Buffer, BufferMut};
use crate::debug_event::DebugEvent;
use crate::disk::Disk;
use crate::edge::Edge;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::node::{Limits, LocalFuture, Node, WriteFlags, ZeroFlags};
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

mod pieces;
mod rules;

use pieces::pieces;
use rules::Engine;
pub use rules::{InjectError, IoType, SetState};

/// The largest alignment that a node may ask for; see [`Limits::write_alignment`].
const MAX_ALIGN: u64 = 64 << 10;

/// The rules, and what the node pretends to need. Sizes are in bytes; 0 is what the child needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlkdebugOptions {
    /// Which requests fail.
    pub inject_error: Vec<InjectError>,
    /// When the state changes, which is 1 at first.
    pub set_state: Vec<SetState>,
    /// What requests must be multiples of; a power of two, up to 64 KiB.
    pub align: u64,
    /// The longest read or write.
    pub max_transfer: u64,
    /// What zero-writes must be multiples of, or else zeroes are written as data.
    pub opt_write_zero: u64,
    /// The longest zero-write.
    pub max_write_zero: u64,
    /// What discards should be multiples of: parts of it are pieces of their own.
    pub opt_discard: u64,
    /// The longest discard.
    pub max_discard: u64,
}

impl BlkdebugOptions {
    /// Refuses sizes that don't go together.
    fn check(&self) -> Result<()> {
        let refuse = |name: &str, value: u64, why: &str| {
            let message = format!("cannot meet constraints with {name} {value}: it must be {why}");
            Err(Error::new(ErrorKind::InvalidInput, message))
        };
        if self.align > MAX_ALIGN || (self.align > 0 && !self.align.is_power_of_two()) {
            return refuse("align", self.align, "a power of two, up to 65536");
        }
        let align = self.align.max(1);
        let of_zeroes = self.opt_write_zero.max(align);
        let of_discards = self.opt_discard.max(align);
        for (name, value, unit, why) in [
            ("max-transfer", self.max_transfer, align, "a multiple of align"),
            ("opt-write-zero", self.opt_write_zero, align, "a multiple of align"),
            ("max-write-zero", self.max_write_zero, of_zeroes, "a multiple of align and of opt-write-zero"),
            ("opt-discard", self.opt_discard, align, "a multiple of align"),
            ("max-discard", self.max_discard, of_discards, "a multiple of align and of opt-discard"),
        ] {
            if !value.is_multiple_of(unit) {
                return refuse(name, value, why);
            }
        }
        self.inject_error.iter().try_for_each(InjectError::check)
    }
}

/// Injects faults; see the module.
pub struct BlkdebugNode {
    child: Child,
    engine: RefCell<Engine>,
    options: BlkdebugOptions,
}

impl BlkdebugNode {
    /// Injects faults into what is asked of `child`.
    ///
    /// # Errors
    /// `InvalidInput` for sizes that don't go together, and for numbers that are no error's.
    pub fn new(child: Rc<Edge>, options: BlkdebugOptions) -> Result<Rc<Self>> {
        options.check()?;
        let engine = Engine::new(options.inject_error.clone(), options.set_state.clone());
        // It fits: 64 KiB at most.
        let child = Child::aligned(child, u32::try_from(options.align).unwrap_or(0));
        Ok(Rc::new(Self { child, engine: RefCell::new(engine), options }))
    }

    /// Fails a request if a rule says so.
    async fn judge(&self, range: Range<u64>, kind: IoType) -> Result<()> {
        let align = self.options.align.max(1);
        let start = range.start - range.start % align;
        let range = start..range.end.checked_next_multiple_of(align).unwrap_or(range.end);
        let Some(injected) = self.engine.borrow_mut().judge(&range, kind) else { return Ok(()) };
        if !injected.immediately {
            let_others_go_first().await;
        }
        let what = format!("{} bytes at {} of {}", range.end - range.start, range.start, self.name());
        let what = format!("{} {what} (a fault injected by blkdebug)", kind.name());
        Err(Error::from_io(std::io::Error::from_raw_os_error(injected.errno), what))
    }

    async fn read_pieces(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        let disk = self.child.enter().await;
        let mut done: Option<BufferMut> = None;
        for piece in pieces(range_of(offset, buf.len()), 1, self.options.max_transfer) {
            self.judge(piece.clone(), IoType::Read).await?;
            let rest = buf.split_off((piece.end - piece.start) as usize);
            let part = self.child.read_on(&disk, piece.start, buf).await?;
            buf = rest;
            done = Some(match done {
                Some(before) => before.join(part),
                None => part,
            });
        }
        Ok(done.unwrap_or(buf))
    }

    async fn write_piece(&self, disk: &Disk, offset: u64, data: Buffer, flags: WriteFlags) -> Result<()> {
        self.judge(range_of(offset, data.len()), IoType::Write).await?;
        self.child.write_on(disk, offset, data, flags).await
    }

    async fn zero_pieces(&self, disk: &Disk, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        let unit = self.options.opt_write_zero.max(self.options.align).max(1);
        for piece in pieces(range, unit, self.options.max_write_zero) {
            let len = piece.end - piece.start;
            if len >= unit {
                self.judge(piece.clone(), IoType::WriteZeroes).await?;
                self.child.write_zeroes_on(disk, piece.start, len, flags).await?;
            } else if flags.fast_only {
                let message =
                    format!("{}: {len} bytes at {} are less than opt-write-zero", self.name(), piece.start);
                return Err(Error::new(ErrorKind::Unsupported, message));
            } else {
                let data = Buffer::zeroed(len as usize);
                let flags = WriteFlags { fua: flags.fua, ..WriteFlags::default() };
                self.write_piece(disk, piece.start, data, flags).await?;
            }
        }
        Ok(())
    }

    async fn discard_pieces(&self, disk: &Disk, range: Range<u64>) -> Result<()> {
        let unit = self.options.opt_discard.max(self.options.align).max(1);
        for piece in pieces(range, unit, self.options.max_discard) {
            if piece.end - piece.start >= self.options.align {
                self.judge(piece.clone(), IoType::Discard).await?;
                self.child.discard_on(disk, piece.start, piece.end - piece.start).await?;
            }
        }
        Ok(())
    }

    async fn flush_all(&self) -> Result<()> {
        let disk = self.child.enter().await;
        self.judge(0..0, IoType::Flush).await?;
        disk.flush().await
    }

    fn event(&self, event: DebugEvent) {
        self.engine.borrow_mut().event(event);
    }
}

fn range_of(offset: u64, len: usize) -> Range<u64> {
    offset..offset.saturating_add(len as u64)
}

impl Node for BlkdebugNode {
    as_the_child!();

    fn driver(&self) -> &'static str {
        "blkdebug"
    }

    fn limits(&self) -> Limits {
        let child = self.child.disk().limits();
        let write_alignment = self.child.alignment();
        let max_transfer = match u32::try_from(self.options.max_transfer) {
            Ok(max) if max > 0 => child.max_transfer.min(max),
            _ => child.max_transfer,
        };
        Limits {
            write_alignment,
            preferred: child.preferred.max(write_alignment),
            allocation_unit: child.allocation_unit.max(write_alignment),
            max_transfer,
            ..child
        }
    }

    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(self.read_pieces(offset, buf))
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        Box::pin(async move {
            self.judge(range.clone(), IoType::BlockStatus).await?;
            self.child.status(range).await
        })
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let disk = self.child.enter().await;
            // As if the layer above had cut it: what is longer doesn't get here in QEMU.
            for piece in pieces(range_of(offset, data.len()), 1, self.options.max_transfer) {
                let part = data.slice((piece.start - offset) as usize..(piece.end - offset) as usize);
                self.event(DebugEvent::Pwritev);
                let result = self.write_piece(&disk, piece.start, part, flags).await;
                self.event(DebugEvent::PwritevDone);
                result?;
            }
            Ok(())
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let disk = self.child.enter().await;
            self.event(DebugEvent::PwritevZero);
            let result = self.zero_pieces(&disk, offset..offset.saturating_add(len), flags).await;
            self.event(DebugEvent::PwritevDone);
            result
        })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let disk = self.child.enter().await;
            self.discard_pieces(&disk, offset..offset.saturating_add(len)).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.flush_all())
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.child.resize(size))
    }

    /// Flushes without judging: what is given up is not under test.
    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.child.flush())
    }

    fn debug_event(&self, event: DebugEvent) {
        self.event(event);
    }

    fn hears_debug_events(&self) -> bool {
        true
    }
}
