//! The qcow2 format, versions 2 and 3.
//!
//! Codecs, without I/O: [`header`] and [`extensions`] (the first cluster), [`entry`] (offsets and table entries).
//! [`create`] makes new images, [`check`] checks and repairs them.

pub mod check;
pub mod create;
pub mod entry;
pub mod extensions;
pub mod header;
