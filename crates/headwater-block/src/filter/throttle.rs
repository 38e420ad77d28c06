//! Throttling: a node whose requests are held to the limits of a group, as QEMU's throttle filter and its throttle groups do.
//!
//! A request waits here, before it reaches the child: so the child can be drained, and used by others, meanwhile. Reads count as reads; writes,
//! zero-writes and discards as writes. Requests without bytes, flushes and look-ups of status pass.
//!
//! **Drain.** A drain of anything above (a disk, an edge) would wait for the requests that wait here, for as long as the limit says: while it does,
//! they pass at once ([`Node::hurry`]). They count, so that draining again and again is no way around a limit. QEMU does the same.
//!
//! **Pauses.** A member that has nothing to do takes no turn, and doesn't save up anything for itself: what the group saves up is for all.

use super::child::{Child, as_the_child};
use crate::buffer::{Buffer, BufferMut};
use crate::drain::Hurry;
use crate::edge::Edge;
use crate::error::Result;
use crate::extent::Extent;
use crate::node::{Limits, LocalFuture, Node, WriteFlags, ZeroFlags};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

mod group;
mod limits;

use group::Direction;
pub use group::ThrottleGroup;
pub use limits::{Directions, Limit, ThrottleLimits};

/// A member of a throttle group; see the module.
pub struct ThrottleNode {
    child: Child,
    membership: RefCell<Membership>,
    /// How many wait for all requests to be over.
    in_hurry: Rc<Cell<u32>>,
}

#[derive(Clone)]
struct Membership {
    group: Rc<ThrottleGroup>,
    id: u64,
}

impl Membership {
    fn of(group: Rc<ThrottleGroup>) -> Self {
        let id = group.join();
        Self { group, id }
    }
}

/// Why a request waits no longer, other than that its turn has come.
enum Excuse {
    Hurry,
    /// The node is in another group now.
    Moved,
}

impl ThrottleNode {
    /// Holds requests to `child` to the limits of `group`.
    pub fn new(child: Rc<Edge>, group: Rc<ThrottleGroup>) -> Rc<Self> {
        Rc::new(Self {
            child: Child::new(child),
            membership: RefCell::new(Membership::of(group)),
            in_hurry: Rc::default(),
        })
    }

    /// The group it is in.
    pub fn group(&self) -> Rc<ThrottleGroup> {
        self.membership.borrow().group.clone()
    }

    /// Puts it into another group. Requests that wait go on waiting there.
    pub fn set_group(&self, group: Rc<ThrottleGroup>) {
        let old = self.membership.replace(Membership::of(group));
        old.group.leave(old.id);
    }

    async fn pass(&self, direction: Direction, len: u64) {
        if len == 0 {
            return;
        }
        loop {
            let Membership { group, id } = self.membership.borrow().clone();
            let excused = || {
                if self.membership.borrow().id != id || !Rc::ptr_eq(&self.membership.borrow().group, &group) {
                    return Some((Excuse::Moved, false));
                }
                (self.in_hurry.get() > 0).then_some((Excuse::Hurry, true))
            };
            match group.pass(id, direction, len, excused).await {
                None | Some(Excuse::Hurry) => return,
                Some(Excuse::Moved) => {}
            }
        }
    }
}

impl Drop for ThrottleNode {
    fn drop(&mut self) {
        let Membership { group, id } = self.membership.get_mut();
        group.leave(*id);
    }
}

impl Node for ThrottleNode {
    as_the_child!();

    fn driver(&self) -> &'static str {
        "throttle"
    }

    fn limits(&self) -> Limits {
        self.child.limits()
    }

    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(async move {
            self.pass(Direction::Read, buf.len() as u64).await;
            self.child.read(offset, buf).await
        })
    }

    fn status(&self, range: Range<u64>) -> LocalFuture<'_, Result<Extent>> {
        Box::pin(self.child.status(range))
    }

    fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.pass(Direction::Write, data.len() as u64).await;
            self.child.write(offset, data, flags).await
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.pass(Direction::Write, len).await;
            self.child.write_zeroes(offset, len, flags).await
        })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.pass(Direction::Write, len).await;
            self.child.discard(offset, len).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.child.flush())
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.child.resize(size))
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.child.flush())
    }

    fn hurry(&self, held: &mut Vec<Hurry>) {
        held.push(Hurry::new(&self.in_hurry));
        let Membership { group, id } = self.membership.borrow().clone();
        group.wake_member(id);
        self.child.top().hurry(held);
    }
}
