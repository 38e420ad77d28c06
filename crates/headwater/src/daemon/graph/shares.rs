//! Sources that are shared: a node over a network is asked once for what several disks need of it (`headwater_block::share`).
//!
//! A node shares from when an image stands on it as its backing, directly or further up, until none does: that is what says that its bytes don't change.
//! Two nodes share with each other if they have one address and the same mark of their contents (an object's ETag or Last-Modified). An NBD
//! export has no such mark: what another node read of it may be older than what this one would be told, so there only the disks on one node share.

use super::open::Built;
use super::{Graph, GraphNode, Role};
use headwater_block::share::{BlockStore, SharePool};
use headwater_storage::cache_dir::CacheDir;
use std::collections::HashMap;
use std::rc::Rc;

/// What is shared of sources.
pub(in crate::daemon) struct Sources {
    /// Has one bound of memory.
    pub(in crate::daemon) shared: Rc<SharePool>,
    /// Where more is kept.
    pub(in crate::daemon) cache: Option<Rc<CacheDir>>,
}

impl Graph {
    /// Puts what shares in front of a node that was opened just now, unless it can be written.
    pub(super) async fn share(&self, built: Built) -> Built {
        if !built.top.is_read_only() {
            return built;
        }
        let store = match &self.sources.cache {
            Some(cache) => kept(cache, &built).await,
            None => None,
        };
        let node = self.sources.shared.join(built.top.clone(), key(&built), store);
        let inside = super::Inside { share: Some(node.clone()), ..built.inside };
        Built { top: node, inside, ..built }
    }

    /// Counts anew how many disks read from each source.
    pub(super) fn settle_shares(&self) {
        let nodes = self.nodes();
        let mut known = HashMap::new();
        for node in &nodes {
            let share = node.inside.borrow().share.clone();
            if let Some(share) = share {
                let readers = self.readers(node, &mut known);
                if share.readers() != readers {
                    tracing::debug!(node = node.name, readers, "disks that share what is read");
                    share.set_readers(readers);
                }
            }
        }
    }

    /// How many disks read from `node` as from a layer below them.
    fn readers(&self, node: &Rc<GraphNode>, known: &mut HashMap<*const GraphNode, u32>) -> u32 {
        if let Some(readers) = known.get(&Rc::as_ptr(node)) {
            return *readers;
        }
        let mut readers = 0u32;
        for parent in self.parents(node) {
            let above = self.readers(&parent, known);
            for link in parent.links.borrow().iter().filter(|link| Rc::ptr_eq(&link.to, node)) {
                readers = readers.saturating_add(match link.role {
                    // A disk, or a layer that others stand on.
                    Role::Backing => above.max(1),
                    Role::Shadow | Role::Moment => 0,
                    _ => above,
                });
            }
        }
        known.insert(Rc::as_ptr(node), readers);
        readers
    }
}

/// Where what is read of the node is kept.
async fn kept(cache: &Rc<CacheDir>, built: &Built) -> Option<Rc<dyn BlockStore>> {
    let identity = built.top.identity().ok()?;
    match cache.file(&built.filename, built.top.size(), &identity).await {
        Ok(Some(file)) => Some(file),
        Ok(None) => {
            let name = &built.filename;
            tracing::warn!(
                "{name}: nothing marks its contents (an ETag, say), so nothing of it is kept in the cache directory"
            );
            None
        }
        Err(err) => {
            tracing::warn!("{err}; nothing of {} is kept in the cache directory", built.filename);
            None
        }
    }
}

/// By what other nodes with the same bytes are recognised.
fn key(built: &Built) -> Option<String> {
    let identity = built.top.identity().ok().filter(|identity| identity.marks_bytes())?;
    let marks: Vec<String> =
        identity.contents.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    Some(format!("{}\n{}\n{}", built.filename, built.top.size(), marks.join("\n")))
}
