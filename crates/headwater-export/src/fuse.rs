//! A disk as a regular file: FUSE, mounted over a file that exists.
//!
//! A request's way through the modules:
//!
//! - `mount` puts the file system in place, by itself or through `fusermount3`, and takes it away again.
//! - `serve` takes requests from `headwater-fuse`, a bounded number at a time, and answers them. They come over io_uring where the kernel offers it, or
//!   else through /dev/fuse, for which the disk's thread waits as for a socket.
//! - `handler` carries one out on the disk.
//! - `export` begins all that, and ends it in order.
//!
//! # Rules
//! - A request that was started is driven to its end, whatever becomes of the mount: a change that is dropped half-way would poison the disk.
//! - Reads and writes pass the kernel's cache by (`FOPEN_DIRECT_IO`), so that all clients of a disk see the same bytes, whichever
//!   export they use. Only who maps the file into memory has pages of it.
//! - The disk has its size. Only where the operator allowed it (`growable`) does writing past the end, or truncating, change that.

mod export;
mod handler;
mod mount;
mod serve;

pub use export::{FuseExport, FuseOptions};
pub use mount::{MountOptions, Mounted, mount, unmount};
