//! TLS for those who serve and for those who connect, with the certificates in a directory as QEMU has them.
//!
//! - [`TlsCredentials`]: what one side proves itself with and what it demands of the other; from it come streams.
//! - [`PlainSocket`]: what a stream is started on.
//! - `files`: the directory. `verify`: a client that takes any server.
//!
//! TLS is rustls, versions 1.2 and 1.3. What QEMU's TLS library does and rustls doesn't is refused by name, where it is configured:
//! pre-shared keys and anonymous sessions ([`CredentialsKind`]).

#![forbid(unsafe_code)]

mod credentials;
mod files;
mod plain;
mod verify;

pub use credentials::{CredentialsKind, Endpoint, TlsCredentials, TlsOptions};
pub use plain::PlainSocket;
pub use tokio_rustls::TlsStream;
