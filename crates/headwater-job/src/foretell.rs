//! What a job tells a source that is far away before it looks for what is to be copied: what it is about to read. The round trips of the first requests, and of the
//! connections that they need, pass while it looks, which may need some of its own: for the tables of an image that is far away.
//!
//! It is told of the *beginning* only: what no nearer layer holds of the first window. The rest is asked for by copies in time.
//!
//! A job that is limited, or has another order, only has connections made: what comes ahead knows no limit.

use crate::control::{Control, Wish};
use crate::path::Path;
use crate::window::Bounds;
use futures_util::future::select;
use headwater_block::chain::is_same_layer;
use headwater_block::{ExtentKind, Node};
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;

/// Tells the first layer from `top` on, above `above`, that is reached over a network, how a job within `bounds` begins. A command of the user ends that.
pub(crate) async fn foretell(
    top: &Rc<dyn Node>,
    above: Option<&Rc<dyn Node>>,
    bounds: Bounds,
    control: &Control,
) {
    if !bounds.far || control.wish() != Wish::Go {
        return;
    }
    let telling = tell(top, above, if control.is_limited() { 0 } else { bounds.start });
    let command = control.wait_until(|control| control.wish() != Wish::Go);
    select(pin!(telling), pin!(command)).await;
}

/// Tells of at most `most` bytes.
async fn tell(top: &Rc<dyn Node>, above: Option<&Rc<dyn Node>>, most: u64) {
    let mut range = 0..most.min(top.size());
    let mut at = Some(top.clone());
    while let Some(layer) = at.filter(|layer| above.is_none_or(|above| !is_same_layer(above, layer))) {
        if Path::through(&layer).is_remote() {
            return layer.expect(range);
        }
        match lacks(&layer, range).await {
            Some(lacking) => range = lacking,
            // The job meets the error where it looks itself.
            None => return,
        }
        at = layer.backing();
    }
}

/// The first part of `range` that `layer` leaves to those below it, which is empty if it holds everything. None if it can't say.
async fn lacks(layer: &Rc<dyn Node>, range: Range<u64>) -> Option<Range<u64>> {
    let mut lacking: Option<Range<u64>> = None;
    let mut pos = range.start;
    while pos < range.end {
        let extent = layer.status(pos..range.end).await.ok()?;
        let end = extent.end().min(range.end);
        match (extent.kind == ExtentKind::Unallocated, &mut lacking) {
            (true, Some(lacking)) => lacking.end = end,
            (true, none) => *none = Some(pos..end),
            (false, Some(_)) => break,
            (false, None) => {}
        }
        pos = end;
    }
    Some(lacking.unwrap_or(0..0))
}
