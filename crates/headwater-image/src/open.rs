//! Opening a disk by name, with everything below it.
//!
//! The names are followed from the top down, each admitted by [`crate::open_gate`], until an image has no backing; then the format nodes
//! are built from the bottom up. Everything below the top is opened for reading only.

use crate::open_gate::{self, Location, Role, Trust};
use crate::probe::{self, Format};
use crate::qcow2::header::Header;
use crate::qcow2::{Children, Qcow2Node, Qcow2Options};
use crate::raw::{RawNode, RawOptions};
use headwater_block::{BufferMut, Error, ErrorKind, LocalFuture, Node, Result};
use std::os::unix::fs::MetadataExt;
use std::rc::Rc;

#[cfg(test)]
mod tests;

/// How many images a chain may have.
const MAX_DEPTH: usize = 200;

/// The default of [`OpenOptions::cache_size`].
pub const DEFAULT_CACHE_SIZE: u64 = Qcow2Options::DEFAULT_CACHE_SIZE;

/// The least memory that an image's tables get, in bytes.
const MIN_CACHE_SIZE: u64 = 64 << 10;

/// How a protocol is to open something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProtocolOptions {
    /// Nothing will be written.
    pub read_only: bool,
    /// Others may write the image meanwhile: for looking at images in use.
    pub force_share: bool,
}

/// Reaches bytes: what turns a path or a URI into a node. Images don't know any storage themselves.
pub trait ProtocolOpener {
    /// Opens what `name` names, a path (absolute or relative to the working directory) or a URI with its scheme.
    fn open<'a>(&'a self, name: &'a str, how: ProtocolOptions) -> LocalFuture<'a, Result<Rc<dyn Node>>>;
}

/// What is below the top image.
#[derive(Clone, Default)]
pub enum Below {
    /// What its header says, and so on.
    #[default]
    Follow,
    /// Nothing: what the image lacks reads as zeroes.
    Nothing,
    /// This node, whatever the header says.
    Node(Rc<dyn Node>),
}

/// How a disk is opened.
#[derive(Clone)]
pub struct OpenOptions {
    /// The format of the top image; `None` means to find out.
    pub format: Option<Format>,
    /// Nothing will be written.
    pub read_only: bool,
    /// Others may write the images meanwhile; goes with `read_only`.
    pub force_share: bool,
    /// What names found inside images may lead to.
    pub trust: Trust,
    /// How much memory in bytes the cached tables of all images of the chain take together; about half of it is the top image's.
    pub cache_size: u64,
    /// What is below the top image.
    pub below: Below,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            format: None,
            read_only: false,
            force_share: false,
            trust: Trust::default(),
            cache_size: DEFAULT_CACHE_SIZE,
            below: Below::Follow,
        }
    }
}

/// One image of a chain, as found on the way down.
#[derive(Clone)]
pub struct Layer {
    /// Where it is.
    pub location: Location,
    /// The format that it was opened as.
    pub format: Format,
    /// The node of its file.
    pub file: Rc<dyn Node>,
    /// The header, if it is a qcow2 image.
    pub header: Option<Header>,
    /// The location of its external data file and the node of that, if it has one.
    pub data_file: Option<(Location, Rc<dyn Node>)>,
}

impl Layer {
    /// How messages name it.
    pub fn name(&self) -> String {
        self.location.as_name()
    }
}

/// A disk that was opened.
pub struct OpenedImage {
    /// The node on top of the chain.
    pub node: Rc<dyn Node>,
    /// The nodes below it that were opened with it, from the top down.
    below: Vec<Rc<dyn Node>>,
    /// The images that were opened, the top first.
    pub layers: Vec<Layer>,
}

impl OpenedImage {
    /// Closes what was opened below the top image, after that was closed (see [`headwater_block::Disk::close`]). Tries all, and
    /// returns the first error.
    pub async fn close_below(self) -> Result<()> {
        let mut result = Ok(());
        for node in self.below {
            result = result.and(node.close().await);
        }
        result
    }
}

/// Opens the disk that the operator calls `name`, a path or a URI.
///
/// Errors name every step of the chain that led to them.
pub async fn open_image(
    name: &str,
    options: &OpenOptions,
    opener: &dyn ProtocolOpener,
) -> Result<OpenedImage> {
    let (layers, failure) = walk(name, options, opener).await;
    if let Some(err) = failure {
        return Err(err);
    }
    let mut nodes = build(&layers, options).await?;
    let node =
        nodes.pop().ok_or_else(|| Error::new(ErrorKind::InvalidInput, "a disk needs at least one image"))?;
    nodes.reverse();
    Ok(OpenedImage { node, below: nodes, layers })
}

/// Follows the chain of the disk that the operator calls `name`. Returns the images that could be opened, the top first, and the
/// failure that ended the walk before its end, if there was one.
pub async fn walk(
    name: &str,
    options: &OpenOptions,
    opener: &dyn ProtocolOpener,
) -> (Vec<Layer>, Option<Error>) {
    let mut walk = Walk { options, opener, layers: Vec::new(), seen: Vec::new() };
    let mut next = Some((Location::of_operator(name), options.format));
    while let Some((location, format)) = next {
        match walk.step(location, format).await {
            Ok(below) => next = below,
            Err(err) => {
                let err = walk.layers.iter().rev().fold(err, |err, layer| {
                    let already = err.to_string().starts_with(&format!("{}: ", layer.name()));
                    if already { err } else { err.context(format!("{}: its backing file", layer.name())) }
                });
                return (walk.layers, Some(err));
            }
        }
    }
    (walk.layers, None)
}

/// What the same file has in common under all its names.
#[derive(Debug, PartialEq, Eq)]
enum Identity {
    File(u64, u64),
    Uri(String),
}

struct Walk<'a> {
    options: &'a OpenOptions,
    opener: &'a dyn ProtocolOpener,
    layers: Vec<Layer>,
    seen: Vec<Identity>,
}

impl Walk<'_> {
    /// Opens the next image, and says what is below it.
    async fn step(
        &mut self,
        location: Location,
        format: Option<Format>,
    ) -> Result<Option<(Location, Option<Format>)>> {
        self.refuse_loop(&location)?;
        let top = self.layers.is_empty();
        let read_only = self.options.read_only || !top;
        let name = location.as_name();
        let file = self.open(&location, read_only).await?;
        let format = match format {
            Some(format) => format,
            None => self.find_format(&*file, &name).await?,
        };
        let mut layer = Layer { location, format, file, header: None, data_file: None };
        if format == Format::Raw {
            self.layers.push(layer);
            return Ok(None);
        }
        let header = Header::read(&*layer.file).await?;
        if header.has_data_file() {
            layer.data_file = Some(self.data_file(&layer.location, &header, read_only).await?);
        }
        let location = layer.location.clone();
        layer.header = Some(header.clone());
        self.layers.push(layer);
        if top && !matches!(self.options.below, Below::Follow) {
            return Ok(None);
        }
        let Some(backing) = &header.backing_name else { return Ok(None) };
        let below = open_gate::admit(&location, backing, Role::Backing, &self.options.trust)?;
        let format = match header.backing_format() {
            Some(format) => Some(Format::from_name(&format, &below.as_name())?),
            None => None,
        };
        Ok(Some((below, format)))
    }

    async fn open(&self, location: &Location, read_only: bool) -> Result<Rc<dyn Node>> {
        let how = ProtocolOptions { read_only, force_share: self.options.force_share };
        self.opener.open(&location.as_name(), how).await
    }

    /// Refuses what is already in the chain, and chains without an end.
    fn refuse_loop(&mut self, location: &Location) -> Result<()> {
        let identity = match location {
            Location::Path(path) => match std::fs::metadata(path) {
                Ok(metadata) => Identity::File(metadata.dev(), metadata.ino()),
                // Whoever opens it will say what is wrong.
                Err(_) => return Ok(()),
            },
            Location::Uri(uri) => Identity::Uri(uri.clone()),
        };
        let why = if self.seen.contains(&identity) {
            "is the image itself, or one above it: the chain runs in a circle".to_owned()
        } else if self.seen.len() >= MAX_DEPTH {
            format!("is number {} of the chain, which may have {MAX_DEPTH} images", self.seen.len() + 1)
        } else {
            self.seen.push(identity);
            return Ok(());
        };
        let remedy = "record the right backing file with qemu-img rebase -u";
        Err(Error::new(ErrorKind::Corrupt, format!("{} {why}; {remedy}", location.as_name())))
    }

    /// Finds out the format of an image that nobody recorded.
    async fn find_format(&self, file: &dyn Node, name: &str) -> Result<Format> {
        let head = file.read(0, BufferMut::new(probe::PROBE_LEN)).await?;
        let head = &head[..file.size().min(head.len() as u64) as usize];
        let format = probe::probe(head, name)?;
        let Some(above) = self.layers.last() else { return Ok(format) };
        if format == Format::Raw || self.options.trust.allow_probed_format {
            return Ok(format);
        }
        let recorded =
            above.header.as_ref().and_then(|header| header.backing_name.as_deref()).unwrap_or_default();
        Err(Error::new(
            ErrorKind::NotAllowed,
            format!(
                "{}: it doesn't record the format of its backing file {name}, which looks like {format}; but whoever could write to a raw \
                 disk can make it look so, and let it name any file of this host. If it is a {format} image, record that with \
                 qemu-img rebase -u -F {format} -b {recorded:?} {:?}, or allow it with --allow-probed-format",
                above.name(),
                above.name(),
            ),
        ))
    }

    /// Opens the external data file of the image at `image`.
    async fn data_file(
        &mut self,
        image: &Location,
        header: &Header,
        read_only: bool,
    ) -> Result<(Location, Rc<dyn Node>)> {
        let Some(name) = header.data_file_name() else {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("{}: its data are in another file, but it doesn't say in which", image.as_name()),
            ));
        };
        let location = open_gate::admit(image, &name, Role::DataFile, &self.options.trust)?;
        let what = || format!("{}: its data file", image.as_name());
        self.refuse_loop(&location).map_err(|err| err.context(what()))?;
        let file = self.open(&location, read_only).await.map_err(|err| err.context(what()))?;
        Ok((location, file))
    }
}

/// Builds the format nodes, from the bottom up.
async fn build(layers: &[Layer], options: &OpenOptions) -> Result<Vec<Rc<dyn Node>>> {
    let tables = layers.iter().filter(|layer| layer.header.is_some()).count() as u64;
    let mut backing = match &options.below {
        Below::Node(node) => Some(node.clone()),
        _ => None,
    };
    let mut nodes = Vec::new();
    for (depth, layer) in layers.iter().enumerate().rev() {
        let read_only = options.read_only || depth > 0;
        let node: Rc<dyn Node> = if layer.header.is_none() {
            RawNode::new(layer.file.clone(), RawOptions { read_only, ..RawOptions::default() })?
        } else {
            let cache_size = match (depth, tables) {
                (0, 1) => options.cache_size,
                (0, _) => options.cache_size / 2,
                (_, tables) => options.cache_size / 2 / (tables - 1).max(1),
            };
            let data_file = layer.data_file.as_ref().map(|(_, node)| node.clone());
            let children = Children { backing: backing.take(), data_file };
            let options = Qcow2Options {
                read_only,
                cache_size: cache_size.max(MIN_CACHE_SIZE),
                ..Qcow2Options::default()
            };
            Qcow2Node::open(layer.file.clone(), children, options).await?
        };
        backing = Some(node.clone());
        nodes.push(node);
    }
    Ok(nodes)
}
