//! `blockdev-create`: makes an empty image, as a job.

mod qcow2;

use super::{Jobs, Plan};
use crate::daemon::failure::{Refusal, cannot_open, generic, of_error};
use crate::daemon::graph::Graph;
use crate::daemon::graph::open::{Options, Read};
use headwater_block::{Error, ErrorKind, Node};
use headwater_image::qcow2::create::{self, Preallocation};
use headwater_storage::file::{Cache, FileNode, FileOptions};
use std::rc::Rc;

/// Starts a create job as the arguments of `blockdev-create` say.
///
/// # Errors
/// If the id is taken, or no such image can be made.
pub(in crate::daemon) async fn start(
    graph: &Rc<Graph>,
    jobs: &Rc<Jobs>,
    args: &Options,
) -> Result<(), Refusal> {
    let id = jobs.check_id(args.text("job-id"))?.to_owned();
    let options = args.object("options").cloned().unwrap_or_default();
    let driver = options.text("driver").unwrap_or_default().to_owned();
    if !matches!(driver.as_str(), "file" | "qcow2") {
        return Err(generic("Driver does not support blockdev-create"));
    }
    let work = {
        let graph = graph.clone();
        async move {
            let made = match driver.as_str() {
                "file" => file(&graph, &options).await,
                _ => qcow2::make(&graph, &options).await,
            };
            graph.collect().await;
            made.map_err(|refusal| Error::new(ErrorKind::Io, refusal.desc))
        }
    };
    jobs.start(Plan::task(graph, "create", id, work)).await;
    Ok(())
}

/// The mode of preallocation that is asked for.
fn preallocation(options: &Options) -> Preallocation {
    options.text("preallocation").and_then(Preallocation::from_name).unwrap_or_default()
}

async fn file(graph: &Rc<Graph>, options: &Options) -> Result<(), Refusal> {
    let filename = options.text("filename").unwrap_or_default();
    let size = options.number("size").unwrap_or(0);
    let preallocation = preallocation(options);
    if preallocation == Preallocation::Metadata {
        return Err(generic("Unsupported preallocation mode 'metadata'"));
    }
    // As `O_CREAT | O_TRUNC` would: what is there is made empty, once nobody else uses it.
    let file_options = FileOptions { cache: Cache::Buffered, ..FileOptions::default() };
    let file = match FileNode::create(&graph.engine, filename, file_options) {
        Err(err) if err.kind() == ErrorKind::AlreadyExists => {
            FileNode::open(&graph.engine, filename, file_options)
        }
        made => made,
    };
    let file = file.map_err(|err| cannot_open(filename, &err))?;
    let make = async {
        file.resize(0).await?;
        create::set_size(&*file, size, preallocation).await?;
        file.close().await
    };
    make.await.map_err(|err| of_error(&err))
}
