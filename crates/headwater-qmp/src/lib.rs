//! The language of QEMU's storage daemon as a codec: bytes in, bytes out, no I/O and no clock.
//!
//! - [`json`]: values as they arrive, and as they are sent. [`message`]: greeting, requests, responses, events.
//! - [`keyval`]: the syntax of options on a command line.
//! - [`schema`]: which commands and types there are; checks arguments and options, and tells clients about itself.
//! - [`error`]: why something is refused.

#![forbid(unsafe_code)]

pub mod error;
pub mod json;
pub mod keyval;
pub mod message;
pub mod schema;

pub use error::{ErrorClass, QmpError};
