//! The exports of a server, which come and go while clients are connected.
//!
//! A client that has chosen an export has a [`Seat`] there until its session is over, requests included. Removing an export takes it off
//! the list at once, so that its name is free and nobody finds it any more, and tells those who have a seat to go; it is gone when the
//! last seat is.

use std::cell::RefCell;
use std::rc::Rc;

use headwater_block::{Edge, Error, ErrorKind, Result};
use headwater_nbd::negotiate::{ALLOCATION_DEPTH, BASE_ALLOCATION, MAX_STRING};
use headwater_nbd::{BlockSizes, ExportInfo, TransmissionFlags};
use tokio::sync::watch;

use crate::removal::{Removal, Removed};
use crate::stop::{Stop, StopListener};

/// Longest read or write, in bytes: what the protocol document asks every server to take.
const MAX_PAYLOAD: u32 = 32 << 20;

/// A disk under a name. One disk may be there under several names, and under some of them for reading only.
#[derive(Clone)]
pub struct Export {
    /// What clients ask for; at most 4096 bytes. May be empty.
    pub name: String,
    /// A text for people, at most 4096 bytes; may be empty.
    pub description: String,
    /// Leads to the disk. Each request enters it and goes to the disk of that moment.
    ///
    /// A client keeps the size that it was told when it chose the export. If the disk grows, it gets no further, and clients that come
    /// later do. If it shrinks, requests past the end fail.
    pub edge: Rc<Edge>,
    /// Whether clients may change it. A disk that is read-only itself is never changed.
    pub writable: bool,
    /// Whether every change is durable before it is answered, whatever the client asked for.
    pub writethrough: bool,
    /// Whether clients may ask how deep in the chain data lie (`qemu:allocation-depth`).
    pub allocation_depth: bool,
}

struct Entry {
    export: Export,
    stop: Stop,
    clients: watch::Sender<usize>,
}

/// See the module.
pub(crate) struct Exports {
    entries: RefCell<Vec<Rc<Entry>>>,
    multi_conn: bool,
}

impl Exports {
    /// No exports yet. `multi_conn` says whether several connections of one client can be had.
    pub(crate) fn new(multi_conn: bool) -> Self {
        Self { entries: RefCell::default(), multi_conn }
    }

    pub(crate) fn add(&self, export: Export) -> Result<()> {
        let name = &export.name;
        if name.len() > MAX_STRING || export.description.len() > MAX_STRING {
            let message = format!("export {name:?}: name and description may have {MAX_STRING} bytes each");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        if self.find(name).is_some() {
            let message = format!("there is an export {name:?} already; give each its own name");
            return Err(Error::new(ErrorKind::AlreadyExists, message));
        }
        let (clients, _) = watch::channel(0);
        self.entries.borrow_mut().push(Rc::new(Entry { export, stop: Stop::new(), clients }));
        Ok(())
    }

    pub(crate) fn remove(&self, name: &str, how: Removal) -> Result<Removed> {
        let Some(entry) = self.find(name) else {
            return Err(Error::new(ErrorKind::NotFound, format!("there is no export {name:?}")));
        };
        let clients = *entry.clients.borrow();
        if how == Removal::Safe && clients > 0 {
            let message = format!("export {name:?} has {clients} clients; remove it hard to send them away");
            return Err(Error::new(ErrorKind::InUse, message));
        }
        self.entries.borrow_mut().retain(|other| !Rc::ptr_eq(other, &entry));
        entry.stop.order();
        let mut clients = entry.clients.subscribe();
        Ok(Removed::when(async move {
            // Senders that are all gone took the clients with them.
            let _ = clients.wait_for(|clients| *clients == 0).await;
        }))
    }

    /// Removes them all hard.
    pub(crate) fn remove_all(&self) {
        for entry in self.entries.take() {
            entry.stop.order();
        }
    }

    /// How many clients have chosen an export; `None` if it isn't there.
    pub(crate) fn clients(&self, name: &str) -> Option<usize> {
        self.find(name).map(|entry| *entry.clients.borrow())
    }

    /// What clients are told, as things are now.
    pub(crate) fn infos(&self) -> Vec<ExportInfo> {
        self.entries.borrow().iter().map(|entry| info(&entry.export, self.multi_conn)).collect()
    }

    /// Lets a client in.
    pub(crate) fn take_seat(&self, name: &str) -> Option<Seat> {
        let entry = self.find(name)?;
        entry.clients.send_modify(|clients| *clients += 1);
        let stop = entry.stop.listener();
        Some(Seat { entry, stop })
    }

    fn find(&self, name: &str) -> Option<Rc<Entry>> {
        self.entries.borrow().iter().find(|entry| entry.export.name == name).cloned()
    }
}

/// A client's place at an export, given back when this is dropped.
pub(crate) struct Seat {
    entry: Rc<Entry>,
    stop: StopListener,
}

impl Seat {
    pub(crate) fn export(&self) -> &Export {
        &self.entry.export
    }

    /// Hears when the client is to go.
    pub(crate) fn stop(&self) -> &StopListener {
        &self.stop
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.entry.clients.send_modify(|clients| *clients -= 1);
    }
}

fn info(export: &Export, multi_conn: bool) -> ExportInfo {
    use TransmissionFlags as F;
    let disk = export.edge.disk();
    let mut flags = F::HAS_FLAGS | F::SEND_FLUSH | F::SEND_FUA | F::SEND_DF | F::SEND_CACHE;
    if multi_conn {
        // All connections use the same disk object, so that a flush on one covers the writes of all.
        flags |= F::CAN_MULTI_CONN;
    }
    // An export that was made writable says so also while its disk takes no writes: it may again while a client is there.
    if export.writable {
        flags |= F::SEND_TRIM | F::SEND_WRITE_ZEROES | F::SEND_FAST_ZERO;
    } else {
        flags |= F::READ_ONLY;
    }
    // The disk takes any alignment.
    let preferred = disk.limits().preferred.clamp(512, MAX_PAYLOAD);
    let preferred = if preferred.is_power_of_two() { preferred } else { 4096 };
    let depth = export.allocation_depth.then_some(ALLOCATION_DEPTH);
    ExportInfo {
        name: export.name.clone(),
        description: export.description.clone(),
        size: disk.size(),
        flags,
        block_sizes: BlockSizes { minimum: 1, preferred, maximum: MAX_PAYLOAD },
        contexts: [BASE_ALLOCATION].into_iter().chain(depth).map(str::to_owned).collect(),
    }
}
