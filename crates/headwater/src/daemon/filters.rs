//! Filter nodes from options: throttle, copy-on-read, compress, blkdebug, blkverify.

mod rules_file;

use self::rules_file::Rules;
use super::failure::{Refusal, generic, of_error};
use super::graph::open::{Built, Options, Read, filter_link};
use super::graph::{Graph, GraphNode, Inside, Link, Role, Settings, layer};
use headwater_block::debug_event::DebugEvent;
use headwater_block::filter::blkdebug::{BlkdebugNode, BlkdebugOptions, InjectError, SetState};
use headwater_block::filter::blkverify::BlkverifyNode;
use headwater_block::filter::compress::CompressNode;
use headwater_block::filter::copy_on_read::CopyOnReadNode;
use headwater_block::filter::throttle::ThrottleNode;
use headwater_block::{Edge, Node};
use serde_json::Value;
use std::rc::Rc;

/// Opens a filter and what it is on.
///
/// # Errors
/// Those of the nodes below, and options that don't go together.
pub(super) async fn open(
    graph: &Rc<Graph>,
    driver: &str,
    settings: &mut Settings,
    level: u32,
) -> Result<Built, Refusal> {
    let key = match driver {
        "blkdebug" => "image",
        "blkverify" => "test",
        _ => "file",
    };
    // Those whose child isn't called "file" stand before it, as where QEMU lists nodes.
    let place = (key != "file").then(|| graph.nodes().len());
    let compared = match driver {
        "blkverify" => Some(graph.need_child(settings, "raw", Role::Compared, level).await?),
        _ => None,
    };
    let child = graph.need_child(settings, key, Role::Filtered, level).await?;
    if child.is_read_only() && driver == "copy-on-read" {
        return Err(generic("Block node is read-only"));
    }
    if child.is_read_only() {
        if !settings.read_only && !settings.auto_read_only && settings.options.contains_key("read-only") {
            return Err(generic("Block node is read-only"));
        }
        settings.read_only = true;
    }
    let filename = child.filename();
    let link = filter_link(key, Role::Filtered, child.clone());
    let edge = edge_of(&link)?;
    let built = |top: Rc<dyn Node>, links| Built { place, ..Built::new(top, links, filename.clone()) };
    match driver {
        "throttle" => {
            let name = settings.options.text("throttle-group").unwrap_or_default().to_owned();
            let group = graph.objects.throttle_group(&name)?;
            let throttle = ThrottleNode::new(edge, group);
            let inside = Inside { throttle: Some(throttle.clone()), ..Inside::default() };
            Ok(Built { inside, ..built(throttle, vec![link]) })
        }
        "copy-on-read" => {
            let bottom = match settings.options.text("bottom") {
                Some(name) => {
                    let bottom =
                        graph.node(name).map_err(|_| generic(format!("Bottom node '{name}' not found")))?;
                    if bottom.is_filter() {
                        return Err(generic(format!("Bottom node '{name}' is a filter")));
                    }
                    if !Graph::is_in_chain(&child, &bottom) {
                        return Err(generic(format!(
                            "Node '{name}' is not in the chain of '{}'",
                            child.name
                        )));
                    }
                    Some(layer(&bottom))
                }
                None => None,
            };
            let node = CopyOnReadNode::new(edge, bottom).map_err(|err| of_error(&err))?;
            Ok(built(node, vec![link]))
        }
        "compress" => {
            let node = CompressNode::new(edge).map_err(|_| {
                let format = match child.driver {
                    "qcow2" => "qcow2 with an external data file",
                    other => other,
                };
                generic(format!("Compression is not supported for underlying format: {format}"))
            })?;
            Ok(built(node, vec![link]))
        }
        "blkdebug" => {
            let node = BlkdebugNode::new(edge, blkdebug_options(&settings.options)?)
                .map_err(|err| of_error(&err))?;
            Ok(built(node, vec![link]))
        }
        _ => {
            let raw = compared.ok_or_else(|| generic("blkverify needs 'raw'"))?;
            let compared = filter_link("raw", Role::Compared, raw);
            let node = BlkverifyNode::new(edge, edge_of(&compared)?).map_err(|err| of_error(&err))?;
            Ok(built(node, vec![link, compared]))
        }
    }
}

/// Where requests pass a link of a filter.
///
/// # Errors
/// If it isn't one.
pub(super) fn edge_of(link: &Link) -> Result<Rc<Edge>, Refusal> {
    link.edge.clone().ok_or_else(|| generic("a filter needs an edge"))
}

/// Makes a throttle node a member of another group.
///
/// # Errors
/// If there is no such group.
pub(super) fn change_group(graph: &Graph, node: &GraphNode, group: &str) -> Result<(), Refusal> {
    let found = graph.objects.throttle_group(group)?;
    let Some(throttle) = node.inside.borrow().throttle.clone() else { return Ok(()) };
    throttle.set_group(found);
    Ok(())
}

fn blkdebug_options(options: &Options) -> Result<BlkdebugOptions, Refusal> {
    let of_file = match options.text("config") {
        Some(path) => rules_file::read(path)?,
        None => Rules::default(),
    };
    let state = |rule: &Options, key: &str| rule.number(key).and_then(|state| u32::try_from(state).ok());
    let event = |rule: &Options| {
        let name = rule.text("event").unwrap_or_default();
        name.parse::<DebugEvent>()
            .map_err(|_| generic(format!("Parameter 'event' does not accept value '{name}'")))
    };
    let rules = |key: &str, of_file: Vec<Options>| {
        let list = options.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
        of_file.into_iter().chain(list.into_iter().filter_map(|rule| match rule {
            Value::Object(rule) => Some(rule),
            _ => None,
        }))
    };
    let mut inject_error = Vec::new();
    for rule in rules("inject-error", of_file.inject_error) {
        let iotype = match rule.text("iotype") {
            Some(name) => Some(
                name.parse()
                    .map_err(|_| generic(format!("Parameter 'iotype' does not accept value '{name}'")))?,
            ),
            None => None,
        };
        inject_error.push(InjectError {
            state: state(&rule, "state").filter(|state| *state > 0),
            iotype,
            errno: rule.number("errno").and_then(|errno| i32::try_from(errno).ok()).unwrap_or(libc::EIO),
            sector: rule.number("sector"),
            once: rule.flag("once").unwrap_or(false),
            immediately: rule.flag("immediately").unwrap_or(false),
            ..InjectError::new(event(&rule)?)
        });
    }
    let mut set_state = Vec::new();
    for rule in rules("set-state", of_file.set_state) {
        set_state.push(SetState {
            event: event(&rule)?,
            state: state(&rule, "state").filter(|state| *state > 0),
            new_state: state(&rule, "new_state").unwrap_or(0),
        });
    }
    let number = |key| options.number(key).unwrap_or(0);
    Ok(BlkdebugOptions {
        inject_error,
        set_state,
        align: number("align"),
        max_transfer: number("max-transfer"),
        opt_write_zero: number("opt-write-zero"),
        max_write_zero: number("max-write-zero"),
        opt_discard: number("opt-discard"),
        max_discard: number("max-discard"),
    })
}
