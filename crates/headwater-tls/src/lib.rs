//! TLS for those who serve and for those who connect, with credentials as QEMU has them: certificates in a directory, or a file of keys.
//!
//! - [`TlsCredentials`]: what one side proves itself with and what it demands of the other; from it come [`TlsStream`]s.
//! - [`PlainSocket`]: what a stream is started on.
//! - `x509`: sessions that certificates are the way to, by rustls, versions 1.2 and 1.3. `files`: the directory. `verify`: a client that
//!   takes any server.
//! - `psk`: sessions that a key of both is the way to, by s2n, version 1.3.
//!
//! Everything above sees one stream: what reads and writes like a socket, and keeps what was written until it is flushed.

#![forbid(unsafe_code)]

mod credentials;
mod files;
mod plain;
mod psk;
mod stream;
mod verify;
mod x509;

pub use credentials::{Endpoint, TlsCredentials, TlsOptions};
pub use plain::PlainSocket;
pub use stream::TlsStream;
