//! Files and block devices: the file engine, which talks to the kernel, and the file node, which is a disk's lowest layer.
//!
//! - `engine`: one per disk thread, shared by all its files. Owns every buffer in flight; submits and reaps in batches.
//!   Behind it, `ring` (io_uring) and `threads` (a few workers, for where io_uring is forbidden) do the same requests, which `op`
//!   describes and `syscalls` performs.
//! - `node`: a [`headwater_block::Node`] over one file: any alignment in, the file's alignment out. `zeroes`: zeroes without data.
//! - `open`: how a file is opened, and what O_DIRECT asks of requests. `lock`: the image locks that QEMU understands, too;
//! - `flush`: durability, and why a failed flush is final. `holes`: what lseek said lately about which ranges are holes. `identity`: whether it is still
//!   the same file.
//!
//! `unsafe` stays in `ring`, `threads`, `syscalls`, `lock` and the one call in `engine` that starts an operation.

mod cached;
mod engine;
mod flush;
mod holes;
mod identity;
mod lock;
mod node;
mod op;
mod open;
mod ring;
mod syscalls;
#[cfg(test)]
mod testing;
mod threads;
mod zeroes;

pub use engine::{Engine, EngineKind, IoMode};
pub use lock::Use;
pub use node::FileNode;
pub use open::{Cache, Demand, Discard, FileOptions, Locking};
