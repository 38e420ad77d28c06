//! From options, as `--blockdev` and `blockdev-add` take them, to nodes.
//!
//! The options were checked against the schema before they come here: what is there has the right type. A child is named by the node-name of
//! a node that exists, or defined in place; what a definition leaves open it takes from the node above it.

use super::settings::{disk_options, settings};
use super::{Graph, GraphNode, Inside, Link, Role, Settings, header};
use crate::daemon::failure::{Refusal, cannot_open, generic, of_error};
use crate::daemon::{filters, fleecing};
use crate::daemon::{object_sources, replicas, sources};
use headwater_block::null::{NullDriver, NullNode, NullOptions};
use headwater_block::{Disk, Edge, LocalFuture, Node};
use headwater_image::qcow2::{Children, Qcow2Node, Qcow2Options};
use headwater_image::raw::{RawNode, RawOptions};
use headwater_storage::file::{Cache, Demand, FileNode, FileOptions, Locking};
use headwater_storage::workers::THREADS;
use serde_json::{Map, Value};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// Options of a node.
pub(in crate::daemon) type Options = Map<String, Value>;

/// How deep definitions may be nested, and how long a chain may be that headers name.
const MOST_LEVELS: u32 = 200;

/// What a node takes from the one above it, where its own options say nothing.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::daemon) struct Inherited {
    pub(in crate::daemon) read_only: bool,
    pub(in crate::daemon) auto_read_only: bool,
    pub(in crate::daemon) direct: bool,
    pub(in crate::daemon) no_flush: bool,
    pub(in crate::daemon) force_share: bool,
    /// Discards are passed on unless the options say otherwise.
    pub(in crate::daemon) unmap: bool,
    pub(in crate::daemon) level: u32,
}

impl Inherited {
    pub(super) fn below(settings: &Settings, role: Role, level: u32) -> Self {
        let backing = role == Role::Backing;
        Self {
            read_only: backing || settings.read_only,
            auto_read_only: !backing,
            direct: settings.direct,
            no_flush: settings.no_flush,
            force_share: settings.force_share,
            unmap: !backing,
            level: level + 1,
        }
    }
}

/// Reads options by name.
pub(in crate::daemon) trait Read {
    /// A string.
    fn text(&self, key: &str) -> Option<&str>;
    /// A switch.
    fn flag(&self, key: &str) -> Option<bool>;
    /// A number that isn't negative.
    fn number(&self, key: &str) -> Option<u64>;
    /// A nested object.
    fn object(&self, key: &str) -> Option<&Options>;
}

impl Read for Options {
    fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    fn flag(&self, key: &str) -> Option<bool> {
        self.get(key).and_then(Value::as_bool)
    }

    fn number(&self, key: &str) -> Option<u64> {
        self.get(key).and_then(Value::as_u64)
    }

    fn object(&self, key: &str) -> Option<&Options> {
        self.get(key).and_then(Value::as_object)
    }
}

/// A node that has been opened, before it has a name in the graph.
pub(in crate::daemon) struct Built {
    pub(in crate::daemon) top: Rc<dyn Node>,
    pub(in crate::daemon) links: Vec<Link>,
    pub(in crate::daemon) filename: String,
    pub(in crate::daemon) inside: Inside,
    /// A file can grow under an image.
    pub(in crate::daemon) growable: bool,
    /// Where among all nodes it stands: before those that were opened because its header names them.
    pub(in crate::daemon) place: Option<usize>,
}

impl Built {
    pub(in crate::daemon) fn new(top: Rc<dyn Node>, links: Vec<Link>, filename: String) -> Self {
        Self { top, links, filename, inside: Inside::default(), growable: false, place: None }
    }
}

impl Graph {
    /// Makes the node that `options` define, and those below it. Those that were made on the way are gone again when it fails.
    ///
    /// # Errors
    /// Names that are taken or not there, what can't be opened, and conflicts with others who use the same nodes.
    pub(in crate::daemon) async fn add(
        self: &Rc<Self>,
        options: Options,
        owned: bool,
    ) -> Result<Rc<GraphNode>, Refusal> {
        let made = self.open(options, Inherited::default()).await;
        if let Ok(node) = &made {
            node.owned.set(owned);
        }
        if made.is_err() {
            self.collect().await;
        }
        made
    }

    /// As [`Graph::add`] for a node at some level of a definition. What a failure leaves behind is collected by the caller.
    pub(super) fn open(
        self: &Rc<Self>,
        options: Options,
        above: Inherited,
    ) -> LocalFuture<'static, Result<Rc<GraphNode>, Refusal>> {
        let graph = self.clone();
        Box::pin(async move {
            if above.level > MOST_LEVELS {
                return Err(generic(format!("A chain may have {MOST_LEVELS} nodes")));
            }
            let name = match options.text("node-name") {
                Some(name) => graph.check_name(name)?.to_owned(),
                None => graph.invent_name(),
            };
            let driver =
                options.text("driver").ok_or_else(|| generic("Parameter 'driver' is missing"))?.to_owned();
            let mut settings = settings(options, above);
            let built = graph.build(&name, &driver, &mut settings, above.level).await?;
            let disk_options = disk_options(&settings, &built, above)?;
            let node = Rc::new(GraphNode {
                name,
                driver: built.top_driver(&driver),
                disk: Disk::new(built.top.clone(), graph.clock.clone(), disk_options),
                own_filename: built.filename,
                links: RefCell::new(built.links),
                owned: Cell::new(false),
                active: Cell::new(!settings.inactive),
                settings: RefCell::new(settings),
                inside: RefCell::new(built.inside),
                busy: RefCell::default(),
                frozen: RefCell::default(),
            });
            graph.enter(&node, built.place);
            graph.settle_rights().await?;
            Ok(node)
        })
    }

    pub(super) fn check_name<'a>(&self, name: &'a str) -> Result<&'a str, Refusal> {
        let mut chars = name.chars();
        let sound = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
            && chars.all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
        if !sound {
            return Err(generic(format!("Invalid node-name: '{name}'")));
        }
        if name.len() > 31 {
            return Err(generic("Node name too long"));
        }
        if self.find(name).is_some() {
            return Err(generic(format!("Duplicate nodes with node-name='{name}'")));
        }
        Ok(name)
    }

    /// Opens a node of `driver`. Settings that turn out otherwise (a file that can't be written) are adapted.
    pub(super) async fn build(
        self: &Rc<Self>,
        name: &str,
        driver: &str,
        settings: &mut Settings,
        level: u32,
    ) -> Result<Built, Refusal> {
        match driver {
            "file" | "host_device" => self.open_file(driver, settings),
            "null-co" | "null-aio" => self.open_null(driver, name, settings),
            "nbd" => Ok(self.share(sources::open_nbd(&self.objects, settings).await?).await),
            "http" | "https" => Ok(self.share(sources::open_http(&self.objects, settings).await?).await),
            _ if let Some(service) = object_sources::service(driver) => {
                Ok(self.share(object_sources::open(&self.objects, service, settings).await?).await)
            }
            "raw" => self.open_raw(settings, level).await,
            "qcow2" => self.open_qcow2(settings, level).await,
            "replicas" | "verify" => replicas::open(self, driver, settings, level).await,
            "copy-before-write" => fleecing::open_filter(self, settings, level).await,
            "snapshot-access" => fleecing::open_access(self, settings, level).await,
            "throttle" | "copy-on-read" | "compress" | "blkdebug" | "blkverify" => {
                filters::open(self, driver, settings, level).await
            }
            _ => Err(generic(format!("Unknown driver '{driver}'"))),
        }
    }

    /// The child that the option `key` names or defines; none if there is no such option.
    pub(in crate::daemon) async fn open_child(
        self: &Rc<Self>,
        settings: &Settings,
        key: &'static str,
        role: Role,
        level: u32,
    ) -> Result<Option<Rc<GraphNode>>, Refusal> {
        let Some(reference) = settings.options.get(key) else { return Ok(None) };
        self.open_reference(settings, reference, role, level).await
    }

    /// The child that `reference` names or defines; none if it is neither.
    pub(in crate::daemon) async fn open_reference(
        self: &Rc<Self>,
        settings: &Settings,
        reference: &Value,
        role: Role,
        level: u32,
    ) -> Result<Option<Rc<GraphNode>>, Refusal> {
        match reference {
            Value::String(name) => self.any(name).map(Some),
            Value::Object(options) => {
                self.open(options.clone(), Inherited::below(settings, role, level)).await.map(Some)
            }
            _ => Ok(None),
        }
    }

    /// As [`Graph::open_child`], where there must be one.
    pub(in crate::daemon) async fn need_child(
        self: &Rc<Self>,
        settings: &Settings,
        key: &'static str,
        role: Role,
        level: u32,
    ) -> Result<Rc<GraphNode>, Refusal> {
        let child = self.open_child(settings, key, role, level).await?;
        child.ok_or_else(|| generic(format!("A block device must be specified for \"{key}\"")))
    }

    fn open_file(&self, driver: &str, settings: &mut Settings) -> Result<Built, Refusal> {
        let filename = settings.options.text("filename").unwrap_or_default().to_owned();
        if filename.is_empty() {
            return Err(generic(format!("The '{driver}' block driver requires a file name")));
        }
        let options = &settings.options;
        if options.text("aio") == Some("native") && !settings.direct {
            return Err(generic(
                "aio=native was specified, but it requires cache.direct=on, which was not specified.",
            ));
        }
        if options.contains_key("pr-manager") {
            return Err(generic("Option 'pr-manager' is not supported"));
        }
        check_kind(driver, &filename)?;
        if driver == "host_device" && !settings.read_only && is_read_only_device(&filename) {
            if !settings.auto_read_only {
                return Err(generic("The device is not writable: Permission denied"));
            }
            settings.read_only = true;
        }
        let file_options = FileOptions {
            read_only: settings.read_only,
            auto_read_only: settings.auto_read_only,
            cache: if settings.direct { Cache::Direct } else { Cache::Buffered },
            no_flush: settings.no_flush,
            // The graph knows what the file is used for, and locks accordingly.
            locking: Locking::Off,
            demand: if driver == "file" { Demand::Regular } else { Demand::Device },
            ..FileOptions::default()
        };
        let file = FileNode::open(&self.engine, &filename, file_options)
            .map_err(|err| cannot_open(&filename, &err))?;
        settings.read_only = file.is_read_only();
        let inside = Inside { file: Some(file.clone()), ..Inside::default() };
        Ok(Built { inside, growable: driver == "file", ..Built::new(file, Vec::new(), filename) })
    }

    fn open_null(&self, driver: &str, name: &str, settings: &Settings) -> Result<Built, Refusal> {
        let options = &settings.options;
        for (key, what) in
            [("latency-ns", "latency-ns is invalid"), ("size", "Image size must be non-negative")]
        {
            // Negative numbers come as the large ones that C makes of them.
            if options.number(key).is_some_and(|number| i64::try_from(number).is_err()) {
                return Err(generic(what));
            }
        }
        let null = NullOptions {
            driver: if driver == "null-co" { NullDriver::Co } else { NullDriver::Aio },
            size: options.number("size").unwrap_or(1 << 30),
            latency: Duration::from_nanos(options.number("latency-ns").unwrap_or(0)),
            read_zeroes: options.flag("read-zeroes").unwrap_or(false),
            read_only: settings.read_only,
        };
        let node = NullNode::new(name, self.clock.clone(), null);
        Ok(Built::new(node, Vec::new(), format!("{driver}://")))
    }

    async fn open_raw(self: &Rc<Self>, settings: &mut Settings, level: u32) -> Result<Built, Refusal> {
        let file = self.need_child(settings, "file", Role::File, level).await?;
        adapt_to_file(settings, &file)?;
        let options = RawOptions {
            read_only: settings.read_only,
            offset: settings.options.number("offset").unwrap_or(0),
            size: settings.options.number("size"),
        };
        check_window(&options, file.disk.size())?;
        let node = RawNode::new(file.top(), options).map_err(|err| of_error(&err))?;
        let filename = file.filename();
        let link = Link { name: "file", role: Role::File, to: file, edge: None };
        Ok(Built::new(node, vec![link], filename))
    }

    async fn open_qcow2(self: &Rc<Self>, settings: &mut Settings, level: u32) -> Result<Built, Refusal> {
        if settings.options.contains_key("encrypt") {
            return Err(generic("Encrypted images are not supported"));
        }
        let file = self.need_child(settings, "file", Role::File, level).await?;
        adapt_to_file(settings, &file)?;
        let header = header::read(&file).await?;
        let place = Some(self.nodes.borrow().len());
        let backing = match settings.options.get("backing") {
            None => match header::backing_options(&header, &file, &self.objects.trust()).await? {
                Some(options) => {
                    let above = Inherited::below(settings, Role::Backing, level);
                    let cannot = |err: Refusal| generic(format!("Could not open backing file: {}", err.desc));
                    Some(self.open(options, above).await.map_err(cannot)?)
                }
                None => None,
            },
            Some(_) => self.open_child(settings, "backing", Role::Backing, level).await?,
        };
        let data_file = match self.open_child(settings, "data-file", Role::DataFile, level).await? {
            Some(given) => Some(given),
            None => match header::data_file_options(&header, &file, &self.objects.trust())? {
                Some(options) => {
                    let above = Inherited::below(settings, Role::DataFile, level);
                    Some(self.open(options, above).await?)
                }
                None => None,
            },
        };
        let node = open_image(settings, &file, backing.as_ref(), data_file.as_ref()).await?;
        // They are only told; an image of which they can't be read is as good as before.
        let snapshots = node.snapshots().await.unwrap_or_else(|err| {
            tracing::warn!("the internal snapshots can't be listed: {err}");
            Vec::new()
        });
        let followed = backing
            .as_ref()
            .filter(|_| !settings.options.contains_key("backing"))
            .map(|backing| self.names().told(backing));
        let inside = Inside { image: Some(node.clone()), followed, snapshots, ..Inside::default() };
        let filename = file.filename();
        let mut links = vec![Link { name: "file", role: Role::File, to: file, edge: None }];
        let others = [("data-file", Role::DataFile, data_file), ("backing", Role::Backing, backing)];
        for (name, role, child) in others {
            links.extend(child.map(|to| Link { name, role, to, edge: None }));
        }
        Ok(Built { inside, place, ..Built::new(node, links, filename) })
    }
}

/// Opens the qcow2 image in `file` as `settings` say.
pub(super) async fn open_image(
    settings: &Settings,
    file: &GraphNode,
    backing: Option<&Rc<GraphNode>>,
    data_file: Option<&Rc<GraphNode>>,
) -> Result<Rc<Qcow2Node>, Refusal> {
    let options = &settings.options;
    let cache_size = options.number("cache-size").or_else(|| options.number("l2-cache-size"));
    let options = Qcow2Options {
        read_only: settings.read_only,
        cache_size: cache_size.unwrap_or(Qcow2Options::DEFAULT_CACHE_SIZE).max(64 << 10),
        workers: THREADS,
    };
    let children =
        Children { data_file: data_file.map(|node| node.top()), backing: backing.map(|node| node.top()) };
    Qcow2Node::open(file.top(), children, options).await.map_err(|err| of_error(&err))
}

/// Refuses what isn't a file, or isn't a device. What isn't there at all, opening tells.
fn check_kind(driver: &str, filename: &str) -> Result<(), Refusal> {
    use std::os::unix::fs::FileTypeExt;
    let Ok(kind) = std::fs::metadata(filename).map(|metadata| metadata.file_type()) else { return Ok(()) };
    if kind.is_dir() {
        return Err(generic(format!("Could not open '{filename}': Is a directory")));
    }
    match driver {
        "file" if !kind.is_file() => {
            Err(generic(format!("'file' driver requires '{filename}' to be a regular file")))
        }
        "host_device" if !kind.is_block_device() => Err(generic(format!(
            "'host_device' driver requires '{filename}' to be either a character or block device"
        ))),
        _ => Ok(()),
    }
}

/// True for a device that takes no writes, which opening it for writing doesn't show.
fn is_read_only_device(filename: &str) -> bool {
    use std::os::unix::fs::MetadataExt;
    let Ok(metadata) = std::fs::metadata(filename) else { return false };
    let device = metadata.rdev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/ro")).is_ok_and(|text| text.trim() == "1")
}

/// Refuses windows that aren't in a file of `actual` bytes.
fn check_window(options: &RawOptions, actual: u64) -> Result<(), Refusal> {
    let RawOptions { offset, size, .. } = *options;
    if offset > actual {
        return Err(generic(format!(
            "Offset ({offset}) cannot be greater than size of the containing file ({actual})"
        )));
    }
    match size {
        Some(size) if offset.checked_add(size).is_none_or(|end| end > actual) => Err(generic(format!(
            "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of the containing file ({actual})"
        ))),
        Some(size) if !size.is_multiple_of(512) => Err(generic("Specified size is not multiple of 512")),
        _ => Ok(()),
    }
}

/// An image can be written only if its file can.
fn adapt_to_file(settings: &mut Settings, file: &GraphNode) -> Result<(), Refusal> {
    if settings.read_only || !file.is_read_only() {
        return Ok(());
    }
    if !settings.auto_read_only {
        return Err(generic("Block node is read-only"));
    }
    settings.read_only = true;
    Ok(())
}

impl Built {
    /// The driver's name for as long as the program runs.
    fn top_driver(&self, driver: &str) -> &'static str {
        const DRIVERS: [&str; 20] = [
            "file",
            "host_device",
            "null-co",
            "null-aio",
            "nbd",
            "http",
            "https",
            "s3",
            "gs",
            "az",
            "raw",
            "qcow2",
            "throttle",
            "copy-on-read",
            "compress",
            "copy-before-write",
            "snapshot-access",
            "blkdebug",
            "replicas",
            "verify",
        ];
        DRIVERS.into_iter().find(|known| *known == driver).unwrap_or("blkverify")
    }
}

/// The link of a filter to the node that it passes requests to.
pub(in crate::daemon) fn filter_link(name: &'static str, role: Role, to: Rc<GraphNode>) -> Link {
    let edge = Some(Edge::new(to.disk.clone()));
    Link { name, role, to, edge }
}
