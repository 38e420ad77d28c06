//! `blockdev-reopen`: nodes get other options, other files and other backings, all of them or none.
//!
//! A definition covers a node, and what lies below it as far as that was opened together with it and isn't a node of its own. What it leaves
//! out has its default again. Everything is looked at before anything is changed; what fails only then (a file that can't be opened, users who
//! don't agree) is taken back.

mod options;
mod relink;

use self::options::{CHANGEABLE, child_keys, flat, is_reset_freely};
use self::relink::Move;
use super::open::{Inherited, Options, Read};
use super::settings::{detect_zeroes, settings, unmaps};
use super::{Graph, GraphNode, Role, Settings, holds};
use crate::daemon::failure::{Refusal, generic};
use headwater_block::DiskOptions;
use serde_json::Value;
use std::rc::Rc;

/// A node that is opened again.
struct Entry {
    node: Rc<GraphNode>,
    settings: Settings,
    /// Where its options say nothing of discards.
    unmap: bool,
    /// It keeps its own options: only what it takes from the node above it may be new.
    keeps: bool,
}

impl Graph {
    /// `blockdev-reopen`: each of `all` are all the options of one node.
    ///
    /// # Errors
    /// Options that can't be changed, and what opening says. Then everything is as it was.
    pub(in crate::daemon) async fn reopen(self: &Rc<Self>, all: Vec<Options>) -> Result<(), Refusal> {
        let mut entries = Vec::new();
        for options in all {
            let name = options.text("node-name").ok_or_else(|| generic("node-name not specified"))?;
            let node = self.node(name)?;
            self.queue(&mut entries, &node, options, Inherited::default(), false);
        }
        let mut moves = Vec::new();
        for entry in &entries {
            if !entry.keeps {
                self.check_entry(entry, &mut moves)?;
            }
            self.check_read_only(entry, &entries)?;
        }
        self.carry_out(&entries, &moves).await?;
        self.settle_holds();
        self.collect().await;
        Ok(())
    }

    /// Adds `node` to what is opened again, and the children that go with it.
    fn queue(
        &self,
        entries: &mut Vec<Entry>,
        node: &Rc<GraphNode>,
        options: Options,
        above: Inherited,
        keeps: bool,
    ) {
        let known = entries.iter().position(|entry| Rc::ptr_eq(&entry.node, node));
        if known.is_some() && keeps {
            return;
        }
        if let Some(known) = known {
            // It is below one of the others and has a definition of its own, which counts.
            entries.remove(known);
        }
        let settings = settings(options, above);
        let children: Vec<_> = node
            .links
            .borrow()
            .iter()
            .filter(|link| link.role != Role::Shadow && self.goes_with(&link.to))
            .map(|link| (link.name, link.role, link.to.clone()))
            .collect();
        let below: Vec<_> = children
            .into_iter()
            .filter_map(|(key, role, child)| {
                let (options, keeps) = match settings.options.get(key) {
                    Some(Value::Object(options)) => (options.clone(), false),
                    Some(Value::String(name)) if *name != child.name => return None,
                    Some(Value::Null) => return None,
                    _ => (child.settings.borrow().options.clone(), true),
                };
                Some((child, options, Inherited::below(&settings, role, 0), keeps))
            })
            .collect();
        entries.push(Entry { node: node.clone(), settings, unmap: above.unmap, keeps });
        for (child, options, inherited, keeps) in below {
            self.queue(entries, &child, options, inherited, keeps);
        }
    }

    /// True for a child that was opened together with what stands on it, and that nothing has come in front of.
    fn goes_with(&self, child: &Rc<GraphNode>) -> bool {
        !child.owned.get() && self.shadow_on(child).is_none()
    }

    /// Looks whether a node can be as its entry says, and what it is to stand on.
    fn check_entry(&self, entry: &Entry, moves: &mut Vec<Move>) -> Result<(), Refusal> {
        let Entry { node, settings, unmap, .. } = entry;
        let options = &settings.options;
        let cannot = |key: &str| generic(format!("Cannot change the option '{key}'"));
        if options.text("driver").is_some_and(|driver| driver != node.driver) {
            return Err(cannot("driver"));
        }
        detect_zeroes(options, unmaps(options, *unmap))?;
        holds::own(options)?;
        let was = node.settings.borrow().clone();
        let (new, old) = (flat(node.driver, options), flat(node.driver, &was.options));
        if let Some(key) =
            old.keys().find(|key| !new.contains_key(*key) && !is_reset_freely(node.driver, key))
        {
            return Err(generic(format!("Option '{key}' cannot be reset to its default value")));
        }
        self.check_driver(node, options)?;
        for key in child_keys(node.driver) {
            self.check_child(node, options, key, moves)?;
        }
        if options.text("node-name").is_some_and(|name| name != node.name) {
            return Err(cannot("node-name"));
        }
        if options.flag("force-share").is_some_and(|share| share != was.force_share) {
            return Err(cannot("force-share"));
        }
        let fixed = |key: &str| !CHANGEABLE.contains(&key) && !is_reset_freely(node.driver, key);
        match new.iter().find(|(key, value)| fixed(key) && old.get(*key) != Some(*value)) {
            Some((key, _)) => Err(cannot(key)),
            None => Ok(()),
        }
    }

    /// What drivers themselves say to their options.
    fn check_driver(&self, node: &Rc<GraphNode>, options: &Options) -> Result<(), Refusal> {
        match node.driver {
            "blkverify" | "copy-on-read" | "compress" | "replicas" | "verify" => Err(generic(format!(
                "Block format '{}' used by node '{}' does not support reopening files",
                node.driver, node.name
            ))),
            "throttle" => self
                .objects
                .throttle_group(options.text("throttle-group").unwrap_or_default())
                .map(|_group| ()),
            "qcow2" => {
                let image = node.inside.borrow().image.clone();
                let (cluster_size, named) = image.map_or((u64::MAX, false), |image| {
                    let header = image.header();
                    (header.cluster_size(), header.backing_name.is_some())
                });
                options::check_caches(options, cluster_size)?;
                if !options.contains_key("backing") && (named || node.child(Role::Backing).is_some()) {
                    return Err(generic(format!("backing is missing for '{}'", node.name)));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Looks at what the option `key` says of a child: the one that is there, with or without other options, or another.
    fn check_child(
        &self,
        node: &Rc<GraphNode>,
        options: &Options,
        key: &'static str,
        moves: &mut Vec<Move>,
    ) -> Result<(), Refusal> {
        let link =
            node.links.borrow().iter().find(|link| link.name == key).map(|link| (link.role, link.to.clone()));
        let (role, now) = link.map_or((Role::Backing, None), |(role, child)| (role, Some(child)));
        let wanted = match options.get(key) {
            Some(Value::String(name)) => Some(self.device_or_node("", name)?),
            Some(Value::Object(_)) => {
                return match now {
                    Some(child) if self.goes_with(&child) => Ok(()),
                    _ => Err(generic(format!("Cannot change the option '{key}.driver'"))),
                };
            }
            Some(Value::Null) => None,
            _ => return Ok(()),
        };
        if let Some(wanted) = wanted.as_ref().filter(|wanted| reaches(wanted, node)) {
            let (wanted, name) = (&wanted.name, &node.name);
            return Err(generic(format!("Making '{wanted}' a {key} child of '{name}' would create a cycle")));
        }
        if wanted.as_ref().map(Rc::as_ptr) == now.as_ref().map(Rc::as_ptr) {
            return Ok(());
        }
        if !matches!(key, "file" | "backing") {
            return Err(generic(format!("Cannot change the option '{key}'")));
        }
        let shadow = now.as_ref().and_then(|now| self.shadow_on(now));
        if shadow.is_some_and(|shadow| shadow.name.starts_with('#')) {
            return Err(generic(format!("Cannot replace implicit {key} child of {}", node.name)));
        }
        if role == Role::File {
            node.check_idle()?;
        } else {
            node.check_not_frozen()?;
        }
        moves.push(Move { node: node.clone(), key, role, from: now, to: wanted });
        Ok(())
    }

    /// Refuses to make a node read-only that others write to, but for those that are opened again with it.
    fn check_read_only(&self, entry: &Entry, entries: &[Entry]) -> Result<(), Refusal> {
        let node = &entry.node;
        if !entry.settings.read_only || node.is_read_only() {
            return Ok(());
        }
        let too = |user: &Rc<GraphNode>| entries.iter().any(|entry| Rc::ptr_eq(&entry.node, user));
        if self.is_written(node, too) {
            let name = &node.name;
            return Err(generic(format!("Read-only block node '{name}' cannot support read-write users")));
        }
        Ok(())
    }

    /// Does what was found to be possible. What fails nevertheless is taken back.
    async fn carry_out(self: &Rc<Self>, entries: &[Entry], moves: &[Move]) -> Result<(), Refusal> {
        let was: Vec<_> = entries.iter().map(|entry| entry.node.settings.borrow().clone()).collect();
        let settings_of = |node: &Rc<GraphNode>| {
            let entry = entries.iter().find(|entry| Rc::ptr_eq(&entry.node, node));
            entry.map_or_else(|| node.settings.borrow().clone(), |entry| entry.settings.clone())
        };
        let old_settings = |node: &Rc<GraphNode>| {
            let at = entries.iter().position(|entry| Rc::ptr_eq(&entry.node, node));
            at.map_or_else(|| node.settings.borrow().clone(), |at| was[at].clone())
        };
        self.relink(moves, &settings_of, &old_settings).await?;
        // Who won't write any more says so before those below can't be written; who will, when they can.
        let stops = |entry: &&Entry| entry.settings.read_only && !entry.node.is_read_only();
        let (first, then): (Vec<_>, Vec<_>) = entries.iter().partition(stops);
        for entry in first.into_iter().chain(then.into_iter().rev()) {
            if let Err(refusal) = self.open_entry(entry).await {
                for (entry, was) in entries.iter().zip(&was) {
                    self.open_as(&entry.node, was.clone()).await?;
                }
                let back: Vec<_> = moves.iter().map(Move::back).collect();
                self.relink(&back, &old_settings, &old_settings).await?;
                return Err(refusal);
            }
        }
        for entry in entries {
            let (node, options) = (&entry.node, &entry.settings.options);
            if let (Some(group), "throttle") = (options.text("throttle-group"), node.driver) {
                crate::daemon::filters::change_group(self, node, group)?;
            }
            let unmap = unmaps(options, entry.unmap);
            let now = node.disk.options();
            node.disk.set_options(DiskOptions {
                detect_zeroes: detect_zeroes(options, unmap)?,
                ignore_discards: !unmap && !node.is_filter(),
                ..now
            });
        }
        Ok(())
    }

    async fn open_entry(self: &Rc<Self>, entry: &Entry) -> Result<(), Refusal> {
        let node = &entry.node;
        let mut settings = entry.settings.clone();
        let on = node.child(Role::File).or_else(|| node.child(Role::Filtered));
        if on.is_some_and(|on| on.is_read_only()) && (settings.auto_read_only || node.is_filter()) {
            settings.read_only = true;
        }
        self.open_as(node, settings).await
    }

    /// Opens a node again if `settings` are others than those that it is open with.
    async fn open_as(self: &Rc<Self>, node: &Rc<GraphNode>, settings: Settings) -> Result<(), Refusal> {
        let old = node.settings.borrow().clone();
        let window = |settings: &Settings| {
            (node.driver == "raw")
                .then(|| (settings.options.number("offset"), settings.options.number("size")))
        };
        let differs = settings.read_only != old.read_only
            || settings.direct != old.direct
            || settings.no_flush != old.no_flush
            || window(&settings) != window(&old);
        if !differs {
            node.settings.replace(settings);
            return Ok(());
        }
        node.check_idle()?;
        self.open_changed(node, settings).await
    }
}

/// True if what is done to `from` can come to `node`.
fn reaches(from: &Rc<GraphNode>, node: &Rc<GraphNode>) -> bool {
    Rc::ptr_eq(from, node) || from.links.borrow().iter().any(|link| reaches(&link.to, node))
}
