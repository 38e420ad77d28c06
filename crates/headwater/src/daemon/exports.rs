//! Exports: which nodes clients reach, and the NBD server through which they do.

use super::events::Events;
use super::failure::{Refusal, errno_text, generic, of_error};
use super::graph::open::{Options, Read};
use super::graph::rights::Rights;
use super::graph::{Graph, Root};
use super::sources::{descriptor, family, port};
use headwater_block::ErrorKind;
use headwater_export::nbd::{self, Listen, NbdServer, Removal, Removed, ServerOptions};
use headwater_tls::Endpoint;
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// A node under a name that clients ask for.
struct Export {
    id: String,
    /// The name that NBD clients use.
    name: String,
    root: Rc<Root>,
    /// No new client gets it; it goes with the last one.
    shutting_down: Cell<bool>,
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
            NbdServer::start(listen(address)?, options).map_err(|err| match (path, err.os_code()) {
                (Some(path), Some(code)) => {
                    generic(format!("Failed to bind socket to {path}: {}", errno_text(code)))
                }
                _ => of_error(&err),
            })?;
        self.server.replace(Some(server));
        Ok(())
    }

    /// Ends the server and all exports on it, and waits until the last client is gone.
    ///
    /// # Errors
    /// If there is none.
    pub(super) async fn stop_server(self: &Rc<Self>, newest_first: bool) -> Result<(), Refusal> {
        if self.server.borrow().is_none() {
            return Err(generic("NBD server not running"));
        }
        let mut ids: Vec<String> = self.exports.borrow().iter().map(|export| export.id.clone()).collect();
        if newest_first {
            ids.reverse();
        }
        let mut gone = Vec::new();
        for id in ids {
            if let Ok((export, removed)) = self.withdraw(&id, Removal::Hard) {
                gone.push((export, removed));
            }
        }
        for (export, removed) in gone {
            removed.await;
            self.forget(&export);
        }
        let server = self.server.take();
        if let Some(server) = server {
            server.stop().await;
        }
        Ok(())
    }

    /// Adds an export as the arguments of `block-export-add` say.
    ///
    /// # Errors
    /// If there is no server, the id or the name is taken, or the node can't be used so.
    pub(super) async fn add(&self, args: &Options) -> Result<(), Refusal> {
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
        if kind != "nbd" {
            return Err(generic(format!("Exports of type '{kind}' are not supported")));
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
        if self.exports.borrow().iter().any(|export| export.name == name && !export.shutting_down.get()) {
            return Err(generic(format!("NBD server already has export named '{name}'")));
        }
        let root = match self
            .graph
            .attach(&node, ("an unnamed block device", "root"), Rights::of_export(writable), true)
            .await
        {
            Ok(root) => root,
            Err(refusal) => {
                self.graph.collect().await;
                return Err(refusal);
            }
        };
        let export = nbd::Export {
            name: name.clone(),
            description: args.text("description").unwrap_or_default().to_owned(),
            edge: root.edge.clone(),
            writable,
            allocation_depth: args.flag("allocation-depth").unwrap_or(false),
        };
        let added = match &*self.server.borrow() {
            Some(server) => server.add(export).map_err(|err| of_error(&err)),
            None => Err(generic("NBD server not running")),
        };
        if let Err(refusal) = added {
            drop(root);
            self.graph.collect().await;
            return Err(refusal);
        }
        let export = Export { id: id.to_owned(), name, root, shutting_down: Cell::new(false) };
        self.exports.borrow_mut().push(Rc::new(export));
        Ok(())
    }

    /// Removes an export; with `hard` also if clients use it, who are cut off.
    ///
    /// # Errors
    /// If there is none, or clients use it.
    pub(super) async fn remove(self: &Rc<Self>, id: &str, hard: bool) -> Result<(), Refusal> {
        let (export, removed) = self.withdraw(id, if hard { Removal::Hard } else { Removal::Safe })?;
        let mut removed = Box::pin(removed);
        if futures_util::poll!(&mut removed).is_ready() {
            self.forget(&export);
        } else {
            let exports = self.clone();
            tokio::task::spawn_local(async move {
                removed.await;
                exports.forget(&export);
                exports.graph.collect().await;
            });
        }
        self.graph.collect().await;
        Ok(())
    }

    fn withdraw(&self, id: &str, how: Removal) -> Result<(Rc<Export>, Removed), Refusal> {
        let found = self.exports.borrow().iter().find(|export| export.id == id).cloned();
        let export = found.ok_or_else(|| generic(format!("Export '{id}' is not found")))?;
        if export.shutting_down.get() {
            return Err(generic(format!("Export '{id}' is already shutting down")));
        }
        let server = self.server.borrow();
        let server = server.as_ref().ok_or_else(|| generic("NBD server not running"))?;
        let removed = server.remove(&export.name, how).map_err(|err| match err.kind() {
            ErrorKind::InUse => generic(format!("export '{id}' still in use")),
            _ => of_error(&err),
        })?;
        export.shutting_down.set(true);
        Ok((export, removed))
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
        let found =
            self.exports.borrow().iter().find(|export| export.name == name).map(|export| export.id.clone());
        found.ok_or_else(|| generic(format!("Export '{name}' is not found")))
    }

    pub(super) fn query(&self) -> Value {
        let exports = self.exports.borrow();
        let tell = |export: &Rc<Export>| {
            json!({
                "node-name": export.root.node.borrow().name,
                "shutting-down": export.shutting_down.get(),
                "type": "nbd",
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
