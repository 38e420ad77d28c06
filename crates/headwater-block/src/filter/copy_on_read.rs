//! Copy-on-read as a node: what is read through it, or through anything else that uses its child's disk, from the layers below the child is
//! kept in the child.
//!
//! The work is the child's disk's ([`Disk::enable_copy_on_read`](crate::Disk::enable_copy_on_read)), because it needs the locks; this node asks for
//! it for as long as it lives, of whatever disk its edge leads to. With a **bottom** only what the layers down to that one (included) hold is
//! kept; what lies below them is read and not kept.

use super::child::{Child, as_the_child, passed_to_the_child};
use crate::buffer::BufferMut;
use crate::chain::is_same_layer;
use crate::edge::Edge;
use crate::error::{Error, ErrorKind, Result};
use crate::node::{LocalFuture, Node};
use std::cell::RefCell;
use std::rc::Rc;

/// Keeps what is read; see the module.
pub struct CopyOnReadNode {
    child: Child,
    bottom: Option<Rc<dyn Node>>,
    /// What lay below the bottom when copy-on-read was last asked for.
    base: RefCell<Option<Rc<dyn Node>>>,
}

impl CopyOnReadNode {
    /// Keeps in `child`'s top layer what is read, of the layers down to `bottom` (all of them, if there is none).
    ///
    /// # Errors
    /// `InvalidInput` if `bottom` is a filter, or not in the chain of the child.
    pub fn new(child: Rc<Edge>, bottom: Option<Rc<dyn Node>>) -> Result<Rc<Self>> {
        if let Some(bottom) = &bottom {
            check_bottom(&child.disk().top(), bottom)?;
        }
        let base = bottom.as_ref().and_then(|bottom| bottom.backing());
        child.keep_what_is_read(base.clone());
        Ok(Rc::new(Self { child: Child::new(child), bottom, base: RefCell::new(base) }))
    }

    /// Asks for copy-on-read anew if the chain has changed below the bottom.
    fn refresh(&self) {
        let base = self.bottom.as_ref().and_then(|bottom| bottom.backing());
        let same = match (&base, &*self.base.borrow()) {
            (Some(new), Some(old)) => Rc::ptr_eq(new, old),
            (new, old) => new.is_none() && old.is_none(),
        };
        if !same {
            self.child.edge().keep_what_is_read(base.clone());
            self.base.replace(base);
        }
    }
}

fn check_bottom(top: &Rc<dyn Node>, bottom: &Rc<dyn Node>) -> Result<()> {
    let refuse = |why: &str| {
        let message = format!("{}: the bottom node {} {why}", top.name(), bottom.name());
        Err(Error::new(ErrorKind::InvalidInput, message))
    };
    if bottom.filtered().is_some() {
        return refuse("is a filter; name the image below it");
    }
    let mut layer = Some(top.clone());
    while let Some(node) = layer {
        if is_same_layer(&node, bottom) {
            return Ok(());
        }
        layer = node.backing();
    }
    refuse("is not in the chain of backing images; name one that is")
}

impl Drop for CopyOnReadNode {
    fn drop(&mut self) {
        self.child.edge().forget_what_is_read();
    }
}

impl Node for CopyOnReadNode {
    as_the_child!();
    passed_to_the_child!();

    fn driver(&self) -> &'static str {
        "copy-on-read"
    }

    fn read(&self, offset: u64, buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        self.refresh();
        Box::pin(self.child.read(offset, buf))
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.child.flush())
    }
}
