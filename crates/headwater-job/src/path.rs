//! The way that data take through the layers of a chain: what it says about how much should be in flight.

use crate::window::Bounds;
use headwater_block::chain::is_same_layer;
use headwater_block::{Error, ErrorKind, Node, Result};
use std::rc::Rc;

/// What the layers on the way have in common.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Path {
    remote: bool,
    most: u64,
}

impl Path {
    /// The way through `node`, its filters and its files.
    pub(crate) fn through(node: &Rc<dyn Node>) -> Path {
        let mut path = Path { remote: false, most: u64::MAX };
        let mut layer = Some(node.clone());
        while let Some(part) = layer {
            path.remote |= part.limits().remote;
            path.most = path.most.min(u64::from(part.limits().max_transfer));
            layer = part.filtered().or_else(|| part.file());
        }
        path
    }

    /// The way through both.
    pub(crate) fn and(self, other: Path) -> Path {
        Path { remote: self.remote || other.remote, most: self.most.min(other.most) }
    }

    /// The way through `top`, and through everything below it that lies above `base`.
    ///
    /// # Errors
    /// `InvalidInput` if `base` isn't below `top`.
    pub(crate) fn above(top: &Rc<dyn Node>, base: Option<&Rc<dyn Node>>) -> Result<Path> {
        let mut path = Path::through(top);
        let mut at = top.backing();
        while let Some(node) = at {
            if base.is_some_and(|base| is_same_layer(base, &node)) {
                return Ok(path);
            }
            path = path.and(Path::through(&node));
            at = node.backing();
        }
        match base {
            Some(base) => {
                let message = format!("{} isn't in the backing chain of {}", base.name(), top.name());
                Err(Error::new(ErrorKind::InvalidInput, message))
            }
            None => Ok(path),
        }
    }

    /// True if a part of it is remote.
    pub(crate) fn is_remote(self) -> bool {
        self.remote
    }

    /// How much should be in flight on this way.
    pub(crate) fn bounds(self) -> Bounds {
        let bounds = if self.remote { Bounds::REMOTE } else { Bounds::LOCAL };
        bounds.with_copies_up_to(self.most)
    }
}
