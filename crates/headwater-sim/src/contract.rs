//! The contract between a node and its caller, checked: who changes a mapping is alone in its range.

use headwater_block::node::Access;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;

/// The requests that are inside a node.
#[derive(Default)]
pub(crate) struct Contract {
    /// Each with its range, and whether it needs that for itself.
    inside: RefCell<BTreeMap<u64, (Range<u64>, bool)>>,
    next_id: Cell<u64>,
}

impl Contract {
    /// Registers a request until the guard is dropped.
    ///
    /// # Panics
    /// If it meets another one that it mustn't meet.
    pub(crate) fn enter(&self, node: &str, range: &Range<u64>, access: Access) -> Inside<'_> {
        let (range, alone) = match access {
            Access::Shared => (range.clone(), false),
            Access::Exclusive(wide) => (wide, true),
        };
        for (other, other_alone) in self.inside.borrow().values() {
            let meet = other.start < range.end && range.start < other.end;
            assert!(
                !meet || !(alone || *other_alone),
                "{node}: the contract is broken: {range:?} (alone: {alone}) meets {other:?} (alone: {other_alone})"
            );
        }
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        self.inside.borrow_mut().insert(id, (range, alone));
        Inside { contract: self, id }
    }
}

/// A request inside.
pub(crate) struct Inside<'a> {
    contract: &'a Contract,
    id: u64,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.contract.inside.borrow_mut().remove(&self.id);
    }
}
