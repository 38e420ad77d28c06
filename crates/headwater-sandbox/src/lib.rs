//! What a process that reads hostile bytes gives up. One that works alone and knows what it will write is [confined](confine()). For the daemon
//! there are two processes instead of one, so that the one that reads hostile bytes can reach nothing but what the operator named.
//!
//! [`split()`] makes two of a process that has one thread. The original is the **data plane**: it executes QMP, reads images, talks to NBD
//! clients and servers. [`DataPlane::lock_down`] takes everything from it that it doesn't need, for good. The copy is the **broker**: it
//! holds the monitors, so that it hears what the operator says before the data plane does, and opens files for the data plane.
//!
//! - **Landlock** with no rule at all: no file opens, by whatever system call (io_uring's too), no TCP socket is bound or connected, no
//!   process outside is signalled or traced, no abstract socket outside reached.
//! - **seccomp** with a list of what may be called ([`profile`]): a list of what is known to be needed fails closed when the kernel grows
//!   new calls, one of what is known to be bad doesn't. No program is executed, no process started, no ring set up.
//! - **The way to files** is a third answer of seccomp: calls that name something (open, connect, bind, unlink, rename, mount) stop, and the kernel
//!   hands them to the broker, which reads the name, decides ([`Grants`]), makes the call itself on its own copy of the arguments, and puts
//!   the descriptor or the error into the caller's hands. So no code of the data plane knows of the sandbox, the C library's look-up of host
//!   names included; and nothing that the data plane does to its memory meanwhile changes what was decided.
//!
//! The broker never lets a stopped call go on by itself: between the decision and the call its arguments could change.
//!
//! The data plane keeps the number that the user knows, and all locks of images; killing it releases them at once. The broker dies with
//! it ([`split()`]), and the data plane learns by its end of [`DataPlane::life`] if the broker is gone.

mod broker;
mod call;
mod confine;
mod grants;
mod memory;
mod mount;
mod packet;
mod profile;
mod split;
mod sys;

pub use broker::Names;
pub use confine::confine;
pub use grants::{Grants, Named, Word, new_name};
pub use packet::{receive_packet, send_packet};
pub use split::{Broker, DataPlane, Side, Unavailable, split};
