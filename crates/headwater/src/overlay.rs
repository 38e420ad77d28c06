//! DISK: the overlay that a stream works on, made or found again.
//!
//! What is recorded in the image decides: no backing means that everything is there already; a backing that is SOURCE means that work goes
//! on; anything else is somebody else's image, which is left alone.

use crate::cli::stream::StreamArgs;
use crate::display::Display;
use crate::failure::{Failure, Outcome};
use crate::opener::{Access, Opener};
use crate::size::human;
use crate::source::is_uri;
use headwater_block::{Error, ErrorKind, Node};
use headwater_image::open::{Below, Layer, OpenedImage};
use headwater_image::open_gate::Location;
use headwater_image::probe::Format;
use headwater_image::qcow2::create::CreateOptions;
use headwater_image::qcow2::header::Header;
use headwater_job::window::Bounds;
use headwater_job::{Base, Link};
use headwater_nbd::NbdUri;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// An overlay, open with its chain.
pub struct Overlay {
    /// The overlay's node.
    pub top: Rc<dyn Node>,
    /// What remains below it, if not everything is streamed.
    pub base: Option<Base>,
    /// Nothing is left to be streamed.
    pub complete: bool,
    /// It was made just now.
    pub made: bool,
    /// What its header calls its backing.
    pub link: Option<String>,
    /// The storage that it lies on.
    pub file: Rc<dyn Node>,
    /// The storage that is streamed from, by name, the upper layers first.
    pub sources: Vec<(String, Rc<dyn Node>)>,
}

/// Opens DISK, which is made if it isn't there.
///
/// # Errors
/// If SOURCE or DISK can't be opened, or they don't belong together.
pub async fn open(args: &StreamArgs, opener: &Opener, display: &Display) -> Outcome<Overlay> {
    let disk = args.disk.display();
    if is_uri(&args.disk.to_string_lossy()) {
        return Err(Failure::usage(format!(
            "{disk} is an address; DISK is a local file, into which SOURCE streams"
        )));
    }
    if !is_uri(&args.source) && is_same_file(Path::new(&args.source), &args.disk) {
        return Err(Failure::new(format!("{disk} is SOURCE itself; choose another name for DISK")));
    }
    match args.disk.symlink_metadata() {
        Ok(_) => resume(args, opener, display).await,
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => make(args, opener, display).await,
        Err(err) => Err(Failure::new(format!("cannot open {disk}: {err}"))),
    }
}

/// Makes DISK on top of SOURCE.
async fn make(args: &StreamArgs, opener: &Opener, display: &Display) -> Outcome<Overlay> {
    let source = opener
        .open_with(&args.source, args.copy.source_format.map(Into::into), Access::Read, Below::Follow)
        .await?;
    let base = base(args, &source)?;
    // Round trips to a source that is far away pass while the overlay is made.
    source.node.expect(0..read_ahead(args));
    let mut options = CreateOptions::new(source.node.size());
    options.cluster_size = args.cluster_size;
    options.backing = Some((recorded_name(&args.source, &args.disk)?, source.layers[0].format));
    opener.create_qcow2(&args.disk, &options).await?;
    display.say(&format!(
        "made {}, {}, backed by {}",
        args.disk.display(),
        human(source.node.size()),
        args.source
    ));
    let link = options.backing.map(|(name, _)| name);
    Ok(Overlay { made: true, ..open_over(args, opener, source, base, link).await? })
}

/// How much of SOURCE is asked for before the job begins, in bytes. Nothing where the job has another order or is not to take the whole line, and where guests' first reads
/// would wait behind it.
pub fn read_ahead(args: &StreamArgs) -> u64 {
    let begins = args.disk.symlink_metadata().is_err();
    let alone = args.serve.is_empty() && args.copy.rate == 0;
    // What a directory keeps of SOURCE need not be asked for.
    if begins && alone && args.copy.boot_trace.is_none() && args.copy.cache_dir.is_none() {
        Bounds::REMOTE.start
    } else {
        0
    }
}

/// Opens a DISK that is there.
async fn resume(args: &StreamArgs, opener: &Opener, display: &Display) -> Outcome<Overlay> {
    let disk = args.disk.display();
    let header = header(args, opener).await?;
    let Some(recorded) = header.backing_name.clone() else {
        let name = args.disk.to_string_lossy();
        let opened = opener.open_with(&name, Some(Format::Qcow2), Access::Write, Below::Follow).await?;
        display.say(&format!("{disk} is complete: it has no backing, so nothing is left to be streamed"));
        return Ok(overlay(opened, None, None, Vec::new(), true));
    };
    if let Some(wanted) = &args.base
        && is_same_image(&recorded, &args.disk, wanted)
    {
        let format = recorded_format(&header, &recorded)?;
        let source = opener.open_with(wanted, format, Access::Read, Below::Follow).await?;
        let overlay = open_over(args, opener, source, None, Some(recorded)).await?;
        display.say(&format!("{disk} is complete: it stands on {wanted}, so nothing is left to be streamed"));
        return Ok(Overlay { complete: true, ..overlay });
    }
    if !is_same_image(&recorded, &args.disk, &args.source) {
        return Err(Failure::new(format!(
            "{disk} exists and its backing is {recorded}, not {}; give that as SOURCE, or choose another DISK",
            args.source
        )));
    }
    let format = recorded_format(&header, &recorded)?;
    if let (Some(asked), Some(format)) = (args.copy.source_format.map(Format::from), format)
        && asked != format
    {
        return Err(Failure::new(format!(
            "{disk} says that its backing is {format}; leave --source-format {asked} out"
        )));
    }
    let source = opener.open_with(&args.source, format, Access::Read, Below::Follow).await?;
    // What is lacking is not known yet.
    source.node.expect(0..0);
    let base = base(args, &source)?;
    let overlay = open_over(args, opener, source, base, Some(recorded)).await?;
    display.say(&format!("{disk} goes on where it stopped"));
    Ok(overlay)
}

/// The header of DISK.
async fn header(args: &StreamArgs, opener: &Opener) -> Outcome<Header> {
    let name = args.disk.to_string_lossy();
    let (mut layers, failure) = opener.walk(&name, None, Below::Nothing).await;
    match (layers.pop(), failure) {
        (Some(Layer { header: Some(header), file, .. }), None) => {
            file.close().await?;
            Ok(header)
        }
        (_, Some(err)) => Err(err.into()),
        _ => Err(Failure::new(format!(
            "{name} exists and is no qcow2 image, so it is left alone; remove it, or choose another name for DISK"
        ))),
    }
}

fn recorded_format(header: &Header, recorded: &str) -> Outcome<Option<Format>> {
    let format = header.backing_format().map(|name| Format::from_name(&name, recorded));
    Ok(format.transpose()?)
}

/// Opens DISK for writing, on top of `source`.
async fn open_over(
    args: &StreamArgs,
    opener: &Opener,
    source: OpenedImage,
    base: Option<Base>,
    link: Option<String>,
) -> Outcome<Overlay> {
    let name = args.disk.to_string_lossy();
    // The nodes are as many as the layers, and the base is the last that isn't streamed.
    let above = |base: &Base| {
        let nodes = std::iter::successors(Some(source.node.clone()), |node| node.backing());
        nodes.take_while(|node| !Rc::ptr_eq(node, &base.node)).count()
    };
    let streamed = base.as_ref().map_or(source.layers.len(), above);
    let mut sources = Vec::new();
    for layer in source.layers.iter().take(streamed) {
        sources.push((layer.name(), layer.file.clone()));
        sources.extend(layer.data_file.iter().map(|(at, node)| (at.as_name(), node.clone())));
    }
    let below = Below::Node(source.node);
    let opened = opener.open_with(&name, Some(Format::Qcow2), Access::Write, below).await?;
    Ok(overlay(opened, base, link, sources, false))
}

fn overlay(
    opened: OpenedImage,
    base: Option<Base>,
    link: Option<String>,
    sources: Vec<(String, Rc<dyn Node>)>,
    complete: bool,
) -> Overlay {
    let file = opened.layers[0].file.clone();
    Overlay { top: opened.node, base, complete, made: false, link, file, sources }
}

/// Finds `--base` among the images below SOURCE.
fn base(args: &StreamArgs, source: &OpenedImage) -> Outcome<Option<Base>> {
    if args.copy.mirrors.verify.is_some() && (source.layers.len() > 1 || source.layers[0].data_file.is_some())
    {
        return Err(Failure::new(format!(
            "{} stands on other files, which the manifest of --verify says nothing of; verify an image that stands alone",
            args.source
        )));
    }
    let Some(wanted) = &args.base else { return Ok(None) };
    let is_wanted = |layer: &Layer| match &layer.location {
        Location::Path(path) => !is_uri(wanted) && is_same_file(path, Path::new(wanted)),
        Location::Uri(uri) => is_same_uri(uri, wanted),
    };
    let depth = source.layers.iter().position(is_wanted);
    let nodes = std::iter::successors(Some(source.node.clone()), |node| node.backing());
    match depth {
        Some(0) => {
            Err(Failure::new(format!("--base {wanted} is SOURCE itself, so there is nothing to stream")))
        }
        Some(depth) => {
            let name = recorded_name(wanted, &args.disk)?;
            let format = source.layers[depth].format.to_string();
            Ok(nodes
                .zip(0..)
                .find(|(_, at)| *at == depth)
                .map(|(node, _)| Base { node, link: Link { name, format } }))
        }
        None => {
            let chain: Vec<String> = source.layers.iter().map(Layer::name).collect();
            let message =
                format!("--base {wanted} is not in the chain of {}: {}", args.source, chain.join(", "));
            Err(Error::new(ErrorKind::InvalidInput, message).into())
        }
    }
}

/// What DISK's header calls `image`: a URI as it is, a file in DISK's directory by its name, other files by their absolute path. Other
/// programs find it under this name as well.
fn recorded_name(image: &str, disk: &Path) -> Outcome<String> {
    if is_uri(image) {
        return Ok(image.to_owned());
    }
    let cannot =
        |what: &Path, err| Failure::new(format!("cannot find out where {} is: {err}", what.display()));
    let path = std::fs::canonicalize(image).map_err(|err| cannot(Path::new(image), err))?;
    let directory = directory_of(disk);
    let directory = std::fs::canonicalize(&directory).map_err(|err| {
        Failure::new(format!(
            "cannot make {}: its directory {} can't be found: {err}",
            disk.display(),
            directory.display()
        ))
    })?;
    let name = match path.file_name() {
        Some(name) if path.parent() == Some(&directory) => Path::new(name),
        _ => &path,
    };
    let Some(name) = name.to_str() else {
        return Err(Failure::new(format!(
            "{}: a qcow2 image can record names of valid UTF-8 only; rename it",
            path.display()
        )));
    };
    // QEMU would take what is before a colon for a protocol.
    Ok(if name.contains(':') && !name.starts_with('/') { format!("./{name}") } else { name.to_owned() })
}

/// The directory that a name in DISK starts from.
fn directory_of(disk: &Path) -> PathBuf {
    match disk.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// True if `recorded`, a name in the header of `disk`, means the image that the operator calls `named`.
fn is_same_image(recorded: &str, disk: &Path, named: &str) -> bool {
    match (is_uri(recorded), is_uri(named)) {
        (true, true) => is_same_uri(recorded, named),
        (false, false) => is_same_file(&directory_of(disk).join(recorded), Path::new(named)),
        _ => false,
    }
}

/// True if both lead to one file that exists.
fn is_same_file(a: &Path, b: &Path) -> bool {
    match (std::fs::metadata(a), std::fs::metadata(b)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// True if both are the same address, however it is written.
fn is_same_uri(a: &str, b: &str) -> bool {
    a == b || matches!((a.parse::<NbdUri>(), b.parse::<NbdUri>()), (Ok(a), Ok(b)) if a == b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_beside_the_disk_are_recorded_by_name_and_others_by_path() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().canonicalize().unwrap().join(name);
        std::fs::create_dir(at("sub")).unwrap();
        for name in ["a.raw", "sub/b.raw", "nbd:c"] {
            std::fs::write(at(name), "").unwrap();
        }
        let name = |image: &str, disk: &str| recorded_name(at(image).to_str().unwrap(), &at(disk)).unwrap();
        assert_eq!(name("a.raw", "disk"), "a.raw");
        assert_eq!(name("sub/../a.raw", "disk"), "a.raw");
        assert_eq!(name("nbd:c", "disk"), "./nbd:c");
        assert_eq!(name("sub/b.raw", "disk"), at("sub/b.raw").to_str().unwrap());
        assert_eq!(recorded_name("nbd://h/x", Path::new("disk")).unwrap(), "nbd://h/x");
        assert!(recorded_name(at("none").to_str().unwrap(), &at("disk")).is_err());
    }

    #[test]
    fn one_image_has_many_names() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::write(at("a"), "").unwrap();
        std::os::unix::fs::symlink("a", at("b")).unwrap();
        assert!(is_same_image("a", &at("disk"), at("b").to_str().unwrap()));
        assert!(!is_same_image("none", &at("disk"), at("none").to_str().unwrap()));
        assert!(is_same_image("nbd://h/x", &at("disk"), "nbd://h:10809/x"));
        assert!(!is_same_image("nbd://h/x", &at("disk"), "nbd://h/y"));
    }
}
