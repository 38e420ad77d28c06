//! For how long the requests of each node's clients are held, and its jobs wait, when a source can't be reached.
//!
//! A node has what its own option says (`x-headwater-hold`, or a command later). One that says nothing has what is said nearest below it, where the source is:
//! its file first, then its backing. Where nothing is said, the daemon's `--hold` counts. So a source's own setting counts for all disks that read from it, and a disk
//! may have another.

use super::open::{Options, Read};
use super::{Graph, GraphNode, Role, Settings};
use crate::cli::reach::parse_patience;
use crate::daemon::failure::{Refusal, generic};
use headwater_block::{DiskOptions, Patience};
use std::rc::Rc;

/// The option of a node.
pub(in crate::daemon) const OPTION: &str = "x-headwater-hold";

/// What `options` say of their own node; none if they say nothing.
///
/// # Errors
/// If it is no time.
pub(in crate::daemon) fn own(options: &Options) -> Result<Option<Patience>, Refusal> {
    options.text(OPTION).map(|text| parse(OPTION, text)).transpose()
}

/// The time that the parameter `name` gives as `text`.
///
/// # Errors
/// If it is none.
pub(in crate::daemon) fn parse(name: &str, text: &str) -> Result<Patience, Refusal> {
    parse_patience(text)
        .map_err(|_| generic(format!("Parameter '{name}' expects a number of seconds, or 'forever'")))
}

impl Graph {
    /// Has all disks wait as long as is said of them, or of what is below them.
    pub(super) fn settle_holds(&self) {
        // A job's shadow has the disk of the node that it is of.
        for node in self.nodes().into_iter().filter(|node| node.child(Role::Shadow).is_none()) {
            let patience = said(&node).unwrap_or(self.objects.patience());
            node.disk.set_options(DiskOptions { patience, ..node.disk.options() });
        }
    }

    /// `headwater-set-hold`: says it anew of one node, in the words of the option; none takes back what was said.
    ///
    /// # Errors
    /// If there is no such node, or it is no time.
    pub(in crate::daemon) fn set_hold(&self, name: &str, hold: Option<&str>) -> Result<(), Refusal> {
        let node = self.node(name)?;
        hold.map(|text| parse("hold", text)).transpose()?;
        {
            let Settings { options, .. } = &mut *node.settings.borrow_mut();
            match hold {
                Some(text) => drop(options.insert(OPTION.to_owned(), text.into())),
                None => drop(options.remove(OPTION)),
            }
        }
        self.settle_holds();
        Ok(())
    }
}

/// What is said of `node`, or else nearest below it.
fn said(node: &Rc<GraphNode>) -> Option<Patience> {
    // A definition that says nonsense was refused.
    if let Ok(Some(own)) = own(&node.settings.borrow().options) {
        return Some(own);
    }
    let links = node.links.borrow();
    let passes = |backing: bool| {
        let here = links.iter().filter(move |link| (link.role == Role::Backing) == backing);
        here.filter(|link| !matches!(link.role, Role::Target | Role::Moment))
    };
    passes(false).chain(passes(true)).find_map(|link| said(&link.to))
}
