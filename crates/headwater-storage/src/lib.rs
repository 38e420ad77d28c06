//! headwater's storage: the lowest nodes of a disk, where its bytes are. Knows no image format.
//!
//! - [`mod@file`]: files and block devices, through io_uring or threads.
//! - [`file_system`]: how much room there is where a file lies.
//! - [`nbd`]: exports of NBD servers.
//! - [`http`]: files behind HTTP servers that answer Range requests.
//! - [`cache_dir`]: a directory for what was read of remote sources.
//! - [`object`]: objects in S3, Google Cloud Storage and Azure.
//! - `dial`: connecting to a host that has several addresses.
//! - `retry`: how long a request is tried by storage itself.
//! - [`workers`]: threads for what would keep a disk's thread from its requests.
//! - [`open`]: which of these a name leads to.

pub mod cache_dir;
mod dial;
pub mod file;
pub mod file_system;
pub mod http;
pub mod nbd;
pub mod object;
pub mod open;
mod pace;
mod retry;
pub mod workers;
