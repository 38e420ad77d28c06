//! The nodes that an image's header names: its backing file and its data file.
//!
//! What a header says is not what the operator said: [`headwater_image::open_gate`] decides whether a name may be followed. What may be
//! is then opened by options, like everything else.

use super::GraphNode;
use super::open::Options;
use crate::daemon::failure::{Refusal, generic, of_error};
use crate::daemon::sources;
use headwater_block::{BufferMut, ErrorKind};
use headwater_image::open_gate::{self, Location, Role, Trust};
use headwater_image::probe::{self, Format};
use headwater_image::qcow2::header::Header;
use serde_json::{Value, json};
use std::path::Path;

/// The first bytes of a qcow2 image.
const MAGIC: &[u8] = b"QFI\xfb";

/// The header of the qcow2 image in `file`.
///
/// # Errors
/// If there is none, or it is broken.
pub(super) async fn read(file: &GraphNode) -> Result<Header, Refusal> {
    let top = file.top();
    let start = top.read(0, BufferMut::new(MAGIC.len())).await.map_err(|err| of_error(&err))?;
    if &start[..] != MAGIC {
        return Err(generic("Image is not in qcow2 format"));
    }
    if top.size() < 72 {
        return Err(generic("qcow2 header too short"));
    }
    Header::read(&*top).await.map_err(|err| of_error(&err))
}

/// How to open the backing file that a header names; none if it names none.
///
/// # Errors
/// If it may not be opened, or its format is unknown.
pub(super) async fn backing_options(
    header: &Header,
    file: &GraphNode,
    trust: &Trust,
) -> Result<Option<Options>, Refusal> {
    let Some(name) = &header.backing_name else { return Ok(None) };
    let image = Location::of_operator(&file.filename());
    let location = open_gate::admit(&image, name, Role::Backing, trust).map_err(|err| match err.kind() {
        ErrorKind::NotFound => {
            let path = match name.strip_prefix("file:") {
                Some(path) => path.into(),
                None => Path::new(&file.filename()).parent().unwrap_or(Path::new("")).join(name),
            };
            let path = path.display();
            generic(format!(
                "Could not open backing file: Could not open '{path}': No such file or directory"
            ))
        }
        _ => of_error(&err),
    })?;
    let format = match header.backing_format() {
        Some(format) => format,
        None => guess_format(&location, trust)?,
    };
    Ok(Some(image_options(&location, &format)?))
}

/// As [`backing_options`] for the external data file.
///
/// # Errors
/// If it may not be opened.
pub(super) fn data_file_options(
    header: &Header,
    file: &GraphNode,
    trust: &Trust,
) -> Result<Option<Options>, Refusal> {
    if !header.has_data_file() {
        return Ok(None);
    }
    let name = header.data_file_name().ok_or_else(|| {
        generic(format!("{}: its data are in another file, but it doesn't say in which", file.filename()))
    })?;
    let image = Location::of_operator(&file.filename());
    let location = open_gate::admit(&image, &name, Role::DataFile, trust).map_err(|err| of_error(&err))?;
    file_options(&location).map(Some)
}

fn image_options(location: &Location, format: &str) -> Result<Options, Refusal> {
    let file = file_options(location)?;
    if file.get("driver").is_some_and(|driver| driver == format) {
        return Ok(file);
    }
    match json!({"driver": format, "file": file}) {
        Value::Object(options) => Ok(options),
        _ => Err(generic("no options")),
    }
}

/// How to open what is there.
///
/// # Errors
/// If it is an address of a kind that isn't known.
pub(in crate::daemon) fn file_options(location: &Location) -> Result<Options, Refusal> {
    match location {
        Location::Path(path) => {
            use std::os::unix::fs::FileTypeExt;
            let device = std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
            let mut options = Options::new();
            options.insert("driver".into(), if device { "host_device" } else { "file" }.into());
            options.insert("filename".into(), path.to_string_lossy().into());
            Ok(options)
        }
        Location::Uri(uri) => sources::uri_options(uri),
    }
}

/// The format of a backing file that isn't recorded: raw, unless the operator lets it be guessed.
fn guess_format(location: &Location, trust: &Trust) -> Result<String, Refusal> {
    let Location::Path(path) = location else { return Ok("raw".into()) };
    let mut head = Vec::new();
    let cannot = |err| generic(format!("Could not open '{}': {err}", path.display()));
    let file = std::fs::File::open(path).map_err(cannot)?;
    std::io::Read::read_to_end(&mut std::io::Read::take(file, probe::PROBE_LEN as u64), &mut head)
        .map_err(cannot)?;
    let format = probe::probe(&head, &path.to_string_lossy()).map_err(|err| of_error(&err))?;
    if format == Format::Raw || trust.allow_probed_format {
        return Ok(format.to_string());
    }
    Err(generic(format!(
        "{}: the image above doesn't record its format, and it looks like {format}, which whoever could write to a raw disk can make it do; \
         give the backing node in the options, or record the format with qemu-img rebase -u -F {format}",
        path.display()
    )))
}
