//! Questions to a whole chain of layers.

use crate::error::Result;
use crate::extent::{Extent, ExtentKind, Resolved};
use crate::node::Node;
use std::ops::Range;
use std::rc::Rc;

/// The node below all filters: the layer that `node` stands for.
pub fn skip_filters(node: &Rc<dyn Node>) -> Rc<dyn Node> {
    let mut node = node.clone();
    while let Some(below) = node.filtered() {
        node = below;
    }
    node
}

/// True if both are the same layer, whatever filters are on top of it.
pub fn is_same_layer(a: &Rc<dyn Node>, b: &Rc<dyn Node>) -> bool {
    Rc::ptr_eq(a, b) || Rc::ptr_eq(&skip_filters(a), &skip_filters(b))
}

/// True if `node` is the layer that `other` names.
fn is_same(node: &Rc<dyn Node>, other: Option<&Rc<dyn Node>>) -> bool {
    other.is_some_and(|other| is_same_layer(node, other))
}

/// The status of the start of `range` (not empty), in the first layer from `top` down that doesn't lack it; `base` and what lies
/// below it are not asked. `depth` tells the layer. `Unallocated` means that no layer above `base` holds the bytes.
pub async fn status(top: &Rc<dyn Node>, range: Range<u64>, base: Option<&Rc<dyn Node>>) -> Result<Extent> {
    let mut node = top.clone();
    let mut end = range.end;
    let mut depth = 0;
    loop {
        if is_same(&node, base) {
            return Ok(Extent {
                depth,
                ..Extent::new(range.start, end - range.start, ExtentKind::Unallocated)
            });
        }
        let extent = node.status(range.start..end).await?;
        end = extent.end().min(end);
        let below = node.backing();
        match (extent.kind, below) {
            (ExtentKind::Unallocated, Some(backing)) => node = backing,
            (ExtentKind::Unallocated, None) => {
                let depth = depth + 1;
                return Ok(Extent { depth, len: end - range.start, ..extent });
            }
            _ => return Ok(Extent { depth, len: end - range.start, ..extent }),
        }
        depth += 1;
    }
}

/// True if a read of `range` through `node` would ask nothing of where its bytes are ([`Node::is_at_hand`]), as far as memory knows.
pub fn is_at_hand(node: &Rc<dyn Node>, range: Range<u64>) -> bool {
    let end = range.end.min(node.size());
    let mut at = range.start;
    while at < end && !node.is_at_hand(at..end) {
        at += match node.resolve(at..end) {
            Resolved::Zero { len, .. } => len,
            Resolved::At { node, offset, len, .. } if node.is_at_hand(offset..offset + len) => len,
            Resolved::At { .. } | Resolved::Ask => return false,
        };
    }
    true
}

/// A run of whole allocation units that the top layer lacks and that must be copied into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The bytes, in whole allocation units of the top layer (the last one may end at the disk's end).
    pub range: Range<u64>,
    /// The layers below say that all of it reads as zeroes: nothing need be read.
    pub zero: bool,
}

/// The first run at or after `range.start` that `top` lacks and a layer below it but above `base` supplies; `None` if there is none
/// before `range.end`. `range.start` is a multiple of `top`'s allocation unit.
///
/// A unit that several layers supply in parts counts as data: it is copied whole, so that no write to the top ever
/// has to fetch the rest of a unit by itself.
///
/// Long runs of one kind are reported as they are found, so two runs of one kind may follow each other.
pub async fn next_missing(
    top: &Rc<dyn Node>,
    range: Range<u64>,
    base: Option<&Rc<dyn Node>>,
) -> Result<Option<Missing>> {
    let unit = u64::from(top.limits().allocation_unit);
    let end_of_unit = |at: u64| at.checked_next_multiple_of(unit).map_or(range.end, |end| end.min(range.end));
    let mut pos = range.start;
    while pos < range.end {
        let extent = status(top, pos..range.end, base).await?;
        let local = extent.depth == 0;
        match extent.kind {
            _ if local && extent.kind != ExtentKind::Unallocated => pos = extent.end(),
            ExtentKind::Unallocated => pos = extent.end(),
            ExtentKind::Data => {
                let start = (pos - pos % unit).max(range.start);
                return Ok(Some(Missing { range: start..end_of_unit(extent.end()), zero: false }));
            }
            ExtentKind::Zero => {
                let whole_units =
                    if extent.end() >= range.end { range.end } else { extent.end() - extent.end() % unit };
                if pos.is_multiple_of(unit) && whole_units > pos {
                    return Ok(Some(Missing { range: pos..whole_units, zero: true }));
                }
                // Zeroes that share their unit with something else.
                let start = (pos - pos % unit).max(range.start);
                return Ok(Some(Missing { range: start..end_of_unit(pos + 1), zero: false }));
            }
        }
    }
    Ok(None)
}

/// How many layers lie below `top`.
pub fn layers_below(top: &Rc<dyn Node>) -> u32 {
    let mut count = 0;
    let mut node = top.clone();
    while let Some(backing) = node.backing() {
        node = backing;
        count += 1;
    }
    count
}
