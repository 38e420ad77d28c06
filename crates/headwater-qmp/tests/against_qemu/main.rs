//! The crate compared with the installed `qemu-storage-daemon`.
//!
//! No request here gets beyond QEMU's own checks: each is wrong somewhere, or only asks for the version.

mod daemon;
mod introspection;
mod options;
mod requests;
mod streams;
