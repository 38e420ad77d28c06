//! The headwater command as a library: the tests' and the demonstration's way to the code that the command runs.
//!
//! - [`cli`]: one module for each verb; arguments in, exit code out.
//! - [`stream`]: a stream from start to end; [`session`] is the disk that it works on, [`overlay`] how that disk is made or found again,
//!   [`exports`] where it is served, [`address`] how such a place is written.
//! - [`boot`]: a stream with a virtual machine on it.
//! - [`opener`]: from names to nodes: joins the storage that can be reached with the image formats.
//! - [`daemon`]: the storage daemon, with QEMU's command line and QMP.
//! - [`durable`]: what is written down so that a job outlives the process.
//! - [`progress`], [`display`]: what a stream says of itself; [`control`]: what it can be told.
//! - [`demo`]: the whole at work on a source made for the occasion.
//! - `confine`: what verbs give up before they look at an image.
//! - [`runtime`], [`size`], [`source`], [`output`], [`picture`], [`shell`], [`failure`]: what they share.

pub mod address;
pub mod boot;
pub mod boot_trace;
pub mod cli;
mod confine;
pub mod control;
pub mod daemon;
pub mod demo;
pub mod digest;
pub mod display;
pub mod durable;
pub mod exports;
pub mod failure;
pub mod guest_latency;
pub mod inherited;
pub mod kept_sources;
pub mod mirrors;
pub mod opener;
pub mod output;
pub mod overlay;
pub mod picture;
pub mod progress;
pub mod receipt;
pub mod room;
pub mod runtime;
pub mod session;
pub mod shell;
pub mod size;
pub mod source;
pub mod stream;
