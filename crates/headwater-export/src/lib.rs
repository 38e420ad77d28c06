//! How clients reach a disk: each module turns one protocol's requests into calls of [`headwater_block::disk::Disk`].
//!
//! - [`nbd`]: the NBD server.
//! - [`fuse`]: the disk as a regular file.
//! - [`vhost`]: the vhost-user-blk server, for virtual machines.
//! - [`ublk`]: the disk as a block device of this machine.
//!
//! What they share: [`Listen`] is where clients can connect, [`Removal`] how an export goes.
//!
//! An export belongs to the thread of its disks: nothing here is `Send`, and everything runs on a tokio `current_thread`
//! runtime inside a `LocalSet`, or on a `LocalRuntime`, which wakes its tasks with fewer system calls.

#![forbid(unsafe_code)]

mod blocking;
pub mod fuse;
mod kick;
mod listener;
pub mod nbd;
mod removal;
mod stop;
pub mod ublk;
pub mod vhost;

pub use listener::Listen;
pub use removal::{Removal, Removed};
