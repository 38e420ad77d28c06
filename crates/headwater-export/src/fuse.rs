//! A disk as a regular file: FUSE, mounted over a file that exists.
//!
//! A request's way through the modules:
//!
//! - `mount` puts the file system in place, by itself or through `fusermount3`, and takes it away again.
//! - `frontend` runs on a thread of the `fuser` crate, which reads requests from the kernel. It hands them to the disk's thread.
//! - `export` takes them there, a bounded number at a time, and ends the export in order.
//! - `handler` carries one out, and answers the kernel from the disk's thread.
//!
//! # Rules
//! - A request that was started is driven to its end, whatever becomes of the mount: a change that is dropped half-way would poison the disk.
//! - Reads and writes pass the kernel's cache by ([`fuser::FopenFlags::FOPEN_DIRECT_IO`]), so that all clients of a disk see the same bytes, whichever
//!   export they use. Only who maps the file into memory has pages of it.
//! - The disk has its size. Only where the operator allowed it (`growable`) does writing past the end, or truncating, change that.

mod export;
mod frontend;
mod handler;
mod mount;

pub use export::{FuseExport, FuseOptions};
pub use mount::{MountOptions, Mounted, mount, unmount};
