//! An edge: how something that uses a disk holds it, such that the graph can put another disk in its place.
//!
//! Exports and filters reach the disk below through an edge. Every request enters it, gets the disk of the moment, and holds the edge until it is
//! over. To exchange the disk, the edge is drained first: so no request that was meant for the new disk goes to the old one, and none
//! that the old one still carries out is overtaken.

use crate::disk::{CopyOnRead, Disk};
use crate::drain::{Drained, Gate, Pass};
use crate::node::Node;
use std::cell::RefCell;
use std::ops::Deref;
use std::rc::Rc;

/// A reference to a disk that can be exchanged while it is in use; see the module.
pub struct Edge {
    gate: Rc<Gate>,
    disk: RefCell<Rc<Disk>>,
    keeps: RefCell<Option<Keeps>>,
}

/// Copy-on-read that is asked for of the disk, and the base above which.
struct Keeps {
    base: Option<Rc<dyn Node>>,
    _asked: CopyOnRead,
}

impl Edge {
    /// An edge to `disk`.
    pub fn new(disk: Rc<Disk>) -> Rc<Self> {
        Rc::new(Self { gate: Gate::new(), disk: RefCell::new(disk), keeps: RefCell::new(None) })
    }

    /// Lets a request in, and gives it the disk that it is for.
    pub async fn enter(&self) -> Entered {
        let pass = self.gate.enter().await;
        Entered { disk: self.disk.borrow().clone(), _pass: pass }
    }

    /// The disk of the moment: to ask what it is, not for requests.
    pub fn disk(&self) -> Rc<Disk> {
        self.disk.borrow().clone()
    }

    /// Waits until no request is on its way through this edge, and lets none in while the guard lives. Requests that wait for a rate limit
    /// further down pass at once.
    pub async fn drain(&self) -> Drained {
        let _hurry = self.disk().hurry();
        self.gate.drain().await
    }

    /// Leads to `disk` from now on. The guard shows that no request is on its way.
    pub fn replace(&self, _drained: &Drained, disk: Rc<Disk>) {
        self.disk.replace(disk);
        let keeps = self.keeps.take();
        if let Some(Keeps { base, .. }) = keeps {
            self.keep_what_is_read(base);
        }
    }

    /// Asks the disk for copy-on-read above `base` ([`Disk::enable_copy_on_read`]) from now on, and every disk that this leads to later.
    pub fn keep_what_is_read(&self, base: Option<Rc<dyn Node>>) {
        let asked = self.disk().enable_copy_on_read(base.clone());
        self.keeps.replace(Some(Keeps { base, _asked: asked }));
    }

    /// Ends [`Edge::keep_what_is_read`].
    pub fn forget_what_is_read(&self) {
        self.keeps.replace(None);
    }
}

/// A request on its way through an edge, with the disk that it goes to.
pub struct Entered {
    disk: Rc<Disk>,
    _pass: Pass,
}

impl Deref for Entered {
    type Target = Rc<Disk>;

    fn deref(&self) -> &Rc<Disk> {
        &self.disk
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::TokioClock;
    use crate::disk::DiskOptions;
    use crate::memory::MemoryNode;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn a_request_that_waits_out_an_exchange_goes_to_the_new_disk() {
        let disk = |byte| {
            let node = MemoryNode::new("m", vec![byte; 4096]);
            Disk::new(node, Rc::new(TokioClock::new()), DiskOptions::default())
        };
        let edge = Edge::new(disk(1));
        let early = edge.enter().await;
        let mut draining = Box::pin(edge.drain());
        assert!(draining.as_mut().now_or_never().is_none(), "a request is on its way");
        let mut late = Box::pin(edge.enter());
        assert!(late.as_mut().now_or_never().is_none(), "none gets in meanwhile");
        assert_eq!(early.read(0, 1).await.unwrap()[0], 1);
        drop(early);
        let drained = draining.await;
        edge.replace(&drained, disk(2));
        drop(drained);
        assert_eq!(late.await.read(0, 1).await.unwrap()[0], 2);
    }
}
