//! Exports: which nodes clients reach, and how: through the NBD server, as a file, or through a socket of vhost-user-blk.

use super::events::Events;
use super::failure::{Refusal, errno_text, generic, of_error};
use super::graph::open::{Options, Read};
use super::graph::rights::{Doing, Rights};
use super::graph::{Graph, GraphNode, Root};
use super::sources::{descriptor, family, port};
use headwater_block::{Error, ErrorKind};
use headwater_export::fuse::{self, FuseExport, FuseOptions, MountOptions};
use headwater_export::nbd::{self, NbdServer, ServerOptions};
use headwater_export::vhost::{BlkExport, BlkOptions, LogicalBlock, MAX_QUEUES, VhostUserBlk};
use headwater_export::{Listen, Removal, Removed};
use headwater_tls::Endpoint;
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// A node that clients reach.
struct Export {
    id: String,
    way: Way,
    root: Rc<Root>,
    /// No new client gets it; it goes with the last one.
    shutting_down: Cell<bool>,
}

/// How clients reach it.
enum Way {
    /// Under this name of the NBD server.
    Nbd(String),
    /// As a file.
    Fuse(FuseExport),
    /// Through a socket of its own, from a virtual machine.
    VhostUserBlk(VhostUserBlk),
}

impl Export {
    fn name(&self) -> Option<&str> {
        match &self.way {
            Way::Nbd(name) => Some(name),
            Way::Fuse(_) | Way::VhostUserBlk(_) => None,
        }
    }
}

/// All exports, and the server.
pub(super) struct Exports {
    graph: Rc<Graph>,
    events: Rc<Events>,
    server: RefCell<Option<NbdServer>>,
    exports: RefCell<Vec<Rc<Export>>>,
}

impl Exports {
    pub(super) fn new(graph: Rc<Graph>, events: Rc<Events>) -> Rc<Self> {
        Rc::new(Self { graph, events, server: RefCell::default(), exports: RefCell::default() })
    }

    /// Starts the NBD server: `nbd-server-start`, where an address stands in `data`, and `--nbd-server`, where it doesn't.
    ///
    /// # Errors
    /// If there is one, or the address can't be had.
    pub(super) fn start_server(&self, args: &Options) -> Result<(), Refusal> {
        if self.server.borrow().is_some() {
            return Err(generic("NBD server already running"));
        }
        if args.contains_key("tls-authz") {
            return Err(generic("Option 'tls-authz' is not supported"));
        }
        let address = args.object("addr").ok_or_else(|| generic("Parameter 'addr' is missing"))?;
        let tls = match args.text("tls-creds") {
            Some(id) => Some(self.graph.objects.credentials(id, Endpoint::Server)?),
            None => None,
        };
        let defaults = ServerOptions::default();
        let options = ServerOptions {
            max_connections: args
                .number("max-connections")
                .map_or(defaults.max_connections, |most| u32::try_from(most).unwrap_or(u32::MAX)),
            handshake_limit: match args.number("handshake-max-seconds") {
                Some(0) => None,
                Some(seconds) => Some(Duration::from_secs(seconds)),
                None => defaults.handshake_limit,
            },
            tls,
            ..defaults
        };
        let path = address.object("data").unwrap_or(address).text("path").map(str::to_owned);
        let server =
            NbdServer::start(listen(address)?, options).map_err(|err| bind_refusal(&err, path.as_deref()))?;
        self.server.replace(Some(server));
        Ok(())
    }

    /// Ends the server and all exports on it, and waits until the last client is gone.
    ///
    /// # Errors
    /// If there is none.
    pub(super) async fn stop_server(self: &Rc<Self>) -> Result<(), Refusal> {
        if self.server.borrow().is_none() {
            return Err(generic("NBD server not running"));
        }
        let exports =
            self.exports.borrow().iter().filter(|export| export.name().is_some()).cloned().collect();
        self.end_all(exports).await;
        let server = self.server.take();
        if let Some(server) = server {
            server.stop().await;
        }
        Ok(())
    }

    /// Ends all exports, the newest first, and the server.
    pub(super) async fn close(self: &Rc<Self>) {
        let exports = self.exports.borrow().iter().rev().cloned().collect();
        self.end_all(exports).await;
        // If there is no server, there is none to stop.
        let _ = self.stop_server().await;
    }

    async fn end_all(self: &Rc<Self>, exports: Vec<Rc<Export>>) {
        let mut ending = Vec::new();
        for export in exports {
            match self.withdraw(&export, true).await {
                Ok(removed) => ending.push((export, removed)),
                // It is on its way already, or its file stays: the process takes it along.
                Err(refusal) => tracing::debug!("export '{}': {refusal:?}", export.id),
            }
        }
        for (export, removed) in ending {
            removed.await;
            self.forget(&export);
        }
    }

    /// Adds an export as the arguments of `block-export-add` say.
    ///
    /// # Errors
    /// If there is no server, the id or the name is taken, or the node can't be used so.
    pub(super) async fn add(self: &Rc<Self>, args: &Options) -> Result<(), Refusal> {
        let id = args.text("id").unwrap_or_default();
        let kind = args.text("type").unwrap_or_default();
        let sound = id.starts_with(|c: char| c.is_ascii_alphabetic())
            && id.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
        if !sound {
            return Err(generic("Invalid block export id"));
        }
        if self.exports.borrow().iter().any(|export| export.id == id) {
            return Err(generic(format!("Block export id '{id}' is already in use")));
        }
        if let Some(thread) = args.text("iothread")
            && !self.graph.objects.is_io_thread(thread)
        {
            return Err(generic(format!("iothread \"{thread}\" not found")));
        }
        let node = self.graph.device_or_node("", args.text("node-name").unwrap_or_default())?;
        let writable = args.flag("writable").unwrap_or(false);
        if writable && node.is_read_only() {
            return Err(generic("Cannot export read-only node as writable"));
        }
        let inactive = args.flag("allow-inactive").unwrap_or(false);
        if !inactive {
            self.graph.activate(&node).await?;
        } else if kind != "nbd" {
            return Err(generic("Export type does not support inactive exports"));
        }
        let way = match kind {
            "nbd" => self.add_nbd(args, &node, writable).await,
            "fuse" => self.add_fuse(args, &node, writable).await,
            "vhost-user-blk" => self.add_vhost(args, id, &node, writable).await,
            _ => Err(generic(format!("Exports of type '{kind}' are not supported"))),
        };
        let (way, root) = match way {
            Ok(added) => added,
            Err(refusal) => {
                self.graph.collect().await;
                return Err(refusal);
            }
        };
        let gone = match &way {
            Way::Fuse(file) => Some(file.gone()),
            Way::Nbd(_) | Way::VhostUserBlk(_) => None,
        };
        let export = Rc::new(Export { id: id.to_owned(), way, root, shutting_down: Cell::new(false) });
        self.exports.borrow_mut().push(export.clone());
        if let Some(gone) = gone {
            // Somebody else may unmount it.
            let exports = self.clone();
            tokio::task::spawn_local(async move {
                gone.await;
                if !export.shutting_down.replace(true) {
                    exports.forget(&export);
                    drop(export);
                    exports.graph.collect().await;
                }
            });
        }
        Ok(())
    }

    async fn add_nbd(
        &self,
        args: &Options,
        node: &Rc<GraphNode>,
        writable: bool,
    ) -> Result<(Way, Rc<Root>), Refusal> {
        if args.get("bitmaps").and_then(Value::as_array).is_some_and(|bitmaps| !bitmaps.is_empty()) {
            return Err(generic("Dirty bitmaps are not supported"));
        }
        let name = args.text("name").unwrap_or(&node.name).to_owned();
        if self.server.borrow().is_none() {
            return Err(generic("NBD server not running"));
        }
        if name.len() > 4096 {
            return Err(generic(format!("export name '{name}' too long")));
        }
        if args.text("description").is_some_and(|text| text.len() > 4096) {
            let text = args.text("description").unwrap_or_default();
            return Err(generic(format!("description '{text}' too long")));
        }
        let taken = |export: &Rc<Export>| export.name() == Some(&name) && !export.shutting_down.get();
        if self.exports.borrow().iter().any(taken) {
            return Err(generic(format!("NBD server already has export named '{name}'")));
        }
        let inactive = args.flag("allow-inactive").unwrap_or(false);
        let root = self.graph.attach_export(node, Rights::of_export(writable), inactive).await?;
        let export = nbd::Export {
            name: name.clone(),
            description: args.text("description").unwrap_or_default().to_owned(),
            edge: root.edge.clone(),
            writable,
            writethrough: args.flag("writethrough").unwrap_or(false),
            allocation_depth: args.flag("allocation-depth").unwrap_or(false),
        };
        match &*self.server.borrow() {
            Some(server) => server.add(export).map_err(|err| of_error(&err))?,
            None => return Err(generic("NBD server not running")),
        }
        Ok((Way::Nbd(name), root))
    }

    async fn add_fuse(
        self: &Rc<Self>,
        args: &Options,
        node: &Rc<GraphNode>,
        writable: bool,
    ) -> Result<(Way, Rc<Root>), Refusal> {
        let path = PathBuf::from(args.text("mountpoint").unwrap_or_default());
        let there = |export: &Rc<Export>| match &export.way {
            Way::Fuse(file) => file.path() == path,
            Way::Nbd(_) | Way::VhostUserBlk(_) => false,
        };
        if self.exports.borrow().iter().any(there) {
            return Err(generic(format!("There already is a FUSE export on '{}'", path.display())));
        }
        let growable = args.flag("growable").unwrap_or(false);
        let mut rights = Rights::of_export(writable);
        if growable && writable {
            rights.does = rights.does.and(Doing::RESIZE);
        }
        let root = self.graph.attach_export(node, rights, false).await?;
        let mount = |allow_other| fuse::mount(&path, MountOptions { writable, allow_other });
        let mounted = match args.text("allow-other").unwrap_or("auto") {
            "off" => mount(false).await,
            "on" => mount(true).await,
            // Others are let in where that is allowed.
            _ => match mount(true).await {
                Err(err) if err.kind() == ErrorKind::PermissionDenied => mount(false).await,
                mounted => mounted,
            },
        };
        let options = FuseOptions {
            edge: root.edge.clone(),
            writable,
            writethrough: args.flag("writethrough").unwrap_or(false),
            growable: growable && writable,
            over_ring: true,
            resized: {
                let exports = Rc::downgrade(self);
                Box::new(move || {
                    if let Some(exports) = exports.upgrade() {
                        exports.look_at_sizes();
                    }
                })
            },
        };
        let file =
            mounted.and_then(|mounted| FuseExport::start(mounted, options)).map_err(|err| of_error(&err))?;
        Ok((Way::Fuse(file), root))
    }

    async fn add_vhost(
        &self,
        args: &Options,
        id: &str,
        node: &Rc<GraphNode>,
        writable: bool,
    ) -> Result<(Way, Rc<Root>), Refusal> {
        let logical_block = match args.number("logical-block-size") {
            Some(size @ 1..) => LogicalBlock::new(size).map_err(|_| {
                generic("parameter logical-block-size must be a power of 2 between 512 and 2097152")
            })?,
            Some(0) | None => LogicalBlock::default(),
        };
        let queues = match args.number("num-queues").unwrap_or(1) {
            0 => return Err(generic("num-queues must be greater than 0")),
            queues => u16::try_from(queues).ok().filter(|queues| *queues <= MAX_QUEUES),
        };
        let queues =
            queues.ok_or_else(|| generic(format!("num-queues must not be greater than {MAX_QUEUES}")))?;
        let address = args.object("addr").ok_or_else(|| generic("Parameter 'addr' is missing"))?;
        if !matches!(address.text("type"), Some("unix" | "fd")) {
            return Err(generic("Only socket address types 'unix' and 'fd' are supported"));
        }
        let writethrough = args.flag("writethrough").unwrap_or(false);
        let options = BlkOptions { writable, writethrough, queues, logical_block };
        let listen = listen(address)?;
        let root = self.graph.attach_export(node, Rights::of_machine(writable), false).await?;
        let export = BlkExport { id: id.to_owned(), edge: root.edge.clone(), options };
        let server =
            VhostUserBlk::start(listen, export).map_err(|err| bind_refusal(&err, address.text("path")))?;
        Ok((Way::VhostUserBlk(server), root))
    }

    /// Tells guests of disks whose size has changed.
    pub(super) fn look_at_sizes(&self) {
        for export in &*self.exports.borrow() {
            if let Way::VhostUserBlk(server) = &export.way {
                server.look_at_size();
            }
        }
    }

    /// Removes an export; with `hard` also if clients use it, who are cut off.
    ///
    /// # Errors
    /// If there is none, or clients use it.
    pub(super) async fn remove(self: &Rc<Self>, id: &str, hard: bool) -> Result<(), Refusal> {
        let found = self.exports.borrow().iter().find(|export| export.id == id).cloned();
        let export = found.ok_or_else(|| generic(format!("Export '{id}' is not found")))?;
        let mut removed = self.withdraw(&export, hard).await?;
        // Where nobody is left who could hold it up, its address is free when this is answered.
        let unused = match &export.way {
            Way::VhostUserBlk(server) => server.clients() == 0,
            Way::Fuse(_) => !hard,
            Way::Nbd(_) => false,
        };
        let gone = if unused {
            (&mut removed).await;
            true
        } else {
            futures_util::poll!(&mut removed).is_ready()
        };
        let exports = self.clone();
        let end = async move {
            exports.forget(&export);
            drop(export);
            exports.graph.collect().await;
        };
        if gone {
            end.await;
        } else {
            tokio::task::spawn_local(async move {
                removed.await;
                end.await;
            });
        }
        Ok(())
    }

    /// Takes an export from its clients: with `hard` also from those who use it.
    async fn withdraw(&self, export: &Rc<Export>, hard: bool) -> Result<Removed, Refusal> {
        let id = &export.id;
        if export.shutting_down.replace(true) {
            return Err(generic(format!("Export '{id}' is already shutting down")));
        }
        let how = if hard { Removal::Hard } else { Removal::Safe };
        let removed = match &export.way {
            Way::Nbd(name) => match &*self.server.borrow() {
                Some(server) => server.remove(name, how),
                None => return Err(generic("NBD server not running")),
            },
            Way::Fuse(file) => file.remove(how).await,
            Way::VhostUserBlk(server) => server.remove(how),
        };
        removed.map_err(|err| {
            export.shutting_down.set(false);
            match err.kind() {
                ErrorKind::InUse => generic(format!("export '{id}' still in use")),
                _ => of_error(&err),
            }
        })
    }

    fn forget(&self, export: &Rc<Export>) {
        self.exports.borrow_mut().retain(|other| !Rc::ptr_eq(other, export));
        self.events.emit("BLOCK_EXPORT_DELETED", json!({"id": export.id}));
    }

    /// The id of the export of that name.
    ///
    /// # Errors
    /// If there is none.
    pub(super) fn id_of(&self, name: &str) -> Result<String, Refusal> {
        let found = self
            .exports
            .borrow()
            .iter()
            .find(|export| export.name() == Some(name))
            .map(|export| export.id.clone());
        found.ok_or_else(|| generic(format!("Export '{name}' is not found")))
    }

    pub(super) fn query(&self) -> Value {
        let exports = self.exports.borrow();
        let tell = |export: &Rc<Export>| {
            json!({
                "node-name": export.root.node.borrow().name,
                "shutting-down": export.shutting_down.get(),
                "type": match &export.way {
                    Way::Nbd(_) => "nbd",
                    Way::Fuse(_) => "fuse",
                    Way::VhostUserBlk(_) => "vhost-user-blk",
                },
                "id": export.id,
            })
        };
        exports.iter().rev().map(tell).collect()
    }

    /// The ids of all exports and their nodes' names.
    pub(super) fn nodes(&self) -> Vec<(String, String)> {
        self.exports
            .borrow()
            .iter()
            .map(|export| (export.id.clone(), export.root.node.borrow().name.clone()))
            .collect()
    }
}

/// Why a socket can't be listened at.
fn bind_refusal(error: &Error, path: Option<&str>) -> Refusal {
    match (path, error.os_code()) {
        (Some(path), Some(code)) => generic(format!("Failed to bind socket to {path}: {}", errno_text(code))),
        _ => of_error(error),
    }
}

/// The address that `address` means: QMP puts it into `data`, the command line doesn't.
fn listen(address: &Options) -> Result<Listen, Refusal> {
    let data = address.object("data").unwrap_or(address);
    let text = |key: &str| data.text(key).unwrap_or_default();
    match address.text("type").unwrap_or_default() {
        "unix" if data.flag("abstract").unwrap_or(false) => {
            Ok(Listen::Abstract { name: text("path").into(), tight: data.flag("tight").unwrap_or(true) })
        }
        "unix" => Ok(Listen::Unix { path: PathBuf::from(text("path")) }),
        "inet" => Ok(Listen::Inet {
            host: text("host").to_owned(),
            port: port(text("port"))?,
            to: data.number("to").and_then(|to| u16::try_from(to).ok()),
            family: family(data)?,
        }),
        "fd" => Ok(Listen::Fd(descriptor(text("str"))?)),
        other => Err(generic(format!("Sockets of type '{other}' are not supported"))),
    }
}
