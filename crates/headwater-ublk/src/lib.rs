//! The server's side of Linux's ublk driver: block devices whose requests a program answers.
//!
//! - [`Control`] adds, starts and removes devices. Its commands block.
//! - [`Queue`] is where a device's requests arrive and are answered. It never blocks.
//! - [`DataPort`] moves a request's bytes.
//!
//! What the driver wants is in the kernel's `include/uapi/linux/ublk_cmd.h` and `Documentation/block/ublk.rst`. Used is what there is since
//! Linux 6.5: commands encoded as ioctls, and bytes that move by reading and writing the device of the server's side
//! (`UBLK_F_USER_COPY`), so that the kernel never reaches into this process's memory by itself. That needs CAP_SYS_ADMIN.
//!
//! A device has one queue here: one thread serves it, and more would be answered by the same.

mod abi;
mod control;
mod data;
mod descriptors;
mod queue;

pub use abi::{Device, Operation, Request, SECTOR, Shape, State};
pub use control::Control;
pub use data::DataPort;
pub use queue::{Arrived, Queue};
