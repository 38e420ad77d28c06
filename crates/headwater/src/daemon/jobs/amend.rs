//! `x-blockdev-amend`: changes an image in use, as a job. What QEMU's can change is how an image is encrypted, and none is here; so the job of an image that
//! is as it should be has nothing to do, and every other one fails.

use super::{Jobs, Plan};
use crate::daemon::failure::{Refusal, generic};
use crate::daemon::graph::Graph;
use crate::daemon::graph::open::{Options, Read};
use headwater_block::{Error, ErrorKind};
use std::rc::Rc;

/// Starts the job as the arguments of `x-blockdev-amend` say.
///
/// # Errors
/// If the id is taken, or it isn't such an image.
pub(in crate::daemon) async fn start(
    graph: &Rc<Graph>,
    jobs: &Rc<Jobs>,
    args: &Options,
) -> Result<(), Refusal> {
    let name = args.text("node-name").unwrap_or_default();
    let node =
        graph.find(name).ok_or_else(|| generic(format!("Cannot find device='' nor node-name='{name}'")))?;
    let options = args.object("options").cloned().unwrap_or_default();
    if options.text("driver") != Some(node.driver) {
        return Err(generic("x-blockdev-amend doesn't support changing the block driver"));
    }
    if node.driver != "qcow2" {
        return Err(generic("Driver does not support x-blockdev-amend"));
    }
    let id = jobs.check_id(args.text("job-id"))?.to_owned();
    let encrypts = options.contains_key("encrypt");
    let work = async move {
        if encrypts {
            return Err(Error::new(ErrorKind::Unsupported, "image is not encrypted, can't amend"));
        }
        Ok(())
    };
    jobs.start(Plan::task(graph, "amend", id, work)).await;
    Ok(())
}
