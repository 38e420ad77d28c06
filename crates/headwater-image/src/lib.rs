//! headwater-image: what the bytes of a file mean as a disk.
//!
//! - [`open`]: opens a disk by name, with everything below it. [`open_gate`] decides which names found inside an image it may follow;
//!   [`probe`] finds out which format a file has.
//! - [`raw`] and [`qcow2`]: the formats, each a [`headwater_block::Node`] over the node of its file.
//! - [`info`]: what there is to tell about an image and its chain.
//!
//! This crate does no I/O of its own but for looking at path names: bytes come from nodes that [`open::ProtocolOpener`] hands in.

pub mod info;
pub mod open;
pub mod open_gate;
pub mod probe;
pub mod qcow2;
pub mod raw;

pub use open::{OpenOptions, OpenedImage, ProtocolOpener, ProtocolOptions, open_image};
pub use open_gate::Trust;
pub use probe::Format;
