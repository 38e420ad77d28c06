//! The server's side of Linux's FUSE protocol, for a file system that is one file.
//!
//! A [`Connection`] is what a mount has at its other end: [`Connection::poll`] gives the kernel's requests, [`Connection::answer`] takes the
//! answers. It never blocks, and belongs to one thread. Requests come in one of two ways, and for those who carry them out there is no
//! difference:
//!
//! - `device`: read from and written to /dev/fuse. What the kernel says by the way comes like that always.
//! - `ring`: over io_uring, where the kernel offers it (Linux 6.14, with the parameter `enable_uring` of the module `fuse`).
//!
//! What both carry is in `request` and `answer`, which do no I/O; `init` is the exchange that both begin with. Layouts are in `abi`, as the
//! kernel's `include/uapi/linux/fuse.h` has them; Linux's `Documentation/filesystems/fuse/fuse-io-uring.rst` tells of the ring.

mod abi;
mod answer;
mod connection;
mod device;
mod init;
mod memory;
mod processors;
mod request;
mod ring;

pub use answer::{Answer, Attributes, Space};
pub use connection::{Arrived, Connection, Options, Ticket};
pub use request::{NewAttributes, Operation, SeekTo};
pub use rustix::io::Errno;
