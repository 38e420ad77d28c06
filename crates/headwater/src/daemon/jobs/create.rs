//! `blockdev-create`: makes an empty image, as a job.

use super::{Hold, JobArgs, Jobs, Plan};
use crate::daemon::failure::{Refusal, cannot_open, generic, of_error};
use crate::daemon::graph::Graph;
use crate::daemon::graph::open::{Options, Read};
use crate::daemon::graph::rights::{Doing, Rights};
use headwater_block::{Error, ErrorKind, Node};
use headwater_image::Format;
use headwater_image::qcow2::create::{self, CreateOptions};
use headwater_image::qcow2::header::Compression;
use headwater_job::OnError;
use headwater_storage::file::{Cache, FileNode, FileOptions};
use serde_json::Value;
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
    let job = JobArgs {
        id: id.clone(),
        speed: 0,
        on_error: OnError::Report,
        auto_finalize: true,
        auto_dismiss: false,
        kept: None,
    };
    let hold = Hold::new(graph, "create", &id);
    let work = {
        let graph = graph.clone();
        async move {
            let made = match driver.as_str() {
                "file" => file(&graph, &options).await,
                _ => qcow2(&graph, &options).await,
            };
            graph.collect().await;
            made.map_err(|refusal| Error::new(ErrorKind::Io, refusal.desc))
        }
    };
    let (handle, work) = headwater_job::task(work, true);
    jobs.start(Plan {
        kind: "create",
        args: job,
        len: 1,
        follows: false,
        hold,
        handle,
        work: Box::pin(work),
        write_through: None,
    })
    .await;
    Ok(())
}

async fn file(graph: &Rc<Graph>, options: &Options) -> Result<(), Refusal> {
    let filename = options.text("filename").unwrap_or_default();
    let size = options.number("size").unwrap_or(0);
    let preallocation = options.text("preallocation").unwrap_or("off");
    if !matches!(preallocation, "off" | "falloc" | "full") {
        return Err(generic(format!("Unsupported preallocation mode '{preallocation}'")));
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
        file.resize(size).await?;
        if preallocation != "off" && size > 0 {
            file.write_zeroes(0, size, headwater_block::ZeroFlags::default()).await?;
        }
        file.close().await
    };
    make.await.map_err(|err| of_error(&err))
}

async fn qcow2(graph: &Rc<Graph>, options: &Options) -> Result<(), Refusal> {
    let file = match options.get("file") {
        Some(Value::String(name)) => graph.any(name)?,
        Some(Value::Object(inline)) => graph.add(inline.clone(), false).await?,
        _ => return Err(generic("Parameter 'file' is missing")),
    };
    for unsupported in ["encrypt", "data-file", "data-file-raw"] {
        if options.contains_key(unsupported) {
            return Err(generic(format!("Option '{unsupported}' is not supported")));
        }
    }
    if options.text("preallocation").is_some_and(|mode| mode != "off") {
        return Err(generic("Preallocation of qcow2 images is not supported"));
    }
    let rights = Rights { does: Doing::READ.and(Doing::WRITE).and(Doing::RESIZE), bears: Doing::ALL };
    let root = graph.attach(&file, ("image creation", "file"), rights, false).await?;
    if options.contains_key("backing-fmt") && !options.contains_key("backing-file") {
        return Err(generic("Backing format cannot be used without backing file"));
    }
    if !options.number("size").unwrap_or(0).is_multiple_of(512) {
        return Err(generic("Image size must be a multiple of 512 bytes"));
    }
    if options.flag("lazy-refcounts") == Some(true) {
        return Err(generic("Lazy refcounts are not supported"));
    }
    let v2 = options.text("version") == Some("v2");
    let backing = match options.text("backing-file") {
        Some(name) => {
            let format = options.text("backing-fmt").unwrap_or("raw");
            Some((name.to_owned(), Format::from_name(format, name).map_err(|err| of_error(&err))?))
        }
        None => None,
    };
    let create = CreateOptions {
        version: if v2 { 2 } else { 3 },
        cluster_size: options.number("cluster-size").unwrap_or(65536),
        refcount_bits: options
            .number("refcount-bits")
            .and_then(|bits| u32::try_from(bits).ok())
            .unwrap_or(16),
        extended_l2: options.flag("extended-l2").unwrap_or(false),
        compression: if options.text("compression-type") == Some("zstd") {
            Compression::Zstd
        } else {
            Compression::Zlib
        },
        backing,
        ..CreateOptions::new(options.number("size").unwrap_or(0))
    };
    let top = file.top();
    let made = async {
        top.resize(0).await?;
        create::create(&*top, &create).await?;
        top.flush().await
    }
    .await;
    drop(root);
    made.map_err(|err| of_error(&err))
}
