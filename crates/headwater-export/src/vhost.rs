//! The vhost-user-blk server: a disk for a virtual machine, by shared memory.
//!
//! A virtual machine monitor (the front end) connects to a Unix socket and hands over its guest's memory and queues. From then on the guest's
//! driver puts requests into memory, and neither the socket nor the monitor is involved.
//!
//! - `server` binds the address and has one client at a time, as QEMU's server does; `connection` drives the client's messages, for which
//!   the `vhost` crate is the codec, and `device` keeps what they say.
//! - `queue` is the task of one running queue. What it finds in the available ring at one wake-up starts together; requests that are done
//!   together are published together, with one notification.
//! - `chain` walks and checks what the guest's driver wrote, `guest` copies from and to its memory, and `handler` carries one request out
//!   on the disk of the moment.
//! - `config` is the configuration space that the guest's driver reads; `inflight` the record of what has been taken and not answered, which
//!   the front end keeps for us in case we die.
//!
//! # Rules
//! - **Everything runs on the disk's thread.** Kicks are eventfds that its event loop watches, and the socket is read only when a whole message
//!   is there, so that nothing ever waits in a system call.
//! - **Guest memory is hostile.** It is read once, into memory of ours, and checked afterwards. Addresses are only used through `vm-memory`,
//!   which checks them. A queue whose rings are nonsense is stopped and told of; the other queues and exports go on.
//! - **What the front end says can end its own connection, nothing else.** It is trusted not to cut off the memory that it shares: where
//!   the kernel lets us, the memory is sealed against that.
//! - **A request that was started is driven to its end**, also when the client is gone. The next client is let in after that.
//! - **What the guest was told is durable is durable.** A driver that can't flush gets every change written through.

mod chain;
mod config;
mod connection;
mod device;
mod guest;
mod handler;
mod inflight;
mod queue;
mod server;

pub use config::{BlkOptions, LogicalBlock, MAX_QUEUES};
pub use server::{BlkExport, VhostUserBlk};
