//! The character devices of a daemon by their ids: those of the command line, which monitors may have, and those that QMP makes, which nobody has.
//!
//! Monitors come with the command line, so a device that is added later has no use but to be there: as a socket that listens, or a ring of bytes.
//! Files, pipes, terminals and what only machines have are refused by name.

use super::ring::Ring;
use super::{Backend, Chardev};
use crate::daemon::failure::{Refusal, generic};
use crate::daemon::graph::open::{Options, Read};
use headwater_qmp::opts;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::rc::Rc;

/// The backends that can be had, in the order in which `query-chardev-backends` tells them.
const BACKENDS: [&str; 5] = ["null", "ringbuf", "socket", "stdio", "memory"];

enum What {
    /// Of the command line.
    Chardev(Rc<Chardev>),
    Ring(Ring),
    Backend(Backend),
}

struct Device {
    id: String,
    what: What,
}

impl Device {
    fn is_monitor(&self) -> bool {
        matches!(&self.what, What::Chardev(chardev) if chardev.is_taken())
    }

    fn describe(&self) -> Value {
        let filename = match &self.what {
            What::Chardev(chardev) if chardev.is_taken() => chardev.filename(),
            What::Chardev(chardev) => without_peer(chardev.filename()),
            What::Ring(_) => "ringbuf".to_owned(),
            What::Backend(backend) => without_peer(backend.filename()),
        };
        json!({"label": self.id, "filename": filename, "frontend-open": self.is_monitor()})
    }
}

/// How a device is called that nobody is at the other end of.
fn without_peer(filename: String) -> String {
    if filename.contains(":") { format!("disconnected:{filename}") } else { filename }
}

/// All devices, in the order in which they were made.
#[derive(Default)]
pub(in crate::daemon) struct Chardevs(RefCell<Vec<Device>>);

impl Chardevs {
    /// Enters one of the command line.
    ///
    /// # Errors
    /// If there is one of that id.
    pub(in crate::daemon) fn enter(&self, chardev: &Rc<Chardev>) -> Result<(), Refusal> {
        if self.has(&chardev.id) {
            return Err(generic(format!(
                "attempt to add duplicate property '{}' to object (type 'container')",
                chardev.id
            )));
        }
        let device = Device { id: chardev.id.clone(), what: What::Chardev(chardev.clone()) };
        self.0.borrow_mut().push(device);
        Ok(())
    }

    fn has(&self, id: &str) -> bool {
        self.0.borrow().iter().any(|device| device.id == id)
    }

    /// `query-chardev`.
    pub(in crate::daemon) fn describe(&self) -> Value {
        self.0.borrow().iter().map(Device::describe).collect()
    }

    /// `query-chardev-backends`.
    pub(in crate::daemon) fn backends() -> Value {
        BACKENDS.iter().map(|name| json!({"name": name})).collect()
    }

    /// `chardev-add`.
    ///
    /// # Errors
    /// If the id is taken, or there can be no such device.
    pub(in crate::daemon) async fn add(&self, args: &Options) -> Result<(), Refusal> {
        let id = args.text("id").unwrap_or_default();
        if self.has(id) {
            return Err(generic(format!("Chardev with id '{id}' already exists")));
        }
        let what = open(id, args).await?;
        self.0.borrow_mut().push(Device { id: id.to_owned(), what });
        Ok(())
    }

    /// `chardev-change`: another backend. What is there stays if that can't be had.
    ///
    /// # Errors
    /// As for [`Chardevs::add`]; and if a monitor has it, which goes with the connection.
    pub(in crate::daemon) async fn change(&self, args: &Options) -> Result<(), Refusal> {
        let id = args.text("id").unwrap_or_default();
        if !self.has(id) {
            return Err(generic(format!("Chardev '{id}' does not exist")));
        }
        if self.0.borrow().iter().any(|device| device.id == id && device.is_monitor()) {
            return Err(generic("Chardev user does not support chardev hotswap"));
        }
        let what = open(id, args).await?;
        if let Some(device) = self.0.borrow_mut().iter_mut().find(|device| device.id == id) {
            device.what = what;
        }
        Ok(())
    }

    /// `chardev-remove`.
    ///
    /// # Errors
    /// If there is none, or a monitor has it.
    pub(in crate::daemon) fn remove(&self, id: &str) -> Result<(), Refusal> {
        self.find(id)?;
        if self.0.borrow().iter().any(|device| device.id == id && device.is_monitor()) {
            return Err(generic(format!("Chardev '{id}' is busy")));
        }
        self.0.borrow_mut().retain(|device| device.id != id);
        Ok(())
    }

    /// That there is one: `chardev-send-break` has nothing more to do, because none has a line that could be broken.
    ///
    /// # Errors
    /// There is none.
    pub(in crate::daemon) fn find(&self, id: &str) -> Result<(), Refusal> {
        if self.has(id) { Ok(()) } else { Err(generic(format!("Chardev '{id}' not found"))) }
    }

    /// `ringbuf-write`.
    ///
    /// # Errors
    /// If it is no ring, and those of [`Ring::write`].
    pub(in crate::daemon) fn write(&self, args: &Options) -> Result<(), Refusal> {
        self.with_ring(args, |ring| ring.write(args))
    }

    /// `ringbuf-read`.
    ///
    /// # Errors
    /// If it is no ring, and those of [`Ring::read`].
    pub(in crate::daemon) fn read(&self, args: &Options) -> Result<Value, Refusal> {
        self.with_ring(args, |ring| ring.read(args)).map(Value::String)
    }

    fn with_ring<T>(
        &self,
        args: &Options,
        what: impl FnOnce(&Ring) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let id = args.text("device").unwrap_or_default();
        let devices = self.0.borrow();
        let device = devices.iter().find(|device| device.id == id);
        match device.map(|device| &device.what) {
            Some(What::Ring(ring)) => what(ring),
            Some(_) => Err(generic(format!("{id} is not a ringbuf device"))),
            None => Err(generic(format!("Device '{id}' not found"))),
        }
    }
}

async fn open(id: &str, args: &Options) -> Result<What, Refusal> {
    let empty = Options::new();
    let backend = args.object("backend").unwrap_or(&empty);
    let data = backend.object("data").unwrap_or(&empty);
    let failed = |err: Refusal| generic(format!("Failed to add chardev '{id}': {}", err.desc));
    match backend.text("type").unwrap_or_default() {
        "ringbuf" | "memory" => Ring::new(data).map(What::Ring).map_err(failed),
        kind @ ("null" | "socket") => {
            let waits = data.flag("server").unwrap_or(false) && data.flag("wait").unwrap_or(true);
            if kind == "socket" && waits {
                return Err(failed(generic("nobody waits for a connection here; say wait=off")));
            }
            let asked = opts::Chardev {
                id: id.to_owned(),
                backend: Value::Object(backend.clone()),
                warnings: Vec::new(),
            };
            Backend::open(&asked).await.map(What::Backend).map_err(failed)
        }
        kind => Err(failed(generic(format!("'{kind}' is for the command line, or not supported here")))),
    }
}
