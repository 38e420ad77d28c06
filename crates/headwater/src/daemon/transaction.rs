//! `transaction`: several snapshots and backups at one moment, or none.
//!
//! All who use nodes are held back until everything is done, or undone. Jobs that it begins start when all of it has succeeded. With completion-mode
//! `grouped` they end together.

use super::failure::{Refusal, generic};
use super::graph::Graph;
use super::graph::open::{Options, Read};
use super::jobs::{Jobs, backup, drive};
use super::{internal_snapshot, snapshot};
use headwater_job::Group;
use serde_json::Value;
use std::rc::Rc;

/// Carries out the actions of a transaction.
///
/// # Errors
/// Those of the first that fails, and actions that aren't supported. Then nothing has changed.
pub(super) async fn run(graph: &Rc<Graph>, jobs: &Rc<Jobs>, args: &Options) -> Result<(), Refusal> {
    let actions: Vec<Options> = args
        .get("actions")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|action| action.as_object().cloned())
        .collect();
    let properties = args.object("properties").cloned().unwrap_or_default();
    let grouped = properties.text("completion-mode") == Some("grouped");
    for action in &actions {
        check(action.text("type").unwrap_or_default(), grouped)?;
    }
    let group = grouped.then(Group::new);
    // From here until all is done or undone.
    let held = graph.hold_everyone().await;
    let (mut overlays, mut internal, mut plans) = (Vec::new(), Vec::new(), Vec::new());
    let mut taken = Ok(());
    for action in &actions {
        let data = action.object("data").cloned().unwrap_or_default();
        taken = match action.text("type").unwrap_or_default() {
            "abort" => Err(generic("Transaction aborted using Abort action")),
            "blockdev-backup" => {
                backup::plan(graph, jobs, &data, group.as_ref()).await.map(|plan| plans.push(plan))
            }
            "drive-backup" => {
                drive::plan_backup(graph, jobs, &data, group.as_ref()).await.map(|plan| plans.push(plan))
            }
            "blockdev-snapshot-internal-sync" => {
                internal_snapshot::take(graph, &data).await.map(|one| internal.push(one))
            }
            kind => snapshot::take(graph, kind, &data, &mut overlays).await,
        };
        if taken.is_err() {
            break;
        }
    }
    if taken.is_err() {
        for plan in plans.drain(..) {
            plan.undo(jobs).await;
        }
        for one in internal.into_iter().rev() {
            internal_snapshot::undo(one).await;
        }
    }
    let result = snapshot::finish(graph, taken, overlays).await;
    drop(held);
    for plan in plans {
        jobs.start(plan).await;
    }
    result
}

/// Whether an action can be part of such a transaction.
fn check(kind: &str, grouped: bool) -> Result<(), Refusal> {
    match kind {
        "blockdev-backup" | "drive-backup" => Ok(()),
        "blockdev-snapshot" | "blockdev-snapshot-sync" | "blockdev-snapshot-internal-sync" | "abort"
            if grouped =>
        {
            Err(generic(format!(
                "Action '{kind}' does not support transaction property completion-mode = grouped"
            )))
        }
        "blockdev-snapshot" | "blockdev-snapshot-sync" | "blockdev-snapshot-internal-sync" | "abort" => {
            Ok(())
        }
        _ => Err(generic(format!("Transaction action '{kind}' is not supported"))),
    }
}
