//! What is told of nodes: `query-named-block-nodes` and the like.

use super::names::{self, Names};
use super::{Graph, GraphNode, Role};
use headwater_block::DetectZeroes;
use headwater_image::qcow2::header::{self, Header};
use serde_json::{Value, json};
use std::rc::Rc;

impl Graph {
    /// All nodes, the newest first. Without `flat` each tells of the images below it as well.
    pub(in crate::daemon) fn describe_nodes(&self, flat: bool) -> Value {
        let names = self.names();
        let nodes = self.nodes().into_iter().rev();
        nodes.map(|node| describe(&names, &node, flat)).collect()
    }

    /// Counters of all nodes: `query-blockstats` with `query-nodes`.
    pub(in crate::daemon) fn describe_stats(&self) -> Value {
        let tell = |node: &Rc<GraphNode>| {
            let stats = node.disk.stats();
            json!({
                "node-name": node.name,
                "stats": {
                    "rd_bytes": stats.read_bytes.get(), "rd_operations": stats.reads.get(),
                    "wr_bytes": stats.write_bytes.get(), "wr_operations": stats.writes.get(),
                    "flush_operations": stats.flushes.get(), "unmap_bytes": 0, "unmap_operations": 0,
                    "zone_append_bytes": 0, "zone_append_operations": 0, "zone_append_total_time_ns": 0,
                    "zone_append_merged": 0, "invalid_zone_append_operations": 0, "failed_zone_append_operations": 0,
                    "rd_total_time_ns": 0, "wr_total_time_ns": 0, "flush_total_time_ns": 0, "unmap_total_time_ns": 0,
                    "rd_merged": 0, "wr_merged": 0, "unmap_merged": 0, "wr_highest_offset": 0,
                    "account_invalid": false, "account_failed": false,
                    "failed_rd_operations": 0, "failed_wr_operations": 0, "failed_flush_operations": 0,
                    "failed_unmap_operations": 0, "invalid_rd_operations": 0, "invalid_wr_operations": 0,
                    "invalid_flush_operations": 0, "invalid_unmap_operations": 0, "timed_stats": [],
                },
            })
        };
        self.nodes().iter().rev().map(tell).collect()
    }

    /// The graph as nodes and edges: `x-debug-query-block-graph`.
    pub(in crate::daemon) fn describe_graph(&self, exports: &[(String, String)]) -> Value {
        let nodes = self.nodes();
        let id = |name: &str| nodes.iter().position(|node| node.name == name).map_or(0, |at| at + 1);
        let mut all: Vec<Value> = nodes
            .iter()
            .map(|node| json!({"id": id(&node.name), "type": "block-driver", "name": node.name}))
            .collect();
        let mut edges = Vec::new();
        for node in &nodes {
            for link in node.links.borrow().iter() {
                edges.push(json!({"name": link.name, "parent": id(&node.name), "child": id(&link.to.name), "perm": [], "shared-perm": []}));
            }
        }
        for (at, (export, node)) in exports.iter().enumerate() {
            let number = nodes.len() + 1 + at;
            all.push(json!({"id": number, "type": "block-backend", "name": export}));
            edges.push(
                json!({"name": "root", "parent": number, "child": id(node), "perm": [], "shared-perm": []}),
            );
        }
        json!({"nodes": all, "edges": edges})
    }
}

/// One node.
fn describe(names: &Names<'_>, node: &Rc<GraphNode>, flat: bool) -> Value {
    let settings = node.settings.borrow();
    let detect = match node.disk.options().detect_zeroes {
        DetectZeroes::Off => "off",
        DetectZeroes::On => "on",
        DetectZeroes::Unmap => "unmap",
    };
    let mut told = json!({
        "file": names.told(node),
        "node-name": node.name,
        "ro": settings.read_only,
        "drv": node.driver,
        "active": node.active.get(),
        "encrypted": false,
        "detect_zeroes": detect,
        "bps": 0,
        "bps_rd": 0,
        "bps_wr": 0,
        "iops": 0,
        "iops_rd": 0,
        "iops_wr": 0,
        "cache": {"writeback": true, "direct": settings.direct, "no-flush": settings.no_flush},
        "write_threshold": threshold(node),
        "backing_file_depth": if flat { 0 } else { depth(node) },
        "image": image(names, node, flat),
    });
    if let (Some(backing), Value::Object(told)) = (node.child(Role::Backing), &mut told) {
        told.insert("backing_file".into(), names.told(&backing).into());
    }
    told
}

fn threshold(node: &GraphNode) -> u64 {
    match &node.inside.borrow().file {
        Some(file) => file.write_watch().threshold(),
        None => node.disk.write_watch().threshold(),
    }
}

/// How many nodes lie below in the chain; filters count as well.
fn depth(node: &Rc<GraphNode>) -> usize {
    node.chain().count().saturating_sub(1)
}

/// What there is to tell of a node as an image.
fn image(names: &Names<'_>, node: &Rc<GraphNode>, flat: bool) -> Value {
    // As everywhere in QEMU's interface, in whole sectors.
    let size = node.disk.size().next_multiple_of(512);
    let mut told = json!({
        "filename": names.told(node),
        "format": node.driver,
        "virtual-size": size,
    });
    let Value::Object(fields) = &mut told else { return told };
    if let Some(actual) = actual_size(node) {
        fields.insert("actual-size".into(), actual.into());
    }
    let holder = holder(node);
    if let Some(image) = &holder.inside.borrow().image {
        let header = image.header();
        fields.insert("cluster-size".into(), header.cluster_size().into());
        fields.insert("dirty-flag".into(), (header.incompatible & header::INCOMPAT_DIRTY != 0).into());
    } else if holder.inside.borrow().file.is_some() {
        fields.insert("dirty-flag".into(), false.into());
    }
    let snapshots = node.skip_filters().inside.borrow().snapshots.clone();
    if !snapshots.is_empty() {
        fields.insert("snapshots".into(), json!(snapshots));
    }
    let inside = node.inside.borrow();
    if let Some(image) = &inside.image {
        let header = image.header();
        fields.insert("format-specific".into(), format_specific(&header));
        if let Some(name) = &header.backing_name {
            fields.insert("backing-filename".into(), name.clone().into());
            if let Some(full) = names::full_name(node, name) {
                fields.insert("full-backing-filename".into(), full.into());
            }
            if let Some(format) = header.backing_format() {
                fields.insert("backing-filename-format".into(), format.into());
            }
        }
    } else if inside.file.is_some() {
        fields.insert("format-specific".into(), json!({"type": "file", "data": {}}));
    }
    if let Some(below) = node.below().filter(|_| !flat) {
        fields.insert("backing-image".into(), self::image(names, &below, false));
    }
    told
}

/// The node that knows how the bytes are held: past filters, and past the raw format, which knows nothing.
fn holder(node: &Rc<GraphNode>) -> Rc<GraphNode> {
    let below = |node: &Rc<GraphNode>| {
        let raw = node.driver == "raw";
        let passed = node.child(Role::Shadow).or_else(|| node.child(Role::Filtered));
        passed.or_else(|| node.child(Role::File).filter(|_| raw))
    };
    let mut node = node.clone();
    while let Some(next) = below(&node) {
        node = next;
    }
    node
}

fn format_specific(header: &Header) -> Value {
    let mut data = json!({
        "compat": if header.version == 2 { "0.10" } else { "1.1" },
        "compression-type": header.compression.as_str(),
        "refcount-bits": 1u32 << header.refcount_order,
    });
    if let (Value::Object(data), true) = (&mut data, header.version >= 3) {
        data.insert("lazy-refcounts".into(), (header.compatible & header::COMPAT_LAZY_REFCOUNTS != 0).into());
        data.insert("corrupt".into(), (header.incompatible & header::INCOMPAT_CORRUPT != 0).into());
        data.insert("extended-l2".into(), header.has_extended_l2().into());
        if let Some(name) = header.data_file_name() {
            data.insert("data-file".into(), name.into());
            data.insert("data-file-raw".into(), header.data_file_is_raw().into());
        }
    }
    json!({"type": "qcow2", "data": data})
}

/// How many bytes the node's file takes on its storage.
fn actual_size(node: &Rc<GraphNode>) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut at = node.clone();
    loop {
        if at.driver.starts_with("null-") {
            return Some(0);
        }
        if at.inside.borrow().file.is_some() {
            return std::fs::metadata(at.filename()).ok().map(|metadata| metadata.blocks() * 512);
        }
        // QEMU, which has these two for protocols, tells nothing of them.
        if matches!(at.driver, "blkdebug" | "blkverify") {
            return None;
        }
        let roles = [Role::File, Role::Filtered, Role::Shadow, Role::Moment];
        let below = roles.into_iter().find_map(|role| at.child(role))?;
        at = below;
    }
}
