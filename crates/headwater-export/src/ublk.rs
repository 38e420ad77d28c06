//! The disk as a block device of this machine, through Linux's ublk driver.
//!
//! [`Ublk`] is the device, from the first command to the driver to the last. `serve` takes its requests, `handler` carries one out. Everything
//! but the commands happens on the disk's thread: the driver's ring is waited for there like a socket.

mod device;
mod handler;
mod serve;

pub use device::{Ublk, UblkOptions};
