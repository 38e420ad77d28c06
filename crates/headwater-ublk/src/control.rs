//! Commands about devices, through `/dev/ublk-control`.

use crate::abi::{
    ADD, ControlCommand, DELETE, Device, DeviceInfo, END_RECOVERY, GET_DEVICE, GET_PARAMETERS, Parameters,
    SET_PARAMETERS, START, START_RECOVERY, STOP, Shape,
};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use zerocopy::{FromZeros, IntoBytes};

/// Where the driver takes commands.
const CONTROL: &str = "/dev/ublk-control";

/// The driver. Each command blocks until the driver is done with it, which for some is when the device's server has done something: they
/// belong to another thread than the server's.
pub struct Control {
    file: File,
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
}

/// Memory that a command takes bytes from, or gives bytes to.
enum Bytes<'a> {
    None,
    Taken(&'a [u8]),
    Given(&'a mut [u8]),
}

impl Control {
    /// Reaches the driver.
    ///
    /// # Errors
    /// `NotFound` if the kernel has no ublk driver, or it isn't loaded; `PermissionDenied` for those who may not use it.
    pub fn open() -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(CONTROL)?;
        Ok(Self { file, ring: IoUring::builder().build(1)? })
    }

    /// Adds a device, which nobody can use before it is started; without an id the driver chooses one. Gives the device as it has become: the
    /// driver may have cut its numbers down.
    ///
    /// # Errors
    /// `AlreadyExists` if there is one with this id; `Unsupported` if the driver can't do what [the crate](crate) needs.
    pub fn add(&mut self, id: Option<u32>, device: &Device) -> io::Result<Device> {
        let mut told = device.encode(id);
        self.run(ADD, id.unwrap_or(u32::MAX), Bytes::Given(told.as_mut_bytes()), 0)?;
        let added = Device::decode(&told);
        match added {
            Some(added) => Ok(added),
            None => {
                // What the driver doesn't know it leaves out; then the device is of no use.
                self.delete(told.id)?;
                let message =
                    "the kernel's ublk driver can't let the server copy bytes; that needs Linux 6.5";
                Err(io::Error::new(io::ErrorKind::Unsupported, message))
            }
        }
    }

    /// The device with this id: `None` if it isn't one that this crate serves.
    ///
    /// # Errors
    /// `NotFound` if there is none.
    pub fn device(&mut self, id: u32) -> io::Result<Option<Device>> {
        let mut told = DeviceInfo::new_zeroed();
        self.run(GET_DEVICE, id, Bytes::Given(told.as_mut_bytes()), 0)?;
        Ok(Device::decode(&told))
    }

    /// Says how a device looks. Only before it is started for the first time.
    ///
    /// # Errors
    /// If the driver can't make one like that.
    pub fn shape(&mut self, device: &Device, shape: &Shape) -> io::Result<()> {
        let said = shape.encode(device.max_request);
        self.run(SET_PARAMETERS, device.id, Bytes::Taken(said.as_bytes()), 0)
    }

    /// The size of a device, in sectors, and whether it is for reading only.
    ///
    /// # Errors
    /// If there is no such device.
    pub fn size(&mut self, id: u32) -> io::Result<(u64, bool)> {
        let mut told = Parameters::room();
        self.run(GET_PARAMETERS, id, Bytes::Given(told.as_mut_bytes()), 0)?;
        Ok((told.sectors, told.is_read_only()))
    }

    /// Lets a device be used. Returns when its [`Queue`](crate::Queue) has fetched, and has answered what the kernel reads of a new disk.
    ///
    /// # Errors
    /// If the queue is gone, or the kernel has no room.
    pub fn start(&mut self, id: u32) -> io::Result<()> {
        self.run(START, id, Bytes::None, std::process::id().into())
    }

    /// Begins to take over a device whose server is gone. Its queue can be opened after this.
    ///
    /// # Errors
    /// `ResourceBusy` as long as the kernel isn't done with the old server, or it is still there.
    pub fn start_recovery(&mut self, id: u32) -> io::Result<()> {
        self.run(START_RECOVERY, id, Bytes::None, 0)
    }

    /// Lets a device be used again, and hands over again the requests that its old server didn't answer. Returns when the queue has
    /// fetched.
    ///
    /// # Errors
    /// If the device has gone meanwhile.
    pub fn end_recovery(&mut self, id: u32) -> io::Result<()> {
        self.run(END_RECOVERY, id, Bytes::None, std::process::id().into())
    }

    /// Takes a device away from those who use it. Returns when all that they asked for is answered, so the queue must still be served.
    ///
    /// # Errors
    /// If there is no such device.
    pub fn stop(&mut self, id: u32) -> io::Result<()> {
        self.run(STOP, id, Bytes::None, 0)
    }

    /// Forgets a device. Returns when its server's side is closed and the id is free.
    ///
    /// # Errors
    /// If there is no such device.
    pub fn delete(&mut self, id: u32) -> io::Result<()> {
        self.run(DELETE, id, Bytes::None, 0)
    }

    fn run(&mut self, command: u32, id: u32, bytes: Bytes<'_>, number: u64) -> io::Result<()> {
        let place = match bytes {
            Bytes::None => (0, 0),
            Bytes::Taken(bytes) => (bytes.as_ptr() as u64, bytes.len() as u16),
            Bytes::Given(bytes) => (bytes.as_mut_ptr() as u64, bytes.len() as u16),
        };
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), command)
            .cmd(ControlCommand::encode(id, place, number))
            .build();
        // SAFETY: the descriptor and the bytes outlive the wait below; the driver writes only where `Given` bytes are, as many as were said.
        unsafe { self.ring.submission().push(&entry) }.expect("a ring in which nothing is has room for one");
        loop {
            // Whatever happens, a command that the driver has must be waited for: it might write when the bytes are gone.
            if let Err(error) = self.ring.submit_and_wait(1)
                && !self.ring.submission().is_empty()
                && error.kind() != io::ErrorKind::Interrupted
            {
                self.ring = IoUring::builder().build(1)?;
                return Err(error);
            }
            if let Some(done) = self.ring.completion().next() {
                return match done.result() {
                    error @ ..0 => Err(io::Error::from_raw_os_error(-error)),
                    _ => Ok(()),
                };
            }
        }
    }
}
