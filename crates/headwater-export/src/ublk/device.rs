//! A block device, from the first command to the driver to the last.

use super::handler::Handler;
use super::serve::serve;
use crate::blocking::blocking;
use crate::kick::Kick;
use crate::vhost::LogicalBlock;
use headwater_block::{Abort, Client, Disk, Edge, Error, ErrorKind, Result};
use headwater_ublk::{Control, Device, Queue, SECTOR, Shape, State};
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;
use tokio::task::JoinHandle;

/// How many requests a device has at once, and how long one is, in bytes: together they bound its memory, to 32 MiB.
const DEPTH: u16 = 64;
const MAX_REQUEST: u32 = 512 << 10;

/// The longest range that is discarded or zeroed at once, in sectors: 2 GiB.
const MAX_RANGE: u32 = 4 << 20;

/// The largest units that the kernel is told of: a physical block, and what requests are best made in.
const MAX_PHYSICAL: u32 = 64 << 10;
const MAX_PREFERRED: u32 = 2 << 20;

/// How often, and with what pauses, a device is asked for whose old server the kernel isn't done with.
const TAKE_OVER_TRIES: u32 = 40;
const TAKE_OVER_PAUSE: Duration = Duration::from_millis(50);

/// What a device is of, and how it looks.
#[derive(Clone)]
pub struct UblkOptions {
    /// Leads to the disk. Each request enters it and goes to the disk of that moment.
    pub edge: Rc<Edge>,
    /// Whether it may be changed. A disk that is read-only itself is never changed.
    pub writable: bool,
    /// The device's number; without one the driver chooses.
    pub id: Option<u32>,
    /// Whether the device outlives its server: if that is killed, those who use the device wait until another server takes it over. Needs an id
    /// to be found again.
    pub recover: bool,
    /// The unit of requests, at most 4096 bytes.
    pub logical_block: LogicalBlock,
}

/// A disk that is a block device. Dropped without [`Ublk::stop`], the device is left without a server.
pub struct Ublk {
    id: u32,
    /// Ends the waiting of requests that are held.
    leaves: Rc<Abort>,
    /// Over when the device has gone.
    task: JoinHandle<()>,
}

impl Ublk {
    /// Makes the device, or takes over one that has lost its server; it can be used when this returns. Must be called inside a tokio
    /// `LocalSet`.
    ///
    /// # Errors
    /// `NotFound` if the kernel has no ublk driver; `PermissionDenied` without CAP_SYS_ADMIN; `InUse` if the device has a server;
    /// `InvalidInput` if the disk can't be such a device, or isn't the one that is taken over.
    pub async fn start(options: UblkOptions) -> Result<Self> {
        let disk = options.edge.disk();
        let shape = shape(&disk, &options)?;
        let UblkOptions { id, recover, .. } = options;
        let (device, again) = blocking(move || prepare(id, recover, &shape)).await?;
        let leaves = Abort::new();
        let task = match Self::serve(&device, options, leaves.clone()) {
            Ok(task) => task,
            Err(error) => {
                if !again {
                    forget(device.id).await;
                }
                return Err(failed(error, device.id, "take its requests"));
            }
        };
        let started = Self { id: device.id, leaves, task };
        let id = started.id;
        let begun = blocking(move || {
            let mut control = open()?;
            let done = if again { control.end_recovery(id) } else { control.start(id) };
            done.map_err(|error| failed(error, id, "start it"))
        });
        if let Err(error) = begun.await {
            started.stop().await;
            return Err(error);
        }
        Ok(started)
    }

    fn serve(device: &Device, options: UblkOptions, leaves: Rc<Abort>) -> io::Result<JoinHandle<()>> {
        // Memory that this thread needs must not be made free by writing to the device, which waits for this thread. Without the right to say so
        // the kernel does its best.
        let _ = rustix::process::configure_io_flusher_behavior(true);
        let (queue, ready) = Queue::open(device)?;
        let kick = Kick::new(ready)?;
        let handler = Handler {
            client: Client::new(options.edge, leaves),
            data: queue.data(),
            writable: options.writable,
        };
        let id = device.id;
        Ok(tokio::task::spawn_local(async move {
            if let Err(error) = serve(queue, kick, Rc::new(handler)).await {
                tracing::error!("{} has no server any more: {error}", path(id).display());
            }
        }))
    }

    /// Its number: it is `/dev/ublkbN`.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Takes the device away: what was asked of it is answered, what is held with an error, and later requests fail. Completes when all that is
    /// over.
    pub async fn stop(self) {
        self.leaves.abort();
        let id = self.id;
        let stopped = blocking(move || open()?.stop(id).map_err(|error| failed(error, id, "take it away")));
        if let Err(error) = stopped.await {
            tracing::warn!("{error}");
            self.task.abort();
        }
        if let Err(error) = self.task.await
            && !error.is_cancelled()
        {
            tracing::error!("a ublk export failed: {error}");
        }
        forget(id).await;
    }
}

/// Frees a device's number.
async fn forget(id: u32) {
    let deleted = blocking(move || open()?.delete(id).map_err(|error| failed(error, id, "free its number")));
    if let Err(error) = deleted.await {
        tracing::warn!("{error}");
    }
}

fn path(id: u32) -> PathBuf {
    format!("/dev/ublkb{id}").into()
}

fn failed(error: io::Error, id: u32, what: &str) -> Error {
    Error::from_io(error, format!("{what}: {}", path(id).display()))
}

fn open() -> Result<Control> {
    Control::open().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::new(
            ErrorKind::NotFound,
            "the kernel has no ublk driver, or it isn't loaded (modprobe ublk_drv)".to_owned(),
        ),
        _ => Error::from_io(error, "reach the ublk driver at /dev/ublk-control".to_owned()),
    })
}

/// A device that has no server yet, and whether it was there before.
fn prepare(id: Option<u32>, recover: bool, shape: &Shape) -> Result<(Device, bool)> {
    let mut control = open()?;
    if let Some(id) = id
        && let Some(device) = take_over(&mut control, id, shape)?
    {
        return Ok((device, true));
    }
    let wanted =
        Device { id: 0, depth: DEPTH, max_request: MAX_REQUEST, recoverable: recover, state: State::Dead };
    let device =
        control.add(id, &wanted).map_err(|error| Error::from_io(error, "add a ublk device".to_owned()))?;
    if let Err(error) = control.shape(&device, shape) {
        // It is of no use, and nobody has it.
        let _ = control.delete(device.id);
        return Err(failed(error, device.id, "say how it looks"));
    }
    Ok((device, false))
}

/// The device with this number if it waits for a server; one that nobody can use any more is removed.
fn take_over(control: &mut Control, id: u32, shape: &Shape) -> Result<Option<Device>> {
    let refuse = |kind, why: String| Err(Error::new(kind, format!("{}: {why}", path(id).display())));
    for _ in 0..TAKE_OVER_TRIES {
        let device = match control.device(id) {
            // One that was made otherwise isn't one of ours, and could want more memory than these bounds.
            Ok(Some(device)) if (device.depth, device.max_request) == (DEPTH, MAX_REQUEST) => device,
            Ok(_) => return refuse(ErrorKind::InUse, "it belongs to another program".into()),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
            Err(error) => return Err(failed(error, id, "look for it")),
        };
        match device.state {
            State::Dead => {
                control.delete(id).map_err(|error| failed(error, id, "remove what is left of it"))?;
                return Ok(None);
            }
            State::Waiting => {
                let (sectors, read_only) =
                    control.size(id).map_err(|error| failed(error, id, "look at its size"))?;
                if (sectors, read_only) != (shape.sectors, shape.read_only) {
                    let (size, as_what) =
                        (sectors * SECTOR, if read_only { " for reading only" } else { "" });
                    let why = format!(
                        "it waits for its server, but this isn't its disk: it has {size} bytes{as_what}, and this one {}",
                        shape.sectors * SECTOR
                    );
                    return refuse(ErrorKind::InvalidInput, why);
                }
                match control.start_recovery(id) {
                    Ok(()) => return Ok(Some(device)),
                    Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
                    Err(error) => return Err(failed(error, id, "take it over")),
                }
            }
            // A server that was just killed is there until the kernel has seen it.
            State::Live | State::Other(_) => {}
        }
        std::thread::sleep(TAKE_OVER_PAUSE);
    }
    refuse(ErrorKind::InUse, "it has a server".into())
}

/// How the disk looks as a block device.
fn shape(disk: &Disk, options: &UblkOptions) -> Result<Shape> {
    let refuse = |why: String| {
        Err(Error::new(ErrorKind::InvalidInput, format!("a block device of {}: {why}", disk.name())))
    };
    let logical_block = options.logical_block.bytes();
    if logical_block > 4096 {
        return refuse(format!("logical blocks of {logical_block} bytes; they can have 512 to 4096"));
    }
    if options.writable && disk.is_read_only() {
        return refuse("it is for reading only".to_owned());
    }
    let blocks = disk.size() / u64::from(logical_block);
    if blocks == 0 {
        return refuse(format!("it has {} bytes, less than a block", disk.size()));
    }
    let limits = disk.limits();
    let physical_block = limits.write_alignment.clamp(logical_block.max(4096), MAX_PHYSICAL);
    Ok(Shape {
        // What is left behind the last whole block isn't there.
        sectors: blocks * (u64::from(logical_block) / SECTOR),
        read_only: !options.writable,
        volatile_cache: true,
        logical_block,
        physical_block,
        preferred: limits.preferred.clamp(physical_block, MAX_PREFERRED),
        max_range: if options.writable { MAX_RANGE } else { 0 },
    })
}
