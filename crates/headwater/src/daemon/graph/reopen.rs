//! `blockdev-reopen`: nodes get other options, all of those that a command names or none.

use super::open::{Options, Read};
use super::{Graph, GraphNode, Role, Settings};
use crate::daemon::failure::{Refusal, generic};
use crate::daemon::filters;
use headwater_block::{DetectZeroes, DiskOptions};
use serde_json::Value;
use std::rc::Rc;

/// Options that a node keeps for as long as it is there.
const FIXED: [&str; 11] = [
    "filename",
    "offset",
    "size",
    "server",
    "export",
    "url",
    "bucket",
    "container",
    "key",
    "endpoint",
    "version-id",
];

/// A node as it was before it got other options.
struct Before {
    node: Rc<GraphNode>,
    settings: Settings,
    backing: Option<Rc<GraphNode>>,
    disk: DiskOptions,
}

impl Graph {
    /// Gives nodes other options: each of `all` has all options of one node.
    ///
    /// # Errors
    /// Options that can't be changed, and what opening says. Then all nodes are as they were, unless even that fails.
    pub(in crate::daemon) async fn reopen(self: &Rc<Self>, all: &[Options]) -> Result<(), Refusal> {
        let mut done = Vec::new();
        let mut result = Ok(());
        for options in all {
            result = self.reopen_one(options, &mut done).await;
            if result.is_err() {
                break;
            }
        }
        if result.is_err() {
            for before in done.into_iter().rev() {
                let name = before.node.name.clone();
                if let Err(refusal) = self.bring_back(before).await {
                    tracing::error!(node = name, "can't be opened again as it was: {}", refusal.desc);
                }
            }
        }
        // Those that nothing stands on any more: not earlier, they might have been needed again.
        self.collect().await;
        result
    }

    /// Gives one node other options, and adds what it was to `done` before anything is changed.
    async fn reopen_one(self: &Rc<Self>, options: &Options, done: &mut Vec<Before>) -> Result<(), Refusal> {
        let name = options.text("node-name").ok_or_else(|| generic("node-name not specified"))?;
        let node = self.node(name)?;
        let old = node.settings.borrow().clone();
        check_unchanged(&node, &old, options)?;
        let backing = match options.get("backing") {
            Some(Value::String(wanted)) if !wanted.is_empty() => Some(Some(self.device_or_node("", wanted)?)),
            Some(_) => Some(None),
            None => None,
        };
        let was = node.child(Role::Backing);
        if backing.is_none() && was.is_some() {
            return Err(generic(format!("backing is missing for '{name}'")));
        }
        let settings = new_settings(options);
        let differs = differs(&settings, &old);
        if differs {
            node.check_idle()?;
        }
        let disk = node.disk.options();
        done.push(Before { node: node.clone(), settings: old, backing: was, disk });
        if let Some(wanted) = backing {
            self.change_backing_node(&node, wanted).await?;
        }
        if differs {
            self.open_changed(&node, settings).await?;
        } else {
            node.settings.replace(settings);
        }
        if let (Some(group), true) = (options.text("throttle-group"), node.driver == "throttle") {
            filters::change_group(self, &node, group)?;
        }
        let ignore = options.text("discard").is_none_or(|discard| discard != "unmap");
        let detect_zeroes = match options.text("detect-zeroes") {
            Some("on") => DetectZeroes::On,
            Some("unmap") => DetectZeroes::Unmap,
            _ => DetectZeroes::Off,
        };
        let now = node.disk.options();
        node.disk.set_options(DiskOptions {
            detect_zeroes,
            ignore_discards: ignore && !node.is_filter(),
            ..now
        });
        Ok(())
    }

    /// Makes a node what it was.
    async fn bring_back(self: &Rc<Self>, before: Before) -> Result<(), Refusal> {
        let Before { node, settings, backing, disk } = before;
        let now = node.settings.borrow().clone();
        self.change_backing_node(&node, backing).await?;
        if differs(&settings, &now) {
            self.open_changed(&node, settings).await?;
        } else {
            node.settings.replace(settings);
        }
        let group = node.settings.borrow().options.text("throttle-group").map(str::to_owned);
        if let Some(group) = group {
            filters::change_group(self, &node, &group)?;
        }
        node.disk.set_options(disk);
        Ok(())
    }

    /// Another backing for an image, as far as the graph allows it. The caller collects what is not needed any more.
    async fn change_backing_node(
        &self,
        node: &Rc<GraphNode>,
        wanted: Option<Rc<GraphNode>>,
    ) -> Result<(), Refusal> {
        let now = node.child(Role::Backing);
        let same = match (&now, &wanted) {
            (Some(now), Some(wanted)) => Rc::ptr_eq(now, wanted),
            (None, None) => true,
            _ => false,
        };
        if same {
            return Ok(());
        }
        node.check_not_frozen()?;
        if let Some(wanted) = &wanted
            && Self::is_in_chain(wanted, node)
        {
            return Err(generic(format!(
                "Making '{}' a backing child of '{}' would create a cycle",
                wanted.name, node.name
            )));
        }
        let drained = node.disk.drain().await;
        let changed = self.set_backing(node, wanted.as_ref()).await;
        drop(drained);
        if changed.is_ok() {
            self.let_requests_pass().await;
        }
        changed
    }
}

/// Refuses what can't be changed about a node, or about one that was opened with it and is described with it again.
fn check_unchanged(node: &GraphNode, old: &Settings, options: &Options) -> Result<(), Refusal> {
    let name = &node.name;
    if options.text("driver").is_some_and(|driver| driver != node.driver) {
        return Err(generic(format!("Cannot change the option 'driver' of node '{name}'")));
    }
    let file = node.child(Role::File).or_else(|| node.child(Role::Filtered));
    match (options.get("file").or_else(|| options.get("image")), file) {
        (Some(Value::String(wanted)), Some(file)) if file.name != *wanted => {
            return Err(generic(format!("Cannot change the option 'file' of node '{name}' to another node")));
        }
        (Some(Value::Object(wanted)), Some(file)) => {
            let was = file.settings.borrow().clone();
            check_unchanged(&file, &was, wanted)?;
        }
        _ => {}
    }
    for fixed in FIXED {
        match (options.get(fixed), old.options.get(fixed)) {
            (Some(new), was) if Some(new) != was => {
                return Err(generic(format!("Cannot change the option '{fixed}'")));
            }
            // All options are those that the command names, and this one would have no value then.
            (None, Some(_)) => {
                return Err(generic(format!("Option '{fixed}' cannot be reset to its default value")));
            }
            _ => {}
        }
    }
    Ok(())
}

/// What the options of `blockdev-reopen` say of all kinds of nodes.
fn new_settings(options: &Options) -> Settings {
    let cache = options.object("cache");
    let of_cache = |key, default| cache.and_then(|cache| cache.flag(key)).unwrap_or(default);
    Settings {
        read_only: options.flag("read-only").unwrap_or(false),
        auto_read_only: options.flag("auto-read-only").unwrap_or(false),
        direct: of_cache("direct", false),
        no_flush: of_cache("no-flush", false),
        force_share: options.flag("force-share").unwrap_or(false),
        options: options.clone(),
    }
}

/// True if a node must be opened again to have the other settings.
fn differs(one: &Settings, other: &Settings) -> bool {
    one.read_only != other.read_only || one.direct != other.direct || one.no_flush != other.no_flush
}
