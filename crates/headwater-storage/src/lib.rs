//! headwater's storage: the lowest nodes of a disk, where its bytes are. Knows no image format.
//!
//! - [`mod@file`]: files and block devices, through io_uring or threads.
//! - [`nbd`]: exports of NBD servers.
//! - [`http`]: files behind HTTP servers that answer Range requests.
//! - [`open`]: which of these a name leads to.

pub mod file;
pub mod http;
pub mod nbd;
pub mod open;
