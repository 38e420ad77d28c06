//! Images that a command makes beside what it is asked for: the overlay of a snapshot, the target of a backup or a mirror.

use super::failure::{Refusal, errno_text, generic, of_error};
use super::graph::{Graph, GraphNode};
use super::jobs::stream::recorded_name;
use headwater_block::{Error, ErrorKind, Node};
use headwater_image::Format;
use headwater_image::qcow2::create::{self, CreateOptions};
use headwater_storage::file::{Cache, FileNode, FileOptions};
use std::rc::Rc;

/// Makes an empty image of `size` bytes in the file `filename`, on top of `backing` if given. What is there is made empty, if nobody else uses it.
///
/// # Errors
/// If images of that format aren't made here, and those of the file.
pub(super) async fn make(
    graph: &Rc<Graph>,
    filename: &str,
    format: &str,
    size: u64,
    backing: Option<&Rc<GraphNode>>,
) -> Result<(), Refusal> {
    check_format(format, backing.is_some())?;
    let backing = backing.map(|backing| {
        let image = backing.skip_filters();
        let format = Format::from_name(image.driver, &image.filename()).unwrap_or(Format::Raw);
        (recorded_name(filename, &graph.names_for_headers().told(&image)), format)
    });
    let options = FileOptions { cache: Cache::Buffered, ..FileOptions::default() };
    let make = async {
        let file = match FileNode::create(&graph.engine, filename, options) {
            // As `qemu-img create` would.
            Err(err) if err.kind() == ErrorKind::AlreadyExists => {
                let file = FileNode::open(&graph.engine, filename, options)?;
                file.resize(0).await?;
                file
            }
            made => made?,
        };
        if format == "qcow2" {
            create::create(&*file, &CreateOptions { backing, ..CreateOptions::new(size) }).await?;
        } else {
            file.resize(size).await?;
        }
        file.close().await
    };
    make.await.map_err(|err| cannot_create(filename, &err))
}

/// A failure to make it, in the words that scripts look for.
fn cannot_create(filename: &str, err: &Error) -> Refusal {
    match err.os_code() {
        Some(code) => generic(format!("Could not create '{filename}': {}", errno_text(code))),
        None => of_error(err),
    }
}

/// Refuses formats that aren't made here. A file is an image without a format.
fn check_format(format: &str, backing: bool) -> Result<(), Refusal> {
    match format {
        "qcow2" => Ok(()),
        "raw" | "file" if backing => {
            Err(generic(format!("Backing file not supported for file format '{format}'")))
        }
        "raw" | "file" => Ok(()),
        "throttle" | "copy-on-read" | "compress" | "copy-before-write" | "snapshot-access" | "blkdebug"
        | "blkverify" | "null-co" | "null-aio" => {
            Err(generic(format!("Format driver '{format}' does not support image creation")))
        }
        _ => Err(generic(format!("Unknown file format '{format}'"))),
    }
}
