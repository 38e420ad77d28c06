//! The qcow2 format, versions 2 and 3.
//!
//! Codecs, without I/O: [`header`] and [`extensions`] (the first cluster), [`entry`] (offsets and table entries).
//!
//! An open image is a [`node::Qcow2Node`], whose state is `image::Image`:
//! - `map` finds where bytes are, from `tables` (in memory) and `cache` (slices of L2 tables and refcount blocks); `read` and
//!   `compressed` fetch them.
//! - `compress` writes compressed clusters (`codec` makes them small), to where `pack` says.
//! - `write` and `zero_discard` change the mapping in memory, with `l2_table` and the allocator (`alloc`, `refcount`).
//! - `meta_writer` brings changed metadata to the disk in an order that survives power cuts (docs/on-disk.md); `backing_link` and `resize`
//!   change the header.
//! - `events` tells the file what is about to happen, if it injects faults.
//! - `snapshot` takes and deletes internal snapshots, of which [`snapshots`] is the table.
//!
//! [`create`] makes new images, [`check`] checks and repairs them.

mod alloc;
mod backing_link;
mod cache;
pub mod check;
mod codec;
mod compress;
mod compressed;
pub mod create;
pub mod entry;
mod events;
pub mod extensions;
pub mod header;
mod image;
mod l2_table;
mod map;
mod meta_writer;
pub mod node;
mod pack;
mod read;
mod refcount;
mod resize;
mod shared;
mod snapshot;
pub mod snapshots;
mod tables;
mod write;
mod zero_discard;

#[cfg(test)]
mod tests;

pub use node::{Children, Qcow2Node, Qcow2Options};
